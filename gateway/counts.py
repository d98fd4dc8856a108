"""What this gateway counts, in plain numbers; the metrics page reads them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from collegium.fabric import metrics


@dataclass(slots=True, kw_only=True)
class Counts:
    """Totals since start. The event loop's thread owns them."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    shed: int = 0
    replays: int = 0
    successes: Counter[str] = field(default_factory=Counter[str])  # by finish reason
    failures: Counter[str] = field(default_factory=Counter[str])  # by canonical status

    def note_refusal(self) -> None:
        """Count a request that admission refused."""
        self.shed += 1

    def series(self) -> dict[str, float]:
        """Give the totals by their registered names."""
        totals: dict[str, float] = {
            "collegium_prompt_tokens_total": self.prompt_tokens,
            "collegium_generation_tokens_total": self.generation_tokens,
            "collegium_requests_shed_total": self.shed,
            "collegium_requests_replayed_total": self.replays,
        }
        for reason, count in list(self.successes.items()):
            totals[metrics.series("collegium_request_success_total", finished_reason=reason)] = count
        for code, count in list(self.failures.items()):
            totals[metrics.series("collegium_request_failure_total", code=code)] = count
        return totals
