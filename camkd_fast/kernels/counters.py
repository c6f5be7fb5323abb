"""Where the programs of a launch meet: each adds 1 to a counter in device memory, and the last one finds that it is.

Launches that may run at the same time never share a counter. Launches of one stream follow each other, so a stream has
one, which the last program of each launch sets back to 0. Graphs may run beside each other and beside any stream, so a
launch that is recorded gets a counter in the memory of its graph, which sets it to 0 before every replay of the launch.
So does a launch on the stream that every thread has one of, since all of them have the same handle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launcher import current_device, current_stream, device_of

_of_streams: dict[tuple[int, int], Tensor] = {}
_PER_THREAD = 2  # cudaStreamPerThread


def counter_for(tensor: Tensor) -> Tensor:
    """(1,) int32, 0 when the next launch on the current stream of this tensor's device begins."""
    device = device_of(tensor)
    if device >= 0 and device != current_device():
        with torch.cuda.device(device):
            return _counter(tensor, device)
    return _counter(tensor, device)


def _counter(tensor: Tensor, device: int) -> Tensor:
    stream = current_stream(device) if device >= 0 else 0
    if stream == _PER_THREAD or (device >= 0 and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(1, dtype=torch.int32, device=tensor.device)
    counter = _of_streams.get((device, stream))
    if counter is None:
        counter = _of_streams[device, stream] = torch.zeros(1, dtype=torch.int32, device=tensor.device)
    return counter
