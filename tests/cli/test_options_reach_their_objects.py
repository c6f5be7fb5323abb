"""Every option of the command line reaches the function that it is for. No command does its work here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from camkd_fast import cli
from camkd_fast.cli import commands, options
from camkd_fast.train import config_file, run
from camkd_fast.train.config import DataConfig, DistillConfig, TeachConfig
from tests.support.strategies import FEATURES, live

NESTED = ("data", "optim", "precision", "log")
# Where no value that is not the default follows from the type.
VALUES: dict[str, Any] = {
    "data": "cifar10",
    "milestones": (0.25, 0.5),
    "swapped": (2, 3),
    "strategy": "fitnet-mkd",
    "teachers": (Path("a"), Path("b")),
    "teacher_cache": None,  # needs views, and images that are not mixed
    "validation": 0.25,
    "momentum": 0.5,
    "betas": (0.8, 0.99),
    "rand_augment": (3, 7),
    "drop": 0.5,
    "wrong_labels": 0.25,
}


def other_value(name: str, hint: Any, default: Any) -> Any:
    """A valid value of a field that is not its default."""
    if name in VALUES and (name != "data" or default == "digits"):
        return VALUES[name]
    if get_origin(hint) is Literal:
        return next(value for value in get_args(hint) if value != default)
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return other_value(name, hint, default)
    if hint is bool:
        return not default
    if hint is int:
        return (default or 0) + 3
    if hint is float:
        return (default or 0.0) + 0.5
    return Path("elsewhere") if hint is Path else "resnet14"


def settings_of(kind: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, another value) of a config class."""
    hints = get_type_hints(kind)
    defaults = kind()
    for field in dataclasses.fields(kind):
        if field.name in NESTED and not path:
            yield from settings_of(hints[field.name], f"{field.name}.")
        else:
            yield f"{path}{field.name}", other_value(field.name, hints[field.name], getattr(defaults, field.name))


def words(name: str, value: Any) -> list[str]:
    option = name.rpartition(".")[2].replace("_", "-")
    if isinstance(value, bool) and option != "flip":  # which may also be None, and so takes a value
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize(("command", "kind"), [("teach", TeachConfig), ("distill", DistillConfig)])
def test_every_setting_is_an_option(command: str, kind: type) -> None:
    """All at once: with the value of its option, each field differs from its default."""
    wanted = {name: value for name, value in settings_of(kind) if value is not None}
    assert len(wanted) > 30
    line = [word for name, value in wanted.items() for word in words(name, value)]
    if kind is DistillConfig:
        cached = options.parse([command, "--views", "2", "--teacher-cache", "cache"]).settings
        assert cached.teacher_cache == Path("cache")
    parsed = options.parse([command, *line]).settings
    changed = config_file.differences(kind(), parsed)
    expected = {name: config_file.serializable(value) for name, value in wanted.items()}
    assert {name: value for name, (_, value) in changed.items()} == expected


@pytest.mark.parametrize(("command", "kind"), [("teach", TeachConfig), ("distill", DistillConfig)])
def test_every_setting_of_a_config_file_is_kept(command: str, kind: type, tmp_path: Path) -> None:
    line = [word for name, value in settings_of(kind) if value is not None for word in words(name, value)]
    settings = options.parse([command, *line]).settings
    config_file.save(settings, tmp_path / "config.yaml")
    assert options.parse([command, "--config", str(tmp_path / "config.yaml")]).settings == settings
    again = options.parse([command, f"--config={tmp_path / 'config.yaml'}", "--seed", "77"]).settings
    assert again == dataclasses.replace(settings, seed=77)


@pytest.mark.parametrize(
    ("line", "read", "value"),
    [
        ("--beta 7.5", lambda strategy: strategy.beta, 7.5),
        ("--no-detach", lambda strategy: strategy.maps.detach_weights, False),
        ("--uniform features", lambda strategy: strategy.uniform, "features"),
        ("--uniform logits", lambda strategy: strategy.formula.weighting, "uniform"),
        ("--temperature 2.5", lambda strategy: strategy.formula.temperature, 2.5),
        ("--alpha 0.75", lambda strategy: strategy.formula.soft_weight, 0.75),
        ("--official-scale", lambda strategy: (strategy.formula.soft_weight, strategy.beta), (0.25, 12.5)),
        ("--strategy kd --teacher-index 2", lambda strategy: strategy.weights.tolist(), [0, 0, 1, 0]),
    ],
)
def test_the_strategy_of_a_command_has_its_options(line: str, read: Any, value: Any) -> None:
    settings = options.parse(["distill", *line.split()]).settings
    strategy = run.make_strategy(settings, live(4), FEATURES)
    assert read(strategy) == value
    default = run.make_strategy(DistillConfig(strategy=settings.strategy), live(4), FEATURES)
    assert read(default) != value


# --- commands --------------------------------------------------------------------------------------------------------


class Calls(list[tuple[tuple[Any, ...], dict[str, Any]]]):
    """Records its calls instead of doing anything."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.append((arguments, keywords))
        return SimpleNamespace(
            images=1, accuracy=0.5, loss=1.0, milliseconds={"fused": 1.0}, note="", speedup=lambda name: 1.0,
            onnx=Path("a"), program=Path("b"), onnx_difference=0.0, program_difference=0.0,
        )  # fmt: skip


@pytest.mark.parametrize("command", ["teach", "distill"])
@pytest.mark.parametrize("option", ["", "--resume", "--overwrite", "--extend"])
def test_jobs_resume_overwrite_or_extend(command: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(commands.jobs, command, calls)
    monkeypatch.setattr(commands, "_finish", lambda result: None)
    assert cli.main([command, "--seed", "5", *option.split()]) == 0
    (((settings,), keywords),) = calls
    assert settings.seed == 5
    assert keywords == {name: option == f"--{name}" for name in ("resume", "overwrite", "extend")}


def test_evaluate_takes_split_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(commands.jobs, "evaluate", calls)
    for line in ("evaluate r", "evaluate r --split train", "evaluate r --split validation --device cpu"):
        assert cli.main(line.split()) == 0
    assert [arguments for arguments, _ in calls] == [
        *((Path("r"), "test", "auto"), (Path("r"), "train", "auto"), (Path("r"), "validation", "cpu"))
    ]


def test_teachers_take_data_split_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from camkd_fast.experiments import teacher_table

    calls, nothing = Calls(), teacher_table.Comparison([], [], "train", 0)
    monkeypatch.setattr(teacher_table, "compare_teachers", lambda *a, **k: calls(*a, **k) and nothing)
    line = "teachers a b@c --data folder --root r --size 40 --validation 0.2 --split-seed 3 --loader torch --workers 5"
    line += " --skip-bad 2 --split train --class-map m --device cpu --batch-size 9"
    assert cli.main(line.split()) == 0
    (((names, data, split), keywords),) = calls
    assert names == ("a", "b@c") and split == "train"
    assert data == DataConfig(
        data="folder", root=Path("r"), size=40, validation=0.2, split_seed=3, loader="torch", workers=5, skip_bad=2
    )
    assert keywords == {"class_map": Path("m"), "device": "cpu", "batch_size": 9}


def test_export_takes_folder_and_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    from camkd_fast.train import export

    calls = Calls()
    monkeypatch.setattr(export, "export", calls)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object())
    for line in ("export r", "export r --out o --no-folded"):
        assert cli.main(line.split()) == 0
    assert [arguments for arguments, _ in calls] == [(Path("r"), None, True), (Path("r"), Path("o"), False)]


def test_fetch_takes_folder_and_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    from camkd_fast.data import fetch

    calls = Calls()
    monkeypatch.setattr(fetch, "fetch", lambda *arguments: [calls(*arguments)][:0])
    assert cli.main(["data", "fetch", "cifar10", "--root", "here", "--base-url", "http://mirror"]) == 0
    ((arguments, _),) = calls
    assert arguments[:3] == ("cifar10", Path("here"), "http://mirror")


def test_bench_takes_shapes_rounds_and_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    from camkd_fast.experiments import loss_speed

    calls = Calls()
    monkeypatch.setattr(loss_speed, "measure_loss_speed", calls)
    assert cli.main(["bench", "--shapes", "8x10x2", "4x20x1", "--rounds", "7", "--no-compiled"]) == 0
    assert [arguments for arguments, _ in calls] == [(8, 10, 2, 7, False), (4, 20, 1, 7, False)]


def test_compare_takes_strategies_seeds_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from camkd_fast.experiments import compare, compare_report

    calls = Calls()
    monkeypatch.setattr(compare.run, "distill", calls)
    monkeypatch.setattr(compare, "check_teachers", lambda config: None)
    monkeypatch.setattr(compare, "collect", lambda config: [])
    monkeypatch.setattr(compare_report, "write", lambda *arguments: None)
    monkeypatch.setattr(compare_report, "student_table", lambda rows: SimpleNamespace(text=lambda: ""))
    line = "compare --strategies aver ca-mkd --seeds 4 9 --temperature 2.5 --beta 7 --out there"
    assert cli.main(line.split()) == 0
    assert [(cell.seed, cell.strategy, cell.temperature, cell.beta) for (cell,), _ in calls] == [
        *((4, "aver", 2.5, None), (4, "ca-mkd", 2.5, 7.0), (9, "aver", 2.5, None), (9, "ca-mkd", 2.5, 7.0))
    ]
    for option in ("", "--overwrite", "--extend"):
        calls.clear()
        assert cli.main([*line.split(), *option.split()]) == 0
        how = {"resume": option != "--overwrite", "overwrite": option == "--overwrite", "extend": option == "--extend"}
        others = [keywords.pop("compared") for _, keywords in calls]
        assert [keywords for _, keywords in calls] == 4 * [how]
        # Its teachers are compared with those of all other runs whose results stay
        outs = [cell.out for (cell,), _ in calls]
        assert others == [outs[:i] if option == "--overwrite" else outs[:i] + outs[i + 1 :] for i in range(len(outs))]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_study_takes_jobs_ranks_and_files(rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from camkd_fast.cli import study

    seen: dict[str, Any] = {}

    def conduct(*arguments: Any, **keywords: Any) -> list[str]:
        seen.update(keywords, out=arguments[1])
        return []

    monkeypatch.setattr(study.conductor, "conduct", conduct)
    monkeypatch.setattr(study.study_report, "write", lambda *arguments: tmp_path)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = Path(__file__).parents[2] / "benchmarks" / "study" / "quick.yaml"
    line = f"compare --study {file} --out {tmp_path / 'out'} --jobs 3 --results {tmp_path / 'kept.jsonl'}"
    assert cli.main(line.split()) == 0
    assert (seen["jobs"], seen["rank"], seen["world"], seen["out"]) == (3, rank, 2, tmp_path / "out")
    cells = study.cells.cells(study.spec.load(file))
    assert seen["only"] == cells[rank::2]
    assert (tmp_path / "kept.jsonl").exists() and not (tmp_path / "out" / "results.jsonl").exists()
