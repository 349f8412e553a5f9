"""Directories of every shape: whatever lies in one, it is read or refused in one sentence."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kconvert
from kconvert import KconvertError, Recipe
from kconvert.cli import main

FOLDERS = [*[""] * 12, "original/", "docs/", "checkpoint-10/", "a/b/", ".cache/", "model.safetensors/", "config.json/"]
WEIGHTS = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model-2-of-2.safetensors",
    "model-1-of-999999999.safetensors",
    "model-00000-of-00000.safetensors",
    "a.safetensors",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    ".safetensors",
]
INDEXES = [
    "model.safetensors.index.json",
    "consolidated.safetensors.index.json",
    "model.safetensors.index.fp8.json",
    "pytorch_model.bin.index.json",
]
OTHERS = [
    "pytorch_model.bin",
    "model.gguf",
    "weights.npz",
    "model.safetensors.aria2",
    "tokenizer.json",
    "hf_quant_config.json",
    "__0_0.distcp",
    "README.md",
    "x" * 250,
    "\udcff",
    "new\nline",
    "kconvert.json",
]
TENSORS = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.experts.0.down_proj.weight",
    "model.layers.0.mlp.experts.0.down_proj.weight_packed",
    "model.layers.0.mlp.experts.0.down_proj.weight_scale",
    "model.layers.0.mlp.experts.0.down_proj.weight_shape",
    "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv",
    "base_model.model.q_proj.lora_A.weight",
    "blk.0.ffn_up_exps.0.numa.0.weight",
    "",
]
ITEM_BYTES = {"U8": 1, "BF16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}


def file_of(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A sound safetensors file of zeros."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = ITEM_BYTES[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + bytes(position)


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """A file of some small tensors, some of them without elements; now and then its end or its header is damaged."""
    shapes = st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.sampled_from([0, 1, 2, 32]), max_size=3))
    content = file_of(draw(st.dictionaries(st.sampled_from(TENSORS), shapes, max_size=4)))
    return content[: draw(st.sampled_from([None, None, None, None, 0, 4, 20, -1]))]


def broken_json(table: st.SearchStrategy[object]) -> st.SearchStrategy[bytes]:
    """Mostly sound JSON, else its first half, or what is no table."""
    sound = table.map(lambda value: json.dumps(value).encode())
    cut = sound.map(lambda text: text[: len(text) // 2])
    return st.one_of(
        sound, sound, sound, cut, st.sampled_from([b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": "\\ud800"}'])
    )


INDEX = broken_json(
    st.fixed_dictionaries(
        {},
        optional={
            "weight_map": st.dictionaries(
                st.sampled_from(TENSORS),
                st.sampled_from([*WEIGHTS, "../x", "/etc/passwd", "./a.safetensors", "", None, 7]),
            )
        },
    )
)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
TABLE = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}, "format": "pack-quantized"}
CONFIG = broken_json(
    st.fixed_dictionaries(
        {},
        optional={
            "model_type": st.sampled_from(["kimi_k2", "qwen3_moe", "other", None, 7]),
            "quantization_config": st.sampled_from(
                [
                    {"quant_method": "fp8", "weight_block_size": [128, 128]},
                    {"quant_method": "compressed-tensors", **TABLE},
                    None,
                ]
            ),
            "base_model_name_or_path": st.sampled_from(["org/base", 7]),
        },
    )
)
PACKED = {f"{TENSORS[1]}_packed": ("I32", [32, 4]), f"{TENSORS[1]}_scale": ("BF16", [32, 1])}
PLAIN = {"a": ("BF16", [0, 8]), "b": ("F32", [])}
BASES: list[dict[str, object]] = [
    {},
    {"model.safetensors": file_of(PLAIN), "config.json": b"{}"},
    {
        "model.safetensors": file_of(PLAIN | PACKED),
        "config.json": json.dumps({"quantization_config": {"quant_method": "compressed-tensors", **TABLE}}).encode(),
    },
    {
        "model-00001-of-00002.safetensors": file_of(PACKED),
        "model-00002-of-00002.safetensors": file_of(PLAIN),
        INDEXES[0]: json.dumps(
            {"weight_map": dict.fromkeys(PACKED, WEIGHTS[1]) | dict.fromkeys(PLAIN, WEIGHTS[2])}
        ).encode(),
        "config.json": json.dumps({"quantization_config": {"quant_method": "compressed-tensors", **TABLE}}).encode(),
    },
]
LINKS = st.sampled_from(["..", ".", "gone", "/etc/hostname", "/dev/null", "model.safetensors", "docs", "x" * 300])


@st.composite
def entries(draw: st.DrawFn) -> dict[str, object]:
    """Path -> its content, None of a folder, or the target of a link in a tuple."""
    found = dict(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(0, 5))):
        kinds = {
            "weights": WEIGHTS,
            "index": INDEXES,
            "config": ["config.json", "adapter_config.json"],
            "other": OTHERS,
        }
        kind = draw(st.sampled_from(["weights", "weights", "index", "config", "config", "other"]))
        contents = {"weights": safetensors(), "index": INDEX, "config": CONFIG, "other": st.just(b"x")}[kind]
        unusual = st.one_of(st.none(), st.tuples(LINKS), st.just(b""))
        name = draw(st.sampled_from(FOLDERS)) + draw(st.sampled_from(kinds[kind]))
        found[name] = draw(unusual if draw(st.integers(0, 9)) == 0 else contents)
    return found


def lay_out(root: Path, found: dict[str, object]) -> None:
    for name, content in found.items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            elif isinstance(content, tuple):
                path.symlink_to(content[0])
            else:
                assert isinstance(content, bytes)
                path.write_bytes(content)
        except OSError:  # one entry is in the way of another
            continue


def look_at(root: Path) -> None:
    """What the commands do before a byte is written; KconvertError is the only way in which it may fail."""
    try:
        kconvert.inspect(root)
    except KconvertError:
        return
    for target in ("bf16", "int4"):
        try:
            kconvert.plan(root, Recipe(target))
        except KconvertError:
            continue


class Bench:
    """A fresh directory for each case, and the one before taken away."""

    def __init__(self, home: Path) -> None:
        self._roots = (home / f"{number}" for number in itertools.count())
        self._last: Path | None = None

    def lay(self, found: dict[str, object]) -> Path:
        if self._last is not None:
            shutil.rmtree(self._last)
        self._last = next(self._roots)
        self._last.mkdir()
        lay_out(self._last, found)
        return self._last


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
few = settings(max_examples=500, suppress_health_check=checks)
many = settings(max_examples=10_000, suppress_health_check=checks)
by_command = settings(max_examples=50, suppress_health_check=checks)


@few
@given(entries())
def test_any_directory_is_read_or_refused_in_one_sentence(bench: Bench, found: dict[str, object]) -> None:
    look_at(bench.lay(found))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@many
@given(entries())
def test_ten_thousand_directories_are_read_or_refused_in_one_sentence(bench: Bench, found: dict[str, object]) -> None:
    look_at(bench.lay(found))


@by_command
@given(entries(), st.sampled_from(["inspect", "int4-to-bf16", "verify", "diff", "repack-amx"]), st.booleans())
def test_any_directory_is_no_traceback_of_a_command(
    bench: Bench, found: dict[str, object], command: str, links: bool
) -> None:
    root = str(bench.lay(found))
    words = {
        "inspect": ["inspect", root],
        "int4-to-bf16": ["int4-to-bf16", root, f"{root}-dst", "--dry-run"],
        "verify": ["verify", root, root],
        "diff": ["diff", root, root],
        "repack-amx": ["repack-amx", root, f"{root}-dst", "--method", "AMXINT4", "--numa", "1", "--dry-run"],
    }[command]
    result = CliRunner().invoke(main, [*words, *(["--allow-links"] if links else [])])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if result.exit_code:
        assert result.exit_code in (1, 2)
        assert result.stderr.count("\n") == 1, result.stderr
    assert not os.path.exists(f"{root}-dst")
