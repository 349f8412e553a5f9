"""Which scheme a module gets, side by side with compressed-tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from compressed_tensors.quantization import apply_quantization_config
from compressed_tensors.utils.match import match_name
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kconvert.dialects import read_quantization
from kconvert.dialects.base import matches

LINEARS = [
    *(f"model.layers.{layer}.mlp.experts.{e}.{p}_proj" for layer in (0, 1) for e in (0, 1) for p in ("up", "down")),
    *(f"model.layers.{layer}.self_attn.{p}_proj" for layer in (0, 1) for p in "qo"),
    "model.layers.0.mlp.gate",
    "lm_head",
]
EMBEDDING = "model.embed_tokens"
WORDS = ["model", "layers", "0", "1", "mlp", "gate", "up_proj", "lm_head", "self_attn", "x", "", "mlp."]
names = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)
expressions = st.lists(
    st.sampled_from([".*", "mlp", "gate", "(up|gate)_proj", r"\.", "layers", r"\d+", "$", "^", "model", "[0-9]", "?"]),
    max_size=5,
).map(lambda parts: "re:" + "".join(parts))
CLASSES = ["Linear", "Module", "Embedding", "LinearBase", "Linea", "re:Linear"]
USUAL = [
    r"re:.*down_proj$",
    r"re:.*layers\.0\..*",
    r"re:.*mlp\.experts.*",
    "re:.*self_attn.*",
    "re:.*",
    "re:model",
    "model.layers",
]
targets = st.sampled_from([*LINEARS, EMBEDDING, *CLASSES, *USUAL]) | expressions
ARGS = [
    {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": size}
    for bits, symmetric, size in ((4, True, 32), (8, True, 32), (4, False, 64), (8, True, 64))
]
groups = st.lists(
    st.fixed_dictionaries(
        {"targets": st.lists(targets, min_size=1, max_size=4), "weights": st.sampled_from([*ARGS, *ARGS, None])}
    ),
    min_size=1,
    max_size=4,
)


def small_model() -> torch.nn.Module:
    model = torch.nn.Module()
    for name in [*LINEARS, EMBEDDING]:
        *path, last = name.split(".")
        parent = model
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, torch.nn.Module())
            parent = getattr(parent, step)
        kind = torch.nn.Embedding if name == EMBEDDING else torch.nn.Linear
        parent.add_module(last, kind(64, 64, device="meta"))
    return model


def theirs(table: dict[str, Any]) -> dict[str, Any]:
    """What compressed-tensors attaches to each module, as far as it concerns the weights."""
    model = small_model()
    apply_quantization_config(model, TheirConfig.model_validate(table), show_progress=False)
    found = {}
    for name in [*LINEARS, EMBEDDING]:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        weights = scheme.weights if scheme else None
        found[name] = weights and (weights.num_bits, weights.symmetric, weights.group_size)
    return found


def ours(table: dict[str, Any]) -> dict[str, Any]:
    quantization = read_quantization({"quantization_config": table})
    schemes = {name: quantization.scheme_for(name) for name in [*LINEARS, EMBEDDING]}
    return {name: scheme and (scheme.num_bits, scheme.symmetric, scheme.group_size) for name, scheme in schemes.items()}


def check_side_by_side(parts: list[dict[str, Any]], ignore: list[str]) -> None:
    spelt = [target for part in parts for target in part["targets"]] + ignore
    try:
        for target in spelt:
            re.compile(target.removeprefix("re:"))
    except re.error:
        assume(False)
    table = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{number}": part for number, part in enumerate(parts)},
        "ignore": ignore,
    }
    assert ours(table) == theirs(table)


@given(groups, st.lists(targets, max_size=3))
@settings(max_examples=60)
def test_each_module_gets_the_scheme_that_compressed_tensors_gives_it(
    parts: list[dict[str, Any]], ignore: list[str]
) -> None:
    check_side_by_side(parts, ignore)


@pytest.mark.slow
@given(groups, st.lists(targets, max_size=3))
@settings(max_examples=2000)
def test_each_module_gets_the_scheme_that_compressed_tensors_gives_it_in_very_many_configs(
    parts: list[dict[str, Any]], ignore: list[str]
) -> None:
    check_side_by_side(parts, ignore)


INT4, INT8, ASYMMETRIC, WIDE = ARGS
DOWN, UP = "model.layers.0.mlp.experts.0.down_proj", "model.layers.0.mlp.experts.1.up_proj"


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("winner", "loser", "module"),
    [
        (r"re:.*down_proj$", "Linear", DOWN),
        (UP, r"re:.*mlp\.experts.*", UP),
        (UP, "Linear", UP),
        (r"re:.*down_proj$", r"re:.*experts.*", DOWN),
        (r"re:.*experts\.1.*", r"re:.*up_proj$", UP),
        ("Linear", "Module", UP),
    ],
)
def test_a_name_beats_a_pattern_and_a_pattern_a_class_in_whatever_order_the_groups_are(
    winner: str, loser: str, module: str, swap: bool
) -> None:
    parts = [{"targets": [winner], "weights": INT8}, {"targets": [loser], "weights": INT4}]
    table = {"config_groups": {str(number): part for number, part in enumerate(parts[::-1] if swap else parts)}}
    assert ours(table)[module][0] == 8
    assert ours(table) == theirs(table)


def test_of_groups_with_the_same_target_the_last_counts() -> None:
    parts = {str(n): {"targets": ["Linear"], "weights": weights} for n, weights in enumerate((INT4, INT8))}
    assert ours({"config_groups": parts})["lm_head"][0] == 8
    assert ours({"config_groups": parts}) == theirs({"config_groups": parts})


def test_a_group_that_quantises_activations_only_leaves_its_modules_weights_alone() -> None:
    attention = {"targets": ["re:.*self_attn.*"], "weights": None}
    table = {"config_groups": {"a": {"targets": ["Linear"], "weights": INT4}, "b": attention}}
    assert ours(table)["model.layers.0.self_attn.q_proj"] is None
    assert ours(table) == theirs(table)


def test_an_embedding_is_no_linear() -> None:
    groups = {"a": {"targets": ["Linear"], "weights": INT4}, "b": {"targets": ["Embedding"], "weights": INT8}}
    assert (ours({"config_groups": groups})[EMBEDDING][0], ours({"config_groups": groups})["lm_head"][0]) == (8, 4)
    del groups["b"]
    assert ours({"config_groups": groups})[EMBEDDING] is None


def test_a_class_may_be_ignored() -> None:
    groups = {"a": {"targets": ["re:.*"], "weights": INT4}}
    table = {"config_groups": groups, "ignore": ["Linear"]}
    assert ours(table) == theirs(table)
    assert {name for name, scheme in ours(table).items() if scheme} == {EMBEDDING}


def test_a_model_inside_another_is_meant_by_its_own_names_too() -> None:
    groups = {"a": {"targets": ["Linear"], "weights": INT4}, "b": {"targets": ["model.up_proj"], "weights": INT8}}
    table = {"config_groups": groups, "ignore": ["model.down_proj"]}
    found = read_quantization({"text_config": {"quantization_config": table}})
    both = {name: (f"language_model.model.{name}", f"model.{name}") for name in ("up_proj", "down_proj", "gate_proj")}
    assert found.scheme_for(*both["up_proj"]).num_bits == 8
    assert found.scheme_for(*both["down_proj"]) is None
    assert found.scheme_for(*both["gate_proj"]).num_bits == 4


@given(names, names | expressions)
@example("model.mlp.up_proj", "re:mlp")
@example("model.mlp.up_proj", "re:model")
@example("model.mlp.up_proj", "model.mlp")
def test_names_match_as_compressed_tensors_matches_them(module: str, pattern: str) -> None:
    try:
        expected = match_name(module, pattern)
    except re.error:
        assume(False)
    assert matches(module, pattern) == expected
