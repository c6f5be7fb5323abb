"""Which teachers a batch needs, and their weights: fixed ones, or by a column that routes or mixes per sample."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .causal_lm import Hidden, Teacher, check_logits, classes_of_head, teacher_hidden, unused_hidden
from .placement import can_move, is_sharded

MOST_PADDING = 1024  # classes by which heads of one tokenizer differ
# Inputs with a row (B, S) of tokens per sample. Others may have as many rows by chance.
OF_TOKENS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "decoder_input_ids",
    "decoder_attention_mask",
)  # fmt: skip


def weights_of_column(name: str, column: Any, K: int, B: int) -> Tensor:
    """Weights (K, B) of the teachers, from their numbers (B,) or weights (B, K) in a column.

    Raises:
        ValueError: another shape, or a teacher that does not exist.
    """
    values = torch.as_tensor(column)
    if values.shape == (B,) and not values.is_floating_point():
        values = values.long()
        lowest, highest = (int(values.min()), int(values.max())) if B else (0, 0)
        if lowest < 0 or highest >= K:
            raise ValueError(f"column {name!r} holds teacher {lowest if lowest < 0 else highest}, but there are {K}")
        return torch.nn.functional.one_hot(values, K).t().float()
    if values.shape == (B, K):
        return values.t().float()
    raise ValueError(
        f"column {name!r} has shape {tuple(values.shape)} and dtype {values.dtype}, but expected are numbers of "
        f"teachers ({B},) or weights ({B}, {K})"
    )


def _listed(teachers: Any) -> list[Any]:
    """
    Raises:
        TypeError: teachers that are no list, such as a model, or no models.
        ValueError: no teachers.
    """
    if not isinstance(teachers, (list, tuple, nn.ModuleList, type(None))):
        raise TypeError(f"teachers must be a list of models, got {type(teachers).__name__}")
    if not teachers:
        raise ValueError("teachers is empty: give at least one to the trainer")
    for teacher in teachers:
        if not isinstance(teacher, (nn.Module, Teacher)):
            raise TypeError(f"a teacher must be a model or a `Teacher`, got {type(teacher).__name__}")
    return list(teachers)


class TeacherMix:
    """K teachers and how they are mixed: by the loss, by fixed weights, or by a column of the data."""

    def __init__(self, teachers: Sequence[Any], weights: Sequence[float] | None, column: str | None) -> None:
        """
        Raises:
            TypeError: teachers that are no models.
            ValueError: no teachers, both kinds of weights, or a number of weights that is not theirs.
        """
        self.teachers, self.column = _listed(teachers), column
        if weights is not None and column is not None:
            raise ValueError(
                f"teacher_weights {list(weights)} and teacher_column {column!r} are both given: expected one of them"
            )
        if weights is not None and len(weights) != (K := len(self.teachers)):
            raise ValueError(f"teacher_weights holds {len(weights)} numbers, but there are {K} teachers")
        self.weights = None if weights is None else [float(weight) for weight in weights]

    def is_of(self, teachers: Sequence[Any], weights: Sequence[float] | None, column: str | None) -> bool:
        """Whether the mix is of these very teachers and of equal weights.

        Raises:
            TypeError, ValueError: as of the constructor, for teachers that are none.
        """
        given = _listed(teachers)
        same = len(given) == len(self.teachers) and all(map(operator.is_, given, self.teachers))
        numbers = None if weights is None else [float(weight) for weight in weights]
        return same and (numbers, column) == (self.weights, self.column)

    def place(self, device: torch.device, student: nn.Module, vocab_size: int | None = None) -> None:
        """Put the teachers into evaluation mode and, unless they are spread over processes or devices, on the device.

        Args:
            vocab_size: number of classes, if it is not that of the student's head.

        Raises:
            ValueError: a teacher's logits do not follow from its head and config, it has fewer classes than there are,
                or it has no parameters but the student's.

        Warns:
            UserWarning: a teacher has more classes than padding would add.
        """
        classes = vocab_size or classes_of_head(student)
        own = set(map(id, student.parameters()))
        for k, teacher in enumerate(self.teachers):
            found = classes_of_head(teacher)
            words = f"teacher {k}'s head has {found} classes, but the vocabulary has {classes}"
            if found < classes:
                raise ValueError(words)
            if found > max(1.05 * classes, classes + MOST_PADDING):
                warnings.warn(f"{words}: do both models have the same tokenizer?", stacklevel=2)
            if isinstance(teacher, nn.Module):
                if own.issuperset(map(id, teacher.parameters())):
                    raise ValueError(
                        f"teacher {k} has the student's own parameters, as has a model after get_peft_model(model): "
                        "give a copy made before"
                    )
                teacher.eval()
                if can_move(teacher):
                    teacher.to(device)
                check_logits(teacher)

    def of_batch(
        self, batch: Mapping[str, Any], inputs: Mapping[str, Any], positions: int
    ) -> tuple[list[Hidden], dict[str, Any]]:
        """Hidden states of the teachers, and the weighting of the loss if it is given.

        Args:
            batch: with the column.
            inputs: of the models; "input_ids" has B rows.
            positions: of the loss in a row.
        """
        ids: Tensor = inputs["input_ids"]
        if self.weights is not None:
            weighting = torch.tensor(self.weights, dtype=torch.float32, device=ids.device)
            return hidden_of_teachers(self.teachers, inputs, None), {"weighting": weighting}
        if self.column is None:
            return hidden_of_teachers(self.teachers, inputs, None), {}
        if self.column not in batch:
            raise ValueError(f"the batch has no column {self.column!r}, only {sorted(batch)}")
        weights = weights_of_column(self.column, batch[self.column], len(self.teachers), len(ids)).to(ids.device)
        weighting = weights.unsqueeze(-1).expand(-1, -1, positions)
        return hidden_of_teachers(self.teachers, inputs, weights), {"weighting": weighting}


def hidden_of_teachers(teachers: Sequence[Any], inputs: Mapping[str, Any], weights: Tensor | None) -> list[Hidden]:
    """Hidden states and heads of all teachers; each teacher computes only the samples in which it has a weight.

    Args:
        inputs: of the models; "input_ids" has B rows.
        weights: (K, B); None if every teacher is needed.
    """
    return [
        teacher_hidden(teacher, inputs) if weights is None else _of_some(teacher, inputs, weights[k] != 0)
        for k, teacher in enumerate(teachers)
    ]


def _of_some(teacher: Any, inputs: Mapping[str, Any], used: Tensor) -> Hidden:
    """Hidden states of the samples `used` (B,), with zeros elsewhere, which the loss does not read.

    Where an input may not have a row per sample (images of a vision-language model, positions of several axes), the
    teacher computes all samples.
    """
    B = len(used)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    selectable = all(name in OF_TOKENS and value.dim() == 2 and len(value) == B for name, value in tensors.items())
    rows = used.nonzero().squeeze(-1)
    if len(rows) == 0:
        if not is_sharded(teacher):
            return unused_hidden(teacher, inputs)
        rows = rows.new_zeros(1)  # as the other processes' samples may be this teacher's
    if len(rows) == B or not selectable:
        return teacher_hidden(teacher, inputs)
    some = {name: value.index_select(0, rows.to(value.device)) for name, value in tensors.items()}
    found = teacher_hidden(teacher, {**inputs, **some})
    states = found.states.new_zeros((B, *found.states.shape[1:]))
    return found._replace(states=states.index_copy_(0, rows.to(states.device), found.states))
