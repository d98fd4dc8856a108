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
