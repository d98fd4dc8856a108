"""Recorded routing of the trained demo models, and what the paper's buffers and placements make of it.

A cluster serves each model while `collegium trace` records: the language model continues texts, the translation model
translates sentences. A workload is the MoE layers of one stack. Then traces are replayed, without a clock.
"""

import functools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.buffering import OPENINGS
from benchmarks.translation import sentences
from benchmarks.ways import told
from collegium.balancing.fleet import Floats, make_fleet, max_loads
from collegium.balancing.policies import POLICIES as PLACEMENTS
from collegium.buffering.belady import Min
from collegium.buffering.policies import make_policy
from collegium.buffering.replay import Result, Scope, capacity_of_percent, replay
from collegium.buffering.traces import Trace, read_trace
from collegium.buffering.visits import read_visits
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.model.manifest import ensure_manifest

ROOT = Path(__file__).parents[1]
EVICTIONS = ("lifo", "lru", "ewma", "min")
PERCENTS = (6.25, 12.5, 25.0, 50.0, 75.0)
_AT_ONCE = 16
_WORKERS = 8
_SPARE = 8  # slots of all workers together beyond an expert each, for what may replicate
_WINDOW_TOKENS = 64
_LISTENING_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A workload's routing: the trace of its layers alone."""

    workload: str
    trace: Trace


def record(folder: Path, num: int) -> list[Recorded]:
    """Serve both models and record: `num` continued texts, `num` sentences into each of two languages."""
    texts = [OPENINGS[i % len(OPENINGS)] for i in range(num)]
    lm = _record(ROOT / "models" / "demo-lm", folder / "lm.csv", lambda client: _continue(client, texts))
    lines = sentences(num, 7)
    mt = _record(ROOT / "models" / "demo-mt", folder / "mt.csv", lambda client: _translate(client, lines))
    encoders = sorted({int(layer) for layer in np.unique(mt.layer)})
    encoders = encoders[: len(encoders) // 2]  # those of the encoder are numbered first, and both stacks have as many
    is_source = np.isin(mt.layer, encoders)
    return [
        Recorded(workload="LM", trace=_part(lm, lm.phase == 1)),
        Recorded(workload="MT encoder", trace=_part(mt, is_source)),
        Recorded(workload="MT decoder", trace=_part(mt, ~is_source & (mt.phase == 1))),
    ]


def caches(recorded: Sequence[Recorded]) -> Iterator[dict[str, object]]:
    """Hit rates of each policy in a buffer with slots for a share of each layer's experts."""
    for one in recorded:
        visits = read_visits(one.trace, prefill_tokens=0)  # batches as they ran
        sizes = list(one.trace.header.expert_bytes.values())
        for percent in PERCENTS:
            capacity = capacity_of_percent(Scope.LAYER, sizes, one.trace.header.num_experts, percent)
            row: dict[str, object] = {"workload": one.workload, "slots, % of experts": percent}
            for name in EVICTIONS:
                policy = Min(visits) if name == "min" else make_policy(name)
                row[name] = round(_hit_rate(replay(visits, policy, capacity)), 4)
            yield row


def _hit_rate(result: Result) -> float:
    hits, requests = result.decode_hits + result.prefill_hits, result.decode_requests + result.prefill_requests
    return hits / requests


def placements(recorded: Sequence[Recorded]) -> Iterator[dict[str, object]]:
    """Max Load and Avg Max Load of each placement: the first half of the windows plans, the second is scored."""
    for one in recorded:
        history = windows(one.trace)
        num_layers, num_experts = history.shape[1:]
        half = len(history) // 2
        for name, place in PLACEMENTS.items():
            spare = _SPARE if name in ("replicated", "eplb") else 0
            fleet = make_fleet(num_layers, _WORKERS, num_experts + spare)
            most, mean = max_loads(place(history[:half], fleet), history[half:])
            yield {
                "workload": one.workload,
                "placement": name,
                "slots": num_experts + spare,
                "Max Load": round(most, 4),
                "Avg Max Load": round(mean, 4),
                "windows": len(history) - half,
            }


def windows(trace: Trace) -> Floats:
    """Count the choices of so many neighbouring tokens of each layer: [T, L, E]."""
    layers = sorted(trace.header.expert_bytes)
    found: list[Floats] = []
    for layer in layers:
        experts = trace.expert[trace.layer == layer]
        number = np.arange(len(experts)) // (_WINDOW_TOKENS * trace.header.top_k)
        counts = np.zeros((int(number[-1]) + 1, trace.header.num_experts))
        np.add.at(counts, (number, experts), 1.0)
        found.append(counts[:-1])  # the last one may be short
    return np.stack([counts[: min(map(len, found))] for counts in found], axis=1)


def idle(recorded: Sequence[Recorded]) -> Iterator[dict[str, object]]:
    """How many experts no token of a batch chose, and the share of the busiest one, means over batches and layers."""
    for one in recorded:
        visits = read_visits(one.trace, prefill_tokens=0)
        num_experts, top_k = one.trace.header.num_experts, one.trace.header.top_k
        yield {
            "workload": one.workload,
            "tokens": sum(visit.num_tokens for visit in visits) // len(one.trace.header.expert_bytes),
            "tokens of a batch": round(statistics.fmean(visit.num_tokens for visit in visits), 1),
            "idle experts": round(statistics.fmean(1 - len(visit.experts) / num_experts for visit in visits), 3),
            "busiest": round(statistics.fmean(max(v.counts) / (v.num_tokens * top_k) for v in visits), 3),
        }


def _part(trace: Trace, kept: np.ndarray) -> Trace:
    """The rows of a trace that are kept, and the layers that they are of."""
    layers = set(trace.layer[kept].tolist())
    header = replace(trace.header, expert_bytes={k: v for k, v in trace.header.expert_bytes.items() if k in layers})
    columns = {
        name: getattr(trace, name)[kept]
        for name in ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
    }
    return Trace(header=header, **columns)


def _record(model: Path, out: Path, work: Callable[[Client], None]) -> Trace:
    spec = ClusterSpec(model=model, manifest=ensure_manifest(model), num_workers=1, log_level="error")
    with told(Cluster(spec), model.name) as cluster:
        command = [sys.executable, "-m", "collegium", "trace", str(out), "--target", cluster.targets[0]]
        tracing = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert tracing.stderr is not None
        tracing.stderr.readline()  # it says when it begins
        time.sleep(_LISTENING_S)  # and its streams are open soon after
        with Client(cluster.targets, timeout_s=600) as client:
            work(client)
        time.sleep(_LISTENING_S)
        tracing.send_signal(signal.SIGINT)
        said = tracing.stderr.read()
        if tracing.wait(timeout=30):
            raise RuntimeError(f"the recording failed: {said}")
        sys.stderr.write(f"{model.name}: {said}")
    return read_trace(out)


def _continue(client: Client, texts: Sequence[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        run = functools.partial(client.complete, max_tokens=96, temperature=0.8, top_k=40, ignore_eos=True)
        list(pool.map(lambda each: run(each[1], seed=each[0] + 1), enumerate(texts)))


def _translate(client: Client, lines: Sequence[str]) -> None:
    for language in ("fra_Latn", "deu_Latn"):
        for one in client.translate_all(lines, to=language, max_tokens=96):
            if one.error is not None:
                raise one.error
