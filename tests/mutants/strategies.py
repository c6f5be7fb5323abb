"""Wrong changes of camkd_fast/train/strategies."""

from . import Change, changes

LOGITS = "tests/train/test_strategies.py"
FEATURES = "tests/train/test_feature_strategies.py"
OPTIONS = "tests/train/test_options.py"

CHANGES = (
    *changes(
        "camkd_fast/train/strategies/registry.py",
        f"{OPTIONS} {LOGITS}",
        Change("alpha not divided", 'soft_weight = common["alpha"] / divisor', 'soft_weight = common["alpha"]'),
        Change("options are dropped", "{**kind.options, **given}", "{**given, **kind.options}"),
        Change(
            "a strategy without maps is no advice",
            "if kind.needs_teachers and not kind.needs_features]",
            "if kind.needs_teachers]",
            tests="tests/train/test_fitted_teachers.py",
        ),
        Change("option 0 is no option", "if options.get(name) is not None}", "if options.get(name)}"),
        Change(
            "default temperature",
            'formula = Formula(common["temperature"], soft_weight',
            "formula = Formula(4.0, soft_weight",
        ),
        Change("rule of the class ignored", "weighting=kind.rule)", 'weighting="confidence")'),
    ),
    *changes(
        "camkd_fast/train/strategies/logits.py",
        LOGITS,
        Change("EBKD divided by K", "return K if official else max(K - 1, 1)", "return K if official else K"),
        Change(
            "gradients at T = 1 in AEKD",
            "(t.logits.float() / T).softmax(-1), 0.0)",
            "t.logits.float().softmax(-1), 0.0)",
        ),
        Change(
            "AEKD under join",
            'getattr(getattr(running, "_join_config", None), "enable", False)',
            "False",
            tests="tests/train/test_distiller_parallel.py",
        ),
        Change("AEKD of each rank", "torch.distributed.all_reduce(gram)", "pass"),
        Change(
            "AEKD with ignored rows",
            "kept = (target != self.formula.ignore_index).unsqueeze(-1)",
            "kept = torch.ones_like(target).bool().unsqueeze(-1)",
        ),
        Change("AEKD without its cap", "return min_norm_weights(gram, self.cap)", "return min_norm_weights(gram)"),
        Change("AEKD in half precision", "with torch.autocast(q.device.type, enabled=False):", "if True:"),
        Change("KD of the first teacher", "torch.tensor(self._index, ", "torch.tensor(0, "),
        Change("KD's index up to K", "if not 0 <= teacher_index < K:", "if not 0 <= teacher_index <= K:"),
    ),
    *changes(
        "camkd_fast/train/strategies/features.py",
        f"{OPTIONS} {FEATURES}",
        Change(
            "beta is not divided",
            'setup.options["beta"] / setup.divisor',
            'setup.options["beta"]',
            tests=f"{OPTIONS} {LOGITS}",
        ),
        Change("hints ignore num_items", 'Divisor("mean", batch.num_items, ', 'Divisor("mean", None, '),
        Change("weights always detached", 'detach = setup.options.get("detach_weights", True)', "detach = True"),
        Change(
            "feature loss in half precision",
            "with torch.autocast(student.features.device.type, enabled=False):",
            "if True:",
        ),
        Change("hints without beta", "return FeatureTerm(self.beta * loss, None)", "return FeatureTerm(loss, None)"),
        Change(
            "gradients without beta",
            "beta=self.beta,",
            "beta=1.0,",
            tests="tests/train/test_step.py::test_gradient_is_that_of_the_differentiable_loss",
        ),
    ),
    *changes(
        "camkd_fast/train/strategies/confidence.py",
        f"{OPTIONS} {FEATURES} {LOGITS}",
        Change("CA-MKD never divided", "return K if official else 1", "return 1"),
        Change("uniform logits are features", 'if self.uniform == "features":', 'if self.uniform == "logits":'),
        Change(
            "feature loss without beta",
            "return FeatureTerm(self.beta * out.loss, out.weights.detach())",
            "return FeatureTerm(out.loss, out.weights.detach())",
        ),
        Change("uniform logits ignored", 'self.formula = self.formula.replaced(weighting="uniform")', "pass"),
        Change(
            "num_items dropped", "batch.target, batch.num_items, **batch.second)", "batch.target, None, **batch.second)"
        ),
    ),
)
