"""The YAML at the head of a repository's README.md, which says what the model is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

CARD = "README.md"


def read_fields(card: Path) -> Mapping[str, Any]:
    """The fields of somebody's card; none if it cannot be read."""
    try:
        return metadata_load(card) or {}
    except Exception:  # the YAML is a stranger's
        return {}


def write_fields(fields: Mapping[str, Any]) -> str:
    return str(ModelCardData(**fields, ignore_metadata_errors=True).to_yaml())
