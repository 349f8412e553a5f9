import copy
import re

import pytest
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from compressed_tensors.utils.match import match_name
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kconvert import KconvertError
from kconvert.checkpoint.config import Scheme, matches, read_quantization, without_quantization

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
TABLE = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
PLACES = {
    "top": lambda table: {"a": 1, "quantization_config": table, "z": 2},
    "nested": lambda table: {"a": 1, "text_config": {"b": 1, "quantization_config": table, "y": 2}, "z": 2},
    "old": lambda table: {"a": 1, "compression_config": table, "z": 2},
}


def with_weights(**changes):
    table = copy.deepcopy(TABLE)
    table["config_groups"]["group_0"]["weights"].update(changes)
    return {"quantization_config": table}


@pytest.mark.parametrize("place", PLACES)
def test_the_quantisation_is_found_wherever_a_dialect_puts_it(place):
    found = read_quantization(PLACES[place](TABLE))
    assert found.schemes == (Scheme("pack-quantized", 4, "int", True, "group", 32, ("Linear",)),)
    assert found.ignore == ("lm_head", "re:.*self_attn.*")


def test_of_several_places_the_one_that_engines_take_first_counts():
    tables = [{**TABLE, "ignore": [name]} for name in ("top", "nested", "old")]
    config = {"compression_config": tables[2], "text_config": {"quantization_config": tables[1]}}
    assert read_quantization(config).ignore == ("nested",)
    assert read_quantization({**config, "quantization_config": tables[0]}).ignore == ("top",)


@pytest.mark.parametrize(
    "config",
    [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {}}, {"text_config": "x"}],
)
def test_a_config_without_quantisation_quantises_nothing(config):
    assert read_quantization(config).scheme_for("model.layers.0.mlp.up_proj") is None


def test_stripping_leaves_no_trace_of_quantisation_and_the_rest_in_its_order():
    config = {
        "a": 1,
        "quantization_config": TABLE,
        "text_config": {"b": [2], "quantization_config": TABLE, "compression_config": TABLE, "c": {"d": 3}},
        "compression_config": TABLE,
        "z": None,
    }
    before = copy.deepcopy(config)
    plain = without_quantization(config)
    assert plain == {"a": 1, "text_config": {"b": [2], "c": {"d": 3}}, "z": None}
    assert (list(plain), list(plain["text_config"])) == (["a", "text_config", "z"], ["b", "c"])
    assert config == before


@pytest.mark.parametrize("nested", [None, "x", [], 1])
def test_stripping_copies_a_strange_text_config_as_it_is(nested):
    assert without_quantization({"text_config": nested, "quantization_config": 1}) == {"text_config": nested}


def test_ignored_modules_and_modules_of_no_target_are_not_quantised():
    groups = {
        "a": {"targets": ["re:.*experts.*"], "weights": WEIGHTS},
        "b": {"targets": ["model.head"], "weights": {**WEIGHTS, "group_size": 64}},
    }
    found = read_quantization({"quantization_config": {**TABLE, "config_groups": groups, "ignore": ["re:.*gate.*"]}})
    assert found.scheme_for("model.experts.0.up").group_size == 32
    assert found.scheme_for("model.head").group_size == 64
    assert found.scheme_for("model.experts.0.gate") is None
    assert found.scheme_for("model.other") is None


def test_a_group_without_weights_is_no_scheme():
    groups = {"kv": {"targets": ["re:.*attn"], "weights": None, "output_activations": {"num_bits": 8}}}
    assert read_quantization({"quantization_config": {**TABLE, "config_groups": groups}}).schemes == ()


def test_a_group_may_have_a_format_of_its_own():
    groups = {"a": {"targets": ["Linear"], "weights": WEIGHTS, "format": "float-quantized"}}
    config = {"quantization_config": {**TABLE, "format": "mixed-precision", "config_groups": groups}}
    assert read_quantization(config).schemes[0].format == "float-quantized"


@pytest.mark.parametrize(
    ("strategy", "group_size"),
    [(None, 32), (None, -1), (None, None), ("group", 128), ("channel", None), ("channel", -1)],
)
def test_strategy_and_group_size_are_read_as_compressed_tensors_reads_them(strategy, group_size):
    weights = {**WEIGHTS, "strategy": strategy, "group_size": group_size}
    theirs = QuantizationScheme(targets=["Linear"], weights=weights).weights
    (ours,) = read_quantization(with_weights(strategy=strategy, group_size=group_size)).schemes
    assert ours.strategy == QuantizationStrategy(theirs.strategy).value
    assert ours.group_size == (theirs.group_size if ours.strategy == "group" else None)


def test_the_published_config_means_what_compressed_tensors_reads_in_it():
    ours, theirs = read_quantization({"quantization_config": TABLE}), TheirConfig.model_validate(TABLE)
    (scheme,), (group,) = ours.schemes, theirs.config_groups.values()
    assert (scheme.num_bits, scheme.type, scheme.symmetric) == (group.weights.num_bits, "int", group.weights.symmetric)
    assert (list(ours.ignore), list(scheme.targets)) == (theirs.ignore, group.targets)


@pytest.mark.parametrize(
    "table",
    [
        {**TABLE, "config_groups": None},
        {**TABLE, "config_groups": []},
        {**TABLE, "config_groups": {"a": None}},
        {**TABLE, "config_groups": {"a": "weights"}},
        {**TABLE, "config_groups": {"a": {"weights": 4}}},
        {**TABLE, "config_groups": {"a": {"weights": WEIGHTS, "targets": [1]}}},
        {**TABLE, "config_groups": {"a": {"weights": WEIGHTS, "targets": 1}}},
        {**TABLE, "ignore": 3},
        {**TABLE, "ignore": [None]},
        {**TABLE, "ignore": ["re:("]},
        {key: value for key, value in TABLE.items() if key != "config_groups"},
        with_weights(group_size=0)["quantization_config"],
        with_weights(group_size=-5)["quantization_config"],
        with_weights(group_size=None)["quantization_config"],
        with_weights(group_size="many")["quantization_config"],
        with_weights(num_bits="four")["quantization_config"],
        with_weights(num_bits=None)["quantization_config"],
        with_weights(num_bits=[4])["quantization_config"],
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_a_malformed_quantisation_is_refused(place, table):
    with pytest.raises(KconvertError, match=r"^config\.json: its quantization_config is malformed"):
        read_quantization(PLACES[place](table))


@pytest.mark.parametrize("table", ["int4", 4, True, ["pack-quantized"]])
@pytest.mark.parametrize("place", PLACES)
def test_a_quantisation_that_is_no_table_is_refused_and_not_taken_for_none(place, table):
    with pytest.raises(KconvertError, match=re.escape(f"its quantization_config is no table but {table!r}")):
        read_quantization(PLACES[place](table))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", 7, ["compressed-tensors"]])
def test_another_method_is_refused_by_name(method):
    with pytest.raises(KconvertError, match=re.escape(f"quant_method {method!r} is not supported")):
        read_quantization({"quantization_config": {"quant_method": method}})


tables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "config_groups",
                    "ignore",
                    "targets",
                    "weights",
                    "format",
                    "num_bits",
                    "group_size",
                    "strategy",
                    "type",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(tables)
def test_no_config_breaks_the_reader(table):
    message = "config.json"
    try:
        read_quantization({"quantization_config": table}).scheme_for("model.layers.1.mlp")
    except KconvertError as error:
        message = str(error)
    assert message.startswith("config.json")


pieces = st.sampled_from(
    ["model", "layers", "0", "10", "mlp", "gate", "up_proj", "lm_head", "self_attn", "x", "", "mlp."]
)
modules = st.lists(pieces, min_size=1, max_size=5).map(".".join)
expressions = st.lists(
    st.sampled_from([".*", "mlp", "gate", "(up|gate)_proj", r"\.", "layers", r"\d+", "$", "^", "model", "[0-9]", "?"]),
    max_size=5,
).map(lambda parts: "re:" + "".join(parts))


@given(modules, modules | expressions)
@example("model.mlp.up_proj", "re:mlp")
@example("model.mlp.up_proj", "re:model")
@example("model.mlp.up_proj", "model.mlp")
def test_names_match_as_compressed_tensors_matches_them(module, pattern):
    try:
        expected = match_name(module, pattern)
    except re.error:
        assume(False)
    assert matches(module, pattern) == expected
