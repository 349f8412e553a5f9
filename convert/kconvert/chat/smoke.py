"""Whether a served model answers: every check of `checks`, one after the other, against one server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from kconvert.chat.answers import quoted
from kconvert.chat.checks import AT_ONCE, CALLS, CHATS, LONG, Checker, Talk, Timing
from kconvert.chat.faults import Unanswered
from kconvert.chat.server import MOST_AT_ONCE, Server, connected
from kconvert.errors import CheckFailed, KconvertError


@dataclass(frozen=True, slots=True)
class Check:
    """What a check found, or what is wrong, in words."""

    name: str
    passed: bool
    said: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """`reasoning_fields` are the keys that reasoning came under, of the `message` and of the `deltas`; `not_run` the checks
    that were left when the server stopped answering."""

    url: str
    model: str
    checks: tuple[Check, ...]
    not_run: tuple[str, ...]
    reasoning_fields: Mapping[str, str]
    timings: tuple[Timing, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


def smoke(
    url: str,
    model: str | None = None,
    *,
    api_key: str | None = None,
    timeout: float = 600.0,
    max_tokens: int = 4096,
    reasoning: bool = True,
    tools: bool = True,
    long_words: int = 2000,
    concurrency: int = 1,
    told: Callable[[Check], None] | None = None,
) -> SmokeReport:
    """Ask the OpenAI-compatible server at `url` (up to /v1) whether its `model` answers as its users will ask it.

    Chats streaming and not, tool calls (unless not `tools`), several in a row, an input of `long_words` words (0: none), and
    `concurrency` chats at once (1: none). An answer may take `timeout` seconds and `max_tokens` tokens; `reasoning` has to be
    there beside the content. `told` gets each check when it has ended. Needs the package `openai` with aiohttp.

    KconvertError when there is no such server, it wants another key, or it serves several models and none is named. What is
    wrong with the answers is in the report.
    """
    if not timeout > 0 or max_tokens < 1 or long_words < 0 or not 1 <= concurrency <= MOST_AT_ONCE:
        raise KconvertError(
            f"timeout is positive, max_tokens at least 1, long_words not negative and concurrency between 1 and {MOST_AT_ONCE}"
        )
    checks: dict[str, Checker] = {**CHATS, **(CALLS if tools else {}), **(LONG if long_words else {})}
    checks |= AT_ONCE if concurrency > 1 else {}

    async def run() -> SmokeReport:
        found: list[Check] = []

        def tell(check: Check) -> None:
            found.append(replace(check, said=_without(api_key, check.said)))
            if told is not None:
                told(found[-1])

        async with connected(url, api_key, timeout) as server:
            began = time.perf_counter()
            name = _chosen(server, await server.models(), model)
            tell(Check("models", True, f"{quoted(name)} is served", time.perf_counter() - began))
            talk = Talk(server, name, reasoning, max_tokens, long_words, concurrency)
            left = await _run(talk, checks, tell)
            return SmokeReport(server.url, name, tuple(found), left, talk.fields, tuple(talk.timings))

    try:
        return _finished(run)
    except KconvertError as error:
        raise type(error)(_without(api_key, str(error))) from None


def _without(api_key: str | None, said: str) -> str:
    """Servers repeat the key that they were given."""
    return said.replace(api_key, "(the key)") if api_key else said


async def _run(talk: Talk, checks: Mapping[str, Checker], tell: Callable[[Check], None]) -> tuple[str, ...]:
    """Returns the checks that are left when the server is gone."""
    for place, (name, check) in enumerate(checks.items(), 1):
        began = time.perf_counter()
        gone = False
        try:
            passed, said = True, await check(talk)
        except CheckFailed as error:
            passed, said, gone = False, str(error), isinstance(error, Unanswered)
        tell(Check(name, passed, said, time.perf_counter() - began))
        if gone:
            return tuple(checks)[place:]
    return ()


def _chosen(server: Server, names: list[str], model: str | None) -> str:
    listed = ", ".join(map(quoted, names[:8])) + (" and more" if len(names) > 8 else "")
    if not names:
        raise KconvertError(f"{server.url} lists no model; is it still loading?")
    if model is None and len(names) > 1:
        raise KconvertError(f"{server.url} serves {listed}: choose one with --model")
    if model is not None and model not in names:
        raise KconvertError(f"{server.url} serves no model {quoted(model)} but {listed}; name that with --model")
    return model or names[0]


def _finished(run: Callable[[], Coroutine[Any, Any, SmokeReport]]) -> SmokeReport:
    """Run to the end, within a program that has a loop of its own (a notebook) too."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(lambda: asyncio.run(run())).result()
