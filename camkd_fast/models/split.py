"""Models without the protocol of `protocol.py`: split at a named module, or used for their logits only."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor, fx, nn

from ..errors import first_line
from .protocol import floating_dtype, logits_of


class LogitsOnly(nn.Module):
    """A model whose feature map is unknown. It serves strategies that read logits only.

    `num_features` is 0, which says that there is no map; `forward_features` returns its input and `forward_head` runs
    the whole model.

    Args:
        model: (N, channels, H, W) -> logits (N, C), or an object whose `logits` they are.
        reason: why there is no map, for the error of a strategy that needs one.
    """

    num_features = 0

    def __init__(self, model: nn.Module, reason: str) -> None:
        super().__init__()
        self.model, self.reason = model, reason
        if hasattr(model, "num_classes"):
            self.num_classes = model.num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        return logits_of(self.model(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(x)


class Split(nn.Module):
    """A model in two parts: `forward_features` up to a named module, `forward_head` the rest."""

    def __init__(self, features: nn.Module, head: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.features, self.head = features, head
        self.num_features, self.num_classes = num_features, num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x)
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@torch.no_grad()
def split(model: nn.Module, layer: str, images: Tensor) -> Split:
    """Split a model at the output of a module, which becomes the feature map. Weights are shared, not copied.

    The model's code is traced by torch.fx down to the module's parents; other modules are opaque.

    Args:
        model: (N, channels, H, W) -> logits (N, C) or an object whose `logits` they are, in evaluation mode.
        layer: name of the module, such as "layer4"; its output is a map (N, D, h, w) and all that the logits depend on.
        images: (1, channels, H, W) for a check of both parts.

    Raises:
        ValueError: no module has that name (the message lists the nearest), torch.fx cannot trace the model, the module
            is not called exactly once, its output is not a map, or the logits depend on the images in other ways.
    """
    owner = type(model).__name__
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if layer not in modules:
        nearest = get_close_matches(layer, modules, n=5) or [name for name, _ in model.named_children()]
        raise ValueError(f"{owner} has no module {layer!r}; nearest: {', '.join(nearest)}")
    refusal = f"{owner} cannot be split at {layer!r}"
    wrapped, layer = _Logits(model), f"model.{layer}"
    try:
        graph = _Tracer(layer).trace(wrapped)
    except Exception as error:  # tracing runs the model's Python code on proxies, which can raise anything
        raise ValueError(f"{refusal}, torch.fx cannot trace it: {first_line(error)}") from error
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    if len(calls) != 1:
        raise ValueError(f"{refusal}: it calls that module {len(calls)} times, not once")
    for node in graph.nodes:
        if node.op == "call_function" and node.kwargs.get("inplace") is True:  # of functional.relu and the like
            node.update_kwarg("inplace", False)
    features = fx.GraphModule(wrapped, _until(graph, calls[0]))
    head = fx.GraphModule(wrapped, _from(graph, calls[0], refusal))
    images = images.to(floating_dtype(model))
    try:
        maps, logits = features(images), wrapped(images)
    except RuntimeError as error:
        shape = tuple(images.shape)
        raise ValueError(f"{owner} cannot run an image of shape {shape}: {first_line(error)}") from error
    if not isinstance(maps, Tensor) or maps.dim() != 4:
        what = f"shape {tuple(maps.shape)}" if isinstance(maps, Tensor) else f"type {type(maps).__name__}"
        raise ValueError(f"{refusal}: its output has {what}, not that of a map (N, D, h, w)")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not torch.equal(head(maps), logits):
        raise ValueError(f"{refusal}: the two parts give other logits than the model")
    return Split(features, head, maps.shape[1], logits.shape[1]).eval()


class _Logits(nn.Module):
    """The logits of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))


class _Tracer(fx.Tracer):
    """Traces into the parents of one module only."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.layer.startswith(f"{module_qualified_name}.")


def _until(graph: fx.Graph, node: fx.Node) -> fx.Graph:
    """The part of a graph that computes a node."""
    part = fx.Graph()
    part.output(_copied(graph, part, _needed(node), {})[node])
    return part


def _from(graph: fx.Graph, node: fx.Node, refusal: str) -> fx.Graph:
    """The part of a graph that computes its output from a node.

    Raises:
        ValueError: the output needs the graph's input in another way.
    """
    output = next(other for other in graph.nodes if other.op == "output")
    needed = _needed(output, given=node)
    if any(other.op == "placeholder" for other in needed):
        raise ValueError(f"{refusal}: the logits depend on the images in other ways than through its output")
    part = fx.Graph()
    _copied(graph, part, needed, {node: part.placeholder("features")})
    return part


def _needed(node: fx.Node, given: fx.Node | None = None) -> set[fx.Node]:
    """The node and all that it depends on, if one is given."""
    found, waiting = {node}, [node]
    while waiting:
        for other in waiting.pop().all_input_nodes:
            if other is not given and other not in found:
                found.add(other)
                waiting.append(other)
    return found


def _copied(
    graph: fx.Graph, part: fx.Graph, nodes: set[fx.Node], copies: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Copy nodes into `part`; their inputs are among them or have copies."""
    for node in graph.nodes:
        if node in nodes:
            copies[node] = part.node_copy(node, copies.__getitem__)
            copies[node].type = None  # the annotation in its source, a string that cannot be pickled
    return copies
