"""Make docs/paper.md and its pictures of what `benchmarks/paper.py --json FILE` measured. Needs matplotlib.

python -m benchmarks.paper_page FILE
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import SERVED, Point, claims
from benchmarks.paper_models import POLICIES, WORKLOADS

DOCS = Path(__file__).parents[1] / "docs"
_DPI = 90
_NAMES = (*POLICIES, SERVED)
_COLORS = dict(zip(_NAMES, ("tab:red", "tab:orange", "tab:green", "black", "tab:blue"), strict=True))
_COMMANDS = """
    .venv/bin/python -m benchmarks.paper --json paper.json
    .venv/bin/python -m benchmarks.paper_page paper.json
"""
_HEAD = """
Theirs: A100 GPUs, fairseq, models of 52 B and 54.5 B parameters. Models are cut to fit this machine, with the paper's
experts (512 or 128), top-2, its capacities (0.05 and 1) and its shares of MoE layers, random weights, d 256 and 4
layers a stack, so that a pass fits it: what is compared is ratios, never speeds. `static`, `padded` (as Tutel),
`block-sparse` (as MegaBlocks, blocks of 32) and `dynamic` differ in nothing but how a layer runs its experts: same
model (of `transformers`), gate, tokens, process. `served` is the same checkpoint as Collegium serves it: engine,
links and worker, sampling and caches included; a pass of the encoder has the decoder's first step in it.
"""
_DASH = "-"


def main() -> None:
    """Read the arguments, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON that benchmarks/paper.py wrote")
    args = parser.parse_args()
    measured: Mapping[str, Any] = json.loads(args.file.read_text())
    (DOCS / "paper.md").write_text("\n".join(page(measured)) + "\n", encoding="utf-8")
    plot_gating(measured["points"], DOCS / "paper-gating.png")
    plot_memory(measured["points"], DOCS / "paper-memory.png")
    plot_routing(measured["caches"], measured["placement"], DOCS / "paper-routing.png")


def page(measured: Mapping[str, Any]) -> Iterable[str]:
    """The page's lines."""
    facts = measured["conditions"]
    told = (
        f"{facts['cores']} cores, {facts['threads']} threads, memory read at {facts['memory_bandwidth_gb_s']} GB/s, "
        f"{facts['dtype']}, commit {facts['commit']}"
    )
    yield "# The paper's evaluation, theirs beside ours"
    yield ""
    yield _text(
        """"Toward Efficient Inference for Mixture of Experts" (Huang et al., NeurIPS 2024), redone by one command; this
        page and its pictures are made of what it wrote:"""
    )
    yield _COMMANDS
    yield _text(f"Ours: {told}. {_HEAD}")
    yield ""
    points = [Point(**one) for one in measured["points"]]
    said = [claims(one, mine) for one in WORKLOADS if (mine := [p for p in points if p.workload == one.name])]
    yield from _gating(measured["points"], said)
    yield from _memory(said)
    yield from _routing(measured["idle"], measured["caches"], measured["placement"])


def _gating(points: Sequence[Mapping[str, Any]], said: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "## Dynamic gating: throughput and latency by batch (the paper's figures on throughput)\n"
    yield _text(
        """Maximum throughput, each policy at its own best batch that fits into the weights + 2 GiB, of up to
        16,384 tokens (decoder: 4,096 sequences; what is served computes 4,096 at once):"""
    )
    yield ""
    yield from _table(
        ("workload", "over static: theirs", "`dynamic`", "`served`", "over Tutel: theirs", "`dynamic` over `padded`"),
        (
            (
                one["workload"],
                f"{one['theirs over static']}x",
                f"**{one['dynamic over static']}x**",
                f"{one['served over static']}x",
                f"{one['theirs over Tutel']}x",
                f"{one['dynamic over padded']}x",
            )
            for one in said
        ),
    )
    yield ""
    yield _text(
        """At equal batch, 1 to 4,096 tokens, the least that dynamic gating is ahead of any of the three others, and
        where; the paper's own loses to MegaBlocks below 32:"""
    )
    yield ""
    yield from _table(
        ("workload", "`dynamic`", "`served`"),
        ((one["workload"], one["least at equal batch"], one["least at equal batch, served"]) for one in said),
    )
    yield ""
    rates = ", ".join(f"{one['workload']} {one['served, GFLOP/s']:g}" for one in said)
    yield f"GFLOP/s of what is served, at its best, counting what a token's matmuls need: {rates}."
    yield ""
    yield _text(
        """Where `served` is behind, batches are of thousands: each sequence of a step then pays for sampling, cache and
        news in the interpreter, and each row for its way over a link, which the other columns, one model in one process
        without either, don't have. Padding is further behind on GPUs, where it also fills what devices exchange."""
    )
    yield "\n![Tokens a second over tokens of a batch, a panel for each workload](paper-gating.png)\n"
    yield "Milliseconds of a pass; a dash: it does not fit.\n"
    for workload in _in_order(points):
        mine = [one for one in points if one["workload"] == workload]
        yield f"{workload}:\n"
        rows: list[Sequence[str]] = []
        for tokens in sorted({one["tokens"] for one in mine}):
            at = {one["policy"]: one["milliseconds"] for one in mine if one["tokens"] == tokens}
            rows.append((str(tokens), *(_DASH if at[n] is None else f"{at[n]:,.2f}" for n in _NAMES)))
        yield from _table(("tokens", *(f"`{name}`" for name in _NAMES)), rows)
        yield ""


def _memory(said: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "## Memory\n"
    yield _text(
        """At static gating's largest batch; peak: weights and what a pass takes beside them. Theirs: peak 1.36x
        lower (LM), activations 79.6 % less (LM), 44.2 % (MT)."""
    )
    yield ""
    yield from _table(
        ("workload", "tokens", "peak lower by", "activations less by"),
        (
            (
                one["workload"],
                str(one["static's largest batch"]),
                f"{one['memory at static' + chr(39) + 's largest batch']}x",
                _DASH if one["activations less by"] is None else f"{100 * one['activations less by']:.1f} %",
            )
            for one in said
        ),
    )
    yield "\n![Memory beside the weights over tokens of a batch](paper-memory.png)\n"


def _routing(
    idle: Sequence[Mapping[str, Any]], caches: Sequence[Mapping[str, Any]], placement: Sequence[Mapping[str, Any]]
) -> Iterable[str]:
    yield "## Routing of the trained models\n"
    yield _text(
        """Recorded by `collegium trace` while a cluster served `models/demo-lm` (16 texts at once) and
        `models/demo-mt`; 32 experts a layer. A batch is what a layer was visited by at once. Theirs: in the MT
        decoder about 75 % of the experts idle in a batch, up to half of a batch on one expert."""
    )
    yield ""
    yield from _table(tuple(idle[0]), (_cells(one) for one in idle))
    yield "\n## Expert buffering: hit rates by size and policy\n"
    yield _text(
        """Slots for a share of each layer's experts; `lifo` is the paper's policy, `ewma` the default here, `min`
        Belady's, which knows the future. Theirs: LIFO with load balancing comes close to MIN."""
    )
    yield ""
    yield from _table(tuple(caches[0]), (_cells(one) for one in caches))
    yield "\n## Load balancing: Max Load and Avg Max Load\n"
    yield _text(
        """Of 8 workers and windows of 64 tokens; the first half of the windows plans, the second is scored.
        `static` is by number, `greedy` and `anti_correlation` are the paper's, `eplb` and `replicated` (the
        default here) have 8 slots more. Perfectly even: 0.125. Theirs: Max Load from above 0.6 to below 0.4."""
    )
    yield ""
    yield from _table(tuple(placement[0]), (_cells(one) for one in placement))
    yield "\n![Hit rates by slots, and Avg Max Load by placement](paper-routing.png)\n"
    yield _text(
        """That quality is untouched, and what dropping costs, is in [benchmarks.md](benchmarks.md#what-dropping-
        tokens-costs); all eight combinations of the techniques by speed and memory are [there](benchmarks.md),
        too."""
    )


def _in_order(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The workloads that there are points of."""
    return [one.name for one in WORKLOADS if any(point["workload"] == one.name for point in points)]


def _text(text: str) -> str:
    """A paragraph on one line."""
    return " ".join(text.split())


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    return [
        f"{value:.3f}"
        if isinstance(value, float) and value < 1
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
        for value in row.values()
    ]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|---" + "|---:" * (len(names) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def plot_gating(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens per second of each policy, by batch."""
    _plot(points, "tokens_per_s", "tokens/s", _NAMES, path)


def plot_memory(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Memory beside the weights of each policy, by batch."""
    scaled = [
        one | {"activation_bytes": one["activation_bytes"] / 2**20 if one["activation_bytes"] else None}
        for one in points
    ]
    _plot(scaled, "activation_bytes", "MiB beside the weights", tuple(POLICIES), path)


def _plot(points: Sequence[Mapping[str, Any]], field: str, label: str, names: Sequence[str], path: Path) -> None:
    import matplotlib.pyplot as plt

    workloads = _in_order(points)
    figure, axes = plt.subplots(1, len(workloads), figsize=(12, 3.6), layout="constrained")
    for axis, workload in zip(axes, workloads, strict=True):
        for name in names:
            mine = [
                (p["tokens"], p[field])
                for p in points
                if p["workload"] == workload and p["policy"] == name and p[field]
            ]
            if mine:
                axis.plot(*zip(*mine, strict=True), marker=".", label=name, color=_COLORS[name])
        axis.set(xscale="log", yscale="log", title=workload, xlabel="tokens of a batch")
        axis.set_xticks([1, 4, 16, 64, 256, 1024, 4096], labels=["1", "4", "16", "64", "256", "1k", "4k"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)


def plot_routing(caches: Sequence[Mapping[str, Any]], placement: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Hit rates by slots, and Avg Max Load by placement, of each workload."""
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(one["workload"] for one in caches))
    figure, axes = plt.subplots(1, len(workloads) + 1, figsize=(14, 3.6), layout="constrained")
    for axis, workload in zip(axes, workloads, strict=False):
        mine = [one for one in caches if one["workload"] == workload]
        for name in ("lifo", "lru", "ewma", "min"):
            style = {"linestyle": "--", "color": "black"} if name == "min" else {"marker": "."}
            axis.plot([one["slots, % of experts"] for one in mine], [one[name] for one in mine], label=name, **style)
        axis.set(title=f"hits, {workload}", xlabel="slots, % of experts", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    names = list(dict.fromkeys(one["placement"] for one in placement))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [one["Avg Max Load"] for one in placement if one["placement"] == name]
        axes[-1].bar(
            [i + width * (number - len(names) / 2 + 0.5) for i in range(len(heights))], heights, width, label=name
        )
    axes[-1].axhline(0.125, color="grey", linewidth=0.8)
    axes[-1].set_xticks(range(len(workloads)), labels=workloads, fontsize=8)
    axes[-1].set(title="Avg Max Load")
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=_DPI)


if __name__ == "__main__":
    main()
