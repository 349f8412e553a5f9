"""Which safetensors files of a directory are the model, and what is said of a directory that holds none."""

import json

import pytest

from kconvert import KconvertError
from kconvert.address import open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(raw, tmp_path):
    """`directory({name: content})` is one with these files: bytes, a table as JSON, or tensors' names in a safetensors file."""

    def make(files):
        root = tmp_path / "src"
        root.mkdir()
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, list):
                raw.write_file(path, {tensor: raw.Tensor("U8", [2], b"ab") for tensor in content})
            else:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return root

    return make


def refusal(root):
    with pytest.raises(KconvertError) as caught:
        open_checkpoint(root)
    message = str(caught.value)
    assert message.startswith(str(root))
    assert "\n" not in message
    assert "fetch both again" not in message
    return message


@pytest.mark.parametrize(
    "other",
    [
        "consolidated.safetensors",
        "original/model.safetensors",
        "adapter_model.safetensors",
        "model.fp16.safetensors",
        "checkpoint-10/model.safetensors",
        "consolidated-00001-of-00002.safetensors",
    ],
)
@pytest.mark.parametrize("model", [["model.safetensors"], ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]])
def test_the_model_is_read_whatever_other_weights_lie_beside_it(directory, model, other):
    index = {INDEX: {"weight_map": {name: name for name in model}}} if len(model) > 1 else {}
    found = open_checkpoint(directory({name: [name] for name in model} | index | {other: ["stranger"]}))
    assert list(found.files) == model
    assert list(found.tensors) == model
    assert found.left_out == (other,)


@pytest.mark.parametrize("first", [0, 1])
def test_a_whole_numbered_set_needs_its_index_which_is_written_last(directory, first):
    root = directory({f"model-0000{first + k}-of-00002.safetensors": [str(k)] for k in (0, 1)})
    assert f"holds 2 safetensors files but no {INDEX}" in refusal(root)


def test_a_numbered_file_that_is_all_there_is_needs_no_index(directory):
    assert list(open_checkpoint(directory({"model-00001-of-00001.safetensors": ["x"]})).tensors) == ["x"]


def test_a_numbered_set_without_an_index_that_lacks_a_file_says_which(directory):
    root = directory({f"model-0000{k}-of-00003.safetensors": [str(k)] for k in (1, 3)})
    assert f"lacks model-00002-of-00003.safetensors and {INDEX}" in refusal(root)


def test_two_models_in_one_directory_are_told_apart_by_nobody(directory):
    numbered = {f"model-0000{k}-of-00002.safetensors": [str(k)] for k in (1, 2)}
    message = refusal(directory({"model.safetensors": ["x"], **numbered}))
    assert "model-00001-of-00002.safetensors to model-00002-of-00002.safetensors or model.safetensors" in message


# What the index says.


def test_an_index_of_files_that_are_not_here_is_said_to_be_left_over(directory):
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    message = refusal(directory({INDEX: index, "model.safetensors": ["x", "y"]}))
    assert "none of which is here, but model.safetensors is" in message
    assert "fetch" not in message


def test_an_index_some_of_whose_files_are_here_wants_the_others(directory):
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    message = refusal(directory({INDEX: index, "model-00001-of-00002.safetensors": ["x"]}))
    assert "model-00002-of-00002.safetensors is missing" in message


def test_files_that_hold_more_than_the_index_takes_want_another_index(directory):
    message = refusal(directory({INDEX: {"weight_map": {"x": "a.safetensors"}}, "a.safetensors": ["x", "y"]}))
    assert "tensor 'y' is here" in message
    assert "does not name it; mend the index" in message


@pytest.mark.parametrize("other", ["model.safetensors.index.fp8.json", "consolidated.safetensors.index.json"])
def test_files_that_two_indexes_share_are_said_to_be_shared(directory, other):
    root = directory(
        {
            INDEX: {"weight_map": {"x": "a.safetensors"}},
            other: {"weight_map": {"y": "a.safetensors"}},
            "a.safetensors": ["x", "y"],
        }
    )
    assert f"tensor 'y' is here but {INDEX} does not name it, {other} does: the two share" in refusal(root)


def test_a_tensor_in_two_files_is_not_fetched_again(directory):
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    message = refusal(directory({INDEX: index, "a.safetensors": ["x"], "b.safetensors": ["x", "y"]}))
    assert "tensor 'x' is here and in a.safetensors" in message
    assert "fetch" not in message


def test_an_index_that_spells_paths_its_own_way_is_told_the_plain_way(directory):
    message = refusal(directory({INDEX: {"weight_map": {"x": "./a.safetensors"}}, "a.safetensors": ["x"]}))
    assert "spell that 'a.safetensors'" in message


def test_a_file_that_aria2_is_still_filling_is_not_read(directory):
    message = refusal(directory({"model.safetensors": ["x"], "model.safetensors.aria2": b""}))
    assert "let its download finish" in message


def test_a_pointer_of_git_lfs_is_said_to_be_one(directory):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    assert "git lfs pull" in refusal(directory({"model.safetensors": pointer}))


# What else a directory is.

LORA = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}


@pytest.mark.parametrize(
    "files",
    [
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": LORA},
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": [*LORA, "base_model.model.lm_head.weight"]},
        {"adapter_config.json": ADAPTER, "adapter_model.bin": b""},
        {"adapter_config.json": ADAPTER, "adapters.safetensors": ["model.layers.0.self_attn.q_proj.lora_a"]},
        {"adapter_config.json": ADAPTER, "model.safetensors": LORA},
        {"adapter_config.json": ADAPTER},
    ],
    ids=["peft", "with a head", "pickled", "mlx", "called model", "config alone"],
)
def test_an_adapter_is_to_be_merged_into_its_base(directory, files):
    message = refusal(directory(files))
    assert "holds an adapter of 'org/base', no model; merge it into its base" in message


def test_an_adapter_without_its_config_is_one_all_the_same(directory):
    assert "holds an adapter, no model" in refusal(directory({"anything.safetensors": LORA}))


def test_an_adapter_beside_its_base_stays_behind_with_its_config(directory):
    files = {"model.safetensors": ["x"], "adapter_model.safetensors": LORA, "adapter_config.json": ADAPTER}
    found = open_checkpoint(directory(files))
    assert list(found.tensors) == ["x"]
    assert sorted(found.left_out) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_checkpoint_in_a_folder_says_in_which(directory):
    files = {"name-w4g128/model.safetensors": ["x"], "name-w4g128/config.json": {}, "README.md": b""}
    assert refusal(directory(files)).endswith("holds its checkpoint in the folder name-w4g128; give that folder")


def test_checkpoints_in_several_folders_say_in_which(directory):
    root = directory({f"checkpoint-{k}/{name}": ["x"] for k in (1, 2) for name in ("a.safetensors", "b.safetensors")})
    assert "folders checkpoint-1 (which has no config.json), checkpoint-2" in refusal(root)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is empty"),
        ({"config.json": {}, "tokenizer.json": {}}, "only what lies beside them; fetch them"),
        ({"notes.txt": b""}, "holds no safetensors files; give the directory"),
        ({"model.gguf": b""}, "GGUF files, which are not converted (model.gguf)"),
        ({"model.gguf": b"", ".kconvert/lock": b""}, "GGUF files, which are not converted (model.gguf)"),
        ({".kconvert/lock": b"", "config.json": {}}, "is unfinished, it has no weights yet; run the conversion again"),
        ({"pytorch_model.bin": b"", "config.json": {}}, "pickled files, which may run code and are not read"),
        ({"weights.npz": b"", "config.json": {}}, "NumPy's archives"),
        ({"step_5/__0_0.distcp": b"", "step_5/.metadata": b""}, "distributed checkpoint"),
        ({"model.nemo": b""}, "NeMo's archives"),
        ({"model_index.json": {}, "unet/diffusion_pytorch_model.safetensors": ["x"]}, "is a diffusers pipeline"),
        ({"consolidated.safetensors": ["x"], "params.json": {}}, "its publisher's own layout"),
        ({"consolidated.safetensors.index.json": {}}, "its publisher's own layout"),
        ({"consolidated.00.pth": b"", "params.json": {}}, "its publisher's own layout"),
        ({"training_args.bin": b"", "config.json": {}}, "only what lies beside them"),
    ],
)
def test_a_directory_without_a_model_is_said_to_be_what_it_is(directory, files, words):
    assert words in refusal(directory(files))
