import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest

from kconvert import KconvertError, Recipe, inspect, plan
from kconvert.checkpoint.safetensors import read_header
from kconvert.formats.dtypes import tensor_bytes
from kconvert.models.catalogue import load_manifest
from kconvert.planning.containers import Safetensors
from kconvert.planning.steps import Copy, Place, Transcode

INDEX = "model.safetensors.index.json"


def to_bf16(shard_size=1_000_000, **options):
    return Recipe("bf16", shard_size=shard_size, **options)


@pytest.fixture(scope="module")
def made(int4):
    return plan(int4, to_bf16())


def outputs(made):
    """(place, bytes) of everything that the steps write."""
    for step in made.steps:
        for (_, dtype, shape), place in zip(step.outputs, step.writes, strict=True):
            yield place, tensor_bytes(dtype, shape)


def test_every_shard_is_its_header_and_then_its_tensors_without_gap_or_overlap(made):
    ranges = {shard.name: [(0, len(shard.header))] for shard in made.shards}
    for place, nbytes in outputs(made):
        ranges[place.file].append((place.start, place.start + nbytes))
    for shard in made.shards:
        spans = sorted(ranges[shard.name])
        assert all(before[1] == after[0] for before, after in pairwise(spans))
        assert spans[-1][1] == shard.nbytes


def test_the_header_of_a_shard_describes_what_the_steps_write_into_it(made):
    said = {}
    for shard in made.shards:
        for entry in read_header(shard.name, shard.nbytes, lambda s, n, shard=shard: shard.header[s : s + n]):
            said[entry.name] = (shard.name, entry.start, entry.dtype, entry.shape)
    written = {
        name: (place.file, place.start, dtype, shape)
        for step in made.steps
        for (name, dtype, shape), place in zip(step.outputs, step.writes, strict=True)
    }
    assert said == written


def test_quantised_weights_become_bf16_and_everything_else_is_copied(made, int4):
    model = inspect(int4)
    experts = {weight.name for weight in model.weights if weight.role.startswith("expert.")}
    assert {step.name for step in made.steps if isinstance(step, Transcode)} == experts
    copied = {step.name: (step.dtype, step.shape) for step in made.steps if isinstance(step, Copy)}
    tensors = model.checkpoint.tensors
    assert copied == {name: (t.dtype, t.shape) for name, t in tensors.items() if name.rpartition(".")[0] not in experts}
    assert {dtype for step in made.steps if isinstance(step, Transcode) for _, dtype, _ in step.outputs} == {"BF16"}


@pytest.mark.parametrize("size", [1, 300_000, 1_000_000, 2_000_000, 10**12])
def test_shards_hold_no_more_than_asked_unless_it_is_one_weight(int4, size):
    made = plan(int4, to_bf16(size))
    for shard in made.shards:
        assert shard.nbytes - len(shard.header) <= size or len(shard.tensors) == 1
    assert len({shard.name for shard in made.shards}) == len(made.shards)
    if size == 10**12:
        assert [shard.name for shard in made.shards] == ["model-00001-of-00001.safetensors"]
    if size == 1:
        assert len(made.shards) == len(made.steps)


def test_the_index_says_where_every_tensor_is_and_how_much_there_is_in_all(made, int4):
    index = json.loads(bytes(made.texts[INDEX]))
    assert index["weight_map"] == {name: shard.name for shard in made.shards for name in shard.tensors}
    assert index["metadata"] == {
        "total_size": sum(nbytes for _, nbytes in outputs(made)),
        "total_parameters": inspect(int4).parameters,
    }


def test_the_parameters_are_those_of_the_weights_not_of_their_encoding(made, int4):
    names = load_manifest("kimi-k2-thinking").bind(inspect(int4).checkpoint.config)
    count = 0
    for _, match in names.expected():
        elements = 1
        for size in match.shape:
            elements *= size
        count += elements
    assert made.facts["parameters"] == count


def test_the_config_is_the_sources_without_its_quantisation(made, int4):
    source = json.loads((int4 / "config.json").read_text())
    del source["quantization_config"]
    config = json.loads(made.texts["config.json"])
    assert config == source
    assert list(config) == list(source)


def test_the_plan_takes_every_side_file_along(made, int4):
    files = {str(path.relative_to(int4)) for path in int4.rglob("*") if path.is_file()}
    own = {name for name in files if name.endswith(".safetensors") or name.startswith(".")} | {INDEX, "config.json"}
    assert set(made.side_files) == files - own
    assert "docs/deploy_guidance.md" in made.side_files


def test_output_bytes_are_all_bytes_of_the_output(made, bf16, tree):
    assert made.output_bytes == sum(map(len, tree(bf16).values()))


HASH = """
import sys, kconvert
print(kconvert.plan(sys.argv[1], kconvert.Recipe("bf16", shard_size=1_000_000)).hash)
"""


def test_the_hash_is_the_same_in_every_process(made, int4):
    hashes = {
        subprocess.run(
            [sys.executable, "-c", HASH, int4],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert hashes == {made.hash}


@pytest.mark.parametrize(
    "options",
    [{"shard_size": 999_999}, {"include": ("*experts*",)}, {"exclude": ("*experts.3.*",)}, {"source": "int4"}],
    ids=lambda options: next(iter(options)),
)
def test_another_recipe_has_another_hash(made, int4, options):
    assert plan(int4, to_bf16(**options)).hash != made.hash


@pytest.mark.parametrize("what", ["config", "placement", "side file", "dtype of weight_shape"])
def test_another_source_has_another_hash(made, int4_copy, raw, what):
    assert plan(int4_copy, to_bf16()).hash == made.hash, "the place of the source must not matter"
    checkpoint = raw.load(int4_copy)
    name = "model.layers.1.mlp.experts.0.up_proj.weight_shape"
    match what:
        case "config":
            checkpoint.config["rope_theta"] = 1.0
        case "placement":
            checkpoint.move(name, "extra.safetensors")
        case "side file":
            (int4_copy / "new.txt").write_text("new")
        case "dtype of weight_shape":
            checkpoint[name].dtype, checkpoint[name].data = "I64", bytes(16)
    assert plan(checkpoint.save(), to_bf16()).hash != made.hash


def test_the_stamp_changes_when_a_source_file_does(int4_copy):
    before = plan(int4_copy, to_bf16()).stamp
    assert plan(int4_copy, to_bf16()).stamp == before
    shard = min(int4_copy.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    assert plan(int4_copy, to_bf16()).stamp != before


def test_planning_reads_headers_and_no_tensor_data(int4_copy, made):
    """Every shard becomes a hole behind its header: data that were read would be zeros, and the plan another."""
    sparse = 0
    for path in int4_copy.glob("*.safetensors"):
        size, content = path.stat().st_size, path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        with open(path, "wb") as file:
            file.write(content[:header])
            file.truncate(size)
        sparse += size - header
    assert sparse > 3_000_000
    assert plan(int4_copy, to_bf16()).hash == made.hash


def test_planning_asks_for_no_byte_beyond_a_header(int4, monkeypatch):
    from kconvert.checkpoint.source import Reader

    asked = []
    read = Reader.read

    def watched(self, file, start, nbytes):
        asked.append((file, start, nbytes))
        return read(self, file, start, nbytes)

    monkeypatch.setattr(Reader, "read", watched)
    monkeypatch.setattr(Reader, "fetch", None)
    checkpoint = plan(int4, to_bf16()).source
    first = {file: min(t.start for t in checkpoint.tensors.values() if t.file == file) for file in checkpoint.files}
    assert asked
    assert all(start + nbytes <= first[file] for file, start, nbytes in asked)


def test_the_plan_as_json_is_json_and_says_what_matters(made, int4):
    facts = json.loads(json.dumps(made.as_dict()))
    assert facts["plan"] == made.hash
    assert facts["output_bytes"] == made.output_bytes
    assert (facts["transcoded"], facts["copied"]) == (24, len(made.steps) - 24)
    assert facts["weights"] == {"bf16": 25, "int4 group 32": 24}
    assert facts["read_bytes"] == inspect(int4).checkpoint.nbytes


def test_a_source_without_quantised_weights_is_refused(bf16):
    with pytest.raises(KconvertError, match="holds no quantised weights"):
        plan(bf16, to_bf16())


@pytest.mark.parametrize("options", [{"to": "int3"}, {"to": "bf16", "shard_size": 0}, {"to": "bf16", "shard_size": -1}])
def test_an_impossible_recipe_is_refused(options):
    with pytest.raises(KconvertError):
        Recipe(**options)


def test_a_source_of_another_encoding_than_the_command_names_is_refused_by_tensor(int4):
    with pytest.raises(KconvertError, match=r"tensor 'model\.layers\.1\..*' is int4 group 32, not fp8"):
        plan(int4, Recipe("bf16", source="fp8"))


@pytest.mark.parametrize("shard_size", [8, 4])
def test_two_weights_of_one_name_are_refused_whether_or_not_they_share_a_shard(shard_size):
    container = Safetensors(shard_size)
    twice = [Copy("x", "F32", (1,), (Place("a", number),)) for number in (0, 4)]
    _, shards = container.place(twice)
    with pytest.raises(KconvertError, match="two weights have the same name"):
        container.texts({}, shards, 2)


def test_an_index_is_spelt_as_json_spells_it(made):
    text = bytes(made.texts[INDEX])
    assert text == (json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n").encode()
    assert list(json.loads(text)["weight_map"]) == sorted(json.loads(text)["weight_map"])
