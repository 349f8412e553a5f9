"""The manifests describe the published models: their sizes, and the names and shapes that transformers knows.

Sizes are those of the models' cards and of the headers on the Hub, as quoted beside each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kconvert.checkpoint.safetensors import Tensor
from kconvert.dialects import without_quantization
from kconvert.formats.dtypes import tensor_bytes
from kconvert.models.catalogue import load_manifest, load_manifests
from kconvert.models.rules import Match

PARAMETERS = {
    "deepseek-v3": 684_489_845_504,  # "685B" on the Hub: with the MTP layer
    "deepseek-v3.2": 685_355_329_792,  # V3 and its indexers
    "deepseek-v4": 290_944_616_402,  # "284B", and the MTP layer
    "deepseek-v4-0731": 304_180_418_494,  # "284B", and three stages of DSpark
    "deepseek-v4-base": 290_944_616_402,
    "deepseek-v4.1": 763_205_315_794,  # model card: 552B, 196B of Engram; and three stages of DSpark
    "glm-4-moe": 110_468_824_832,  # "110B" on the Hub: with the MTP layer
    "glm-5": 753_864_139_008,  # GLM-5.1's headers
    "glm-5.3": 753_329_940_480,
    "gpt-oss": 116_829_156_672,  # model card: 116.83B
    "kimi-k2-instruct": 1_026_408_232_448,
    "kimi-k2-thinking-nvfp4": 1_026_408_232_448,
    "kimi-k2-thinking": 1_026_408_232_448,
    "kimi-k2.5": 1_026_879_376_368,  # K2 and 471M of vision
    "kimi-k2.6": 1_026_879_376_368,
    "kimi-k2.7": 1_026_879_376_368,
    "kimi-k3": 2_779_931_837_184,
    "kimi-linear": 49_122_681_728,
    "ling-3": 127_486_405_600,  # "127.5B": with the MTP layer
    "minimax-m2": 228_689_764_864,  # "229B" on the Hub
    "minimax-m3": 427_040_140_160,
    "mixtral": 46_702_792_704,
    "qwen3-moe": 30_532_122_624,
    "qwen3.5-moe": 35_951_822_704,  # "36B" on the Hub: with vision and the MTP layer
    "qwen3.5-moe-fp8": 35_951_822_704,
    "qwen3.8-moe": 2_446_182_725_504,  # "2.4T", and the MTP layer
    "step-3": 199_384_301_376,  # "199B" on the Hub: with the MTP layers
    "step-3.7": 199_384_301_376,  # and vision, which is copied unknown
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


@pytest.mark.parametrize(
    ("name", "main"),
    [
        ("deepseek-v3", 671_026_419_200),
        ("deepseek-v4", 284_334_567_511),
        ("glm-4-moe", 106_852_251_264),
        ("ling-3", 124_414_211_552),
        ("step-3", 196_956_130_368),
    ],
)
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


Spelt = Callable[[Match], Iterator[tuple[str, tuple[int, ...]]]]


def plain(match: Match) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "BF16", match.shape


def blocks(scale: str, size: int = 128) -> Spelt:
    """FP8 codes and a scale for each block, but in lm_head."""

    def spell(match: Match) -> Iterator[tuple[str, tuple[int, ...]]]:
        if match.rule.role == "lm_head":
            yield from plain(match)
            return
        rows, cols = match.shape
        height, width = match.rule.block or (size, size)
        yield from (("F8_E4M3", match.shape), (scale, (math.ceil(rows / height), math.ceil(cols / width))))

    return spell


def experts(spell: Spelt, others: Spelt = plain) -> Spelt:
    return lambda match: spell(match) if match.rule.role.startswith("expert.") else others(match)


def int4(match: Match) -> Iterator[tuple[str, tuple[int, ...]]]:
    rows, cols = match.shape
    yield from (("I32", (rows, cols // 8)), ("BF16", (rows, cols // 32)), ("I32", (2,)))


def mxfp4(codes: str, scale: str) -> Spelt:
    return lambda match: iter(
        ((codes, (match.shape[0], match.shape[1] // 2)), (scale, (match.shape[0], match.shape[1] // 32)))
    )


def mxfp8(match: Match) -> Iterator[tuple[str, tuple[int, ...]]]:
    if match.rule.role == "lm_head":
        yield from plain(match)
    else:
        yield from (("F8_E4M3", match.shape), ("U8", (match.shape[0], match.shape[1] // 32)))


DEEPSEEK_V4 = experts(mxfp4("I8", "F8_E8M0"), blocks("F8_E8M0"))
PRO = {
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
PRUNED = {"n_routed_experts": 160}


def encoded(name: str, spell: Spelt, changes: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor of the published checkpoint, its Linears spelt out here by hand."""
    manifest = load_manifest(name)
    names = manifest.bind({**manifest.config, **changes})
    stacked = {member for stack in names.stacks.values() for member in stack.members}
    for weight, match in names.expected():
        if match.rule.dtype is not None:
            yield match.rule.dtype, match.shape
        elif weight not in stacked:
            yield from spell(match)
    for stack in names.stacks.values():
        match = names.linear(stack.members[0])
        assert match is not None
        count = len(stack.members) // stack.width
        yield "BF16", (count, stack.width * match.shape[0], match.shape[1])


@pytest.mark.parametrize(
    ("name", "spell", "changes", "count", "size"),
    [
        ("deepseek-v3", blocks("F32"), {}, 91_991, "688574839360"),  # the Hub's headers
        ("deepseek-v3.2", blocks("F32"), {}, 92_425, "642.12 GiB"),
        ("deepseek-v4", DEEPSEEK_V4, {}, 69_187, "148.65 GiB"),
        ("deepseek-v4", DEEPSEEK_V4, PRO, 145_116, "805.32 GiB"),
        ("deepseek-v4-0731", DEEPSEEK_V4, {}, 72_317, "166878536440"),
        (
            "deepseek-v4-0731",
            DEEPSEEK_V4,
            PRUNED,
            45_821,
            "107803320952",
        ),  # a release of others, whose headers are known
        ("deepseek-v4.1", experts(mxfp4("I8", "F8_E8M0"), blocks("F8_E8M0", 32)), {}, 96_085, "510286023000"),
        ("glm-5", plain, {}, 59_870, "1404.18 GiB"),
        ("glm-5.3", blocks("F32"), {}, 59_585 + 59_044, "703.72 GiB"),
        ("kimi-k2-thinking", experts(int4), {}, 208_215, "594.21 GB"),
        ("kimi-k2.5", experts(int4), {}, 208_550, "554.27 GiB"),  # the Hub's headers
        ("kimi-k3", experts(mxfp4("U8", "U8")), {}, 497_220, "1560860324864"),  # the Hub's index
        ("kimi-linear", plain, {}, 20_493, "98.25 GB"),  # the Hub's headers
        ("minimax-m2", blocks("F32"), {}, 96_103, "214.32 GiB"),
        ("minimax-m3", mxfp8, {}, 45_838, "413.27 GiB"),
        ("step-3", plain, {}, 804, "398.77 GB"),  # the Hub's headers: the count
    ],
)
def test_the_full_checkpoint_has_as_many_tensors_and_bytes_as_the_published_one(
    name: str, spell: Spelt, changes: Mapping[str, Any], count: int, size: str
) -> None:
    tensors = list(encoded(name, spell, changes))
    nbytes = sum(tensor_bytes(dtype, shape) for dtype, shape in tensors)
    assert len(tensors) == count
    assert size in (str(nbytes), f"{nbytes / 1e9:.2f} GB", f"{nbytes / 2**30:.2f} GiB")


FAMILIES = [
    *(
        "deepseek-v3",
        "deepseek-v3.2",
        "deepseek-v4",
        "glm-4-moe",
        "glm-5",
        "gpt-oss",
        "kimi-k2.5",
        "kimi-linear",
        "ling-3",
    ),
    *("minimax-m2", "minimax-m3", "mixtral", "qwen3-moe", "qwen3.5-moe", "qwen3.8-moe"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_exactly_these_names_and_shapes(
    small_config: Callable[..., dict[str, Any]],
    tensors_of: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
    name: str,
) -> None:
    changes = {"q_lora_rank": None} if name == "ling-3" else {}  # published without
    config = {key: value for key, value in small_config(name, **changes).items() if key != "auto_map"}
    for nested in ("text_config", "vision_config"):
        if nested in config:
            config[nested] = {key: value for key, value in config[nested].items() if key != "auto_map"}
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
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    zeros = {tensor.name: torch.zeros(tensor.shape, dtype=dtypes[tensor.dtype]) for tensor in tensors.values()}
    save_file(zeros, root / "model.safetensors", {"format": "pt"})
    (root / "config.json").write_text(json.dumps(config))
    auto = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    _, report = auto.from_pretrained(root, output_loading_info=True, dtype=torch.bfloat16)
    return dict(report)
