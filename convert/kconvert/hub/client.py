"""Calls to the Hub that outlast its faults: bounded retries with backoff, then one sentence.

The session, the token, the endpoint and its mirrors are huggingface_hub's. Its own messages are not shown: they run over
several lines and repeat URLs, which may be signed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, logging, parse_ratelimit_headers

from kconvert.checkpoint.remote import Sink, check_endpoint, without_password
from kconvert.errors import KconvertError
from kconvert.hub.bodies import httpx, receive
from kconvert.hub.ids import HubId
from kconvert.version import __version__

T = TypeVar("T")

HUB = "https://huggingface.co"
BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
LONGEST_WAIT = 300.0  # seconds; a server that asks for more gets the run ended, its state is kept
FIRST = "find the commit"  # what is done before anything else
AGAIN = "run the same command again, a conversion goes on from what it has"
LATER = AGAIN.replace("again", "again later")
PASSING = (408, 429, 500, 502, 503, 504)

disable_progress_bars()
logging.set_verbosity(50)  # above what it calls an error


def api() -> HfApi:
    return HfApi(library_name="kconvert", library_version=__version__)


class Patience:
    """Counts failures in a row and waits after each, longer every time; gives up with one sentence."""

    def __init__(
        self, place: HubId, doing: str, stopped: threading.Event | None = None, attempts: int | None = None
    ) -> None:
        self._place = place
        self._doing = doing
        self._waits = BACKOFF if attempts is None else BACKOFF[: attempts - 1]
        self._stopped = stopped or threading.Event()
        self._failures = 0

    def progress(self) -> None:
        self._failures = 0

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A failure that may pass is waited out, any other and the last one becomes a KconvertError."""
        try:
            yield
        except KconvertError:
            raise
        except Exception as caught:
            error = _cause(caught)
            if not _may_pass(error):
                raise explain(error, self._place, self._doing) from None
            self._wait(error)

    def _wait(self, error: Exception) -> None:
        asked = _retry_after(error)
        if self._failures == len(self._waits) or (asked or 0) > LONGEST_WAIT or self._stopped.is_set():
            raise explain(error, self._place, self._doing) from None
        self._stopped.wait(asked if asked is not None else self._waits[self._failures])
        self._failures += 1


def patiently(place: HubId, doing: str, call: Callable[[], T], attempts: int | None = None) -> T:
    """What `call` returns, as soon as the Hub lets it; `doing` says in messages what cannot be done.

    Calls for which the client has a patience of its own need few `attempts`.
    """
    if constants.ENDPOINT != HUB and not constants.is_offline_mode():
        check_endpoint(constants.ENDPOINT, "HF_ENDPOINT")
    patience = Patience(place, doing, attempts=attempts)
    while True:
        with patience.attempt():
            return call()


def into_cache(place: HubId, file: str, force: bool = False) -> Path:
    """Where the Hub's cache has a file, after downloading it if it has not."""
    return Path(
        patiently(
            place,
            f"read {file}",
            lambda: api().hf_hub_download(place.repo, file, revision=place.revision, force_download=force),
        )
    )


def transfer(
    place: HubId, file: str, start: int, stop: int, sink: Sink, stopped: threading.Event | None = None
) -> None:
    """Bring bytes `start` to `stop` (exclusive) of a file to `sink`, going on where a connection broke off."""
    patience = Patience(place, f"read {file}", stopped)
    position = start
    while position < stop:
        with patience.attempt():
            for count in receive(place, file, position, stop, sink):
                position += count
                patience.progress()
            if position < stop:
                raise httpx.RemoteProtocolError("the answer was too short")


def explain(error: Exception, place: HubId, doing: str) -> KconvertError:
    """One sentence for whatever the client raised; nothing of the error's own text, which may hold signed URLs."""
    endpoint = without_password(constants.ENDPOINT)
    mistaken = "" if doing != FIRST or os.path.lexists(place.repo) else " (no directory here is called so)"
    what = f"{place} on {endpoint}{mistaken}: cannot {doing}"
    status = _status(error)
    match error:
        case OfflineModeIsEnabled():
            fault = "HF_HUB_OFFLINE is set; unset it, or give the directory of a repository in the Hub's cache"
        case GatedRepoError():
            fault = "the repository is gated; ask for access on its page, then log in with `hf auth login`"
        case RepositoryNotFoundError():
            fault = "there is no such repository, or it is private; check the name, or log in with `hf auth login`"
        case RevisionNotFoundError():
            fault = f"there is no revision {place.revision!r}; name a branch, a tag or a commit"
        case EntryNotFoundError():
            fault = "there is no such file; the repository has changed, run the same command again"
        case _ if status in (401, 403):
            fault = f"access was refused ({status}); check the rights of your token, or log in with `hf auth login`"
        case _ if status == 429:
            fault = f"the Hub asks for fewer requests (429); {LATER}"
        case _ if status is not None:
            fault = f"the Hub answered {status}; {LATER}"
        case httpx.TimeoutException():
            fault = f"the Hub did not answer in time; {AGAIN}"
        case httpx.HTTPError():
            fault = f"the connection failed; check the network and {AGAIN}"
        case _:
            fault = f"the client failed ({type(error).__name__}); {AGAIN}"
    return KconvertError(f"{what}, {fault}")


def _cause(error: Exception) -> Exception:
    """What lies behind an error that the client wrapped (a failed look at a file, a failed upload)."""
    wrapped = isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
    return error.__cause__ if wrapped and isinstance(error.__cause__, Exception) else error


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _may_pass(error: Exception) -> bool:
    # The client's OSError without an errno: a file of another size than announced.
    short = type(error) is OSError and error.errno is None
    return short or isinstance(error, httpx.TransportError) or _status(error) in PASSING


def _retry_after(error: Exception) -> float | None:
    """For how many seconds the server asks: in Retry-After, a number or a date, or by the limit of its rates."""
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return None
    value = error.response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        limit = parse_ratelimit_headers(error.response.headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None
