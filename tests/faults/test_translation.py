"""Translations of the demo model over real processes: each sentence's are the reference's, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import AsyncClient, Client, InvalidArgument, RetryPolicy
from collegium.model.manifest import ensure_manifest

MODEL = Path(__file__).parents[2] / "models" / "demo-mt"
MAX_TOKENS = 48
LIMIT_S = 90.0
GOLDEN = Path(__file__).parents[1] / "golden"
FOUND = json.loads((GOLDEN / "demo-mt.json").read_text())["found"]  # by transformers 4.48.3
TEXTS = ["", *(GOLDEN / "texts.txt").read_text(encoding="utf-8").splitlines()]
REFERENCES = {to: ["", *(one["said"] for one in FOUND if one["to"] == to)] for to in ("fra_Latn", "deu_Latn")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    spec = ClusterSpec(
        model=MODEL,
        manifest=ensure_manifest(MODEL, out=tmp_path_factory.mktemp("m") / "manifest.json"),
        num_workers=2,
        dtype="float32",
        log_level="warning",
    )
    with Cluster(spec) as running:
        yield running


def test_texts_ids_and_order_are_those_of_the_reference(cluster: Cluster) -> None:
    with Client(cluster.targets, timeout_s=LIMIT_S) as client:
        model = client.get_model()
        assert (model.is_encoder_decoder, model.languages) == (True, ("deu_Latn", "eng_Latn", "fra_Latn"))
        for language, expected in REFERENCES.items():
            times = 512 // len(TEXTS) if language == "fra_Latn" else 4
            found = list(client.translate_all(TEXTS * times, to=language, max_tokens=MAX_TOKENS))
            assert [one.index for one in found] == list(range(times * len(TEXTS)))
            assert [one.text for one in found] == expected * times
        said = FOUND[0]
        one = client.translate(said["text"], to="fra_Latn", max_tokens=MAX_TOKENS, logprobs=True)
        assert list(one.translations[0].token_ids) == said["token_ids"]
        given = {"target_language": "fra_Latn", "source_language": "eng_Latn"}
        by_ids = client.score(said["text"], target_ids=said["token_ids"], **given)  # type: ignore[arg-type]
        by_text = client.score(said["text"], target=said["said"], **given)  # type: ignore[arg-type]
        assert by_text.token_ids == by_ids.token_ids == tuple(said["token_ids"])
        assert by_text.logprobs == pytest.approx(by_ids.logprobs, abs=1e-5)
        assert (by_ids.logprobs[0], sum(by_ids.logprobs)) == (0.0, pytest.approx(one.translations[0].logprob, abs=1e-4))
        asked = client.score(said["text"], target_ids=said["token_ids"])  # whose first id is a token like any other
        assert asked.logprobs[0] < 0 and asked.logprobs[1:] == pytest.approx(by_ids.logprobs[1:], abs=1e-5)
        streamed = client.complete(said["text"], target_language="fra_Latn", max_tokens=MAX_TOKENS, logprobs=0)
        assert (list(streamed.token_ids), streamed.text) == (said["token_ids"], said["said"])
        assert streamed.logprobs[0].chosen == 0.0
        assert sum(each.chosen for each in streamed.logprobs) == pytest.approx(one.translations[0].logprob, abs=1e-4)


def test_a_worker_a_router_and_a_gateway_may_die_amid_translations(cluster: Cluster) -> None:
    for name in ("worker-1", "router-0", "gateway-0"):
        starts = cluster.num_starts(name)
        found: list[str] = []
        failures: list[BaseException] = []

        def run(found: list[str] = found, failures: list[BaseException] = failures) -> None:
            try:
                with Client(cluster.targets, timeout_s=LIMIT_S, retry=RetryPolicy(rounds=100)) as client:
                    for one in client.translate_all(TEXTS * 6, to="deu_Latn", max_tokens=MAX_TOKENS):
                        found.append(one.text)
            except BaseException as error:
                failures.append(error)

        running = threading.Thread(target=run)
        running.start()
        cluster.wait_until(lambda found=found: len(found) > 20, LIMIT_S, "the first translations")
        cluster.kill(name)
        cluster.wait_until(lambda running=running: not running.is_alive(), LIMIT_S, "the last translation")
        assert not failures
        assert found == REFERENCES["deu_Latn"] * 6
        cluster.wait_until(lambda name=name, starts=starts: cluster.num_starts(name) > starts, LIMIT_S)
        cluster.wait_until_serving(name)


def test_what_is_wrong_with_one_sentence_fails_it_alone_and_what_is_wrong_with_all_fails_at_once(
    cluster: Cluster,
) -> None:
    texts = [TEXTS[0], "\udcff broken", TEXTS[1], "word " * 700, TEXTS[2]]
    with Client(cluster.targets, timeout_s=LIMIT_S) as client:
        found = list(client.translate_all(texts, to="fra_Latn", max_tokens=MAX_TOKENS))
        assert [one.text for one in found[::2]] == REFERENCES["fra_Latn"][:3]
        assert [one.error.reason for one in found[1::2] if one.error] == ["BROKEN_UTF8", "PROMPT_TOO_LONG"]
        assert "the source has 702 tokens, and the model takes 512" in str(found[3].error)
        with pytest.raises(InvalidArgument, match=r"'tlh_Latn' is no language of this model.*deu_Latn, eng_Latn"):
            list(client.translate_all(TEXTS, to="tlh_Latn"))
        with pytest.raises(InvalidArgument, match="3 choices are more than 2 beams"):
            list(client.translate_all(TEXTS, to="fra_Latn", num_beams=2, n=3))
        with pytest.raises(InvalidArgument, match="scores an answer to the input"):
            client.score("text")

        def texts_that_end_badly() -> Iterator[str]:
            yield TEXTS[0]
            raise KeyError("the caller's own")

        taken: list[str] = []
        with pytest.raises(KeyError, match="the caller's own"):
            taken.extend(one.text for one in client.translate_all(texts_that_end_badly(), to="fra_Latn"))


def test_beams_are_the_best_first_and_the_asynchronous_client_finds_the_same(cluster: Cluster) -> None:
    with Client(cluster.targets, timeout_s=LIMIT_S) as client:
        found = list(client.translate_all(TEXTS, to="deu_Latn", num_beams=4, n=3, max_tokens=MAX_TOKENS))
        greedy = list(client.translate_all(TEXTS, to="deu_Latn", max_tokens=MAX_TOKENS, logprobs=True))
    for one, other in zip(found, greedy, strict=True):
        if one.source:
            scores = [each.score for each in one.translations if each.score is not None]
            assert scores == sorted(scores, reverse=True)
            assert len({each.token_ids for each in one.translations}) == 3
            best, alone = one.translations[0], other.translations[0]
            assert best.score == pytest.approx(best.logprob / len(best.token_ids), abs=1e-5)
            assert best.score >= alone.logprob / len(alone.token_ids) - 0.05  # it may miss what is best, not by much

    with Client(cluster.targets, timeout_s=LIMIT_S) as client:
        options = {"num_beams": 4, "n": 2, "early_stopping": True, "max_tokens": MAX_TOKENS}
        golden = [one for one in FOUND if one["to"] == "deu_Latn"]
        same = list(client.translate_all([one["text"] for one in golden], to="deu_Latn", **options))  # type: ignore[arg-type]
    for one, wanted in zip(same, golden, strict=True):
        assert [each.score for each in one.translations] == pytest.approx(wanted["scores"], abs=1e-4)
        assert [each.text for each in one.translations] == wanted["beams"]

    async def asked() -> list[list[tuple[int, ...]]]:
        async with AsyncClient(cluster.targets, timeout_s=LIMIT_S) as client:

            async def slowly() -> AsyncIterator[str]:
                for text in TEXTS:
                    await asyncio.sleep(0.01)
                    yield text

            options = {"num_beams": 4, "n": 3, "max_tokens": MAX_TOKENS}
            return [
                [each.token_ids for each in one.translations]
                async for one in client.translate_all(slowly(), to="deu_Latn", **options)  # type: ignore[arg-type]
            ]

    assert asyncio.run(asked()) == [[each.token_ids for each in one.translations] for one in found]


def test_the_command_keeps_lines_and_tells_of_those_that_fail(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "collegium", "translate", "--target", cluster.targets[0], "--to", "fra_Latn"]
    lines = [text.encode() for text in TEXTS] + [b"caf\xe9", TEXTS[1].encode()]
    env = os.environ | {"COLUMNS": "200"}
    command += ["--max-tokens", str(MAX_TOKENS)]
    done = subprocess.run(command, input=b"\r\n".join(lines), capture_output=True, check=False, env=env)
    expected = [*REFERENCES["fra_Latn"], "", REFERENCES["fra_Latn"][1]]
    assert done.stdout.decode().split("\n") == [*expected, ""]
    assert done.returncode == 1
    told = done.stderr.decode()
    assert f"line {len(TEXTS) + 1}: INVALID_ARGUMENT: text: the bytes are not UTF-8" in told
    assert f"{len(TEXTS) + 2} lines" in told
    assert "1 failed" in told


def test_the_command_scores_an_answer_to_a_source(cluster: Cluster) -> None:
    said = FOUND[0]
    command = [sys.executable, "-m", "collegium", "score", "--target", cluster.targets[0], "--prompt", said["text"]]
    command += ["--target-text", said["said"], "--source-language", "eng_Latn", "--target-language", "fra_Latn"]
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert (found["token_ids"], found["text"]) == (said["token_ids"], said["said"])
    assert found["logprobs"][0] is None and all(one <= 0 for one in found["logprobs"][1:])
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    assert lines[0].split() == [str(said["token_ids"][0]), "-"]
    assert lines[-1].endswith(f"over {len(said['token_ids']) - 1} tokens (the first is given)")


def test_texts_of_several_sentences_are_translated_sentence_by_sentence(cluster: Cluster) -> None:
    texts = [f"{TEXTS[2]} {TEXTS[3]}\n{TEXTS[5]}", "", f"{TEXTS[2]} " + "word " * 700 + ".", TEXTS[5]]
    first, second, third = (REFERENCES["fra_Latn"][at] for at in (2, 3, 5))
    with Client(cluster.targets, timeout_s=LIMIT_S) as client:
        found = list(client.translate_all(texts, to="fra_Latn", source="eng_Latn", split=True, max_tokens=MAX_TOKENS))
    assert [one.text for one in found[:2]] == [f"{first} {second}\n{third}", ""]
    assert found[2].error is not None and found[2].error.reason == "PROMPT_TOO_LONG"
    assert found[3].text == REFERENCES["fra_Latn"][5]
