"""Heads whose classes are spread over processes: every process has the numbers of the whole vocabulary, and the
gradients of its own classes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from camkd_fast import CAMKDLinearLoss, camkd_linear_loss
from camkd_fast.losses import vocabulary
from tests.losses.test_linear_autograd import check_operator
from tests.support.linear_cases import MAPS, LinearCase, LinearResult, make_linear_case, run
from tests.support.processes import leave_group, run_processes
from tests.support.tolerance import assert_near

C = 50
BOUNDS = {1: (0, C), 2: (0, 37, C), 4: (0, 1, 20, 38, C)}  # uneven, one process with a single class
DIVERGENCES: list[Any] = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.2)]
WEIGHTINGS = ("confidence", "uniform", "entropy", "min_ce")


def own_range() -> tuple[int, int]:
    return BOUNDS[dist.get_world_size()][dist.get_rank() :][:2]  # type: ignore[return-value]


def shard(case: LinearCase, begin: int, end: int, padding: int = 0) -> LinearCase:
    """The classes begin .. end - 1 of every head and bias, and rows of NaN that are no classes."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x[begin:end], x.new_full((padding, *x.shape[1:]), float("nan"))])

    biases = case.teacher_biases and tuple(map(cut, case.teacher_biases))
    return case.with_(
        head=cut(case.head), bias=cut(case.bias), teacher_heads=tuple(map(cut, case.teacher_heads)),
        teacher_biases=biases, group=dist.group.WORLD,
    )  # fmt: skip


def assert_whole(ours: LinearResult, whole: LinearResult, begin: int, end: int, rtol: float = 1e-5) -> None:
    for name, found, expected in zip(LinearResult._fields, ours, whole, strict=True):
        if expected is None:
            assert found is None
            continue
        if name in ("grad_head", "grad_bias"):
            expected = expected[begin:end]
            assert not found[end - begin :].any()  # padding
            found = found[: end - begin]
        assert_near(found, expected, rtol, name)


def check(case: LinearCase, grad_output: Tensor | None = None, padding: int = 0, rtol: float = 1e-5) -> None:
    begin, end = own_range()
    ours = run(shard(case, begin, end, padding), grad_output, vocab_range=(begin, end))
    assert_whole(ours, run(case, grad_output), begin, end, rtol)


# --- what every process runs, in this order --------------------------------------------------------------------------


def every_formula() -> None:
    cells = itertools.product(DIVERGENCES, WEIGHTINGS, (1.0, 2.0, 3.3), (torch.float32, torch.float64))
    for i, (divergence, weighting, temperature, dtype) in enumerate(cells):
        case = make_linear_case(
            21, C, dtype=dtype, ignored=0.2, divergence=divergence, weighting=weighting, temperature=temperature,
            hard_weight=0.7, z_loss_weight=0.01, chunk_rows=(None, 4)[i % 2], scale_by_t2=i % 3 > 0,
            reduction=("mean", "sum", "none")[i % 3], **(MAPS if i % 5 == 0 else {}),
        )  # fmt: skip
        grad_output = torch.rand(21, generator=torch.Generator().manual_seed(i)) if i % 3 == 2 else torch.tensor(0.37)
        check(case, grad_output.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-12)


def other_arguments() -> None:
    """Routing, masks, shifted labels, a known number of rows, padded heads, no row at all."""
    weights = torch.rand(2, 21, generator=torch.Generator().manual_seed(0))
    check(make_linear_case(21, C, weighting=weights, hard_weight=0.5))
    routed = torch.nn.functional.one_hot(torch.arange(600) % 2, 2).t().float()
    check(make_linear_case(600, C, weighting=routed, hard_weight=0.5, chunk_rows=128))
    mask = torch.rand(21, generator=torch.Generator().manual_seed(1)) < 0.5
    check(make_linear_case(21, C, weighting="uniform").with_(target=mask))
    check(make_linear_case(24, C, lead=(4, 6), shift=True, ignored=0.2, hard_weight=1.0))
    check(make_linear_case(21, C, ignored=0.5, num_valid=17, hard_weight=1.0))
    check(make_linear_case(21, C, hard_weight=1.0, num_items=100), padding=3)
    check(make_linear_case(21, C, biased=False, backend="reference", divergence=("jsd", 0.3)))
    check(make_linear_case(9, C, ignored=1.0, hard_weight=1.0))
    check(make_linear_case(9, C, ignore_index=3, hard_weight=1.0, ignored=0.3))


def bfloat16_models() -> None:
    """The shards' logits are rounded as the whole ones are; sums of gradients are rounded once per process."""
    for logits_dtype in (torch.float32, torch.bfloat16):
        case = make_linear_case(64, C, dtype=torch.bfloat16, logits_dtype=logits_dtype, hard_weight=1.0)
        check(case, rtol=2e-2)


def equal_shards_by_rank() -> None:
    """Without a range."""
    size, rank = dist.get_world_size(), dist.get_rank()
    case = make_linear_case(21, 48, hard_weight=1.0)
    begin, end = 48 // size * rank, 48 // size * (rank + 1)
    assert_whole(run(shard(case, begin, end)), run(case), begin, end)


def same_bits_everywhere() -> None:
    case, (begin, end) = make_linear_case(21, C, hard_weight=1.0, divergence=("skew", 0.1)), own_range()
    ours = run(shard(case, begin, end), vocab_range=(begin, end))
    numbers = torch.cat([ours.loss.view(1), *(x.flatten() for x in ours[3:6]), ours.grad_hidden.flatten()])
    every = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
    dist.all_gather(every, numbers)
    assert all(torch.equal(x, numbers) for x in every)


def gradients_that_the_caller_adds_up() -> None:
    case, (begin, end) = make_linear_case(21, C, hard_weight=1.0, ignored=0.2), own_range()
    for reduction in ("mean", "none"):
        weights = None if reduction == "mean" else torch.linspace(0.1, 1, 21)
        part = shard(case, begin, end)
        ours = run(part, weights, vocab_range=(begin, end), reduction=reduction, reduce_input_grad=False)
        dist.all_reduce(ours.grad_hidden)
        assert_whole(ours, run(case, weights, reduction=reduction), begin, end)


def two_collectives_of_a_few_numbers_a_row() -> None:
    """And one for the gradient of the hidden states."""
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            plain = getattr(dist, name)

            def counted(*tensors: Any, plain: Any = plain, **options: Any) -> Any:
                sizes.append(tensors[-1].numel())
                return plain(*tensors, **options)

            patch.setattr(vocabulary.dist, name, counted)
        case, (begin, end) = make_linear_case(64, C, chunk_rows=64), own_range()
        for divergence, expected in (("forward_kl", [7 * 3 * 64]), (("jsd", 0.5), [7 * 3 * 64, 2 * 2 * 64])):
            run(shard(case, begin, end), vocab_range=(begin, end), divergence=divergence)
            assert sizes == [*expected, 64 * 8], sizes
            sizes.clear()


def heads_that_are_sharded_tensors() -> None:
    """The parameter gets a sharded gradient; torch's shards are of equal sizes but for the last ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    case = make_linear_case(21, C, hard_weight=1.0, biased=False)
    whole = run(case)
    head = torch.nn.Parameter(distribute_tensor(case.head, mesh, [Shard(0)]))
    local = head.to_local()
    begin = -(-C // dist.get_world_size()) * dist.get_rank()
    part = shard(case, begin, begin + len(local))
    hidden = case.hidden.clone().requires_grad_()
    loss = camkd_linear_loss(
        hidden, local, case.teacher_hidden, part.teacher_heads, case.target, hard_weight=1.0,
        group=mesh.get_group("tp"), vocab_range=(begin, begin + len(local)),
    ).loss  # fmt: skip
    loss.backward()
    assert_near(loss.detach(), whole.loss, 1e-5)
    assert_near(hidden.grad, whole.grad_hidden, 1e-5)
    assert_near(head.grad.full_tensor(), whole.grad_head, 1e-5)


def labels_that_nobody_has() -> None:
    """Refused by all processes, so that none is left waiting."""
    case, (begin, end) = make_linear_case(21, C), own_range()
    for label in (C, C + 1000):
        wrong = case.with_(target=case.target.index_fill(0, torch.tensor([5]), label))
        with pytest.raises(ValueError, match=f"label {label} is in the vocab_range of 0 processes"):
            run(shard(wrong, begin, end), vocab_range=(begin, end))
    with pytest.raises(ValueError, match="label -3"):
        run(shard(case.with_(target=case.target.clamp(max=0) - 3), begin, end), vocab_range=(begin, end))


def ranges_that_do_not_fit() -> None:
    """Refused by all processes, also if no label is in the classes concerned, and after calls whose ranges fitted."""
    size, rank, (begin, end) = dist.get_world_size(), dist.get_rank(), own_range()
    first, second = itertools.pairwise(BOUNDS[size][:3])
    case = make_linear_case(21, C + 9)
    case = case.with_(target=case.target.clamp(second[0] + 1, second[1] - 1))
    mask = make_linear_case(21, C + 9, weighting="uniform").with_(target=torch.ones(21, dtype=torch.bool))
    changes: dict[str, dict[int, tuple[int, int]]] = {
        f"vocab_range {first} of process 0 and {(second[0] + 1, second[1])} of process 1 leave a gap": {
            1: (second[0] + 1, second[1])
        },
        f"vocab_range {(0, first[1] + 1)} of process 0 and {second} of process 1 overlap": {0: (0, first[1] + 1)},
        f"vocab_range {first} of process 0 and {first} of process 1 overlap": {1: first},
        f"vocab_range {(1, first[1] + 1)} of process 0 is the first one and must begin at 0": {0: (1, first[1] + 1)},
    }
    for given in (case, mask):
        run(shard(given, begin, end), vocab_range=(begin, end))
        for words, changed in changes.items():
            own = changed.get(rank, (begin, end))
            for reduction in ("mean", "none"):
                with pytest.raises(ValueError, match=re.escape(words)):
                    run(shard(given, *own), vocab_range=own, reduction=reduction)
    run(shard(case, begin, end), vocab_range=(begin, end))


CHECKS = (
    every_formula, other_arguments, bfloat16_models, equal_shards_by_rank, same_bits_everywhere,
    heads_that_are_sharded_tensors, gradients_that_the_caller_adds_up,
    two_collectives_of_a_few_numbers_a_row, labels_that_nobody_has, ranges_that_do_not_fit,
)  # fmt: skip


def in_a_process(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for each in CHECKS:
        each()
    leave_group()


@pytest.mark.parametrize("size", [2, 4])
def test_in_processes(tmp_path: Path, size: int) -> None:
    run_processes(__name__, size, tmp_path)


# --- in a world of one -----------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(world: Any, reduction: str, divergence: Any) -> None:
    case = make_linear_case(5, 7, (3, 4, 2), torch.float64, ignored=0.2, spread=1.0)

    def loss(*parameters: Tensor) -> Tensor:
        return camkd_linear_loss(
            *parameters[:2], case.teacher_hidden, case.teacher_heads, case.target, student_bias=parameters[2],
            hard_weight=0.5, z_loss_weight=0.1, divergence=divergence, temperature=2.0, reduction=reduction,
            group=world,
        ).loss  # fmt: skip

    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    assert torch.autograd.gradcheck(loss, parameters)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(world: Any, reduction: str) -> None:
    case = make_linear_case(20, 30, hard_weight=1.0, reduction=reduction)
    grad_output = None if reduction == "mean" else torch.rand(20)

    def evaluated(hidden: Tensor, head: Tensor, bias: Tensor) -> Any:
        return camkd_linear_loss(
            hidden, head, case.teacher_hidden, case.teacher_heads, case.target, student_bias=bias,
            teacher_biases=case.teacher_biases, group=world, vocab_range=(0, 30), **case.options,
        )  # fmt: skip

    results = []
    for function in (evaluated, torch.compile(evaluated, fullgraph=True, backend="aot_eager")):
        parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
        out = function(*parameters)
        results.append([out.loss, *torch.autograd.grad(out.loss, parameters, grad_output)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("ranges", [[(0, 9)], [(5, 9), (0, 5)], [(7, 8), (0, 3), (3, 7)]])
def test_ranges_in_any_order(ranges: list[tuple[int, int]]) -> None:
    vocabulary.check_ranges(ranges)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(3, 9)], "vocab_range (3, 9) of process 0 is the first one and must begin at 0"),
        ([(5, 9), (0, 4)], "vocab_range (0, 4) of process 1 and (5, 9) of process 0 leave a gap"),
        ([(7, 8), (0, 3), (3, 8)], "vocab_range (3, 8) of process 2 and (7, 8) of process 0 overlap"),
        ([(0, 9), (2, 3), (9, 10)], "vocab_range (0, 9) of process 0 and (2, 3) of process 1 overlap"),
    ],
)
def test_gaps_and_overlaps(ranges: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        vocabulary.check_ranges(ranges)


@pytest.mark.parametrize("name", ["linear_loss", "linear_loss_rows", "linear_loss_rows_backward"])
def test_opcheck(world: Any, name: str) -> None:
    check_operator(name, (True, True, True), (world.group_name, 0, True))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"group": "tp"}, TypeError, "group must be a torch.distributed.ProcessGroup, got str"),
        ({"vocab_size": 20}, ValueError, "vocab_size 20 and a group exclude each other"),
        ({"vocab_range": 5}, TypeError, r"vocab_range must be two ints, \(start, stop\), got 5"),
        ({"vocab_range": (0, 5, 9)}, TypeError, r"got \(0, 5, 9\)"),
        ({"vocab_range": (5, 5)}, ValueError, r"0 <= start < stop, got \(5, 5\)"),
        ({"vocab_range": (-1, 5)}, ValueError, r"got \(-1, 5\)"),
        ({"vocab_range": (100, 131)}, ValueError, "student's head has 30 classes, but the vocabulary has 31"),
        ({"group": None, "vocab_range": (0, 30)}, ValueError, r"vocab_range \(0, 30\) needs the group"),
        ({"reduce_input_grad": 1}, TypeError, "reduce_input_grad must be True or False, got int"),
    ],
)
def test_errors_name_both_values(world: Any, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(make_linear_case(20, 30), **{"group": world, **changes})


def test_the_module_takes_the_group_with_the_call(world: Any) -> None:
    case = make_linear_case(20, C, biased=False)
    tensors = case.hidden, case.head, case.teacher_hidden, case.teacher_heads, case.target
    module = CAMKDLinearLoss(hard_weight=1.0, reduce_input_grad=False)
    found = module(*tensors, group=world, vocab_range=(0, C)).loss
    assert_near(found, camkd_linear_loss(*tensors, hard_weight=1.0).loss)
