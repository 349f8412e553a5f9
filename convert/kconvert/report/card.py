"""The README.md of a converted checkpoint on the Hub: what it was made from, how, and how well that was checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kconvert.checkpoint.source import Checkpoint, Reader
from kconvert.errors import counted, human
from kconvert.formats.base import FATES
from kconvert.hub.ids import HubId, parse_hub_id
from kconvert.planning.plan import Plan
from kconvert.proof.spot_check import Parity, SpotCheck, parity_of
from kconvert.version import __version__

# Fields that are as true of the converted model.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


class ModelCard:
    """The card of a plan's output, see run.departures; `command` is what the user typed."""

    def __init__(self, plan: Plan, command: str) -> None:
        self._plan, self._command = plan, command
        self._spot_check = SpotCheck(plan)

    def look(self, shard: str, source: Reader, output: Reader) -> Mapping[str, Any]:
        """What the journal is to have of a shard that has just been finished."""
        return self._spot_check(shard, source, output)

    def text(self, title: str, records: Iterable[Mapping[str, Any]]) -> str:
        """All of it; `records` are what the journal has of the shards."""
        from kconvert.hub.front_matter import write_fields

        plan = self._plan
        base = parse_hub_id(plan.source.name) if plan.source is not None else None
        fields = {key: value for key, value in _fields(plan.source).items() if key in CARRIED and value}
        if base is not None:
            fields["base_model"] = base.repo
            if "to" in plan.facts:
                fields["base_model_relation"] = "quantized"
        body = _body(plan, base, self._command, parity_of(records))
        return "\n".join(["---", write_fields(fields), "---", "", f"# {title}", "", *body, ""])


def _fields(source: Checkpoint | None) -> Mapping[str, Any]:
    """Those of the source's own card."""
    from kconvert.hub.front_matter import CARD, read_fields

    return {} if source is None or CARD not in source.side_files else read_fields(source.side_file(CARD))


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
    yield f"- {human(plan.output_bytes)} in {counted(len(plan.shards), 'shard')}"
    for fate in FATES:
        for pair, count in plan.facts.get(fate, {}).items():
            yield f"- {pair}, {counted(count, 'weight')}: {fate}"
    yield from parity.lines()
