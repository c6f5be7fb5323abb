"""The commands and their options as dataclasses for tyro: fields are options, docstrings are help texts.

Options have no prefixes (`--epochs`, not `--settings.optim.epochs`), so field names are unique within each command.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, Suppress, arg, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..losses.checks import MAX_TEACHERS
from ..system import expand_path
from ..train import config_file, strategies
from ..train.config import JOBS, DataConfig, DistillConfig, TeachConfig, at_least
from ..train.source_strings import SourceString


@dataclass(frozen=True)
class Teach:
    """Train one model on labels, to become a teacher."""

    settings: Annotated[TeachConfig, arg(name="")] = field(default_factory=TeachConfig)
    config: Path | None = None
    """config.yaml of a run to repeat; other options override its settings."""
    resume: bool = False
    """Resume from the last checkpoint in --out, if there is one."""
    overwrite: bool = False
    """Remove the run in --out, if there is one."""
    extend: bool = False
    """With --resume and other --epochs: go on although learning rates so far depend on the number of epochs."""


@dataclass(frozen=True)
class Distill:
    """Train a student from labels and trained teachers."""

    settings: Annotated[DistillConfig, arg(name="")] = field(default_factory=DistillConfig)
    config: Path | None = None
    """config.yaml of a run to repeat; other options override its settings."""
    resume: bool = False
    """Resume from the last checkpoint in --out, if there is one."""
    overwrite: bool = False
    """Remove the run in --out, if there is one."""
    extend: bool = False
    """With --resume and other --epochs: go on although learning rates so far depend on the number of epochs."""


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the model of a finished run on its data set."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of the run, or a model file in it, such as model_ema.safetensors."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to evaluate, unaugmented."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU if torch sees one."""


@dataclass(frozen=True)
class Teachers:
    """Compare sources of teachers on a data set: model, preprocessing, accuracy, agreement and speed."""

    sources: Annotated[tuple[SourceString, ...], Positional, arg(metavar="SOURCE ...")]
    """Run folders, NAME@FILE, timm:NAME, torchvision:NAME@WEIGHTS, hf:NAME or py:MODULE:FUNCTION."""
    data: str = "digits"
    """Data set: a name of the catalogue, or "folder" for a class-per-folder tree at --root."""
    root: Path | None = None
    """Folder of the data set; None: its default location."""
    split: Literal["auto", "train", "validation", "test"] = "auto"
    """Split to evaluate, unaugmented; auto: validation, or test if no image is held out."""
    split_seed: int = 0
    """Seed of the stratified split into training and validation images."""
    validation: float = 0.1
    """Fraction of the training images held out for validation."""
    size: int | None = None
    """Side in pixels to which files are resized and arrays are padded; None: the data set's own."""
    class_map: Path | None = None
    """JSON or YAML file: class of the images -> class of the teacher, by name or number, for all teachers or each."""
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    """Loader of the images."""
    workers: int | None = None
    """Threads or processes that decode files; None: this process's share of the processors, at most 8."""
    skip_bad: int = 0
    """Number of image files that may be unreadable."""
    batch_size: int = 256
    """Images per process and batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU if torch sees one."""

    def __post_init__(self) -> None:
        self.data_config()
        at_least("batch_size", self.batch_size, 1)

    def data_config(self) -> DataConfig:
        """The settings of the images, checked."""
        return DataConfig(**{f.name: getattr(self, f.name) for f in fields(DataConfig) if hasattr(self, f.name)})


@dataclass(frozen=True)
class ComparedStudent(DistillConfig):
    """Common settings of all runs of a comparison."""

    strategy: Suppress[str] = "ca-mkd"
    seed: Suppress[int] = 0
    out: Path = Path("runs/compare")
    """Folder of the comparison, with one subfolder per run."""


def _check_different(name: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more different ones, got {' '.join(map(str, values))}")


@dataclass(frozen=True)
class Compare:
    """Train one student with several strategies and seeds; finished runs are kept.

    Writes a table, compare.json and report.html; `camkd-fast report` writes the page of a single run.

    With --study FILE the file defines teachers, pools, students, variants and seeds. Everything is trained, including
    teachers, by --jobs processes of one thread each. Finished pieces are kept, in DIR and in the file of results, and
    killed ones resume. Under `torchrun --nproc-per-node N -m camkd_fast compare --study FILE --out DIR`, also with
    --nnodes, rank r of w takes every w-th cell, with --jobs processes each; ranks do not communicate, but reuse each
    other's teachers and caches if they share DIR. On machines without a shared folder, merge with --results FILE, one
    machine after the other.
    """

    strategies: tuple[str, ...] = field(default_factory=strategies.names)
    """Strategies to compare, with equal alpha; each gets only the options that it takes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every strategy; equal seeds share initial parameters and image order."""
    settings: Annotated[ComparedStudent, arg(name="")] = field(default_factory=ComparedStudent)
    config: Path | None = None
    """config.yaml of a distilled student to start from; other options override its settings."""
    overwrite: bool = False
    """Train all runs again."""
    extend: bool = False
    """With other --epochs: go on although learning rates so far depend on the number of epochs."""
    study: Path | None = None
    """YAML file of a study to run instead; only --out, --jobs, --results and --check may be combined with it."""
    jobs: int | None = None
    """Processes of a study; None: one per available processor, or one for a GPU."""
    results: Path | None = None
    """JSON-lines file into which a study's results are merged; None: results.jsonl in --out."""
    check: int = 0
    """Train this many finished cells of a study again, chosen at random, and compare their accuracies exactly."""

    def __post_init__(self) -> None:
        _check_different("strategies", self.strategies)
        _check_different("seeds", self.seeds)
        at_least("jobs", self.jobs, 1)
        at_least("check", self.check, 0)
        if self.study is None and (of_studies := [x for x in ("jobs", "results", "check") if getattr(self, x)]):
            raise ValueError(f"--{', --'.join(of_studies)}: only for studies, with --study FILE")


@dataclass(frozen=True)
class Report:
    """Write a run's report.html again from the files in its folder."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of the run."""


@dataclass(frozen=True)
class Fetch:
    """Download a data set with published checksums; an interrupted download resumes."""

    name: Annotated[str, Positional, arg(metavar="NAME")]
    """cifar10, cifar100 or fashion-mnist."""
    root: Path | None = None
    """Folder to write; None: $CAMKD_FAST_DATA/NAME or ~/.cache/camkd_fast/NAME."""
    base_url: str | None = None
    """URL of a mirror with the published file names; None: the publisher."""


@dataclass(frozen=True)
class ListData:
    """List the data sets and which of them are present."""


@dataclass(frozen=True)
class Data:
    """Data sets: list, fetch."""

    action: Annotated[Fetch, subcommand("fetch")] | Annotated[ListData, subcommand("list")]


@dataclass(frozen=True)
class Bench:
    """Time the loss, forward + backward, against the same formulas in eager PyTorch and under torch.compile."""

    shapes: tuple[str, ...] = ("64x100x3", "1024x100x3", "1024x1000x3")
    """Images x classes x teachers of each measurement."""
    rounds: int = 25
    """Repetitions, each of which times all losses once; the median is reported."""
    compiled: bool = True
    """Also time torch.compile; takes some seconds of compilation per shape."""

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds, 1)
        self.sizes()

    def sizes(self) -> list[tuple[int, int, int]]:
        """Images, classes and teachers of each measurement."""
        result = []
        for shape in self.shapes:
            sizes = shape.split("x")
            if len(sizes) != 3 or not all(size.isdecimal() and 0 < int(size) < 2**31 for size in sizes):
                raise ValueError(f"shapes must be IMAGESxCLASSESxTEACHERS, got {shape!r}")
            N, C, K = map(int, sizes)
            if K > MAX_TEACHERS:
                raise ValueError(f"shapes may have up to {MAX_TEACHERS} teachers, got {shape!r}")
            result.append((N, C, K))
        if not result:
            raise ValueError("shapes must be one or more of IMAGESxCLASSESxTEACHERS, got none")
        return result


@dataclass(frozen=True)
class Info:
    """Print versions, backends and the reason for each missing one, instruction set, threads, GPU."""


@dataclass(frozen=True)
class Export:
    """Write a run's model as ONNX and as a torch.export program, both checked against it."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of the run, or a model file in it, such as model_ema.safetensors."""
    out: Path | None = None
    """Folder to write; None: RUN/export."""
    folded: bool = True
    """Fold batch norms into convolutions; equal up to rounding."""


@dataclass(frozen=True)
class Demo:
    """Train teachers, one of them poor, and students on digits; write a report. Takes about a minute."""

    out: Path = Path("runs/demo")
    """Folder to write."""


Command: TypeAlias = Teach | Distill | Evaluate | Teachers | Compare | Report | Data | Bench | Info | Export | Demo
_COMMANDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in get_args(Command)}
_SETTINGS: dict[str, Any] = {"teach": TeachConfig, "distill": DistillConfig, "compare": ComparedStudent}


_PATHS = ConstructorRegistry()
_PACKAGE = __name__.partition(".")[0]
_refused: list[str] = []  # why sources of the command line could not be expanded


@_PATHS.primitive_rule
def _expanded_paths(field: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Every option that is a path is expanded."""
    if field.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: expand_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@_PATHS.primitive_rule
def _expanded_sources(field: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[SourceString] | None:
    """Read a source from the command line, with the path in it expanded."""
    if field.type is not SourceString:
        return None

    def expanded(words: list[str]) -> SourceString:
        try:
            return SourceString.expanded(words[0])
        except ValueError as error:
            _refused.append(str(error))  # in a list of values tyro says only that they cannot be parsed
            raise

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="SOURCE",
        instance_from_str=expanded,
        is_instance=lambda value: isinstance(value, SourceString),
        str_from_instance=lambda source: [str(source)],
    )


def parse(argv: Sequence[str]) -> Command:
    """Parse a command line.

    Raises:
        SystemExit: with status 2 for an invalid command line, 0 after --help. If one of the values is refused, the
            reason is one line on stderr.
        ValueError, OSError: the file of --config cannot be read, or has another job or invalid settings.
    """
    _refused.clear()
    with _PATHS:
        return _parse(argv)


def _parse(argv: Sequence[str]) -> Command:
    name, *options = argv or [""]
    if name not in _COMMANDS:
        # Without a valid command tyro prints the list of commands, as help or with an error.
        every: Any = reduce(or_, (Annotated[kind, subcommand(name)] for name, kind in _COMMANDS.items()))
        description = "Fast multi-teacher knowledge distillation (CA-MKD) for PyTorch."
        return _cli(every, prog="camkd-fast", description=description, args=list(argv))
    return _cli(
        _COMMANDS[name],
        prog=f"camkd-fast {name}",
        args=options,
        default=_configured(name, options),
        config=(OmitArgPrefixes, OmitSubcommandPrefixes),
    )


def _cli(command: Any, **options: Any) -> Command:
    """`tyro.cli`, which frames the errors of some settings, names their class, and raises those of others."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            found = cast(Command, tyro.cli(command, **options))
    except (SystemExit, ValueError) as error:
        if reason := _refused[0] if _refused else _reason_of_ours(error):
            print(f"camkd-fast: {reason}", file=sys.stderr)
            raise SystemExit(2) from error
        sys.stderr.write(printed.getvalue())
        raise
    sys.stderr.write(printed.getvalue())  # warnings
    return found


def _reason_of_ours(error: BaseException | None) -> str | None:
    """The message, on one line, of the ValueError of this package that led to `error`."""
    while error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and frames and frames[-1].f_globals["__name__"].startswith(f"{_PACKAGE}."):
            return " ".join(str(error).split())
        error = error.__context__
    return None


def _configured(name: str, options: Sequence[str]) -> Command | None:
    """The command with the settings of --config as defaults; None without --config."""
    if name not in _SETTINGS:
        return None
    parser = argparse.ArgumentParser(prog=f"camkd-fast {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=expand_path)
    path: Path | None = parser.parse_known_args(options)[0].config
    if path is None:
        return None
    loaded = config_file.load(path)
    if not issubclass(_SETTINGS[name], type(loaded)):
        job = next(job for job, kind in JOBS.items() if isinstance(loaded, kind))
        raise ValueError(f"{path} is the config of a {job} run, but the command is {name}")
    settings = _SETTINGS[name](**{f.name: getattr(loaded, f.name) for f in fields(loaded)})
    return cast(Command, _COMMANDS[name](settings=settings))
