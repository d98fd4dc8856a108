"""`collegium generate`: stream a completion to the terminal, or give it whole as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from collegium.cli import target as t
from collegium.client import Choice, Completion, GenerateOptions, Message, Stream, TokenLogprobs


def generate(
    target: t.Target = t.DEFAULT_TARGET,
    prompt: Annotated[str | None, typer.Option("--prompt", help='Text to continue; "-" reads stdin.')] = None,
    prompt_ids: t.PromptIds = None,
    message: Annotated[
        list[str] | None, typer.Option("--message", help="What the user says, rendered by the model's chat template.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Name from `status`; empty: the only one.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Most tokens per choice; default: up to the model's length.")
    ] = None,
    min_tokens: Annotated[int, typer.Option("--min-tokens", help="Nothing ends a choice before.")] = 0,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0: greedy, the default.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Keep tokens up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Drop tokens below this share of the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty", help="1: none.")] = None,
    presence_penalty: Annotated[float | None, typer.Option("--presence-penalty", help="0: none.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option("--frequency-penalty", help="0: none.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of sequence.")] = False,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="String that ends a choice; repeatable.")] = None,
    stop_ids: Annotated[str | None, typer.Option("--stop-ids", help="Ids that end a choice, such as 1,2.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Number of choices.")] = 1,
    num_beams: t.NumBeams = 1,
    length_penalty: t.LengthPenalty = None,
    early_stopping: t.EarlyStopping = "false",
    no_repeat_ngram_size: t.NoRepeatNgramSize = 0,
    source_language: Annotated[
        str, typer.Option("--source-language", help='Of a model that translates: the prompt\'s, such as "eng_Latn".')
    ] = "",
    target_language: Annotated[
        str, typer.Option("--target-language", help="Of a model that translates: the answer's.")
    ] = "",
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Log-probabilities of the chosen and the n likeliest tokens.")
    ] = None,
    request_id: Annotated[
        str | None, typer.Option("--request-id", help="Id for logs and for the SDK's cancel().")
    ] = None,
    timeout_s: t.TimeoutS = None,
    api_key: t.ApiKey = None,
    tls: t.Tls = False,
    tls_ca: t.TlsCa = None,
    json: t.AsJson = False,
) -> None:
    """Continue a prompt.

    Streams the text to stdout, or token ids where the model has no tokenizer. Numbers go to stderr.
    """
    options: GenerateOptions = {
        "prompt_ids": t.read_ids(prompt_ids),
        "messages": [Message(role="user", content=t.typed(text)) for text in message] if message else None,
        "model": model,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "ignore_eos": ignore_eos,
        "stop": [t.typed(text) for text in stop or ()],
        "stop_ids": t.read_ids(stop_ids, "--stop-ids") or (),
        "n": n,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "early_stopping": t.read_early_stopping(early_stopping),
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "source_language": source_language,
        "target_language": target_language,
        "logprobs": logprobs,
        "request_id": request_id,
    }
    with (
        t.open_client(target, api_key, tls, tls_ca, timeout_s) as client,
        client.generate(t.read_prompt(prompt), **options) as stream,
    ):
        if json:
            t.print_json(_as_json(stream.completion()))
        elif n == 1:
            _show_stream(stream, has_text=client.get_model(model).has_tokenizer)
        else:
            _show_choices(stream.completion())


def _show_stream(stream: Stream, *, has_text: bool) -> None:
    begin_s = time.monotonic()
    first_s: float | None = None
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason = ""
    try:
        for chunk in stream:
            if first_s is None and chunk.token_ids:
                first_s = time.monotonic() - begin_s
            token_ids += chunk.token_ids
            logprobs += chunk.logprobs
            finish_reason = chunk.finish_reason or finish_reason
            t.print_text(chunk.text if has_text else "".join(f"{token_id} " for token_id in chunk.token_ids))
    finally:
        if token_ids or finish_reason:
            t.print_line("")
    _show_logprobs(token_ids, logprobs)
    total_s = time.monotonic() - begin_s
    first_ms = (total_s if first_s is None else first_s) * 1e3
    sys.stderr.write(
        f"{len(token_ids)} tokens ({finish_reason}), the first after {first_ms:.0f} ms, {total_s:.2f} s in all\n"
    )


def _show_choices(completion: Completion) -> None:
    for choice in completion.choices:
        score = "" if choice.score is None else f", score {choice.score:.4f}"
        t.print_line(f"--- choice {choice.index}, {choice.finish_reason}{score}")
        t.print_line(choice.text or " ".join(map(str, choice.token_ids)))
        _show_logprobs(choice.token_ids, choice.logprobs)


def _show_logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
    # There are none unless they were asked for.
    if logprobs:
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            top = "".join(f"  {other}:{value:.4f}" for other, value in entry.top)
            t.print_line(f"{token_id:>8} {entry.chosen:>10.4f}{top}")


def _as_json(completion: Completion) -> t.Json:
    usage = completion.usage
    head: dict[str, t.Json] = {
        "request_id": completion.request_id,
        "model": completion.model,
        "seed": completion.seed,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_prompt_tokens": usage.cached_prompt_tokens,
            "output_tokens": usage.output_tokens,
        },
    }
    first = _choice_as_json(completion.choices[0])
    choices: t.Json = [_choice_as_json(choice) for choice in completion.choices]
    return head | first | ({"choices": choices} if len(completion.choices) > 1 else {})


def _choice_as_json(choice: Choice) -> dict[str, t.Json]:
    written: dict[str, t.Json] = {
        "index": choice.index,
        "token_ids": list(choice.token_ids),
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        **({} if choice.score is None else {"score": choice.score}),
    }
    if choice.logprobs:
        written["logprobs"] = [_logprobs_as_json(entry) for entry in choice.logprobs]
    return written


def _logprobs_as_json(entry: TokenLogprobs) -> t.Json:
    return {"chosen": entry.chosen, "top": [{"id": token_id, "logprob": value} for token_id, value in entry.top]}
