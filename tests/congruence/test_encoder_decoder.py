"""Tokens and log-probabilities of models with an encoder, against the corrected modelling classes, in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.one_process import OneProcess, Request
from collegium.fabric.errors import FailedPrecondition
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.sampling import SamplingParams
from router_svc.app import read_unsafe_routing
from router_svc.encoder_decoder import EncoderDecoderModel
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.model_loader import load_router_model
from router_svc.paged_attention import PagedCache, SourceRun
from tests.checkpoints import TRANSLATORS, Variant
from tests.oracle import Oracle, Reference

MAX_TOKENS = 20
FORCED = {"nllb-moe": 9, "switch_transformers": None}
CASES = [(arch, variant) for arch in TRANSLATORS for variant in (Variant.BASE, Variant.OTHER)]


def start_of(running: OneProcess) -> int:
    """The id that the model's decoder begins with."""
    assert running.model.both is not None
    return running.model.both.start_id


def requests_for(running: OneProcess, references: list[Reference], forced: int | None, every: int = 3) -> list[Request]:
    """Ask for the references' sources, each some tokens after the one before."""
    return [
        Request(
            prompt_ids=[start_of(running)],
            source_ids=one.prompt_ids,
            forced=() if forced is None else (forced,),
            max_tokens=MAX_TOKENS,
            num_logprobs=0,
            after_tokens=every * number,
        )
        for number, one in enumerate(references)
    ]


def check(references: list[Reference], running: OneProcess, forced: int | None, every: int = 3) -> None:
    """Hold the answers to the references' sources against them."""
    answers = running.run(requests_for(running, references, forced, every))
    for reference, (answer,) in zip(references, answers, strict=True):
        assert answer.failure == ""
        assert answer.token_ids == reference.token_ids
        assert [one.chosen for one in answer.logprobs] == pytest.approx(reference.logprobs, abs=1e-4)


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_tokens_and_logprobs_equal_the_reference_for_any_workers_and_arrivals(
    arch: str, variant: Variant, oracle: Oracle
) -> None:
    checkpoint, forced = oracle.checkpoint(arch, variant), FORCED[arch]
    references = oracle.choose_sources(checkpoint, 6, MAX_TOKENS, forced=forced)
    for num_workers, max_batch_tokens in ((1, 64), (2, 16), (3, 7)):
        with OneProcess(checkpoint, num_workers=num_workers, max_batch_tokens=max_batch_tokens) as running:
            check(references, running, forced)
            totals, pool = running.calls.totals, running.engine.scheduler.pool
            assert pool.num_free == pool.num_blocks
            assert totals.python_exchanges == 0 < totals.native_exchanges


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_scores_of_answers_are_their_logprobs_in_chunks_of_any_size(
    arch: str, variant: Variant, oracle: Oracle
) -> None:
    checkpoint, forced = oracle.checkpoint(arch, variant), FORCED[arch]
    references = oracle.choose_sources(checkpoint, 6, MAX_TOKENS, forced=forced)
    for max_batch_tokens in (64, 7):
        with OneProcess(checkpoint, num_workers=2, max_batch_tokens=max_batch_tokens) as running:
            requests = requests_for(running, references, None)
            for request, one in zip(requests, references, strict=True):
                request.prompt_ids, request.is_score = [start_of(running), *one.token_ids], True
            for one, (answer,) in zip(references, running.run(requests), strict=True):
                given = int(forced is not None)
                assert len(answer.logprobs) == len(one.token_ids)
                found = [each.chosen for each in answer.logprobs[given:]]
                assert found == pytest.approx(one.logprobs[given:], abs=1e-4)


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_preemption_changes_nothing_and_encodes_again(arch: str, variant: Variant, oracle: Oracle) -> None:
    checkpoint, forced = oracle.checkpoint(arch, variant), FORCED[arch]
    references = oracle.choose_sources(checkpoint, 6, MAX_TOKENS, forced=forced)
    longest = max(-(-len(one.prompt_ids) // BLOCK_TOKENS) + -(-(MAX_TOKENS + 1) // BLOCK_TOKENS) for one in references)
    with OneProcess(checkpoint, num_workers=2, kv_tokens=(longest + 4) * BLOCK_TOKENS, max_batch_tokens=64) as running:
        check([*references, *references], running, forced, every=1)
        assert running.engine.scheduler.num_preemptions > 0
        assert running.engine.scheduler.pool.num_free == longest + 4


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_buffered_experts_change_nothing_and_are_foretold_to_decoders(
    arch: str, variant: Variant, device: torch.device | None, oracle: Oracle
) -> None:
    checkpoint, forced = oracle.checkpoint(arch, variant), FORCED[arch]
    references = oracle.choose_sources(checkpoint, 6, MAX_TOKENS, forced=forced)
    with OneProcess(
        checkpoint, num_workers=1, max_batch_tokens=16, expert_memory="40%", host_memory="100%", device=device
    ) as running:
        check(references, running, forced)
        totals = running.calls.totals
        assert sum(buffer.totals.misses for buffer in running.buffers) > 0
        assert running.model.both is not None
        is_foretold = len(running.model.both.decoder.sparse) > 1
        assert totals.hinted >= totals.hinted_right >= is_foretold == bool(totals.hinted)


def test_what_a_decoder_begins_with_is_read_where_generate_reads_it(oracle: Oracle, tmp_path: Path) -> None:
    checkpoint = oracle.checkpoint("nllb-moe")

    def loaded(config: dict[str, int], generation: dict[str, int] | None) -> tuple[int, int | None]:
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(checkpoint, tmp_path)
        path, more = tmp_path / "config.json", tmp_path / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        more.unlink(missing_ok=True)
        if generation is not None:
            more.write_text(json.dumps({"eos_token_id": 2} | generation))
        model = load_router_model(tmp_path, torch.float32, torch.device("cpu"))
        assert model.both is not None
        return model.both.start_id, model.forced_id

    said = {"decoder_start_token_id": 5, "forced_bos_token_id": 6}
    assert loaded(said, None) == (5, 6)
    assert loaded(said, {"decoder_start_token_id": 7, "forced_bos_token_id": 8}) == (7, 8)
    assert loaded(said, {}) == (5, None)
    with pytest.raises(CheckpointError, match=r"generation_config.json: decoder_start_token_id is 100000; it must be"):
        loaded(said, {"decoder_start_token_id": 100000})


def test_choices_share_what_is_kept_of_their_source_and_a_later_request_finds_it(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = oracle.checkpoint("nllb-moe")
    reference = oracle.choose_sources(checkpoint, 2, MAX_TOKENS, lengths=(47,), forced=9)[0]
    with OneProcess(checkpoint, num_workers=1, max_batch_tokens=64) as running:
        encoded: list[int] = []
        model = running.model.lean
        assert isinstance(model, EncoderDecoderModel)
        encode = model.encode

        def counted(sources: Sequence[SourceRun], cache: PagedCache, most_rows: int) -> None:
            encoded.append(len(sources))
            encode(sources, cache, most_rows)

        monkeypatch.setattr(model, "encode", counted)
        (request,) = requests_for(running, [reference], 9)
        request.num_choices = 4
        first, second = running.run([request]), running.run([request])
        assert encoded == [1]
        for answers in (first, second):
            assert all(answer.token_ids == reference.token_ids for answer in answers[0])


def test_seeded_draws_do_not_depend_on_the_company(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("switch_transformers")
    references = oracle.choose_sources(checkpoint, 6, MAX_TOKENS)
    with OneProcess(checkpoint, num_workers=2, max_batch_tokens=16) as running:
        asked = requests_for(running, references, None, every=0)
        for number, one in enumerate(asked):
            one.sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=number)
        together = [answer.token_ids for (answer,) in running.run(asked)]
        alone = [running.run([one])[0][0].token_ids for one in asked]
    assert together == alone
    assert together != [one.token_ids for one in references]


@pytest.mark.parametrize("arch", TRANSLATORS)
def test_bfloat16_stays_near_the_reference(arch: str, oracle: Oracle) -> None:
    checkpoint, forced = oracle.checkpoint(arch), FORCED[arch]
    references = oracle.choose_sources(checkpoint, 6, MAX_TOKENS, forced=forced)
    with OneProcess(checkpoint, num_workers=1, dtype=torch.bfloat16, max_batch_tokens=64) as running:
        answers = running.run(requests_for(running, references, forced))
    begun = 0 if forced is None else 1
    for reference, (answer,) in zip(references, answers, strict=True):
        assert answer.token_ids[: begun + 1] == reference.token_ids[: begun + 1] or reference.margin < 0.2
        assert answer.logprobs[begun].chosen == pytest.approx(reference.logprobs[begun], abs=0.3)


def test_five_hundred_cancelled_translations_leave_nothing(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("nllb-moe")
    references = oracle.choose_sources(checkpoint, 6, MAX_TOKENS, forced=9)
    with OneProcess(checkpoint, num_workers=1, max_batch_tokens=64, kv_tokens=4096) as running:
        commands, pool = running.engine.commands, running.engine.scheduler.pool
        for number in range(500):
            (request,) = requests_for(running, [references[number % 6]], 9)
            name = running._submit(request)
            commands.cancel(1, [(name, None)])
        assert commands.wait_idle(60.0)
        assert pool.num_free == pool.num_blocks
        while not running._news.empty():
            running._news.get_nowait()
        check(references, running, 9)


def test_the_reference_that_is_used_here_is_what_transformers_4_48_3_answers(oracle: Oracle) -> None:
    """5.23 is corrected in these tests; 4.48.3 was right as it was, and its answers were kept."""
    folder = Path(__file__).parents[1] / "golden"
    found = json.loads((folder / "demo-mt.json").read_text())["found"]
    model = folder.parents[1] / "models" / "demo-mt"
    for to in ("fra_Latn", "deu_Latn"):
        wanted = [one for one in found if one["to"] == to]
        said = oracle.translate_texts(model, [one["text"] for one in wanted], to=to, max_tokens=48)
        assert [one["token_ids"] for one in said] == [one["token_ids"] for one in wanted]
        assert [one["text"] for one in said] == [one["said"] for one in wanted]


def test_routing_is_not_played_on_a_model_with_an_encoder(oracle: Oracle) -> None:
    model = load_router_model(oracle.checkpoint("nllb-moe"), torch.float32, torch.device("cpu"))
    asked: Any = SimpleNamespace(unsafe_routing=Path("trace.csv"))
    with pytest.raises(FailedPrecondition, match="cannot be played on a model with an encoder"):
        read_unsafe_routing(asked, model)
