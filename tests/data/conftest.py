"""Files of data sets, and a folder of data sets for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from camkd_fast.data import ImageFiles
from tests.support.loader_data import image_files


@pytest.fixture
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMKD_FAST_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    return image_files(tmp_path_factory.mktemp("images"), 36)
