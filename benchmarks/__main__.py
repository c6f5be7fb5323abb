"""`python -m benchmarks SUITE ... [pytest options]`: every suite prints a table and writes a JSON file.

Example: `python -m benchmarks logit_loss --shapes quick -k 64x100`. The options of pytest-benchmark work too
(`--benchmark-autosave --benchmark-compare` to compare commits, `--benchmark-verbose`); its own table is disabled.
"""

from __future__ import annotations

import sys

import pytest

from benchmarks.results import SUITES

# The suites do not test the tree, so they write no cache and no verdict. A compilation may take minutes.
FLAGS = ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--benchmark-quiet", "--override-ini", "timeout=900"]


def main(arguments: list[str]) -> int:
    names = [name for name in arguments if name in SUITES]
    if not names:
        raise SystemExit(f"name one or more of {', '.join(SUITES)}")
    options = [word for word in arguments if word not in SUITES]
    return pytest.main([*FLAGS, *(f"benchmarks/bench_{name}.py" for name in names), *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
