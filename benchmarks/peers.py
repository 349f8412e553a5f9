"""A conversion against a peer's: same input, cold, a fresh process each, alternating.

When the peer ends, its output is in the page cache, kconvert's is on the disk: "on disk" adds the time that `sync` takes
afterwards. "Work alone" leaves out start-up (imports, kconvert's planning) and sync. On a slow disk the disk bounds the
ratio, and two dd's, one reading as many bytes and the other writing them, show how far; the CPU time tells what both would
do on a fast one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from common import (
    EXPERT_BYTES,
    GB,
    LITTLE_ELSE,
    Child,
    alternate,
    arguments,
    machine,
    make_cold,
    nbytes,
    remove,
    run,
    sample,
    spread,
    table,
    tensor_files,
    verdict,
)
from disk_speed import two_dds


def peer_arguments(doc: str | None, model_gb: float) -> argparse.ArgumentParser:
    parser = arguments(doc)
    parser.add_argument("--model-gb", type=float, default=model_gb, help=f"of the model in BF16 [{model_gb}]")
    parser.add_argument("--shards", type=int, default=4, help="files of the input, about [4]")
    return parser


def int4_source(options: argparse.Namespace, *sizes: str) -> Path:
    """An INT4 checkpoint of true experts, in about `options.shards` files."""
    experts = max(1, round(options.model_gb * GB / EXPERT_BYTES))
    shard_size = int(EXPERT_BYTES * (experts * 0.2817 + 2) / options.shards)
    name = "-".join(["peer", f"{experts}-experts", str(options.shards), *(size.strip("-") for size in sizes)])
    return sample(options.dir, name, *LITTLE_ELSE, f"--experts={experts}", f"--shard-size={shard_size}", *sizes)


DISK = "two dd's"


class Contest:
    """Both sides write to one place, which is empty whenever one begins."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source = source
        self.target = target
        self.written: dict[Child, int] = {}
        self.on_disk: dict[Child, float] = {}  # seconds until everything is there

    def side(self, *command: str | Path) -> Callable[[], Child]:
        def once() -> Child:
            remove(self.target)
            make_cold(self.source)
            result = run(command)
            started = time.perf_counter()
            os.sync()
            self.on_disk[result] = result.seconds + time.perf_counter() - started
            self.written[result] = nbytes(tensor_files(self.target))
            remove(self.target)
            return result

        return once

    def disk(self) -> Child:
        """Reads the source and writes as many zeros as the sides before wrote, at once."""
        make_cold(self.source)
        zeros = self.target.with_name("peer-zeros")
        result = run(["sh", "-c", two_dds(tensor_files(self.source), zeros, next(reversed(self.written.values())))])
        remove(zeros)
        return result

    def hold(
        self, ours: Sequence[str | Path], peer: str, theirs: Sequence[str | Path], runs: int, target: float
    ) -> None:
        """Run both sides `runs` times and print the figures; `target` is how many times our throughput is to be theirs."""
        sides = {"kconvert": self.side(*ours), peer: self.side(*theirs), DISK: self.disk}
        results = alternate(runs, sides)
        floor = results.pop(DISK)
        rows = [
            [
                name,
                spread([child.seconds for child in children], 2, "s"),
                spread([self.written[child] / child.seconds / GB for child in children], 2, "GB/s"),
                spread([self.written[child] / self.on_disk[child] / GB for child in children], 2, "GB/s"),
                spread([self.written[child] / alone(child) / GB for child in children], 2, "GB/s"),
                spread([child.cpu for child in children], 1, "s"),
                spread([child.peak / 1e6 for child in children], 0, "MB"),
            ]
            for name, children in results.items()
        ]
        files, written = tensor_files(self.source), median(self.written.values()) / GB
        print(
            f"\n{len(files)} shards, read {nbytes(files) / GB:.2f} GB, wrote {written:.2f} GB, {runs} runs each: "
            "median (min-max)",
            end="",
        )
        table(["", "wall time", "throughput", "on disk", "work alone", "CPU time", "peak RSS"], rows)
        self._compare(list(zip(*results.values(), strict=True)), target)
        most = [theirs.seconds / disk.seconds for theirs, disk in zip(results[peer], floor, strict=True)]
        print(
            f"two dd's took {spread([c.seconds for c in floor], 2, 's')}: the most this disk allows is {spread(most, 1)} x"
        )
        machine(self.target.parent)

    def _compare(self, pairs: Sequence[tuple[Child, ...]], target: float) -> None:
        measures: dict[str, Callable[[Child], float]] = {
            "throughput": lambda child: child.seconds,
            "  on disk": self.on_disk.__getitem__,
            "  work alone": alone,
            "  CPU time": lambda child: child.cpu,
        }
        for name, seconds in measures.items():
            ratios = [seconds(peer) / seconds(own) for own, peer in pairs]
            goal = verdict(median(ratios), target, "x", at_most=False) if name == "throughput" else ""
            print(f"{name}, pair by pair: {spread(ratios, 1)} x  {goal}".rstrip())
        print(f"  peak RSS, pair by pair: {spread([peer.peak / own.peak for own, peer in pairs], 1)} x less")


def alone(child: Child) -> float:
    """Seconds of the conversion without start-up, as the child told in its last line."""
    return float(json.loads(child.stdout[child.stdout.rindex("{", 0, child.stdout.rindex('"seconds"')) :])["seconds"])
