"""FP8 of every strategy by compressed-tensors, DeepSeek's block scales under the name that it knows; or in less time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.buffers import Buffers
from kconvert.formats.fp8 import E8M0, WRITTEN_SCALES, Fp8
from kconvert.models.model import Weight
from kconvert.proof.parity import library
from kconvert.proof.parity.quick import fp8 as quick
from kconvert.proof.parity.witnesses.base import State, Witness, count_bytes, in_pieces, scheme

if TYPE_CHECKING:
    import torch


class Fp8Witness(Witness[Fp8]):
    decodes_parts_of_blocks = True

    @property
    def shared(self) -> str | None:
        return self.format.scale_name if self.format.strategy == "tensor" else None

    def arguments(self) -> dict[str, Any]:
        block = list(self.format.block) if self.format.strategy == "block" else None
        common = {"num_bits": 8, "type": "float", "symmetric": True}
        return {**common, "strategy": self.format.strategy, "block_structure": block}

    def values(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        """It computes in the scale's dtype: widened to f32, exact, the value is one f32 product, then rounded to bf16."""
        import torch

        compressor = library.part("compressors.naive_quantized.base", "FloatQuantizationCompressor")
        state = {"weight": state["weight"], "weight_scale": self.scales(state)}
        values: torch.Tensor = compressor.decompress(state, scheme(self))["weight"]
        return values.to(torch.bfloat16)

    @property
    def has_reference(self) -> bool:
        format = self.format
        written = ("F32",) if format.strategy == "tensor" else WRITTEN_SCALES
        return format.scale_dtype in written and not format.unused

    def encodings(self, values: torch.Tensor, weight: Weight, first: int, found: State) -> Iterator[State]:
        """Nothing in a checkpoint says with which scales it was made; that of a tensor is of more than these rows."""
        from kconvert.formats.reference import fp8

        if self.format.strategy == "tensor":
            yield {**found, "weight": fp8.encode_by_scale(values, found[self.format.scale_name])}
            return

        block = self.format.block_shape(*values.shape)
        choices = [(False, True)] if self.format.powers else [(False, False), (True, False), (False, True)]
        for mse, powers in choices:
            encode = partial(fp8.encode, block=block, scale_dtype=self._scale_dtype, mse=mse, powers=powers)
            codes, scale = in_pieces(encode, values, block)
            yield {"weight": codes, self.format.scale_name: scale}

    @property
    def _scale_dtype(self) -> torch.dtype:
        import torch

        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, **dict.fromkeys(E8M0, torch.uint8)}
        return dtypes[self.format.scale_dtype]

    @property
    def _block(self) -> tuple[int, int] | None:
        return self.format.block if self.format.strategy == "block" else None

    def is_quick(self, cols: int) -> bool:
        return cols % 2 == 0

    def quick_values(self, state: State, cols: int, buffers: Buffers) -> torch.Tensor:
        return quick.decode(state["weight"], self.scales(state), self._block, buffers)

    @property
    def judges_quickly(self) -> bool:
        return self.has_reference and self.format.strategy != "tensor"

    def is_made_of(self, values: torch.Tensor, weight: Weight, first: int, found: State, buffers: Buffers) -> bool:
        """By the usual rule or of least squared error, or if all scales that were found are powers of two, by that rule."""
        import torch

        powers = bool((torch.frexp(self.scales(found)).mantissa == 0.5).all())
        return quick.is_made_of(values, found["weight"], found[self.format.scale_name], self._block, powers)

    def grid(self) -> tuple[float, ...]:
        return e4m3_values()

    def count_codes(self, state: State, shape: tuple[int, int]) -> torch.Tensor:
        return count_bytes(state["weight"])

    def scales(self, state: State) -> torch.Tensor:
        """f32, exact."""
        scale = state[self.format.scale_name]
        return (scale.double() - 127).exp2().float() if self.format.scale_dtype in E8M0 else scale.float()

    def group_columns(self, cols: int) -> int:
        return self.format.block[1] if self.format.strategy == "block" else cols


def e4m3_values() -> tuple[float, ...]:
    """Of all bytes; NaN, which is found elsewhere, as 0."""
    import torch

    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    return tuple(0.0 if math.isnan(value) else value for value in values)
