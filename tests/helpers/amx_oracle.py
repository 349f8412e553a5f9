"""kt-kernel itself, for tests of the AMX layout: packs BF16 experts as it does, and computes an MoE from packed weights.

Needs the wheel `kt-kernel` (install it with --no-deps, and gguf) and a CPU with AVX-512; AMX is not needed. `missing`
says what is not there, for pytest's skip. kt-kernel is imported inside the functions: it chooses its machine code then.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

METHODS = {"AMXINT4": "INT4", "AMXINT8": "INT8"}
PROJECTIONS = ("gate", "up", "down")


def missing() -> str | None:
    """Why kt-kernel cannot pack here, or None where it can."""
    for module in ("kt_kernel", "gguf"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if "avx512bw" not in Path("/proc/cpuinfo").read_text("utf-8"):
        return "kt-kernel packs AMX weights only on a CPU with AVX-512"
    return None


def pack(
    directory: Path, method: str, numa: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> dict[str, np.ndarray]:
    """What kt-kernel packs of one layer, as bytes by the tensors' names in its safetensors form.

    `gate` and `up` are BF16 [experts, I, H], `down` is [experts, H, I]. The files it writes are left in `directory`.
    """
    experts, intermediate, hidden = gate.shape
    with _wrapper(directory, method, numa, experts, 1, hidden, intermediate, cpu_save=True) as wrapper:
        wrapper.load_weights_from_tensors(gate, up, down, torch.arange(experts))
    packed = {}
    for shard in range(numa):
        folder = directory / "_layer_0" / f"_numa_{shard}"
        for expert in range(experts):
            for projection in PROJECTIONS:
                for entry, kind in (("weight", "quant"), ("scale", "scale")):
                    (file,) = folder.glob(f"{METHODS[method]}_{projection}_{expert}_*Byte_{kind}_.kt")
                    name = f"blk.0.ffn_{projection}_exps.{expert}.numa.{shard}.{entry}"
                    packed[name] = np.fromfile(file, np.uint8)
    return packed


def forward(
    directory: Path,
    method: str,
    numa: int,
    experts: int,
    intermediate: int,
    tokens: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    layer: int = 0,
) -> torch.Tensor:
    """The MoE of one layer of a packed directory (either form), as kt-kernel computes it: BF16 [tokens, H].

    `tokens` is BF16 [tokens, H]; `expert_ids` (int64) and `expert_weights` (F32) are [tokens, experts per token].
    """
    count, hidden = tokens.shape
    per_token = expert_ids.shape[1]
    output = torch.zeros_like(tokens)
    length = torch.tensor([count], dtype=torch.int32)
    with _wrapper(directory, method, numa, experts, per_token, hidden, intermediate, layer_idx=layer) as wrapper:
        wrapper.load_weights(torch.arange(experts))
        inputs = [tensor.contiguous() for tensor in (expert_ids, expert_weights, tokens)]
        pointers = [tensor.data_ptr() for tensor in inputs]
        task = wrapper.moe.forward_task(length.data_ptr(), per_token, *pointers, output.data_ptr(), False)
        wrapper.cpu_infer.submit(task)
        wrapper.cpu_infer.sync()
    return output


def dequantise(data: np.ndarray, scale: np.ndarray, method: str, rows: int, cols: int) -> np.ndarray:
    """The bytes of a packed matrix and of its scale -> F32 [rows, cols], by the place of each value in a closed form."""
    r, c = np.indices((rows, cols))
    block, step = (128, 128) if method == "AMXINT4" else (64, 64)
    first_row, first_col = r // block * block, c // 3584 * 3584
    block_rows, block_cols = np.minimum(block, rows - first_row), np.minimum(3584, cols - first_col)
    i, j = r - first_row, c - first_col
    before = first_row * cols + first_col * block_rows + i // 32 * 32 * block_cols
    k = j % step % 64
    within = j // step * 2048 + i % 32 // 16 * 1024 + k // 4 * 64 + i % 16 * 4 + k % 4
    d = scale.view(np.float32)[:, None]
    if method == "AMXINT8":
        return data.view(np.int8)[before + within] * d
    byte = data.view(np.uint8)[before // 2 + within]
    nibble = np.where(j % step < 64, byte & 15, byte >> 4).astype(np.int8)
    return np.where(nibble > 7, nibble - 16, nibble).astype(np.float32) * (np.float32(16) * d)


@contextmanager
def _wrapper(
    directory: Path,
    method: str,
    numa: int,
    experts: int,
    per_token: int,
    hidden: int,
    intermediate: int,
    layer_idx: int = 0,
    cpu_save: bool = False,
) -> Iterator[object]:
    """A KTMoEWrapper of its own: kt-kernel keeps its threads and its open files for the life of a process."""
    with _unpinned():
        from kt_kernel import KTMoEWrapper
        from kt_kernel.utils.amx import AMXMoEWrapper

        # Importing kt-kernel sets this for the importing thread, from which kt-kernel's own inherit it.
        torch.set_flush_denormal(True)
        wrapper = KTMoEWrapper(
            layer_idx=layer_idx,
            num_experts=experts,
            num_experts_per_tok=per_token,
            hidden_size=hidden,
            moe_intermediate_size=intermediate,
            gpu_experts_mask=None,
            cpuinfer_threads=numa,
            threadpool_count=numa,
            weight_path=str(directory),
            chunked_prefill_size=64,
            cpu_save=cpu_save,
            method=method,
            numa_nodes=[0] * numa,
        )
        try:
            yield wrapper
        finally:
            AMXMoEWrapper._cpu_infer_instance = AMXMoEWrapper._safetensor_loader_instance = None
            torch.set_flush_denormal(False)


@contextmanager
def _unpinned() -> Iterator[None]:
    """kt-kernel asks for pinned memory, which torch refuses without a CUDA device."""

    def without_pinning(function):  # type: ignore[no-untyped-def]
        def call(*args, pin_memory=False, **options):  # type: ignore[no-untyped-def]
            return function(*args, **options)

        return call

    with mock.patch.multiple(
        torch, **{name: without_pinning(getattr(torch, name)) for name in ("zeros", "empty", "full")}
    ):
        yield
