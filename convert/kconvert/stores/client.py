"""Requests to an object store that outlast its faults: obstore's own retries, then some after an answer that broke off.

Credentials and endpoints are those of the stores' own tools: environment, AWS profiles (where boto3 is installed), Google's
application default credentials, Azure's managed identities. They are never part of a message; neither is the store's
answer, which may repeat them.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from kconvert.checkpoint.remote import Sink, check_endpoint, pour
from kconvert.errors import KconvertError
from kconvert.stores.urls import StoreUrl

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
RETRIES = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}  # of one request, by obstore
TIMEOUT = "60s"  # without a byte
CHUNK = 4 << 20
# What obstore says of faults that do not pass.
NO_BUCKET, NO_CONDITION, REGION, TOKEN = LASTING = (
    "404 Not Found",
    "501 Not Implemented",
    "incorrectly configured region",
    "performing token request",
)
OPEN = "open it"
ENDPOINTS = {  # by the beginning of an address
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "gs": ("STORAGE_EMULATOR_HOST",),
}


def open_store(place: StoreUrl) -> ObjectStore:
    """The store, whose paths are relative to the prefix; KconvertError when obstore is not installed, or cannot be used."""
    if importlib.util.find_spec("obstore") is None:
        raise KconvertError(f"{place} takes obstore; install it with `pip install 'kconvert-toolkit[cloud]'`")
    if is_forked():
        raise KconvertError(
            f"{place} cannot be opened in a process that was forked from one that has used a store, which obstore does not "
            "survive; open it before the fork, or start processes by spawn"
        )
    from obstore.store import from_url

    endpoints = {name: os.environ[name] for name in ENDPOINTS.get(place.scheme, ()) if os.environ.get(name)}
    if len(set(endpoints.values())) == 1 and place.scheme != "gs":  # of several obstore takes one, of Google's none
        check_endpoint(*reversed(next(iter(endpoints.items()))))
    plain = any(endpoint.startswith("http://") for endpoint in endpoints.values())  # as the user wants it
    options: dict[str, Any] = {
        "client_options": {"allow_http": plain, "timeout": TIMEOUT},
        "retry_config": RETRIES,
    }
    said = any(name in os.environ for name in ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"))
    if place.scheme == "s3" and not said and importlib.util.find_spec("boto3") is not None:
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = attempt(place, OPEN, Boto3CredentialProvider)
    return attempt(place, OPEN, lambda: from_url(str(place), **options))


def is_forked() -> bool:
    """Whether obstore, whose threads are those of another process, stands still here; see stores.forked."""
    return _home() != os.getpid()


@lru_cache(1)
def _home() -> int:
    """The process that was the first to use it."""
    return os.getpid()


def attempt(place: StoreUrl, doing: str, call: Callable[[], T]) -> T:
    """What `call` returns; one sentence for whatever it raises."""
    try:
        return call()
    except KconvertError:
        raise
    except Exception as error:
        raise explain(error, place, doing) from None


def persist(place: StoreUrl, doing: str, call: Callable[[], T]) -> T:
    """The same after faults that pass; `call` must be one that can be made twice."""
    for wait in WAITS:
        try:
            return call()
        except KconvertError:
            raise
        except Exception as error:
            if not _may_pass(error):
                raise explain(error, place, doing) from None
        time.sleep(wait)
    return attempt(place, doing, call)


def transfer(
    place: StoreUrl,
    store: ObjectStore,
    stamp: str | None,
    file: str,
    start: int,
    stop: int,
    sink: Sink,
    stopped: threading.Event | None = None,
) -> None:
    """Bring bytes `start` to `stop` (exclusive) of an object to `sink`, going on where an answer broke off.

    `stamp` is the ETag that the object must have still.
    """
    from obstore import get

    position, failures, stopped = start, 0, stopped or threading.Event()
    while position < stop:
        try:
            options: GetOptions = {"range": (position, stop)}
            if stamp is not None:
                options["if_match"] = stamp
            answer = get(store, file, options=options)
            for chunk in answer.stream(min_chunk_size=CHUNK):
                wanted = memoryview(chunk)[: stop - position]  # no more than was asked for, whatever is sent
                pour(wanted, sink)
                position, failures = position + len(wanted), 0
            if position < stop:
                raise TimeoutError
        except KconvertError:
            raise
        except Exception as error:
            if failures == len(WAITS) or stopped.is_set() or not _may_pass(error):
                raise explain(error, place, f"read {file}") from None
            stopped.wait(WAITS[failures])
            failures += 1


def _may_pass(error: Exception) -> bool:
    from obstore.exceptions import GenericError

    return isinstance(error, (GenericError, TimeoutError)) and not any(words in str(error) for words in LASTING)


def explain(error: Exception, place: StoreUrl, doing: str) -> KconvertError:
    """One sentence for whatever obstore raised, but for its own text."""
    from obstore.exceptions import PermissionDeniedError, PreconditionError, UnauthenticatedError

    match error:
        case FileNotFoundError():
            fault = "there is no such object; check the address"
        case PreconditionError():
            fault = "the object has changed since the command began; run it again when nobody writes there"
        case PermissionDeniedError() | UnauthenticatedError():
            fault = "access was refused; check the credentials, as the store's own command line takes them"
        case _ if NO_CONDITION in str(error):
            fault = (
                "the store takes no writes on condition that there is no such object, by which runs know of each other; choose "
                "another store"
            )
        case _ if REGION in str(error):
            fault = "the bucket is in another region; set that, as the store's own command line takes it"
        case _ if TOKEN in str(error):
            fault = "nobody here gives credentials for it; set them as the store's own command line takes them"
        case _ if NO_BUCKET in str(error):
            fault = f"there is no bucket {place.bucket!r}; check the address"
        case _ if "credential" in str(error).lower():
            fault = "there are no credentials for it; set them as the store's own command line takes them"
        case _ if doing == OPEN:
            fault = (
                "what is set for it makes no sense; set account, profile and keys as for the store's own command line"
            )
        case _:
            fault = (
                "the store failed or did not answer; run the same command again, a conversion goes on from what it has"
            )
    return KconvertError(f"{place}: cannot {doing}, {fault}")
