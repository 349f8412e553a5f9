import json
import re
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from kconvert.checkpoint import safetensors as header
from kconvert.checkpoint.safetensors import MAX_HEADER_BYTES, encode_header, in_order, read_header
from kconvert.errors import KconvertError
from kconvert.formats.dtypes import DTYPE_BITS, tensor_bytes

FILE = "some/model.safetensors"
GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def file_bytes(text, data=b"", length=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parse(content):
    return read_header(FILE, len(content), lambda start, nbytes: content[start : start + nbytes])


def refusal(content):
    with pytest.raises(KconvertError) as caught:
        parse(content)
    message = str(caught.value)
    assert message.startswith(FILE)
    assert "\n" not in message
    return message


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(safetensors.torch._TYPES)), shapes), max_size=6))
def test_every_file_that_safetensors_writes_is_read_with_the_same_tensors(tensors):
    made = {
        name: torch.arange(2 * torch.Size(shape).numel()).to(torch.uint8).repeat(16)[: tensor_bytes(dtype, shape)]
        for name, (dtype, shape) in tensors.items()
    }
    content = safetensors.torch.save(
        {
            name: made[name].clone().view(safetensors.torch._TYPES[dtype]).reshape(shape)
            for name, (dtype, shape) in tensors.items()
        },
        {"format": "pt"},
    )
    entries = {entry.name: entry for entry in parse(content)}
    assert {name: (entry.dtype, list(entry.shape)) for name, entry in entries.items()} == tensors
    for name, entry in entries.items():
        assert content[entry.start : entry.start + entry.nbytes] == made[name].numpy().tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_size_that_safetensors_gives_it(dtype):
    text = {"x": {"dtype": dtype, "shape": [8, 3], "data_offsets": [0, 3 * DTYPE_BITS[dtype]]}}
    content = file_bytes(text, bytes(3 * DTYPE_BITS[dtype]))
    assert safetensors.deserialize(content)[0][1]["shape"] == [8, 3]
    assert parse(content)[0].nbytes == 3 * DTYPE_BITS[dtype]


def sound_tables():
    """Tables of a few tensors in a row, with the size of their data."""

    def table(specs):
        position, entries = 0, {}
        for name, (dtype, shape) in specs.items():
            stop = position + tensor_bytes(dtype, shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
            position = stop
        return entries, position

    spec = st.tuples(st.sampled_from(["U8", "BF16", "I32", "BOOL", "F8_E4M3"]), shapes)
    return st.dictionaries(names, spec, max_size=4).map(table)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.just(2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_files(draw):
    """A sound file in which one thing or two are changed, perhaps for the same."""
    table, size = draw(sound_tables())
    for _ in range(draw(st.integers(1, 2))):
        if not table:
            break
        name = draw(st.sampled_from(sorted(table)))
        if not isinstance(table[name], dict):
            continue
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        match draw(st.sampled_from(["offset", "offset", "dimension", "value", "entry", "loss", "dtype"])):
            case "offset":
                table[name]["data_offsets"] = [o + draw(st.integers(-2, 2)) for o in (0, size)]
            case "dimension":
                table[name]["shape"] = draw(
                    st.lists(st.integers(-1, 4), max_size=3) | st.just([2**64]) | st.just([2**40] * 2)
                )
            case "value":
                table[name][key] = draw(json_values)
            case "entry":
                table[name] = draw(json_values)
            case "loss":
                table[name].pop(key, None)
            case "dtype":
                table[name]["dtype"] = draw(st.sampled_from([*DTYPE_BITS, "u8", "", "F128"]))
    data = bytes(max(0, size + draw(st.integers(-2, 2))))
    text = json.dumps(table).encode()
    return file_bytes(text, data, max(0, len(text) + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 2**40, 2**63]))))


def read_or_refused(content):
    """What the file holds, None when it is refused as it should be."""
    try:
        return {entry.name: (entry.dtype, list(entry.shape)) for entry in parse(content)}
    except KconvertError as error:
        message = str(error)
    assert message.startswith(FILE)
    assert "\n" not in message
    return None


def accepted_by_safetensors(content):
    try:
        return {name: (info["dtype"], info["shape"]) for name, info in safetensors.deserialize(content)}
    except (safetensors.SafetensorError, OverflowError):
        return None


@given(damaged_files())
def test_a_damaged_file_is_refused_in_one_sentence_and_only_if_safetensors_refuses_it(content):
    assert read_or_refused(content) == accepted_by_safetensors(content)


@given(st.binary(max_size=64) | st.binary(max_size=64).map(file_bytes) | json_values.map(file_bytes))
def test_rubbish_is_refused_or_read_but_never_crashes(content):
    read_or_refused(content)


@pytest.mark.parametrize(
    ("table", "data", "fault"),
    [
        ({"a": {**GOOD, "dtype": "U9"}}, b"ab", "unknown dtype 'U9'"),
        ({"a": {**GOOD, "dtype": 8}}, b"ab", "unknown dtype 8"),
        ({"a": {**GOOD, "shape": [-2]}}, b"ab", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [2.0]}}, b"ab", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [True, 2]}}, b"ab", "not a list of sizes"),
        ({"a": {**GOOD, "shape": 2}}, b"ab", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [1 << 64]}}, b"ab", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [3]}}, b"ab", "span 2"),
        ({"a": {**GOOD, "shape": [2**62] * 2}}, b"ab", "span 2"),
        ({"a": {**GOOD, "dtype": "F4", "shape": [5]}}, b"ab", "span 2"),
        ({"a": {**GOOD, "data_offsets": [2, 0]}}, b"ab", "span -2"),
        ({"a": {**GOOD, "data_offsets": [0, 2, 4]}}, b"ab", "not two sizes"),
        ({"a": {**GOOD, "data_offsets": [-2, 0]}}, b"ab", "not two sizes"),
        ({"a": {**GOOD, "data_offsets": "02"}}, b"ab", "not two sizes"),
        ({"a": {"dtype": "U8", "shape": [2]}}, b"ab", "not described by"),
        ({"a": [1, 2]}, b"ab", "not described by"),
        ({"b": GOOD, "a": {**GOOD, "data_offsets": [1, 3]}}, b"abc", "overlaps"),
        ({"b": GOOD, "a": {**GOOD, "data_offsets": [0, 2]}}, b"ab", "overlaps"),
        ({"b": GOOD, "a": {**GOOD, "data_offsets": [3, 5]}}, b"abcde", "gap"),
        ({"a": {**GOOD, "data_offsets": [1, 3]}}, b"abc", "gap"),
        ({"b": GOOD, "a": {**GOOD, "shape": [0], "data_offsets": [1, 1]}}, b"ab", "overlaps"),
    ],
)
def test_a_refusal_names_the_tensor_at_fault(table, data, fault):
    message = refusal(file_bytes(table, data))
    assert fault in message
    assert "'a'" in message or ("'b'" in message and "overlaps" in message)


def test_a_tensor_named_twice_is_refused_by_name():
    entry = json.dumps(GOOD)
    assert "'a' twice" in refusal(file_bytes(f'{{"a": {entry}, "b": {entry}, "a": {entry}}}'.encode(), b"ab"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "0 bytes are too few"),
        (b"1234567", "7 bytes are too few"),
        (file_bytes({"a": GOOD}, b"a"), "is truncated"),
        (file_bytes({"a": GOOD}, b"abc"), "bytes that no tensor owns"),
        (file_bytes({}, b"a"), "bytes that no tensor owns"),
        (file_bytes({"a": GOOD}, b"ab")[:30], "truncated"),
        (file_bytes(b"", b"ab"), "not valid JSON"),
        (file_bytes(b'{"a": '), "not valid JSON"),
        (file_bytes(b"{}{}"), "not valid JSON"),
        (file_bytes(b"\xff\xfe{}"), "not valid JSON"),
        (file_bytes(b"[]"), "not a JSON object"),
        (file_bytes(b"null"), "not a JSON object"),
    ],
)
def test_a_file_that_is_not_whole_safetensors_is_refused(content, fault):
    assert fault in refusal(content)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,2]}}',
        pytest.param(
            json.dumps({"a": {**GOOD, "shape": [2**62] * 500}}).encode(), id="a product too long to be printed"
        ),
        pytest.param(b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', id="a name that is no Unicode"),
    ],
)
def test_a_header_made_to_break_its_reader_is_refused(text):
    refusal(file_bytes(text, b"ab"))


@pytest.mark.timeout(5)
def test_a_shape_of_very_many_dimensions_is_refused_at_once():
    refusal(file_bytes({"a": {**GOOD, "shape": [2**62] * 200_000}}, b"ab"))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_over_the_limit_is_refused_before_it_is_read(length):
    def read(start, nbytes):
        assert (start, nbytes) == (0, 8)
        return struct.pack("<Q", length)

    with pytest.raises(KconvertError, match=re.escape(f"{FILE}: its header claims {length} bytes, over the limit")):
        read_header(FILE, 2**65, read)


def test_a_header_of_exactly_the_limit_is_read():
    asked = []

    def read(start, nbytes):
        asked.append((start, nbytes))
        return struct.pack("<Q", MAX_HEADER_BYTES) if start == 0 else b"{}"

    with pytest.raises(KconvertError, match="bytes that no tensor owns"):
        read_header(FILE, 8 + MAX_HEADER_BYTES, read)
    assert asked == [(0, 8), (8, MAX_HEADER_BYTES)]


layouts = st.dictionaries(
    names,
    st.tuples(st.sampled_from(["BOOL", "U8", "I16", "BF16", "F16", "I32", "F32", "I64", "F64"]), shapes),
    max_size=8,
)


def layout(tensors, metadata):
    """The header of a file of these tensors, and what a reader finds in it."""
    head = encode_header(in_order(tensors), metadata)
    size = len(head) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in tensors)
    return head, read_header(FILE, size, lambda start, nbytes: head[start : start + nbytes], inside="")


@given(layouts, st.randoms())
def test_what_is_laid_out_is_what_safetensors_reads(tensors, random):
    head, entries = layout([(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()], {"format": "pt"})
    data = {entry.name: random.randbytes(entry.nbytes) for entry in entries}
    found = dict(safetensors.deserialize(head + b"".join(data[entry.name] for entry in entries)))
    assert {name: (info["dtype"], info["shape"]) for name, info in found.items()} == tensors
    assert {name: bytes(info["data"]) for name, info in found.items()} == data


@given(layouts)
def test_a_layout_reads_back_as_itself_with_every_tensor_aligned(tensors):
    described = [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    head, entries = layout(described, {"format": "pt"})
    assert len(head) % 4096 == 0
    assert all(entry.start % (DTYPE_BITS[entry.dtype] // 8) == 0 for entry in entries)
    assert sorted((entry.name, entry.dtype, entry.shape) for entry in entries) == sorted(described)


def test_a_layout_opens_with_safe_open_and_keeps_its_metadata(tmp_path):
    head, entries = layout([("b", "U8", (3,)), ("a", "F32", (2, 2)), ("ü", "BF16", ())], {"format": "pt"})
    values = {"a": torch.eye(2), "b": torch.tensor([1, 2, 3], dtype=torch.uint8), "ü": torch.tensor(0.5).bfloat16()}
    data = b"".join(values[entry.name].reshape(-1).view(torch.uint8).numpy().tobytes() for entry in entries)
    (tmp_path / "x.safetensors").write_bytes(head + data)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == values.keys()
        assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())


def test_tensors_of_one_dtype_are_laid_out_in_the_given_order():
    _, entries = layout([("z", "BF16", (2,)), ("a", "BF16", (2,)), ("w", "F32", (1,)), ("b", "BF16", (2,))], {})
    assert [entry.name for entry in entries] == ["w", "z", "a", "b"]


def test_a_shard_whose_header_would_pass_the_limit_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 10_000)
    layout([(f"tensor {i}", "U8", (1,)) for i in range(100)], {})
    with pytest.raises(KconvertError, match="choose a smaller --shard-size"):
        layout([(f"tensor {i}", "U8", (1,)) for i in range(200)], {})
