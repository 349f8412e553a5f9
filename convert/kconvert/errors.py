"""The two ways a command ends badly; `cli` turns them into one sentence and an exit code. How messages spell bytes."""

from __future__ import annotations

import errno
import os


class KconvertError(Exception):
    """Wrong usage or bad input (exit code 2). The message is one sentence that names file and tensor."""


class CheckFailed(KconvertError):
    """A check that ran to its end and found a difference (exit code 1)."""


class Unfit(ValueError):
    """What of a weight an encoding does not take; `advice` is what would help, said after where it is."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.advice = advice


class Damaged(Unfit):
    """What of a weight no sound checkpoint has."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "its file is damaged or was written wrongly: fetch it again, or have it made anew")


def explain_os_error(error: OSError, doing: str) -> KconvertError:
    """Turn the error of a system call into one sentence: what was being done, what went wrong, what would help."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    where = f" {path}" if path and path not in doing else ""
    advice = {
        errno.ENOSPC: "; free some space and run the same command again, finished shards are kept",
        errno.EDQUOT: "; your disk quota is used up, free some space and run the same command again",
        errno.EIO: "; the disk reported an error, check it and run the same command again",
        errno.EACCES: "; check the permissions",
        errno.EPERM: "; check the permissions",
        errno.EROFS: "; the file system is mounted read-only",
        errno.ELOOP: "; mend the links, which lead in a circle",
        errno.ENAMETOOLONG: "; choose a shorter name",
    }.get(error.errno or 0, "")
    return KconvertError(f"{doing}{where}: {error.strerror or error}{advice}")


def counted(number: int, one: str, several: str = "") -> str:
    """3_000, "shard" -> '3,000 shards'; 1, "shard" -> '1 shard'; with words of their own for `several`: '2 matrices'."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def some_have(number: int, what: str) -> str:
    """1, "groups" -> '1 of its groups has'."""
    return f"{number:,} of its {what} {'has' if number == 1 else 'have'}"


def human(nbytes: float) -> str:
    """3_456_000_000 -> '3.46 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
