"""The tokenizer of a GGUF file, from the files beside the weights: tiktoken.model as Kimi has it, or a BPE in tokenizer.json.

llama.cpp knows a byte-level BPE by its tokens, each with a type, and its merges in their order; bytes are spelt as GPT-2 does.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.pretokenizers import KIMI, NAMES, changes_text, name_of, steps_of
from kconvert.checkpoint.source import Checkpoint
from kconvert.errors import KconvertError
from kconvert.targets.tokens import spelt

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
TIKTOKEN, TOKENIZER, CONFIG, TEMPLATE = (
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
KIMIS_CLASS = "TikTokenTokenizer"  # the one in Kimi's repositories; transformers' own read tokenizer.json
RESERVED = 256  # special tokens behind the others in Kimi's tokenizer
SPECIAL = ("bos", "eos", "unk", "sep", "pad")
TURNS = ("eot", "eom")  # what also ends an answer, where config.json lists several: of GLM the turn of user or tool
LONGEST = 1024  # bytes of a token
LARGEST = 1 << 27  # bytes of a file; a tokenizer.json of 256,000 tokens has 20 MB
LONGEST_TEMPLATE = 1 << 24  # bytes; one has some 10,000
# A tokenizer may call them no special ones.
LOOKS_SPECIAL = (("<|", "|>"), ("<\uff5c", "\uff5c>"))


@dataclass(frozen=True)
class Vocabulary:
    """`tokens` by id, each with its spelling and type; `merges` are pairs with a space between; `begins` is whether a text gets
    a token in front, where the tokenizer itself says so."""

    tokens: Mapping[int, tuple[str, int]]
    merges: list[str]
    pre: str
    begins: bool | None = None

    @property
    def ids(self) -> dict[str, int]:
        return {token: number for number, (token, _) in self.tokens.items()}


class Files:
    """The small files beside the weights that say what a tokenizer is; KconvertError, in one sentence, for what does not."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def root(self) -> Path:
        return self._checkpoint.root

    def has(self, name: str) -> bool:
        return name in self._checkpoint.side_files

    def read(self, name: str) -> bytes:
        try:
            path = self._checkpoint.side_file(name)
            if (nbytes := path.stat().st_size) > LARGEST:
                raise self.fault(name, f"has {nbytes:,} bytes, over the limit of {LARGEST:,}")
            return path.read_bytes()
        except OSError as error:
            raise self.fault(name, f"cannot be read ({error.strerror})") from None

    def text(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError:
            raise self.fault(name, "is not text in UTF-8") from None

    def table(self, name: str) -> dict[str, Any]:
        """A JSON object; an empty one where there is no such file."""
        if not self.has(name):
            return {}
        try:
            table = json.loads(self.read(name))
            json.dumps(table, ensure_ascii=False).encode()  # half of a surrogate pair is no text that a GGUF can hold
        except UnicodeEncodeError:
            raise self.fault(name, "has text that is no Unicode") from None
        except (ValueError, RecursionError):
            raise self.fault(name, "is not valid JSON") from None
        if not isinstance(table, dict):
            raise self.fault(name, "is not a JSON object")
        return table

    def fault(self, name: str, what: str) -> KconvertError:
        return KconvertError(
            f"{self._checkpoint.root}/{name} {what}, and a GGUF needs the model's tokenizer; fetch that file from its release"
        )


def add_vocabulary(writer: GGUFWriter, checkpoint: Checkpoint, config: Mapping[str, Any], size: int) -> None:
    """All keys of the tokenizer, for `size` rows of embeddings; ids without a token are called [PAD…]."""
    files = Files(checkpoint)
    settings = files.table(CONFIG)
    name = _file_of(files, settings, config)
    vocabulary = _from_tiktoken(files, settings, size) if name == TIKTOKEN else _from_json(files)
    if not vocabulary.merges:
        raise files.fault(name, "has no merges")
    if max(vocabulary.tokens) >= size:
        raise KconvertError(
            f"{checkpoint.root}/{name} has the token {max(vocabulary.tokens)}, but the model's vocab_size is {size}; they are "
            "not of one model"
        )
    listed = [vocabulary.tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    _check_once(files, name, (token for token, _ in listed))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.begins is not None and not isinstance(settings.get("add_bos_token"), bool):
        writer.add_add_bos_token(vocabulary.begins)
    _add_special(writer, settings, config, vocabulary.ids, size)
    _add_template(writer, files, settings)


def check_tokenizer(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """KconvertError where there is no file to take the tokenizer from; what is in it is not looked at."""
    files = Files(checkpoint)
    _file_of(files, files.table(CONFIG), config)


def _file_of(files: Files, settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The file that the model's own tokenizer reads: by its class, else by the model."""
    kind = settings.get("tokenizer_class")
    kimis = kind == KIMIS_CLASS if isinstance(kind, str) else str(config.get("model_type")).startswith("kimi")
    for name in (TIKTOKEN, TOKENIZER) if kimis else (TOKENIZER,):
        if files.has(name):
            return name
    what = f"has neither {TOKENIZER} nor {TIKTOKEN}" if kimis else f"has no {TOKENIZER}"
    raise KconvertError(f"{files.root} {what}, and a GGUF needs the model's tokenizer; fetch it from its release")


def _check_once(files: Files, name: str, tokens: Iterable[str]) -> None:
    """KconvertError for a token that has two ids, of which llama.cpp would know one."""
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            raise files.fault(name, f"has the token {token!r:.80} under two ids")
        seen.add(token)


def _add_template(writer: GGUFWriter, files: Files, settings: Mapping[str, Any]) -> None:
    template = files.text(TEMPLATE) if files.has(TEMPLATE) else settings.get("chat_template")
    if isinstance(template, list):  # several by name
        entries = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(entries, {}).get("template")
    if isinstance(template, str):
        if len(template.encode()) > LONGEST_TEMPLATE:
            where = TEMPLATE if files.has(TEMPLATE) else CONFIG
            raise files.fault(where, f"has a chat template over the limit of {LONGEST_TEMPLATE:,} bytes")
        writer.add_chat_template(template)


def _add_special(
    writer: GGUFWriter, settings: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int], size: int
) -> None:
    """Which tokens begin and end a text, by tokenizer_config.json, else by config.json."""
    for word in SPECIAL:
        entry = settings.get(f"{word}_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        number = ids.get(content) if isinstance(content, str) else None
        if number is None:
            number = config.get(f"{word}_token_id")
            number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < size:
            writer.add_uint32(f"tokenizer.ggml.{KEYS.get(word, word)}_token_id", number)
        adds = settings.get(f"add_{word}_token")
        if isinstance(adds, bool) and word in ("bos", "eos"):
            writer.add_bool(f"tokenizer.ggml.add_{word}_token", adds)
    ends = config.get("eos_token_id")
    others = [end for end in ends[1:] if type(end) is int and 0 <= end < size] if isinstance(ends, list) else []
    for word, number in zip(TURNS, others, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{word}_token_id", number)


KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them


def _from_json(files: Files) -> Vocabulary:
    table = files.table(TOKENIZER)
    model = table.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise files.fault(TOKENIZER, "is no BPE with a vocabulary")
    if model.get("byte_fallback"):
        raise files.fault(TOKENIZER, "is no BPE of bytes, but of characters")
    tokens = _tokens(files, vocab, table.get("added_tokens") or [])
    merges = model.get("merges") or []
    if not isinstance(merges, list):
        raise files.fault(TOKENIZER, "has no list of merges")
    listed = [_merge(files, merge, vocab) for merge in merges]
    if why := _not_llamas(table, model):
        raise KconvertError(
            f"{files.root}/{TOKENIZER} {why}, so llama.cpp would make other tokens of a text than the model has"
        )
    return Vocabulary(tokens, listed, name_of(table) or "", _begins(table))


def _not_llamas(table: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """What llama.cpp has not of a tokenizer; None if it has all."""
    if kind := changes_text(table):
        return f"changes texts first ({kind:.40}), which llama.cpp does not do"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "marks the parts of a word, which llama.cpp does not do"
    if name_of(table) is None:
        found = json.dumps(table.get("pre_tokenizer"), ensure_ascii=False)
        return f"cuts texts into words by {found:.300}, as none of those does that are known here ({', '.join(NAMES.values())})"
    return None


def _begins(table: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a special token in front of a text."""
    for step in steps_of(table.get("post_processor"), "processors"):
        parts = step.get("single") if isinstance(step, dict) else None
        if isinstance(parts, list) and parts and isinstance(parts[0], dict):
            return "SpecialToken" in parts[0]
    return False


def _tokens(files: Files, vocab: Mapping[str, Any], added: object) -> dict[int, tuple[str, int]]:
    """The vocabulary and the added tokens, some of which may be in it, by id."""
    if any(type(number) is not int or number < 0 for number in vocab.values()):
        raise files.fault(TOKENIZER, "has tokens whose ids are no numbers")
    tokens = {number: (token, NORMAL) for token, number in vocab.items()}
    if len(tokens) < len(vocab):
        twice = next(token for token, number in vocab.items() if tokens[number][0] != token)
        raise files.fault(TOKENIZER, f"has two tokens with the id {vocab[twice]}, {twice!r:.80} the first")
    if not isinstance(added, list):
        raise files.fault(TOKENIZER, "has no list of added tokens")
    for entry in added:
        number, content = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or number < 0 or not isinstance(content, str):
            raise files.fault(TOKENIZER, "has added tokens without id or content")
        if tokens.get(number, (content, NORMAL))[0] != content:
            raise files.fault(TOKENIZER, f"has two tokens with the id {number}, {content!r:.80} the second")
        special = entry.get("special") or any(content.startswith(a) and content.endswith(b) for a, b in LOOKS_SPECIAL)
        tokens[number] = (content, CONTROL if special else USER_DEFINED)
    return tokens


def _merge(files: Files, merge: object, vocab: Mapping[str, Any]) -> str:
    """A merge as one string; new files have the two parts apart."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise files.fault(TOKENIZER, f"has a merge that is no pair ({merge!r:.40})")
    if unknown := next((token for token in (*parts, "".join(parts)) if token not in vocab), None):
        raise files.fault(TOKENIZER, f"has the merge {merge!r:.80}, but no token {unknown!r:.80}")
    if any(" " in part for part in parts):
        raise files.fault(TOKENIZER, f"has a merge with a space in it ({merge!r:.80}), as no BPE of bytes has")
    return " ".join(parts)


def _from_tiktoken(files: Files, settings: Mapping[str, Any], size: int) -> Vocabulary:
    """Ranks, and behind them the special tokens of Kimi's tokenizer, whose names are in tokenizer_config.json."""
    ranks = _ranks(files)
    tokens = {rank: (spelt(token), NORMAL) for token, rank in ranks.items()}
    merges = [
        " ".join(map(spelt, parts))
        for token, rank in ranks.items()
        if len(token) > 1 and len(parts := _parts(ranks, token, rank)) == 2
    ]
    named = settings.get("added_tokens_decoder")
    named = named if isinstance(named, dict) else {}
    for number in range(len(ranks), min(len(ranks) + RESERVED, size)):
        entry = named.get(str(number))
        content = entry.get("content") if isinstance(entry, dict) else None
        tokens[number] = (content if isinstance(content, str) else f"<|reserved_token_{number}|>", CONTROL)
    return Vocabulary(tokens, merges, KIMI)


def _ranks(files: Files) -> dict[bytes, int]:
    """Tokens in the order of their ranks, 0 and on."""
    ranks: dict[bytes, int] = {}
    for line in files.read(TIKTOKEN).splitlines():
        words = line.split()
        if not words:
            continue
        try:
            token, rank = base64.b64decode(words[0], validate=True), int(words[1])
        except (binascii.Error, ValueError, IndexError):
            raise files.fault(TIKTOKEN, "has a line that is no token and its rank") from None
        if not token or len(words) != 2 or len(token) > LONGEST or token in ranks or rank != len(ranks):
            raise files.fault(TIKTOKEN, f"has a token out of order, or twice, in the line of rank {rank}")
        ranks[token] = rank
    if not ranks:
        raise files.fault(TIKTOKEN, "holds no tokens")
    return ranks


def _parts(ranks: Mapping[bytes, int], token: bytes, rank: int) -> list[bytes]:
    """What the token was merged from: its bytes, merged by all ranks before its own."""
    starts = [*range(len(token)), len(token)]  # of the parts, and the end
    found = [ranks.get(token[i : i + 2], rank) for i in range(len(token) - 1)]  # the rank of each part with the next
    while found and (lowest := min(found)) < rank:
        at = found.index(lowest)
        del found[at], starts[at + 1]
        for i in (at - 1, at):
            if 0 <= i < len(found):
                found[i] = ranks.get(token[starts[i] : starts[i + 2]], rank)
    return [token[first:last] for first, last in pairwise(starts)]
