"""Several teachers in TRL's DistillationTrainer: the loss of a batch, columns, logs, and a step with generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import DistillationConfig, DistillationTrainer, SFTConfig

from camkd_fast.integrations.trl import MultiTeacherDistillationTrainer
from tests.support import language_models as lm
from tests.support.distilled_runs import LOSS, SETTINGS, MixedSFT, prompts, texts, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def made(teachers: list[Any], data: Any = None, kind: type = MultiTeacherDistillationTrainer, **given: Any) -> Any:
        changes = given.pop("settings", {})
        settings = {
            **SETTINGS,
            "max_steps": 1,
            "save_strategy": "no",
            "max_completion_length": 5,
            "beta": 0.5,
            **changes,
        }
        config = DistillationConfig(str(tmp_path), **settings)
        model = given.pop("model", None) or lm.causal_lm()
        others = teachers[0] if kind is DistillationTrainer else teachers
        data = prompts() if data is None else data
        return kind(model, others, config, train_dataset=data, processing_class=tokenizer(), **given)

    return made


def batch(**columns: Tensor) -> dict[str, Tensor]:
    """As TRL generates it: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(1)
    prompt, completion = (torch.randint(3, lm.VOCABULARY, (4, length), generator=generator) for length in (4, 6))
    prompt_mask, completion_mask = torch.ones_like(prompt), torch.ones_like(completion)
    prompt_mask[0, :2], completion_mask[1, 3:], completion_mask[2, 1:] = 0, 0, 0
    return {
        "prompt_ids": prompt * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": completion * completion_mask,
        "completion_mask": completion_mask,
        "num_items_in_batch": completion_mask.sum(),
        **columns,
    }


def evaluated(trainer: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), lm.gradients(trainer.model)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_one_teacher_is_trls_trainer(beta: float, temperature: float, make: Any) -> None:
    teachers, inputs = [lm.causal_lm("gemma2", 24, seed=1)], batch()
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][0, 2] = 0
    results = []
    for kind in (DistillationTrainer, MultiTeacherDistillationTrainer):
        trainer = make(teachers, kind=kind, settings={"beta": beta, "temperature": temperature})
        results.append((*evaluated(trainer, inputs), trainer._metrics["train"]["entropy"]))
    (expected, wanted, entropy), (loss, found, ours) = results
    assert abs(loss - expected) <= 1e-5 * expected
    lm.assert_gradients(found, wanted)
    assert abs(ours[0] - entropy[0]) <= 1e-5 * entropy[0]


def test_fixed_weights_are_a_sum_over_teachers(make: Any) -> None:
    teachers, inputs = lm.teachers(), batch()
    single = [evaluated(make([teacher]), inputs) for teacher in teachers]
    weights = [0.7, 0.2]
    loss, found = evaluated(make(teachers, teacher_weights=weights), inputs)
    expected = sum(w * one for w, (one, _) in zip(weights, single, strict=True))
    assert abs(loss - expected) <= 1e-5 * expected
    wanted = {name: sum(w * g[name] for w, (_, g) in zip(weights, single, strict=True)) for name in single[0][1]}
    lm.assert_gradients(found, wanted)


def test_prompts_are_routed(make: Any) -> None:
    teachers, inputs = lm.teachers(), batch()
    ids = torch.tensor([1, 0, 0, 1])
    expected = sum(
        evaluated(make([teacher]), {**inputs, "completion_mask": inputs["completion_mask"] * (ids == k).unsqueeze(-1)})[
            0
        ]
        for k, teacher in enumerate(teachers)
    )
    loss, _ = evaluated(make(teachers, teacher_column="teacher_id"), {**inputs, "teacher_id": ids})
    assert abs(loss - expected) <= 1e-5 * expected


def test_confidence_weights_are_an_option(make: Any) -> None:
    teachers, inputs = lm.teachers(), batch()
    uniform = evaluated(make(teachers), inputs)[0]
    assert abs(evaluated(make(teachers, teacher_weights=[0.5, 0.5]), inputs)[0] - uniform) <= 1e-5 * uniform
    assert abs(evaluated(make(teachers, weighting="confidence"), inputs)[0] - uniform) > 1e-3 * uniform


def test_a_step_with_generation(make: Any) -> None:
    """The column follows its prompts through generation, shuffling and accumulation."""
    ids = [i % 2 for i in range(40)]
    trainer = make(lm.teachers(), prompts(teacher_id=ids), teacher_column="teacher_id")
    seen: list[tuple[int, int]] = []
    inside = trainer._compute_loss

    def compute(student: Any, inputs: dict[str, Tensor], number: Any) -> Any:
        firsts = [int(row[mask == 1][0]) for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
        seen.extend(zip(firsts, inputs["teacher_id"].tolist(), strict=True))
        return inside(student, inputs, number)

    trainer._compute_loss = compute
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert len(seen) == 4 and all((first - 3) % 2 == teacher for first, teacher in seen)
    assert not torch.equal(trainer.model.lm_head.weight, before)
    log = trainer.state.log_history[0]
    assert {"hard_loss", "soft_loss", "teacher_0_weight", "teacher_1_ce", "entropy"} <= log.keys()
    share = sum(teacher == 0 for _, teacher in seen) / 4
    assert (log["teacher_0_weight"] == 0) == (share == 0)
    assert abs(log["teacher_0_weight"] + log["teacher_1_weight"] - 1) < 1e-5


def test_a_column_that_is_missing(make: Any) -> None:
    trainer = make(lm.teachers(), teacher_column="teacher_id")
    with pytest.raises(ValueError, match=r"the data have no column 'teacher_id', only \['prompt'\]"):
        trainer.train()


def test_evaluation(make: Any) -> None:
    trainer = make(lm.teachers(), eval_dataset=prompts().select(range(3)))
    found = trainer.evaluate()
    assert found["eval_loss"] > 0 and "eval_teacher_1_ce" in trainer.state.log_history[-1]


def test_a_column_in_the_sft_trainer(tmp_path: Path) -> None:
    """TRL's collator and data preparation drop what they do not know."""
    data = texts().add_column("teacher_id", [0, 1, 1, 1] * 10)
    settings = {**SETTINGS, "max_steps": 10, "logging_steps": 10, "save_strategy": "no", "learning_rate": 0.0}
    trainer = MixedSFT(
        lm.causal_lm(), SFTConfig(str(tmp_path), **settings), train_dataset=data, eval_dataset=data,
        processing_class=tokenizer(), teachers=lm.teachers(), distillation_loss=LOSS, teacher_column="teacher_id",
    )  # fmt: skip
    trainer.train()
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in data]
    share = sum(counts[::4]) / sum(counts)
    log = trainer.state.log_history[0]
    assert abs(log["teacher_0_weight"] - share) < 1e-5 and abs(log["teacher_1_weight"] - 1 + share) < 1e-5
    found = trainer.evaluate()
    assert found["eval_loss"] > 0
    assert abs(trainer.state.log_history[-1]["eval_teacher_0_weight"] - share) < 1e-5
