"""The kernels, through the format classes, against torch eager doing the same and a memory copy of the same bytes.

All figures are GB/s of BF16 (two bytes a weight) over true expert matrices [2048, 7168], one for each thread; kconvert
works on them in the engine's tiles, torch on the whole, as people write it. Before timing, all results are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch_eager
from common import GB, machine, spread, table
from foreign_sample import interleaved
from torch_eager import GROUP

from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import Fp8
from kconvert.formats.gptq import Gptq
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.run.tiles import TILE_BYTES
from kconvert.targets.synthetic import Synthetic

if TYPE_CHECKING:
    from kconvert.formats.base import Bytes, Format, Tile

ROWS, COLS = 2048, 7168
SIZE = ROWS * COLS
TILE_ROWS = TILE_BYTES // (4 * COLS) // 8 * 8  # as AWQ has them
INT4, BF16 = Packed(GROUP), Dense("BF16")
ACROSS = {spelling: Gptq(GROUP, spelling, scale_dtype="BF16") for spelling in ("gptq", "awq")}
ORDERED = Gptq(GROUP, scale_dtype="BF16", ordered=True)
MXFP4, MXFP8, FP8 = Mx(4), Mx(8), Fp8(powers=True, exact=True)
BLOCK_ROWS = 128


class Weight:
    """One expert in INT4 and BF16. Each method goes over the whole of it once."""

    floats: Floats

    def __init__(self, seed: int) -> None:
        self.made = Synthetic("weight", seed)
        self.packed, self.scale = np.zeros(SIZE // 2, np.uint8), np.zeros(SIZE // GROUP * 2, np.uint8)
        self.out, self.spare = np.zeros(SIZE * 2, np.uint8), np.zeros(SIZE * 2, np.uint8)
        self.tile = np.zeros((TILE_ROWS, COLS), np.float32)
        for first, tile, int4, bf16 in self.tiles():
            self.made.decode([], first, tile)
            INT4.encode(tile, int4)
            INT4.decode(int4, first, tile)
            BF16.encode(tile, bf16)
        words, scale = self.packed.view("u4").reshape(ROWS, -1), self.scale.view("u2").reshape(ROWS, -1)
        scale = np.where(scale == 0, np.uint16(0x3F80), scale)  # over zeros, which other columns are not
        self.across = {"gptq": across(words.T, 0x77777777, scale), "awq": across(interleaved(words), 0x88888888, scale)}
        self.groups = np.random.default_rng(seed).permutation(np.arange(COLS, dtype="i4") // GROUP).view("u1")
        self.t_packed = torch.from_numpy(self.packed).view(torch.int32).view(ROWS, -1)
        self.t_scale = torch.from_numpy(self.scale).view(torch.bfloat16).view(ROWS, -1)
        self.t_out = torch.from_numpy(self.out).view(torch.bfloat16).view(ROWS, COLS)

    def tiles(self) -> Iterator[tuple[int, Tile, list[Bytes], list[Bytes]]]:
        """First row, tile, its bytes in INT4, its bytes in BF16."""
        for first in range(0, ROWS, TILE_ROWS):
            last = min(first + TILE_ROWS, ROWS)
            start, stop = first * COLS, last * COLS
            int4 = [self.packed[start // 2 : stop // 2], self.scale[start // 16 : stop // 16]]
            yield first, self.tile[: last - first], int4, [self.out[2 * start : 2 * stop]]

    def copy(self) -> None:
        np.copyto(self.spare, self.out)

    def synthetic(self) -> None:
        for first, tile, _, _ in self.tiles():
            self.made.decode([], first, tile)

    def int4_decode(self) -> None:
        for first, tile, int4, _ in self.tiles():
            INT4.decode(int4, first, tile)

    def gptq_decode(self, spelling: str = "gptq") -> None:
        for first, tile, _, _ in self.tiles():
            ACROSS[spelling].decode(self.across[spelling], first, tile)

    def awq_decode(self) -> None:
        self.gptq_decode("awq")

    def ordered_decode(self) -> None:
        for first, tile, _, _ in self.tiles():
            ORDERED.decode([*self.across["gptq"], self.groups], first, tile)

    def bf16_encode(self) -> None:
        for _, tile, _, bf16 in self.tiles():
            BF16.encode(tile, bf16)

    def int4_to_bf16(self) -> None:
        for first, tile, int4, bf16 in self.tiles():
            INT4.decode(int4, first, tile)
            BF16.encode(tile, bf16)

    def bf16_to_int4(self) -> None:
        for first, tile, int4, bf16 in self.tiles():
            BF16.decode(bf16, first, tile)
            INT4.encode(tile, int4)

    def torch_int4_to_bf16(self) -> torch.Tensor:
        return torch_eager.decode(self.t_packed, self.t_scale)

    def torch_bf16_to_int4(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_eager.encode(self.t_out)

    def compressed_tensors(self) -> torch.Tensor:
        return torch_eager.decode_compressed_tensors(self.t_packed, self.t_scale)

    def check(self) -> None:
        """All ways give the same bits."""
        for first, tile, int4, _ in self.tiles():
            INT4.decode(int4, first, tile)
            expected = tile.copy()
            for spelling, format in ACROSS.items():
                format.decode(self.across[spelling], first, tile)
                assert np.array_equal(tile.view("u4"), expected.view("u4")), f"{spelling} differs"
        packed, scale, out = self.t_packed.clone(), self.t_scale.clone(), self.t_out.clone()
        self.int4_to_bf16()
        self.bf16_to_int4()
        for values in (self.t_out, self.torch_int4_to_bf16(), self.compressed_tensors()):
            assert torch.equal(values.view(torch.int16), out.view(torch.int16)), "BF16 differs"
        for codes, steps in ((self.t_packed, self.t_scale), self.torch_bf16_to_int4()):
            assert torch.equal(codes, packed), "codes differ"
            assert torch.equal(steps, scale), "scales differ"


def across(words: np.ndarray[Any, Any], zero: int, scale: np.ndarray[Any, Any]) -> list[Bytes]:
    """The tensors of a GPTQ or AWQ weight, as bytes."""
    zeros = np.full((COLS // GROUP, ROWS // 8), zero, "u4")
    return [np.ascontiguousarray(part).view("u1").reshape(-1) for part in (words, zeros, scale.T)]


class Floats:
    """One expert in MXFP4, and its values in what keeps them. Each method goes over the whole of it once, in whole blocks."""

    def __init__(self, weight: Weight) -> None:
        self.tile = np.zeros((BLOCK_ROWS, COLS), np.float32)
        self.parts = {f: [np.zeros(p.nbytes, np.uint8) for p in f.parts(ROWS, COLS)] for f in (MXFP4, MXFP8, FP8, BF16)}
        self.parts[BF16][0][:] = weight.out
        self.cast(BF16, MXFP4)
        for format in (MXFP8, FP8):
            assert self.cast(MXFP4, format) == 0, "values are lost"
            self.cast(format, BF16)
            values = self.parts[BF16][0].copy()
            self.cast(MXFP4, BF16)
            assert np.array_equal(values, self.parts[BF16][0]), f"{format.label} differs"

    def cast(self, source: Format | None, target: Format | None) -> int:
        """From one encoding to another, or half of it: from the last tile's values, or to values."""
        lost = 0
        for first in range(0, ROWS, BLOCK_ROWS):
            if source is not None:
                source.decode(self._cut(source, first), first, self.tile)
            if target is not None:
                lost += target.encode(self.tile, self._cut(target, first))
        return lost

    def _cut(self, format: Format, first: int) -> list[Bytes]:
        spans = [part.span(ROWS, first, first + BLOCK_ROWS) for part in format.parts(ROWS, COLS)]
        return [data[slice(*span)] for data, span in zip(self.parts[format], spans, strict=True)]


def casting(source: Format | None, target: Format | None) -> Callable[[Weight], object]:
    """Floats.cast of the weight's floats."""
    return lambda weight: weight.floats.cast(source, target)


SIDES: dict[str, Callable[[Weight], object]] = {
    "memory copy (numpy)": Weight.copy,
    "Int4.decode": Weight.int4_decode,
    "Gptq.decode": Weight.gptq_decode,
    "  of AWQ": Weight.awq_decode,
    "  ordered": Weight.ordered_decode,
    "Dense.encode": Weight.bf16_encode,
    "INT4 -> BF16": Weight.int4_to_bf16,
    "  torch eager": Weight.torch_int4_to_bf16,
    "  compressed-tensors": Weight.compressed_tensors,
    "BF16 -> INT4": Weight.bf16_to_int4,
    "  torch eager ": Weight.torch_bf16_to_int4,
    "Mx(4).decode": casting(MXFP4, None),
    "Mx(8).decode": casting(MXFP8, None),
    "Fp8.decode": casting(FP8, None),
    "Fp8.encode, powers of two": casting(None, FP8),
    "MXFP4 -> BF16": casting(MXFP4, BF16),
    "MXFP4 -> FP8, exact": casting(MXFP4, FP8),
    "MXFP4 -> MXFP8": casting(MXFP4, MXFP8),
    "Synthetic.decode": Weight.synthetic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="of each [15]")
    options = parser.parse_args()
    weights = [Weight(seed) for seed in range(2)]
    weights[0].check()
    for weight in weights:
        weight.floats = Floats(weight)
    speeds: dict[tuple[str, int], list[float]] = {}
    with ThreadPoolExecutor(2) as pool:
        for _ in range(options.runs):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for name, side in SIDES.items():
                    torch_divides = name.strip().startswith(("torch", "compressed"))
                    started = time.perf_counter()
                    list(map(side, weights) if torch_divides else pool.map(side, weights[:threads]))
                    count = 2 if torch_divides else threads
                    speed = count * SIZE * 2 / (time.perf_counter() - started) / GB
                    speeds.setdefault((name, threads), []).append(speed)
    rows = [[name, *(cell for threads in (1, 2) for cell in cells(speeds, name, threads))] for name in SIDES]
    print(f"GB/s of BF16, {options.runs} runs each: median (min-max); x copy: against the memory copy", end="")
    table(["", "1 thread", "x copy", "2 threads", "x copy"], rows)
    machine()


def cells(speeds: dict[tuple[str, int], list[float]], name: str, threads: int) -> list[str]:
    copy = median(speeds["memory copy (numpy)", threads])
    return [spread(speeds[name, threads]), f"{median(speeds[name, threads]) / copy:.2f}"]


if __name__ == "__main__":
    main()
