"""Tiny models of every layout, made from configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def deepseek() -> Any:
    from transformers import DeepseekV3Config

    latent = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    sizes = {**SMALL, "num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 32}
    return DeepseekV3Config(**sizes, **latent, **experts, first_k_dense_replace=1)


def qwen() -> Any:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeConfig(**SMALL, **experts, intermediate_size=128, head_dim=16)


def mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**SMALL, intermediate_size=32, num_local_experts=4)


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(**SMALL, intermediate_size=32, num_local_experts=4, head_dim=16, pad_token_id=0)


def granite() -> Any:
    from transformers import GraniteMoeConfig

    return GraniteMoeConfig(**SMALL, intermediate_size=32, num_local_experts=4)


CONFIGS: dict[str, Callable[[], Any]] = {"deepseek": deepseek, "qwen": qwen, "mixtral": mixtral, "gpt-oss": gpt_oss}
FUSED: dict[str, Callable[[], Any]] = {"granite": granite}  # also on disk


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(name, dtype=, seed=)` is a causal language model in evaluation mode with random weights."""

    def make(name: str = "deepseek", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config({**CONFIGS, **FUSED}[name](), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)  # so that rounding the experts shows in every logit
        return model

    return make


@pytest.fixture(scope="session", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.arange(48).view(2, 24) * 5 % 128


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """A router and a ModuleList of experts, as remote code has them; every expert sees every token."""

    def __init__(self, experts: int = 3, hidden: int = 64, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Mlp(hidden, width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x).softmax(-1)
        return torch.stack([expert(x) for expert in self.experts], -1) @ scores.unsqueeze(-1)


@pytest.fixture
def module_list() -> nn.Module:
    torch.manual_seed(0)
    return Block().bfloat16()
