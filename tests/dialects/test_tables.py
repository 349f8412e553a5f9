"""Where in a config.json quantisation is declared: found, removed, put there."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.dialects import quantization_tables, read_quantization, with_quantization, without_quantization

TABLE: dict[str, Any] = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
PLACES = [
    "quantization_config",
    "compression_config",
    "text_config.quantization_config",
    "text_config.compression_config",
    "llm_config.quantization_config",
    "language_config.quantization_config",
    "thinker_config.text_config.quantization_config",
    "talker_config.code_predictor_config.compression_config",
]


def put(path: str, table: Any, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config.json with `table` at `path`, and other keys before and behind it at every level."""
    whole = level = {"a": 1} if config is None else config
    *sections, last = path.split(".")
    for section in sections:
        level = level.setdefault(section, {"b": [2]})
    level[last] = table
    level["z"] = {"c": 3}
    return whole


@pytest.mark.parametrize("place", PLACES)
def test_the_quantisation_is_found_wherever_a_config_puts_it(place: str) -> None:
    config = put(place, TABLE)
    assert list(quantization_tables(config)) == [TABLE]
    assert read_quantization(config).ignore == ("lm_head",)


@pytest.mark.parametrize("place", PLACES)
def test_the_quantisation_is_removed_wherever_a_config_puts_it(place: str) -> None:
    config = put(place, TABLE)
    before = copy.deepcopy(config)
    plain = without_quantization(config)
    assert list(quantization_tables(plain)) == []
    assert "quant" not in str(plain)
    assert "compression" not in str(plain)
    assert config == before


def test_removing_leaves_the_rest_in_its_order() -> None:
    config: dict[str, Any] = {"a": 1}
    for place in [*PLACES, "quantization"]:
        put(place, {**TABLE, "bits": 4}, config)
    plain = without_quantization({**config, "quantization_config": None, "y": None})
    assert list(plain) == [
        "a",
        "z",
        "text_config",
        "llm_config",
        "language_config",
        "thinker_config",
        "talker_config",
        "y",
    ]
    assert plain["thinker_config"] == {"b": [2], "text_config": {"b": [2], "z": {"c": 3}}}


def test_of_several_places_the_one_that_engines_take_first_counts() -> None:
    order = [
        "quantization_config",
        "text_config.quantization_config",
        "compression_config",
        "llm_config.quantization_config",
        "vision_config.quantization_config",
    ]
    for first in range(len(order)):
        config: dict[str, Any] = {}
        for place in reversed(order[first:]):
            put(place, {**TABLE, "ignored_layers": [place]}, config)
        assert read_quantization(config).ignore == (order[first],)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"text_config": {}},
        {"text_config": "x"},
        {"quantization": "none"},
        {"codec_config": {"quantization": {"codebooks": 8}}},
    ],
)
def test_a_config_without_quantisation_quantises_nothing(config: dict[str, Any]) -> None:
    assert read_quantization(config).scheme_for("model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize("strange", [None, "x", [], 1])
def test_removing_leaves_a_strange_text_config_as_it_is(strange: Any) -> None:
    assert without_quantization({"text_config": strange, "quantization_config": 1}) == {"text_config": strange}


@pytest.mark.parametrize("value", ["int4", 4, True, ["pack-quantized"]])
@pytest.mark.parametrize("place", PLACES)
def test_a_quantisation_that_is_no_table_is_refused_and_not_taken_for_none(place: str, value: Any) -> None:
    with pytest.raises(KconvertError, match=re.escape(f"config.json: {place} is {value!r}; a table belongs there")):
        read_quantization(put(place, value))


@pytest.mark.parametrize("place", PLACES)
def test_a_declaration_goes_to_the_top_and_leaves_no_other(place: str) -> None:
    written = with_quantization(put(place, TABLE), {"quant_method": "fp8"})
    assert list(quantization_tables(written)) == [{"quant_method": "fp8"}]
    assert written["quantization_config"] == {"quant_method": "fp8"}
