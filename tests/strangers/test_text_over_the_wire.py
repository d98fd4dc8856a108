"""Text of answers as callers of a gateway get it: after a prompt, across routers, up to a special token."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import tokenizers

from collegium.v1 import inference_pb2 as pb
from gateway.tokenizer import Tokenizer
from tests.fake_router import FakeRouter, scripted
from tests.gateway_rig import endings, gather, ids_request, rig, text, text_request, token_ids
from tests.tokenizer_kinds import DEMO, byte_level, llama, word_piece


def folder_of(path: Path, inner: tokenizers.Tokenizer, **config: object) -> tuple[Path, Tokenizer]:
    inner.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    tokenizer = Tokenizer.load(path)
    assert tokenizer is not None
    return path, tokenizer


def ids_of(inner: tokenizers.Tokenizer, *tokens: str) -> list[int]:
    found = [inner.token_to_id(token) for token in tokens]
    assert None not in found
    return found


async def test_an_answer_begins_with_the_space_that_its_prompt_calls_for(tmp_path: Path) -> None:
    inner = llama()
    folder, tokenizer = folder_of(tmp_path, inner)
    prompt, script = ids_of(inner, "▁a", "b"), ids_of(inner, "▁lo", "▁a", "b")
    router = FakeRouter()
    router.next_token = scripted(script)
    async with rig(router, model_dir=folder) as served:
        responses = await gather(served.stub.Generate(ids_request(*prompt, max_tokens=3)))
    assert tokenizer.decode(prompt) == "ab"
    assert text(responses) == " lo ab"


@pytest.mark.parametrize("cut", [1, 2, 3])
async def test_a_character_that_the_prompt_begins_is_in_the_answer(tmp_path: Path, cut: int) -> None:
    for maker, number in ((llama, 0), (byte_level, 1)):
        path = tmp_path / str(number)
        path.mkdir()
        inner = maker()
        folder, _ = folder_of(path, inner)
        emoji = [inner.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
        emoji = emoji if None not in emoji else [inner.token_to_id(c) for c in "ðŁĻĤ"]
        script = [*emoji[cut:], *ids_of(inner, "a")]
        router = FakeRouter()
        router.next_token = scripted(script)
        async with rig(router, model_dir=folder) as served:
            request = ids_request(*ids_of(inner, "b"), *emoji[:cut], max_tokens=len(script))
            assert text(await gather(served.stub.Generate(request))) == "🙂a"


async def test_a_resumed_answer_goes_on_in_the_text_of_its_prompt(tmp_path: Path) -> None:
    inner = word_piece()
    folder, tokenizer = folder_of(tmp_path, inner)
    script = tokenizer.encode("hello world don't of the hello")
    router = FakeRouter()
    router.next_token = scripted(script)
    async with rig(router, model_dir=folder) as served:
        request = text_request("the world", max_tokens=len(script), sampling=pb.Sampling(seed=1))
        whole = text(await gather(served.stub.Generate(request)))
        assert whole == tokenizer.decode(tokenizer.encode("the world") + script)[len("the world") :]
        for num_ids in range(1, len(script)):
            prompt = tokenizer.encode("the world")
            have = tokenizer.decode(prompt + script[:num_ids])[len("the world") :]
            progress = pb.ChoiceProgress(token_ids=script[:num_ids], text_offset=len(have))
            resumed = await gather(served.stub.Resume(pb.ResumeRequest(request=request, progress=[progress])))
            assert have + "".join(chunk.text for one in resumed for chunk in one.response.chunks) == whole


@pytest.mark.parametrize("named", ["tokenizer.json", "tokenizer_config.json"])
async def test_a_stop_string_that_is_a_special_token_ends_the_choice_by_its_id(tmp_path: Path, named: str) -> None:
    inner = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    end = tokenizers.Tokenizer.get_vocab_size(inner) - 1
    content = inner.id_to_token(end)
    if named == "tokenizer.json":
        inner.add_special_tokens([content])
    folder, tokenizer = folder_of(tmp_path, inner, **({"eot_token": content} if named != "tokenizer.json" else {}))
    assert tokenizer.special_id(content) == end
    words = tokenizer.encode(" one two three four")
    script = [words[0], end, *words[1:], end]
    router = FakeRouter()
    router.next_token = scripted(script)

    def request(**stopping: int | bool) -> pb.GenerateRequest:
        stop = pb.Stopping(max_tokens=len(script), stop_strings=[content.encode(), b"zzz"], **stopping)
        return ids_request(5, stopping=stop, num_choices=2, sampling=pb.Sampling(seed=3))

    async with rig(router, model_dir=folder) as served:
        responses = await gather(served.stub.Generate(request()))
        for choice in range(2):
            assert token_ids(responses, choice) == script[:2]
            assert text(responses, choice) == tokenizer.decode(words[:1])
            assert endings(responses)[choice] == ("FINISH_REASON_STOP", content)
        assert list(router.submissions[0].stopping.stop_ids) == [end]
        # min_tokens lets the first one pass, ignore_eos is about other ids.
        responses = await gather(served.stub.Generate(request(min_tokens=3, ignore_eos=True)))
        assert token_ids(responses) == script
        assert text(responses) == tokenizer.decode(words)
        assert endings(responses)[0] == ("FINISH_REASON_STOP", content)
        # An end that was delivered while the message that said so was lost.
        progress = [pb.ChoiceProgress(choice_index=i, token_ids=script[:2], text_offset=0) for i in range(2)]
        resumed = await gather(served.stub.Resume(pb.ResumeRequest(request=request(), progress=progress)))
        told = [one.response for one in resumed]
        assert set(endings(told).values()) == {("FINISH_REASON_STOP", content)}
        assert text(told) == tokenizer.decode(words[:1])


async def test_a_stop_string_with_a_special_token_inside_is_looked_for_in_text(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    script = inner.encode("one <|endoftext|", add_special_tokens=False).ids
    script += inner.encode("> two three", add_special_tokens=False).ids
    router = FakeRouter()
    router.next_token = scripted(script)
    async with rig(router) as served:
        stopping = pb.Stopping(max_tokens=len(script), stop_strings=[b"<|endoftext|> t"])
        responses = await gather(served.stub.Generate(ids_request(5, stopping=stopping)))
    assert text(responses) == "one "
    assert endings(responses)[0] == ("FINISH_REASON_STOP", "<|endoftext|> t")


async def test_a_special_token_as_a_stop_string_is_found_across_the_death_of_a_router(tmp_path: Path) -> None:
    inner = byte_level()
    inner.add_special_tokens(["<|im_end|>"])
    folder, tokenizer = folder_of(tmp_path, inner)
    script = [*tokenizer.encode("hello world"), *ids_of(inner, "<|im_end|>"), *tokenizer.encode("never")]
    routers = (FakeRouter(), FakeRouter())
    for router in routers:
        router.next_token = scripted(script)
        router.hold()
    async with rig(*routers, model_dir=folder) as served:
        stopping = pb.Stopping(max_tokens=50, stop_strings=[b"<|im_end|>"])
        reading = asyncio.create_task(gather(served.stub.Generate(ids_request(1, stopping=stopping))))
        waiting = [asyncio.ensure_future(one.until(lambda one=one: bool(one.submissions))) for one in routers]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        first, second = routers if waiting[0].done() else routers[::-1]
        first.step(2)
        await first.until(lambda: first.num_steps == 2)
        await first.stop()
        await asyncio.gather(*waiting)
        second.release()
        responses = await reading
    assert text(responses) == "hello world"
    assert endings(responses) == {0: ("FINISH_REASON_STOP", "<|im_end|>")}
