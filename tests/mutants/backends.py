"""Wrong changes of camkd_fast/backends, the reference included: its truth is tests/support/truth.py."""

from . import Change, changes

DISPATCH = "tests/backends/test_dispatch.py"
FORMULAS = "tests/losses/test_formulas.py"
FEATURES = "tests/losses/test_feature_loss.py"
DIVERGENCES = "tests/losses/test_divergences.py"

CHANGES = (
    *changes(
        "camkd_fast/backends/divergences.py",
        f"{DIVERGENCES} {FORMULAS}",
        Change(
            "KL the wrong way round", "return _expected_ratio(log_p, log_q)", "return _expected_ratio(log_q, log_p)"
        ),
        Change("the reverse KL's slope has the other sign", "g = log_q - log_p", "g = log_p - log_q"),
        Change("skew without the student's share", "g = -(1.0 - mixture_share) * (log_p", "g = -(log_p"),
        Change("columns without probability", "return q, g.masked_fill(q == 0, 0.0)", "return q, g"),
        Change("an infinite reverse KL", 'center.masked_fill(center.isinf(), float("nan"))', "center"),
        Change(
            "the mixture's shares exchanged",
            "log_p + math.log(mixture_share), log_q + math.log1p(-mixture_share)",
            "log_q + math.log(mixture_share), log_p + math.log1p(-mixture_share)",
        ),
    ),
    *changes(
        "camkd_fast/backends/feature_maps.py",
        "tests/backends/test_feature_maps.py",
        Change("the teacher's strides are not asked", "and merged[-1][2] == size * t:", "and True:"),
        Change(
            "gaps between samples", "return (sample_size(student), *student.stride()[1:])", "return student.stride()"
        ),
        Change(
            "gradients without room between them", "return -(-elements // _ALIGNMENT) * _ALIGNMENT", "return elements"
        ),
    ),
    *changes(
        "camkd_fast/backends/labels.py",
        "tests/losses/test_two_labels.py tests/losses/test_bad_input.py tests/backends/test_contract.py",
        Change("label C counts", "valid = (first >= 0) & (first < C)", "valid = (first >= 0) & (first <= C)"),
        Change("a second label of C counts", "(other >= 0) & (other < C)", "(other >= 0) & (other <= C)"),
        Change("a NaN share counts", "(mix >= 0) & (mix <= 1)", "~((mix < 0) | (mix > 1))"),
        Change("the ignored label as a second one", "valid = valid & (ignored | (other != ignore_index))", "pass"),
        Change("infinite logits at a label without a share", ".masked_fill(share == 0, 0.0)", ""),
        Change("twice the same label rounds", "mix = mix.masked_fill(first == other, 1.0)", "pass"),
        Change("one-hot of the first label only", "mine * at_first + other * at_second", "mine * at_first"),
        Change("shares the wrong way round", "(mix, 1 - mix))", "(1 - mix, mix))"),
    ),
    *changes(
        "camkd_fast/backends/reference.py",
        f"{FORMULAS} tests/losses/test_autograd.py::test_gradcheck_in_float64",
        Change(
            "soft loss without the square of T",
            "soft = temperature**2 * soft",
            "soft = temperature * soft",
        ),
        Change(
            "ignored rows times infinity",
            ".masked_fill(wide == 0, 0.0)",
            "",
            tests="tests/losses/test_formulas.py::test_ignored_rows_are_zero_whatever_comes_in",
        ),
        Change(
            "the gradient of weights at terms that count for nothing",
            "scaled(_counted(rows.weights, rows.divergence), ",
            "scaled(rows.divergence, ",
            tests="tests/losses/test_infinities.py",
        ),
        Change(
            "the gradient of weights without a soft loss",
            "if formula.soft_weight == 0.0:\n        return torch.zeros_like",
            "if False:\n        return torch.zeros_like",
            tests="tests/losses/test_infinities.py",
        ),
        Change("gradient without T", "out = formula.soft_grad_scale() * _soft", "out = formula.soft_weight * _soft"),
        Change("entropy weights of the whole batch", "total = entropy.sum(0, keepdim=True)", "total = entropy.sum()"),
        Change(
            "infinite cross-entropies are not shared",
            'gap.masked_fill(top.isposinf() & ~infinite, float("-inf")).softmax(0)',
            "gap.softmax(0)",
            tests="tests/losses/test_infinities.py",
        ),
        Change(
            "weights follow only their own cross-entropy",
            "return grad_ce - sigma * (grad_weights - mean) / (K - 1)",
            "return grad_ce - sigma * grad_weights / (K - 1)",
            tests=FEATURES,
        ),
        Change(
            "mean over all rows",
            "valid = (target != formula.ignore_index).sum().clamp(min=1)",
            "valid = torch.tensor(target.numel())",
            tests="tests/losses/test_device_mean.py tests/backends/test_contract.py",
        ),
        Change(
            "mean error over the batch",
            "errors.append((r.to(dtype) - f.to(dtype)).square().flatten(1).mean(-1))",
            "errors.append((r.to(dtype) - f.to(dtype)).square().flatten(1).sum(-1))",
            tests=FEATURES,
        ),
        Change(
            "z-loss without its gradient",
            "out = out + 2.0 * formula.z_loss_weight",
            "out = out + 0.0 * formula.z_loss_weight",
            tests=DIVERGENCES,
        ),
        Change(
            "the map of the first teacher for all",
            "formula.teacher_map(k), s.dtype) / T",
            "formula.teacher_map(0), s.dtype) / T",
            tests=DIVERGENCES,
        ),
        Change(
            "the first of the lowest and all equal ones",
            "lowest & (lowest.cumsum(0) == 1)",
            "lowest",
            tests=DIVERGENCES,
        ),
        Change(
            "weights of bfloat16 students in bfloat16",
            "return torch.float64 if dtype == torch.float64 else torch.float32",
            "return torch.float32",
            tests="tests/losses/test_autograd.py",
        ),
    ),
    *changes(
        "camkd_fast/backends/cpu.py",
        f"{FORMULAS} {FEATURES}",
        Change(
            "factor of rows as one factor",
            "0 if factor.numel() == 1 else 1,\n        torch.get_num_threads()",
            "0,\n        torch.get_num_threads()",
        ),
        Change(
            "strided factors",
            "factor = factor.contiguous()",
            "pass",
            tests="tests/losses/test_layout.py tests/losses/test_autograd.py",
        ),
        Change(
            "strided incoming gradients of the confidence weights",
            "lse, grad_ce = lse.contiguous(), grad_ce.contiguous()",
            "lse = lse.contiguous()",
            tests="tests/backends/test_cpu_functions.py",
        ),
        Change(
            "strided log-sum-exps on a CPU",
            "lse, grad_ce = lse.contiguous(), grad_ce.contiguous()",
            "grad_ce = grad_ce.contiguous()",
            tests="tests/backends/test_cpu_functions.py",
        ),
        Change(
            "strided incoming gradients of the features",
            "N, weights = student[0].shape[0], given_weights(grad_error)",
            "N, weights = student[0].shape[0], (grad_error.data_ptr(), student[0].shape[0], 1)",
            tests="tests/backends/test_cpu_functions.py",
        ),
        Change(
            "recycled memory is not filled when torch fills its own",
            "out.fill_(torch.nan)",
            "pass",
            tests="tests/backends/test_output_memory.py tests/repo/test_tolerance_rule.py",
        ),
        Change(
            "grad scale dropped",
            "scale = float(grad_scale) * inverse",
            "scale = inverse",
            tests=f"{FORMULAS}::test_loss_scale_multiplies_only_the_gradient {FORMULAS}::test_num_items_is_the_divisor",
        ),
    ),
    *changes(
        "camkd_fast/backends/cuda.py",
        "tests/cuda/test_row_loss_on_host.py::test_value_and_grad tests/cuda/test_row_loss_on_host.py::test_means tests/cuda/test_other_ops_on_host.py",
        Change(
            "strided log-sum-exps",
            "lse, grad_ce = lse.contiguous(), grad_ce.contiguous()",
            "lse, grad_ce = lse.contiguous(), grad_ce",
        ),
        Change(
            "PTX of a later architecture",
            "later = number.isdigit() and of < capability",
            "later = number.isdigit() and of > capability",
            tests=DISPATCH,
        ),
    ),
    *changes(
        "camkd_fast/backends/dispatch.py",
        DISPATCH,
        Change(
            "CUDA kernels are always preferred",
            "measured = any(capability == c and fewest <= C <= most",
            "measured = any(True",
        ),
        Change("fewest classes of a measurement", "fewest <= C <= most", "fewest < C <= most"),
        Change(
            "compiled kernels for float64",
            "if tensor.dtype not in COMPILED_DTYPES:\n            return False",
            "if tensor.dtype not in COMPILED_DTYPES:\n            return True",
            tests=f"{DISPATCH} tests/losses/test_autograd.py::test_float64_runs_on_the_reference",
        ),
        Change(
            "dtypes of the first tensor",
            "for tensor in tensors:\n        if tensor.dtype not in COMPILED_DTYPES:\n            return False",
            "for tensor in tensors[:1]:\n        if tensor.dtype not in COMPILED_DTYPES:\n            return False",
            tests=f"{DISPATCH} tests/losses/test_keywords.py",
        ),
        Change(
            "one call for every backend",
            'if name in ("cpu", "cuda") else None',
            "if name else None",
            tests=DISPATCH,
        ),
    ),
)
