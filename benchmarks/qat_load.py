"""Masters from codes: peak memory of kconvert_qat.load, and the speed of kconvert.open beside that of a conversion.

    python benchmarks/qat_load.py [--experts 12] [--ranks 2]

The checkpoint has Kimi-K2's own shapes (hidden 7168, experts of 2048, latent attention), of two layers with few experts. `load`
fills a BF16 model from the meta device in one process, and then its halves under FSDP2 in two; each may take 500 MB beside its
weights. `open` reads every tensor into memory that it lets go of again, in turns with a conversion to BF16 into a directory in
memory, both with warm files and kernels, without the start. Targets: 500 MB, and 0.9 of the conversion's speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from common import GB, Child, alternate, arguments, machine, remove, run, sample, spread, table, verdict

SIZES = ["--layers=2", "--dense-layers=1", "--vocab=4096", "--intermediate=2048"]
WORK = """
import json, sys, time, torch, kconvert
source, target = sys.argv[1:]
plan = kconvert.plan(source, kconvert.Recipe("bf16"))
with kconvert.open(source) as weights:
    for name in list(weights)[:40]:
        weights[name]
    started, cpu = time.perf_counter(), time.process_time()
    if target:
        kconvert.convert(plan, target)
    else:
        for name in weights:
            weights[name]
    took = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps([*took, sum(weights._tensors[name].nbytes for name in weights)]))
"""


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--experts", type=int, default=12, help="of the layer that has them [12]")
    parser.add_argument("--ranks", type=int, default=2, help="of FSDP2 [2]")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="where the conversion writes [/dev/shm]")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        load_here(options.child)
        return
    source = sample(options.dir, f"load-{options.experts}", *SIZES, f"--experts={options.experts}")
    target = options.memory / "kconvert-load"

    def work(into: str) -> Child:
        remove(target)
        return run([sys.executable, "-c", WORK, source, into])

    try:
        memory(source, options.ranks)
        sides = {"conversion": lambda: work(str(target)), "kconvert.open": lambda: work("")}
        results = alternate(options.runs, sides)
    finally:
        remove(target)
    facts = {name: [json.loads(child.stdout) for child in children] for name, children in results.items()}
    size = facts["kconvert.open"][0][2]
    rates = {name: [size / seconds / GB for seconds, _, _ in each] for name, each in facts.items()}
    rows = [
        [
            name,
            spread([it[0] for it in facts[name]], 2, "s"),
            spread([it[1] for it in facts[name]], 2, "s"),
            spread(each, 2, "GB/s"),
        ]
        for name, each in rates.items()
    ]
    table([f"INT4 to {size / GB:.1f} GB of BF16", "wall time", "on the CPUs", ""], rows)
    share = median(rates["kconvert.open"]) / median(rates["conversion"])
    print(f"kconvert.open: {share:.2f} of the conversion's speed  {verdict(share, 0.9, at_most=False)}")
    machine(options.dir)


def memory(source: Path, ranks: int) -> None:
    """Print what loading takes beside the weights, of one process and of each of several."""
    alone = [sys.executable, __file__, "--child", source]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *alone[1:]]
    for command in (alone, together):
        for line in run(command).stdout.splitlines():
            facts = json.loads(line)
            beside = (facts["grown"] - facts["weights"]) / 1e6
            print(
                f"rank {facts['rank']} of {facts['ranks']}: weights {facts['weights'] / GB:.2f} GB, loaded in "
                f"{facts['seconds']:.1f} s, {beside:.0f} MB beside them  {verdict(beside, 500, 'MB')}",
                flush=True,
            )


def load_here(source: Path) -> None:
    """Load within this process, one of several where torchrun started it, and print what it took."""
    import os
    import resource
    import time

    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from kconvert_qat import load

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def resident() -> int:  # which may have been more before, while modules were imported
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    config = DeepseekV3Config.from_pretrained(source)
    del config.quantization_config
    config.model_type = "deepseek_v3"
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    if ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    before, started = resident(), time.perf_counter()
    load(model, source)
    seconds = time.perf_counter() - started
    grown = peak() - before
    own = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    weights = sum(p.nbytes for p in own)
    facts = {"rank": rank, "ranks": ranks, "weights": weights, "grown": grown, "seconds": seconds}
    print(json.dumps(facts), flush=True)
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
