"""The text of a choice: detokenising, stop strings, offsets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import router_pb2
from gateway.attachment import Seat
from gateway.choice import Choice
from gateway.generation import MAX_MESSAGE_CHARS, Generation
from gateway.requests import Accepted
from gateway.stops import StopMatcher, StopStrings
from gateway.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent.parent / "models" / "demo-lm"
TOKENIZER = Tokenizer.load(DEMO)
assert TOKENIZER is not None
decode = TOKENIZER.decode
encode = TOKENIZER.encode


def pieces(token_ids: Sequence[int], tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """Feed one id at a time; give the text that each set free, and what was left."""
    answer = tokenizer.prompt_end(()).answer(StopMatcher(StopStrings()))
    return [*(answer.feed(token_id, may_stop=True)[0] for token_id in token_ids), answer.flush()]


def choice(**fields: Any) -> Choice:
    return Choice(0, prompt_end=TOKENIZER.prompt_end(()), **fields)


@given(st.text(max_size=60))
def test_text_comes_back_whole(text: str) -> None:
    assert "".join(pieces(encode(text))) == decode(encode(text))


@given(st.lists(st.integers(0, 4095), max_size=50))
def test_any_ids_give_the_text_that_the_tokenizer_gives_them_together(token_ids: list[int]) -> None:
    assert "".join(pieces(token_ids)) == decode(token_ids)


def test_no_piece_holds_half_a_character() -> None:
    assert not any("\ufffd" in piece for piece in pieces(encode("naïve 日本語 🙂🙂 done")))


def test_an_unfinished_character_becomes_a_replacement_character_at_the_end() -> None:
    token_ids = encode("🙂")
    assert len(token_ids) > 1
    found = pieces(token_ids[:-1])
    assert "".join(found[:-1]) == ""
    assert set(found[-1]) == {"\ufffd"}


def test_a_run_of_broken_bytes_that_never_ends_still_streams() -> None:
    continuation = encode("🙂")[1]
    found = pieces([continuation] * 500)
    assert "".join(found) == decode([continuation] * 500)
    assert any(found[:100])


def test_special_tokens_have_no_text_however_many_there_are() -> None:
    assert "".join(pieces([0] * 200 + encode(" hi") + [0])) == " hi"


@given(st.lists(st.integers(0, 4095), min_size=1, max_size=30), st.data())
def test_offsets_do_not_depend_on_how_ids_arrive(token_ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(token_ids)))
    whole, parts = choice(), choice()
    whole.add(token_ids)
    parts.add(token_ids[:cut])
    first = parts.take()
    parts.add(token_ids[cut:])
    for one in (whole, parts):
        one.finish(pb.FINISH_REASON_LENGTH)
    second, everything = parts.take(), whole.take()
    assert second is not None
    assert everything is not None
    assert (first.text if first else "") + second.text == everything.text
    assert second.text_offset == (len(first.text) if first else 0)
    assert [*(first.token_ids if first else ()), *second.token_ids] == token_ids


# Stop strings.

ALPHABET = st.text(alphabet="ab", max_size=12)


def reference(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Say where a text stops by looking at every beginning of it."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            stop = max(matching, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(ALPHABET, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_stop_string_that_ends_first_wins_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    matcher = StopMatcher(StopStrings(stops))
    given_out, found, rest = "", None, text
    while rest and found is None:
        size = data.draw(st.integers(1, len(rest)))
        piece, found = matcher.feed(rest[:size])
        given_out, rest = given_out + piece, rest[size:]
    if found is None:
        given_out += matcher.flush()
    assert (given_out, found) == reference(text, stops)


@given(ALPHABET, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_is_held_back_only_while_it_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    given_out = ""
    for position, character in enumerate(text, start=1):
        piece, found = matcher.feed(character)
        given_out += piece
        if found is not None:
            return
        held = text[len(given_out) : position]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_over_several_tokens_is_not_delivered_and_ids_end_where_it_ends() -> None:
    token_ids = encode("one two END three")
    one = choice(stops=StopStrings(["END"]))
    assert one.add(token_ids)
    chunk = one.take()
    assert chunk is not None
    assert chunk.text == "one two "
    assert chunk.stop_reason == "END"
    assert chunk.finish_reason == pb.FINISH_REASON_STOP
    assert "END" in decode(chunk.token_ids)
    assert "END" not in decode(chunk.token_ids[:-1])
    assert one.take() is None


def test_a_stop_string_before_min_tokens_passes_as_text() -> None:
    token_ids = encode(" a a a a a")
    one = choice(stops=StopStrings(["a"]), min_tokens=3)
    one.add(token_ids)
    chunk = one.take()
    assert chunk is not None
    assert len(chunk.token_ids) == 3
    assert chunk.text == " a a "


def test_text_that_was_held_back_comes_out_at_the_end() -> None:
    one = choice(stops=StopStrings(["hello world"]))
    one.add(encode("hello"))
    first = one.take()
    assert first is not None
    assert first.text == ""
    one.finish(pb.FINISH_REASON_LENGTH)
    last = one.take()
    assert last is not None
    assert (last.text, list(last.token_ids), last.finish_reason) == ("hello", [], pb.FINISH_REASON_LENGTH)


def test_a_found_text_that_a_stop_string_ends_has_its_score() -> None:
    token_ids = encode("one two END three")
    accepted = dataclasses.replace(long_generation(1, 1).accepted, beam_search=pb.BeamSearch(num_beams=4))
    generation = Generation(accepted, [choice(stops=StopStrings(["END"]))], model="m")
    news = {"token_ids": token_ids, "finish_reason": pb.FINISH_REASON_LENGTH, "score": -1.5}
    generation.take_news(router_pb2.SequenceNews(**news))  # type: ignore[arg-type]
    response = generation.take()
    assert response is not None
    (chunk,) = response.chunks
    assert (chunk.text, chunk.score, chunk.finish_reason) == ("one two ", -1.5, pb.FINISH_REASON_STOP)


def test_without_a_tokenizer_there_are_ids_and_no_text() -> None:
    one = Choice(0, prompt_end=None)
    one.add([1, 2, 3])
    one.finish(pb.FINISH_REASON_LENGTH)
    chunk = one.take()
    assert chunk is not None
    assert (list(chunk.token_ids), chunk.text) == ([1, 2, 3], "")


# Texts that are too long for one message.


def long_generation(num_choices: int, token_chars: int) -> Generation:
    """Choices over a tokenizer whose token 0 has a long text."""
    words = tokenizers.Tokenizer(models.WordLevel({"x" * token_chars: 0, "y": 1}, unk_token="y"))
    prompt_end = Tokenizer(words).prompt_end(())
    accepted = Accepted(
        request_id="r",
        prompt_ids=(1,),
        sampling=pb.Sampling(seed=1),
        stopping=pb.Stopping(max_tokens=1000),
        stop_strings=(),
        stop_tokens={},
        num_choices=num_choices,
        num_logprobs=None,
    )
    return Generation(accepted, [Choice(index, prompt_end=prompt_end) for index in range(num_choices)], model="m")


@pytest.mark.parametrize(
    ("num_choices", "token_chars", "num_tokens", "is_finished"),
    [
        (1, 10, 5, True),
        (1, 5 * MAX_MESSAGE_CHARS // 2, 1, True),
        (1, 100_000, 100, True),
        (1, 100_000, 100, False),
        (3, 300_000, 10, True),
        (2, MAX_MESSAGE_CHARS, 1, True),
    ],
)
def test_a_text_that_is_too_long_for_one_message_comes_in_several(
    num_choices: int, token_chars: int, num_tokens: int, is_finished: bool
) -> None:
    generation = long_generation(num_choices, token_chars)
    reason = pb.FINISH_REASON_LENGTH if is_finished else pb.FINISH_REASON_UNSPECIFIED
    for index in range(num_choices):
        news = router_pb2.SequenceNews(choice_index=index, token_ids=[0] * num_tokens, finish_reason=reason)
        generation.take_news(news)
    ids, texts, reasons = [0] * num_choices, [""] * num_choices, [pb.FINISH_REASON_UNSPECIFIED] * num_choices
    while (response := generation.take()) is not None:
        assert response.ByteSize() < MAX_MESSAGE_CHARS + 2000
        for chunk in response.chunks:
            index = chunk.choice_index
            assert (chunk.token_offset, chunk.text_offset) == (ids[index], len(texts[index]))
            assert not reasons[index]
            assert chunk.token_ids or chunk.text or chunk.finish_reason
            ids[index] += len(chunk.token_ids)
            texts[index] += chunk.text
            reasons[index] = chunk.finish_reason
        assert response.HasField("usage") == generation.is_delivered
        if not generation.has_rest:
            break
    text = " ".join(["x" * token_chars] * num_tokens)
    assert all(one == text for one in texts)
    assert (ids, reasons) == ([num_tokens] * num_choices, [reason] * num_choices)
    assert generation.is_delivered == is_finished


class Holding:
    """A seat that notes what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def pause(self) -> None:
        self.said.append("pause")

    def unpause(self) -> None:
        self.said.append("unpause")


def test_a_router_is_held_until_a_long_text_is_delivered() -> None:
    generation, seat = long_generation(1, MAX_MESSAGE_CHARS), Holding()
    generation.sit(cast("Seat", seat))
    generation.take_news(router_pb2.SequenceNews(choice_index=0, token_ids=[0, 0]))
    said: list[list[str]] = []
    while generation.num_pending_chars:
        said.append(list(seat.said))
        generation.take()
    assert said == [["pause"], ["pause"], ["pause"]]
    assert seat.said == ["pause", "unpause"]


# Chat templates.


def chat_folder(tmp_path: Path, template: str, config: str = '{"bos_token": {"content": "<s>"}}') -> Path:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


def test_a_chat_template_is_rendered_with_what_transformers_gives_it(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% generation %}[{{ m.role }}]{{ m.content | tojson }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
        "{{ strftime_now('%%') }}"
    )
    tokenizer = Tokenizer.load(chat_folder(tmp_path, template))
    assert tokenizer is not None
    assert tokenizer.has_chat_template
    token_ids = tokenizer.encode_chat([("user", "5 < 6 & é")])
    assert token_ids[0] == tokenizer.special_id("<s>")
    assert tokenizer.decode(token_ids) == '[user]"5 < 6 & é"[assistant]%'


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(chat_folder(tmp_path, "{{ raise_exception('only users here') }}"))
    assert tokenizer is not None
    with pytest.raises(InvalidArgument, match="only users here") as caught:
        tokenizer.encode_chat([("system", "x")])
    assert caught.value.field == "chat.messages"


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(chat_folder(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    assert tokenizer is not None
    with pytest.raises(FailedPrecondition, match="unsafe"):
        tokenizer.encode_chat([("user", "x")])


def test_broken_tokenizer_files_name_themselves(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FailedPrecondition, match=r"tokenizer_config\.json"):
        Tokenizer.load(chat_folder(tmp_path, "x", config="["))
