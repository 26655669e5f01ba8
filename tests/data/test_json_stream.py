"""JSON in blocks: what `json.loads` says of a whole text, in bounded memory."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mocov3_ds.data import json_stream
from mocov3_ds.data.json_stream import JsonStream


def blocks(text, size):
    data = text if isinstance(text, bytes) else text.encode()
    return (data[begin : begin + size] for begin in range(0, len(data), size))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(max_size=4), VALUES, max_size=4),
    st.lists(VALUES, max_size=4),
    st.integers(1, 9),
    st.booleans(),
    st.none() | st.integers(0, 2),
)
def test_values_are_those_of_the_whole_text(tree, items, size, ascii_only, indent):
    text = json.dumps({**tree, "items": items}, ensure_ascii=ascii_only, indent=indent)
    stream, found = JsonStream(blocks(text, size)), {}
    for key in stream.entries():
        found[key] = list(stream.elements()) if key == "items" else stream.take_value()
    stream.check_end()
    assert found == {**tree, "items": items}


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", '{"a": 1', '{"a": 1,}', '{"a" 1}', '{"a": 1} x', "{3: 4}",
    '{"a": 1 "b": 2}', b"\xff\xfe", '{"a": "', '{"a": nul}',
])  # fmt: skip
def test_what_is_no_object_is_refused_in_one_line(text):
    stream = JsonStream(blocks(text, 3))
    with pytest.raises(ValueError) as caught:
        for _ in stream.entries():
            stream.take_value()
        stream.check_end()
    assert "\n" not in str(caught.value)


def test_a_number_may_go_on_in_the_next_block():
    for text, number in ((b'{"a": 1234}', 1234), (b'{"a": -1.5e+2 }', -150.0)):
        for cut in range(1, len(text)):
            stream = JsonStream([text[:cut], text[cut:]])
            assert [stream.take_value() for _ in stream.entries()] == [number]


@pytest.mark.parametrize("filling", [b"{},", b"[],", b'"ab",'])
def test_memory_is_bounded_whatever_the_size(filling, monkeypatch):
    """What is held is a value of the largest size, not the file: here 3 MB in values of 64 kB."""
    monkeypatch.setattr(json_stream, "VALUE_LIMIT", 1 << 16)
    filled = [filling * ((1 << 14) // len(filling))] * 200
    tracemalloc.start()
    stream = JsonStream([b'{"made": [', *filled, b"{}]}"])
    with pytest.raises(ValueError, match="longer than 65536 characters"):
        for _ in stream.entries():
            stream.take_value()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * (1 << 16)


def test_elements_are_not_held():
    count, block = 0, b'{"a": 1},' * 1000
    tracemalloc.start()
    stream = JsonStream([b'{"made": [', *[block] * 30, b"{}]}"])
    for _ in stream.entries():
        for _ in stream.elements():
            count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_001 and peak < 100_000
