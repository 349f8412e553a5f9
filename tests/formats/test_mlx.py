"""MLX's affine integers: read as bf16(code * scale + bias), and made of INT4 without touching its words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlx_packing import BITS, affine, pack, value

from kconvert.formats import recognise
from kconvert.formats.base import Scheme
from kconvert.formats.dense import Dense
from kconvert.formats.engines.mlx import Affine, affine_of, by_heads
from kconvert.formats.engines.turns import Turns
from kconvert.formats.mx import Mx
from kconvert.formats.packed import Packed
from kconvert.proof.parity.oracle import decoded

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


def decode(format: Affine, parts: dict[str, torch.Tensor], rows: int, cols: int) -> torch.Tensor:
    tile = np.empty((rows, cols), "f4")
    format.decode([flat(parts[suffix]) for suffix in ("weight", "scales", "biases")], 0, tile)
    return torch.from_numpy(tile).bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_a_value_is_code_times_scale_plus_bias_rounded_once(bits: int, group: int, dtype: str) -> None:
    parts = affine(5, 256, bits, group, DTYPES[dtype])
    found = decode(Affine(bits, group, dtype), parts, 5, 256)
    assert found.equal(value(parts, group))
    assert decoded(Affine(bits, group, dtype), parts, (5, 256)).equal(found)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_mlx_gives_the_same_with_scales_in_f32(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    parts = affine(8, 256, bits, group, torch.float32)
    arrays = [mx.array(parts[suffix].numpy()) for suffix in ("weight", "scales", "biases")]
    theirs = torch.from_numpy(np.array(mx.dequantize(*arrays, group_size=group, bits=bits)))
    ours = decode(Affine(bits, group, "F32"), parts, 8, 256)
    # Its sum may be fused, which is another f32 and seldom another bf16.
    assert (theirs.bfloat16() != ours).float().mean() < 1e-3
    assert theirs.sub(ours.float()).abs().max() <= ours.float().abs().max() * 2**-8


def int4(rows: int, cols: int, scales: torch.Tensor, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor, Packed]:
    """Codes with their offset, their words as compressed-tensors has them, and the format."""
    codes = torch.arange(rows * cols).reshape(rows, cols) % 2**bits
    return codes, pack(codes, bits), Packed(cols // scales.shape[1], None, bits=bits)


def carried(words: torch.Tensor, scales: torch.Tensor, packed: Packed, dtype: str) -> tuple[list[np.ndarray], int]:
    rows, cols = len(words), words.shape[1] * 32 // packed.bits
    target = affine_of(packed, cols, dtype, strict=False)
    assert target is not None
    out = [np.zeros(part.nbytes, "u1") for part in target.parts(rows, cols)]
    return out, target.recode(packed, [flat(words), flat(scales)], rows, cols, out)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int4_keeps_its_words_and_scales_and_every_product(bits: int, dtype: str) -> None:
    scales = (
        torch.from_numpy((np.arange(64, dtype="u4") * 0x10007 % 0x7B80 << 16).view("f4")).bfloat16().clamp(min=1e-30)
    )
    scales = scales.reshape(8, 8)
    codes, words, packed = int4(8, 256, scales, bits)
    (out_words, out_scales, out_biases), lost = carried(words, scales, packed, dtype)
    assert lost == 0
    assert out_words.tobytes() == flat(words).tobytes()
    as_torch = {"weight": words, "codes": codes}
    for suffix, data in (("scales", out_scales), ("biases", out_biases)):
        as_torch[suffix] = torch.from_numpy(data.copy()).view(DTYPES[dtype]).reshape(8, 8)
    assert as_torch["scales"].float().equal(scales.float())
    assert as_torch["biases"].double().equal(scales.double() * -(2 ** (bits - 1)))
    want = ((codes - 2 ** (bits - 1)).float() * scales.float().repeat_interleave(32, 1)).bfloat16()
    assert value(as_torch, 32).view(torch.int16).equal(want.view(torch.int16))


@pytest.mark.parametrize(
    ("scale", "code", "lost"),
    [(-0.5, 8, 1), (-0.5, 9, 0), (0.0, 8, 0), (0.0, 7, 1), (-0.0, 8, 1), (-0.0, 3, 0), (0.5, 8, 0)],
)
def test_zeros_that_lose_their_sign_are_counted(scale: float, code: int, lost: int) -> None:
    words = pack(torch.full((1, 32), code), 4)
    steps = torch.tensor([[scale]], dtype=torch.bfloat16)
    (_, scales, biases), count = carried(words, steps, Packed(32, None), "BF16")
    assert count == lost
    parts = {"codes": torch.full((1, 32), code)}
    parts |= {
        key: torch.from_numpy(data.copy()).view(torch.bfloat16)[None]
        for key, data in (("scales", scales), ("biases", biases))
    }
    want = ((code - 8) * steps.float()).bfloat16().expand(1, 32)
    assert value(parts, 32).view(torch.int16).equal(want.contiguous().view(torch.int16)) is not bool(lost)


def test_a_scale_whose_bias_would_be_infinite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        carried(
            pack(torch.full((1, 32), 9), 4), torch.tensor([[2.0**125]], dtype=torch.bfloat16), Packed(32, None), "BF16"
        )


def test_kv_b_goes_by_heads_and_back() -> None:
    format = by_heads(6, 4, Dense("BF16"), Dense("BF16"))
    whole = torch.randn(3 * 10, 8).bfloat16()
    out = [np.zeros(part.nbytes, "u1") for part in format.parts(30, 8)]
    format.encode(whole.float().numpy(), out)
    heads = whole.view(3, 10, 8)
    assert out[0].tobytes() == flat(heads[:, :6].mT.contiguous()).tobytes()
    assert out[1].tobytes() == flat(heads[:, 6:].contiguous()).tobytes()
    tile = np.empty((30, 8), "f4")
    format.decode(out, 0, tile)
    assert torch.from_numpy(tile).bfloat16().equal(whole)


def test_gate_and_up_take_turns() -> None:
    format = Turns(Dense("BF16"), 2)
    whole = torch.randn(2 * 6, 8).bfloat16()
    out = [np.zeros(part.nbytes, "u1") for part in format.parts(12, 8)]
    format.encode(whole.float().numpy(), out)
    assert out[0].tobytes() == flat(whole[0::2]).tobytes()
    assert out[1].tobytes() == flat(whole[1::2]).tobytes()


def test_shapes_tell_what_config_json_does_not_name() -> None:
    scheme = Scheme("mlx", 4, "int", False, "group", 32)
    found = {"weight": ("U32", (8, 64)), "scales": ("F16", (8, 4)), "biases": ("F16", (8, 4))}
    assert recognise(scheme, found, (8, 256)) == (Affine(8, 64, "F16"), (8, 256))
    assert recognise(scheme, {"weight": ("U32", (8, 32)), "scales": ("U8", (8, 8))}, (8, 256))[0] == Mx(
        4, codes_name="weight", codes_dtype="U32", scale_name="scales"
    )


@pytest.mark.parametrize(
    "found",
    [
        {"weight": ("U32", (8, 32)), "scales": ("BF16", (8, 8))},
        {"weight": ("U32", (8, 32)), "scales": ("I64", (8, 8)), "biases": ("BF16", (8, 8))},
        {"weight": ("I32", (8, 32)), "scales": ("BF16", (8, 8)), "biases": ("BF16", (8, 8))},
        {"weight": ("U32", (8, 32)), "scales": ("BF16", (8, 16)), "biases": ("BF16", (8, 16))},
        {"weight": ("U32", (8, 28)), "scales": ("BF16", (8, 8)), "biases": ("BF16", (8, 8))},
        {"weight": ("U32", (8, 0)), "scales": ("BF16", (8, 0)), "biases": ("BF16", (8, 0))},
        {"weight": ("U32", (8,)), "scales": ("BF16", (8,)), "biases": ("BF16", (8,))},
    ],
    ids=["no biases", "no scales", "other words", "groups of 16", "bits of 3.5", "empty", "a line"],
)
def test_what_is_no_affine_weight_is_refused(found: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    with pytest.raises(ValueError, match=r"^(its|it has)"):
        recognise(Scheme("mlx", 4, "int", False, "group", 32), found, (8, 256))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_every_scale_has_the_bias_that_torch_computes(dtype: str) -> None:
    """All but those whose multiple is not finite, over codes that are zero, negative, positive, or all of it."""
    scales = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    scales = scales[(scales.float() * 16).isfinite()]
    scales = scales[: len(scales) // 8 * 8].reshape(-1, 8)
    kinds = torch.tensor([[8] * 16, [7] * 16, [9] * 16, list(range(16))])
    codes = kinds.repeat(1, 2)[torch.arange(scales.numel()) % 4].reshape(len(scales), 256)
    parts, lost = carried(pack(codes, 4), scales, Packed(32, None), dtype)
    stored = torch.from_numpy(parts[2]).view(DTYPES[dtype]).view(scales.shape)
    assert stored.float().view(torch.int32).equal((-8 * scales.float()).view(torch.int32))
    products = (codes - 8).view(len(scales), 8, 32) * scales.float().unsqueeze(-1)
    assert lost == int((products.view(torch.int32) == -(1 << 31)).any(-1).sum())
