"""Fast multi-teacher knowledge distillation for PyTorch: CA-MKD as fused CPU, Triton and CUDA kernels."""

from typing import TYPE_CHECKING, Any

from .losses.feature import camkd_feature_loss_and_grad, confidence_weights, weighted_feature_loss
from .losses.feature_module import CAMKDFeatureLoss
from .losses.linear import CAMKDLinearLoss, camkd_linear_loss
from .losses.logit import CAMKDLoss, camkd_loss, camkd_loss_and_grad

if TYPE_CHECKING:
    from .train.distiller import Distiller

__version__ = "0.1.0"

__all__ = [
    "CAMKDFeatureLoss",
    "CAMKDLinearLoss",
    "CAMKDLoss",
    "Distiller",
    "__version__",
    "camkd_feature_loss_and_grad",
    "camkd_linear_loss",
    "camkd_loss",
    "camkd_loss_and_grad",
    "confidence_weights",
    "weighted_feature_loss",
]


def __getattr__(name: str) -> Any:
    """`Distiller` is imported on use: the losses need neither models nor training."""
    if name == "Distiller":
        from .train.distiller import Distiller

        return Distiller
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
