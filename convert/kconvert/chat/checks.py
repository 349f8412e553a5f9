"""The checks of `kconvert smoke`, in the order in which they run: the chats of Kimi-K2-Thinking's model card, and more of them.

A check is a coroutine function that returns what it found, in words, or raises CheckFailed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from kconvert.chat.answers import Answer, quoted
from kconvert.chat.judging import Expected, judge, judge_calls
from kconvert.chat.server import Server
from kconvert.errors import CheckFailed, counted

QUESTION = "Which one is bigger, 9.11 or 9.9? Think carefully."
ABOUT = ("9.9", "9.11")
CITIES = {"Beijing": "北京", "Shanghai": "上海", "Guangzhou": "广州"}  # and in the words of who answers in Chinese
WEATHER = {"weather": "Sunny", "temperature": "23"}
TOOL = "get_weather"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Look up the current weather. Call this when the user asks about the weather.",
            "parameters": {
                "type": "object",
                "required": ["city"],
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
            },
        },
    }
]
MOST_ROUNDS = 4  # of calls before an answer

Messages = list[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds until the first token, and tokens a second after it (None where the server counts none); `chats` at once."""

    chats: int
    first_token: float
    tokens_per_second: float | None


@dataclass(slots=True)
class Talk:
    """What the checks share. `fields` are the keys that reasoning came under, streaming or not."""

    server: Server
    model: str
    reasoning: bool
    max_tokens: int
    long_words: int
    concurrency: int
    timings: list[Timing] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)

    async def ask(self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **request: Any) -> Answer:
        request = {"model": self.model, "max_tokens": self.max_tokens, "temperature": 1.0, **request}
        return await self.server.chat(messages, stream=stream, **request)

    async def answer(self, question: str, *, stream: bool) -> Answer:
        """A whole answer to the question of the two numbers."""
        answer = await self.ask([{"role": "user", "content": question}], stream=stream)
        judge(answer, Expected(self.reasoning, ABOUT, self.max_tokens))
        return answer

    async def use_tool(self, messages: Messages, city: str, *, stream: bool) -> tuple[int, Answer]:
        """How many calls the model made for the last of `messages`, and its answer; both are appended to `messages`.

        CheckFailed unless one of the calls is about the `city`."""
        asked: list[str] = []
        for _ in range(MOST_ROUNDS):
            parsed = len(messages) > 1 and ("deltas" if stream else "message") in self.fields
            answer = await self.ask(messages, stream=stream, tools=TOOLS, tool_choice="auto")
            if asked and not answer.calls and answer.finish != "tool_calls":
                if not any(_is_about(city, given) for given in asked):
                    raise CheckFailed(f"the model calls {TOOL!r} for {quoted(asked[0])}, and was asked about {city!r}")
                judge(answer, Expected(False, tuple(WEATHER.values()), self.max_tokens, tools=True, parsed=parsed))
                messages.append(answer.message)
                return len(asked), answer
            arguments = judge_calls(answer, TOOL, "city", self.max_tokens, parsed=parsed)
            asked += [str(given["city"]) for given in arguments]
            messages.append(answer.message)
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"city": given["city"], **WEATHER})}
                for call, given in zip(answer.calls.values(), arguments, strict=True)
            ]
        raise CheckFailed(
            f"the model goes on calling {TOOL!r} after {counted(len(asked), 'result')} instead of answering"
        )


async def chat(talk: Talk) -> str:
    answer = await talk.answer(QUESTION, stream=False)
    return _said(talk, answer, "message")


async def stream(talk: Talk) -> str:
    answer = await talk.answer(QUESTION, stream=True)
    said = _said(talk, answer, "deltas")
    if answer.first_token is not None:
        talk.timings.append(Timing(1, answer.first_token, answer.rate))
        said += f"; {_timing(talk.timings[-1])}"
    return said


async def tools(talk: Talk) -> str:
    return await _weather(talk, [*CITIES][:1], stream=False)


async def tools_stream(talk: Talk) -> str:
    return await _weather(talk, [*CITIES][:1], stream=True)


async def calls_in_a_row(talk: Talk) -> str:
    return await _weather(talk, [*CITIES], stream=False)


async def long_input(talk: Talk) -> str:
    """The numbers stand before the filler, the question behind."""
    filler = " ".join(f"Line {number} says nothing about them." for number in range(1, talk.long_words // 6 + 2))
    asked = f"Keep the numbers 9.11 and 9.9 in mind. {filler} Which of the two numbers at the beginning is bigger?"
    answer = await talk.answer(asked, stream=False)
    tokens = "" if answer.prompt_tokens is None else f" ({counted(answer.prompt_tokens, 'token')})"
    return f"{counted(len(asked.split()), 'word')}{tokens} read, {_end(answer.content)}"


async def at_once(talk: Talk) -> str:
    began = time.perf_counter()
    asked = (talk.answer(QUESTION, stream=True) for _ in range(talk.concurrency))
    found = await asyncio.gather(*asked, return_exceptions=True)
    seconds = time.perf_counter() - began
    failed = [error for error in found if isinstance(error, BaseException)]
    for error in failed:
        if isinstance(error, CheckFailed):
            raise type(error)(f"{len(failed)} of {talk.concurrency} chats at once failed, the first so: {error}")
        raise error
    answers = [answer for answer in found if isinstance(answer, Answer)]
    counts = [answer.tokens for answer in answers if answer.tokens is not None]
    rate = sum(counts) / seconds if len(counts) == len(answers) else None
    timing = Timing(talk.concurrency, median(answer.first_token or 0.0 for answer in answers), rate)
    talk.timings.append(timing)
    return f"{counted(talk.concurrency, 'chat')} answered in {seconds:.2f} s; {_timing(timing)} together"


Checker = Callable[[Talk], Awaitable[str]]
CHATS: Mapping[str, Checker] = {"chat": chat, "stream": stream}
CALLS: Mapping[str, Checker] = {"tools": tools, "tools-stream": tools_stream, "calls-in-a-row": calls_in_a_row}
LONG: Mapping[str, Checker] = {"long-input": long_input}
AT_ONCE: Mapping[str, Checker] = {"at-once": at_once}


async def _weather(talk: Talk, cities: Sequence[str], *, stream: bool) -> str:
    messages: Messages = []
    calls = 0
    for city in cities:
        messages.append({"role": "user", "content": f"What is the weather in {city} today? Use the tool to check."})
        more, answer = await talk.use_tool(messages, city, stream=stream)
        calls += more
    return f"{counted(calls, 'call')}, arguments that parse, {_end(answer.content)}"


def _is_about(city: str, given: str) -> bool:
    return city.casefold() in given.casefold() or CITIES[city] in given


def _said(talk: Talk, answer: Answer, where: str) -> str:
    if answer.reasoning_field is None:
        return f"{_end(answer.content)}, no reasoning"
    talk.fields[where] = answer.reasoning_field
    return f"{_end(answer.content)}, reasoning in `{answer.reasoning_field}`"


def _end(content: str) -> str:
    """The end of an answer: where the conclusion stands."""
    content = content.strip()
    return f"answered {quoted(content if len(content) <= 60 else '…' + content[-59:])}"


def _timing(timing: Timing) -> str:
    rate = "" if timing.tokens_per_second is None else f", {timing.tokens_per_second:.1f} tokens/s"
    return f"first token after {timing.first_token:.2f} s{rate}"
