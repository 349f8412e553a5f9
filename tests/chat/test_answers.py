"""Answers, calls and streams that are not whole, by what is wrong with them."""

import pytest
from chat_server import Script, call, calls, says, verdicts

pytest.importorskip("aiohttp")
THOUGHT = "9 tenths are more than 11 hundredths."
REASONING_IN_CONTENT = {"content": f"<think>{THOUGHT}</think>9.9 is bigger."}
HALF_A_TAG = {"content": f"{THOUGHT}</think>9.9 is bigger."}
CUT = {"content": None, "reasoning": THOUGHT, "finish_reason": "length"}
ALL_REASONING = {"content": None, "reasoning": f"{THOUGHT} 9.9 is bigger."}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            REASONING_IN_CONTENT,
            "reasoning is left in `content` (<think> is there): start the server with this model's --rea",
        ),
        (HALF_A_TAG, "reasoning is left in `content` (</think> is there)"),
        (CUT, "cut at max_tokens 4096 while the model was thinking, so all is in `reasoning` and `content` is empty"),
        (ALL_REASONING, "`content` is empty and all is in `reasoning`, though the model came to its end"),
        ({"content": "9.9 is bigger."}, "no reasoning: start the server with this model's --reasoning-parser"),
        ({"content": "9.9", "finish_reason": "length", "reasoning": "x"}, "was cut at max_tokens 4096, after '9.9'"),
        ({"content": ""}, "the answer is empty: neither content nor reasoning"),
        ({"content": "!!!!!!!!", "reasoning": "!!"}, "something else than the question: '!!!!!!!!'"),
        ({"content": "9.9 \x1b[2J", "reasoning": "<|tool_call_end|>"}, "(<|tool_call_end|> is in `reasoning`)"),
        (
            {"tool_calls": [call()], "finish_reason": "tool_calls"},
            "the model calls 'get_weather' where it has to answer",
        ),
    ],
)
def test_a_chat_that_is_not_whole_is_named_streaming_and_not(smoke, reply, words):
    found = verdicts(smoke(says(reply), tools=False, long_words=0))
    assert found.keys() == {"chat", "stream"}
    assert all(words in said for said in found.values())


IN_TEXT = '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0{"city": "Beijing"}<|tool_call_end|>'


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            {"content": IN_TEXT},
            "left in the text (<|tool_calls_section_begin|> is in `content`): start the server with this",
        ),
        ({"content": None, "reasoning": IN_TEXT}, "(<|tool_calls_section_begin|> is in `reasoning`)"),
        ({"content": '<tool_call>{"name": "get_weather"}</tool_call>'}, "(<tool_call> is in `content`)"),
        (
            {"content": 'functions.get_weather:0{"city": "Beijing"}'},
            'left in the text, \'get_weather:0{"city": "Beijing"}\'',
        ),
        ({"content": "I think it rains."}, "rains.' and does not call 'get_weather': its chat template offers it no"),
        ({"content": None, "reasoning": "Hm", "finish_reason": "length"}, "cut at max_tokens 4096 while the model was"),
        (
            {"tool_calls": [call('{"city": "Bei')], "finish_reason": "tool_calls"},
            'no JSON object in a string: \'{"city": "Bei\'',
        ),
        ({"tool_calls": [call("[1]")], "finish_reason": "tool_calls"}, "no JSON object in a string: '[1]'"),
        ({"tool_calls": [call('{"town": "x"}')], "finish_reason": "tool_calls"}, "lack 'city', which is required"),
        ({"tool_calls": [call(name="rain")], "finish_reason": "tool_calls"}, "calls 'rain', which it was not offered"),
        ({"tool_calls": [call()], "finish_reason": "stop"}, "finish_reason is 'stop' and not 'tool_calls'"),
        ({"tool_calls": [call(id="")], "finish_reason": "tool_calls"}, "the calls have no ids of their own"),
        ({"tool_calls": [call(), call()], "finish_reason": "tool_calls"}, "the calls have no ids of their own"),
    ],
)
def test_a_tool_call_that_no_client_could_use_is_named_streaming_and_not(smoke, reply, words):
    found = verdicts(smoke(calls(reply), long_words=0))
    assert found.keys() == {"tools", "tools-stream", "calls-in-a-row"}
    assert all(words in said for said in found.values())


def test_arguments_that_are_no_string_are_named(smoke):
    found = verdicts(
        smoke(calls({"tool_calls": [call({"city": "Beijing"})], "finish_reason": "tool_calls"}), long_words=0)
    )
    assert 'no JSON object in a string: \'{"city": "Beijing"}\'' in found["tools"]


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ({"content": "I cannot know."}, "'I cannot know.' has not 'Sunny' or '23'"),
        ({"tool_calls": [call()], "finish_reason": "tool_calls"}, "goes on calling 'get_weather' after 4 results"),
    ],
)
def test_an_answer_has_to_use_what_the_tool_said(smoke, then, words):
    good = {"tool_calls": [call()], "finish_reason": "tool_calls"}
    found = verdicts(smoke(calls(good, then), long_words=0))
    assert words in found["tools"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(cut_after=3), "the stream ended after '0.9 is more' without a finish_reason"),
        (Script(cut_after=3, clean_cut=True), "the stream ended after '0.9 is more' without a finish_reason"),
        (Script(cut_after=0, clean_cut=True), "holds no events with words"),
        (Script(cut_after=0), "closed the connection without a whole answer"),
        (Script(raw_chunk="{nonsense"), "a chunk that is no JSON object"),
        (
            Script(raw_chunk='{"error": {"message": "CUDA out of memory"}}'),
            "broke off with an error: 'CUDA out of memory'",
        ),
    ],
)
def test_a_stream_that_breaks_is_named_while_the_rest_goes_well(smoke, script, words):
    report = smoke(script, tools=False, long_words=0)
    assert [check.passed for check in report.checks] == [True, True, False]
    assert words in report.checks[2].said


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            Script(status=500, body=b'{"error": {"message": "out of\\nmemory \\u001b[2J"}}'),
            "answers 500: 'out of memory [2J'",
        ),
        (
            Script(status=400, body=b'{"message": "needs --enable-auto-tool-choice"}'),
            "answers 400: 'needs --enable-auto-tool",
        ),
        (Script(body=b'{"error": {"message": "out of memory"}}'), "answers 200, but with an error: 'out of memory'"),
        (Script(body=b'{"error": {"message": "Bearer my-key is unknown"}}'), "an error: 'Bearer (the key) is unknown'"),
        (Script(body=b"<html>"), "is no chat completion"),
        (Script(body=b'{"choices": [7], "usage": 3}'), "is no chat completion"),
        (Script(body=b"[" * 100_000), "is no chat completion"),
    ],
)
def test_what_is_no_answer_is_named_in_the_servers_own_words(smoke, script, words):
    assert words in verdicts(smoke(script, tools=False, api_key="my-key"))["chat"]


def test_a_chunk_that_is_nested_too_deep_is_one_sentence(smoke):
    report = smoke(Script(raw_chunk="[" * 100_000), tools=False)
    assert verdicts(report) == {"stream": "the stream has a chunk that is no JSON object"}
