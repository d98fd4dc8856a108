"""Translation beside `transformers`, corrected, in the same run: sentences and tokens a second.

Work: N different sentences at once, to the end of each. The cluster gets them as one call of translate_all, through
gateway, router and workers; `transformers` as one padded batch, the shape that suits it best. They take turns within
every round; the ratio is that of medians. How many texts come out equal is told: in float32 all but those that rounding
decides. With --dense, CTranslate2 takes its turn, too (`pip install 'ctranslate2>=4.8,<5'`): a dense model of equal
active size, random weights, sources as long, and for each sentence as many tokens as the mean of ours.

    python -m benchmarks.translation [MODEL_DIR] [--sentences 1,16,64] [--rounds 5] [--dtype auto] [--num-beams 4]
                                     [--dense]
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.threads import allot
from collegium.client import Client
from collegium.model.manifest import ensure_manifest, load_manifest

ROOT = Path(__file__).parents[1]
MAX_TOKENS = 96
# Sentences are made of these, for the domain that the demo model was trained on: interfaces, manuals, packages.
_SUBJECTS = ["The selected file", "This package", "The current window", "Each message", "A new folder", "The server"]
_SUBJECTS += ["Your password", "The image on the left", "The list of contacts", "The first column", "The program"]
_VERBS = ["could not be opened", "contains the documentation", "was saved to another folder", "has been deleted"]
_VERBS += ["is used by another program", "shows the number of pages", "will be replaced", "must not be empty"]
_VERBS += ["provides the static libraries", "can be moved with the mouse", "is sent to the printer"]
_ENDS = ["", " because the disk is full", " when the application starts", ", and the settings were changed"]
_ENDS += [" if you choose another language in the settings", " before the connection is closed", " for all users"]
_ENDS += [", so that the text fits on one page and no line is longer than the page is wide"]


@dataclass(frozen=True, slots=True)
class Burst:
    """What N sentences took, and what came of them."""

    seconds: float
    num_tokens: int
    texts: list[str]
    source_lengths: list[int] = field(default_factory=list[int])  # in tokens, where they are told


def sentences(num: int, seed: int) -> list[str]:
    """Different sentences of mixed lengths, always the same for the same arguments."""
    drawn = random.Random(seed)
    every = [f"{s} {v}{e}." for s in _SUBJECTS for v in _VERBS for e in _ENDS]
    return drawn.sample(every, num)


class Peer:
    """Another engine in a process of its own, stopped while it isn't its turn."""

    def __init__(self, module: str, num_threads: int, *args: str) -> None:
        """Start it and wait until it says that it is ready."""
        argv = [sys.executable, "-m", module, *args, str(num_threads)]
        env = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
        self._process = subprocess.Popen(
            argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def translate(self, texts: Sequence[str], to: str, num_beams: int) -> Burst:
        """Translate one padded batch."""
        said = self._ask({"texts": list(texts), "to": to, "max_tokens": MAX_TOKENS, "num_beams": num_beams})
        return Burst(said["seconds"], said["num_tokens"], said["texts"])

    def translate_like(self, burst: Burst) -> Burst:
        """Translate as many sentences, as long ones, into as many tokens each as the mean of another's."""
        new_tokens = round(burst.num_tokens / len(burst.texts))
        said = self._ask({"lengths": burst.source_lengths, "new_tokens": new_tokens})
        return Burst(said["seconds"], new_tokens * len(burst.texts), [])

    def _ask(self, asked: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        os.kill(self._process.pid, signal.SIGSTOP)
        return said

    def close(self) -> None:
        """End it."""
        os.kill(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@contextmanager
def peer(model: Path, dtype: str, num_threads: int) -> Iterator[Peer]:
    """Run `transformers`."""
    running = Peer("benchmarks.corrected_transformers", num_threads, str(model), dtype)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def dense_peer(model: Path, num_threads: int) -> Iterator[Peer]:
    """Run a dense model of equal active size by CTranslate2."""
    running = Peer("benchmarks.dense_process", num_threads, str(model))
    try:
        yield running
    finally:
        running.close()


def ask(client: Client, texts: Sequence[str], to: str, num_beams: int) -> Burst:
    """Translate through the cluster."""
    began_s = time.perf_counter()
    found = list(client.translate_all(texts, to=to, max_tokens=MAX_TOKENS, num_beams=num_beams))
    seconds = time.perf_counter() - began_s
    return Burst(
        seconds,
        sum(len(one.translations[0].token_ids) for one in found),
        [one.text for one in found],
        [one.source_tokens for one in found],
    )


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "models" / "demo-mt")
    parser.add_argument("--sentences", default="1,16,64", help="how many at once")
    parser.add_argument("--rounds", type=int, default=5, help="counted; one more warms up")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of both; auto: the checkpoint's, as `collegium up` and transformers take it",
    )
    parser.add_argument("--workers", type=int, default=1, help="of the cluster")
    parser.add_argument("--to", default="fra_Latn", help="language")
    parser.add_argument("--num-beams", type=int, default=1, help="above 1: beam search")
    parser.add_argument("--dense", action="store_true", help="a dense model by CTranslate2, too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    manifest = ensure_manifest(args.model)
    dtype = load_manifest(manifest).dtype if args.dtype == "auto" else args.dtype
    sizes = [int(one) for one in args.sentences.split(",")]
    num_cores = len(os.sched_getaffinity(0))
    spec = ClusterSpec(
        model=args.model,
        manifest=manifest,
        num_workers=args.workers,
        dtype=dtype,
        threads=allot(num_cores, num_routers=1, num_workers=args.workers),
        log_level="warning",
    )
    ours: dict[int, list[Burst]] = {size: [] for size in sizes}
    theirs: dict[int, list[Burst]] = {size: [] for size in sizes}
    dense: dict[int, list[Burst]] = {size: [] for size in sizes}
    with (
        told(Cluster(spec)) as cluster,
        Client(cluster.targets, timeout_s=600) as client,
        peer(args.model, dtype, num_cores) as other,
        dense_peer(args.model, num_cores) if args.dense else nullcontext() as one_more,
    ):
        for number in range(args.rounds + 1):  # the first one warms up
            for size in sizes:
                texts = sentences(size, number * 1000 + size)
                pair = ask(client, texts, args.to, args.num_beams), other.translate(texts, args.to, args.num_beams)
                like = None if one_more is None else one_more.translate_like(pair[0])
                if number:
                    ours[size].append(pair[0])
                    theirs[size].append(pair[1])
                    dense[size] += [like] if like is not None else []
    rows = [_row(size, ours[size], theirs[size], dense[size]) for size in sizes]
    if args.json:
        print(
            json.dumps(
                {
                    "conditions": conditions(model=args.model.name, dtype=dtype, beams=args.num_beams),
                    "rows": rows,
                }
            )
        )
        return
    names = ["sentences", "cluster, sentences/s", "tokens/s", "transformers", "tokens/s", "ratio", "equal texts"]
    table = Table(*names, *(["dense, CTranslate2", "ratio"] if args.dense else []))
    for row in rows:
        table.add_row(*(f"{row[name]:,.2f}" if isinstance(row[name], float) else str(row[name]) for name in row))
    console = Console(width=120)
    console.print(conditions(model=args.model.name, dtype=dtype, beams=args.num_beams))
    console.print(table)


def _row(size: int, ours: Sequence[Burst], theirs: Sequence[Burst], dense: Sequence[Burst]) -> dict[str, Any]:
    seconds = [statistics.median(one.seconds for one in each) for each in (ours, theirs, dense) if each]
    rates = [statistics.median(one.num_tokens / one.seconds for one in each) for each in (ours, theirs)]
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a.texts, b.texts, strict=True)]
    return {
        "sentences": size,
        "cluster": size / seconds[0],
        "cluster_tokens": rates[0],
        "transformers": size / seconds[1],
        "transformers_tokens": rates[1],
        "ratio": seconds[1] / seconds[0],
        "equal": f"{sum(a == b for a, b in pairs)} of {len(pairs)}",
    } | ({"dense": size / seconds[2], "ratio_to_dense": seconds[2] / seconds[0]} if dense else {})


if __name__ == "__main__":
    main()
