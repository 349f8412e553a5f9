"""GGUF files that strangers made: what is the source's bits, what differs, what is missing and what is there besides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_writing
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gguf_writing import Tensors, Types, as_type, dense, from_int4, rewritten, write

from kconvert import convert, verify
from kconvert.cli import main
from kconvert.proof.parity.compare import Standard
from kconvert.proof.parity.metrics import Limits
from kconvert.proof.parity.witnesses import ggml
from kconvert.targets.sample import SampleRecipe, plan_synthetic

Verify = Callable[..., Result]
UP = "blk.1.ffn_up_exps.weight"


@pytest.fixture(scope="session")
def file(int4: Path) -> Path:
    """`int4` as a stranger writes it: experts Q4_0 with the source's own codes and scales; look, do not touch."""
    return write(int4.parent / "int4.gguf", from_int4(int4, 3, 4))


@pytest.fixture
def check(int4: Path, file: Path, tmp_path: Path, run_verify: Verify) -> Callable[..., Result]:
    """`check(edit, *options, words=, code=)`: verify a copy of the file that `edit` has changed."""

    def run(edit: Callable[[Tensors], Any], *options: object, words: tuple[str, ...] = (), code: int = 1) -> Result:
        path = rewritten(file, edit, tmp_path / "edited.gguf")
        result = run_verify(int4, path, *options)
        text = result.stdout if code == 0 else result.stderr
        assert result.exit_code == code, result.output
        assert code == 0 or len(text.splitlines()) == 1
        assert [word for word in words if word not in text] == [], text
        return result

    return run


def test_a_file_with_the_sources_codes_and_scales_is_the_sources_value_for_value(
    int4: Path, file: Path, run_verify: Verify
) -> None:
    result = run_verify(int4, file)
    assert result.exit_code == 0, result.output
    assert "bit for bit" in result.stdout
    assert "q4_0: 24 weights, the source's value for value" in result.stdout
    assert "f32: " in result.stdout
    assert "3 kv_b put together again from k_b, transposed back, and v_b" in result.stdout


@pytest.mark.parametrize("by", ["first part", "directory"])
def test_a_file_in_parts_is_verified_by_one_of_them_or_their_directory(
    int4: Path, tmp_path: Path, run_verify: Verify, by: str
) -> None:
    first = write(tmp_path / "toy.gguf", from_int4(int4, 3, 4), parts=3)
    assert run_verify(int4, first if by == "first part" else tmp_path).exit_code == 0
    first.unlink()
    missing = run_verify(int4, tmp_path)
    assert missing.exit_code == 1
    assert f"{first.name} is missing" in missing.stderr


def flip(name: str, place: int, bit: int = 0) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name][0].reshape(-1).view(np.uint8)[place] ^= 1 << bit

    return edit


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        (UP, 2, ("'blk.1.ffn_up_exps.weight[0]' differs at [0, 0]",)),
        (UP, -1, ("'blk.1.ffn_up_exps.weight[3]' differs at [127, ",)),
        (UP, 0, ("'blk.1.ffn_up_exps.weight[0]' differs at [0, ",)),
        ("blk.2.ffn_down_exps.weight", 18, ("'blk.2.ffn_down_exps.weight[0]' differs at [0, 3",)),
        ("output_norm.weight", 0, ("'output_norm.weight' differs at [0, 0]",)),
        ("blk.1.exp_probs_b.bias", 4, ("'blk.1.exp_probs_b.bias' differs at [0, 1]",)),
        ("blk.1.ffn_gate_inp.weight", 0, ("'blk.1.ffn_gate_inp.weight' differs at [0, 0]",)),
        ("token_embd.weight", 0, ("'token_embd.weight' differs at [0, 0]",)),
        ("blk.0.attn_k_b.weight", 0, ("'blk.0.attn_k_b.weight' differs at [0, 0]",)),
        ("blk.0.attn_v_b.weight", -1, ("differs at [1023, 31]",)),
    ],
)
def test_one_flipped_bit_is_found_and_placed(
    check: Callable[..., Result], name: str, place: int, words: tuple[str, ...]
) -> None:
    check(flip(name, place), words=(*words, "it is"))


def test_a_scale_that_only_rounding_to_bf16_hides_is_found(check: Callable[..., Result]) -> None:
    """F16 has three bits more than BF16: the values of a group may round to the source's for all that."""

    def edit(tensors: Tensors) -> None:
        block = tensors[UP][0][0, 0, :18]
        block[2:] = 0x99  # the code 1 everywhere, in the source as well
        block[:2] = np.frombuffer(np.float16(np.frombuffer(block[:2].tobytes(), np.float16)[0]).tobytes(), np.uint8)
        block[0] ^= 1

    check(edit, words=("differs at [0, 0]",))


def test_swapped_experts_are_found(check: Callable[..., Result]) -> None:
    def edit(tensors: Tensors) -> None:
        data = tensors[UP][0]
        data[[1, 2]] = data[[2, 1]]

    check(edit, words=("/edited.gguf: tensor 'blk.1.ffn_up_exps.weight[1]'",))


def test_keys_that_were_not_transposed_are_found(check: Callable[..., Result]) -> None:
    def edit(tensors: Tensors) -> None:
        data, kind = tensors["blk.0.attn_k_b.weight"]
        heads, rank, nbytes = data.shape
        tensors["blk.0.attn_k_b.weight"] = data.reshape(heads, nbytes // 2, rank * 2), kind

    check(edit, words=("kv_b_proj",))


def test_codes_by_another_rule_are_judged_by_limits_where_these_are_allowed(check: Callable[..., Result]) -> None:
    """llama.cpp's own Q4_0 of the same values: max / -8 keeps neither codes nor scales."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_exps.weight")]:
            as_type(Types.Q4_0)(tensors, name)

    check(edit, words=("differs at", "compressed-tensors gives", "judge it with --close"))
    said = check(edit, "--close", words=("q4_0: 24 weights, off by", "within limits"), code=0)
    assert "the source's value for value" not in said.stdout.partition("q4_0")[2].splitlines()[0]
    check(edit, "--fail-under", "sqnr=40", words=("SQNR", "40"))


@pytest.mark.parametrize("kind", [Types.Q8_0, Types.Q5_0], ids=lambda kind: kind.name)
def test_weights_that_were_rounded_are_told_by_how_much(check: Callable[..., Result], kind: Types) -> None:
    def edit(tensors: Tensors) -> None:
        for name in ("blk.0.attn_q_a.weight", "blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight"):
            as_type(kind)(tensors, name)

    said = check(
        edit, words=(f"{kind.name.lower()}: 1 weight, off by", f"{kind.name.lower()} by head: 1 weight, off by"), code=0
    )
    assert "q4_0: 24 weights, the source's value for value" in said.stdout


def test_k_quants_are_decoded_by_gguf(int4: Path, file: Path, tmp_path: Path) -> None:
    """Of zeros, which gguf cannot encode but can decode."""

    def edit(tensors: Tensors) -> None:
        rows = tensors["blk.1.attn_output.weight"][0].shape[0]
        cols = tensors["blk.1.attn_output.weight"][0].shape[1] // 2
        tensors["blk.1.attn_output.weight"] = np.zeros((rows, cols // 256 * 210), np.uint8), Types.Q6_K

    report = verify(int4, rewritten(file, edit, tmp_path / "k.gguf"), keep_going=True)
    (found,) = [c for c in report.comparisons if c.output_format == "q6_k"]
    assert found.judged_by == "limits"
    assert "its SQNR" in str(found.fault)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (UP, "'model.layers.1.mlp.experts.0.up_proj' of the source is missing (4 in all)"),
        ("output_norm.weight", "'model.norm.weight' of the source is missing (1 in all)"),
        ("blk.2.attn_v_b.weight", "'model.layers.2.self_attn.kv_b_proj' of the source is missing"),
        ("blk.1.exp_probs_b.bias", "e_score_correction_bias' of the source is missing"),
    ],
)
def test_what_is_missing_is_named(check: Callable[..., Result], name: str, words: str) -> None:
    check(lambda tensors: tensors.pop(name), words=(words,))


def test_a_missing_expert_is_named(check: Callable[..., Result]) -> None:
    def edit(tensors: Tensors) -> None:
        data, kind = tensors[UP]
        tensors[UP] = data[:3], kind

    check(edit, words=("'model.layers.1.mlp.experts.0.up_proj' of the source is missing",))


def test_one_row_of_another_shape_is_not_the_same_tensor(check: Callable[..., Result]) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["output_norm.weight"] = tensors["output_norm.weight"][0].reshape(2, 128), Types.F32

    check(edit, words=("'output_norm.weight' is [2, 128], in the source 'model.norm.weight' is [256]",))


def test_nvfp4_has_a_factor_of_its_own() -> None:
    rows = np.random.default_rng(0).integers(0, 120, (3, 2 * 36), np.uint8)
    format = ggml.Blocks("NVFP4", 64, 36, factor=True)
    state = {"weight": torch.from_numpy(rows), "scale": torch.tensor([0.25])}
    plain = torch.from_numpy(gguf.quants.dequantize(rows, Types.NVFP4))
    assert torch.equal(ggml.BlocksWitness(format).values(state, (3, 128)), plain * 0.25)


def test_logits_of_a_file_are_not_transformers(int4: Path, file: Path, run_verify: Verify) -> None:
    result = run_verify(int4, file, "--logits")
    assert result.exit_code == 2
    assert "leave out --logits" in result.stderr


def test_some_weights_of_a_whole_file_can_be_looked_at(
    int4: Path, file: Path, tmp_path: Path, run_verify: Verify
) -> None:
    damaged = rewritten(file, flip(UP, 2), tmp_path / "damaged.gguf")
    said = run_verify(int4, damaged, "--include", "*.layers.2.mlp.experts.*")
    assert said.exit_code == 0, said.output
    assert "q4_0: 12 weights, the source's value for value" in said.stdout
    assert run_verify(int4, damaged, "--include", "*.layers.1.mlp.experts.0.*").exit_code == 1
    proof = tmp_path / "proof.json"
    run_verify(int4, damaged, "--include", "*.layers.2.mlp.experts.*", "--certificate", proof)
    found = CliRunner().invoke(main, ["check", str(damaged), str(proof)])
    assert re.search(r"but for \d+ tensors that it did not compare", found.stdout)


def test_a_share_of_a_file_can_be_looked_at(int4: Path, file: Path, run_verify: Verify) -> None:
    assert "not looked at (--sample)" in run_verify(int4, file, "--sample", 0.1).stdout


def test_what_the_source_lacks_is_named(check: Callable[..., Result]) -> None:
    def add(name: str) -> Callable[[Tensors], None]:
        def edit(tensors: Tensors) -> None:
            tensors[name] = np.ones(4, np.float32), Types.F32

        return edit

    check(add("blk.0.attn_q_a.bias"), words=("'blk.0.attn_q_a.bias' is not in the source (1 such in all)",))
    check(add("rope_freqs.weight"), words=("note: 'rope_freqs.weight' is not in the source",), code=0)


def test_a_transposed_weight_is_found(check: Callable[..., Result]) -> None:
    def edit(tensors: Tensors) -> None:
        data, kind = tensors["blk.0.attn_q_a.weight"]
        tensors["blk.0.attn_q_a.weight"] = data.reshape(data.shape[1] // 2, -1), kind

    check(
        edit,
        words=("'blk.0.attn_q_a.weight' is [256, 64], in the source 'model.layers.0.self_attn.q_a_proj' is [64, 256]",),
    )


def test_an_older_file_with_kv_b_as_it_is_passes(check: Callable[..., Result], int4: Path) -> None:
    source = gguf_writing.read(int4)

    def edit(tensors: Tensors) -> None:
        for layer in range(3):
            del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
            whole = source[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
            tensors[f"blk.{layer}.attn_kv_b.weight"] = dense(whole)

    said = check(edit, code=0)
    assert "put together" not in said.stdout


def test_a_type_that_nobody_decodes_is_said(int4: Path, file: Path, tmp_path: Path, run_verify: Verify) -> None:
    path = tmp_path / "odd.gguf"
    content = file.read_bytes()
    name = b"output_norm.weight"
    place = content.index(name) + len(name) + 4 + 8
    path.write_bytes(content[:place] + b"\x4d" + content[place + 1 :])
    result = run_verify(int4, path)
    assert result.exit_code == 1
    assert "tensor 'output_norm.weight' is TYPE_77, whose values are not known" in result.stderr
    shown = CliRunner().invoke(main, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert "finding: TYPE_77 is a type of tensors that is not known" in shown.stdout


def test_an_architecture_whose_tensors_are_not_known_is_wrong_usage(
    int4: Path, tmp_path: Path, run_verify: Verify
) -> None:
    result = run_verify(int4, write(tmp_path / "other.gguf", from_int4(int4, 3, 4), "llama"))
    assert result.exit_code == 2
    assert "is of the architecture 'llama', of which it is not known" in result.stderr


def test_a_file_of_another_model_fails(int4: Path, tmp_path: Path, run_verify: Verify) -> None:
    result = run_verify(
        int4, write(tmp_path / "other.gguf", {"token_embd.weight": (np.ones(4, np.float32), Types.F32)})
    )
    assert result.exit_code == 1
    assert "'token_embd.weight' is [4], in the source 'model.embed_tokens.weight' is [512, 256]" in result.stderr


def test_a_truncated_file_is_a_failed_check(int4: Path, file: Path, tmp_path: Path, run_verify: Verify) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(file.read_bytes()[:-4000])
    result = run_verify(int4, path)
    assert result.exit_code == 1
    assert "truncated" in result.stderr


def test_a_file_that_is_not_there_is_wrong_usage(int4: Path, tmp_path: Path, run_verify: Verify) -> None:
    result = run_verify(int4, tmp_path / "nothing.gguf")
    assert result.exit_code == 2
    assert f"there is no file {tmp_path / 'nothing.gguf'}; give a model in GGUF" in result.stderr


def test_a_conversion_that_was_interrupted_between_parts_is_to_be_run_again(
    int4: Path, tmp_path: Path, run_verify: Verify
) -> None:
    first = write(tmp_path / "toy.gguf", from_int4(int4, 3, 4), parts=3)
    (tmp_path / ".kconvert").mkdir()
    first.with_name("toy-00002-of-00003.gguf").unlink()
    result = run_verify(int4, tmp_path)
    assert result.exit_code == 1
    assert "run the conversion again, or if that does not make it, fetch it" in result.stderr


def test_a_conversion_to_gguf_that_has_written_nothing_yet_is_unfinished(
    int4: Path, tmp_path: Path, run_verify: Verify
) -> None:
    (tmp_path / "out" / ".kconvert").mkdir(parents=True)
    result = run_verify(int4, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{tmp_path / 'out'} is unfinished, it has no weights yet; run the conversion again" in result.stderr


def test_a_file_is_certified_with_its_header(int4: Path, file: Path, tmp_path: Path, run_verify: Verify) -> None:
    def check(path: Path) -> Result:
        return CliRunner().invoke(main, ["check", str(path), str(tmp_path / "proof.json")])

    path = tmp_path / "int4.gguf"
    path.write_bytes(file.read_bytes())
    assert run_verify(int4, path, "--certificate", tmp_path / "proof.json").exit_code == 0
    document = json.loads((tmp_path / "proof.json").read_text())
    assert document["tensors"][UP]["dtype"] == "Q4_0"
    assert document["tensors"][UP]["shape"] == [4, 128, 256]
    assert document["weights"]["model.layers.1.mlp.experts.3.up_proj"] == "exact values"
    assert document["not_compared"] == []
    assert check(path).exit_code == 0
    for place, words in ((-40, "sha256 differs"), (path.read_bytes().index(b"deepseek2"), "is not the file")):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        found = check(path)
        assert found.exit_code == 1
        assert words in found.stderr


def test_a_certified_file_may_have_another_name_but_nothing_behind_its_tensors(
    int4: Path, file: Path, tmp_path: Path, run_verify: Verify
) -> None:
    def check(path: Path) -> Result:
        return CliRunner().invoke(main, ["check", str(path), str(tmp_path / "proof.json")])

    assert run_verify(int4, file, "--certificate", tmp_path / "proof.json").exit_code == 0
    path = tmp_path / "Kimi-K2-Q4_0.gguf"
    path.write_bytes(file.read_bytes())
    assert check(path).exit_code == 0
    path.write_bytes(file.read_bytes() + b"payload")
    found = check(path)
    assert found.exit_code == 1
    assert f"{path}: bytes behind its tensors, 7 of them, belong to none" in found.stderr


def test_a_report_has_all_faults_and_figures(int4: Path, file: Path, tmp_path: Path, run_verify: Verify) -> None:
    def edit(tensors: Tensors) -> None:
        flip(UP, 2)(tensors)
        flip("output_norm.weight", 3)(tensors)

    path = rewritten(file, edit, tmp_path / "two.gguf")
    assert run_verify(int4, path, "--report", tmp_path / "report.json").exit_code == 1
    document = json.loads((tmp_path / "report.json").read_text())
    assert len(document["faults"]) == 2
    assert document["totals"]["different"] == 2
    assert document["output"]["formats"]["q4_0"] == 24


def test_diff_compares_the_tensors_of_two_files(file: Path, tmp_path: Path) -> None:
    path = rewritten(file, flip(UP, 2), tmp_path / "two.gguf")
    result = CliRunner().invoke(main, ["diff", str(file), str(path)])
    assert result.exit_code == 1
    assert UP in result.stdout
    assert "1 changed (1 in value)" in result.stdout


def test_inspect_says_what_is_in_a_file(file: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(file), "--json"], catch_exceptions=False)
    facts = json.loads(result.stdout)
    assert facts["architecture"] == "deepseek2"
    rows = {(row["role"], row["format"]): row for row in facts["roles"]}
    assert rows["expert.up", "Q4_0"]["parameters"] == 2 * 4 * 128 * 256
    assert rows["expert.up", "Q4_0"]["bytes"] == 2 * 4 * 128 * 256 // 32 * 18
    assert rows["attention.kv_b", "BF16"]["tensors"] == 6
    assert rows["norm", "F32"]["tensors"] == 13
    assert not any(role == "other" for role, _ in rows)


def sampled(root: Path, like: str, **sizes: int) -> Path:
    convert(plan_synthetic(SampleRecipe(like, sizes)), root)
    return root


def test_deepseek_without_the_layer_behind_the_last_passes_and_says_so(tmp_path: Path, run_verify: Verify) -> None:
    """Block FP8 as BF16; llama.cpp does not run the layer that predicts a second token."""
    sizes = {"layers": 2, "dense_layers": 1, "experts": 2, "hidden": 128, "intermediate": 128, "moe_intermediate": 128}
    source = sampled(tmp_path / "source", "deepseek-v3", **sizes, vocab=64, heads=2, q_rank=32, kv_rank=64)
    plain = tmp_path / "plain"
    assert CliRunner().invoke(main, ["fp8-to-bf16", str(source), str(plain), "-q"]).exit_code == 0
    tensors = {name: value for name, value in gguf_writing.read(plain).items() if ".layers.2." not in name}
    made: Tensors = {}
    for name, value in tensors.items():
        if name.endswith("kv_b_proj.weight"):
            k, v = value.view(-1, 256, 64).split([128, 128], 1)
            layer = name.split(".")[2]
            made[f"blk.{layer}.attn_k_b.weight"], made[f"blk.{layer}.attn_v_b.weight"] = (
                dense(k.transpose(1, 2)),
                dense(v),
            )
        elif ".experts.0." in name:
            part = name.split(".")[-2].removesuffix("_proj")
            both = torch.stack([value, tensors[name.replace(".experts.0.", ".experts.1.")]])
            made[f"blk.1.ffn_{part}_exps.weight"] = dense(both)
        elif ".experts.1." not in name:
            layer, rest = (name.split(".")[2], name.split(".", 3)[3]) if ".layers." in name else ("", name)
            made[(f"blk.{layer}." if layer else "") + gguf_writing.NAMES[rest]] = dense(value)
    result = run_verify(source, write(tmp_path / "deepseek.gguf", made))
    assert result.exit_code == 0, result.output
    assert "of the source's mtp are not in it" in result.stdout


def mxfp4(codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray[Any, Any]:
    """e2m1 codes two a byte, low first, [.., groups, 16] and E8M0 [.., groups] as blocks."""
    low, high = (codes & 15, codes >> 4)
    each = torch.stack([low, high], -1).flatten(-2)  # [.., groups, 32]
    packed = each[..., :16] | each[..., 16:] << 4
    return torch.cat([scale.unsqueeze(-1), packed], -1).flatten(-2).numpy()


def gpt_oss(source: Path) -> Tensors:
    made: Tensors = {}
    tensors = gguf_writing.read(source)
    names = {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router.weight": "ffn_gate_inp.weight",
        "mlp.router.bias": "ffn_gate_inp.bias",
        **{f"self_attn.{part}_proj.{kind}": f"attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")},
        **{f"self_attn.o_proj.{kind}": f"attn_output.{kind}" for kind in ("weight", "bias")},
    }
    for name, value in tensors.items():
        layer, rest = (name.split(".")[2], name.split(".", 3)[3]) if ".layers." in name else ("", name)
        prefix = f"blk.{layer}." if layer else ""
        if rest.endswith("_proj_blocks"):
            blocks = mxfp4(value, tensors[name.replace("_blocks", "_scales")])
            if "gate_up" in rest:
                made[f"{prefix}ffn_gate_exps.weight"] = np.ascontiguousarray(blocks[:, ::2]), Types.MXFP4
                made[f"{prefix}ffn_up_exps.weight"] = np.ascontiguousarray(blocks[:, 1::2]), Types.MXFP4
            else:
                made[f"{prefix}ffn_down_exps.weight"] = blocks, Types.MXFP4
        elif rest == "mlp.experts.gate_up_proj_bias":
            made[f"{prefix}ffn_gate_exps.bias"] = value[:, ::2].float().numpy(), Types.F32
            made[f"{prefix}ffn_up_exps.bias"] = value[:, 1::2].float().numpy(), Types.F32
        elif rest == "mlp.experts.down_proj_bias":
            made[f"{prefix}ffn_down_exps.bias"] = value.float().numpy(), Types.F32
        elif not rest.endswith("_scales"):
            made[prefix + names.get(rest, gguf_writing.NAMES.get(rest, rest))] = dense(value)
    return made


@pytest.mark.parametrize("fault", [None, "blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_exps.bias"])
def test_gpt_oss_with_gate_and_up_apart(tmp_path: Path, run_verify: Verify, fault: str | None) -> None:
    sizes = {"layers": 1, "experts": 2, "hidden": 64, "moe_intermediate": 64, "vocab": 64, "heads": 2, "kv_heads": 1}
    source = sampled(tmp_path / "source", "gpt-oss", **sizes)
    made = gpt_oss(source)
    if fault:
        flip(fault, 3)(made)
    result = run_verify(source, write(tmp_path / "oss.gguf", made, "gpt-oss"))
    assert result.exit_code == (1 if fault else 0), result.output
    if fault is None:
        assert "mxfp4: 2 weights, the source's value for value" in result.stdout
    else:
        assert "differs at" in result.stderr


@pytest.mark.parametrize(
    ("like", "architecture", "sizes"),
    [
        ("qwen3-moe", "qwen3moe", {"moe_intermediate": 64}),
        ("glm-4-moe", "glm4moe", {"moe_intermediate": 64, "intermediate": 64, "dense_layers": 1}),
        ("minimax-m2", "minimax-m2", {"moe_intermediate": 64}),
    ],
)
def test_other_models_with_experts(
    tmp_path: Path, run_verify: Verify, like: str, architecture: str, sizes: dict[str, int]
) -> None:
    source = sampled(tmp_path / "source", like, layers=2, experts=2, hidden=128, vocab=64, heads=2, kv_heads=1, **sizes)
    plain = source
    if "quantization_config" in json.loads((source / "config.json").read_text()):
        plain = tmp_path / "plain"
        assert CliRunner().invoke(main, ["fp8-to-bf16", str(source), str(plain), "-q"]).exit_code == 0
    made = gguf_writing.from_plain(plain, architecture, 3)
    result = run_verify(source, write(tmp_path / "other.gguf", made, architecture))
    assert result.exit_code == 0, result.output
    flip(next(name for name in made if "ffn_down_exps" in name), 3)(made)
    assert run_verify(source, write(tmp_path / "other.gguf", made, architecture)).exit_code == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [([], "bf16: 26 weights, the source's value for value"), (["--rest", "q8_0"], "q8_0 by head: 3 weights, off by")],
)
def test_what_kconvert_writes_itself_is_the_sources_too(
    int4: Path, tmp_path: Path, run_verify: Verify, options: list[str], words: str
) -> None:
    command = ["convert", str(int4), str(tmp_path / "out"), "--to", "gguf", "--shard-size", "1MB", "-q", *options]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    said = run_verify(int4, tmp_path / "out")
    assert said.exit_code == 0, said.output
    assert "q4_0: 24 weights, the source's value for value" in said.stdout
    assert words in said.stdout


@pytest.fixture
def counted(int4_copy: Path, tmp_path: Path, raw: Any) -> Path:
    """`int4_copy` in GGUF, where two of its scales are none of F16's and a third is, but of codes that are all zero."""
    checkpoint = raw.load(int4_copy)
    weight = "model.layers.1.mlp.experts.2.up_proj"
    scale = checkpoint[f"{weight}.weight_scale"]
    scale.data = b"\x01\x34\x03\xb4\x01\x34" + scale.data[6:]  # 2^-23 and a bit, and less than -2^-23 by more
    words = checkpoint[f"{weight}.weight_packed"]
    words.data = words.data[:32] + b"\x88" * 16 + words.data[48:]
    checkpoint.save()
    command = ["convert", str(int4_copy), str(tmp_path / "out"), "--to", "gguf"]
    said = CliRunner().invoke(main, command, catch_exceptions=False)
    assert "F16 has not the scales of 2 groups in 1 weight" in said.stdout
    return tmp_path / "out"


def test_what_a_conversion_counts_passes_and_is_counted_again(
    int4_copy: Path, counted: Path, tmp_path: Path, run_verify: Verify
) -> None:
    said = run_verify(int4_copy, counted, "--certificate", tmp_path / "proof.json")
    assert said.exit_code == 0, said.output
    assert "bit for bit, but for 2 groups that differ as planned" in said.stdout
    assert "q4_0: 24 weights, the source's value for value but for 2 groups" in said.stdout
    assert "note: F16 has not the scales of 2 groups in 1 weight, which have the nearest, as planned" in said.stdout
    outcomes = json.loads((tmp_path / "proof.json").read_text())["weights"]
    assert outcomes["model.layers.1.mlp.experts.2.up_proj"] == "exact but for planned groups"
    found = CliRunner().invoke(main, ["check", str(counted), str(tmp_path / "proof.json")])
    assert "(exact, but for 1 weight with groups that differ as planned)" in found.stdout
    assert run_verify(int4_copy, counted, "--close").exit_code == 0
    report = verify(int4_copy, counted)
    assert {c.name: c.changed for c in report.comparisons if c.changed} == {"model.layers.1.mlp.experts.2.up_proj": 2}


@pytest.mark.parametrize("place", [0, 1, 2, 18, 20, 40])
def test_what_is_not_the_nearest_is_found_beside_what_is(
    int4_copy: Path, counted: Path, tmp_path: Path, run_verify: Verify, place: int
) -> None:
    (path,) = counted.glob("*.gguf")
    offset = 2 * 128 * 256 // 32 * 18  # of the third expert
    refused = run_verify(int4_copy, rewritten(path, flip(UP, offset + place), tmp_path / "edited.gguf"))
    assert refused.exit_code == 1
    assert "'blk.1.ffn_up_exps.weight[2]' differs at [0, " in refused.stderr
    assert "compressed-tensors with the nearest scales of F16 gives" in refused.stderr


def test_kv_b_by_head_has_the_laxer_limits_of_its_types_and_none_for_rows() -> None:
    """Its blocks lie across the rows, so that a row has values of many scales."""
    limits = Standard().limits_for("q8_0 and q2_k by head")
    assert limits == Limits({"sqnr": 6.0})
    assert Standard().limits_for("q8_0").ceilings == {"max_relative": 0.05}


def test_every_architecture_is_one_that_gguf_knows_or_that_has_a_table_of_its_own() -> None:
    from kconvert.formats.engines.names import LAYERS, LIKE
    from kconvert.proof.gguf.tensors import ARCHITECTURES

    assert set(ARCHITECTURES) <= {*gguf.MODEL_ARCH_NAMES.values(), *LAYERS, *LIKE}
