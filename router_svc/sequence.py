"""One choice of one request while it grows.

Owns a sequence's tokens, its block table and what has been computed of it. Answers questions about itself, so that the
scheduler holds no arithmetic. Knows nothing of tensors.

Example: prompt of 5, two tokens generated, all but the last in the cache: num_tokens 7, num_computed 6, one row to
compute.
"""

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, auto

from collegium.model.sampling import SamplingParams, TokenCounts
from router_svc.beams import BeamSearch, ngram_bans
from router_svc.kv_blocks import BLOCK_TOKENS, ROOT, SOURCE, block_hash, num_blocks_for
from router_svc.sequence_life import SequenceLife


class Finish(Enum):
    """Why a sequence ended."""

    STOP = auto()
    LENGTH = auto()
    CANCELLED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRules:
    """When a sequence ends, in tokens."""

    max_tokens: int
    min_tokens: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    ending_ids: frozenset[int] = field(init=False)  # those that end a sequence, and aren't drawn before min_tokens

    def __post_init__(self) -> None:
        """Put together what is asked for at every token."""
        object.__setattr__(self, "ending_ids", self.eos_ids | self.stop_ids)


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A growing run of tokens. `owner` is the gateway stream that it belongs to."""

    owner: int
    request_id: str
    choice_index: int
    prompt_ids: list[int]
    source_ids: list[int] = field(default_factory=list)  # what an encoder reads; the prompt is the decoder's then
    sampling: SamplingParams
    rules: StopRules
    output_ids: list[int] = field(default_factory=list)
    num_logprobs: int | None = None
    is_score: bool = False
    deadline_s: float = float("inf")
    traceparent: str = ""
    caller: int = 0  # who asks; 0: not told
    leader: "Sequence | None" = None  # the choice that computes the common prompt first
    blocks: list[int] = field(default_factory=list)
    source_blocks: list[int] = field(default_factory=list)
    is_encoded: bool = False  # whether what is kept of its source is there
    forced: list[int] = field(default_factory=list)  # the first of its output that were given, and are still to be told
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the cache at first admission
    num_preemptions: int = 0
    is_running: bool = False  # whether it holds a place among the running
    is_paused: bool = False
    is_reported: bool = False  # whether its cached tokens were reported
    finish: Finish | None = None
    stop_id: int | None = None
    number: int = 0  # among all that this router was given, in order
    arrival: int = 0  # among all that its scheduler was given, in order
    num_recorded: int = 0  # positions whose choices of experts were recorded, so that a preempted one repeats none
    is_source_recorded: bool = False  # likewise
    num_scored: int = 0  # log-probabilities of a score that were reported, so that a preempted one repeats none
    stalled_since_s: float | None = None  # since when its steps find no worker
    life: SequenceLife | None = None  # what is told of it when it ends
    beams: BeamSearch | None = None
    searched_by: "Sequence | None" = None  # whose beams it is one of the best of; itself it is never computed
    best: list["Sequence"] = field(default_factory=list["Sequence"])  # those that its beams are searched for
    score: float | None = None
    counts: TokenCounts | None = None  # of its tokens, for penalties; None: not needed so far
    _names: list[bytes] = field(default_factory=list)
    _source_names: list[bytes] = field(default_factory=list)

    @property
    def payer(self) -> tuple[int, int | str]:
        """Whose share of the places it takes: its caller's, or its own request's where no caller is told."""
        return self.owner, self.caller or self.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def size(self) -> int:
        """All tokens that are to be computed for it, its source's too."""
        return self.num_tokens + len(self.source_ids)

    @property
    def num_unencoded(self) -> int:
        """Rows of its source that are to be encoded first, all at once."""
        return 0 if self.is_encoded else len(self.source_ids)

    @property
    def width(self) -> int:
        """Rows of one position: one for each of its beams."""
        return 1 if self.beams is None else self.beams.width

    @property
    def num_own(self) -> int:
        """Rows to compute of its own tokens before the next one can be drawn."""
        return (self.num_tokens - self.num_computed) * self.width

    @property
    def num_remaining(self) -> int:
        """Rows to compute before the next token can be drawn."""
        return self.num_own + self.num_unencoded

    @property
    def is_decoding(self) -> bool:
        """Whether a single position is all that it needs."""
        if self.beams is None:  # asked of every sequence in every step
            num_left = len(self.prompt_ids) + len(self.output_ids) - self.num_computed
            return num_left == 1 and bool(self.output_ids) and (self.is_encoded or not self.source_ids)
        return self.num_remaining == self.width and bool(self.output_ids)

    @property
    def has_ended(self) -> bool:
        """Whether it grows no more."""
        return self.finish is not None

    @property
    def waits_for_leader(self) -> bool:
        """Whether another choice of its request still computes the prompt that they share."""
        leader = self.leader
        if leader is None or leader.has_ended or leader.is_paused:
            return False
        return leader.num_computed < len(leader.prompt_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens by position, over the border of prompt and output."""
        prompt = len(self.prompt_ids)
        if end <= prompt:
            return self.prompt_ids[begin:end]
        if begin >= prompt:
            return self.output_ids[begin - prompt : end - prompt]
        return self.prompt_ids[begin:] + self.output_ids[: end - prompt]

    def num_new_blocks(self, num_rows: int) -> int:
        """Blocks lacking for so many more rows, of all beams together."""
        if self.beams is None:
            return max(0, num_blocks_for(self.num_computed + num_rows) - len(self.blocks))
        wanted = num_blocks_for(self.num_computed + num_rows // self.width)
        return sum(max(0, wanted - len(blocks)) for blocks in self.tables)

    @property
    def tables(self) -> list[list[int]]:
        """Its block tables: of each beam, or its one."""
        return [beam.blocks for beam in self.beams.beams] if self.beams and self.beams.beams else [self.blocks]

    def take_blocks(self, blocks: list[int], num_rows: int) -> None:
        """Add as many blocks as num_new_blocks said, to the tables that lack some."""
        wanted, rest = num_blocks_for(self.num_computed + num_rows // self.width), iter(blocks)
        for table in self.tables:
            table += itertools.islice(rest, max(0, wanted - len(table)))

    def give_blocks(self) -> list[int]:
        """Let go of all its blocks, its source's too, once for each table that has them; nothing is computed then."""
        given = [*self.source_blocks, *itertools.chain.from_iterable(self.tables)]
        self.blocks, self.source_blocks = [], []
        if self.beams is not None:
            for beam in self.beams.beams:
                beam.blocks = []
        self.num_computed, self.is_encoded = 0, False
        return given

    def source_names(self) -> list[bytes]:
        """Names of the blocks of its source, the last one too, however full: they are found together or not at all."""
        if not self._source_names and self.source_ids:
            if self.leader is not None and self.leader._source_names:
                self._source_names = self.leader._source_names
            else:
                root = block_hash(SOURCE, self.source_ids)
                num_blocks = num_blocks_for(len(self.source_ids))
                self._source_names = [root, *(block_hash(root, [idx]) for idx in range(1, num_blocks))]
        return self._source_names

    def block_names(self, num_tokens: int) -> list[bytes]:
        """Names of the full blocks among the first `num_tokens` tokens, in order. Computed once each."""
        full = num_tokens // BLOCK_TOKENS
        if not self._names and self.leader is not None:
            self._names = self.leader._names[: len(self.prompt_ids) // BLOCK_TOKENS]
        while len(self._names) < full:
            begin = len(self._names) * BLOCK_TOKENS
            parent = self._names[-1] if self._names else (self.source_names() or [ROOT])[0]
            self._names.append(block_hash(parent, self.tokens(begin, begin + BLOCK_TOKENS)))
        return self._names[:full]

    def append(self, token: int) -> None:
        """Add a drawn token and end where a rule says so."""
        self.output_ids.append(token)
        if token in self.rules.ending_ids and len(self.output_ids) > self.rules.min_tokens:
            self.finish, self.stop_id = Finish.STOP, token
        else:
            self.end_if_long()

    def force(self, token: int) -> None:
        """Begin its output with a token that is not drawn; it is told beside the first that is, or at the end."""
        self.append(token)
        self.forced.append(token)

    def end_if_long(self) -> None:
        """End where nothing more may be drawn."""
        if not self.is_score and len(self.output_ids) >= self.rules.max_tokens:
            self.finish = Finish.LENGTH

    def banned_ids(self, output_ids: Seq[int] | None = None) -> Seq[int]:
        """Ids that must not be drawn now, or after this output: those that would end it among its first min_tokens
        tokens, or repeat an n-gram.
        """
        output = self.output_ids if output_ids is None else output_ids
        if not (self.rules.min_tokens or self.sampling.no_repeat_ngram_size):
            return ()
        ends = sorted(self.rules.ending_ids) if len(output) < self.rules.min_tokens else []
        size = self.sampling.no_repeat_ngram_size
        return [*ends, *ngram_bans([*self.prompt_ids, *output], size)] if size else ends or ()
