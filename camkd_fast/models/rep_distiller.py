"""Parameter names of checkpoints of RepDistiller (github.com/HobbitLong/RepDistiller) and CA-MKD
(github.com/Rorozhl/CA-MKD), and zoo models with such weights.

The architectures are the zoo's; only the names of the modules differ. One table per family has the official names of
the modules within a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from . import create, mobilenet, resnet, shufflenet, vgg, wide_resnet, zoo_name
from . import names as zoo_names
from .weights import fill, size

Names = dict[str, str]  # official -> ours


def _pairs(*ours: str) -> Names:
    """`conv1` and `bn1`, `conv2` and `bn2`, ... are the first two modules of the sequences `ours`."""
    return {f"{kind}{i}": f"{path}.{k}" for i, path in enumerate(ours, 1) for k, kind in enumerate(("conv", "bn"))}


# Modules in a unit. Units that keep the shape have no shortcut.
_RESNET = {**_pairs("residual.0", "residual.1"), "downsample.0": "shortcut.0", "downsample.1": "shortcut.1"}
_WIDE_RESNET = {"bn1": "bn1", "conv1": "conv1", "bn2": "bn2", "conv2": "conv2", "convShortcut": "shortcut"}
_MOBILENET = {f"conv.{3 * i + k}": f"layers.{i}.{k}" for i in range(3) for k in range(2)}
_SHUFFLENET_V1 = _pairs("layers.0", "layers.2", "layers.3")  # layers.1 is the shuffle
_SHUFFLENET_V2 = _pairs("branch.0", "branch.1", "branch.2")
_SHUFFLENET_V2_DOWN = _pairs("short.0", "short.1", "branch.0", "branch.1", "branch.2")


def _units(stages: Iterable[tuple[str, int]], unit: Names, first: Names | None = None) -> Names:
    """Modules of all units, which follow the stem in our body.

    Args:
        stages: official path of each stage, and its number of units.
        first: modules of a stage's first unit, if they differ.
    """
    names: Names = {}
    position = 1
    for path, units in stages:
        for index in range(units):
            inside = first if first is not None and index == 0 else unit
            names |= {f"{path}.{index}.{theirs}": f"body.{position}.{ours}" for theirs, ours in inside.items()}
            position += 1
    return names


def _resnet(architecture: resnet.Architecture) -> Names:
    stages = [(f"layer{stage}", architecture.blocks) for stage in (1, 2, 3)]
    return {**_pairs("body.0"), **_units(stages, _RESNET), "fc": "fc"}


def _wide_resnet(architecture: wide_resnet.Architecture) -> Names:
    blocks = (architecture.depth - 4) // 6
    stages = [(f"block{stage}.layer", blocks) for stage in (1, 2, 3)]
    return {"conv1": "body.0", **_units(stages, _WIDE_RESNET), "bn1": f"body.{1 + 3 * blocks}", "fc": "fc"}


def _vgg(blocks: tuple[tuple[int, ...], ...]) -> Names:
    names: Names = {}
    position = 0
    for block, widths in enumerate(blocks):
        position += block > 0  # a pooling layer, which has no number in the official block
        for i in range(len(widths)):
            for k in range(2):  # convolution and batch norm; a ReLU follows
                names[f"block{block}.{3 * i + k}"] = f"body.{position + k}"
            position += 3
    return {**names, "classifier": "fc"}


def _mobilenet() -> Names:
    counts = [stage.blocks for stage in mobilenet.STAGES]
    names = _units([(f"blocks.{stage}", count) for stage, count in enumerate(counts)], _MOBILENET)
    for k in range(2):
        names |= {f"conv1.{k}": f"body.0.{k}", f"conv2.{k}": f"body.{1 + sum(counts)}.{k}"}
    return {**names, "classifier.0": "fc"}


def _shufflenet_v1() -> Names:
    stages = [(f"layer{stage}", units) for stage, (_, units) in enumerate(shufflenet.V1_STAGES, 1)]
    return {**_pairs("body.0"), **_units(stages, _SHUFFLENET_V1), "linear": "fc"}


def _shufflenet_v2() -> Names:
    stages = [(f"layer{stage}", units) for stage, (_, units) in enumerate(shufflenet.V2_STAGES, 1)]
    last = f"body.{1 + sum(units for _, units in stages)}"
    return {**_pairs("body.0", last), **_units(stages, _SHUFFLENET_V2, _SHUFFLENET_V2_DOWN), "linear": "fc"}


def _modules(name: str) -> Names:
    """Official name of each module with parameters of a zoo model, and of shortcuts that it may lack."""
    if name in resnet.ARCHITECTURES:
        return _resnet(resnet.ARCHITECTURES[name])
    if name in wide_resnet.ARCHITECTURES:
        return _wide_resnet(wide_resnet.ARCHITECTURES[name])
    if name in vgg.ARCHITECTURES:
        return _vgg(vgg.ARCHITECTURES[name])
    return {"mobilenetv2": _mobilenet, "shufflenetv1": _shufflenet_v1, "shufflenetv2": _shufflenet_v2}[name]()


def parameter_names(name: str) -> Names:
    """Official name of each parameter and buffer of a zoo model -> its name here, in the model's order.

    Args:
        name: of the zoo, in either spelling.

    Raises:
        ValueError: the zoo has no such model.
    """
    known = zoo_name(name)
    if known is None:
        nearest = ", ".join(get_close_matches(name, zoo_names(), n=5) or zoo_names())
        raise ValueError(f"the zoo has no model {name!r}; nearest: {nearest}")
    theirs = {ours: official for official, ours in _modules(known).items()}
    with torch.device("meta"):
        state = create(known, 1, 1).state_dict()
    names: Names = {}
    for ours in state:
        module, _, tensor = ours.rpartition(".")
        names[f"{theirs[module]}.{tensor}"] = ours
    return names


def load(name: str, tensors: Mapping[str, Tensor], source: object) -> nn.Module:
    """A zoo model with the weights of a checkpoint: float32, on the CPU, in evaluation mode.

    The numbers of classes and of input channels are the checkpoint's. Weights of another dtype are converted.

    Args:
        name: of the zoo, in either spelling.
        tensors: state dict under the official names or under ours. `num_batches_tracked` may be missing.
        source: of the tensors, for errors.

    Raises:
        ValueError: the zoo has no such model; or, as in `weights.fill`, the tensors do not fit it.
    """
    names = parameter_names(name)
    if set(tensors) <= set(names.values()):
        names = {ours: ours for ours in names.values()}
    theirs = {ours: key for key, ours in names.items()}
    stem = next(iter(names))
    model = create(name, size(tensors, theirs["fc.weight"], 0), size(tensors, stem, 1))
    return fill(model, tensors, name, source, names)
