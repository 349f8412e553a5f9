"""How a repository of the Hub is written on a command line: `org/name`, `hf://org/name@revision`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from kconvert.checkpoint.files import exists, is_directory

SCHEME = "hf://"
NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
PATTERN = re.compile(rf"(?:{SCHEME})?({NAME}/{NAME})(?:@([^\s@]+))?")


@dataclass(frozen=True, slots=True)
class HubId:
    """A model repository; `revision` is a branch, a tag or a commit, None for the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_hub_id(text: str) -> HubId | None:
    """None for what cannot be a repository."""
    match = PATTERN.fullmatch(text)
    if match is None or "--" in match[1] or ".." in match[1]:
        return None
    return HubId(match[1], match[2])


def parse_destination(text: str) -> HubId | None:
    """The repository that a DST names; None for a directory.

    `a/b` is a directory if it is there or could be made in `a`; `hf://a/b` never is.
    """
    if not text.startswith(SCHEME) and (exists(text) or is_directory(Path(text).parent)):
        return None
    return parse_hub_id(text)


def check_address() -> None:
    """KconvertError where what is set for the Hub's address is none: with some the client cannot even be imported."""
    if setting := os.environ.get("HF_ENDPOINT"):
        from kconvert.checkpoint.remote import parse_endpoint

        parse_endpoint(setting, "HF_ENDPOINT")
