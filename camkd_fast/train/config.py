"""Settings of a run as frozen dataclasses; each field is a command line option, its docstring the help text.

Field names are unique over all classes, so options need no prefixes. Defaults marked "paper" are those of
arXiv 2201.00007.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from typing_extensions import Doc

from ..data.augment import Augmentation
from .source_strings import SourceString
from .strategies import STRATEGIES, names, taking

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of `PrecisionConfig.dtype`

MOST_PIXELS = 1 << 14  # of a side or its padding
# Compilation takes 3 to 26 s and gains 1.1 ms a step under CUDA graphs (an H200, three ResNet-32x4 and VGG-8).
COMPILED_STEPS = 10_000


@dataclass(frozen=True)
class DataConfig:
    """Data set, split, loader and augmentation."""

    data: str = "digits"
    """Data set: a name of the catalogue, or "folder" for a class-per-folder tree at --root."""
    root: Path | None = None
    """Folder of the data set; None: its default location."""
    split_seed: int = 0
    """Seed of the stratified split into training and validation images."""
    validation: float = 0.1
    """Fraction of the training images held out for validation."""
    size: int | None = None
    """Side in pixels to which files are resized and arrays are padded; None: the data set's own."""
    images: int | None = None
    """Number of images to train on, stratified by class; None: all."""
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    """Loader: images resident on the device, DALI, or torch's DataLoader; auto picks one."""
    workers: int | None = None
    """Threads or processes that decode files; None: this process's share of the processors, at most 8."""
    augmentation: Literal["auto", "none", "crop", "resized-crop"] = "auto"
    """Training augmentation; auto: shifted crops up to 64 pixels (paper: CIFAR-100), resized crops above."""
    padding: int | None = None
    """Pixels of zero padding around shifted crops; None: an eighth of the side (paper: 4 of 32)."""
    flip: bool | None = None
    """Flip images horizontally at random; None: yes, except for digits."""
    rand_augment: tuple[int, ...] = ()
    """RandAugment: operations per image and their magnitude from 0 to 30, of which 2 9 is usual; (): none."""
    random_erasing: float = 0.0
    """Probability that a random box of a training image is erased to the mean of the data set."""
    views: int | None = None
    """Augmented views per image, repeated over the epochs; None: new ones each epoch. A teacher cache needs them."""
    view_seed: int | None = None
    """Seed of the augmentation; None: the run's seed. Runs with the same view seed can share a teacher cache."""
    skip_bad: int = 0
    """Number of image files that may be unreadable: by their headers in all parts, by their contents in each part."""

    def __post_init__(self) -> None:
        _choices(self)
        _fraction("validation", self.validation)
        _seed("split_seed", self.split_seed)
        _seed("view_seed", self.view_seed)
        for name, low in (("size", 1), ("images", 1), ("workers", 0), ("padding", 0), ("views", 1), ("skip_bad", 0)):
            at_least(name, getattr(self, name), low)
        for name, high in (("size", MOST_PIXELS), ("padding", MOST_PIXELS)):
            if (getattr(self, name) or 0) > high:
                raise ValueError(f"{name} must be at most {high}, got {getattr(self, name)}")
        if len(self.rand_augment) not in (0, 2):
            raise ValueError(f"rand_augment must be two numbers, got {' '.join(map(str, self.rand_augment))}")
        if self.rand_augment:
            Augmentation(padding=0, rand_augment=(self.rand_augment[0], self.rand_augment[1]))  # which checks them
        if not 0.0 <= self.random_erasing <= 1.0:
            raise ValueError(f"random_erasing must lie in [0, 1], got {self.random_erasing}")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning rate schedule, and what a step does to its batch and its gradients."""

    epochs: int = 240
    """Passes over the training images (paper: 240)."""
    batch_size: int = 64
    """Images per step, summed over all processes (paper: 64)."""
    learning_rate: float | None = None
    """Peak learning rate; None: 0.05, 0.01 for MobileNetV2 and ShuffleNets (paper), 0.001 for adamw and muon."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning rate schedule (paper: step)."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Fractions of the run, or epochs (1 and more), after which a step schedule drops (paper: epochs 150 180 210)."""
    drop: float = 0.1
    """Factor of each drop of a step schedule (paper: 0.1)."""
    warmup: float = 0.0
    """Epochs of linear warmup (paper: none)."""
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """Optimiser (paper: sgd); muon: torch's Muon for weights of two and more dimensions, AdamW for all others."""
    momentum: float = 0.9
    """Nesterov momentum of sgd and muon (paper: 0.9)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of AdamW's averages of gradients and of their squares."""
    weight_decay: float = 5e-4
    """L2 penalty of sgd (paper: 5e-4), or decoupled weight decay of adamw and muon, of which 0.05 is usual."""
    decay_norms: bool = True
    """Decay parameters of fewer than two dimensions too: norms and biases (paper)."""
    clip_grad: float | None = None
    """Largest norm of the gradients of all parameters together, to which larger ones are scaled down; None, 0: any."""
    ema: float | None = None
    """Decay of an average of the student over the steps, evaluated and written beside it; None: none."""
    label_smoothing: float = 0.0
    """Share of the label that the student's cross-entropy spreads over all classes."""
    mixup: float = 0.0
    """Alpha of Mixup, of which 0.2 is usual; 0: none. With Mixup and CutMix each batch has one of them, by chance."""
    cutmix: float = 0.0
    """Alpha of CutMix, of which 1 is usual; 0: none."""

    def __post_init__(self) -> None:
        _choices(self)
        for name in ("epochs", "batch_size"):
            at_least(name, getattr(self, name), 1)
        if self.learning_rate is not None and not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        fractions = [0.0 < milestone < 1.0 for milestone in self.milestones]
        epochs = [1.0 <= milestone < math.inf for milestone in self.milestones]
        if list(self.milestones) != sorted(self.milestones) or not (all(fractions) or all(epochs)):
            raise ValueError(
                f"milestones must be rising fractions between 0 and 1, or epochs from 1 on, got {self.milestones}"
            )
        if not 0.0 < self.drop <= 1.0:
            raise ValueError(f"drop must lie in (0, 1], got {self.drop}")
        if not 0.0 <= self.warmup < self.epochs:
            raise ValueError(f"warmup must lie in [0, epochs), got {self.warmup} of {self.epochs} epochs")
        at_least("clip_grad", self.clip_grad, 0)
        _fraction("label_smoothing", self.label_smoothing)
        at_least("mixup", self.mixup, 0)
        at_least("cutmix", self.cutmix, 0)
        if self.ema is not None:
            _fraction("ema", self.ema)
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas}")
        for value in self.betas:
            _fraction("betas", value)
        if not 0.0 < self.momentum < 1.0:
            raise ValueError(f"momentum must lie in (0, 1), got {self.momentum}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")


@dataclass(frozen=True)
class PrecisionConfig:
    """Device, precision and compilation of a step."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU if torch sees one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of activations (autocast) and teachers. Student parameters are float32; float16 uses loss scaling."""
    channels_last: bool = False
    """Channels-last memory format for images and convolutions."""
    compile: Literal["auto", "on", "teachers", "off"] = "auto"
    """torch.compile student, loss and teachers, or only the teachers; auto: on for a GPU and at least 10,000 steps."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay each training step as one CUDA graph, with and without compilation; auto: on for a GPU."""
    teacher_ahead: Literal["auto", "on", "off"] = "auto"
    """Run the teachers on the next batch beside the student's step on this one; auto: on in a CUDA graph."""
    sync_batchnorm: bool = False
    """Batch-norm statistics over all GPUs instead of per process."""
    deterministic: Literal["auto", "on", "off"] = "auto"
    """Use only deterministic algorithms; auto: on a CPU, where they cost nothing."""

    def __post_init__(self) -> None:
        _choices(self)

    def for_run(self, device: str, steps: int) -> PrecisionConfig:
        """These settings for a run of `steps` steps: "auto" compiles only where that gains more time than it takes."""
        if self.compile != "auto":
            return self
        return replace(self, compile="on" if device == "cuda" and steps >= COMPILED_STEPS else "off")

    def compiles(self, device: str) -> bool:
        """Whether student and loss are compiled on this device type; "auto" as for a long run."""
        return self.compile == "on" or (self.compile == "auto" and device == "cuda")

    def compiles_teachers(self, device: str) -> bool:
        """Whether teachers are compiled. On a CPU only they gain: compiled batch statistics are slow there."""
        return self.compile == "teachers" or self.compiles(device)


@dataclass(frozen=True)
class LogConfig:
    """Logging and checkpoints; no effect on the result."""

    log_every: int = 50
    """Steps between two log records; each one synchronises with the device and checks the loss."""
    validate_every: int = 1
    """Epochs between two evaluations on the validation images; the last epoch is always evaluated."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: only at the end of every epoch and by time."""
    checkpoint_minutes: float = 10.0
    """Minutes after which the next log record also writes a checkpoint; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name, low in (("log_every", 1), ("validate_every", 1), ("checkpoint_every", 0), ("checkpoint_minutes", 0)):
            at_least(name, getattr(self, name), low)


@dataclass(frozen=True)
class TeachConfig:
    """Train one model on labels, to become a teacher."""

    model: str = "resnet32x4"
    """Model (paper: ResNet-32x4, ResNet-56, WRN-40-2, VGG-13 as teachers)."""
    seed: int = 0
    """Seed of initial parameters, image order and augmentation."""
    out: Path = Path("runs/teach")
    """Run folder to write."""
    wrong_labels: float = 0.0
    """Fraction of training labels replaced by wrong ones, for a deliberately poor teacher."""
    swapped: tuple[int, ...] = ()
    """Two classes whose training labels are swapped, for a teacher with a systematic error."""
    init: SourceString | None = None
    """Initial weights: a run folder, NAME@FILE, timm:NAME or another source of this architecture; None: random."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _source(self, "init")
        _seed("seed", self.seed)
        _fraction("wrong_labels", self.wrong_labels)
        if self.swapped and (len(self.swapped) != 2 or len(set(self.swapped)) != 2 or min(self.swapped) < 0):
            raise ValueError(f"swapped must name two different classes, got {' '.join(map(str, self.swapped))}")


def _published_betas() -> str:
    return ", ".join(f"{STRATEGIES[name].options['beta']:g} for {name}" for name in taking("beta"))


@dataclass(frozen=True)
class DistillConfig:
    """Train a student from the labels and from trained teachers."""

    student: str = "vgg8"
    """Model of the student."""
    teachers: tuple[SourceString, ...] = ()
    """Teachers: run folders, NAME@FILE, timm:NAME, torchvision:NAME@WEIGHTS, hf:NAME or py:MODULE:FUNCTION."""
    strategy: Annotated[str, Doc(f"How the teachers are combined: {', '.join(names())}.")] = "ca-mkd"
    alpha: float = 1.0
    """Weight of the distillation loss relative to the cross-entropy (paper: 1)."""
    beta: Annotated[
        float | None, Doc(f"Weight of the feature loss; None: the strategy's own ({_published_betas()}).")
    ] = None
    temperature: float = 4.0
    """Temperature of the distillation loss (paper: 4)."""
    official_scale: bool = False
    """Divide the losses of ebkd, ca-mkd-logits and ca-mkd by the number of teachers, as the official code does."""
    teacher_index: Annotated[
        int, Doc(f"Teacher that {', '.join(taking('teacher_index'))} learns from, counted from 0.")
    ] = 0
    detach: bool = True
    """Cut the gradient through the feature weights (the paper does not say; the official code keeps it)."""
    uniform: Annotated[
        Literal["none", "logits", "features"],
        Doc(f"Give all teachers equal weights in this part of {', '.join(taking('uniform'))}, as an ablation."),
    ] = "none"
    class_map: Path | None = None
    """JSON or YAML file: class of the images -> class of the teacher, by name or number, for all teachers or each."""
    teacher_cache: Path | None = None
    """Folder for a cache of the teachers' outputs, which replaces their forward passes from then on; needs --views."""
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the teacher cache; float32 is exact."""
    cache_top_k: int | None = None
    """Logits per sample kept in the cache, besides the total mass of the others; None: all."""
    seed: int = 0
    """Seed of initial parameters, image order and augmentation."""
    out: Path = Path("runs/distill")
    """Run folder to write."""
    init: SourceString | None = None
    """Initial weights: a run folder, NAME@FILE, timm:NAME or another source of this architecture; None: random."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _choices(self)
        if isinstance(self.teachers, (str, Path)):
            raise ValueError(f"teachers must be several sources, got only {str(self.teachers)!r}")
        object.__setattr__(self, "teachers", tuple(map(SourceString, self.teachers)))
        _source(self, "init")
        _seed("seed", self.seed)
        for name, low in (("alpha", 0), ("beta", 0), ("teacher_index", 0), ("cache_top_k", 1)):
            at_least(name, getattr(self, name), low)
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.teacher_cache is not None and self.data.views is None:
            raise ValueError(f"teacher_cache {self.teacher_cache} needs a fixed number of views, got views None")
        if self.teacher_cache is not None and (self.optim.mixup or self.optim.cutmix):
            raise ValueError(
                f"teacher_cache {self.teacher_cache} holds outputs of images that are not mixed, got mixup "
                f"{self.optim.mixup:g} and cutmix {self.optim.cutmix:g}"
            )


JobConfig = TeachConfig | DistillConfig
JOBS: dict[str, type[TeachConfig] | type[DistillConfig]] = {"teach": TeachConfig, "distill": DistillConfig}


# --- checks ----------------------------------------------------------------------------------------------------------


def _source(config: object, name: str) -> None:
    """A string or a Path in the field becomes a source."""
    if getattr(config, name) is not None:
        object.__setattr__(config, name, SourceString(getattr(config, name)))


def at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and not low <= value < math.inf:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def _seed(name: str, value: int | None) -> None:
    """torch's generators take negative seeds too."""
    if value is not None and not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must lie in [-2**63, 2**64), got {value}")


def _fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def _choices(config: Any) -> None:
    """Fields that are annotated as a Literal hold one of its values."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
