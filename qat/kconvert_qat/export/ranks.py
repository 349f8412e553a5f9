"""What the ranks of an export tell each other, so that none waits for one that has refused.

Each plans for itself; then the first one writes, and the others take part in the gathering of weights. Before each collective
of that the first one says whether it is still at it. Where nothing is sharded none needs another, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kconvert.errors import KconvertError


def is_leader() -> bool:
    """Whether this process is the one that writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_sharded(model: nn.Module) -> bool:
    """Whether weights have to be gathered, in which every rank takes part."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def together(sharded: bool) -> Iterator[None]:
    """What every rank does for itself within; KconvertError on all of them where one fails, by the sentence of that one."""
    if not sharded:
        yield
        return
    fault: str | None = None
    try:
        yield
    except BaseException as error:
        fault = _sentence(error)
        raise
    finally:
        faults: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(faults, fault)
        others = [each for each in faults if each is not None]
        if fault is None and others:
            raise KconvertError(others[0])


@contextmanager
def led(sharded: bool) -> Iterator[None]:
    """What the first rank does within, while the others do their part, which begins every collective with `go_on`; all of them
    leave it when it is done, or with KconvertError where it failed."""
    try:
        yield
    except BaseException as error:
        if sharded and is_leader():
            _tell(_sentence(error))
        raise
    if sharded:
        go_on()


def go_on() -> None:
    """KconvertError on the other ranks where the first one has given up."""
    if (fault := _tell(None)) is not None:
        raise KconvertError(fault)


def _tell(fault: str | None) -> str | None:
    """From the first rank to all."""
    told = [fault]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def _sentence(error: BaseException) -> str:
    if isinstance(error, KconvertError):
        return str(error)
    return f"rank {torch.distributed.get_rank()} could not go on with the export; its own output says why"
