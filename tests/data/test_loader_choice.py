"""The loader that `auto` picks, and why another cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from camkd_fast.data import LoaderConfig, choose
from tests.support.loader_data import CROP, arrays, image_files, opened


def test_auto_keeps_arrays_that_fit_in_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = arrays(100), LoaderConfig(16, augmentation=CROP)
    assert choose.explain(data, config).startswith("resident: 0 MB of images, ")
    with opened(data, "auto") as loader:
        assert type(loader).__name__ == "ResidentLoader"
    need = 100 * 3 * 18 * 18
    monkeypatch.setattr(choose, "free_bytes", lambda device: 2 * need - 1)
    assert "of which resident images may take 50%" in choose.explain(data, config)
    assert choose.pick(data, config)[0] == "torch"
    with opened(data, "resident", augmentation=CROP) as loader:  # by name it may use all free memory
        assert len(loader) == 7
    monkeypatch.setattr(choose, "free_bytes", lambda device: need - 1)
    with pytest.raises(NotImplementedError, match=f"{need} bytes of images, {need - 1} bytes free on cpu"):
        choose.loader(data, config, "resident")


def test_auto_picks_dali_for_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    data, config = image_files(tmp_path, 4), LoaderConfig(2)
    assert choose.explain(data, config) == "dali: 4 image files to decode"
    with pytest.raises(NotImplementedError, match="'resident' cannot run here: 4 image files are not in memory"):
        choose.loader(data, config, "resident")
    other = replace(config, device=torch.device("mps"))
    assert choose.explain(data, other) == "torch: DALI supports cpu and cuda, not mps"
    monkeypatch.setattr(choose, "_installed", lambda module: False)
    assert choose.explain(data, config).startswith("torch: NVIDIA DALI is not installed")
    with pytest.raises(NotImplementedError, match="'dali' cannot run here: NVIDIA DALI is not installed"):
        choose.loader(data, config, "dali")


def test_unknown_loader_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'resident', 'dali', 'torch'.*'ffcv'"):
        choose.loader(arrays(), LoaderConfig(2), "ffcv")


def test_free_memory_is_below_physical_memory() -> None:
    assert 2**20 < choose.free_bytes(torch.device("cpu")) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_arrays_need_neither_pillow_nor_dali() -> None:
    program = """
import sys
sys.modules.update({"PIL": None, "nvidia": None, "sklearn": None})
import torch
from camkd_fast.data import Augmentation, ImageFiles, LabelledImages, LoaderConfig, choose
data = LabelledImages(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), 1, (0.0,), (1.0,))
config = LoaderConfig(4, augmentation=Augmentation())
assert [len(batch.target) for batch in choose.loader(data, config)] == [4, 5]
print(choose.explain(ImageFiles((), data.labels, 1, ("a",), (0.0,), (1.0,), 8), config))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("torch: NVIDIA DALI is not installed")
