"""How pairs of feature maps are described to kernels: the right values, in place wherever two strides are enough."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from camkd_fast.backends.feature_maps import gradient_strides, map_pair, new_gradients
from tests.support.op_contract import MAP_LAYOUTS


def as_described(maps: Tensor, P: int, Q: int, strides: tuple[int, int, int]) -> Tensor:
    """(N, P, Q) read by these strides."""
    return maps.as_strided((maps.shape[0], P, Q), strides)


def in_gradient_order(maps: Tensor, student: Tensor) -> Tensor:
    """(N, P, Q) of a copy that has the gradient's strides."""
    copy = torch.empty_strided(maps.shape, gradient_strides(student), dtype=maps.dtype).copy_(maps)
    return copy.as_strided((maps.shape[0], maps[0].numel()), (maps[0].numel(), 1))


def check(student: Tensor, teacher: Tensor) -> None:
    r, f, P, Q, student_strides, teacher_strides = map_pair(student, teacher)
    for given_map, used, strides in ((student, r, student_strides), (teacher, f, teacher_strides)):
        described = as_described(used, P, Q, strides).reshape(student.shape[0], -1)
        assert torch.equal(described, in_gradient_order(given_map, student))


@st.composite
def map_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """A map in any order of its dimensions, with gaps and repetitions."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    wide = torch.randn([shape[d] * steps[d] for d in order])
    permuted = wide.permute([order.index(d) for d in range(len(shape))])
    maps = permuted[tuple(slice(None, None, step) for step in steps)]
    if draw(st.integers(0, 5)) == 0:
        d = draw(st.integers(0, len(shape) - 1))
        maps = maps.narrow(d, 0, 1).expand(shape)
    return maps


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    return draw(map_of(shape)), draw(map_of(shape))


@given(pair=pairs())
def test_maps_of_any_strides(pair: tuple[Tensor, Tensor]) -> None:
    check(*pair)


@pytest.mark.parametrize(
    ("first", "second"),
    [*product(("contiguous", "channels_last", "samples", "expanded"), repeat=2), ("columns", "contiguous")]
    + [(name, name) for name in ("transposed", "columns")],
)
def test_common_layouts_are_read_in_place(first: str, second: str) -> None:
    student, teacher = MAP_LAYOUTS[first](torch.randn(3, 5, 6, 4)), MAP_LAYOUTS[second](torch.randn(3, 5, 6, 4))
    check(student, teacher)
    pair = map_pair(student, teacher)
    assert pair.student is student and pair.teacher is teacher
    dense = (pair.P, pair.student_strides[2], pair.teacher_strides[2]) == (1, 1, 1)
    assert dense == ("columns" not in (first, second) and (first == "channels_last") == (second == "channels_last"))


@pytest.mark.parametrize("layout", MAP_LAYOUTS)
def test_gradients_have_the_strides_that_autograd_passes_on(layout: str) -> None:
    student = MAP_LAYOUTS[layout](torch.randn(3, 5, 6, 4))
    expected = torch.empty_like(student).stride() if layout not in ("expanded", "samples") else (120, 24, 4, 1)
    assert gradient_strides(student) == expected


def test_gradients_in_one_buffer_do_not_overlap() -> None:
    student = [
        torch.randn(3, 5, 6, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 7),
        torch.ones(3, 1),
    ]
    grads, buffer = new_gradients(student, True)
    assert buffer is not None
    for k, grad in enumerate(grads):
        grad.fill_(k)
    assert all((grad == k).all() and grad.storage_offset() % 32 == 0 for k, grad in enumerate(grads))
    for allocate in (None, torch.empty):
        separate, none = new_gradients(student, False, allocate)
        assert none is None and len({grad.untyped_storage().data_ptr() for grad in separate}) == 3
        assert [grad.stride() for grad in grads] == [grad.stride() for grad in separate]
