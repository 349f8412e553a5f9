"""A weight's values by somebody else's code: compressed-tensors and torch, never the kernels that convert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kconvert.checkpoint.source import Reader
from kconvert.formats.dense import Dense
from kconvert.formats.packed import Packed
from kconvert.model import Weight

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


def independent_values(weight: Weight, reader: Reader, first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` (exclusive) of `weight`, [last - first, cols] in the weight's own dtype."""
    state = {
        part.suffix: _rows(weight, index, reader, first, last)
        for index, part in enumerate(weight.parts)
        if part.constant is None
    }
    match weight.format:
        case Dense():
            return state["weight"]
        case Packed():
            return _pack_quantized(weight.format, state, (last - first, weight.cols))
    raise NotImplementedError(f"no independent decoder of {weight.format.label}")


def _rows(weight: Weight, index: int, reader: Reader, first: int, last: int) -> torch.Tensor:
    """The rows of one part that these rows of the weight need, as torch reads them."""
    import torch

    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32}
    part, tensor = weight.parts[index], weight.tensors[index]
    start, stop = part.span(weight.rows, first, last)
    data = bytearray(reader.read(tensor.file, tensor.start + start, stop - start))
    return torch.frombuffer(data, dtype=dtypes[part.dtype]).view(last - first, -1)


def _pack_quantized(format: Packed, state: State, shape: tuple[int, int]) -> torch.Tensor:
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if format.group_size else "channel"
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy=strategy, group_size=format.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {**state, "weight_shape": torch.tensor(shape)}
    values: torch.Tensor = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return values
