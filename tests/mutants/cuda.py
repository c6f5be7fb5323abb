"""Wrong changes of the CUDA kernels, which the tests compile for the host."""

from . import Change, changes

ROWS = "tests/cuda/test_row_loss_on_host.py"
SOME = f"{ROWS}::test_matches_truth {ROWS}::test_wide_rows"
OTHERS = "tests/cuda/test_other_ops_on_host.py"
RACES = "tests/cuda/test_races.py::test_no_races tests/cuda/test_races.py::test_no_races_with_delays"
TABLE = "tests/cuda/test_launch_table.py"

CHANGES = (
    *changes(
        "csrc/cuda/row_loss/group.cuh",
        RACES,
        Change("one inbox instead of two", "exchange % 2 * cluster() + rank", "rank"),
        Change(
            "one inbox for the labels instead of two",
            "shared_memory() + launch.inbox_labels) + exchange % 2 * label_packs()",
            "shared_memory() + launch.inbox_labels)",
        ),
        Change(
            "infos of the next row over those of this row",
            "((WarpPerRow ? 2 * warp() : 0) + parity) * rows_per_group()",
            "(WarpPerRow ? 2 * warp() : 0) * rows_per_group()",
        ),
        Change("label in the next chunk", "info.label_slot - c * launch.geometry.slots", "info.label_slot", tests=SOME),
    ),
    *changes(
        "csrc/cuda/row_loss/statistics.cuh",
        SOME,
        Change("labels of one rank only", "info.label_member / block_threads() == group_.rank", "group_.rank == 0"),
        Change(
            "phase of the mailbox",
            "mailbox_wait(group_.box(exchange), exchange / 2);",
            "mailbox_wait(group_.box(exchange), 0);",
            tests=RACES,
        ),
        Change(
            "message without its barrier",
            "RowSums<float>* const row = group_.rows()[0].sums;\n        warp_barrier();",
            "RowSums<float>* const row = group_.rows()[0].sums;",
            tests=RACES,
        ),
        Change("chunks overwrite the sums", "if (c > 0) add_chunk();", ""),
        Change("entropy lost between blocks", "if (FixedK == 0) state.plogp = bits_to_float(from[1].word[0]);", ""),
    ),
    *changes(
        "csrc/cuda/row_loss/kernel.cuh",
        SOME,
        Change(
            "means over all rows",
            "kept += args.target[n] != args.formula.ignore_index;",
            "++kept;",
            tests=f"{ROWS}::test_means_of_narrow_rows",
        ),
        Change(
            "a row beyond the last",
            "return row < args.N ? args.target[row] : args.formula.ignore_index;",
            "return args.target[row < args.N ? row : args.N - 1];",
        ),
        Change(
            "no barrier before the weights are read",
            "if (WarpPerRow) results_.write_row_stats(infos[r], r);\n                }\n            }\n            group_.barrier();",
            "if (WarpPerRow) results_.write_row_stats(infos[r], r);\n                }\n            }",
            tests=RACES,
        ),
        Change(
            "no barrier before the warps are merged",
            "statistics_.sum_up(infos[r], r);\n            group_.barrier();",
            "statistics_.sum_up(infos[r], r);",
            tests=RACES,
        ),
        Change(
            "means without the cluster's barrier",
            "CAMKD_DEVICE void write_batch_means() {\n        cluster_barrier(true);",
            "CAMKD_DEVICE void write_batch_means() {",
            tests=RACES,
        ),
        Change(
            "stride of the look-ahead",
            "label_of(first + int64_t(group_.launch.groups) * rows + group_.lane())",
            "label_of(first + int64_t(group_.launch.groups) + group_.lane())",
            tests=f"{ROWS}::test_several_rows_per_warp",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/results.cuh",
        SOME,
        Change("confidence weights divided by K", "total * float(K - 1)", "total * float(K)"),
        Change(
            "soft coefficient without T",
            "args.formula.soft_weight * args.formula.temperature * scale",
            "args.formula.soft_weight * scale",
        ),
        Change(
            "row of the cross-entropies",
            "stats[row_stats::teacher_ce(K, k) * args.N] = ce;",
            "stats[row_stats::teacher_ce(K, k) * args.N] = weight;",
        ),
        Change(
            "strides of given weights",
            "args.weights[group_.lane() * args.weight_stride_k + info.row * args.weight_stride_n]",
            "args.weights[group_.lane() * args.weight_stride_k + info.row]",
            tests=f"{ROWS}::test_every_weighting_and_temperature {ROWS}::test_given_weights_of_any_strides",
        ),
        Change(
            "fast path with a teacher of infinite sums",
            "fast = fast && (coefficient != 0 || sumT < INFINITY);",
            "",
            tests=f"{ROWS}::test_given_weight_of_zero_silences_a_teacher",
        ),
        Change(
            "correction of the reference dropped",
            "(soft_scale * total / sumT + label_nan(info)) * reference.factor()",
            "(soft_scale * total / sumT + label_nan(info))",
            tests=f"{ROWS}::test_large_offsets_do_not_cancel",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/gradient.cuh",
        f"{SOME} {ROWS}::test_ignored_rows_are_zero_whatever_they_contain",
        Change(
            "ignored rows keep what was there", "store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);", ";"
        ),
        Change(
            "chunks of an ignored row",
            "for (int v = c * group_.members() + group_.member();",
            "for (int v = group_.member();",
            equivalent="with one chunk nothing changes; with several, each pass writes the same zeros more often than needed",
        ),
        Change("aligned stores into an unaligned gradient", "if (!group_.launch.wide_out) columns.whole = 0;", ""),
        Change("copies are not waited for", "copies_wait();", ""),
    ),
    *changes(
        "csrc/cuda/row_loss/passes.cuh",
        SOME,
        Change(
            "chance of NaN in the cross term", "if (sum != sum) {", "if (false) {", tests=f"{ROWS}::test_masked_columns"
        ),
        Change(
            "the third teacher of a group",
            "constexpr int kTeacherGroup = 3;",
            "constexpr int kTeacherGroup = 2;",
            equivalent="a pass takes two teachers instead of three, with the same sums",
        ),
    ),
    *changes(
        "csrc/cuda/confidence.cuh",
        f"{OTHERS} {RACES}",
        Change(
            "no barrier before the maxima are read",
            "shared.sum[warp] = sum;\n                    }\n                    group.barrier();",
            "shared.sum[warp] = sum;\n                    }",
        ),
        Change(
            "no barrier after the maxima were read",
            "group.barrier();  // all have read before the next teacher overwrites",
            "",
        ),
        Change("gradient without the label", "if (j == at) x[j] -= g;", ""),
        Change(
            "phase of the label", "args.target[n] + columns.phase - int64_t(v) * V", "args.target[n] - int64_t(v) * V"
        ),
        Change("weights of ignored rows", "kept ? shared.weights[k] : 0.0f", "shared.weights[k]"),
    ),
    *changes(
        "csrc/cuda/elementwise.cuh",
        f"{OTHERS} {RACES}",
        Change(
            "feature error without its second barrier",
            "group.barrier();  // all have read before the next item overwrites",
            "",
        ),
        Change(
            "width of the first teacher",
            "args.error[item] = sum / float(launch.M[k]);",
            "args.error[item] = sum / float(launch.M[0]);",
        ),
        Change("factor of the next row", "if (++row < args.N) factor = args.factor[row];", "++row;"),
    ),
    *changes(
        "csrc/cuda/rows.cuh",
        f"{OTHERS}::test_features {OTHERS}::test_confidence",
        Change(
            "one element too many at the end",
            "if (c >= 0 && c < columns.C) store_element",
            "if (c >= 0 && c <= columns.C) store_element",
            tests=f"{OTHERS} {SOME}",
        ),
        Change("the first vector of a shifted row", "const int first = phase ? 1 : 0,", "const int first = 0,"),
    ),
    *changes(
        "csrc/cuda/batch_mean.cu",
        f"{ROWS}::test_means_of_narrow_rows",
        Change(
            "sum of the first warp",
            "warp < block_threads() / kWarp; ++warp) sum += parts[warp];",
            "warp < 1; ++warp) sum += parts[warp];",
        ),
    ),
    *changes(
        "csrc/cuda/launch_table.h",
        TABLE,
        Change(
            "shared memory of one row in flight",
            "int64_t(warp_per_row ? warps * rows : 1) * p.row_bytes",
            "int64_t(warp_per_row ? warps : 1) * p.row_bytes",
            tests=f"{TABLE} {ROWS}::test_several_rows_per_warp",
        ),
        Change(
            "clusters that are no power of two",
            "while (g.cluster & (g.cluster - 1)) ++g.cluster;",
            "",
            tests=f"{TABLE} {ROWS}::test_means_of_narrow_rows",
        ),
    ),
)
