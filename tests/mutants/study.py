"""Wrong changes of camkd_fast/experiments."""

from . import Change, changes

STUDY = "tests/experiments/test_study.py"
SETTINGS = "tests/experiments/test_study_settings.py"
SPEC = "tests/experiments/test_study_spec.py"
REPORT = "tests/experiments/test_study_report.py"
COMPARE = "tests/experiments/test_compare.py"

CHANGES = (
    *changes(
        "camkd_fast/experiments/study/work.py",
        SETTINGS,
        Change(
            "best teacher by test accuracy",
            'record["validation_accuracy"] for record in records',
            'record["test_accuracy"] for record in records',
        ),
        Change(
            "the worst teacher", "return accuracies.index(max(accuracies))", "return accuracies.index(min(accuracies))"
        ),
        Change(
            "a record of other settings counts",
            'found is not None and found["hash"] == digest',
            "True",
            tests=f"{STUDY}::test_a_derived_teacher_follows_its_source_and_scale",
        ),
    ),
    *changes(
        "camkd_fast/experiments/study/cells.py",
        f"{SETTINGS} {SPEC}",
        Change("temperature of a variant dropped", "        temperature=variant.temperature,\n", ""),
        Change("uniform of a variant dropped", "        uniform=variant.uniform,\n", ""),
        Change("detach of a variant dropped", "        detach=variant.detach,\n", ""),
        Change("official scale of a variant dropped", "        official_scale=variant.official_scale,\n", ""),
        Change("alpha of a variant dropped", "        alpha=variant.alpha,\n", ""),
        Change(
            "rate of a student dropped", "optim=replace(study.training, learning_rate=rate),", "optim=study.training,"
        ),
        Change("own beta in every table", 'owns = variant.table == "main" and', "owns ="),
        Change("cell without its seed", "        seed=cell.seed,\n", ""),
        Change("teacher without its seed", "        seed=spec.seed,\n", ""),
        Change("wrong labels of a teacher dropped", "        wrong_labels=spec.wrong_labels,\n", ""),
        Change("epochs of a teacher dropped", "optim=replace(study.teaching, epochs=epochs)", "optim=study.teaching"),
        Change(
            "hash without the teachers",
            "return _hash(_settings(student_config(study, cell, Path())), teachers, variant.best_teacher)",
            "return _hash(_settings(student_config(study, cell, Path())), variant.best_teacher)",
        ),
        Change("machines overlap", "return list(cells[rank::world])", "return list(cells[rank:])"),
        Change("variants in every pool", "and (not variant.pools or pool.name in variant.pools)", ""),
        Change("students in every pool", "and (not student.pools or pool.name in student.pools)", ""),
        Change(
            "sources of derived teachers are not trained",
            "used |= {study.teacher(name).source for name in used}",
            "pass",
            tests=f"{SETTINGS} {SPEC}",
        ),
    ),
    *changes(
        "camkd_fast/experiments/study/measure.py",
        SETTINGS,
        Change(
            "test images as validation images",
            "validation = _evaluate(model, parts.validation, study, world)",
            "validation = _evaluate(model, parts.test, study, world)",
        ),
        Change(
            "scale of the weights, not of the bias",
            "for parameter in layers[-1].parameters():",
            "for parameter in list(layers[-1].parameters())[:1]:",
        ),
        Change(
            "means over all images",
            "counts = torch.bincount(labels, minlength=C).clamp(min=1)",
            "counts = torch.tensor(len(labels) / C)",
        ),
        Change("entropy weights as they are", "weights = weights / weights.sum(0)", "weights = weights / 1"),
    ),
    *changes(
        "camkd_fast/experiments/study/paired.py",
        REPORT,
        Change("one degree of freedom too many", "return t95(n - 1) * stdev", "return t95(n) * stdev"),
        Change("interval of one run", "stdev(self.differences) / math.sqrt(n)", "stdev(self.differences)"),
        Change("ties are losses", "losses = sum(difference < 0", "losses = sum(difference <= 0"),
    ),
    *changes(
        "camkd_fast/experiments/study/findings.py",
        REPORT,
        Change(
            "seeds that one place lacks",
            "all(seed in there for there in gains)",
            "any(seed in there for there in gains)",
        ),
        Change(
            "against AVER whatever the variant says",
            "other = against or self.results.study.variant(variant.against)\n        gains",
            "other = against or self.results.study.variant('aver')\n        gains",
        ),
        Change("better at a mean above 0", '"better" if paired.low > 0', '"better" if paired.mean > 0'),
        Change("bad pools among the good ones", "if not study.bad(place[0])]", "]"),
    ),
    *changes(
        "camkd_fast/experiments/study/records.py",
        STUDY
        + "::test_results_of_other_settings_do_not_count "
        + STUDY
        + "::test_results_are_sorted_lines_that_machines_can_merge",
        Change("results of other settings count", 'if hashes.get(cell) == record["hash"]:', "if cell in hashes:"),
    ),
    *changes(
        "camkd_fast/experiments/study/check.py",
        f"{STUDY}::test_checked_cells_are_random_ones_that_are_finished {SETTINGS}",
        Change(
            "nearly the same accuracy",
            "return self.kept == self.again",
            "return self.again is not None and abs(self.kept - self.again) < 0.01",
        ),
        Change("always the same cells", "random.Random(seed).sample", "random.Random(0).sample"),
    ),
    *changes(
        "camkd_fast/experiments/study/spec.py",
        SPEC,
        Change("views may be missing", "if self.data.views is None:", "if False:"),
        Change("names as paths", "if not NAME.fullmatch(name):", "if not NAME.match(name):"),
    ),
    *changes(
        "camkd_fast/experiments/compare.py",
        COMPARE,
        Change(
            "differences over the mean of the baseline",
            "[mine - theirs for mine, theirs in zip",
            "[mine - baseline.mean for mine, theirs in zip",
        ),
        Change("every strategy with the same seed", "strategy=strategy, seed=seed,", "strategy=strategy,"),
        Change(
            "overwriting is resuming",
            "resume=not overwrite, overwrite=overwrite",
            "resume=True, overwrite=False",
            tests=f"{COMPARE} tests/cli/test_options_reach_their_objects.py",
        ),
    ),
)
