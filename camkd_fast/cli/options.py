"""The commands and their options, which tyro reads from dataclasses: fields are options, docstrings their help.

Prefixes are left out: `--epochs`, not `--settings.optim.epochs`. Field names are unique within each command for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, Suppress, arg, subcommand

from ..train import config_file, strategies
from ..train.config import JOBS, DistillConfig, TeachConfig


@dataclass(frozen=True)
class Teach:
    """Train one model on labels, to become a teacher."""

    settings: Annotated[TeachConfig, arg(name="")] = field(default_factory=TeachConfig)
    config: Path | None = None
    """Settings of a run to repeat, its config.yaml; options beside it override it."""
    resume: bool = False
    """Go on from the last checkpoint in --out, if there is one."""
    overwrite: bool = False
    """Remove the run in --out, if there is one."""


@dataclass(frozen=True)
class Distill:
    """Train a student from labels and trained teachers."""

    settings: Annotated[DistillConfig, arg(name="")] = field(default_factory=DistillConfig)
    config: Path | None = None
    """Settings of a run to repeat, its config.yaml; options beside it override it."""
    resume: bool = False
    """Go on from the last checkpoint in --out, if there is one."""
    overwrite: bool = False
    """Remove the run in --out, if there is one."""


@dataclass(frozen=True)
class Evaluate:
    """A finished run's model on images of its data set."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of the run."""
    split: Literal["train", "validation", "test"] = "test"
    """Which images, unaugmented."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU where there is one."""


@dataclass(frozen=True)
class ComparedStudent(DistillConfig):
    """What all runs of a comparison share."""

    strategy: Suppress[str] = "ca-mkd"
    seed: Suppress[int] = 0
    out: Path = Path("runs/compare")
    """Folder of the comparison; every run has one in it."""


@dataclass(frozen=True)
class Compare:
    """Train one student with several strategies from several seeds; runs that are finished are kept.

    Writes a table, compare.json and report.html; `camkd-fast report` makes the page of a single run.

    With --study FILE the file says which teachers, pools, students, variants and seeds there are, and everything is
    trained, teachers included, by --jobs processes of one thread each. What is finished is kept, in DIR and in the file
    of results, and what was killed goes on. Under `torchrun --nproc-per-node N -m camkd_fast compare --study FILE
    --out DIR`, also with --nnodes, rank r of w takes every w-th cell, --jobs processes each; ranks do not talk, but
    find each other's teachers and caches where they share DIR. On machines that share nothing, merge with --results
    FILE, one machine after the other.
    """

    strategies: tuple[str, ...] = field(default_factory=strategies.names)
    """Strategies to compare, with equal alpha; beta is for those that regress feature maps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every strategy; equal seeds share first parameters and image order."""
    settings: Annotated[ComparedStudent, arg(name="")] = field(default_factory=ComparedStudent)
    config: Path | None = None
    """Settings to start from, the config.yaml of a distilled student; options beside it override it."""
    overwrite: bool = False
    """Train all runs anew."""
    study: Path | None = None
    """Study to run instead, a YAML file; of the other options --out, --jobs, --results and --check go with it."""
    jobs: int | None = None
    """Processes of a study; None: one per processor that this process may use, or one for a GPU."""
    results: Path | None = None
    """File of lines to which a study's results are merged; None: results.jsonl in --out."""
    check: int = 0
    """Train so many finished cells of a study once more, at random, and compare their accuracies exactly."""


@dataclass(frozen=True)
class Report:
    """Write a run's report.html again from what lies in its folder."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of the run."""


@dataclass(frozen=True)
class Fetch:
    """Download a data set with published checksums; an interrupted download goes on."""

    name: Annotated[str, Positional, arg(metavar="NAME")]
    """cifar10, cifar100 or fashion-mnist."""
    root: Path | None = None
    """Folder to write; None: $CAMKD_FAST_DATA/NAME or ~/.cache/camkd_fast/NAME."""
    base_url: str | None = None
    """A mirror that has the files under their published names; None: the publisher."""


@dataclass(frozen=True)
class ListData:
    """The data sets by name, and which of them are here."""


@dataclass(frozen=True)
class Data:
    """Data sets: list, fetch."""

    action: Annotated[Fetch, subcommand("fetch")] | Annotated[ListData, subcommand("list")]


@dataclass(frozen=True)
class Bench:
    """Time the loss, forward + backward, beside the same formulas in eager PyTorch and under torch.compile."""

    shapes: tuple[str, ...] = ("64x100x3", "1024x100x3", "1024x1000x3")
    """Images x classes x teachers of each measurement."""
    rounds: int = 25
    """Repetitions, in each of which all take their turn; the median counts."""
    compiled: bool = True
    """Compare with torch.compile too, some seconds of compilation per shape."""


@dataclass(frozen=True)
class Info:
    """Versions, backends and why one is missing, instruction set, threads, GPU."""


@dataclass(frozen=True)
class Export:
    """Write a run's model as ONNX and as a torch.export program, both checked against it."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of the run."""
    out: Path | None = None
    """Folder to write; None: RUN/export."""
    folded: bool = True
    """Fold batch norms into convolutions, equal up to rounding."""


@dataclass(frozen=True)
class Demo:
    """Train teachers, one of them poor, and students on digits; write a report. About a minute."""

    out: Path = Path("runs/demo")
    """Folder to write."""


Command: TypeAlias = Teach | Distill | Evaluate | Compare | Report | Data | Bench | Info | Export | Demo
_COMMANDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in get_args(Command)}
_SETTINGS: dict[str, Any] = {"teach": TeachConfig, "distill": DistillConfig, "compare": ComparedStudent}


def parse(argv: Sequence[str]) -> Command:
    """The command that `argv` asks for.

    Raises:
        SystemExit: with status 2 for a bad command line, 0 after --help.
        ValueError, OSError: the file of --config cannot be read, holds another job or unfit settings.
    """
    name, *options = argv or [""]
    if name not in _COMMANDS:
        # Nothing but help or an error can come of this: it says what commands there are.
        every: Any = reduce(or_, (Annotated[kind, subcommand(name)] for name, kind in _COMMANDS.items()))
        description = "Fast multi-teacher knowledge distillation (CA-MKD) for PyTorch."
        return cast(Command, tyro.cli(every, prog="camkd-fast", description=description, args=list(argv)))
    command = tyro.cli(
        _COMMANDS[name],
        prog=f"camkd-fast {name}",
        args=options,
        default=_configured(name, options),
        config=(OmitArgPrefixes, OmitSubcommandPrefixes),
    )
    return cast(Command, command)


def _configured(name: str, options: Sequence[str]) -> Command | None:
    """The command with the settings of --config, which take the place of the defaults; None without it."""
    if name not in _SETTINGS:
        return None
    parser = argparse.ArgumentParser(prog=f"camkd-fast {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path: Path | None = parser.parse_known_args(options)[0].config
    if path is None:
        return None
    loaded = config_file.load(path)
    if not issubclass(_SETTINGS[name], type(loaded)):
        job = next(job for job, kind in JOBS.items() if isinstance(loaded, kind))
        raise ValueError(f"{path} is the config of a {job} run, but {name} was asked for")
    settings = _SETTINGS[name](**{f.name: getattr(loaded, f.name) for f in fields(loaded)})
    return cast(Command, _COMMANDS[name](settings=settings))
