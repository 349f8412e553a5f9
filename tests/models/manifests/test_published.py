"""The manifests describe the published models: their sizes, and the names and shapes that transformers knows.

Sizes are those of the models' cards and of the headers on the Hub, as quoted beside each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kconvert.checkpoint.safetensors import Tensor
from kconvert.dialects import without_quantization
from kconvert.formats.dtypes import tensor_bytes
from kconvert.models.catalogue import load_manifest, load_manifests

PARAMETERS = {
    "deepseek-v3": 684_489_845_504,  # "685B" on the Hub: with the MTP layer
    "glm-4-moe": 110_468_824_832,  # "110B" on the Hub: with the MTP layer
    "gpt-oss": 116_829_156_672,  # model card: 116.83B
    "kimi-k2-instruct": 1_026_408_232_448,
    "kimi-k2-thinking": 1_026_408_232_448,
    "kimi-k2.5": 1_026_879_376_368,  # K2 and 471M of vision
    "kimi-k2.6": 1_026_879_376_368,
    "kimi-linear": 49_122_681_728,
    "mixtral": 46_702_792_704,
    "qwen3-moe": 30_532_122_624,
}


def parameters(name: str, **changes: Any) -> int:
    manifest = load_manifest(name)
    config = {**without_quantization(manifest.config), **changes}
    return sum(math.prod(match.shape) for _, match in manifest.bind(config).expected())


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_full_model_has_the_published_number_of_parameters(name: str) -> None:
    assert parameters(name) == PARAMETERS[name]


def test_every_manifest_but_the_generic_one_has_a_published_size() -> None:
    assert set(load_manifests()) - {"generic"} == set(PARAMETERS)


@pytest.mark.parametrize(("name", "main"), [("deepseek-v3", 671_026_419_200), ("glm-4-moe", 106_852_251_264)])
def test_without_its_mtp_layer_a_model_has_the_size_it_is_called_by(name: str, main: int) -> None:
    assert parameters(name, num_nextn_predict_layers=0) == main


@pytest.mark.parametrize(
    ("name", "shape", "billions"),
    [
        ("glm-4-moe", "GLM-4.5", 358.3),
        ("mixtral", "8x22B", 140.6),
        ("qwen3-moe", "Qwen3-235B-A22B", 235.1),
        ("gpt-oss", "gpt-oss-20b", 20.9),
    ],
)
def test_the_larger_and_smaller_models_of_a_family_come_out_too(name: str, shape: str, billions: float) -> None:
    sizes = {
        "GLM-4.5": {
            "num_hidden_layers": 92,
            "hidden_size": 5120,
            "n_routed_experts": 160,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "first_k_dense_replace": 3,
            "use_qk_norm": True,
        },
        "8x22B": {"num_hidden_layers": 56, "hidden_size": 6144, "num_attention_heads": 48, "intermediate_size": 16384},
        "Qwen3-235B-A22B": {
            "num_hidden_layers": 94,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "moe_intermediate_size": 1536,
        },
        "gpt-oss-20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    }[shape]
    assert round(parameters(name, **sizes) / 1e9, 1) == billions


def encoded(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor of the published checkpoint, its quantised Linears spelt out here by hand."""
    manifest = load_manifest(name)
    for _, match in manifest.bind(manifest.config).expected():
        if match.rule.dtype is None and name == "deepseek-v3" and match.rule.role != "lm_head":
            rows, cols = match.shape
            yield from (("F8_E4M3", match.shape), ("F32", (math.ceil(rows / 128), math.ceil(cols / 128))))
        elif match.rule.role.startswith("expert.") and name.startswith("kimi-k2"):
            rows, cols = match.shape
            yield from (("I32", (rows, cols // 8)), ("BF16", (rows, cols // 32)), ("I32", (2,)))
        else:
            yield match.rule.dtype or "BF16", match.shape


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("deepseek-v3", 91_991, "688574839360"),  # the Hub's headers
        ("kimi-k2-thinking", 208_215, "594.21 GB"),
        ("kimi-k2.5", 208_550, "554.27 GiB"),  # the Hub's headers
        ("kimi-linear", 20_493, "98.25 GB"),  # the Hub's headers
    ],
)
def test_the_full_checkpoint_has_as_many_tensors_and_bytes_as_the_published_one(
    name: str, count: int, size: str
) -> None:
    tensors = list(encoded(name))
    nbytes = sum(tensor_bytes(dtype, shape) for dtype, shape in tensors)
    assert len(tensors) == count
    assert size in (str(nbytes), f"{nbytes / 1e9:.2f} GB", f"{nbytes / 2**30:.2f} GiB")


VISION_OF_TRANSFORMERS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
FAMILIES = ["deepseek-v3", "glm-4-moe", "gpt-oss", "kimi-k2.5", "kimi-linear", "mixtral", "qwen3-moe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_exactly_these_names_and_shapes(
    small_config: Callable[..., dict[str, Any]],
    tensors_of: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
    name: str,
) -> None:
    config = {key: value for key, value in small_config(name).items() if key != "auto_map"}
    for nested in ("text_config", "vision_config"):
        if nested in config:
            config[nested] = {key: value for key, value in config[nested].items() if key != "auto_map"}
    if "vision_config" in config:  # transformers has other words for it than the model's own code
        config["vision_config"] |= VISION_OF_TRANSFORMERS
        config["projection_hidden_size"] = VISION_OF_TRANSFORMERS["hidden_size"]
    tensors = tensors_of(name, config)
    report = load_in_transformers(tmp_path, config, tensors)
    layers = config.get("num_hidden_layers")
    unknown = {key for key in report["unexpected_keys"] if not key.startswith(f"model.layers.{layers}.")}
    assert (report["missing_keys"], unknown, report["mismatched_keys"]) == (set(), set(), set())


def test_transformers_finds_nothing_of_another_architecture(
    small_config: Callable[..., dict[str, Any]], tensors_of: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    config = small_config("mixtral")
    tensors = tensors_of("mixtral", config)
    lost = tensors.pop("model.layers.3.self_attn.k_proj.weight")
    report = load_in_transformers(tmp_path, config, tensors)
    assert report["missing_keys"] == {lost.name}


def load_in_transformers(root: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What transformers says about a checkpoint of zeros with these tensors."""
    transformers = pytest.importorskip("transformers")
    import torch
    from safetensors.torch import save_file

    transformers.utils.logging.disable_progress_bar()
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    zeros = {tensor.name: torch.zeros(tensor.shape, dtype=dtypes[tensor.dtype]) for tensor in tensors.values()}
    save_file(zeros, root / "model.safetensors", {"format": "pt"})
    (root / "config.json").write_text(json.dumps(config))
    auto = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    _, report = auto.from_pretrained(root, output_loading_info=True, dtype=torch.bfloat16)
    return dict(report)
