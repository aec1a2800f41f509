"""The frame codec: what goes in comes out; what is not a frame is a FrameError, whatever it is."""

from __future__ import annotations

import math
import subprocess
import sys
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.client import RolloutGroup
from orchestrator.core.ledger.groups import GroupFacts, Place, StoredGroup
from orchestrator.errors import FrameError
from orchestrator.frames import (
    DEFAULT_MAX_PAYLOAD_BYTES,
    MAX_HEADER_BYTES,
    MAX_INLINE_JSON_BYTES,
    PREFIX_BYTES,
    GroupFrame,
    encode_frame,
    encode_group,
    parse_header,
    parse_prefix,
)
from orchestrator.records import NO_VERSION, Group, Prompt, Sample, SampleStatus
from tests.support.builders import make_group
from tests.support.group_frames import iter_group_frames

int32s = st.integers(-(2**31), 2**31 - 1)
any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)  # lone surrogates too
utf8_text = st.text(st.characters(codec="utf-8"), max_size=30)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | utf8_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(utf8_text, inner, max_size=3),
    max_leaves=8,
)
large_text = st.builds(
    lambda char, extra: char * (MAX_INLINE_JSON_BYTES + extra), st.sampled_from("aé☃𝄞"), st.integers(0, 9)
)
prompts = (
    utf8_text | st.none() | large_text | st.lists(st.fixed_dictionaries({"role": utf8_text, "content": utf8_text}))
)


@st.composite
def samples(draw: st.DrawFn, *, with_logprobs: bool) -> Sample:
    sample = Sample(index=draw(st.integers(0, 2**40)), status=draw(st.sampled_from(SampleStatus)))
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.lists(int32s, max_size=6))
        logprobs = draw(st.lists(st.floats(-50, 0, width=32), min_size=len(tokens), max_size=len(tokens)))
        sample.extend(tokens, logprobs if with_logprobs else None, draw(st.integers(NO_VERSION, 5)))
    if not with_logprobs:
        sample.logprobs = None
    sample.text = draw(any_text)
    sample.reward = draw(st.floats(allow_nan=False, allow_infinity=False))
    if draw(st.booleans()):
        sample.loss_mask = bytes(
            draw(st.lists(st.integers(0, 1), min_size=len(sample.tokens), max_size=len(sample.tokens)))
        )
    sample.metadata = draw(st.dictionaries(utf8_text, json_values, max_size=2))
    sample.metadata |= draw(st.sampled_from([{}, {"pieces": 1}, {"pieces": 3}]))
    sample.finish_reason = draw(st.sampled_from(["stop", "length", None]))
    return sample


@st.composite
def groups(draw: st.DrawFn) -> Group:
    has_logprobs = draw(st.lists(st.booleans(), max_size=4))
    prompt = Prompt(
        source=draw(utf8_text),
        prompt_index=draw(st.integers(0, 2**40)),
        epoch=draw(st.integers(0, 99)),
        content=draw(prompts),
        label=draw(json_values | large_text),
        metadata=draw(st.dictionaries(utf8_text, json_values, max_size=2)),
    )
    return Group(
        source=prompt.source,
        group_index=draw(st.integers(0, 2**40)),
        prompt=prompt,
        prompt_tokens=array("i", draw(st.lists(int32s, max_size=9))),
        samples=[draw(samples(with_logprobs=has)) for has in has_logprobs],
        sampling={"temperature": 1.0},
    )


@given(st.lists(int32s, max_size=9), st.lists(st.floats(-1e30, 0) | st.integers(-99, 0), max_size=9))
@pytest.mark.parametrize("times", [1, 40])
def test_tokens_of_lists_are_those_of_arrays(times: int, tokens: list[int], logprobs: list[float]) -> None:
    """However long the lists are: short and long ones are converted by different means."""
    tokens, logprobs = [7, *tokens] * times, [-0.1, *logprobs] * times
    n = min(len(tokens), len(logprobs))
    sample = Sample(index=0)
    for _ in range(2):
        sample.extend(tokens[:n], logprobs[:n], 0)
    assert sample.tokens == array("i", 2 * tokens[:n])
    assert sample.logprobs == array("f", 2 * logprobs[:n])


@pytest.mark.parametrize("length", [2, 1000])
@pytest.mark.parametrize(("bad", "error"), [(2**31, OverflowError), (-(2**31) - 1, OverflowError), ("1", TypeError)])
def test_a_token_that_is_none_is_refused_at_every_length(length: int, bad: Any, error: type[Exception]) -> None:
    sample = Sample(index=0)
    with pytest.raises(error):
        sample.extend([0] * (length - 1) + [bad], None, 0)
    assert not sample.tokens


@given(groups())
def test_a_group_comes_out_as_it_went_in(group: Group) -> None:
    read = RolloutGroup(memoryview(encode_group(group)))
    assert (read.source, read.group_index, read.prompt_index) == (
        group.source,
        group.group_index,
        group.prompt.prompt_index,
    )
    assert (read.prompt, read.label, read.metadata) == (group.prompt.content, group.prompt.label, group.prompt.metadata)
    assert read.prompt_tokens.tolist() == list(group.prompt_tokens)
    assert (read.logprobs is None) == any(sample.logprobs is None for sample in group.samples)
    for got, put in zip(read.samples, group.samples, strict=True):
        assert (got.index, got.status, got.reward, got.versions) == (put.index, put.status, put.reward, put.versions)
        assert (got.metadata, got.finish_reason) == (put.metadata, put.finish_reason)
        assert got.response_tokens.tolist() == list(put.tokens)
        sampled = bytes(version != NO_VERSION for version, count in put.versions for _ in range(count))
        assert bytes(got.loss_mask) == (sampled if put.loss_mask is None else put.loss_mask)
        assert got.text == put.text.encode("utf-8", "replace").decode()
        if got.logprobs is not None:
            assert got.logprobs.tolist() == list(put.logprobs or ())


@given(groups())
def test_columns_are_aligned_and_fill_the_payload_in_order(group: Group) -> None:
    data = encode_group(group)
    prefix = parse_prefix(data)
    assert len(data) == prefix.frame_bytes
    assert len(data) % 8 == (PREFIX_BYTES + prefix.header_bytes) % 8 == prefix.payload_bytes % 8 == 0
    position = 0
    for _, begin, end in GroupFrame(data).header["columns"].values():
        assert begin % 8 == 0
        assert position <= begin < position + 8
        position = end
    assert position <= prefix.payload_bytes < position + 8


@given(groups())
def test_what_is_known_of_a_group_is_what_its_frame_says(group: Group) -> None:
    """The daemon that made the frame and the one that reads it back after a restart decide by the same facts."""
    frame, place = encode_group(group), Place(1, 16, 8)
    assert StoredGroup.of(GroupFacts.of(group), frame, place) == StoredGroup.from_frame(frame, place)


@given(st.lists(groups(), max_size=3))
def test_frames_follow_one_another_in_a_payload(several: list[Group]) -> None:
    payload = b"".join(map(encode_group, several))
    assert [f.header["group_index"] for f in iter_group_frames(payload)] == [g.group_index for g in several]


@pytest.mark.parametrize("name", ["prompt", "label", "metadata"])
@pytest.mark.parametrize("excess", [0, 1])
def test_more_than_64_kib_of_json_moves_to_a_column(name: str, excess: int) -> None:
    group = make_group()
    quotes = {"prompt": 2, "label": 2, "metadata": len('{"k":""}')}[name]
    text = "x" * (MAX_INLINE_JSON_BYTES - quotes + excess)
    value: Any = {"k": text} if name == "metadata" else text
    changes = {"prompt": "content"}.get(name, name)
    parts = {"content": "p", "label": "y", "metadata": {}} | {changes: value}
    group.prompt = Prompt(group.source, 0, 0, **parts)
    frame = GroupFrame(encode_group(group))
    assert (name in frame, name in frame.header) == (bool(excess), not excess)
    assert frame.json(name) == value


def test_parts_that_are_large_only_together_stay_in_the_header() -> None:
    group = make_group()
    texts = {name: name[0] * (MAX_INLINE_JSON_BYTES - 9) for name in ("content", "label")}
    group.prompt = Prompt(group.source, 0, 0, **texts)
    frame = GroupFrame(encode_group(group))
    assert (frame.header["prompt"], frame.header["label"]) == tuple(texts.values())


def test_an_unknown_column_and_an_unpadded_frame_are_read() -> None:
    header = b'{"columns":{"new":["BF16",0,3],"text":["U8",3,5]},"later":1}'
    data = b"ROL1" + len(header).to_bytes(4, "little") + (5).to_bytes(8, "little") + header + b"abcde"
    frame = GroupFrame(data)
    assert frame.column("text").tobytes() == b"de"
    with pytest.raises(FrameError, match="BF16"):
        frame.column("new")


def test_a_writable_buffer_gives_writable_columns() -> None:
    data = bytearray(encode_group(make_group()))
    assert GroupFrame(data).column("response_tokens").flags.writeable
    assert not GroupFrame(bytes(data)).column("response_tokens").flags.writeable


# -- limits -----------------------------------------------------------------------------------------------------------


def test_lengths_are_checked_by_the_prefix_alone() -> None:
    """16 bytes suffice to refuse a frame: nothing was read, or allocated, for the lengths that they announce."""

    def prefix(header: int, payload: int, magic: bytes = b"ROL1") -> bytes:
        return magic + header.to_bytes(4, "little") + payload.to_bytes(8, "little")

    assert parse_prefix(prefix(MAX_HEADER_BYTES, DEFAULT_MAX_PAYLOAD_BYTES)).header_bytes == MAX_HEADER_BYTES
    for bad in (
        prefix(MAX_HEADER_BYTES + 1, 0),
        prefix(0, DEFAULT_MAX_PAYLOAD_BYTES + 1),
        prefix(2**32 - 1, 2**64 - 1),
    ):
        with pytest.raises(FrameError, match="at most"):
            parse_prefix(bad)
    with pytest.raises(FrameError, match="ROL1"):
        parse_prefix(prefix(0, 0, b"HTTP"))
    with pytest.raises(FrameError, match="at most 7"):
        parse_prefix(prefix(0, 8), max_payload=7)


def test_a_frame_that_promises_more_than_there_is_allocates_nothing() -> None:
    data = bytearray(encode_group(make_group()))
    data[8:16] = (DEFAULT_MAX_PAYLOAD_BYTES).to_bytes(8, "little")
    with pytest.raises(FrameError):
        GroupFrame(data)
    with pytest.raises(FrameError, match="cut off"):
        list(iter_group_frames(data))


def test_a_header_above_its_limit_is_not_written() -> None:
    with pytest.raises(FrameError, match="at most"):
        encode_frame({"x": "y" * MAX_HEADER_BYTES})


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, "\ud800", {"a": {1, 2}}], ids=["object", "key", "surrogate", "set"]
)
def test_what_json_cannot_say_is_a_frame_error(value: Any) -> None:
    with pytest.raises(FrameError, match="JSON"):
        encode_frame({"x": value})
    group = make_group()
    group.prompt = Prompt(group.source, 0, 0, "p", label=value)
    with pytest.raises(FrameError, match="JSON"):
        encode_group(group)


@pytest.mark.parametrize("name", ["loss_mask", "logprobs"])
def test_a_mask_or_logprobs_of_another_length_are_not_written(name: str) -> None:
    group = make_group()
    setattr(group.samples[0], name, b"\1" if name == "loss_mask" else array("f", [0.0]))
    with pytest.raises(FrameError, match=name):
        encode_group(group)


def test_tokens_that_are_not_int32_are_not_written() -> None:
    group = make_group()
    group.samples[0].tokens = array("q", group.samples[0].tokens)
    with pytest.raises(FrameError, match="int32"):
        encode_group(group)


# -- what is not a frame ----------------------------------------------------------------------------------------------

WHOLE = encode_group(make_group())


def read_everything(data: bytes | bytearray) -> None:
    for frame in iter_group_frames(data):
        group = RolloutGroup(frame.buffer)
        for sample in group.samples:
            assert math.isfinite(sample.reward)
            _ = (sample.text, sample.logprobs, sample.loss_mask, sample.versions)
            assert len(sample.response_tokens) == sum(count for _, count in sample.versions)
        _ = (group.prompt, group.label, group.metadata, group.token_versions)


def test_a_frame_cut_at_any_length_is_a_frame_error() -> None:
    for length in range(1, len(WHOLE)):
        with pytest.raises(FrameError):
            read_everything(WHOLE[:length])
        with pytest.raises(FrameError):
            GroupFrame(WHOLE[:length])


def test_any_single_byte_changed_reads_or_is_a_frame_error() -> None:
    for position in range(len(WHOLE)):
        for value in (0, 0xFF, WHOLE[position] ^ 1, WHOLE[position] ^ 0x80, ord("9"), ord('"')):
            data = bytearray(WHOLE)
            data[position] = value
            with_frame_errors_only(data)


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_changed_read_or_are_a_frame_error(data: st.DataObject) -> None:
    mutated = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 6))):
        begin = data.draw(st.integers(0, len(mutated)))
        end = min(len(mutated), begin + data.draw(st.integers(0, 4)))
        mutated[begin:end] = data.draw(st.binary(max_size=4))
    with_frame_errors_only(mutated)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_frame_error(data: bytes) -> None:
    with_frame_errors_only(b"ROL1" + data)
    with pytest.raises(FrameError):
        GroupFrame(data)


def with_frame_errors_only(data: bytes | bytearray) -> None:
    try:
        read_everything(data)
    except FrameError:
        return


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"1", b"nul", b"\xff\xfe", b"[" * 5000, '{"a":1}'.encode("utf-16"), b'{"a":NaN}', b'{"a":1}x'],
)
def test_a_header_that_is_no_json_object_is_a_frame_error(text: bytes) -> None:
    with pytest.raises(FrameError):
        parse_header(text)


def test_a_column_that_is_no_json_is_a_frame_error() -> None:
    header = b'{"columns":{"label":["U8",0,4]}}'
    frame = GroupFrame(b"ROL1" + len(header).to_bytes(4, "little") + (4).to_bytes(8, "little") + header + b"{{{{")
    with pytest.raises(FrameError, match="label"):
        frame.json("label")


def with_header(change: dict[str, Any]) -> bytes:
    """A whole frame with some header keys replaced."""
    prefix = parse_prefix(WHOLE)
    header = parse_header(WHOLE[PREFIX_BYTES : PREFIX_BYTES + prefix.header_bytes])
    payload = WHOLE[PREFIX_BYTES + prefix.header_bytes :]
    return encode_frame({**header, **change}, len(payload)) + payload


SAMPLES = parse_header(WHOLE[PREFIX_BYTES : PREFIX_BYTES + parse_prefix(WHOLE).header_bytes])["samples"]
COLUMNS = GroupFrame(WHOLE).header["columns"]
WRONG: dict[str, dict[str, Any]] = {
    "no source": {"source": None},
    "group_index": {"group_index": 1.5},
    "n": {"n": 3},
    "one sample less": {"samples": SAMPLES[:1], "n": 1},
    "status": {"samples": [SAMPLES[0] | {"status": "great"}, SAMPLES[1]]},
    "no reward": {"samples": [SAMPLES[0] | {"reward": None}, SAMPLES[1]]},
    "true is no reward": {"samples": [SAMPLES[0] | {"reward": True}, SAMPLES[1]]},
    "versions do not add up": {"samples": [SAMPLES[0] | {"versions": [[0, 2]]}, SAMPLES[1]]},
    "negative count": {"samples": [SAMPLES[0] | {"versions": [[0, 4], [1, -1]]}, SAMPLES[1]]},
    "versions of samples exchanged": {"samples": [SAMPLES[0] | {"versions": SAMPLES[1]["versions"]}, SAMPLES[1]]},
    "dtype": {"columns": COLUMNS | {"response_tokens": ["F32", *COLUMNS["response_tokens"][1:]]}},
    "short logprobs": {"columns": COLUMNS | {"logprobs": ["F32", *COLUMNS["response_tokens"][1:2], 40]}},
    "outside": {"columns": COLUMNS | {"text": ["U8", 0, 10**9]}},
    "half a number": {"columns": COLUMNS | {"prompt_tokens": ["I32", 0, 3]}},
    "offsets of something else": {"columns": COLUMNS | {"response_offsets": ["I64", 0, 24]}},
    "no offsets": {"columns": {k: v for k, v in COLUMNS.items() if k != "response_offsets"}},
    "text alone": {"columns": {k: v for k, v in COLUMNS.items() if k != "text_offsets"}},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_add_up_is_a_frame_error(change: dict[str, Any]) -> None:
    read_everything(with_header({}))
    with pytest.raises(FrameError):
        read_everything(with_header(change))


@pytest.mark.parametrize("name", ["response_offsets", "text_offsets"])
@pytest.mark.parametrize("offsets", [[0, 4, 3], [0, 8, 7], [1, 3, 7], [0, -1, 7], [0, 3, 6]])
def test_offsets_that_do_not_rise_are_a_frame_error(name: str, offsets: list[int]) -> None:
    data = bytearray(WHOLE)
    GroupFrame(data).column(name)[:] = np.array(offsets)
    with pytest.raises(FrameError):
        read_everything(data)


def test_the_codec_is_the_same_without_orjson() -> None:
    """A trainer's environment may have numpy only."""
    code = """
import sys
sys.modules["orjson"] = None
from orchestrator.errors import FrameError
from orchestrator.frames import encode_frame, parse_header, parse_prefix, GroupFrame
frame = GroupFrame(bytes.fromhex(sys.argv[1]))
assert frame.json("label") == "y", frame.header
data = encode_frame({"é": [1, 2.5, None, "☃"]})
assert parse_header(data[16:]) == {"é": [1, 2.5, None, "☃"]} and len(data) % 8 == 0
bad = [b"", b"[]", b"nul", b"\\xff\\xfe", b"[" * 100000, '{"a":1}'.encode("utf-16"), b'{"a":NaN}', b'{"a":1}x']
for text in bad:
    try:
        parse_header(text)
    except FrameError:
        continue
    raise SystemExit(f"{text[:20]!r} was read")
for value in (float("nan"), "\\ud800", object()):
    try:
        encode_frame({"x": value})
    except FrameError:
        continue
    raise SystemExit(f"{value!r} was written")
"""
    done = subprocess.run([sys.executable, "-c", code, WHOLE.hex()], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr + done.stdout
