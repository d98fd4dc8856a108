"""Admission, frames to routers, the choice of a router, keys, the cluster's status."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import ExitStack
from pathlib import Path

import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from collegium.fabric.errors import Cancelled, ResourceExhausted, SettingsError
from collegium.v1 import balancer_pb2
from collegium.v1 import inference_pb2 as ipb
from collegium.v1 import router_pb2 as pb
from gateway import outbox as outbox_module
from gateway.admission import Admission, Limits, Ticket
from gateway.app import router_addresses
from gateway.auth import KeyRing
from gateway.choose import RUN_TOKENS, Candidate, PrefixTable, choose
from gateway.cluster import from_view
from gateway.outbox import Outbox
from gateway.relay import write_in_time
from gateway.scoring import perplexity
from gateway.settings import GatewaySettings


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


# Admission.


def admission_of(
    clock: Clock | None = None, *, requests: int = 9, sequences: int = 99, output: int = 999, queued: int = 100
) -> Admission:
    limits = Limits(requests=requests, sequences=sequences, output_tokens=output, queued_tokens=queued)
    return Admission(limits, clock=clock or Clock())


def test_requests_are_bounded_and_a_place_given_back_is_free() -> None:
    admission = admission_of(requests=2)
    with admission.admitted():
        with admission.admitted():
            with pytest.raises(ResourceExhausted) as caught, admission.admitted():
                pass
            assert caught.value.retry_after_s is not None
            assert caught.value.retry_after_s > 0
        with admission.admitted():
            pass


def test_waiting_tokens_are_bounded_and_stop_waiting_at_the_first_answer() -> None:
    admission = admission_of()
    with admission.admitted() as first, admission.admitted() as second:
        admission.queue(first, 90)
        with pytest.raises(ResourceExhausted, match="90 prompt tokens"):
            admission.queue(second, 20)
        admission.start(first)
        admission.start(first)
        admission.queue(second, 20)
        assert admission.queued_tokens == 20


def test_a_prompt_larger_than_the_bound_comes_in_alone() -> None:
    admission = admission_of()
    with admission.admitted() as large:
        admission.queue(large, 500)
        with pytest.raises(ResourceExhausted), admission.admitted() as small:
            admission.queue(small, 1)
    assert admission.queued_tokens == 0


def test_those_who_ask_for_many_choices_are_bounded_and_leave_room_for_one() -> None:
    admission = admission_of(sequences=100)
    with admission.admitted(num_sequences=64):
        with pytest.raises(ResourceExhausted) as caught, admission.admitted(num_sequences=64):
            pass
        assert caught.value.reason == "SEQUENCES_EXHAUSTED"
        assert "64 sequences" in caught.value.message
        with admission.admitted(num_sequences=36), admission.admitted():
            assert admission.num_sequences == 101
    with admission.admitted(num_sequences=200):  # more than the bound, alone
        assert admission.num_sequences == 200
    assert admission.num_sequences == 0


def test_tokens_to_be_made_are_bounded_for_those_who_ask_for_many_choices() -> None:
    admission = admission_of(output=1000)
    with admission.admitted(num_sequences=2, num_output_tokens=900):
        with (
            pytest.raises(ResourceExhausted) as caught,
            admission.admitted(num_sequences=2, num_output_tokens=200),
        ):
            pass
        assert caught.value.reason == "OUTPUT_EXHAUSTED"
        with admission.admitted(num_output_tokens=200):
            assert admission.output_tokens == 1100
    assert admission.output_tokens == 0


def test_the_retry_delay_follows_how_long_prompts_have_waited() -> None:
    clock = Clock()
    admission = admission_of(clock, queued=10)
    for _ in range(50):
        with admission.admitted() as ticket:
            admission.queue(ticket, 10)
            clock.now_s += 8.0
            admission.start(ticket)
    with admission.admitted() as first, admission.admitted() as second:
        admission.queue(first, 10)
        with pytest.raises(ResourceExhausted) as caught:
            admission.queue(second, 10)
    assert caught.value.retry_after_s == pytest.approx(8.0, rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(1, 64)), max_size=40))
def test_counts_return_to_zero_whatever_happens(steps: list[tuple[int, int, int]]) -> None:
    admission = admission_of(requests=5, sequences=80, queued=120)
    inside: list[tuple[ExitStack, Ticket]] = []
    for action, amount, num_sequences in steps:
        if action <= 1:
            stack = ExitStack()
            try:
                ticket = stack.enter_context(admission.admitted(num_sequences=num_sequences))
                admission.queue(ticket, amount)
            except ResourceExhausted:
                stack.close()
            else:
                inside.append((stack, ticket))
        elif inside:
            stack, ticket = inside[amount % len(inside)]
            if action == 2:
                admission.start(ticket)
            else:
                inside.remove((stack, ticket))
                stack.close()
        assert admission.num_requests == len(inside) <= 5
        assert admission.num_sequences == sum(ticket.num_sequences for _, ticket in inside)
    for stack, _ in inside:
        stack.close()
    assert (admission.num_requests, admission.num_sequences, admission.queued_tokens) == (0, 0, 0)


# Frames.


def submission(name: str, num_tokens: int = 3) -> pb.Submission:
    return pb.Submission(request_id=name, prompt_ids=[1] * num_tokens)


def test_one_frame_carries_everything_since_the_last_one() -> None:
    box = Outbox()
    box.submit(submission("a"))
    box.submit(submission("b"))
    box.cancel("old")
    box.pause("a")
    frame = box.next_frame()
    assert frame is not None
    assert [s.request_id for s in frame.submissions] == ["a", "b"]
    assert [ref.request_id for ref in frame.cancellations] == ["old"]
    assert [ref.request_id for ref in frame.pauses] == ["a"]
    assert box.next_frame() is None


def test_what_undoes_itself_is_not_sent() -> None:
    box = Outbox()
    box.submit(submission("a"))
    box.cancel("a")
    box.pause("b")
    box.unpause("b")
    assert box.next_frame() is None
    box.pause("b")
    box.next_frame()
    box.unpause("b")
    box.pause("b")
    assert box.next_frame() is None
    box.unpause("b")
    frame = box.next_frame()
    assert frame is not None
    assert [ref.request_id for ref in frame.unpauses] == ["b"]


def test_a_choice_is_cancelled_by_its_index_even_where_that_is_zero() -> None:
    box = Outbox()
    box.cancel("a", 0)
    box.cancel("b")
    frame = box.next_frame()
    assert frame is not None
    one, whole = frame.cancellations
    assert one.HasField("choice_index")
    assert not whole.HasField("choice_index")


def test_a_replay_of_many_long_choices_goes_in_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_FRAME_TOKENS", 100)
    box = Outbox()
    starts = [pb.ChoiceStart(choice_index=index, output_ids=[7] * 30) for index in range(8)]
    box.submit(pb.Submission(request_id="a", prompt_ids=[1] * 20, choices=starts, num_logprobs=3))
    frames: list[pb.AttachRequest] = []
    while (frame := box.next_frame()) is not None:
        frames.append(frame)
    sent = [submission for frame in frames for submission in frame.submissions]
    assert len(frames) == len(sent) == 4
    assert [choice for one in sent for choice in one.choices] == starts
    assert {(one.request_id, tuple(one.prompt_ids), one.num_logprobs) for one in sent} == {("a", (1,) * 20, 3)}
    box.submit(pb.Submission(request_id="b", prompt_ids=[1] * 20, choices=starts))
    box.next_frame()
    box.cancel("b")  # of what the router has had a part
    frame = box.next_frame()
    assert frame is not None
    assert not frame.submissions
    assert [ref.request_id for ref in frame.cancellations] == ["b"]


def test_frames_stay_small_and_nothing_overtakes_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_FRAME_TOKENS", 10)
    box = Outbox()
    for name, num_tokens in (("a", 6), ("b", 6), ("huge", 50), ("c", 1)):
        box.submit(submission(name, num_tokens))
    box.pause("c")
    frames = list(itertools.takewhile(lambda frame: frame is not None, iter(box.next_frame, None)))
    names = [[s.request_id for s in frame.submissions] for frame in frames if frame]
    assert names == [["a"], ["b"], ["huge"], ["c"]]
    assert [len(frame.pauses) for frame in frames if frame] == [0, 0, 0, 1]


# The choice of a router.


def candidate(address: str, num_sequences: int = 0, waiting_tokens: int = 0) -> Candidate:
    return Candidate(address=address, num_sequences=num_sequences, waiting_tokens=waiting_tokens)


def test_the_least_loaded_router_is_chosen() -> None:
    assert choose([candidate("a", 3), candidate("b", 1), candidate("c", 0, 5000)], None).address == "b"


def test_a_router_with_the_prefix_is_preferred_unless_it_is_much_busier() -> None:
    assert choose([candidate("a", 5), candidate("b")], "a").address == "a"
    assert choose([candidate("a", 50), candidate("b")], "a").address == "b"
    assert choose([candidate("a"), candidate("b")], "gone").address == "a"


def test_the_longest_known_beginning_decides() -> None:
    table = PrefixTable()
    prompt = list(range(RUN_TOKENS * 3))
    table.note(prompt[: RUN_TOKENS * 2], "a")
    table.note([9] * RUN_TOKENS, "b")
    assert table.find(prompt) == "a"
    assert table.find([*prompt[:RUN_TOKENS], *[7] * RUN_TOKENS]) == "a"
    assert table.find([9] * (RUN_TOKENS + 5)) == "b"
    assert table.find(prompt[: RUN_TOKENS - 1]) is None
    table.forget("a")
    assert table.find(prompt) is None


def test_the_prefix_table_is_bounded() -> None:
    table = PrefixTable(max_entries=2)
    for i in range(5):
        table.note([i] * RUN_TOKENS, str(i))
    assert [table.find([i] * RUN_TOKENS) for i in range(5)] == [None, None, None, "3", "4"]


# Keys and settings.


def test_keys_are_read_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nalpha\n\n  beta  \n#gamma\n")
    ring = KeyRing.load(path)
    assert [ring.accepts(key) for key in ("alpha", "beta", "gamma", "# ours", "", "alph", "ümlaut")] == [
        True, True, False, False, False, False, False,
    ]  # fmt: skip


def test_a_key_file_that_is_missing_or_empty_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    for name in ("empty", "missing"):
        with pytest.raises(SettingsError, match="--api-keys"):
            KeyRing.load(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": Path("no-such-folder")}, "--model"),
        ({"routers": ()}, "--balancer and --routers"),
        ({"balancer": "127.0.0.1:1"}, "--balancer and --routers"),
        ({"tls_cert": Path("cert.pem")}, "--tls-key"),
    ],
)
def test_settings_that_do_not_fit_together_name_themselves(
    changes: dict[str, object], named: str, tmp_path: Path
) -> None:
    settings = {"model": tmp_path, "routers": ("127.0.0.1:1",)} | changes
    with pytest.raises(SettingsError, match=named):
        GatewaySettings(**settings).check()  # type: ignore[arg-type]


# Status and numbers.


def test_the_balancers_view_becomes_a_status() -> None:
    view = balancer_pb2.WatchPlacementResponse(
        placement=balancer_pb2.Placement(
            epoch=4,
            worker_ids=["w1", "w2"],
            layers=[balancer_pb2.LayerPlacement(offsets=[0, 1, 3], worker_idx=[0, 0, 1])] * 2,
        ),
        members=[
            balancer_pb2.Member(
                member_id="w1",
                role=balancer_pb2.ROLE_WORKER,
                address="h:1",
                state=balancer_pb2.MEMBER_STATE_SERVING,
                num_threads=2,
                counters={"rows": 5.0},
                joined_unix_ms=7,
                counted_unix_ms=9,
            ),
            balancer_pb2.Member(
                member_id="r1",
                role=balancer_pb2.ROLE_ROUTER,
                address="h:2",
                state=balancer_pb2.MEMBER_STATE_SERVING,
            ),
            balancer_pb2.Member(
                member_id="r2", role=balancer_pb2.ROLE_ROUTER, address="h:3", state=balancer_pb2.MEMBER_STATE_JOINING
            ),
        ],
    )
    status = from_view(view, ipb.MemberStatus(role="balancer", member_id="balancer", state="SERVING"))
    assert [(m.role, m.member_id, m.state) for m in status.members] == [
        ("balancer", "balancer", "SERVING"),
        ("router", "r1", "SERVING"),
        ("router", "r2", "JOINING"),
        ("worker", "w1", "SERVING"),
    ]
    assert (status.members[3].joined_unix_ms, status.members[3].counted_unix_ms) == (7, 9)
    assert status.placement_epoch == 4
    assert dict(status.experts_per_worker) == {"w1": 4, "w2": 2}
    assert list(router_addresses(view)) == ["h:2"]


def test_perplexity_of_nothing_is_one_and_of_the_impossible_infinite() -> None:
    assert perplexity([]) == 1.0
    assert perplexity([-1.0, -3.0]) == pytest.approx(7.389056)
    assert perplexity([float("-inf"), -1.0]) == float("inf")
    assert perplexity([-1e6]) == float("inf")


def test_a_caller_who_does_not_read_is_cancelled_and_one_who_is_gone_is_no_error() -> None:
    async def run() -> None:
        async def stalled(message: object) -> None:
            await asyncio.sleep(3600)

        async def gone(message: object) -> None:
            raise aio.InternalError("the call is over")

        with pytest.raises(Cancelled, match=r"not read for 0.01 s") as caught:
            await write_in_time(stalled, None, 0.01, "read it")
        assert caught.value.reason == "CALLER_STALLED"
        with pytest.raises(asyncio.CancelledError):
            await write_in_time(gone, None, 60.0, "read it")

    asyncio.run(run())
