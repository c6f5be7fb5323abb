"""Wrong changes of the Triton kernels, which the tests run under Triton's interpreter."""

from . import Change, changes

TRITON = "tests/backends/test_triton.py"
TRUTH = f"{TRITON}::test_matches_truth"
BOTH = f"{TRITON}::test_every_weighting_both_regimes {TRITON}::test_number_of_teachers"
EDGES = (
    f"{TRITON}::test_masked_columns {TRITON}::test_blocks_masked_with_infinity_and_with_the_lowest_number"
    f" {TRITON}::test_infinite_cross_entropies {TRITON}::test_certain_teachers"
)
ONE_OF_TWO = f"{TRITON}::test_rows_of_one_label_among_two"
INVALID = f"{TRITON}::test_invalid_second_labels_are_nan"
MEMORY = "tests/backends/test_memory_access.py"
BEYOND = "tests/backends/test_triton_divergences.py"
OPTIONS = f"{BEYOND}::test_all_options_at_once"
MAPS = f"{BEYOND}::test_a_softcap_near_0_and_far_beyond_it {BEYOND}::test_scales_without_a_softcap {OPTIONS}"

CHANGES = (
    *changes(
        "camkd_fast/kernels/softmax.py",
        EDGES,
        Change(
            "rows beyond the last are kept",
            "kept = in_range & (y != ignore_index)",
            "kept = y != ignore_index",
            tests=MEMORY,
        ),
        Change("an underflowing decay times infinity", "tl.where(decay > 0, value * decay, 0.0)", "value * decay"),
        Change(
            "maximum of a masked row",
            'return tl.where(top == float("-inf"), 0.0, top)',
            "return top",
            equivalent="the results of a row of only -inf are NaN either way, as in the reference; rows beyond the last are not stored",
        ),
        Change("infinite scores subtracted", "tl.where(score == top, 1.0, tl.exp(score - top))", "tl.exp(score - top)"),
        Change(
            "confidence weights not divided by K - 1", "weight = weight / (K - 1)", "weight = weight / K", tests=BOTH
        ),
        Change(
            "label C is valid",
            "valid = (y >= 0) & (y < C)",
            "valid = (y >= 0) & (y <= C)",
            tests=f"{TRITON}::test_labels_out_of_range_give_nan_rows",
        ),
        Change(
            "every lowest cross-entropy has weight 1",
            "left -= weight",
            "left -= 0.0",
            tests=f"{BEYOND}::test_lowest_cross_entropies",
        ),
        Change("invalid shares", " & (share >= 0) & (share <= 1)", "", tests=INVALID),
        Change("the ignored label as a second one", " & (second != ignore_index)", "", tests=INVALID),
        Change("a share of 0 keeps the first label", "y = tl.where(share == 0, second, y)", "pass", tests=ONE_OF_TWO),
        Change(
            "twice the same label rounds", "one = (share == 0) | (second == y)", "one = share == 0", tests=ONE_OF_TWO
        ),
        Change(
            "the second label has the share of the first",
            "tl.where(cols == second, 1 - share, 0.0)",
            "tl.where(cols == second, share, 0.0)",
            tests=f"{TRITON}::test_two_labels",
        ),
        Change(
            "second labels of ignored rows are read",
            "second = tl.load(second_target + n, mask=kept, other=0)",
            "second = tl.load(second_target + n)",
            tests=MEMORY,
        ),
        Change(
            "inner row stride",
            "(n % S) * stride_inner",
            "(n % S) * stride_outer",
            tests=f"{TRITON}::test_two_row_strides",
        ),
    ),
    *changes(
        "camkd_fast/kernels/results.py",
        BOTH,
        Change(
            "soft loss of weight 0 has a gradient",
            "tl.where(formula.soft_weight == 0, 0.0, soft_part)",
            "soft_part",
            tests=f"{BEYOND}::test_masked_columns",
        ),
        Change(
            "soft loss without the square of T", "(formula.temperature * formula.temperature)", "formula.temperature"
        ),
        Change(
            "gradient without T",
            "formula.soft_weight * formula.temperature * soft_part",
            "formula.soft_weight * soft_part",
        ),
        Change(
            "one teacher has entropy weight 0",
            'return "uniform" if K == 1 and name in ("confidence", "entropy") else name',
            'return "uniform" if K == 1 and name == "confidence" else name',
            tests=TRUTH,
        ),
        Change(
            "the z-loss has no gradient",
            "        gradient += 2.0 * formula",
            "        gradient += 0.0 * formula",
            tests=OPTIONS,
        ),
        Change(
            "soft loss always with T^2",
            "    if SCALE_BY_T2:\n        soft",
            "    if True:\n        soft",
            tests=OPTIONS,
        ),
        Change("entropies without T", "plogp / (sumT * formula.temperature)", "plogp / sumT", tests=OPTIONS),
        Change(
            "scales without a softcap are no map",
            "any(of.softcap or of.scale != 1.0 for of in maps)",
            "any(of.softcap for of in maps)",
            tests=f"{BEYOND}::test_scales_without_a_softcap",
        ),
        Change(
            "statistics of ignored rows",
            "tl.where(kept, value, 0.0)",
            "value",
            tests=f"{TRITON}::test_ignored_rows_are_zero_whatever_they_contain",
        ),
    ),
    *changes(
        "camkd_fast/kernels/row_loss_onchip.py",
        BOTH,
        Change("mixture not rescaled to the new top", "mixed = mixed * decay[:, None] +", "mixed = mixed +"),
        Change(
            "columns beyond the row",
            "tile = in_range[:, None] & (cols < C)[None, :]",
            "tile = in_range[:, None] & (cols <= C)[None, :]",
            tests=f"{TRITON}::test_reductions {MEMORY}",
        ),
        Change(
            "probability 0 times infinity",
            "cross = tl.sum(tl.where(e > 0, e * (z - s), 0.0), axis=1)",
            "cross = tl.sum(e * (z - s), axis=1)",
            tests=EDGES,
        ),
        Change(
            "min_ce mixes the last of equal ones",
            "(ce < lowest)[:, None]",
            "(ce <= lowest)[:, None]",
            tests=f"{BEYOND}::test_lowest_cross_entropies",
        ),
        Change("the entropy of teachers", "tl.where(e_s > 0, e_s * s, 0.0)", "e_s * 0.0", tests=OPTIONS),
        Change(
            "row stride of given weights",
            "k * stride_wk + n * stride_wn, mask",
            "k * stride_wk + n, mask",
            tests=f"{TRITON}::test_given_weights_of_any_strides",
        ),
    ),
    *changes(
        "camkd_fast/kernels/lanes.py",
        BOTH,
        Change(
            "cross terms keep the student's old maximum",
            "(drop - s_drop), decay) + tl.sum(tl.where(e > 0",
            "drop, decay) + tl.sum(tl.where(e > 0",
        ),
        Change(
            "reverse cross terms keep the teacher's old maximum",
            "(s_drop - drop), s_decay) + tl.sum(",
            "s_drop, s_decay) + tl.sum(",
            tests=f"{BEYOND}::test_every_weighting",
        ),
        Change(
            "reverse cross terms of a block after its own sums",
            "lane_rescale(cross + s_sumT * (s_drop - drop), s_decay) + tl.sum(",
            "lane_rescale(cross + (s_sumT * s_decay + tl.sum(e_s, axis=1)) * (s_drop - drop), s_decay) + tl.sum(",
            tests=f"{BEYOND}::test_every_weighting",
        ),
        Change(
            "lanes of the reverse KL not moved to the row's maxima",
            "cross = tl.sum(lane_rescale(cross + s_sumT * (s_drop - drop), s_decay), axis=0)",
            "cross = tl.sum(lane_rescale(cross, s_decay), axis=0)",
            tests=f"{BEYOND}::test_every_weighting",
        ),
        Change(
            "the second group of teachers mixes with the maxima of the first",
            "z = in_lanes(z, R, VEC, ALIGN) - z_top[k]",
            "z = in_lanes(z, R, VEC, ALIGN) - z_top[k - first]",
            tests=f"{BEYOND}::test_every_weighting",
        ),
    ),
    *changes(
        "camkd_fast/kernels/divergences.py",
        BEYOND,
        Change("distances of columns without probability", "return tl.where(e_s > 0, s - z, 0.0)", "return s - z"),
        Change("the mixture has equal shares", "m = formula.mixture_share * p", "m = formula.mixture_other * p"),
        Change("jsd without the student's part", "p_excess + formula.mixture_other * q_excess", "p_excess"),
        Change(
            "the slope of skew has the other sign",
            "p_excess, -formula.mixture_other",
            "p_excess, formula.mixture_other",
        ),
        Change(
            "a NaN teacher drops out of a mixture",
            "tl.where(m < LEAST, LEAST, m)",
            "tl.where(m >= LEAST, m, LEAST)",
            tests=f"{BEYOND}::test_teachers_of_nan",
        ),
        Change(
            "terms of jsd and skew that cancel",
            "x * log_x + (1.0 - x)",
            "x * log_x",
            tests="tests/losses/test_divergences.py::test_nearly_certain_rows",
        ),
        Change("without the center", "x - center[:, None], 0.0)", "x, 0.0)"),
        Change(
            "an infinite reverse KL spoils all teachers",
            "(center - center == 0)[:, None]",
            "(center == center)[:, None]",
            tests=f"{BEYOND}::test_an_infinite_divergence_of_a_teacher_that_weighs_0",
        ),
        Change(
            "an infinite gradient is finite",
            "tl.where(weights[k] == 0, 0.0, centers[k] - centers[k])",
            "0.0",
            tests=f"{BEYOND}::test_masked_columns",
        ),
        Change("the reverse KL's gradient without T", "mixed = mixed * (1.0 / formula.temperature)", "pass"),
    ),
    *changes(
        "camkd_fast/kernels/logit_map.py",
        MAPS,
        Change("tanh cancels near 0", "large = magnitude > 0.625", "large = magnitude >= 0.0"),
        Change(
            "the derivative of tanh cancels",
            "tl.where(large, 4.0 * t * inverse * inverse, 1.0 - small * small)",
            "1.0 - tl.where(large, (1.0 - t) * inverse, small) * tl.where(large, (1.0 - t) * inverse, small)",
        ),
        Change(
            "a softcap makes columns beyond the row finite",
            'return tl.where(mask, z, float("-inf"))',
            "return z",
        ),
        Change(
            "labels are not mapped",
            "return mapped(first, maps, k, MAPS), mapped(second, maps, k, MAPS)",
            "return first, second",
        ),
        Change("the gradient by the logits", "return gradient * maps[0].inner\n", "return gradient\n"),
    ),
    *changes(
        "camkd_fast/kernels/row_loss_streaming.py",
        BOTH,
        Change(
            "the last block of columns is not written",
            "blocks = tl.cdiv(C, BLOCK_C)\n        for i in range(blocks)",
            "blocks = C // BLOCK_C\n        for i in range(blocks)",
        ),
        Change(
            "ignored rows are read",
            "limit_units = tl.where(kept, C_units, 0)",
            "limit_units = C_units",
            equivalent="a cost only: statistics and gradient of ignored rows are replaced by 0 where they are stored",
        ),
    ),
    *changes(
        "camkd_fast/kernels/launcher.py",
        "tests/backends/test_triton_launch.py",
        Change("one kernel for all dtypes", "            kinds.append(pointer.dtype)\n", ""),
        Change("one kernel for all alignments", "address % 16 == 0 if", "True if"),
        Change("the alignment is that of 8 bytes", "address % 16 == 0 if", "address % 8 == 0 if"),
        Change("one kernel for None and for numbers", "            kinds.append(type(pointer))\n", ""),
        Change("one kernel for all devices", "kinds: list[object] = [device]", "kinds: list[object] = []"),
        Change("integers of 64 bits are passed as 32", "(-(2**31) <= number < 2**31, -", "(True, -"),
        Change("strides of 1 are like others", "(*width, number == 1, number % 16 == 0)", "(*width, number % 16 == 0)"),
        Change("pointers to the host are kept", " and _ELSEWHERE not in key", ""),
        Change("hooks see the first launch only", "kernel is None or _observed(self._kernel)", "kernel is None"),
        Change("another device's stream", "current_stream(device)", "current_stream(0)"),
        Change(
            "constants in the order of the caller",
            "tuple(constants[name] for name in names)",
            "tuple(constants.values())",
        ),
        Change("no guard for another device", "elif device == current_device():", "elif device >= 0:"),
    ),
    *changes(
        "camkd_fast/kernels/confidence.py",
        f"{TRITON}::test_confidence {TRITON}::test_confidence_edges",
        Change("lanes not rescaled", "sums = sums * tl.exp2(drop * LOG2E) + tl.sum", "sums = sums + tl.sum"),
        Change("log-sum-exp without its maximum", "tl.where(kept, log_sum + top, 0.0)", "tl.where(kept, log_sum, 0.0)"),
        Change("row stride of the incoming gradient", "n * stride_gn, mask=in_range", "n, mask=in_range"),
        Change(
            "rows beyond the last of the gradient",
            "tile = in_range[:, None] & (cols < C)[None, :]",
            "tile = (cols < C)[None, :]",
            tests=MEMORY,
        ),
    ),
    *changes(
        "camkd_fast/kernels/features.py",
        f"{TRITON}::test_features {TRITON}::test_feature_layouts {TRITON}::test_feature_loss_module",
        Change("one stride for both", "teacher[k] + n * stride(stride_tn[k])", "teacher[k] + n * stride(stride_sn[k])"),
        Change("the student's order for both", "p * stride_tp + q * stride_tq", "p * stride_sp + q * stride_sq"),
        Change(
            "a coefficient of 0 multiplies NaN",
            "tl.where(coefficient == 0, 0.0, coefficient * difference)",
            "coefficient * difference",
        ),
        Change("all samples count", "total += tl.where(weight == 0, 0.0, weight * mean)", "total += mean"),
    ),
    *changes(
        "camkd_fast/kernels/batch_mean.py",
        f"{TRITON}::test_means {TRITON}::test_launches_of_a_mean",
        Change("all rows counted", "(n < N) & (y != ignore_index)", "n < N"),
        Change("no row at all divides by 0", "tl.maximum(tl.sum(kept, axis=0), 1)", "tl.sum(kept, axis=0)"),
        Change(
            "scale on the device ignored",
            "scale = tl.load(grad_scale)",
            "scale = 1.0",
            tests=f"{TRITON}::test_scaled_gradient_and_no_gradient",
        ),
        Change("the counter keeps its number", "        tl.store(counter, 0)\n", ""),
        Change(
            "a program before the last adds up", "ended == tl.num_programs(0) - 1:", "ended == tl.num_programs(0) // 2:"
        ),
        Change("a count before the rows is not used", "factor = tl.load(others + 2)\n", "factor = 1.0\n"),
        Change("the gradient is not divided by an own count", "BLOCK_B)\n        scale *= factor", "BLOCK_B)"),
        Change("soft is hard", "row_stats + 2 * tl.cast(N, tl.int64)", "row_stats + tl.cast(N, tl.int64)"),
    ),
    *changes(
        "camkd_fast/kernels/row_loss.py",
        f"{TRITON}::test_sums_of_rows {TRITON}::test_sums_in_the_launch_of_the_rows",
        Change("sums are left to the caller", "ADDS_UP=total and batch.ADDS_UP", "ADDS_UP=False"),
        Change("sums are not scaled", "float(total_scale)", "1.0"),
    ),
    *changes(
        "camkd_fast/kernels/counters.py",
        "tests/backends/test_triton_launch.py",
        Change("streams share a counter", "stream = current_stream(device) if device >= 0 else 0", "stream = 0"),
        Change(
            "devices share a counter", "_of_streams.get((device, stream))", "next(iter(_of_streams.values()), None)"
        ),
        Change("threads share a counter", "stream == _PER_THREAD or ", ""),
        Change("recorded launches share a counter", "torch.cuda.is_current_stream_capturing()", "False"),
        Change("another device's stream is asked", "device != current_device()", "device < 0"),
    ),
    *changes(
        "camkd_fast/kernels/min_norm.py",
        "tests/train/test_min_norm.py::test_the_kernel_agrees_with_the_operations",
        Change("the cap is ignored", "high = CAP - low", "high = one - low"),
        Change(
            "rows below the pivot only", "tl.where(here, 0.0, column / pivot)", "tl.where(i <= p, 0.0, column / pivot)"
        ),
        Change(
            "padding takes part in the sum of the weights",
            "step, unit = tl.where(inside, pull, 0.0), tl.where(inside, one, zero)",
            "step, unit = pull, one",
        ),
    ),
    *changes(
        "camkd_fast/kernels/scale.py",
        f"{TRITON}::test_scale_rows {TRITON}::test_a_factor_of_1_writes_nothing",
        Change("a factor of 1 writes", "if tl.load(factor) == 1.0:", "if tl.load(factor) != tl.load(factor):"),
        Change("nothing is written elsewhere", "one_factor and in_place)", "one_factor)"),
        Change("first factor for all rows", "tl.load(factor + n * stride_fn", "tl.load(factor + n * 0"),
    ),
    *changes(
        "camkd_fast/kernels/layout.py",
        f"{TRITON}::test_alignments {TRITON}::test_two_row_strides {TRITON}::test_matches_truth",
        Change(
            "row strides do not count for the alignment",
            "numbers += (*_row_strides(tensor), tensor.shape[-1])",
            "numbers += (tensor.shape[-1],)",
            tests=f"{TRITON}::test_row_strides_that_are_less_aligned_than_the_width",
        ),
    ),
)
