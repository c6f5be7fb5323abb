"""What the trainers of the integrations share: a column of the data that reaches the loss, and logs of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from .loss_metrics import LossMetrics

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class TrainerParts(_Trainer):  # type: ignore[misc]
    """The base of the mixins; it stands before a transformers Trainer in the list of bases."""

    teacher_column: str | None = None
    data_collator: Any  # of the trainer
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: DeepSpeed partitions the parameters, so that no process has the head that the loss reads.
        """
        if is_deepspeed_zero3_enabled():
            raise ValueError("DeepSpeed ZeRO-3 is not supported, the loss needs whole heads: use stage 2, or FSDP2")
        self._loss_metrics = {"train": LossMetrics(), "eval": LossMetrics()}
        super().__init__(*args, **kwargs)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.teacher_column is not None and self.teacher_column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self.teacher_column]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add means over the tokens since the last log: hard_loss, soft_loss, entropy if the loss has it, and of
        teacher k teacher_k_weight and teacher_k_ce; in evaluation with its prefix."""
        # Only to logs that every process writes: those have a loss. The model's mode does not say whose log it is,
        # since an evaluation may come before a log of training.
        name = "loss" if "loss" in logs else _loss_of_evaluation(logs)
        if name is not None:
            means = self._loss_metrics["train" if name == "loss" else "eval"].means(self.accelerator)
            prefix = name.removesuffix("loss")
            logs.update({prefix + key: value for key, value in means.items()})
        super().log(logs, start_time)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as Trainer does, and drop the sums of the loss: Trainer does not log predictions."""
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._loss_metrics["eval"].clear()


def _loss_of_evaluation(logs: Mapping[str, float]) -> str | None:
    """The name of an evaluation's loss, such as "eval_loss". Metrics of the user may end alike, with longer names."""
    if "total_flos" in logs:  # the last log of a run, whose train_loss is no evaluation's
        return None
    return min((name for name in logs if name.endswith("_loss")), key=len, default=None)


class CollatorWithColumn:
    """A collator that passes a column on which the collator inside may not know."""

    def __init__(self, inner: Callable[[Sequence[Any]], dict[str, Any]], name: str) -> None:
        self.inner, self.name = inner, name

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.name not in examples[0]:
            return self.inner(examples)  # an error if a loss is computed, which says so
        others = [{name: value for name, value in example.items() if name != self.name} for example in examples]
        return {**self.inner(others), self.name: torch.as_tensor([example[self.name] for example in examples])}
