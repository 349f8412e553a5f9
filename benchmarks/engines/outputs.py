"""What kconvert makes of a small Kimi-K2, and how kt-kernel is asked to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

READERS = ("transformers", "vllm", "sglang")


@dataclass(frozen=True)
class Output:
    """`command` makes it, but for SRC and DST: of none, it is the source itself. `reads` are engines that could, `method` is
    kt-kernel's, which looks for settings in the `environment`. `like` is an output above it with the same values, where
    these go by names that engines take for BF16.
    """

    label: str
    command: tuple[str, ...] = ()
    reads: tuple[str, ...] = READERS
    method: str = ""
    like: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def engines(self) -> tuple[str, ...]:
        return (*self.reads, "kt") if self.method else self.reads


SOURCE = "int4, group 32 (the source)"


def _convert(label: str, options: str, method: str = "", reads: tuple[str, ...] = READERS, like: str = "") -> Output:
    return Output(label, ("convert", *options.split()), reads, method, like)


def _amx(method: str) -> Output:
    return Output(method.lower(), ("repack-amx", "--method", method, "--numa", "1"), (), method, SOURCE)


OUTPUTS = (
    Output(SOURCE, method="RAWINT4"),
    _convert("bf16", "--to bf16", "BF16"),
    _convert("int4, group 128", "--to int4 --group-size 128", "RAWINT4"),
    _convert("int8", "--to int8"),
    _convert("fp8 experts", "--to fp8 --layout experts", "FP8"),
    _convert("fp8 all", "--to fp8 --layout all", "FP8"),
    _convert("fp8 compressed-tensors", "--to fp8 --layout compressed-tensors", "FP8"),
    _convert("fp8 compressed-tensors-channel", "--to fp8 --layout compressed-tensors-channel", "FP8_PERCHANNEL"),
    _convert("mxfp4", "--to mxfp4"),
    _convert("mxfp4 ktransformers", "--to mxfp4 --layout ktransformers", "MXFP4", (), "mxfp4"),
    _convert("mxfp8", "--to mxfp8"),
    _convert("mxfp8 ktransformers", "--to mxfp8 --layout ktransformers", "MXFP8", (), "mxfp8"),
    _convert("nvfp4 compressed-tensors", "--to nvfp4 --layout compressed-tensors"),
    replace(
        _convert("nvfp4 modelopt", "--to nvfp4 --layout modelopt", "NVFP4"),
        environment={"KT_MXFP4_BACKEND": "avx2"},  # its other kernels of four bits want AMX
    ),
    _convert("gguf", "--to gguf", "", ("llama.cpp",), SOURCE),
    _convert("mlx", "--to mlx", "", ("mlx",), SOURCE),
    _convert("mlx, F32 scales", "--to mlx --scales f32", "", ("mlx",), SOURCE),
    _amx("AMXINT4"),
    _amx("AMXINT8"),
)
