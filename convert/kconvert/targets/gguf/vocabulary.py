"""The tokenizer of a GGUF file, from the files beside the weights: tiktoken.model as Kimi has it, or a BPE in tokenizer.json.

llama.cpp knows a byte-level BPE by its tokens, each with a type, and its merges in their order; bytes are spelt as GPT-2 does.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
KIMI_PRE = "kimi-k2"
RESERVED = 256  # special tokens behind the others in Kimi's tokenizer
SPECIAL = ("bos", "eos", "unk", "sep", "pad")
LONGEST = 1024  # bytes of a token
# A tokenizer may call them no special ones.
LOOKS_SPECIAL = (("<|", "|>"), ("<\uff5c", "\uff5c>"))


@dataclass(frozen=True)
class Vocabulary:
    """`tokens` by id, each with its spelling and type; `merges` are pairs with a space between."""

    tokens: Mapping[int, tuple[str, int]]
    merges: list[str]
    pre: str

    @property
    def ids(self) -> dict[str, int]:
        return {token: number for number, (token, _) in self.tokens.items()}


class Files:
    """The small files beside the weights that say what a tokenizer is; KconvertError, in one sentence, for what does not."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def has(self, name: str) -> bool:
        return name in self._checkpoint.side_files

    def read(self, name: str) -> bytes:
        try:
            return self._checkpoint.side_file(name).read_bytes()
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


def add_vocabulary(writer: GGUFWriter, checkpoint: Checkpoint, config: Mapping[str, Any], pre: str, size: int) -> None:
    """All keys of the tokenizer, for `size` rows of embeddings; ids without a token are called [PAD…]."""
    files = Files(checkpoint)
    settings = files.table(CONFIG)
    name = next(filter(files.has, (TIKTOKEN, TOKENIZER)), None)
    if name is None:
        raise KconvertError(
            f"{checkpoint.root} has neither {TOKENIZER} nor {TIKTOKEN}, and a GGUF needs the model's tokenizer; fetch it "
            "from its release"
        )
    vocabulary = _from_tiktoken(files, settings, size) if name == TIKTOKEN else _from_json(files, pre)
    if not vocabulary.merges:
        raise files.fault(name, "has no merges")
    if max(vocabulary.tokens) >= size:
        raise KconvertError(
            f"{checkpoint.root}/{name} has the token {max(vocabulary.tokens)}, but the model's vocab_size is {size}; they are "
            "not of one model"
        )
    listed = [vocabulary.tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges(vocabulary.merges)
    _add_special(writer, settings, config, vocabulary.ids, size)
    template = files.text(TEMPLATE) if files.has(TEMPLATE) else settings.get("chat_template")
    if isinstance(template, list):  # several by name
        entries = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(entries, {}).get("template")
    if isinstance(template, str):
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


KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them


def _from_json(files: Files, pre: str) -> Vocabulary:
    table = files.table(TOKENIZER)
    model = table.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise files.fault(TOKENIZER, "is no BPE with a vocabulary")
    if model.get("byte_fallback"):
        raise files.fault(TOKENIZER, "is no BPE of bytes, but of characters")
    if any(type(number) is not int or number < 0 for number in vocab.values()):
        raise files.fault(TOKENIZER, "has tokens whose ids are no numbers")
    tokens = {number: (token, NORMAL) for token, number in vocab.items()}
    added = table.get("added_tokens") or []
    if not isinstance(added, list):
        raise files.fault(TOKENIZER, "has no list of added tokens")
    for entry in added:
        number, content = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or number < 0 or not isinstance(content, str):
            raise files.fault(TOKENIZER, "has added tokens without id or content")
        special = entry.get("special") or any(content.startswith(a) and content.endswith(b) for a, b in LOOKS_SPECIAL)
        tokens[number] = (content, CONTROL if special else USER_DEFINED)
    merges = model.get("merges") or []
    if not isinstance(merges, list):
        raise files.fault(TOKENIZER, "has no list of merges")
    return Vocabulary(tokens, [_merge(files, merge) for merge in merges], pre)


def _merge(files: Files, merge: object) -> str:
    """A merge as one string; new files have the two parts apart."""
    if isinstance(merge, str) and merge.count(" ") == 1:
        return merge
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
        return " ".join(part.replace(" ", "Ġ") for part in merge)
    raise files.fault(TOKENIZER, f"has a merge that is no pair ({merge!r:.40})")


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
    return Vocabulary(tokens, merges, KIMI_PRE)


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
