"""mkdocs hooks: pages that are made of files outside docs/, and the help texts of the command line."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The Markdown of a page before it is rendered."""
    name = page.file.src_path
    if name in INCLUDED:
        # Links of the root's files start with docs/; those of the site do not.
        return (ROOT / INCLUDED[name]).read_text().replace("](docs/", "](")
    return re.sub(r"^\{\{ help (.+) \}\}$", lambda match: f"```text\n{help_text(match[1])}```", markdown, flags=re.M)


def help_text(command: str) -> str:
    """Output of `camkd-fast COMMAND --help`, 100 columns wide and without colours."""
    from camkd_fast.cli import main

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()).rstrip() + "\n"
