"""AMX codes and scales as the reference makes them, in their order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kconvert.checkpoint.buffers import Buffers
from kconvert.proof.parity.quick.memory import take
from kconvert.proof.parity.quick.native import Loop

if TYPE_CHECKING:
    import torch

ENCODE = Loop("amx", "encode", "u2* f4* u1* f4* f4* i8 i8 i8 i8 i8 i8 i8")
WRONG_ORDER = Loop("amx", "wrong_order", "u4* u4* i8 i8 i8 i8 i8 i8 i8 i8")
UNPACK = Loop("amx", "unpack", "u4* u4* i8 i8 i8 i8 i8 i8")
DECODE = Loop("amx", "decode", "u1* f4* f4* i8 i8 i8 i8 i8 i8")
LANES = 64  # of the reference's sums
BLOCK_COLS = 3584


def encode(
    values: torch.Tensor, first: int, cols: int, bits: int, mse: bool, buffers: Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `first` to first + cols of finite bf16 [n, k] -> the bytes of each row's codes, u8 [n, cols * bits / 8], and f32
    scales [n], in memory of `buffers`."""
    import torch

    rows = len(values)
    lines = take(buffers, "lines", torch.uint8, (rows, cols * bits // 8))
    rooms = {"steps": rows, "floats": cols, "sums": LANES}
    scale, floats, sums = (take(buffers, use, torch.float32, (size,)) for use, size in rooms.items())
    ENCODE(values, scale, lines, floats, sums, rows, values.shape[1], first, cols, LANES, bits, mse)
    return lines, scale


def is_packed(lines: torch.Tensor, first: int, width: int, packed: torch.Tensor, bits: int) -> bool:
    """Whether I8 [n * width] are bytes `first` to first + width of u8 [n, bytes], in the order of AMX."""
    import torch

    words = [tensor.view(torch.int32) for tensor in (lines, packed.contiguous())]
    rows, stride = words[0].shape
    return not WRONG_ORDER(*words, rows, stride, first // 4, width // 4, *_blocks(rows, width // 4, bits))


def decode(
    packed: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, first: int, cols: int, bits: int, buffers: Buffers
) -> None:
    """I8 [n * cols * bits / 8] and f32 [n] -> columns `first` to first + cols of f32 [n, k]."""
    import torch

    rows, words = len(scale), cols * bits // 32
    lines = take(buffers, "lines", torch.int32, (rows, words))
    UNPACK(packed.contiguous().view(torch.int32), lines, rows, words, *_blocks(rows, words, bits))
    DECODE(lines.view(torch.uint8), scale.contiguous(), values, rows, cols, values.shape[1], first, LANES, bits)


def _blocks(rows: int, words: int, bits: int) -> tuple[int, int, int, int]:
    """The height of a block, how many there are, and the same of its width in words."""
    height, width = 512 // bits, BLOCK_COLS * bits // 32
    return height, math.ceil(rows / height), width, math.ceil(words / width)
