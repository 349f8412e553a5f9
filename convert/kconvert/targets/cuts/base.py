"""What a cut consists of, and how a tensor is cut: along its first axis, so that what is left are the first of its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kconvert.checkpoint.safetensors import Tensor
from kconvert.errors import KconvertError
from kconvert.planning.containers import Container
from kconvert.planning.steps import Copy, Step, Transcode, copy_of
from kconvert.targets.synthetic import Integers, Unquantised


class Cut(NamedTuple):
    """The parts of an Output that are a cut's own, see planning.plan."""

    drafts: list[Step]
    container: Container
    config: Mapping[str, Any]
    parameters: int
    texts: Mapping[str, bytes] = {}


def first_of(tensor: Tensor, have: int, wanted: int) -> Copy:
    """Of the `have` rows or matrices of a tensor the first `wanted`; KconvertError where it has another number of them."""
    if have == wanted:
        return copy_of(tensor)
    if tensor.shape[:1] != (have,) or wanted > have:
        raise KconvertError(
            f"{tensor} has the shape {list(tensor.shape)}, of which the first {wanted} of {have} experts cannot be cut out"
        )
    return copy_of(tensor, (wanted, *tensor.shape[1:]))


def numbers_below(tensor: Tensor, shape: tuple[int, ...], below: int, seed: int) -> Transcode:
    """A table of experts' numbers in the place of one that has larger ones: made up, as nothing says which these become."""
    rows, cols = shape
    source, target = Integers(tensor.name, below, seed), Unquantised(tensor.dtype, shape)
    return Transcode(tensor.name, rows, cols, source, (), target)


def check_size(symbol: str, size: int, have: int | None) -> None:
    """KconvertError where the checkpoint has not so many, or nothing is left."""
    option = f"--{symbol.replace('_', '-')}"
    if have is None:
        raise KconvertError(
            f"the checkpoint's config.json does not say how many {option[2:]} it has; leave {option} out"
        )
    if size > have:
        raise KconvertError(f"{option} {size} is more than the checkpoint's {have}")
    if size == 0 and symbol != "dense_layers":
        raise KconvertError(f"{option} 0 leaves no model that an engine loads; take one or more")
