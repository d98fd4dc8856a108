"""Clusters as GetCluster tells them, for tests of `collegium top`: counters are a function of the time that passed."""

from __future__ import annotations

from dataclasses import replace

from collegium.cli import rates as r
from collegium.cli.watching import Frame, Watch
from collegium.client import Balance, Cluster, Evenness, Member, Model
from collegium.fabric.metric_names import series as of

UNIX_S = 1_700_000_000.0
EVEN = Evenness(min=0.7, p50=0.9, mean=0.85)
MODEL = Model(
    name="demo-lm",
    architecture="qwen3_moe",
    vocab_size=4096,
    max_model_len=512,
    has_tokenizer=True,
    has_chat_template=False,
    eos_ids=(0,),
    num_moe_layers=4,
    num_experts=16,
    top_k=4,
    dtype="bfloat16",
)


def balance(**changes: object) -> Balance:
    """Make a balance of a cluster that moved experts once."""
    made = Balance(
        decode=EVEN,
        prefill=EVEN,
        num_windows=3,
        since_plan_ms=41_000,
        last_decision="kept: the best move gains less than its bytes cost",
        moves=12,
        moved_bytes=12 * 2**20,
        is_leader=True,
        has_memory=True,
        hottest=((3, 7, 0.181), (0, 2, 0.15), (1, 11, 0.125)),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def gateway(at_s: float = 0.0, name: str = "gateway-00000000aa") -> Member:
    """Make a gateway that ends 2 requests a second."""
    counters = {
        of(r.REQUESTS, finished_reason="stop"): 1.5 * at_s,
        of(r.REQUESTS, finished_reason="length"): 0.5 * at_s,
        r.SHED: 0.0,
        r.PROMPT_TOKENS: 40 * at_s,
        r.GENERATED_TOKENS: 100 * at_s,
    }
    return member("gateway", name, "127.0.0.1:50051", counters, at_s)


def router(at_s: float = 0.0, name: str = "router-00000000bb", workers: tuple[str, ...] = ()) -> Member:
    """Make a router that samples 100 tokens a second, in 25 steps, and sends 1,000 rows."""
    counters = {
        r.RUNNING: 4.0,
        r.WAITING: 1.0,
        r.KV_USE: 0.25,
        r.KV_BLOCKS: 100.0,
        r.PREEMPTIONS: 0.0,
        r.RETRIES: 0.0,
        r.PREFILLED_TOKENS: 40 * at_s,
        r.SAMPLED_TOKENS: 100 * at_s,
        of(r.STEPS, kind="decode"): 20 * at_s,
        of(r.STEPS, kind="mixed"): 5 * at_s,
    }
    counters |= traffic(at_s, r.ROUTER_ROWS, r.ROUTER_BYTES)
    for worker_id in workers:
        counters |= {f"{r.LINK_ROWS_OUT}/{worker_id}": 10 * at_s, f"{r.LINK_ROWS_BACK}/{worker_id}": 10 * at_s}
        counters |= {f"{r.LINK_BYTES_OUT}/{worker_id}": 5e3 * at_s, f"{r.LINK_BYTES_BACK}/{worker_id}": 4e3 * at_s}
        counters |= {f"{r.LINK_DISPATCHES}/{worker_id}": 7 * at_s}
    return member("router", name, "127.0.0.1:31009", counters, at_s)


def worker(at_s: float = 0.0, name: str = "worker-00000000cc", busy: float = 0.5, state: str = "SERVING") -> Member:
    """Make a worker that asks for 200 experts a second, of which 190 are there."""
    counters = {
        r.BUSY_S: busy * at_s,
        r.STALL_S: 0.0,
        r.QUEUED: 2.0,
        r.DISPATCHES: 50 * at_s,
        r.EXPERT_REQUESTS: 1000 + 200 * at_s,
        r.EXPERT_HITS: 500 + 190 * at_s,
        of(r.LOAD_BYTES, tier="host"): 2**20 * at_s,
        of(r.LOAD_BYTES, tier="disk"): 2**10 * at_s,
        r.MEMORY_BYTES: 2.0**30,
        r.RESIDENT: 32.0,
    }
    counters |= traffic(at_s, r.WORKER_ROWS, r.WORKER_BYTES)
    return replace(member("worker", name, "127.0.0.1:30184", counters, at_s), state=state)


def traffic(at_s: float, rows: str, num_bytes: str) -> dict[str, float]:
    """Count 1,000 rows a second each way, under these names."""
    return {
        of(rows, direction="out"): 1000 * at_s,
        of(rows, direction="back"): 1000 * at_s,
        of(num_bytes, direction="out"): 512 * 1024 * at_s,
        of(num_bytes, direction="back"): 256 * 1024 * at_s,
    }


def member(role: str, name: str, address: str, counters: dict[str, float], at_s: float) -> Member:
    """Make a member that was heard at_s after the start."""
    return Member(
        role=role,
        member_id=name,
        address=address,
        state="SERVING",
        num_threads=1,
        metrics_url="",
        counters=counters,
        joined_unix_ms=round(UNIX_S * 1e3) - 720_000,
        counted_unix_ms=round((UNIX_S + at_s) * 1e3),
    )


def cluster(*members: Member, epoch: int = 3, **changes: object) -> Cluster:
    """Make a cluster of these and a balancer."""
    balancer = Member(
        role="balancer",
        member_id="balancer",
        address="127.0.0.1:20671",
        state="SERVING",
        num_threads=0,
        metrics_url="",
        counters={},
    )
    made = Cluster(
        members=tuple(sorted((balancer, *members), key=lambda one: (one.role, one.member_id))),
        placement_epoch=epoch,
        experts_per_worker={one.member_id: 32 for one in members if one.role == "worker"},
        balance=balance(),
        wanted_workers=0,
        stale_ms=0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def cluster_at(at_s: float, num_workers: int = 2, num_routers: int = 1) -> Cluster:
    """Make a cluster some time after its start; of its workers, the later ones are busier; the last one joins, idle."""
    ids = tuple(f"worker-{at:010x}" for at in range(num_workers))
    workers = [worker(at_s, name, busy=(at + 1) / (num_workers + 1)) for at, name in enumerate(ids)]
    if num_workers > 2:
        workers[-1] = worker(at_s, ids[-1], busy=0.0, state="JOINING")
    routers = [router(at_s, f"router-{at:010x}", ids) for at in range(num_routers)]
    return cluster(gateway(at_s), *routers, *workers)


def seen(watch: Watch, told: Cluster, at_s: float) -> Frame:
    """Have a watch take an answer so long after the start."""
    return watch.take(told, (MODEL,), now_s=at_s, unix_s=UNIX_S + at_s)


def frame_of(num_workers: int = 2, num_routers: int = 1, num_frames: int = 12) -> Frame:
    """Make a frame after some seconds."""
    watch = Watch()
    frame = seen(watch, cluster_at(0.0, num_workers, num_routers), 0.0)
    for at in range(1, num_frames):
        frame = seen(watch, cluster_at(float(at), num_workers, num_routers), float(at))
    return frame
