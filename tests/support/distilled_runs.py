"""Runs of 20 steps of trainers with two tiny teachers, which a process may be killed in: NAME, FOLDER, STEP to die at.

As a script it trains until the process kills itself. A run that is resumed from its checkpoint must not differ from one
that nobody killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support import language_models as lm  # before trl, because of what it sets for transformers

import datasets  # isort: skip
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments  # isort: skip
from trl import DistillationConfig, SFTConfig, SFTTrainer  # isort: skip

from camkd_fast.integrations.transformers import MultiTeacherDistillationMixin
from camkd_fast.integrations.trl import MultiTeacherDistillationTrainer

LOSS = {"temperature": 2.0, "hard_weight": 0.5}
STEPS, SAVED, KILLED = 20, 8, 13
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": STEPS,
    "save_steps": SAVED,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "gradient_checkpointing": False,
}


class Mixed(MultiTeacherDistillationMixin, Trainer):
    pass


class MixedSFT(MultiTeacherDistillationMixin, SFTTrainer):
    pass


class Unfused(Trainer):
    """The same loss from all logits."""

    teachers: Any = ()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        others = lm.teacher_logits(self.teachers, inputs)
        loss = lm.unfused_loss(logits, others, inputs["labels"], num_items=num_items_in_batch, **LOSS)
        return (loss, {"logits": logits}) if return_outputs else loss


def tokenizer() -> Any:
    """Words w0, w1, ... of the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: i for i, name in enumerate(("<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, lm.VOCABULARY))))}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def texts() -> Any:
    """Sequences with labels, as a data set that is tokenized already."""
    samples = lm.TokenData(40)
    rows = []
    for sample in samples.samples:
        length = int(sample["attention_mask"].sum())
        rows.append({name: sample[name][:length].tolist() for name in ("input_ids", "labels")})
    return datasets.Dataset.from_list(rows)


def prompts(**columns: Any) -> Any:
    return datasets.Dataset.from_dict({"prompt": [f"w{3 + i} w{4 + i}" for i in range(40)], **columns})


def trainer(name: str, folder: Path, **changes: Any) -> Any:
    settings, model, others = {**SETTINGS, **changes}, lm.causal_lm(), lm.teachers()
    if name == "mixin":
        made: Any = Mixed(
            model, TrainingArguments(str(folder), **settings), train_dataset=lm.TokenData(40), teachers=others,
            distillation_loss=LOSS,
        )  # fmt: skip
    elif name == "unfused":
        made = Unfused(model, TrainingArguments(str(folder), **settings), train_dataset=lm.TokenData(40))
        made.teachers = others
    elif name == "sft":
        made = MixedSFT(
            model, SFTConfig(str(folder), **settings), train_dataset=texts(), processing_class=tokenizer(),
            teachers=others, distillation_loss=LOSS,
        )  # fmt: skip
    else:
        config = DistillationConfig(str(folder), max_completion_length=6, beta=0.5, **settings)
        made = MultiTeacherDistillationTrainer(
            model, others, config, train_dataset=prompts(), processing_class=tokenizer()
        )
    return made


def losses(made: Any) -> list[float]:
    return [log["loss"] for log in made.state.log_history if "loss" in log]


class Killer(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    made = trainer(sys.argv[1], Path(sys.argv[2]))
    made.add_callback(Killer())
    made.train()
    raise SystemExit(3)
