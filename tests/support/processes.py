"""Processes of a group: how a test starts them, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def leave_group() -> None:
    """End this process, a member of a gloo group, as one that has succeeded.

    What refers to the group, a wrapped module or a mesh, keeps it until the interpreter ends, where its threads
    sometimes abort the process. So the interpreter does not end.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_processes(module: str, world: int, folder: Path, timeout: float = 240.0) -> None:
    """Run `module.in_a_process(rank, world, store)` in `world` processes, all of which must succeed.

    Args:
        store: a file in `folder` by which they meet.
    """
    code = f"import sys; from {module} import in_a_process; in_a_process(*map(int, sys.argv[1:3]), sys.argv[3])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world), str(folder / "store")],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    failed = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        if process.returncode != 0:
            failed.append(errors)
            for other in processes:  # which would wait for it
                other.terminate()
    assert not failed, failed[0]
