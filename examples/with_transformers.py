"""A transformers student from two teachers of other kinds, with transformers' Trainer.

pip install '.[train]' transformers accelerate
python examples/with_transformers.py
"""

from __future__ import annotations

import tempfile

import torch
from digits import accuracy, digits, trained_teachers
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from camkd_fast import Distiller


class TrainedByTrainer(Distiller):
    """Trainer's names for inputs and outputs."""

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = super().forward(pixel_values, labels)
        return {"loss": out.loss, "logits": out.logits}


class Images(torch.utils.data.Dataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        images, target = self.data[i]
        return {"pixel_values": images, "labels": target}


def main(epochs: int = 3) -> float:
    set_seed(0)
    train, test = digits()
    shape = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    student = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **shape))
    distiller = TrainedByTrainer(
        student,
        trained_teachers(train),
        "ca-mkd",
        student_layer="resnet.encoder.stages.1",  # a module whose output is a feature map
        example=train[0][0].unsqueeze(0),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=50,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(distiller, arguments, train_dataset=Images(train)).train()
    found = accuracy(TestedStudent(student), test)
    print(f"accuracy {found:.3f}")
    return found


class TestedStudent(torch.nn.Module):
    """The student as a function that returns logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


if __name__ == "__main__":
    main()
