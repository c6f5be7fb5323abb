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
    ),
    *changes(
        "csrc/cuda/row_loss/statistics.cuh",
        SOME,
        Change("labels of one rank only", "info.label_member / block_threads() == group_.rank", "group_.rank == 0"),
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
            "no barrier before the weights are read",
            "if (WarpPerRow) results_.write_row_stats(infos[r], r);\n                }\n            }\n            group_.barrier();",
            "if (WarpPerRow) results_.write_row_stats(infos[r], r);\n                }\n            }",
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
    ),
    *changes(
        "csrc/cuda/row_loss/gradient.cuh",
        f"{SOME} {ROWS}::test_ignored_rows_are_zero_whatever_they_contain",
        Change(
            "ignored rows keep what was there", "store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);", ";"
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
    ),
    *changes(
        "csrc/cuda/features.cuh",
        f"{OTHERS} {RACES}",
        Change(
            "feature error without its second barrier",
            "group.barrier();  // all have read before the next item overwrites",
            "",
        ),
        Change(
            "a tile without its second barrier", "warp_barrier();  // all have read before the next tile overwrites", ""
        ),
        Change("the gradient's alignment", "(!part.out || before_boundary<R>(part.out) == r)", "true", tests=OTHERS),
        Change(
            "a coefficient of 0 multiplies NaN",
            "return coefficient == 0 ? 0.0f : coefficient * difference;",
            "return coefficient * difference;",
            tests=OTHERS,
        ),
        Change("parts that do not begin at a step", "unit = dense ? kFeatureStep : 1", "unit = 1", equivalent="slower"),
        Change(
            "the last part only",
            "for (int i = 1; i < launch.parts; ++i) error +=",
            "for (int i = 1; i < launch.parts; ++i) error =",
            tests=OTHERS,
        ),
        Change(
            "errors of parts stay with the parts", "if (launch.parts > 1) args.error[item] = error;", "", tests=OTHERS
        ),
        Change(
            "every block adds up", "launch.arrivals && last_block(launch.arrivals)", "launch.arrivals", tests=OTHERS
        ),
    ),
    *changes(
        "csrc/cuda/scale_rows.cuh",
        f"{OTHERS} {RACES}",
        Change(
            "a factor of 1 writes",
            "&& args.factor[0] == 1.0f) return",
            "&& args.factor[0] == -1.0f) return",
            tests=OTHERS,
        ),
        Change(
            "nothing is written elsewhere",
            "args.factor_stride == 0 && args.out == args.grad &&",
            "args.factor_stride == 0 &&",
            tests=OTHERS,
        ),
        Change("the first row's factor is 1", "args.factor_stride == 0 && args.out", "args.out", tests=OTHERS),
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
    ),
    *changes(
        "csrc/cuda/batch_mean.cuh",
        f"{ROWS}::test_means_of_narrow_rows",
        Change(
            "sum of the first warp",
            "warp < block_threads() / kWarp; ++warp) sum += of_warps[warp];",
            "warp < 1; ++warp) sum += of_warps[warp];",
        ),
    ),
    *changes(
        "csrc/cuda/launch_table.h",
        TABLE,
        Change(
            "clusters that are no power of two",
            "while (g.cluster & (g.cluster - 1)) ++g.cluster;",
            "",
            tests=f"{TABLE} {ROWS}::test_means_of_narrow_rows",
        ),
    ),
)
