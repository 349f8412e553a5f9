"""A weight's values by somebody else's code: compressed-tensors and torch, never the kernels that convert.

AMX weights, which neither of them knows, are unpacked by the reference, whose bytes are kt-kernel's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

from kconvert.checkpoint.buffers import Buffers
from kconvert.checkpoint.source import Reader
from kconvert.formats import Format
from kconvert.formats.amx import Amx
from kconvert.formats.conventions import CONVENTIONS
from kconvert.formats.dense import Dense
from kconvert.formats.fp8 import E8M0, WRITTEN_SCALES, Fp8
from kconvert.formats.int8 import Int8
from kconvert.formats.mx import GROUP, Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.stacks import MxStack
from kconvert.models.model import Weight

if TYPE_CHECKING:
    import torch

State: TypeAlias = "dict[str, torch.Tensor]"
Encoder: TypeAlias = Callable[..., tuple[Any, ...]]  # values -> codes, scales and what else there is

PIECE_ELEMENTS = 1 << 17  # of the work of a reference

# How torch reads the tensors of a file: names, as torch is loaded when it is needed.
TORCH_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E8M0": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}


def independent_values(weight: Weight, reader: Reader, first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` (exclusive) of `weight`, [last - first, cols] in the weight's own dtype."""
    unit = row_unit(weight)
    start, stop = first // unit * unit, min(-(-last // unit) * unit, weight.rows)
    state = read_state(weight, reader, start, stop)
    return decoded(weight.format, state, (stop - start, weight.cols))[first - start : last - start]


def read_state(weight: Weight, reader: Reader, first: int, last: int, buffers: Buffers | None = None) -> State:
    """The tensors that these rows of `weight` need, but for constants; `first` is a multiple of row_unit(weight).

    They lie in `buffers`, new ones by default, until something else is read into these.
    """
    buffers = buffers or Buffers()
    return {
        part.suffix: _rows(weight, index, reader, first, last, buffers)
        for index, part in enumerate(weight.parts)
        if part.constant is None
    }


def decoded(format: Format, state: State, shape: tuple[int, int]) -> torch.Tensor:
    """The values [rows, cols] = `shape` that the tensors `state` spell, in the weight's own dtype."""
    cols = shape[1]
    match format:
        case Dense(transposed=int(out)):
            values = state[""].view(-1, cols, out).swapaxes(1, 2).reshape(-1, cols)
        case Dense():
            values = state["weight"]
        case Packed():
            values = _pack_quantized(format, state, shape)
        case Fp8():
            values = _float_quantized(format, state)
        case Int8():
            values = _int_quantized(format, state)
        case Mx() | Nvfp4():
            values = _microscaled(format, state)
        case MxStack():
            codes, scale = state["_blocks"].view(-1, cols // 2), state["_scales"].view(-1, cols // GROUP)
            values = _microscaled(Mx(4), {"weight_packed": codes, "weight_scale": scale})
        case Amx():
            values = _amx(format, state, cols)
        case _:
            raise NotImplementedError(f"no independent decoder of {format.label}")
    return values


def authority(format: Format) -> str:
    """Who says what the values of a weight in this format are."""
    return "the source" if isinstance(format, Dense) else "compressed-tensors"


def has_reference(format: Format) -> bool:
    """Whether it is known what kconvert writes as `format`: then expected_parts takes it."""
    match format:
        case Packed():
            kind = (format.bits, format.symmetric, format.ordered, format.scale_dtype) == (4, True, False, "BF16")
            return kind and not format.unused
        case Fp8():
            return format.strategy != "tensor" and format.scale_dtype in WRITTEN_SCALES and not format.unused
        case Int8():
            kind = (format.bits, format.strategy, format.symmetric) == (8, "channel", True)
            return kind and format.scale_dtype == "BF16" and not format.unused
        case Mx():
            return not format.unused
    return isinstance(format, Amx)


def expected_parts(values: torch.Tensor, weight: Weight, first: int) -> Iterator[State]:
    """What the format of `weight`, one that has_reference, may make of `values`, bf16 [rows, cols], as its rows from `first`
    on: {suffix: tensor}.

    Nothing in an INT4, FP8 or MX checkpoint says by which convention it was made, from exact values, or with which scales.
    """
    import torch

    from kconvert.formats.reference import amx, fp8, int8, mx, packed

    match format := weight.format:
        case Packed():
            size = format.group_size or values.shape[1]
            encoders: tuple[Encoder, ...] = (packed.encode_exact, packed.encode, packed.encode_mse)
            for encode in encoders:
                for rule in CONVENTIONS.values():
                    codes, scale = _in_pieces(partial(encode, group_size=size, rule=rule), values)
                    yield {"weight_packed": codes, "weight_scale": scale}
        case Fp8():
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[format.scale_dtype]
            block = format.block_shape(*values.shape)
            for mse in (False, True):
                codes, scale = _in_pieces(partial(fp8.encode, block=block, scale_dtype=dtype, mse=mse), values, block)
                yield {"weight": codes, format.scale_name: scale}
        case Int8():
            codes, scale = _in_pieces(int8.encode, values)
            yield {"weight": codes, "weight_scale": scale}
        case Mx():
            for mse in (False, True):
                codes, scale = _in_pieces(partial(mx.encode, bits=format.bits, mse=mse), values)
                yield {"weight_packed" if format.bits == 4 else "weight": codes, "weight_scale": scale}
        case Amx():
            for mse in (False, True) if format.mse is None else (format.mse,):
                encode = partial(amx.codes_and_scale, bits=format.bits, mse=mse)
                yield amx_parts(values, weight, first, format, partial(_in_pieces, encode))
        case _:
            raise NotImplementedError(f"no reference encoder of {format.label}")


def _in_pieces(
    encode: Encoder,
    values: torch.Tensor,
    block: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that `encode` makes of whole blocks, by default rows, as many at a time as fit into a cache."""
    import torch

    rows, cols = values.shape
    height, width = block or (1, cols)
    across = max(width, PIECE_ELEMENTS // height // width * width)
    down = max(height, PIECE_ELEMENTS // min(across, cols) // height * height)
    bands = [
        [encode(values[row : row + down, col : col + across]) for col in range(0, cols, across)]
        for row in range(0, rows, down)
    ]
    codes, scale = (torch.cat([torch.cat([piece[k] for piece in band], -1) for band in bands]) for k in (0, 1))
    return codes, scale


def row_unit(weight: Weight) -> int:
    """Ranges of rows that begin at multiples of this can be decoded and encoded by themselves."""
    return math.lcm(*(part.every for part in weight.parts if part.every))


def _rows(weight: Weight, index: int, reader: Reader, first: int, last: int, buffers: Buffers) -> torch.Tensor:
    """The rows of one part that these rows of the weight need, as torch reads them."""
    import torch

    part, tensor = weight.parts[index], weight.tensors[index]
    start, stop = part.span(weight.rows, first, last)
    data = buffers.fetch(reader, part.suffix, tensor.file, tensor.start + start, stop - start)
    shape = part.shape if part.every is None else (-1, *part.shape[max(1, len(part.shape) - 1) :])
    dtype = getattr(torch, TORCH_DTYPES[part.dtype])
    # A part that belongs to other rows gives none, which torch does not take.
    if not len(data):
        return torch.empty(0, dtype=dtype)
    aligned = (tensor.start + start) % dtype.itemsize == 0
    return torch.from_numpy(data if aligned else data.copy()).view(dtype).view(shape)


def _pack_quantized(format: Packed, state: State, shape: tuple[int, int]) -> torch.Tensor:
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    state = {**_without_unused(format, state), "weight_shape": torch.tensor(shape)}
    if not format.symmetric and format.zero_dtype == "I8":
        state["weight_zero_point"] = pack_to_int32(state["weight_zero_point"], format.bits, packed_dim=0)
    if not format.symmetric and len(state["weight_zero_point"]) == 1:
        # compressed-tensors cannot unpack a single word down the rows; it cuts off what is too much.
        state["weight_zero_point"] = state["weight_zero_point"].repeat(2, 1)
    if format.ordered:
        return _unordered(format, state, shape)
    values: torch.Tensor = PackedQuantizationCompressor.decompress(state, _scheme(format))["weight"]
    return values


def _unordered(format: Packed, state: State, shape: tuple[int, int]) -> torch.Tensor:
    """compressed-tensors unpacks weights with a g_idx, but no longer multiplies them by the scales of its groups."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scale, groups = state["weight_scale"], state["weight_g_idx"].long()
    codes = unpack_from_int32(state["weight_packed"], format.bits, shape).to(scale.dtype)
    if not format.symmetric:
        zero = unpack_from_int32(state["weight_zero_point"], format.bits, scale.shape, packed_dim=0)
        codes = codes - zero[:, groups].to(scale.dtype)
    values: torch.Tensor = codes * scale[:, groups]
    return values


def _without_unused(format: Packed | Int8 | Mx | Nvfp4, state: State) -> State:
    """Without zero points that mean nothing: compressed-tensors' own writers leave them out."""
    gone = {part.suffix for part in format.unused}
    return {suffix: tensor for suffix, tensor in state.items() if suffix not in gone}


def fp8_scale(format: Fp8, state: State) -> torch.Tensor:
    """The scales as f32, exact."""
    scale = state[format.scale_name]
    return (scale.double() - 127).exp2().float() if format.scale_dtype in E8M0 else scale.float()


def _float_quantized(format: Fp8, state: State) -> torch.Tensor:
    """FP8 of every strategy by compressed-tensors, DeepSeek's block scales under the name that it knows.

    It computes in the scale's dtype. Widened to f32, exact, the value is one f32 product that is then rounded to bf16.
    """
    import torch
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor

    scale = fp8_scale(format, state)
    values: torch.Tensor = FloatQuantizationCompressor.decompress(
        {"weight": state["weight"], "weight_scale": scale}, _scheme(format)
    )["weight"]
    return values.to(torch.bfloat16)


def _int_quantized(format: Int8, state: State) -> torch.Tensor:
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor

    state = _without_unused(format, state)
    values: torch.Tensor = IntQuantizationCompressor.decompress(state, _scheme(format))["weight"]
    return values


def _microscaled(format: Mx | Nvfp4, state: State) -> torch.Tensor:
    from compressed_tensors.compressors import mxfp4, mxfp8, nvfp4

    if isinstance(format, Nvfp4):
        compressor: Any = nvfp4.NVFP4PackedCompressor
    else:
        compressor = mxfp4.MXFP4PackedCompressor if format.bits == 4 else mxfp8.MXFP8QuantizationCompressor
    values: torch.Tensor = compressor.decompress(_without_unused(format, state), _scheme(format))["weight"]
    return values


@cache
def _scheme(format: Packed | Fp8 | Int8 | Mx | Nvfp4) -> Any:
    """What compressed-tensors calls the format; it takes a while to check its own words."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    match format:
        case Packed():
            strategy = "group" if format.group_size else "channel"
            args = {"num_bits": format.bits, "symmetric": format.symmetric, "strategy": strategy}
            args["group_size"] = format.group_size
        case Fp8():
            args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": format.strategy}
            args["block_structure"] = list(format.block) if format.strategy == "block" else None
        case Int8():
            args = {"num_bits": format.bits, "symmetric": format.symmetric, "strategy": format.strategy}
            args["group_size"] = format.group_size
        case Mx():
            args = {"num_bits": format.bits, "type": "float", "strategy": "group", "group_size": format.group_size}
        case Nvfp4():
            args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def _amx(format: Amx, state: State, cols: int) -> torch.Tensor:
    """All shards, side by side as the weight was cut."""
    import torch

    from kconvert.formats.reference import amx

    by_rows = format.split == "rows"
    width = cols if by_rows else cols // format.numa
    shards = [
        amx.decode(state[f"numa.{n}.weight"], state[f"numa.{n}.scale"], width, format.bits) for n in range(format.numa)
    ]
    return torch.cat(shards, 0 if by_rows else 1)


def amx_parts(values: torch.Tensor, weight: Weight, first: int, format: Amx, quantise: Encoder) -> State:
    """Codes and scales that `quantise` makes of what was quantised together, cut into the shards in which it is."""
    from kconvert.formats.reference import amx

    state: State = {}

    def add(n: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
        state[f"numa.{n}.weight"], state[f"numa.{n}.scale"] = amx.pack(codes, format.bits), scale

    if format.split == "rows":
        codes, scale = quantise(values)
        for n, part in enumerate(weight.parts[::2]):
            begin, end = part.rows or (0, weight.rows)
            own = slice(max(begin - first, 0), max(end - first, 0))
            add(n, codes[own], scale[own])
    else:
        for n, together in enumerate(values.chunk(format.numa // format.pieces, 1)):
            codes, scale = quantise(together)
            for k, shard in enumerate(codes.chunk(format.pieces, 1)):
                add(n * format.pieces + k, shard, scale)
    return state
