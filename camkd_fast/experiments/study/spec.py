"""The settings file of a study as frozen dataclasses: teachers, pools, students, variants and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ...system import is_portable_name
from ...train import config_file, strategies
from ...train.config import DataConfig, OptimConfig, PrecisionConfig
from ...train.yaml_file import read_yaml

NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")  # names are used as folder names
REFERENCE = strategies.AVER.name  # default of `Variant.against`


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher that is trained on labels or derived from another teacher."""

    name: str
    model: str = ""
    seed: int = 0
    badness: str = ""  # description of a bad teacher; empty for a good one
    epochs: int | None = None  # None: from `StudyConfig.teaching`
    images: int | None = None  # number of training images; None: all
    wrong_labels: float = 0.0
    swapped: tuple[int, ...] = ()
    source: str = ""  # the teacher that this one is derived from, by scaling its logits
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        _name("teacher", self.name)
        if bool(self.model) == bool(self.source):
            raise ValueError(f"teacher {self.name} needs a model or a source, and not both")
        if not 0.0 < self.logit_scale < float("inf"):
            raise ValueError(f"teacher {self.name} has logit_scale {self.logit_scale}, which must be positive, finite")
        if self.model and self.logit_scale != 1.0:
            raise ValueError(f"teacher {self.name} is trained: logit_scale {self.logit_scale} is for one with a source")


@dataclass(frozen=True)
class Pool:
    """Teachers of one student."""

    name: str
    teachers: tuple[str, ...]
    label: str = ""

    def __post_init__(self) -> None:
        _name("pool", self.name)
        if not self.teachers:
            raise ValueError(f"pool {self.name} has no teachers")


@dataclass(frozen=True)
class Student:
    """A student, named by its model, and its own settings."""

    model: str
    learning_rate: float | None = None  # None: from `StudyConfig.training`
    beta: float | None = None  # replaces the beta of main-table variants that have one
    pools: tuple[str, ...] = ()  # empty: all

    def __post_init__(self) -> None:
        _name("student", self.model)


@dataclass(frozen=True)
class Variant:
    """A strategy with options, and the pools and students that it is run with."""

    name: str
    strategy: str
    label: str = ""
    table: Literal["main", "official", "ablation"] = "main"
    best_teacher: bool = False  # teacher_index is that of the highest validation accuracy, the first of equals
    alpha: float = 1.0
    beta: float | None = None
    temperature: float = 4.0
    detach: bool = True
    uniform: Literal["none", "logits", "features"] = "none"
    official_scale: bool = False
    against: str = REFERENCE  # the variant that this one is compared with
    pools: tuple[str, ...] = ()  # empty: all
    students: tuple[str, ...] = ()  # empty: all

    def __post_init__(self) -> None:
        _name("variant", self.name)
        kind = strategies.find(self.strategy)
        if self.best_teacher and "teacher_index" not in kind.options:
            who = ", ".join(strategies.taking("teacher_index"))
            raise ValueError(f"variant {self.name} is {self.strategy}: best_teacher is for {who}")

    @property
    def has_pool(self) -> bool:
        """False for variants without teachers, whose runs belong to every pool."""
        return strategies.find(self.strategy).needs_teachers


@dataclass(frozen=True)
class StudyConfig:
    """The whole study; all names that it refers to must be defined in it."""

    title: str
    teachers: tuple[TeacherSpec, ...]
    pools: tuple[Pool, ...]
    students: tuple[Student, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    data: DataConfig = field(default_factory=DataConfig)
    """Data of students. Teachers use the same split, but all images and new views in every epoch."""
    training: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of students."""
    teaching: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of teachers."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Precision of students, and of teachers for their cache."""
    teaching_precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Precision of teachers while they are trained."""
    cache_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        teachers = _unique("teacher", [teacher.name for teacher in self.teachers])
        pools = _unique("pool", [pool.name for pool in self.pools])
        students = _unique("student", [student.model for student in self.students])
        variants = _unique("variant", [variant.name for variant in self.variants])
        _unique("seed", self.seeds)
        trained = [teacher.name for teacher in self.teachers if teacher.model]
        for teacher in self.teachers:
            _known(f"source of teacher {teacher.name}", (teacher.source,) if teacher.source else (), trained)
        for pool in self.pools:
            _known(f"teachers of pool {pool.name}", pool.teachers, teachers)
        for student in self.students:
            _known(f"pools of student {student.model}", student.pools, pools)
        for variant in self.variants:
            _known(f"pools of variant {variant.name}", variant.pools, pools)
            _known(f"students of variant {variant.name}", variant.students, students)
            _known(f"against of variant {variant.name}", (variant.against,), variants)
        if self.data.views is None:
            raise ValueError("data.views must be a number: all cells of a pool replay one teacher cache")
        if self.data.view_seed is None:
            raise ValueError("data.view_seed must be a number: cells from several seeds share one teacher cache")

    def teacher(self, name: str) -> TeacherSpec:
        return next(teacher for teacher in self.teachers if teacher.name == name)

    def pool(self, name: str) -> Pool:
        return next(pool for pool in self.pools if pool.name == name)

    def student(self, model: str) -> Student:
        return next(student for student in self.students if student.model == model)

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def is_bad(self, teacher: str) -> bool:
        return bool(self.teacher(teacher).badness)

    def bad(self, pool: Pool) -> list[str]:
        """The bad teachers of a pool."""
        return [name for name in pool.teachers if self.is_bad(name)]


def load(path: Path) -> StudyConfig:
    """The study in a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML, or a field is missing, unknown or invalid; the message has file and field.
    """
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping, got {content!r}")
    try:
        return config_file.build(StudyConfig, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).replace('StudyConfig.__init__()', 'the study')}") from error


Name = TypeVar("Name", str, int)


def _name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} names are made of a-z, 0-9, . and -, got {name!r}")
    if not is_portable_name(name):
        raise ValueError(f"{what} names are names of folders, which Windows refuses for {name!r}")


def _unique(what: str, names: Sequence[Name]) -> Sequence[Name]:
    if not names:
        raise ValueError(f"a study needs at least one {what}")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]} is named twice")
    return names


def _known(what: str, used: Sequence[Any], known: Sequence[Any]) -> None:
    for name in used:
        if name not in known:
            raise ValueError(f"{what}: {name!r} is none of {', '.join(map(str, known))}")
