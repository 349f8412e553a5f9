"""What is wrong with an answer, and which setting of the server does that: parsers of reasoning and of tool calls first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kconvert.chat.answers import KINDS, Answer, Call, quoted
from kconvert.errors import CheckFailed

# How models spell, in their own text, where reasoning begins and ends and that they call a tool.
THINKING = ("<think>", "</think>", "◁think▷", "◁/think▷", "<|channel|>analysis", "<mm:think>", "</mm:think>")
CALLING = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_end|>",
    "<\uff5ctool▁calls▁begin\uff5c>",
    "<\uff5ctool▁call▁begin\uff5c>",
    "<\uff5cDSML\uff5c",
    "<tool_call>",
    "</tool_call>",
    "<tool_calls>",
    "<minimax:tool_call>",
    "<function=",
    "<invoke name=",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|channel|>commentary to=",
)
TOOL_PARSER = (
    "start the server with this model's --tool-call-parser (kimi_k2 for Kimi-K2; vLLM: --enable-auto-tool-choice too)"
)
REASONING_PARSER = "start the server with this model's --reasoning-parser (kimi_k2 for Kimi-K2-Thinking)"
MISLED_PARSER = (
    "the server's reasoning parser works for a first question and errs behind earlier answers, whose end of reasoning it "
    "takes for this one's: the server's fault"
)

JSON_KINDS: Mapping[type, str] = {str: "a string", list: "a list", dict: "an object", bool: "a truth value"}


@dataclass(frozen=True, slots=True)
class Expected:
    """`reasoning`: there has to be some; `about`: the content has one of these words; `limit`: the request's max_tokens;
    `tools`: it offered some; `parsed`: the server took the reasoning out of the answers to first questions.
    """

    reasoning: bool
    about: Sequence[str]
    limit: int
    tools: bool = False
    parsed: bool = False


def judge(answer: Answer, expected: Expected) -> None:
    """CheckFailed unless the answer is whole: content, reasoning, and neither within the other."""
    _as_the_protocol_has_it(answer)
    _no_nonsense(answer, expected.about)
    _no_markers(answer, expected.tools, expected.parsed)
    if answer.calls:
        raise CheckFailed(f"the model calls {quoted(next(iter(answer.calls.values())).name)} where it has to answer")
    if not answer.content.strip():
        raise CheckFailed(_why_empty(answer, expected.limit))
    if answer.finish == "length":
        raise CheckFailed(
            f"the answer was cut at max_tokens {expected.limit}, after {quoted(answer.content)}; --max-tokens allows more"
        )
    if answer.finish != "stop":
        raise CheckFailed(
            f"finish_reason is {quoted(answer.finish or '')} and not 'stop', after {quoted(answer.content)}: the server broke "
            "the answer off, or clients believe so"
        )
    if expected.reasoning and not answer.reasoning.strip():
        raise CheckFailed(
            f"the answer has content but no reasoning: {REASONING_PARSER}, or say --no-reasoning of a model that does not think"
        )
    if not _speaks_of(answer.content, expected.about):
        raise CheckFailed(
            f"the answer is about something else than the question: {quoted(answer.content)} has not {_either(expected.about)}"
        )


def judge_calls(
    answer: Answer, tool: str, argument: str, limit: int, *, parsed: bool = False
) -> list[dict[str, object]]:
    """The arguments of each call of `tool`. CheckFailed unless there are calls, whole and where a client looks for them."""
    _as_the_protocol_has_it(answer)
    _no_markers(answer, parsed=parsed)
    if not answer.calls:
        text = next(
            (text for text in (answer.content, answer.reasoning) if tool in text and f'"{argument}"' in text), None
        )
        if text is not None:
            raise CheckFailed(f"the tool call is left in the text, {quoted(text[text.index(tool) :])}: {TOOL_PARSER}")
        if answer.finish == "length" or not answer.content.strip():
            raise CheckFailed(_why_empty(answer, limit))
        raise CheckFailed(
            f"the model answers {quoted(answer.content)} and does not call {tool!r}: its chat template offers it no tools, or "
            "the tool-call parser drops what it calls; or say --no-tools of a model that calls none"
        )
    ids = [call.id for call in answer.calls.values()]
    if not all(ids) or len(set(ids)) < len(ids):
        raise CheckFailed("the calls have no ids of their own, so results cannot be told apart: the server's fault")
    found = [_arguments(call, tool, argument) for call in answer.calls.values()]
    if answer.finish != "tool_calls":
        raise CheckFailed(
            f"the model calls {tool!r}, but finish_reason is {quoted(answer.finish or '')} and not 'tool_calls', so clients "
            "that go by it stop: the server's fault"
        )
    return found


def _arguments(call: Call, tool: str, argument: str) -> dict[str, object]:
    if call.name != tool:
        raise CheckFailed(f"the model calls {quoted(call.name)}, which it was not offered: {TOOL_PARSER}")
    try:
        found = json.loads(call.arguments) if isinstance(call.arguments, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        said = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)
        raise CheckFailed(f"the arguments of the call are no JSON object in a string: {quoted(said)}; {TOOL_PARSER}")
    if not isinstance(found.get(argument), str):
        raise CheckFailed(
            f"the arguments of the call, {quoted(str(call.arguments))}, lack {argument!r}, which is required"
        )
    return found


def _as_the_protocol_has_it(answer: Answer) -> None:
    if answer.odd is not None:
        key, found = answer.odd
        raise CheckFailed(
            f"`{key}` is {JSON_KINDS.get(type(found), 'a number')} where OpenAI's protocol has {JSON_KINDS[KINDS[key]]}, so "
            "its clients cannot read it: the server's fault"
        )


def _no_nonsense(answer: Answer, about: Sequence[str]) -> None:
    """Parsers are not to blame where nothing that the model says, wherever it stands, is about the question."""
    said = f"{answer.reasoning} {answer.content}"
    is_odd = not answer.content.strip() or _first((*THINKING, *CALLING), said) is not None
    if said.strip() and is_odd and answer.finish != "length" and not _speaks_of(said, about):
        raise CheckFailed(
            f"the answer is about something else than the question, its reasoning too: {quoted(said)} has not {_either(about)}"
            "; the weights are wrong or made up, or the engine's kernels are: compare with `kconvert verify`"
        )


def _speaks_of(text: str, about: Sequence[str]) -> bool:
    return any(word.casefold() in text.casefold() for word in about)


def _no_markers(answer: Answer, tools: bool = True, parsed: bool = False) -> None:
    if marker := _first(THINKING, answer.content):
        why = MISLED_PARSER if parsed else REASONING_PARSER
        raise CheckFailed(f"the reasoning is left in `content` ({marker} is there): {why}")
    for place, text in (("content", answer.content), (answer.reasoning_field or "reasoning", answer.reasoning)):
        if (marker := _first(CALLING, text)) and not tools:
            raise CheckFailed(
                f"the model calls a tool in its text ({marker} is in `{place}`), and was offered none: the chat template or "
                "the weights"
            )
        if marker:
            raise CheckFailed(f"the tool call is left in the text ({marker} is in `{place}`): {TOOL_PARSER}")


def _why_empty(answer: Answer, limit: int) -> str:
    where = f"`{answer.reasoning_field}`"
    if answer.finish == "length":
        thinking = (
            f" while the model was thinking, so all is in {where} and `content` is empty" if answer.reasoning else ""
        )
        return f"the answer was cut at max_tokens {limit}{thinking}; --max-tokens allows more"
    if answer.reasoning:
        return (
            f"`content` is empty and all is in {where}, though the model came to its end: it ended within its thoughts, or the "
            f"reasoning parser is another model's; {REASONING_PARSER}"
        )
    return "the answer is empty: neither content nor reasoning"


def _first(markers: Iterable[str], text: str) -> str | None:
    return next((marker for marker in markers if marker in text), None)


def _either(words: Sequence[str]) -> str:
    return " or ".join(map(repr, words))
