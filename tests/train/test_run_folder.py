"""Which run may write to a folder: its own on resume, none that would remove what it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from camkd_fast.train import config_file, run_folder
from camkd_fast.train.config import DataConfig, DistillConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.run_folder import RunExistsError

RESUMED = TeachConfig("resnet8", data=DataConfig(images=40, workers=1), optim=OptimConfig(epochs=2))


@pytest.mark.parametrize(
    "config",
    [
        replace(RESUMED, seed=1),
        replace(RESUMED, model="resnet14"),
        replace(RESUMED, data=replace(RESUMED.data, views=2)),
        replace(RESUMED, optim=replace(RESUMED.optim, weight_decay=0.1)),
        replace(RESUMED, precision=PrecisionConfig(dtype="bfloat16")),
    ],
)
def test_a_run_goes_on_under_its_own_settings_only(config: TeachConfig, tmp_path: Path) -> None:
    run_folder.prepare(replace(RESUMED, out=tmp_path), resume=False)
    with pytest.raises(RunExistsError, match="cannot be resumed"):
        run_folder.check_unused(replace(config, out=tmp_path), resume=True, overwrite=False)
    free = replace(RESUMED, out=tmp_path, data=replace(RESUMED.data, workers=4, root=tmp_path))
    run_folder.check_unused(free, resume=True, overwrite=False)


def test_a_run_goes_on_with_its_own_teachers_only(tmp_path: Path) -> None:
    config = DistillConfig(teachers=(Path("a"), Path("b")), out=tmp_path)
    run_folder.prepare(config, resume=False)
    run_folder.check_unused(config, resume=True, overwrite=False)
    for teachers in ((Path("a"),), (Path("b"), Path("a"))):
        with pytest.raises(RunExistsError, match="teachers"):
            run_folder.check_unused(replace(config, teachers=teachers), resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("before", "after", "goes_on"),
    [
        (None, Path("c"), False),
        (Path("c"), None, False),
        (Path("c"), Path("moved"), True),
        (None, None, True),
    ],
)
def test_a_run_goes_on_with_a_cache_or_without_as_it_began(
    before: Path | None, after: Path | None, goes_on: bool, tmp_path: Path
) -> None:
    """A cache has pooled maps, so the feature loss is another one with it."""
    config = DistillConfig(teachers=(Path("a"),), teacher_cache=before, data=DataConfig(views=2), out=tmp_path)
    run_folder.prepare(config, resume=False)
    changed = replace(config, teacher_cache=after)
    if goes_on:
        run_folder.check_unused(changed, resume=True, overwrite=False)
    else:
        values = "None instead of 'c'" if before is None else "'c' instead of None"
        with pytest.raises(RunExistsError, match=f"it was started with teacher_cache {values}: --resume with"):
            run_folder.check_unused(changed, resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("name", "free"),
    [
        *(("out", True), ("outer_steps", False), ("data.root", True), ("data.root_classes", False)),
        *(("log.validate_every", True), ("log", False), ("logits", False), ("teacher_cache_views", False)),
    ],
)
def test_settings_are_free_by_their_whole_name_or_by_their_group(name: str, free: bool) -> None:
    assert run_folder.is_free(name) == free


@pytest.mark.parametrize(
    "source",
    [
        "{0}", "{0}/", "{0}/model.safetensors", "{0}/checkpoints/step-1/model.safetensors", "{1}", "{1}#layer3",
        "{1}?size=32", "{1}#layer3?size=32", "resnet8@{1}/model.safetensors", "hf:{0}",
    ],
)  # fmt: skip
def test_a_run_does_not_overwrite_what_it_starts_from(source: str, tmp_path: Path) -> None:
    out, link = tmp_path / "t", tmp_path / "link"
    (out / "checkpoints" / "step-1").mkdir(parents=True)
    for folder in (out, out / "checkpoints" / "step-1"):
        (folder / "model.safetensors").touch()
    link.symlink_to(out)
    source = source.format(out, link)
    for config in (DistillConfig(teachers=("elsewhere", source), out=out), DistillConfig(init=source, out=out)):
        with pytest.raises(ValueError, match=r"cannot be overwritten: .*, from which this run starts, is in it"):
            run_folder.check_unused(config, resume=False, overwrite=True)
        run_folder.check_unused(replace(config, out=tmp_path / "t2"), resume=False, overwrite=True)


def test_other_files_in_the_folder_of_a_run_stay(tmp_path: Path) -> None:
    inside = tmp_path / "teachers" / "t0"
    inside.mkdir(parents=True)
    config = DistillConfig(teachers=(str(inside), "timm:resnet18", "hf:org/name"), out=tmp_path)
    run_folder.check_unused(config, resume=False, overwrite=True)


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its config has run folders as teachers, and lacks later settings."""
    config = DistillConfig(teachers=(Path("runs/t$0"), tmp_path / "t1"), out=tmp_path)
    run_folder.prepare(config, resume=False)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["teachers"] == ["runs/t$$0", str(tmp_path / "t1")]
    for later in ("class_map", "init"):
        assert written.pop(later) is None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    run_folder.check_unused(config, resume=True, overwrite=False)
    assert config_file.load(tmp_path / "config.yaml") == config
