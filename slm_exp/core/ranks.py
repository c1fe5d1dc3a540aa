"""Which of several processes this one is, where a launcher (accelerate, torchrun) started the same command many times.

The first one does the run. The others come to the recovery by the same way (through the stage cache they share), take
part in its training, and end; what they write goes to a folder of their own that is removed.
"""

from __future__ import annotations

import os


def world() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Of this process among them; the first is 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def local_rank() -> int:
    """Of this process on its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0
