"""The baseline of the training step: a distillation step in eager PyTorch that works like the published CA-MKD code.

Rewritten from its behaviour: images augmented one by one in a DataLoader, unmodified float32 teachers, one loss per
teacher, regressed feature maps with gradients through the teacher heads, `.item()` after every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from camkd_fast.data.images import LabelledImages
from camkd_fast.models.protocol import feature_model, predict


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Augments one image at a time: crop with padding 4, flip, normalise."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images
        self.mean = torch.tensor(images.mean).view(-1, 1, 1)
        self.std = torch.tensor(images.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = self.images.pixels[i]
        H, W = pixels.shape[1:]
        top, left, mirrored = (int(torch.randint(n, ())) for n in (9, 9, 2))
        pixels = F.pad(pixels, (4, 4, 4, 4))[:, top : top + H, left : left + W]
        if mirrored:
            pixels = pixels.flip(2)
        return (pixels.float() - self.mean) / self.std, int(self.images.labels[i])


def endless(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


class OfficialStep:
    """Callable: one step on the next batch, DataLoader included."""

    def __init__(
        self,
        images: LabelledImages,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        batch_size: int,
        workers: int,
        temperature: float = 4.0,
        beta: float = 50.0,
    ) -> None:
        loader = DataLoader(
            AugmentedImages(images), batch_size, shuffle=True, num_workers=workers, drop_last=True,
            persistent_workers=workers > 0,
        )  # fmt: skip
        self.batches = endless(loader)
        self.device = next(student.parameters()).device
        self.student, self.teachers = feature_model(student.train()), [feature_model(t.eval()) for t in teachers]
        self.regressors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(self.student.num_features, t.num_features, 1, bias=False),
                nn.BatchNorm2d(t.num_features),
                nn.ReLU(inplace=True),
            )
            for t in self.teachers
        ).to(self.device)
        self.T, self.beta = temperature, beta
        self.optimizer = torch.optim.SGD(
            [*student.parameters(), *self.regressors.parameters()],
            lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True,
        )  # fmt: skip
        self.log: list[float] = []

    def weights(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """(K, N) confidence weights."""
        ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits])
        return (1.0 - ce.softmax(0)) / (len(logits) - 1)

    def __call__(self) -> None:
        images, target = (tensor.to(self.device) for tensor in next(self.batches))
        student = predict(self.student, images)
        with torch.no_grad():
            teachers = [predict(teacher, images) for teacher in self.teachers]
        loss = F.cross_entropy(student.logits, target)
        log_q = F.log_softmax(student.logits / self.T, dim=1)
        divergences = [
            self.T**2 * F.kl_div(log_q, F.softmax(t.logits / self.T, dim=1), reduction="none").sum(1) for t in teachers
        ]
        loss = loss + (self.weights([t.logits for t in teachers], target) * torch.stack(divergences)).sum(0).mean()
        mapped, errors = [], []
        for regressor, teacher, answer in zip(self.regressors, self.teachers, teachers, strict=True):
            feature = regressor(F.adaptive_avg_pool2d(student.features, answer.features.shape[2:]))
            mapped.append(teacher.forward_head(feature))
            errors.append((answer.features - feature).square().mean((1, 2, 3)))
        loss = loss + self.beta * (self.weights(mapped, target) * torch.stack(errors)).sum(0).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.log += [loss.item(), (student.logits.argmax(1) == target).float().mean().item()]
