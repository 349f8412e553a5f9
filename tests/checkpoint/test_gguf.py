"""Headers of GGUF files: what gguf's own writer makes is read as its reader does; all else is one sentence."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kconvert import KconvertError
from kconvert.checkpoint.gguf import TYPES, Array
from kconvert.checkpoint.gguf_files import is_gguf, open_gguf

Types = gguf.GGMLQuantizationType


def write(path: Path, alignment: int | None = None) -> Path:
    """Keys of every kind, and tensors of several types."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "deepseek2")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("toy")
    writer.add_uint8("toy.u8", 200)
    writer.add_int8("toy.i8", -3)
    writer.add_uint16("toy.u16", 60000)
    writer.add_int16("toy.i16", -30000)
    writer.add_int32("toy.i32", -70000)
    writer.add_uint64("toy.u64", 1 << 40)
    writer.add_int64("toy.i64", -(1 << 40))
    writer.add_float32("toy.f32", 0.5)
    writer.add_float64("toy.f64", 1e-300)
    writer.add_bool("toy.bool", True)
    writer.add_token_list([f"word{n}" for n in range(3000)])
    writer.add_array("toy.numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", random.random((10, 64), np.float32))
    writer.add_tensor("odd", random.random(3, np.float32))
    writer.add_tensor("half", random.random((2, 5), np.float32).astype(np.float16))
    for kind in (Types.Q4_0, Types.Q8_0, Types.MXFP4, Types.Q6_K, Types.IQ4_XS):
        nbytes = gguf.GGML_QUANT_SIZES[kind][1]
        codes = random.integers(0, 255, (4, 6, 2 * nbytes), np.uint8)
        writer.add_tensor(f"blk.0.{kind.name}.weight", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write(tmp_path / "toy.gguf")


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_a_file_is_read_as_its_makers_reader_reads_it(tmp_path: Path, alignment: int | None) -> None:
    path = write(tmp_path / "toy.gguf", alignment)
    found, wanted = open_gguf(path), gguf.GGUFReader(path)
    assert [
        (tensor.name, tensor.dtype, list(tensor.shape), tensor.start, tensor.nbytes)
        for tensor in found.tensors.values()
    ] == [
        (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()[::-1], tensor.data_offset, tensor.n_bytes)
        for tensor in wanted.tensors
    ]
    for key, field in wanted.fields.items():
        if key.startswith("GGUF."):
            continue
        value = found.metadata[key]
        assert (value.items == len(field.data)) if isinstance(value, Array) else (value == field.contents())
    assert found.metadata["tokenizer.ggml.tokens"].items == 3000
    assert found.architecture == "deepseek2"
    assert found.name == "toy.gguf"
    with found.reader() as reader:
        tensor = found.tensors["token_embd.weight"]
        data = reader.read(tensor.file, tensor.start, tensor.nbytes)
    assert data == wanted.tensors[0].data.tobytes()


def test_the_sizes_of_all_types_are_ggmls() -> None:
    known = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in Types}
    assert {number: tuple(type) for number, type in TYPES.items()} == known


def test_a_type_that_nobody_knows_is_named_by_its_number(toy: Path) -> None:
    edit(toy, entry(toy, "odd") + 4 + 8, struct.pack("<I", 77))
    tensor = open_gguf(toy).tensors["odd"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("TYPE_77", (3,), 32)


def edit(path: Path, place: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(data)] = data
    path.write_bytes(content)


def entry(path: Path, name: str) -> int:
    """Where the number of dimensions of a tensor stands."""
    return path.read_bytes().index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


def key(path: Path, name: str) -> int:
    """Where the type of the value of a key stands."""
    return entry(path, name)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file of this kind": (lambda path: edit(path, 0, b"ggml"), "does not begin with GGUF"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
    "nothing": (lambda path: path.write_bytes(b""), "too few"),
    "version 1": (lambda path: edit(path, 4, struct.pack("<I", 1)), "version 1"),
    "version 4": (lambda path: edit(path, 4, struct.pack("<I", 4)), "version 4"),
    "big-endian": (lambda path: edit(path, 4, struct.pack(">I", 3)), "big-endian"),
    "too many tensors": (lambda path: edit(path, 8, struct.pack("<Q", 1 << 62)), "claims 4611686018427387904 tensors"),
    "too many keys": (lambda path: edit(path, 16, struct.pack("<Q", 1 << 62)), "claims 4611686018427387904 keys"),
    "a key of 2^60 letters": (lambda path: edit(path, 24, struct.pack("<Q", 1 << 60)), "bytes of text"),
    "a value of an unknown type": (lambda path: edit(path, key(path, "toy.u8"), struct.pack("<I", 99)), "type 99"),
    "a list of an unknown type": (lambda path: edit(path, key(path, "toy.numbers") + 4, b"\x63"), "toy.numbers"),
    "a list without end": (
        lambda path: edit(path, key(path, "tokenizer.ggml.tokens") + 8, struct.pack("<Q", 1 << 60)),
        "tokenizer.ggml.tokens",
    ),
    "numbers without end": (
        lambda path: edit(path, key(path, "toy.numbers") + 8, struct.pack("<Q", 1 << 60)),
        "inside its header",
    ),
    "a name that is not UTF-8": (lambda path: edit(path, entry(path, "odd") - 3, b"\xff"), "not UTF-8"),
    "a name with a line break": (lambda path: edit(path, entry(path, "odd") - 3, b"\n"), "that can be printed"),
    "five dimensions": (lambda path: edit(path, entry(path, "odd"), struct.pack("<I", 5)), "'odd' claims 5 dimensions"),
    "a huge shape": (
        lambda path: edit(path, entry(path, "half") + 4, struct.pack("<QQ", 1 << 40, 1 << 40)),
        "larger than any file",
    ),
    "a shape beyond the file": (
        lambda path: edit(path, entry(path, "blk.0.IQ4_XS.weight") + 4 + 16, struct.pack("<Q", 1 << 20)),
        "truncated",
    ),
    "overlapping tensors": (lambda path: edit(path, entry(path, "half") + 4 + 16 + 4, bytes(8)), "overlaps"),
    "a shape that eats the next": (
        lambda path: edit(path, entry(path, "odd") + 4, struct.pack("<Q", 30)),
        "tensor 'half' overlaps",
    ),
    "a byte behind the last tensor": (
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "bytes behind its tensors, 1 of them",
    ),
    "a gap": (lambda path: edit(path, entry(path, "odd") + 4, struct.pack("<Q", 0)), "leaves a gap"),
    "an offset beside the alignment": (
        lambda path: edit(path, entry(path, "odd") + 4 + 8 + 4, struct.pack("<Q", 2561)),
        "no multiple of its alignment",
    ),
    "half a block": (
        lambda path: edit(path, entry(path, "blk.0.Q4_0.weight") + 4, struct.pack("<Q", 63)),
        "no whole blocks of 32",
    ),
    "the same name twice": (lambda path: edit(path, entry(path, "blk.0.Q8_0.weight") - 10, b"4_0"), "twice"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_wrong_with_a_file_is_said_of_it(toy: Path, kind: str) -> None:
    damage, words = DAMAGES[kind]
    damage(toy)
    with pytest.raises(KconvertError) as caught:
        open_gguf(toy)
    message = str(caught.value)
    assert str(toy) in message
    assert words in message
    assert len(message) < 300 + len(str(toy))


@pytest.mark.parametrize("alignment", [0, 3, 1 << 31 | 1])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path, alignment: int) -> None:
    path = write(tmp_path / "toy.gguf", 64)
    edit(path, key(path, "general.alignment") + 4, struct.pack("<I", alignment))
    with pytest.raises(KconvertError, match="no power of two"):
        open_gguf(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(toy: Path, share: float) -> None:
    os.truncate(toy, int(toy.stat().st_size * share))
    with pytest.raises(KconvertError, match=r"toy\.gguf"):
        open_gguf(toy)


@pytest.fixture(scope="module")
def bytes_of_toy(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("fuzz") / "toy.gguf").read_bytes()


@settings(max_examples=300)
@given(st.data())
def test_no_damage_is_a_traceback(bytes_of_toy: bytes, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(bytes_of_toy)
    interesting = st.integers(0, 700) | st.integers(len(content) - 9000, len(content) - 6000)
    for place in data.draw(st.lists(interesting, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "toy.gguf"
    path.write_bytes(content)
    with suppress(KconvertError):
        open_gguf(path)


def split(root: Path, total: int = 3, stem: str = "toy") -> list[Path]:
    """A model in parts, as llama.cpp splits it."""
    paths = []
    for number in range(total):
        path = root / f"{stem}-{number + 1:05d}-of-{total:05d}.gguf"
        writer = gguf.GGUFWriter(path, "deepseek2")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", total)
        writer.add_int32("split.tensors.count", total)
        writer.add_tensor(f"blk.{number}.attn_norm.weight", np.full(8, number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("which", [0, 1, 2, None], ids=["first", "middle", "last", "directory"])
def test_a_split_model_is_read_by_any_of_its_parts(tmp_path: Path, which: int | None) -> None:
    paths = split(tmp_path)
    found = open_gguf(tmp_path if which is None else paths[which])
    assert list(found.files) == [path.name for path in paths]
    assert [tensor.file for tensor in found.tensors.values()] == list(found.files)


def test_a_first_part_may_have_no_tensors(tmp_path: Path) -> None:
    first, second = split(tmp_path, 2)
    with_keys = gguf.GGUFWriter(first, "deepseek2")
    with_keys.add_uint16("split.no", 0)
    with_keys.add_uint16("split.count", 2)
    with_keys.add_int32("split.tensors.count", 1)
    with_keys.write_header_to_file()
    with_keys.write_kv_data_to_file()
    with_keys.write_tensors_to_file()
    with_keys.close()
    edit(second, key(second, "split.tensors.count") + 4, struct.pack("<i", 1))
    assert list(open_gguf(tmp_path).tensors) == ["blk.1.attn_norm.weight"]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_part_that_is_missing_is_named(tmp_path: Path, missing: int) -> None:
    paths = split(tmp_path)
    paths[missing].unlink()
    with pytest.raises(KconvertError, match=f"{paths[missing].name} is missing"):
        open_gguf(paths[missing - 1])


def test_parts_that_were_renamed_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(KconvertError, match="says that it is part 0 "):
        open_gguf(tmp_path / "alone.gguf")
    (tmp_path / "alone.gguf").rename(paths[0])
    paths[1].rename(tmp_path / "second")
    paths[2].rename(paths[1])
    (tmp_path / "second").rename(paths[2])
    with pytest.raises(KconvertError, match="says that it is part 2 "):
        open_gguf(tmp_path)


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    (tmp_path / "more").mkdir()
    split(tmp_path / "more")[1].rename(paths[1])
    content = paths[1].read_bytes().replace(b"blk.1.", b"blk.0.")
    paths[1].write_bytes(content)
    with pytest.raises(KconvertError, match=r"'blk\.0\.attn_norm\.weight' is here and in"):
        open_gguf(tmp_path)


def test_a_directory_with_two_models_asks_for_one(tmp_path: Path) -> None:
    split(tmp_path)
    write(tmp_path / "mmproj-toy.gguf")
    assert len(open_gguf(tmp_path).files) == 3
    write(tmp_path / "another.gguf")
    with pytest.raises(KconvertError, match="several models"):
        open_gguf(tmp_path)


def test_what_a_gguf_is(tmp_path: Path, int4: Path) -> None:
    assert is_gguf(write(tmp_path / "toy.gguf"))
    assert is_gguf(tmp_path)
    assert not is_gguf(int4)
    assert not is_gguf(tmp_path / "nothing.gguf")
    (tmp_path / "toy.gguf").rename(tmp_path / "sha256-0123")
    assert is_gguf(tmp_path / "sha256-0123")
    assert open_gguf(tmp_path / "sha256-0123").name == "sha256-0123"


def test_a_link_that_leads_out_is_not_followed(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "link.gguf").symlink_to(toy)
    with pytest.raises(KconvertError, match="symbolic link"):
        open_gguf(tmp_path / "there" / "link.gguf")
