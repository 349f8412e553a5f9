"""Checkpoints to convert and to damage, made with the product's own `sample`, and the command as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from sizes import SIZES

from kconvert import Recipe, convert, plan
from kconvert.targets.sample import SampleRecipe, plan_synthetic

hypothesis.settings.register_profile(
    "kconvert",
    deadline=None,
    derandomize=True,  # what passes here passes everywhere
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("kconvert")

# Commands start as a user's do, whose Python keeps what it compiled: half a second of each, where this is set.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

INDEX = "model.safetensors.index.json"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: a third of the time a test waits, for processes, servers and files."""
    return (os.cpu_count() or 1) + 1


Kconvert = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class RawTensor:
    """A tensor as it lies in a file. Nothing checks that the three agree: that is what it is for."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class RawCheckpoint:
    """A checkpoint read whole by code that shares nothing with the product's, to be damaged and saved again.

    `files` maps a file's name to its tensors by name. `save` writes them all, with the index and config.json.
    """

    root: Path
    files: dict[str, dict[str, RawTensor]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path) -> RawCheckpoint:
        files = {path.name: read_safetensors(path) for path in sorted(root.glob("*.safetensors"))}
        return cls(root, files, json.loads((root / "config.json").read_text()))

    def file_of(self, name: str) -> str:
        return next(file for file, tensors in self.files.items() if name in tensors)

    def __getitem__(self, name: str) -> RawTensor:
        return self.files[self.file_of(name)][name]

    def __iter__(self) -> Iterator[str]:
        return (name for tensors in self.files.values() for name in tensors)

    def put(self, name: str, tensor: RawTensor, file: str | None = None) -> None:
        """Add a tensor, to the first file unless another is named."""
        self.files[file or next(iter(self.files))][name] = tensor

    def pop(self, name: str) -> RawTensor:
        return self.files[self.file_of(name)].pop(name)

    def move(self, name: str, file: str) -> None:
        """Put the tensor into another file, which may be new."""
        self.files.setdefault(file, {})[name] = self.pop(name)

    def save(self, root: Path | None = None) -> Path:
        root = root or self.root
        root.mkdir(parents=True, exist_ok=True)
        for file, tensors in self.files.items():
            write_safetensors(root / file, tensors)
        weight_map = {name: file for file, tensors in self.files.items() for name in tensors}
        total = sum(len(tensor.data) for tensors in self.files.values() for tensor in tensors.values())
        (root / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
        (root / "config.json").write_text(json.dumps(self.config))
        return root


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    return {
        name: RawTensor(info["dtype"], info["shape"], data[slice(*info["data_offsets"])])
        for name, info in table.items()
        if name != "__metadata__"
    }


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + len(tensor.data)]
        table[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        position += len(tensor.data)
    write_raw(path, json.dumps(table).encode(), b"".join(tensor.data for tensor in tensors.values()))


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header text, any data and, for a lie, any stated header length."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@dataclass(frozen=True)
class Raw:
    """Raw access to safetensors files: what tests damage checkpoints with."""

    Tensor = RawTensor
    load = staticmethod(RawCheckpoint.load)
    new = RawCheckpoint
    read_file = staticmethod(read_safetensors)
    write_file = staticmethod(write_safetensors)
    write_bytes = staticmethod(write_raw)


@pytest.fixture(scope="session")
def raw() -> Raw:
    return Raw()


def make_sample(root: Path, *, shard_size: int = 500_000, scatter: bool = False, seed: int = 0, **sizes: int) -> Path:
    convert(plan_synthetic(SampleRecipe("kimi-k2-thinking", {**SIZES, **sizes}, shard_size, scatter, seed)), root)
    return root


@pytest.fixture(scope="session")
def sample() -> Callable[..., Path]:
    """`sample(root, shard_size=, scatter=, seed=, layers=, …)` writes a tiny Kimi-K2-shaped INT4 checkpoint into root."""
    return make_sample


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kimi-K2-shaped INT4 checkpoint of several shards; look, do not touch (see int4_copy)."""
    return make_sample(tmp_path_factory.mktemp("session") / "int4")


@pytest.fixture(scope="session")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `int4`, the three tensors of each in different shards."""
    return make_sample(tmp_path_factory.mktemp("session") / "scattered", scatter=True)


@pytest.fixture(scope="session")
def bf16(int4: Path) -> Path:
    """`int4` converted to BF16, in shards of 1 MB; look, do not touch (see bf16_copy)."""
    root = int4.parent / "bf16"
    convert(plan(int4, Recipe("bf16", shard_size=1_000_000)), root)
    return root


@pytest.fixture(scope="session")
def fp8(int4: Path) -> Path:
    """`int4` with its experts in FP8; look, do not touch."""
    root = int4.parent / "fp8"
    convert(plan(int4, Recipe("fp8")), root)
    return root


@pytest.fixture
def int4_copy(int4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int4, tmp_path / "int4", ignore=shutil.ignore_patterns(".kconvert")))


@pytest.fixture
def bf16_copy(bf16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bf16, tmp_path / "bf16", ignore=shutil.ignore_patterns(".kconvert")))


@pytest.fixture(scope="session")
def kconvert() -> Kconvert:
    """`kconvert(*arguments, env={}, timeout=60, **popen)` runs the installed command, away from any terminal."""
    command = Path(sys.executable).with_name("kconvert")

    def run(
        *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *map(str, arguments)],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            **options,
        )

    return run


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """`tree(root)` is every file below root, by relative path, with its bytes; without the journal's directory."""

    def read(root: Path) -> dict[str, bytes]:
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        content = {str(path.relative_to(root)): path for path in files}
        return {name: path.read_bytes() for name, path in content.items() if not name.startswith(".kconvert")}

    return read
