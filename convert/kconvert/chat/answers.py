"""An answer put together from a message or from the deltas of a stream, which have the same keys.

What a server says is untrusted: a value of another kind than the protocol's counts as missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# SGLang and the model card of Kimi-K2-Thinking; vLLM from 0.12 on, and OpenAI's own gpt-oss.
REASONING_FIELDS = ("reasoning_content", "reasoning")

# What a message has under a key, where that is there and not null.
KINDS: Mapping[str, type] = {"content": str, **dict.fromkeys(REASONING_FIELDS, str), "tool_calls": list}


@dataclass(slots=True)
class Call:
    """A call of a tool; `arguments` is text that should be a JSON object, or whatever else the server sent."""

    id: str = ""
    name: str = ""
    arguments: object = ""

    def take(self, fragment: Mapping[str, Any]) -> None:
        function = table(fragment.get("function"))
        self.id = self.id or text(fragment.get("id"))
        self.name = self.name or text(function.get("name"))
        more = function.get("arguments")
        if isinstance(more, str) and isinstance(self.arguments, str):
            self.arguments += text(more)
        elif more is not None:
            self.arguments = more


@dataclass(slots=True)
class Answer:
    """`first` and `last` are when the first and the last token came, `began` and `ended` the request, in seconds of one clock.

    `reasoning_field` is the key that the reasoning came under, `tokens` and `prompt_tokens` what the server counted; `odd` is a
    key of the message, and what came there, where that is of another kind than the protocol's.
    """

    began: float = field(default_factory=time.perf_counter)
    content: str = ""
    reasoning: str = ""
    reasoning_field: str | None = None
    calls: dict[int, Call] = field(default_factory=dict)
    odd: tuple[str, object] | None = None
    finish: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    first: float | None = None
    last: float | None = None
    ended: float | None = None

    def take(self, response: Mapping[str, Any]) -> None:
        """A whole response, or a chunk of one."""
        usage = table(response.get("usage"))
        self.tokens = count(usage.get("completion_tokens"), self.tokens)
        self.prompt_tokens = count(usage.get("prompt_tokens"), self.prompt_tokens)
        choices = response.get("choices")
        choice = table(choices[0]) if isinstance(choices, list) and choices else {}
        self.finish = text(choice.get("finish_reason")) or self.finish
        if self._take_words(table(choice.get("message") or choice.get("delta"))):
            self.last = time.perf_counter()
            self.first = self.first or self.last

    def _take_words(self, message: Mapping[str, Any]) -> bool:
        """Whether there were any."""
        self.odd = self.odd or next(((key, message[key]) for key in KINDS if _is_odd(key, message.get(key))), None)
        content = text(message.get("content"))
        self.content += content
        key = next((key for key in REASONING_FIELDS if text(message.get(key))), None)
        if key is not None:
            self.reasoning += text(message[key])
            self.reasoning_field = self.reasoning_field or key
        calls = message.get("tool_calls")
        fragments = [table(call) for call in calls] if isinstance(calls, list) else []
        for place, fragment in enumerate(fragments):
            self.calls.setdefault(count(fragment.get("index"), place) or 0, Call()).take(fragment)
        return bool(content or key or fragments)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the next request hands it back; the reasoning under the key that it came under."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls.values()
        ]
        said: dict[str, Any] = {"role": "assistant", "content": self.content or None, "tool_calls": calls}
        if not calls:
            del said["tool_calls"]
        return said | ({self.reasoning_field: self.reasoning} if self.reasoning_field else {})

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token of a stream."""
        return None if self.first is None else self.first - self.began

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first, where the server counts them."""
        if self.tokens is None or self.first is None or self.last is None or self.last == self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)


def _is_odd(key: str, value: object) -> bool:
    return value is not None and not isinstance(value, KINDS[key])


def text(value: object) -> str:
    """Without halves of surrogate pairs, which nobody can send back."""
    if not isinstance(value, str):
        return ""
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def count(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def quoted(words: str, most: int = 80) -> str:
    """What a server or a model said, on one line that a terminal can show."""
    line = " ".join("".join(char if char.isprintable() else " " for char in words).split())
    return f"'{line if len(line) <= most else line[: most - 1] + '…'}'"
