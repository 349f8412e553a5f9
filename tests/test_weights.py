"""`kconvert.open`: the tensors that a conversion to BF16 writes, without writing them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sizes import SIZES

import kconvert
from kconvert import KconvertError, Recipe, convert, plan
from kconvert.models.catalogue import load_manifest, load_manifests
from kconvert.targets.sample import SampleRecipe, plan_synthetic

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
FAMILIES = sorted(set(load_manifests()) - {"generic"})
WRITTEN = [
    *(("fp8", ""), ("fp8", "all"), ("fp8", "compressed-tensors"), ("fp8", "compressed-tensors-channel"), ("f16", "")),
    *(("int8", "all"), ("mxfp4", "all"), ("mxfp8", "all"), ("nvfp4", "compressed-tensors"), ("nvfp4", "modelopt")),
    *(("mxfp4", "ktransformers"), ("mlx", "")),
]


def values(root: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in root.glob("*.safetensors") for name, value in load_file(path).items()}


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, two)))


def check_like(source: Path, folder: Path) -> None:
    """What `source` opens as is what a conversion of it writes, whole and by rows; or itself where it is plain already."""
    if any(weight.format.quantised for weight in kconvert.inspect(source).weights):
        convert(plan(source, Recipe("bf16")), folder)
    else:
        folder = source
    written = values(folder)
    with kconvert.open(source, threads=2) as weights:
        assert set(weights) == set(written)
        for name, value in written.items():
            assert same(weights[name], value), name
            assert weights.get_slice(name).get_shape() == list(value.shape)
            length = len(value) if value.dim() else 0
            for first, last in {(0, 1), (1, length - 1), (length // 3, length // 2), (length, length)}:
                if 0 <= first <= last <= length:
                    assert same(weights.rows(name, first, last), value[first:last]), (name, first, last)


@pytest.fixture
def weights(int4: Path) -> Iterator[kconvert.Weights]:
    with kconvert.open(int4) as opened:
        yield opened


@pytest.mark.parametrize("name", FAMILIES)
def test_every_sample_opens_as_its_conversion_to_bf16(tmp_path: Path, name: str) -> None:
    manifest = load_manifest(name)
    sizes = {symbol: size for symbol, size in {**SIZES, "layers": 4}.items() if symbol in manifest.dims}
    convert(plan_synthetic(SampleRecipe(name, sizes)), tmp_path / "source")
    check_like(tmp_path / "source", tmp_path / "bf16")


@pytest.mark.parametrize(("to", "layout"), WRITTEN)
def test_every_output_opens_as_its_conversion_to_bf16(int4: Path, tmp_path: Path, to: str, layout: str) -> None:
    convert(plan(int4, Recipe(to, layout=layout)), tmp_path / "source")
    check_like(tmp_path / "source", tmp_path / "bf16")


def test_a_bf16_checkpoint_opens_as_it_is(bf16: Path, tmp_path: Path) -> None:
    check_like(bf16, tmp_path)


def test_parts_in_different_shards_make_the_same_tensors(scattered: Path, bf16: Path) -> None:
    with kconvert.open(scattered) as weights:
        assert all(same(weights[name], value) for name, value in values(bf16).items())


def test_it_is_a_mapping_that_reads_nothing_until_it_is_asked(int4: Path, bf16: Path) -> None:
    with kconvert.open(int4) as weights:
        assert len(weights) == len(values(bf16)) == len(list(weights))
        assert EXPERT in weights
        assert "none" not in weights
        assert weights.get("none") is None
        with pytest.raises(KeyError):
            weights["none"]


@pytest.mark.parametrize(
    "key", [slice(None), slice(3, 50), (slice(-9, None), slice(5, 9)), slice(0, 90, 7), 4, ..., (..., 3), (), True]
)
def test_slices_are_those_of_safetensors(weights: kconvert.Weights, bf16: Path, key: Any) -> None:
    mine = weights.get_slice(EXPERT)
    for path in bf16.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if EXPERT in file.keys():  # noqa: SIM118 - a handle is no dict
                theirs = file.get_slice(EXPERT)
                assert (mine.get_shape(), mine.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
                assert same(mine[key], file.get_tensor(EXPERT)[key])


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (3, 2), (0, 1 << 20)])
def test_rows_that_there_are_not_are_refused(weights: kconvert.Weights, first: int, last: int) -> None:
    with pytest.raises(KconvertError, match=r"experts\.2\.up_proj\.weight' \[128, 256\] has no rows"):
        weights.rows(EXPERT, first, last)


def test_any_thread_may_ask(weights: kconvert.Weights, bf16: Path) -> None:
    written = values(bf16)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: same(weights[name], written[name]), [*written, *written])
    assert all(found)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_may_ask(weights: kconvert.Weights, bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kconvert.weights.PIECE", 1 << 10)  # so that threads are needed
    value = weights[EXPERT]
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(weights[EXPERT].view(torch.int16), value.view(torch.int16)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_pieces_of_any_size_make_the_same_tensor(
    weights: kconvert.Weights, fp8: Path, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kconvert.weights.PIECE", 1 << 10)
    written = values(bf16)
    assert all(same(weights[name], value) for name, value in written.items())
    check_like(fp8, tmp_path / "bf16")


def test_a_tensor_belongs_to_who_asked(weights: kconvert.Weights) -> None:
    weights[EXPERT].zero_()
    assert weights[EXPERT].count_nonzero()


def test_files_are_closed_at_the_end_and_a_read_after_it_says_so(int4: Path) -> None:
    def opened() -> set[str]:
        folder = Path("/proc/self/fd")
        names = [name for name in os.listdir(folder) if (folder / name).exists()]
        return {name for name in names if os.readlink(folder / name).startswith(str(int4))}

    before = opened()  # by other tests of this process
    with kconvert.open(int4) as weights:
        weights[EXPERT]
        assert opened() - before
    assert not opened() - before
    threads = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert "decode" not in threads
    with pytest.raises(KconvertError, match="was closed; open it again"):
        weights[EXPERT]


def test_a_bad_scale_is_the_sentence_of_a_conversion_and_harms_no_other_weight(
    int4_copy: Path, bf16: Path, raw: Any, tmp_path: Path
) -> None:
    damaged = raw.load(int4_copy)
    name = EXPERT.removesuffix(".weight") + ".weight_scale"
    scales = damaged[name]
    scales.data = scales.data[:-2] + b"\x80\x7f"
    damaged.save()
    with pytest.raises(KconvertError) as said:
        convert(plan(int4_copy, Recipe("bf16")), tmp_path / "bf16")
    with kconvert.open(int4_copy) as weights:
        last = weights.get_slice(EXPERT).get_shape()[0] - 1
        for ask in (lambda: weights[EXPERT], lambda: weights.rows(EXPERT, last, last + 1), lambda: weights[EXPERT]):
            with pytest.raises(KconvertError) as mine:
                ask()
            assert str(mine.value) == str(said.value)
        assert "is not finite" in str(said.value)
        other = EXPERT.replace("up", "down")
        assert same(weights[other], values(bf16)[other])


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(KconvertError, match="is not a directory"):
        kconvert.open(tmp_path / "none")


def test_it_needs_nothing_that_trains(int4: Path) -> None:
    code = f"import sys, kconvert; w = kconvert.open({str(int4)!r}); w[next(iter(w))]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"kconvert_qat", "transformers", "accelerate", "peft", "huggingface_hub", "click"}


def test_a_thread_needs_some_megabytes(tmp_path: Path, sample: Callable[..., Path]) -> None:
    root = sample(tmp_path / "wide", hidden=1024, moe_intermediate=1024, layers=2)
    code = (
        f"import resource, kconvert; w = kconvert.open({str(root)!r}, threads=2); names = list(w); w[names[0]]\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak()\n"
        "for name in names: w[name]\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 << 10  # KiB
