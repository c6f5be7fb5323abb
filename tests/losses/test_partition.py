"""One batch in parts: gradient accumulation and data parallelism, simulated and in processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camkd_fast import camkd_loss, camkd_loss_and_grad
from tests.support.cases import Case, make_case
from tests.support.evaluate import fields
from tests.support.tolerance import assert_accurate, assert_near
from tests.support.truth import naive, truth

ROOT = Path(__file__).parents[2]


def ragged(dtype: torch.dtype = torch.float32) -> Case:
    """32 rows in four quarters with 1, 5, 8 and 0 rows that are not ignored."""
    case = make_case(32, 129, dtype=dtype, peaked=True)
    target = case.target.clone()
    for first, length in ((0, 1), (8, 5), (16, 8), (24, 0)):
        target[first + length : first + 8] = -100
    return case.with_(target=target)


def parts(case: Case, pieces: int) -> list[Case]:
    rows = [z.chunk(pieces) for z in (case.student, *case.teachers, case.target)]
    return [case.with_(student=s, teachers=tuple(zs), target=y) for s, *zs, y in zip(*rows, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pieces", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_accumulation_with_num_items(as_tensor, pieces, dtype, backend):
    case = ragged(dtype)
    kept = (case.target != -100).sum()
    num_items = kept if as_tensor else int(kept)
    R, N = truth(case), naive(case)
    total, gradients, direct = 0.0, [], []
    for part in parts(case, pieces):
        student = part.student.detach().requires_grad_()
        options = {"num_items": num_items, "backend": backend}
        loss = camkd_loss(student, part.teachers, part.target, **options).loss
        loss.backward()
        total += loss.detach()
        gradients.append(student.grad)
        direct.append(camkd_loss_and_grad(part.student, part.teachers, part.target, **options)[1])
    assert_accurate(torch.cat(gradients), R.grad, N.grad)
    assert_accurate(torch.cat(direct), R.grad, N.grad)
    assert_near(total, R.loss.float())


@pytest.mark.parametrize("pieces", [2, 4])
def test_rows_do_not_see_each_other(pieces, backend):
    case = ragged().with_(reduction="none")
    whole = camkd_loss(case.student, case.teachers, case.target, reduction="none", backend=backend)
    cut = [camkd_loss(p.student, p.teachers, p.target, reduction="none", backend=backend) for p in parts(case, pieces)]
    for expected, *pieces_of_it in zip(fields(whole), *map(fields, cut), strict=True):
        assert_near(torch.cat(pieces_of_it, dim=-1), expected)


def test_data_parallel_in_simulation(backend):
    # Four ranks average their gradients. With num_items = kept / ranks the average is the gradient of the whole batch.
    case, ranks = ragged(), 4
    weight = torch.randn(129, 129, generator=torch.Generator().manual_seed(1))
    kept = int((case.target != -100).sum())
    gradients = []
    for part in parts(case, ranks):
        body = weight.clone().requires_grad_()
        out = camkd_loss(part.student @ body, part.teachers, part.target, num_items=kept / ranks, backend=backend)
        out.loss.backward()
        gradients.append(body.grad)
    whole = case.with_(student=case.student @ weight)
    R, N = case.student.double().T @ truth(whole).grad, case.student.T @ naive(whole).grad
    assert_accurate(torch.stack(gradients).mean(0), R, N)


RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from camkd_fast import camkd_loss
from tests.support.processes import leave_group

rank, store, backend, case, answer = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
student, teachers, target, weight = torch.load(case)
rows = slice(16 * rank, 16 * rank + 16)
body = torch.nn.Linear(129, 129, bias=False)
body.weight.data.copy_(weight)
parallel = DistributedDataParallel(body)
kept = (target[rows] != -100).sum()
dist.all_reduce(kept)
out = camkd_loss(
    parallel(student[rows]), [z[rows] for z in teachers], target[rows], num_items=kept / 2, backend=backend
)
out.loss.backward()
if rank == 0:
    torch.save(body.weight.grad, answer)
leave_group()
"""


def test_data_parallel_in_processes(backend, tmp_path):
    case = ragged()
    weight = torch.randn(129, 129, generator=torch.Generator().manual_seed(1))
    inputs, answer = tmp_path / "case.pt", tmp_path / "answer.pt"
    torch.save([case.student, list(case.teachers), case.target, weight], inputs)
    command = [str(tmp_path / "store"), backend, str(inputs), str(answer)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *command], env=environment, cwd=tmp_path)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    whole = case.with_(student=case.student @ weight.T)
    R, N = truth(whole).grad.T @ case.student.double(), naive(whole).grad.T @ case.student
    assert_accurate(torch.load(answer), R, N)
