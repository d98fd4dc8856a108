"""What an engine did since its start, for the metrics page and the lease."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineTotals:
    """Counters since the start; written by the engine's thread alone."""

    steps: dict[str, int] = field(default_factory=lambda: {"decode": 0, "prefill": 0, "mixed": 0})
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0  # of step_seconds, all but sampling and bookkeeping
    micro_batches: int = 0
