"""Say what plain `transformers` answers on a checkpoint, and how far from another answer it was.

Owns the reference of every congruence test (one prompt at a time, float32, one thread) and the search for prompts on
which rounding cannot decide. Works in one process of its own, started when first asked, because importing transformers
is slow and its patches are global; answers are kept on disk. Knows nothing of the system under test.
Margin: likeliest minus second logit, smallest over the answer. Gap: distance of the gate from another choice of
experts, smallest over layers and tokens, in units of what the gate ranks by (logits, or sigmoid scores plus bias).
"""

import functools
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

from tests.checkpoints import VOCAB_SIZE, Variant, build, cache_key

CLEAR = 1e-3  # a smaller margin or gap could be decided by rounding
_FIRST_PLAIN_ID = 8  # below are special ids
_NUM_CANDIDATES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What plain transformers makes of one prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]  # of token_ids, in the raw distribution
    margin: float
    gap: float

    @property
    def is_clear(self) -> bool:
        """Whether no rounding error could have changed the answer."""
        return self.margin > CLEAR and self.gap > CLEAR


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """One of the n best of a beam search: its ids without the decoder's start, and its score.

    is_clear: whether small changes of the scores, as of rounding, find the same n best.
    """

    token_ids: list[int]
    score: float
    is_clear: bool = True


class Oracle:
    """Asks the reference process. Owned by one test session; close it in the end."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._process: subprocess.Popen[str] | None = None

    def checkpoint(self, arch: str, variant: Variant = Variant.BASE) -> Path:
        """Return the folder of a tiny checkpoint, made when it does not exist."""
        path = self._cache / "checkpoints" / cache_key() / f"{arch}-{variant}"
        if not path.is_dir():
            made = self._ask("build", arch=arch, root=str(self._cache / "checkpoints"), variant=variant)
            assert made == str(path)
        return path

    def reference(
        self, checkpoint: Path, prompts: Sequence[Sequence[int]], max_tokens: int, *, ignore_eos: bool = True
    ) -> list[Reference]:
        """Return what greedy `generate` answers to each prompt alone."""
        answer = self._remember(
            "reference", checkpoint, prompts=[list(p) for p in prompts], max_tokens=max_tokens, ignore_eos=ignore_eos
        )
        return [Reference(**one) for one in answer]

    def choose_prompts(
        self, checkpoint: Path, num_prompts: int, max_tokens: int, *, lengths: Sequence[int] = (), seed: int = 0
    ) -> list[Reference]:
        """Search random prompts, always the same for the same arguments, until all have clear answers.

        lengths: taken in turn; by default 5 to 40. Every answer is asserted to be clear and to hold several ids.
        """
        answer = self._remember(
            "choose_prompts",
            checkpoint,
            num_prompts=num_prompts,
            max_tokens=max_tokens,
            lengths=list(lengths),
            seed=seed,
        )
        references = [Reference(**one) for one in answer]
        assert all(one.is_clear for one in references)
        return references

    def choose_sources(
        self,
        checkpoint: Path,
        num_sources: int,
        max_tokens: int,
        *,
        lengths: Sequence[int] = (4, 30, 11, 1, 47, 18),
        forced: int | None = None,
        seed: int = 0,
    ) -> list[Reference]:
        """Search sources of a model with an encoder whose greedy answers are clear, as choose_prompts does."""
        arguments = {"num_sources": num_sources, "max_tokens": max_tokens, "lengths": list(lengths), "seed": seed}
        answer = self._remember("choose_sources", checkpoint, forced=forced, **arguments)
        return [Reference(**one) for one in answer]

    def translate_texts(
        self, checkpoint: Path, texts: Sequence[str], *, to: str, max_tokens: int
    ) -> list[dict[str, Any]]:
        """Return what `generate` translates each text to: "text", "token_ids" and "source_tokens"."""
        arguments = {"texts": list(texts), "to": to, "max_tokens": max_tokens}
        return cast(list[dict[str, Any]], self._remember("translate_texts", checkpoint, **arguments))

    def beams(
        self,
        checkpoint: Path,
        sources: Sequence[Sequence[int]],
        *,
        forced: int | None = None,
        num_shakes: int = 2,
        **options: Any,
    ) -> list[list[Beam]]:
        """Return the n best of each source by `generate` with these options.

        num_shakes: searches with noise on the scores, by which it is told whether a source is clear.
        """
        arguments = {"options": options, "forced": forced, "num_shakes": num_shakes}
        answer = self._remember("beams", checkpoint, sources=[list(one) for one in sources], **arguments)
        return [[Beam(**one) for one in each] for each in answer]

    def score(self, checkpoint: Path, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of every prompt token after the first."""
        return cast(list[list[float]], self._remember("score", checkpoint, prompts=[list(p) for p in prompts]))

    def close(self) -> None:
        """End the process; it ends by itself when this one is gone."""
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait(timeout=30)
            self._process = None

    def _remember(self, name: str, checkpoint: Path, **arguments: Any) -> Any:
        key = json.dumps([name, checkpoint_key(checkpoint), Path(__file__).read_text(), arguments])
        path = self._cache / "answers" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if not path.exists():
            answer = self._ask(name, checkpoint=str(checkpoint), **arguments)
            path.parent.mkdir(parents=True, exist_ok=True)
            work = path.with_suffix(f".{os.getpid()}")
            work.write_text(json.dumps(answer))
            work.rename(path)
        return json.loads(path.read_text())

    def _ask(self, name: str, **arguments: Any) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.oracle"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[1],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"name": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the oracle ended with status {self._process.wait()} while asked for {name}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"the oracle failed on {name}:\n{reply['error']}")
        return reply["result"]


def checkpoint_key(checkpoint: Path) -> str:
    """Name a checkpoint by its config and its files' names, sizes and times."""
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(checkpoint.iterdir())]
    return json.dumps([stats, cache_key()])


# What follows runs in the oracle's process.


def translate_texts(checkpoint: str, texts: list[str], to: str, max_tokens: int) -> list[dict[str, Any]]:
    """Let AutoTokenizer and greedy `generate` translate each text alone: text and ids without the decoder's start."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    found: list[dict[str, Any]] = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            forced_bos_token_id=tokenizer.convert_tokens_to_ids(to),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
        )
        said = tokenizer.decode(out[0], skip_special_tokens=True)
        found.append({"text": said, "token_ids": out[0, 1:].tolist(), "source_tokens": ids.shape[1]})
    return found


def choose_sources(
    checkpoint: str, num_sources: int, max_tokens: int, lengths: list[int], forced: int | None, seed: int
) -> list[Reference]:
    """Search sources as choose_prompts does."""
    drawn = random.Random(seed)
    chosen: list[Reference] = []
    for _ in range(60 * num_sources):
        length = lengths[len(chosen) % len(lengths)]
        source = [drawn.randrange(_FIRST_PLAIN_ID, VOCAB_SIZE) for _ in range(length)]
        found = _translate_one(load(checkpoint), source, max_tokens, forced)
        if found.is_clear and len(set(found.token_ids)) >= min(4, max_tokens):
            chosen.append(found)
        if len(chosen) == num_sources:
            return chosen
    raise RuntimeError(f"only {len(chosen)} of {num_sources} sources with clear answers were found for {checkpoint}")


def _translate_one(model: Any, source: list[int], max_tokens: int, forced: int | None) -> Reference:
    import torch

    gaps: list[float] = [1e9]

    def watch(gate: Any, arguments: Any, output: Any) -> None:
        scores = output[-1].reshape(-1, output[-1].shape[-1]).float()
        num = 2 if "Top2" in type(gate).__name__ else 1
        top = scores.topk(num + 1, dim=-1).values
        gaps.append((top[:, num - 1] - top[:, num]).min().item())

    hooks = [
        m.register_forward_hook(watch) for m in model.modules() if type(m).__name__.endswith(("2Router", "1Router"))
    ]
    ids = torch.tensor([source])
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            forced_bos_token_id=forced,
            output_logits=True,
            return_dict_in_generate=True,
            use_cache=_can_cache(model.config),
        )
    finally:
        for hook in hooks:
            hook.remove()
    token_ids = out.sequences[0, 1:].tolist()
    first = 0 if forced is None else 1
    logits = torch.cat(out.logits)
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
    top = logits[first:].topk(2, dim=-1).values
    return Reference(
        prompt_ids=source,
        token_ids=token_ids,
        logprobs=[0.0] * first + logprobs[first:],
        margin=(top[:, 0] - top[:, 1]).min().item(),
        gap=min(gaps),
    )


def _can_cache(config: Any) -> bool:
    """Whether `generate` can use its cache: with one, 5.23 fails on a Switch whose decoder is the deeper stack."""
    return config.model_type != "switch_transformers" or config.num_layers >= config.num_decoder_layers


def beams(
    checkpoint: str, sources: list[list[int]], options: dict[str, Any], forced: int | None, num_shakes: int
) -> list[list[Beam]]:
    """Let beam search answer each source, or prompt, alone: the n best of each, best first."""
    found: list[list[Beam]] = []
    for source in sources:
        plain, *shaken = (_search(load(checkpoint), source, options, forced, seed) for seed in range(1 + num_shakes))
        is_clear = all([one for one, _ in each] == [one for one, _ in plain] for each in shaken)
        found.append([Beam(token_ids=ids, score=score, is_clear=is_clear) for ids, score in plain])
    return found


def _search(
    model: Any, source: list[int], options: dict[str, Any], forced: int | None, seed: int
) -> list[tuple[list[int], float]]:
    """The n best and their scores. seed: of noise on the scores as large as rounding may be; 0: none."""
    import torch
    from transformers import LogitsProcessorList

    generator = torch.Generator().manual_seed(seed)

    def shake(_ids: Any, scores: Any) -> Any:
        return scores + torch.randn(scores.shape, generator=generator) * CLEAR / 2

    is_both = model.config.is_encoder_decoder
    ids, end = torch.tensor([source]), options["eos_token_id"]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=not is_both or _can_cache(model.config),
        logits_processor=LogitsProcessorList([shake] if seed else []),  # type: ignore[list-item]
        **({"forced_bos_token_id": forced} if is_both else {}),
        **options,
    )
    rows = out.sequences[:, 1 if is_both else len(source) :].tolist()
    ended = [row[: row.index(end) + 1] if end in row else row for row in rows]
    return list(zip(ended, out.sequences_scores.tolist(), strict=True))


@functools.lru_cache(maxsize=2)
def load(checkpoint: str) -> Any:
    """Load the plain model in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if AutoConfig.from_pretrained(checkpoint).is_encoder_decoder:
        _correct_nllb()
        return AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


def _correct_nllb() -> None:
    """Have NLLB-MoE run every expert that its gate chose: 5.23 runs the first two, whatever it chose (4.48.3 does)."""
    import torch
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

    def forward(self: Any, rows: Any, _mask: Any, weights: Any) -> Any:
        out = torch.zeros_like(rows)
        for expert in range(self.num_experts):
            at = weights[:, expert].nonzero()[:, 0]
            y = self[f"expert_{expert}"](rows[at]) * (1 - self.moe_token_dropout)
            out.index_add_(0, at, y * weights[at, expert, None])
        return out

    NllbMoeExperts.forward = forward  # type: ignore[method-assign]


def gate_gaps(gate: Any, arguments: Sequence[Any], output: Any) -> Any:
    """Return how far every token's choice of experts was from another: [tokens], from a gate's call."""
    import torch

    logits = (output[0] if isinstance(output, tuple) else output).float()
    config_k: int = getattr(gate, "top_k", 0) or gate.num_chosen
    bias = getattr(gate, "e_score_correction_bias", arguments[1] if len(arguments) > 1 else None)
    ranked_by = logits if bias is None else logits.sigmoid() + bias
    if hasattr(gate, "moe_statics"):
        ranked_by = gate.moe_statics(logits.softmax(-1))
    num_experts = logits.shape[-1]
    gaps = [torch.full(logits.shape[:1], math.inf)]

    def add(scores: Any, num_kept: int) -> Any:
        """Note the gap below the num_kept-th score; return the kept indices."""
        top = scores.topk(min(num_kept + 1, scores.shape[-1]), dim=-1)
        if num_kept < scores.shape[-1]:
            gaps.append(top.values[:, num_kept - 1] - top.values[:, num_kept])
        return top.indices[:, :num_kept]

    num_groups = getattr(gate, "num_group", 1) or 1
    if num_groups > 1 and getattr(gate, "topk_method", "group_limited_greedy") != "greedy":
        grouped = ranked_by.view(len(logits), num_groups, -1)
        group_scores = grouped.amax(-1) if bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, add(group_scores, gate.topk_group), True)
        ranked_by = ranked_by.masked_fill(~kept.repeat_interleave(num_experts // num_groups, 1), -math.inf)
    chosen = add(ranked_by, config_k)
    if hasattr(gate, "router_jitter_noise"):  # phimoe: each choice's weight is a softmax over what is near it
        rest = logits
        for k in range(config_k):
            best = rest.amax(-1, keepdim=True)
            distance = (best - logits) / logits.abs().clamp(min=best)
            near = (distance - 2 * gate.router_jitter_noise).abs()
            gaps.append(near.masked_fill(rest.isinf(), math.inf).amin(-1))
            gaps.append(best[:, 0] - rest.scatter(1, chosen[:, k : k + 1], -math.inf).amax(-1))
            rest = rest.scatter(1, chosen[:, k : k + 1], -math.inf)
    return torch.stack(gaps).amin(0)


def answer_batch(model: Any, prompts: list[list[int]], max_tokens: int, ignore_eos: bool) -> list[Reference]:
    """Let `generate` answer prompts of one length, with margins and gaps."""
    import torch

    gaps: list[Any] = []

    def watch(gate: Any, arguments: Any, output: Any) -> None:
        gaps.append(gate_gaps(gate, arguments, output).view(len(prompts), -1).amin(-1))

    hooks: list[Any] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith(("topkrouter", "dbrxrouter", "v1gate")):
            if type(module).__name__ == "DbrxRouter":
                module.num_chosen = model.config.ffn_config.moe_top_k
            hooks.append(module.register_forward_hook(watch))
    assert hooks, f"no gate was found in {type(model).__name__}"
    ids = torch.tensor(prompts)
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None if ignore_eos else model.config.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    logits = torch.stack(out.logits, dim=1)  # [B, tokens, V]
    new_ids = out.sequences[:, ids.shape[1] :]
    chosen = logits.log_softmax(-1).gather(-1, new_ids[..., None])[..., 0]
    top = logits.topk(2, dim=-1).values
    margins = (top[..., 0] - top[..., 1]).amin(-1)
    smallest = torch.stack(gaps).amin(0)
    return [
        Reference(
            prompt_ids=prompt,
            token_ids=new_ids[b].tolist(),
            logprobs=chosen[b].tolist(),
            margin=margins[b].item(),
            gap=min(smallest[b].item(), 1e9),
        )
        for b, prompt in enumerate(prompts)
    ]


def reference(checkpoint: str, prompts: list[list[int]], max_tokens: int, ignore_eos: bool = True) -> list[Reference]:
    """Answer each prompt alone."""
    return [answer_batch(load(checkpoint), [prompt], max_tokens, ignore_eos)[0] for prompt in prompts]


def choose_prompts(
    checkpoint: str, num_prompts: int, max_tokens: int, lengths: list[int], seed: int
) -> list[Reference]:
    """Search prompts: candidates are screened in batches of one length, then answered alone."""
    source = random.Random(seed)
    chosen: list[Reference] = []
    for _ in range(20 * num_prompts):
        length = lengths[len(chosen) % len(lengths)] if lengths else source.randint(5, 40)
        prompts = [
            [source.randrange(_FIRST_PLAIN_ID, VOCAB_SIZE) for _ in range(length)] for _ in range(_NUM_CANDIDATES)
        ]
        screened = answer_batch(load(checkpoint), prompts, max_tokens, ignore_eos=True)
        for candidate in sorted(screened, key=lambda one: -min(one.margin, one.gap)):
            if not candidate.is_clear or len(set(candidate.token_ids)) < min(4, max_tokens):
                continue
            alone = answer_batch(load(checkpoint), [candidate.prompt_ids], max_tokens, ignore_eos=True)[0]
            if alone.is_clear:
                chosen.append(alone)
                break
        if len(chosen) == num_prompts:
            return chosen
    raise RuntimeError(f"only {len(chosen)} of {num_prompts} prompts with clear answers were found for {checkpoint}")


def score(checkpoint: str, prompts: list[list[int]]) -> list[list[float]]:
    """Score each prompt alone."""
    import torch

    scores: list[list[float]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            logprobs = load(checkpoint)(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return scores


def build_path(arch: str, root: str, variant: str) -> str:
    """Make a checkpoint."""
    return str(build(arch, Path(root), Variant(variant)))


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer one JSON line per request until the other side closes."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    verbs: dict[str, Callable[..., Any]] = {
        "build": build_path,
        "reference": reference,
        "choose_prompts": choose_prompts,
        "score": score,
        "translate_texts": translate_texts,
        "choose_sources": choose_sources,
        "beams": beams,
    }
    for line in requests:
        request = json.loads(line)
        try:
            result = verbs[request["name"]](**request["arguments"])
            if result and isinstance(result[0], Reference):
                result = [asdict(one) for one in result]
            elif request["name"] == "beams":
                result = [[asdict(one) for one in each] for each in result]
            reply: dict[str, Any] = {"result": result}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    clean = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    serve(sys.stdin, clean)
