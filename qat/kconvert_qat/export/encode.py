"""The bytes of an export, weight after weight: gathered from the model, a few at a time, and encoded in threads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kconvert.checkpoint.files import PAGE
from kconvert.errors import KconvertError
from kconvert.planning.steps import Copy, Step
from kconvert_qat.export.planned import Export, Stacked
from kconvert_qat.export.ranks import go_on
from kconvert_qat.grid import reaches
from kconvert_qat.grids.fingerprints import fingerprint
from kconvert_qat.names import Matrix

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes

_OWN = threading.local()
HELD = 256 << 20  # bytes of values that are gathered at a time, or one weight


@dataclass(frozen=True)
class Seen:
    """What tells a weight that is encoded from another: a fingerprint of what its bytes are made of, and their SHA-256."""

    mark: bytes
    digest: bytes


@dataclass(frozen=True)
class Encoded:
    """What a step writes: the bytes of each tensor, in memory aligned as the file is; none where they are those of before."""

    step: Step
    parts: list[Bytes]
    seen: Seen


def check_values(task: Export) -> None:
    """KconvertError where a tensor has none."""
    weights = {matrix.weight.key: matrix.weight.tensor for matrix in task.matrices.values()}
    for name, tensor in {**weights, **task.rest}.items():
        if tensor.is_meta:
            raise KconvertError(
                f"{name} is on the meta device, where it has no values; load the model before it is exported"
            )


def encoded(task: Export, before: Mapping[str, Seen]) -> Iterator[Encoded]:
    """Every step of the export, in its order; bytes are made of what is not as `before`."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for batch, values, limits in _gathered(task, 2 * threads):
            work, marks = [], []
            for step, value, reach in zip(batch, map(torch.Tensor.cpu, values), limits, strict=True):
                mark, seen = _mark(step, value, reach), before.get(step.name)
                if seen is not None and seen.mark == mark:
                    yield Encoded(step, [], seen)
                    continue
                work.append((step, value, _rooms(step, reach)))
                marks.append(mark)
            _encode(pool, work)
            digests = pool.map(_digest, [rooms for _, _, rooms in work])
            for (step, _, rooms), mark, digest in zip(work, marks, digests, strict=True):
                yield Encoded(step, rooms, Seen(mark, digest))


def _mark(step: Step, value: torch.Tensor, reach: float) -> bytes:
    """Of all that the bytes are made of; as they are equal without it, formats are spelt, rule and all."""
    return fingerprint(value, "" if isinstance(step, Copy) else f"{step.target!r} {reach!r}")


def help_gather(task: Export) -> None:
    """What the other ranks do while one of them asks for what is encoded."""
    for _ in _gathered(task, 1):
        pass


def _gathered(task: Export, most: int) -> Iterator[tuple[list[Step], list[torch.Tensor], list[float]]]:
    """Some steps at a time, the whole tensor of each, and what it is settled by; the same collectives whatever `most` is."""
    whole = Whole()
    for batch in _batches(task.plan.steps, most):
        for_each = [(_value(task, step, whole), _reach(task, step, whole)) for step in batch]
        yield batch, [value for value, _ in for_each], [reach for _, reach in for_each]


def _batches(steps: Sequence[Step], most: int) -> Iterator[list[Step]]:
    batch: list[Step] = []
    nbytes = 0
    for step in steps:
        size = step.nbytes if isinstance(step, Copy) else step.rows * step.cols * 4
        if batch and (len(batch) == most or nbytes + size > HELD):
            yield batch
            batch, nbytes = [], 0
        batch.append(step)
        nbytes += size
    if batch:
        yield batch


class Whole:
    """Gathers sharded tensors (FSDP2, expert parallelism), and keeps those of one module, whose matrices alternate."""

    def __init__(self) -> None:
        self._module: Any = None
        self._held: dict[str, torch.Tensor] = {}

    def of(self, matrix: Matrix | Stacked) -> torch.Tensor:
        weight = matrix.weight
        if weight.module is not self._module:
            self._module, self._held = weight.module, {}
        if weight.parameter not in self._held:
            self._held[weight.parameter] = whole(weight.tensor)
        return self._held[weight.parameter]


def whole(tensor: Any) -> torch.Tensor:
    """The tensor itself, or all of it when it is sharded; then every rank must call this."""
    if hasattr(tensor, "full_tensor"):
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)  # fails while nobody waits for it
        go_on()
        tensor = tensor.full_tensor()
    plain: torch.Tensor = tensor.detach()
    return plain


def _value(task: Export, step: Step, gathered: Whole) -> torch.Tensor:
    if (matrix := task.matrices.get(step.name)) is not None:
        return matrix.of(gathered.of(matrix))
    return whole(task.rest[step.name if isinstance(step, Copy) else f"{step.name}.weight"])


def _reach(task: Export, step: Step, gathered: Whole) -> float:
    """What the target settles by, see Format.settle; 0 where it settles nothing."""
    if isinstance(step, Copy) or not step.target.settles(step.source):
        return 0.0
    if (fused := task.fused.get(step.name)) is None:
        return max(reaches(_value(task, step, gathered), None, "nvfp4"))
    return max(reach for matrix in fused for reach in reaches(matrix.of(gathered.of(matrix)), None, "nvfp4"))


def _rooms(step: Step, reach: float) -> list[Bytes]:
    """For each tensor its memory, with what does not come from tiles in it already."""
    if isinstance(step, Copy):
        return [_room(step.nbytes, step.writes[0].start)]
    parts = step.target_parts
    rooms = [_room(part.nbytes, spot.start) for part, spot in zip(parts, step.writes, strict=True)]
    for part, room in zip(parts, rooms, strict=True):
        if part.constant is not None:
            room[:] = np.frombuffer(part.constant, np.uint8)
    if step.target.settles(step.source):
        step.target.settle(reach, rooms)
    return rooms


def _encode(pool: Executor, work: Sequence[tuple[Step, torch.Tensor, list[Bytes]]]) -> None:
    """Fill the rooms; the matrices of a stack are tiles, each a thread's."""
    tiles: list[tuple[Step, torch.Tensor, list[Bytes]]] = []
    for step, value, rooms in work:
        if value.dim() == 3 and not isinstance(step, Copy):
            shares = [np.array_split(room, len(value)) for room in rooms]
            tiles += [(step, matrix, list(share)) for matrix, *share in zip(value, *shares, strict=True)]
        else:
            tiles.append((step, value, rooms))
    for _ in pool.map(_spell, *zip(*tiles, strict=True)):
        pass


def _spell(step: Step, value: torch.Tensor, rooms: list[Bytes]) -> None:
    if isinstance(step, Copy):
        rooms[0][:] = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        return
    try:
        step.target.encode(_floats(value), rooms)
    except ValueError as error:
        raise KconvertError(f"weight {step.name!r} cannot be written as {step.target.label}: {error}") from None


def _floats(value: torch.Tensor) -> Any:
    """The matrix as bf16 in f32, in memory that is this thread's, as new memory takes longer than all else."""
    held = getattr(_OWN, "room", None)
    if held is None or held.numel() < value.numel():
        held = _OWN.room = torch.empty(value.numel())
    room = held[: value.numel()].view(value.shape)
    return room.copy_(value.bfloat16()).numpy()


def _digest(parts: list[Bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.digest()


def _room(nbytes: int, start: int) -> Bytes:
    raw = np.empty(nbytes + PAGE, np.uint8)
    skip = (start - raw.ctypes.data) % PAGE
    return raw[skip : skip + nbytes]
