"""What a batch computes, against naive Python; and memory that is used again only when nobody holds it."""

from __future__ import annotations

import gc
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.client import Batch, RolloutClient, checks
from orchestrator.client.buffers import MAX_BUFFERS, BufferPool
from orchestrator.client.groups import RolloutGroup
from orchestrator.errors import FrameError
from orchestrator.frames import GroupFrame, encode_group
from orchestrator.records import NO_VERSION, Group, Sample, SampleStatus
from tests.support.builders import make_group
from tests.support.consumer_stub import stub_daemon

POLICY_VERSION = 7


def batch_of(groups: list[Group]) -> Batch:
    payload = b"".join(map(encode_group, groups))
    result = {"lease": "l", "step": 3, "policy_version": POLICY_VERSION, "groups": len(groups)}
    return Batch.from_answer(result, np.frombuffer(bytearray(payload), np.uint8))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    sample = Sample(index=draw(st.integers(0, 9)), status=SampleStatus.COMPLETED)
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.lists(st.integers(1, 999), max_size=4))
        version = draw(st.integers(NO_VERSION, POLICY_VERSION))
        sample.extend(tokens, [-float(token) for token in tokens], version)
    mask = draw(st.lists(st.integers(0, 1), min_size=len(sample.tokens), max_size=len(sample.tokens)))
    sample.loss_mask = bytes(mask)
    sample.reward = draw(st.floats(-100, 100))
    return sample


@st.composite
def groups(draw: st.DrawFn) -> Group:
    group = make_group(draw(st.sampled_from(["a", "b"])), draw(st.integers(0, 99)))
    group.prompt_tokens = type(group.prompt_tokens)("i", draw(st.lists(st.integers(1, 999), max_size=5)))
    group.samples = draw(st.lists(samples(), max_size=4))
    return group


def flat(groups: list[Group]) -> list[tuple[Group, Sample]]:
    return [(group, sample) for group in groups for sample in group.samples]


def versions_of(sample: Sample) -> list[int]:
    return [version for version, count in sample.versions for _ in range(count)]


@given(st.lists(groups(), max_size=4))
def test_values_of_samples_and_tokens(groups: list[Group]) -> None:
    batch, naive = batch_of(groups), flat(groups)
    assert batch.rewards.tolist() == [np.float32(s.reward) for _, s in naive]
    assert batch.sources == [g.source for g, _ in naive]
    assert batch.group_ids.tolist() == [g.group_index for g, _ in naive]
    assert batch.prompt_lengths.tolist() == [len(g.prompt_tokens) for g, _ in naive]
    assert batch.response_lengths.tolist() == [len(s.tokens) for _, s in naive]
    assert batch.response_tokens.tolist() == [token for _, s in naive for token in s.tokens]
    assert batch.logprobs.tolist() == [-token for _, s in naive for token in s.tokens]
    assert batch.loss_mask.tolist() == [bit for _, s in naive for bit in s.loss_mask]
    assert batch.token_versions.tolist() == [version for _, s in naive for version in versions_of(s)]
    for version in (0, 3, POLICY_VERSION):
        assert batch.loss_mask_against(version).tolist() == [
            int(bit and v >= version) for _, s in naive for bit, v in zip(s.loss_mask, versions_of(s), strict=True)
        ]
        oldest = [[v for v in versions_of(s) if v != NO_VERSION] for _, s in naive]
        assert batch.staleness(version).tolist() == [version - min(v) if v else 0 for v in oldest]
    assert batch.staleness().tolist() == batch.staleness(POLICY_VERSION).tolist()


@given(st.lists(groups(), max_size=4), st.booleans(), st.sampled_from([0, 1]))
def test_advantages(groups: list[Group], std: bool, ddof: int) -> None:
    eps, expected = 1e-4, []
    for group in groups:
        rewards = [s.reward for s in group.samples]
        n = len(rewards)
        for reward in rewards:
            mean = math.fsum(rewards) / n
            scale = 1.0
            if std and n > ddof:
                scale = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - ddof)) + eps
            expected.append((reward - mean) / scale)
    got = batch_of(groups).advantages(std, eps, ddof=ddof)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_advantages_of_known_rewards() -> None:
    batch = batch_of([make_group(lengths=(1,) * 4, rewards=[1, 0, 0, 1]), make_group(lengths=(1,) * 2, rewards=[3, 3])])
    np.testing.assert_allclose(batch.advantages(), [1, -1, -1, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(batch.advantages(std=False), [0.5, -0.5, -0.5, 0.5, 0, 0])


@given(
    st.lists(groups(), max_size=4), st.sampled_from(["left", "right"]), st.none() | st.integers(1, 12), st.booleans()
)
def test_padded(groups: list[Group], side: str, max_len: int | None, against: bool) -> None:
    batch, naive = batch_of(groups), flat(groups)
    got = batch.padded(-5, max_len, side, loss_mask=batch.loss_mask_against(4) if against else None)  # type: ignore[arg-type]
    sequences = [[*g.prompt_tokens, *s.tokens] for g, s in naive]
    width = max(map(len, sequences), default=0)
    width = width if max_len is None else min(width, max_len)
    assert got["tokens"].shape == (len(naive), width)
    assert got["tokens"].dtype == np.int32
    for row, (group, sample) in enumerate(naive):
        prompt = [None] * len(group.prompt_tokens)
        bits = [int(b and (not against or v >= 4)) for b, v in zip(sample.loss_mask, versions_of(sample), strict=True)]

        def fill(values: list[Any], filling: Any) -> list[Any]:
            cut = values[:width]
            rest = [filling] * (width - len(cut))
            return rest + cut if side == "left" else cut + rest

        assert got["tokens"][row].tolist() == fill(sequences[row], -5)
        assert got["attention_mask"][row].tolist() == fill([True] * len(sequences[row]), False)
        assert got["response_mask"][row].tolist() == fill([False] * len(prompt) + [True] * len(sample.tokens), False)
        assert got["loss_mask"][row].tolist() == fill([False] * len(prompt) + list(map(bool, bits)), False)
        assert got["logprobs"][row].tolist() == fill([0.0] * len(prompt) + [-float(t) for t in sample.tokens], 0.0)
        assert got["is_cut"][row] == (len(sequences[row]) > width)
    assert all(array.flags.writeable and array.base is None for array in got.values())


def test_padded_refuses_what_makes_no_sense() -> None:
    batch = batch_of([make_group()])
    with pytest.raises(ValueError, match="max_len"):
        batch.padded(max_len=0)
    with pytest.raises(ValueError, match="side"):
        batch.padded(side="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="7 response tokens"):
        batch.padded(loss_mask=np.ones(3))


def test_without_logprobs_there_are_none() -> None:
    bare = make_group()
    bare.samples[0].logprobs = None
    batch = batch_of([make_group(), bare])
    assert batch.logprobs is None
    assert "logprobs" not in batch.padded()
    assert batch.groups[1].samples[1].logprobs is None
    assert batch.groups[0].samples[1].logprobs is not None


def test_a_group_is_looked_at_only_when_asked_for() -> None:
    data = bytearray(encode_group(make_group()) + encode_group(make_group(group_index=1)))
    second = len(data) // 2
    data[second + 20] = 0xFF  # in the header of the second
    batch = Batch.from_answer(
        {"lease": "l", "step": 0, "policy_version": 0, "groups": 2}, np.frombuffer(data, np.uint8)
    )
    assert batch.groups[0].source == "easy"
    with pytest.raises(FrameError):
        _ = batch.groups[1].source


@pytest.mark.parametrize("reward", [pytest.param(10**400, id="of 401 digits"), math.inf, True, "1", None])
def test_a_reward_that_is_no_finite_number_is_a_frame_error(reward: Any) -> None:
    frame = GroupFrame(encode_group(make_group()))
    frame.header["samples"][0]["reward"] = reward
    with pytest.raises(FrameError, match="expected a finite number"):
        checks.check_samples(frame, frame.integers("response_offsets"))


@pytest.mark.parametrize("status", [[], {}, 1, None, "lost"])
def test_a_status_of_another_type_is_a_frame_error(status: Any) -> None:
    frame = GroupFrame(encode_group(make_group()))
    frame.header["samples"][0]["status"] = status
    with pytest.raises(FrameError, match="known `status`"):
        checks.check_samples(frame, frame.integers("response_offsets"))


ODD: list[Any] = [None, True, 0, -1, -2, 0.5, 3.0, 1e308, 1 << 53, 1 << 60, "a", "ab", [], [[]], {}, {"ab": 1}, [0, 3]]
ODD += [[[0, 3]], [[0, 3.0]], [[True, 3]], [[-1, 3]], [[-2, 3]], [[0, 4]], [[0, 2], [1, 1]], [[0, 3, 0]], [["0", "3"]]]
ODD += [{"ab": [0, 3]}, ["ab"], [{"a": 0, "b": 3}], "completed", "truncated", "lost"]


@pytest.mark.parametrize("key", ["index", "status", "reward", "versions", "metadata", None])
def test_samples_that_are_found_plain_are_those_that_a_close_look_finds_sound(key: str | None) -> None:
    """And what is refused is so wherever it is asked for: by reward, or by anything else."""
    found = {True: 0, False: 0}
    for value in [*ODD, ...]:
        frame = GroupFrame(encode_group(make_group(lengths=(3, 3))))
        offsets, samples = frame.integers("response_offsets"), frame.header["samples"]
        if key is None:
            samples[1] = value
        elif value is ...:
            del samples[1][key]
        else:
            samples[1][key] = value
        try:
            for i, sample in enumerate(samples):
                checks._check_sample(i, sample, 3)
            is_sound = True
        except FrameError:
            is_sound = False
        found[is_sound] += 1
        assert is_sound or not checks._are_plain(samples, offsets), value
        if is_sound:
            checks.check_samples(frame, offsets)
            assert checks.rewards_of(frame) == [sample["reward"] for sample in samples]
        else:
            with pytest.raises(FrameError, match="group 0: sample 1"):
                checks.check_samples(frame, offsets)
            if key in ("reward", None):
                with pytest.raises(FrameError, match="group 0: sample 1: its reward"):
                    checks.rewards_of(frame)
    assert found[False] > 10
    assert found[True] or key is None


def test_columns_of_a_group_are_there_though_its_samples_are_refused() -> None:
    header, frame = make_group(), encode_group(make_group())
    group = RolloutGroup(memoryview(frame.replace(b'"status":"completed"', b'"status":"completeX"')))
    assert list(group.response_tokens) == [token for sample in header.samples for token in sample.tokens]
    for ask in (lambda: group.samples, lambda: group.token_versions):
        with pytest.raises(FrameError, match="known `status`"):
            ask()


@pytest.mark.parametrize("missing", ["lease", "step", "policy_version", "groups"])
def test_an_answer_that_lacks_something_is_a_frame_error(missing: str) -> None:
    result: dict[str, Any] = {"lease": "l", "step": 0, "policy_version": 0, "groups": 0}
    assert Batch.from_answer(result, None).padded()["tokens"].shape == (0, 0)
    del result[missing]
    with pytest.raises(FrameError):
        Batch.from_answer(result, None)


# -- torch ------------------------------------------------------------------------------------------------------------


def test_without_torch_to_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="needs torch"):
        batch_of([make_group()]).to_torch()


def test_to_torch_shares_the_memory_of_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch with the one function that is used, as strict about writable memory as torch."""

    def from_numpy(array: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
        assert array.flags.writeable
        return ("tensor", array)

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(from_numpy=from_numpy))  # type: ignore[arg-type]
    tensors = batch_of([make_group()]).to_torch(pad_token_id=9, side="left")
    kind, tokens = tensors["tokens"]
    assert kind == "tensor"
    assert tokens.tolist() == [[9, 1, 2, 3, 0, 1, 2], [1, 2, 3, 0, 1, 2, 3]]


# -- memory -----------------------------------------------------------------------------------------------------------


def address(array: np.ndarray[Any, Any]) -> int:
    return array.__array_interface__["data"][0]


HOLDERS: dict[str, Any] = {
    "the array": lambda array: array,
    "a slice": lambda array: array[3:5],
    "another dtype": lambda array: array[:8].view(np.int32),
    "a memoryview": lambda array: memoryview(array)[2:],
    "an array of a memoryview": lambda array: np.frombuffer(memoryview(array)[8:16], np.int64),
    "a view of a view": lambda array: array.reshape(-1, 2)[1:].T,
    "DLPack": lambda array: np.from_dlpack(array),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_memory_that_anything_refers_to_is_not_used_again(hold: Any) -> None:
    pool = BufferPool()
    first = pool.take(64)
    first[:] = 1
    place = address(first)
    held = hold(first)
    del first
    for _ in range(3):
        other = pool.take(64)
        assert address(other) != place
        other[:] = 2
    assert set(np.asarray(held).tobytes()) == {1}
    del held, other
    gc.collect()
    assert place in {address(array) for array in [pool.take(64) for _ in range(MAX_BUFFERS)]}


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    pool = BufferPool()
    assert len({address(pool.take(size)) for size in (3_000_000, 64, 2_000_000, 3_000_000)}) == 1
    assert len(pool) == 1


def test_the_pool_keeps_few_and_lets_go_of_small_ones() -> None:
    pool = BufferPool()
    held = [pool.take(64) for _ in range(MAX_BUFFERS + 3)]
    assert len({address(array) for array in held}) == len(held)
    assert len(pool) == MAX_BUFFERS
    del held
    large = pool.take(5 << 20)
    assert (len(pool), large.nbytes, address(large) % 8) == (1, 5 << 20, 0)


def test_without_exact_reference_counts_nothing_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    pool = BufferPool()
    pool.take(64)
    assert len(pool) == 0


@pytest.mark.parametrize("prefetch", [False, True])
def test_arrays_of_earlier_batches_stay_as_they_were(tmp_path: Path, prefetch: bool) -> None:
    """Some are kept and some are not: the kept ones are never overwritten, and memory of the others is used again."""
    with stub_daemon(tmp_path, 12, length=20) as daemon, RolloutClient(daemon.path) as client:
        kept: list[tuple[np.ndarray[Any, Any], bytes]] = []
        places: set[int] = set()
        for batch in client.batches(prefetch=prefetch):
            places.add(address(batch.groups[0].frame.buffer.obj))
            array = batch.groups[batch.step % 2].samples[1].response_tokens[3:]
            array += 100 * batch.step
            if batch.step % 3 == 0:
                kept.append((array, array.tobytes()))
            del array
        for array, content in kept:
            assert array.tobytes() == content
        assert len(kept) == 4
        assert len(places) < 12


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("prefetch", [False, True])
def test_in_the_steady_state_two_buffers_serve_a_loop(tmp_path: Path, prefetch: bool) -> None:
    """Nothing that a trainer looks at forms a cycle, which would keep the memory until the collector runs."""
    with stub_daemon(tmp_path, 9, length=20) as daemon, RolloutClient(daemon.path) as client:
        for batch in client.batches(prefetch=prefetch):
            for sample in batch.samples:
                _ = (sample.text, sample.logprobs, sample.versions, repr(sample))
            _ = (batch.padded(), batch.advantages(), batch.staleness(), batch.loss_mask_against(1), repr(batch))
        assert len(client._core._pool) == 2
