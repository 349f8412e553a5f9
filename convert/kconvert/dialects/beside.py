"""Quantisation that a file beside config.json declares, and config.json does not.

Some tools write such a file only, or an older config.json hides what it says: the weights then look like nothing known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from kconvert.dialects.fields import Table, brief
from kconvert.dialects.registry import dialect_of
from kconvert.dialects.unread import unread
from kconvert.errors import KconvertError

# File -> the key in it where the quantisation is; "": it is all there is.
FILES = {
    "hf_quant_config.json": "quantization",
    "quantize_config.json": "",
    "quant_config.json": "",
    "quantization_config.json": "",
}


def declared_beside(names: Collection[str], read: Callable[[str], bytes]) -> str | None:
    """What the first of the side files `names` that declares a quantisation declares, as a sentence; None: there is none.

    It is for a checkpoint whose tensors are quantised and whose config.json declares nothing. `read` gives a file's content.
    """
    found = next((name for name in FILES if name in names), None)
    if found is None:
        return None
    values = _parse(read(found))
    if FILES[found] and isinstance(values, dict):
        values = values.get(FILES[found])
    if not isinstance(values, dict):
        return f"{found} should declare a quantisation, and is {brief(values)}; fetch it again"
    return f"{found} declares a quantisation that config.json does not: {_describe(Table('', values))}"


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return "no JSON"


def _describe(table: Table) -> str:
    if (other := unread(table)) is not None:
        return f"{other.describe(table)}, which is not read; {other.helps}"
    try:
        dialect = dialect_of(table)
    except KconvertError:
        method = table.values.get("quant_method")
        return "one without a quant_method" if method is None else f"quant_method {brief(method)}, which is not known"
    return f"{dialect.METHODS[0]}, which is read from config.json only; put its content there as quantization_config"
