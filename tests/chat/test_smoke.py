"""`smoke` of a healthy server, as a function and as a command."""

import asyncio
import itertools
import json

import pytest
from chat_server import Script, call, calls, healthy, says, serving, verdicts

import kconvert

pytest.importorskip("aiohttp")
EVERY = ["models", "chat", "stream", "tools", "tools-stream", "calls-in-a-row", "long-input"]
THOUGHT = "9 tenths are more than 11 hundredths."


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


def test_a_model_that_neither_thinks_nor_calls_tools_passes_when_one_says_so(smoke):
    report = smoke(says({"content": "9.9 is bigger."}), reasoning=False, tools=False)
    assert report.passed
    assert [check.name for check in report.checks] == ["models", "chat", "stream", "long-input"]
    assert "no reasoning" in report.checks[1].said


def test_one_bad_chat_among_many_is_told(smoke):
    number = itertools.count(1)
    bad = {"content": "9.9 </think>"}
    script = Script(reply=lambda request: healthy(request) if next(number) <= 7 else dict(bad))
    report = smoke(script, tools=False, long_words=0, concurrency=8)
    assert (
        "3 of 8 chats at once failed, the first so: the reasoning is left in `content`" in verdicts(report)["at-once"]
    )


def test_the_command_prints_a_line_for_each_check_and_ends_with_0(run_command):
    with serving(Script()) as url:
        result = run_command(url, "--concurrency", 3)
    assert result.returncode == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["ok", name] for name in [*EVERY, "at-once"]]


def test_the_command_ends_with_1_and_the_first_check_that_failed(run_command):
    with serving(says({"content": f"<think>{THOUGHT}</think>9.9 is bigger."})) as url:
        result = run_command(url, "--no-tools")
    assert result.returncode == 1
    assert result.stderr.startswith("failed: chat: the reasoning is left in `content`")
    assert "(2 more checks failed)" in result.stderr


def test_json_has_the_whole_report_when_a_check_failed_too(run_command):
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
