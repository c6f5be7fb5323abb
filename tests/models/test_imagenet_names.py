"""WordNet ids from descriptions, with a small table in place of timm's.

`test_installed_teachers.py` has the real one.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from camkd_fast.models import imagenet_names
from camkd_fast.models.imagenet_names import is_wordnet_id, wordnet_ids

SMALL = {
    "n00000001": "tench, Tinca tinca",
    "n00000002": "crane",
    "n00000003": "great white shark, white shark",
    "n00000004": "crane",
}
LARGE = {**SMALL, "n00000005": "bus, coach", "n00000006": "trainer, coach", "n00000007": "tench"}


@pytest.fixture(autouse=True)
def _timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def info(subset: str) -> Any:
        table = {"imagenet-1k": SMALL, "imagenet-22k": LARGE}[subset]
        return SimpleNamespace(
            label_names=lambda: list(table), label_name_to_description=lambda name, detailed: table[name]
        )

    monkeypatch.setitem(sys.modules, "timm.data", SimpleNamespace(ImageNetInfo=info))
    monkeypatch.setattr(imagenet_names, "_SETS", {4: "imagenet-1k", 7: "imagenet-22k"})


def test_classes_in_the_known_order_are_known_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wordnet_ids(["tench", "crane", "white shark", "Crane"]) == list(SMALL)
    assert wordnet_ids(list(LARGE.values())) == list(LARGE)
    words = ["tench", "crane bird", "white shark", "crane"]  # as torchvision has it
    assert wordnet_ids(words)[1] == "crane bird"
    monkeypatch.setattr(imagenet_names, "_IN_ORDER", 0.75)
    assert wordnet_ids(words) == list(SMALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tench", "n00000001"),  # also in the larger set, where another class has the word
        ("TINCA TINCA", "n00000001"),
        (" white shark ", "n00000003"),
        ("great white shark, white shark", "n00000003"),
        ("bus", "n00000005"),
        ("crane", "crane"),
        ("coach", "coach"),
        ("bus, coach", "n00000005"),
        ("whale", "whale"),
    ],
)
def test_other_classes_by_a_word_that_only_one_has(text: str, expected: str) -> None:
    assert wordnet_ids([text]) == [expected]
    assert wordnet_ids(["whale", text, "no class"]) == ["whale", expected, "no class"]


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data", None)
    assert wordnet_ids(["tench"]) is None


def test_ids() -> None:
    assert is_wordnet_id("n01440764")
    assert not any(map(is_wordnet_id, ("n0144076", "tench", "N01440764", "n01440764x")))
