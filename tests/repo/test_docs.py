"""The documentation: links, examples, public names, length. Its words are checked in test_structure.py."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path

import pytest

import camkd_fast

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if re.search(r"^```(pycon|python)$", page.read_text(), re.MULTILINE)]


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs derive it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_is_short() -> None:
    words = len((ROOT / "README.md").read_text().split())
    assert words <= 900, f"README.md has {words} words, at most 900 are allowed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}, which has no such heading"


def test_files_that_the_map_names_exist() -> None:
    """Of several files in one table cell the first names the folder."""
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        folder = ROOT
        for name in re.findall(
            r"`([\w./*]+(?:/|\.(?:py|h|cuh|cpp|cmake|yaml)))`", line.replace("bench_NAME", "bench_*")
        ):
            if "/" in name:
                folder = (ROOT / name).parent if not name.endswith("/") else ROOT / name
                found = [*ROOT.glob(name.rstrip("/"))]
            else:
                found = [*folder.glob(name)] or [*ROOT.glob(f"*/**/{name}")]
            assert found, f"CONTRIBUTING.md names {name}"


@pytest.mark.parametrize("folder", ["camkd_fast/losses", "camkd_fast/backends", "csrc"])
def test_the_map_names_every_file(folder: str) -> None:
    """Of folders whose files it lists one by one."""
    names = re.findall(r"[`/](\w+\.\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    files = [path.name for kind in ("*.py", "*.h") for path in (ROOT / folder).glob(kind) if path.name != "__init__.py"]
    assert len(files) > 4 and not set(files) - set(names)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share their names: `pycon` blocks are doctests, `python` blocks just run."""
    text = page.read_text()
    if page.name == "language_models.md":
        pytest.importorskip("trl")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.chdir(tmp_path)
        # transformers would take the folder `kernels` at the root for a package of that name.
        monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), names)
    blocks = "\n".join(re.findall(r"^```pycon\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    test = doctest.DocTestParser().get_doctest(blocks, names, page.name, str(page), 0)
    output: list[str] = []
    result = doctest.DocTestRunner().run(test, out=output.append)
    assert not result.failed, "".join(output)


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for name in camkd_fast.__all__:
        assert re.search(rf"^::: camkd_fast\.{name}$|`camkd_fast\.{name}`", text, re.MULTILINE), name


def test_the_command_line_page_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    from camkd_fast.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    match = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)
    assert match is not None
    text = (ROOT / "docs" / "cli.md").read_text()
    for command in match[1].split(","):
        assert f"[`{command}`](#{command})" in text and f"\n## {command}\n" in text, command


def test_the_checks_see_what_they_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("[x](missing.md)\n")
    with pytest.raises(AssertionError, match=r"links to missing\.md"):
        test_links_resolve(page)
    page.write_text("```pycon\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match="Expected"):
        test_examples_run(page, tmp_path, monkeypatch)
