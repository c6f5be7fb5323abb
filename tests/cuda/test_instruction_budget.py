"""Machine instructions in the loops of the row kernel, which its time is proportional to. No GPU is needed.

A committed budget for bfloat16 and three teachers on Hopper: instructions of a warp per slot, that is a 16-byte vector
of the student and of each teacher per lane. docs/performance.md says why they matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda.test_offline_compile import ROOT, cuobjdump, run  # skips without nvcc

ARCH = "sm_90"
STREAMS, COLUMNS = 4, 8  # of a slot
EXPONENTIALS = STREAMS * COLUMNS  # of a slot, in each of the two loops
BUDGET = {"sums": 270, "gradient": 180}
POWERS = 3  # T = 1, 2 and 4 have loops of their own

SOURCE = """
#include "row_loss/pipeline.cuh"
namespace camkd::cuda {
const void* const kernels[] = {reinterpret_cast<const void*>(&row_loss_kernel<bf16, false, 3>),
                               reinterpret_cast<const void*>(&row_loss_kernel<bf16, true, 3>),
                               reinterpret_cast<const void*>(&pipelined_kernel<bf16, 3>)};
}
"""


class Loop(NamedTuple):
    """An innermost loop: its instructions, and how many there are of each mnemonic with `.128` for 16 bytes."""

    instructions: int
    counts: Counter[str]

    @property
    def kind(self) -> str | None:
        """Which loop over whole vectors it is, of the two that take the time."""
        if self.counts["MUFU.EX2"] == 0 or self.counts["MUFU.EX2"] % EXPONENTIALS:
            return None
        if self.counts["LDS.128"] < STREAMS * self.slots:
            return None
        memory = [self.counts[name] / self.slots for name in ("STG", "STG.128", "LDGSTS.128")]
        # Without the copies it is the gradient of a row that no other row follows.
        return {(0, 0, 0): "sums", (0, 1, STREAMS): "gradient"}.get(tuple(memory))

    @property
    def slots(self) -> int:
        """Slots of an iteration: the loop may be unrolled."""
        return self.counts["MUFU.EX2"] // EXPONENTIALS


def instructions(sass: str) -> Iterator[tuple[str, dict[int, str]]]:
    """Kernels and their instructions by address, from the output of `cuobjdump -sass`."""
    for part in sass.split("Function : ")[1:]:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", part)
        yield part.split()[0], {int(address, 16): text for address, text in found}


def mnemonic(text: str) -> str:
    name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    base = ".".join(name.split(".")[:2]) if name.startswith("MUFU") else name.partition(".")[0]
    return base + (".128" if ".128" in name else "")


def innermost_loops(code: dict[int, str]) -> Iterator[Loop]:
    """Loops that contain no other one; a loop ends with a branch backwards."""
    spans = []
    for address, text in code.items():
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        names = [mnemonic(text) for address, text in code.items() if first <= address <= last]
        yield Loop(len(names), Counter(names))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    folder: Path = tmp_path_factory.mktemp("budget")
    (folder / "kernels.cu").write_text(SOURCE)
    cubin = folder / "kernels.cubin"
    target = ["-gencode", f"arch={ARCH.replace('sm', 'compute')},code={ARCH}"]
    run(
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-I{ROOT / 'csrc' / 'cuda'}",
        *target,
        "-cubin",
        folder / "kernels.cu",
        "-o",
        cubin,
    )
    return dict(instructions(run(cuobjdump(), "-sass", cubin)))


@pytest.mark.parametrize("kind", BUDGET)
def test_loops_within_the_budget(kernels: dict[str, dict[int, str]], kind: str) -> None:
    assert len(kernels) == 3
    for name, code in kernels.items():
        loops = [loop for loop in innermost_loops(code) if loop.kind == kind]
        # The pipelined kernel has another gradient for even rows
        copies = 2 if "pipelined" in name and kind == "gradient" else 1
        assert len(loops) == POWERS * copies, f"{name}: {len(loops)} loops of this kind"
        for loop in loops:
            per_slot = loop.instructions / loop.slots
            assert per_slot <= BUDGET[kind], f"{name}: {per_slot} instructions per slot, {dict(loop.counts)}"


def test_the_count_of_a_loop() -> None:
    """A loop of two instructions inside one of five, with predicates and a branch forwards."""
    lines = [
        "/*0000*/  MOV R1, c[0x0][0x28] ;",
        "/*0010*/  LDS.128 R4, [R2] ;",
        "/*0020*/  @!P0 BRA 0x50 ;",
        "/*0030*/  @P1 MUFU.EX2 R5, R4 ;",
        "/*0040*/  @P1 BRA 0x30 ;",
        "/*0050*/  @!UP0 BRA 0x10 ;",
        "/*0060*/  EXIT ;",
    ]
    ((name, code),) = instructions("\t\tFunction : kernel\n" + "\n".join(lines))
    assert (name, len(code)) == ("kernel", 7)
    (loop,) = innermost_loops(code)
    assert loop == Loop(2, Counter({"MUFU.EX2": 1, "BRA": 1}))
    assert mnemonic("@P0 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]") == "LDGSTS.128"
