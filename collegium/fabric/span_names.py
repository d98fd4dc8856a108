"""The names of all spans, and of the attributes that each may have. Told to readers by docs/telemetry.md."""

from __future__ import annotations

from dataclasses import dataclass

_RPC = ("rpc.system", "rpc.service", "rpc.method", "error.type")
_REQUEST = (
    "gen_ai.operation.name",
    "gen_ai.provider.name",
    "gen_ai.request.model",
    "gen_ai.request.max_tokens",
    "gen_ai.request.temperature",
    "gen_ai.request.seed",
    "gen_ai.response.id",
    "gen_ai.response.model",
    "gen_ai.response.finish_reasons",
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.output_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanName:
    """What a span is called, who makes it, under which other one, what it is, and its attributes."""

    name: str
    by: str
    under: str
    help: str
    attributes: tuple[str, ...]


SPANS = (
    SpanName(
        name="text_completion MODEL, chat MODEL",
        by="SDK",
        under="the caller's, if any",
        help="one generate call over all its attempts",
        attributes=(*_REQUEST, "gen_ai.request.top_p", "gen_ai.request.top_k", "error.type"),
    ),
    SpanName(
        name="collegium.v1.Inference/METHOD",
        by="SDK",
        under="the caller's, if any",
        help="one other call",
        attributes=("error.type",),
    ),
    SpanName(
        name="collegium.v1.SERVICE/METHOD",
        by="every service",
        under="the caller's of the RPC",
        help="one call at its server; of a generate call, one for each attempt",
        attributes=(*_RPC, *_REQUEST),
    ),
    SpanName(
        name="router.sequence",
        by="router",
        under="the gateway's",
        help="one choice of a request on one router, from its arrival to its end; events `first step`, `first token`",
        attributes=(
            "collegium.request_id",
            "collegium.choice",
            "collegium.prompt_tokens",
            "collegium.given_tokens",
            "collegium.output_tokens",
            "collegium.cached_tokens",
            "collegium.preemptions",
            "collegium.finish",
        ),
    ),
    SpanName(
        name="router.step",
        by="router",
        under="router.sequence",
        help="the forward pass of a step",
        attributes=("collegium.step", "collegium.rows", "collegium.sequences", "collegium.kind"),
    ),
    SpanName(
        name="router.experts",
        by="router",
        under="router.step",
        help="the experts of one layer: from the first row sent to the last one back",
        attributes=("collegium.layer", "collegium.rows", "collegium.retries"),
    ),
    SpanName(
        name="worker.batch",
        by="worker",
        under="router.experts",
        help="one dispatch at its worker, from when it was begun; `collegium.wait_us` is how long it had waited",
        attributes=(
            "collegium.layer",
            "collegium.rows",
            "collegium.experts",
            "collegium.joined",
            "collegium.wait_us",
        ),
    ),
)
