"""ImageNet's classes by WordNet id and by description. The table is timm's, which is optional and imported on use."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

_ID = re.compile(r"n\d{8}")
# Numbers of classes -> timm's name of the set with as many, in whose order models have their logits.
_SETS = {1000: "imagenet-1k", 11221: "imagenet-21k-miil", 11821: "imagenet-12k", 21841: "imagenet-22k"}
_IN_ORDER = 0.99  # of the descriptions; torchvision changed two of the thousand, which are not unique


def is_wordnet_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None


def wordnet_ids(descriptions: Sequence[str]) -> list[str] | None:
    """The WordNet id of each class; the description itself where it names no class, or several.

    A description is the list of a class's words ("tench, Tinca tinca") or one of them. As many classes as in an
    ImageNet, in its order, are known by their position.

    Returns:
        None if timm is not installed.
    """
    try:
        data = importlib.import_module("timm.data")
    except ModuleNotFoundError:
        return None
    if len(descriptions) in _SETS:
        info = data.ImageNetInfo(_SETS[len(descriptions)])
        ids: list[str] = info.label_names()
        words = [_words(info.label_name_to_description(name, detailed=False)) for name in ids]
        equal = sum(not its.isdisjoint(_words(text)) for its, text in zip(words, descriptions, strict=True))
        if equal >= _IN_ORDER * len(ids):
            return ids
    found = list(descriptions)
    for subset in ("imagenet-1k", "imagenet-22k"):  # fewer classes share a word in the first
        named = _named(data.ImageNetInfo(subset))
        for position, text in enumerate(descriptions):
            meant = named.get(text.strip().casefold()) or set().union(*(named.get(word, ()) for word in _words(text)))
            if found[position] == text and len(meant) == 1:
                found[position] = next(iter(meant))
    return found


def _named(info: Any) -> dict[str, set[str]]:
    """The ids of the classes that have a word."""
    named: dict[str, set[str]] = {}
    for name in info.label_names():
        for word in _words(info.label_name_to_description(name, detailed=False)):
            named.setdefault(word, set()).add(name)
    return named


def _words(description: str) -> set[str]:
    """The list as a whole, and its words."""
    text = description.strip().casefold()
    return {text, *(word.strip() for word in text.split(","))}
