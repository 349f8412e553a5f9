"""Why no answer came, from what the client and the system raise: one sentence for each fault."""

from __future__ import annotations

import errno
import json
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

from kconvert.chat.answers import quoted, table, text
from kconvert.errors import CheckFailed, KconvertError


class Unanswered(CheckFailed):
    """The server is gone or hangs: asking on would only wait."""


def explained(error: Exception, url: str, has_key: bool) -> KconvertError:
    """What to say of an error of `openai`, or of what it stands on, about the server at `url`."""
    from openai import APIStatusError

    if not isinstance(error, APIStatusError):
        return Unanswered(_unreachable(error, url))
    code, path = error.status_code, error.request.url.path
    if code in (401, 403):
        why = "does not take the key that it was given" if has_key else "wants a key"
        return KconvertError(f"{url} {why} ({code}): give its own with --api-key or in OPENAI_API_KEY")
    if code in (404, 405) and not path.endswith("/completions"):
        return KconvertError(
            f"{url} has no {path} ({code}); the address of a server that speaks OpenAI's protocol ends in /v1"
        )
    return CheckFailed(f"the server answers {code}{words(error.body)}")


def words(body: object) -> str:
    """What a server said of its error, as the end of a sentence."""
    said = table(body).get("error") or table(body).get("detail") or body
    plain = text(said) or text(table(said).get("message"))
    shown = plain or (json.dumps(said, ensure_ascii=False) if said else "")
    return f": {quoted(shown, 240)}" if shown else ""


def _unreachable(error: Exception, url: str) -> str:
    causes = list(_causes(error))
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    codes = {cause.errno for cause in causes if isinstance(cause, OSError)}
    no_host, no_tls = (any(isinstance(cause, kind) for cause in causes) for kind in (socket.gaierror, ssl.SSLError))
    # A connection that was taken and closed again, before a word of HTTP.
    no_tls |= "ClientConnectorError" in kinds and url.startswith("https:") and errno.ECONNREFUSED not in codes
    faults = {
        " is asked by way of a proxy, as HTTP_PROXY or its like says, and that does not answer": "ClientProxyConnectionError"
        in kinds,
        ": no host of that name is known here": no_host,
        ": more chats at once than this process may have open files; raise ulimit -n, or ask fewer": errno.EMFILE
        in codes,
        ": no way leads from here to that host": codes & {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT},
        ": the server speaks no TLS that is trusted here; is its address http:// and not https://?": no_tls,
        ": nothing listens there; start the server, or give its address": "ClientConnectorError" in kinds,
        " sends on without end; give the address of the server itself": "TooManyRedirects" in kinds,
        " answers with a body that is not compressed as its Content-Encoding says": "DecodingError" in kinds,
        " closed the connection without a whole answer, or does not speak HTTP; what does its log say?": True,
    }
    return _asked(error, url) + next(words for words, holds in faults.items() if holds)


def _asked(error: Exception, url: str) -> str:
    """The address, and the one of another server that the client was sent on to."""
    with suppress(AttributeError, RuntimeError):  # of an error that knows of no request
        first, last = error.request.url, error.__cause__.request.url  # type: ignore[attr-defined,union-attr]
        if (last.scheme, last.netloc) != (first.scheme, first.netloc):
            return f"{last.scheme}://{last.netloc.decode()}, which {url} sends on to"
    return url


def _causes(error: BaseException | None) -> Sequence[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
