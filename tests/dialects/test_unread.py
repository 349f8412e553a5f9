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
    "quark": ({"quant_method": "quark", "global_quant_config": {}}, "Quark's (quant_method 'quark')"),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"a": {"targets": ["Linear"]}}},
        "ModelOpt's (quant_method 'modelopt', quant_algo 'NVFP4')",
    ),
    "modelopt without a method": ({"producer": {"name": "modelopt"}, **NVFP4}, "ModelOpt's (quant_algo 'NVFP4', group"),
    "modelopt_mixed": ({"quant_method": "modelopt_mixed"}, "ModelOpt's"),
    "mxfp8": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "MXFP8 with weight_scale_inv"),
    "mxfp4": ({"quant_method": "mxfp4"}, "gpt-oss's MXFP4, in stacks of experts"),
    "mlx": ({"group_size": 64, "bits": 4}, "MLX's (bits 4, group_size 64)"),
    "mlx with a mode": ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "MLX's (mode 'mxfp4', bits 4, group_size 32)"),
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


def test_mlx_alone_under_its_own_key_is_found() -> None:
    with pytest.raises(KconvertError, match=r"config\.json: quantization is MLX's .*mlx_lm\.convert --dequantize"):
        read_quantization({"quantization": {"group_size": 64, "bits": 4}})


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
    "modelopt": (
        "hf_quant_config.json",
        {"producer": {"name": "modelopt"}, "quantization": NVFP4},
        "ModelOpt's (quant_a",
    ),
    "gptq": ("quantize_config.json", GPTQ, "gptq, which is read from config.json only"),
    "awq": ("quant_config.json", AWQ, "awq, which is read from config.json only"),
    "auto-round": ("quantization_config.json", {"quant_method": "auto-round", "bits": 4}, "auto-round, which is read"),
    "compressed-tensors": (
        "quantization_config.json",
        {"quant_method": "compressed-tensors", "config_groups": {}},
        "compressed-tensors, which is read from config.json only; put its content there as quantization_config",
    ),
    "unknown": ("quantize_config.json", {"quant_method": "new"}, "quant_method 'new', which is not known"),
    "nothing known": ("quantize_config.json", {"a": 1}, "one without a quant_method"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_only_a_file_beside_config_json_declares_is_said(case: str) -> None:
    name, content, said = BESIDE[case]
    sentence = declared_beside(["tokenizer.json", name], {name: json.dumps(content).encode()}.__getitem__)
    assert sentence is not None
    assert sentence.startswith(f"{name} declares a quantisation that config.json does not: {said}")


def test_without_such_a_file_nothing_is_said() -> None:
    assert declared_beside(["tokenizer.json", "sub/quantize_config.json"], lambda name: b"{}") is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_beside_config_json_is_to_be_fetched_again(content: bytes) -> None:
    assert declared_beside(DECLARING_FILES, lambda name: content) == f"{DECLARING_FILES[0]} is no JSON; fetch it again"


@pytest.mark.parametrize("content", [b"[1]", b"{}", b"null"])
def test_a_file_that_declares_nothing_is_read_past(content: bytes) -> None:
    contents = dict.fromkeys(DECLARING_FILES, content)
    assert declared_beside(DECLARING_FILES, contents.__getitem__) is None
    contents[DECLARING_FILES[-1]] = b'{"quant_method": "hqq"}'
    assert "HQQ" in str(declared_beside(DECLARING_FILES, contents.__getitem__))
