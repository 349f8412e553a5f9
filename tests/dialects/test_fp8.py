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


@pytest.mark.parametrize("key", ["moe_quant_algo", "routed_experts_quant_method", "expert_dtype"])
def test_experts_in_another_encoding_are_said_to_be_in_another(key: str) -> None:
    assert read(**{key: "fp8"}).schemes == read(**{key: None}).schemes == read().schemes
    with pytest.raises(KconvertError, match=f"quant_method 'fp8', but experts with {key} 'NVFP4', which is not read"):
        read(**{key: "NVFP4"})
