"""vLLM's own server on a sample in BF16, started as `kconvert launch` says and asked by `kconvert smoke`:

    python benchmarks/engines/served.py PYTHON

PYTHON has vLLM. A sample's weights are made up and say nothing, so a few are set: each token makes one other the next, whatever
stood before. So it thinks and answers in one sentence, which is enough for chats; it cannot call tools.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KCONVERT = Path(sys.executable).with_name("kconvert")
SIZES = "--layers 2 --experts 4 --hidden 512 --intermediate 512 --moe-intermediate 128 --vocab 512 --heads 4"
ANSWER = "9.9 is bigger than 9.11."
SAYS = ("<|im_middle|>", "<think>", "H", "m", "</think>", ANSWER, "<|im_end|>")
SERVER = ("-m", "vllm.entrypoints.openai.api_server", "--model")  # of the wheel for CPUs `vllm serve` does not start
SMALL = ["--max-model-len", "8192", "--enforce-eager", "--host", "127.0.0.1", "--distributed-executor-backend", "uni"]
SMOKE = ["--no-tools", "--long-words", "300", "--max-tokens", "64", "--concurrency", "4", "--timeout", "300", "--json"]
PATIENCE = 600  # seconds until the server is up


def smoked(python: str, folder: Path) -> str:
    """Which checks passed, or what is wrong."""
    model = taught(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "server.log").open("w+") as log:
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        words = [*command(python, model), *SMALL, "--port", str(port)]
        server = subprocess.Popen(words, stdout=log, stderr=log, env=settings)
        try:
            if not is_up(server, f"http://127.0.0.1:{port}/health"):
                log.seek(0)
                return f"does not start: {(log.read().splitlines() or ['without a word'])[-1][:160]}"
            words = [KCONVERT, "smoke", f"http://127.0.0.1:{port}/v1", *SMOKE]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        finally:
            server.terminate()
            server.wait(60)
    if done.returncode not in (0, 1):
        return done.stderr.strip()
    checks = json.loads(done.stdout)["checks"]
    wrong = [f"`{check['name']}`: {check['said']}" for check in checks if not check["passed"]]
    return "; ".join(wrong) or f"passes {', '.join(check['name'] for check in checks)}"


def taught(folder: Path) -> Path:
    """A Kimi-K2-Thinking in BF16 that says what it SAYS."""
    source, model = folder / "int4", folder / "bf16"
    run("sample", source, "--like", "kimi-k2-thinking", *SIZES.split(), "--quiet")
    run("convert", source, model, "--to", "bf16", "--quiet")
    ids = learn_words(model)
    following = torch.full((512,), ids[SAYS[-1]])
    for word, then in pairwise(SAYS):
        following[ids[word]] = ids[then]
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()  # so that a layer adds nothing to its token
            elif name.endswith("norm.weight"):
                tensor.fill_(1)
            elif name.endswith("embed_tokens.weight"):
                tensor.copy_(torch.eye(512))
            elif name == "lm_head.weight":
                tensor.copy_(torch.eye(512)[following].T)
        save_file(tensors, file, {"format": "pt"})
    return model


def learn_words(model: Path) -> dict[str, int]:
    """The id of each token, the ANSWER among them."""
    file = model / "tokenizer.json"
    table = json.loads(file.read_text())
    more = max(token["id"] for token in table["added_tokens"]) + 1
    table["added_tokens"].append({**table["added_tokens"][0], "id": more, "content": ANSWER, "special": False})
    file.write_text(json.dumps(table))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]  # which has the others alone
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return {**table["model"]["vocab"], **{token["content"]: token["id"] for token in table["added_tokens"]}}


def command(python: str, model: Path) -> list[str]:
    """The command of `kconvert launch`, for vLLM's wheel for CPUs."""
    found = json.loads(run("launch", model, "--engine", "vllm", "--json"))["command"]
    assert found[:2] == ["vllm", "serve"]
    return [python, *SERVER, *found[2:]]


def is_up(server: subprocess.Popen[bytes], url: str) -> bool:
    """Whether it answers before it ends or patience does."""
    until = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError:
            time.sleep(1)
    return False


def run(*words: str | Path) -> str:
    return subprocess.run([KCONVERT, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(smoked(sys.argv[1], Path(made)))
