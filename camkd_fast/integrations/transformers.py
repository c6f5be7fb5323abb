"""Distillation from several teachers in transformers' Trainer, and in trainers above it such as TRL's SFTTrainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..losses.linear import CAMKDLinearLoss
from .causal_lm import backbone, check_logits, linear_loss, student_loss
from .output_head import OutputHead
from .signatures import check_signature
from .teacher_mix import TeacherMix
from .trainer_parts import CollatorWithColumn, TrainerParts
from .wrappers import unwrapped

COMPUTE_LOSS = ("model", "inputs", "return_outputs", "num_items_in_batch")
GIVEN = ("reduction", "shift", "ignore_index")  # settings of the loss that the trainer decides


class MultiTeacherDistillationMixin(TrainerParts):
    """`compute_loss` by `camkd_linear_loss` from K frozen teachers, put before a trainer:

    >>> class MyTrainer(MultiTeacherDistillationMixin, Trainer): ...
    >>> trainer = MyTrainer(student, arguments, train_dataset=data, teachers=[small, large])

    Attributes, which may be set later too:
        teachers: K causal language models of transformers, or `camkd_fast.integrations.causal_lm.Teacher`s. Their
            vocabulary is the student's, their heads may have more rows.
        distillation_loss: a CAMKDLinearLoss, or its settings by name; labels count with `hard_weight`. Entropies
            are logged with `entropy`, for which a GPU takes a slower kernel.
        teacher_weights: K fixed weights instead of the loss's weighting.
        teacher_column: a column of the data instead: the number of a sample's teacher, to which it is routed, or its K
            weights. A teacher does not run for samples where its weight is 0.
    """

    teachers: Sequence[Any] = ()
    distillation_loss: CAMKDLinearLoss | Mapping[str, Any] | None = None
    teacher_weights: Sequence[float] | None = None
    teacher_column: str | None = None

    def __init__(
        self,
        *args: Any,
        teachers: Sequence[Any] | None = None,
        distillation_loss: CAMKDLinearLoss | Mapping[str, Any] | None = None,
        teacher_weights: Sequence[float] | None = None,
        teacher_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: of the trainer.

        Raises:
            RuntimeError: the trainer's compute_loss takes other arguments than in the version this was written for.
            ValueError, TypeError: settings of the loss are invalid, both kinds of weights are given, the logits of a
                model do not follow from its head and config, or as `TeacherMix.place`.
        """
        check_signature(super(), "compute_loss", COMPUTE_LOSS, "transformers")
        given = {
            "teachers": teachers,
            "distillation_loss": distillation_loss,
            "teacher_weights": teacher_weights,
            "teacher_column": teacher_column,
        }
        for name, value in given.items():
            if value is not None:
                setattr(self, name, value)
        self._mix: TeacherMix | None = None
        self._loss_settings()
        super().__init__(*args, **kwargs)
        self._refuse_other_losses()
        # The trainer counts the labels of an update by what the model's class says of its own loss: this one takes
        # their number, and shifts them
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        if self.args.n_gpu > 1:
            raise ValueError(
                f"nn.DataParallel over {self.args.n_gpu} GPUs is not supported, one GPU per process is: start the "
                "script with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        check_logits(self.model)
        if self.model_init is None:
            self._compile(self.model)
        if self.teachers:
            self._teacher_mix()
        if self.teacher_column is not None:
            self.data_collator = CollatorWithColumn(self.data_collator, self.teacher_column)

    def call_model_init(self, trial: Any = None) -> Any:
        """Trainer makes a model here, and another one when it trains."""
        model = super().call_model_init(trial)
        self._compile(model)
        return model

    def _compile(self, model: Any) -> None:
        """The backbone, if the arguments ask for it: the trainer compiles the whole model, of which parts run."""
        if self.args.torch_compile:
            options = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
            backbone(unwrapped(model)).compile(**options)

    def _refuse_other_losses(self) -> None:
        """
        Raises:
            ValueError: a setting of the trainer asks for a loss that this one would replace.

        Warns:
            UserWarning: a mixture of experts would add its router's loss by default.
        """
        smoothing = getattr(self.args, "label_smoothing_factor", 0.0)
        others = {
            "compute_loss_func": getattr(self, "compute_loss_func", None),
            "label_smoothing_factor": smoothing or None,
            "loss_type": None if (kind := getattr(self.args, "loss_type", "nll")) in ("nll", "chunked_nll") else kind,
            "router_aux_loss_coef": getattr(self.args, "router_aux_loss_coef", None) or None,
        }
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} is {value!r}, but the loss is that of `distillation_loss`: leave it out")
        text = self.model.config.get_text_config()
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
        if getattr(text, "output_router_logits", False) and coefficient:
            warnings.warn(
                f"the router's loss of {type(self.model).__name__} is no part of the loss: set router_aux_loss_coef to "
                f"0, got {coefficient:g}",
                stacklevel=3,
            )

    def _loss_settings(self) -> Mapping[str, Any]:
        loss = self.distillation_loss or {}
        settings = loss.settings if isinstance(loss, CAMKDLinearLoss) else loss
        for name in GIVEN:
            if name in settings:
                raise ValueError(f"distillation_loss has {name}={settings[name]!r}, but the trainer decides it")
        return settings if isinstance(loss, CAMKDLinearLoss) else CAMKDLinearLoss(**loss).settings

    def _teacher_mix(self) -> TeacherMix:
        """The mix of the trainer's teachers, made again if one of its attributes has changed."""
        given = self.teachers, self.teacher_weights, self.teacher_column
        if self._mix is None or not self._mix.is_of(*given):
            mix = TeacherMix(*given)
            mix.place(self.args.device, self.model, self._loss_settings().get("vocab_size"))
            self._mix = mix
        return self._mix

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss per label of `num_items_in_batch`, or of this batch without it; with `return_outputs` logits too."""
        settings, mix = self._loss_settings(), self._teacher_mix()
        shift = "shift_labels" not in inputs
        target = inputs.get("labels" if shift else "shift_labels")
        if target is None:
            raise ValueError(f"the batch has no labels, only {sorted(inputs)}")
        taken = {name: value for name, value in inputs.items() if name != mix.column}
        divisor: Tensor | None = None
        if num_items_in_batch is not None:  # a batch without labels has the loss 0
            divisor = torch.as_tensor(num_items_in_batch, device=target.device).clamp(min=1)
        logits: list[Tensor] = []

        def compute(states: Tensor, head: OutputHead) -> Tensor:
            out = linear_loss(states, head, hidden, target, shift=shift, num_items=divisor, **{**settings, **weighting})
            self._loss_metrics[self._mode].add(out, divisor, weighting.get("weighting"))
            if return_outputs:
                with torch.no_grad():
                    logits.append(head.logits(states))
            return out.loss

        with self.accelerator.autocast():
            hidden, weighting = mix.of_batch(inputs, taken, target.shape[1] - shift)
            loss = student_loss(model, taken, compute)
        # As Trainer does: the number is that of all processes, whose gradients are averaged.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, CausalLMOutput(logits=logits[0])) if return_outputs else loss
