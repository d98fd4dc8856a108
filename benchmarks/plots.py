"""Pictures of benchmarks' figures, for docs/benchmarks.md. Needs matplotlib, which nothing else here does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS, _SIZE, _DPI = "ours", (9, 4), 90


def plot_gating(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time of a layer over tokens, each implementation over ours, uniform and skewed side by side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=_SIZE, sharey=True, layout="constrained")
    mine = [row for row in rows if row["sweep"] == "tokens"]
    for axis, routing in zip(axes, ("uniform", "skewed"), strict=True):
        ours = {
            r["tokens"]: r["milliseconds"] for r in mine if r["implementation"] == _OURS and r["routing"] == routing
        }
        for name in dict.fromkeys(row["implementation"] for row in mine):
            points = [
                (r["tokens"], r["milliseconds"] / ours[r["tokens"]])
                for r in mine
                if r["implementation"] == name and r["routing"] == routing and r["milliseconds"] is not None
            ]
            style = {"color": "black", "linewidth": 2.5} if name == _OURS else {"marker": "."}
            axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set(xscale="log", yscale="log", title=f"{routing} routing", xlabel="tokens")
        axis.set_xticks([1, 4, 16, 64, 256, 1024, 4096], labels=["1", "4", "16", "64", "256", "1024", "4096"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over ours (above 1: slower)")
    axes[0].set_yticks([1, 2, 5, 10, 20, 50], labels=["1x", "2x", "5x", "10x", "20x", "50x"])
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)


def plot_serving(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens per second of each way at each concurrency, as bars."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    ways = list(dict.fromkeys(r["way"] for r in results))
    counts = sorted({r["concurrency"] for r in results})
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        speeds = {r["concurrency"]: r["tokens_per_s"] for r in results if r["way"] == way}
        at = [i + width * (number - (len(ways) - 1) / 2) for i in range(len(counts))]
        bars = axis.bar(at, [speeds.get(c, 0) for c in counts], width, label=way)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(counts)), labels=[str(c) for c in counts])
    axis.set(xlabel="concurrent requests", ylabel="tokens/s")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)


def plot_techniques(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens per second and expert memory of each combination of the three techniques."""
    import matplotlib.pyplot as plt

    names = {"dynamic_gating": "gating", "expert_buffering": "buffering", "load_balancing": "balancing"}
    labels = [" + ".join(short for name, short in names.items() if r[name]) or "none" for r in results]
    figure, axes = plt.subplots(1, 2, figsize=_SIZE, sharey=True, layout="constrained")
    for axis, field, title in (
        (axes[0], "tokens_per_s", "tokens/s"),
        (axes[1], "expert_memory_mb", "expert memory, MB"),
    ):
        bars = axis.barh(labels, [r[field] for r in results], color="tab:blue" if axis is axes[0] else "tab:orange")
        axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
        axis.margins(x=0.1)
        axis.set(title=title)
    figure.savefig(path, dpi=_DPI)


def plot_overlap(costs: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gain of micro-batches, measured and predicted."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    ways = [r["micro_batches"] for r in results]
    axis.bar(ways, [r["gain"] for r in results], 0.5, label="measured")
    predicted = [(r["micro_batches"], r["predicted_gain"]) for r in results if r["predicted_gain"]]
    axis.plot(*zip(*predicted, strict=True), "k_", markersize=30, label="predicted")
    axis.axhline(1.0, color="grey", linewidth=0.8)
    first = costs[0]
    title = f"a step: router {first['router_ms']:.0f}, worker {first['worker_ms']:.0f}, link {first['link_ms']:.0f} ms"
    axis.set(xlabel="micro-batches", ylabel="gain over one", title=title)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=_DPI)


def plot_scaling(swept: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Cost of a token along each simulated sweep."""
    import matplotlib.pyplot as plt

    along = {
        "tokens": "rows of a router",
        "experts": "experts",
        "workers": "workers",
        "routers": "routers",
        "both": "workers",
    }
    figure, axes = plt.subplots(1, len(along), figsize=(13, 3.4), sharey=True, layout="constrained")
    for axis, (sweep, field) in zip(axes, along.items(), strict=True):
        rows = [row for row in swept if row["sweep"] == sweep]
        axis.plot([row[field] for row in rows], [row["process ms a token"] for row in rows], marker="o")
        axis.set(xscale="log", yscale="log", title=sweep, xlabel=field)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("process ms a token")
    figure.savefig(path, dpi=_DPI)
