"""What is read in DeepSeek's dialect."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kconvert import KconvertError
from kconvert.dialects import read_quantization

PUBLISHED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def read(**changes: Any) -> Any:
    return read_quantization({"quantization_config": {**PUBLISHED, **changes}})


@pytest.mark.parametrize("name", ["model.layers.3.mlp.experts.1.up_proj", "lm_head", "model.embed_tokens"])
def test_whatever_is_not_listed_is_meant(name: str) -> None:
    assert read().scheme_for(name).block == (128, 128)
    assert read(weight_block_size=None).scheme_for(name).strategy == "tensor"
    for key in ("modules_to_not_convert", "ignored_layers"):
        assert read(**{key: [name]}).scheme_for(name) is None
        assert read(**{key: [name[:-1]]}).scheme_for(name) is not None


@pytest.mark.parametrize("block", [[0, 128], [128], "wide", [128, None], 128, [1.5, 2], [128, 128, 128]], ids=str)
def test_a_block_size_that_makes_no_sense_is_named(block: Any) -> None:
    with pytest.raises(KconvertError, match=re.escape(f"weight_block_size is {block!r}; a pair of positive numbers")):
        read(weight_block_size=block)


EXPERT, SHARED = "layers.3.ffn.experts.17.w1", "layers.3.ffn.shared_experts.w1"


@pytest.mark.parametrize("key", ["moe_quant_algo", "routed_experts_quant_method", "store_dtype", "expert_dtype"])
@pytest.mark.parametrize("name", ["NVFP4", "mxfp4", "fp4", "MXFP8"])
def test_experts_may_be_in_another_encoding(key: str, name: str) -> None:
    assert read(**{key: "fp8"}).schemes == read(**{key: None}).schemes == read().schemes
    found = read(**{key: name})
    assert found.scheme_for(EXPERT).format == name.lower()
    assert found.scheme_for(SHARED) == read().scheme_for(SHARED)
    with pytest.raises(
        KconvertError, match=rf"quantization_config\.{key} is 'IQ3', an encoding of experts that is not"
    ):
        read(**{key: "IQ3"})


@pytest.mark.parametrize("place", ["", "text_config"])
def test_the_dtype_of_experts_may_stand_elsewhere_in_config_json(place: str) -> None:
    def config(dtype: str) -> dict[str, Any]:
        says = {"expert_dtype": dtype}
        return {"quantization_config": PUBLISHED, "model_type": "deepseek_v4", **({place: says} if place else says)}

    assert read_quantization(config("fp4")).scheme_for(EXPERT).format == "fp4"
    with pytest.raises(KconvertError, match=f"{place}[. ]expert_dtype is 'int3', an encoding"):
        read_quantization(config("int3"))


@pytest.mark.parametrize("method", ["fp8", "mxfp8"])
def test_blocks_of_one_row_and_32_columns_are_mxfp8s(method: str) -> None:
    found = read(quant_method=method, weight_block_size=[1, 32], ignored_layers=["lm_head"])
    assert found.scheme_for(EXPERT).format == "mxfp8"
    assert found.scheme_for("lm_head") is None
    assert read(quant_method="mxfp8", weight_block_size=None).scheme_for(EXPERT).format == "mxfp8"
