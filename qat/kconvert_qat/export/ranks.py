"""What ranks that share a model tell each other, so that none waits for one that has refused.

In an export each plans for itself; then the first one writes, and the others take part in the gathering of weights. Before each
collective of that every one says whether it is still at it. Where nothing is sharded none needs another, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kconvert.errors import KconvertError


class Told(KconvertError):
    """What another rank has refused, as all of them know."""


def is_leader() -> bool:
    """Whether this process is the one that writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_sharded(model: nn.Module) -> bool:
    """Whether weights have to be gathered, in which every rank takes part."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def together(sharded: bool) -> Iterator[None]:
    """What every rank does within, where each collective begins with `go_on`; all of them leave it when all are done, or with
    KconvertError where one fails, by the sentence of that one."""
    try:
        yield
    except Told:
        raise
    except BaseException as error:
        if sharded:
            _tell(_sentence(error))
        raise
    if sharded:
        go_on()


def go_on() -> None:
    """KconvertError where another rank has given up."""
    if others := [fault for fault in _tell(None) if fault is not None]:
        raise Told(others[0])


def check_same(sharded: bool, outline: str) -> None:
    """KconvertError on all ranks unless they are about to do the same."""
    if sharded and len(set(_tell(outline))) > 1:
        raise Told("the ranks were asked for different exports; let all of them call export with the same arguments")


def _tell(said: str | None) -> list[str | None]:
    """To all ranks; returns what each of them says."""
    heard: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(heard, said)
    return heard


def _sentence(error: BaseException) -> str:
    if isinstance(error, KconvertError):
        return str(error)
    return f"rank {torch.distributed.get_rank()} could not go on; its own output says why"
