"""What is read in compressed-tensors' config_groups, and the sentence for each value that makes no sense."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme

from kconvert import KconvertError
from kconvert.dialects import read_quantization
from kconvert.dialects.presets import PRESETS
from kconvert.formats.base import Scheme

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
TABLE = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def with_weights(**changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = copy.deepcopy(TABLE)
    table["config_groups"]["group_0"]["weights"].update(changes)
    return table


def with_groups(**groups: Any) -> dict[str, Any]:
    return {**TABLE, "config_groups": groups}


def read(table: dict[str, Any]) -> Any:
    return read_quantization({"quantization_config": table})


def test_ignored_modules_and_modules_of_no_target_are_not_quantised() -> None:
    groups = {
        "a": {"targets": ["re:.*experts.*"], "weights": WEIGHTS},
        "b": {"targets": ["model.head"], "weights": {**WEIGHTS, "group_size": 64}},
    }
    found = read({**TABLE, "config_groups": groups, "ignore": ["re:.*gate.*"]})
    assert found.scheme_for("model.experts.0.up").group_size == 32
    assert found.scheme_for("model.head").group_size == 64
    assert found.scheme_for("model.experts.0.gate") is None
    assert found.scheme_for("model.other") is None


def test_a_group_without_weights_is_no_scheme() -> None:
    groups = {"kv": {"targets": ["re:.*attn"], "weights": None, "output_activations": {"num_bits": 8}}}
    assert read({**TABLE, "config_groups": groups}).schemes == ()


def test_one_target_and_one_ignored_name_need_no_list() -> None:
    groups = {"a": {"targets": "Linear", "weights": WEIGHTS}}
    found = read({**TABLE, "config_groups": groups, "ignore": "lm_head"})
    assert found.scheme_for("model.up_proj").num_bits == 4
    assert found.scheme_for("lm_head") is None


def test_a_group_may_have_a_format_of_its_own() -> None:
    groups = {"a": {"targets": ["Linear"], "weights": WEIGHTS, "format": "float-quantized"}}
    assert read({**TABLE, "format": "mixed-precision", "config_groups": groups}).schemes[0].format == "float-quantized"


@pytest.mark.parametrize("format", [None, "mixed-precision"])
def test_where_no_format_is_named_it_is_the_one_that_compressed_tensors_infers(format: str | None) -> None:
    table = {**TABLE, "format": format, "config_groups": {"W4A16": ["Linear"], "FP8_DYNAMIC": ["re:.*attn.*"]}}
    found = read({key: value for key, value in table.items() if value is not None})
    assert [scheme.format for scheme in found.schemes] == ["pack-quantized", "float-quantized"]


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
@pytest.mark.parametrize("spelt", [str.upper, str.lower], ids=["upper", "lower"])
def test_every_preset_means_what_compressed_tensors_means_by_it(name: str, spelt: Any) -> None:
    from compressed_tensors.compressors.format import infer_module_format
    from torch.nn import Linear

    schemes = read(with_groups(**{spelt(name): ["Linear"]})).schemes
    theirs = preset_name_to_scheme(name, ["Linear"])
    if theirs.weights is None:
        assert schemes == ()
        return
    (ours,) = schemes
    assert (ours.num_bits, ours.type, ours.symmetric) == (
        theirs.weights.num_bits,
        theirs.weights.type,
        theirs.weights.symmetric,
    )
    assert ours.strategy == theirs.weights.strategy
    assert ours.group_size == (theirs.weights.group_size if ours.strategy == "group" else None)
    assert ours.block == (tuple(theirs.weights.block_structure) if theirs.weights.block_structure else None)
    (inferred,) = read({**with_groups(**{name: ["Linear"]}), "format": "mixed-precision"}).schemes
    assert inferred.format == infer_module_format(Linear, theirs).value


def test_the_presets_are_those_of_compressed_tensors() -> None:
    assert PRESETS.keys() >= PRESET_SCHEMES.keys()


@pytest.mark.parametrize(
    ("strategy", "group_size"),
    [(None, 32), (None, -1), (None, None), ("group", 128), ("channel", None), ("channel", -1), ("GROUP", 32)],
)
def test_strategy_and_group_size_are_read_as_compressed_tensors_reads_them(
    strategy: str | None, group_size: int | None
) -> None:
    theirs = QuantizationScheme(
        targets=["Linear"], weights={**WEIGHTS, "strategy": strategy, "group_size": group_size}
    ).weights
    (ours,) = read(with_weights(strategy=strategy, group_size=group_size)).schemes
    assert ours.strategy == QuantizationStrategy(theirs.strategy).value
    assert ours.group_size == (theirs.group_size if ours.strategy == "group" else None)


def test_the_published_config_means_what_compressed_tensors_reads_in_it() -> None:
    ours, theirs = read(TABLE), TheirConfig.model_validate(TABLE)
    (scheme,), (group,) = ours.schemes, theirs.config_groups.values()
    assert (scheme.num_bits, scheme.type, scheme.symmetric) == (group.weights.num_bits, "int", group.weights.symmetric)
    assert (list(ours.ignore), list(scheme.targets)) == (theirs.ignore, group.targets)


@pytest.mark.parametrize("status", ["initialized", "calibration", "frozen", "compressed"])
def test_the_status_of_a_quantisation_does_not_hinder_reading_it(status: str) -> None:
    fake = {**TABLE, "quantization_status": status, "format": "dense"}
    assert read(fake).scheme_for("model.up_proj").format == "dense"
    assert read({**TABLE, "quantization_status": status}).schemes == read(TABLE).schemes


DENSE = {"format": "dense", "sparsity_structure": "unstructured", "global_sparsity": 0.13, "targets": ["Linear"]}


def test_sparse_weights_that_are_stored_with_their_zeros_are_read_as_they_are() -> None:
    assert read({**TABLE, "sparsity_config": DENSE}).schemes == read(TABLE).schemes
    only = {"quant_method": "compressed-tensors", "sparsity_config": DENSE}
    assert read(only).scheme_for("model.up_proj") is None


@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("quantised", [True, False])
def test_sparse_weights_without_their_zeros_are_said_to_be_what_they_are(format: str, quantised: bool) -> None:
    table = TABLE if quantised else {}
    with pytest.raises(
        KconvertError, match=rf"quantization_config\.sparsity_config has format '{format}'.*is not read"
    ):
        read({**table, "sparsity_config": {**DENSE, "format": format, "sparsity_structure": "2:4"}})


def test_marlins_order_is_said_to_be_what_it_is() -> None:
    with pytest.raises(KconvertError, match=r"quantization_config has format 'marlin-24' \(2:4 sparse .*is not read"):
        read({**TABLE, "format": "marlin-24"})
    groups = {"g": {"targets": ["Linear"], "weights": WEIGHTS, "format": "marlin-24"}}
    with pytest.raises(KconvertError, match=r"config_groups\.g has format 'marlin-24'"):
        read({**TABLE, "config_groups": groups})


def test_a_config_inside_the_config_is_read() -> None:
    for table in ({"quantization_config": TABLE}, {"quantization_config": TABLE, "sparsity_config": DENSE}):
        assert read_quantization({"compression_config": table}) == read(TABLE)
    sparse = {"quantization_config": TABLE, "sparsity_config": {**DENSE, "format": "sparse-bitmask"}}
    with pytest.raises(KconvertError, match="sparsity_config has format 'sparse-bitmask'"):
        read_quantization({"compression_config": sparse})


def transform(location: str) -> dict[str, Any]:
    return {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}}}


def test_rotations_that_the_model_needs_while_it_runs_cannot_get_lost() -> None:
    for location in ("weight_input", "weight_output"):
        assert read({**TABLE, "transform_config": transform(location)}).schemes == read(TABLE).schemes
    for location in ("input", "output", "q_attn", "k_cache"):
        with pytest.raises(KconvertError, match=rf"R1\.apply\[0\] rotates activations .*'{location}'"):
            read({**TABLE, "transform_config": transform(location)})


GROUP = "config_groups.group_0"
MALFORMED = {
    "config_groups null": ({**TABLE, "config_groups": None}, "config_groups is None; a table"),
    "config_groups a list": ({**TABLE, "config_groups": []}, "config_groups is []; a table"),
    "no config_groups": ({k: v for k, v in TABLE.items() if k != "config_groups"}, "config_groups is missing; a table"),
    "group null": (with_groups(a=None), "config_groups.a is None; a table"),
    "group a string": (with_groups(a="weights"), "config_groups.a is 'weights'; a table"),
    "an unknown preset": (with_groups(W5A3=["Linear"]), "config_groups.W5A3 is ['Linear']; a table"),
    "a preset of no names": (with_groups(W4A16=[1]), "config_groups.W4A16 is [1]; a list of names"),
    "weights a number": (with_groups(a={"weights": 4}), "config_groups.a.weights is 4; a table"),
    "targets of numbers": (with_groups(a={"weights": WEIGHTS, "targets": [1]}), "a.targets is [1]; a list of names"),
    "targets a number": (with_groups(a={"weights": WEIGHTS, "targets": 1}), "a.targets is 1; a list of names"),
    "a group's strange name": (with_groups(**{"a b\n": {"weights": 4}}), r"config_groups['a b\n'].weights is 4"),
    "ignore a number": ({**TABLE, "ignore": 3}, "ignore is 3; a list of names"),
    "ignore of null": ({**TABLE, "ignore": [None]}, "ignore is [None]; a list of names"),
    "a broken pattern": ({**TABLE, "ignore": ["re:("]}, "ignore has 're:(', which is no regular expression; mend it"),
    "group_size 0": (with_weights(group_size=0), f"{GROUP}.weights.group_size is 0; a positive number"),
    "group_size -5": (with_weights(group_size=-5), f"{GROUP}.weights.group_size is -5; a positive number"),
    "group_size null": (with_weights(group_size=None), f"{GROUP}.weights.group_size is None; a positive number"),
    "group_size a word": (with_weights(group_size="many"), f"{GROUP}.weights.group_size is 'many'; a whole number"),
    "num_bits a word": (with_weights(num_bits="four"), f"{GROUP}.weights.num_bits is 'four'; a whole number"),
    "num_bits null": (with_weights(num_bits=None), f"{GROUP}.weights.num_bits is None; a whole number"),
    "num_bits a list": (with_weights(num_bits=[4]), f"{GROUP}.weights.num_bits is [4]; a whole number"),
    "num_bits a half": (with_weights(num_bits=4.5), f"{GROUP}.weights.num_bits is 4.5; a whole number"),
    "symmetric a word": (with_weights(symmetric="false"), f"{GROUP}.weights.symmetric is 'false'; true or false"),
    "strategy a number": (with_weights(strategy=7), f"{GROUP}.weights.strategy is 7; a name"),
    "block without size": (
        with_weights(strategy="block"),
        f"{GROUP}.weights.block_structure is missing; the size of a block",
    ),
    "block of one": (with_weights(block_structure=[128]), f"{GROUP}.weights.block_structure is [128]; a pair"),
    "block of nothing": (with_weights(block_structure=[0, 128]), "block_structure is [0, 128]; a pair"),
    "format a number": ({**TABLE, "format": 8}, "quantization_config.format is 8; a name"),
    "sparsity a word": ({**TABLE, "sparsity_config": "2:4"}, "sparsity_config is '2:4'; a table"),
    "method a number": ({**TABLE, "quant_method": 7}, "quantization_config.quant_method is 7; a name"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_makes_no_sense_is_named_by_its_key(case: str) -> None:
    table, said = MALFORMED[case]
    with pytest.raises(KconvertError, match=re.escape(said)) as raised:
        read(table)
    sentence = str(raised.value)
    assert sentence.startswith("config.json: quantization_config")
    assert "\n" not in sentence
    assert "fetch" not in sentence


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(KconvertError) as raised:
        read({**TABLE, "ignore": ["x" * 10_000, 3]})
    assert len(str(raised.value)) < 300


def test_the_scheme_is_whole() -> None:
    assert read(TABLE).schemes == (Scheme("pack-quantized", 4, "int", True, "group", 32, ("Linear",)),)
    assert read(with_weights(group_size="32", num_bits=4.0)).schemes == read(TABLE).schemes
