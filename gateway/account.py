"""How each request ends: counted, timed, noted on its span, and told in one line of the log.

Owns what is said of a request to those who operate the gateway. Says nothing of what it asked or was answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from opentelemetry import trace

from collegium.fabric import logs, metrics
from collegium.fabric.errors import CollegiumError, DeadlineExceeded, Internal
from gateway.counts import Counts
from gateway.fields import is_plain_id
from gateway.generation import Generation
from gateway.relay import Arrival

PROVIDER = "collegium"
SCORE = "score"
TRANSLATE = "translate"
# Failures that are the caller's, or were foreseen: nothing for operators to do about one of them.
_CALLERS = frozenset({"CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
_log = logs.get("gateway")


class Account:
    """One request's. operation: as gen_ai.operation.name has it, or SCORE or TRANSLATE."""

    def __init__(self, arrival: Arrival, operation: str) -> None:
        self.arrival = arrival
        self.operation = operation
        self._generation: Generation | None = None

    def begin(self, generation: Generation, model: str) -> None:
        """Note what was accepted, for the span and for every line of the log from here on."""
        self._generation = generation
        accepted = generation.accepted
        logs.bind(request_id=accepted.request_id)
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes(
                {
                    "gen_ai.operation.name": self.operation,
                    "gen_ai.provider.name": PROVIDER,
                    "gen_ai.request.model": model,
                    "gen_ai.request.max_tokens": accepted.max_tokens,
                    "gen_ai.request.temperature": accepted.sampling.temperature,
                    "gen_ai.request.seed": str(accepted.sampling.seed),
                    "gen_ai.response.id": accepted.request_id,
                    "gen_ai.response.model": model,
                    "gen_ai.usage.input_tokens": len(accepted.prompt_ids),
                }
            )

    def end(self, failure: str, reason: str, field: str, model: str) -> None:
        """Say how it went. failure: a canonical status, or empty; reason and field: of the error, or empty."""
        took_s = asyncio.get_running_loop().time() - self.arrival.arrived_s
        metrics.histogram("collegium_e2e_request_latency_seconds").observe(took_s)
        generation, told = self._generation, {"operation": self.operation, "took_s": took_s}
        if generation is not None:
            told |= self._end_generation(generation, took_s, model, is_well=not failure)
        if self.operation != SCORE:
            labels = {**_labels(self.operation, model), "error_type": _error_type(failure)}
            metrics.histogram("gen_ai_server_request_duration_seconds").labels(**labels).observe(took_s)
        if not failure:
            _log.info("request done", **told)
            return
        told |= {"code": failure, "reason": reason} | ({"field": field} if field else {})
        (_log.info if failure in _CALLERS else _log.warning)("request failed", **told)

    def _end_generation(self, generation: Generation, took_s: float, model: str, *, is_well: bool) -> dict[str, object]:
        prompt, output = len(generation.accepted.prompt_ids), generation.num_new_tokens
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attribute("gen_ai.usage.output_tokens", output)
            span.set_attribute("gen_ai.response.finish_reasons", generation.finish_reasons)
        if is_well:
            metrics.histogram("collegium_request_prompt_tokens").observe(prompt)
            metrics.histogram("collegium_request_generation_tokens").observe(output)
        told: dict[str, object] = {
            "prompt_tokens": prompt,
            "output_tokens": output,
            "finish": ",".join(generation.finish_reasons),
        }
        if generation.first_token_s is None:
            return told
        first_s = generation.first_token_s - self.arrival.arrived_s
        if is_well:
            labels = _labels(self.operation, model)
            metrics.histogram("gen_ai_server_time_to_first_token_seconds").labels(**labels).observe(first_s)
            longest = generation.num_longest
            if longest > 1 and not generation.num_given:
                each_s = (took_s - first_s) / (longest - 1)
                metrics.histogram("gen_ai_server_time_per_output_token_seconds").labels(**labels).observe(each_s)
        return {**told, "first_token_s": first_s}


class Accounts:
    """Keeps those of all requests; owned by the event loop's thread. model: gives the model's name, once known."""

    def __init__(self, counts: Counts, model: Callable[[], str]) -> None:
        self._counts = counts
        self._model = model

    @asynccontextmanager
    async def of(
        self, operation: str, left_s: float | None, request_id: str = "", *, caller: int = 0
    ) -> AsyncGenerator[Account, None]:
        """Account for what is done inside; left_s: seconds until the caller's deadline, None without one.

        request_id: as the caller gave it; it is in no line of the log unless it can be one.
        """
        if request_id and is_plain_id(request_id):
            logs.bind(request_id=request_id)
        now_s = asyncio.get_running_loop().time()
        deadline_s = None if left_s is None else now_s + left_s
        arrival = Arrival(arrived_s=now_s, deadline_s=deadline_s, caller=caller)
        account = Account(arrival, operation)
        code, reason, field = "CANCELLED", "", ""  # an exception of another kind is the caller's going away
        try:
            if left_s is not None and left_s <= 0:
                raise DeadlineExceeded("the deadline had passed before the request arrived", remedy="give more time")
            yield account
            code = ""
        except CollegiumError as error:
            code, reason, field = error.code.name, error.reason, error.field or ""
            raise
        except Exception:
            code = Internal.code.name
            raise
        finally:
            if code:
                self._counts.failures[code] += 1
            account.end(code, reason, field, self._model())


def _error_type(failure: str) -> str:
    # By whose fault, not by status: buckets for each status would be most of a gateway's series.
    return "" if not failure else "caller" if failure in _CALLERS else "server"


def _labels(operation: str, model: str) -> dict[str, str]:
    return {
        "gen_ai_operation_name": operation,
        "gen_ai_provider_name": PROVIDER,
        "gen_ai_request_model": model,
    }
