"""Every benchmark says which way its rows went."""

from pathlib import Path

import pytest

from benchmarks.ways import tell
from collegium.fabric.metrics import series

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("exchanges", "answers", "told"),
    [
        ((0, 0), (0, 0), "native way: no exchanges, no answers"),
        ((999, 1), (0, 8), "native way: 99.9% of 1,000 exchanges, 0.0% of 8 answers"),
        ((5, 0), (3, 1), "native way: 100.0% of 5 exchanges, 75.0% of 4 answers"),
    ],
)
def test_the_share_of_the_native_way_is_told(exchanges: tuple[int, int], answers: tuple[int, int], told: str) -> None:
    counters = {
        series(f"collegium_{what}_total", way=way): float(count)
        for what, counts in (("exchanges", exchanges), ("answers", answers))
        for way, count in zip(("native", "python"), counts, strict=True)
    }
    assert tell(counters) == told


def test_no_benchmark_starts_a_cluster_or_a_process_that_does_not_tell() -> None:
    silent = [
        path.name
        for path in BENCHMARKS.glob("*.py")
        if path.name not in ("ways.py", "one_process.py")
        for text in [path.read_text()]
        if ("Cluster(" in text or "OneProcess(" in text) and "from benchmarks.ways" not in text
    ]
    assert not silent
