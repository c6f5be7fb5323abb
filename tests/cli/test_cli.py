"""The command line: help, typical commands end to end, one-line errors, missing packages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch

from camkd_fast import __version__, cli, models
from camkd_fast.backends.dispatch import BACKENDS, availability
from camkd_fast.cli import options
from camkd_fast.cli.options import Bench, Compare, Teach, Teachers, parse
from camkd_fast.models.model_file import model_bytes
from camkd_fast.train.folder_lock import locked

SMALL = "--data digits --images 60 --epochs 1 --no-progress --no-tensorboard"
COMMANDS = ("teach", "distill", "evaluate", "teachers", "compare", "report", "data", "bench", "info", "export", "demo")


pytestmark = pytest.mark.usefixtures("one_thread")


def call(line: str, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    """Run a command line in this process; returns stdout, or stderr if it is expected to fail."""
    capsys.readouterr()
    assert cli.main(line.split()) == status
    printed = capsys.readouterr()
    if status:
        assert printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
        return printed.err
    return printed.out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers and a student, from the README's commands with small settings."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for k in (0, 1):
            assert cli.main(f"teach {SMALL} --model resnet8 --seed {k} --out runs/t{k}".split()) == 0
        line = f"distill {SMALL} --student resnet8 --teachers runs/t0 runs/t1 --strategy ca-mkd --seed 0 --out runs/s0"
        assert cli.main(line.split()) == 0
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


# --- info, help ------------------------------------------------------------------------------------------------------


def test_info_names_versions_backends_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (__version__, torch.__version__, "instruction set", "threads", "GPU"):
        assert expected in printed
    listed = printed.partition("backends\n")[2]
    for name in BACKENDS:
        state = availability(name)
        line = next(line for line in listed.splitlines() if line.split()[:1] == [name])
        assert ("usable" if state.usable else "missing") in line and state.reason in line


def test_info_imports_nothing_but_torch() -> None:
    check = (
        "import sys; from camkd_fast.cli import main; main(['info']);"
        "sys.exit(bool({'sklearn', 'matplotlib', 'tyro', 'yaml', 'camkd_fast.train'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The help of a command, without its frames and colours."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    return " ".join(re.sub("[─│╭╮╰╯]", " ", text).split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown([], capsys)
    assert all(f"• {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", [*((c,) for c in COMMANDS if c != "data"), ("data", "fetch"), ("data", "list")])
def test_help_has_every_option_with_its_default(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(list(command), capsys).partition(" options ")[2]
    # An option starts with its name and type; its description ends at the next option.
    options = re.split(r" (?=--(?!no-)[a-z][a-z-]*(?:, --no-| [A-Z{\[]))", text)[1:]
    if command[-1] in ("teach", "distill", "compare"):
        assert len(options) > 30
    for option in options:
        assert "(default: " in option, option
    assert not re.search(r"--(settings|optim|data)\.", text)


def test_help_names_the_source_of_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["distill"], capsys)
    assert "--temperature FLOAT Temperature of the distillation loss (paper: 4). (default: 4.0)" in text
    assert "--epochs INT Passes over the training images (paper: 240). (default: 240)" in text


# --- typical commands ------------------------------------------------------------------------------------------------


def test_runs_leave_their_files(here: Path) -> None:
    for run in ("t0", "t1", "s0"):
        for name in ("config.yaml", "metrics.jsonl", "model.safetensors", "checkpoints", "report.html"):
            assert (here / "runs" / run / name).exists()


def test_a_config_repeats_a_run_byte_by_byte(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = call("distill --config runs/s0/config.yaml --out runs/again", capsys)
    assert re.match(r"test accuracy \d+\.\d\d % on 597 images, [\d.]+ s\n", printed)  # one step, which is not timed
    longer = call("distill --config runs/s0/config.yaml --out runs/longer --epochs 9", capsys)
    assert re.match(r"test accuracy .* images, [\d,.]*[1-9][\d,.]* images/s, [\d.]+ s\n", longer)
    assert printed.splitlines()[1] == "runs/again/report.html"
    first, again = (here / "runs" / run / "model.safetensors" for run in ("s0", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_options_override_the_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("distill --config=runs/s0/config.yaml --seed 5 --strategy aver --out runs/other", capsys)
    config = (here / "runs/other/config.yaml").read_text()
    assert "seed: 5" in config and "strategy: aver" in config and "student: resnet8" in config
    assert (here / "runs/other/model.safetensors").read_bytes() != (here / "runs/s0/model.safetensors").read_bytes()


def test_a_finished_run_is_kept_resumed_or_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"teach {SMALL} --model resnet8 --seed 3 --out runs/kept"
    call(line, capsys)
    model = here / "runs/kept/model.safetensors"
    before = model.stat().st_mtime_ns, model.read_bytes()
    assert "runs/kept holds a finished run" in call(line, capsys, status=1)
    call(f"{line} --resume", capsys)
    assert (model.stat().st_mtime_ns, model.read_bytes()) == before
    assert "data.images 60 instead of 50" in call(f"{line} --images 50 --resume", capsys, status=1)
    call(f"{line} --images 50 --overwrite", capsys)
    assert model.read_bytes() != before[1]


def test_a_finished_run_takes_more_epochs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"teach {SMALL.replace('--epochs 1', '')} --model resnet8 --batch-size 20 --schedule cosine --out runs/more"
    call(f"{line} --epochs 1", capsys)
    refused = call(f"{line} --epochs 2 --resume", capsys, status=1)
    assert "the cosine schedule depends on the number of epochs: step 3 of runs/more had" in refused
    assert "--extend goes on with step 4 at 0.0" in refused
    capsys.readouterr()
    assert cli.main(f"{line} --epochs 2 --resume --extend".split()) == 0
    assert "camkd-fast: warning: the cosine schedule depends" in capsys.readouterr().err
    page = (here / "runs/more/report.html").read_text()
    assert "repeats the run, but for epochs up to 1, which had the learning rates of 1 epochs." in page
    assert "has trained 2 epochs, more than the 1 of --epochs" in call(f"{line} --epochs 1 --resume", capsys, status=1)


def test_evaluate_report_and_export_of_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = call("evaluate runs/s0", capsys)
    test = json.loads((here / "runs/s0/metrics.jsonl").read_text().splitlines()[-1])
    assert f"597 test images: accuracy {100 * test['test_accuracy']:.2f} %" in printed
    assert "300 validation images" in call("evaluate runs/s0 --split validation", capsys)

    (here / "runs/s0/report.html").unlink()
    assert call("report runs/s0", capsys) == "runs/s0/report.html\n"
    assert "<h2>Weights of the teachers</h2>" in (here / "runs/s0/report.html").read_text()

    pytest.importorskip("onnxruntime")
    printed = call("export runs/s0 --out exported", capsys)
    assert all(f"exported/student.{kind}  differs" in printed for kind in ("onnx", "pt2"))


def test_data_sets_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAMKD_FAST_DATA", str(tmp_path))
    (tmp_path / "cifar10" / ".cache").mkdir(parents=True)
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "cifar-100-python.tar.gz").touch()
    lines = dict(line.split(maxsplit=1) for line in call("data list", capsys).splitlines())
    assert lines["cifar100"] == str(tmp_path / "cifar100")
    assert lines["cifar10"] == f"nothing in {tmp_path / 'cifar10'}: camkd-fast data fetch cifar10"
    assert lines["digits"] == "comes with scikit-learn" and "folder" in lines


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    printed = call("bench --shapes 8x10x2 --rounds 3 --no-compiled", capsys)
    assert re.search(r"^8 x 10 x 2 .* ms +[\d.]+x$", printed, re.MULTILINE)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"teach {SMALL} --model resnt8 --out runs/x", "no model is called 'resnt8'; nearest: resnet8,"),
        (f"teach {SMALL} --data digit --out runs/x", "got 'digit' (nearest: digits)"),
        (f"teach {SMALL} --root /nowhere --out runs/x", "digits come with scikit-learn"),
        ("teach --data folder --root nowhere --out runs/x", "nowhere"),
        (f"distill {SMALL} --strategy camkd --teachers runs/t0 --out runs/x", "no strategy is named 'camkd'; nearest:"),
        (f"distill {SMALL} --out runs/x", "ca-mkd learns from teachers, but none were given"),
        (f"distill {SMALL} --teachers runs/nobody --out runs/x", "source runs/nobody does not exist"),
        ("teach --config runs/s0/config.yaml", "is the config of a distill run, but the command is teach"),
        ("teach --config nowhere.yaml", "nowhere.yaml: No such file or directory"),
        ("distill --config broken.yaml", "broken.yaml is not YAML"),
        ("distill --config unknown.yaml", "unknown.yaml: unknown field optim.epoch; did you mean optim.epochs?"),
        ("evaluate runs/nobody", "runs/nobody holds no run"),
        ("evaluate unfinished", "unfinished holds an unfinished run"),
        ("report runs/nobody", "runs/nobody/config.yaml: No such file or directory"),
        ("report unfinished", "unfinished/metrics.jsonl has no finished epoch to report"),
        ("export runs/nobody", "runs/nobody holds no run"),
        ("compare --strategies aver camkd", "no strategy is named 'camkd'"),
        ("data fetch imagenet", "only cifar10, cifar100, fashion-mnist can be fetched, got 'imagenet'"),
    ],
)
def test_bad_input_is_one_line(here: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken.yaml").write_text("job: [")
    (here / "unknown.yaml").write_text("job: distill\noptim:\n  epoch: 3\n")
    (here / "unfinished").mkdir(exist_ok=True)
    (here / "unfinished/config.yaml").write_text("job: teach\n")
    (here / "unfinished/metrics.jsonl").touch()
    error = call(line, capsys, status=1)
    assert error.startswith("camkd-fast: ") and words in error
    assert not (here / "runs/x").exists()


def test_a_teacher_of_another_class_count_is_named_with_both(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog", "owl"):
            images = here / "tree" / split / name
            images.mkdir(parents=True, exist_ok=True)
            for i in range(4):
                Image.new("L", (8, 8), 40 * i).save(images / f"{i}.png")
    metadata = {"model": "resnet8", "num_classes": 10, "in_channels": 3, "mean": [1.0] * 3, "std": [1.0] * 3}
    model = model_bytes(models.create("resnet8", 10), {**metadata, "size": [8, 8], "class_names": list("0123456789")})
    (here / "colour.safetensors").write_bytes(model)
    line = "distill --data folder --root tree --size 8 --epochs 1 --validation 0 --student resnet8 --out runs/x"
    assert "it takes images of 1 channels, but they have 3" in call(f"{line} --teachers runs/t0", capsys, status=1)
    error = call(f"{line} --teachers colour.safetensors", capsys, status=1)
    assert (
        "colour.safetensors knows 10 classes, such as '0' and '1', but the images have 3, such as 'cat' and 'd" in error
    )
    assert "give a model of the same classes, or say which is which with --class-map FILE" in error


def test_a_damaged_model_is_named(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes((here / "runs/t0/model.safetensors").read_bytes()[:5000])
    assert "model.safetensors is damaged" in call(f"export {tmp_path}", capsys, status=1)


@pytest.mark.parametrize(
    "line", ["no-such-command", "", "demo --no-such-option", "teach --epoch 3", "teach --epochs 0", "evaluate", "data"]
)
def test_bad_command_line_exits_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert "camkd-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("distill --temperature 0", "temperature must be positive and finite, got 0.0"),
        ("distill --alpha -1", "alpha must be at least 0, got -1.0"),
        ("compare --beta nan", "beta must be at least 0, got nan"),
        ("compare --cache-top-k 0", "cache_top_k must be at least 1, got 0"),
        ("compare --seeds 1 2 1", "seeds must be one or more different ones, got 1 2 1"),
        ("compare --jobs 0", "jobs must be at least 1, got 0"),
        ("compare --strategies ce ce", "strategies must be one or more different ones, got ce ce"),
        ("compare --strategies", "strategies must be one or more different ones, got"),
        ("teach --padding 5000000000", "padding must be at most 16384, got 5000000000"),
        ("bench --shapes 4x5x17", "shapes may have up to 16 teachers, got '4x5x17'"),
        ("bench --shapes 1x99999999999x2", "shapes must be IMAGESxCLASSESxTEACHERS, got '1x99999999999x2'"),
        ("bench --shapes", "shapes must be one or more of IMAGESxCLASSESxTEACHERS, got none"),
        ("compare --check -1", "check must be at least 0, got -1"),
        ("compare --check 3 --jobs 2", "--jobs, --check: only for studies, with --study FILE"),
        ("compare --results r.jsonl", "--results: only for studies, with --study FILE"),
        ("teach --seed 99999999999999999999", "seed must lie in [-2**63, 2**64), got 99999999999999999999"),
        (
            "distill --view-seed -99999999999999999999",
            "view_seed must lie in [-2**63, 2**64), got -99999999999999999999",
        ),
        ("teach --epochs 0", "epochs must be at least 1, got 0"),
        ("teach --learning-rate inf", "learning_rate must be positive and finite, got inf"),
        ("teach --wrong-labels 1", "wrong_labels must lie in [0, 1), got 1.0"),
        ("teach --swapped 1", "swapped must name two different classes, got 1"),
        ("teach --rand-augment 0 9", "rand_augment must be 1 operation or more of magnitude 0 to 30, got 0 of 9"),
        ("teachers x --batch-size 0", "batch_size must be at least 1, got 0"),
        ("teachers x --validation 2", "validation must lie in [0, 1), got 2.0"),
        ("bench --rounds 0", "rounds must be at least 1, got 0"),
        ("bench --shapes 8x10", "shapes must be IMAGESxCLASSESxTEACHERS, got '8x10'"),
        ("distill --teacher-cache c", "teacher_cache c needs a fixed number of views, got views None"),
    ],
)
def test_a_bad_value_exits_2_with_one_line(line: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert (stopped.value.code, capsys.readouterr().err) == (2, f"camkd-fast: {reason}\n")


def test_a_word_in_place_of_a_number_is_the_parsers_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["distill", "--epochs", "many"])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "--epochs" in printed and "many" in printed


def test_what_the_parser_prints_besides_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tyros = options.tyro.cli

    def warns(*arguments: Any, **keywords: Any) -> Any:
        print("a warning", file=sys.stderr)
        return tyros(*arguments, **keywords)

    monkeypatch.setattr(options.tyro, "cli", warns)
    assert isinstance(parse(["bench"]), Bench)
    assert capsys.readouterr().err == "a warning\n"


def numeric_options(kind: type) -> Iterator[tuple[str, int]]:
    """Name and number of values of each option that is a number or several."""
    for name, hint in get_type_hints(kind).items():
        types = set(get_args(hint) or [hint])
        if is_dataclass(hint):
            yield from numeric_options(hint)  # type: ignore[arg-type]
        elif types & {int, float}:
            yield f"--{name.replace('_', '-')}", 2 if get_origin(hint) is tuple else 1


@pytest.mark.parametrize("command", [Teach, Teachers, Compare, Bench])
def test_no_number_is_an_unexpected_error(command: type, capsys: pytest.CaptureFixture[str]) -> None:
    name = command.__name__.lower()
    refused = 0
    for option, count in numeric_options(command):
        for value in ("-1", "nan"):
            try:
                parse([name, *["x"][: name == "teachers"], option, *[value] * count])
            except SystemExit as stopped:
                refused += 1
                assert stopped.code == 2
            assert value == "-1" or "nan" in capsys.readouterr().err  # no option takes it
    assert refused > (1 if command is Bench else 10)


def test_an_option_that_is_nearly_right_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["teach", "--epoch", "3"])
    error = capsys.readouterr().err
    assert "Unrecognized options: --epoch" in error and "--epochs INT" in error


def test_demo_into_a_file_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in call(f"demo --out {tmp_path / 'file' / 'out'}", capsys, status=1)


# --- what is missing, other processes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("tyro", "teach", "camkd-fast teach needs tyro: pip install 'camkd-fast[train]'"),
        ("sklearn", "demo", "camkd-fast demo needs scikit-learn: pip install 'camkd-fast[train]'"),
        ("onnxruntime", "export runs/s0", "camkd-fast export needs onnxruntime: pip install 'camkd-fast[export]'"),
    ],
)
def test_a_missing_extra_is_named(
    module: str, line: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == module else object())
    assert words in call(line, capsys, status=1)


def test_other_ranks_are_silent_but_for_errors(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call("data list", capsys) == ""
    assert call("evaluate runs/nobody", capsys, status=1).startswith("camkd-fast: process 1: ")


@pytest.mark.slow
def test_torchrun_prints_once_and_leaves_one_run(here: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "camkd_fast", *f"teach {SMALL} --model resnet8 --device cpu --out runs/two".split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert (here / "runs/two/report.html").exists()
    assert len((here / "runs/two/metrics.jsonl").read_text().splitlines()) == 2  # one epoch, the test
    assert not (here / "runs/two/.lock").exists()
    with locked(here / "runs/two"):
        done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    for start in ("camkd-fast: ", "camkd-fast: process 1: "):
        assert f"{start}runs/two is being written by process" in done.stderr


@pytest.mark.slow
def test_torchrun_compares(here: Path) -> None:
    """Every cell has a process group; both processes see that another command writes the folder."""
    assert cli.main(f"teach {SMALL} --model resnet8 --device cpu --out runs/teacher".split()) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    line = f"compare {SMALL} --student resnet8 --teachers runs/teacher --device cpu --out runs/both"
    command = [*torchrun, "camkd_fast", *line.split(), "--strategies", "ce", "aver", "--seeds", "0", "1"]
    with locked(here / "runs/both"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode != 0
    for start in ("camkd-fast: ", "camkd-fast: process 1: "):
        assert f"{start}runs/both is being written by process" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(list((here / "runs/both").glob("*/seed-*/model.safetensors"))) == 4
