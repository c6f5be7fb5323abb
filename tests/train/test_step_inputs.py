"""The inputs of a recorded step: what the host packs arrives in one copy, as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from camkd_fast.train.step_inputs import ALIGNMENT, SLOTS, StepInputs

CPU = torch.device("cpu")
DTYPES = (torch.uint8, torch.bfloat16, torch.int32, torch.float32, torch.int64, torch.float64)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, shape, generator=generator).to(dtype)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES)), max_size=5),
    st.integers(1, 2 * SLOTS),
)
def test_inputs_arrive_as_they_are(forms: list[tuple[list[int], torch.dtype]], steps: int) -> None:
    def batch(step: int) -> list[Tensor]:
        return [numbers(tuple(shape), dtype, 100 * step + i) for i, (shape, dtype) in enumerate(forms)]

    inputs = StepInputs(batch(0), CPU)
    places = [tensor.data_ptr() for tensor in inputs.tensors]
    for step in range(steps):
        mine = batch(step)
        inputs.fill(mine)
        for tensor in mine:
            tensor.zero_()  # the caller's own again
        for arrived, expected in zip(inputs.tensors, batch(step), strict=True):
            assert arrived.dtype == expected.dtype and torch.equal(arrived, expected)
    assert [tensor.data_ptr() for tensor in inputs.tensors] == places
    filled = [place for place, tensor in zip(places, inputs.tensors, strict=True) if tensor.numel()]
    assert all((place - filled[0]) % ALIGNMENT == 0 for place in filled)


@pytest.mark.parametrize("layout", ["channels last", "slice", "expanded"])
def test_strides(layout: str) -> None:
    whole = numbers((4, 3, 6, 6), torch.float32, 0)
    tensor = {
        "channels last": whole.to(memory_format=torch.channels_last),
        "slice": whole[:, 1],
        "expanded": whole[:1].expand(4, -1, -1, -1),
    }[layout]
    inputs = StepInputs([tensor], CPU)
    inputs.fill([tensor])
    assert torch.equal(inputs.tensors[0], tensor)
    assert inputs.tensors[0].stride() == torch.empty_like(tensor).stride()


class Copies(TorchDispatchMode):
    """Keeps the targets of copies, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::copy_":
            self.targets.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 4])
def test_one_copy_brings_all_of_the_hosts_inputs(count: int) -> None:
    """The device here is "meta", which every machine has. An image that lies there is copied by itself."""
    device = torch.device("meta")
    host = [numbers((32, 1 + i), DTYPES[i], i) for i in range(count)]
    image = torch.empty(32, 3, 8, 8, device=device)
    inputs = StepInputs([image, *host], device)
    with Copies() as copies:
        inputs.fill([image, *host])
    to_device = [tensor for tensor in copies.targets if tensor.device == device]
    assert [tensor.dtype for tensor in to_device] == [torch.uint8, torch.float32]
    assert len(copies.targets) - len(to_device) == count  # into the record
