"""What becomes of an export of each family of mixtures of experts that transformers has, and of its table in docs/."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import kconvert
from kconvert.errors import KconvertError
from kconvert_qat import QATConfig, export, prepare
from kconvert_qat.attach import attached_to
from kconvert_qat.export import plan_export

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LATENT = {
    **{key: value for key, value in SIZES.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
SPARSE = {**LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
NARROW = {**SIZES, "intermediate_size": 32}
FULL = {**SIZES, "layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 32}
KIMI = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4}
VISION = {"depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
VISION |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "out_hidden_size": 64}
VISION |= {"patch_size": 4, "image_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
GEMMA = {**SIZES, "enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 128}


def vision(**text):
    return {"text_config": text, "vision_config": VISION}


LOADED = {
    "afmoe": SIZES,
    "axk1": LATENT,
    "axk2": LATENT,
    "cohere2_moe": SIZES,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": SPARSE,
    "dots1": SIZES,
    "dots3_note_text": LATENT,
    "ernie4_5_moe": SIZES,
    "exaone_moe": FULL,
    "flex_olmo": SIZES,
    "glm4_moe": SIZES,
    "glm4_moe_lite": LATENT,
    "glm4v_moe": vision(**SIZES),
    "glm_moe_dsa": SPARSE,
    "hunyuan_v1_moe": SIZES,
    "hy_v3": SIZES,
    "jamba": {**NARROW, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "kolibri1": SIZES,
    "laguna": SIZES,
    "lfm2_moe": {**FULL, "num_dense_layers": 1},
    "mellum": SIZES,
    "mimo_v2_flash": SIZES,
    "minimax": NARROW,
    "minimax_m2": NARROW,
    "mistral_large4": vision(**LATENT),
    "mixtral": NARROW,
    "nemotron_h": SIZES,
    "olmoe": {**SIZES, "head_dim": 16, "num_key_value_heads": 4},
    "phimoe": NARROW,
    "qwen2_moe": FULL,
    "qwen3_5_moe": vision(**FULL),
    "qwen3_5_moe_text": FULL,
    "qwen3_moe": SIZES,
    "qwen3_next": FULL,
    "solar_open": SIZES,
}
DECODED = {
    "ernie4_5_vl_moe": vision(**{**SIZES, "moe_intermediate_size": [32, 32], "head_dim": 128}),
    "kimi_linear": {**LATENT, "linear_attn_config": KIMI},
}
WITH_SOURCE = {"bailing_hybrid": LATENT, "deepseek_v4": SPARSE, "minimax_m3_vl": vision(**SIZES)}
REFUSED = {
    "aria": vision(**NARROW),
    "aria_text": NARROW,
    "gemma4": vision(**GEMMA, hidden_size_per_layer_input=0),
    "gemma4_text": GEMMA,
    "gpt_oss": NARROW,
    "granitemoe": NARROW,
    "granitemoe_swa": NARROW,
    "granitemoehybrid": {**NARROW, "layer_types": ["attention"] * 2, "shared_intermediate_size": 32},
    "granitemoeshared": {**NARROW, "shared_intermediate_size": 32},
    "hy_v4": SIZES,
    "inkling2_text": SIZES,
    "minimax_m3_vl_text": SIZES,
    "mistral4": LATENT,
    "qwen3_vl_moe": vision(**SIZES),
    "zaya": {**SIZES, "num_experts_per_tok": 1},
}
UNPREPARED = {"inkling_text": SIZES, "jetmoe": SIZES, "llama4_text": SIZES, "longcat_flash": LATENT}
COMMON = {"deepseek_v3", "glm4_moe", "minimax_m2", "qwen3_moe", "kimi_linear", "gemma4_text", "gpt_oss", "granitemoe"}
COMMON |= {"llama4_text"}

TABLE = {
    "loads it, bit for bit": LOADED,
    "fails to load it, with an error; loads what `kconvert int4-to-bf16` makes of it, bit for bit": DECODED,
    "saves a config.json of its own, not that of the releases: `export` wants one of these as `source`": WITH_SOURCE,
    "would load random experts, for it keeps them fused on disk: `export` refuses": REFUSED,
    "does not say how the experts lie in their weights: `prepare` refuses": UNPREPARED,
}


def families(group):
    return pytest.mark.parametrize(
        "name", [name if name in COMMON else pytest.param(name, marks=pytest.mark.slow) for name in group]
    )


def make(name, **changed):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    options = {**LOADED, **DECODED, **WITH_SOURCE, **REFUSED, **UNPREPARED}[name]
    config = CONFIG_MAPPING[name](**{**options, **changed})
    text_only = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.sub_configs
    torch.manual_seed(0)
    return (
        (AutoModelForCausalLM if text_only else AutoModelForImageTextToText)
        .from_config(config, dtype=torch.bfloat16)
        .eval()
    )


def load(folder, like, **options):
    return type(like).from_pretrained(folder, dtype=torch.bfloat16, **options)


def assert_served(model, loaded):
    """Every weight that `loaded` has is the one with which `model` is trained."""
    trained = dict(model.state_dict())
    for name, module in model.named_modules():
        if (attached := attached_to(module)) is not None:
            trained |= {f"{name}.{weight}": attached.serve(module, weight) for weight in attached.places}
    state = loaded.state_dict()
    assert state.keys() == trained.keys()
    assert [name for name in state if not torch.equal(state[name], trained[name].to(state[name].dtype))] == []


@families(LOADED)
def test_transformers_loads_the_export_of_a_family_bit_for_bit_also_by_way_of_bf16(name, tmp_path):
    assert_loads(make(name), tmp_path)


def test_kimi_linear_loads_where_its_attention_is_full_in_every_layer_and_nothing_warns(tmp_path, caplog):
    full = {**KIMI, "full_attn_layers": [1, 2], "kda_layers": []}
    assert_loads(make("kimi_linear", linear_attn_config=full), tmp_path)
    assert not caplog.records


def assert_loads(model, tmp_path):
    from transformers import CompressedTensorsConfig

    prepare(model)
    export(model, tmp_path / "int4")
    assert_served(model, load(tmp_path / "int4", model, quantization_config=CompressedTensorsConfig(dequantize=True)))
    assert_served(model, load(to_bf16(tmp_path), model))


@pytest.mark.skipif(Version(version("transformers")) < Version("5.23"), reason="what loads differs between versions")
@families(DECODED)
def test_a_family_whose_int4_transformers_fails_to_load_is_exported_with_a_warning_and_loads_as_bf16(
    name, tmp_path, caplog
):
    from transformers import CompressedTensorsConfig

    model = make(name)
    prepare(model)
    export(model, tmp_path / "int4")
    assert "fails to load the INT4 checkpoint" in caplog.text
    with pytest.raises(RuntimeError, match="conversion"):
        load(tmp_path / "int4", model, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_served(model, load(to_bf16(tmp_path), model))


@families(WITH_SOURCE)
def test_a_family_that_only_its_releases_describe_is_refused_without_one_before_anything_is_written(name, tmp_path):
    model = make(name)
    prepare(model)
    with pytest.raises(KconvertError, match=r"could not read the export|config\.json: \S+ is missing") as said:
        export(model, tmp_path / "int4")
    assert "\n" not in str(said.value)
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize("grid", ["int4", "mxfp4", "nvfp4", "fp8-block"])
def test_experts_without_a_gate_are_exported_on_every_grid(grid, tmp_path):
    model = make("nemotron_h")
    assert {matrix.piece for matrix in prepare(model, QATConfig(grid=grid)).matrices} == {"up", "down"}
    export(model, tmp_path / "int4")
    assert_served(model, load(to_bf16(tmp_path), model))


def to_bf16(root):
    kconvert.convert(kconvert.plan(root / "int4", kconvert.Recipe("bf16")), root / "bf16")
    kconvert.verify(root / "int4", root / "bf16")
    return root / "bf16"


@families(REFUSED)
def test_a_family_whose_experts_transformers_keeps_fused_is_refused_before_anything_is_written(name, tmp_path):
    model = make(name)
    prepare(model)
    with pytest.raises(KconvertError, match=r"which it keeps fused, and would load random values; save_pretrained"):
        export(model, tmp_path / "int4")
    assert not (tmp_path / "int4").exists()


@families(UNPREPARED)
def test_a_family_whose_experts_do_not_say_how_they_lie_is_not_prepared(name):
    with pytest.raises(KconvertError, match="does not say how they lie in it"):
        prepare(make(name))


def test_experts_that_transformers_saves_together_are_quantised_together():
    model = make("ernie4_5_vl_moe")
    prepare(model, QATConfig(targets=("*.experts.[0-3].*",)))
    with pytest.raises(KconvertError, match="let the targets mean all of them"):
        plan_export(model)


def test_an_export_that_transformers_would_load_with_random_experts_is_written_for_other_engines(tmp_path):
    model = make("granitemoe")
    prepare(model)
    export(model, tmp_path / "int4", for_transformers=False)
    to_bf16(tmp_path)


def test_the_documentation_lists_what_is_tested_here():
    documents = Path(__file__).parents[2].joinpath("docs").glob("QAT*.md")
    text = "\n".join(document.read_text() for document in documents)
    for fate, group in TABLE.items():
        assert f"| {fate} | {', '.join(f'`{name}`' for name in group)} |" in text
