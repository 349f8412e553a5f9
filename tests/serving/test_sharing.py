"""What GPUs, NUMA nodes and cores share of a model that `kconvert launch` serves, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kconvert.errors import KconvertError
from kconvert.serving import experts, machine
from kconvert.serving.memory import check_room
from kconvert.serving.place import look_at
from kconvert.serving.table import engines

from .conftest import Made, command, refused, run, words_of

K2 = "kimi-k2-thinking"
Written = Callable[..., Path]


@pytest.mark.parametrize(("gpus", "parallel"), [(1, False), (2, False), (4, False), (8, True)])
@pytest.mark.parametrize(("engine", "flag"), [("vllm", "--enable-expert-parallel"), ("sglang", "--ep-size")])
def test_experts_in_blocks_that_gpus_cannot_cut_are_dealt_out_whole(
    written: Written, gpus: int, parallel: bool, engine: str, flag: str
) -> None:
    """512 / 8 is no multiple of 128; SGLang wants as many of the four experts in each group, and two GPUs can cut them."""
    flags = words_of(command(written("fp8", "experts"), "--engine", engine, "--gpus", gpus))
    assert (flag in flags) is parallel
    assert flags.get("--ep-size", "4") == "4"


def test_gpus_that_can_neither_cut_experts_nor_get_as_many_each_are_refused_by_sglang_alone(written: Written) -> None:
    """Of four experts of 512, 32 GPUs would have 16 in groups of two, which cannot cut them in blocks of 128."""
    root = written("fp8", "experts")
    line = refused("launch", root, "--engine", "sglang", "--gpus", 32)
    assert "32 GPUs cannot share 4 experts of a width of 512, in 128s" in line
    assert line.endswith("give --gpus 16")
    assert words_of(command(root, "--engine", "sglang", "--gpus", 16))["--ep-size"] == "4"
    assert "--enable-expert-parallel" in command(root, "--engine", "vllm", "--gpus", 32)


def test_int4_and_channels_are_cut_further(like: Made, written: Written) -> None:
    for root in (like(K2), written("fp8", "compressed-tensors-channel")):
        assert "--enable-expert-parallel" not in command(root, "--engine", "vllm", "--gpus", 16)
    assert "--enable-expert-parallel" in command(like(K2), "--engine", "vllm", "--gpus", 32)  # 512 / 32 is half a group


def test_what_else_gpus_cannot_share_in_blocks_is_a_note(written: Written) -> None:
    result = run("launch", written("fp8", "all"), "--engine", "vllm", "--gpus", 8)
    assert "--enable-expert-parallel" in result.stdout
    assert "8 GPUs cannot share 'model.layers.1.mlp.shared_experts" in result.stderr


def test_heads_that_gpus_cannot_share_are_named(like: Made) -> None:
    line = refused("launch", like(K2), "--engine", "vllm", "--gpus", 3)
    assert "32 attention heads" in line
    assert "1, 2, 4, 8" in line


def test_memory_that_is_too_small_is_refused_with_what_would_do(like: Made) -> None:
    nbytes = sum(path.stat().st_size for path in like(K2).glob("*.safetensors"))
    tight = f"{nbytes}B"
    line = refused("launch", like(K2), "--engine", "vllm", "--gpus", 1, "--gpu-memory", tight)
    assert "do not fit into 1 GPU" in line
    assert "or 2 of this size" in line


def test_the_cache_of_the_context_has_to_fit_too(like: Made) -> None:
    options = ("launch", like(K2), "--engine", "vllm", "--gpus", 1, "--gpu-memory", "40MB")
    line = refused(*options)
    assert "262,144 of the model's context" in line
    fits = line.partition("--context ")[2].split()[0]
    result = run(*options, "--context", fits)
    assert result.exit_code == 0
    assert f"which holds {int(fits):,} tokens" in result.stderr
    assert "asked for" in refused(*options, "--context", int(fits) + 1)


def test_gigabytes_are_meant_by_a_number_alone(like: Made) -> None:
    facts = json.loads(command(like(K2), "--engine", "vllm", "--gpus", 2, "--gpu-memory", 80, "--json"))
    assert facts["usable_bytes_per_gpu"] == 72_000_000_000


def test_a_context_beyond_the_models_is_refused(like: Made) -> None:
    assert "--context 262144" in refused("launch", like(K2), "--engine", "sglang", "--context", 300_000)


def test_ktransformers_gets_as_many_experts_on_gpus_as_fit(like: Made) -> None:
    options = (like(K2), "--engine", "ktransformers", "--gpus", 1, "--context", 1)
    plenty = words_of(command(*options, "--gpu-memory", 24))
    assert plenty["--kt-num-gpu-experts"] == "4"
    nbytes = sum(path.stat().st_size for path in like(K2).glob("*.safetensors"))
    experts_bytes = 4 * 3 * 2 * (512 * 256 // 2 + 512 * 256 // 32 * 2)
    memory = int((nbytes - experts_bytes / 2) / 0.88) + 5_000
    assert words_of(command(*options, "--gpu-memory", f"{memory}B"))["--kt-num-gpu-experts"] in ("1", "2")
    assert words_of(command(*options))["--kt-num-gpu-experts"] == "0"


def test_numa_nodes_that_cannot_share_an_expert_are_refused_or_not_chosen(
    like: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "give --numa 4" in refused("launch", like(K2), "--engine", "ktransformers", "--numa", 5)
    few = ("--numa", 5, "--cores", 3)
    assert "give --numa 2" in refused("launch", like(K2), "--engine", "ktransformers", *few)  # each wants a core
    monkeypatch.setattr(experts, "numa_nodes", lambda: 7)
    assert words_of(command(like(K2), "--engine", "ktransformers"))["--kt-threadpool-count"] == "4"


def test_a_node_without_a_core_is_refused(like: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused("launch", like(K2), "--engine", "ktransformers", "--numa", 2, "--cores", 1)
    assert "2 NUMA nodes want a core each, and --cores is 1; give --cores 2 or more, or leave out --numa" in line
    monkeypatch.setattr(experts, "numa_nodes", lambda: 2)
    assert words_of(command(like(K2), "--engine", "ktransformers", "--cores", 1))["--kt-threadpool-count"] == "1"


def test_the_machine_has_a_core_and_a_node_at_least() -> None:
    assert machine.physical_cores() >= 1
    assert machine.numa_nodes() >= 1


def test_heads_that_gpus_cannot_share_are_named_of_ktransformers_too(like: Made) -> None:
    assert "32 attention heads" in refused("launch", like(K2), "--engine", "ktransformers", "--gpus", 3)


def test_gpus_that_would_hold_the_weights_can_share_the_heads_too(like: Made) -> None:
    nbytes = sum(path.stat().st_size for path in like(K2).glob("*.safetensors"))
    line = refused("launch", like(K2), "--engine", "vllm", "--gpus", 1, "--gpu-memory", f"{nbytes * 2 // 5}B")
    assert "or 4 of this size" in line  # 3 have no use for 32 heads


def test_more_gpus_than_can_share_the_heads_are_not_advised(like: Made) -> None:
    contents = look_at(str(like(K2))).contents
    with pytest.raises(KconvertError, match=r"takes 1\.111 TB for each of 1$"):
        check_room(engines()["vllm"], contents, 10**12, 1, 10**9, None)


def test_gpus_without_memory_are_a_wrong_option(like: Made) -> None:
    assert "give its GB" in run("launch", like(K2), "--engine", "vllm", "--gpu-memory", 0).stderr
