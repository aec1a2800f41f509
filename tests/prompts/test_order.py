"""The order of prompts: a permutation an epoch, a function of (seed, name, epoch, rows), the same for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.prompts.order import MAX_ROWS, PromptOrder

GOLDEN_EPOCH_0 = [7, 5, 6, 9, 8, 1, 2, 4, 0, 3]
GOLDEN_EPOCH_1 = [8, 6, 2, 0, 4, 7, 5, 3, 1, 9]
GOLDEN_SEED_1 = [2, 9, 7, 8, 0, 6, 3, 5, 4, 1]


def epoch_of(order: PromptOrder, epoch: int, rows: int) -> list[int]:
    return [order.row_at(epoch, position) for position in range(rows)]


def shuffled(seed: int = 0, name: str = "math", rows: int = 10) -> PromptOrder:
    return PromptOrder(seed=seed, name=name, rows=rows, shuffle=True)


def test_the_order_never_changes() -> None:
    """Fixed numbers: a change of them makes every run that is under way repeat some prompts and skip others."""
    order = shuffled()
    assert epoch_of(order, 0, 10) == GOLDEN_EPOCH_0
    assert epoch_of(order, 1, 10) == GOLDEN_EPOCH_1
    assert epoch_of(shuffled(seed=1), 0, 10) == GOLDEN_SEED_1


@given(seed=st.integers(0, 2**80), name=st.text(max_size=20), epoch=st.integers(0, 10**6), rows=st.integers(1, 300))
def test_every_row_comes_exactly_once_an_epoch(seed: int, name: str, epoch: int, rows: int) -> None:
    order = PromptOrder(seed=seed, name=name, rows=rows, shuffle=True)
    assert sorted(epoch_of(order, epoch, rows)) == list(range(rows))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 19)), max_size=60))
def test_the_order_does_not_depend_on_what_was_asked_before(questions: list[tuple[int, int]]) -> None:
    order = shuffled(rows=20)
    for epoch, position in questions:
        assert order.row_at(epoch, position) == shuffled(rows=20).row_at(epoch, position)
        assert len(order._kept) <= 2


def test_another_process_has_the_same_order() -> None:
    program = (
        "from orchestrator.prompts.order import PromptOrder\n"
        "order = PromptOrder(seed=7, name='hard', rows=50, shuffle=True)\n"
        "print([order.row_at(3, position) for position in range(50)])\n"
    )
    # -R: another hash seed, so that nothing may lean on hash().
    answer = subprocess.run([sys.executable, "-R", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(epoch_of(shuffled(7, "hard", 50), 3, 50))


def test_sources_epochs_and_seeds_are_shuffled_independently() -> None:
    orders = [
        epoch_of(shuffled(seed, name, 100), epoch, 100)
        for seed in (0, 1)
        for name in ("easy", "hard")
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_without_shuffling_the_order_is_that_of_the_file() -> None:
    order = PromptOrder(seed=3, name="math", rows=5, shuffle=False)
    assert [epoch_of(order, epoch, 5) for epoch in (0, 9)] == [[0, 1, 2, 3, 4]] * 2


def test_large_sources_take_four_bytes_a_row() -> None:
    order = shuffled(rows=100_000)
    order.row_at(0, 0)
    assert [kept.nbytes for kept in order._kept.values()] == [400_000]


@pytest.mark.parametrize(("epoch", "position"), [(-1, 0), (0, -1), (0, 10)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_is_not_there_is_an_index_error(shuffle: bool, epoch: int, position: int) -> None:
    order = PromptOrder(seed=0, name="math", rows=10, shuffle=shuffle)
    with pytest.raises(IndexError, match="no position"):
        order.row_at(epoch, position)


@pytest.mark.parametrize(("seed", "rows"), [(-1, 10), (0, 0), (0, MAX_ROWS + 1)])
def test_parameters_out_of_range_are_refused(seed: int, rows: int) -> None:
    with pytest.raises(ValueError, match=r"must be at least 0|rows, but must be 1 to"):
        shuffled(seed=seed, rows=rows)
