"""Runs pytest in a fork for every line of its input, so that torch is imported once and not for each change.

Input: a JSON list, the log file and then pytest's arguments. Output: the fork's process id, later its exit code. A fork
leads its own process group, which the reader kills when it takes too long.
"""

from __future__ import annotations

import json
import os
import sys

# What the tests set before torch is loaded (tests/conftest.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def main() -> None:
    import hypothesis  # noqa: F401
    import pytest
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch._dynamo
    import torch.distributed

    for line in sys.stdin:
        log, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            code = 3
            try:
                code = int(pytest.main(arguments))
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
