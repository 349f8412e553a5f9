"""Which files go along into an output, and what is said of those that do not."""

import json

import pytest
from click.testing import CliRunner

import kconvert
from kconvert import Recipe
from kconvert.checkpoint.side_files import why_left_out
from kconvert.cli import main

GO_ALONG = [
    "README.md",
    "LICENSE",
    ".gitattributes",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "merges.txt",
    "vocab.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "configuration_deepseek.py",
    "modeling_quantized_moe.py",
    "1_Pooling/config.json",
    "docs/guide.md",
    "figures/latest.png",
    "mergekit_config.yml",
]
DECLARATIONS = [
    "hf_quant_config.json",
    "quantize_config.json",
    "quantization_config.json",
    "quant_config.json",
    "qat_config.json",
    "recipe.yaml",
    "quant_log.csv",
    "quanto_qmap.json",
    "quant_model_description.json",
    "tokenizer/hf_quant_config.json",
    "kv_cache_scales.json",
]
STAY_BEHIND = [
    "pytorch_model.bin",
    "model.safetensors.index.fp8.json",
    "pytorch_model.bin.index.json",
    "model.gguf",
    "MODEL.GGUF",
    "weights.npz",
    "model.nemo",
    "onnx/model.onnx_data",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.pt2",
    "old.tar.gz",
    "params.json",
    "optimizer.pt",
    "rng_state_0.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "latest",
    "global_step10/mp_rank_00_model_states.pt",
    "global_step10/notes.txt",
    "checkpoint-10/config.json",
    "pytorch_model_fsdp_0/.metadata",
    "dcp/__0_0.distcp",
    "runs/events.out.tfevents.1",
    "wandb/files/output.log",
    "model.safetensors.part",
    "model.safetensors.incomplete",
    "model-00001-of-00001.safetensors.aria2",
    "__pycache__/modeling.cpython-311.pyc",
    "README.md~",
]


@pytest.mark.parametrize("name", GO_ALONG)
def test_what_the_model_needs_goes_along(name):
    assert why_left_out(name) is None


@pytest.mark.parametrize("name", DECLARATIONS)
def test_what_declares_a_quantisation_stays_behind(name):
    assert "declares a quantisation" in why_left_out(name)


@pytest.mark.parametrize("name", STAY_BEHIND)
def test_other_weights_and_a_trainings_state_stay_behind(name):
    assert why_left_out(name) is not None


@pytest.fixture
def furnished(int4_copy):
    for name in ("hf_quant_config.json", "recipe.yaml", "optimizer.pt", "chat_template.jinja"):
        (int4_copy / name).write_text(name)
    return int4_copy


def run(*arguments):
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["int4-to-bf16"],
        ["int4-to-fp8"],
        ["repack-amx", "--method", "AMXINT4", "--numa", "1", "--with-rest"],
        ["sample", "--layers", "2", "--experts", "2"],
    ],
    ids=lambda command: command[0],
)
def test_no_output_declares_a_quantisation_outside_config_json(furnished, tmp_path, command):
    name, *options = command
    destination = tmp_path / "dst"
    source = ["--from", furnished] if name == "sample" else [furnished]
    run(name, *source, destination, *options, "-q")
    written = {path.name for path in destination.iterdir()}
    assert "chat_template.jinja" in written
    assert not written & {"hf_quant_config.json", "recipe.yaml", "optimizer.pt"}
    if name != "sample":
        run("verify", furnished, destination, "-q")


def test_what_stays_behind_is_said_with_the_reason(furnished, tmp_path):
    said = run("inspect", furnished)
    assert "finding: recipe.yaml declares a quantisation" in said
    assert "finding: optimizer.pt is of a training, not of the model, and will not be copied" in said
    assert "not copied: recipe.yaml" in run("int4-to-bf16", furnished, tmp_path / "dst", "--dry-run")


def test_overwriting_a_checkpoint_takes_its_declarations_away(int4, tmp_path):
    destination = tmp_path / "dst"
    destination.mkdir()
    for name in ("hf_quant_config.json", "notes.txt"):
        (destination / name).write_text(json.dumps({}))
    kconvert.convert(kconvert.plan(int4, Recipe("bf16")), destination, overwrite=True)
    assert not (destination / "hf_quant_config.json").exists()
    assert (destination / "notes.txt").exists()
