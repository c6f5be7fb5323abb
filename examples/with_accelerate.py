"""A student from two teachers with accelerate, which places the model, wraps it in DDP and accumulates gradients.

pip install '.[train]' accelerate
python examples/with_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from digits import accuracy, digits, student, trained_teachers
from torch.utils.data import DataLoader

from camkd_fast import Distiller


def main(epochs: int = 3) -> float:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    train, test = digits()
    distiller = Distiller(student(), trained_teachers(train), "ca-mkd")
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(train, batch_size=25, shuffle=True)
    distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
    for _ in range(epochs):
        distiller.train()
        for images, target in loader:
            with accelerator.accumulate(distiller):
                out = distiller(images, target)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
    found = accuracy(accelerator.unwrap_model(distiller).student, test)
    accelerator.print(f"accuracy {found:.3f}")
    return found


if __name__ == "__main__":
    main()
