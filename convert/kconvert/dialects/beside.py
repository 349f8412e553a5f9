"""Quantisation that a file beside config.json declares, and config.json does not.

Some tools write such a file only, or an older config.json hides what it says: the weights then look like nothing known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from kconvert.dialects.fields import Table, brief
from kconvert.dialects.registry import dialect_of
from kconvert.dialects.unread import unread
from kconvert.errors import KconvertError

DECLARING_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
KEY = "quantization"  # where ModelOpt has it, beside the name of the producer


def declared_beside(names: Collection[str], read: Callable[[str], bytes]) -> str | None:
    """What one of the side files `names` declares, as a sentence that begins with its name; None: none declares anything.

    It is for a checkpoint whose tensors are quantised as config.json does not say. `read` gives a file's content.
    """
    for name in DECLARING_FILES:
        if name not in names:
            continue
        try:
            values = json.loads(read(name))
        except (ValueError, RecursionError):
            return f"{name} is no JSON; fetch it again"
        if isinstance(values, dict) and values:
            inner = values.get(KEY)
            table = Table("", inner if isinstance(inner, dict) else values)
            return f"{name} declares a quantisation that config.json does not: {_describe(table)}"
    return None


def _describe(table: Table) -> str:
    try:
        dialect = dialect_of(table)
    except KconvertError:
        if (other := unread(table)) is not None:
            return f"{other.describe(table)}, which is not read; {other.helps}"
        method = table.values.get("quant_method")
        return "one without a quant_method" if method is None else f"quant_method {brief(method)}, which is not known"
    return f"{dialect.METHODS[0]}, which is read from config.json only; put its content there as quantization_config"
