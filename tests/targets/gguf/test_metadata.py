"""What a GGUF says of the model and its tokenizer, and what is refused before anything is written."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kconvert import KconvertError, Recipe, plan
from kconvert.targets.tokens import spelt

Source = Callable[[str], Path]
ToGguf = Callable[..., Any]
# The architecture, and the way in which the tokenizer of the sample cuts texts: by Kimi's own code, or as tokenizer.json says.
ARCHITECTURES = {
    "kimi-k2-thinking": ("deepseek2", "kimi-k2"),
    "kimi-k2.5": ("deepseek2", "kimi-k2"),
    "deepseek-v3": ("deepseek2", "gpt-2"),
    "deepseek-v3.2": ("deepseek32", "gpt-2"),
    "glm-5": ("glm-dsa", "gpt-2"),
    "qwen3-moe": ("qwen3moe", "gpt-2"),
    "gpt-oss": ("gpt-oss", "gpt-2"),
    "glm-4-moe": ("glm4moe", "gpt-2"),
    "minimax-m2": ("minimax-m2", "gpt-2"),
}


@pytest.fixture
def copy(source: Source, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a small model, to damage."""
    return lambda name: Path(shutil.copytree(source(name), tmp_path / name, ignore=shutil.ignore_patterns(".kconvert")))


def edit(root: Path, **changes: Any) -> Path:
    path = root / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return root


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_says_which_model_it_is(source: Source, to_gguf: ToGguf, name: str) -> None:
    read = to_gguf(source(name))
    architecture, pre = ARCHITECTURES[name]
    assert read["general.architecture"] == architecture
    assert read["general.name"] == name
    assert read["tokenizer.ggml.pre"] == pre
    assert read[f"{architecture}.block_count"] == 2
    assert read[f"{architecture}.embedding_length"] == 128
    assert read[f"{architecture}.expert_count"] == 4
    assert len(read["tokenizer.ggml.tokens"]) == len(read["tokenizer.ggml.token_type"]) == 320
    assert read["tokenizer.ggml.tokens"][:257] == [*(spelt(bytes([byte])) for byte in range(256)), "th"]
    assert read["tokenizer.ggml.merges"] == ["t h"]


def test_latent_attention_is_one_head_as_long_as_the_latent(source: Source, to_gguf: ToGguf) -> None:
    read = to_gguf(source("kimi-k2-thinking"))
    wanted = {
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 32 + 64,
        "attention.value_length": 32,
        "attention.key_length_mla": 128 + 64,
        "attention.value_length_mla": 128,
        "leading_dense_block_count": 1,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 64.0,
    }
    assert {key: read[f"deepseek2.{key}"] for key in wanted} == wanted
    assert read["deepseek2.expert_weights_scale"] == pytest.approx(2.827)
    assert read["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


def test_kimis_special_tokens_have_the_names_of_its_tokenizer(copy: Callable[[str], Path], to_gguf: ToGguf) -> None:
    root = copy("kimi-k2-thinking")
    settings = {
        "added_tokens_decoder": {"258": {"content": "[EOS]"}},
        "eos_token": "[EOS]",
        "bos_token": {"content": "no"},
    }
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    read = to_gguf(edit(root, bos_token_id=257))
    assert read["tokenizer.ggml.tokens"][256:260] == ["th", "<|reserved_token_257|>", "[EOS]", "<|reserved_token_259|>"]
    assert read["tokenizer.ggml.token_type"][255:260] == [1, 1, 3, 3, 3]
    assert (read["tokenizer.ggml.eos_token_id"], read["tokenizer.ggml.bos_token_id"]) == (258, 257)
    assert "for message in messages" in read["tokenizer.chat_template"]


def test_a_part_of_each_head_has_rotary_positions(source: Source, to_gguf: ToGguf) -> None:
    assert to_gguf(source("glm-4-moe"))["glm4moe.rope.dimension_count"] == 16
    assert to_gguf(source("minimax-m2"))["minimax-m2.rope.dimension_count"] == 64


def test_indexers_are_in_the_layers_that_have_one(source: Source, to_gguf: ToGguf) -> None:
    read = to_gguf(source("glm-5.3"))
    assert read["glm-dsa.attention.indexer.types"] == [True, True, True, False, False]
    assert ["blk.2.indexer.attn_k.weight" in read.tensors, "blk.3.indexer.attn_k.weight" in read.tensors] == [
        True,
        False,
    ]
    read = to_gguf(source("deepseek-v3.2"))
    assert read["deepseek32.attention.indexer.head_count"] == 2
    assert "deepseek32.attention.indexer.types" not in read


def test_an_answer_ends_with_each_of_several_tokens(copy: Callable[[str], Path], to_gguf: ToGguf) -> None:
    """GLM's end with the turn of the user, or of a tool."""
    read = to_gguf(edit(copy("glm-4-moe"), eos_token_id=[258, 261, 262]))
    assert (read["tokenizer.ggml.eot_token_id"], read["tokenizer.ggml.eom_token_id"]) == (261, 262)


def merged_from(ranks: Mapping[bytes, int], token: bytes) -> list[bytes]:
    """tiktoken's own way: the pair of the lowest rank first, as long as that is below the token's."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= ranks[token]:
            break
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
    return parts


def test_merges_follow_from_ranks(copy: Callable[[str], Path], to_gguf: ToGguf) -> None:
    random = Random(0)
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokens = [b"a", b"b", b"c"]
    while len(ranks) < 310:
        token = random.choice(tokens) + random.choice(tokens)
        if token not in ranks:
            ranks[token] = len(ranks)
            tokens.append(token)
    root = copy("kimi-k2-thinking")
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (root / "tiktoken.model").write_bytes(b"".join(lines))
    expected = [merged_from(ranks, token) for token in ranks if len(token) > 1]
    assert to_gguf(root)["tokenizer.ggml.merges"] == [" ".join(map(spelt, pair)) for pair in expected if len(pair) == 2]


def test_added_tokens_are_special_or_the_users(copy: Callable[[str], Path], to_gguf: ToGguf) -> None:
    root = copy("qwen3-moe")
    table = json.loads((root / "tokenizer.json").read_text())
    table["added_tokens"] = [
        {"id": 257, "content": "<think>", "special": False},
        {"id": 258, "content": "<|end|>", "special": False},
        {"id": 259, "content": "stop", "special": True},
    ]
    table["model"]["merges"] = [["t", "h"]]
    (root / "tokenizer.json").write_text(json.dumps(table))
    read = to_gguf(root)
    assert read["tokenizer.ggml.tokens"][257:261] == ["<think>", "<|end|>", "stop", "[PAD260]"]
    assert read["tokenizer.ggml.token_type"][256:261] == [1, 4, 3, 3, 5]
    assert read["tokenizer.ggml.merges"] == ["t h"]


def test_layers_for_drafting_and_towers_stay_out_and_are_told(source: Source) -> None:
    for name, first in (("deepseek-v3", "model.layers.2."), ("kimi-k2.5", "mm_projector.")):
        facts = plan(source(name), Recipe("gguf")).facts
        assert any(tensor.startswith(first) for tensor in facts["dropped"])
        assert any("left out" in note for note in facts["notes"])


def test_only_a_head_that_is_the_embedding_stays_out(copy: Callable[[str], Path]) -> None:
    root = edit(copy("kimi-k2-thinking"), tie_word_embeddings="false")
    assert "lm_head" not in plan(root, Recipe("gguf")).facts["dropped"]
    facts = plan(edit(root, tie_word_embeddings=True), Recipe("gguf")).facts
    assert facts["dropped"] == ["lm_head"]
    assert any("a head that is the embedding): 1 weight, 'lm_head' the first" in note for note in facts["notes"])


def test_the_plan_says_what_is_the_sources_and_what_is_not(source: Source) -> None:
    facts = plan(source("kimi-k2-thinking"), Recipe("gguf")).facts
    assert facts["tensors"]["the source's codes and scales, in another order"] == 12
    assert facts["tensors"]["the source's values, split and transposed"] == 2
    assert "computed, and rounded" not in facts["tensors"]
    facts = plan(source("kimi-k2-thinking"), Recipe("gguf", rest="q8_0")).facts
    assert facts["tensors"]["computed, and rounded"] == 18
    assert "the source's values, split and transposed" not in facts["tensors"]


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("kimi-k2-thinking", {"n_shared_experts": "one"}, "n_shared_experts"),
        ("kimi-k2-thinking", {"rope_theta": None}, "rope_theta is missing, but llama.cpp needs a number"),
        ("kimi-k2-thinking", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
        (
            "kimi-k2-thinking",
            {"num_experts_per_tok": 5},
            "num_experts_per_tok is 5, but .* from 1 to the 4 of n_routed",
        ),
        ("qwen3-moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, but .* from 1 to the 4 of num_experts"),
        (
            "kimi-k2-thinking",
            {"norm_topk_prob": "false"},
            "norm_topk_prob is 'false', but llama.cpp needs true or false",
        ),
        ("kimi-k2-thinking", {"num_hidden_layers": 1}, r"layers\.1\..* no place in llama.cpp's deepseek2 of 1 layers"),
        ("minimax-m2", {"scoring_func": "softmax"}, "scoring_func is 'softmax', not sigmoid"),
        ("minimax-m2", {"rotary_dim": 256}, "rotary_dim rotates 256 numbers of heads that have 128"),
        (
            "glm-4-moe",
            {"partial_rotary_factor": None},
            "partial_rotary_factor is missing, but llama.cpp needs a number",
        ),
        ("kimi-k2-thinking", {"scoring_func": "softmax"}, "scoring_func is 'softmax', not sigmoid"),
        ("kimi-k2-thinking", {"rope_scaling": {"type": "linear", "factor": 2}}, "by 'linear'"),
        (
            "glm-5",
            {"indexer_types": ["full"]},
            "indexer_types is .* but llama.cpp needs full or shared for each of the 2",
        ),
        ("deepseek-v3.2", {"index_topk": None}, "index_topk is missing, but llama.cpp needs a whole number there"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob is not true"),
        ("gpt-oss", {"layer_types": ["full_attention"] * 2}, "layer_types do not take turns"),
    ],
)
def test_a_config_that_llama_cpp_cannot_follow_is_refused(
    copy: Callable[[str], Path], name: str, changes: dict[str, Any], sentence: str
) -> None:
    root = edit(copy(name), **changes)
    with pytest.raises(KconvertError, match=sentence):
        plan(root, Recipe("gguf"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has neither tokenizer.json nor tiktoken.model"),
        (b"", "holds no tokens"),
        (b"stands for it\n", "has a line that is no token and its rank"),
        (b"YQ== 0\nYQ== 1\n", "out of order, or twice"),
        (b"YQ== 0\nYg== 1\n", "has no merges"),
        (b"YQ== 0\nYg== 1\nYWI= 3\n", "out of order, or twice"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(
    copy: Callable[[str], Path], content: bytes | None, sentence: str
) -> None:
    root = copy("kimi-k2-thinking")
    path = root / "tiktoken.model"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(KconvertError, match=sentence):
        plan(root, Recipe("gguf"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "is no BPE with a vocabulary"),
        ('{"model": {"vocab": {"a": 1}, "byte_fallback": true}}', "is no BPE of bytes"),
        ('{"model": {"vocab": {"a": "b"}}}', "ids are no numbers"),
        ('{"model": {"vocab": {"a": 1}, "merges": ["a"]}}', "a merge that is no pair"),
        ('{"model": {"vocab": {"a": 1}, "merges": ["a b"]}, "added_tokens": [1]}', "without id or content"),
        ('{"model": {"vocab": {"a": 1}, "merges": ["a b"]}, "added_tokens": 5}', "has no list of added tokens"),
        ('{"model": {"vocab": {"\\ud800": 1}, "merges": ["a b"]}}', "has text that is no Unicode"),
        ('{"model": {"vocab": {"a": 1}, "merges": ["a b"]}}', "has the merge 'a b', but no token 'b'"),
        ('{"model": {"vocab": {"a": 1, "b": 2}, "merges": [["a", "b"]]}}', "but no token 'ab'"),
        ('{"model": {"vocab": {"a": 1, "b": 1}}}', "has two tokens with the id 1, 'a' the first"),
        (
            '{"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 1, "content": "<x>"}]}',
            "has two tokens with the id 1, '<x>' the second",
        ),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(copy: Callable[[str], Path], content: str, sentence: str) -> None:
    root = copy("qwen3-moe")
    (root / "tokenizer.json").write_text(content)
    with pytest.raises(KconvertError, match=sentence):
        plan(root, Recipe("gguf"))


def test_a_token_beyond_the_embeddings_is_refused(copy: Callable[[str], Path]) -> None:
    root = copy("qwen3-moe")
    table = json.loads((root / "tokenizer.json").read_text())
    table["model"]["vocab"]["far"] = 900
    (root / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(KconvertError, match="has the token 900, but the model's vocab_size is 320"):
        plan(root, Recipe("gguf"))


def test_of_several_chat_templates_the_default_is_taken(copy: Callable[[str], Path], to_gguf: ToGguf) -> None:
    root = copy("qwen3-moe")
    (root / "chat_template.jinja").unlink(missing_ok=True)
    templates = [
        {"name": {}, "template": "odd"},
        {"name": "tool", "template": "no"},
        {"name": "default", "template": "yes"},
    ]
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert to_gguf(root)["tokenizer.chat_template"] == "yes"


def test_a_chat_template_that_is_no_unicode_is_refused(copy: Callable[[str], Path]) -> None:
    root = copy("qwen3-moe")
    (root / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')
    with pytest.raises(KconvertError, match=r"tokenizer_config\.json has text that is no Unicode"):
        plan(root, Recipe("gguf"))


def test_a_directory_whose_name_is_no_unicode_is_converted(copy: Callable[[str], Path], to_gguf: ToGguf) -> None:
    root = copy("qwen3-moe")
    assert to_gguf(root.rename(root.with_name("model-\udcff")))["general.name"] == "model-?"


def test_a_directory_that_is_called_like_a_part_of_a_model_is_converted(
    copy: Callable[[str], Path], to_gguf: ToGguf
) -> None:
    root = copy("qwen3-moe")
    read = to_gguf(root.rename(root.with_name("m-00001-of-00002")))
    assert [path.name for path in read.files] == ["m.gguf"]


def test_a_model_without_mapping_is_refused(bf16: Path, raw: Any, tmp_path: Path) -> None:
    checkpoint = raw.load(bf16)
    checkpoint.config["model_type"] = "some_model"
    root = checkpoint.save(tmp_path / "other")
    with pytest.raises(KconvertError, match="is a some_model, whose tensors have no mapping to GGUF yet"):
        plan(root, Recipe("gguf"))


def test_experts_are_taken_all_or_none(source: Source) -> None:
    with pytest.raises(KconvertError, match="lacks the up of some of its experts"):
        plan(source("kimi-k2-thinking"), Recipe("gguf", exclude=("*.experts.1.up_proj",)))
    with pytest.raises(KconvertError, match="lacks the down of some of its experts"):
        plan(source("kimi-k2-thinking"), Recipe("gguf", include=("*.experts.0.*", "*.experts.1.*")))


def test_the_rest_is_for_gguf_alone() -> None:
    with pytest.raises(KconvertError, match="the rest as 'q8_0' is not possible for bf16"):
        Recipe("bf16", rest="q8_0")


@pytest.mark.parametrize(("name", "options"), [("qwen3-moe", {"rest": "q8_0"}), ("kimi-k2-thinking", {"rest": "q8_0"})])
def test_what_rounds_is_refused_where_all_must_be_exact(source: Source, name: str, options: dict[str, str]) -> None:
    with pytest.raises(
        KconvertError, match=r"\(bf16\) may lose values as q8_0.*; leave out --rest q8_0 or --require-exact"
    ):
        plan(source(name), Recipe("gguf", require_exact=True, **options))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_is_rounded_otherwise(source: Source, name: str) -> None:
    assert not plan(source(name), Recipe("gguf", require_exact=True)).facts["lossy"]
