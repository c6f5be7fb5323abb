"""The fingerprint: repeatable, sensitive to one bit, and over everything that a backend computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import fingerprint_cases as cases
from tests.support.backends import WITHOUT_MODULE
from tests.support.fingerprint import combined, digest, digests_of, main
from tests.support.fingerprint_cases import Spec, specs_for
from tests.support.fingerprint_evaluations import evaluate

FEW = "^(loss|module|feature),N=[35],C=(10|100),"
KINDS = ("reference", "cpu-avx2", "triton", "cuda-host")


@pytest.mark.parametrize("name", ["reference"] if WITHOUT_MODULE else ["reference", "cpu-baseline"])
def test_repeatable(name: str) -> None:
    first, second = (dict(digests_of(name, FEW)) for _ in range(2))
    assert len(first) > 2 and first == second
    assert combined(first) == combined(dict(reversed(first.items())))
    changed = first | {next(iter(first)): "0"}
    assert combined(changed) != combined(first)


def test_one_bit_changes_the_hash() -> None:
    results = evaluate(Spec("loss", dtype="bfloat16"), "reference")
    expected = digest(results)
    for name, value in results.items():
        assert value is not None
        flipped = value.detach().clone().contiguous()
        flipped.reshape(-1).view(torch.uint8)[-1] ^= 1
        assert digest(results | {name: flipped}) != expected, name
    assert digest(results | {"loss": results["loss"].double()}) != expected
    assert digest(results | {"loss": results["loss"].view(1)}) != expected


def test_a_nan_is_a_nan() -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001, -0x400000], dtype=torch.int32)
    assert len({digest({"x": nan}) for nan in bits.view(torch.float32)}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_occurs(kind: str) -> None:
    specs = specs_for(kind)
    assert len({spec.name for spec in specs}) == len(specs)
    logit = [s for s in specs if s.entry not in cases.FEATURE_ENTRIES]
    for field in ("weighting", "reduction", "layout", "dtype", "ignored", "columns", "temperature", "gradient"):
        missing = set(cases.LOGIT_OPTIONS[field]) - {getattr(spec, field) for spec in logit}
        assert not missing, f"{field}: {missing}"
    assert {0.0, 1.0} <= {s.hard_weight for s in logit} & {s.soft_weight for s in logit}
    entries = {*cases.LOGIT_ENTRIES, *cases.COMPILED_ENTRIES, *cases.FEATURE_ENTRIES}
    if kind.startswith("cpu"):
        entries -= {"backend mean", "backend mean and grad"}  # but for float64
    assert entries <= {spec.entry for spec in specs}
    assert {0, 1} <= {spec.N for spec in specs} and 1 in {spec.C for spec in specs}
    for entry in ("confidence", "feature"):
        assert {spec.dtype for spec in specs if spec.entry == entry} == set(cases.DTYPES)
    assert {spec.format for spec in specs if spec.entry == "feature"} == set(cases.FORMATS)
    assert {"1", "1024"} <= {spec.loss_scale for spec in specs if spec.entry == "loss and grad"}


def test_each_backend_by_all_of_its_ways() -> None:
    reference, triton, cuda = (specs_for(kind) for kind in ("reference", "triton", "cuda-host"))
    assert len(reference) >= 400
    assert {spec.K for spec in reference} == set(range(1, 17))
    assert "float64" in {spec.dtype for spec in reference}
    assert {(s.N == 1, s.K) for s in reference if s.C >= 70_000} >= {(True, 3), (False, 16)}
    assert {spec.K > 6 for spec in triton} == {True, False} and any(spec.C > 4096 for spec in triton)
    for regime in ("table", "cluster", "batches"):
        assert {1, 2, 3, 4, 5} < {spec.K for spec in cuda if spec.regime == regime}


def test_command_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, before, after = "^loss,N=(3|5),C=10,", tmp_path / "before.txt", tmp_path / "after.txt"
    lines = [f"{value} reference {name}" for name, value in digests_of("reference", pattern)]
    assert len(lines) > 2
    before.write_text("\n".join(["0" * 64 + lines[0][64:], *lines[1:]]))
    arguments = ["--backend", "reference", "--cases", pattern, "--dump", str(after), "--against", str(before)]
    assert main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [lines[0].split(" ", 1)[1]]
    assert sorted(after.read_text().splitlines()) == sorted(lines)
