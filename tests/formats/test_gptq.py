"""GPTQ's and AWQ's integers: values as the tools' own dequantisers have them, in every packing that they write."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_packing import Tensors, make

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.formats import gptq
from kconvert.formats.gptq import Gptq, turn
from kconvert.formats.reference import gptq as reference
from kconvert.proof.parity import compare, rows


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().contiguous().view(torch.int16)


@pytest.fixture
def tiles_of_32(codec: Any) -> Any:
    """A codec with tiles that begin where a word of any number of bits does."""
    wide = type(codec)()
    wide.tile_rows = 32
    return wide


CASES = [
    *itertools.product([64], [128], [32, 64, 128], [2, 3, 4, 5, 6, 7, 8], ["gptq", "auto-round"], [False, True]),
    *itertools.product([64], [128], [32], [2, 3, 4, 8], ["gptq_v2", "gptqmodel"], [False, True]),
    *itertools.product([40, 104], [96, 40, 36], [32, 4, 5], [4, 8], ["gptq", "gptqmodel"], [False, True]),
    *itertools.product([3, 36], [96, 40], [32, 8], [2, 4, 8], ["gptq"], [False, True]),
    *itertools.product([16, 40, 64, 136], [128, 96], [32], [4], ["awq"], [False]),
    *itertools.product([40], [96], [16, 8], [4], ["awq"], [False]),
]


@pytest.mark.parametrize(("rows", "cols", "size", "bits", "spelling", "ordered"), CASES)
def test_values_are_the_tools_own(
    tiles_of_32: Any, rows: int, cols: int, size: int, bits: int, spelling: str, ordered: bool
) -> None:
    for dtype in ("F16", "BF16", "F32"):
        scales = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
        tensors, values = make(rows, cols, size, bits, spelling, scales, ordered)
        format = Gptq(size, spelling, bits, scale_dtype=dtype, ordered=ordered)
        decoded = tiles_of_32.decode(format, tensors, rows, cols)
        assert torch.equal(bits_of(decoded), bits_of(values))
        assert torch.equal(decoded, decoded.bfloat16().float())
        again = reference.decode(**tensors, cols=cols, group_size=size, bits=bits, spelling=spelling)
        assert torch.equal(bits_of(again), bits_of(values))


@pytest.mark.parametrize("spelling", ["gptq", "gptqmodel", "auto-round", "awq"])
def test_values_are_the_same_on_a_processor_that_looks_no_codes_up(
    tiles_of_32: Any, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    tensors, values = make(72, 128, 32, 4, spelling)
    monkeypatch.setattr(gptq, "has", lambda feature: False)
    decoded = tiles_of_32.decode(Gptq(32, spelling), tensors, 72, 128)
    assert torch.equal(bits_of(decoded), bits_of(values))


@pytest.mark.parametrize(("lines", "rows"), [*itertools.product([1, 7, 8, 9, 30], repeat=2)])
def test_lines_become_columns_in_any_order(lines: int, rows: int) -> None:
    source = torch.randint(-(2**31), 2**31, (lines, rows + 3), dtype=torch.int32)
    order = torch.cat([torch.randperm(lines), torch.zeros(2, dtype=torch.int64)])
    target = torch.zeros(rows, len(order) + 1, dtype=torch.int32)
    turn(source.numpy().view("u4"), 3, order.numpy().astype("u4"), target.numpy().view("u4"))
    assert torch.equal(target[:, :-1], source[order, 3:].T)
    assert not target[:, -1].any()


def named(tensors: Tensors, module: str = "model.layers.0.mlp.experts.3.up_proj") -> Tensors:
    return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
BY = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
# A spelling of config.json, and whose way of storing zero points it means.
DIALECTS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": (GPTQ, "gptq"),
    "gptq, version 1": ({**GPTQ, "checkpoint_format": "gptq"}, "gptq"),
    "gptq, version 1 of gptqmodel": ({**GPTQ, "checkpoint_format": "gptq", "format": "gptq", **BY}, "gptqmodel"),
    "gptq, version 2": ({**GPTQ, "checkpoint_format": "gptq_v2", **BY}, "gptq_v2"),
    "gptq, without a method": ({"bits": 4, "group_size": 32, "desc_act": False, "sym": False}, "gptq"),
    "awq": (AWQ, "awq"),
    "awq, old": ({"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}, "awq"),
    "auto-round's gptq": ({**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}, "auto-round"),
    "auto-round's gptq, old": ({**AUTO_ROUND, "backend": "auto_round:gptq:exllamav2"}, "auto-round"),
    "auto-round's gptqmodel": ({**AUTO_ROUND, "packing_format": "auto_round:gptqmodel"}, "gptq_v2"),
    "auto-round's own": ({**AUTO_ROUND, "packing_format": "auto_round"}, "gptq_v2"),
    "auto-round's awq": ({**AUTO_ROUND, "quant_method": "auto_round", "packing_format": "auto_round:auto_awq"}, "awq"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_becomes_bf16_and_verifies(write: Any, becomes: Any, dialect: str) -> None:
    quantization, spelling = DIALECTS[dialect]
    module = "model.layers.0.mlp.experts.3.up_proj"
    tensors, values = make(64, 128, 32, 4, spelling)
    becomes(write(named(tensors, module), quantization), {f"{module}.weight": values})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, -1])
def test_columns_in_the_order_of_their_activations_are_in_the_groups_that_g_idx_says(
    write: Any, becomes: Any, bits: int, size: int
) -> None:
    tensors, values = make(64, 96, size if size > 0 else 96, bits, "gptq", ordered=True)
    table = {**GPTQ, "bits": bits, "group_size": size, "desc_act": True}
    becomes(write({f"lm_head.{suffix}": t for suffix, t in tensors.items()}, table), {"lm_head.weight": values})


def test_a_code_at_the_zero_point_of_a_negative_scale_is_minus_zero(write: Any, becomes: Any) -> None:
    tensors, _ = make(32, 64, 32, 4, "auto-round")
    tensors["qweight"] = torch.full_like(tensors["qweight"], 0x88888888 - (1 << 32))
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], 0x77777777)
    tensors["scales"] = -tensors["scales"].abs() - 1e-4
    table = {**AUTO_ROUND, "sym": True, "packing_format": "auto_round:auto_gptq"}
    becomes(
        write({f"a.{suffix}": t for suffix, t in tensors.items()}, table), {"a.weight": -torch.zeros(32, 64).bfloat16()}
    )


@pytest.mark.parametrize("dialect", ["gptq", "awq"])
def test_a_wrong_value_is_found_wherever_rows_are_read_of_what_lies_across(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    """The next rows are read while the last are compared, all of them out of the same words."""
    quantization, spelling = DIALECTS[dialect]
    weights = {module: make(64, 128 + 32 * k, 32, 4, spelling)[0] for k, module in enumerate(("a", "b"))}
    tensors = {name: tensor for module, parts in weights.items() for name, tensor in named(parts, module).items()}
    source, output = write(tensors, quantization), tmp_path / "out"
    convert(plan(source, Recipe("bf16")), output)
    monkeypatch.setattr(rows, "PIECE_ELEMENTS", 8 * 128)
    monkeypatch.setattr(compare, "CHUNK", 16 * 256)
    verify(source, output)
    for tensor in inspect(output).checkpoint.tensors.values():
        for place in (0, tensor.nbytes // 2, tensor.nbytes - 1):
            with (output / tensor.file).open("r+b") as file:
                right = os.pread(file.fileno(), 1, tensor.start + place)
                os.pwrite(file.fileno(), bytes([right[0] ^ 1]), tensor.start + place)
                (fault,) = verify(source, output, keep_going=True).faults
                os.pwrite(file.fileno(), right, tensor.start + place)
            assert f"{tensor.name!r} differs at [{place // 2 // tensor.shape[1]}, " in fault


def test_modules_of_other_bits_are_found_by_dynamic(write: Any, becomes: Any) -> None:
    """The first pattern that matches counts; what is spared has a plain weight and is copied."""
    (a, values_a), (b, values_b) = make(32, 64, 32, 8, "gptq"), make(32, 64, 64, 4, "gptq")
    c = torch.randn(8, 8).bfloat16()
    rules = {r"-:.*\.gate$": {}, r"+:.*\.0\.up": {"bits": 8}, r".*up": {"bits": 2}, ".*": {"group_size": 64}}
    tensors = {**{f"m.0.up.{k}": t for k, t in a.items()}, **{f"m.1.down.{k}": t for k, t in b.items()}}
    values = {"m.0.up.weight": values_a, "m.1.down.weight": values_b, "m.1.gate.weight": c}
    becomes(write({**tensors, "m.1.gate.weight": c}, {**GPTQ, "dynamic": rules}), values)


def test_integer_weights_become_int4_with_their_own_codes(write: Any, tmp_path: Any, raw: Any) -> None:
    """Where scales are BF16 and zero points 8, as symmetric AWQ has them."""
    tensors, _ = make(64, 128, 32, 4, "awq", torch.bfloat16)
    tensors["qweight"] |= 0x11111111  # codes from 1 on: Kimi's go from -7 to 7
    tensors["scales"] = tensors["scales"].abs()
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], 0x88888888 - (1 << 32))
    source = write(named(tensors), {**AWQ, "zero_point": False})
    convert(plan(source, Recipe("int4", require_exact=True)), tmp_path / "out")
    verify(source, tmp_path / "out")
    assert not [name for name in raw.load(tmp_path / "out") if name.endswith("qweight")]


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no scales": (GPTQ, lambda t: t.pop("scales"), "it has no scales, but qweight, qzeros"),
    "no qzeros": (AWQ, lambda t: t.pop("qzeros"), "it has no qzeros, but qweight, scales"),
    "no qweight": (GPTQ, lambda t: t.pop("qweight"), "it has no qweight, but qzeros, scales"),
    "activation order without g_idx": ({**GPTQ, "desc_act": True}, lambda t: t, "it has no g_idx, but qweight"),
    "g_idx in awq": (AWQ, lambda t: t.update(g_idx=torch.zeros(128).int()), "g_idx does not belong to it"),
    "a plain weight beside": (GPTQ, lambda t: t.update(weight=torch.ones(2, 2).bfloat16()), "weight does not belong"),
    "scales of integers": (
        GPTQ,
        lambda t: t.update(scales=t["scales"].int()),
        "its scales are I32, not F16, BF16 or F32",
    ),
    "another group": (
        {**GPTQ, "group_size": 64},
        lambda t: t,
        r"qzeros' is I32 \[4, 8\], but a weight \[64, 128\] in gptq",
    ),
    "other bits": ({**GPTQ, "bits": 8}, lambda t: t, r"is I32 \[4, 8\], but a weight \[64, 64\] in gptq int8"),
    "a qweight of three": (GPTQ, lambda t: t.update(qweight=t["qweight"][None]), "are not two matrices"),
    "awq's tensors": (
        GPTQ,
        lambda t: t.update(make(64, 128, 32, 4, "awq")[0]),
        r"qweight' is I32 \[128, 8\], but a weight",
    ),
    "gptq's tensors": (AWQ, lambda t: t, "its 16 columns do not divide into groups of 32"),
    "bits of a third kind": ({**GPTQ, "bits": 5}, lambda t: t, "bits is 5; 2 or 3 or 4 or 8 belongs there"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(write: Any, tmp_path: Any, case: str) -> None:
    quantization, harm, sentence = BAD[case]
    tensors, _ = make(64, 128, 32, 4, "gptq")
    harm(tensors)
    with pytest.raises(KconvertError, match=sentence):
        plan(write(named(tensors), quantization), Recipe("bf16"))


VALUES: dict[str, tuple[str, int, float, str]] = {
    "a scale that is NaN": ("scales", 5, float("nan"), r"up_proj\.scales' is not finite at \[0, 5\]"),
    "a scale that is infinite": ("scales", 70, float("inf"), r"up_proj\.scales' is not finite at \[1, 6\]"),
    "a group out of range": ("g_idx", 9, 4, r"up_proj\.g_idx' is 4 at \[9\], but there are groups 0 to 3"),
    "a negative group": ("g_idx", 0, -1, r"up_proj\.g_idx' is -1 at \[0\], but there are groups 0 to 3"),
    "a scale of zero": (
        "scales",
        3,
        0.0,
        r"experts\.3\.up_proj' cannot be read as gptq .*: it has a scale of zero over codes",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_mean_nothing_are_refused_by_name(write: Any, tmp_path: Any, case: str) -> None:
    suffix, place, value, sentence = VALUES[case]
    tensors, _ = make(64, 128, 32, 4, "gptq", ordered=True)
    tensors[suffix].view(-1)[place] = value
    with pytest.raises(KconvertError, match=sentence):
        convert(plan(write(named(tensors), {**GPTQ, "desc_act": True}), Recipe("bf16")), tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "cols", "table", "sentence"),
    [
        (40, 64, {**GPTQ, "bits": 3}, "its 40 rows do not divide into words of 32 codes"),
        (64, 40, {**GPTQ, "bits": 3, "desc_act": True}, "its 40 columns do not divide into words of 32 codes"),
        (12, 64, AWQ, "its 12 rows do not divide into words of 8 codes"),
    ],
)
def test_sizes_that_the_packing_cannot_hold_are_named(
    write: Any, rows: int, cols: int, table: dict[str, Any], sentence: str
) -> None:
    shape = (cols, 1) if table is AWQ else (-(-cols * 3 // 32), rows)
    tensors = {
        "qweight": torch.zeros(shape).int(),
        "qzeros": torch.zeros(2, 2).int(),
        "scales": torch.ones(2, rows).half(),
    }
    if table.get("desc_act"):
        tensors["g_idx"] = torch.zeros(cols).int()
    with pytest.raises(KconvertError, match=sentence):
        plan(write(named(tensors), table), Recipe("bf16"))
