"""What the engine has to tell each gateway stream, gathered into one delivery per step.

Owns the news until they are delivered, and which owners there are. A delivery that fails is repeated item by item, so
that a sequence whose news cannot be told costs the others nothing. The engine's thread owns all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from collegium.fabric import logs
from collegium.model.sampling import TokenLogprobs
from router_svc.failures import Failure
from router_svc.sequence import Sequence

_log = logs.get("engine")


@dataclass(slots=True, kw_only=True)
class News:
    """What happened to a sequence."""

    sequence: Sequence
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    failure: Failure | None = None

    def tell_forced(self) -> None:
        """Tell the tokens that the sequence's output was begun with, once: nothing else could have been, so the
        log-probability of each is 0.
        """
        told, self.sequence.forced = self.sequence.forced, []
        self.token_ids += told
        if self.sequence.num_logprobs is not None:
            num = min(1, self.sequence.num_logprobs)
            self.logprobs += [TokenLogprobs(chosen=0.0, top_ids=(one,) * num, top=(0.0,) * num) for one in told]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy the engine is."""

    num_running: int
    num_waiting: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int


Deliver = Callable[[int, list[News], Load, int], None]  # (owner, news, load, step)


class NewsBoard:
    """The news of the step at hand, by owner."""

    def __init__(self, deliver: Deliver) -> None:
        """deliver: called from the engine's thread, once per owner and step."""
        self.deliver = deliver
        self._owners: set[int] = set()
        self._news: dict[int, dict[Sequence, News]] = {}

    def __contains__(self, owner: int) -> bool:
        return owner in self._owners

    def open(self, owner: int, load: Load) -> None:
        """Begin to report to an owner, with a first report that is empty but for the load."""
        self._owners.add(owner)
        self.deliver(owner, [], load, 0)

    def close(self, owner: int) -> None:
        """Report to an owner no more."""
        self._owners.discard(owner)
        self._news.pop(owner, None)

    def tell(self, sequence: Sequence) -> News:
        """Find or make this step's news of a sequence."""
        news = self._news.setdefault(sequence.owner, {})
        if sequence not in news:
            news[sequence] = News(sequence=sequence)
        return news[sequence]

    def flush(self, load: Callable[[], Load], step: int) -> list[Sequence]:
        """Deliver everything. Returns the sequences whose news could not be delivered: nobody will hear of them."""
        if not self._news:
            return []
        news, self._news = self._news, {}
        now, lost = load(), list[Sequence]()
        for owner, items in news.items():
            if owner not in self._owners:
                continue
            try:
                self.deliver(owner, list(items.values()), now, step)
            except Exception as error:
                _log.exception("news could not be delivered", owner=owner, num_sequences=len(items))
                lost += self._deliver_each(owner, list(items.values()), now, step, error)
        return lost

    def _deliver_each(self, owner: int, items: list[News], load: Load, step: int, error: Exception) -> list[Sequence]:
        """Deliver one by one; a sequence whose news cannot be told is told to have failed, if that can be told."""
        lost: list[Sequence] = []
        message = f"the router could not report what it computed ({type(error).__name__}); its log has the details"
        failure = Failure(code="INTERNAL", reason="NEWS_FAILED", message=message)
        for item in items:
            told = [News(sequence=item.sequence, failure=failure)]
            for attempt in (told,) if len(items) == 1 else ([item], told):
                if attempt is told:
                    lost.append(item.sequence)
                try:
                    self.deliver(owner, attempt, load, step)
                except Exception as again:  # the first one's traceback is in the log
                    _log.debug("news could not be delivered", request_id=item.sequence.request_id, why=repr(again))
                else:
                    break
        return lost
