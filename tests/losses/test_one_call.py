"""The loss in one C++ call: which inputs it accepts and declines, and that no result changes by a bit."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from camkd_fast import camkd_loss, camkd_loss_and_grad
from tests.support.backends import BACKENDS
from tests.support.cases import make_case
from tests.support.evaluate import fields, run, run_value_and_grad
from tests.support.tensors import Wrapped, strided
from tests.support.torch_version import HAS_C_FUNCTIONS, OLD_TORCH

if "cpu" not in BACKENDS:
    pytest.skip("a build without the compiled module", allow_module_level=True)
if not HAS_C_FUNCTIONS:
    pytest.skip(OLD_TORCH, allow_module_level=True)

from camkd_fast.backends import cpu as cpu_backend
from camkd_fast.backends.dispatch import whole_losses
from camkd_fast.backends.whole_losses import WholeLoss
from camkd_fast.losses.formula import Formula


def one_call(
    student: Any,
    teachers: Any,
    target: Any,
    loss_scale: Any = 1.0,
    reduction: Any = "mean",
    num_items: Any = None,
    second: Any = None,
    **changes: Any,
) -> WholeLoss | None:
    arguments = student, teachers, target, Formula(**changes), reduction, num_items, loss_scale
    return cpu_backend.whole_losses.logit_loss(*arguments, second)


def batch(N: int = 5, C: int = 7, K: int = 3) -> tuple[Tensor, list[Tensor], Tensor]:
    return torch.randn(N, C), [torch.randn(N, C) for _ in range(K)], torch.randint(C, (N,))


def test_a_torch_with_c_functions_is_connected() -> None:
    assert cpu_backend.whole_losses.connected


@pytest.mark.parametrize("lead", [(37,), (4, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", ["confidence", "uniform", "entropy"])
@pytest.mark.parametrize("C, K, temperature", [(10, 1, 4.0), (100, 3, 3.0), (5000, 2, 2.0), (9000, 5, 1.0)])
def test_bitwise_the_general_path(C, K, temperature, weighting, dtype, lead, general):
    case = make_case(
        math.prod(lead),
        C,
        K,
        dtype,
        lead=lead,
        ignored=0.3,
        teacher_dtypes=(torch.float32, torch.bfloat16, torch.float16),
        weighting=weighting,
        temperature=temperature,
        hard_weight=0.7,
        soft_weight=0.4,
    )
    options = {name: case.options()[name] for name in Formula._fields}
    found = one_call(case.student, case.teachers, case.target, **options)
    assert found is not None and all(part is not None for part in (*found[:4], found[5]))
    results = []
    for yes in (False, True):
        general(yes)
        results.append([*run(case, "cpu")[:-1], *run_value_and_grad(case, "cpu", loss_scale=8.0)[:-1]])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        assert ours.is_contiguous()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"divergence": "reverse_kl"}, {"divergence": ("reverse_kl", 0.0)}),
        ({"divergence": "forward_kl"}, {"divergence": ["forward_kl", 0]}),
        ({"divergence": ("jsd", 0.25)}, {"divergence": ["jsd", 0.25]}),
        ({"teacher_logit_scales": (1.0, 0.5, 2.0)}, {"teacher_logit_scales": [1, 0.5, 2]}),
        ({"teacher_softcaps": (5.0, None, 3.0)}, {"teacher_softcaps": [5, None, 3]}),
    ],
    ids=str,
)
def test_every_spelling_of_a_setting_is_one_call(first, second):
    tensors = batch()
    one, other = one_call(*tensors, **first), one_call(*tensors, **second)
    assert one is not None and other is not None
    general = camkd_loss_and_grad(*tensors, **second, backend="reference")[0]
    assert torch.equal(one[0], other[0]) and torch.allclose(one[0], general.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lead", [(37,), (4, 9)], ids=str)
def test_two_labels_are_bitwise_the_general_path(lead, reduction, general):
    case = make_case(math.prod(lead), 33, 3, lead=lead, ignored=0.3, reduction=reduction, two_labels=True)
    second = case.second_target, case.mix
    assert one_call(case.student, case.teachers, case.target, reduction=reduction, second=second) is not None
    ones = torch.ones(lead) if reduction == "none" else None
    results = []
    for yes in (False, True):
        general(yes)
        results.append([*run(case, "cpu", ones)[:-1], *run_value_and_grad(case, "cpu")[:-1]])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("lead", [(37,), (4, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "reduction, num_items, scale",
    [
        ("sum", None, 0.5),
        ("none", None, 8.0),
        ("mean", 5, 8.0),
        ("mean", 7.5, torch.tensor([4.0])),
        ("mean", None, torch.tensor(4.0)),
    ],
)
def test_every_reduction_is_bitwise_the_general_path(reduction, num_items, scale, dtype, lead, general):
    case = make_case(math.prod(lead), 33, 2, dtype, lead=lead, ignored=0.3, reduction=reduction)
    assert one_call(case.student, case.teachers, case.target, scale, reduction, num_items) is not None
    results = []
    for yes in (False, True):
        general(yes)
        options = {**case.options(), "num_items": num_items, "backend": "cpu"}
        out, grad = camkd_loss_and_grad(case.student, case.teachers, case.target, loss_scale=scale, **options)
        learning = case.student.detach().requires_grad_()
        loss = camkd_loss(learning, case.teachers, case.target, **options).loss
        loss.backward(torch.linspace(-1, 1, loss.numel()).view(loss.shape) if reduction == "none" else None)
        results.append([*fields(out), grad, loss.detach(), learning.grad])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        assert torch.equal(ours, expected)


def test_losses_of_rows_have_memory_of_their_own():
    student, teachers, target = batch()
    out = camkd_loss(student, teachers, target, reduction="none")
    hard, weights = out.hard, out.weights
    out.loss.zero_()
    assert torch.equal(out.hard, hard) and torch.equal(out.weights, weights)


S, Z, Y = batch()
M = torch.rand(5)
DECLINED: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "no tensor": (S.tolist(), Z, Y, {}),
    "float16 student whose gradient is to be divided": (S.half(), Z, Y, {"loss_scale": None}),
    "float64 student": (S.double(), Z, Y, {}),
    "float64 teacher": (S, [Z[0].double()], Y, {}),
    "integer student": (Y.new_ones(5, 7), Z, Y, {}),
    "student on meta": (S.to("meta"), Z, Y, {}),
    "teacher on meta": (S, [Z[0].to("meta")], Y, {}),
    "subclass": (S.as_subclass(Wrapped), Z, Y, {}),
    "subclass of a teacher": (S, [Z[0].as_subclass(Wrapped)], Y, {}),
    "sparse": (S.to_sparse(), Z, Y, {}),
    "one dimension": (S[0], [z[0] for z in Z], Y[0], {}),
    "four dimensions": (S.view(1, 1, 5, 7), [z.view(1, 1, 5, 7) for z in Z], Y.view(1, 1, 5), {}),
    "strided columns": (strided(S), Z, Y, {}),
    "strided columns of a teacher": (S, [strided(Z[0])], Y, {}),
    "no rows": (S[:0], [z[:0] for z in Z], Y[:0], {}),
    "no classes": (S[:, :0], [z[:, :0] for z in Z], Y, {}),
    "no teachers": (S, [], Y, {}),
    "17 teachers": (S, Z[:1] * 17, Y, {}),
    "teachers as one tensor": (S, torch.stack(Z), Y, {}),
    "teachers as an iterator": (S, iter(Z), Y, {}),
    "no teacher": (S, [None], Y, {}),
    "teacher that requires grad": (S, [Z[0].clone().requires_grad_()], Y, {}),
    "teacher with fewer rows": (S, [Z[0][:4]], Y, {}),
    "teacher with fewer classes": (S, [Z[0][:, :6]], Y, {}),
    "teacher with more dimensions": (S, [Z[0][None]], Y, {}),
    "int32 labels": (S, Z, Y.int(), {}),
    "strided labels": (S, Z, torch.stack([Y, Y], 1)[:, 0], {}),
    "fewer labels": (S, Z, Y[:4], {}),
    "label too large": (S, Z, Y.clone().fill_(7), {}),
    "label below 0": (S, Z, Y.clone().fill_(-1), {}),
    "second label too large": (S, Z, Y, {"second": (Y.clone().fill_(7), M)}),
    "share above 1": (S, Z, Y, {"second": (Y, M + 1)}),
    "fewer second labels": (S, Z, Y, {"second": (Y[:4], M)}),
    "fewer shares": (S, Z, Y, {"second": (Y, M[:4])}),
    "int32 second labels": (S, Z, Y, {"second": (Y.int(), M)}),
    "float64 shares": (S, Z, Y, {"second": (Y, M.double())}),
    "strided second labels": (S, Z, Y, {"second": (torch.stack([Y, Y], 1)[:, 0], M)}),
    "strided shares": (S, Z, Y, {"second": (Y, torch.stack([M, M], 1)[:, 0])}),
    "shares that require grad": (S, Z, Y, {"second": (Y, M.clone().requires_grad_())}),
    "second labels on meta": (S, Z, Y, {"second": (Y.to("meta"), M)}),
    "second labels without shares": (S, Z, Y, {"second": (Y, None)}),
    "second labels as a list": (S, Z, Y, {"second": [Y, M]}),
    "temperature 0": (S, Z, Y, {"temperature": 0.0}),
    "temperature -1": (S, Z, Y, {"temperature": -1}),
    "temperature inf": (S, Z, Y, {"temperature": math.inf}),
    "temperature a tensor": (S, Z, Y, {"temperature": torch.tensor(4.0)}),
    "temperature true": (S, Z, Y, {"temperature": True}),
    "temperature beyond float64": (S, Z, Y, {"temperature": 10**400}),
    "hard weight nan": (S, Z, Y, {"hard_weight": math.nan}),
    "soft weight a string": (S, Z, Y, {"soft_weight": "1"}),
    "unknown weighting": (S, Z, Y, {"weighting": "confident"}),
    "given weights": (S, Z, Y, {"weighting": torch.ones(3)}),
    "divergence without its share": (S, Z, Y, {"divergence": "jsd"}),
    "divergence with a share that it lacks": (S, Z, Y, {"divergence": ["reverse_kl", 0.5]}),
    "divergence of three parts": (S, Z, Y, {"divergence": ["jsd", 0.5, 0]}),
    "divergence without parts": (S, Z, Y, {"divergence": []}),
    "unknown divergence": (S, Z, Y, {"divergence": "kl"}),
    "scales of two teachers": (S, Z, Y, {"teacher_logit_scales": [1.0, 2.0]}),
    "scales of no teacher": (S, Z, Y, {"teacher_logit_scales": []}),
    "scale 0": (S, Z, Y, {"teacher_logit_scales": [1.0, 0.0, 1.0]}),
    "softcap below 0": (S, Z, Y, {"teacher_softcaps": [-5.0, None, None]}),
    "ignore_index a string": (S, Z, Y, {"ignore_index": "none"}),
    "ignore_index beyond int64": (S, Z, Y, {"ignore_index": 2**64}),
    "loss scale a float64 tensor": (S, Z, Y, {"loss_scale": torch.tensor(2.0, dtype=torch.float64)}),
    "loss scale of two elements": (S, Z, Y, {"loss_scale": torch.ones(2)}),
    "loss scale on meta": (S, Z, Y, {"loss_scale": torch.ones(1, device="meta")}),
    "loss scale a string": (S, Z, Y, {"loss_scale": "2"}),
    "unknown reduction": (S, Z, Y, {"reduction": "average"}),
    "no reduction": (S, Z, Y, {"reduction": None}),
    "no items": (S, Z, Y, {"num_items": 0}),
    "items below 0": (S, Z, Y, {"num_items": -2}),
    "items a tensor": (S, Z, Y, {"num_items": torch.tensor(5)}),
    "items nan": (S, Z, Y, {"num_items": math.nan}),
    "items of a sum": (S, Z, Y, {"reduction": "sum", "num_items": 5}),
    "items of single rows": (S, Z, Y, {"reduction": "none", "num_items": 5}),
    "loss scale nan": (S, Z, Y, {"loss_scale": math.nan}),
}


@pytest.mark.parametrize("name", DECLINED)
def test_unsupported_or_invalid_input_is_declined(name):
    student, teachers, target, options = DECLINED[name]
    assert one_call(student, teachers, target, **options) is None


class Exchange(ctypes.Structure):
    """torch's functions, as in csrc/python/dlpack.h: older ones, allocate, take, give, look, stream."""

    _fields_ = [("version", ctypes.c_uint32 * 2), ("functions", ctypes.c_void_p * 6)]


@contextlib.contextmanager
def on_another_cpu(tensor: Tensor) -> Iterator[None]:
    """The module sees this tensor on cpu:1, which torch does not have."""
    name, torchs = b"dlpack_exchange_api", Tensor.__dlpack_c_exchange_api__
    pointer_of, capsule_of = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule_of.restype, capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api = Exchange.from_buffer_copy(Exchange.from_address(pointer_of(torchs, name)))
    function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    look = function(api.functions[4])

    def look_elsewhere(address: int, out: int) -> int:
        found = look(address, out)
        if address == id(tensor):
            ctypes.c_int32.from_address(out + 12).value = 1  # after the address of the data and the device's type
        return found

    replaced = function(look_elsewhere)
    api.functions[4] = ctypes.cast(replaced, ctypes.c_void_p).value
    connect = cpu_backend._C.connect_tensors
    assert connect(capsule_of(ctypes.addressof(api), name, None), Tensor, nn.Parameter)
    try:
        yield
    finally:
        assert connect(torchs, Tensor, nn.Parameter)


@pytest.mark.parametrize("which", ["teacher", "labels", "second labels", "shares", "loss scale"])
def test_tensors_of_two_devices_are_declined(which: str) -> None:
    student, teachers, target = batch()
    second, scale = (target.clone(), torch.rand(5)), torch.tensor([2.0])
    given = {"teacher": teachers[1], "labels": target, "second labels": second[0], "shares": second[1]}
    assert one_call(student, teachers, target, scale, second=second) is not None
    with on_another_cpu(given.get(which, scale)):
        assert one_call(student, teachers, target, scale, second=second) is None
    assert one_call(student, teachers, target, scale, second=second) is not None


def test_tensors_without_memory_of_their_own_are_declined():
    student, teachers, target = batch()
    with FakeTensorMode() as mode:
        assert one_call(mode.from_tensor(student), teachers, target) is None

    seen = []

    def loss(s: Tensor) -> Tensor:
        seen.append(one_call(s, teachers, target))
        return s.sum()

    torch.func.grad(loss)(student)
    torch.func.vmap(loss)(torch.stack([student, student]))
    assert seen == [None, None]


def test_rows_of_any_stride_are_accepted():
    student, teachers, target = batch(8, 9)
    wide = torch.full((16, 20), math.nan)
    wide[::2, 3:12] = student
    for laid_out in (wide[::2, 3:12], nn.Parameter(student), student[:1].expand(8, 9)):
        found = one_call(laid_out, (teachers[0][:1].expand(8, 9), *teachers[1:]), target)
        assert found is not None and found[2] is not None and found[2].is_contiguous()


def test_the_gradient_is_computed_only_if_needed():
    student, teachers, target = batch()
    assert one_call(student, teachers, target, loss_scale=None)[2] is None
    assert one_call(student, teachers, target)[2].shape == student.shape
    student.requires_grad_()
    assert one_call(student, teachers, target, loss_scale=None)[2].shape == student.shape
    with torch.no_grad():
        assert one_call(student, teachers, target, loss_scale=None)[2] is None


def test_every_row_ignored():
    student, teachers, target = batch()
    out, grad = camkd_loss_and_grad(student, teachers, target.fill_(-100))
    assert all(not bool(x.any()) for x in (*fields(out), grad))


def test_outputs_outlive_inputs_and_later_calls():
    """Small tensors, and one in recycled memory, which is released by its last owner."""
    for N, C in ((3, 5), (300, 1000)):
        case = make_case(N, C, padded=False)
        out, grad = camkd_loss_and_grad(case.student, case.teachers, case.target)
        kept = [x.clone() for x in (*fields(out), grad)]
        parts = [*fields(out), grad]
        del case, out, grad
        gc.collect()
        others = [camkd_loss_and_grad(*batch(N, C)) for _ in range(5)]
        for part, copy in zip(parts, kept, strict=True):
            assert torch.equal(part, copy)
        del others


def test_results_may_be_changed_in_place():
    student, teachers, target = batch()
    out, grad = camkd_loss_and_grad(student, teachers, target)
    value = float(out.loss)
    out.loss.mul_(2)
    grad.add_(1)
    assert float(out.loss) == 2 * value
    again, fresh = camkd_loss_and_grad(student, teachers, target)
    assert float(again.loss) == value and not torch.equal(fresh, grad)


def test_reference_counts_are_restored():
    student, teachers, target = batch()
    objects = [student, *teachers, target, teachers]
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(50):
        one_call(student, teachers, target)
        one_call(student, teachers, target.int())
        one_call(student, teachers, target, temperature=torch.ones(()))
    assert [sys.getrefcount(x) for x in objects] == before


def test_from_many_threads():
    cases = [make_case(8 + i, 50, padded=False, seed=i) for i in range(4)]
    expected = [run_value_and_grad(case, "cpu") for case in cases]
    wrong = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(200):
            result = run_value_and_grad(cases[i], "cpu")
            if not torch.equal(result.grad, expected[i].grad) or not torch.equal(result.weights, expected[i].weights):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(2)
    assert not wrong


def test_a_torch_without_c_functions(general):
    """As before torch 2.10: the general path is taken."""
    assert not cpu_backend._C.connect_tensors(None, Tensor, nn.Parameter)
    assert one_call(*batch()) is not None  # the refused connection did not replace the earlier one
    student, teachers, target = batch()
    assert whole_losses("auto", student) is cpu_backend.whole_losses
    general(True)
    assert whole_losses("auto", student) is None
    loss = camkd_loss(student.requires_grad_(), teachers, target).loss
    loss.backward()
    assert loss.isfinite() and student.grad is not None
