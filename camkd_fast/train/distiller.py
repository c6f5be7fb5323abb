"""Distillation in any training loop: student, frozen teachers and loss in one module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..losses.logit import camkd_loss, camkd_loss_and_grad
from ..models.observer import Observer
from ..models.preprocessing import Preprocessing
from ..models.protocol import Prediction, Source
from . import strategies
from .batch_labels import Labels
from .distiller_checks import check_layers, check_replicas, check_teachers, check_types, strategy_class
from .strategies import Strategy
from .teachers.given import Images, can_compare, check_heads, frozen_teachers, listed, needed
from .teachers.live import LiveTeachers, Teachers


class DistillerOutput(NamedTuple):
    """Result of a `Distiller` for one batch. Only `loss` and `logits` are differentiable."""

    loss: Tensor  # scalar, float32: hard + alpha soft + beta feature
    logits: Tensor  # (N, C) of the student, or (..., C)
    hard: Tensor  # scalar: cross-entropy of the student, with label smoothing
    soft: Tensor  # scalar: T^2 sum_k w_k KL_k; 0 without teachers
    feature: Tensor  # scalar: the feature term, beta included; 0 without
    weights: Tensor | None  # (K, N) or (K, ...): w_k of the teachers' logits; None without teachers


class Objective(NamedTuple):
    """Loss of one batch, as arguments of `torch.autograd.backward(roots, gradients)`."""

    roots: list[Tensor]  # logits (N, C) and those of the strategy's feature loss
    gradients: list[Tensor]  # d(scale * loss) / d root
    numbers: Tensor  # float32, sums over the batch: loss, cross-entropy, distillation, feature loss, correct
    weights: Tensor | None  # (K,) logit weights of the teachers, summed over the batch
    feature_weights: Tensor | None  # (K,) feature weights, summed over the batch


class Distiller(nn.Module):
    """A student that learns from labels and K frozen teachers (CA-MKD, arXiv 2201.00007, and other strategies).

    >>> distiller = Distiller(student, ["runs/t0", "timm:resnet50.a1_in1k", my_teacher])
    >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
    >>> distiller(images, target).loss.backward()

    Its parameters, buffers and state are those of the student and of the strategy (the feature maps r_k). Teachers are
    frozen copies: they are no part of `parameters()` or `state_dict()`, stay in evaluation mode, compute in their own
    dtype outside autocast, and follow `.to()`.

    Args:
        student: follows timm's protocol (`models.protocol`), or returns logits (N, C) or an object with `logits`;
            logits may be (..., C), of dense labels for one, for strategies without feature maps.
        teachers: modules of the same kinds, `sources.Source`s, or strings of `sources.load`; 1 to 16.
        strategy: a name of `strategies.names()`.
            An instance may come in its place, whose options are its own.
        temperature: T of the distillation loss; None: 4.
        alpha: coefficient of the distillation loss; None: 1.
        beta: coefficient of the feature loss; None: the strategy's own (50 for CA-MKD).
        label_smoothing: of the cross-entropy of the student, as torch.nn.CrossEntropyLoss defines it.
        student_layer: name of the student's module whose output (N, D, h, w) is its feature map, if the student does
            not follow the protocol.
        teacher_layers: likewise for each teacher, None for those that follow it; what comes after the module is the
            head. torch.fx must be able to trace such a teacher.
        example: images (n, channels, H, W), as `forward` gets them; needed with a layer's name.
        preprocessing: of the images that `forward` gets; those of teachers whose `Source` knows another normalisation,
            size or number of channels follow from them. None: they are as every teacher expects them.
        class_names: in the order of the student's logits; the logits of teachers whose `Source` knows the same names in
            another order, or more of them, are mapped. None: all have one order.
        teacher_dtype: of the teachers' parameters and activations; None: their own.
        channels_last: memory format of student and teachers.
        options: further ones of the strategy: teacher_index (kd), detach_weights and uniform (ca-mkd), official_scale.

    Attributes:
        student, strategy: modules.
        teachers: `LiveTeachers`; None if the strategy needs none.

    Raises:
        ValueError: an option is invalid; a layer is unknown or its output no map; the strategy needs feature maps, but
            a model has none; numbers of classes differ; or as `sources.load`.
        TypeError: an option, a teacher or the strategy has another type, or options are given with an instance.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Teachers | Iterable[nn.Module | Source | str] | None,
        strategy: str | Strategy = "ca-mkd",
        *,
        temperature: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        label_smoothing: float = 0.0,
        student_layer: str | None = None,
        teacher_layers: Sequence[str | None] | None = None,
        example: Tensor | None = None,
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
        teacher_dtype: torch.dtype | None = None,
        channels_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_types(label_smoothing, preprocessing, class_names, teacher_dtype, channels_last)
        check_layers(student_layer, teacher_layers, example)
        self.student, self.label_smoothing = student, float(label_smoothing)
        given = {"temperature": temperature, "alpha": alpha, "beta": beta, **options}
        given = {name: value for name, value in given.items() if value is not None}
        kind = strategy_class(strategy, given)
        self._observe = Observer(student, student_layer)
        if student_layer is not None:
            self._observe.measure(student, needed(example, "student_layer", student_layer))
        channels = self._observe.num_features
        if kind.needs_features and not channels:
            raise ValueError(
                f"{kind.name} needs the student's feature map, which {type(student).__name__} does not name: "
                "student_layer names the module"
            )
        teachers = listed(teachers)
        teachers_are_models = kind.needs_teachers and isinstance(teachers, list)
        if not kind.needs_teachers or teachers == []:
            teachers = None
        if isinstance(teachers, list):
            images = Images(example, preprocessing, class_names)
            classes = getattr(student, "num_classes", None)
            frozen = frozen_teachers(teachers, teacher_layers, images, teacher_dtype, channels_last)
            check_teachers(kind, frozen, classes)
            teachers = LiveTeachers([model for _, model in frozen], classes)
        if isinstance(strategy, str):
            strategy = strategies.create(strategy, teachers, channels, **given)
        else:
            strategy.use_with(teachers, channels)
        strategy.formula.checked()
        check_replicas(student, strategy)
        self.strategy = strategy
        self._heads_unchecked = teachers_are_models and strategy.needs_heads
        self._teachers = [] if teachers is None else [teachers]  # a list hides their modules from nn.Module
        self._channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def teachers(self) -> Teachers | None:
        return self._teachers[0] if self._teachers else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """As `nn.Module._apply`, for the teachers too.

        `to_empty` of this module, or of one that holds it, empties the student only. The strategy keeps its values, or
        is initialised anew if it was on meta: a state dict of the student lacks them. Teachers keep their weights,
        which are in no state dict.
        """
        move = fn
        if _loses_values(fn):
            where = fn(torch.empty(1, device="meta")).device  # meta if every tensor stays on its device
            device = None if where.type == "meta" else where
            self.student._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.strategy.to_device(device)
            move = lambda tensor: tensor.to(device=device)  # noqa: E731
        else:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for teachers in self._teachers:
            teachers.move(move)
        return self

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        num_items: float | Tensor | None = None,
        second_target: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> DistillerOutput:
        """
        Args:
            images: (N, channels, H, W), for student and teachers.
            target: (N,) int64 labels, or the leading shape of the logits; -100, or the `ignore_index` of the formula of
                a strategy instance, for images that do not count.
            num_items: divisor of the summed loss instead of the number of images that count: all of an optimiser's
                step, for gradient accumulation; those of all processes divided by their number, for DDP and FSDP.
            second_target: (N,) int64 second labels of mixed images (Mixup, CutMix); None: images have one label.
            mix: (N,) float32 in [0, 1], the share of `target`; the share of `second_target` is 1 - mix.

        Raises:
            ValueError, TypeError: shapes, dtypes or labels that do not fit; both values are named.
        """
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs = [] if self.teachers is None else self.teachers.outputs(images, [])
        if self.teachers is not None and self._heads_unchecked and can_compare(outputs):
            check_heads(self.teachers, outputs)
            self._heads_unchecked = False
        student = self._observe(self.student, images, self.strategy.needs_features)
        logits = student.logits
        labels = self._labels(target, second_target, mix)
        labels.check(logits, num_items)
        zero = torch.zeros((), device=logits.device)
        if not outputs:
            loss = labels.cross_entropy(_wide(logits), self.label_smoothing, num_items)
            return DistillerOutput(loss, logits, loss.detach(), zero, zero, None)
        options = self._options(logits.detach(), outputs, labels)
        out = camkd_loss(logits, [teacher.logits for teacher in outputs], target, num_items=num_items, **options)
        loss, hard = self._smoothed(out.loss, out.hard, logits, labels, num_items)
        term = self.strategy.feature_term(student, outputs, target, num_items, **labels.second())
        feature = zero if term is None else term.loss
        return DistillerOutput(loss + feature, logits, hard, out.soft, feature.detach(), out.weights)

    def objective(
        self,
        images: Tensor,
        target: Tensor,
        teacher_outputs: list[Prediction],
        num_items: float | Tensor,
        scale: Tensor,
        second_target: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Objective:
        """The batch of a training step, with the gradients of the losses computed in one pass.

        Args:
            images: (N, channels, H, W), the batch that the teachers received.
            target, second_target, mix: as in `forward`.
            teacher_outputs: K predictions; empty without teachers.
            num_items: as in `forward`.
            scale: (1,) float32, multiplies all gradients.
        """
        student = self._observe(self.student, images, self.strategy.needs_features)
        labels = self._labels(target, second_target, mix)
        weights = feature_weights = term = None
        feature = torch.zeros((), device=images.device)
        if teacher_outputs:
            term = self.strategy.feature_term(student, teacher_outputs, target, num_items, scale, **labels.second())
            out, gradient = self._distillation(student.logits.detach(), teacher_outputs, labels, num_items, scale)
            loss, hard, soft = out.loss, out.hard, out.soft
            weights = out.weights.sum(1)
            roots, gradients = [student.logits], [gradient]
        else:
            root = labels.cross_entropy(_wide(student.logits), self.label_smoothing, num_items)
            loss = hard = root.detach()
            soft = torch.zeros_like(hard)
            roots, gradients = [root], [scale.reshape(()).to(root.dtype)]
        if term is not None:
            roots += term.roots or [term.loss]
            gradients += term.gradients or [scale.reshape(()).to(term.loss.dtype)]
            feature = term.loss.detach()
            feature_weights = None if term.weights is None else term.weights.sum(1)
        losses = torch.stack([loss + feature, hard, soft, feature]).float() * num_items
        correct = student.logits.detach().argmax(1) == labels.largest()
        if labels.ignore_index >= 0:  # else it is nobody's prediction
            correct = correct & labels.kept()
        return Objective(roots, gradients, torch.cat([losses, correct.sum().float().view(1)]), weights, feature_weights)

    def _labels(self, target: Tensor, second_target: Tensor | None, mix: Tensor | None) -> Labels:
        """The labels of a batch, of which those that the strategy's formula ignores do not count."""
        return Labels(target, second_target, mix, int(self.strategy.formula.ignore_index))

    def _distillation(
        self,
        logits: Tensor,
        teacher_outputs: list[Prediction],
        labels: Labels,
        num_items: float | Tensor,
        scale: Tensor,
    ) -> tuple[_Losses, Tensor]:
        """The loss of logits (N, C), detached, and d(scale * loss) / d logits."""
        teachers = [teacher.logits for teacher in teacher_outputs]
        options = self._options(logits, teacher_outputs, labels)
        given = {"num_items": num_items, "loss_scale": scale, **options}
        out, gradient = camkd_loss_and_grad(logits, teachers, labels.target, **given)
        loss, hard = self._smoothed(out.loss, out.hard, logits, labels, num_items)
        if self.label_smoothing:
            weight = self.strategy.formula.hard_weight
            slope = labels.smoothing_slope(_wide(logits)) * (scale * (weight * self.label_smoothing / num_items))
            gradient.add_(slope.to(gradient.dtype))
        return _Losses(loss, hard, out.soft, out.weights), gradient

    def _smoothed(
        self, loss: Tensor, hard: Tensor, logits: Tensor, labels: Labels, num_items: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss and its cross-entropy, detached, with label smoothing."""
        if not self.label_smoothing:
            return loss, hard
        smoothing = self.label_smoothing * labels.smoothed(_wide(logits), num_items)
        return loss + self.strategy.formula.hard_weight * smoothing, hard + smoothing.detach()

    def _options(self, logits: Tensor, teacher_outputs: list[Prediction], labels: Labels) -> dict[str, Any]:
        """Keywords of the loss for one batch; logits (N, C) of the student, detached."""
        weighting = self.strategy.weighting(logits, teacher_outputs, labels.target)
        return {**self.strategy.formula.replaced(weighting=weighting).options(), **labels.second()}


class _Losses(NamedTuple):
    """Parts of a batch's loss; `weights` (K, N)."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    weights: Tensor


def _wide(logits: Tensor) -> Tensor:
    """The logits in the accumulation dtype of the loss."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _loses_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether `fn` makes tensors without the values of its argument, as that of `nn.Module.to_empty` does.

    On meta no tensor has any.
    """
    bits = int.from_bytes(os.urandom(16), "little")
    probe = torch.tensor([float(bits >> i & 1) for i in range(128)], device="cpu")  # 0 and 1 are exact in every dtype
    made = fn(probe)
    return not made.is_meta and not torch.equal(made.to(probe), probe)
