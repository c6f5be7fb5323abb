"""Reading YAML files: what PyYAML accepts, but for a key that is there twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..system import utf8_text

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, no YAML, or has a key twice; the message has the file.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def once(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
        read = partial(loader.construct_object, deep=True)
        # What << brings in may be there too
        unique([(read(key), None) for key, _ in node.value if key.tag != _MERGE])
        loader.flatten_mapping(node)
        return {read(key): read(value) for key, value in node.value}

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, once)
    text = utf8_text(path)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # an unhashable key is a TypeError
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def unique(pairs: Sequence[tuple[Any, Any]]) -> dict[object, object]:
    """A mapping of these keys and values.

    Raises:
        ValueError: a key is there twice.
    """
    found: dict[object, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found
