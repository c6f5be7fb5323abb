"""Loader on NVIDIA DALI, which decodes, crops, flips and normalises on a GPU or on the CPU.

DALI's own checkpoints are not used. Order and augmentation are inputs of the graph, which has neither a reader nor a
random operator, so its checkpoint would contain only a count of batches. `state_dict` has that count as (epoch, batch),
from which any loader on any number of ranks can continue.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .augment import records
from .batch import LoaderConfig
from .epoch_loader import EpochLoader
from .files import ImageFiles, ImageSet

_PREFETCH = 2  # batches prepared while one is used


class DaliLoader(EpochLoader):
    """Decodes and resizes files, or crops arrays; then flips and normalises.

    Only the window is decoded if the format allows it. Decoded pixels equal Pillow's on the CPU; on a GPU (`mixed`)
    they differ by a few levels. Kinds of files that DALI cannot read, or reads differently, are decoded by Pillow.
    Resizing is linear with antialiasing. A file is unreadable if its header or the decoder reports an error.

    Raises:
        NotImplementedError: DALI is not installed.
    """

    def __init__(self, data: ImageSet, config: LoaderConfig) -> None:
        super().__init__(data, config)
        _import_dali()
        a = config.augmentation
        self._files = isinstance(data, ImageFiles)
        self._shifts = a is not None and a.kind == "crop" and a.padding > 0
        self._resizes = self._files or (a is not None and a.kind == "resized-crop")
        flips = a is not None and a.flip
        windows = ("start", "shape")
        self._inputs = ("source", *windows * self._resizes, *("shift",) * self._shifts, *("mirror",) * flips)
        # Of files the sizes in their headers, which are read on first use.
        self._image_sizes = np.zeros((0, 2), np.int64) if self._files else np.array([data.shape[1:]])
        self._foreign = np.zeros(0, np.bool_)  # files that Pillow decodes; empty if there is none
        self._view = 0
        self._queued: deque[Tensor] = deque()  # batches not yet passed to DALI
        self._in_flight: deque[Tensor] = deque()  # batches passed to DALI and not yet delivered
        self._pipeline: Any = None  # built on first use

    def _images(self, batches: Sequence[Tensor], view: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        self._read_headers()
        self._rewind()
        self._view = view
        self._queued.extend(batches)
        while self._queued or self._in_flight:
            try:
                images = self._deliver()
            except RuntimeError as error:
                self._skip_undecodable(error)
                continue
            except StopIteration:  # no image is left in the batches of the queue
                yield from self._empty_batches()
                continue
            yield from self._empty_batches()
            index = self._in_flight.popleft()
            yield self._augmented(images, index, view) if self._augments_levels else images, index

    def _empty_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The next batches in flight without a readable image, which DALI does not get."""
        while self._in_flight and not len(self._in_flight[0]):
            yield torch.zeros(0, *self.data.shape, device=self.config.device), self._in_flight.popleft()

    def _read_headers(self) -> None:
        """Sizes and kinds of all files, on first use."""
        if isinstance(self.data, ImageFiles) and not len(self._image_sizes):
            headers = self.data.headers()
            self._image_sizes = headers.sizes
            if not headers.exact.all():
                self._foreign = ~headers.exact
                self._inputs = (*self._inputs, "encoded")

    def _build(self) -> Any:
        """A pipeline of the graph, with room for the largest batch."""
        dali = _import_dali()
        feed: Any = WeakMethod(self._feed)  # a cycle would delay the release of threads and memory
        types = dali.types
        source = {
            "source": lambda: feed()(),
            "num_outputs": len(self._inputs),
            "dtype": [types.UINT8, *[types.INT32] * (len(self._inputs) - 1)],
            "layout": [None if self._files else "CHW"],
        }
        names = self._inputs
        graph = partial(self._graph, dali)

        @dali.pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=max(self._sizes),
            num_threads=max(self.config.workers, 1),
            device_id=_device_id(self.config.device),
            prefetch_queue_depth=_PREFETCH,
            enable_conditionals=len(self._foreign) > 0,  # `_content` chooses by sample
        )
        def pipeline() -> Any:
            fed = dali.fn.external_source(**source)
            return graph({name: fed[n] for n, name in enumerate(names)})

        built = pipeline()
        built.build()
        return built

    def _graph(self, dali: Any, inputs: dict[str, Any]) -> Any:
        """The graph from the outputs of `_feed` to images (n, channels, H, W) or (n, H, W, channels) float32.

        If levels are augmented further, they are not normalised, and uint8.
        """
        fn, types = dali.fn, dali.types
        gpu = self.config.device.type == "cuda"
        _, H, W = self.data.shape
        levels = inputs["source"]
        if self._files:
            content = _content(fn, levels, inputs.get("encoded"))
            window = {"start": inputs["start"], "shape": inputs["shape"], "axis_names": "HW"}
            levels = fn.decoders.image_slice(content, **window, **_decoder_options(types, gpu))
        elif gpu:
            levels = levels.gpu()
        if self._resizes:
            if not self._files:
                levels = fn.slice(levels, start=inputs["start"], shape=inputs["shape"], axis_names="HW")
            levels = fn.resize(levels, size=(H, W), interp_type=types.INTERP_TRIANGULAR, antialias=True)
        if self._shifts:
            edge = {"out_of_bounds_policy": "pad", "fill_values": 0}
            levels = fn.slice(levels, start=inputs["shift"], shape=(H, W), axis_names="HW", **edge)
        normalised = {"mean": list(self.data.mean), "std": list(self.data.std), "dtype": types.FLOAT}
        return fn.crop_mirror_normalize(
            levels,
            mirror=inputs.get("mirror", 0),
            **({"dtype": types.UINT8} if self._augments_levels else normalised),
            output_layout="HWC" if self.config.channels_last else "CHW",
        )

    def _feed(self) -> tuple[Any, ...]:
        """Inputs of DALI's next batch. DALI calls this before the batch is delivered.

        Raises:
            StopIteration: no batch with a readable image is queued.
        """
        source: Any = []
        while isinstance(self.data, ImageFiles) and self._queued and not source:
            index, source = self._sources(self._queued[0], self.data)
            if not source:
                self._queued.popleft()
                self._in_flight.append(index)
        if not self._queued:
            raise StopIteration
        if isinstance(self.data, ImageFiles):
            sizes = self._image_sizes[index.numpy()]
        else:
            index = self._queued[0]
            source, sizes = self.data.pixels[index.to(self.data.pixels.device)].cpu().numpy(), self._image_sizes
        record = records(self.config.augmentation, self.config.augmentation_seed, self._view, index.numpy(), sizes)
        self._queued.popleft()
        self._in_flight.append(index)
        inputs = {
            "start": record.windows[:, :2],
            "shape": record.windows[:, 2:],
            "shift": record.shifts,
            "mirror": record.mirrored,
            "encoded": self._foreign[index.numpy()] if len(self._foreign) else index.numpy(),
        }
        return source, *(inputs[name].astype(np.int32, order="C") for name in self._inputs[1:])

    def _sources(self, batch: Tensor, data: ImageFiles) -> tuple[Tensor, list[NDArray[np.uint8]]]:
        """The readable samples of a batch, and for each its path, or the encoded image if Pillow decodes it."""
        problems = data.headers().problems
        while len(index := self._readable(batch)):
            for sample in index.tolist():
                if sample in problems:
                    self._reject(sample, problems[sample])
            found = {
                i: np.frombuffer(os.fsencode(data.paths[i]), np.uint8) for i in index.tolist() if i not in problems
            }
            foreign = [i for i in found if self._foreign[i]] if len(self._foreign) else []
            if foreign:
                with ThreadPoolExecutor(max(self.config.workers, 1)) as pool:
                    encoded = list(pool.map(_encode_file, (data.paths[i] for i in foreign)))
                for i, content in zip(foreign, encoded, strict=True):
                    if isinstance(content, str):
                        del found[i]
                        self._reject(i, content)
                    else:
                        found[i] = content
            if found:
                return torch.tensor(list(found)), list(found.values())
        return index, []

    def _deliver(self) -> Tensor:
        """The oldest batch in flight, without a copy.

        Raises:
            RuntimeError: DALI failed on one of the batches in flight.
        """
        device = self.config.device
        # With a stream, the output is ordered on it and the host does not wait.
        stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
        (images,) = self._pipeline.run(*stream)
        tensor = from_dlpack(images.as_tensor())
        return tensor.permute(0, 3, 1, 2) if self.config.channels_last else tensor

    def _skip_undecodable(self, error: RuntimeError) -> None:
        """Find the files that caused `error` and rebuild the pipeline, which is unusable after a failure.

        DALI does not name the file, so each file in flight is decoded by itself.

        Raises:
            RuntimeError: no file causes it; `error` itself.
            BadImageError: more than `skip_bad` files are unreadable.
        """
        batches = list(self._in_flight)
        self._in_flight.clear()
        self._pipeline = None
        problems = {}
        if isinstance(self.data, ImageFiles):
            for sample in (sample for batch in batches for sample in batch.tolist()):
                problem = _decoding_problem(self.data.paths[sample], self.config.device)
                if problem is not None:
                    problems[sample] = problem
        if not problems:
            raise error
        for sample, problem in problems.items():
            self._reject(sample, problem)
        self._queued.extendleft(reversed(batches))
        self._pipeline = self._build()

    def _rewind(self) -> None:
        """Discard the batches of an iteration that ended early, and prepare the pipeline for other ones."""
        self._queued.clear()
        try:
            while self._pipeline is not None:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # one of the discarded batches cannot be decoded
            self._pipeline = None
        self._in_flight.clear()
        self._pipeline = self._pipeline or self._build()

    def close(self) -> None:
        super().close()
        self._pipeline = None


def _import_dali() -> Any:
    """Import DALI with its operators.

    Raises:
        NotImplementedError: DALI cannot be imported.
    """
    try:
        import nvidia.dali
        import nvidia.dali.fn
    except ImportError as error:
        raise NotImplementedError(f"loader 'dali' cannot run here: {error} (pip install 'camkd-fast[dali]')") from error
    return nvidia.dali


def _device_id(device: torch.device) -> int | None:
    """DALI's id of a device; None for the CPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _content(fn: Any, source: Any, encoded: Any) -> Any:
    """Encoded images from their paths, or the source itself for samples of which `encoded` is not 0."""
    if encoded is None:
        content = fn.io.file.read(source)
    elif encoded != 0:  # for each sample: DALI translates this statement
        content = source
    else:
        content = fn.io.file.read(source)
    return content


def _encode_file(path: Path) -> NDArray[np.uint8] | str:
    """A file decoded by Pillow, as the bytes of one that DALI reads; the reason if it cannot be decoded."""
    from .decode import encode, open_rgb

    try:
        return encode(open_rgb(path))
    except ValueError as error:
        return str(error)


def _decoder_options(types: Any, gpu: bool) -> dict[str, Any]:
    """Decoder options that match Pillow: the orientation tag is not applied."""
    return {
        "device": "mixed" if gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }


def _decoding_problem(path: Path, device: torch.device) -> str | None:
    """DALI's error for one file, in one line; None if the file can be decoded."""
    dali = _import_dali()
    pipeline = dali.Pipeline(1, 1, _device_id(device), prefetch_queue_depth=1, exec_pipelined=False, exec_async=False)
    with pipeline:
        name = dali.fn.external_source(name="name", dtype=dali.types.UINT8, ndim=1)
        options = _decoder_options(dali.types, device.type == "cuda")
        pipeline.set_outputs(dali.fn.decoders.image(dali.fn.io.file.read(name), **options))
    pipeline.build()
    pipeline.feed_input("name", [np.frombuffer(os.fsencode(path), np.uint8)])
    try:
        pipeline.run()
    except RuntimeError as error:
        lines = str(error).partition("encountered:")[2].split("\n")
        return next((line.strip() for line in lines if line.strip()), "DALI cannot decode it")
    return None
