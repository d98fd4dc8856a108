"""What the techniques do to quality: BLEU and chrF of the demo translation model, perplexity of the demo language one.

The text is the Debian Handbook, which neither model was trained on: fetched as a package from the Debian archive and
aligned page by page as the translation model's training script does it; nothing of it is kept. Answers are greedy.
In float32 the cluster's scores equal the reference's to the last digit that is printed, whatever techniques are on.
Static gating with a capacity drops what finds no place (Huang et al., NeurIPS 2024, section 3): in the reference, and
in the system itself beside the two other techniques, so that all eight combinations are there.

    pip install 'sacrebleu>=2.5,<3'
    python -m benchmarks.quality [--models mt,lm] [--sentences 256] [--capacity 0.5,1,2] [--json]
"""

import argparse
import importlib.util
import itertools
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.capacity import Dropping
from benchmarks.conditions import conditions
from benchmarks.one_process import Request
from benchmarks.translation import MAX_TOKENS, peer
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.model.manifest import ensure_manifest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "demo-mt"
LANGUAGE_MODEL = ROOT / "models" / "demo-lm"
PASSAGE = 256  # tokens
LANGUAGES = {"fr": "fra_Latn", "de": "deu_Latn"}
BATCH = 16
EAGER = ("--rebalance-s", "0.5", "--window-s", "0.5", "--target", "1", "--horizon-s", "1e9", "--spare-share", "0.5")


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and its translation in the book."""

    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to serve: how many workers, in which type, and which techniques beside dynamic gating."""

    workers: int = 1
    dtype: str = "float32"
    buffers: bool = False
    balances: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        what = ["half of the experts in slots"] * self.buffers + ["balanced all the time"] * self.balances
        return ", ".join(["cluster", self.dtype, f"{self.workers} worker{'s' * (self.workers > 1)}", *what])


def held_out(num: int, folder: Path) -> dict[str, list[Pair]]:
    """Fetch and align the handbook: `num` sentences of each language, always the same ones."""
    subprocess.run(["apt-get", "download", "-qq", "debian-handbook"], cwd=folder, check=True)
    script = _training_script()
    pages: dict[str, dict[str, str]] = {"en": {}, "fr": {}, "de": {}}
    wanted = re.compile(r"/(en-US|fr-FR|de-DE)/.*\.html$")
    for path, data in script.members(next(folder.glob("debian-handbook_*.deb")), wanted):
        language, key = script.language_and_key(path)
        pages[language][key] = data.decode("utf-8", "ignore")
    found: dict[str, dict[str, Pair]] = {language: {} for language in LANGUAGES}
    for language, _, source, target in script.by_twins(pages):
        cleaned = script.clean_pair(source, target, language, False)
        for one, other in script.split_pair(*cleaned) if cleaned else ():
            if 4 <= len(one.split()) <= 40:
                found[language].setdefault(one, Pair(one, other))
    drawn = random.Random(1)
    return {language: drawn.sample(sorted(pairs.values(), key=str), num) for language, pairs in found.items()}


def _training_script() -> Any:
    path = ROOT / "models" / "train_demo_mt.py"
    spec = importlib.util.spec_from_file_location("train_demo_mt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def by_reference(texts: dict[str, list[Pair]], capacity: float = 0.0) -> dict[str, list[str]]:
    """Translate by `transformers`, corrected, in float32; capacity: the factor beyond which its gates drop tokens."""
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL if not capacity else _with_capacity(Path(folder), capacity)
        with peer(model, "float32", 2) as other:
            for language, pairs in texts.items():
                sources = [one.source for one in pairs]
                batches = [sources[at : at + BATCH] for at in range(0, len(sources), BATCH)]
                said = [other.translate(batch, LANGUAGES[language], 1).texts for batch in batches]
                found[language] = [text for batch in said for text in batch]
    return found


def _with_capacity(folder: Path, factor: float) -> Path:
    """The model, with a config by which an expert takes factor * top-k / experts of a batch's tokens and no more."""
    for file in MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((MODEL / "config.json").read_text())
    config["moe_eval_capacity_token_fraction"] = min(1.0, factor * 2 / config["num_experts"])
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_cluster(texts: dict[str, list[Pair]], way: Way) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Translate by a cluster, each language in one call: the texts, and counters that tell what was at work."""
    with serving(MODEL, way) as (client, counters):
        found = {
            name: [
                one.text
                for one in client.translate_all([p.source for p in pairs], to=LANGUAGES[name], max_tokens=MAX_TOKENS)
            ]
            for name, pairs in texts.items()
        }
    return found, counters


@contextmanager
def serving(model: Path, way: Way) -> Iterator[tuple[Client, dict[str, float]]]:
    """Run a cluster; at its end the counters hold what was at work."""
    flags: dict[str, Sequence[str]] = {"balancer": EAGER} if way.balances else {}
    if way.buffers:
        flags["worker"] = ("--expert-memory", f"{50 // way.workers}%", "--host-memory", "100%")  # of all experts
    spec = ClusterSpec(
        model=model,
        manifest=ensure_manifest(model),
        num_workers=way.workers,
        dtype=way.dtype,
        log_level="warning",
        flags=flags,
    )
    counters: dict[str, float] = {}
    with told(Cluster(spec), way.name) as cluster, Client(cluster.targets, timeout_s=600) as client:
        yield client, counters
        status = client.get_cluster()
        counters["misses"] = sum(
            value
            for member in status.members
            for name, value in member.counters.items()
            if name.startswith("collegium_expert_misses_total")
        )
        counters["moves"] = float(status.balance.moves) if status.balance else 0.0


def scores(texts: dict[str, list[Pair]], said: dict[str, list[str]]) -> dict[str, float]:
    """BLEU and chrF of each language, by sacrebleu (Post, 2018)."""
    import sacrebleu  # type: ignore[import-not-found]

    found: dict[str, float] = {}
    for language, pairs in texts.items():
        targets = [[one.target for one in pairs]]
        found[f"{language} BLEU"] = sacrebleu.corpus_bleu(said[language], targets).score
        found[f"{language} chrF"] = sacrebleu.corpus_chrf(said[language], targets).score
    return found


def ways() -> Iterator[Way]:
    """All combinations of the techniques on two workers, and other sizes and types without."""
    for buffers in (False, True):
        for balances in (False, True):
            yield Way(workers=2, buffers=buffers, balances=balances)
    yield Way(workers=1)
    yield Way(workers=3, buffers=True, balances=True)
    yield Way(workers=2, dtype="bfloat16")


def translation(texts: dict[str, list[Pair]], factors: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Rows of the translation model."""
    reference = by_reference(texts)

    def row(way: str, said: dict[str, list[str]], **counts: float) -> dict[str, Any]:
        equal = sum(a == b for one in texts for a, b in zip(said[one], reference[one], strict=True))
        return {"way": way} | scores(texts, said) | {"equal": equal} | counts

    yield row("transformers, corrected, float32", reference)
    for way in ways():
        said, counters = by_cluster(texts, way)
        yield row(way.name, said, **counters)
    for factor in factors:
        yield row(f"transformers, static gating, capacity factor {factor:g}", by_reference(texts, factor))
    for name, dropping in combinations(MODEL, factors):
        with dropping as running:
            yield row(name, dropped_translations(running, texts), **counts_of(running))


def language(texts: dict[str, list[Pair]], factors: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Rows of the language model: perplexity of passages of each language."""
    passages = passages_of(texts)
    yield {"way": "transformers, float32"} | perplexities(passages, reference_scores(passages))
    for way in ways():
        found, counters = cluster_scores(passages, way)
        yield {"way": way.name} | perplexities(passages, found) | counters
    for name, dropping in combinations(LANGUAGE_MODEL, factors):
        with dropping as running:
            yield {"way": name} | perplexities(passages, dropped_scores(running, passages)) | counts_of(running)


def combinations(model: Path, factors: Sequence[float]) -> Iterator[tuple[str, Dropping]]:
    """Static gating by itself at every factor, and beside the other techniques at the middle one."""
    middle = sorted(factors)[len(factors) // 2 : len(factors) // 2 + 1]
    for factor in factors:
        for buffers, balances in itertools.product((False, True), repeat=2):
            if factor in middle or not (buffers or balances):
                what = ["half of the experts in slots"] * buffers + ["balanced"] * balances
                name = ", ".join([f"static gating, capacity factor {factor:g}", *what])
                yield name, Dropping(model, factor=factor, buffers=buffers, balances=balances)


def counts_of(running: Dropping) -> dict[str, float]:
    """What was at work."""
    return {
        "dropped, %": round(100 * running.num_dropped / max(1, running.num_choices), 2),
        "misses": float(running.num_misses),
    }


def dropped_translations(running: Dropping, texts: dict[str, list[Pair]]) -> dict[str, list[str]]:
    """Translate with static gating."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    config = json.loads((MODEL / "config.json").read_text())
    found: dict[str, list[str]] = {}
    for name, pairs in texts.items():
        requests = [
            Request(
                source_ids=tokenizer(one.source)["input_ids"],
                prompt_ids=[config["decoder_start_token_id"]],
                forced=[tokenizer.convert_tokens_to_ids(LANGUAGES[name])],
                eos_ids=[config["eos_token_id"]],
                max_tokens=MAX_TOKENS,
            )
            for one in pairs
        ]
        answers = running.run(requests)
        found[name] = tokenizer.batch_decode([one.token_ids for (one,) in answers], skip_special_tokens=True)
    return found


def passages_of(texts: dict[str, list[Pair]]) -> dict[str, list[list[int]]]:
    """Ids of passages of each language, English from the sources of the first."""
    tokenizer: Any = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    prose = {"en": [one.source for one in next(iter(texts.values()))]}
    prose |= {name: [one.target for one in pairs] for name, pairs in texts.items()}
    found: dict[str, list[list[int]]] = {}
    for name, lines in prose.items():
        ids: list[int] = tokenizer(" ".join(lines))["input_ids"]
        found[name] = [ids[at : at + PASSAGE] for at in range(0, len(ids) - PASSAGE + 1, PASSAGE)]
    return found


def perplexities(passages: dict[str, list[list[int]]], logprobs: dict[str, list[Sequence[float]]]) -> dict[str, float]:
    """By language, and of all; logprobs: of each passage's tokens from the second on."""
    assert all(len(one) == PASSAGE - 1 for each in logprobs.values() for one in each)
    found = {
        f"{name} perplexity": math.exp(-statistics.fmean(value for one in logprobs[name] for value in one))
        for name in passages
    }
    return found | {
        "perplexity": math.exp(-statistics.fmean(v for each in logprobs.values() for one in each for v in one))
    }


def reference_scores(passages: dict[str, list[list[int]]]) -> dict[str, list[Sequence[float]]]:
    """Score by `transformers` in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL, dtype=torch.float32).eval()
    found: dict[str, list[Sequence[float]]] = {}
    with torch.inference_mode():
        for name, each in passages.items():
            logits = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in each]
            found[name] = [
                rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
                for rows, ids in zip(logits, each, strict=True)
            ]
    return found


def cluster_scores(
    passages: dict[str, list[list[int]]], way: Way
) -> tuple[dict[str, list[Sequence[float]]], dict[str, float]]:
    """Score by a cluster, several passages at once."""
    with serving(LANGUAGE_MODEL, way) as (client, counters), ThreadPoolExecutor(BATCH) as pool:
        found = {
            name: [one.logprobs[one.num_given :] for one in pool.map(lambda ids: client.score(prompt_ids=ids), each)]
            for name, each in passages.items()
        }
    return found, counters


def dropped_scores(running: Dropping, passages: dict[str, list[list[int]]]) -> dict[str, list[Sequence[float]]]:
    """Score with static gating."""
    found: dict[str, list[Sequence[float]]] = {}
    for name, each in passages.items():
        requests = [Request(prompt_ids=ids, max_tokens=1, num_logprobs=0, is_score=True) for ids in each]
        found[name] = [[entry.chosen for entry in one.logprobs] for (one,) in running.run(requests)]
    return found


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mt,lm")
    parser.add_argument("--sentences", type=int, default=256, help="of each language")
    parser.add_argument("--capacity", default="0.5,1,2", help="factors of static gating; empty: none")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    factors = [float(one) for one in args.capacity.split(",") if one]
    with tempfile.TemporaryDirectory() as folder:
        texts = held_out(args.sentences, Path(folder))
    found: dict[str, list[dict[str, Any]]] = {}
    for name, rows in (("mt", translation), ("lm", language)):
        if name in args.models.split(","):
            found[name] = []
            for row in rows(texts, factors):
                found[name].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    facts = conditions(sentences=2 * args.sentences)
    if args.json:
        print(json.dumps({"conditions": facts} | found))
        return
    console = Console(width=170)
    console.print(facts)
    for rows in found.values():
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(*names)
        for row in rows:
            table.add_row(*(_cell(name, row.get(name, "")) for name in names))
        console.print(table)


def _cell(name: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if name.endswith(("BLEU", "chrF")) else f"{value:.3f}" if "perp" in name else f"{value:g}"
    return str(value)


if __name__ == "__main__":
    main()
