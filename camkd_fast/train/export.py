"""Export of a run's model to ONNX and torch.export, both checked against the model before they are kept."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import first_line
from ..system import replace
from .folder_lock import check_free, locked
from .run_folder import folder_of, load_model, model_metadata

ONNX, PROGRAM = "student.onnx", "student.pt2"
METADATA = "camkd_fast"  # key of the ONNX model's properties, name of the file in the program's archive
# Largest difference of float32 logits, relative to the largest logit. Another order of summation changes logits by
# about 1e-6 after tens of layers; a wrong layer, padding or batch norm changes them by 1e-2 and more.
TOLERANCE = 1e-4
BATCH_SIZES = (1, 5)  # checked; tracing uses another one

Call = Callable[[Tensor], Tensor]


class ExportError(RuntimeError):
    """A model cannot be exported, or an exported file gives other logits."""


@dataclass(frozen=True)
class Exported:
    """The exported files, and the largest difference of each to the model, relative to the largest logit."""

    onnx: Path
    program: Path
    onnx_difference: float
    program_difference: float


def export(run: Path, out: Path | None = None, folded: bool = True) -> Exported:
    """Write the model of a finished run as `student.onnx` and `student.pt2`.

    Both take normalised `images` (n, channels, H, W) float32 for any n and return `logits` (n, C). The metadata has
    the normalisation of pixel levels 0 to 255, (level - mean) / std per channel, the model's name, its data set and
    the names of its classes in the order of the logits: JSON under "camkd_fast" in the ONNX model's properties and in
    the extra files of the torch.export program.

    Args:
        run: folder of the run, or a model file in it.
        out: folder to write; None: `export` in the run's folder.
        folded: fold batch norms into the preceding convolutions; equal up to rounding.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: there is no model, or it is damaged.
        ExportError: torch cannot trace the model, or a file differs from it by more than `TOLERANCE`; nothing is left
            behind.
        OSError: the folder cannot be written.
    """
    model, metadata = load_model(run), model_metadata(run)
    channels, (H, W) = metadata["in_channels"], metadata["size"]
    metadata = {**metadata, "input": f"images (n, {channels}, {H}, {W}) float32, (level - mean) / std by channel"}
    folder = folder_of(run) / "export" if out is None else out
    check_free(folder_of(run))
    with locked(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as unchecked:
        onnx_file, program_file = Path(unchecked) / ONNX, Path(unchecked) / PROGRAM
        written = models.freeze(model) if folded else model
        try:
            _write(written, (channels, H, W), metadata, onnx_file, program_file)
        except OSError:
            raise
        except Exception as error:  # tracing runs the model's own Python on symbols: anything can come out of it
            raise ExportError(f"the model of {run} cannot be exported: {first_line(error)}") from error
        worst = {}
        for file, call in ((onnx_file, _onnx_call(onnx_file)), (program_file, _program_call(program_file))):
            found = [_difference(call, model, (n, channels, H, W)) for n in BATCH_SIZES]
            worst[file] = max(found)
            for n, difference in zip(BATCH_SIZES, found, strict=True):
                if not difference <= TOLERANCE:  # NaN too
                    raise ExportError(
                        f"{file.name} differs from the model of {run} by {difference:.1e} of the largest logit of {n} "
                        f"images, more than {TOLERANCE:.0e}"
                    )
        for file in worst:
            replace(file, folder / file.name)
    return Exported(folder / ONNX, folder / PROGRAM, worst[onnx_file], worst[program_file])


def _write(model: nn.Module, shape: tuple[int, ...], metadata: dict[str, Any], onnx: Path, program: Path) -> None:
    text = json.dumps(metadata)
    batch = torch.export.Dim("batch")
    images = torch.zeros(2, *shape)  # torch.export specialises a batch of 1
    with _quiet(), torch.no_grad():
        traced = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},))
        torch.export.save(traced, program, extra_files={METADATA: text})
        made = torch.onnx.export(
            traced,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
        )
        assert made is not None
        made.model.metadata_props[METADATA] = text
        made.save(onnx)


def _difference(call: Call, model: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest difference of logits on random images, relative to the model's largest logit."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    with torch.no_grad():
        ours = model(images)
        return float((call(images) - ours).abs().max() / ours.abs().max().clamp(min=1e-30))


def _onnx_call(path: Path) -> Call:
    """The ONNX model on onnxruntime's CPU kernels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _program_call(path: Path) -> Call:
    program: Call = torch.export.load(path).module()
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's log about unused packages and its own deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
