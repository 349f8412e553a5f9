"""What is one number of a whole weight must be the same for those that engines fuse into one matrix: they keep one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kconvert.checkpoint.source import Reader
from kconvert.models.model import Weight
from kconvert.models.roles import fusion
from kconvert.proof.parity.witnesses.registry import witness_of


def fused_faults(pairs: Iterable[tuple[Weight, Weight]], output: Reader) -> Iterator[str]:
    """A sentence for each weight whose scale is not that of the first one that it is fused with.

    Pairs are of the source and of the output. What was quantised so in the source already has the scales that it had.
    """
    first: dict[object, tuple[str, bytes]] = {}
    for ours, theirs in pairs:
        suffix, group = witness_of(theirs.format).shared, fusion(ours.role, ours.name)
        if suffix is None or group is None or witness_of(ours.format).shared is not None:
            continue
        tensor = next(
            tensor for part, tensor in zip(theirs.parts, theirs.tensors, strict=True) if part.suffix == suffix
        )
        value = output.read(tensor.file, tensor.start, tensor.nbytes)
        other, shared = first.setdefault((suffix, group), (tensor.name, value))
        if value != shared:
            yield f"tensor {tensor.name!r} differs from {other!r}, though engines fuse the two and keep one scale"
