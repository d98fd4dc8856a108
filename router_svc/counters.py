"""The router's counters by series name, for its metrics page and its lease. Owns no number: reads those of others."""

from collegium.fabric.metrics import series
from collegium.link.base import LinkStats
from router_svc.commands import Commands
from router_svc.expert_calls import ExpertCalls
from router_svc.scheduler import Scheduler
from router_svc.totals import EngineTotals


def read_counters(
    scheduler: Scheduler, totals: EngineTotals, commands: Commands, calls: ExpertCalls
) -> dict[str, float]:
    """Collect everything that a router counts."""
    load, stats = scheduler.load(), calls.link_stats()
    both = list(stats.values())
    counters: dict[str, float] = {
        series("collegium_num_requests_running"): load.num_running,
        series("collegium_num_requests_waiting"): load.num_waiting,
        series("collegium_kv_cache_usage_perc"): 1.0 - load.free_blocks / load.total_blocks,
        series("collegium_num_preemptions_total"): scheduler.num_preemptions,
        series("collegium_prefix_cache_queries_total"): totals.prompt_tokens,
        series("collegium_prefix_cache_hits_total"): scheduler.num_cached_tokens,
        series("collegium_prefilled_tokens_total"): totals.prefilled_tokens,
        series("collegium_sampled_tokens_total"): totals.generated_tokens,
        series("collegium_step_seconds_total"): totals.step_seconds,
        series("collegium_forward_seconds_total"): totals.forward_seconds,
        series("collegium_micro_batches_total"): totals.micro_batches,
        series("collegium_steps_shortened_total"): scheduler.num_shortened,
        series("collegium_rows_away_seconds_total"): calls.totals.away_s,
        series("collegium_rows_blocked_seconds_total"): calls.totals.blocked_s,
        series("collegium_overlap_ratio"): 1.0 - calls.totals.blocked_s / max(calls.totals.away_s, 1e-9)
        if calls.totals.away_s
        else 0.0,
        series("collegium_exchanges_total", way="native"): calls.totals.native_exchanges,
        series("collegium_exchanges_total", way="python"): calls.totals.python_exchanges,
        series("collegium_dispatches_total"): sum(s.dispatches for s in both),
        series("collegium_dispatch_retries_total"): calls.totals.retries,
        series("collegium_link_rows_total", direction="out"): sum(s.rows_out for s in both),
        series("collegium_link_rows_total", direction="back"): sum(s.rows_back for s in both),
        series("collegium_link_pairs_total", direction="out"): sum(s.pairs_out for s in both),
        series("collegium_link_bytes_total", direction="out"): sum(s.bytes_out for s in both),
        series("collegium_link_bytes_total", direction="back"): sum(s.bytes_back for s in both),
        series("collegium_link_late_replies_total"): sum(s.late_replies for s in both),
        series("collegium_suspect_answers_total"): calls.totals.suspect_answers,
        series("collegium_prefetch_predicted_total"): calls.totals.hinted,
        series("collegium_prefetch_predicted_right_total"): calls.totals.hinted_right,
        series("collegium_links"): len(calls.worker_ids),
        series("collegium_placement_epoch"): calls.epoch,
        # Beside the metrics page, in `collegium status`:
        "needed_bytes": calls.totals.needed_bytes,
        "free_kv_blocks": load.free_blocks,
        "total_kv_blocks": load.total_blocks,
        "sequences": load.num_running + load.num_waiting,
    }
    counters |= {series("collegium_steps_total", kind=kind): count for kind, count in totals.steps.items()}
    counters |= {
        series("collegium_submissions_refused_total", reason=reason): count
        for reason, count in list(commands.refused.items())
    }
    for worker_id, link in stats.items():
        counters |= {} if not worker_id else _by_worker(worker_id, link)
    return counters


def _by_worker(worker_id: str, link: LinkStats) -> dict[str, float]:
    return {
        f"rows_out/{worker_id}": link.rows_out,
        f"rows_back/{worker_id}": link.rows_back,
        f"bytes_out/{worker_id}": link.bytes_out,
        f"bytes_back/{worker_id}": link.bytes_back,
        f"dispatches/{worker_id}": link.dispatches,
    }
