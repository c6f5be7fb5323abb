"""A student from two teachers with Lightning. Teachers are neither in checkpoints nor in the optimiser.

pip install '.[train]' lightning
python examples/with_lightning.py
"""

from __future__ import annotations

import lightning
import torch
from digits import accuracy, digits, student, trained_teachers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from camkd_fast import Distiller


class Distillation(lightning.LightningModule):
    def __init__(self, teachers: list[nn.Module]) -> None:
        super().__init__()
        self.distiller = Distiller(student(), teachers, "ca-mkd")

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        out = self.distiller(*batch)
        self.log_dict({"hard": out.hard, "soft": out.soft, "feature": out.feature})
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def main(epochs: int = 3) -> float:
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    module = Distillation(trained_teachers(train))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(max_epochs=epochs, enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader(train, batch_size=50, shuffle=True))
    found = accuracy(module.distiller.student, test)
    print(f"accuracy {found:.3f}")
    return found


if __name__ == "__main__":
    main()
