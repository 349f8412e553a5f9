"""Logits of a checkpoint by vLLM on the CPU, in BF16: python by_vllm.py DIR RESULT.json"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from prompt import TOKENS


def main(root: str, result: str) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault(
        "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
    )  # a process for each part would import vLLM three times
    from vllm import LLM, SamplingParams

    size = json.loads((Path(root) / "config.json").read_text())["vocab_size"]
    sizes = {"max_model_len": 64, "max_num_seqs": 1, "max_logprobs": size, "distributed_executor_backend": "uni"}
    model = LLM(
        root, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, logprobs_mode="raw_logits", **sizes
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=size, logprobs=size, detokenize=False)
    (answer,) = model.generate({"prompt_token_ids": TOKENS}, asked)
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    logits = [[row[token].logprob for token in range(size)] for row in rows]
    Path(result).write_text(json.dumps({"logits": logits}))


if __name__ == "__main__":
    main(*sys.argv[1:])
