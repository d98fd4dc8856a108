"""Plans on paper: how even, in what time, with how many moves; the default policy beside the paper's and EPLB.

    python benchmarks/planning.py [--seeds 5] [--json]

Three questions. From nothing: 61 layers x 256 experts, log-normal loads, 288 slots, 32 workers. After 30 % log-normal
drift: the moves that bring every layer back to 1.02. While routing drifts (the generator of collegium/buffering, 30 %
of the static terms drawn anew at each prompt's border): balancedness of the window after the one that was planned with,
and the bytes that it took, against EPLB that plans anew for each window. The paper's policies plan once, from the first
half of the windows; all are scored on the second.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from collegium.balancing.fleet import Floats, count_moves, make_fleet, max_loads, max_over_mean, weigh
from collegium.balancing.forecast import forecast
from collegium.balancing.moves import Terms, rebalance
from collegium.balancing.policies import POLICIES
from collegium.buffering.generator import RoutingShape, generate_trace

SMALL = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
LAYERS, EXPERTS, SLOTS, WORKERS = 61, 256, 288, 32
DRIFT = RoutingShape(num_layers=12, num_experts=128, top_k=8, prompt_tokens=0, decode_tokens=512, drift=0.3)
DRIFT_WORKERS, DRIFT_SLOTS = 16, 144
WINDOW_TOKENS = 128
BUDGET = 0.08  # of all slots: what one plan may load, for EPLB loads nine tenths of them


@dataclass(frozen=True, slots=True, kw_only=True)
class FromNothing:
    """One policy on the large case and on the small one."""

    policy: str
    worst_max_over_mean: float  # of all layers and seeds
    mean_max_over_mean: float
    milliseconds: float
    small_max: float  # work of the busiest worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Drifting:
    """One policy on drifting routing."""

    policy: str
    balancedness: float  # of the next window, mean over layers, windows and seeds
    moved: float  # experts loaded per window, over all slots
    max_load: float
    avg_max_load: float


def from_nothing(seeds: int, repeat: int) -> list[FromNothing]:
    """Plan the large and the small case with every policy."""
    fleet, small = make_fleet(LAYERS, WORKERS, SLOTS), make_fleet(1, 8, 16)
    results: list[FromNothing] = []
    for name, policy in POLICIES.items():
        ratios: list[Floats] = []
        taken_ms: list[float] = []
        for seed in range(seeds):
            loads = np.random.default_rng(seed).lognormal(0, 1, (1, LAYERS, EXPERTS))
            for _ in range(repeat if name in ("replicated", "static") else 2):
                began = time.perf_counter()
                experts = policy(loads, fleet)
                taken_ms.append((time.perf_counter() - began) * 1e3)
            ratios.append(max_over_mean(experts, loads[0], fleet.speeds))
        every = np.concatenate(ratios)
        results.append(
            FromNothing(
                policy=name,
                worst_max_over_mean=round(float(every.max()), 4),
                mean_max_over_mean=round(float(every.mean()), 4),
                milliseconds=round(statistics.median(taken_ms), 2),
                small_max=round(float(weigh(policy(SMALL[None], small), SMALL).sum(2).max()), 2),
            )
        )
    return results


def after_drift(seeds: int) -> dict[str, float]:
    """Move from a plan to one for loads that drifted by 30 %."""
    fleet = make_fleet(LAYERS, WORKERS, SLOTS)
    moves, eplb_moves, worst = [], [], 0.0
    taken_ms: list[float] = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        loads = rng.lognormal(0, 1, (LAYERS, EXPERTS))
        drifted = loads * rng.lognormal(0, 0.3, loads.shape)
        base = POLICIES["replicated"](loads[None], fleet)
        began = time.perf_counter()
        outcome = rebalance(base, drifted, fleet, target=1.02, terms=Terms(expert_bytes=np.ones(LAYERS, np.int64)))
        taken_ms.append((time.perf_counter() - began) * 1e3)
        moves.append(count_moves(base, outcome.experts, EXPERTS) / LAYERS)
        worst = max(worst, float(max_over_mean(outcome.experts, drifted, fleet.speeds).max()))
        before, after = (POLICIES["eplb"](one[None], fleet) for one in (loads, drifted))
        eplb_moves.append(count_moves(before, after, EXPERTS) / LAYERS)
    return {
        "moves_per_layer": round(statistics.mean(moves), 1),
        "most_moves_per_layer": round(max(moves), 1),
        "worst_max_over_mean": round(worst, 4),
        "eplb_moves_per_layer": round(statistics.mean(eplb_moves), 1),
        "milliseconds": round(statistics.median(taken_ms), 1),
    }


def windows(seed: int, num_prompts: int) -> Floats:
    """Count the choices of generated routing, window by window: [T, L, E]."""
    shape = RoutingShape(**{**asdict(DRIFT), "num_prompts": num_prompts})
    trace = generate_trace(shape, seed=seed)
    token = trace.turn * shape.decode_tokens + trace.step
    number = token // WINDOW_TOKENS
    counts = np.zeros((int(number.max()) + 1, shape.num_layers, shape.num_experts))
    np.add.at(counts, (number, trace.layer, trace.expert), 1.0)
    return counts


def drifting(seeds: int, num_prompts: int) -> tuple[list[Drifting], dict[str, float]]:
    """Let each policy follow drifting routing: plan with the windows so far, count on the next one."""
    fleet = make_fleet(DRIFT.num_layers, DRIFT_WORKERS, DRIFT_SLOTS)
    all_slots = DRIFT.num_layers * DRIFT_SLOTS
    even: dict[str, list[float]] = {name: [] for name in POLICIES}
    moved: dict[str, list[float]] = {name: [] for name in POLICIES}
    peaks: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
    for seed in range(seeds):
        history = windows(seed, num_prompts)
        for name in POLICIES:
            shares: list[tuple[float, float]] = []
            before = None
            for at, experts in enumerate(_plans(name, history)):
                if at + 1 < len(history) // 2:  # as in the paper: the first half plans, the second is scored
                    before = experts
                    continue
                following = history[at + 1]
                even[name].append(float((1 / max_over_mean(experts, following, fleet.speeds)).mean()))
                shares.append(max_loads(experts, following[None]))
                if before is not None:
                    moved[name].append(count_moves(before, experts, DRIFT.num_experts) / all_slots)
                before = experts
            peaks[name].append((max(share for share, _ in shares), statistics.mean(share for share, _ in shares)))
    results = [
        Drifting(
            policy=name,
            balancedness=round(statistics.mean(even[name]), 4),
            moved=round(statistics.mean(moved[name]), 4),
            max_load=round(statistics.mean(peak for peak, _ in peaks[name]), 4),
            avg_max_load=round(statistics.mean(mean for _, mean in peaks[name]), 4),
        )
        for name in POLICIES
    ]
    gap = np.array(even["replicated"]) - np.array(even["eplb"])
    against = {
        "balancedness_gained": round(float(gap.mean()), 4),
        "plus_minus_95": round(1.96 * float(gap.std()) / len(gap) ** 0.5, 4),
        "bytes_over_eplbs": round(statistics.mean(moved["replicated"]) / statistics.mean(moved["eplb"]), 4),
        "windows": len(gap),
    }
    return results, against


def _plans(name: str, history: Floats) -> Iterator[np.ndarray]:
    """Give what a policy has in force after each window but the last."""
    fleet = make_fleet(DRIFT.num_layers, DRIFT_WORKERS, DRIFT_SLOTS)
    terms = Terms(
        expert_bytes=np.ones(DRIFT.num_layers, np.int64), byte_budget=int(BUDGET * DRIFT.num_layers * DRIFT_SLOTS)
    )
    seats = None
    for at in range(len(history) - 1):
        seen = history[max(0, at - 11) : at + 1]
        if name == "eplb":
            seats = POLICIES[name](seen[-1:], fleet)  # anew for each window, as it is used
        elif name != "replicated":  # static and the paper's: once, from the first half
            seats = POLICIES[name](history[: len(history) // 2], fleet) if seats is None else seats
        elif seats is None:
            seats = POLICIES[name](forecast(seen)[None], fleet)
        else:
            seats = rebalance(seats, forecast(seen), fleet, target=1.0, terms=terms).experts
        yield seats


def show(nothing: Sequence[FromNothing], drift: Sequence[Drifting]) -> None:
    """Print both tables."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{LAYERS} layers x {EXPERTS} experts, log-normal, {SLOTS} slots, {WORKERS} workers")
    for column in ("policy", "worst max/mean", "mean max/mean", "ms", "small example, busiest"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for one in nothing:
        table.add_row(
            one.policy,
            f"{one.worst_max_over_mean:.4f}",
            f"{one.mean_max_over_mean:.4f}",
            f"{one.milliseconds:.2f}",
            f"{one.small_max:.2f}",
        )
    console.print(table)
    table = Table(title="drifting routing: the window after the planned one")
    for column in ("policy", "balancedness", "loaded per window", "Max Load", "Avg Max Load"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for two in drift:
        table.add_row(
            two.policy,
            f"{two.balancedness:.3f}",
            f"{100 * two.moved:.1f} % of slots",
            f"{two.max_load:.3f}",
            f"{two.avg_max_load:.3f}",
        )
    console.print(table)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=9, help="plans of the default policy per seed")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of drifting routing, 4 windows each")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the tables")
    args = parser.parse_args()
    nothing, drifted = from_nothing(args.seeds, args.repeat), after_drift(args.seeds)
    drift, against = drifting(args.seeds, args.prompts)
    facts = conditions(threads=1)
    if args.json:
        result = {
            "conditions": facts,
            "from_nothing": [asdict(one) for one in nothing],
            "after_drift": drifted,
            "drifting": [asdict(one) for one in drift],
            "against_eplb": against,
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    show(nothing, drift)
    for name, values in (("after 30 % drift", drifted), ("against eplb", against), ("conditions", facts)):
        sys.stdout.write(f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}\n")


if __name__ == "__main__":
    main()
