"""A converted checkpoint to the Hub: shards one by one as they are finished, and one commit at the end that names them all.

Until that commit the repository shows nothing, so nobody finds half a checkpoint there. What has been sent is known to the
Hub by its digest; a rerun names it again without having the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.lfs import UploadInfo

from kconvert.checkpoint.listing import FileStat
from kconvert.checkpoint.side_files import is_stale
from kconvert.errors import KconvertError
from kconvert.hub.client import FIRST, Patience, api, patiently
from kconvert.hub.digests import matches
from kconvert.hub.front_matter import CARD
from kconvert.hub.ids import HubId
from kconvert.hub.repository import list_files

OWN = (CARD, ".gitattributes")  # what a repository may have before it has a checkpoint


def workplace(target: HubId) -> Path:
    """Where an output that is only meant for the Hub lies until it is there."""
    return Path(constants.HF_HOME, "kconvert", str(target).replace("/", "--"))


class Upload:
    """A commit in the making. Opening it makes the repository, private, if there is none."""

    def __init__(self, target: HubId) -> None:
        self._target = target
        patiently(target, "make the repository", lambda: api().create_repo(target.repo, private=True, exist_ok=True))
        self._before = contents(target)

    def has(self, upload: Mapping[str, Any]) -> bool:
        """Whether a journal's record says that the content is here."""
        return upload.get("repo") == self._target.repo

    def send(self, name: str, path: Path) -> dict[str, Any]:
        """Send the content of a shard; returns what the commit, or the one of a later run, needs to know of it."""
        # Made once: its digest takes a while, and does not change over the attempts.
        addition = CommitOperationAdd(name, path)

        def attempt() -> None:
            api().preupload_lfs_files(self._target.repo, [addition], revision=self._target.revision)

        patiently(self._target, f"send {name} to the repository", attempt, attempts=2)
        if not addition._is_uploaded:
            raise KconvertError(f"{self._target} will not take {name} as a large file; mend its .gitattributes")
        info = addition.upload_info
        return {"repo": self._target.repo, "sha256": info.sha256.hex(), "size": info.size}

    def commit(
        self, shards: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path], card: bytes, message: str
    ) -> None:
        """Make one commit of what was sent, small files and the card."""
        patience = Patience(self._target, "commit to")
        while not self._is_there(shards, files):
            with patience.attempt():
                additions = [
                    *(_sent(name, upload) for name, upload in shards.items()),
                    *(CommitOperationAdd(name, path) for name, path in files.items() if name not in OWN),
                    CommitOperationAdd(CARD, card),
                ]
                stale = [name for name in self._before if is_stale(name)]
                kept = shards.keys() | files.keys()
                api().create_commit(
                    self._target.repo,
                    [*additions, *(CommitOperationDelete(name) for name in stale if name not in kept)],
                    commit_message=message,
                    revision=self._target.revision,
                )
                return

    def _is_there(self, shards: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]) -> bool:
        """Whether an earlier attempt, whose answer never came, has done it."""
        there = contents(self._target)
        sent = all(name in there and there[name].stamp == f"sha256:{up['sha256']}" for name, up in shards.items())
        return sent and all(
            name in there and matches(path, there[name]) for name, path in files.items() if name not in OWN
        )


def head(target: HubId) -> HubId | None:
    """The repository at its last commit; None when there is no such repository, or none that this user may see."""

    def look() -> HubId | None:
        try:
            return HubId(target.repo, api().model_info(target.repo, revision=target.revision).sha)
        except RepositoryNotFoundError:
            return None

    return patiently(target, FIRST, look)


def contents(target: HubId) -> dict[str, FileStat]:
    """What is in the repository now."""
    place = head(target)
    return list_files(place) if place is not None and place.revision else {}


def check_target(target: HubId, ours: Iterable[str], overwrite: bool) -> None:
    """KconvertError when the repository has files that a commit would replace or mix with, but for `ours`; writes nothing."""
    there = set(contents(target)) - {*OWN, *ours}
    if there and not overwrite:
        raise KconvertError(
            f"{target} is not empty ({min(there)}); choose another repository, or --overwrite to replace the checkpoint in it"
        )


def _sent(name: str, upload: Mapping[str, Any]) -> CommitOperationAdd:
    """The addition of a file that has been sent, perhaps by an earlier process, and need not be here any more.

    The client keeps what it knows of a sent file in these attributes of an addition; it has no call that restores them.
    """
    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(sha256=bytes.fromhex(upload["sha256"]), size=upload["size"], sample=b"")
    addition._upload_mode = "lfs"
    addition._should_ignore = False
    addition._is_uploaded = True
    return addition
