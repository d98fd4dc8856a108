"""The counter-based generator against its authors' known answers, and what sampling relies on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.model.philox import philox, uniforms

DRAWS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))


# Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        pytest.param(
            (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"
        ),
        pytest.param(
            (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"
        ),
        pytest.param(
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            id="digits of pi",
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_its_authors(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    words = philox(np.array([counter], np.uint64), np.array([key], np.uint64))
    assert tuple(words[0].tolist()) == answer


@given(st.lists(DRAWS, min_size=1, max_size=40))
def test_a_number_does_not_depend_on_the_numbers_drawn_beside_it(draws: list[tuple[int, int, int]]) -> None:
    together = uniforms(draws)
    assert together.tolist() == [uniforms([draw])[0] for draw in draws]
    assert ((together >= 0) & (together < 1)).all()


def test_seed_choice_and_position_each_change_the_number() -> None:
    draws = [(seed, choice, position) for seed in (0, 1, 2**32, 2**63) for choice in range(4) for position in range(50)]
    assert len(set(uniforms(draws).tolist())) == len(draws)


def test_numbers_of_neighbouring_positions_are_uniform_and_uncorrelated() -> None:
    numbers = uniforms([(7, 0, position) for position in range(20_000)])
    counts = np.bincount((numbers * 16).astype(int), minlength=16)
    assert ((counts - 1250) ** 2 / 1250).sum() < 44.3  # chi-square, 15 degrees of freedom, p = 1e-4
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("draw", [(-1, 0, 0), (2**64, 0, 0), (0, 2**32, 0), (0, 0, -1)])
def test_a_counter_out_of_range_is_refused(draw: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        uniforms([draw])


def test_no_draws_give_no_numbers() -> None:
    assert uniforms([]).shape == (0,)
