"""What a run has counted: groups that lost something where nothing was to be lost, and scales of activations that became 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kconvert.errors import counted
from kconvert.models.model import natural_key
from kconvert.planning.plan import Plan
from kconvert.planning.steps import Transcode


def inexact_facts(plan: Plan, inexact: Mapping[str, int]) -> dict[str, Any]:
    groups, scales = _apart(plan, inexact)
    return {"inexact_groups": groups, **({"activation_scales_of_1": scales} if scales else {})}


def exactness(plan: Plan, inexact: Mapping[str, int], earlier: int) -> Iterator[str]:
    """What a run knows of the shards that it wrote itself; those of an earlier one were counted then."""
    lost, scales = _apart(plan, inexact)
    if lost:
        first = min(lost, key=natural_key)
        target = next(step.target for step in plan.steps if isinstance(step, Transcode) and step.name == first)
        groups, weights = counted(sum(lost.values()), target.unit), counted(len(lost), "weight")
        yield f"{target.shortfall.format(f'{groups} in {weights}')}; first in {first!r}"
    elif plan.facts.get("recovered") and earlier < shard_bytes(plan):
        what = f" of {', '.join(plan.facts['recovered'])}" if plan.facts.get("lossy") else ""
        yield f"every value{what}{' in the shards written now' * bool(earlier)} was reproduced exactly"
    if scales:
        yield (
            f"{counted(len(scales), 'scale')} of activations became 1, as there is no inverse of what the source has; "
            f"{scales[0]!r} the first"
        )


def shard_bytes(plan: Plan) -> int:
    return sum(shard.nbytes for shard in plan.shards)


def _apart(plan: Plan, inexact: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """Groups by weight, and the names of scales; what a run counts has the name of a weight, or of a tensor beside one."""
    if not inexact:
        return {}, []
    weights = {step.name for step in plan.steps}
    groups = {name: count for name, count in inexact.items() if name in weights}
    return groups, sorted(inexact.keys() - groups.keys(), key=natural_key)
