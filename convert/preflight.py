"""Checks before the first byte is written: room on the disk, and the values that a header cannot vouch for.

Scales are a ninth of an INT4 checkpoint's bytes or less. Reading them first means that a NaN in the last layer shows after
a minute and not after hours; the pages stay in the page cache for the conversion where there is memory.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kconvert.checkpoint.source import Checkpoint, Reader
from kconvert.errors import KconvertError, human
from kconvert.formats import Part
from kconvert.journal import stale_files
from kconvert.plan import Place, Plan, Transcode

# dtype -> numpy code, sign bit, bits that are all set in Inf and NaN
SCALE_BITS = {
    "BF16": ("u2", 0x8000, 0x7F80),
    "F16": ("u2", 0x8000, 0x7C00),
    "F32": ("u4", 0x80000000, 0x7F800000),
    "F8_E4M3": ("u1", 0x80, 0x7F),
    "F8_E8M0": ("u1", 0, 0xFF),
    "U8": ("u1", 0, 0xFF),  # E8M0 by another name: a power of two, never zero
}


def check_paths(source: Path, destination: Path) -> None:
    """KconvertError when writing `destination` could touch `source`."""
    source, destination = source.resolve(), destination.resolve()
    if source == destination:
        raise KconvertError(f"SRC and DST are both {source}; choose another directory for the output")
    if destination.is_relative_to(source):
        raise KconvertError(f"{destination} lies inside SRC; choose a directory outside {source}")
    if source.is_relative_to(destination):
        raise KconvertError(f"SRC lies inside {destination}; choose another directory for the output")


def check_space(plan: Plan, destination: Path, finished: set[str], overwrite: bool) -> None:
    """KconvertError when the disk of `destination` cannot hold what is still to be written."""
    folder = destination
    while not folder.exists():
        folder = folder.parent
    done = sum(shard.nbytes for shard in plan.shards if shard.name in finished)
    needed = plan.output_bytes - done - sum(map(_disk_bytes, stale_files(destination, finished, overwrite)))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise KconvertError(
            f"{destination} needs {human(needed)} more, but its disk has {human(free)} free; free some space or choose "
            "another disk"
        )


def _disk_bytes(path: Path) -> int:
    """0 for a file that is gone: another run may just have finished it."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def check_values(plan: Plan, finished: set[str]) -> None:
    """Read the scales and shapes of every weight still to be converted; KconvertError for the first that is not sound."""
    if plan.source is None:
        return
    steps = [
        step
        for step in plan.steps
        if isinstance(step, Transcode) and any(place.file not in finished for place in step.writes)
    ]
    batches = [steps[i : i + 64] for i in range(0, len(steps), 64)]
    with plan.source.reader() as reader, ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as pool:
        checkpoint = plan.source
        for _ in pool.map(lambda batch: _check_batch(checkpoint, reader, batch), batches):
            pass


def _check_batch(checkpoint: Checkpoint, reader: Reader, steps: Iterable[Transcode]) -> None:
    for step in steps:
        for part, place in _doubtful(step):
            where = f"{checkpoint.root / place.file}: tensor {part.tensor_of(step.name)!r}"
            data = reader.read(place.file, place.start, part.nbytes)
            if part.constant is not None and data != part.constant:
                code = {"I32": "i", "I64": "q"}[part.dtype]
                values = list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))
                raise KconvertError(
                    f"{where} says {values}, but the weight is [{step.rows}, {step.cols}]; fetch the file again"
                )
            if part.values != "any":
                _check_scale(where, part, data)
            if part.below is not None:
                _check_index(where, part.below, data)


def _doubtful(step: Transcode) -> Iterator[tuple[Part, Place]]:
    for part, place in zip(step.source_parts, step.reads, strict=True):
        if part.values != "any" or part.constant is not None or part.below is not None:
            yield part, place


def _check_scale(where: str, part: Part, data: bytes) -> None:
    import numpy as np

    code, sign, special = SCALE_BITS[part.dtype]
    bits = np.frombuffer(data, code)
    faults = {"is not finite": (bits & special) == special, "is negative": (bits & sign != 0) & (bits != sign)}
    if part.values == "positive" and sign:
        faults["is zero"] = bits & ~np.array(sign, code) == 0
    for fault, bad in faults.items():
        if bad.any():
            index = [int(i) for i in np.unravel_index(int(bad.argmax()), part.shape)]
            raise KconvertError(f"{where} {fault} at {index}; the checkpoint is damaged, fetch the file again")


def _check_index(where: str, below: int, data: bytes) -> None:
    import numpy as np

    index = np.frombuffer(data, "i4")
    bad = (index < 0) | (index >= below)
    if bad.any():
        at = int(bad.argmax())
        raise KconvertError(
            f"{where} is {index[at]} at [{at}], but there are groups 0 to {below - 1}; fetch the file again"
        )
