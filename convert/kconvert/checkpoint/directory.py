"""What lies in a checkpoint's directory on the disk: every file, through the links that may be followed.

Checkpoints are strangers' work, and a conversion hands on what it reads. So links that lead out of the directory are
refused, but for those into the blobs of a repository in the Hub's cache, unless the user says that he trusts them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from kconvert.checkpoint.listing import CONFIG_NAME, FileStat
from kconvert.errors import KconvertError, explain_os_error

# A policy of a whole command: of what it converts, compares with, and copies along.
_ANY_LINK: ContextVar[bool] = ContextVar("any link", default=False)


@contextmanager
def links_allowed() -> Iterator[None]:
    """Within, links of checkpoints are followed wherever they lead."""
    token = _ANY_LINK.set(True)
    try:
        yield
    finally:
        _ANY_LINK.reset(token)


def are_links_allowed() -> bool:
    """Whether this is such a command, for who sends a part of it elsewhere."""
    return _ANY_LINK.get()


def list_directory(root: Path) -> dict[str, FileStat]:
    """Every regular file below `root`, by relative path; hidden folders (.git, .cache, our own) are not content.

    Folders behind links are listed as if they lay there. Raises KconvertError for what cannot be looked at, for links that
    lead outside, nowhere or in circles, and for what is no file where one should be.
    """
    found: dict[str, FileStat] = {}
    linked: set[str] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        folders = []
        try:
            with os.scandir(root / prefix) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    _check_name(entry)
                    look = _look(root, entry)
                    name = prefix + entry.name
                    if not stat.S_ISDIR(look.st_mode):
                        _check_regular(entry, look)
                        found[name] = _stat_of(look)
                    elif not entry.name.startswith("."):
                        _check_folder(entry, linked)
                        folders.append(f"{name}/")
        except OSError as error:
            raise explain_os_error(error, f"cannot read {error.filename or root / prefix}") from None
        pending += reversed(folders)
    return found


def check_same(root: Path, file: str, was: FileStat) -> None:
    """KconvertError where a file is not as it was listed."""
    try:
        now = _stat_of(os.stat(root / file))
    except FileNotFoundError:
        now = None
    except OSError as error:
        raise explain_os_error(error, f"cannot read {root / file}") from None
    if now != was:
        raise KconvertError(
            f"{root / file} has changed while it was being read; run the same command again when nobody writes there, which "
            "makes anew what it went into"
        )


def _stat_of(look: os.stat_result) -> FileStat:
    return FileStat(look.st_size, f"{look.st_size}:{look.st_mtime_ns}")


def _check_name(entry: os.DirEntry[str]) -> None:
    """Names are told on terminals and written into files; those of strangers may hold anything."""
    if not entry.name.isprintable():
        raise KconvertError(
            f"{os.path.dirname(entry.path)} has a file called {entry.name!r}, which cannot be printed; rename it"
        )


def _look(root: Path, entry: os.DirEntry[str]) -> os.stat_result:
    """What the entry is, or what its link leads to."""
    try:
        look = entry.stat()
    except FileNotFoundError:
        if not entry.is_symlink():
            raise
        raise KconvertError(
            f"{entry.path} is missing: it is a symbolic link to {os.path.realpath(entry.path)}, where nothing is; fetch or "
            "copy the file itself to this place (cp -rL follows links)"
        ) from None
    hidden = entry.name.startswith(".") and stat.S_ISDIR(look.st_mode)
    if entry.is_symlink() and not hidden:
        check_link(root, Path(entry.path))
    return look


def check_link(root: Path, path: Path) -> None:
    """KconvertError unless the symbolic link `path`, of the checkpoint in `root`, may be followed."""
    target = Path(os.path.realpath(path))
    in_cache = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    if in_cache or are_links_allowed() or target.is_relative_to(os.path.realpath(root)):
        return
    raise KconvertError(
        f"{path} is a symbolic link to {target}, outside the checkpoint; put the file itself there, or follow it with "
        "--allow-links if you trust who made it"
    )


def _check_regular(entry: os.DirEntry[str], look: os.stat_result) -> None:
    if not stat.S_ISREG(look.st_mode):
        raise KconvertError(
            f"{entry.path} is neither a file nor a folder; a checkpoint has no such thing, move it away"
        )


def _check_folder(entry: os.DirEntry[str], linked: set[str]) -> None:
    """KconvertError for a folder in the place of a file, and for a second link to the same: circles are made of those."""
    if entry.name == CONFIG_NAME or entry.name.endswith((".safetensors", ".index.json")):
        raise KconvertError(f"{entry.path} is a folder, where a file should be; fetch the file")
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if target in linked or Path(os.path.realpath(os.path.dirname(entry.path))).is_relative_to(target):
            raise KconvertError(
                f"{entry.path} is a symbolic link to {target}, which other links lead through as well; put the folder itself "
                "there"
            )
        linked.add(target)


def snapshot(root: Path, revision: str | None) -> Path:
    """`root` itself, or the snapshot of `revision` (a branch, a tag or a commit) if it is a repository of the Hub's cache."""
    if not (root / "snapshots").is_dir():
        if revision is not None:
            raise KconvertError(
                f"{root} has no revisions, it is no repository of the Hub's cache; leave out --revision"
            )
        return root
    name = revision or "main"
    inside = not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name
    commit = name
    if inside and (reference := root / "refs" / name).is_file():
        commit = reference.read_text("utf-8", errors="replace").strip()
    found = root / "snapshots" / commit
    if not inside or not commit or Path(commit).name != commit or "\0" in commit or not found.is_dir():
        raise KconvertError(f"{root} has no snapshot of the revision {name!r}; fetch it")
    return found
