"""Home folder and environment variables in every path of the command line and of YAML files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from camkd_fast import cli
from camkd_fast.cli.options import _COMMANDS, parse
from camkd_fast.data.fetch import default_folder
from camkd_fast.experiments.study import spec
from camkd_fast.train import config_file
from camkd_fast.train.config import DataConfig, DistillConfig, TeachConfig
from camkd_fast.train.source_strings import SourceString, labels
from tests.support.study_parts import study

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", str(tmp_path / "all runs"))


def path_options(kind: Any, name: str) -> Iterator[tuple[str, str]]:
    """(command, option) of every field that is a path or a source; positional ones have no option."""
    for field, hint in get_type_hints(kind, include_extras=True).items():
        inner = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(inner):
            yield from path_options(inner, name)
        elif {inner, *get_args(inner)} & {Path, SourceString}:
            positional = "Positional" in str(hint) or "positional" in str(hint).lower()
            yield name, "" if positional else f"--{field.replace('_', '-')}"


POSITIONAL = ("evaluate", "teachers", "report", "export")
OPTIONS = [option for name, kind in _COMMANDS.items() if name != "data" for option in path_options(kind, name)]


def paths_of(value: Any) -> Iterator[Path]:
    if isinstance(value, (Path, SourceString)):
        yield Path(value)
    elif isinstance(value, tuple):
        for item in value:
            yield from paths_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from paths_of(getattr(value, field.name))


def test_the_list_of_options_is_complete() -> None:
    assert len(OPTIONS) >= 15 and {"--out", "--root", "--teachers", "--teacher-cache", "--study"} <= {
        o for _, o in OPTIONS
    }


@pytest.mark.parametrize(("command", "option"), [o for o in OPTIONS if o[1] != "--config"])
@pytest.mark.parametrize("text", ["~/x", "$RUNS/x", "${RUNS}/x"])
def test_every_path_option_is_expanded(command: str, option: str, text: str, tmp_path: Path) -> None:
    base = [] if option or command not in POSITIONAL else [text]
    required = ["run"] if option and command in POSITIONAL else []
    more = {"--teacher-cache": ["--views", "2"], "--results": ["--study", "s.yaml"]}.get(option, [])
    words = [f"{option}={text}"] if option and option != "--teachers" else [option, text] if option else []
    parsed = parse([command, *base, *required, *words, *more])
    expected = tmp_path / "home" / "x" if text.startswith("~") else tmp_path / "all runs" / "x"
    assert expected in paths_of(parsed)


def test_data_fetch_and_configs(tmp_path: Path) -> None:
    parsed: Any = parse(["data", "fetch", "cifar10", "--root=~/x"])
    assert parsed.action.root == tmp_path / "home" / "x"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.yaml").write_text("job: teach\nmodel: vgg8\nout: ${RUNS}/a\ndata: {root: ~/data}\n")
    loaded: Any = parse(["teach", "--config=~/c.yaml"])
    assert loaded.settings.model == "vgg8"
    assert set(paths_of(loaded.settings)) == {tmp_path / "all runs" / "a", tmp_path / "home" / "data"}


def test_every_path_of_every_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    content = {
        "out": "~/o",
        "teachers": ["$RUNS/t0", "~/t1"],
        "teacher_cache": "$RUNS/c",
        "data": {"root": "~", "views": 1},
    }
    file.write_text(yaml.safe_dump({"job": "distill", **content}))
    home, runs = tmp_path / "home", tmp_path / "all runs"
    assert list(paths_of(config_file.load(file))) == [runs / "t0", home / "t1", runs / "c", home / "o", home]
    written = config_file.serializable(study())
    written["data"]["root"] = "$RUNS/data"
    file.write_text(yaml.safe_dump(written))
    assert spec.load(file).data.root == runs / "data"


def test_a_run_folder_stores_what_the_paths_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: Any = parse(["teach", "--out=~/a", "--root", "$RUNS"])
    config_file.save(parsed.settings, tmp_path / "config.yaml")
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.delenv("RUNS")
    assert config_file.load(tmp_path / "config.yaml") == parsed.settings


@pytest.mark.parametrize("name", ["a$b", "~", "~user/x", "$$", "${X}", "~$HOME"])
def test_odd_names_survive_their_config(name: str, tmp_path: Path) -> None:
    config = DistillConfig(teachers=(Path(name), Path("x") / name), out=Path(name), data=DataConfig(root=Path(name)))
    config_file.save(config, tmp_path / "config.yaml")
    assert config_file.load(tmp_path / "config.yaml") == config
    assert not config_file.differences(config_file.load(tmp_path / "config.yaml"), config)


def test_defaults_are_left_as_they_are() -> None:
    parsed: Any = parse(["teach"])
    assert parsed.settings == TeachConfig()


@pytest.mark.parametrize(
    "line", ["teach --out $NOT_SET/x", "teach --root=${NOT_SET}", "evaluate $NOT_SET", "demo --out $NOT_SET"]
)
def test_an_unset_variable_is_named(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    error = re.sub("[─│╭╮╰╯]", " ", capsys.readouterr().err)
    assert stopped.value.code == 2
    assert "the environment variable NOT_SET of the path" in " ".join(error.split())


def test_an_unset_variable_of_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("job: teach\nout: $NOT_SET/x\n")
    assert cli.main(["teach", "--config", "c.yaml"]) == 1
    error = capsys.readouterr().err
    assert "c.yaml: the environment variable NOT_SET of the path '$NOT_SET/x' is not set" in error


def test_the_folder_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, path in {"~/d": tmp_path / "home" / "d", "$RUNS/d": tmp_path / "all runs" / "d", "": None}.items():
        monkeypatch.setenv("CAMKD_FAST_DATA", text)
        assert default_folder("x") == (path or tmp_path / "home" / ".cache" / "camkd_fast") / "x"


def test_a_machine_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A container with a user of no name."""
    import pwd

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("CAMKD_FAST_DATA", raising=False)

    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cli.main(["data", "list"]) == 1
    assert "the home folder '~' of the path '~/.cache/camkd_fast' is not known" in capsys.readouterr().err


# --- sources of weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/t0/", "runs/t0"),
        ("~/t", "{home}/t"),
        ("$RUNS/t?mean=0.5&std=0.5#body.2", "{runs}/t?mean=0.5&std=0.5#body.2"),
        ("wrn_40_2@~/a.pth?size=32", "wrn_40_2@{home}/a.pth?size=32"),
        ("timm:resnet50.a1_in1k", "timm:resnet50.a1_in1k"),
        ("timm:resnet50@$RUNS/a#layer3", "timm:resnet50@{runs}/a#layer3"),
        ("torchvision:resnet50@IMAGENET1K_V2", "torchvision:resnet50@IMAGENET1K_V2"),
        ("torchvision:resnet50@${RUNS}/a", "torchvision:resnet50@{runs}/a"),
        ("hf:org/name", "hf:org/name"),
        ("hf:~/a", "hf:{home}/a"),
        ("py:package.module:function", "py:package.module:function"),
        ("folder@x/$$y", "folder@x/$y"),
    ],
)
def test_the_path_of_a_source_is_expanded(text: str, expected: str, tmp_path: Path) -> None:
    expected = expected.format(home=tmp_path / "home", runs=tmp_path / "all runs")
    parsed: Any = parse(["distill", "--teachers", text, "x"])
    assert parsed.settings.teachers == (expected, "x")
    file = tmp_path / "config.yaml"
    config_file.save(parsed.settings, file)
    assert config_file.load(file) == parsed.settings  # as it was used, whatever the environment is then
    assert yaml.safe_load(file.read_text())["teachers"][1] == "x"
    file.write_text(yaml.safe_dump({"job": "distill", "teachers": [text]}))
    assert config_file.load(file).teachers == (expected,)  # type: ignore[union-attr]


def test_run_folders_may_be_paths_in_python(tmp_path: Path) -> None:
    config = DistillConfig(teachers=(Path("a/b"), "a/b/", tmp_path))  # type: ignore[arg-type]
    assert config.teachers == ("a/b", "a/b", str(tmp_path))
    with pytest.raises(ValueError, match="teachers must be several sources, got only 'runs/t0'"):
        DistillConfig(teachers="runs/t0")  # type: ignore[arg-type]


def test_an_unset_variable_of_a_source_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["distill", "--teachers", "resnet8@$NOT_SET/a"])
    error = " ".join(re.sub("[─│╭╮╰╯]", " ", capsys.readouterr().err).split())
    assert "the environment variable NOT_SET of the path" in error


def test_labels_are_short_unless_they_would_be_equal() -> None:
    assert labels(["a/t0", "resnet8@b/c.pth", "timm:net.a", "hf:a/t0"]) == [
        "t0",
        "resnet8@c.pth",
        "timm:net.a",
        "hf:a/t0",
    ]
    assert labels(["a/t0", "b/t0", "b/t1", "/"]) == ["a/t0", "b/t0", "t1", "/"]
