"""`kconvert launch` of what is in an object store: for the engines that can load from one, and a sentence for the others."""

from __future__ import annotations

import pytest
from s3_server import Bucket

from .test_writing import ok, refused, run


@pytest.mark.parametrize(
    ("engine", "begin"), [("vllm", "vllm serve {}"), ("sglang", "python -m sglang.launch_server --model {}")]
)
def test_an_engine_that_streams_is_told_the_address(stored: str, engine: str, begin: str) -> None:
    said = run("launch", stored + "/", "--engine", engine, "--gpus", "1")
    line, notes = said.stdout, said.stderr

    assert line.startswith(begin.format(stored) + " ")
    assert " --load-format runai_streamer " in line
    assert f"pip install '{engine}[runai]'" in notes


def test_nothing_of_the_weights_is_fetched(bucket: Bucket, stored: str) -> None:
    ok("launch", stored, "--engine", "vllm")

    shards = [span for name, span in bucket.asked if name.endswith(".safetensors")]
    assert all(span.startswith("bytes=0-") for span in shards)


def test_an_engine_that_reads_directories_is_refused_with_what_helps(stored: str) -> None:
    said = refused("launch", stored, "--engine", "ktransformers")

    assert said == (
        f"error: KTransformers reads from a directory, not from an object store; copy {stored} with the store's own tools and "
        "give the directory, or give another --engine: vLLM and SGLang can\n"
    )


def test_what_is_unfinished_is_not_served(bucket: Bucket, stored: str) -> None:
    bucket.put("models/kimi/tiny/.kconvert/plan.json", b"{}")
    bucket.remove(stored, "config.json")

    assert "is unfinished, it has no config.json; run the conversion again" in refused(
        "launch", stored, "--engine", "vllm"
    )


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://127.0.0.1:9", "where nobody takes connections (Connection refused); set it right, or leave it out"),
        ("https://no-such-host.invalid", "where no host 'no-such-host.invalid' is known"),
        ("minio:9000", "which is no address; one is like https://host"),
    ],
)
def test_an_endpoint_that_is_mistyped_is_not_waited_for(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, endpoint: str, words: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    line = refused("launch", "s3://models/tiny", "--engine", "vllm")
    assert line.startswith("error: AWS_ENDPOINT_URL is ")
    assert words in line
