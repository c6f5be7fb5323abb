"""Wrong changes of the CUDA kernels, which the tests compile for the host."""

from . import Change, changes

ROWS = "tests/cuda/test_row_loss_on_host.py"
ORDERS = "tests/benchmarks/test_row_kernel.py"
SOME = f"{ROWS}::test_matches_truth {ROWS}::test_wide_rows"
WARPS = "tests/cuda/test_warp_rows_on_host.py"
CALL = "tests/cuda/test_one_call_on_host.py"
FEATURE_CALLS = "tests/cuda/test_feature_calls_on_host.py"
ACCURACY = "tests/cuda/test_row_loss_accuracy.py"
SUMS = "tests/cuda/test_batch_sums_on_host.py"
BUDGET = "tests/cuda/test_instruction_budget.py"
OTHERS = "tests/cuda/test_other_ops_on_host.py"
RACES = "tests/cuda/test_races.py::test_no_races tests/cuda/test_races.py::test_no_races_with_delays"
TABLE = "tests/cuda/test_launch_table.py"
DIVERGENCES = "tests/cuda/test_divergences_on_host.py"
CELLS = f"{DIVERGENCES}::test_every_divergence_temperature_and_weighting"

CHANGES = (
    *changes(
        "csrc/cuda/row_loss/group.cuh",
        RACES,
        Change("one inbox instead of two", "int(exchange & 1) * blocks() + rank", "rank"),
        Change(
            "lanes beyond the end of the row have its last vector",
            "(first + (end - begin - 1) * kWarp >= columns.vectors ? 1 : 0)",
            "0",
            equivalent="slower: there they have -inf, which adds nothing, and store nothing",
        ),
        Change(
            "every lane lacks the last vector of its warp",
            "(first + (end - begin - 1) * kWarp >= columns.vectors ? 1 : 0)",
            "1",
            tests=SOME,
        ),
        Change(
            "the label's column is looked for in one lane only",
            "return distance % kWarp == 0 ? distance / kWarp : -1;",
            "return distance == 0 ? 0 : -1;",
            tests=SOME,
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/label_statistics.cuh",
        SOME,
        Change("sums of the first block only", "rank < group_.blocks(); ++rank", "rank < 1; ++rank"),
        Change("sums of the first warp only", "if (warp < group_.warps()) sum +=", "if (warp < 1) sum +="),
        Change(
            "no sums at T = 1",
            "if (P == 1) {",
            "if (false) {",
            tests=f"{ROWS}::test_every_weighting_and_temperature",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/fixed_k_passes.cuh",
        SOME,
        Change(
            "the cross term of slots with -inf is dropped",
            "if (marked) add_masked_cross<T, K>(buffer, chunk, marked, scale, at, sums);",
            "",
            tests=f"{ROWS}::test_masked_columns {SOME}",
        ),
        Change(
            "probability 0 times infinity",
            "if (e > 0) cross = fmaf(e, z - s, cross);",
            "cross = fmaf(e, z - s, cross);",
            equivalent="slower: the row's cross term is NaN, and the general passes sum it up once more",
        ),
        Change(
            "an instruction more per column of the sums",
            "const float e = exp2_fast(z[j]), distance = z[j] - s[j];",
            "const float e = exp2_fast(z[j]) * at[0], distance = z[j] - s[j];",
            tests=BUDGET,
        ),
        Change(
            "an instruction more per column of the gradient",
            "out[j] = fmaf(row.student1 * q, q, row.studentT * e);",
            "out[j] = fmaf(row.student1 * q * row.at[K], q, row.studentT * e);",
            tests=BUDGET,
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/minibatch.cuh",
        SOME,
        Change(
            "the divisor is not counted by one cluster",
            "here ? inverse_of(count_labels(args, 0, args.N)) :",
            "here ? 1.0f / args.N :",
            tests=f"{ROWS}::test_means_of_narrow_rows",
        ),
    ),
    *changes(
        "csrc/cuda/batch_mean.cuh",
        SOME,
        Change(
            "the divisor of a number of items is counted",
            "args.grad_scale * (args.batch.counts ? factor : 1.0f) *",
            "args.grad_scale * factor *",
            tests=f"{CALL}::test_every_reduction {CALL}::test_divisors_and_scales",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/pipeline.cuh",
        f"{ROWS}::test_long_pipelines",
        Change(
            "every block records a row",
            "if (n % group_.blocks() == group_rank()) results_",
            "results_",
            tests=f"{SUMS}::test_long_pipelines",
        ),
        Change(
            "a row that is out of range is not summed up again",
            "statistics_.merge(exchange_, r);\n                results_.compute_weights",
            "results_.compute_weights",
        ),
        Change(
            "sums do not wait for the copies of their row",
            "const bool more = written + rows() > summed + 1;",
            "const bool more = true;",
            tests=ORDERS,
        ),
        Change(
            "a row's copies belong to the group before",
            "write(written, even, part, again);\n                copies_end_group();",
            "write(written, even, part, again);",
            tests=ORDERS,
        ),
        Change(
            "the next row is not that of the same place",
            "&next = info(n + rows());",
            "&next = info(n + kRowsInPipeline);",
            tests=ORDERS,
        ),
        Change(
            "prepared rows are those of the next group",
            "group_id() + int64_t(number)",
            "group_id() + 1 + int64_t(number)",
        ),
        Change("the last row of a group is left out", "(after + groups - 1) / groups", "after / groups"),
        Change(
            "both labels are the first one",
            "second.logits[1][lane] = load_element(address, labels.second",
            "second.logits[1][lane] = load_element(address, labels.first",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/kernel.cuh",
        SOME,
        Change(
            "no barrier before the weights are read",
            "if (group_.is_merging_warp()) merge(infos[r], r);\n            group_.barrier();",
            "if (group_.is_merging_warp()) merge(infos[r], r);",
            tests=RACES,
        ),
        Change(
            "rows out of range keep their sums",
            "if (infos[r].kept && group_.rows()[r].out_of_range) use_maxima(infos[r], r);",
            ";",
            tests=f"{ACCURACY}::test_labels_far_from_the_maximum",
        ),
        Change(
            "the last chunk is taken for the first",
            "if (group_.chunks() > 1) group_.fetch_chunk(info, group_.chunk_of(info, r, 0));",
            "",
            tests=f"{ACCURACY}::test_labels_far_from_the_maximum",
        ),
        Change(
            "no barrier before the sums relative to the maxima are merged",
            "statistics_.sum_up(info, r);\n        group_.barrier();",
            "statistics_.sum_up(info, r);",
            tests=RACES,
        ),
        Change(
            "stride of the look-ahead",
            "fetch_labels(first + int64_t(group_.launch.groups) * rows);",
            "fetch_labels(first + int64_t(group_.launch.groups));",
            tests=f"{ROWS}::test_several_rows_per_warp",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/warp_rows.cuh",
        WARPS,
        Change(
            "a warp's second row in the buffers of the first",
            "return buffer_ + (row_ % 2 ? -packs : packs);",
            "return buffer_;",
        ),
        Change("the label of the row that is fetched", "column_ = next_column_;", "column_ = fetched;"),
        Change("copies of a warp's first row are not waited for", "copies_wait_but_last_group();", ";"),
        Change("sums of the last narrow row", "batch_sum_ += number;", "batch_sum_ = number;", tests=SUMS),
        Change(
            "rows of the general passes are left out of the sums",
            "if (role_.adds_up()) batch_sum_ = group_.batch_sums()[role_.row()];",
            "",
            tests=SUMS,
        ),
        Change(
            "narrow rows out of range keep their sums",
            "if (far || !Results::in_range(sums.total, sums.total_cross)) return;",
            "",
        ),
        Change("ignored narrow rows keep what was there", "rows_.write_zeros(row_);", ";"),
        Change(
            "no barrier before the logits at the label are read",
            "copies_wait();\n            warp_barrier();",
            "copies_wait();",
            tests=RACES,
        ),
        Change(
            "no barrier before the sums are read",
            "shared[role_.sum()] = mine;\n            warp_barrier();",
            "shared[role_.sum()] = mine;",
            tests=RACES,
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/shared_sums.cuh",
        WARPS,
        Change(
            "sums at T = 1 of narrow rows with the rounding of their references",
            "mass = sum * temperature.raise(factor);",
            "mass = sum;",
        ),
        Change("the label's probability with that rounding", "inverse * reciprocal(factor)", "inverse"),
    ),
    *changes(
        "csrc/cuda/exponentials.cuh",
        f"{ACCURACY}::test_nearly_certain_rows",
        Change("nearly certain rows with the rounding of the power", "if (power == 4) own *= own;", "own = 1;"),
        Change(
            "nearly certain rows with the rounding of the label's own exponential",
            "return fmaf(others, raise(factor), 1.0f);",
            "return sum1 * raise(factor);",
        ),
        Change(
            "nearly certain rows of the general passes with the rounding of the power",
            "return power ? raise(of_max)",
            "return power ? 1.0f",
            tests=f"{ACCURACY}::test_nearly_certain_rows_in_the_general_passes",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/passes.cuh",
        f"{ACCURACY}::test_nearly_certain_rows_in_the_general_passes",
        Change(
            "nearly certain rows with the rounding of the maximum's own exponential",
            "if (AnyRow && state.max != -INFINITY)",
            "if (false)",
        ),
        Change(
            "rows without a finite logit have a sum", "if (AnyRow && state.max != -INFINITY)", "if (AnyRow)", tests=ROWS
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/even_rows.cuh",
        WARPS,
        Change("rows of two dimensions are taken for one", "args.N > args.S || ", ""),
        Change(
            "aligned stores of narrow rows into an unaligned gradient",
            "!launch.even || (args.grad_student && !launch.wide_out)",
            "!launch.even",
        ),
        Change(
            "second labels are not seen",
            " || args.second.target) return false;",
            ") return false;",
            tests=f"{ROWS}::test_rows_of_one_label_among_two",
        ),
        Change("every stream has the student's stride", "uint32_t(stream.stride_inner)", "uint32_t(group_.launch.C)"),
        Change(
            "addresses of rows in 64 bits",
            "return uint64_t(uint32_t(row) * uint32_t(sizeof(T))) * stride;",
            "return row * int64_t(sizeof(T)) * stride;",
            tests=BUDGET,
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/group_memory.cuh",
        f"{SOME} {ROWS}::test_wide_rows",
        Change("messages of any exchange", "uint32_t(found[i] >> 32) == exchange", "true"),
        Change("words of one lane", "first += several * kWarp) {", "first = count) {"),
    ),
    *changes(
        "csrc/cuda/row_loss/exchange.cuh",
        f"{SOME} {ROWS}::test_wide_rows",
        Change(
            "exchanges of a cooperative group counted from 0 in every launch",
            "count_ = read_device",
            "(void)read_device",
        ),
        Change(
            "one box for two exchanges",
            "group_id() * 2 + int(exchange & 1)",
            "group_id() * 2",
            tests=f"{ROWS}::test_a_block_that_lags_behind_its_cooperative_group",
        ),
        Change("one box for all groups", "group_id() * 2 + int(exchange & 1)", "int(exchange & 1)"),
        Change("own messages only", "group_rank() * stride + i, group_word", "i, group_word"),
    ),
    *changes(
        "csrc/cuda/row_loss/results.cuh",
        SOME,
        Change(
            "a soft loss of weight 0 reads the teachers",
            "args.formula.soft_weight == 0 ? 0.0f : coefficient",
            "coefficient",
            tests="tests/cuda/test_divergences_on_host.py::test_a_soft_loss_of_weight_0_reads_no_teacher",
        ),
        Change(
            "its student reads them too",
            "args.formula.soft_weight == 0 ? 0.0f : soft_scale() * total / sumT",
            "soft_scale() * total / sumT",
            tests="tests/cuda/test_divergences_on_host.py::test_a_soft_loss_of_weight_0_reads_no_teacher",
        ),
        Change(
            "weights by the reference instead of both labels",
            "masses[k] *= std::exp(second.below(logits.at[k], k));",
            "",
            tests=f"{ROWS}::test_two_labels",
        ),
        Change(
            "an infinite cross-entropy of two labels on the fast path",
            "total_sums += mix_masses(info, logits, masses);",
            "mix_masses(info, logits, masses);",
            tests=f"{ROWS}::test_a_masked_label_of_two_is_infinite",
        ),
        Change(
            "the second label's gradient with the share of the first",
            "gradient_at(second.logits[1], 1.0f - second.share,",
            "gradient_at(second.logits[1], second.share,",
            tests=f"{ROWS}::test_two_labels",
        ),
        Change(
            "strides of given weights",
            "args.weights[k * args.weight_stride_k + row * args.weight_stride_n]",
            "args.weights[k * args.weight_stride_k + row]",
            tests=f"{ROWS}::test_every_weighting_and_temperature {ROWS}::test_given_weights_of_any_strides",
        ),
        Change(
            "fast path with a teacher of infinite sums",
            "!(in_range(total_sums, total_cross) && info.near)",
            "!info.near",
            tests=f"{ROWS}::test_given_weight_of_zero_silences_a_teacher {ACCURACY}",
        ),
        Change(
            "sums at T = 1 with the rounding of their references",
            "masses[k] = sums.of[label_sum(k, kSum1)] * temperature.raise(factors[k]);",
            "masses[k] = sums.of[label_sum(k, kSum1)];",
            tests=f"{ROWS}::test_large_offsets_do_not_cancel",
        ),
        Change(
            "the gradient at the label with the rounding of the references",
            "at_label - inverse_k * reciprocal(factors[k + 1])",
            "at_label - inverse_k",
            tests=f"{ROWS}::test_student_equal_to_teachers",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/gradient.cuh",
        f"{ROWS}::test_two_labels",
        Change(
            "no second label in the gradient",
            "if (info.second_vector >= 0)\n                store_at",
            "if (false)\n                store_at",
        ),
        Change(
            "the first label has a share of 1 in the general gradient",
            "group_.has_two_labels(info) ? group_.second(info).share : 1.0f",
            "1.0f",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/kernel.cuh",
        f"{ROWS}::test_two_labels {ACCURACY}::test_two_labels_far_from_the_maximum",
        Change(
            "the first label is the reference",
            "logit = fmaxf(logit, second.logits[1][group_.lane()]);",
            "",
            tests=f"{ACCURACY}::test_cross_entropies_of_two_labels_do_not_cancel",
        ),
        Change(
            "the second label in the first one's column",
            "info.second_vector = other / V;",
            "info.second_vector = info.label_vector;",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/gradient.cuh",
        f"{SOME} {ROWS}::test_ignored_rows_are_zero_whatever_they_contain",
        Change(
            "ignored rows keep what was there", "store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);", ";"
        ),
        Change(
            "vectors outside the next row are copied",
            "whole.end < other.end ? whole.end : other.end",
            "whole.end",
            tests=f"{ROWS}::test_several_rows_per_warp",
        ),
        Change(
            "aligned stores into an unaligned gradient",
            "if (!group_.launch.wide_out) columns.whole = 0;",
            "",
            tests=f"{ROWS}::test_gradient_aligned_unlike_the_logits",
        ),
        Change("copies are not waited for", "copies_wait();", ""),
    ),
    *changes(
        "csrc/cuda/batch_mean.cuh",
        f"{CALL}::test_every_reduction {CALL}::test_the_numbers_of_a_batch_do_not_depend_on_how_its_blocks_meet",
        Change("counters keep their numbers", "counters->counted = 0;", ""),
        Change(
            "the arrival is not counted",
            "(1ull << kCountBits) + (unsigned long long)(mine)",
            "(unsigned long long)(mine)",
            equivalent="slower: every block waits in vain and counts all labels itself",
        ),
        Change("an arrival counts twice", "(1ull << kCountBits) + (", "(2ull << kCountBits) + ("),
        Change("labels of the first block only", "first = block_id() * labels_per_block, left", "first = 0, left"),
        Change(
            "the last block counts as many labels as others",
            "left < labels_per_block ? left : labels_per_block",
            "labels_per_block",
        ),
        Change(
            "one label for all",
            "return all < 0 ? count_labels(args, 0, args.N) : all;",
            "return all < 0 ? 1.0f : all;",
        ),
        Change(
            "every block adds up the rows",
            "if (!last_block(&counters->finished)) return;",
            "last_block(&counters->finished);",
            tests=RACES,
        ),
        Change("sums of one warp", "for (int p = 0; p < parts; ++p)", "for (int p = 0; p < 1; ++p)"),
    ),
    *changes(
        "csrc/cuda/row_loss/results.cuh",
        f"{CALL}::test_every_reduction {CALL}::test_results_have_memory_of_their_own",
        Change(
            "sums of the last row",
            "group_.batch_sums()[group_.lane()] += number;",
            "group_.batch_sums()[group_.lane()] = number;",
        ),
        Change("losses of hard", "args.batch.losses[info.row] = loss;", "args.batch.losses[info.row] = hard;"),
    ),
    *changes(
        "csrc/python/cuda_calls.cpp",
        CALL,
        Change(
            "a scale of rows is that of the first",
            "args.factor_stride = factor.shape[0] == 1 ? 0 : 1;",
            "args.factor_stride = 0;",
        ),
        Change(
            "num_items is left out of the gradient",
            "float(call.divisor.inverse * call.scale.number)",
            "float(call.scale.number)",
        ),
        Change("a scale on the device is 1", "args.grad_scale_device = call.scale.address;", ""),
        Change("columns in memory are not asked for", "|| !is_contiguous(*tensor))", ")"),
    ),
    *changes(
        "csrc/python/feature_functions.h",
        FEATURE_CALLS,
        Change("the number of samples on the device is 1", "scale.address = confidence.inverse_valid;", ""),
        Change(
            "num_items is not the divisor",
            "divisor.inverse_of(valid) : divisor.inverse)",
            "divisor.inverse_of(valid) : 1)",
        ),
    ),
    *changes(
        "csrc/python/cuda_features.cpp",
        FEATURE_CALLS,
        Change("factors on the device are 1", "address = factor.address;", ""),
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
        Change("gradient without the label", "if (j == at) x[j] -= share;", ""),
        Change(
            "no copy of the weights",
            "if (args.weights_copy) args.weights_copy[k * args.N + n] = weight;",
            "",
            tests=FEATURE_CALLS,
        ),
        Change("phase of the label", "label + columns.phase - int64_t(v) * V", "label - int64_t(v) * V"),
        Change("no second label", "if (labels.second >= 0) subtract(", "if (false) subtract(", tests=OTHERS),
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
        Change("every block adds up", "launch.arrivals && last_block(launch.arrivals)", "launch.arrivals", tests=RACES),
    ),
    *changes(
        "csrc/cuda/scale_rows.cuh",
        f"{OTHERS} {RACES}",
        Change(
            "a factor of 1 writes",
            "&& args.factor[0] * args.number == 1.0f) return",
            "&& args.factor[0] * args.number == -1.0f) return",
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
        SUMS,
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
            "any geometry for a trial",
            "if (!trial.admits(warps, slots)) continue;",
            "",
            tests="tests/benchmarks/test_row_kernel.py",
        ),
        Change(
            "clusters that are no power of two",
            "while (g.blocks_per_group & (g.blocks_per_group - 1)) ++g.blocks_per_group;",
            "",
            tests=f"{TABLE} {ROWS}::test_means_of_narrow_rows",
        ),
    ),
    *changes(
        "csrc/cuda/any_formula/passes.cuh",
        CELLS,
        Change(
            "the cross sum of the reverse KL is moved like the forward one's",
            "if (formula.divergence == Divergence::reverse_kl)\n        move_reverse(",
            "if (false)\n        move_reverse(",
        ),
        Change(
            "a cross sum stays when only the student's maximum rises",
            "if (max > teacher.max || student.max != before.max)",
            "if (max > teacher.max)",
        ),
        Change("the divergence of padding is 0 times infinity", "if (forward && e_z > 0)", "if (forward)"),
        Change("the gradient of skew lacks a factor", "-of_q * p_ratio", "-p_ratio"),
        Change(
            "terms of jsd and skew that cancel",
            "fmaf(ratio, log, 1.0f - ratio)",
            "ratio * log",
            tests=f"{DIVERGENCES}::test_nearly_certain_rows",
        ),
        Change("the label has all of the one-hot label", "hard -= at_label * labels.share;", "hard -= at_label;"),
        Change("the gradient lacks the slope of the softcap", "x[j] *= curve.slope(from[j]);", "x[j] *= curve.scale;"),
        Change(
            "a teacher of weight 0 counts",
            "if (row.coefficients.teacher[k - 1] == 0) continue;",
            "",
            tests=f"{DIVERGENCES}::test_terms_of_weight_0_contribute_nothing",
        ),
        Change(
            "the soft gradient of a column without probability is 0 times infinity",
            "e[j] == 0 ? 0.0f : studentT * e[j] * x[j]",
            "studentT * e[j] * x[j]",
            tests=f"{DIVERGENCES}::test_columns_without_probability",
        ),
    ),
    *changes(
        "csrc/cuda/any_formula/reader.cuh",
        CELLS,
        Change(
            "padding has a logit under a softcap",
            "if (!curve.capped() || whole_vector(columns_, v)) return;",
            "return;",
        ),
        Change(
            "the slope of a softcap lacks the scale", "return scale * inverse * inverse;", "return inverse * inverse;"
        ),
    ),
    *changes(
        "csrc/cuda/any_formula/kernel.cuh",
        CELLS,
        Change("a row has the sums of its first warp", "++w) sum += warps()", "w += kWarp) sum += warps()"),
        Change(
            "given weights of the first row",
            "group_.member * args.weight_stride_k + n * args.weight_stride_n",
            "group_.member * args.weight_stride_k",
        ),
        Change(
            "a row begins before the one before it has ended",
            "group_.barrier();  // all have read before the next row overwrites",
            "",
            tests=RACES,
        ),
    ),
    *changes(
        "csrc/row_math.h",
        f"{DIVERGENCES}::test_entropies",
        Change(
            "the student's entropy is moved the wrong way",
            "factor * (student.plogp - shift * student.sumT)",
            "factor * (student.plogp + shift * student.sumT)",
        ),
    ),
)
