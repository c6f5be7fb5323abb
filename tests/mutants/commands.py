"""Wrong changes of camkd_fast/cli, and of what its commands print and read."""

from . import Change, changes

OPTIONS = "tests/cli/test_options_reach_their_objects.py"
CLI = "tests/cli/test_cli.py"

CHANGES = (
    *changes(
        "camkd_fast/cli/commands.py",
        OPTIONS,
        Change(
            "teach never resumes",
            "jobs.teach(command.settings, **_how(command))",
            "jobs.teach(command.settings, **_how(command) | {'resume': False})",
        ),
        Change(
            "distill never overwrites",
            "jobs.distill(command.settings, **_how(command))",
            "jobs.distill(command.settings, **_how(command) | {'overwrite': False})",
        ),
        Change(
            "evaluate always on the test split",
            "jobs.evaluate(command.run, command.split, command.device)",
            'jobs.evaluate(command.run, "test", command.device)',
        ),
        Change(
            "evaluate ignores the device",
            "jobs.evaluate(command.run, command.split, command.device)",
            "jobs.evaluate(command.run, command.split)",
        ),
        Change(
            "export always folds",
            "export(command.run, command.out, command.folded)",
            "export(command.run, command.out)",
        ),
        Change(
            "fetch ignores the folder",
            "fetch.fetch(command.name, command.root, command.base_url, progress)",
            "fetch.fetch(command.name, None, command.base_url, progress)",
        ),
        Change("bench ignores the rounds", "command.rounds, command.compiled)", "25, command.compiled)"),
        Change(
            "comparison of the default seeds",
            "compare.CompareConfig(command.strategies, command.seeds, shared)",
            "compare.CompareConfig(command.strategies, student=shared)",
        ),
        Change(
            "every process prints",
            "    if rank() == 0:\n        print(text)",
            "    print(text)",
            tests=f"{CLI}::test_other_ranks_are_silent_but_for_errors",
        ),
    ),
    *changes(
        "camkd_fast/cli/options.py",
        f"{OPTIONS} {CLI}::test_options_override_the_config {CLI}::test_bad_input_is_one_line",
        Change("a config of another job", "if not issubclass(_SETTINGS[name], type(loaded)):", "if False:"),
        Change("config file ignored", "default=_configured(name, options),", "default=None,"),
    ),
    *changes(
        "camkd_fast/cli/options.py",
        f"{CLI}::test_a_bad_value_exits_2_with_one_line {CLI}::test_a_word_in_place_of_a_number_is_the_parsers_error",
        Change("some values have status 1", "except (SystemExit, ValueError) as error:", "except SystemExit as error:"),
        Change("a frame with the names of classes", "_refused[0] if _refused else _reason_of_ours(error)", "None"),
        Change("errors of others are ours", '.startswith(f"{_PACKAGE}.")', ""),
        Change("images of `teachers` are not checked", "        self.data_config()\n", ""),
        Change("shapes are not checked", "        self.sizes()\n", ""),
    ),
    *changes(
        "camkd_fast/cli/study.py",
        OPTIONS,
        Change("one job", "jobs=jobs", "jobs=1"),
    ),
    *changes(
        "camkd_fast/experiments/teacher_table.py",
        "tests/experiments/test_teacher_table.py",
        Change(
            "agreement with the labels",
            "(stacked.unsqueeze(0) == stacked.unsqueeze(1))",
            "(stacked.unsqueeze(0) == batch.target)",
        ),
        Change("accuracy of the last batch", "counts[1 : K + 1] += (stacked", "counts[1 : K + 1] = (stacked"),
        Change(
            "validation images even if there are none",
            'split = "validation" if len(parts.validation) else "test"',
            'split = "validation"',
        ),
    ),
    *changes(
        "camkd_fast/train/source_strings.py",
        "tests/cli/test_paths.py",
        Change("dollar signs are not quoted", "quote_path(Path(path)) if special else path", "path"),
        Change(
            "two spellings of a path",
            "if before == hf_models.PREFIX or not path else str(Path(path))",
            "if True else str(Path(path))",
        ),
        Change("equal labels", "name if counts[name] == 1 else str(teacher)", "name"),
    ),
)
