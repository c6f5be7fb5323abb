"""Classes spread over processes: the row op of shards on one GPU, and the linear loss in a world of one over NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from camkd_fast.backends.dispatch import shard_backend_for
from tests.gpu.test_gpu_linear import back, on
from tests.support import cases
from tests.support.gpu import Place
from tests.support.linear_cases import LinearResult, make_linear_case, run
from tests.support.row_contract import assert_agrees
from tests.support.shards import in_shards
from tests.support.tolerance import assert_near

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DIVERGENCES: list[Any] = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.2)]
WIDTHS = {400: (0, 13, 250, 400), 32000: (0, 16000, 32000), 128256: (0, 100001, 128256)}
pytestmark = pytest.mark.usefixtures("products_in_float32")


@pytest.fixture
def world() -> Iterator[Any]:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_rows_in_shards(place: Place, C: int, divergence: Any) -> None:
    i = list(WIDTHS).index(C) + DIVERGENCES.index(divergence)
    weighting = ("confidence", "uniform", "min_ce")[i % 3]
    case = cases.on(
        cases.make_case(9, C, 1 + i % 5, (F32, BF16, F16)[i % 3], padded=i % 2 == 0, ignored=0.2), place.device
    )
    backend = shard_backend_for(place.backend, [case.student, *case.teachers])
    assert_agrees(
        in_shards(backend, WIDTHS[C]), case.student, list(case.teachers), case.target, divergence=divergence,
        weighting=weighting, temperature=(1.0, 2.0, 3.3)[i % 3], hard_weight=0.5, z_loss_weight=0.01 * (i % 2),
    )  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_group_of_one(place: Place, world: Any, reduction: str, divergence: Any) -> None:
    case = on(
        make_linear_case(61, 1128, (40, 72, 24), ignored=0.2, hard_weight=1.0, divergence=divergence), place.device
    )
    weights = None if reduction == "mean" else torch.linspace(0.1, 1, 61, device=place.device)
    keywords: dict[str, Any] = {"reduction": reduction, "backend": place.backend, "chunk_rows": 23}
    whole, ours = (back(run(case, weights, **keywords, **more)) for more in ({}, {"group": world}))
    for name, a, b in zip(LinearResult._fields, ours, whole, strict=True):
        assert_near(a, b, 1e-5, name)


def test_nothing_waits_for_the_device(gpu: Place, world: Any) -> None:
    """Given the number of rows that count; labels of no process are NaN there, since reading them would wait."""
    case = on(make_linear_case(64, 1128, (40, 72), ignored=0.2, hard_weight=1.0), gpu.device)
    run(case, group=world, num_valid=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, group=world, num_valid=64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wrong = case.with_(target=case.target.index_fill(0, torch.tensor([5], device=gpu.device), 1128))
    assert run(wrong, group=world).loss.isnan()
