"""`smoke` against a scripted server: what it says of a healthy one, and of every fault that a real one may have."""

import asyncio
import itertools
import json
import subprocess
import time

import pytest
from chat_server import Script, call, healthy, serving
from click.testing import CliRunner

import kconvert
from kconvert import CheckFailed, KconvertError
from kconvert.chat.server import address
from kconvert.cli import main

pytest.importorskip("aiohttp")
EVERY = ["models", "chat", "stream", "tools", "tools-stream", "calls-in-a-row", "long-input"]
THOUGHT = "9 tenths are more than 11 hundredths."


@pytest.fixture
def smoke():
    """`smoke(script, **options)` is the report on a server that follows the script."""

    def run(script, **options):
        with serving(script) as url:
            return kconvert.smoke(url, **{"timeout": 20, **options})

    return run


def run_command(*arguments):
    result = CliRunner().invoke(main, ["smoke", *map(str, arguments)], prog_name="kconvert")
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def says(reply):
    """A script that answers every chat the same."""
    return Script(reply=lambda request: dict(reply))


def calls(reply, then=None):
    """A healthy script, but for its calls of tools, and for its answer to their results."""

    def answer(request):
        last = request["messages"][-1]["role"]
        if last == "tool" and then is not None:
            return dict(then)
        return dict(reply) if last == "user" and "tools" in request else healthy(request)

    return Script(reply=answer)


def verdicts(report):
    return {check.name: check.said for check in report.failed}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_a_healthy_server_passes_whatever_it_calls_the_reasoning(smoke, key):
    report = smoke(Script(reply=lambda request: healthy(request, key)), concurrency=4)
    assert report.passed
    assert [check.name for check in report.checks] == [*EVERY, "at-once"]
    assert dict(report.reasoning_fields) == {"message": key, "deltas": key}
    assert [timing.chats for timing in report.timings] == [1, 4]
    assert all(timing.first_token >= 0 and timing.tokens_per_second > 0 for timing in report.timings)


def test_the_reasoning_goes_back_to_the_server_under_its_own_name_with_the_calls(smoke):
    script = Script(reply=lambda request: healthy(request, "reasoning"))
    assert smoke(script).passed
    longest = max((request["messages"] for request in script.requests), key=len)
    assert [message["role"] for message in longest] == ["user", "assistant", "tool", "assistant"] * 2 + [
        "user",
        "assistant",
        "tool",
    ]
    called, result = longest[1:3]
    assert called["reasoning"] == "I look it up."
    assert called["tool_calls"][0]["id"] == result["tool_call_id"] == "functions.get_weather:0"


def test_several_calls_in_one_answer_get_a_result_each(smoke):
    cities = ("Beijing", "Shanghai", "Guangzhou")
    made = [call(json.dumps({"city": city}), id=city) for city in cities]
    report = smoke(calls({"tool_calls": made, "finish_reason": "tool_calls"}))
    assert report.passed
    assert [check.said.split(",")[0] for check in report.checks[3:6]] == ["3 calls", "3 calls", "9 calls"]


def test_a_server_that_counts_no_tokens_gets_no_rate(smoke):
    report = smoke(Script(usage=False))
    assert report.passed
    assert report.timings[0].tokens_per_second is None


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


def test_a_model_that_neither_thinks_nor_calls_tools_passes_when_one_says_so(smoke):
    report = smoke(says({"content": "9.9 is bigger."}), reasoning=False, tools=False)
    assert report.passed
    assert [check.name for check in report.checks] == ["models", "chat", "stream", "long-input"]
    assert "no reasoning" in report.checks[1].said


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


@pytest.mark.parametrize("script", [Script(delay=3), Script(comments=3)], ids=["silent", "keeps the connection alive"])
def test_a_server_that_hangs_is_waited_for_once(smoke, script):
    began = time.monotonic()
    report = smoke(script, timeout=0.4)
    assert time.monotonic() - began < 2.5
    assert "gave no whole answer within 0.4 s" in report.failed[0].said
    assert "calls-in-a-row" in report.not_run


def test_one_bad_chat_among_many_is_told(smoke):
    number = itertools.count(1)
    bad = {"content": "9.9 </think>"}
    script = Script(reply=lambda request: healthy(request) if next(number) <= 7 else dict(bad))
    report = smoke(script, tools=False, long_words=0, concurrency=8)
    assert (
        "3 of 8 chats at once failed, the first so: the reasoning is left in `content`" in verdicts(report)["at-once"]
    )


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        (Script(key="secret"), {}, "wants a key (401): give its own with --api-key or in OPENAI_API_KEY"),
        (Script(key="secret"), {"api_key": "other"}, "does not take the key that it was given (401)"),
        (Script(models=("a", "b")), {}, "serves 'a', 'b': choose one with --model"),
        (Script(models=("a",)), {"model": "c"}, "serves no model 'c' but 'a'"),
        (Script(models=()), {}, "lists no model"),
        (Script(listing=b"<html>", content_type="text/html"), {}, "but with no list of models"),
        (Script(listing=b'{"data": 3}'), {}, "3}', but with no list of models; what does its log say?"),
        (Script(listing=b" "), {}, "/v1/models answers nothing, but with no list of models"),
        (Script(listing=b'{"error": "Loading"}', listing_status=503), {}, "/models: the server answers 503: 'Loading'"),
        (Script(), {"concurrency": 1001}, "concurrency between 1 and 1000"),
        (Script(), {"timeout": 0}, "timeout is positive, max_tokens at least 1"),
    ],
)
def test_no_such_server_or_model_is_an_error_and_no_failed_check(smoke, script, options, words):
    with pytest.raises(KconvertError) as found:
        smoke(script, **options)
    assert words in str(found.value)
    assert not isinstance(found.value, CheckFailed)
    assert "other" not in str(found.value)


def test_a_key_that_fits_opens(smoke):
    assert smoke(Script(key="secret"), api_key="secret", tools=False).passed


@pytest.mark.parametrize(
    ("path", "words"),
    [("http://127.0.0.1:{port}/v2", "has no /v2/models (404)"), ("http://127.0.0.1:1", "nothing listens there")],
)
def test_an_address_without_a_server_is_one_sentence_and_exit_2(path, words):
    with serving(Script()) as url:
        result = run_command(path.format(port=url.split(":")[2].split("/")[0]))
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://host:1/", "http://host:1/v1"),
        ("https://host/api/v1/", "https://host/api/v1"),
        ("http://host:1/v1/chat/completions", "http://host:1/v1"),
        ("http://[::1]:30000", "http://[::1]:30000/v1"),
    ],
)
def test_an_address_may_be_typed_short(typed, meant):
    assert address(typed) == meant


@pytest.mark.parametrize(
    "typed", ["", "http://", "ftp://host", "http://host:99999", "a b", "http://h/?x=1", "http://[::1"]
)
def test_what_is_no_address_is_refused(typed):
    with pytest.raises(KconvertError, match="is no address of a server"):
        address(typed)


def test_the_command_prints_a_line_for_each_check_and_ends_with_0():
    with serving(Script()) as url:
        result = run_command(url, "--concurrency", 3)
    assert result.returncode == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["ok", name] for name in [*EVERY, "at-once"]]


def test_the_command_ends_with_1_and_the_first_check_that_failed():
    with serving(says(REASONING_IN_CONTENT)) as url:
        result = run_command(url, "--no-tools")
    assert result.returncode == 1
    assert result.stderr.startswith("failed: chat: the reasoning is left in `content`")
    assert "(2 more checks failed)" in result.stderr


def test_json_has_the_whole_report_when_a_check_failed_too():
    with serving(says({"content": "9.9 is bigger."})) as url:
        result = run_command(url, "--json", "--no-tools", "--long-words", 0)
    document = json.loads(result.stdout)
    assert result.returncode == 1
    assert document["passed"] is False
    assert [check["passed"] for check in document["checks"]] == [True, False, False]
    assert document.keys() == {"url", "model", "checks", "not_run", "reasoning_fields", "timings", "passed"}


def test_a_program_that_runs_a_loop_of_its_own_may_call_it():
    async def notebook(url):
        return kconvert.smoke(url, tools=False, long_words=0)

    with serving(Script()) as url:
        assert asyncio.run(notebook(url)).passed
