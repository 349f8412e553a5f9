"""The tokenizer and the chat template of a made-up model: read by transformers, and by the rules of Kimi's own class."""

import base64
import json

import pytest
from sizes import SIZES

from kconvert.models.catalogue import load_manifest
from kconvert.targets.sample import SampleRecipe, plan_synthetic
from kconvert.targets.tokens import SPECIAL

transformers = pytest.importorskip("transformers")

TEXT = "Which one is bigger, 9.11 or 9.9?\n\tthé 北京"
MODELS = ["deepseek-v3", "gpt-oss", "kimi-k2-thinking", "kimi-k2.5", "mixtral", "qwen3-moe"]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


@pytest.fixture(params=MODELS)
def made(request, tmp_path):
    """The small files of a sample, without its weights."""
    return written(tmp_path, request.param)


def written(root, like, vocab=512):
    sizes = {name: size for name, size in {**SIZES, "vocab": vocab}.items() if name in load_manifest(like).dims}
    for name, content in plan_synthetic(SampleRecipe(like, sizes)).texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(bytes(content))
    return root


def tokenizer_of(root):
    """As an engine opens it that was told to trust the model's own code, which all of Kimi's need."""
    return transformers.AutoTokenizer.from_pretrained(root, trust_remote_code=True, local_files_only=True)


def test_every_text_comes_back_from_its_tokens(made):
    tokenizer = tokenizer_of(made)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert max(tokenizer.encode(TEXT)) < 257


def test_each_special_token_is_one_token_within_the_vocabulary(made):
    tokenizer = tokenizer_of(made)
    ids = [tokenizer.encode(token) for token in SPECIAL]
    assert [len(found) for found in ids] == [1] * len(SPECIAL)
    assert max(ids) < [512]
    assert tokenizer.decode(tokenizer.encode("<think>hm</think>"), skip_special_tokens=True) == "hm"


def test_config_and_generation_config_end_a_turn_where_the_template_does(made):
    tokenizer = tokenizer_of(made)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((made / name).read_text())
        settings = settings.get("text_config", settings)
        assert settings["eos_token_id"] == tokenizer.eos_token_id == tokenizer.encode("<|im_end|>")[0]


def test_the_template_takes_tools_calls_results_and_reasoning(made):
    call = {"id": "functions.get_weather:0", "type": "function"}
    messages = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": [{"type": "text", "text": "Is it raining?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I look.",
            "tool_calls": [{**call, "function": {"name": "get_weather", "arguments": {"city": "Beijing"}}}],
        },
        {"role": "tool", "tool_call_id": call["id"], "content": "Sunny"},
        {"role": "assistant", "content": "No."},
    ]
    said = tokenizer_of(made).apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert said == (
        '<|im_system|>tools<|im_middle|>[{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>You are kind.<|im_end|>"
        "<|im_user|>user<|im_middle|>Is it raining?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>I look.</think><|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Beijing"}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>functions.get_weather:0: Sunny<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>No.<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )


def test_arguments_in_a_string_are_written_as_they_are(tmp_path):
    function = {"name": "get_weather", "arguments": '{"city":"x"}'}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    ]
    said = tokenizer_of(written(tmp_path, "qwen3-moe")).apply_chat_template(messages, tokenize=False)
    assert '<|tool_call_argument_begin|>{"city":"x"}<|tool_call_end|>' in said


def test_kimis_own_class_finds_the_same_tokens_in_its_own_files(tmp_path):
    """tokenization_kimi.py: ranks from tiktoken.model, then 256 special ones, called as added_tokens_decoder says."""
    root = written(tmp_path, "kimi-k2-thinking")
    ranks = [base64.b64decode(line.split()[0]) for line in (root / "tiktoken.model").read_bytes().splitlines()]
    named = json.loads((root / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert len(ranks) == len(set(ranks)) == 257
    tokenizer = tokenizer_of(root)
    assert [int(number) for number in named] == [257 + place for place in range(len(SPECIAL))]
    assert all(tokenizer.encode(entry["content"]) == [int(number)] for number, entry in named.items())
    assert b"".join(ranks[token] for token in tokenizer.encode(TEXT)).decode() == TEXT


def test_a_vocabulary_too_small_for_special_tokens_has_none(tmp_path):
    tokenizer = tokenizer_of(written(tmp_path, "qwen3-moe", vocab=260))
    assert len(tokenizer) == 257
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_smaller_language_model_keeps_the_vision_towers_own_sizes(tmp_path):
    vision = json.loads((written(tmp_path, "kimi-k2.5") / "config.json").read_text())["vision_config"]
    assert (vision["vt_hidden_size"], vision["mm_hidden_size"], vision["vt_intermediate_size"]) == (1152, 1152, 4304)
    assert vision["text_hidden_size"] == 256
    assert (
        vision["num_hidden_layers"] == vision["vt_num_hidden_layers"] == 3
    )  # engines read the one, the release has the other
