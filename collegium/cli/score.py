"""`collegium score`: the log-probability of every token of a text, and its perplexity."""

from __future__ import annotations

from typing import Annotated

import typer

from collegium.cli import target as t


def score(
    target: t.Target = t.DEFAULT_TARGET,
    prompt: Annotated[str | None, typer.Option("--prompt", help='Text to score; "-" reads stdin.')] = None,
    prompt_ids: t.PromptIds = None,
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
        result = client.score(text, prompt_ids=t.read_ids(prompt_ids), model=model)
    num_scored = len(result.token_ids) - 1  # the first has nothing before it
    if json:
        t.print_json(
            {
                "token_ids": list(result.token_ids),
                "text": text or "",  # as in generate's object, so that one reader does for both
                "finish_reason": None,
                "logprobs": [None, *result.logprobs[1:]],
                "perplexity": result.perplexity if num_scored else None,
            }
        )
        return
    t.print_line(f"{result.token_ids[0]:>8} {'-':>10}")
    for token_id, logprob in zip(result.token_ids[1:], result.logprobs[1:], strict=True):
        t.print_line(f"{token_id:>8} {logprob:>10.4f}")
    perplexity = f"{result.perplexity:.4f}" if num_scored else "-"
    tokens = "1 token" if num_scored == 1 else f"{num_scored} tokens"
    t.print_line(f"perplexity {perplexity} over {tokens} (the first has nothing before it)")
