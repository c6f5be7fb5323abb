"""The interface of teachers, and teachers that compute their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...losses.checks import MAX_TEACHERS
from ...models.preprocessing import Adapted
from ...models.protocol import Prediction, feature_model, floating_dtype, predict
from .teacher_hash import state_hash

if TYPE_CHECKING:
    from ...data.batch import Batch

Head = Callable[[Tensor], Tensor]  # (N, D_k, H, W) -> logits (N, C)
Result = TypeVar("Result")


class Teachers(Protocol):
    """K teachers that compute their outputs (`LiveTeachers`) or replay them from a cache (`cache.CachedTeachers`)."""

    @property
    def num_features(self) -> list[int]:
        """Channels D_k of each feature map; 0 if feature maps are not available."""

    @property
    def heads(self) -> list[Head]:
        """Pooling and classifier of each teacher, differentiable in the input; autocast outside has no effect."""

    @property
    def hashes(self) -> list[str]:
        """Hash of each teacher's layers, weights, attributes and code, see `teacher_hash`."""

    @property
    def computes(self) -> bool:
        """Whether `outputs` runs the teachers: worth running ahead of the student."""
        return True

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to the models' tensors, as `nn.Module.to` does."""
        return

    def inputs(self, batch: Batch) -> list[Tensor]:
        """The tensors that `outputs` reads besides the images, on the host or the device."""

    def outputs(self, images: Tensor, inputs: Sequence[Tensor]) -> list[Prediction]:
        """Features (n, D_k, H_k, W_k) and logits (n, C) of each teacher, without autograd.

        Can be recorded in a CUDA graph if the inputs are on the device.
        """

    def __call__(self, batch: Batch) -> list[Prediction]:
        return self.outputs(batch.images, self.inputs(batch))


class LiveTeachers(Teachers):
    """K trained models in evaluation mode, with frozen parameters.

    Args:
        models: 1 to 16 models, from `models.freeze` or as trained; set to evaluation mode in place.
        num_classes: of the data set, and so of the student; None: that of the first teacher that says it.
        autocast: bfloat16 or float16 for forward passes under autocast; None: the parameters' own dtype, even if the
            caller has autocast enabled.

    Raises:
        ValueError: no teacher, more than 16, or one with another number of classes.
        TypeError: a model does not follow the protocol of `camkd_fast.models.protocol`.
    """

    def __init__(
        self, models: Sequence[nn.Module], num_classes: int | None, autocast: torch.dtype | None = None
    ) -> None:
        if not 1 <= len(models) <= MAX_TEACHERS:
            raise ValueError(f"a student learns from 1 to {MAX_TEACHERS} teachers, got {len(models)}")
        for k, model in enumerate(models):
            classes = getattr(model, "num_classes", num_classes)
            num_classes = classes if num_classes is None else num_classes
            if classes != num_classes:
                name = f"teacher {k} ({type(model).__name__})"
                raise ValueError(f"{name} has {classes} classes, but the data set has {num_classes}")
        self._modules = [model.eval().requires_grad_(False) for model in models]
        self._models = [feature_model(model) for model in self._modules]
        self._dtypes = [floating_dtype(model) for model in self._modules]
        self.num_classes, self.autocast = num_classes, autocast
        self._eager: list[Callable[[Tensor], Prediction]] = [partial(self._predict, k) for k in range(len(models))]
        self._compiled_size, self._compiled = -1, self._eager

    def compile_for(self, batch_size: int) -> None:
        """Compile batches of this size, one graph per teacher. Other sizes run eagerly: each would recompile."""
        self._compiled_size = batch_size
        self._compiled = [torch.compile(predict, fullgraph=True, dynamic=False) for predict in self._eager]

    @property
    def num_features(self) -> list[int]:
        return [model.num_features for model in self._models]

    @property
    def heads(self) -> list[Head]:
        return [partial(self._head, k) for k in range(len(self._models))]

    @property
    def hashes(self) -> list[str]:
        """The hash of each teacher as it is now, for one pass over its weights."""
        return [state_hash(module) for module in self._modules]

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        for module in self._modules:
            module._apply(fn)  # type: ignore[no-untyped-call]
        self._dtypes[:] = [floating_dtype(module) for module in self._modules]

    def inputs(self, batch: Batch) -> list[Tensor]:
        return []

    @torch.no_grad()
    def outputs(self, images: Tensor, inputs: Sequence[Tensor] = ()) -> list[Prediction]:
        run = self._compiled if len(images) == self._compiled_size else self._eager
        return side_by_side([partial(predict, images) for predict in run], images.device)

    def _predict(self, k: int, images: Tensor) -> Prediction:
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            model = self._models[k]
            # What adapts images rounds them last.
            return predict(model, images if isinstance(model, Adapted) else images.to(self._dtypes[k]))

    def _head(self, k: int, features: Tensor) -> Tensor:
        """Apply the head in its own dtype: regressed maps are float32 whatever the teacher's dtype."""
        with torch.autocast(features.device.type, enabled=False):
            return self._models[k].forward_head(features.to(self._dtypes[k]))


def side_by_side(tasks: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """Results of the tasks: parallel branches of a CUDA graph that is being recorded, one after the other elsewhere.

    At small batches the kernels of one teacher fill a fraction of the GPU.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return [task() for task in tasks]
    here = torch.cuda.current_stream(device)
    start = here.record_event()  # before the first task, or the others would wait for it
    streams = [torch.cuda.Stream(device) for _ in tasks[1:]]  # type: ignore[no-untyped-call]
    results = [tasks[0]()]
    for stream, task in zip(streams, tasks[1:], strict=True):
        stream.wait_event(start)
        with torch.cuda.stream(stream):
            results.append(task())
    for stream in streams:
        here.wait_stream(stream)
    return results
