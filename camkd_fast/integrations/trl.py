"""TRL's DistillationTrainer: its loss in one call of `camkd_linear_loss`, and several teachers.

The methods of TRL that are extended here are private, so their arguments are compared with those of the version that
this was written for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer

from ..losses.linear import CAMKDLinearLoss, LinearLossOutput
from .causal_lm import Hidden, at_head, check_logits, hidden_states, linear_loss
from .output_head import OutputHead, whole
from .signatures import check_signature
from .teacher_mix import TeacherMix
from .trainer_parts import TrainerParts

METHODS = {
    "_compute_loss": ("unwrapped_student", "inputs", "num_items_in_batch"),
    "_generate_and_score_completions": ("inputs",),
    "_set_signature_columns_if_needed": (),
    "log": ("logs", "start_time"),
}
# What a batch holds beside ids and masks, for models of text and images.
NOT_FOR_MODELS = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "num_items_in_batch", "num_images",
    "num_tiles",
)  # fmt: skip


def divergence_of(beta: float) -> str | tuple[str, float]:
    """TRL's generalized JSD as a `divergence` of ours: forward KL at 0, reverse KL at 1."""
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), ("jsd", float(beta)))


def fused_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`trl.trainer.distillation_trainer._chunked_divergence_loss` of TRL 1.16.0 by `camkd_linear_loss`.

    Args:
        student_hidden_states, teacher_hidden_states: (B, S, H) and (B, S, H_t), aligned to the completion.
        student_lm_head_weight, teacher_lm_head_weight: (C, H) and (C_t, H_t), C_t >= C; biases (C,) and (C_t,).
        completion_mask: (B, S), nonzero where a token counts.
        beta: 0 for forward KL, 1 for reverse KL, between them the JSD.
        num_items_in_batch: divisor instead of the number of tokens that count.

    Returns:
        The loss, the sum of the student's entropies in nats, and the number of tokens that count. Without T^2 and
        without cross-entropy.
    """
    student = OutputHead(
        *(whole(student_lm_head_weight), whole(student_lm_head_bias)),
        *(student_logit_scale, student_final_logit_softcapping),
    )
    with torch.no_grad():
        head = OutputHead(
            *(whole(teacher_lm_head_weight), whole(teacher_lm_head_bias)),
            *(teacher_logit_scale, teacher_final_logit_softcapping),
        )
    mask = completion_mask != 0
    out = linear_loss(
        student_hidden_states, student, [Hidden(teacher_hidden_states.detach(), head)], mask,
        divergence=divergence_of(beta), temperature=temperature, num_items=num_items_in_batch, weighting="uniform",
        scale_by_t2=False, entropy=True,
    )  # fmt: skip
    assert out.entropy is not None  # requested
    return out.loss, out.entropy.sum(), out.num_valid


class MultiTeacherDistillationTrainer(TrainerParts, DistillationTrainer):  # type: ignore[misc]
    """TRL's DistillationTrainer with K teachers: on-policy, beta and temperature by its arguments, without T^2."""

    def __init__(
        self,
        model: Any,
        teachers: Sequence[Any],
        *args: Any,
        weighting: str = "uniform",
        teacher_weights: Sequence[float] | None = None,
        teacher_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model, args, kwargs: as in DistillationTrainer, but for teacher_model.
            teachers: K causal language models of transformers, whose vocabulary is the student's; their heads may have
                more rows.
            weighting: "uniform", "confidence", "entropy" or "min_ce". Labels are the student's own samples, of which
                a teacher's cross-entropy says little.
            teacher_weights: K fixed weights instead.
            teacher_column: a column of the data instead: the number of a prompt's teacher, to which it is routed, or
                its K weights. A teacher does not run for prompts where its weight is 0.

        Raises:
            RuntimeError: TRL's methods take other arguments than in the version that this was written for.
            ValueError: no teachers, both kinds of weights, a model's logits do not follow from its head and config, or
                as `TeacherMix.place`.
        """
        for method, expected in METHODS.items():
            check_signature(DistillationTrainer, method, expected, "trl")
        self._mix, self.teacher_column = TeacherMix(teachers, teacher_weights, teacher_column), teacher_column
        super().__init__(model, None, *args, **kwargs)
        check_logits(self.model)
        self._mix.place(self.accelerator.device, self.model)
        self.distillation_loss = CAMKDLinearLoss(
            weighting,
            divergence=divergence_of(self.beta),
            temperature=self.temperature,
            scale_by_t2=False,
            entropy=True,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        name = self.teacher_column
        if name is not None and name not in inputs[0]:
            raise ValueError(f"the data have no column {name!r}, only {sorted(inputs[0])}")
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if name is not None:
            output[name] = torch.as_tensor([example[name] for example in inputs], device=output["prompt_ids"].device)
        return output

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Called inside the forward of the student's wrapper."""
        completion = inputs["completion_ids"]
        counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        target = completion.masked_fill(counted == 0, -100)
        taken = {
            name: value for name, value in inputs.items() if name not in NOT_FOR_MODELS and name != self.teacher_column
        }
        taken["input_ids"] = torch.cat([inputs["prompt_ids"], completion], dim=1)
        taken["attention_mask"] = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = target.shape[1]
        outputs: list[LinearLossOutput] = []

        def compute(states: Tensor, head: OutputHead) -> Tensor:
            settings = {**self.distillation_loss.settings, **weighting}
            outputs.append(linear_loss(states, head, aligned, target, num_items=num_items_in_batch, **settings))
            return outputs[0].loss

        with self.accelerator.autocast():
            hidden, weighting = self._mix.of_batch(inputs, taken, length)
            aligned = [found._replace(states=found.states[:, -length - 1 : -1]) for found in hidden]
            states = hidden_states(unwrapped_student, taken)[:, -length - 1 : -1]
            loss = at_head(unwrapped_student, states, compute)
        (out,) = outputs
        self._loss_metrics[self._mode].add(out, num_items_in_batch, weighting.get("weighting"))
        assert out.entropy is not None  # requested
        return loss, out.entropy.sum(), out.num_valid
