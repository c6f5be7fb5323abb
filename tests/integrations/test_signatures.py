"""Another version of a trainer, with other arguments, fails with one line."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer

from camkd_fast.integrations.signatures import WRITTEN_FOR, check_signature
from camkd_fast.integrations.transformers import MultiTeacherDistillationMixin


class Distilled(MultiTeacherDistillationMixin, Trainer):
    pass


def refused(make: Any, *words: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_another_compute_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False) -> None: ...

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    refused(Distilled, "compute_loss", "takes (model, inputs, return_outputs)", "num_items_in_batch)", "5.24.0")


def test_no_compute_loss() -> None:
    class Alone(MultiTeacherDistillationMixin):
        pass

    refused(Alone, "has no compute_loss", "5.24.0")


def test_another_private_method_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    from camkd_fast.integrations.trl import METHODS, MultiTeacherDistillationTrainer

    def other(self: Any, student: Any) -> None: ...

    for name in METHODS:
        with monkeypatch.context() as patch:
            patch.setattr(trl.DistillationTrainer, name, other)
            refused(
                lambda: MultiTeacherDistillationTrainer("x", []), "takes (student)", f"as in trl {WRITTEN_FOR['trl']}"
            )
        with monkeypatch.context() as patch:
            patch.setitem(METHODS, "_of_another_version", ())
            refused(lambda: MultiTeacherDistillationTrainer("x", []), "has no _of_another_version", trl.__version__)


def test_the_installed_versions_are_accepted() -> None:
    check_signature(
        Trainer, "compute_loss", ("model", "inputs", "return_outputs", "num_items_in_batch"), "transformers"
    )
