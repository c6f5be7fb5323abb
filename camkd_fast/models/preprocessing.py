"""A teacher behind the student's batch: its own normalisation, size and number of channels.

Student and teachers share one batch, decoded and augmented once. What a teacher expects in another form follows from it
on the device: an affine per channel, one resize, and gray images repeated for models of colour images.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .protocol import Wrapper, device_of, feature_model, floating_dtype

# Mean and std of the same statistics differ by less if one of them was stored in levels of 0 to 255 and divided.
_SAME = 1e-7


@dataclass(frozen=True)
class Preprocessing:
    """How images are given to a model; None: unknown.

    Attributes:
        mean: of each channel, or of one for all, of images in [0, 1]; a number becomes a tuple of one.
        std: likewise.
        size: (H, W) in pixels; a number is that of both.
        channels: of the images.

    Raises:
        ValueError: mean and std do not belong together, are not for this number of channels or no numbers of images,
            or the size is below 1.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("mean", 1), ("std", 1), ("size", 2)):
            if isinstance(value := getattr(self, name), numbers.Real):
                object.__setattr__(self, name, (value,) * count)
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be at least 1, got {min(self.size)}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std belong together, got mean {self.mean} and std {self.std}")
        if self.mean is None or self.std is None:
            return
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, but std {len(self.std)}")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if self.channels is not None and len(self.mean) not in (1, self.channels):
            raise ValueError(f"mean has {len(self.mean)} channels, but the images {self.channels}")


def adapted(model: nn.Module, own: Preprocessing, given: Preprocessing) -> nn.Module:
    """The model as a function of images as `given`; the model itself if nothing differs.

    What either side does not know is taken to be equal, except that images of unknown size are resized where needed.
    Freeze a model before: `freeze` does not look into the result.

    Args:
        model: a `FeatureModel` of images as `own`. Its number of channels is that of `own`, or of its first
            convolution.
        given: of the images that the result receives.

    Raises:
        ValueError: the model takes another number of channels, and not three where one is given.
        TypeError: the model does not follow the protocol.
    """
    channels = input_channels(model) if own.channels is None else own.channels
    repeats = None
    if channels is not None and given.channels is not None and channels != given.channels:
        if (given.channels, channels) != (1, 3):
            raise ValueError(f"it takes images of {channels} channels, but they have {given.channels}")
        repeats = channels
    affine = _affine(own, given)
    resizes = own.size is not None and own.size != given.size
    if affine is None and not resizes and repeats is None:
        return model
    made = Adapted(model, affine, own.size if resizes else None, repeats)
    return made.to(device_of(model)).train(model.training)


def input_channels(model: nn.Module) -> int | None:
    """1 or 3, the channels of a model's images, from its first convolution; None if that does not look like one of
    images: the first one that was defined need not be the first one that runs.
    """
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first if first in (1, 3) else None


def _affine(own: Preprocessing, given: Preprocessing) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (C,) float64 from images normalised as `given` to images normalised as `own`.

    With levels u, x = (u - m) / s is given and y = (u - M) / S is needed: y = x s / S + (m - M) / S.

    Returns:
        None if they are equal or one is unknown.
    """
    if own.mean is None or own.std is None or given.mean is None or given.std is None:
        return None
    m, s, M, S = (torch.tensor(v, dtype=torch.float64) for v in (given.mean, given.std, own.mean, own.std))
    if torch.allclose(m, M, rtol=0, atol=_SAME) and torch.allclose(s, S, rtol=_SAME, atol=0):
        return None
    return s / S, (m - M) / S


class Adapted(Wrapper):
    """A model with its preprocessing in front, behind the protocol of `protocol.py`.

    Images keep their dtype (at least float32) until the last operation on them, and then take the model's.

    Args:
        affine: scale and shift of each channel, (C,) or (1,); None: none.
        size: (H, W) to which other images are resized; None: no other.
        channels: number to which one channel is repeated; None: channels stay as they are.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        affine: tuple[Tensor, Tensor] | None = None,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.model = feature_model(model)
        self.num_features = self.model.num_features
        if hasattr(model, "num_classes"):
            self.num_classes = model.num_classes
        self.size, self.channels = size, channels
        self._exact = {} if affine is None else {"scale": affine[0].float(), "shift": affine[1].float()}
        for name in ("scale", "shift"):
            # Part of the state, and so of the hash by which a teacher cache knows its teachers.
            self.register_buffer(name, self._exact[name].view(1, -1, 1, 1) if affine is not None else None)
        self.dtype = floating_dtype(model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the module; the affine stays in float32, which a cast to half precision would round."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in self._exact.items():
            moved = getattr(self, name)
            setattr(self, name, exact.to(moved.device).view_as(moved))
        self.dtype = floating_dtype(self.model)  # type: ignore[arg-type]
        return self

    def extra_repr(self) -> str:
        return f"size={self.size}, channels={self.channels}"

    def before(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) as the model expects them, in its dtype."""
        # Resizing and the affine commute, as weights of a resize sum to 1. The smaller images take the affine.
        resizes = self.size is not None and x.shape[-2:] != self.size
        grows = resizes and self.channels is None and x.shape[-2] * x.shape[-1] < math.prod(self.size or ())
        if grows:
            x = self._normalised(x)
        if resizes:
            # Without antialias a smaller image is a sample of pixels, not their average. The libraries of images, and
            # so the pipelines that models were trained with, average; for larger images both are the same.
            x = F.interpolate(x.to(self._wide(x)), self.size, mode="bilinear", antialias=True)
        if not grows:
            x = self._normalised(x)
        return x.to(self.dtype)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.scale is not None and self.shift is not None:
            x = torch.addcmul(self.shift, x.to(self._wide(x)), self.scale)  # one pass; repeats a single channel
        return x if self.channels is None else x.expand(-1, self.channels, -1, -1)

    def _wide(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32)
