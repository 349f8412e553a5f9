"""`smoke` against a server whose answers look right, and are not what was asked or what the protocol has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from chat_server import Reply, Script, call, healthy, serving

import kconvert

pytest.importorskip("aiohttp")


def said_of(reply: Callable[[Mapping[str, Any]], Reply], **options: Any) -> dict[str, str]:
    """What each check that failed says of a server that answers so."""
    with serving(Script(reply=reply)) as url:
        report = kconvert.smoke(url, timeout=20, long_words=0, **options)
    return {check.name: check.said for check in report.failed}


def asks_for(city: str) -> Callable[[Mapping[str, Any]], Reply]:
    """A healthy model, but that it looks up this city whatever it is asked."""

    def reply(request: Mapping[str, Any]) -> Reply:
        made = healthy(request)
        return {**made, "tool_calls": [call(json.dumps({"city": city}))]} if "tool_calls" in made else made

    return reply


def test_a_call_for_another_city_than_the_one_asked_about_is_no_pass() -> None:
    found = said_of(asks_for("Paris"))
    assert (
        found["tools"]
        == found["tools-stream"]
        == "the model calls 'get_weather' for 'Paris', and was asked about 'Beijing'"
    )


def test_a_conversation_whose_later_questions_are_not_looked_up_is_no_pass() -> None:
    found = said_of(asks_for("Beijing"))
    assert found == {"calls-in-a-row": "the model calls 'get_weather' for 'Beijing', and was asked about 'Shanghai'"}


@pytest.mark.parametrize("city", ["beijing", "Beijing, China", "北京市"])
def test_a_city_may_be_spelt_as_the_model_likes(city: str) -> None:
    assert said_of(asks_for(city)).keys() == {"calls-in-a-row"}  # whose other cities it does not look up


def test_a_model_that_corrects_itself_passes() -> None:
    def reply(request: Mapping[str, Any]) -> Reply:
        since = [message["role"] for message in request["messages"]][::-1]
        rounds = since.index("user") // 2  # of calls and results
        again = {"tools": request["tools"], "messages": [m for m in request["messages"] if m["role"] == "user"]}
        return asks_for("Paris")(request) if rounds == 0 else healthy(again) if rounds == 1 else healthy(request)

    assert not said_of(lambda request: reply(request) if "tools" in request else healthy(request))


PARTS = [{"type": "text", "text": "9.9 is bigger."}]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"content": PARTS},
            "`content` is a list where OpenAI's protocol has a string, so its clients cannot read it: the server's fault",
        ),
        ({"content": {"text": "9.9"}}, "`content` is an object where OpenAI's protocol has a string"),
        ({"content": 9.9}, "`content` is a number where OpenAI's protocol has a string"),
        ({"content": True}, "`content` is a truth value where OpenAI's protocol has a string"),
        (
            {"content": "9.9 is bigger.", "reasoning_content": PARTS},
            "`reasoning_content` is a list where OpenAI's protocol has a string",
        ),
        (
            {"content": "9.9 is bigger.", "reasoning_content": "Hm.", "tool_calls": {}},
            "`tool_calls` is an object where OpenAI's protocol has a list",
        ),
    ],
)
def test_what_the_protocol_has_otherwise_is_named_and_not_taken_for_an_empty_answer(message: Reply, words: str) -> None:
    body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
    with serving(Script(body=body)) as url:
        report = kconvert.smoke(url, timeout=20, long_words=0, tools=False)
    assert words in report.checks[1].said


def test_deltas_with_lists_of_parts_are_named_as_well() -> None:
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": PARTS}}]})
    with serving(Script(raw_chunk=chunk)) as url:
        report = kconvert.smoke(url, timeout=20, long_words=0, tools=False)
    assert "`content` is a list where OpenAI's protocol has a string" in report.checks[2].said


NONSENSE = "\u00c6\u0135 th<|im_user|>\u00b1 q\u0136"  # what vLLM answered of a sample's weights


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning": NONSENSE},
        {"content": f"{NONSENSE}<|tool_call_begin|>", "reasoning": None},
        {"content": f"{NONSENSE}</think>"},
    ],
)
def test_nonsense_is_no_fault_of_parsers(message: Reply) -> None:
    found = said_of(lambda request: {**message}, tools=False)
    assert found.keys() == {"chat", "stream"}
    assert all("about something else than the question, its reasoning too" in said for said in found.values())
    assert not any("-parser" in said for said in found.values())


def test_a_call_in_the_text_where_no_tools_were_offered_is_no_fault_of_a_parser() -> None:
    text = '9.9. <tool_call>{"name": "get_weather"}</tool_call>'
    found = said_of(lambda request: {"content": text, "reasoning": "Hm."}, tools=False)
    assert found["chat"].startswith(
        "the model calls a tool in its text (<tool_call> is in `content`), and was offered none"
    )


def behind_earlier_answers(key: str) -> Callable[[Mapping[str, Any]], Reply]:
    """vLLM 0.32's kimi_k2 when it streams: it takes the `</think>` of an earlier answer for this one's."""

    def reply(request: Mapping[str, Any]) -> Reply:
        made = healthy(request, key)
        if not request.get("stream") or len(request["messages"]) == 1:
            return made
        return {**made, "content": f"<think>{made.pop(key, 'Hm.')}{made['content'] or ''}"}

    return reply


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_a_parser_that_errs_behind_earlier_answers_alone_is_not_said_to_be_missing(key: str) -> None:
    found = said_of(behind_earlier_answers(key))
    assert found.keys() == {"tools-stream"}
    assert found["tools-stream"].startswith(
        "the reasoning is left in `content` (<think> is there): the server's reasoning"
    )
    assert "--reasoning-parser" not in found["tools-stream"]


def test_a_parser_that_misses_the_first_answer_too_is_said_to_be_missing() -> None:
    found = said_of(lambda request: {**healthy(request), "content": "<think>9.9: Sunny</think>"})
    assert all("--reasoning-parser" in said for said in found.values())
    assert {"chat", "tools", "tools-stream", "calls-in-a-row"} <= found.keys()
