"""Where an output goes: into a directory, and from there perhaps to a repository of the Hub."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kconvert.errors import KconvertError
from kconvert.hub.ids import HubId, parse_destination, parse_hub_id
from kconvert.planning.plan import Plan
from kconvert.run.journal import Journal, Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kconvert.hub.upload import Upload


@dataclass(frozen=True)
class Delivery:
    """`push` is the repository that gets the output. With `passing` the directory is only on the way there."""

    directory: Path
    push: HubId | None = None
    passing: bool = False

    @classmethod
    def to(cls, destination: str | os.PathLike[str], push: str | None = None) -> Delivery:
        """From DST, a directory or a Hub id, and --push."""
        target = parse_destination(os.fspath(destination))
        if push is None and target is None:
            return cls(Path(destination))
        if push is not None and target is not None:
            raise KconvertError(f"DST is {target} and --push says {push}; leave out one of them")
        if push is not None and (target := parse_hub_id(push)) is None:
            raise KconvertError(f"--push {push} is no repository of the Hub; name it as ORG/NAME")
        assert target is not None
        if push is not None:
            return cls(Path(destination), target)
        from kconvert.hub.upload import workplace

        return cls(workplace(target), target, passing=True)

    def __str__(self) -> str:
        return str(self.push if self.passing else self.directory)

    def published(self, plan: Plan) -> dict[str, Record]:
        """Records of all shards when the repository that DST is has the output of `plan` already; else none."""
        if self.push is None or not self.passing:
            return {}
        from kconvert.hub.front_matter import CARD
        from kconvert.hub.repository import list_files, small_file
        from kconvert.hub.upload import head

        place = head(self.push)
        files = list_files(place) if place is not None and place.revision else {}
        shards = [shard.name for shard in plan.shards]
        if place is None or not files.keys() >= {CARD, *shards, *plan.texts, *plan.side_files}:
            return {}
        digests = {name: files[name].stamp.removeprefix("sha256:") for name in shards}
        card = small_file(place, CARD, files[CARD]).read_text("utf-8", errors="replace")
        if _seal(plan, digests) not in card:
            return {}
        return {name: {"upload": {"repo": self.push.repo, "sha256": digest}} for name, digest in digests.items()}

    def check(self, plan: Plan, finished: Mapping[str, Record], overwrite: bool) -> None:
        """KconvertError when the repository has something else in it; it need not exist yet."""
        if self.push is None:
            return
        from kconvert.hub.upload import check_target

        # An earlier run may have made the commit and been killed before it knew.
        begun = any(record.get("upload", {}).get("repo") == self.push.repo for record in finished.values())
        ours = {shard.name for shard in plan.shards} | plan.texts.keys() | plan.side_files.keys()
        check_target(self.push, ours if begun else (), overwrite)

    def open(self) -> Upload | None:
        if self.push is None:
            return None
        from kconvert.hub.upload import Upload

        return Upload(self.push)

    def publish(self, plan: Plan, journal: Journal, outbox: Upload, command: str, card: str) -> None:
        """Commit what the directory holds and what was sent, with `card` as the repository's README.md."""
        uploads = {shard.name: journal.finished[shard.name]["upload"] for shard in plan.shards}
        digests = {name: upload["sha256"] for name, upload in uploads.items()}
        sealed = f"{card}\n{_seal(plan, digests)}\n".encode()
        files = {name: self.directory / name for name in (*plan.side_files, *plan.texts)}
        outbox.commit(uploads, files, sealed, f"Add the output of {command.partition(' -')[0]}")
        self.clear()

    def clear(self) -> None:
        """What has arrived need not be on the way any more."""
        if self.passing:
            shutil.rmtree(self.directory, ignore_errors=True)


def _seal(plan: Plan, digests: Mapping[str, str]) -> str:
    """A line that no other plan, source or shards would have: by it a later run knows that the output is there already."""
    text = f"{plan.hash} {plan.stamp} {sorted(digests.items())}"
    return f"<!-- kconvert {hashlib.sha256(text.encode()).hexdigest()} -->"
