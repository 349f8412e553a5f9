"""A server that speaks OpenAI's protocol, asked with the client `openai`: every way it can fail is one sentence."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from kconvert.chat.answers import Answer, quoted, table, text
from kconvert.chat.events import Events
from kconvert.chat.faults import Unanswered, explained, words
from kconvert.errors import CheckFailed, KconvertError

if TYPE_CHECKING:
    from httpx2 import Response
    from openai import AsyncOpenAI

T = TypeVar("T")
LISTING = 10.0  # seconds; a server that is up lists its models at once
MOST_AT_ONCE = 1000  # connections that the client opens
MOST_BYTES = 1 << 28  # of an answer: what engines need for half a million tokens in events of their own


class Server:
    """`url` is up to /v1; an answer may take `timeout` seconds in all, and a connection as long."""

    def __init__(self, client: AsyncOpenAI, url: str, timeout: float, has_key: bool) -> None:
        self.url = url
        self._client = client
        self._timeout = timeout
        self._has_key = has_key

    async def models(self) -> list[str]:
        """The names of the models. KconvertError when there is no such server."""
        try:
            return await self._bounded(self._list(), min(self._timeout, LISTING))
        except Unanswered as error:
            raise KconvertError(str(error)) from None
        except CheckFailed as error:
            raise KconvertError(f"{self.url}/models: {error}") from None

    async def chat(self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **request: Any) -> Answer:
        """What is answered to `messages`; `request` as in the protocol. CheckFailed when none comes, or half of one."""
        asked = {**request, "messages": list(messages)}
        return await self._bounded(self._stream(asked) if stream else self._complete(asked), self._timeout)

    async def _list(self) -> list[str]:
        body = await _read(await self._opened(self._client.get, "/models"))
        data = _document(body).get("data")
        if not isinstance(data, list):
            ends_so = self.url.endswith("/v1")
            raise KconvertError(
                f"{self.url}/models answers{_begin(body) or ' nothing'}, but with no list of models; "
                + ("what does its log say?" if ends_so else "the address of a server of OpenAI's protocol ends in /v1")
            )
        return [name for model in data if (name := text(table(model).get("id")))]

    async def _complete(self, request: Mapping[str, Any]) -> Answer:
        answer = Answer()
        body = await _read(await self._opened(self._client.post, "/chat/completions", body=request))
        response = _document(body)
        answer.take(response)
        answer.ended = time.perf_counter()
        if response.get("error"):
            raise CheckFailed(f"the server answers 200, but with an error{words(response)}")
        if answer.finish is None:
            raise CheckFailed(
                f"the server's answer{_begin(body)} is no chat completion: it has no choice with a finish_reason"
            )
        return answer

    async def _stream(self, request: Mapping[str, Any]) -> Answer:
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        answer, events = Answer(), Events()
        opened = await self._opened(self._client.post, "/chat/completions", body=body)
        try:
            await _fed(opened, lambda data: _taken(answer, events.of(data)))
        except Exception as error:
            if answer.first is not None and _is_transport(error):
                raise _cut_short(answer) from None
            raise
        answer.ended = time.perf_counter()
        if answer.finish is None:
            raise _cut_short(answer)
        return answer

    async def _opened(self, method: Any, path: str, **request: Any) -> Response:
        """The answer, its body unread: making objects of it is most of what the client costs where many chats run at once."""
        from httpx2 import Response

        opened: Response = await method(path, cast_to=Response, stream=True, **request)
        return opened

    async def _bounded(self, asked: Coroutine[Any, Any, T], seconds: float) -> T:
        from aiohttp import ClientError
        from httpx2 import HTTPError
        from openai import OpenAIError

        try:
            return await asyncio.wait_for(asked, seconds)
        except asyncio.TimeoutError:
            longer = " --timeout waits longer" if seconds == self._timeout else ""
            raise Unanswered(
                f"{self.url} gave no whole answer within {seconds:g} s; is the server overloaded, or still loading?{longer}"
            ) from None
        except (OpenAIError, HTTPError, ClientError) as error:
            raise explained(error, self.url, self._has_key) from None


@asynccontextmanager
async def connected(url: str, api_key: str | None, timeout: float) -> AsyncIterator[Server]:
    """The server at `url`. KconvertError when that is no address, the key is none, or the client is not installed."""
    try:
        import aiohttp  # noqa: F401
        from httpx2 import Limits
        from openai import AsyncOpenAI, DefaultAioHttpClient
    except ModuleNotFoundError:
        raise KconvertError("asking a server needs openai[aiohttp]: pip install 'kconvert-toolkit[smoke]'") from None
    base = address(url)
    if not all("!" <= char <= "~" for char in api_key or ""):
        raise KconvertError(
            "the key that was given with --api-key or in OPENAI_API_KEY is none: it has a blank, a line break, or a letter "
            "beyond ASCII"
        )
    parts = urlsplit(base)
    asked = base.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1)
    # A connection for each request: the server may close one that waits just as it is used again.
    limits = Limits(max_connections=MOST_AT_ONCE, keepalive_expiry=0)
    password = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    # The time is bounded for an answer as a whole; to watch each read as well costs as much as the read.
    settings: dict[str, Any] = {"timeout": None, "max_retries": 0}
    http = DefaultAioHttpClient(timeout=None, limits=limits, auth=password)
    async with AsyncOpenAI(base_url=asked, api_key=api_key or "none", http_client=http, **settings) as client:
        yield Server(client, asked, timeout, bool(api_key))


def address(url: str) -> str:
    """'localhost:8000' -> 'http://localhost:8000/v1'; a path that is there stays."""
    whole = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parts = urlsplit(whole)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80) > 0
    except ValueError:
        sound = False
    if not sound or any(char.isspace() or not char.isprintable() for char in whole) or parts.query or parts.fragment:
        raise KconvertError(f"{quoted(url)} is no address of a server; give one such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/models")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _document(body: bytes) -> Mapping[str, Any]:
    """Nothing, where a body is no JSON object."""
    try:
        return table(json.loads(body))
    except (ValueError, RecursionError):
        return {}


def _begin(body: bytes) -> str:
    """How a body begins, behind a word; nothing, where it is empty."""
    shown = body[:400].decode("utf-8", "replace").strip()
    return f" {quoted(shown)}" if shown else ""


async def _read(response: Response) -> bytes:
    body = bytearray()
    await _fed(response, body.extend)
    return bytes(body)


async def _fed(response: Response, take: Callable[[bytes], object]) -> None:
    """The body, as it comes, to `take`, until that says that it has all."""
    size = 0
    try:
        async for data in response.aiter_bytes():
            size += len(data)
            if size > MOST_BYTES:
                raise CheckFailed(
                    f"the server sends on after {MOST_BYTES >> 20} MiB of an answer: it ends nowhere, or heeds no max_tokens"
                )
            if take(data):
                break
    finally:
        await response.aclose()


def _taken(answer: Answer, events: Iterable[bytes]) -> bool:
    """Whether these are the last events of the stream."""
    for event in events:
        if event.startswith(b"[DONE]"):
            return True
        chunk = _chunk(event)
        if chunk.get("error"):
            raise CheckFailed(f"the server broke off with an error{words(chunk)}")
        answer.take(chunk)
    return False


def _chunk(event: bytes) -> Mapping[str, Any]:
    try:
        chunk = json.loads(event)
    except (ValueError, RecursionError):
        chunk = None
    if not isinstance(chunk, dict):
        raise CheckFailed("the stream has a chunk that is no JSON object")
    return chunk


def _is_transport(error: Exception) -> bool:
    from aiohttp import ClientError
    from httpx2 import TransportError

    return isinstance(error, (TransportError, ClientError))


def _cut_short(answer: Answer) -> CheckFailed:
    if answer.last is None:
        return CheckFailed("the server does not stream: what it answers to stream=true holds no events with words")
    last = answer.content or answer.reasoning
    said = f" after {quoted(last)}" if last else ""
    lacks = "without a finish_reason" if answer.finish is None else "behind its finish_reason, and not as HTTP ends it"
    return CheckFailed(f"the stream ended{said} {lacks}: it was cut short, by the server or a proxy")
