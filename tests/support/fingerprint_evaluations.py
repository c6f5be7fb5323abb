"""Runs one evaluation of `fingerprint_cases.py` on one backend, through the public functions only."""

from __future__ import annotations

import contextlib
import hashlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from camkd_fast import (
    CAMKDFeatureLoss,
    CAMKDLoss,
    camkd_loss,
    camkd_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from tests.support.cases import Case, make_case, poisoned_slice, second_labels
from tests.support.evaluate import fields
from tests.support.fingerprint_cases import Spec

MIXED = (torch.float16, torch.float32, torch.bfloat16)
Results = dict[str, Tensor | None]

# --- inputs ----------------------------------------------------------------------------------------------------------


def _generator(spec: Spec) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256(spec.name.encode()).hexdigest()[:12], 16))


def _dtype(spec: Spec) -> torch.dtype:
    return torch.float32 if spec.dtype == "mixed" else getattr(torch, spec.dtype)


def _lead(spec: Spec) -> tuple[int, ...]:
    """The shape of the labels: N rows, or N / 2 sequences of 2 where that is possible."""
    if spec.layout.startswith("3-D"):
        return (spec.N // 2, 2) if spec.N % 2 == 0 else (spec.N, 1)
    return (spec.N,)


def _laid_out(z: Tensor, spec: Spec, index: int) -> Tensor:
    if spec.layout == "padded":
        return poisoned_slice(z, pad=3 + 2 * index, offset=1 + index % 3)
    if spec.layout == "3-D slice":  # as language models shift their logits
        return torch.cat([z, torch.full_like(z[:, :1], float("nan"))], 1)[:, :-1]
    if spec.layout == "transposed":
        return z.t().contiguous().t()
    if spec.layout == "expanded" and index == 1 and len(z):
        return z[:1].expand(z.shape)
    return z


def _logits(spec: Spec) -> tuple[list[Tensor], Tensor]:
    """The logits of the student and of K teachers, and the labels."""
    generator = _generator(spec)
    case = make_case(
        spec.N,
        spec.C,
        spec.K,
        _dtype(spec),
        peaked=spec.peaked,
        padded=False,
        ignored={"none": 0.0, "some": 0.3, "all": 1.0}[spec.ignored],
        teacher_dtypes=MIXED if spec.dtype == "mixed" else (),
        seed=int(torch.randint(1 << 20, (), generator=generator)),
        lead=_lead(spec),
        ignore_index=spec.ignore_index,
    )
    tensors, target = [case.student, *case.teachers], case.target
    masked = slice(spec.C // 3, spec.C // 3 + 2)
    if spec.columns == "finfo.min":  # as a label it would cost more than float32 holds in a sum
        target = target.where((target < masked.start) | (target >= masked.stop), 0)
    for index, z in enumerate(tensors):
        if index == spec.K:  # nothing may depend on the logits of an ignored row
            z.masked_fill_((target == spec.ignore_index).unsqueeze(-1), float("nan"))
        if spec.columns and (index == 0 or "student" not in spec.columns):
            fill = torch.finfo(z.dtype).min if spec.columns == "finfo.min" else -float("inf")
            z[..., masked] = fill
    return [_laid_out(z, spec, index) for index, z in enumerate(tensors)], target


def _second(spec: Spec, target: Tensor) -> dict[str, Tensor]:
    """Second labels, of columns that are not masked."""
    if spec.labels == "one":
        return {}
    kept = torch.arange(spec.C)
    kept = kept[(kept < spec.C // 3) | (kept > spec.C // 3 + 1)] if spec.columns and spec.C > 2 else kept
    return second_labels(target, kept, spec.ignore_index, _generator(spec))


def _case(spec: Spec) -> Case:
    generator = _generator(spec)
    (student, *teachers), target = _logits(spec)
    weighting: str | Tensor = spec.weighting
    if spec.weighting.startswith("given"):
        shape = (spec.K,) if spec.weighting == "given" else (spec.K, *target.shape)
        weighting = torch.rand(shape, generator=generator)
    reduction, _, count = spec.reduction.partition("/")
    items: float | Tensor | None = None
    if count:
        items = 7.0 if count == "number" else torch.tensor(7.0)
    return Case(
        student, tuple(teachers), target, spec.temperature, spec.hard_weight, spec.soft_weight, weighting, reduction,
        spec.ignore_index, items, **_second(spec, target),
    )  # fmt: skip


# --- evaluations -----------------------------------------------------------------------------------------------------


def _gradients(results: Results, loss: Tensor, inputs: dict[str, Tensor], spec: Spec) -> Results:
    """`results` and the gradient of every input, twice where the graph is retained."""
    incoming = torch.ones_like(loss)
    if spec.gradient != "one":
        incoming = torch.randn(loss.shape, generator=_generator(spec)).to(loss.dtype)
    for run in range(2 if spec.gradient == "retained" else 1):
        again = spec.gradient == "retained" and run == 0
        grads = torch.autograd.grad(loss, list(inputs.values()), incoming, retain_graph=again, allow_unused=True)
        results |= {f"grad {name} {run}": grad for name, grad in zip(inputs, grads, strict=True)}
    return results


def _named(out: Any) -> Results:
    names = ("loss", "hard", "soft", "weights", "teacher_ce", "divergence")
    return dict(zip(names, fields(out), strict=True))


def _compiled(function: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def _logit_loss(spec: Spec, backend: str) -> Results:
    case = _case(spec)
    student, options = case.student.detach(), case.options()
    teachers: Any = list(case.teachers)
    if spec.layout == "stacked" and spec.dtype != "mixed":
        teachers = torch.stack(teachers)
    inputs = {}
    if "grad" not in spec.entry:
        inputs["student"] = student.requires_grad_()
        if isinstance(case.weighting, Tensor):
            options["weighting"] = inputs["weighting"] = case.weighting.requires_grad_()
    if spec.entry.endswith("and grad"):
        scale = {"1": 1.0, "1024": 1024.0, "tensor": torch.tensor(1024.0)}[spec.loss_scale]

        def value_and_grad(student: Tensor, teachers: Any, target: Tensor) -> tuple[Any, Tensor]:
            return camkd_loss_and_grad(student, teachers, target, loss_scale=scale, backend=backend, **options)

        call = _compiled(value_and_grad) if spec.entry.startswith("compiled") else value_and_grad
        out, grad = call(student, teachers, case.target)
        return _named(out) | {"grad": grad}
    if spec.entry == "module":
        items, *second = (options.pop(name) for name in ("num_items", "second_target", "mix"))
        if isinstance(case.weighting, Tensor):
            options["weighting"] = inputs["weighting"] = nn.Parameter(case.weighting.detach())
        out = CAMKDLoss(backend=backend, **options)(student, teachers, case.target, items, *second)
    else:

        def value(student: Tensor, teachers: Any, target: Tensor, weighting: str | Tensor) -> Any:
            return camkd_loss(student, teachers, target, backend=backend, **options | {"weighting": weighting})

        call = _compiled(value) if spec.entry.startswith("compiled") else value
        out = call(student, teachers, case.target, options["weighting"])
    results = _named(out)
    return _gradients(results, out.loss, inputs, spec) if inputs else results


def _confidence(spec: Spec, backend: str) -> Results:
    generator = _generator(spec)
    tensors, target = _logits(spec)
    inputs = {f"logits {k}": z.detach().requires_grad_() for k, z in enumerate(tensors[1:])}
    logits: Any = list(inputs.values())
    if spec.layout == "stacked" and spec.dtype != "mixed":
        logits = torch.stack(logits)
    weights, ce = confidence_weights(logits, target, spec.ignore_index, backend, **_second(spec, target))
    one, other = (torch.randn(weights.shape, generator=generator).to(weights.dtype) for _ in range(2))
    return _gradients({"weights": weights, "ce": ce}, (weights * one + ce * other).sum(), inputs, spec)


def _maps(spec: Spec, dtype: torch.dtype, generator: torch.Generator, count: int) -> list[Tensor]:
    """`count` feature maps (N, D_k, H_k, W_k), or (N, M_k), of different sizes."""
    maps = []
    for k in range(count):
        z = torch.randn(spec.N, 4 + 3 * k, 2 + k % 3, 3, generator=generator).to(dtype)
        if spec.format == "channels_last":
            z = z.contiguous(memory_format=torch.channels_last)
        maps.append(z.flatten(1) if spec.format == "flat" else z)
    return maps


def _features(spec: Spec, backend: str) -> Results:
    generator = _generator(spec)
    student = _maps(spec, _dtype(spec), generator, spec.K)
    teachers = _maps(spec, torch.bfloat16 if spec.dtype == "mixed" else _dtype(spec), generator, spec.K)
    inputs = {f"features {k}": r.requires_grad_() for k, r in enumerate(student)}
    inputs["weights"] = torch.rand(spec.K, spec.N, generator=generator).requires_grad_()
    loss = weighted_feature_loss(student, teachers, inputs["weights"], reduction=spec.reduction, backend=backend)
    return _gradients({"loss": loss}, loss, inputs, spec)


def _feature_module(spec: Spec, backend: str) -> Results:
    generator = _generator(spec)
    teachers = _maps(spec, torch.float32, generator, spec.K)
    module = CAMKDFeatureLoss(5, [z.shape[1] for z in teachers], detach_weights=spec.ignored == "none", backend=backend)
    inputs = dict(module.named_parameters())
    for parameter in inputs.values():
        nn.init.normal_(parameter, generator=generator)
    inputs["feature"] = torch.randn(spec.N, 5, 4, 4, generator=generator).requires_grad_()
    matrices = [torch.randn(z.shape[1], spec.C, generator=generator) for z in teachers]
    heads = [lambda z, matrix=matrix: z.mean((2, 3)) @ matrix for matrix in matrices]
    out = module(inputs["feature"], teachers, heads, _logits(spec)[1])
    return _gradients(dict(out._asdict()), out.loss, inputs, spec)


def _compiled_features(spec: Spec, backend: str) -> Results:
    generator = _generator(spec)
    tensors, target = _logits(spec)
    teachers = _maps(spec, torch.float32, generator, spec.K)

    def function(logits: list[Tensor], features: list[Tensor]) -> Tensor:
        weights, ce = confidence_weights(logits, target, backend=backend)
        return weighted_feature_loss(features, teachers, weights, backend=backend) + ce.mean()

    logits = {f"logits {k}": z.requires_grad_() for k, z in enumerate(tensors[1:])}
    maps = _maps(spec, torch.float32, generator, spec.K)
    features = {f"features {k}": z.requires_grad_() for k, z in enumerate(maps)}
    loss = _compiled(function)(list(logits.values()), list(features.values()))
    return _gradients({"loss": loss}, loss, logits | features, spec)


def evaluate(spec: Spec, backend: str, emulated: ModuleType | None = None) -> Results:
    """Every tensor that a caller gets, by name. `emulated` is the module of backend="cuda" on the host."""
    with contextlib.ExitStack() as stack:
        if emulated is not None:
            from tests.cuda.host.on_host import enter, limit

            limit(emulated)
            enter(emulated, spec.regime, spec.K)
        if spec.entry.startswith("backend mean"):
            from tests.cuda.host.on_host import labels_counted_by_backend

            stack.enter_context(labels_counted_by_backend())
        special = {
            "confidence": _confidence,
            "feature": _features,
            "feature module": _feature_module,
            "compiled features": _compiled_features,
        }
        results = special.get(spec.entry, _logit_loss)(spec, backend)
        if emulated is not None and spec.regime != "table":
            _, batches, blocks, *_ = emulated.last_rows()
            reached = (batches > 1, blocks > 1)
            assert reached == (spec.regime == "batches", spec.regime == "cluster"), f"{spec.name} ran as {reached}"
        return results
