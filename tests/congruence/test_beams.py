"""Beam search against `generate`'s: ids and scores of the n best, with whatever comes between."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.one_process import OneProcess, Request
from collegium.model.sampling import SamplingParams
from router_svc.beams import Beam as LiveBeam
from router_svc.beams import BeamOptions, BeamSearch
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.step import Step
from tests.checkpoints import Variant
from tests.oracle import Beam, Oracle

MAX_TOKENS = 16
NO_END = 2  # an id that few of these models give
NGRAM = "no_repeat_ngram_size"
# By architecture and variant, what the decoder is forced to begin with, and how it is searched.
CASES: list[tuple[str, Variant, int | None, dict[str, Any]]] = [
    ("nllb-moe", Variant.BASE, 9, {"num_beams": 4, "num_return_sequences": 4}),
    ("nllb-moe", Variant.BASE, None, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, NGRAM: 2}),
    ("nllb-moe", Variant.OTHER, 9, {"num_beams": 3, "num_return_sequences": 1, "early_stopping": True}),
    ("switch_transformers", Variant.BASE, None, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -0.5}),
    (
        "switch_transformers",
        Variant.OTHER,
        None,
        {"num_beams": 5, "num_return_sequences": 5, "early_stopping": "never"},
    ),
    ("switch_transformers", Variant.BASE, 11, {"num_beams": 2, "num_return_sequences": 2, "min_new_tokens": 6}),
    ("mixtral", Variant.BASE, None, {"num_beams": 4, "num_return_sequences": 4}),
    ("qwen3_moe", Variant.OTHER, None, {"num_beams": 3, "num_return_sequences": 2, NGRAM: 3, "length_penalty": 0.0}),
]


def sources_of(running: OneProcess, number: int) -> list[list[int]]:
    """Sources or prompts of mixed lengths, always the same."""
    import random

    drawn = random.Random(number)
    lengths = itertools.cycle((5, 23, 1, 40, 12))
    return [[drawn.randrange(8, running.model.vocab_size) for _ in range(next(lengths))] for _ in range(6)]


def requests_for(
    running: OneProcess, sources: list[list[int]], forced: int | None, options: dict[str, Any], end: int = NO_END
) -> list[Request]:
    """Ask as `generate` was asked, one a few tokens after the other."""
    both = running.model.both
    return [
        Request(
            prompt_ids=source if both is None else [both.start_id],
            source_ids=() if both is None else source,
            forced=() if forced is None else (forced,),
            max_tokens=MAX_TOKENS,
            min_tokens=options.get("min_new_tokens", 0),
            eos_ids=(end,),
            num_choices=options["num_return_sequences"],
            num_logprobs=0,
            sampling=SamplingParams(no_repeat_ngram_size=options.get(NGRAM, 0)),
            after_tokens=2 * number,
            beams=BeamOptions(
                num_beams=options["num_beams"],
                num_return=options["num_return_sequences"],
                length_penalty=options.get("length_penalty", 1.0),
                early_stopping=options.get("early_stopping", False),
            ),
        )
        for number, source in enumerate(sources)
    ]


def references_of(
    oracle: Oracle, checkpoint: Path, sources: list[list[int]], forced: int | None, options: dict[str, Any]
) -> tuple[int, list[list[Beam]]]:
    """An id that ends some hypotheses and not all, and what `generate` finds where it is the end."""
    asked: dict[str, Any] = {"forced": forced, "max_new_tokens": MAX_TOKENS} | options
    endless = oracle.beams(checkpoint, sources, eos_token_id=NO_END, num_shakes=0, **asked)
    end = Counter(token for best in endless for one in best for token in set(one.token_ids[5:])).most_common(1)[0][0]
    found = oracle.beams(checkpoint, sources, eos_token_id=end, **asked)
    assert len({len(one.token_ids) for best in found for one in best}) > 1
    return end, found


def check(running: OneProcess, references: list[list[Beam]], requests: list[Request]) -> None:
    """Hold the answers against the references, of those sources for which rounding decides nothing."""
    num_clear = 0
    for best, answers in zip(references, running.run(requests), strict=True):
        assert [answer.failure for answer in answers] == [""] * len(best)
        assert all(len(answer.logprobs) == len(answer.token_ids) for answer in answers)
        if best[0].is_clear:
            num_clear += 1
            assert [answer.token_ids for answer in answers] == [one.token_ids for one in best]
            assert [answer.score for answer in answers] == pytest.approx([one.score for one in best], abs=1e-4)
    assert num_clear >= len(references) // 2
    pool = running.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize(("arch", "variant", "forced", "options"), CASES)
def test_the_n_best_and_their_scores_are_those_of_generate(
    arch: str, variant: Variant, forced: int | None, options: dict[str, Any], oracle: Oracle
) -> None:
    checkpoint = oracle.checkpoint(arch, variant)
    with OneProcess(checkpoint, num_workers=2, max_batch_tokens=32) as running:
        sources = sources_of(running, len(arch))
        end, references = references_of(oracle, checkpoint, sources, forced, options)
        check(running, references, requests_for(running, sources, forced, options, end))


@pytest.mark.parametrize(("arch", "forced"), [("nllb-moe", 9), ("mixtral", None)])
def test_preemption_changes_no_beam(arch: str, forced: int | None, oracle: Oracle) -> None:
    checkpoint, options = oracle.checkpoint(arch), CASES[0][3]
    with OneProcess(checkpoint, num_workers=1, max_batch_tokens=32, kv_tokens=18 * BLOCK_TOKENS) as running:
        sources = sources_of(running, len(arch))
        end, references = references_of(oracle, checkpoint, sources, forced, options)
        check(running, references, requests_for(running, sources, forced, options, end))
        assert running.engine.scheduler.num_preemptions > 0


def test_a_step_has_no_more_rows_than_links_take_however_many_beams_there_are(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = oracle.checkpoint("mixtral")
    most = 11  # rows: two searches fit, and a part of a third
    with OneProcess(checkpoint, num_workers=1, max_batch_tokens=most, kv_tokens=20 * BLOCK_TOKENS) as running:
        scheduler, num_rows = running.engine.scheduler, list[int]()
        schedule = scheduler.schedule

        def counted(shared_rows: int | None = None) -> Step | None:
            if (step := schedule(shared_rows)) is not None:
                num_rows.append(step.num_rows)
            return step

        monkeypatch.setattr(scheduler, "schedule", counted)
        searched = requests_for(running, sources_of(running, 3) * 2, None, CASES[0][3])
        plain = requests_for(running, sources_of(running, 4), None, {"num_beams": 1, "num_return_sequences": 1})
        for number, one in enumerate(plain):
            one.beams, one.after_tokens = None, 5 * number
        for number, one in enumerate(searched):
            one.after_tokens = number
        together = running.run([*searched, *plain])
        assert scheduler.num_preemptions > 0 and most // 2 < max(num_rows) <= most
        for request, answers in zip([*searched, *plain], together, strict=True):
            request.after_tokens = 0
            (alone,) = running.run([request])
            assert [one.token_ids for one in answers] == [one.token_ids for one in alone]
        (wide,) = running.run(requests_for(running, [[9]], None, {"num_beams": 12, "num_return_sequences": 1}))
        assert "12 beams go on together, and the router computes 11 rows in a step" in wide[0].failure


@pytest.mark.parametrize(("arch", "forced"), [("nllb-moe", 9), ("mixtral", None)])
def test_one_beam_is_greedy_decoding_through_preemption_too(arch: str, forced: int | None, oracle: Oracle) -> None:
    checkpoint, options = oracle.checkpoint(arch), {"num_beams": 1, "num_return_sequences": 1}
    with OneProcess(checkpoint, num_workers=1, max_batch_tokens=32, kv_tokens=9 * BLOCK_TOKENS) as running:
        searched = requests_for(running, sources_of(running, 8) * 2, forced, options)
        greedy = requests_for(running, sources_of(running, 8) * 2, forced, options)
        for one, other in zip(searched, greedy, strict=True):
            other.beams, one.after_tokens, other.after_tokens = None, 0, 0
            one.max_tokens = other.max_tokens = 40
        plain = running.run(greedy)  # which leaves blocks to be found
        num_preemptions = running.engine.scheduler.num_preemptions
        answers = running.run(searched)
        assert running.engine.scheduler.num_preemptions > num_preemptions
        assert [one.token_ids for (one,) in answers] == [one.token_ids for (one,) in plain]


def test_beams_that_may_go_on_with_nothing_have_ended() -> None:
    search = BeamSearch(BeamOptions(num_beams=2, num_return=2))
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    for beam, (_, tokens) in zip((0, 1), search.advance(logits, [[]], frozenset(), 9), strict=True):
        assert tokens.token_ids == [(2, 3)[beam]]
        search.beams.append(LiveBeam(tokens=tokens))
    assert search.advance(logits.expand(2, 4), [range(4)] * 2, frozenset(), 9) == []
    assert search.is_over and [one.token_ids for one in search.results] == [[2], [3]]


def test_a_search_that_could_never_fit_is_refused_and_cancelled_ones_leave_nothing(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("nllb-moe")
    with OneProcess(checkpoint, num_workers=1, max_batch_tokens=32, kv_tokens=10 * BLOCK_TOKENS) as running:
        sources = sources_of(running, 1)
        (request,) = requests_for(running, sources[3:4], 9, {"num_beams": 8, "num_return_sequences": 2})
        failures = [answer.failure for answer in running.run([request])[0]]
        assert all("8 beams of 17 tokens may take 19 KV blocks, and the router has 10" in one for one in failures)
        commands, pool = running.engine.commands, running.engine.scheduler.pool
        for source in sources:
            (request,) = requests_for(running, [source], 9, CASES[0][3])
            commands.cancel(1, [(running._submit(request), None)])
        assert commands.wait_idle(60.0)
        assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize("arch", ["mixtral", "nllb-moe"])
def test_no_ngram_is_there_twice_without_a_search_either(arch: str, oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint(arch)
    options = {"num_beams": 1, "num_return_sequences": 1, NGRAM: 2}
    with OneProcess(checkpoint, num_workers=1, max_batch_tokens=32) as running:
        requests = requests_for(running, sources_of(running, 2), None, options)
        for one in requests:
            one.beams, one.eos_ids = None, ()
        for request, (answer,) in zip(requests, running.run(requests), strict=True):
            tokens = [*request.prompt_ids, *answer.token_ids]
            pairs = list(itertools.pairwise(tokens))[max(0, len(request.prompt_ids) - 1) :]
            assert len(answer.token_ids) == MAX_TOKENS
            assert len(set(pairs)) == len(pairs)
