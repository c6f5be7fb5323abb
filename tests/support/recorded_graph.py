"""A CUDA graph's rules on the CPU: work is recorded once as operations on fixed memory, and replayed operation by
operation, with the Python numbers of the recording. A value that the host reads while recording is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

HOST_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal", "masked_select", "bincount", "_unique2")
# On a GPU these read a tensor on the host inside: a value that they fill with, a mask, the size of their result.
HIDDEN_HOST_READS = (
    *("masked_fill.Tensor", "masked_fill_.Tensor", "index_fill.int_Tensor", "index_fill_.int_Tensor"),
    *("repeat_interleave.Tensor", "linspace.Tensor_Tensor"),
)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(*values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def reads_on_the_host(func: Any, given: list[Tensor]) -> bool:
    """Whether the operation waits for the device on a GPU."""
    name = func.name().removeprefix("aten::")
    indexed = name.split(".")[0] in ("index", "index_put", "index_put_", "_index_put_impl_")
    masks = indexed and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    return masks or name in HIDDEN_HOST_READS or name.split(".")[0] in HOST_READS


class _Recording(TorchDispatchMode):
    """Runs and keeps all operations, and the contents of memory from outside before they changed it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> all of it, a copy
        self.mine: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in(args, kwargs)
        if reads_on_the_host(func, given):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        for tensor in given:
            if storage_of(tensor) not in self.mine:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before.setdefault(storage_of(tensor), (whole, whole.clone()))
        out = func(*args, **kwargs)
        inputs = {storage_of(tensor) for tensor in given}
        new = [tensor for tensor in tensors_in(out) if storage_of(tensor) not in inputs]
        self.mine.update(map(storage_of, new))
        # Detached: views that autograd changes later, such as an output's requires_grad, must not reach the replay.
        kept = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self.operations.append((func, *kept, [tensor.detach() for tensor in new]))
        return out


class Operations(TorchDispatchMode):
    """Counts the operations in the block by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


class RecordedGraphs:
    """A `Recorder` for the CPU.

    Attributes:
        recordings: number of recordings.
        replays: number of replays of all of them.
        operations: number of operations of the last recording.
    """

    def __init__(self) -> None:
        self.recordings = self.replays = self.operations = 0

    def side_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        recording = _Recording()
        try:
            with torch.random.fork_rng(devices=[]), recording:
                work()
        finally:
            for whole, content in recording.before.values():
                whole.copy_(content)
        self.operations = len(recording.operations)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, outputs in recording.operations:
                    inputs = set(map(storage_of, tensors_in(args, kwargs)))
                    found = tensors_in(func(*args, **kwargs))
                    new = [tensor for tensor in found if storage_of(tensor) not in inputs]
                    for mine, value in zip(outputs, new, strict=True):
                        mine.copy_(value)

        return replay
