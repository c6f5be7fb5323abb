"""Export: ONNX and torch.export agree with the model for any batch size; a file that differs is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models.model_file import model_bytes
from camkd_fast.train import export as exporting
from camkd_fast.train.export import METADATA, ONNX, PROGRAM, TOLERANCE, ExportError, export
from camkd_fast.train.run_folder import load_model

MEAN, STD = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
CLASSES = "cdabgfe"


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(folder: Path, name: str, size: int = 8) -> Path:
    """A finished run's folder, with trained batch-norm statistics."""
    model = models.create(name, num_classes=7)
    model.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model(2 * torch.randn(8, 3, size, size, generator=generator) + 0.5)
    metadata = {"model": name, "num_classes": 7, "in_channels": 3, "data": "cifar10", "size": [size, size]}
    metadata["class_names"] = list(CLASSES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(model_bytes(model, {**metadata, "mean": MEAN, "std": STD}))
    return folder


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.dtype == torch.float32
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize(
    ("name", "folded"),
    [("resnet8", True), ("resnet8", False), pytest.param("shufflenetv2", True, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_both_files_compute_what_the_model_computes(tmp_path: Path, name: str, folded: bool) -> None:
    run = trained(tmp_path, name)
    done = export(run, folded=folded)
    assert (done.onnx, done.program) == (run / "export" / ONNX, run / "export" / PROGRAM)
    assert max(done.onnx_difference, done.program_difference) <= TOLERANCE
    assert sorted(path.name for path in (run / "export").iterdir()) == [ONNX, PROGRAM]

    model = load_model(run)
    session = onnxruntime.InferenceSession(done.onnx, providers=["CPUExecutionProvider"])
    program = torch.export.load(done.program).module()
    for n in (1, 2, 5, 17):  # including sizes that the export itself does not check
        images = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
        assert difference(model(images), program(images)) <= TOLERANCE
        (logits,) = session.run(None, {"images": images.numpy()})
        assert difference(model(images), torch.from_numpy(logits)) <= TOLERANCE


def test_batch_norms_are_folded_unless_kept(tmp_path: Path) -> None:
    run = trained(tmp_path, "resnet8")
    operators = {}
    for folded in (True, False):
        done = export(run, tmp_path / str(folded), folded)
        operators[folded] = {
            str(node.target) for node in torch.export.load(done.program).graph.nodes if node.op == "call_function"
        }
    assert not any("batch_norm" in name for name in operators[True])
    assert any("batch_norm" in name for name in operators[False])


def test_metadata_says_how_to_normalise(tmp_path: Path) -> None:
    done = export(trained(tmp_path, "resnet8", size=12))
    extra = {METADATA: ""}
    torch.export.load(done.program, extra_files=extra)
    (property,) = (p for p in onnx.load(done.onnx).metadata_props if p.key == METADATA)
    for text in (extra[METADATA], property.value):
        metadata = json.loads(text)
        assert (metadata["model"], metadata["mean"], metadata["std"]) == ("resnet8", MEAN, STD)
        assert metadata["class_names"] == list(CLASSES)  # in the order of the logits
        assert metadata["input"] == "images (n, 3, 12, 12) float32, (level - mean) / std by channel"
    (images,) = onnx.load(done.onnx).graph.input
    sizes = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, 12, 12]


class Off(nn.Module):
    """A model as a faulty exporter would write it."""

    def __init__(self, model: nn.Module, factor: float, last: float) -> None:
        super().__init__()
        self.model, self.factor, self.last = model, factor, last

    def forward(self, x: Tensor) -> Tensor:
        fifth = torch.arange(x.shape[0]).unsqueeze(1) == 4
        return self.model(x) * torch.where(fifth, self.last, self.factor)


@pytest.mark.parametrize(("factor", "last"), [(1.001, 1.001), (float("nan"), float("nan")), (1.0, float("nan"))])
def test_files_that_differ_are_refused_and_removed(
    tmp_path: Path, factor: float, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, "resnet8")
    monkeypatch.setattr(exporting.models, "freeze", lambda model: Off(model, factor, last))
    # torch 2.8 cannot export a model of NaNs.
    with pytest.raises(ExportError, match=r"\.onnx differs from the model of .* more than 1e-04|cannot be exported"):
        export(run)
    assert not list(run.glob("export/*"))


class Branching(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if x.sum() > 0 else -self.model(x)


def test_a_model_that_cannot_be_traced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path, "resnet8")
    monkeypatch.setattr(exporting.models, "freeze", Branching)
    with pytest.raises(ExportError, match=f"the model of {run} cannot be exported: .*data-dependent"):
        export(run)
    assert not list(run.glob("export/*"))
