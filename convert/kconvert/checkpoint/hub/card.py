"""The README.md of a converted checkpoint on the Hub: what it was made from, how, and how well that was checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from kconvert.checkpoint.hub.repository import list_files, small_file
from kconvert.checkpoint.hub.upload import CARD, head
from kconvert.checkpoint.hub_id import HubId, parse_hub_id
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import human
from kconvert.formats.base import FATES
from kconvert.parity.spot_check import Parity
from kconvert.plan import Plan
from kconvert.version import __version__

# Fields that are as true of the converted model.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def model_card(title: str, plan: Plan, command: str, parity: Parity, digests: Mapping[str, str]) -> bytes:
    """The card's text; `command` is what the user typed, `digests` are the sha256 of the shards."""
    base = parse_hub_id(plan.source.name) if plan.source is not None else None
    metadata = {key: value for key, value in _metadata(plan.source).items() if key in CARRIED and value}
    if base is not None:
        metadata["base_model"] = base.repo
        if "to" in plan.facts:
            metadata["base_model_relation"] = "quantized"
    head = ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()
    return "\n".join(
        ["---", head, "---", "", f"# {title}", "", *_body(plan, base, command, parity), "", _seal(plan, digests), ""]
    ).encode()


def published(target: HubId, plan: Plan) -> dict[str, str]:
    """The digests of the shards when the repository holds all that `plan` writes, as its card was made for; else none."""
    place = head(target)
    files = list_files(place) if place is not None and place.revision else {}
    shards = [shard.name for shard in plan.shards]
    if place is None or not files.keys() >= {CARD, *shards, *plan.texts, *plan.side_files}:
        return {}
    digests = {name: files[name].stamp.removeprefix("sha256:") for name in shards}
    card = small_file(place, CARD, files[CARD]).read_text("utf-8", errors="replace")
    return digests if _seal(plan, digests) in card else {}


def _seal(plan: Plan, digests: Mapping[str, str]) -> str:
    """A line that no other plan, source or shards would have."""
    text = f"{plan.hash} {plan.stamp} {sorted(digests.items())}"
    return f"<!-- kconvert {hashlib.sha256(text.encode()).hexdigest()} -->"


def _metadata(source: Checkpoint | None) -> Mapping[str, Any]:
    """The fields of the source's own card; none if it cannot be read."""
    if source is None or CARD not in source.side_files:
        return {}
    try:
        return metadata_load(Path(source.side_file(CARD))) or {}
    except Exception:  # the YAML is a stranger's
        return {}


def _body(plan: Plan, base: HubId | None, command: str, parity: Parity) -> Iterator[str]:
    tool = f"kconvert {__version__}"
    if base is not None:
        link = f"[{base.repo}](https://huggingface.co/{base.repo}/tree/{base.revision})"
        yield f"Made from {link} at commit `{base.revision}` by {tool}:"
    elif plan.source is not None:
        yield f"Made from `{plan.source.name}` by {tool}:"
    else:
        yield f"Synthetic weights in the shape of {plan.facts.get('like')}, made by {tool}:"
    yield f"\n    {command}\n"
    yield f"- {human(plan.output_bytes)} in {len(plan.shards)} shards"
    for fate in FATES:
        for pair, count in plan.facts.get(fate, {}).items():
            yield f"- {pair}, {count:,} weights: {fate}"
    yield from parity.lines()
