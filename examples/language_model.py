"""A small language model from two teachers, byte by byte, with transformers' Trainer.

pip install '.[llm]'
python examples/language_model.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from camkd_fast.integrations.transformers import MultiTeacherDistillationMixin

TEXT = Path(__file__).parents[1] / "README.md"


class MultiTeacherTrainer(MultiTeacherDistillationMixin, Trainer):
    pass


class Bytes(torch.utils.data.Dataset):
    """A text in sequences of `length` bytes, every tenth of them for testing."""

    def __init__(self, text: bytes, test: bool, length: int = 64) -> None:
        rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, length, length)
        is_test = torch.arange(len(rows)) % 10 == 9
        self.rows = rows[is_test == test]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def language_model(width: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )


def trainer_of(kind: type[Trainer], model: LlamaForCausalLM, steps: int, **given: Any) -> Trainer:
    text = TEXT.read_bytes()
    arguments = TrainingArguments(
        tempfile.gettempdir(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=max(steps // 4, 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return kind(model, arguments, train_dataset=Bytes(text, test=False), eval_dataset=Bytes(text, test=True), **given)


def nats(model: LlamaForCausalLM) -> float:
    """Cross-entropy per byte of the test sequences."""
    return float(trainer_of(Trainer, model, 1).evaluate()["eval_loss"])


def main(steps: int = 60) -> tuple[float, float]:
    set_seed(0)
    teachers = [language_model(width) for width in (64, 96)]
    for k, teacher in enumerate(teachers):
        trainer_of(Trainer, teacher, steps).train()
        print(f"teacher {k}: {nats(teacher):.2f} nats per byte")
    student = language_model(32)
    before = nats(student)
    settings = {"temperature": 2.0, "hard_weight": 1.0, "weighting": "confidence"}
    trainer_of(MultiTeacherTrainer, student, steps, teachers=teachers, distillation_loss=settings).train()
    after = nats(student)
    print(f"student: {before:.2f} nats per byte before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
