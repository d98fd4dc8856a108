"""`collegium score`: the log-probability of every token of a text, and its perplexity."""

from __future__ import annotations

from typing import Annotated

import typer

from collegium.cli import target as t


def score(
    target: t.Target = t.DEFAULT_TARGET,
    prompt: Annotated[str | None, typer.Option("--prompt", help='Text to score; "-" reads stdin.')] = None,
    prompt_ids: t.PromptIds = None,
    target_text: Annotated[
        str | None, typer.Option("--target-text", help="Of a model that translates: what is scored, the prompt given.")
    ] = None,
    target_ids: Annotated[
        str | None, typer.Option("--target-ids", help="The same as token ids, separated by commas or blanks.")
    ] = None,
    source_language: Annotated[
        str, typer.Option("--source-language", help="Of a model that translates: the prompt's.")
    ] = "",
    target_language: Annotated[
        str,
        typer.Option(
            "--target-language",
            help='The target\'s, such as "fra_Latn": its code, with which the target then begins, is given and not '
            "scored; empty: as the model's files say, and where they say nothing the source's own code is scored.",
        ),
    ] = "",
    model: Annotated[str, typer.Option("--model", help="Name from `status`; empty: the only one.")] = "",
    timeout_s: t.TimeoutS = None,
    api_key: t.ApiKey = None,
    tls: t.Tls = False,
    tls_ca: t.TlsCa = None,
    json: t.AsJson = False,
) -> None:
    """Score a text: how likely each token is after those before it."""
    text = t.read_prompt(prompt)
    with t.open_client(target, api_key, tls, tls_ca, timeout_s) as client:
        result = client.score(
            text,
            prompt_ids=t.read_ids(prompt_ids),
            model=model,
            target=target_text,
            target_ids=t.read_ids(target_ids, "--target-ids"),
            source_language=source_language,
            target_language=target_language,
        )
    num_given, num_scored = result.num_given, len(result.token_ids) - result.num_given
    has_target = target_text is not None or target_ids is not None
    if json:
        t.print_json(
            {
                "token_ids": list(result.token_ids),
                "text": target_text or "" if has_target else text or "",  # of token_ids, as in generate's object
                "finish_reason": None,
                "logprobs": [*[None] * num_given, *result.logprobs[num_given:]],
                "perplexity": result.perplexity if num_scored else None,
            }
        )
        return
    for token_id in result.token_ids[:num_given]:
        t.print_line(f"{token_id:>8} {'-':>10}")
    for token_id, logprob in zip(result.token_ids[num_given:], result.logprobs[num_given:], strict=True):
        t.print_line(f"{token_id:>8} {logprob:>10.4f}")
    perplexity = f"{result.perplexity:.4f}" if num_scored else "-"
    note = ""
    if num_given:  # nothing is before it, or it is the code of a language
        note = f" (the first {'is given' if has_target else 'has nothing before it'})"
    tokens = "1 token" if num_scored == 1 else f"{num_scored} tokens"
    t.print_line(f"perplexity {perplexity} over {tokens}{note}")
