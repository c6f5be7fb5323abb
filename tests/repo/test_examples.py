"""Every script of examples/ runs as it is and ends with a student that has learned."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("digits", "language_model"))
NEEDS = {"with_lightning": "lightning", "with_accelerate": "accelerate", "with_transformers": "transformers"}
LEAST = 0.6  # accuracy after these few epochs; 0.1 is chance


def test_every_example_is_listed() -> None:
    assert len(SCRIPTS) == 4
    text = (ROOT / "docs" / "loops.md").read_text()
    for name in SCRIPTS:
        assert f"examples/{name}.py" in text
    assert "examples/language_model.py" in (ROOT / "docs" / "language_models.md").read_text()


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    """examples/digits.py, whose teachers are trained once for all examples."""
    pytest.importorskip("sklearn")
    module = loaded("digits")
    trained = module.trained_teachers(module.digits()[0])
    module.trained_teachers = lambda train: trained
    return module


def as_a_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # transformers would take the folder `kernels` at the root for a package of that name.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains_a_student(
    name: str, shared: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    as_a_script(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "digits", shared)
    assert loaded(name).main() > LEAST


@pytest.mark.usefixtures("one_thread")
def test_the_language_model_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    as_a_script(tmp_path, monkeypatch)
    before, after = loaded("language_model").main()
    assert after < 3.5 < 5 < before
    printed = capsys.readouterr().out
    assert "teacher 1: " in printed and "soft_loss" in printed
