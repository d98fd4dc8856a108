"""BLEU and chrF of the demo translation model on held-out text: the reference, and the cluster by every technique.

The text is the Debian Handbook, which the model was not trained on: fetched as a package from the Debian archive and
aligned page by page as the model's training script does it; nothing of it is kept. Answers are greedy. In float32 the
cluster's scores equal the reference's to the last digit that is printed, whatever techniques are on; `--capacity` has
the reference drop what static gating with such capacity factors drops (Huang et al., NeurIPS 2024, section 3).

    pip install 'sacrebleu>=2.5,<3'; python -m benchmarks.quality [--sentences 256] [--capacity 0.5,1,2] [--json]
"""

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.translation import MAX_TOKENS, peer
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.model.manifest import ensure_manifest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "demo-mt"
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
    flags: dict[str, Sequence[str]] = {"balancer": EAGER} if way.balances else {}
    if way.buffers:
        flags["worker"] = ("--expert-memory", f"{50 // way.workers}%", "--host-memory", "100%")  # of all experts
    spec = ClusterSpec(
        model=MODEL,
        manifest=ensure_manifest(MODEL),
        num_workers=way.workers,
        dtype=way.dtype,
        log_level="warning",
        flags=flags,
    )
    found: dict[str, list[str]] = {}
    with told(Cluster(spec), way.name) as cluster, Client(cluster.targets, timeout_s=600) as client:
        for language, pairs in texts.items():
            sources = [one.source for one in pairs]
            each = client.translate_all(sources, to=LANGUAGES[language], max_tokens=MAX_TOKENS)
            found[language] = [one.text for one in each]
        status = client.get_cluster()
    counters = {"moves": float(status.balance.moves) if status.balance else 0.0}
    for member in status.members:
        for name, value in member.counters.items():
            if name.startswith(("collegium_expert_misses_total", "collegium_expert_hits_total")):
                counters[name] = counters.get(name, 0.0) + value
    return found, counters


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


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=256, help="of each language")
    parser.add_argument("--capacity", default="0.5,1,2", help="factors of static gating; empty: none")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = held_out(args.sentences, Path(folder))
    reference = by_reference(texts)
    rows: list[dict[str, Any]] = [{"way": "transformers, corrected, float32"} | scores(texts, reference)]
    for way in ways():
        said, counters = by_cluster(texts, way)
        equal = sum(a == b for one in texts for a, b in zip(said[one], reference[one], strict=True))
        rows.append({"way": way.name} | scores(texts, said) | {"equal": equal, "counters": counters})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for factor in filter(None, args.capacity.split(",")):
        said = by_reference(texts, float(factor))
        equal = sum(a == b for one in texts for a, b in zip(said[one], reference[one], strict=True))
        rows.append({"way": f"static gating, capacity factor {factor}"} | scores(texts, said) | {"equal": equal})
    facts = conditions(model=MODEL.name, sentences=2 * args.sentences)
    if args.json:
        print(json.dumps({"conditions": facts, "rows": rows}))
        return
    names = [name for name in rows[0] if name != "way"]
    table = Table("way", *names, "texts as the reference's", "misses", "moves")
    for row in rows:
        counts = row.get("counters", {})
        told_of = (row.get("equal", ""), counts.get("collegium_expert_misses_total", ""), counts.get("moves", ""))
        table.add_row(
            row["way"],
            *(f"{row[name]:.2f}" for name in names),
            *(f"{one:g}" if isinstance(one, float) else str(one) for one in told_of),
        )
    console = Console(width=160)
    console.print(facts)
    console.print(table)


if __name__ == "__main__":
    main()
