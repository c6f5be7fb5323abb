"""CA-MKD: teachers that assign the label a high probability weigh more (arXiv 2201.00007)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...losses.formula import check_choice
from .base import FeatureTerm, Setup, Strategy
from .features import FeatureStrategy, MapBatch
from .registry import register


@register
class CAMKDLogits(Strategy):
    """Confidence weights on the logits: per sample, a teacher with a high cross-entropy loses weight."""

    name, label, color = "ca-mkd-logits", "CA-MKD, logits", "#56b4e9"
    rule = "confidence"
    unweighted = "aver"

    @staticmethod
    def divisor(K: int, official: bool) -> int:
        return K if official else 1


@register
class CAMKD(FeatureStrategy):
    """CA-MKD as published: confidence weights on logits and on feature maps.

    A map's weight follows from the logits that the teacher's head computes from the student's regressed map.

    Options:
        detach_weights: no gradient through the feature weights (the official code keeps it).
        uniform: "logits" or "features" gives all teachers equal weights in that part; "none" in neither.
    """

    name, label, color = "ca-mkd", "CA-MKD", "#0072b2"
    options: ClassVar[Mapping[str, Any]] = {"beta": 50.0, "detach_weights": True, "uniform": "none"}
    rule = "confidence"
    unweighted = "fitnet-mkd"
    divisor = staticmethod(CAMKDLogits.divisor)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.uniform = setup.options["uniform"]
        check_choice("uniform", self.uniform, ("none", "logits", "features"))
        self.needs_heads = self.uniform != "features"
        if self.uniform == "logits":
            self.formula = self.formula.replaced(weighting="uniform")

    def _term(self, batch: MapBatch) -> FeatureTerm:
        if self.uniform == "features":
            return self._hints(batch)
        if batch.loss_scale is not None and self.maps.detach_weights:
            return self._with_gradients(batch, "confidence")
        out = self.maps(batch.student, batch.teachers, self.heads, batch.target, batch.num_items, **batch.second)
        return FeatureTerm(self.beta * out.loss, out.weights.detach())
