"""The models that llama.cpp knows and kconvert writes: by model_type in config.json, its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kconvert.errors import KconvertError
from kconvert.formats.engines.ggml import Q4_0
from kconvert.targets.base import EXPERTS, Target, Targets

if TYPE_CHECKING:
    from kconvert.models.model import Model

PART = re.compile(r"(-[0-9]{5}-of-[0-9]{5})+$")
TARGETS: Targets = {"gguf": {"": Target(Q4_0(), EXPERTS)}}


ARCHITECTURES = {
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "deepseek_v4": "deepseek4",
    "glm_moe_dsa": "glm-dsa",
    "kimi_k2": "deepseek2",
    "kimi_k3": "kimi-k3",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
}

HAVE_DENSE = ("deepseek2", "deepseek32", "glm-dsa", "glm4moe", "kimi-k3")  # layers without experts, the first ones
# The weights whose outputs llama.cpp multiplies by the factor of their NVFP4. Its loader takes that of any weight, but what it
# computes from deepseek2's experts goes without.
HAS_FACTOR = {
    "qwen3moe": frozenset(
        ("expert.gate", "expert.up", "expert.down", *(f"attention.{part}" for part in "qkvo"), "lm_head"),
    ),
}


def architecture_of(model: Model) -> str:
    """What llama.cpp calls the model; KconvertError where kconvert has no mapping of its tensors."""
    kinds = (section_of(model).get("model_type"), model.checkpoint.config.get("model_type"))
    architecture = next(
        (ARCHITECTURES[kind] for kind in kinds if isinstance(kind, str) and kind in ARCHITECTURES), None
    )
    if architecture is None:
        what = model.checkpoint.config.get("model_type") or "model without model_type in config.json"
        raise KconvertError(
            f"{model.checkpoint.root} is a {what}, whose tensors have no mapping to GGUF yet; there are those of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return architecture


def title_of(model: Model) -> str:
    """What the model is called, as far as its directory or repository says; in Unicode, which a path need not be, and not as
    parts of split files are, for which engines would look for the others."""
    name = model.checkpoint.name.encode(errors="replace").decode()
    name = name.partition("@")[0].rpartition("/")[2] if "/" in name else name
    return PART.sub("", name) or "model"


def section_of(model: Model) -> Mapping[str, Any]:
    """What config.json says of the language model."""
    return model.manifest.section(model.checkpoint.config)
