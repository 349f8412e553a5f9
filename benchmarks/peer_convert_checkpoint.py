"""INT4 -> BF16 against compressed-tensors' own `convert_checkpoint` with `CompressedTensorsDequantizer`; see peers.py."""

from __future__ import annotations

import sys

from common import KCONVERT
from peers import Contest, int4_source, peer_arguments

TARGET = 8.0
PEER = """
import json, sys, time
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint
started = time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], CompressedTensorsDequantizer(sys.argv[1]), device="cpu")
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    options = peer_arguments(__doc__, model_gb=1.5).parse_args()
    source, target = int4_source(options), options.dir / "peer-bf16"
    ours = [KCONVERT, "int4-to-bf16", source, target, "--json"]
    Contest(source, target).hold(
        ours, "convert_checkpoint", [sys.executable, "-c", PEER, source, target], options.runs, TARGET
    )


if __name__ == "__main__":
    main()
