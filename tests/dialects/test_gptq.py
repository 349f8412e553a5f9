"""What is read in GPTQ's and AWQ's dialects."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.dialects import read_quantization
from kconvert.formats.base import Scheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def scheme(table: dict[str, Any], module: str = "model.layers.0.q_proj", **changes: Any) -> Scheme:
    found = read_quantization({"quantization_config": {**table, **changes}}).scheme_for(module)
    assert found is not None
    return found


@pytest.mark.parametrize("module", ["model.layers.3.mlp.experts.1.up_proj", "lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("table", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_whatever_has_the_tensors_is_meant(table: dict[str, Any], module: str) -> None:
    found = scheme(table, module, modules_to_not_convert=["lm_head"], lm_head=False)
    assert (found.num_bits, found.group_size, found.type) == (4, 128, "int")


@pytest.mark.parametrize("table", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_one_group_is_a_whole_row(table: dict[str, Any]) -> None:
    assert (scheme(table, group_size=-1).strategy, scheme(table, group_size=-1).group_size) == ("channel", None)


@pytest.mark.parametrize("size", [0, -2, "many", 1.5])
def test_a_group_size_that_makes_no_sense_is_named(size: Any) -> None:
    with pytest.raises(KconvertError, match=re.escape(f"quantization_config.group_size is {size!r}; a ")):
        scheme(GPTQ, group_size=size)


@pytest.mark.parametrize("bits", [None, 1, 5, 16, "four"])
def test_bits_that_are_not_written_are_named(bits: Any) -> None:
    for table in (GPTQ, AWQ):
        with pytest.raises(KconvertError, match=re.escape(f"quantization_config.bits is {bits!r}; ")):
            scheme(table, bits=bits)


def test_bits_must_be_said() -> None:
    with pytest.raises(KconvertError, match=r"quantization_config\.bits is missing"):
        read_quantization({"quantization_config": {"quant_method": "gptq", "group_size": 128}})


@pytest.mark.parametrize(
    ("changes", "spelling"),
    [
        ({}, "gptq"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq_p"}, "gptq_v2"),
        ({"meta": {"quantizer": ["gptqmodel:2.2.0"]}}, "gptqmodel"),
        ({"meta": {"quantizer": "gptqmodel:1.0.0"}, "checkpoint_format": "gptq"}, "gptqmodel"),
        ({"meta": {"quantizer": ["gptqmodel:2.2.0"]}, "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"meta": ["gptqmodel:"]}, "gptq"),
        ({"quant_method": "gptq_marlin"}, "gptq"),
    ],
)
def test_how_zero_points_are_stored_is_said_by_the_format_and_who_wrote_it(
    changes: dict[str, Any], spelling: str
) -> None:
    assert scheme(GPTQ, **changes).format == spelling


@pytest.mark.parametrize(
    ("table", "changes", "said"),
    [
        (GPTQ, {"checkpoint_format": "marlin"}, "weights in the format 'marlin', which is not read"),
        (GPTQ, {"is_marlin_format": True}, "weights in the format 'marlin', which is not read"),
        (GPTQ, {"checkpoint_format": "bitblas"}, "weights in the format 'bitblas'"),
        (GPTQ, {"pack_dtype": "int64"}, "pack_dtype is 'int64'; 'int32', the words that are read, belongs there"),
        (GPTQ, {"checkpoint_format": "gptq_p", "bits": 3}, "bits is 3; 2 or 4 or 8 belongs there"),
        (AWQ, {"version": "gemv"}, "weights in the format 'gemv', which is not read, only gemm and exllama"),
        (AWQ, {"version": "gemv_fast"}, "weights in the format 'gemv_fast'"),
        (AWQ, {"version": None, "format": "llm-awq"}, "weights in the format 'llm-awq'"),
    ],
)
def test_other_orders_of_codes_are_called_by_their_names(
    table: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(KconvertError, match=re.escape(said)):
        scheme(table, **changes)


def test_of_the_patterns_of_dynamic_the_first_that_matches_counts() -> None:
    rules = {
        r"-:.*gate$": {},
        r".*layers\.1\..*": {"bits": 8},
        r"+:.*down": {"bits": 2, "group_size": -1},
        ".*q_": {"sym": False},
    }
    assert scheme(GPTQ, "model.layers.1.down", dynamic=rules).num_bits == 8
    assert scheme(GPTQ, "model.layers.2.down", dynamic=rules).group_size is None
    assert not scheme(GPTQ, "model.layers.2.q_proj", dynamic=rules).symmetric
    assert scheme(GPTQ, "model.layers.2.up", dynamic=rules).num_bits == 4


def test_patterns_that_are_whole_names_are_looked_up_as_names() -> None:
    rules = {rf"^model\.layers\.{n}\.up$": {"bits": 8} for n in range(20_000)}
    quantization = read_quantization({"quantization_config": {**GPTQ, "dynamic": rules}})
    assert len(quantization.schemes) == 2
    assert [quantization.scheme_for(f"model.layers.{n}.up").num_bits for n in (7, 19_999, 20_000)] == [8, 8, 4]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"+:(": {"bits": 8}}, "dynamic has '(', which is no regular expression"),
        ({"a": 3}, "dynamic.a is 3; a table belongs there"),
        ({"a": {"bits": 9}}, "dynamic.a.bits is 9; 2 or 3 or 4 or 8 belongs there"),
        (["a"], "dynamic is ['a']; a table belongs there"),
    ],
)
def test_rules_that_make_no_sense_are_named(rules: Any, said: str) -> None:
    with pytest.raises(KconvertError, match=re.escape(said)):
        scheme(GPTQ, dynamic=rules)


def test_an_old_table_of_awq_has_keys_of_its_own() -> None:
    found = read_quantization({"quantization_config": {"zero_point": False, "q_group_size": 64, "w_bit": 4}}).schemes[
        -1
    ]
    assert (found.format, found.group_size, found.symmetric) == ("awq", 64, True)
