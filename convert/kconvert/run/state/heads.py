"""What a run says of itself at the head of its journal: which plan it carries out, of which source, and what was typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from kconvert.checkpoint.files import is_directory
from kconvert.checkpoint.listing import STATE_DIR
from kconvert.errors import KconvertError
from kconvert.hub.ids import parse_hub_id
from kconvert.planning.plan import Plan
from kconvert.run.state.outline import Outline
from kconvert.run.state.ranks import Rank
from kconvert.version import __version__

JOURNAL = "journal.jsonl"
PROVENANCE = ("version", "recipe", "from", "command")
DIRECTORY = "another directory"  # what advice names

Record: TypeAlias = dict[str, Any]


def head_of(plan: Plan, command: str) -> Record:
    """What a journal belongs to, and where that comes from; of a source on the Hub also the revision that was asked for."""
    said = {"version": __version__, "recipe": plan.recipe, "from": plan.source.name if plan.source else ""}
    origin = {} if plan.source is None else plan.source.origin
    return {"plan": plan.hash, "source": plan.stamp, **said, "command": command, **origin}


def belongs(head: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a journal is this plan's; what the source is called does not matter."""
    return (head.get("plan"), head.get("source")) == (plan.hash, plan.stamp)


def is_mended(head: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a journal is this plan's, but of files on this disk of which some were others then: what comes from the rest is
    as good as it was."""
    here = plan.source is not None and plan.source.directory is not None
    return here and head.get("plan") == plan.hash and head.get("source") != plan.stamp


def heads_of(state: Path, outline: Outline | None) -> list[Mapping[str, Any]]:
    """Of the journal in DST/.kconvert, and of the ranks' outline."""
    return [*read_lines(state / JOURNAL)[:1], *([outline.head] if outline else [])]


def read_lines(path: Path) -> list[Record]:
    """The journal's records; a last line that a crash cut short is no record."""
    lines: list[Record] = []
    if path.exists():
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            lines.append(line if isinstance(line, dict) else {})
    return lines


def pinned_commit(look: Callable[[], Mapping[str, Any]], source: str, revision: str | None) -> str | None:
    """The commit of the repository `source` from which a run was begun that asked for the same revision; `look` finds what
    that run said of itself in DST."""
    place = parse_hub_id(source)
    if place is None or is_directory(source):
        return None
    head = look()
    origin = parse_hub_id(str(head.get("origin")))
    same = origin is not None and origin.repo == place.repo and head.get("asked") == (revision or place.revision)
    return origin.revision if origin is not None and same else None


def head_at(destination: Path) -> Mapping[str, Any]:
    """What the run that began in DST said of itself; nothing where none did."""
    state = destination / STATE_DIR
    try:
        return next(iter(heads_of(state, Outline.read(state))), {})
    except OSError:
        return {}  # whoever opens the journal says so


def provenance(root: Path) -> dict[str, str]:
    """`version`, `recipe`, `from` and `command` of the run that wrote the checkpoint in `root`; none without a journal.

    `from` is the source's name, empty of a synthetic sample, and `command` what was typed, empty if nothing was.
    """
    try:
        lines = read_lines(root / STATE_DIR / JOURNAL)
    except OSError:
        return {}
    head = lines[0] if lines else {}
    return {key: str(head.get(key, "")) for key in PROVENANCE} if "version" in head else {}


def advice(rank: Rank | None, another: str = DIRECTORY) -> str:
    """What helps where DST holds something else."""
    if rank is None:
        return f"choose {another}, or --overwrite to replace the checkpoint in it"
    return f"choose {another}, and give all ranks the same command, SRC and kconvert"


def check_head(
    place: object, head: Mapping[str, Any], plan: Plan, rank: Rank | None, is_open: bool, another: str = DIRECTORY
) -> None:
    """KconvertError where DST, `place`, holds another conversion than that of `plan`; `is_open` is what has no config.json
    yet."""
    if belongs(head, plan):
        return
    help = advice(rank, another)
    if rank is not None and is_open and is_mended(head, plan):
        help = (
            "give all ranks the same SRC or, if files of it were replaced by sound ones, the command once without --worker, "
            "which keeps what was made of the others"
        )
    raise KconvertError(f"{place} holds a conversion {_difference(head, plan)}; {help}")


def _difference(head: Mapping[str, Any], plan: Plan) -> str:
    """What is another in the run that a journal belongs to."""
    if (version := head.get("version", __version__)) != __version__:
        return f"by kconvert {version}, and this is {__version__}"
    same = head.get("plan") == plan.hash
    return "from source files that have changed since" if same else "with other settings, or of another source"
