"""Which backend runs, and the reason given for it."""

from types import SimpleNamespace

import pytest
import torch

from camkd_fast import camkd_loss
from camkd_fast.backends import dispatch
from tests.support.backends import BACKENDS
from tests.support.cases import make_case
from tests.support.evaluate import run
from tests.support.tolerance import assert_result
from tests.support.truth import naive, truth


@pytest.mark.parametrize("dtype", dispatch.COMPILED_DTYPES, ids=str)
def test_auto_takes_the_fastest_backend_of_a_cpu(dtype):
    tensors = [torch.zeros(2, 3, dtype=dtype)]
    assert dispatch.choose("auto", tensors)[0] == BACKENDS[-1]
    assert dispatch.backend_for("auto", tensors) is dispatch.backend_for(BACKENDS[-1], tensors)


def test_auto_takes_the_reference_for_float64_and_says_why():
    student, double = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    for tensors in ([double], [student, double]):
        assert dispatch.choose("auto", tensors)[0] == "reference"
        assert "float64" in dispatch.explain(*tensors)


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_every_backend_is_available_or_says_why_not(name):
    state = dispatch.availability(name)
    assert state.reason and "\n" not in state.reason
    if not state.usable:
        with pytest.raises(NotImplementedError, match="cannot run here"):
            dispatch.choose(name, [torch.zeros(2, 3)])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_is_the_one_that_runs(name, monkeypatch):
    case = make_case(4, 10)
    module = dispatch.backend_for(name, [case.student])
    whole, results = getattr(module, "whole_losses", None), []
    for owner, function in ((module, module.row_loss), *([(whole, whole.logit_loss)] if whole else [])):

        def spy(*args, function=function, **kwargs):
            results.append(function(*args, **kwargs))
            return results[-1]

        monkeypatch.setattr(owner, function.__name__, spy)
    camkd_loss(case.student, case.teachers, case.target, backend=name)
    # logit_loss may leave a call to row_loss, as it does with a PyTorch that has no exchange of tensors with C++
    assert sum(result is not None for result in results) == 1


def test_auto_equals_the_backend_that_it_names_bit_for_bit():
    case = make_case(33, 129)
    name = dispatch.explain(case.student).split(" ")[0]
    assert all(torch.equal(a, b) for a, b in zip(run(case, "auto")[:-1], run(case, name)[:-1], strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter, on masked lanes
def test_interpreted_triton_agrees_through_the_public_function():
    # A smoke test of the path; test_triton.py tests the kernels.
    case = make_case(3, 33, ignored=0.2)
    assert_result(run(case, "triton"), case, truth(case), naive(case))


@pytest.fixture
def gpu_logits(monkeypatch):
    """Mock of bfloat16 logits of 1000 classes on a Hopper GPU, where all backends are available."""
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "availability", lambda name: dispatch.Availability(True, name))
    built = SimpleNamespace(build=lambda: (True, "90"), built_for=lambda capability: capability >= (8, 0))
    monkeypatch.setattr(dispatch, "_module", lambda name: built)
    monkeypatch.setattr(dispatch.memory, "are_dense", lambda tensors: True)
    shape = torch.Size([8, 1000])
    return SimpleNamespace(
        device=torch.device("cuda", 0), is_cpu=False, dtype=torch.bfloat16, shape=shape, dim=lambda: len(shape)
    )


def test_auto_on_a_gpu_takes_triton_until_a_measurement_says_otherwise(gpu_logits, monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_PREFERRED", ())
    assert dispatch.choose("auto", [gpu_logits])[0] == "triton"
    assert "9.0, 1000 classes" in dispatch.choose("auto", [gpu_logits])[1]
    monkeypatch.setattr(dispatch, "CUDA_PREFERRED", (((9, 0), 512, 2048),))
    assert dispatch.choose("auto", [gpu_logits])[0] == "cuda"
    for entry in [((8, 0), 512, 2048), ((9, 0), 1001, 2048), ((9, 0), 1, 999)]:
        monkeypatch.setattr(dispatch, "CUDA_PREFERRED", (entry,))
        assert dispatch.choose("auto", [gpu_logits])[0] == "triton"


def test_auto_on_a_gpu_takes_cuda_for_feature_maps(gpu_logits, monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_PREFERRED", ())
    assert dispatch.choose("auto", [gpu_logits], maps=True)[0] == "cuda"
    monkeypatch.setattr(dispatch, "availability", lambda name: dispatch.Availability(name != "cuda", "absent"))
    name, reason = dispatch.choose("auto", [gpu_logits], maps=True)
    assert name == "triton" and "cuda: absent" in reason


def test_a_measurement_counts_from_its_fewest_to_its_most_classes(gpu_logits, monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_PREFERRED", (((9, 0), 512, 2048),))

    def chosen(C):
        logits = SimpleNamespace(**{**vars(gpu_logits), "shape": torch.Size([8, C])})
        return dispatch.choose("auto", [logits])[0]

    assert [chosen(C) for C in (511, 512, 513, 2047, 2048, 2049)] == ["triton", *["cuda"] * 4, "triton"]


@pytest.mark.skipif(not dispatch.availability("cpu").usable, reason="no compiled module")
def test_cpu_logits_take_one_call_only_where_the_cpu_backend_is_allowed():
    logits = torch.zeros(2, 3)
    found = {name: dispatch.whole_losses(name, logits) is not None for name in ("auto", *dispatch.BACKENDS)}
    assert found == {"auto": True, "cpu": True, "cuda": False, "triton": False, "reference": False}
    for other in (None, [1.0], torch.zeros((), device="meta"), torch.zeros(2, 3, device="meta")):
        assert dispatch.whole_losses("auto", other) is None


def test_gpu_logits_take_one_call_where_cuda_is_preferred_or_requested(gpu_logits, monkeypatch):
    monkeypatch.setattr(dispatch, "_compiled", dispatch._compiled.__wrapped__)
    monkeypatch.setattr(dispatch, "CUDA_PREFERRED", (((9, 0), 512, 2048),))
    gpu, C = gpu_logits.device, gpu_logits.shape[-1]
    assert [dispatch._compiled("auto", gpu, classes) for classes in (511, C, 2049)] == ["triton", "cuda", "triton"]
    assert dispatch._compiled("cuda", gpu, 5) == "cuda" and dispatch._compiled("cpu", gpu, 5) is None
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    assert dispatch._compiled("cuda", gpu, 5) is None  # not built for it: `choose` says so


def test_auto_on_a_gpu_without_triton_takes_cuda(gpu_logits, monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_PREFERRED", ())
    monkeypatch.setattr(dispatch, "availability", lambda name: dispatch.Availability(name != "triton", "absent"))
    name, reason = dispatch.choose("auto", [gpu_logits])
    assert name == "cuda" and "triton: absent" in reason


def test_the_cuda_backend_refuses_gpus_that_it_was_not_built_for(gpu_logits, monkeypatch):
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    with pytest.raises(NotImplementedError, match=r"built for 90, got compute capability 7\.5"):
        dispatch.choose("cuda", [gpu_logits])


@pytest.mark.skipif(not dispatch.availability("cpu").usable, reason="no compiled module")
@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("80-real 90", (8, 0), True),
        ("80-real 90", (8, 9), True),  # machine code of the same major version
        ("80-real 90", (7, 5), False),
        ("80-real 90", (10, 0), True),  # from PTX
        ("80-real 90-real", (10, 0), False),
        ("86-real", (8, 0), False),
        ("90-virtual", (9, 0), True),
        ("90-virtual", (8, 9), False),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),  # architecture-specific code runs on no other
        ("100f-real 120-real", (12, 0), True),
    ],
)
def test_a_build_runs_on_the_gpus_of_its_architectures(archs, capability, expected, monkeypatch):
    from camkd_fast.backends import cuda as cuda_backend

    monkeypatch.setattr(cuda_backend, "build", lambda: (True, archs))
    assert cuda_backend.built_for.__wrapped__(capability) is expected
