"""The mixin in transformers' Trainer: losses, columns, logs, evaluation and prediction."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from camkd_fast import CAMKDLinearLoss
from camkd_fast.integrations import teacher_mix, trainer_parts
from camkd_fast.integrations.causal_lm import OutputHead, Teacher, hidden_states, teacher_hidden
from camkd_fast.integrations.teacher_mix import TeacherMix
from camkd_fast.integrations.transformers import MultiTeacherDistillationMixin
from tests.support.language_models import (
    TokenData,
    assert_gradients,
    causal_lm,
    gradients,
    teacher_logits,
    teachers,
    unfused_loss,
)
from tests.support.tensor_kinds import default_dtype

pytestmark = pytest.mark.usefixtures("one_thread")
LOSS = {"temperature": 2.0, "hard_weight": 0.5}


class Distilled(MultiTeacherDistillationMixin, Trainer):
    pass


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def made(data: TokenData | None = None, settings: dict[str, Any] | None = None, **given: Any) -> Distilled:
        arguments = TrainingArguments(
            str(tmp_path),
            **{
                "use_cpu": True,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "max_steps": 2,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "logging_steps": 1,
                "optim": "sgd",
                "learning_rate": 0.1,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                **(settings or {}),
            },
        )
        data = data or TokenData()
        model = given.pop("model", None if "model_init" in given else causal_lm())
        given = {"teachers": teachers(), "distillation_loss": LOSS, **given}
        return Distilled(model, arguments, train_dataset=data, eval_dataset=data, **given)

    return made


def batch_of(data: TokenData, rows: range = range(4)) -> dict[str, Tensor]:
    return default_data_collator([data[i] for i in rows])  # type: ignore[no-any-return]


def expected_loss(model: nn.Module, others: list[Any], batch: dict[str, Tensor], **options: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return unfused_loss(logits, teacher_logits(others, batch), batch["labels"], **{**LOSS, **options})


def assert_loss(trainer: Distilled, batch: dict[str, Tensor], **options: Any) -> None:
    model = trainer.model
    model.zero_grad()
    expected_loss(model, list(trainer.teachers), batch, **options).backward()
    wanted = gradients(model)
    expected = expected_loss(model, list(trainer.teachers), batch, **options).item()
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=options.get("num_items"))
    loss.backward()
    assert abs(loss.item() - expected) <= 1e-5 * expected
    assert_gradients(gradients(model), wanted)


def test_the_loss_of_a_batch(make: Any) -> None:
    assert_loss(make(), batch_of(TokenData()))
    assert_loss(make(distillation_loss=CAMKDLinearLoss("uniform", **LOSS)), batch_of(TokenData()), weighting="uniform")
    assert_loss(make(), batch_of(TokenData()), num_items=torch.tensor(50))
    for given in ([0.9, 0.3], [1, 0], torch.tensor([0.2, 0.7])):
        weights = torch.as_tensor(given, dtype=torch.float32)
        trainer = make(teacher_weights=given)
        for _ in range(2):
            assert_loss(trainer, batch_of(TokenData()), weighting=weights)


def test_attributes_may_be_set_later(make: Any) -> None:
    trainer = make(teachers=None, distillation_loss=None)
    with pytest.raises(ValueError, match="teachers is empty"):
        trainer.compute_loss(trainer.model, batch_of(TokenData()))
    trainer.teachers, trainer.distillation_loss = teachers(), LOSS
    assert_loss(trainer, batch_of(TokenData()))
    trainer.teachers = trainer.teachers[:1]
    assert_loss(trainer, batch_of(TokenData()))


def test_shifted_labels_are_taken_as_they_are(make: Any) -> None:
    trainer, batch = make(), batch_of(TokenData())
    expected = trainer.compute_loss(trainer.model, dict(batch))
    batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    found = trainer.compute_loss(trainer.model, batch)
    assert found.item() == expected.item()


def test_a_batch_without_labels_that_count(make: Any) -> None:
    trainer, batch = make(), batch_of(TokenData())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss == 0 and not any(gradient.any() for gradient in gradients(trainer.model).values())
    with pytest.raises(ValueError, match=r"no labels, only \['attention_mask', 'input_ids'\]"):
        trainer.compute_loss(trainer.model, {name: batch[name] for name in ("input_ids", "attention_mask")})


# --- columns ---------------------------------------------------------------------------------------------------------


def test_samples_are_routed_to_their_teacher(make: Any) -> None:
    """And a teacher runs for its samples only."""
    data = TokenData(teacher_id=[0, 1, 0, 0, 0, 0, 0, 0])
    trainer = make(data, teacher_column="teacher_id")
    sizes: list[list[int]] = [[], []]
    for k, teacher in enumerate(trainer.teachers):
        teacher.base_model.register_forward_pre_hook(
            lambda _, args, kwargs, k=k: sizes[k].append(len(kwargs["input_ids"])), with_kwargs=True
        )
    for rows, ids, expected in ((range(4), [0, 1, 0, 0], [[3], [1]]), (range(4, 8), [0] * 4, [[4], []])):
        batch = batch_of(data, rows)
        trainer.compute_loss(trainer.model, dict(batch))
        assert sizes == expected
        weights = torch.nn.functional.one_hot(torch.tensor(ids), 2).t().float()
        assert_loss(trainer, batch, weighting=weights)
        sizes[0].clear(), sizes[1].clear()


@pytest.mark.parametrize("extra", ["pixel_values", "position_ids"])
def test_inputs_without_a_row_per_sample_are_not_selected(make: Any, extra: str) -> None:
    """As many images as samples, of which the second sample has two; positions of as many axes as samples."""
    trainer, batch = make(), {**batch_of(TokenData()), extra: torch.randn(4, 3, 8)}
    received: list[list[int]] = [[], []]

    def hidden(teacher: Any, inputs: Any) -> Any:
        received[trainer.teachers.index(teacher)] += [len(inputs["input_ids"]), len(inputs[extra])]
        return teacher_hidden(teacher, {name: inputs[name] for name in ("input_ids", "attention_mask")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_mix, "teacher_hidden", hidden)
        teacher_mix.hidden_of_teachers(
            trainer.teachers, batch, torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
        )
    assert received == [[4, 4], [4, 4]]


def test_the_default_dtype_does_not_round_the_weights(make: Any) -> None:
    trainer = make(teacher_weights=[0.7, 0.3])
    with default_dtype(torch.bfloat16):
        _, given = trainer._mix.of_batch(batch_of(TokenData()), batch_of(TokenData()), 5)
    assert given["weighting"].tolist() == torch.tensor([0.7, 0.3]).tolist()


def test_samples_mix_their_teachers(make: Any) -> None:
    weights = torch.rand(8, 2)
    data = TokenData(mix=weights.tolist())
    trainer = make(data, teacher_column="mix")
    assert_loss(trainer, next(iter(trainer.get_train_dataloader())) | batch_of(data), weighting=weights[:4].t())


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (torch.tensor([0, 1, 2, 0]), "column 'teacher_id' holds teacher 2, but there are 2"),
        (torch.tensor([0, -1, 1, 0]), "holds teacher -1, but there are 2"),
        (torch.rand(4, 3), r"has shape \(4, 3\) and dtype torch.float32, but expected .* \(4,\) or weights \(4, 2\)"),
        (None, r"no column 'teacher_id', only \['attention_mask', 'input_ids', 'labels'\]"),
    ],
)
def test_columns_are_checked(make: Any, column: Any, words: str) -> None:
    trainer, batch = make(teacher_column="teacher_id"), batch_of(TokenData())
    with pytest.raises(ValueError, match=words):
        trainer.compute_loss(trainer.model, batch if column is None else {**batch, "teacher_id": column})


def test_settings_are_checked(make: Any) -> None:
    for given, words in (
        ({"distillation_loss": {"shift": True}}, "shift=True, but the trainer decides it"),
        ({"distillation_loss": {"temperatur": 2.0}}, "got 'temperatur'"),
        ({"teacher_weights": [1.0]}, "teacher_weights holds 1 numbers, but there are 2 teachers"),
        ({"teacher_weights": [1.0, 2.0], "teacher_column": "x"}, r"\[1.0, 2.0\] and teacher_column 'x' are both given"),
        ({"teachers": ["gpt2"]}, "a teacher must be a model or a `Teacher`, got str"),
        ({"teachers": teachers()[0]}, "teachers must be a list of models, got LlamaForCausalLM"),
        ({"teachers": [teachers()[0].model]}, "LlamaModel has no output head"),
        ({"settings": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor is 0.1, but the loss is that of"),
        ({"compute_loss_func": print}, "compute_loss_func is .*, but the loss is that of"),
        ({"teachers": [causal_lm(classes=40)]}, "teacher 0's head has 40 classes, but the vocabulary has 60"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            make(**given)
    make(teachers=[causal_lm(classes=40)], distillation_loss={"vocab_size": 40})
    with pytest.warns(UserWarning, match="teacher 1's head has 2000 classes, but the vocabulary has 60: do both"):
        make(teachers=[causal_lm(classes=64), causal_lm(classes=2000)])


@pytest.mark.parametrize("weights", [None, [1.0]])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Linear(2, 2), "teachers must be a list of models, got Linear"),
        (nn.Sequential(nn.Linear(2, 2)), "teachers must be a list of models, got Sequential"),
        ("gpt2", "teachers must be a list of models, got str"),
        ((model for model in [nn.Linear(2, 2)]), "teachers must be a list of models, got generator"),
        ({"one": nn.Linear(2, 2)}, "teachers must be a list of models, got dict"),
        (["gpt2"], "a teacher must be a model or a `Teacher`, got str"),
        ([], "teachers is empty"),
        (None, "teachers is empty"),
    ],
)
def test_teachers_that_are_no_list_of_models_are_refused(given: Any, words: str, weights: list[float] | None) -> None:
    """Before anything is done with them, and also if they are set on a trainer that has run."""
    with pytest.raises((TypeError, ValueError), match=words):
        TeacherMix(given, weights, None)
    for whole in ([nn.Linear(2, 2)], (nn.Linear(2, 2),), nn.ModuleList([nn.Linear(2, 2)])):
        mix = TeacherMix(whole, weights, None)
        assert mix.is_of(whole, weights, None)
        with pytest.raises((TypeError, ValueError), match=words):
            mix.is_of(given, weights, None)


def test_a_teacher_of_the_students_parameters_is_refused(make: Any) -> None:
    """PEFT puts its adapters into the model that it is given."""
    peft = pytest.importorskip("peft")
    base = causal_lm()
    before = copy.deepcopy(base)
    student = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    for teacher in (base, student):
        with pytest.raises(ValueError, match="teacher 1 has the student's own parameters"):
            make(model=student, teachers=[before, teacher])
    make(model=student, teachers=[before])
    trainer = make(model=student, teachers=None)
    trainer.teachers = [student]
    for _ in range(2):  # a second try does not pass
        with pytest.raises(ValueError, match="teacher 0 has the student's own parameters"):
            trainer.train()


def mixture_of_experts(coefficient: float) -> Any:
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    config = MixtralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        output_router_logits=True, router_aux_loss_coef=coefficient, **settings,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_a_routers_loss_is_not_lost_in_silence(make: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="router's loss of MixtralForCausalLM .* router_aux_loss_coef to 0, got 0.5"):
        make(model=mixture_of_experts(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(model=mixture_of_experts(0.0))
    trainer = make()
    trainer.args.router_aux_loss_coef = 0.1  # of SFTConfig
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.1, but the loss is that of"):
        trainer._refuse_other_losses()


# --- training and evaluation -----------------------------------------------------------------------------------------


def test_partitioned_parameters_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_parts, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 is not supported"):
        make()


class Undeclared(LlamaForCausalLM):
    """A name from which the trainer does not see that the loss shifts its labels."""

    accepts_loss_kwargs = False  # as classes of models of text and images say


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Undeclared])
def test_accumulation_is_one_large_batch(make: Any, kind: type) -> None:
    found = []
    for batch_size, steps in ((4, 1), (1, 4)):
        model = causal_lm()
        model.__class__ = kind
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make(model=model, settings=settings)
        trainer.train()
        log = trainer.state.log_history[0]
        assert abs(0.5 * log["hard_loss"] + log["soft_loss"] - log["loss"]) < 1e-5 * log["loss"]
        found.append((log["loss"], {name: p.detach() for name, p in model.named_parameters()}))
    assert abs(found[0][0] - found[1][0]) <= 1e-5 * found[0][0]
    assert_gradients(found[1][1], found[0][1])
    start = causal_lm().lm_head.weight
    assert (found[0][1]["lm_head.weight"] - start).norm() > 1e-3


@pytest.mark.parametrize("entropies", [False, True])
def test_logs_are_means_over_tokens(make: Any, entropies: bool) -> None:
    """Entropies on request: a GPU computes them in a slower kernel."""
    data, loss = TokenData(16), {**LOSS, "entropy": entropies}
    settings = {"logging_steps": 2, "learning_rate": 0.0, "gradient_accumulation_steps": 2}
    trainer = make(data, settings, distillation_loss=loss)
    trainer.train()
    first = next(log for log in trainer.state.log_history if "hard_loss" in log)
    trainer.model.eval()
    total, tokens, entropy = torch.zeros(2), 0, 0.0
    for rows in (range(8), range(8, 16)):
        batch = batch_of(data, rows)
        kept = batch["labels"][:, 1:] != -100
        label = batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1)
        with torch.no_grad():
            log_q = trainer.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        softened = (log_q / 2).log_softmax(-1)
        entropy += float(-(softened.exp() * softened).sum(-1)[kept].sum())
        teacher = teacher_logits(list(trainer.teachers), batch)[0][:, :-1, : log_q.shape[-1]].log_softmax(-1)
        total += torch.stack([-x.gather(-1, label).squeeze(-1)[kept].sum() for x in (log_q, teacher)])
        tokens += int(kept.sum())
    assert ("entropy" in first) == entropies
    for name, value in (("hard_loss", total[0]), ("teacher_0_ce", total[1]), ("entropy", entropy))[: 2 + entropies]:
        assert abs(first[name] - float(value) / tokens) <= 1e-5 * float(value) / tokens, name
    assert abs(first["teacher_0_weight"] + first["teacher_1_weight"] - 1) < 1e-5
    assert "hard_loss" not in trainer.state.log_history[-1]  # of the whole run


def test_a_certain_teacher_counts_in_the_logs(make: Any) -> None:
    """Its cross-entropies are 0 where it is right; elsewhere it knows nothing."""
    model = causal_lm()
    C = model.config.vocab_size

    def hidden(input_ids: Tensor, **_: Any) -> Tensor:
        states = torch.nn.functional.one_hot(input_ids.roll(-1, 1), C).float()
        states[:, 1::2] = 0
        return states

    trainer = make(model=model, teachers=[Teacher(hidden, OutputHead(60 * torch.eye(C)))])
    batch = batch_of(TokenData())
    trainer.compute_loss(trainer.model, dict(batch))
    logits = 60 * hidden(batch["input_ids"])[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).item()
    found = trainer._loss_metrics["train"].means(trainer.accelerator)
    assert found["teacher_0_ce"] == pytest.approx(expected, rel=1e-5)


def test_a_teacher_that_nothing_was_routed_to_has_no_cross_entropy(make: Any) -> None:
    trainer = make(teacher_column="teacher_id")
    trainer.compute_loss(trainer.model, {**batch_of(TokenData()), "teacher_id": torch.ones(4, dtype=torch.int64)})
    found = trainer._loss_metrics["train"].means(trainer.accelerator)
    assert found["teacher_0_weight"] == 0 and "teacher_0_ce" not in found and found["teacher_1_ce"] > 0


def test_evaluation_and_prediction(make: Any) -> None:
    trainer, data = make(), TokenData()
    predicted = trainer.predict(data)
    found = trainer.evaluate()
    trainer.model.eval()
    with torch.no_grad():
        losses = [
            expected_loss(trainer.model, list(trainer.teachers), batch_of(data, rows))
            for rows in (range(4), range(4, 8))
        ]
        logits = trainer.model(**{k: v for k, v in batch_of(data, range(8)).items() if k != "labels"}).logits
    expected = float(sum(losses) / 2)
    assert abs(found["eval_loss"] - expected) < 1e-5 * expected
    assert abs(predicted.metrics["test_loss"] - expected) < 1e-5 * expected
    error = (torch.as_tensor(predicted.predictions) - logits).norm() / logits.norm()
    assert error < 1e-5 and predicted.label_ids.shape == (8, 9)
    log = trainer.state.log_history[-1]
    assert {"eval_hard_loss", "eval_teacher_1_weight", "eval_teacher_1_ce"} <= log.keys() and "eval_entropy" not in log
    assert trainer._loss_metrics["eval"].means(trainer.accelerator) == {}


def test_a_log_of_training_after_an_evaluation(make: Any) -> None:
    """The model is in evaluation mode then. The last log of a run has a loss of its own."""
    logs: list[list[dict[str, float]]] = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        settings |= {"max_steps": 4, "logging_strategy": "epoch"}
        trainer = make(settings=settings, compute_metrics=lambda _: {"eval_aux_loss": 1.0})
        trainer.train()
        logs.append(trainer.state.log_history)
    expected, found = ([log for log in history if "loss" in log] for history in logs)
    assert found == expected and len(found) == 2
    assert {"hard_loss", "teacher_1_weight", "teacher_1_ce"} <= found[0].keys()
    evaluations = [log for log in logs[1] if "eval_loss" in log]
    assert len(evaluations) == 2
    for log in evaluations:
        assert {"eval_hard_loss", "eval_teacher_1_ce"} <= log.keys() and "hard_loss" not in log
        assert "eval_aux_teacher_1_ce" not in log
    assert [name for name in logs[1][-1] if "loss" in name or "teacher" in name] == ["train_loss"]


def test_an_evaluation_of_any_prefix_has_its_means(make: Any) -> None:
    trainer = make()
    for prefix in ("train", "eval", "test"):
        trainer.evaluate(metric_key_prefix=prefix)
        assert {f"{prefix}_hard_loss", f"{prefix}_teacher_1_ce"} <= trainer.state.log_history[-1].keys()
        assert trainer._loss_metrics["eval"].means(trainer.accelerator) == {}


def test_mixed_precision_is_the_trainers(make: Any) -> None:
    trainer, dtypes = make(settings={"bf16": True}), []
    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    trainer.train()
    assert set(dtypes) == {torch.bfloat16} and trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("made_later", [False, True])
def test_compilation_is_that_of_the_backbone(make: Any, made_later: bool) -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        settings = {"torch_compile": compiled, "torch_compile_backend": "aot_eager" if compiled else None}
        trainer = make(settings=settings, **({"model_init": lambda: causal_lm()} if made_later else {}))
        torch._dynamo.utils.counters.clear()
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_students_logits_are_never_computed(make: Any) -> None:
    trainer, batch = make(), batch_of(TokenData())
    states = hidden_states(trainer.model, batch)
    shapes: list[tuple[int, ...]] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            shapes.extend(tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    trainer.distillation_loss = {**LOSS, "chunk_rows": 4}
    with Seen():
        trainer.compute_loss(trainer.model, batch).backward()
    assert states.shape in shapes
    assert not any(shape[-1:] == (60,) and shape[:-1].numel() > 16 for shape in map(torch.Size, shapes))
