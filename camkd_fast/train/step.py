"""One training step. It is the same for every strategy and never synchronises with the device.

Forward of teachers and student, loss and its gradient in one pass (`camkd_loss_and_grad`), one backward, SGD.
Student and loss are one graph under torch.compile. On a GPU the whole step is one CUDA graph (`step_graph`).
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batch import Batch
from ..losses.logit import camkd_loss_and_grad
from ..models.protocol import Prediction, feature_model, predict
from .config import OptimConfig, PrecisionConfig
from .distributed import World, replicate
from .single_values import running_statistics
from .step_graph import WARM_UP, CudaRecorder, Recorder, StepGraph
from .strategies import Strategy
from .sums import Sums
from .teachers.live import Teachers

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Objective(NamedTuple):
    """Loss of one batch, as arguments of `torch.autograd.backward(roots, gradients)`."""

    roots: list[Tensor]  # logits (n, C) and those of the strategy's feature loss
    gradients: list[Tensor]  # d(scale * loss) / d root
    numbers: Tensor  # float32, sums over the batch: loss, cross-entropy, distillation, feature loss, correct
    weights: Tensor | None  # (K,) logit weights of the teachers, summed over the batch
    feature_weights: Tensor | None  # (K,) feature weights, summed over the batch


class TrainableStudent(nn.Module):
    """Student and strategy in one module, so that DDP and the optimiser see the parameters of both."""

    def __init__(self, student: nn.Module, strategy: Strategy, dtype: torch.dtype) -> None:
        super().__init__()
        feature_model(student)
        self.student, self.strategy, self._dtype = student, strategy, dtype
        self._compiled_size = -1
        self._compiled: Callable[..., Objective] = self._objective

    def compile_for(self, batch_size: int) -> None:
        """Compile batches of this size. Others, such as an epoch's last batch, run eagerly: each would recompile."""
        self._compiled_size = batch_size
        self._compiled = torch.compile(self._objective, fullgraph=True, dynamic=False)

    def forward(
        self, images: Tensor, target: Tensor, teacher_outputs: list[Prediction], num_items: int, scale: Tensor
    ) -> Objective:
        """
        Args:
            images: (n, channels, H, W), the batch that the teachers received.
            target: (n,) int64.
            teacher_outputs: K predictions; empty without teachers.
            num_items: images of this step over all processes, the divisor of the summed loss.
            scale: (1,) float32, multiplies all gradients.
        """
        run = self._compiled if images.shape[0] == self._compiled_size else self._objective
        return run(images, target, teacher_outputs, num_items, scale)

    def _objective(
        self, images: Tensor, target: Tensor, teacher_outputs: list[Prediction], num_items: int, scale: Tensor
    ) -> Objective:
        strategy = self.strategy
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            student = predict(feature_model(self.student), images)
            term = None
            if teacher_outputs:
                term = strategy.feature_term(student, teacher_outputs, target, num_items, scale)
        logits = student.logits.detach()
        weights = feature_weights = None
        feature = torch.zeros((), device=images.device)
        if teacher_outputs:
            teacher_logits = [teacher.logits for teacher in teacher_outputs]
            formula = strategy.formula._replace(weighting=strategy.weighting(logits, teacher_outputs, target))
            out, gradient = camkd_loss_and_grad(
                logits,
                teacher_logits,
                target,
                num_items=num_items,
                loss_scale=scale,
                **formula.options(),
            )
            loss, hard, soft = out.loss, out.hard, out.soft
            weights = out.weights.sum(1)
            roots, gradients = [student.logits], [gradient]
        else:
            root = F.cross_entropy(student.logits.float(), target, reduction="sum") / num_items
            loss = hard = root.detach()
            soft = torch.zeros_like(hard)
            roots, gradients = [root], [scale.reshape(())]
        if term is not None:
            roots += term.roots or [term.loss]
            gradients += term.gradients or [scale.reshape(()).to(term.loss.dtype)]
            feature = term.loss.detach()
            feature_weights = None if term.weights is None else term.weights.sum(1)
        losses = torch.stack([loss + feature, hard, soft, feature]).float() * num_items
        correct = (logits.argmax(1) == target).sum().float()
        return Objective(roots, gradients, torch.cat([losses, correct.view(1)]), weights, feature_weights)


class TrainStep:
    """Callable that trains on one batch.

    Args:
        full_batch: images per full batch of this process, the compiled size.
        seed: of random numbers drawn in the forward pass (dropout). Each step reseeds from (seed, rank, step), so a
            resumed run draws the same numbers as an uninterrupted one.
        recorder: of the device work; None: CUDA graphs where `precision` asks for them.

    Raises:
        ValueError: CUDA graphs or synchronised batch norms are asked for, but the device is a CPU.
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
        self.trainable = TrainableStudent(student, strategy, DTYPES[precision.dtype]).to(world.device)
        if precision.channels_last:
            self.trainable.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if precision.sync_batchnorm:
            if world.device.type == "cpu":
                raise ValueError("sync_batchnorm needs GPUs, but the device is cpu")
            self.trainable = nn.SyncBatchNorm.convert_sync_batchnorm(self.trainable)  # type: ignore[no-untyped-call]
        compiled = precision.compiles(world.device.type) and full_batch > 1  # one image: see `running_statistics`
        if full_batch == 1 and any(isinstance(module, _BatchNorm) for module in self.trainable.modules()):
            warnings.warn(
                "batch_size 1 for a process: a batch norm that sees one value per channel uses its running statistics",
                stacklevel=2,
            )
        if compiled:
            self.trainable.compile_for(full_batch)
        self.student, self.strategy, self.teachers = self.trainable.student, self.trainable.strategy, teachers
        self._forward = replicate(self.trainable, world)
        self.optimizer = torch.optim.SGD(
            [p for p in self.trainable.parameters() if p.requires_grad],
            lr=1.0,  # replaced in every call
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=True,
            fused=True,
        )
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                # torch leaves the momentum uninitialised if the scaler skips the first fused step.
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision.dtype == "float16")
        self.sums = Sums()
        self._world, self._seed, self._full_batch = world, seed, full_batch
        self._scale = torch.full((1,), float(world.size), device=world.device)  # DDP averages
        recorder = recorder or _recorder(precision, world)
        self._mentioned = False  # that some batches run without the graph
        self._finish: Callable[[Tensor], Tensor] | None = None
        self._graph = None if recorder is None else StepGraph(recorder, world.device, self._recorded)
        # Slow ones: compilation of both passes, recording of the graph.
        self.first_steps = WARM_UP + 1 if self._graph else 3 if compiled else 1

    def __call__(self, batch: Batch, num_items: int, rate: float, number: int) -> None:
        """Train on one batch.

        Args:
            num_items: images of this step over all processes.
            rate: learning rate.
            number: of the step in the run, from 0.
        """
        seed_generators(self._world.device, self._seed, self._world.rank, number)
        images = len(batch.target)
        for_teachers = self.teachers.inputs(batch) if self.teachers is not None else []
        if self._graph is not None and batch.finish is not self._finish:
            self._graph.forget()
        self._finish = batch.finish
        if self._graph is not None and images == num_items == self._full_batch:
            numbers = torch.tensor([rate, number + 1], dtype=torch.float64)
            self._graph([batch.images, batch.target, numbers, *for_teachers])
        else:
            if self._graph is not None and not self._mentioned:
                log.info("batches of %d and not %d images run without the CUDA graph", images, self._full_batch)
                self._mentioned = True
            self._work(batch.images, batch.target, for_teachers, num_items, rate, number + 1)
        self.sums.count(images)

    def _recorded(self, inputs: Sequence[Tensor]) -> None:
        """`_work` on a full batch with all inputs in tensors."""
        images, target, numbers, *for_teachers = inputs
        rate, number = numbers.to(self._world.device, non_blocking=True).unbind()
        self._work(images, target, for_teachers, self._full_batch, rate.float(), number)

    def _work(
        self,
        images: Tensor,
        target: Tensor,
        for_teachers: Sequence[Tensor],
        num_items: int,
        rate: float | Tensor,
        number: float | Tensor,
    ) -> None:
        """What a step does on the device.

        Args:
            images: as in the batch, finished here.
            number: of the step, from 1.
        """
        if self._finish is not None:
            images = self._finish(images)
        teacher_outputs = self.teachers.outputs(images, for_teachers) if self.teachers is not None else []
        scale = self.scaler.scale(self._scale)
        with running_statistics(self.trainable) if len(target) == 1 else nullcontext():
            objective = self._forward(images, target, teacher_outputs, num_items, scale)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(objective.roots, objective.gradients)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums.add(objective, len(target), number)

    @property
    def replays(self) -> bool:
        """Whether full batches are replayed as a graph, so that loaders should leave them as much work as they can."""
        return self._graph is not None

    def state_dict(self) -> dict[str, Any]:
        """State of strategy, optimiser and scaler; the student is saved separately."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = 1.0  # replaced in every call
        return {
            "strategy": self.strategy.state_dict(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strategy.load_state_dict(state["strategy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self._graph is not None:
            self._graph.forget()  # the optimiser has new buffers


def _recorder(precision: PrecisionConfig, world: World) -> Recorder | None:
    """The recorder of CUDA graphs; None where steps run eagerly."""
    if precision.cuda_graphs == "on" and world.device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a GPU, but the device is {world.device.type}")
    if precision.cuda_graphs == "off" or world.device.type != "cuda":
        return None
    if world.size > 1:
        log.warning("training steps run without a CUDA graph: %d processes exchange gradients", world.size)
        return None
    return CudaRecorder(world.device)


def seed_generators(device: torch.device, *key: int) -> None:
    """Seed the default generators with a hash of `key`; 100 us faster than torch.manual_seed."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
