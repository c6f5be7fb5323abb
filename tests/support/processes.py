"""How the processes of a group end."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist


def leave_group() -> None:
    """End this process, a member of a gloo group, as one that has succeeded.

    What refers to the group, a wrapped module or a mesh, keeps it until the interpreter ends, where its threads
    sometimes abort the process. So the interpreter does not end.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
