"""An INT4 checkpoint in the tensors of GPTQ, AWQ or ModelOpt's NVFP4, which kconvert itself does not write, for benchmarks.

GPTQ and AWQ have the same codes and scales; NVFP4 has its words as codes, under scales of its own. `foreign_sample.py SRC DST
gptq` does it, in memory, shard by shard.
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
TABLES: dict[str, dict[str, Any]] = {
    **{name: {"quant_method": name, "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True} for name in STORED},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}


def respell(source: Path, target: Path, method: str) -> None:
    """Write the INT4 checkpoint `source` (groups of 32) to the directory `target` by one of TABLES."""
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        header, data = _read(file)
        tensors = dict(_tensors(header, data, method))
        _write(target / file.name, tensors)
        weight_map |= dict.fromkeys(tensors, file.name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = TABLES[method]
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
            if method == "nvfp4":
                yield from _floats(module, words)
                continue
            groups = words.shape[1] * 8 // GROUP
            yield f"{module}.qweight", ("I32", words.T if method == "gptq" else interleaved(words))
            yield f"{module}.qzeros", ("I32", np.full((groups, len(words) // 8), STORED[method], "<u4"))
        elif suffix == "weight_scale" and method != "nvfp4":
            yield f"{module}.scales", ("BF16", array.view("<u2").reshape(entry["shape"]).T)
        elif suffix not in ("weight_shape", "weight_scale"):
            kind = np.dtype(f"u{len(array) // max(int(np.prod(entry['shape'])), 1)}")
            yield name, (entry["dtype"], array.view(kind).reshape(entry["shape"]))


def _floats(module: str, words: Any) -> Any:
    """The words' nibbles as e2m1 codes, sixteen of them to a scale from 0.25 to 4."""
    rows, width = words.shape
    scale = np.resize(np.arange(0x28, 0x49, dtype=np.uint8), (rows, width // 2))
    yield f"{module}.weight", ("U8", np.ascontiguousarray(words).view(np.uint8))
    yield f"{module}.weight_scale", ("F8_E4M3", scale)
    yield f"{module}.weight_scale_2", ("F32", np.full((), 2.0**-9, "<f4"))


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
