"""What the examples share: images of digits, two trained teachers, and a student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camkd_fast import models


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,500 images (1, 8, 8) with labels to train on, and 297 to test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    target = torch.tensor(data.target)
    return TensorDataset(images[:1500], target[:1500]), TensorDataset(images[1500:], target[1500:])


def student() -> nn.Module:
    """A small network; any module works that returns logits."""
    return models.create("resnet8", num_classes=10, in_channels=1)


def trained_teachers(train: TensorDataset, epochs: int = 2) -> list[nn.Module]:
    """Yours would come from a file, or from timm."""
    teachers = [models.create(name, num_classes=10, in_channels=1) for name in ("resnet8", "wrn-16-1")]
    for teacher in teachers:
        optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for images, target in DataLoader(train, batch_size=50, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(teacher(images), target).backward()
                optimizer.step()
    return teachers


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Share of the test images that a model (N, 1, 8, 8) -> logits (N, 10) gets right."""
    images, target = test.tensors
    model.eval()
    logits: Tensor = model(images.to(next(model.parameters()).device))
    return float((logits.argmax(1).cpu() == target).float().mean())
