"""How much memory a device has left for data."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

# A container's limit, and what of its use cannot be taken back: (limit, statistics, the line that counts it), for
# version 2 of Linux control groups and for version 1.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)


def free_memory(device: torch.device, cgroups: Sequence[tuple[Path, Path, str]] = CGROUPS) -> int:
    """The bytes that are free on ``device``; on the CPU, and where a device shares its memory, those of the machine,
    or of the container where that is less.

    Pages of files do not count as taken: the system takes them back, and streamed data would else be its own obstacle.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit_file, statistics_file, counted in cgroups:
        with suppress(OSError):  # no such control group
            limit = limit_file.read_text().strip()
            lines = dict(line.split() for line in statistics_file.read_text().splitlines())
            if limit.isdecimal() and counted in lines:  # "max": no limit
                free = min(free, max(int(limit) - int(lines[counted]), 0))
    return free
