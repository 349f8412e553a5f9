"""What `kconvert smoke` adds to a server's own time at 64 chats at once: a local stub streams answers at a fixed pace.

    python benchmarks/smoke_overhead.py [--chats 64] [--tokens 200] [--pace 0.05]

The stub is a process of its own and takes tokens x pace for each chat, however many there are, as an engine with such a batch
does. What smoke's `at-once` check needs beyond that is connecting, sending, reading and judging, in both processes; how much of
it is the stub's is seen by a client that only reads bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import chain, repeat

from common import machine, spread, verdict

from kconvert.chat.checks import Talk, at_once
from kconvert.chat.checks import stream as stream_check
from kconvert.chat.server import connected

MOST_PERCENT = 2.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Pace:
    tokens: int
    seconds: float

    @property
    def answer(self) -> float:
        """Seconds that an answer takes."""
        return self.tokens * self.seconds


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    document = {
        "id": "1",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return chunk(b"data: " + json.dumps(document).encode() + b"\n\n")


async def stream(writer: asyncio.StreamWriter, pace: Pace) -> None:
    """An answer whose tokens come when they are due, late ones at once."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    writer.write(HEAD % b"text/event-stream")
    words = chain(
        [("reasoning", "Hm. ")] * (pace.tokens // 2), [("content", "9.9 is bigger. ")], repeat(("content", "So. "))
    )
    for number, (key, word) in zip(range(1, pace.tokens + 1), words, strict=False):
        await asyncio.sleep(max(0.0, began + number * pace.seconds - loop.time()))
        writer.write(event({key: word}))
    usage = {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": pace.tokens}}
    writer.write(
        event({}, "stop") + chunk(b"data: " + json.dumps(usage).encode() + b"\n\n") + chunk(b"data: [DONE]\n\n")
    )
    writer.write(b"0\r\n\r\n")


async def whole(writer: asyncio.StreamWriter, document: object) -> None:
    writer.write(HEAD % b"application/json" + chunk(json.dumps(document).encode()) + b"0\r\n\r\n")


async def serve(pace: Pace) -> None:
    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            lines = head.decode("latin1").lower().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
            request = json.loads(await reader.readexactly(length)) if length else None
            if request is None:
                await whole(writer, {"object": "list", "data": [{"id": "stub", "object": "model"}]})
            elif request.get("stream"):
                await stream(writer, pace)
            else:
                message = {"role": "assistant", "content": "9.9 is bigger.", "reasoning": "Hm."}
                await whole(writer, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
            await writer.drain()

    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await connection(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is done
        finally:
            writer.close()

    server = await asyncio.start_server(quiet, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def read_alone(port: int, chats: int) -> float:
    """Seconds that the stub needs for `chats` chats at once of a client that only waits for their end."""
    body = b'{"stream": true}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async def chat() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(chat() for _ in range(chats)))
    return time.perf_counter() - began


async def measured(url: str, chats: int) -> tuple[float, float]:
    """Seconds that smoke's check needed for `chats` chats at once, and CPU time of this process; the first chat is apart."""
    async with connected(url, None, 600.0) as server:
        talk = Talk(server, "stub", reasoning=True, max_tokens=4096, long_words=0, concurrency=chats)
        await stream_check(talk)
        began, cpu = time.perf_counter(), time.process_time()
        await at_once(talk)
        return time.perf_counter() - began, time.process_time() - cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="of an answer [200]")
    parser.add_argument("--pace", type=float, default=0.05, help="seconds a token [0.05]")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help="be the stub")
    options = parser.parse_args()
    pace = Pace(options.tokens, options.pace)
    if options.serve:
        asyncio.run(serve(pace))
    machine()
    command = [sys.executable, __file__, "--serve", "--tokens", str(pace.tokens), "--pace", str(pace.seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stub:
        assert stub.stdout is not None
        port = int(stub.stdout.readline())
        url = f"http://127.0.0.1:{port}/v1"
        try:
            runs = range(options.runs)
            alone, asked = zip(
                *(
                    (asyncio.run(read_alone(port, options.chats)), asyncio.run(measured(url, options.chats)))
                    for _ in runs
                ),
                strict=True,
            )
        finally:
            stub.terminate()
    seconds, cpu = zip(*asked, strict=True)
    added = [100 * (took / pace.answer - 1) for took in seconds]
    what = f"{options.chats} chats of {pace.answer:g} s at once"
    print(f"{what}: {spread(seconds, 3, 's')}, added {spread(added, 2, '%')}; the stub alone {spread(alone, 3, 's')}")
    print(f"CPU time of the client: {spread(cpu, 3, 's')}")
    print(verdict(sorted(added)[len(added) // 2], MOST_PERCENT, "%"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
