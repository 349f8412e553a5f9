"""Which tensors differ between two checkpoints, in name, dtype, shape or value: the bytes as they lie in the files.

No manifest is needed, and nothing is decoded; `verify` is for checkpoints that spell the same weights in different ways.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kconvert.address import open_stored
from kconvert.checkpoint.safetensors import Tensor
from kconvert.checkpoint.source import Checkpoint, Reader
from kconvert.models.model import natural_key

CHUNK = 4 << 20  # bytes at a time


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that is not the same. `kind`: added, removed, dtype, shape or value; `before` and `after` are dtype and shape
    where the tensor is; `changed` counts the elements with other bytes where both have the same dtype and shape."""

    name: str
    kind: str
    before: str | None
    after: str | None
    changed: int | None = None
    elements: int | None = None


@dataclass(frozen=True)
class Difference:
    """`changes` in natural order of the names; `same` counts the tensors without any; keys of config.json that differ."""

    changes: tuple[Change, ...]
    same: int
    config: tuple[str, ...]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many changes there are of each kind."""
        return Counter(change.kind for change in self.changes)


def diff(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    *,
    values: bool = True,
    advance: Callable[[int], None] | None = None,
) -> Difference:
    """Compare two checkpoints' tensors by name; without `values` only what the headers say.

    `advance` is called with the bytes of `after` compared.
    """
    one, two = open_stored(before), open_stored(after)
    changes = [change for name in one.tensors.keys() | two.tensors.keys() if (change := _header_change(name, one, two))]
    found = {change.name for change in changes}
    alike = [name for name in two.tensors if name not in found]
    if values:
        one.check_index()
        two.check_index()
        changes += _value_changes(alike, one, two, advance or (lambda nbytes: None))
    changes.sort(key=lambda change: natural_key(change.name))
    keys = {key for key in one.config.keys() | two.config.keys() if one.config.get(key) != two.config.get(key)}
    return Difference(tuple(changes), len(one.tensors.keys() | two.tensors.keys()) - len(changes), tuple(sorted(keys)))


def _header_change(name: str, one: Checkpoint, two: Checkpoint) -> Change | None:
    before, after = one.tensors.get(name), two.tensors.get(name)
    if before is None or after is None:
        return Change(name, "added" if before is None else "removed", _spelled(before), _spelled(after))
    if before.dtype != after.dtype:
        return Change(name, "dtype", _spelled(before), _spelled(after))
    if before.shape != after.shape:
        return Change(name, "shape", _spelled(before), _spelled(after))
    return None


def _spelled(tensor: Tensor | None) -> str | None:
    return None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _value_changes(
    names: list[str], one: Checkpoint, two: Checkpoint, advance: Callable[[int], None]
) -> Iterator[Change]:
    with one.reader() as ours, two.reader() as theirs, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def compare(name: str) -> int:
            return _count_changed(one.tensors[name], two.tensors[name], ours, theirs, advance)

        for name, changed in zip(names, pool.map(compare, names), strict=True):
            if changed:
                tensor = two.tensors[name]
                yield Change(name, "value", _spelled(tensor), _spelled(tensor), changed, math.prod(tensor.shape))


def _count_changed(a: Tensor, b: Tensor, ours: Reader, theirs: Reader, advance: Callable[[int], None]) -> int:
    """Elements whose bytes differ; of types under a byte, bytes."""
    import numpy as np

    size = max(1, a.nbytes // max(1, math.prod(a.shape)))
    changed = 0
    for start in range(0, a.nbytes, CHUNK // size * size):
        nbytes = min(CHUNK // size * size, a.nbytes - start)
        one, two = ours.read(a.file, a.start + start, nbytes), theirs.read(b.file, b.start + start, nbytes)
        if one != two:
            different = np.frombuffer(one, np.uint8) != np.frombuffer(two, np.uint8)
            changed += int(different.reshape(-1, size).any(1).sum())
        advance(nbytes)
    return changed
