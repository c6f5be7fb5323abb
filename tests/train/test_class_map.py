"""`--class-map`: classes of teachers, said by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camkd_fast.train.class_map import Classes, ClassMap

OURS = Classes("the images", 3, ("ant", "bee", "cat"))
UNNAMED = Classes("the images", 3, None)
THEIRS = Classes("teacher t", 5, ("Formica", "Apis", "Felis", "Canis", "7"))


def order(tmp_path: Path, text: str, name: str = "m.yaml", ours: Classes = OURS, theirs: Classes = THEIRS) -> Any:
    file = tmp_path / name
    file.write_text(text)
    return ClassMap.read(file, ("runs/t", "timm:x@a")).order("runs/t", theirs, ours)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ant: Canis\nbee: Formica\ncat: Felis\n", "m.yaml"),
        ("cat: 2\nant: 3\nbee: '0'\n", "m.yml"),
        ('{"0": "Canis", "1": 0, "cat": "2"}', "m.json"),
        ('{"ant": 3,\n\t"bee": 0,\n\t"cat": 2}', "M.JSON"),
        ("runs/t/: {ant: 3, bee: 0, cat: 2}\ntimm:x@a: {ant: 0, bee: 1, cat: 2}\n", "m.yaml"),
    ],
)
def test_by_name_or_number_for_all_or_for_each(tmp_path: Path, text: str, name: str) -> None:
    assert order(tmp_path, text, name) == [3, 0, 2]


def test_a_name_that_is_a_number_is_a_name(tmp_path: Path) -> None:
    digits = Classes("the images", 2, ("1", "0"))
    assert order(tmp_path, "1: 7\n0: 3\n", ours=digits) == [4, 3]
    assert order(tmp_path, "1: 2\n0: 3\n", ours=Classes("the images", 2, None)) == [3, 2]


def test_a_teacher_that_the_file_does_not_name_has_none(tmp_path: Path) -> None:
    assert order(tmp_path, "timm:x@a: {ant: 0, bee: 1, cat: 2}\n") is None


def test_names_are_compared_in_their_normal_form(tmp_path: Path) -> None:
    assert order(tmp_path, "cafe\u0301: 1\n", ours=Classes("the images", 1, ("caf\u00e9",))) == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ant: 0\nbee: 1\n", r"m.yaml lacks class 'cat' of the images$"),
        ("{}", r"must map classes of the images to classes of a teacher, got {}$"),
        ("[1, 2]", r"must map classes .*, got \[1, 2\]$"),
        ("ant: 0\nbee: 1\ncta: 2\n", r"m.yaml: no class of the images is called 'cta'; nearest: cat$"),
        ("ant: 0\nbee: 1\n3: 2\n", r"m.yaml: class 3 of the images must lie in \[0, 3\)$"),
        ("ant: 0\nbee: 1\n-1: 2\n", r"class -1 of the images must lie in \[0, 3\)$"),
        ("ant: 0\nbee: 1\ncat: 5\n", r"class 5 of teacher t must lie in \[0, 5\)$"),
        ("ant: 0\nbee: 1\ncat: Leo\n", r"no class of teacher t is called 'Leo'; there are 5$"),
        ("ant: 0\nbee: 1\n2: 2\ncat: 3\n", r"class 'cat' of the images is there twice$"),
        ("ant: 0\nant: 1\n", r"m.yaml is not YAML: 'ant' is there twice$"),
        ("ant: 0\nbee: 0\ncat: 2\n", r"'ant' and 'bee' of the images are both class 'Formica' of teacher t$"),
        ("no: 0\nbee: 1\ncat: 2\n", r"class False of the images must be a name or a number; put names in quotes$"),
        ("ant: 0\nbee: [1]\ncat: 2\n", r"class \[1\] of teacher t must be a name or a number"),
        ("runs/t: {ant: 0}\nx: 1\n", r"has a mapping for 'runs/t', but not for 'x': give one mapping for all"),
        ("runs/x: {ant: 0}\n", r"names 'runs/x', but the teachers are runs/t, timm:x@a$"),
        ("runs/t: {ant: 0}\n", r"lacks class 'bee', 'cat' of the images$"),
        ("a: b: c", r"m.yaml is not YAML: mapping values"),
        ("[a, b]: 1", r"is not YAML: unhashable"),
        ("!!python/object/apply:os.getcwd []", r"is not YAML: could not determine a constructor"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        order(tmp_path, text)
    assert str(tmp_path / "m.yaml") in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_where_names_are_unknown_or_double(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks class 0, 2 of the images"):
        order(tmp_path, "1: 0\n", ours=UNNAMED)
    double = Classes("teacher t", 3, ("crane", "crane", "x"))
    with pytest.raises(ValueError, match=r"2 classes of teacher t are called 'crane': give its number$"):
        order(tmp_path, "0: crane\n1: 1\n2: 2\n", theirs=double)
    assert order(tmp_path, "0: 1\n1: 0\n2: x\n", theirs=double) == [1, 0, 2]


@pytest.mark.parametrize("text", ['{"ant": 0, "ant": 1}', "{ant: 0}", "\ud800"])
def test_json_that_is_none_or_has_a_class_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"m.json is not JSON: "):
        ClassMap.read(tmp_path / "m.json", ())


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ClassMap.read(tmp_path / "none.json", ())
