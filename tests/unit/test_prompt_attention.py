"""Attention over prompts by the native kernels: what torch's attention says, however the prompt is cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from collegium.model import native
from collegium.model.native.layer import AttentionWeights, LayerBlock, LayerWeights, NormWeights, Workspace

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(
    LIBRARY is None or LIBRARY.isa != "amx", reason="attention over prompts is computed by matrix units alone"
)
D_MODEL = 64


def make_block(num_heads: int, num_kv_heads: int, width: int, window: int, sinks: Tensor | None) -> LayerBlock:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    attention = AttentionWeights(
        qkv=zeros((num_heads + 2 * num_kv_heads) * width, D_MODEL),
        out=zeros(D_MODEL, num_heads * width),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=width,
        rotated=width,
        scaling=width**-0.5,
        window=window,
        sinks=sinks,
    )
    norm = NormWeights(weight=zeros(D_MODEL), eps=1e-6)
    return LayerBlock(LayerWeights(input_norm=norm, output_norm=norm, attention=attention, gate=None), 16)


class Case:
    """A sequence's positions, scattered over the pools, and rows that look at them."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, width: int, window: int, num_positions: int, *, has_sinks: bool = False
    ):
        generator = torch.Generator().manual_seed(num_positions + 7 * width + window)
        self.sinks = 3 * torch.randn(num_heads, generator=generator) if has_sinks else None
        self.block = make_block(num_heads, num_kv_heads, width, window, self.sinks)
        self.heads, self.kv_heads, self.width, self.window = num_heads, num_kv_heads, width, window
        num_slots = num_positions + 50
        self.pools = [
            torch.randn(num_slots, num_kv_heads * width, generator=generator).bfloat16() for _ in ("keys", "values")
        ]
        self.slots = torch.randperm(num_slots, generator=generator)[:num_positions]
        for pool in self.pools:  # what is no position of this sequence is never looked at
            others = torch.ones(num_slots, dtype=torch.bool)
            others[self.slots] = False
            pool[others] = torch.nan
        self.block.bind(*self.pools)
        self.q = torch.randn(num_positions, num_heads * width, generator=generator)

    def attend(self, begin: int, end: int, num_threads: int = 1) -> Tensor:
        work = Workspace([self.block], end - begin + 1)
        work.q[1:] = self.q[begin:end]  # behind a row that decodes
        work.attended.fill_(torch.nan)
        assert self.block.attend_prompt(work, 1, end - begin, self.slots[:end].contiguous(), num_threads)
        return work.attended[1:].clone()

    def expected(self, begin: int, end: int) -> Tensor:
        key, value = (
            pool[self.slots[:end]].double().view(end, self.kv_heads, self.width).transpose(0, 1) for pool in self.pools
        )
        query = self.q[begin:end].bfloat16().double().view(end - begin, self.heads, self.width).transpose(0, 1)
        row, at = torch.arange(begin, end)[:, None], torch.arange(end)
        mask = at <= row
        if self.window:
            mask &= at > row - self.window
        share = self.heads // self.kv_heads
        key, value = key.repeat_interleave(share, 0), value.repeat_interleave(share, 0)
        scores = (query @ key.transpose(1, 2) * self.width**-0.5).masked_fill(~mask, -torch.inf)
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks.double()[:, None, None].expand(-1, end - begin, 1)), -1)
        out = scores.softmax(-1)[..., :end] @ value
        return out.transpose(0, 1).reshape(end - begin, -1).float()


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 1, 37, 128, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 32), (8, 1, 48), (3, 3, 64), (10, 2, 128)])
def test_it_is_what_torch_says_for_any_heads_windows_and_lengths(
    heads: int, kv_heads: int, width: int, window: int, has_sinks: bool
) -> None:
    for num_positions in (1, 2, 31, 33, 128, 129, 300):
        case = Case(heads, kv_heads, width, window, num_positions, has_sinks=has_sinks)
        torch.testing.assert_close(case.attend(0, num_positions), case.expected(0, num_positions), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("window", [0, 70])
def test_a_row_is_the_same_however_its_prompt_was_cut_and_by_how_many_threads(window: int) -> None:
    case = Case(6, 2, 64, window, 421)
    whole = case.attend(0, 421)
    for cuts in ((0, 1, 2, 421), (0, 128, 256, 421), (0, 77, 200, 300, 420, 421)):
        parts = [case.attend(begin, end, 2) for begin, end in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)


def test_what_is_no_number_stays_so_in_its_own_rows_alone() -> None:
    case = Case(4, 2, 32, 0, 200)
    case.q[150, :32] = torch.nan
    out = case.attend(0, 200)
    assert torch.isnan(out[150, :32]).all()
    out[150, :32] = 0
    assert torch.isfinite(out).all()


def test_scores_of_any_size_do_not_overflow() -> None:
    case = Case(2, 2, 32, 0, 300)
    case.q *= 1e4
    out = case.attend(0, 300)
    assert torch.isfinite(out).all()
    assert (out.abs() <= case.pools[1][case.slots].float().abs().max() * 1.01).all()
