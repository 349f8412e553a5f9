import re
import struct

import pytest

from kconvert import KconvertError, Recipe, convert, inspect, plan

WEIGHT = "model.layers.1.mlp.experts.2.gate_proj"
PACKED, SCALE, SHAPE = (f"{WEIGHT}.weight_{part}" for part in ("packed", "scale", "shape"))


@pytest.fixture
def damaged(raw, int4_copy):
    """The tiny checkpoint in memory, to be changed and saved."""
    return raw.load(int4_copy)


def refusal(checkpoint, *parts):
    """What inspect says of the checkpoint; it names each of `parts`."""
    with pytest.raises(KconvertError) as caught:
        inspect(checkpoint.save())
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def cut(tensor, dimension, size):
    """The tensor with fewer columns or rows, dtype of two or four bytes."""
    width = {"BF16": 2, "I32": 4}[tensor.dtype]
    rows, cols = tensor.shape
    kept = size if dimension == 0 else rows
    data = b"".join(
        tensor.data[row * cols * width :][: (cols if dimension == 0 else size) * width] for row in range(kept)
    )
    tensor.shape, tensor.data = ([size, cols] if dimension == 0 else [rows, size]), data


def test_the_tiny_checkpoint_is_understood_as_what_it_is(int4):
    model = inspect(int4)
    assert model.manifest.name == "kimi-k2-thinking"
    (weight,) = (weight for weight in model.weights if weight.name == WEIGHT)
    assert (weight.role, weight.rows, weight.cols, weight.layer, weight.expert) == ("expert.gate", 128, 256, 1, 2)
    assert weight.format.label == "int4 group 32"
    assert [tensor.name for tensor in weight.tensors] == [PACKED, SCALE, SHAPE]
    assert {w.format.label for w in model.weights if not w.role.startswith("expert")} == {"bf16"}


def test_an_unknown_part_of_a_known_weight_is_refused_by_name(damaged, raw):
    damaged.put(f"{WEIGHT}.weight_wobble", raw.Tensor("BF16", [2], bytes(4)))
    refusal(damaged, repr(WEIGHT), "weight_wobble")


def test_an_expert_beyond_the_configs_is_a_finding(damaged):
    for part in ("packed", "scale", "shape"):
        damaged.put(f"model.layers.1.mlp.experts.4.gate_proj.weight_{part}", damaged[f"{WEIGHT}.weight_{part}"])
    (finding,) = inspect(damaged.save()).findings
    assert finding.startswith("model.layers.1.mlp.experts.4.gate_proj not listed in the manifest kimi-k2-thinking")


@pytest.mark.parametrize(("gone", "part"), [(PACKED, "weight_packed"), (SCALE, "weight_scale")])
def test_a_weight_without_a_part_is_refused_by_name(damaged, gone, part):
    file = damaged.file_of(gone)
    damaged.pop(gone)
    refusal(damaged, file, repr(WEIGHT), f"has no {part}")


def test_a_weight_that_is_gone_altogether_is_refused_by_name(damaged):
    for name in (PACKED, SCALE, SHAPE):
        damaged.pop(name)
    refusal(damaged, str(damaged.root), repr(WEIGHT), "missing")


def test_a_plain_tensor_that_is_gone_is_refused_by_name(damaged):
    damaged.pop("model.norm.weight")
    refusal(damaged, str(damaged.root), "'model.norm.weight'", "missing")


@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "groups"])
@pytest.mark.parametrize("size", [1, 7])
def test_a_scale_with_too_few_rows_or_groups_is_refused_by_name(damaged, dimension, size):
    cut(damaged[SCALE], dimension, size)
    refusal(damaged, f"{damaged.file_of(SCALE)}: tensor {SCALE!r}", "[128, 8]")


@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "columns"])
def test_packed_codes_of_another_shape_are_refused_by_name(damaged, dimension):
    cut(damaged[PACKED], dimension, 16)
    refusal(damaged, f"{damaged.file_of(PACKED)}: tensor {PACKED!r}", "[128, 32]")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(PACKED, "U8"), (PACKED, "I64"), (PACKED, "F32"), (SCALE, "U8"), (SCALE, "F8_E4M3"), (SCALE, "I64")],
)
def test_a_part_of_another_dtype_is_refused_by_name(damaged, name, dtype):
    tensor = damaged[name]
    width = {"U8": 1, "F8_E4M3": 1, "F32": 4, "I64": 8}[dtype]
    tensor.dtype, tensor.data = dtype, bytes(tensor.shape[0] * tensor.shape[1] * width)
    refusal(damaged, f"{damaged.file_of(name)}: tensor {name!r}", dtype)


def test_a_weight_that_the_config_ignores_but_the_file_packs_is_refused_by_name(damaged):
    damaged.config["quantization_config"]["ignore"].append("re:.*experts.2.*")
    refusal(damaged, "model.layers.1.mlp.experts.2.", "declares no quantisation")


def test_a_packed_weight_beside_a_whole_one_is_refused_by_name(damaged, raw):
    damaged.put(f"{WEIGHT}.weight", raw.Tensor("BF16", [128, 256], bytes(128 * 256 * 2)))
    refusal(damaged, repr(WEIGHT))


@pytest.mark.parametrize(
    ("name", "shape"), [("model.norm.weight", [128, 2]), ("model.layers.2.self_attn.o_proj.weight", [512, 256])]
)
def test_a_tensor_whose_shape_disagrees_with_the_config_is_refused_by_name(damaged, name, shape):
    damaged[name].shape = shape
    refusal(damaged, f"{damaged.file_of(name)}: tensor {name!r}", str(shape))


def test_a_config_with_another_hidden_size_is_refused_with_the_first_tensor_that_disagrees(damaged):
    damaged.config["hidden_size"] = 512
    assert re.search(r"\.safetensors: (tensor|weight) '", refusal(damaged))


@pytest.mark.parametrize("change", [{"num_bits": 3}, {"strategy": "tensor", "group_size": None}, {"type": "float"}])
def test_a_scheme_that_cannot_be_read_is_refused_with_the_weight(damaged, change):
    damaged.config["quantization_config"]["config_groups"]["group_0"]["weights"].update(change)
    refusal(damaged, "model.layers.1.mlp.experts.0.", "is not supported")


@pytest.fixture(scope="module")
def expected(int4, tree, tmp_path_factory):
    """int4 -> BF16 in one shard: what every other way of laying out the same weights must give."""
    return tree(to_bf16(int4, tmp_path_factory.mktemp("expected") / "dst"))


def to_bf16(source, destination):
    convert(plan(source, Recipe("bf16", source="int4")), destination)
    return destination


def weights(content):
    return {name: data for name, data in content.items() if name.endswith(".safetensors") or name.endswith(".json")}


def test_weights_whose_tensors_lie_in_different_shards_convert_to_the_same_bytes(scattered, expected, tree, tmp_path):
    homes = {tensor.file for weight in inspect(scattered).weights if weight.name == WEIGHT for tensor in weight.tensors}
    assert len(homes) == 3
    assert tree(to_bf16(scattered, tmp_path / "dst")) == expected


def test_a_shard_of_companions_only_converts_to_the_same_bytes(damaged, expected, tree, tmp_path):
    for name in [name for name in damaged if name.endswith(("weight_scale", "weight_shape"))]:
        damaged.move(name, "companions.safetensors")
    assert tree(to_bf16(damaged.save(), tmp_path / "dst")) == expected


def test_weights_without_weight_shape_convert_to_the_same_bytes(damaged, expected, tree, tmp_path):
    for name in [name for name in damaged if name.endswith("weight_shape")]:
        damaged.pop(name)
    assert tree(to_bf16(damaged.save(), tmp_path / "dst")) == expected


def test_weights_with_an_int64_weight_shape_convert_to_the_same_bytes(damaged, expected, tree, tmp_path):
    for name in [name for name in damaged if name.endswith("weight_shape")]:
        shape = damaged[name]
        shape.dtype, shape.data = "I64", struct.pack("<2q", *struct.unpack("<2i", shape.data))
    assert tree(to_bf16(damaged.save(), tmp_path / "dst")) == expected


def test_a_config_that_nests_its_quantisation_converts_to_the_same_weights(damaged, expected, tree, tmp_path):
    damaged.config["text_config"] = {"quantization_config": damaged.config.pop("quantization_config")}
    found = tree(to_bf16(damaged.save(), tmp_path / "dst"))
    assert {n: d for n, d in found.items() if n != "config.json"} == {
        n: d for n, d in expected.items() if n != "config.json"
    }
    assert b"quantization" not in found["config.json"]


def test_scales_of_the_cache_are_dropped_and_said_so(damaged, raw, expected, tree, tmp_path):
    name = "model.layers.1.self_attn.k_scale"
    damaged.put(name, raw.Tensor("F32", [1], bytes(4)))
    source = damaged.save()
    assert [tensor.name for tensor in inspect(source).dropped] == [name]
    assert plan(source, Recipe("bf16")).facts["dropped"] == [name]
    assert tree(to_bf16(source, tmp_path / "dst")) == expected


@pytest.fixture
def stranger(damaged):
    """An ordinary pack-quantized release of a model that no manifest knows."""
    damaged.config = {"model_type": "nobody", "quantization_config": damaged.config["quantization_config"]}
    for name in list(damaged):
        file = damaged.file_of(name)
        damaged.put(name.replace("model.layers", "transformer.h"), damaged.pop(name), file)
    return damaged


def test_a_model_that_no_manifest_knows_converts_by_its_own_config(stranger, expected, tree, tmp_path, raw):
    source = stranger.save()
    model = inspect(source)
    assert model.manifest.name == "generic"
    assert len(model.weights) == 24
    ours = raw.load(to_bf16(source, tmp_path / "dst"))
    theirs = tmp_path / "expected"
    theirs.mkdir()
    for name, content in weights(expected).items():
        (theirs / name).write_bytes(content)
    known = raw.load(theirs)
    assert {n.replace("transformer.h", "model.layers"): ours[n] for n in ours} == {n: known[n] for n in known}


@pytest.mark.parametrize("gone", ["weight_scale", "weight_packed"])
def test_a_missing_part_is_refused_in_a_model_that_no_manifest_knows(stranger, gone):
    name = "transformer.h.1.mlp.experts.2.gate_proj"
    stranger.pop(f"{name}.{gone}")
    refusal(stranger, repr(name), f"has no {gone}")


@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "groups"])
def test_a_short_scale_is_refused_in_a_model_that_no_manifest_knows(stranger, dimension):
    name = "transformer.h.1.mlp.experts.2.gate_proj"
    cut(stranger[f"{name}.weight_scale"], dimension, 4)
    refusal(stranger, name)


def test_a_missing_quantisation_is_refused_in_a_model_that_no_manifest_knows(stranger):
    del stranger.config["quantization_config"]
    refusal(stranger, "transformer.h.1.mlp.experts.0.", "declares no quantisation")


@pytest.mark.parametrize(
    ("include", "exclude", "weights", "plain"),
    [
        (["*experts.2.gate_proj"], [], 2, 0),
        (["*.experts.2.*"], ["*.down_proj"], 4, 0),
        (["*.layers.1.*", "lm_head"], [], 5 + 12 + 3 + 1, 4 + 2),
        ([], ["*.experts.*"], 15 + 3 + 6 + 1, 12 + 1 + 1 + 4),
        ([], [], 15 + 3 + 6 + 1 + 24, 12 + 1 + 1 + 4),
    ],
)
def test_include_and_exclude_choose_weights_and_tensors_by_name(int4, include, exclude, weights, plain):
    model = inspect(int4).select(include, exclude)
    assert (len(model.weights), len(model.plain)) == (weights, plain)


def test_a_selection_that_leaves_nothing_is_refused(int4):
    with pytest.raises(KconvertError, match=r"leave no tensor; .* whole names, of which 'model[^']*' is one"):
        inspect(int4).select([], ["*"])


@pytest.mark.parametrize("selection", [(["nothing*"], []), ([], ["*.down_proj.weight_packed"])])
def test_a_glob_that_matches_nothing_is_refused(int4, selection):
    """A weight goes by its own name, not by that of a tensor: who excludes the latter would exclude nothing."""
    with pytest.raises(KconvertError, match=r"matches no weight or tensor; globs are of whole names"):
        inspect(int4).select(*selection)
