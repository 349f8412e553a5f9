"""A server that speaks OpenAI's protocol, asked with the client `openai`: every way it can fail is one sentence."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from kconvert.chat.answers import Answer, quoted, table, text
from kconvert.errors import CheckFailed, KconvertError

if TYPE_CHECKING:
    from openai import APIConnectionError, AsyncOpenAI

T = TypeVar("T")
LISTING = 10.0  # seconds; a server that is up lists its models at once


class Unanswered(CheckFailed):
    """The server is gone or hangs: asking on would only wait."""


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
        response = await self._client.models.with_raw_response.list()
        data = _document(response.content).get("data")
        if not isinstance(data, list):
            raise KconvertError(
                f"{self.url}/models answers, but with no list of models; the address of a server that speaks OpenAI's "
                "protocol ends in /v1"
            )
        return [name for model in data if (name := text(table(model).get("id")))]

    async def _complete(self, request: Mapping[str, Any]) -> Answer:
        # Its arguments' types list OpenAI's own models; the raw response, as the client breaks where it is no JSON.
        create: Any = self._client.chat.completions.with_raw_response.create
        answer = Answer()
        response = _document((await create(**request)).content)
        answer.take(response)
        answer.ended = time.perf_counter()
        if said := words(response.get("error")):
            raise CheckFailed(f"the server answers 200, but with an error{said}")
        if answer.finish is None:
            raise CheckFailed("the server's answer is no chat completion: it has no choice with a finish_reason")
        return answer

    async def _stream(self, request: Mapping[str, Any]) -> Answer:
        from openai import AsyncStream

        # Chunks as they are: making the client's own objects of them is most of what many chats at once cost here.
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        answer = Answer()
        opened = await self._client.post(
            "/chat/completions", body=body, cast_to=object, stream=True, stream_cls=AsyncStream[object]
        )
        try:
            async for chunk in opened:
                answer.take(table(chunk))
        except Exception as error:
            if answer.first is not None and _is_transport(error):
                raise _cut_short(answer) from None
            raise
        answer.ended = time.perf_counter()
        if answer.finish is None:
            raise _cut_short(answer)
        return answer

    async def _bounded(self, asked: Coroutine[Any, Any, T], seconds: float) -> T:
        from openai import APITimeoutError, OpenAIError

        try:
            return await asyncio.wait_for(asked, seconds)
        except (asyncio.TimeoutError, APITimeoutError):
            raise Unanswered(
                f"{self.url} gave no whole answer within {seconds:g} s; is the server overloaded, or still loading? "
                "--timeout waits longer"
            ) from None
        except OpenAIError as error:
            raise self._explained(error) from None
        except (ValueError, TypeError, RecursionError):  # what the client makes of a chunk that is none
            raise CheckFailed("the stream has a chunk that is no JSON object") from None

    def _explained(self, error: Exception) -> KconvertError:
        from openai import APIConnectionError, APIStatusError

        if isinstance(error, APIConnectionError):
            return Unanswered(self._unreachable(error))
        said = words(getattr(error, "body", None))
        if not isinstance(error, APIStatusError):
            return CheckFailed(f"the server broke off with an error{said}")
        code = error.status_code
        if code in (401, 403):
            why = "does not take the key that it was given" if self._has_key else "wants a key"
            return KconvertError(f"{self.url} {why} ({code}): give its own with --api-key or in OPENAI_API_KEY")
        path = error.request.url.path
        if code in (404, 405) and not path.endswith("/completions"):
            return KconvertError(
                f"{self.url} has no {path} ({code}); the address of a server that speaks OpenAI's protocol ends in /v1"
            )
        return CheckFailed(f"the server answers {code}{said}")

    def _unreachable(self, error: APIConnectionError) -> str:
        causes = list(_causes(error))
        kinds = {type(cause).__name__ for cause in causes}
        codes = {cause.errno for cause in causes if isinstance(cause, OSError)}
        no_host, no_tls = (any(isinstance(cause, kind) for cause in causes) for kind in (socket.gaierror, ssl.SSLError))
        too_many, no_way = errno.EMFILE in codes, codes & {errno.ENETUNREACH, errno.EHOSTUNREACH}
        faults = {
            ": no host of that name is known here": no_host,
            ": the server speaks no TLS that is trusted here; is its address http:// and not https://?": no_tls,
            ": more chats at once than this process may have open files; raise ulimit -n, or ask fewer": too_many,
            ": no way leads from here to that host": no_way,
            ": nothing listens there; start the server, or give its address": "ConnectError" in kinds,
            " sends on without end; give the address of the server itself": "TooManyRedirects" in kinds,
            " answers with a body that is not compressed as its Content-Encoding says": "DecodingError" in kinds,
            " closed the connection without a whole answer, or does not speak HTTP; what does its log say?": True,
        }
        return self._asked(error) + next(words for words, holds in faults.items() if holds)

    def _asked(self, error: APIConnectionError) -> str:
        """The address, and the one of another server that the client was sent on to."""
        first = error.request.url
        with suppress(AttributeError, RuntimeError):  # of a cause that knows of no request
            last = error.__cause__.request.url  # type: ignore[union-attr]
            if (last.scheme, last.netloc) != (first.scheme, first.netloc):
                return f"{last.scheme}://{last.netloc.decode()}, which {self.url} sends on to"
        return self.url


@asynccontextmanager
async def connected(url: str, api_key: str | None, timeout: float) -> AsyncIterator[Server]:
    """The server at `url`. KconvertError when that is no address, the key is none, or the client is not installed."""
    try:
        from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAsyncHttpxClient
    except ModuleNotFoundError:
        raise KconvertError("asking a server needs openai: pip install 'kconvert-toolkit[smoke]'") from None
    base = address(url)
    if not all("!" <= char <= "~" for char in api_key or ""):
        raise KconvertError(
            "the key that was given with --api-key or in OPENAI_API_KEY is none: it has a blank, a line break, or a letter "
            "beyond ASCII"
        )
    # A connection for each request: many that are kept are looked at one by one whenever another is wanted.
    limits = type(DEFAULT_CONNECTION_LIMITS)(max_keepalive_connections=0)
    http = DefaultAsyncHttpxClient(timeout=timeout, limits=limits)
    settings: dict[str, Any] = {"timeout": timeout, "max_retries": 0, "http_client": http}
    async with AsyncOpenAI(base_url=base, api_key=api_key or "none", **settings) as client:
        place = urlsplit(base).netloc
        yield Server(client, base.replace(place, place.rpartition("@")[2], 1), timeout, bool(api_key))


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


def words(body: object) -> str:
    """What a server said of its error, as the end of a sentence."""
    inner = table(body)
    said = text(body) or text(inner.get("message")) or text(inner.get("detail"))
    return f": {quoted(said, 240)}" if said else ""


def _document(body: bytes) -> Mapping[str, Any]:
    """Nothing, where a body is no JSON object."""
    try:
        return table(json.loads(body))
    except (ValueError, RecursionError):
        return {}


def _is_transport(error: Exception) -> bool:
    from openai import APIConnectionError, APITimeoutError

    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)


def _cut_short(answer: Answer) -> CheckFailed:
    if answer.last is None:
        return CheckFailed("the server does not stream: what it answers to stream=true holds no events with words")
    last = answer.content or answer.reasoning
    said = f" after {quoted(last)}" if last else ""
    return CheckFailed(f"the stream ended{said} without a finish_reason: it was cut short, by the server or a proxy")


def _causes(error: BaseException | None) -> Sequence[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
