"""Wrong changes of camkd_fast/losses."""

from . import Change, changes

FORMULAS = "tests/losses/test_formulas.py"
FEATURES = "tests/losses/test_feature_loss.py"
ONE_PASS = "tests/losses/test_feature_loss_and_grad.py"
COMPILE = "tests/losses/test_compile.py"

CHANGES = (
    *changes(
        "camkd_fast/losses/logit.py",
        "tests/losses/test_autograd.py",
        Change(
            "gradient of the weights without its scale",
            "factor = grad_output.reshape(-1) * ctx.inverse_divisor",
            "factor = grad_output.reshape(-1)",
        ),
        Change(
            "a retained graph is scaled in place", "out = torch.empty_like(grad) if retained else grad", "out = grad"
        ),
        Change(
            "divisor left out in backward",
            "factor = factor * ctx.in_backward",
            "pass",
            tests=f"tests/losses/test_scale_plan.py {FORMULAS}::test_num_items_is_the_divisor tests/losses/test_logit_loss.py",
        ),
        Change(
            "backend of backward",
            "grad = backend_for(ctx.backend, [grad]).scale_rows",
            'grad = backend_for("reference", [grad]).scale_rows',
            equivalent="every backend multiplies by the same factor, in the same precision",
        ),
        Change(
            "the module forgets its ignore_index",
            "self.weighting, self.ignore_index = weighting, ignore_index",
            "self.weighting, self.ignore_index = weighting, -100",
            tests="tests/losses/test_formula.py tests/losses/test_keywords.py",
        ),
        Change(
            "the module forgets its reduction",
            "self.reduction, self.backend = reduction, backend",
            'self.reduction, self.backend = "mean", backend',
            tests=f"{FORMULAS}::test_module_equals_the_function tests/losses/test_keywords.py",
        ),
        Change(
            "the module drops num_items",
            "self.formula, self.reduction, num_items, self.backend",
            "self.formula, self.reduction, None, self.backend",
            tests=f"{FORMULAS}::test_module_equals_the_function",
        ),
    ),
    *changes(
        "camkd_fast/losses/formula.py",
        "tests/losses/test_formula.py",
        Change(
            "a flag becomes a number of the trace",
            "1.0 if self.scale_by_t2 else 0.0",
            "float(self.scale_by_t2)",
            tests="tests/losses/test_compile.py",
        ),
        Change(
            "numbers of NumPy equal to a default stay",
            "if tuple(map(type, rest)) == _BASIC_TYPES and rest == _BASIC:",
            "if rest == _BASIC:",
            tests="tests/losses/test_formula.py",
        ),
        Change(
            "soft scale without the square of T",
            "(self.temperature**2 if self.scale_by_t2 else 1.0)",
            "(self.temperature if self.scale_by_t2 else 1.0)",
            tests="tests/losses/test_formula.py tests/losses/test_autograd.py",
        ),
        Change(
            "temperature 0 is positive",
            "(positive and value <= 0)",
            "(positive and value < 0)",
            tests="tests/losses/test_bad_input.py",
        ),
        Change(
            "ignore_index of an operator",
            "weighting if weights is None else weights, ignore_index)",
            "weighting if weights is None else weights)",
            tests=f"tests/losses/test_formula.py {COMPILE}",
        ),
        Change(
            "True is an ignore_index",
            "isinstance(value, bool) or not isinstance(value, (int, numbers.Integral))",
            "not isinstance(value, (int, numbers.Integral))",
            tests="tests/losses/test_bad_input.py tests/losses/test_keywords.py",
        ),
    ),
    *changes(
        "camkd_fast/losses/evaluate.py",
        FORMULAS,
        Change(
            "labels of the default ignore_index",
            "student, ignore_index = call.student, call.formula.ignore_index",
            "student, ignore_index = call.student, -100",
            tests=f"{FORMULAS} tests/losses/test_keywords.py",
        ),
        Change(
            "learned weights have a graph in the value and gradient",
            "formula = formula.replaced(weighting=formula.weighting.detach())",
            "pass",
            tests=f"{FORMULAS} {COMPILE}::test_loss_and_grad_records_no_graph_for_learned_weights",
        ),
        Change(
            "no gradient for learned weights only",
            "needs_grad = with_grad or (torch.is_grad_enabled() and student.requires_grad)",
            "needs_grad = with_grad or student.requires_grad",
            equivalent="a cost only: under no_grad the gradient that was written is not used",
        ),
    ),
    *changes(
        "camkd_fast/losses/scale_plan.py",
        f"tests/losses/test_scale_plan.py {FORMULAS}::test_num_items_is_the_divisor",
        Change(
            "the loss scale's precision is that of its dtype",
            "factor = as_scale(loss_scale, accumulation_dtype, device)",
            "factor = loss_scale",
        ),
        Change(
            "float16 is divided in the kernel",
            "return student_dtype != torch.float16 or loss_scale is not None",
            "return True",
            tests="tests/losses/test_scale_plan.py",
        ),
        Change("no valid row divides by 0", "return 1.0 / max(valid, 1)", "return 1.0 / valid", tests=FORMULAS),
        Change("the number of samples under num_items", "self.num_items is None", "True", tests=ONE_PASS),
        Change(
            "all labels of a device count",
            "(labels != ignore_index).sum()",
            "(labels != -100).sum()",
            tests="tests/losses/test_scale_plan.py tests/losses/test_device_mean.py tests/losses/test_keywords.py",
        ),
        Change(
            "the scale twice",
            "return ScalePlan(as_scale(inverse_divisor * factor, accumulation_dtype, device), 1.0, inverse_divisor)",
            "return ScalePlan(as_scale(inverse_divisor * factor, accumulation_dtype, device), factor, inverse_divisor)",
            tests="tests/losses/test_scale_plan.py",
        ),
    ),
    *changes(
        "camkd_fast/losses/output.py",
        f"{FORMULAS}::test_coefficients {FORMULAS}::test_ignored_rows tests/losses/test_device_mean.py",
        Change(
            "pytrees do not see into a result",
            "torch.export.register_dataclass(CAMKDOutput, ",
            "str(",
            tests="tests/losses/test_module_results.py",
        ),
        Change(
            "row of the means",
            "return means[0] if row == LOSS else means[1][row - 1]",
            "return means[0] if row == LOSS else means[1][row]",
        ),
        Change(
            "hard is part of the graph",
            "self._inverse_divisor, self._lead).detach()",
            "self._inverse_divisor, self._lead)",
            tests=f"{COMPILE}::test_fullgraph_equals_eager",
        ),
    ),
    *changes(
        "camkd_fast/losses/layout.py",
        "tests/losses/test_layout.py",
        Change(
            "weights expanded over the wrong axis",
            "weighting.reshape(K, -1) if weighting.dim() > 1",
            "weighting.reshape(-1, K).T if weighting.dim() > 1",
            tests="tests/losses/test_autograd.py tests/losses/test_logit_loss.py",
        ),
        Change(
            "the gradient of weights rounded row by row",
            "flat.to(dtype).expand(K, N)",
            "flat.expand(K, N).to(dtype)",
            tests="tests/losses/test_autograd.py",
        ),
        Change("four dimensions as three", "if dimensions > 3:", "if dimensions > 4:"),
        Change(
            "strided columns in place",
            "return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()",
            "return logits",
        ),
        Change(
            "labels of any strides",
            "target if target.dim() == 1 and target.is_contiguous()",
            "target if target.dim() == 1",
            tests="tests/losses/test_layout.py tests/losses/test_keywords.py::test_labels_of_any_strides",
        ),
    ),
    *changes(
        "camkd_fast/losses/autograd.py",
        "tests/losses/test_autograd.py tests/losses/test_feature_loss.py",
        Change("double backward is silent", "if torch.is_grad_enabled():  # create_graph=True", "if False:"),
        Change(
            "every graph is freed",
            "return True if _engine_keeps_graph is None else bool(_engine_keeps_graph())",
            "return False",
        ),
    ),
    *changes(
        "camkd_fast/losses/logit_op.py",
        COMPILE,
        Change(
            "given weights keep the student's gradient from being optional",
            "if ctx.needs_input_grad[0]:",
            "if True:",
            tests="tests/losses/test_infinities.py",
        ),
        Change("gradient of another row of row_stats", "factor = grad_row_stats[LOSS]", "factor = grad_row_stats[1]"),
        Change(
            "compiled labels are not checked",
            "checks.count_if_dense(labels, student.shape[-1], ignore_index, second)\n    formula",
            "pass\n    formula",
        ),
        Change(
            "scale of 1 for every traced call",
            "return None if scale == 1.0 else",
            "return None if True else",
            tests="tests/losses/test_keywords.py::test_a_loss_scale_multiplies_the_gradient_compiled_too",
        ),
    ),
    *changes(
        "camkd_fast/losses/confidence_op.py",
        f"{FEATURES} {COMPILE}::test_feature_losses_fullgraph_equal_eager tests/losses/test_keywords.py",
        Change(
            "gradient through ignored rows",
            "return total.masked_fill(target.reshape(-1) == ignore_index, 0.0)",
            "return total",
        ),
        Change(
            "default ignore_index in backward",
            "return total.masked_fill(target.reshape(-1) == ignore_index, 0.0)",
            "return total.masked_fill(target.reshape(-1) == -100, 0.0)",
        ),
        Change(
            "gradient through the cross-entropies only",
            "total = ce_gradient(weights, grad_weights, grad_ce)",
            "total = grad_ce",
        ),
    ),
    *changes(
        "camkd_fast/losses/feature.py",
        f"{FEATURES} tests/losses/test_feature_module.py",
        Change(
            "mean over teachers and samples",
            "scale = 1.0 / max(N, 1) if",
            "scale = 1.0 / max(weights.numel(), 1) if",
        ),
    ),
    *changes(
        "camkd_fast/losses/feature_module.py",
        f"{FEATURES} tests/losses/test_feature_module.py",
        Change("heads may change their map", "if regressed._version != version:", "if False:"),
        Change(
            "the feature module forgets ignore_index",
            "self.detach_weights, self.ignore_index, self.backend = detach_weights, ignore_index, backend",
            "self.detach_weights, self.ignore_index, self.backend = detach_weights, -100, backend",
            tests="tests/losses/test_feature_module.py tests/losses/test_keywords.py",
        ),
        Change(
            "detached although asked not to be",
            "torch.is_grad_enabled() and not self.detach_weights",
            "torch.is_grad_enabled() and False",
        ),
        Change(
            "num_items ignored in the feature loss",
            'divisor = Divisor("mean", num_items, self.ignore_index)',
            'divisor = Divisor("mean", None, self.ignore_index)',
            tests="tests/losses/test_feature_module.py tests/train/test_feature_strategies.py",
        ),
        Change(
            "resizing by pooling to the wrong side",
            "(min(size[0], H), min(size[1], W))",
            "(min(size[0], H), min(size[0], W))",
            tests="tests/losses/test_feature_module.py tests/losses/test_keywords.py",
        ),
        Change(
            "regression without its ReLU",
            "nn.BatchNorm2d(channels), nn.ReLU(inplace=True)\n            )",
            "nn.BatchNorm2d(channels)\n            )",
            tests="tests/losses/test_feature_module.py",
        ),
        Change(
            "bilinear instead of nearest",
            'mode="nearest"',
            'mode="bilinear"',
            tests="tests/losses/test_feature_module.py tests/losses/test_keywords.py",
        ),
    ),
    *changes(
        "camkd_fast/losses/feature_op.py",
        FEATURES,
        Change(
            "a retained feature graph is scaled in place",
            "out = torch.empty_like(buffer) if retained else buffer",
            "out = buffer",
            tests=ONE_PASS,
        ),
        Change(
            "float16 gradients are stored without a loss scale",
            "call.student[0].dtype != torch.float16:",
            "True:",
            tests=ONE_PASS,
        ),
        Change("the weights' gradient without the scale", "error * (grad_output * ctx.scale)", "error * grad_output"),
    ),
    *changes(
        "camkd_fast/losses/feature_weights.py",
        ONE_PASS,
        Change("ignored samples weigh something", ".masked_fill(ignored, 0.0)", ""),
        Change("equal weights of ignored samples", "(kept.to(dtype) / K)", "((kept | ~kept) / K)"),
    ),
    *changes(
        "camkd_fast/losses/checks.py",
        "tests/losses/test_bad_input.py",
        Change("teachers that require grad", "if tensor.requires_grad and torch.is_grad_enabled():", "if False:"),
        Change(
            "no teacher at all",
            'if not 1 <= len(teachers) <= MAX_TEACHERS:\n        raise ValueError(f"{name} must hold',
            'if not 0 <= len(teachers) <= MAX_TEACHERS:\n        raise ValueError(f"{name} must hold',
        ),
        Change("num_items with a sum", 'if reduction != "mean":', "if False:"),
        Change("loss scale of several elements", "if scale.numel() != 1:", "if scale.numel() < 1:"),
    ),
)
