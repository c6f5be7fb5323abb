"""`python -m tests.mutants`: which wrong changes do the tests notice?

Exit status 1 if fewer than 95 % of the changes that are not equivalent were noticed, 2 if the tests fail without any
change. Logs and results: build/mutants/. A pass takes hours, so results may be committed (`--record`), and the next
pass runs what has changed since (`--resume`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from . import AREAS, Change, load
from .scratch import HUNG, ROOT, BuildError, Tree, seconds_of

FOLDER = ROOT / "build" / "mutants"
RESULTS = "results.jsonl"
RECORD = Path(__file__).parent / RESULTS  # committed
SHARE = 0.95  # of the changes that must be noticed
FAILED, INTERRUPTED = 1, 2  # pytest's exit codes of a failed test and of a module that cannot be imported


@dataclass(frozen=True)
class Outcome:
    """What became of one change: "caught", "survived" or "broken" (it does not compile, or its tests do not run)."""

    change: Change
    result: str
    by: str = ""  # the test that failed, or what is wrong with the entry
    seconds: float = 0.0

    @property
    def record(self) -> dict[str, Any]:
        """The line of results.jsonl."""
        found = {"title": self.change.title, "result": self.result, "by": self.by, "seconds": self.seconds}
        return {**found, "key": key_of(self.change)}


def key_of(change: Change) -> str:
    """Hash of what a result depends on in the first place: the change, its file and the files of its tests."""
    files = [change.file, *(test.partition("::")[0] for test in change.tests.split())]
    digest = hashlib.sha256(repr(change).encode())
    for path in (ROOT / name for name in files):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept(listed: Iterable[Change], paths: Iterable[Path]) -> list[Outcome]:
    """The results in these files whose change, file and tests are as they were; the last one of each counts."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    by_key = {record["key"]: record for record in map(json.loads, lines)}
    found = [(change, by_key[key]) for change in listed if (key := key_of(change)) in by_key]
    return [Outcome(change, record["result"], record["by"], record["seconds"]) for change, record in found]


def recorded(outcomes: Iterable[Outcome]) -> str:
    """Lines of results in the order of the list, in whole seconds."""
    return "".join(json.dumps({**outcome.record, "seconds": round(outcome.seconds)}) + "\n" for outcome in outcomes)


def chosen(every: Iterable[Change], only: Sequence[str]) -> list[Change]:
    """The changes of these areas, or whose titles contain one of these words; all without words."""
    return [c for c in every if not only or any(word == c.area if word in AREAS else word in c.title for word in only)]


def named_tests(listed: Iterable[Change]) -> list[str]:
    """All named tests once, in order."""
    return list(dict.fromkeys(test for change in listed for test in change.tests.split()))


def outcome(tree: Tree, change: Change, limit: float) -> Outcome:
    start = time.perf_counter()
    try:
        with tree.changed(change):
            code = tree.pytest(change.tests.split(), limit)
    except BuildError as error:
        return Outcome(change, "broken", f"does not compile: {error}", seconds_of(start))
    if code == 0:
        return Outcome(change, "survived", "", seconds_of(start))
    if code == HUNG:
        return Outcome(change, "caught", f"still running after {limit:g} s", seconds_of(start))
    if code in (FAILED, INTERRUPTED) or code < 0:  # negative: a signal, such as a segmentation fault
        return Outcome(change, "caught", tree.last_failure() or f"exit code {code}", seconds_of(start))
    return Outcome(change, "broken", f"pytest exit code {code}: {change.tests}", seconds_of(start))


def run(listed: Sequence[Change], jobs: int, limit: float, folder: Path) -> list[Outcome] | None:
    """Outcomes in the order of the list; None if the unchanged tree fails."""
    waiting: SimpleQueue[tuple[int, Change]] = SimpleQueue()
    for item in enumerate(listed):
        waiting.put(item)
    found: dict[int, Outcome] = {}
    printing = Lock()

    def work(tree: Tree) -> None:
        while True:
            try:
                position, change = waiting.get_nowait()
            except Empty:
                return
            found[position] = done = outcome(tree, change, limit)
            with printing, (folder / RESULTS).open("a") as file:
                print(f"{done.result:9} {done.seconds:6.1f} s  {change.title}  {done.by}", flush=True)
                file.write(json.dumps(done.record) + "\n")

    trees = [Tree(folder / f"worker-{i}") for i in range(min(jobs, max(len(listed), 1)))]
    try:
        print("the unchanged tree", flush=True)
        if trees[0].pytest(named_tests(listed), 20 * limit) != 0:
            print(trees[0].log.read_text()[-5000:])
            return None
        threads = [Thread(target=work, args=(tree,)) for tree in trees]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for tree in trees:
            tree.close()
    return [found[position] for position in sorted(found)]


def summary(outcomes: Sequence[Outcome], equivalent: int) -> str:
    counts = {r: sum(o.result == r for o in outcomes) for r in ("caught", "survived", "broken")}
    lines = [
        f"{o.change.title} ({o.change.file})\n  {o.by or o.change.tests}" for o in outcomes if o.result != "caught"
    ]
    share = 100 * counts["caught"] / max(len(outcomes), 1)
    numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([*lines, f"{len(outcomes)} changes: {numbers} ({share:.1f} % caught); {equivalent} equivalent"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="areas, or words of titles")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    parser.add_argument("--resume", action="store_true", help="keep results whose change, file and tests are unchanged")
    parser.add_argument("--record", action="store_true", help="also write all such results to tests/mutants")
    parser.add_argument("--jobs", type=int, default=1, help="changes at the same time, each in a copy of its own")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a run counts as a hang")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for copies, logs and results")
    arguments = parser.parse_args()
    listed = chosen(load(), arguments.only)
    if arguments.list:
        for change in listed:
            print(change.title, f"[equivalent: {change.equivalent}]" if change.equivalent else "", change.file)
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = [RECORD, arguments.folder / RESULTS]
    effective = [change for change in listed if not change.equivalent]
    before = kept(effective, results) if arguments.resume else []
    known = {outcome.change for outcome in before}
    left = [change for change in effective if change not in known]
    found = run(left, arguments.jobs, arguments.limit, arguments.folder) if left else []
    if found is None:
        print("the tests fail without any change")
        return 2
    if arguments.record:
        RECORD.write_text(recorded(kept((change for change in load() if not change.equivalent), results)))
    outcomes = [*before, *found]
    print(summary(outcomes, len(listed) - len(effective)))
    return int(sum(o.result == "caught" for o in outcomes) < SHARE * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
