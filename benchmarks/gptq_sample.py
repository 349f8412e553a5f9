"""An INT4 checkpoint in GPTQ's or AWQ's tensors, for benchmarks: the same codes and scales, which kconvert itself writes in no
such form. `gptq_sample.py SRC DST gptq` does it, in memory, shard by shard.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that lies in each nibble
STORED = {"gptq": 0x77777777, "awq": 0x88888888}  # a zero point of 8, of which GPTQ takes one off
GROUP = 32


def respell(source: Path, target: Path, method: str) -> None:
    """Write the INT4 checkpoint `source` (groups of 32) to the directory `target` as `gptq` or `awq`."""
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        header, data = _read(file)
        tensors = dict(_tensors(header, data, method))
        _write(target / file.name, tensors)
        weight_map |= dict.fromkeys(tensors, file.name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((source / "config.json").read_text())
    table: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    config["quantization_config"] = table
    (target / "config.json").write_text(json.dumps(config))


def _read(file: Path) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    data = np.memmap(file, np.uint8, "r")
    size = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + size]))
    header.pop("__metadata__", None)
    return header, data[8 + size :]


def _tensors(header: dict[str, Any], data: Any, method: str) -> Any:
    """(name, (dtype, array)) of the file in the other spelling."""
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        array = data[start:stop]
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            words = array.view("<u4").reshape(entry["shape"])
            groups = words.shape[1] * 8 // GROUP
            yield f"{module}.qweight", ("I32", words.T if method == "gptq" else interleaved(words))
            yield f"{module}.qzeros", ("I32", np.full((groups, len(words) // 8), STORED[method], "<u4"))
        elif suffix == "weight_scale":
            yield f"{module}.scales", ("BF16", array.view("<u2").reshape(entry["shape"]).T)
        elif suffix != "weight_shape":
            kind = np.dtype(f"u{len(array) // max(int(np.prod(entry['shape'])), 1)}")
            yield name, (entry["dtype"], array.view(kind).reshape(entry["shape"]))


def interleaved(words: Any) -> Any:
    """Words [out, in / 8] of eight columns -> [in, out / 8] of eight rows in AWQ's order."""
    codes = np.stack([words >> np.uint32(4 * j) & np.uint32(15) for j in range(8)], -1).reshape(len(words), -1)
    eights = codes.T.reshape(codes.shape[1], -1, 8)[..., AWQ_ORDER]
    return np.bitwise_or.reduce(eights << (4 * np.arange(8, dtype=np.uint32)), -1)


def _write(file: Path, tensors: dict[str, Any]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            out.write(np.ascontiguousarray(array).data)


if __name__ == "__main__":
    respell(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
