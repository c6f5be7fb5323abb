"""Wrong changes of the compiled module without CUDA: csrc/ but for csrc/cuda/."""

from . import Change, changes

FORMULAS = "tests/losses/test_formulas.py"
INFINITIES = "tests/losses/test_infinities.py"
FEATURES = "tests/losses/test_feature_loss.py"
MEAN = "tests/losses/test_one_call.py tests/losses/test_call_memory.py"
TWO_LABELS = "tests/losses/test_two_labels.py"
DIVERGENCES = "tests/losses/test_divergences.py"
CALLS = "tests/losses/test_feature_calls.py tests/losses/test_call_memory.py tests/losses/test_feature_loss_and_grad.py"
ROWS = (
    f"{FORMULAS}::test_ignored_rows_are_exactly_zero_where_threads_share_a_row"
    f" {FORMULAS}::test_ignored_rows_are_exactly_zero_even_if_nan {FORMULAS}::test_mixed_dtypes"
    f" {FORMULAS}::test_every_weighting_and_temperature tests/losses/test_logit_loss.py"
)

CHANGES = (
    *changes(
        "csrc/row_math.h",
        f"{FORMULAS}::test_every_weighting_and_temperature {INFINITIES} tests/losses/test_logit_loss.py",
        Change(
            "soft loss without the square of T", "scale_by_t2 ? T * T : 1.0f) * soft", "scale_by_t2 ? T : 1.0f) * soft"
        ),
        Change(
            "gradient of the soft term without T",
            "formula.scale_by_t2 ? formula.soft_weight * formula.temperature",
            "formula.scale_by_t2 ? formula.soft_weight",
        ),
        Change("confidence weights divided by K", "sum * Math::set(float(K - 1))", "sum * Math::set(float(K))"),
        Change(
            "a teacher's sums do not follow the student's maximum",
            "teacher.cross -= (shift - student_shift) * teacher.sumT;",
            "teacher.cross -= shift * teacher.sumT;",
        ),
        Change(
            "an underflowing factor times an infinite sum",
            "factorT > 0 ? factorT * teacher.cross : Real(0)",
            "factorT * teacher.cross",
        ),
        Change(
            "an underflowing factor times an overflowing shift",
            "factor1 > 0 ? factor1 * (teacher.plogp - shift * teacher.sum1) : Real(0)",
            "factor1 * (teacher.plogp - shift * teacher.sum1)",
            tests="tests/cuda/test_row_loss_on_host.py::test_blocks_masked_with_infinity_and_with_the_lowest_number"
            " tests/cuda/test_row_loss_on_host.py::test_columns_masked_with_the_lowest_number",
        ),
        Change(
            "no infinity where the weight is 0",
            "return weight * Math::zero_where_zero(term, weight);",
            "return weight * term;",
        ),
        Change("the last of the lowest", "zero, left);", "zero, one);", tests=DIVERGENCES),
        Change("the lowest beside a NaN", "w[k] = weight + nan;", "w[k] = weight;", tests=DIVERGENCES),
        Change(
            "a soft loss of weight 0 reads the teachers",
            "no_soft_term = formula.soft_weight == 0;",
            "no_soft_term = false;",
            tests=DIVERGENCES,
        ),
        Change(
            "the reverse sums do not follow the student",
            "(own - students) * old_student.sumT",
            "own * old_student.sumT",
            tests=DIVERGENCES,
        ),
        Change(
            "z-loss without its gradient", "hard_scale = hard_scale + Math::set(2 *", "Math::set(2 *", tests=DIVERGENCES
        ),
        Change(
            "an infinite reverse KL leaves finite gradients",
            "coefficients.student1 + nan;",
            "coefficients.student1;",
            tests=DIVERGENCES,
        ),
        Change("no soft term, but its infinity", "no_soft_term ? zero : w[k]", "w[k]", tests=DIVERGENCES),
        Change(
            "the reverse KL's gradient without 1 / T",
            "soft_scale * Math::set(1.0f / T) : soft_scale",
            "soft_scale : soft_scale",
            tests=DIVERGENCES,
        ),
        Change(
            "an invalid label with soft_weight 0 has a loss",
            "formula.soft_weight), result.soft) + label_nan",
            "formula.soft_weight), result.soft)",
            tests="tests/backends/test_cpu_functions.py tests/losses/test_bad_input.py",
        ),
    ),
    *changes(
        "csrc/labels.h",
        f"{TWO_LABELS} tests/losses/test_bad_input.py tests/backends/test_contract.py",
        Change("label C is valid", "target < C};", "target <= C};"),
        Change("label C is a valid second label", "second < C && second", "second <= C && second"),
        Change("a share above 1", " && mix <= 1;", ";"),
        Change("a NaN share is valid", "mix >= 0 && mix <= 1;", "!(mix < 0 || mix > 1);"),
        Change("the ignored label as a second one", " && second != ignore_index", ""),
        Change("a share of 0 reads the first label", "labels.first = second;", "labels.second = second;"),
        Change("twice the same label is two", "else if (mix != 1 && second != target)", "else if (mix != 1)"),
        Change(
            "second labels of ignored rows are read",
            "!second.target || target[n] == ignore_index",
            "!second.target",
            equivalent="nothing of an ignored row's labels is used, and their memory is there",
        ),
        Change("shares the wrong way round", "labels.share = mix;", "labels.share = 1.0f - mix;"),
    ),
    *changes(
        "csrc/cpu/row_loss.h",
        ROWS,
        Change(
            "ignored rows not cleared where rows run in parallel",
            "row.clear_grad();\n                    continue;",
            "continue;",
        ),
        Change(
            "scratch of any size is kept",
            "(floats * int64_t(sizeof(float)) <= kKeptScratch ? kept : wide)",
            "kept",
            tests="tests/losses/test_call_memory.py::test_scratch_of_a_wide_row_is_released",
        ),
        Change(
            "ignored rows not cleared where columns run in parallel",
            "if (ignored && args.grad_student) row.clear_grad();",
            "",
        ),
        Change(
            "two states of the threads are not merged",
            "for (int t = 1; !ignored && t < num_threads; ++t)",
            "for (int t = 2; !ignored && t < num_threads; ++t)",
        ),
        Change(
            "two mixtures of the threads are not added",
            "for (int t = 1; t < num_threads; ++t)",
            "for (int t = 2; t < num_threads; ++t)",
            tests=DIVERGENCES,
        ),
        Change(
            "a block lost between the threads",
            "end = blocks * (thread + 1) / num_threads;",
            "end = blocks * (thread + 1) / num_threads - (thread + 1 == num_threads && blocks > 2);",
        ),
        Change(
            "one student scratch for all threads",
            "block(base + row_floats + thread * block_floats);",
            "block(base + row_floats);",
            tests=f"{FORMULAS}::test_threads_that_share_a_row_do_not_disturb_each_other",
        ),
        Change(
            "no barrier before the next row",
            "GradientBlock(row, shared, 0, b).write(block, streaming);\n#pragma omp barrier",
            "GradientBlock(row, shared, 0, b).write(block, streaming);",
            equivalent="all threads meet once more before one of them changes what they share, for the next row",
        ),
        Change(
            "the last group is cut",
            "const int64_t groups = (args.N + group - 1) / group;",
            "const int64_t groups = std::max<int64_t>(1, args.N / group);",
        ),
    ),
    *changes(
        "csrc/cpu/row_passes.h",
        f"{ROWS} {INFINITIES}",
        Change("a masked block is not read again", "if (k == 0 || sums[k].finite()) continue;", "continue;"),
        Change(
            "inner stride ignored",
            "offset[k] = outer * m.stride_outer + inner * m.stride_inner;",
            "offset[k] = outer * m.stride_outer + inner;",
            tests="tests/losses/test_layout.py",
        ),
        Change(
            "a common offset at the second label",
            "logit(k, labels.second) - max)",
            "logit(k, labels.second))",
            tests=TWO_LABELS,
        ),
        Change(
            "the label's logit is not mapped",
            "return args.formula.maps ? mapped(k, x) : x;",
            "return x;",
            tests=DIVERGENCES,
        ),
        Change(
            "a teacher has the student's map",
            "n, map_of(k), block.mapped);",
            "n, map_of(0), block.mapped);",
            tests=DIVERGENCES,
        ),
        Change(
            "the mixture takes another student",
            "scratch.stream(0) + c, probability(0), probability(k)",
            "scratch.stream(0) + c, probability(k), probability(k)",
            tests=DIVERGENCES,
        ),
    ),
    *changes(
        "csrc/cpu/row_gradient.h",
        f"{ROWS} {INFINITIES}",
        Change(
            "gradient of a block without the shift to the row's maximum",
            "term.coefficient *= shift_factor(references[k + 1], rows.streams[k + 1].max[lane], inverseT);",
            ";",
        ),
        Change(
            "label in the first block only",
            "const int64_t y = label - c;",
            "const int64_t y = label;",
        ),
        Change("weight 0 reads a teacher of NaN", "if (coefficient == 0) continue;", ""),
        Change(
            "the second label has the share of the first",
            "write_label(row.labels.second, 1.0f - row.labels.share",
            "write_label(row.labels.second, row.labels.share",
            tests=TWO_LABELS,
        ),
        Change(
            "distances of a block without the shift to the row's maximum",
            "(distances ? shift(k + 1) - shift(0) : 0.0)",
            "0.0",
            tests=DIVERGENCES,
        ),
        Change(
            "the label's soft part is that of the forward KL",
            "return e[y] == 0 ? 0.0f : studentT * e[y] * soft;",
            "return studentT * e[y];",
            tests=DIVERGENCES,
        ),
    ),
    *changes(
        "csrc/cpu/row_divergences.h",
        DIVERGENCES,
        Change("jsd without the teacher's half", "Vec::fma(of_p, term, of_q * excess(", "(of_q * excess("),
        Change(
            "terms of jsd and skew that cancel",
            "Vec::fma(ratio, log, one - ratio)",
            "ratio * log",
            tests=f"{DIVERGENCES}::test_nearly_certain_rows",
        ),
        Change("the slope of jsd without its factor", "g = of_q * log_q;", "g = log_q;"),
        Change("skew's mixture the wrong way round", "Vec::fma(of_p, p, of_q * q)", "Vec::fma(of_q, p, of_p * q)"),
        Change("columns beyond the end are mixed", "first_lanes(n - i)](Vec v)", "first_lanes(W)](Vec v)"),
        Change("the center is left out", "- Vec::set(terms[k].center), soft);", ", soft);"),
        Change("columns without probability", "Vec::zero_where_zero(a * e * soft, e)", "a * e * soft"),
        Change(
            "entropies do not follow the maximum",
            "if (formula.entropy) move_entropy(states[0], maxima[0], inverseT);",
            "",
        ),
        Change("sums over mixtures of the first thread", "center += other.center;", ""),
    ),
    *changes(
        "csrc/cpu/row_maps.h",
        DIVERGENCES,
        Change(
            "tanh from the exponential at 0 too",
            "const Vec is_large = magnitude -",
            "const Vec is_large = Vec::set(2.0f) -",
        ),
        Change(
            "the slope of tanh from the exponential at 0 too",
            "Vec::where_positive(is_large, Vec::set(4.0f) * t * inverse * inverse, Vec::fnma(small, small, one))",
            "Vec::fnma(positive, positive, one)",
            equivalent="it is less accurate far from 0, by less than the tests' tolerance of most inputs",
        ),
        Change("the gradient by the logits is that by x", "return scale * value *", "return value *"),
    ),
    *changes(
        "csrc/cpu/row_lanes.h",
        ROWS,
        Change(
            "given weights of the first row for all",
            "args.weights[k * args.weight_stride_k + (begin + lane) * args.weight_stride_n]",
            "args.weights[k * args.weight_stride_k + lane * args.weight_stride_n]",
        ),
        Change(
            "ignored rows keep their statistics",
            "Vec::bit_and(x, mask), count);\n        };\n        store_row(row_stats::loss",
            "x, count);\n        };\n        store_row(row_stats::loss",
        ),
        Change(
            "hard and soft exchanged",
            "store_row(row_stats::hard, result.hard);",
            "store_row(row_stats::hard, result.soft);",
        ),
    ),
    *changes(
        "csrc/cpu/row_blocks.h",
        f"{FORMULAS}::test_every_weighting_and_temperature {INFINITIES} tests/losses/test_logit_loss.py",
        Change(
            "the overlap is counted twice", "const Vec mask = last_lanes(n - i);", "const Vec mask = last_lanes(W);"
        ),
        Change(
            "streamed gradient starts late",
            "i = W - misaligned;",
            "i = W;",
            tests=f"{FORMULAS}::test_gradients_that_do_not_stay_in_the_cache",
        ),
        Change(
            "infinite sums are finite",
            "return std::isfinite(cross) && std::isfinite(plogp);",
            "return std::isfinite(cross);",
            equivalent="a column of -inf makes both sums NaN: 0 * inf",
        ),
    ),
    *changes(
        "csrc/cpu/vec_math.h",
        "tests/losses/test_logit_loss.py tests/losses/test_formulas.py::test_every_weighting_and_temperature",
        Change(
            "work of one element wakes all threads",
            "elements / kWorkPerThread, 1",
            "elements, 1",
            equivalent="only the number of threads changes: rows and their sums do not depend on it",
        ),
    ),
    *changes(
        "csrc/cpu/confidence.h",
        FEATURES,
        Change(
            "exponentials of the next block without the old maximum",
            "state.sum1 *= shift_factor(state.max, max, 1.0);",
            "",
            tests="tests/backends/test_cpu_functions.py::test_confidence",
        ),
        Change("no one-hot in the gradient", "- Vec::set(scale * share), 1);", ", 1);"),
        Change(
            "no second label in the gradient",
            "    write_label(labels.second, 1.0f - labels.share);\n",
            "",
            tests=TWO_LABELS,
        ),
        Change(
            "the first label only in the cross-entropies",
            "mixed(labels.share, distance(labels.first), distance(labels.second));",
            "distance(labels.first);",
            tests=TWO_LABELS,
        ),
        Change(
            "cross-entropies of ignored rows",
            "store_row(args.ce, k, ce[k]);",
            "store_lanes(args.ce + k * args.N + begin, ce[k], count);",
            equivalent="the lane of an ignored row holds sum 1, maximum 0 and label 0: its cross-entropy is 0 unmasked",
        ),
        Change("gradient of the first teacher's log-sum-exp", "args.lse[k * args.N + n]", "args.lse[n]"),
    ),
    *changes(
        "csrc/cpu/features.h",
        "tests/backends/test_cpu_functions.py",
        Change("feature gradient without the factor 2", "* 2.0f / float(M)", "/ float(M)"),
        Change("a weight of 0 multiplies NaN", "return grad && weight != 0 ?", "return grad ?"),
        Change("the error of a sample that does not count", "weight == 0 && !std::isfinite(error) ?", "false ?"),
        Change(
            "the strides of P alone",
            "from[i * map.stride_p + j * map.stride_q];\n    } else {",
            "from[j + i * width];\n    } else {",
        ),
        Change(
            "stores past the cache at any address",
            "streaming && reinterpret_cast<uintptr_t>(out) % sizeof(Vec) == 0",
            "streaming",
        ),
        Change("the loss without its scale", "float(total * double(args.scale))", "float(total)"),
    ),
    *changes(
        "csrc/cpu/scale_rows.h",
        FEATURES,
        Change(
            "one factor for all rows",
            "args.factor[n * args.factor_stride]",
            "args.factor[0]",
            tests="tests/losses/test_autograd.py tests/losses/test_formulas.py::test_random_grad_output_for_every_reduction",
        ),
        Change(
            "0 times infinity is NaN",
            "return Vec::zero_where_zero(factor * x, x);",
            "return factor * x;",
            tests="tests/losses/test_formulas.py::test_ignored_rows_are_zero_whatever_comes_in",
        ),
    ),
    *changes(
        "csrc/python/arguments.h",
        "tests/losses/test_divergences.py::test_shares_near_the_ends_of_their_range",
        Change("1 minus a share in float32", "float(1 - share)", "1.0f - out.mixture_share"),
    ),
    *changes(
        "csrc/cpu/output_memory.cpp",
        "tests/backends/test_output_memory.py",
        Change(
            "a block that is too small",
            "pages->bytes >= needed && pages->bytes / 2 <= needed",
            "pages->bytes / 2 <= needed",
        ),
    ),
    *changes(
        "csrc/cpu/row_call.h",
        f"{MEAN} tests/losses/test_bad_input.py",
        Change(
            "ignore_index must be a class",
            "if (!labels.kept) continue;",
            "",
        ),
        Change("invalid labels are counted", "if (!labels.valid) return {valid, n};", ""),
    ),
    *changes(
        "csrc/python/logit_loss.cpp",
        f"{MEAN} tests/losses/test_layout.py",
        Change("divided by all rows", "inverse_of(found.valid)", "inverse_of(args.N)"),
        Change(
            "loss scale multiplies the gradient twice",
            "float(inverse * call.scale.on_host());",
            "float(inverse * call.scale.on_host() * call.scale.number);",
            tests=f"{MEAN} {FORMULAS}::test_loss_scale_multiplies_only_the_gradient",
        ),
        Change("all rows are added up", "rows ? call.labels.dimensions : 0", "0"),
    ),
    *changes(
        "csrc/python/logit_call.cpp",
        f"{MEAN} tests/losses/test_layout.py",
        Change("float16 is divided in the kernel", "divisor.reduction == Reduction::mean && !finished", "false"),
        Change(
            "a teacher that requires grad passes",
            "||\n            tensors::requires_grad(teachers_[k]))",
            ")",
            tests=f"{MEAN} tests/losses/test_bad_input.py",
        ),
        Change(
            "gradient under no_grad",
            "(from[grad_enabled] == Py_True && tensors::requires_grad(from[student]))",
            "tensors::requires_grad(from[student])",
        ),
    ),
    *changes(
        "csrc/python/readers.h",
        f"{MEAN} tests/losses/test_layout.py",
        Change("no row, and divided by 0", "valid > 0 ? valid : 1", "valid"),
        Change("a scale on the device is 1", "address ? double(*address) : number", "number"),
    ),
    *changes(
        "csrc/python/readers.cpp",
        f"{MEAN} tests/losses/test_layout.py",
        Change("labels of any strides", "if (tensor.strides[i] != stride && tensor.shape[i] != 1) return false;", ""),
        Change("num_items multiplies", "inverse = 1 / divisor;", "inverse = divisor;"),
        Change("num_items of a sum", "return num_items == Py_None && (reduction", "return (reduction"),
        Change("any reduction is none", '(reduction == Reduction::sum || is("none"))', "true"),
        Change("a scale on another device", "&& out.device == device", ""),
    ),
    *changes(
        "csrc/ops.h",
        CALLS,
        Change("gradient of ignored rows", "if (args.target[n] == args.ignore_index) return 0.0f;", ""),
        Change(
            "the first teacher's softmax",
            "args.weights_copy[k * N + n];\n    return",
            "args.weights_copy[n];\n    return",
        ),
        Change(
            "gradient without its mean",
            "(args.grad_weights[k * N + n] - mean) / others",
            "args.grad_weights[k * N + n] / others",
        ),
        Change("gradient through the weights only", "return direct - softmax", "return -softmax"),
    ),
    *changes(
        "csrc/python/confidence_call.cpp",
        CALLS,
        Change("logits of any shape", "!same_shape(z, logits[0], z.dimensions) ||", ""),
        Change("the last one requires grad or none", "requires_grad = requires_grad ||", "requires_grad ="),
    ),
    *changes(
        "csrc/python/feature_call.cpp",
        CALLS,
        Change("the teacher's strides are not asked for", "&& of_f[count - 1] == size * f.strides[d]", ""),
        Change("any order is dense", "dense = dense && map.strides[sorted.at[i]] == expected;", ""),
        Change("gaps between samples", "contiguous || (dense && d > 0)", "contiguous || dense"),
        Change("teachers may require grad", "if (tensors::requires_grad(teachers_[k])) return false;", ""),
        Change(
            "weights without strides of samples",
            "args.weight_stride_n = weights.strides[1];",
            "args.weight_stride_n = 1;",
        ),
        Change("gradients on top of each other", "for (int i = 0; i < k; ++i)", "for (int i = 1; i < k; ++i)"),
        Change("maps of any dtype", "|| !(r.dtype == student[0].dtype)", ""),
    ),
    *changes(
        "csrc/python/feature_functions.h",
        CALLS,
        Change(
            "float16 gradients without a loss scale",
            "args.student[0].dtype == DType::f16 && (of_maps || of_weights)",
            "false",
        ),
        Change("a retained graph is scaled in place", "from[4] != Py_True", "true"),
        Change(
            "the weights' gradient without the scale",
            "from[1], error, by, scale, false",
            "from[1], error, by, Factor{}, false",
        ),
        Change("weights of other samples", "|| confidence.N != args.N", ""),
        Change("a loss per sample", "divisor.reduction == Reduction::none || !loss_scale", "!loss_scale"),
        Change(
            "a loss without beta",
            "beta * (Target::kCounts ?",
            "(Target::kCounts ?",
        ),
        Change("no copy of the weights", "if (wants_grad) args.weights_copy = args.lse + args.K * args.N;", ""),
        Change("strided gradients of the weights", "|| !is_contiguous(tensor))", ")"),
    ),
    *changes(
        "csrc/python/feature_loss.cpp",
        CALLS,
        Change("labels out of range", "return found.invalid < 0;", "return true;"),
    ),
)
