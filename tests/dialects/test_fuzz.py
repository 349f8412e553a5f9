"""Whatever a config.json holds, it is read or refused in one sentence."""

from __future__ import annotations

import copy
import json
import random
import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kconvert import KconvertError
from kconvert.dialects import declared_beside, quantization_tables, read_quantization, without_quantization
from kconvert.dialects.compressed_tensors import compressed_fp8_table, int8_table, mx_table, packed_table
from kconvert.dialects.unread import UNREAD
from kconvert.formats import from_scheme
from kconvert.models.catalogue import load_manifests, manifest_for

# fmt: off
KEYS = [
    "quant_method", "config_groups", "ignore", "targets", "weights", "input_activations", "format", "num_bits",
    "group_size", "strategy", "type", "symmetric", "block_structure", "scale_dtype", "sparsity_config",
    "transform_config", "apply", "location", "quantization_config", "compression_config", "text_config", "llm_config",
    "quantization", "weight_block_size", "modules_to_not_convert", "ignored_layers", "expert_dtype", "W4A16",
    "FP8_BLOCK", "quant_algo", "quantized_layers", "exclude_modules", "exclude", "global_quant_config", "weight",
    "layer_quant_config", "layer_type_quant_config", "qscheme", "block_size", "scale_format", "moe_quant_algo", "store_dtype",
    "model_type",
    *(sign for unread in UNREAD for sign in unread.signs),
]
VALUES = [
    "compressed-tensors", "fp8", "pack-quantized", "mixed-precision", "group", "block", "channel", "int", "float",
    "Linear", "re:(", "re:.*", "128x128", "-1", "32", "sparse-24-bitmask", "weight_input", "modelopt", "quark", "mxfp8",
    "NVFP4", "MIXED_PRECISION", "FP8_PB_WO", "fp4", "mxfp4", "per_group", "e8m0", "fp8_e4m3", "*x*", "[z-a]", "[!",
    "deepseek_v4",
    *(method for unread in UNREAD for method in unread.methods),
]
# fmt: on
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([*VALUES, 4, 8, 32, -1])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)
configs = st.dictionaries(st.sampled_from(["quantization_config", "text_config", "a_config", "quantization"]), values)


MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [128, 128]}
LAYERS = {"model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}, "a.*": {"quant_algo": "FP8_PB_WO"}}
OTHERS: list[dict[str, Any]] = [
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "*self_attn*"]},
    {"quant_method": "modelopt", "quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": LAYERS}},
    {
        "quant_method": "quark",
        "global_quant_config": {"weight": MXFP4},
        "layer_quant_config": {"*self_attn*": {"weight": FP8}, "lm_head": {"weight": None}},
        "exclude": ["lm_head", "re:.*gate", "*router*"],
    },
    {"quant_method": "fp8", "weight_block_size": [32, 32], "moe_quant_algo": "NVFP4"},
    {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]},
]


def real_configs() -> list[dict[str, Any]]:
    """What published models and the product's own outputs have."""
    published = [manifest.config for manifest in load_manifests().values() if manifest.config]
    names = ["model.layers.0.mlp.up_proj"], ["lm_head"]
    tables = [packed_table(32, *names), int8_table(*names), mx_table(4, *names), compressed_fp8_table("block", *names)]
    return [
        *published,
        *({"quantization_config": table, "text_config": {"quantization_config": table}} for table in tables),
        *({"quantization_config": table, "model_type": "deepseek_v4", "expert_dtype": "fp4"} for table in OTHERS),
    ]


def mutated(config: dict[str, Any], number: random.Random, spare: list[Any]) -> dict[str, Any]:
    """A copy in which a few values at any depth are replaced, dropped or moved to another key."""
    config = copy.deepcopy(config)
    for _ in range(number.randint(1, 4)):
        level: Any = config
        while True:
            places = list(level) if isinstance(level, dict) else list(range(len(level)))
            # What is about quantisation is a small part of a config.json, and all that counts here.
            likely = [place for place in places if "config" in str(place) or level is not config]
            if not places:
                break
            place = number.choice(likely or places)
            if isinstance(level[place], dict | list) and number.random() < 0.8:
                level = level[place]
                continue
            if number.random() < 0.2:
                del level[place]
            elif isinstance(level, dict) and number.random() < 0.2:
                level[number.choice(KEYS)] = level.pop(place)
            else:
                level[place] = number.choice(spare)
            break
    return config


def check(config: dict[str, Any]) -> None:
    """Every function of the room that a conversion calls."""
    sentence = refusal(config)
    assert sentence is None or re.fullmatch(r"config\.json: .{,600}", sentence)
    plain = without_quantization(config)
    assert list(quantization_tables(plain)) == []
    assert read_quantization(plain).schemes == ()


def refusal(config: dict[str, Any]) -> str | None:
    try:
        quantization = manifest_for(config).quantization(config)
    except KconvertError as error:
        return str(error)
    for scheme in (quantization.scheme_for("model.layers.1.mlp.up_proj", "up_proj"), *quantization.schemes):
        if scheme is not None:
            with suppress(ValueError):  # no family has it
                from_scheme(scheme)
            assert str(scheme)
    return None


SPARE: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "re:[",
    [],
    [1],
    ["a"],
    {},
    {"a": None},
    *VALUES,
]
seeds = st.integers(0, 2**32)


@given(configs)
@settings(max_examples=250)
def test_no_config_breaks_the_reader(config: dict[str, Any]) -> None:
    check(config)


@given(seeds)
@settings(max_examples=250)
def test_no_damaged_config_breaks_the_reader(seed: int) -> None:
    number = random.Random(seed)
    check(mutated(number.choice(real_configs()), number, SPARE))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(configs)
@settings(max_examples=2000)
def test_no_config_breaks_the_reader_in_very_many_cases(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(seeds)
@settings(max_examples=10_000)
def test_no_damaged_config_breaks_the_reader_in_ten_thousand_cases(seed: int) -> None:
    number = random.Random(seed)
    check(mutated(number.choice(real_configs()), number, SPARE))


@given(values)
def test_no_file_beside_config_json_breaks_the_reader(content: Any) -> None:
    for name in ("hf_quant_config.json", "quantize_config.json"):
        for whole in (content, {"quantization": content}):
            said = beside(name, whole)
            assert said is None or said.startswith(name)


def beside(name: str, content: Any) -> str | None:
    """What a side file is refused with, or the name of it; None when it declares nothing."""
    try:
        found = declared_beside([name], lambda _: json.dumps(content).encode(), {})
    except KconvertError as error:
        return str(error)
    return None if found is None else found.file
