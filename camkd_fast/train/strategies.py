"""What a student learns from: one small object per strategy, all called alike by the step, which knows no names.

L = CE + alpha T^2 sum_k w_k KL_k + beta * feature term, and a strategy says what w_k and the feature term are:

    name            w_k                                     alpha is divided by    feature term        beta, divided by
                                                            default   official                         default  official
    ce              none                                                           none
    kd              1 for one teacher, 0 for the others     1         1            none
    aver            1/K                                     1         1            none
    ebkd            1 - H_k / sum_j H_j, sums to K-1        K-1       K            none
    aekd            min-norm, one per batch, sums to 1      1         1            none
    fitnet-mkd      1/K                                     1         1            hints, w_k = 1/K    100, 1   100, 1
    ca-mkd-logits   confidence, sums to 1                   1         K            none
    ca-mkd          confidence, sums to 1                   1         K            confidence          50, 1    50, K

So by default the weights of every strategy sum to 1 after the division, and equal alpha means equal strength. With
`official_scale` the sums are those of the official code; for K = 3: kd, aver, aekd and fitnet-mkd 1, ebkd 2/3, ca-mkd
1/3, and its feature weights 1/3. One teacher weighs 1 in both. The official code's hint loss has no gradient; here it
has one in either scale.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..feature_loss import CAMKDFeatureLoss, weighted_feature_loss
from ..models.protocol import Prediction
from .min_norm import min_norm_weights
from .teachers.live import Teachers

IGNORE_INDEX = -100  # label of rows without a loss, as in camkd_loss


class FeatureTerm(NamedTuple):
    """What feature maps add to the loss of one batch."""

    loss: Tensor  # scalar, float32, differentiable, beta included
    weights: Tensor | None  # (K, N) weight of each teacher's map, detached; None where all weigh the same


class Strategy(nn.Module):
    """A module, so that what it must train itself (the feature maps r_k) is found by the optimiser."""

    needs_teachers = True
    needs_features = False
    rule = "uniform"  # `weighting` of camkd_loss

    def __init__(self, soft_weight: float, temperature: float) -> None:
        super().__init__()
        self.soft_weight, self.hard_weight, self.temperature = soft_weight, 1.0, temperature

    @staticmethod
    def divisor(K: int, official: bool) -> int:
        """What alpha is divided by (table above)."""
        return 1

    def weighting(self, student_logits: Tensor, taught: list[Prediction], target: Tensor) -> str | Tensor:
        """`weighting` of camkd_loss for this batch: a rule's name, or weights (K,) or (K, N) without gradient."""
        return self.rule

    def feature_term(
        self, student: Prediction, taught: list[Prediction], target: Tensor, num_items: float | Tensor | None = None
    ) -> FeatureTerm | None:
        """What the feature maps of this batch add; `num_items` divides the sum over samples, as in camkd_loss."""
        return None


class CE(Strategy):
    """The labels alone."""

    needs_teachers = False


class KD(Strategy):
    """One teacher of the K."""

    def __init__(self, soft_weight: float, temperature: float, K: int, teacher_index: int) -> None:
        super().__init__(soft_weight, temperature)
        if not 0 <= teacher_index < K:
            raise ValueError(f"teacher_index must lie in [0, {K}) for {K} teachers, got {teacher_index}")
        self.weights: Tensor
        self.register_buffer("weights", F.one_hot(torch.tensor(teacher_index), K).float(), persistent=False)

    def weighting(self, student_logits: Tensor, taught: list[Prediction], target: Tensor) -> Tensor:
        return self.weights


class AVER(Strategy):
    """Every teacher alike."""


class EBKD(Strategy):
    """The less entropy a teacher's answer has, the more it weighs (Kwon et al. 2020)."""

    rule = "entropy"

    @staticmethod
    def divisor(K: int, official: bool) -> int:
        return K if official else max(K - 1, 1)


class AEKD(Strategy):
    """The least common descent direction of the K soft losses in the student's logits (Du et al. 2020).

    One weight per teacher and batch, at most `cap`, from the K gradients of the batch's soft loss with respect to the
    student's (N, C) logits. The Gram matrix is summed over all ranks, so that weights do not depend on how a batch is
    spread. (The official code averages each gradient over the batch before it takes inner products.)
    """

    cap = 0.6

    @torch.no_grad()
    def weighting(self, student_logits: Tensor, taught: list[Prediction], target: Tensor) -> Tensor:
        """(K,) float64."""
        T = self.temperature
        kept = (target != IGNORE_INDEX).unsqueeze(-1)
        q = (student_logits.float() / T).softmax(-1)
        with torch.autocast(q.device.type, enabled=False):
            # The common factor T / N of the gradients changes no weight.
            gradients = [torch.where(kept, q - (t.logits.float() / T).softmax(-1), 0.0).flatten() for t in taught]
            stacked = torch.stack(gradients)
            gram = stacked @ stacked.T
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gram)
        return min_norm_weights(gram, self.cap)


class FeatureStrategy(Strategy):
    """Base of those that regress the teachers' last feature maps; owns the maps r_k. The feature term is float32.

    With a teacher cache the teachers' maps are pooled, (N, D_k, 1, 1), and so are the student's before r_k.
    """

    needs_features = True

    def __init__(
        self,
        soft_weight: float,
        temperature: float,
        teachers: Teachers,
        student_features: int,
        beta: float,
        detach_weights: bool = True,
    ) -> None:
        super().__init__(soft_weight, temperature)
        self.beta = beta
        self.heads = teachers.heads
        self.maps = CAMKDFeatureLoss(student_features, teachers.num_features, detach_weights, IGNORE_INDEX)

    def feature_term(
        self, student: Prediction, taught: list[Prediction], target: Tensor, num_items: float | Tensor | None = None
    ) -> FeatureTerm:
        with torch.autocast(student.features.device.type, enabled=False):
            return self._term(student.features.float(), [t.features for t in taught], target, num_items)

    def _term(
        self, student: Tensor, teachers: list[Tensor], target: Tensor, num_items: float | Tensor | None
    ) -> FeatureTerm:
        raise NotImplementedError

    def _hints(
        self, student: Tensor, teachers: list[Tensor], target: Tensor, num_items: float | Tensor | None
    ) -> Tensor:
        """Every map is regressed alike: beta mean_n mean_k mean_{d,h,w} (F_k - r_k)^2."""
        regressed = self.maps.regress(student, teachers)
        kept = target != IGNORE_INDEX
        weights = (kept / len(teachers)).expand(len(teachers), -1)
        total = weighted_feature_loss(regressed, teachers, weights, reduction="sum")
        return self.beta * total / (kept.sum().clamp(min=1) if num_items is None else num_items)


class FitNetMKD(FeatureStrategy):
    """AVER plus hints: every map is regressed alike, mean_k mean_{d,h,w} (F_k - r_k)^2 (after Romero et al. 2015)."""

    def _term(
        self, student: Tensor, teachers: list[Tensor], target: Tensor, num_items: float | Tensor | None
    ) -> FeatureTerm:
        return FeatureTerm(self._hints(student, teachers, target, num_items), None)


class CAMKDLogits(Strategy):
    """Confidence weights on the logits: a teacher that is wrong about a sample loses its say in it."""

    rule = "confidence"

    @staticmethod
    def divisor(K: int, official: bool) -> int:
        return K if official else 1


class CAMKDFull(FeatureStrategy):
    """CA-MKD as published: confidence weights on the logits, and on the feature maps by what heads make of them."""

    rule = "confidence"
    uniform = "none"  # "logits" or "features": all teachers weigh the same in that part
    divisor = staticmethod(CAMKDLogits.divisor)

    def _term(
        self, student: Tensor, teachers: list[Tensor], target: Tensor, num_items: float | Tensor | None
    ) -> FeatureTerm:
        if self.uniform == "features":
            return FeatureTerm(self._hints(student, teachers, target, num_items), None)
        out = self.maps(student, teachers, self.heads, target, num_items)
        return FeatureTerm(self.beta * out.loss, out.weights.detach())


STRATEGIES: dict[str, type[Strategy]] = {
    "ce": CE,
    "kd": KD,
    "aver": AVER,
    "ebkd": EBKD,
    "aekd": AEKD,
    "fitnet-mkd": FitNetMKD,
    "ca-mkd-logits": CAMKDLogits,
    "ca-mkd": CAMKDFull,
}
NAMES = tuple(STRATEGIES)
BETA = {"fitnet-mkd": 100.0, "ca-mkd": 50.0}


def find(name: str) -> type[Strategy]:
    """The strategy's class.

    Raises:
        ValueError: no strategy has that name; the nearest are named.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4) or NAMES
        raise ValueError(f"no strategy is named {name!r}; nearest: {', '.join(near)}")
    return STRATEGIES[name]


def create(
    name: str,
    teachers: Teachers | None,
    student_features: int,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    temperature: float = 4.0,
    official_scale: bool = False,
    teacher_index: int = 0,
    detach_weights: bool = True,
    uniform: str = "none",
) -> Strategy:
    """The strategy of that name, its own parameters initialised from torch's global generator.

    Args:
        name: one of `NAMES`.
        teachers: the K teachers; None for "ce" alone.
        student_features: channels of the student's last feature map.
        alpha: strength of the soft loss, before the division of the table above.
        beta: strength of the feature term, likewise; None for the published one.
        official_scale: divide as the official code does.
        teacher_index: which teacher "kd" learns from.
        detach_weights: cut the gradient through "ca-mkd"'s feature weights (the official code keeps it).
        uniform: the part of "ca-mkd", "logits" or "features", in which all teachers weigh the same.

    Raises:
        ValueError: an unknown name, no teachers, a `beta` without a feature term, teachers without feature maps.
    """
    kind = find(name)
    if beta is not None and not kind.needs_features:
        raise ValueError(f"beta is {beta}, but {name} has no feature term")
    if uniform != "none" and kind is not CAMKDFull:
        raise ValueError(f"uniform is {uniform!r}, but {name} is not ca-mkd, whose parts it is about")
    if not kind.needs_teachers:
        return kind(0.0, temperature)
    if teachers is None:
        raise ValueError(f"{name} learns from teachers, but none were given")
    K = len(teachers.num_features)
    divisor = kind.divisor(K, official_scale)
    soft_weight = alpha / divisor
    if issubclass(kind, KD):
        return kind(soft_weight, temperature, K, teacher_index)
    if not issubclass(kind, FeatureStrategy):
        return kind(soft_weight, temperature)
    if 0 in teachers.num_features:
        raise ValueError(f"{name} needs feature maps, but the teachers give {teachers.num_features} channels")
    beta = BETA[name] if beta is None else beta
    made = kind(soft_weight, temperature, teachers, student_features, beta / divisor, detach_weights)
    if isinstance(made, CAMKDFull):
        made.uniform = uniform
        made.rule = "uniform" if uniform == "logits" else made.rule
    return made
