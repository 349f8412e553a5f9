"""config.json says the dtype that the output's weights have; its source is a float16 checkpoint by compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kconvert import Recipe, convert, plan

KEYS = ("torch_dtype", "dtype")


@pytest.fixture(params=[*KEYS, "text_config"])
def half(request: Any, int4_copy: Path, raw: Any) -> tuple[Path, str]:
    """INT4 with F16 scales whose config declares float16 in one of the places where engines look, and that place."""
    checkpoint = raw.load(int4_copy)
    for name in checkpoint:
        if name.endswith("weight_scale"):
            scale = torch.frombuffer(bytearray(checkpoint[name].data), dtype=torch.bfloat16).half()
            checkpoint[name].dtype, checkpoint[name].data = "F16", scale.numpy().tobytes()
    for key in KEYS:
        checkpoint.config.pop(key, None)
    declared = {"dtype": "float16"} if request.param == "text_config" else "float16"
    checkpoint.config[request.param] = declared
    checkpoint.config["vision_config"] = {"dtype": "float16"}
    return checkpoint.save(), request.param


def declared(config: dict[str, Any], place: str) -> str:
    return str(config["text_config"]["dtype"] if place == "text_config" else config[place])


@pytest.mark.parametrize(("to", "dtype"), [("bf16", "bfloat16"), ("f16", "float16"), ("fp8", "float16")])
def test_config_says_the_dtype_that_the_weights_have(
    half: tuple[Path, str], tmp_path: Path, to: str, dtype: str
) -> None:
    source, place = half
    convert(plan(source, Recipe(to)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert declared(config, place) == dtype
    assert config["vision_config"] == {"dtype": "float16"}
    assert not [key for key in KEYS if key in config and key != place]


def test_rounding_f16_to_bf16_is_told_at_the_end(half: tuple[Path, str], tmp_path: Path, kconvert: Any) -> None:
    result = kconvert("int4-to-bf16", half[0], tmp_path / "out")
    assert "\nlossy: int4 group 32 -> bf16, " in result.stdout
