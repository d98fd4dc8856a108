#!/usr/bin/env python3
"""Train the small Mixture-of-Experts language model that Collegium serves as its demo.

The model is a real, if tiny, Qwen3-MoE: 32 experts per layer of which each token wakes four.
It learns four kinds of text that any Debian machine can fetch for itself, so that nothing but
the finished checkpoint needs to be kept:

    english, french, german   package descriptions and their translations, manuals and guides,
                              from the Debian archive
    python                    the standard library of the Python that runs this script

Every batch holds the same number of rows of each domain, and the load-balancing loss looks at a
whole batch at a time: experts are kept alive, yet remain free to specialise by domain.

Needs a Debian system (`apt-get`, nothing installed, no root) and torch, transformers, tokenizers:

    python train_demo_lm.py --out demo-lm --minutes 45
    python train_demo_lm.py --out better --resume demo-lm --lr 1.5e-3 --megabytes 30 --minutes 90

`--resume` goes on from a checkpoint, with its tokenizer and a learning rate that rises and falls
anew. It reads the work folder of the earlier run, so that tokens and minutes are counted from the
start. Held out is one document in fifty of the first 10 MB of each domain, however much is trained
on: what one run kept back no later run sees. The checkpoint is saved every ten minutes.

The learning rate follows the wall clock, so that the run ends when it should on any machine. The
same seed gives the same data, tokenizer and first weights; the number of steps depends on speed.
Afterwards the saved checkpoint is loaded afresh and measured: perplexity, the load of every expert
by domain, samples. The figures go into the work folder, as the tables of the model card.
`--measure-only` repeats that last part for a checkpoint trained before.
"""

import argparse
import collections
import copy
import gzip
import hashlib
import html
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LANGUAGES = {"english": "en", "french": "fr", "german": "de"}
DOMAINS = [*LANGUAGES, "python"]
EOS = "<|endoftext|>"
HELD_OUT_ONE_IN = 50  # documents: 2 % of each domain
FIRST_CUT = 10.0  # MB of each domain from which documents are held out
GUIDES_CUT = 4.0  # MB of manuals and guides in a language: package descriptions stay the larger part
ROFF_MARKS = {r"\-": "-", r"\ ": " ", r"\(bu": "", r"\(aq": "'", r"\(dq": '"', r"\(co": "©", r"\e": "/"}
SAVE_EVERY_S = 600
GUIDES = {  # packages, and where each language's pages lie once they are unpacked
    "debian-handbook": "usr/share/doc/debian-handbook/html/{0}-*/*.html",
    "debian-reference-en": "usr/share/debian-reference/*.{0}.html",
    "debian-reference-fr": "usr/share/debian-reference/*.{0}.html",
    "debian-reference-de": "usr/share/debian-reference/*.{0}.html",
    "installation-guide-amd64": "usr/share/doc/installation-guide-amd64/{0}/*.html",
    "manpages-fr": "usr/share/man/{0}/man*/*.gz",
    "manpages-de": "usr/share/man/{0}/man*/*.gz",
}
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "turtledemo", "lib2to3", "encodings", "pydoc_data"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20}
PROMPTS = {
    "english": "library for reading and writing",
    "french": "Ce paquet fournit la documentation",
    "german": "Dieses Paket enthält die",
    "python": "    def __init__(self, name",
}


# --- text ------------------------------------------------------------------------------------


def apt_get(work: Path, *words: str) -> None:
    """Run apt-get without root, on lists of our own, in the work folder."""
    for folder in (work / "apt-lists", work / "apt-cache" / "archives"):
        (folder / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::lists": work / "apt-lists",
        "Dir::State::status": os.devnull,
        "Dir::Cache": work / "apt-cache",
        "Acquire::Languages": ",".join(LANGUAGES.values()),
        "Acquire::GzipIndexes": "false",  # keep the lists as plain text
        "APT::Sandbox::User": "",
    }
    command = ["apt-get", *words, "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    subprocess.run(command, cwd=work, check=False)  # a third-party source that fails does not matter


def fetch_descriptions(work: Path) -> dict[str, list[str]]:
    """Fetch the package descriptions of every language."""
    apt_get(work, "update")
    lists = work / "apt-lists"
    texts = {}
    for domain, code in LANGUAGES.items():
        files = sorted(lists.glob(f"*_main_i18n_Translation-{code}"))
        if not files:
            raise SystemExit(f"apt-get brought no descriptions for {domain}: are Debian's sources configured?")
        raw = "\n\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
        texts[domain] = [text for stanza in raw.split("\n\n") if (text := parse_stanza(stanza))]
    return texts


def parse_stanza(stanza: str) -> str:
    """Turn one stanza of a Translation file into its summary and its unwrapped paragraphs."""
    paragraphs: list[str] = []
    for line in stanza.split("\n"):
        if line.startswith("Description-") and not line.startswith("Description-md5"):
            paragraphs += [line.partition(": ")[2].strip(), ""]
        elif paragraphs and line.strip() == ".":
            paragraphs.append("")
        elif paragraphs and line.startswith(" "):
            bullet = re.match(r"\s+[-*+•]\s+", line)
            text = f"\n* {line[bullet.end() :].strip()}" if bullet else f" {line.strip()}"
            paragraphs[-1] += text
    return "\n\n".join(p.strip() for p in paragraphs if p.strip())


def fetch_guides(work: Path) -> dict[str, list[str]]:
    """Fetch manuals and guides: one document for each page, of which only the paragraphs are kept."""
    root = work / "unpacked"
    texts: dict[str, list[str]] = {domain: [] for domain in LANGUAGES}
    for package, pattern in GUIDES.items():
        if not list(work.glob(f"{package}_*.deb")):
            apt_get(work, "download", package)
        for archive in work.glob(f"{package}_*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
        for domain, code in LANGUAGES.items():
            pages = sorted(path for path in root.glob(pattern.format(code)) if not path.is_symlink())
            texts[domain] += [parse_manual(page) if page.suffix == ".gz" else parse_html(page) for page in pages]
    return {domain: list(dict.fromkeys(filter(None, pages))) for domain, pages in texts.items()}


def parse_html(page: Path) -> str:
    """Return the paragraphs of a page, without tags."""
    raw = page.read_text(encoding="utf-8", errors="ignore")
    found = re.findall(r'<(p|div class="para")(?: [^>]*)?>(.*?)</?(?:p|div|pre|table|ul|ol)\b', raw, re.DOTALL)
    plain = (" ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split()) for _, text in found)
    return "\n\n".join(text for text in plain if len(text) >= 40)


def parse_manual(page: Path) -> str:
    """Return the paragraphs of a manual page, without its macros, fonts, examples and notices at the end."""
    raw = gzip.decompress(page.read_bytes()).decode("utf-8", errors="ignore")
    raw = re.split(r"^\.SH .*(?:ÜBERSETZUNG|TRADUCTION)", raw, maxsplit=1, flags=re.MULTILINE)[0]
    raw = re.sub(r"^\.(EX|nf|TS)\b.*?^\.(EE|fi|TE)\b.*?$", ".PP", raw, flags=re.MULTILINE | re.DOTALL)
    raw = re.sub(r"^\.(?:[BI]|[BIR]{2}) (.*)$", lambda m: m[1].replace('"', ""), raw, flags=re.MULTILINE)
    raw = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\[&|^%/,:c]", "", raw)
    for mark, plain in ROFF_MARKS.items():
        raw = raw.replace(mark, plain)
    blocks = re.split(r"(?:^[.'].*\n|^[ \t]*\n)+", raw, flags=re.MULTILINE)
    plain = (" ".join(block.split()) for block in blocks)
    return "\n\n".join(text for text in plain if len(text) >= 40 and "\\" not in text)


def fetch_python() -> list[str]:
    """Read the standard library's modules, without tests, tables and licence headers."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").expandtabs(4)
        text = re.sub(r"\A(\s*#.*\n)+", "", text).strip()  # coding lines and licence notices
        lines = text.split("\n")
        overlong = sum(len(line) > 100 for line in lines)
        if len(text) > 200 and overlong < 0.02 * len(lines):
            documents.append("\n".join(line.rstrip() for line in lines if len(line) <= 100))
    return documents


def is_prose(paragraph: str) -> bool:
    """Say whether a paragraph is language rather than a table, a drawing or a list of addresses."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return 10 <= len(paragraph) <= 2000 and letters >= 0.85 * len(paragraph) and "://" not in paragraph


class Gatherer:
    """Cleans documents of every domain and drops the paragraphs that were seen before."""

    def __init__(self):
        self.seen: collections.Counter[str] = collections.Counter()

    def clean(self, text: str, known: set[str]) -> str:
        """Return the summary with the paragraphs that are prose, not yet seen too often and not among the known."""
        summary, *paragraphs = text.split("\n\n")
        kept = []
        for paragraph in filter(is_prose, paragraphs):
            self.seen[paragraph] += 1  # packages built from one source repeat whole paragraphs
            limit = 1 if len(paragraph) > 100 else 10
            if self.seen[paragraph] <= limit and paragraph not in known:
                kept.append(paragraph)
        return "\n\n".join([summary, *kept]).strip() if kept else ""

    def take(self, documents: Iterator[str], domain: str, known: set[str], megabytes: float) -> dict:
        """Take documents until there is enough, split by the hash of the document."""
        parts: dict[str, list[str]] = {"train": [], "heldout": []}
        size = 0
        while size <= megabytes * 1e6 and (text := next(documents, "")):
            text = text if domain == "python" else self.clean(text, known)
            if len(text) < 60:
                continue
            digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            parts["heldout" if digest % HELD_OUT_ONE_IN == 0 else "train"].append(text)
            size += len(text)
        return parts


def build_corpus(work: Path, megabytes: float) -> dict[str, dict[str, list[str]]]:
    """Gather every domain's documents, cleaned, cut to size and split by the hash of the document.

    What is held out comes from the first 10 MB alone. Later text that the hash would hold out is
    left aside, so that neither the held-out text nor what it is kept apart from hangs on the size.
    """
    raw = {**fetch_descriptions(work), "python": fetch_python()}
    gatherer, corpus, left = Gatherer(), {}, {}
    for domain in DOMAINS:  # English first: what another language left untranslated is then known
        known = set(gatherer.seen)
        left[domain] = iter(sorted(set(raw[domain]), key=lambda text: hashlib.sha256(text.encode()).digest()))
        corpus[domain] = gatherer.take(left[domain], domain, known, min(megabytes, FIRST_CUT))
    if megabytes > FIRST_CUT:
        guides = fetch_guides(work)
        for domain in DOMAINS:
            known = set() if domain == "english" else set(gatherer.seen)
            pages = (f"\n\n{page}" for page in guides.get(domain, []))  # a page has no summary
            for documents, most in ((pages, GUIDES_CUT), (left[domain], megabytes - FIRST_CUT)):
                corpus[domain]["train"] += gatherer.take(documents, domain, known, most)["train"]
    for domain, parts in corpus.items():
        size = sum(len(text) for part in parts.values() for text in part)
        print(f"{domain:8s} {len(parts['train']):6d} documents, {len(parts['heldout'])} held out, {size / 1e6:.1f} MB")
    return corpus


# --- tokens ----------------------------------------------------------------------------------


def train_tokenizer(corpus: dict, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on equal amounts of every domain."""

    def sample():
        for domain in DOMAINS:
            taken = 0
            for text in corpus[domain]["train"]:
                yield text
                taken += len(text)
                if taken > 3e6:
                    break

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, model_max_length=context)


def encode(tokenizer, documents: list[str]) -> torch.Tensor:
    """Encode documents as one stream, each closed by the end-of-sequence token."""
    ids = [i for row in tokenizer(documents, verbose=False)["input_ids"] for i in (*row, tokenizer.eos_token_id)]
    return torch.tensor(ids, dtype=torch.int32)


class Stream:
    """Hands out windows of a token stream in random order, cut anew for every pass."""

    def __init__(self, ids: torch.Tensor, length: int, generator: random.Random):
        self.ids, self.length, self.random = ids, length, generator
        self.starts: list[int] = []
        self.drawn = 0

    def draw(self) -> torch.Tensor:
        """Return the next window, one token longer than `length` for the targets."""
        if not self.starts:
            offset = self.random.randrange(self.length)
            self.starts = list(range(offset, len(self.ids) - self.length, self.length))
            self.random.shuffle(self.starts)
        start = self.starts.pop()
        self.drawn += self.length
        return self.ids[start : start + self.length + 1].long()


# --- training --------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, eos: int) -> Qwen3MoeForCausalLM:
    """Build the untrained model."""
    config = Qwen3MoeConfig(
        vocab_size=args.vocab,
        hidden_size=192,
        intermediate_size=512,  # of dense layers, of which this model has none
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        initializer_range=0.04,
        router_aux_loss_coef=args.balance / 4,  # the library's loss adds up the four choices, ours averages
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return Qwen3MoeForCausalLM(config)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return how unevenly the experts are used, averaged over the layers: 1.0 is perfectly even.

    This is the loss of the Switch Transformer taken layer by layer. The one that comes with the
    model adds the layers up first, so that an expert which is dead in one layer could be made up
    for by its namesake in another.
    """
    total = 0.0
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        experts = probabilities.shape[-1]
        chosen = probabilities.topk(top_k, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        total = total + experts * (load * probabilities.mean(0)).sum()
    return total / len(router_logits)


def train(args: argparse.Namespace) -> None:
    """Fetch the text, train the tokenizer and the model or go on with earlier ones, and save the checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    earlier = json.loads((args.work / "history.json").read_text()) if args.resume else None
    corpus = build_corpus(args.work, args.megabytes)
    args.work.joinpath("heldout.json").write_text(json.dumps({d: corpus[d]["heldout"] for d in DOMAINS}))
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        model = Qwen3MoeForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(corpus, args.vocab, args.context)
        model = build_model(args, tokenizer.eos_token_id)
    model = model.to(device).train()
    draws = random.Random(args.seed + len(earlier["runs"]) if earlier else args.seed)
    streams = {d: Stream(encode(tokenizer, corpus[d]["train"]), args.context, draws) for d in DOMAINS}
    print("tokens:", {d: f"{len(s.ids) / 1e6:.2f} M" for d, s in streams.items()}, flush=True)

    model.set_experts_implementation("grouped_mm")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)

    rows = args.rows_per_domain
    smooth: dict[str, float] = {}
    began, step, progress, saved = time.monotonic(), 0, 0.0, 0.0
    while progress < 1.0:
        warm_up = min(1.0, (step + 1) / args.warm_up)
        rate = args.lr * warm_up * (1 - progress)  # to zero: it averages out the noise of small batches
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.stack([streams[d].draw() for d in DOMAINS for _ in range(rows)]).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        logits, targets = output.logits.float().flatten(0, 1), batch[:, 1:].flatten()
        losses = F.cross_entropy(logits, targets, reduction="none").view(len(DOMAINS), -1).mean(-1)
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        loss = losses.mean() + args.balance * balance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        step += 1
        elapsed = time.monotonic() - began
        progress = elapsed / (60 * args.minutes)
        for domain, value in zip(DOMAINS, losses.tolist(), strict=True):
            smooth[domain] = value + 0.98 * (smooth.get(domain, value) - value)
        if step % 20 == 0:
            shown = " ".join(f"{d} {value:.2f}" for d, value in smooth.items())
            speed = step * targets.numel() / elapsed
            print(
                f"step {step:5d} {elapsed / 60:5.1f} min  loss {losses.mean().item():.3f} ({shown})  "
                f"balance {balance.item():.3f}  lr {rate:.1e}  {speed:,.0f} tokens/s",
                flush=True,
            )

        if elapsed - saved > SAVE_EVERY_S or progress >= 1.0:
            saved = elapsed
            save_checkpoint(model, tokenizer, args.out)
            history = write_history(args, earlier, step, elapsed, streams)
            args.work.joinpath("history.json").write_text(json.dumps(history, indent=2))


def write_history(args: argparse.Namespace, earlier: dict | None, step: int, elapsed: float, streams: dict) -> dict:
    """Return what made the checkpoint: this run, the runs that it went on from, and their sums.

    Passes are all trained tokens over the tokens of this run's text.
    """
    run = {
        "steps": step,
        "minutes": elapsed / 60,
        "tokens": {d: s.drawn for d, s in streams.items()},
        "text_tokens": {d: len(s.ids) for d, s in streams.items()},
        "python": platform.python_version(),
        "debian": platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown"),
        "cpus": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
    }
    runs = [*(earlier["runs"] if earlier else []), run]
    tokens = {d: sum(r["tokens"][d] for r in runs) for d in DOMAINS}
    return {
        "steps": sum(r["steps"] for r in runs),
        "minutes": sum(r["minutes"] for r in runs),
        "tokens": tokens,
        "passes": {d: tokens[d] / len(s.ids) for d, s in streams.items()},
        "runs": runs,
    }


def save_checkpoint(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model and tokenizer in bf16, spelt so that readers of transformers 4 and 5 understand."""
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    copy.deepcopy(model).to(device="cpu", dtype=torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["num_experts"] = model.config.num_experts  # transformers 5 writes num_local_experts alone
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    spelling = json.loads((out / "tokenizer_config.json").read_text())
    for key in ("backend", "is_local", "local_files_only"):  # of no concern to readers
        spelling.pop(key, None)
    spelling["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(spelling, indent=2, sort_keys=True) + "\n")


# --- measurement -----------------------------------------------------------------------------


@torch.inference_mode()
def measure_domain(model, ids: torch.Tensor, context: int) -> tuple[float, torch.Tensor]:
    """Return the mean loss in nats over whole windows, and the load of every expert.

    The load is [2, L, E]: the share of the layer's choices, in even and in odd windows apart.
    """
    config = model.config
    windows = ids[: (len(ids) - 1) // context * context + 1].long().unfold(0, context + 1, context)
    loss, counts = 0.0, torch.zeros(2, config.num_hidden_layers, config.num_experts)
    for i, window in enumerate(windows):
        output = model(input_ids=window[None, :-1], use_cache=False, output_router_logits=True)
        loss += F.cross_entropy(output.logits[0], window[1:]).item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
            counts[i % 2, layer] += torch.bincount(chosen.flatten(), minlength=config.num_experts)
    return loss / len(windows), counts / counts.sum(-1, keepdim=True)


def table(head: list[str], rows: list[list]) -> str:
    """Lay out a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def go_on(model, tokenizer, prompt: str, seed: int, settings: dict) -> str:
    """Return the forty tokens that the model puts after a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    output = model.generate(**inputs, **settings, min_new_tokens=40, max_new_tokens=40)[0]
    return tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(args: argparse.Namespace) -> None:
    """Load the saved checkpoint as any user would and write what it does into figures.md."""
    history = json.loads((args.work / "history.json").read_text())
    heldout = json.loads((args.work / "heldout.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    config, context = model.config, model.config.max_position_embeddings
    layers = range(config.num_hidden_layers)

    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (1 - config.num_experts_per_tok / config.num_experts)
    trained, last = sum(history["tokens"].values()), history["runs"][-1]
    runs = f"{len(history['runs'])} run(s), the last on {last['cpus']} {last['device']} threads"
    report = [
        f"{total / 1e6:.2f} M parameters, {(total - idle) / 1e6:.2f} M active, {trained / 1e6:.2f} M tokens, "
        f"{history['steps']} steps, {history['minutes']:.0f} minutes in {runs}"
    ]

    losses, halves, rows = {}, {}, []
    for domain in DOMAINS:
        ids = encode(tokenizer, heldout[domain])
        losses[domain], halves[domain] = measure_domain(model, ids, context)
        size = sum(len(text.encode()) for text in heldout[domain])
        bits = losses[domain] / math.log(2) * len(ids) / size
        row = [len(heldout[domain]), f"{len(ids):,}", f"{math.exp(losses[domain]):.2f}", f"{bits:.3f}"]
        seen = [f"{history['tokens'][domain]:,}", f"{history['passes'][domain]:.2f}"]
        rows.append([domain, *row, *seen])
    overall = math.exp(sum(losses.values()) / len(losses))
    rows.append(["all, equal weight", "", "", f"{overall:.2f}", "", f"{trained:,}", ""])
    head = ["domain", "held-out documents", "tokens", "perplexity", "bits per byte", "trained tokens", "passes"]
    report.append(table(head, rows))

    # Coefficient of variation and maximum over mean of the experts' loads.
    loads = {domain: half.mean(0) for domain, half in halves.items()}
    loads["all"] = torch.stack(list(loads.values())).mean(0)
    even = 1 / config.num_experts
    spread = {d: (load.std(-1, correction=0) / even, load.amax(-1) / even) for d, load in loads.items()}
    rows = [[n, *(f"{cv[n]:.2f} / {peak[n]:.1f}" for cv, peak in spread.values())] for n in layers]
    report += [table(["layer", *loads], rows), f"Least busy expert: {loads['all'].min() / even:.2f} of an even share."]

    # Cosine of two domains' loads; as the yardstick, the lowest of two halves of one domain.
    pairs = list(itertools.combinations(DOMAINS, 2))
    cosines = {f"{a} / {b}": F.cosine_similarity(loads[a], loads[b], dim=-1) for a, b in pairs}
    within = [F.cosine_similarity(half[0], half[1], dim=-1) for half in halves.values()]
    cosines["same domain"] = torch.stack(within).amin(0)
    report.append(table(["layer", *cosines], [[n, *(f"{c[n]:.2f}" for c in cosines.values())] for n in layers]))

    # The expert that a domain favours most, against that expert's load over all domains.
    rows = []
    for domain in DOMAINS:
        excess, expert = (loads[domain] / loads["all"]).max(-1)
        rows.append([domain, *(f"{expert[n]} ({excess[n]:.1f}x)" for n in layers)])
    report.append(table(["domain", *(f"layer {n}" for n in layers)], rows))

    for title, settings in (("Greedy", {"do_sample": False}), ("Sampled", SAMPLING)):
        report.append(f"{title}:")
        for domain, prompt in PROMPTS.items():
            report.append(f"{domain}:\n\n```text\n{prompt}▸{go_on(model, tokenizer, prompt, args.seed, settings)}\n```")
    (args.work / "figures.md").write_text("\n\n".join(report) + "\n")


def main() -> None:
    """Read the arguments, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-lm"), help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("demo-lm-work"), help="folder of text and logs")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to go on from, with its run's work folder")
    parser.add_argument("--minutes", type=float, default=45.0, help="wall-clock length of the training")
    parser.add_argument("--megabytes", type=float, default=10.0, help="most text to take of a domain, guides apart")
    parser.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--context", type=int, default=512, help="length of a sequence, in training and in use")
    parser.add_argument("--rows-per-domain", type=int, default=1, help="sequences of each domain in a batch")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="highest learning rate")
    parser.add_argument("--warm-up", type=int, default=100, help="steps until the highest learning rate")
    parser.add_argument("--beta2", type=float, default=0.99, help="AdamW's memory of squared gradients")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--measure-only", action="store_true", help="measure the checkpoint in --out, train nothing")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    if not args.measure_only:
        train(args)
    measure(args)


if __name__ == "__main__":
    main()
