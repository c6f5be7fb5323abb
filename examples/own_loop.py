"""A student from two teachers in a loop of your own, with accumulated gradients and clipping.

pip install '.[train]'
python examples/own_loop.py
"""

from __future__ import annotations

import torch
from digits import accuracy, digits, student, trained_teachers
from torch.utils.data import DataLoader

from camkd_fast import Distiller


def main(epochs: int = 3, batch_size: int = 25, parts: int = 2) -> float:
    torch.manual_seed(0)
    train, test = digits()
    distiller = Distiller(student(), trained_teachers(train), "ca-mkd", temperature=4.0, beta=50.0)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        distiller.train()
        for number, (images, target) in enumerate(DataLoader(train, batch_size, shuffle=True), 1):
            out = distiller(images, target, num_items=parts * batch_size)
            out.loss.backward()  # gradients of `parts` batches add up to those of one large batch
            if number % parts == 0:
                torch.nn.utils.clip_grad_norm_(distiller.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
        weights = ", ".join(f"{weight:.2f}" for weight in out.weights.mean(1))
        print(f"epoch {epoch + 1}: accuracy {accuracy(distiller.student, test):.3f}, teachers' weights {weights}")
    return accuracy(distiller.student, test)


if __name__ == "__main__":
    main()
