"""Memory for packed weights: aligned pieces that do not overlap, used again, and given back with their run."""

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.model import packed_memory
from collegium.model.packed_memory import take


@given(st.lists(st.tuples(st.integers(1, 300_000), st.booleans()), max_size=60))
@settings(deadline=None)
def test_pieces_are_aligned_apart_and_as_long_as_asked_for(asked: list[tuple[int, bool]]) -> None:
    kept: list[torch.Tensor] = []
    for num_bytes, stays in asked:
        piece = take(num_bytes)
        assert piece.shape == (num_bytes,) and piece.data_ptr() % 64 == 0
        if stays:
            piece.fill_(len(kept) % 251)
            kept.append(piece)
    for idx, piece in enumerate(kept):
        assert (piece == idx % 251).all()


def test_a_run_goes_when_its_last_piece_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_memory, "_runs", [])
    pieces = [take(20 << 20) for _ in range(4)]
    assert len(packed_memory._runs) == 4
    del pieces[1:]
    gc.collect()
    assert len(packed_memory._runs) == 1
    again = take(20 << 20)
    pieces.clear()
    gc.collect()
    assert len(packed_memory._runs) == 1 and again.data_ptr() % 64 == 0


def test_pieces_that_come_back_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_memory, "_runs", [])  # whatever else lives in this process
    first = [take(123_456) for _ in range(50)]
    kept, places = first.pop(), {piece.data_ptr() for piece in first}  # the run stays for the sake of one
    first.clear()
    gc.collect()
    again = [take(123_456) for _ in range(49)]
    assert {piece.data_ptr() for piece in again} == places
    assert kept.data_ptr() not in places


def test_threads_take_and_give_back_at_the_same_time() -> None:
    wrong: list[int] = []

    def churn(mark: int) -> None:
        for turn in range(300):
            piece = take(4096 + 64 * (turn % 5))
            piece.fill_(mark)
            if not (piece == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=churn, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
