"""Every script of examples/ runs as it is and ends with a student that has learned."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "digits")
NEEDS = {"with_lightning": "lightning", "with_accelerate": "accelerate", "with_transformers": "transformers"}
LEAST = 0.6  # accuracy after these few epochs; 0.1 is chance


def test_every_example_is_listed() -> None:
    assert len(SCRIPTS) == 4
    text = (ROOT / "docs" / "loops.md").read_text()
    for name in SCRIPTS:
        assert f"examples/{name}.py" in text


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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains_a_student(
    name: str, shared: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    monkeypatch.chdir(tmp_path)  # for the files that it writes
    # As for a script: transformers would take the folder `kernels` at the root for a package of that name.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    monkeypatch.setitem(sys.modules, "digits", shared)
    assert loaded(name).main() > LEAST
