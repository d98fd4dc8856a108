"""How `up` shows a cluster: a streamed completion, its numbers, the rows and bytes of every worker, the addresses.

Owns words and tables; asks workers for their counters and the client for the completion. Starts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import grpc
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from collegium.client import Client
from collegium.fabric.channels import TlsTrust, blocking_channel
from collegium.v1 import expert_pb2, expert_pb2_grpc

_TOKEN_IDS = (1, 2, 3, 4)  # the prompt where a checkpoint has no tokenizer
_CALL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a completion took."""

    num_tokens: int
    first_token_s: float
    total_s: float
    finish_reason: str

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first one per second; 0 where there is only one."""
        rest_s = self.total_s - self.first_token_s
        return (self.num_tokens - 1) / rest_s if self.num_tokens > 1 and rest_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The completion that `up` asks for."""

    prompt: str
    max_tokens: int
    temperature: float
    top_k: int
    seed: int


def stream_completion(
    targets: Sequence[str], demand: Demand, out: TextIO, *, api_key: str | None = None, tls: TlsTrust | None = None
) -> Completion:
    """Stream a completion through the SDK to a file as it comes. Raises the SDK's errors."""
    ca = None if tls is None or tls.ca is None else str(tls.ca)
    with Client(targets, api_key=api_key, tls_ca=ca) as client:
        model = client.get_model()
        prompt: dict[str, Any] = {"prompt": demand.prompt}
        if not model.has_tokenizer:
            prompt = {"prompt_ids": list(_TOKEN_IDS)}
        else:
            out.write(demand.prompt)
        if model.is_encoder_decoder:  # what comes is no continuation
            others = [language for language in model.languages if not language.startswith("eng_")]
            prompt |= {"target_language": others[-1]} if others else {}
            out.write(f"\n{others[-1] if others else 'answer'}: ")
        start_s = time.monotonic()
        first_s, num_tokens, finish = 0.0, 0, ""
        sampling: dict[str, Any] = {}
        if demand.temperature > 0:
            sampling = {"temperature": demand.temperature, "top_k": demand.top_k, "seed": demand.seed}
        try:
            for chunk in client.generate(**prompt, max_tokens=demand.max_tokens, **sampling):
                if chunk.token_ids and not num_tokens:
                    first_s = time.monotonic() - start_s
                num_tokens += len(chunk.token_ids)
                out.write(chunk.text if "prompt" in prompt else " ".join(map(str, [*chunk.token_ids, ""])))
                out.flush()
                finish = chunk.finish_reason or finish
        finally:
            out.write("\n")
        total_s = time.monotonic() - start_s
    return Completion(num_tokens=num_tokens, first_token_s=first_s, total_s=total_s, finish_reason=finish)


def worker_counters(addresses: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Ask workers, by name and address, for their counters; one that does not answer has none."""
    counters: dict[str, dict[str, float]] = {}
    for name, address in addresses.items():
        with blocking_channel(address) as channel:
            stub: Any = expert_pb2_grpc.ExpertStub(channel)
            try:
                answer: expert_pb2.GetWorkerResponse = stub.GetWorker(expert_pb2.GetWorkerRequest(), timeout=_CALL_S)
                counters[name] = dict(answer.counters)
            except grpc.RpcError:
                counters[name] = {}
    return counters


def completion_table(
    completion: Completion, before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> Group:
    """Lay out a completion's numbers and what each worker did for it."""
    title = (
        f"{completion.num_tokens} tokens, first after {completion.first_token_s * 1e3:.0f} ms, "
        f"then {completion.tokens_per_s:.1f} tokens/s"
    )
    table = Table()
    for column in ("worker", "rows out", "rows back", "bytes out", "bytes back"):
        table.add_column(column, justify="left" if column == "worker" else "right")
    for name, counters in after.items():
        old = before.get(name, {})

        def gained(key: str, counters: Mapping[str, float] = counters, old: Mapping[str, float] = old) -> str:
            return f"{counters.get(key, 0.0) - old.get(key, 0.0):,.0f}"

        table.add_row(
            name,
            gained('collegium_worker_link_rows_total{direction="out"}'),
            gained('collegium_worker_link_rows_total{direction="back"}'),
            gained('collegium_worker_link_bytes_total{direction="out"}'),
            gained('collegium_worker_link_bytes_total{direction="back"}'),
        )
    return Group(Text(title), table)


def address_table(rows: Sequence[tuple[str, str, int]], threads: Mapping[str, int]) -> Group:
    """Lay out the members: (name, address, process id) and the compute threads by role."""
    table = Table()
    for column in ("service", "address", "process", "threads"):
        table.add_column(column, justify="right" if column in ("process", "threads") else "left")
    for name, address, pid in rows:
        table.add_row(name, address, str(pid), str(threads.get(name.partition("-")[0], "")))
    return Group(Text("The cluster"), table)  # a table's own title is padded to its width


def console(out: TextIO) -> Console:
    """Make the console that tables are written with; wide enough where the output is no terminal."""
    return Console(file=out, width=None if out.isatty() else 100, highlight=False)
