"""Import and fallback, in new processes where the missing modules are blocked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Acts as a machine without the modules in ABSENT.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in ABSENT):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def python(code: str, absent: tuple[str, ...] = (), **environment: str) -> str:
    prefix = f"ABSENT = {absent!r}\n{BLOCK}" if absent else ""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", prefix + code],
        cwd=ROOT,
        env=clean | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_costs_less_than_two_seconds_beyond_torch():
    # Processor time, so that other work on the machine does not count.
    code = """
import time, torch
start = time.process_time()
import camkd_fast
print(time.process_time() - start)
"""
    assert float(python(code)) < 2.0


def test_import_loads_neither_triton_nor_training_dependencies():
    code = """
import sys, torch
before = set(sys.modules)
import camkd_fast
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    loaded = set(python(code).split())
    assert "camkd_fast" in loaded
    assert not loaded & {"triton", "sklearn", "matplotlib", "tqdm", "numpy", "tests", "benchmarks"}


STEP = """
import warnings, torch
from camkd_fast import camkd_loss, confidence_weights
from camkd_fast.backends.dispatch import explain
student, teachers = torch.randn(4, 10, requires_grad=True), [torch.randn(4, 10) for _ in range(3)]
target = torch.arange(4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        camkd_loss(student, teachers, target).loss.backward()
        confidence_weights(teachers, target)
assert student.grad.isfinite().all() and student.grad.abs().sum() > 0
"""


def test_without_the_compiled_module_auto_falls_back_and_warns_once():
    code = STEP + (
        "assert len(caught) == 1, [str(w.message) for w in caught]\n"
        "print(caught[0].message)\n"
        "print(explain(student))\n"
        "try: camkd_loss(student, teachers, target, backend='cpu')\n"
        "except NotImplementedError as error: print(error)\n"
        "try: camkd_loss(student, teachers, torch.tensor([0, -100, 10, 3]))\n"
        "except ValueError as error: print(error)\n"
        "print(camkd_loss(student, teachers, torch.tensor([0, -100, -100, -100])).loss.item())\n"
        "print(camkd_loss(student[:1], [z[:1] for z in teachers], torch.tensor([0])).loss.item())\n"
    )
    warning, explanation, refusal, label, one_kept, one = python(code, absent=("camkd_fast._C",)).splitlines()
    assert "label 10, but there are 10 classes" in label
    assert float(one_kept) == pytest.approx(float(one), rel=1e-5)
    assert "PyTorch" in warning and "cpu" in warning
    assert explanation.startswith("reference (cpu:")
    assert "'cpu' cannot run here" in refusal and "_C" in refusal


def test_without_triton_everything_else_works():
    code = STEP + (
        "assert not caught, caught[0].message\n"
        "try: camkd_loss(student, teachers, target, backend='triton')\n"
        "except NotImplementedError as error: print(error)\n"
    )
    assert "'triton' cannot run here" in python(code, absent=("triton",))


def test_a_distiller_needs_torch_only():
    """torch does not require NumPy. Neither do teachers and strategies, only images and their augmentation."""
    code = """
import warnings
warnings.simplefilter("ignore")  # torch's, of NumPy
import torch
from camkd_fast import Distiller, models
teachers = [models.create("resnet8", num_classes=10) for _ in range(2)]
distiller = Distiller(models.create("resnet8", num_classes=10), teachers, strategy="ca-mkd")
distiller(torch.randn(4, 3, 32, 32), torch.arange(4)).loss.backward()
print(all(p.grad is not None for p in distiller.parameters()))
"""
    assert python(code, ("numpy", "yaml", "sklearn", "PIL", "safetensors", "matplotlib", "triton")) == "True"


def test_with_triton_but_no_gpu_the_reason_is_the_gpu():
    code = STEP + (
        "try: camkd_loss(student, teachers, target, backend='triton')\n"
        "except NotImplementedError as error: print(error)\n"
    )
    assert "GPU" in python(code)


def test_public_names():
    import camkd_fast

    assert set(camkd_fast.__all__) == {
        "CAMKDFeatureLoss",
        "CAMKDLinearLoss",
        "CAMKDLoss",
        "Distiller",
        "__version__",
        "camkd_feature_loss_and_grad",
        "camkd_linear_loss",
        "camkd_loss",
        "camkd_loss_and_grad",
        "confidence_weights",
        "weighted_feature_loss",
    }
    assert all(hasattr(camkd_fast, name) for name in camkd_fast.__all__)
    assert (ROOT / "camkd_fast" / "py.typed").exists()
