"""The scheme that SGLang's own code chooses for the experts of a config.json: python by_sglang.py DIR RESULT.json

It needs no GPU: sglang without what it depends on, in an environment of vLLM's; nothing is loaded or computed. What its modules
import besides, for images and notebooks, is made up.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ABSENT = ("IPython", "torchvision")
PREFIX = "model.layers.1"


class Empty(ModuleType):
    """A module that has whatever is asked of it."""

    __path__: list[str] = []  # noqa: RUF012  a module's, which is read and not written

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Empties(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def scheme_of(method: Any, layer: Any) -> str:
    scheme = getattr(layer, "scheme", None)
    return type(method if scheme is None else scheme).__name__


def bare(kind: type) -> Any:
    """A layer of this kind without weights."""
    import torch

    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    return layer


def main(root: str, result: str) -> None:
    table = json.loads((Path(root) / "config.json").read_text()).get("quantization_config")
    Path(result).write_text(json.dumps({"schemes": "none needed" if table is None else chosen(table)}))


def chosen(table: dict[str, Any]) -> str:
    import torch
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # kept by transformers, before there seems to be one
    sys.meta_path.append(Empties())
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.linear import RowParallelLinear
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization import get_quantization_config, modelopt_quant, mxfp4

    # What is chosen asks how new the GPU is, as far as it does so when it is chosen: an H100.
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.is_available = lambda: True
    for made in (modelopt_quant.ModelOptNvFp4FusedMoEMethod, mxfp4.Mxfp4MoEMethod):
        made.__init__ = lambda self, *given, **settings: None
    parsed = ModelConfig._parse_modelopt_quant_config(SimpleNamespace(), table) or table
    config = get_quantization_config(parsed["quant_method"]).from_config(table)
    config.packed_modules_mapping = {}
    kinds = {"mlp.experts": FusedMoE, "self_attn.o_proj": RowParallelLinear}
    layers = {name: bare(kind) for name, kind in kinds.items()}
    found = [scheme_of(config.get_quant_method(layer, f"{PREFIX}.{name}"), layer) for name, layer in layers.items()]
    attention = "" if found[1].startswith("Unquantized") else f"; attention {found[1]}"
    return found[0] + attention


if __name__ == "__main__":
    main(*sys.argv[1:])
