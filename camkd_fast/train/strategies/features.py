"""Strategies that also regress the teachers' feature maps, with equal weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...losses.feature import scaled_feature_loss
from ...losses.feature_module import CAMKDFeatureLoss
from ...losses.feature_weights import uniform_weights
from ...losses.scale_plan import Divisor
from ...models.protocol import Prediction
from ..teachers.live import Teachers
from .base import FeatureTerm, Setup, Strategy
from .registry import register


class MapBatch(NamedTuple):
    """What a feature term is computed of: the maps of a batch, and the rest as in `Strategy.feature_term`."""

    student: Tensor  # (N, D, H, W), in the dtype of the maps r_k
    teachers: list[Tensor]  # (N, D_k, H_k, W_k)
    target: Tensor
    num_items: float | Tensor | None
    loss_scale: Tensor | None
    second: dict[str, Tensor]


class FeatureStrategy(Strategy):
    """Base of strategies that regress the teachers' last feature maps; owns the maps r_k.

    The feature term has the dtype of their parameters, float32 unless the strategy was cast, whatever autocast says.

    With a teacher cache the teachers' maps are pooled, (N, D_k, 1, 1), and the student's map is pooled before r_k.
    """

    needs_features = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.formula)
        teachers = setup.teachers
        assert teachers is not None
        if 0 in teachers.num_features:  # a caller's own teachers
            raise ValueError(f"{self.name} needs feature maps, but the teachers give {teachers.num_features} channels")
        self.beta: float = setup.options["beta"] / setup.divisor
        self.heads = teachers.heads
        detach = setup.options.get("detach_weights", True)
        self.maps = CAMKDFeatureLoss(setup.student_features, teachers.num_features, detach, self.formula.ignore_index)

    @classmethod
    def build(cls, setup: Setup) -> FeatureStrategy:
        return cls(setup)

    def channels(self) -> list[int]:
        """Of the student's map, then of each teacher's."""
        convolutions: list[Any] = [regressor[0] for regressor in self.maps.regressors]  # type: ignore[index]
        return [convolutions[0].in_channels, *(convolution.out_channels for convolution in convolutions)]

    def use_with(self, teachers: Teachers | None, student_features: int) -> None:
        super().use_with(teachers, student_features)
        assert teachers is not None
        given = [student_features, *teachers.num_features]
        if given != self.channels():
            raise ValueError(
                f"{self.name} was made for a student and teachers of {self.channels()} channels, but the models have "
                f"{given}"
            )
        self.heads = teachers.heads

    def feature_term(
        self,
        student: Prediction,
        teacher_outputs: list[Prediction],
        target: Tensor,
        num_items: float | Tensor | None = None,
        loss_scale: Tensor | None = None,
        **second: Tensor,
    ) -> FeatureTerm:
        self._check_maps(student.features, [teacher.features for teacher in teacher_outputs])
        with torch.autocast(student.features.device.type, enabled=False):
            maps = student.features.to(self.maps.dtype), [t.features for t in teacher_outputs]
            return self._term(MapBatch(*maps, target, num_items, loss_scale, second))

    def _check_maps(self, student: Tensor, teachers: Sequence[Tensor]) -> None:
        """Transformers have tokens in their place, and some models channels last."""
        named = ("the student", student), *((f"teacher {k}", f) for k, f in enumerate(teachers))
        for (name, features), channels in zip(named, self.channels(), strict=True):
            if not isinstance(features, Tensor):
                kind = type(features).__name__
                raise ValueError(f"{self.name} needs feature maps (N, D, h, w), but that of {name} is a {kind}")
            if features.shape == (0,):
                raise ValueError(
                    f"{self.name} needs feature maps, but {name} gave none: its forward does not call its "
                    "forward_features once; expected that, or the name of a module as its layer"
                )
            if features.dim() != 4:
                raise ValueError(
                    f"{self.name} needs feature maps (N, D, h, w), but that of {name} has shape {tuple(features.shape)}"
                )
            if features.shape[1] != channels:
                raise ValueError(
                    f"{self.name} needs feature maps (N, D, h, w) with D = {channels} of {name}, but that has shape "
                    f"{tuple(features.shape)}"
                )

    def _term(self, batch: MapBatch) -> FeatureTerm:
        """`feature_term` of these maps."""
        raise NotImplementedError

    def _with_gradients(self, batch: MapBatch, weighting: str) -> FeatureTerm:
        """The term whose roots are the maps r_k: loss and gradients in one pass."""
        second = batch.second if weighting == "confidence" else {}
        out, maps, gradients = self.maps.loss_and_grad(
            batch.student,
            batch.teachers,
            self.heads,
            batch.target,
            beta=self.beta,
            weighting=weighting,
            num_items=batch.num_items,
            loss_scale=batch.loss_scale,
            **second,
        )
        return FeatureTerm(out.loss, out.weights if weighting == "confidence" else None, maps, gradients)

    def _hints(self, batch: MapBatch) -> FeatureTerm:
        """beta mean_n mean_k mean_{d,h,w} (F_k - r_k)^2: equal weights for all maps."""
        if batch.loss_scale is not None:
            return self._with_gradients(batch, "uniform")
        regressed = self.maps.regress(batch.student, batch.teachers)
        dtype = torch.promote_types(regressed[0].dtype, torch.float32)
        divisor = Divisor("mean", batch.num_items, self.formula.ignore_index)
        weights, _, inverse = uniform_weights(batch.target, len(regressed), divisor, dtype)
        loss = scaled_feature_loss(regressed, batch.teachers, weights, "mean", inverse, "auto")
        return FeatureTerm(self.beta * loss, None)


@register
class FitNetMKD(FeatureStrategy):
    """AVER plus hints, mean_k mean_{d,h,w} (F_k - r_k)^2 (after Romero et al. 2015)."""

    name, label, color = "fitnet-mkd", "FitNet-MKD", "#d55e00"
    options: ClassVar[Mapping[str, Any]] = {"beta": 100.0}

    def _term(self, batch: MapBatch) -> FeatureTerm:
        return self._hints(batch)
