"""`--to gguf` beside the two-step way from the same INT4 checkpoint, all in fresh processes that find it cold.

The two steps are kconvert's own int4-to-bf16, and then gguf's: its numpy Q4_0 of every expert, stacked by layer, all else as
it is, written by its writer tensor by tensor. What counts as written is every byte of tensor files that a side makes, the BF16
between the two steps included. kconvert's times go up to the last fsync; gguf's writer does none. The second step is given by
itself, too: what gguf takes when the BF16 is there already.

    python benchmarks/gguf_two_steps.py [--dir DIR] [--model-gb 3.5]
"""

from __future__ import annotations

import os
import sys
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
    spread,
    table,
    tensor_files,
    true_experts,
    verdict,
)

FASTER, FEWER = 5, 0.35
SECOND = """
import re, sys
from collections import defaultdict
from pathlib import Path
import gguf, numpy as np
from safetensors import safe_open
source, target = map(Path, sys.argv[1:])
Type = gguf.GGMLQuantizationType
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 2)
files = [safe_open(path, "pt") for path in sorted(source.glob("*.safetensors"))]
stacks = defaultdict(dict)
for file in files:
    for name in file.keys():
        inner, expert = re.subn(r"[.]experts[.]([0-9]+)[.]", ".experts.", name)
        number = int(re.search(r"[.]experts[.]([0-9]+)", name)[1]) if expert else 0
        inner = inner.replace("e_score_correction_bias", "e_score_correction.bias")
        stacks[names.get_name(inner, (".weight", ".bias"))][number] = file, name
writer = gguf.GGUFWriter(target, "deepseek2")
for name, members in stacks.items():
    file, first = members[0]
    shape = file.get_slice(first).get_shape()
    if "_exps" in name:
        kind, shape = Type.Q4_0, [len(members), *shape]
    else:
        kind = Type.BF16 if file.get_slice(first).get_dtype() == "BF16" else Type.F32
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(name, shape, None, int(np.prod(shape)) // elements * size, kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
for name, members in stacks.items():
    tensors = [file.get_tensor(which) for _, (file, which) in sorted(members.items())]
    if "_exps" in name:
        writer.write_tensor_data(np.stack([gguf.quants.quantize(t.float().numpy(), Type.Q4_0) for t in tensors]))
    else:
        writer.write_tensor_data(tensors[0].contiguous().view(-1).view(__import__("torch").uint8).numpy())
writer.close()
"""


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--model-gb", type=float, default=3.5, help="size of the model in BF16 [3.5]")
    options = parser.parse_args()
    source = true_experts(options.dir, options.model_gb)
    direct, between, file = (options.dir / name for name in ("gguf-direct", "gguf-between", "two-steps.gguf"))
    written: dict[str, int] = {}
    loads: list[float] = []
    seconds: list[Child] = []

    def ours() -> Child:
        make_cold(source)
        result = run([KCONVERT, "convert", source, direct, "--to", "gguf", "-q"])
        written["kconvert"] = nbytes(tensor_files(direct))
        remove(direct)
        loads.append(os.getloadavg()[0])
        return result

    def two_steps() -> Child:
        make_cold(source)
        first = run([KCONVERT, "int4-to-bf16", source, between, "-q"])
        second = run([sys.executable, "-c", SECOND, between, file])
        seconds.append(second)
        written["two steps"] = nbytes([*tensor_files(between), file])
        remove(between)
        remove(file)
        loads.append(os.getloadavg()[0])
        peak = max(first.peak, second.peak)
        return Child(first.seconds + second.seconds, first.cpu + second.cpu, peak, "", "")

    remove(direct)
    remove(between)
    results = alternate(options.runs, {"kconvert": ours, "two steps": two_steps})
    rows = [
        [
            name,
            spread([child.seconds for child in children], 1, "s"),
            spread([child.cpu for child in children], 1, "s"),
            f"{written[name] / GB:.2f} GB",
            spread([child.peak / 1e6 for child in children], 0, "MB"),
        ]
        for name, children in results.items()
    ]
    print(
        f"\nread {nbytes(tensor_files(source)) / GB:.2f} GB of INT4, {options.runs} runs each: median (min-max)", end=""
    )
    table(["", "wall time", "CPU time", "written", "peak RSS"], rows)
    ratios = [b.seconds / a.seconds for a, b in zip(results["kconvert"], results["two steps"], strict=True)]
    print(f"two steps / kconvert, pair by pair: {spread(ratios, 1)}  {verdict(median(ratios), FASTER, at_most=False)}")
    alone = [b.seconds / a.seconds for a, b in zip(results["kconvert"], seconds[-options.runs :], strict=True)]
    print(f"gguf's step alone / kconvert: {spread(alone, 1)}  {verdict(median(alone), FASTER, at_most=False)}")
    bytes_ratio = written["kconvert"] / written["two steps"]
    print(f"written, kconvert / two steps: {bytes_ratio:.3f}  {verdict(bytes_ratio, FEWER)}")
    print(f"load of the machine: {spread(loads, 1)}")
    machine(options.dir)


if __name__ == "__main__":
    main()
