"""Parts of a batch, one after another and in processes of their own, have the gradients of the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from camkd_fast import camkd_linear_loss
from tests.support.linear_cases import LinearCase, make_linear_case
from tests.support.processes import leave_group, run_processes
from tests.support.tolerance import assert_near

ROWS, WORLD = 32, 4


class Student(nn.Module):
    """A model that returns the loss of a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 50)

    def forward(self, case: LinearCase, part: slice, num_items: float) -> Tensor:
        return camkd_linear_loss(
            self.body(case.hidden[part]), self.head.weight, [h[part] for h in case.teacher_hidden], case.teacher_heads,
            case.target[part], student_bias=self.head.bias, teacher_biases=case.teacher_biases, hard_weight=1.0,
            num_items=num_items,
        ).loss  # fmt: skip


def batch() -> LinearCase:
    return make_linear_case(ROWS, 50, (12, 8, 6), ignored=0.2)


def parts(count: int) -> list[slice]:
    return [slice(begin, begin + ROWS // count) for begin in range(0, ROWS, ROWS // count)]


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [grad.detach().clone() for grad in found if grad is not None]


def of_the_whole_batch() -> list[Tensor]:
    student, case = Student(), batch()
    student(case, slice(None), float((case.target != -100).sum())).backward()
    return gradients(student)


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected) == 4
    for a, b in zip(ours, expected, strict=True):
        assert_near(a, b, 1e-6)


def in_a_process(rank: int, world: int, store: str) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    case, student = batch(), DistributedDataParallel(Student())
    # DDP averages over the processes.
    student(case, parts(WORLD)[rank], float((case.target != -100).sum()) / WORLD).backward()
    assert_equal(gradients(student), of_the_whole_batch())
    leave_group()


def test_accumulated_over_eight_parts() -> None:
    student, case = Student(), batch()
    for part in parts(8):
        student(case, part, float((case.target != -100).sum())).backward()
    assert_equal(gradients(student), of_the_whole_batch())


@pytest.mark.slow
def test_in_four_processes(tmp_path: Path) -> None:
    run_processes(__name__, WORLD, tmp_path)
