"""Where in a config.json quantisation is declared: found, removed and put there.

A table is kept at the top level, or with the part of a multimodal model that it is about (`text_config` in Kimi-K2.5,
`llm_config`, `thinker_config.text_config`, …); old files of compressed-tensors call it `compression_config`, MLX's
`quantization`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kconvert.dialects.fields import Table
from kconvert.formats import Format

KEYS = ("quantization_config", "compression_config")
MLX_KEY = "quantization"
# Where DeepSeek-V4 says, beside the table, in which encoding its experts are.
EXPERTS_KEY = "expert_dtype"
SECTION = "_config"
DEPTH = 2
# The order in which serving engines look; the language model's comes before what sees and hears.
FIRST = (KEYS[0], f"text_config.{KEYS[0]}", KEYS[1])
HALVES = {"BF16": "bfloat16", "F16": "float16"}  # as config.json spells them
TOWERS = ("vision", "visual", "image", "video", "audio", "speech")


def declarations(config: Mapping[str, Any]) -> list[Table]:
    """Every quantisation table of a config.json, the one that counts first; KconvertError when one is no table."""
    return sorted(_declared(Table("", config, config=config), DEPTH), key=lambda table: _rank(table.path))


def quantization_tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The values of `declarations`."""
    return (table.values for table in declarations(config))


def _declared(section: Table, depth: int) -> Iterator[Table]:
    for key, value in section.values.items():
        if _declares(key, value):
            if value:
                yield section.table(key)
        elif depth and _is_section(key, value):
            yield from _declared(section.table(key), depth - 1)


def _declares(key: str, value: Any) -> bool:
    """Other tools have a `quantization` of their own; MLX's is known by what it holds."""
    return key in KEYS or (
        key == MLX_KEY and isinstance(value, dict) and {"bits", "group_size"} & value.keys() != set()
    )


def _is_section(key: str, value: Any) -> bool:
    return key.endswith(SECTION) and isinstance(value, dict)


def _rank(path: str) -> int:
    if path in FIRST:
        return FIRST.index(path)
    return len(FIRST) + any(word in path for word in TOWERS)


def without_quantization(config: Mapping[str, Any], depth: int = DEPTH) -> dict[str, Any]:
    """A copy of config.json with every trace of quantisation gone, also the nested ones (engines consult all of them)."""
    return {
        key: without_quantization(value, depth - 1) if depth and _is_section(key, value) else value
        for key, value in config.items()
        if not _declares(key, value) and key != EXPERTS_KEY
    }


def with_quantization(config: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json that declares the quantisation `table` and no other.

    It goes to the top level also where the source keeps it in `text_config` (Kimi-K2.5): engines look there first, and a
    second, nested one would be another place to disagree.
    """
    return {**without_quantization(config), KEYS[0]: dict(table)}


def declare_dtype(had: Mapping[str, Any], written: str, becomes: Iterable[Format | None]) -> dict[str, Any]:
    """config.json without quantisation and, where weights become plain in BF16 or F16, as `written` says, with that dtype:
    engines cast to it."""
    config = without_quantization(had)
    others = [dtype for half, dtype in HALVES.items() if half != written]
    tables = [table for table in (config, config.get("text_config")) if isinstance(table, dict)]
    places = [(table, key) for table in tables for key in ("torch_dtype", "dtype") if table.get(key) in others]
    if places and any(format is not None and not format.quantised for format in becomes):
        for table, key in places:
            table[key] = HALVES[written]
    return config
