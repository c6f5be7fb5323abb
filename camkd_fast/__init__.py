"""Fast multi-teacher knowledge distillation for PyTorch: CA-MKD as fused CPU, Triton and CUDA kernels."""

from .losses.feature import (
    CAMKDFeatureLoss,
    camkd_feature_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from .losses.logit import CAMKDLoss, camkd_loss, camkd_loss_and_grad

__version__ = "0.1.0"

__all__ = [
    "CAMKDFeatureLoss",
    "CAMKDLoss",
    "__version__",
    "camkd_feature_loss_and_grad",
    "camkd_loss",
    "camkd_loss_and_grad",
    "confidence_weights",
    "weighted_feature_loss",
]
