"""INT4 -> BF16 against compressed-tensors' own `convert_checkpoint` with `CompressedTensorsDequantizer`.

Same input, cold, a fresh process each. When the peer ends, its output is in the page cache, kconvert's is on the disk:
"on disk" adds the time that `sync` takes afterwards. "Work alone" leaves out start-up (imports, kconvert's planning) and
sync. On a slow disk the disk bounds the ratio; the CPU time tells what both would do on a fast one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from common import (
    GB,
    KCONVERT,
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
from disk_speed import EXPERT_BYTES, LITTLE_ELSE

TARGET = 8.0
PEER = """
import json, sys, time
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint
started = time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], CompressedTensorsDequantizer(sys.argv[1]), device="cpu")
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--output-gb", type=float, default=1.5, help="BF16 to write [1.5]")
    parser.add_argument("--shards", type=int, default=4, help="files of the input, about [4]")
    options = parser.parse_args()
    experts = max(1, round(options.output_gb * GB / EXPERT_BYTES))
    shard_size = int(EXPERT_BYTES * (experts * 0.2817 + 2) / options.shards)
    sizes = [*LITTLE_ELSE, "--vocab=1024", f"--experts={experts}", f"--shard-size={shard_size}"]
    source = sample(options.dir, f"peer-{experts}-experts-{options.shards}", *sizes)
    target = options.dir / "peer-bf16"
    written: list[int] = []
    on_disk: dict[Child, float] = {}  # seconds until everything is there

    def side(*command: str | Path) -> Callable[[], Child]:
        def once() -> Child:
            make_cold(source)
            result = run(command)
            started = time.perf_counter()
            os.sync()
            on_disk[result] = result.seconds + time.perf_counter() - started
            written.append(nbytes(tensor_files(target)))
            remove(target)
            return result

        return once

    remove(target)
    ours = side(KCONVERT, "int4-to-bf16", source, target, "--json")
    theirs = side(sys.executable, "-c", PEER, source, target)
    results = alternate(options.runs, {"kconvert": ours, "convert_checkpoint": theirs})
    rows = [
        [
            name,
            spread([child.seconds for child in children], 2, "s"),
            spread([written[-1] / child.seconds / GB for child in children], 2, "GB/s"),
            spread([written[-1] / on_disk[child] / GB for child in children], 2, "GB/s"),
            spread([written[-1] / alone(child) / GB for child in children], 2, "GB/s"),
            spread([child.cpu for child in children], 1, "s"),
            spread([child.peak / 1e6 for child in children], 0, "MB"),
        ]
        for name, children in results.items()
    ]
    print(
        f"\n{len(tensor_files(source))} shards, read {nbytes(tensor_files(source)) / GB:.2f} GB, "
        f"wrote {written[-1] / GB:.2f} GB, {options.runs} runs each: median (min-max)",
        end="",
    )
    table(["", "wall time", "throughput", "on disk", "work alone", "CPU time", "peak RSS"], rows)
    pairs = list(zip(*results.values(), strict=True))
    measures: dict[str, Callable[[Child], float]] = {
        "throughput": lambda child: child.seconds,
        "  on disk": lambda child: on_disk[child],
        "  work alone": alone,
        "  CPU time": lambda child: child.cpu,
    }
    for name, seconds in measures.items():
        ratios = [seconds(peer) / seconds(own) for own, peer in pairs]
        goal = verdict(median(ratios), TARGET, "x", at_most=False) if name == "throughput" else ""
        print(f"{name}, pair by pair: {spread(ratios, 1)} x  {goal}".rstrip())
    print(f"  peak RSS, pair by pair: {spread([peer.peak / own.peak for own, peer in pairs], 1)} x less")
    machine(options.dir)


def alone(child: Child) -> float:
    """Seconds of the conversion without start-up, as the child told."""
    return float(json.loads(child.stdout)["seconds"])


if __name__ == "__main__":
    main()
