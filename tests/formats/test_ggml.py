"""llama.cpp's blocks, held against gguf's own quantisation and dequantisation in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from kconvert.formats.base import Format
from kconvert.formats.engines.ggml import Q4_0, Q8_0, Mxfp4, Nvfp4Blocks
from kconvert.formats.engines.turns import Turns
from kconvert.formats.mx import Mx
from kconvert.formats.nvfp4 import Nvfp4
from kconvert.formats.packed import Packed
from kconvert.formats.stacks import MxStack

ROWS, COLS = 6, 64


def packed(codes: torch.Tensor, scale: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Codes -8 to 7 and their scales as pack-quantized has them: the first value in the lowest nibble."""
    stored = (codes + 8).to(torch.int32).view(len(codes), -1, 2)
    bytes_ = (stored[..., 0] | stored[..., 1] << 4).to(torch.uint8)
    return [bytes_.flatten().numpy(), scale.contiguous().flatten().view(torch.uint8).numpy()]


def recode(target: Format, source: Format, inputs: list[Any], rows: int, cols: int) -> tuple[list[Any], int]:
    outputs = [np.zeros(part.nbytes, np.uint8) for part in target.parts(rows, cols)]
    assert target.takes_codes(source)
    return outputs, target.recode(source, inputs, rows, cols, outputs)


def dequantised(blocks: Any, dtype: Type) -> Any:
    size = {Type.Q4_0: 18, Type.Q8_0: 34, Type.MXFP4: 17, Type.NVFP4: 36}[dtype]
    return quants.dequantize(blocks.reshape(-1, size), dtype)


def every_scale() -> torch.Tensor:
    """All positive bf16 numbers that the text of formats.engines.ggml promises."""
    bits = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16)
    scale = bits.view(torch.bfloat16)
    return scale[(scale.float() >= 2**-17) & (scale.float() <= 65280)]


def test_every_promised_scale_keeps_every_code() -> None:
    scale = every_scale()
    scale = torch.cat([scale, -scale])[:, None]
    codes = torch.arange(-8, 8).repeat(2).expand(len(scale), 32)
    (blocks,), lost = recode(Q4_0(strict=True), Packed(32), packed(codes, scale), len(scale), 32)
    assert lost == 0
    assert (dequantised(blocks, Type.Q4_0) == (codes * scale.float()).numpy()).all()
    assert len(scale) == 2 * 32 * 128 + 2 * 128 or len(scale) > 8000


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_codes_times_scales(codec: Any, group: int | None, dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (ROWS, COLS))
    scale = (torch.rand(ROWS, COLS // (group or COLS)) * 0.1 + 0.01).half().bfloat16().to(dtype)
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    (blocks,), lost = recode(Q4_0(), Packed(group, scale_dtype=name), packed(codes, scale), ROWS, COLS)
    expected = (codes.view(ROWS, scale.shape[1], -1) * scale.float()[..., None]).view(ROWS, COLS)
    assert lost == 0
    assert (dequantised(blocks, Type.Q4_0).reshape(ROWS, COLS) == expected.numpy()).all()
    tensor = torch.frombuffer(bytearray(blocks), dtype=torch.uint8)
    tile = np.empty((ROWS, COLS), np.float32)
    Q4_0().decode([tensor.numpy()], 0, tile)
    assert (tile == expected.numpy()).all()


def test_scales_that_f16_has_not_are_counted_or_refused() -> None:
    codes = torch.ones(3, 32, dtype=torch.int64)
    scale = torch.tensor([[0.5], [2**-18 * 1.0078125], [2**-20 * 1.3]]).bfloat16()
    inputs = packed(codes, scale)
    (blocks,), lost = recode(Q4_0(), Packed(32), inputs, 3, 32)
    assert lost == 2
    assert (dequantised(blocks, Type.Q4_0)[:, 0] == scale.half().float().numpy()[:, 0]).all()
    with pytest.raises(ValueError, match="2 of its groups have scales that F16 has not"):
        recode(Q4_0(strict=True), Packed(32), inputs, 3, 32)
    zeros = packed(codes * 0, scale)
    assert recode(Q4_0(strict=True), Packed(32), zeros, 3, 32)[1] == 0


def test_a_scale_beyond_f16_is_refused() -> None:
    with pytest.raises(ValueError, match="F16 cannot hold"):
        recode(Q4_0(), Packed(32), packed(torch.ones(1, 32), torch.tensor([[70000.0]]).bfloat16()), 1, 32)


def test_every_scale_is_rounded_as_numpy_rounds_it() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    scale = bits.view(torch.bfloat16)
    scale = scale[scale.float().abs() < 65520][:, None]
    more = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32))
    ties = torch.arange(-3, 4) * 2**-25 + torch.tensor([[2.0**-24], [2.0**-14], [2.0**-13]])
    for name, found in (("BF16", scale), ("F32", torch.cat([more[more.abs() < 65520], ties.flatten()])[:, None])):
        codes = torch.ones(len(found), 32, dtype=torch.int64)
        (blocks,), lost = recode(
            Q4_0(), Packed(32, scale_dtype=name), packed(codes * (found != 0), found), len(found), 32
        )
        halves = found.half()
        assert (blocks.reshape(-1, 18)[:, :2] == halves.view(torch.uint8).numpy()).all()
        assert lost == (halves.float() != found.float()).sum()


def test_a_scale_of_zero_over_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="scale of zero"):
        recode(Q4_0(), Packed(32), packed(torch.ones(1, 32), torch.zeros(1, 1).bfloat16()), 1, 32)


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-140, 20))
@settings(max_examples=60)
def test_q8_0_is_what_gguf_makes(seed: int, power: int) -> None:
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal((ROWS, COLS)) * 2.0**power).astype(np.float32)
    values[0] = 0
    values[1, :32] = np.arange(32) / 2 * 2.0**power  # halves
    outputs = [np.zeros(ROWS * COLS // 32 * 34, np.uint8)]
    Q8_0().encode(values, outputs)
    if power > -100:  # 1 / scale is finite
        assert (outputs[0].reshape(ROWS, -1) == quants.quantize(values, Type.Q8_0)).all()
    tile = np.empty_like(values)
    Q8_0().decode(outputs, 0, tile)
    assert (tile == dequantised(outputs[0], Type.Q8_0).reshape(ROWS, COLS)).all()


def test_q8_0_refuses_what_no_scale_holds() -> None:
    for value in (np.nan, np.inf, 3e38):
        with pytest.raises(ValueError, match="not finite, or too large"):
            Q8_0().encode(np.full((1, 32), value, np.float32), [np.zeros(34, np.uint8)])


@pytest.mark.parametrize("source", [Mx(4), MxStack(2)])
def test_mxfp4_keeps_every_code_and_scale(source: Format) -> None:
    codes = torch.randint(0, 256, (ROWS, COLS // 2), dtype=torch.uint8)
    scale = torch.randint(0, 255, (ROWS, COLS // 32), dtype=torch.uint8)
    scale[0] = 0
    (blocks,), _ = recode(Mxfp4(), source, [codes.flatten().numpy(), scale.flatten().numpy()], ROWS, COLS)
    tile = np.empty((ROWS, COLS), np.float32)
    source.decode([codes.flatten().numpy(), scale.flatten().numpy()], 0, tile)
    ours = np.empty_like(tile)
    Mxfp4().decode([blocks], 0, ours)
    theirs = dequantised(blocks, Type.MXFP4).reshape(ROWS, COLS)
    assert (ours == theirs).all()
    assert (torch.from_numpy(theirs).bfloat16().float().numpy() == tile)[1:].all()


@pytest.mark.parametrize("multiplies", [True, False])
def test_nvfp4_keeps_every_code_under_every_scale(multiplies: bool) -> None:
    codes = torch.arange(16).repeat(2).expand(127, 2, 32).reshape(127, 64)
    codes = torch.stack([codes[row].roll(row) for row in range(127)]).to(torch.uint8)
    scale = torch.arange(127, dtype=torch.uint8)[:, None].expand(127, 4) ^ torch.arange(4, dtype=torch.uint8)
    scale = scale.clamp(max=0x7E)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    factor = np.float32(0.1)
    inputs = [packed.flatten().numpy(), scale.flatten().numpy(), np.array([factor]).view(np.uint8)]
    (blocks, beside), lost = recode(Nvfp4Blocks(strict=multiplies), Nvfp4(multiplies), inputs, 127, 64)
    assert multiplies is False or lost == 0
    assert beside.view(np.float32) == (factor if multiplies else np.float32(1) / factor)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    wide = scale.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
    expected = grid[codes.long()] * wide
    assert (dequantised(blocks, Type.NVFP4).reshape(127, 64) == expected.numpy()).all()
    nibbles = blocks.reshape(127, 36)[:, 4:].reshape(127, 4, 8)
    ours = np.concatenate([nibbles & 15, nibbles >> 4], -1).reshape(127, 64)
    assert (ours == codes.numpy()).all()


def test_rows_that_take_turns_become_two_stacks() -> None:
    codes = torch.randint(0, 256, (8, COLS // 2), dtype=torch.uint8)
    scale = torch.randint(100, 140, (8, COLS // 32), dtype=torch.uint8)
    format = Turns(Mxfp4(), 2, ("_gate_exps.{}", "_up_exps.{}"))
    assert [part.shape for part in format.parts(8, COLS)] == [(2, 2, COLS)] * 2
    outputs, _ = recode(format, MxStack(2), [codes.flatten().numpy(), scale.flatten().numpy()], 8, COLS)
    for k, output in enumerate(outputs):
        inputs = [codes[k::2].flatten().numpy(), scale[k::2].flatten().numpy()]
        assert (output == recode(Mxfp4(), Mx(4), inputs, 4, COLS)[0][0]).all()
