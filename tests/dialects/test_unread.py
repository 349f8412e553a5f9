"""Quantisations that are not read are called by their names, with a way out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.dialects import DECLARING_FILES, declared_beside, read_quantization
from kconvert.dialects.registry import DIALECTS

NVFP4 = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
SPOKEN: dict[str, tuple[dict[str, Any], str]] = {
    "marlin": ({"quant_method": "marlin", "group_size": 128}, "Marlin's (quant_method 'marlin', group_size 128)"),
    "mxfp4": ({"quant_method": "mxfp4"}, "gpt-oss's MXFP4, in stacks of experts"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes'"),
    "bitsandbytes, old": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes' (load_in_4bit True"),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4"}}}, "torchao's"),
    **{
        method: ({"quant_method": method}, f"quant_method '{method}'")
        for method in (
            "hqq",
            "eetq",
            "aqlm",
            "quanto",
            "fbgemm_fp8",
            "higgs",
            "spqr",
            "vptq",
            "bitnet",
            "fp_quant",
            "gguf",
        )
    },
}


@pytest.mark.parametrize("case", SPOKEN)
@pytest.mark.parametrize("key", ["quantization_config", "text_config.quantization_config"])
def test_a_quantisation_that_is_not_read_is_called_by_its_name(case: str, key: str) -> None:
    table, said = SPOKEN[case]
    config = {"text_config": {"quantization_config": table}} if "." in key else {"quantization_config": table}
    with pytest.raises(KconvertError) as raised:
        read_quantization(config)
    sentence = str(raised.value)
    assert sentence.startswith(f"config.json: {key} is ")
    assert said in sentence
    assert "is not read; " in sentence
    assert "convert" in sentence
    assert "fetch" not in sentence
    assert "malformed" not in sentence


@pytest.mark.parametrize("method", ["no_such", ""])
def test_an_unknown_method_is_quoted_with_those_that_are_read(method: str) -> None:
    read = " and ".join(name for dialect in DIALECTS for name in dialect.METHODS)
    with pytest.raises(KconvertError, match=f"{read} are read"):
        read_quantization({"quantization_config": {"quant_method": method, "a": 1}})


@pytest.mark.parametrize("method", ["FP8", "compressed_tensors"])
def test_a_method_is_known_in_the_spellings_that_engines_take(method: str) -> None:
    table = {"quant_method": method, "config_groups": {"W4A16": ["Linear"]}}
    assert read_quantization({"quantization_config": table}).schemes


def test_a_table_that_says_nothing_known_is_not_taken_for_compressed_tensors() -> None:
    with pytest.raises(
        KconvertError, match="quant_method is missing, and nothing else there says what the weights are"
    ):
        read_quantization({"quantization_config": {"foo": 1}})


BESIDE: dict[str, tuple[str, Any, str]] = {
    "hqq": ("quantize_config.json", {"quant_method": "hqq", "bits": 4}, "HQQ (quant_method 'hqq')"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_only_a_file_beside_config_json_declares_and_is_not_read_is_called_by_its_name(case: str) -> None:
    name, content, said = BESIDE[case]
    with pytest.raises(KconvertError) as raised:
        declared_beside(["tokenizer.json", name], {name: json.dumps(content).encode()}.__getitem__, {})
    assert str(raised.value).startswith(f"{name} is {said}")


def test_a_file_beside_config_json_is_read_in_each_dialect() -> None:
    contents: dict[str, Any] = {
        "hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": NVFP4},
        "quantization_config.json": {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}},
        "quant_config.json": AWQ,
        "quantize_config.json": GPTQ,
    }
    for name, content in contents.items():
        found = declared_beside([name], {name: json.dumps(content).encode()}.__getitem__, {})
        assert found is not None
        assert (found.file, found.scheme_for("model.layers.0.mlp.up_proj") is None) == (name, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"quant_method": "new"}, "quantize_config.json: quant_method is 'new', which is not known"),
        ({"a": 1}, "quantize_config.json: quant_method is missing, and nothing else there says"),
    ],
)
def test_a_file_beside_config_json_in_an_unknown_dialect_is_named(content: Any, said: str) -> None:
    with pytest.raises(KconvertError) as raised:
        declared_beside(["quantize_config.json"], lambda name: json.dumps(content).encode(), {})
    assert str(raised.value).startswith(said)


def test_without_such_a_file_nothing_is_said() -> None:
    assert declared_beside(["tokenizer.json", "sub/quantize_config.json"], lambda name: b"{}", {}) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_beside_config_json_is_to_be_fetched_again(content: bytes) -> None:
    with pytest.raises(KconvertError, match=f"^{DECLARING_FILES[0]} is no JSON; fetch it again$"):
        declared_beside(DECLARING_FILES, lambda name: content, {})


@pytest.mark.parametrize("content", [b"[1]", b"{}", b"null"])
def test_a_file_that_declares_nothing_is_read_past(content: bytes) -> None:
    contents = dict.fromkeys(DECLARING_FILES, content)
    assert declared_beside(DECLARING_FILES, contents.__getitem__, {}) is None
    contents[DECLARING_FILES[-1]] = b'{"quant_method": "hqq"}'
    with pytest.raises(KconvertError, match="HQQ"):
        declared_beside(DECLARING_FILES, contents.__getitem__, {})
