"""The machine that a command is printed on: its cores and NUMA nodes, as Linux tells them."""

from __future__ import annotations

import os
import re
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
NODES = Path("/sys/devices/system/node")


def physical_cores() -> int:
    """Cores without their second threads; where nobody says so, what runs at a time."""
    cores = {path.read_text("ascii") for path in CPUS.glob("cpu[0-9]*/topology/core_cpus_list")}
    return len(cores) or os.cpu_count() or 1


def numa_nodes() -> int:
    """Nodes that have memory of their own; 1 where nobody says so."""
    return sum(re.fullmatch("node[0-9]+", path.name) is not None for path in NODES.glob("node*")) or 1
