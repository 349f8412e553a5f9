"""INT4 -> FP8 in blocks against llm-compressor's `model_free_ptq` of the same scheme; see peers.py.

llm-compressor wants older releases of our dependencies, so it lives in an environment of its own:

    python -m venv peer && peer/bin/pip install llmcompressor
    python benchmarks/peer_model_free_ptq.py --peer-python peer/bin/python
"""

from __future__ import annotations

import sys

from common import KCONVERT
from peers import Contest, int4_source, peer_arguments

TARGET = 25.0
# What `--layout compressed-tensors` leaves as it is, too.
PEER = """
import json, sys, time
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
from llmcompressor import model_free_ptq
ignore = ["lm_head", "re:.*mlp.gate$", "re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$", "re:.*embed_tokens$"]
started = time.perf_counter()
model_free_ptq(
    sys.argv[1], sys.argv[2], scheme="FP8_BLOCK", ignore=ignore, device="cpu",
    converter=CompressedTensorsDequantizer(sys.argv[1]),
)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    parser = peer_arguments(__doc__, model_gb=1.5)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has llm-compressor [this one]")
    options = parser.parse_args()
    # The peer takes matrices that divide into blocks only.
    source, target = int4_source(options, "--q-rank=128", "--kv-rank=128"), options.dir / "peer-fp8"
    ours = [KCONVERT, "int4-to-fp8", source, target, "--layout", "compressed-tensors", "--json"]
    Contest(source, target).hold(
        ours, "model_free_ptq", [options.peer_python, "-c", PEER, source, target], options.runs, TARGET
    )


if __name__ == "__main__":
    main()
