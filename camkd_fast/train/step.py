"""One training step. It is the same for every strategy and never synchronises with the device.

Forward of teachers and student, loss and its gradient in one pass (`Distiller.objective`), one backward, one step of
the optimiser. Student and loss are one graph under torch.compile. On a GPU the whole step is one CUDA graph
(`step_graph`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batch import Batch
from .average import Average
from .config import DTYPES, OptimConfig, PrecisionConfig
from .distiller import Distiller, Objective
from .distributed import World, replicate
from .generators import seed_generators
from .mixing import mixed, mixer_for
from .optimizer import create as create_optimizer
from .single_values import running_statistics
from .step_graph import WARM_UP, Recorder, StepGraph, recorder_for
from .strategies import Strategy
from .sums import Sums
from .teacher_ahead import DrawsRandomNumbersError, StudentBatch, ahead_for
from .teachers.live import Teachers

log = logging.getLogger(__name__)


class StepObjective(nn.Module):
    """A distiller whose call is the objective of a training step, for DDP, under autocast, compiled for one size."""

    def __init__(self, distiller: Distiller, dtype: torch.dtype) -> None:
        super().__init__()
        self.distiller, self._dtype = distiller, dtype
        self._compiled_size = -1
        self._compiled: Callable[..., Objective] = self._objective

    def compile_for(self, batch_size: int) -> None:
        """Compile batches of this size. Others, such as an epoch's last batch, run eagerly: each would recompile."""
        self._compiled_size = batch_size
        self._compiled = torch.compile(self._objective, fullgraph=True, dynamic=False)

    def forward(self, images: Tensor, *arguments: Any) -> Objective:
        """Arguments as `Distiller.objective`."""
        run = self._compiled if images.shape[0] == self._compiled_size else self._objective
        return run(images, *arguments)

    def _objective(self, images: Tensor, *arguments: Any) -> Objective:
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return self.distiller.objective(images, *arguments)


class TrainStep:
    """Callable that trains on one batch.

    Args:
        full_batch: images per full batch of this process, the compiled size.
        seed: of random numbers drawn in the forward pass (dropout). Each step reseeds from (seed, rank, step), so a
            resumed run draws the same numbers as an uninterrupted one.
        recorder: of the device work; None: CUDA graphs where `precision` asks for them.

    Raises:
        ValueError: CUDA graphs or synchronised batch norms are asked for, but the device is a CPU; images are mixed,
            but the teachers are cached; or as `optimizer.create`.
    """

    def __init__(
        self,
        student: nn.Module,
        strategy: Strategy,
        teachers: Teachers | None,
        optim: OptimConfig,
        precision: PrecisionConfig,
        world: World,
        full_batch: int,
        seed: int,
        recorder: Recorder | None = None,
    ) -> None:
        options: dict[str, Any] = {"label_smoothing": optim.label_smoothing, "channels_last": precision.channels_last}
        distiller = Distiller(student, teachers, strategy, **options).to(world.device)
        if precision.sync_batchnorm:
            if world.device.type == "cpu":
                raise ValueError("sync_batchnorm needs GPUs, but the device is cpu")
            distiller = nn.SyncBatchNorm.convert_sync_batchnorm(distiller)  # type: ignore[no-untyped-call]
        self.trainable = StepObjective(distiller, DTYPES[precision.dtype])
        compiled = precision.compiles(world.device.type) and full_batch > 1  # one image: see `running_statistics`
        if full_batch == 1 and any(isinstance(module, _BatchNorm) for module in self.trainable.modules()):
            warnings.warn(
                "batch_size 1 for a process: a batch norm that sees one value per channel uses its running statistics",
                stacklevel=2,
            )
        if compiled:
            self.trainable.compile_for(full_batch)
        self.student, self.strategy, self.teachers = distiller.student, distiller.strategy, teachers
        self._forward = replicate(self.trainable, world)
        scaled = precision.dtype == "float16"
        self.optimizer = create_optimizer(self.trainable, optim, scaled)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self.sums = Sums()
        self._world, self._seed, self._full_batch = world, seed, full_batch
        self._mixer = mixer_for(optim, seed, world.rank)
        if self._mixer is not None and teachers is not None and not teachers.computes:
            raise ValueError("mixup and cutmix need teachers that compute: a cache holds outputs of unmixed images")
        self._largest_norm = optim.clip_grad or None
        self.average = None if optim.ema is None else Average(self.student, optim.ema)
        self._scale = torch.full((1,), float(world.size), device=world.device)  # DDP averages
        recorder = recorder or recorder_for(precision, world)
        self._mentioned = False  # that some batches run without the graph
        self._finish: Callable[[Tensor], Tensor] | None = None
        self._graph = None if recorder is None else StepGraph(recorder, world.device, self._recorded)
        self._ahead = ahead_for(precision, world.device, recorder is not None, teachers)
        # Slow ones: compilation of both passes, recording of the graph.
        self.first_steps = WARM_UP + 1 if self._graph else 3 if compiled else 1

    def __call__(self, batch: Batch, num_items: int, rate: float, number: int, following: Batch | None = None) -> None:
        """Train on one batch.

        Args:
            num_items: images of this step over all processes.
            rate: learning rate.
            number: of the step in the run, from 0.
            following: batch of the next call, if it is there, for teachers that run ahead.
        """
        seed_generators(self._world.device, self._seed, self._world.rank, number)
        images = len(batch.target)
        if self._graph is not None and batch.finish is not self._finish:
            self._forget()
        self._finish = batch.finish
        if self._graph is not None and images == num_items == self._full_batch:
            numbers = torch.tensor([rate, number + 1], dtype=torch.float64)
            prepared = self._next_to_prepare(batch, following, number)
            self._graph([*self._inputs(prepared, number + (prepared is not batch)), numbers])
        else:
            if self._graph is not None and not self._mentioned:
                log.info("batches of %d and not %d images run without the CUDA graph", images, self._full_batch)
                self._mentioned = True
            self._learn(self._prepare(self._inputs(batch, number)), num_items, rate, number + 1)
        self.sums.count(images)

    def _inputs(self, batch: Batch, number: int) -> list[Tensor]:
        """The tensors that `_prepare` reads, on the host or the device; `number` counts the steps from 0."""
        for_teachers = [] if self.teachers is None else self.teachers.inputs(batch)
        mixing = [] if self._mixer is None else self._mixer.inputs(len(batch.target), number)
        return [batch.images, batch.target, *mixing, *for_teachers]

    def _next_to_prepare(self, batch: Batch, following: Batch | None, number: int) -> Batch:
        """The batch whose inputs the graph gets in the step on `batch`."""
        if self._ahead is not None:
            try:
                return self._ahead.advance(batch, following, lambda given: self._prepare(self._inputs(given, number)))
            except DrawsRandomNumbersError:
                log.warning("teachers do not run ahead of the student: they draw random numbers")
                self._ahead = None
        return batch

    def _recorded(self, inputs: Sequence[Tensor]) -> None:
        """The step on a full batch with all inputs in tensors."""
        *of_batch, numbers = inputs
        rate, number = numbers.unbind()

        def learn(batch: StudentBatch) -> None:
            self._learn(batch, self._full_batch, rate.float(), number)

        if self._ahead is None:
            learn(self._prepare(of_batch))
        else:
            self._ahead.run(learn, lambda: self._prepare(of_batch))

    def _prepare(self, inputs: Sequence[Tensor]) -> StudentBatch:
        """The part of a step that does not depend on the student."""
        images, target, *others = (tensor.to(self._world.device, non_blocking=True) for tensor in inputs)
        if self._finish is not None:
            images = self._finish(images)
        second: tuple[Tensor, ...] = ()
        if self._mixer is not None:
            partner, shares, *others = others
            images, *second_labels = mixed(images, target, partner, shares)
            second = tuple(second_labels)
        outputs = self.teachers.outputs(images, others) if self.teachers is not None else []
        return StudentBatch(images, target, outputs, second)

    def _learn(self, batch: StudentBatch, num_items: int, rate: float | Tensor, number: float | Tensor) -> None:
        """The student's part.

        Args:
            number: of the step, from 1.
        """
        images, target, teacher_outputs, second = batch
        scale = self.scaler.scale(self._scale)
        with running_statistics(self.trainable) if len(target) == 1 else nullcontext():
            objective = self._forward(images, target, teacher_outputs, num_items, scale, *second)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(objective.roots, objective.gradients)
        self._update(rate)
        if self.average is not None:
            # A skipped step lowers the loss scale.
            taken = (self.scaler.scale(self._scale) >= scale).float() if self.scaler.is_enabled() else None
            self.average.update(number, None if taken is None else taken.squeeze(0))
        self.sums.add(objective, len(target), number)

    def _update(self, rate: float | Tensor) -> None:
        """Move the parameters by the gradients of this step."""
        if self._largest_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainable.parameters(), self._largest_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _forget(self) -> None:
        """Record anew: memory that the graph reads or writes has been replaced."""
        if self._graph is not None:
            self._graph.forget()
        if self._ahead is not None:
            self._ahead.forget()

    @property
    def looks_ahead(self) -> bool:
        """Whether calls need `following`."""
        return self._ahead is not None

    @property
    def replays(self) -> bool:
        """Whether full batches are replayed as a graph, so that loaders should leave them as much work as they can."""
        return self._graph is not None

    def state_dict(self) -> dict[str, Any]:
        """State of strategy, optimiser, scaler and average; the student is saved separately."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = 1.0  # replaced in every call
        average = {} if self.average is None else {"average": self.average.module.state_dict()}
        return {
            **average,
            "strategy": self.strategy.state_dict(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strategy.load_state_dict(state["strategy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self._forget()  # the optimiser has new buffers
