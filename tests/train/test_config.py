"""Configs: YAML round trip, rejected values, descriptions of all fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from camkd_fast.train.config import (
    DataConfig,
    DistillConfig,
    LogConfig,
    OptimConfig,
    PrecisionConfig,
    TeachConfig,
)
from camkd_fast.train.config_file import differences, load, save

PARTS = (DataConfig, OptimConfig, PrecisionConfig, LogConfig)


@pytest.mark.parametrize(
    "config",
    [
        TeachConfig(),
        DistillConfig(),
        TeachConfig(
            model="vgg8",
            wrong_labels=0.25,
            swapped=(3, 5),
            out=Path("a b/c"),
            data=DataConfig(data="folder", root=Path("/x")),
        ),
        DistillConfig(
            teachers=(Path("t0"), Path("t1")),
            beta=16.7,
            teacher_cache=Path("cache"),
            data=DataConfig(views=4, flip=False),
            optim=OptimConfig(learning_rate=1e-5, milestones=(0.5,), weight_decay=0.0),
            precision=PrecisionConfig(dtype="bfloat16", compile="on"),
            log=LogConfig(checkpoint_minutes=0),
        ),
    ],
    ids=["teach", "distill", "teach, changed", "distill, changed"],
)
def test_yaml_round_trip(tmp_path: Path, config: TeachConfig | DistillConfig) -> None:
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert not differences(load(tmp_path / "config.yaml"), config)


def test_a_file_by_hand_may_leave_fields_out(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("job: teach\nmodel: vgg8\noptim:\n  learning_rate: 5e-4\n  epochs: 3\n")
    assert load(path) == TeachConfig(model="vgg8", optim=OptimConfig(epochs=3, learning_rate=5e-4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("job: tech", "job must be one of teach, distill, got 'tech'"),
        ("[1, 2]", "job must be one of teach, distill, got None"),
        ("job: teach\nmodle: vgg8", "unknown field modle; did you mean model?"),
        ("job: teach\noptim: {epoch: 3}", "unknown field optim.epoch; did you mean optim.epochs?"),
        ("job: teach\noptim: {epochs: three}", "optim.epochs must be int, got 'three'"),
        ("job: teach\noptim: {epochs: true}", "optim.epochs must be int, got True"),
        ("job: teach\noptim: {epochs: 0}", "epochs must be at least 1, got 0"),
        ("job: teach\noptim: 3", "optim must be a mapping, got 3"),
        ("job: teach\ndata: {loader: tape}", "data.loader must be 'auto', 'resident', 'dali', 'torch', got 'tape'"),
        ("job: distill\nteachers: runs/t0", "teachers must be a list, got 'runs/t0'"),
        ("job: teach\n  model: x: y", "is not YAML"),
        ("job: [teach]", "job must be one of teach, distill, got ['teach']"),
        ("job: teach\noptim: {epochs: 3, epochs: 4}", "is not YAML: 'epochs' is there twice"),
        ("job: teach\noptim: {betas: [0.9]}", "betas must be two numbers, got (0.9,)"),
        ("job: teach\noptim: {betas: 0.9}", "optim.betas must be a list, got 0.9"),
    ],
)
def test_invalid_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_merged_keys_of_yaml_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("job: teach\noptim:\n  <<: {epochs: 3, batch_size: 7}\n  epochs: 4\n")
    assert (load(path).optim.epochs, load(path).optim.batch_size) == (4, 7)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (DataConfig, {"validation": 1.0}, "validation must lie in [0, 1), got 1.0"),
        (DataConfig, {"views": 0}, "views must be at least 1, got 0"),
        (DataConfig, {"augmentation": "cutout"}, "got 'cutout'"),
        (DataConfig, {"split_seed": 2**64}, "split_seed must lie in [-2**63, 2**64), got 18446744073709551616"),
        (TeachConfig, {"seed": -(2**63) - 1}, "seed must lie in [-2**63, 2**64), got -9223372036854775809"),
        (DistillConfig, {"seed": 2**64}, "seed must lie in [-2**63, 2**64), got 18446744073709551616"),
        (OptimConfig, {"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        (OptimConfig, {"learning_rate": float("nan")}, "got nan"),
        (OptimConfig, {"milestones": (0.8, 0.5)}, "got (0.8, 0.5)"),
        (OptimConfig, {"milestones": (0.5, 150.0)}, "fractions between 0 and 1, or epochs from 1 on, got (0.5, 150.0)"),
        (OptimConfig, {"warmup": 240.0}, "warmup must lie in [0, epochs), got 240.0 of 240 epochs"),
        (OptimConfig, {"momentum": 1.0}, "got 1.0"),
        (OptimConfig, {"betas": (0.9, 0.99, 0.999)}, "betas must be two numbers, got (0.9, 0.99, 0.999)"),
        (OptimConfig, {"drop": 0.0}, "got 0.0"),
        (PrecisionConfig, {"dtype": "float8"}, "got 'float8'"),
        (PrecisionConfig, {"compile": "yes"}, "got 'yes'"),
        (LogConfig, {"log_every": 0}, "log_every must be at least 1, got 0"),
        (LogConfig, {"checkpoint_minutes": float("inf")}, "got inf"),
        (TeachConfig, {"wrong_labels": -0.1}, "got -0.1"),
        (TeachConfig, {"swapped": (3,)}, "swapped must name two different classes, got 3"),
        (TeachConfig, {"swapped": (3, 3)}, "swapped must name two different classes, got 3 3"),
        (TeachConfig, {"swapped": (-1, 3)}, "swapped must name two different classes, got -1 3"),
        (DistillConfig, {"uniform": "both"}, "uniform must be one of none, logits, features, got 'both'"),
        (DistillConfig, {"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        (DistillConfig, {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (DistillConfig, {"teacher_cache": Path("c")}, "needs a fixed number of views, got views None"),
    ],
)
def test_invalid_values_are_refused(kind: type, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        kind(**settings)


@pytest.mark.parametrize("kind", [TeachConfig, DistillConfig])
def test_every_field_has_a_default_a_description_and_a_name_of_its_own(kind: type) -> None:
    names = [f.name for part in (kind, *PARTS) for f in dataclasses.fields(part)]
    nested = {"data", "optim", "precision", "log"}
    assert len([n for n in names if n not in nested]) == len({n for n in names if n not in nested})
    for part in (kind, *PARTS):
        source, hints = inspect.getsource(part), get_type_hints(part, include_extras=True)
        for f in dataclasses.fields(part):
            has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            written = re.search(rf'^    {f.name}: .*\n    """.+\."""$', source, re.MULTILINE)
            built = [doc.documentation for doc in getattr(hints[f.name], "__metadata__", ())]
            described = written or (built and built[0].endswith("."))
            assert has_default and (described or (f.name in nested and f.default_factory in PARTS)), f.name


def test_differences_name_both_values() -> None:
    one, two = TeachConfig(), TeachConfig(seed=3, optim=OptimConfig(epochs=5))
    assert differences(one, two) == {"seed": (0, 3), "optim.epochs": (240, 5)}
    assert differences(one, DistillConfig())["student"] == (None, "vgg8")
