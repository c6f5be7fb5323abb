"""Thousands of random calls, in a process of its own because a wrong one may crash.

    python -m tests.support.wide --examples 2500 --seed 1

prints how many calls were right and how many were refused, by sort of tensor, as JSON. A wrong value or an unexpected
error ends the process with hypothesis' report of the case. Before each call its description goes to --last, which names
the case that crashed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from camkd_fast import camkd_loss, confidence_weights, weighted_feature_loss
from camkd_fast.backends.dispatch import availability
from tests.support.cases import Case
from tests.support.evaluate import Result, fields, run
from tests.support.random_cases import FLOATS, Evaluation, cases, check, lay_out, value_and_grad
from tests.support.tensor_kinds import CALLS, FLOATING, REFUSED, VALUES, dense
from tests.support.tolerance import assert_accurate, rms

COUNTS: collections.Counter[str] = collections.Counter()
ORDINARY = ["dense"] * 4
# Parts of a call that are given as another sort of tensor.
SLOTS = ("student", "teachers", "target", "weighting", "num_items")

# --- evaluations of the logit loss besides camkd_loss(...).backward() -------------------------------------------------


def _loss(case: Case, backend: str, student: Tensor, teachers: Any, target: Tensor) -> Any:
    return camkd_loss(student, teachers, target, backend=backend, **case.options())


def _result(case: Case, backend: str, gradient: Tensor) -> Result:
    out = _loss(case, backend, case.student, case.teachers, case.target)
    return Result(*(x.detach() for x in fields(out)), grad=gradient)


def by_torch_func(case: Case, backend: str, grad_output: Tensor | None) -> Result:
    factor = 1.0 if grad_output is None else grad_output
    by_student = grad(lambda s: (_loss(case, backend, s, case.teachers, case.target).loss * factor).sum())
    return _result(case, backend, by_student(case.student))


def by_vmap(case: Case, backend: str, grad_output: Tensor | None) -> Result:
    factor = 1.0 if grad_output is None else grad_output
    by_student = grad(lambda s: (_loss(case, backend, s, case.teachers, case.target).loss * factor).sum())
    batch = torch.stack([case.student, case.teachers[0].to(case.student.dtype)])
    return _result(case, backend, vmap(by_student)(batch)[0])


def by_trace(case: Case, backend: str, grad_output: Tensor | None) -> Result:
    """Traced with other values, of which all labels are ignored."""
    factor = 1.0 if grad_output is None else grad_output

    def everything(student: Tensor, target: Tensor, *teachers: Tensor) -> tuple[Tensor, ...]:
        leaf = student.detach().requires_grad_()
        out = _loss(case, backend, leaf, teachers, target)
        (gradient,) = torch.autograd.grad((out.loss * factor).sum(), leaf)
        return (*fields(out), gradient)

    ignored = torch.full_like(case.target, case.ignore_index)
    traced = make_fx(everything)(torch.zeros_like(case.student), ignored, *map(torch.ones_like, case.teachers))
    return Result(*(x.detach() for x in traced(case.student, case.target, *case.teachers)))


TRANSFORMS: dict[str, Evaluation] = {"torch.func": by_torch_func, "vmap": by_vmap, "make_fx": by_trace}

# --- drawing ----------------------------------------------------------------------------------------------------------


def convert(tensor: Tensor, sort: str) -> Tensor:
    return tensor if sort == "dense" else (VALUES | FLOATING | REFUSED)[sort](tensor)


def sorts_for(tensor: Tensor, learned: bool) -> list[str]:
    """Sorts of equal values; `learned`: that have a gradient of their own."""
    names = list(VALUES) if not tensor.is_floating_point() else [*VALUES, *FLOATING]
    without = {"inference", "functionalised", "functionalised view"} if learned else set()
    # A complex number has no bfloat16 parts.
    if tensor.dtype == torch.bfloat16:
        without.add("imaginary part")
    return [name for name in names if name not in without]


class Call:
    """A random case with one of its tensors replaced, in random circumstances."""

    def __init__(self, draw: Any, case: Case) -> None:
        self.case, self.slot, self.sort, self.call, self.transform = case, "student", "dense", None, None
        self.backend = draw(st.sampled_from(["auto", "auto", "auto", "reference", "cpu"]))
        kind = draw(st.sampled_from(["dense", "sort", "sort", "call", "transform", "refused"]))
        if self.backend == "cpu" and not availability("cpu").usable:
            self.backend = "auto"
        if kind in ("sort", "refused"):
            present = [name for name in SLOTS if isinstance(getattr(case, name), (Tensor, tuple))]
            self.slot = draw(st.sampled_from(present))
            tensor = case.teachers[0] if self.slot == "teachers" else getattr(case, self.slot)
            learned = self.slot in ("student", "weighting")
            self.sort = draw(st.sampled_from(list(REFUSED) if kind == "refused" else sorts_for(tensor, learned)))
        elif kind == "call":
            self.call = draw(st.sampled_from(list(CALLS)))
        elif kind == "transform":
            self.transform = draw(st.sampled_from(list(TRANSFORMS)))

    def given(self) -> Case:
        """The case with the replaced tensor; for teachers the first one."""
        value = getattr(self.case, self.slot)
        if self.slot == "teachers":
            return self.case.with_(teachers=(convert(value[0], self.sort), *value[1:]))
        return self.case.with_(**{self.slot: convert(value, self.sort)})

    @property
    def circumstances(self) -> Any:
        return CALLS[self.call] if self.call else contextlib.nullcontext

    @property
    def name(self) -> str:
        return self.transform or self.call or self.sort

    def __repr__(self) -> str:
        return (
            f"{self.backend}, {self.slot} is {self.sort}, call {self.call}, transform {self.transform}: {self.case!r}"
        )


@st.composite
def calls(draw: Any) -> Call:
    return Call(draw, draw(cases(most_rows=4, most_teachers=6)))


# --- checks -----------------------------------------------------------------------------------------------------------

NEEDS_ORDINARY = "cannot run here"


def check_logits(call: Call) -> str:
    """Checks one call of the logit loss; returns what it was."""
    if call.sort in REFUSED:
        return check_refused(call)
    evaluations = (TRANSFORMS[call.transform],) if call.transform else (run, value_and_grad)
    if call.call == "forward-mode level" and not isinstance(call.case.weighting, str):
        evaluations = (value_and_grad,)
    try:
        check(call.case, call.backend, call.given(), evaluations, call.circumstances)
    except NotImplementedError as error:
        # Only a backend requested by name may say so.
        assert call.backend == "cpu" and NEEDS_ORDINARY in str(error), error
        return f"refused, backend by name: {call.name}"
    return f"right: {call.name}"


def check_refused(call: Call) -> str:
    try:
        given = call.given()
    except (IndexError, RuntimeError, TypeError, ValueError):
        return "no such tensor"  # labels have no quantised form, vectors no compressed one
    replaced = given.teachers[0] if call.slot == "teachers" else getattr(given, call.slot)
    if call.sort == "freed" and replaced.numel() == 0:
        return "no such tensor"
    try:
        run(given, call.backend) if call.slot not in ("student", "weighting") else _loss(
            given, call.backend, given.student, given.teachers, given.target
        )
    except (TypeError, NotImplementedError) as error:
        assert call.sort in str(error) or NEEDS_ORDINARY in str(error), error
        return f"refused: {call.sort}"
    raise AssertionError(f"{call.sort} was taken")


@st.composite
def features(draw: Any) -> dict[str, Any]:
    """Features, weights and their sorts."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    N, K = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(FLOATS))
    student, teachers = [], []
    for _ in range(K):
        shape = (N, *draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
        r, f = (torch.randn(shape, generator=generator) * scale for _ in range(2))
        student.append(lay_out(r.to(dtype), draw(st.sampled_from(["contiguous", "padded", "transposed", "columns"]))))
        teachers.append(lay_out(f.to(draw(st.sampled_from(FLOATS))), draw(st.sampled_from(["contiguous", "rows"]))))
    slot = draw(st.sampled_from(["student", "teachers", "weights"]))
    weights = torch.rand(K, N, generator=generator)
    sorts = sorts_for(weights if slot == "weights" else teachers[0], learned=slot == "student")
    if dtype == torch.bfloat16 and "imaginary part" in sorts:
        sorts.remove("imaginary part")
    return {
        "student": student,
        "teachers": teachers,
        "weights": weights,
        "slot": slot,
        "sort": draw(st.sampled_from([*ORDINARY, *sorts, *REFUSED])),
        "call": draw(st.sampled_from([None, None, None, *CALLS])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


def replaced(x: dict[str, Any]) -> dict[str, Any]:
    """Student, teachers and weights with one tensor of another sort; of several the first."""
    value = x[x["slot"]]
    changed = [convert(value[0], x["sort"]), *value[1:]] if isinstance(value, list) else convert(value, x["sort"])
    return {name: x[name] for name in ("student", "teachers", "weights")} | {x["slot"]: changed}


def eager_feature_loss(student: list[Tensor], teachers: list[Tensor], weights: Tensor, reduction: str) -> Tensor:
    """eq. 6 in the dtype of the student's features."""
    dtype = student[0].dtype
    pairs = zip(weights.to(dtype), student, teachers, strict=True)
    rows = sum(w * (r - f.to(dtype)).square().flatten(1).mean(1) for w, r, f in pairs)
    if reduction == "none":
        return rows
    return rows.sum() / (max(rows.numel(), 1) if reduction == "mean" else 1)


def loss_and_gradients(function: Any, student: list[Tensor], *others: Any) -> list[Tensor]:
    """The loss and the gradient of each of the student's features, by a gradient of the loss other than 1."""
    leaves = [r.detach().requires_grad_() for r in student]
    loss = function(leaves, *others)
    g = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device="cpu").view(loss.shape)
    gradients = torch.autograd.grad((loss * g).sum(), leaves)
    return [dense(t.detach()) for t in (loss, *gradients)]


def check_refused_features(x: dict[str, Any]) -> str:
    tensor = x["weights"] if x["slot"] == "weights" else x[x["slot"]][0]
    if x["sort"] == "MaskedTensor" or (x["sort"] == "freed" and tensor.numel() == 0):
        return "no such tensor"  # PyTorch computes with a masked one
    try:
        given = replaced(x)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return "no such tensor"
    try:
        weighted_feature_loss(given["student"], given["teachers"], given["weights"], x["reduction"])
    except TypeError as error:
        assert x["sort"] in str(error), error
        return f"refused, features: {x['sort']}"
    raise AssertionError(f"{x['sort']} was taken")


def check_features(x: dict[str, Any]) -> str:
    if x["sort"] in REFUSED:
        return check_refused_features(x)
    others = x["teachers"], x["weights"], x["reduction"]
    R, N = (
        loss_and_gradients(eager_feature_loss, [r.to(dtype) for r in x["student"]], *others)
        for dtype in (torch.float64, torch.float32)
    )
    given = replaced(x)
    with CALLS[x["call"]]() if x["call"] else contextlib.nullcontext():
        ours = loss_and_gradients(
            weighted_feature_loss, given["student"], given["teachers"], given["weights"], x["reduction"]
        )
    for mine, true, eager in zip(ours, R, N, strict=True):
        # Eager may be exact by luck over a few elements, and float16 gradients may be subnormal, 2^-24 apart.
        floor = 4 * torch.finfo(torch.float32).eps * rms(true) + (2.0**-24 if mine.dtype == torch.float16 else 0)
        assert_accurate(mine, true, eager, "feature loss or gradient", floor)
    return f"right, features: {x['call'] or x['sort']}"


def check_confidence(call: Call) -> str:
    """confidence_weights of the student and the teachers of a case."""
    if call.transform or call.sort in REFUSED or call.slot in ("weighting", "num_items"):
        return check_logits(call)
    case, given = call.case, call.given()
    C, kept = case.student.shape[-1], (case.target != case.ignore_index).reshape(-1)
    label = torch.where(kept, case.target.reshape(-1), 0)
    results = []
    for dtype in (torch.float64, torch.float32):
        zs = [z.detach().to(dtype).reshape(-1, C).clamp(min=-1e6) for z in (case.student, *case.teachers)]
        ce = torch.stack([torch.nn.functional.cross_entropy(z, label, reduction="none") for z in zs])
        w = (1 - ce.softmax(0)) / (len(zs) - 1)
        results.append([t.where(kept, 0.0).view(len(zs), *case.target.shape) for t in (w, ce)])
    try:
        with call.circumstances():
            tensors = [given.student, *given.teachers]
            ours = confidence_weights(tensors, given.target, case.ignore_index, call.backend)
    except NotImplementedError as error:
        assert call.backend == "cpu" and NEEDS_ORDINARY in str(error), error
        return f"refused, backend by name: {call.name}"
    widest = max(
        [1.0, *(float(z.where(z > -1e6, 0.0).abs().max()) for z in (case.student, *case.teachers) if z.numel())]
    )
    floor = 16 * torch.finfo(torch.float32).eps * widest
    for mine, true, eager in zip(ours, *results, strict=True):
        assert_accurate(dense(mine), true, eager, "confidence weights", floor)
    return f"right, confidence: {call.name}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--last", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    last = options.last.open("w")

    @seed(options.seed)
    @settings(
        max_examples=options.examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls(), x=features(), kind=st.sampled_from(["logits"] * 6 + ["confidence"] * 2 + ["features"] * 2))
    def one(call: Call, x: dict[str, Any], kind: str) -> None:
        last.seek(0)
        last.truncate()
        shapes = [tuple(r.shape) for r in x["student"]]
        last.write(
            f"{kind}: {call!r}" if kind != "features" else f"features {shapes}, {x['slot']} is {x['sort']}, {x['call']}"
        )
        last.flush()
        COUNTS[
            check_features(x)
            if kind == "features"
            else {"logits": check_logits, "confidence": check_confidence}[kind](call)
        ] += 1

    one()
    print(json.dumps(COUNTS))


if __name__ == "__main__":
    main()
