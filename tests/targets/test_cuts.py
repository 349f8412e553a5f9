"""A cut has the form of what it is cut out of: that of a conversion is the conversion of a cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner
from kimi_release import as_released

from kconvert import KconvertError, Recipe, convert, inspect, plan, verify
from kconvert.address import open_stored
from kconvert.checkpoint.gguf_files import open_gguf
from kconvert.cli import main
from kconvert.proof.diff import diff
from kconvert.targets.sample import SampleRecipe, plan_cut, plan_synthetic

COMMON = {"experts": 4, "hidden": 128, "moe_intermediate": 64, "vocab": 320, "heads": 2}
SIZES = {
    "kimi-k2-thinking": {"layers": 3, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32},
    "deepseek-v3": {"layers": 3, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32},
    "kimi-k3": {"layers": 4, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32},
    "glm-5.3": {"layers": 5, "dense_layers": 1, "intermediate": 256, "q_rank": 32, "kv_rank": 32, "index_heads": 2},
    "deepseek-v4": {"layers": 4, "head": 128, "q_rank": 32, "o_rank": 32, "index_heads": 2, "index_head": 64},
    "qwen3-moe": {"layers": 3, "kv_heads": 2, "head": 32},
    "gpt-oss": {"layers": 3, "kv_heads": 2, "head": 32},
    "minimax-m3": {"layers": 4, "kv_heads": 2, "head": 128, "index_heads": 2, "index_head": 64},
}
CUT = {"layers": 2, "experts": 3}
Tensors = dict[str, tuple[str, list[int], bytes]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("cuts")

    def make(name: str) -> Path:
        if not (root / name).exists():
            known = SIZES[name].keys() | COMMON.keys()
            sizes = {key: size for key, size in {**COMMON, **SIZES[name]}.items() if key in known}
            convert(plan_synthetic(SampleRecipe(name, sizes)), root / name)
            as_released(root / name)
        return root / name

    return make


def cut(root: Path, to: Path, **sizes: int) -> Path:
    convert(plan_cut(open_stored(root), SampleRecipe(sizes=sizes or CUT)), to)
    return to


def tensors(root: Path) -> Tensors:
    """Every tensor by dtype, shape and bytes."""
    checkpoint = open_stored(root)
    with checkpoint.reader() as reader:
        return {
            name: (t.dtype, list(t.shape), reader.read(t.file, t.start, t.nbytes))
            for name, t in checkpoint.tensors.items()
        }


def keys(root: Path) -> dict[str, Any]:
    (file,) = root.glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    return {key: ([*field.types], field.contents()) for key, field in fields.items() if key[:5] != "GGUF."}


@pytest.mark.parametrize("name", ["kimi-k2-thinking", "deepseek-v3", "kimi-k3", "gpt-oss", "qwen3-moe", "minimax-m3"])
@pytest.mark.parametrize("scales", ["amax", "f32"])
def test_the_cut_of_an_mlx_directory_is_the_mlx_directory_of_a_cut(
    source: Callable[[str], Path], tmp_path: Path, name: str, scales: str
) -> None:
    convert(plan(source(name), Recipe("mlx", scales=scales)), tmp_path / "mlx")
    found = cut(tmp_path / "mlx", tmp_path / "found")
    small = cut(source(name), tmp_path / "small")
    convert(plan(small, Recipe("mlx", scales=scales)), tmp_path / "wanted")
    assert tensors(found) == tensors(tmp_path / "wanted")
    assert json.loads((found / "config.json").read_text()) == json.loads(
        (tmp_path / "wanted" / "config.json").read_text()
    )
    assert b'"format":"mlx"' in next(found.glob("*.safetensors")).read_bytes()[:200]
    assert verify(small, found).faults == ()


@pytest.mark.parametrize("name", ["kimi-k2-thinking", "deepseek-v3", "kimi-k3", "glm-5.3", "gpt-oss", "qwen3-moe"])
def test_the_cut_of_a_gguf_is_the_gguf_of_a_cut(source: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    convert(plan(source(name), Recipe("gguf")), tmp_path / "gguf")
    found = cut(tmp_path / "gguf", tmp_path / "found")
    small = cut(source(name), tmp_path / "small")
    convert(plan(small, Recipe("gguf")), tmp_path / "wanted")
    assert tensors(found) == tensors(tmp_path / "wanted")
    ours, theirs = keys(found), keys(tmp_path / "wanted")
    assert [file.name for file in found.glob("*.gguf")] == [f"{name}.gguf"]
    grouped = {key for key in theirs if ".expert_group_" in key}
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} <= {
        "general.name",
        *grouped,
    }
    assert verify(small, found).faults == ()


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("name", ["kimi-k2-thinking", "deepseek-v3", "qwen3-moe"])
def test_the_cut_of_nvfp4_is_the_nvfp4_of_a_cut(
    source: Callable[[str], Path], tmp_path: Path, name: str, layout: str
) -> None:
    convert(plan(source(name), Recipe("nvfp4", layout=layout)), tmp_path / "nvfp4")
    found = cut(tmp_path / "nvfp4", tmp_path / "found")
    convert(plan(cut(source(name), tmp_path / "small"), Recipe("nvfp4", layout=layout)), tmp_path / "wanted")
    assert tensors(found) == tensors(tmp_path / "wanted")
    assert verify(tmp_path / "small", found, standard=None).faults == ()
    assert (found / "hf_quant_config.json").exists() is (layout == "modelopt")


def test_a_cut_has_what_lies_beside_weights_and_what_declares_them(
    source: Callable[[str], Path], tmp_path: Path, raw: Any
) -> None:
    """Scales of activations and of the cache, and a config.json that says nothing of the quantisation."""
    convert(plan(source("qwen3-moe"), Recipe("nvfp4", layout="modelopt")), tmp_path / "nvfp4")
    checkpoint = raw.load(tmp_path / "nvfp4")
    for layer in range(3):
        checkpoint.put(f"model.layers.{layer}.self_attn.k_proj.k_scale", raw.Tensor("F32", [], b"\0\0\x80?"))
    del checkpoint.config["quantization_config"]
    found = cut(checkpoint.save(), tmp_path / "found")
    assert inspect(found).quantization.schemes
    left = tensors(found)
    assert "model.layers.1.self_attn.k_proj.k_scale" in left
    assert "model.layers.2.self_attn.k_proj.k_scale" not in left
    assert "model.layers.1.mlp.experts.2.up_proj.input_scale" in left


@pytest.mark.parametrize("experts", [2, 3, 5, 6, 7, 8])
def test_groups_of_experts_divide_those_that_are_left(tmp_path: Path, experts: int) -> None:
    """DeepSeek-V3's router looks at four of eight groups."""
    sizes = {**COMMON, **SIZES["deepseek-v3"], "experts": 16}
    convert(plan_synthetic(SampleRecipe("deepseek-v3", sizes)), tmp_path / "source")
    convert(plan(tmp_path / "source", Recipe("gguf")), tmp_path / "gguf")
    small = cut(tmp_path / "source", tmp_path / "small", experts=experts)
    convert(plan(small, Recipe("gguf")), tmp_path / "wanted")
    said = json.loads((small / "config.json").read_text())
    assert experts % said["n_group"] == said["n_group"] % said["topk_group"] == 0
    ours, theirs = (keys(cut(tmp_path / "gguf", tmp_path / "found", experts=experts)), keys(tmp_path / "wanted"))
    for key in ("expert_group_count", "expert_group_used_count", "expert_count", "expert_used_count"):
        assert ours.get(f"deepseek2.{key}") == theirs.get(f"deepseek2.{key}"), key


def test_split_files_become_one_cut_and_a_whole_file_several(source: Callable[[str], Path], tmp_path: Path) -> None:
    convert(plan(source("qwen3-moe"), Recipe("gguf", shard_size=100_000)), tmp_path / "split")
    first = min((tmp_path / "split").glob("*.gguf"))
    assert "-00001-of-" in first.name
    found = cut(first, tmp_path / "found")
    assert [file.name for file in found.glob("*.gguf")] == ["qwen3-moe.gguf"]
    again = plan_cut(open_stored(found), SampleRecipe(shard_size=50_000))
    convert(again, tmp_path / "again")
    assert len(again.shards) > 1
    assert tensors(tmp_path / "again") == tensors(found)
    assert diff(found, tmp_path / "again").counts == {}


def test_a_strangers_gguf_of_any_architecture_is_cut(tmp_path: Path) -> None:
    """K-quants, lists of layers and of other things, and an expert by itself; keys of all types come back as they were."""
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "stranger-Q4_K.gguf", "stranger")
    writer.add_block_count(4)
    writer.add_expert_count(4)
    writer.add_expert_used_count(4)
    writer.add_array("stranger.attention.head_count_kv", [1, 2, 3, 4])
    writer.add_array("stranger.rope.dimension_sections", [5, 6, 7, 8])
    writer.add_array("general.languages", ["en", "fr", "de", "it"])
    writer.add_uint64("stranger.some.number", 1 << 40)
    writer.add_float32("stranger.eps", 1e-6)
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    names = [f"blk.{n}.ffn_up_exps.weight" for n in range(4)]
    data = {name: rng.integers(0, 256, (4, 2, 144), np.uint8) for name in names}
    for name in names:
        writer.add_tensor(name, data[name], raw_dtype=kinds.Q4_K)
        writer.add_tensor(name.replace("up_exps", "norm_exps"), np.arange(8, dtype="f4"))
        writer.add_tensor(name.replace("up_exps", "gate_inp"), np.arange(12, dtype="f4").reshape(4, 3))
        for expert in range(4):
            writer.add_tensor(name.replace("up_exps", f"down.{expert}"), np.full((2, 2), expert, "f4"))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    found = cut(tmp_path / "stranger-Q4_K.gguf", tmp_path / "found", layers=3, experts=2)
    left, said = tensors(found), keys(found)
    assert left[names[2]] == ("Q4_K", [2, 2, 256], data[names[2]][:2].tobytes())
    assert left["blk.0.ffn_norm_exps.weight"][1] == [8]
    assert left["blk.0.ffn_gate_inp.weight"][1] == [2, 3]
    assert {"blk.0.ffn_down.1.weight", "blk.2.ffn_down.0.weight"} <= left.keys()
    assert not {"blk.0.ffn_down.2.weight", names[3]} & left.keys()
    assert said["stranger.attention.head_count_kv"][1] == [1, 2, 3]
    assert said["stranger.rope.dimension_sections"][1] == [5, 6, 7, 8]
    assert said["general.languages"][1] == ["en", "fr", "de", "it"]
    assert said["stranger.some.number"] == ([gguf.GGUFValueType.UINT64], 1 << 40)
    assert (said["stranger.block_count"][1], said["stranger.expert_used_count"][1]) == (3, 2)


def test_a_cut_is_never_written_among_the_files_that_it_is_cut_out_of(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(plan(source("qwen3-moe"), Recipe("gguf")), tmp_path / "gguf")
    file = tmp_path / "gguf" / "qwen3-moe.gguf"
    with pytest.raises(KconvertError, match="SRC lies inside"):
        cut(file, tmp_path / "gguf")
    with pytest.raises(KconvertError, match=f"SRC and DST are both {file.parent}"):
        cut(file.parent, tmp_path / "gguf")
    with pytest.raises(KconvertError, match=f"inner lies inside SRC; choose a directory outside {file.parent}"):
        cut(file.parent, tmp_path / "gguf" / "inner")
    assert [path.name for path in file.parent.iterdir() if path.name[0] != "."] == [file.name]
    assert cut(file, tmp_path / "gguf" / "beside")  # a file has no inside


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"layers": 4}, "--layers 4 is more than the checkpoint's 3"),
        ({"experts": 5}, "--experts 5 is more than the checkpoint's 4"),
        ({"layers": 0}, "--layers 0 leaves no model"),
        ({"experts": 0}, "--experts 0 leaves no model"),
        ({"vocab": 2}, "--vocab cannot be cut out of a GGUF; leave it out"),
        ({"dense_layers": 1}, "--dense-layers cannot be cut out of a GGUF"),
    ],
)
def test_what_a_gguf_cannot_be_cut_to_is_one_sentence(
    source: Callable[[str], Path], tmp_path: Path, sizes: dict[str, int], sentence: str
) -> None:
    convert(plan(source("qwen3-moe"), Recipe("gguf")), tmp_path / "gguf")
    with pytest.raises(KconvertError, match=sentence):
        plan_cut(open_gguf(tmp_path / "gguf"), SampleRecipe(sizes=sizes))


@pytest.mark.parametrize(
    ("key", "sizes", "sentence"),
    [
        ("block_count", {"layers": 5}, "says that it has 9 layers, but has no tensor of layer 3"),
        ("expert_count", {"experts": 2}, r"of which the first 2 of 9 experts cannot be cut out"),
    ],
)
def test_metadata_that_counts_wrongly_is_found_out(
    source: Callable[[str], Path], tmp_path: Path, key: str, sizes: dict[str, int], sentence: str
) -> None:
    convert(plan(source("qwen3-moe"), Recipe("gguf")), tmp_path / "gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    before, name, behind = file.read_bytes().partition(f"qwen3moe.{key}".encode())
    file.write_bytes(before + name + behind[:4] + b"\x09\0\0\0" + behind[8:])  # behind the type of the value
    with pytest.raises(KconvertError, match=sentence):
        plan_cut(open_gguf(file), SampleRecipe(sizes=sizes))


@pytest.mark.parametrize(
    ("edit", "sizes", "sentence"),
    [
        ({"experts": 3}, {"experts": 3}, r"_exps.weight' has the shape \[4, .*the first 3 of 3 .*mend expert_count"),
        ({"experts": 3}, {"layers": 1}, r"_exps.weight' has the shape \[4, .*mend expert_count"),
        ({"experts": 5}, {"layers": 1}, r"_exps.weight' has the shape \[4, .*mend expert_count"),
        ({"layers": 9}, {"layers": 2}, r"says that it has 9 layers, but has no tensor of layer 3 .*mend block_count"),
        ({"layers": 9}, {"experts": 2}, r"says that it has 9 layers, but has no tensor of layer 3 .*mend block_count"),
        ({"layers": 2}, {"layers": 1}, r"says that it has 2 layers, but has tensors of layer 2 .*mend block_count"),
        ({"further": 4}, {"layers": 1}, r"says that 4 of its 3 layers predict further tokens; mend nextn_predict"),
        ({"without": "blk.0.ffn_gate_exps.weight"}, {"layers": 2}, r"has no tensor 'blk.0.ffn_gate_exps.weight'"),
        ({"without": "blk.2.ffn_down_exps.weight"}, {"layers": 2}, r"has no tensor 'blk.2.ffn_down_exps.weight'"),
        ({"without": "blk.1."}, {"experts": 2}, r"but has no tensor of layer 1"),
    ],
)
def test_a_gguf_that_counts_wrongly_is_one_true_sentence(
    tmp_path: Path, edit: dict[str, Any], sizes: dict[str, int], sentence: str
) -> None:
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    writer.add_block_count(edit.get("layers", 3))
    writer.add_expert_count(edit.get("experts", 4))
    if "further" in edit:
        writer.add_nextn_predict_layers(edit["further"])
    for layer in range(3):
        names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        for name in names:
            if not name.startswith(edit.get("without", "none")):
                writer.add_tensor(name, np.zeros((4, 2, 2), "f4"))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(KconvertError, match=sentence):
        plan_cut(open_stored(tmp_path / "model.gguf"), SampleRecipe(sizes=sizes))


def test_a_count_of_the_first_layers_is_no_larger_than_what_is_left(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(plan(source("deepseek-v4"), Recipe("gguf")), tmp_path / "gguf")
    assert keys(tmp_path / "gguf")["deepseek4.hash_layer_count"][1] == 3
    found = cut(tmp_path / "gguf", tmp_path / "found", layers=2)
    assert keys(found)["deepseek4.hash_layer_count"][1] == 2


@pytest.mark.parametrize("to", [None, "fp8", "nvfp4", "mlx"])
def test_a_cut_to_dense_layers_declares_no_quantisation_of_what_is_gone(
    source: Callable[[str], Path], tmp_path: Path, to: str | None
) -> None:
    root = source("kimi-k2-thinking")
    if to is not None:
        convert(plan(root, Recipe(to)), tmp_path / "made")
        root = tmp_path / "made"
    dense = cut(root, tmp_path / "dense", layers=1)
    assert "quantization" not in (dense / "config.json").read_text()
    verify(dense, dense)


@pytest.mark.parametrize("other", [4, 9])
def test_every_key_that_says_the_number_of_experts_is_cut(
    source: Callable[[str], Path], tmp_path: Path, other: int
) -> None:
    shutil.copytree(source("qwen3-moe"), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "num_local_experts": other}))
    found = cut(tmp_path / "saved", tmp_path / "found", experts=2)
    left = json.loads((found / "config.json").read_text())
    assert (left["num_experts"], left["num_local_experts"]) == (2, 2)


def test_tables_of_experts_are_made_up_where_fewer_stay(source: Callable[[str], Path], tmp_path: Path) -> None:
    import numpy as np

    convert(plan(source("deepseek-v4"), Recipe("gguf")), tmp_path / "gguf")
    found = tensors(cut(tmp_path / "gguf", tmp_path / "found"))
    dtype, shape, data = found["blk.0.ffn_gate_tid2eid.weight"]
    assert (dtype, shape) == ("I32", [320, 3])
    numbers = np.frombuffer(data, "<i4").reshape(shape)
    assert (np.sort(numbers) == range(3)).all()
    for root, name in ((tmp_path / "gguf", "blk.0.ffn_gate"), (source("deepseek-v4"), "layers.0.ffn.gate")):
        (note,) = plan_cut(open_stored(root), SampleRecipe(sizes=CUT)).facts["notes"]
        assert "made up, as those of the source name experts that are left out: 2 tables" in note
        assert name in note
        assert plan_cut(open_stored(root), SampleRecipe(sizes={"layers": 2})).facts["notes"] == []


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2-thinking", "kimi-k3", "gpt-oss", "qwen3-moe", "minimax-m3"])
def test_mlx_lm_loads_a_cut_and_answers(source: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    mx = pytest.importorskip("mlx.core")
    convert(plan(source(name), Recipe("mlx")), tmp_path / "mlx")
    model, _ = utils.load_model(cut(tmp_path / "mlx", tmp_path / "found"))
    model.set_dtype(mx.float32)  # on CPUs MLX multiplies stacks of nothing else
    assert len(model.layers) == 2
    assert bool(mx.isfinite(model(mx.array([[1, 2, 3]]))).all())


def test_llama_cpp_loads_a_cut_and_answers(source: Callable[[str], Path], tmp_path: Path) -> None:
    llama = pytest.importorskip("llama_cpp")
    convert(plan(source("deepseek-v3"), Recipe("gguf")), tmp_path / "gguf")
    (file,) = cut(tmp_path / "gguf", tmp_path / "found").glob("*.gguf")
    model = llama.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    assert model.create_completion("the", max_tokens=4, temperature=0)["choices"]


def test_the_command_reads_a_file_any_of_its_parts_and_their_directory(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(plan(source("qwen3-moe"), Recipe("gguf", shard_size=200_000)), tmp_path / "gguf")
    last = max((tmp_path / "gguf").glob("*.gguf"))
    for number, place in enumerate((last, tmp_path / "gguf")):
        command = ["sample", str(tmp_path / f"out-{number}"), "--from", str(place), "--layers", "1", "-q"]
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, done.output) == (0, "")
    assert tensors(tmp_path / "out-0") == tensors(tmp_path / "out-1")
    refused = CliRunner().invoke(main, ["convert", str(last), str(tmp_path / "bf16"), "--to", "bf16"])
    assert refused.exit_code == 2
    assert "is a GGUF, which inspect, diff and sample --from read" in refused.stderr


def test_a_number_of_experts_is_found_where_transformers_5_saves_it(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(source("qwen3-moe"), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    found = cut(tmp_path / "saved", tmp_path / "found", experts=2)
    assert json.loads((found / "config.json").read_text())["num_local_experts"] == 2
    assert tensors(found) == tensors(cut(source("qwen3-moe"), tmp_path / "usual", experts=2))


@pytest.mark.parametrize("symbol", ["layers", "experts"])
def test_a_cut_leaves_something(source: Callable[[str], Path], symbol: str) -> None:
    for name in ("kimi-k2-thinking", "gpt-oss"):
        with pytest.raises(KconvertError, match=f"--{symbol} 0 leaves no model"):
            plan_cut(open_stored(source(name)), SampleRecipe(sizes={symbol: 0}))


def test_the_model_of_a_cut_is_that_of_its_source(source: Callable[[str], Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["sample", str(tmp_path / "out"), "--like", "gpt-oss", "--from", str(source("qwen3-moe"))]
    )
    assert done.exit_code == 2
    assert "leave out --like" in done.stderr


@pytest.mark.parametrize("name", ["kimi-k2-thinking", "qwen3-moe"])
def test_what_mlx_has_in_bf16_goes_back_to_what_transformers_has(
    source: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    plain = source(name)
    if name != "qwen3-moe":
        convert(plan(plain, Recipe("bf16")), tmp_path / "bf16")
        plain = tmp_path / "bf16"
    convert(plan(plain, Recipe("mlx")), tmp_path / "mlx")
    convert(plan(cut(tmp_path / "mlx", tmp_path / "found"), Recipe("bf16")), tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(cut(plain, tmp_path / "usual"))


@pytest.mark.parametrize("form", ["safetensors", "kt"])
def test_amx_weights_are_no_model_to_cut(int4: Path, tmp_path: Path, form: str) -> None:
    command = ["repack-amx", str(int4), str(tmp_path / "amx"), "--method", "AMXINT8", "--numa", "1", "--with-rest"]
    command = command[:-1] if form == "kt" else command
    done = CliRunner().invoke(main, [*command, "--format", form, "-q"], catch_exceptions=False)
    assert done.exit_code == 0
    amx, out = str(tmp_path / "amx"), str(tmp_path / "out")
    for order in (["sample", out, "--from", amx], ["convert", amx, out, "--to", "bf16"]):
        found = CliRunner().invoke(main, order)
        assert found.exit_code == 2
        assert "AMX weights" in found.stderr
        assert "give the checkpoint that they were packed of" in found.stderr
