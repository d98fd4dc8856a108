#!/usr/bin/env python3
"""Train the small translation model that Collegium serves as its encoder-decoder demo.

The model is a real, if tiny, NLLB-MoE: English to French and to German, with 32 experts in every
second layer of the encoder and of the decoder, of which each token wakes two. Its text comes from
packages of the Debian archive that carry their own translations, so that nothing but the finished
checkpoint needs to be kept:

    help          manuals: LibreOffice, GNOME, GIMP, Debian's guides
    software      interfaces: Odoo, Blender, LibreOffice, KDE, GNOME, git ...
    prose         stories, dialogue and history of games: Wesnoth, Widelands, FreedroidRPG, Freeciv
    descriptions  package descriptions and their translations

The Debian Handbook and two campaigns of Wesnoth are held out whole, and so is one page in forty of
the manuals, one text domain in forty of the interfaces and one package in sixty of the descriptions.

Needs a Debian system (`apt-get download`, nothing installed, no root) and torch, tokenizers,
safetensors, sacrebleu. Stages, each of which reads what the one before left in --work:

    python train_demo_mt.py data                      fetch, align, clean, split; tokenizer; token ids
    python train_demo_mt.py train --resume            train until stopped; --resume if a checkpoint is there
    python train_demo_mt.py train --resume --anneal-minutes 60    go on for an hour, learning rate to zero
    python train_demo_mt.py data --init demo-mt       go on from an exported checkpoint, on a new machine: both stages with --init
    python train_demo_mt.py eval                      chrF, BLEU, the load of every expert, samples
    python train_demo_mt.py export --out demo-mt      a Hugging Face checkpoint in bfloat16
    python train_demo_mt.py verify --out demo-mt      own modules against transformers' greedy generate

transformers is needed by `verify` alone. transformers 5.23 computes NLLB-MoE wrongly (it only ever
runs experts 0 and 1), which `verify` puts right before it compares; 4.48.3 is right as it is.
Training uses modules of its own that compute the same, with the experts of a layer in one tensor.
"""

import argparse
import collections
import difflib
import gettext
import glob
import hashlib
import html
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import tarfile
import time
import unicodedata
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin are ruinous on a shared machine
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # kernels are made for each shape: keep them all

LANGS = {"fr": "fra_Latn", "de": "deu_Latn"}
CODES = ["eng_Latn", "fra_Latn", "deu_Latn"]
BOS, PAD, EOS, UNK = 0, 1, 2, 3
DOMAINS = ["help", "software", "prose", "descriptions"]

# package: how its texts are paired, domain. Held out whole: debian-handbook, two Wesnoth campaigns.
WESNOTH = [
    "data",
    "did",
    "dm",
    "dw",
    "ei",
    "httt",
    "l",
    "low",
    "nr",
    "sof",
    "sota",
    "sotbe",
    "thot",
    "trow",
    "tsg",
    "ttb",
    "utbs",
    "wof",
]
HELD_CAMPAIGNS = {"wesnoth-l", "wesnoth-sota"}
SOURCES = {
    "libreoffice-help-en-us libreoffice-help-fr libreoffice-help-de": ("ids", "help"),
    "gnome-user-docs": ("twins", "help"),
    "gimp-help-en gimp-help-fr gimp-help-de": ("twins", "help"),
    "installation-guide-amd64": ("twins", "help"),
    "debian-reference-en debian-reference-fr debian-reference-de": ("twins", "help"),
    "debian-faq debian-faq-fr debian-faq-de": ("twins", "help"),
    "developers-reference developers-reference-fr developers-reference-de": ("twins", "help"),
    "debian-handbook": ("twins", "handbook"),
    **{f"wesnoth-1.18-{part}": ("gettext", "prose") for part in WESNOTH},
    "widelands-data": ("gettext", "prose"),
    "freedroidrpg-data": ("gettext", "prose"),
    "freeciv-data": ("gettext", "prose"),
    "odoo-19": ("gettext", "software"),
    "blender-data": ("gettext", "software"),
    "libreoffice-l10n-fr": ("gettext", "software"),
    "libreoffice-l10n-de": ("gettext", "software"),
    "digikam-data": ("gettext", "software"),
    "gramps": ("gettext", "software"),
    "kdenlive-data": ("gettext", "software"),
    "kmymoney-common": ("gettext", "software"),
    "kstars-data": ("gettext", "software"),
    "gnucash-common": ("gettext", "software"),
    "evolution-common": ("gettext+twins", "software"),
    "git": ("gettext", "software"),
}


# --- text ------------------------------------------------------------------------------------


def archive() -> str:
    """Return the address of the Debian archive that this system already uses."""
    for file in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        if file.is_file():
            for word in file.read_text().split():
                if re.fullmatch(r"\w+://\S+/debian/?", word):
                    return word.rstrip("/")
    raise SystemExit("no Debian archive found in the package sources of this system")


def apt(work: Path, *words: str, cwd: Path | None = None) -> None:
    """Run apt-get without root, on lists of our own; Debian unstable has all the packages named above."""
    for folder in (work / "apt/lists/partial", work / "apt/cache/archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    listed = f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {archive()} sid main\n"
    (work / "apt/sources.list").write_text(listed)
    options = {
        "Dir::Etc::SourceList": work / "apt/sources.list",
        "Dir::Etc::SourceParts": os.devnull,
        "Dir::State::Lists": work / "apt/lists",
        "Dir::State::status": os.devnull,
        "Dir::Cache": work / "apt/cache",
        "Acquire::Languages": "en,fr,de",
        "APT::Sandbox::User": "",
    }
    subprocess.run(["apt-get", *words, "-qq", *(f"-o{k}={v}" for k, v in options.items())], cwd=cwd, check=False)


def members(deb: Path, wanted: re.Pattern):
    """Yield (path, bytes) of the files of a package that are wanted, without unpacking it to disk."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and wanted.search(member.name):
                yield member.name, archive.extractfile(member).read()
    process.wait()


LANG_PART = re.compile(r"/(en-US|en|C|fr-FR|fr|de-DE|de)(?=/)|\.(en|fr|de)(?=\.html$)")


def language_and_key(path: str) -> tuple[str, str]:
    """Return the language a path names (English if none) and the path without it."""
    found = [m[1] or m[2] for m in LANG_PART.finditer(path)]
    lang = {"fr": "fr", "de": "de"}.get(found[-1][:2] if found else "en", "en")
    return lang, LANG_PART.sub("", path)


def plain(text: str) -> str:
    """Strip tags and entities, unify spaces and apostrophes."""
    text = html.unescape(re.sub(r"<[^<>]*>", " " if "<br" in text or "</" not in text else "", text))
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("\u00ad", "").replace("\u200b", "")
    return " ".join(text.split())


LO_BLOCK = re.compile(r'<(p|h[1-6])\s+id="((?:par|hd)_id[0-9A-Za-z_]*)"[^>]*>(.*?)</\1>', re.S)
BLOCKS = [
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "li",
    "dt",
    "dd",
    "td",
    "th",
    "tr",
    "table",
    "div",
    "ul",
    "ol",
    "dl",
    "pre",
    "section",
    "title",
    "desc",
    "item",
    "list",
    "steps",
    "note",
    "para",
]
BLOCK = re.compile(r"<(/?(?:{}))\b[^>]*>".format("|".join(BLOCKS)), re.I)


def by_ids(pages: dict[str, dict[str, str]]):
    """Pair the paragraphs of LibreOffice's help by their ids."""
    for key, english in pages["en"].items():
        table = {m[2]: m[3] for m in LO_BLOCK.finditer(english)}
        for lang in LANGS:
            for m in LO_BLOCK.finditer(pages[lang].get(key, "")):
                if m[2] in table:
                    yield lang, key, table[m[2]], m[3]


def segments(page: str) -> list[tuple[str, str]]:
    """Cut a page into blocks: the tag before each text, and the text."""
    page = re.sub(r"<(script|style|head|pre|screen|code)\b.*?</\1>", "", page, flags=re.S)
    parts = BLOCK.split(re.sub(r"<!--.*?-->", "", page, flags=re.S))
    return [(tag.lower(), text) for tag, text in zip(["", *parts[1::2]], parts[::2], strict=True)]


def by_twins(pages: dict[str, dict[str, str]]):
    """Pair the blocks of two pages that were made from one source, where their tags run in parallel."""
    for key, english in pages["en"].items():
        a = segments(english)
        marks_a = [tag + ("+" if plain(text) else "") for tag, text in a]
        for lang in LANGS:
            if key not in pages[lang]:
                continue
            b = segments(pages[lang][key])
            marks_b = [tag + ("+" if plain(text) else "") for tag, text in b]
            if marks_a == marks_b:
                runs = [(0, 0, len(a))]
            else:
                matcher = difflib.SequenceMatcher(None, marks_a, marks_b, autojunk=False)
                runs = [m for m in matcher.get_matching_blocks() if m[2] >= 20]
            for i, j, n in runs:
                for k in range(n):
                    yield lang, key, a[i + k][1], b[j + k][1]


def unescape_po(text: str) -> str:
    return text.replace('\\"', '"').replace("\\n", "\n").replace("\\t", " ").replace("\\\\", "\\")


PO_ENTRY = re.compile(r'^msgid((?:\s*"(?:[^"\\]|\\.)*"\n)+)msgstr((?:\s*"(?:[^"\\]|\\.)*"(?:\n|$))+)', re.M)
PO_LINE = re.compile(r'"((?:[^"\\]|\\.)*)"')


def by_gettext(path: str, data: bytes):
    """Yield the pairs of a .mo or .po file; paragraphs apart where both sides have as many."""
    if path.endswith(".mo"):
        table = gettext.GNUTranslations(io.BytesIO(data))._catalog
        items = [(k[0] if isinstance(k, tuple) else k, v) for k, v in table.items()]
    else:
        raw = re.sub(
            r"^#, .*fuzzy.*\n(?:#.*\n)*(?:msgctxt.*\n)?msgid(?:.|\n)*?\n\n",
            "",
            data.decode("utf-8", "ignore"),
            flags=re.M,
        )
        items = [
            tuple(unescape_po("".join(PO_LINE.findall(part))) for part in m.groups()) for m in PO_ENTRY.finditer(raw)
        ]
    for source, target in items:
        source = re.sub(r"^[\w ,:-]+\^", "", source.split("\x04")[-1])  # a note on the context, at Wesnoth
        a, b = (re.split(r"\s*\n\s*\n\s*", text.strip()) for text in (source, target))
        yield from zip(a, b, strict=True) if len(a) == len(b) else [(source, target)]


def gettext_language(path: str) -> str | None:
    parts = re.split(r"[/.]", path)
    return next((lang for lang in LANGS if lang in parts[-4:-1] or (lang in parts and path.endswith(".mo"))), None)


def fetch_descriptions(work: Path):
    """Pair the package descriptions of Debian and their translations, paragraph by paragraph."""

    def table(lang):
        out = {}
        for file in glob.glob(str(work / f"apt/lists/*i18n_Translation-{lang}*")):
            raw = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", file], capture_output=True, check=True).stdout
            for stanza in raw.decode("utf-8", "ignore").split("\n\n"):
                m = re.match(r"Package: (\S+)\nDescription-md5: (\w+)\n", stanza)
                if m:
                    out[m[1], m[2]] = stanza
        return out

    def paragraphs(stanza):
        out = []
        for line in stanza.split("\n"):
            if re.match(r"Description-(?!md5)", line):
                out += [line.partition(": ")[2].strip(), ""]
            elif out and line.strip() == ".":
                out.append("")
            elif out and line.startswith(" "):
                bullet = re.match(r"\s+[-*+•o]\s+", line)
                if bullet:
                    out.append(line[bullet.end() :].strip())
                else:
                    out[-1] += f" {line.strip()}"
        return [p.strip() for p in out if p.strip()]

    english = table("en")
    for lang in LANGS:
        for key, stanza in table(lang).items():
            if key in english:
                a, b = paragraphs(english[key]), paragraphs(stanza)
                if len(a) == len(b):
                    stem = re.sub(r"^lib|\d.*$", "", key[0].split("-")[0]) or key[0]
                    for x, y in zip(a, b, strict=True):
                        yield lang, f"package-{stem}", x, y


PLACEHOLDER = re.compile(
    r"%\(\w+\)[sd]|%[\d$.l]*[sdiufxc]\b|%[LnN]?\d+|%\w\b|\{[\w%.:!]*\}|\$\{?\w+[}|]?|\$\([^)]*\)|&\w+;|\\\w|@\w+"
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'«„“(]?[A-ZÀ-ÖØ-Þ0-9])")
STOP = {
    "en": {
        "the",
        "of",
        "to",
        "and",
        "is",
        "in",
        "that",
        "for",
        "with",
        "this",
        "are",
        "be",
        "on",
        "as",
        "it",
        "you",
        "by",
        "from",
    },
    "fr": {
        "le",
        "la",
        "les",
        "de",
        "des",
        "du",
        "et",
        "est",
        "un",
        "une",
        "pour",
        "dans",
        "que",
        "vous",
        "en",
        "ce",
        "cette",
        "par",
        "avec",
        "sur",
        "au",
        "aux",
        "il",
        "qui",
        "pas",
    },
    "de": {
        "der",
        "die",
        "das",
        "und",
        "ist",
        "ein",
        "eine",
        "zu",
        "den",
        "von",
        "für",
        "mit",
        "nicht",
        "sie",
        "auf",
        "dem",
        "des",
        "im",
        "wird",
        "werden",
        "oder",
        "als",
        "es",
    },
}


def clean_pair(source: str, target: str, lang: str, interface: bool) -> tuple[str, str] | None:
    """Return the pair cleaned, or None if it is not worth learning from."""
    a, b = plain(source), plain(target)
    if interface:  # keyboard accelerators
        for mark in "_&~":
            if a.count(mark) <= 1 and b.count(mark) <= 1:
                a, b = (re.sub(rf"{mark}(?=\w)|\s*\({mark}\w\)", "", text) for text in (a, b))
    words = a.split()
    if not a or not b or a == b or not 2 <= len(words) <= 130 or len(b.split()) > 170:
        return None
    marks = sorted(PLACEHOLDER.findall(a))
    if marks != sorted(PLACEHOLDER.findall(b)) or len(marks) > 2 or len(marks) * 4 > len(words):
        return None
    ratio = len(b) / len(a)
    if not (0.6 <= ratio <= 2.2 if len(a) > 40 else 0.35 <= ratio <= 3.5):
        return None
    for text in (a, b):
        if sum(c.isalpha() or c.isspace() for c in text) < 0.75 * len(text) or re.search(
            r"://|\w{35}|[{}\\|]{2}|==", text
        ):
            return None
        if re.search(r"[^\x00-\u024f\u2010-\u2044\u20ac\u2190-\u21ff\u2022\u2122]", text):
            return None
    low = [w.strip(".,;:!?()«»\"'").lower() for w in b.split()]
    if len(low) >= 6:
        here, there = sum(w in STOP[lang] for w in low), sum(w in STOP["en"] for w in low)
        if there > here:
            return None  # left untranslated
    return a, b


def split_pair(a: str, b: str):
    """Yield the sentences of a paragraph if both sides have as many, else the paragraph; a third stay whole."""
    x, y = SENTENCE_END.split(a), SENTENCE_END.split(b)
    whole = int(hashlib.sha256(a.encode()).hexdigest(), 16) % 3 == 0
    if (
        len(x) == len(y) > 1
        and not whole
        and all(0.5 < (len(q) + 8) / (len(p) + 8) < 2 for p, q in zip(x, y, strict=True))
    ):
        yield from zip(x, y, strict=True)
    else:
        yield a, b


def one_in(name: str, n: int) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % n == 0


def part_of(doc: str, domain: str) -> str:
    """Say to which part a document belongs: train, or one of the held-out sets."""
    if domain == "handbook":
        return "handbook"
    if doc in HELD_CAMPAIGNS:
        return "campaigns"
    if domain == "descriptions":
        return "held-descriptions" if one_in(doc, 60) else "train"
    if domain in ("help", "software") and one_in(doc, 40):
        return f"held-{domain}"
    return "train"


def gather(work: Path):
    """Yield (lang, document, domain, source, target) of everything."""
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    if not glob.glob(str(work / "apt/lists/*i18n_Translation-de*")):
        apt(work, "update")
    for names, (kind, domain) in SOURCES.items():
        start, count = time.time(), 0
        pages: dict[str, dict[str, str]] = {"en": {}, **{lang: {} for lang in LANGS}}
        for name in names.split():
            if not list(debs.glob(f"{name}_*.deb")):
                apt(work, "download", name, cwd=debs)
            found = sorted(debs.glob(f"{name}_*.deb"))
            if not found:
                raise SystemExit(f"apt-get brought no package {name}")
            wanted = {
                "ids": r"/(en-US|fr|de)/.*\.html$",
                "twins": r"(/(en|C|fr|de|en-US|fr-FR|de-DE)/.*|\.(en|fr|de)|/developers-reference/[\w-]+|/FAQ/[\w.-]+)\.(html|page)$|/FAQ/.*html$",
                "gettext": r"[/.](fr|de)[/.].*\.[mp]o$|/(fr|de)\.[mp]o$",
                "gettext+twins": r"[/.](fr|de)[/.].*\.[mp]o$|/(C|fr|de)/.*\.page$",
            }[kind]
            for path, data in members(found[-1], re.compile(wanted)):
                if path.endswith("o"):
                    lang = gettext_language(path)
                    if lang:
                        base = os.path.basename(path).rsplit(".", 1)[0]
                        doc = base if base not in LANGS else "/".join(path.split("/")[-3:-1])
                        for a, b in by_gettext(path, data):
                            count += 1
                            yield lang, doc, domain, a, b
                else:
                    lang, key = language_and_key(path)
                    pages[lang][key] = data.decode("utf-8", "ignore")
        if pages["en"]:
            pair = by_ids if kind == "ids" else by_twins
            for lang, key, a, b in pair(pages):
                count += 1
                yield lang, key, "help" if kind == "gettext+twins" else domain, a, b
        print(f"{names.split()[0]:28s} {count:7d} raw pairs {time.time() - start:5.1f} s", flush=True)
    for lang, doc, a, b in fetch_descriptions(work):
        yield lang, doc, "descriptions", a, b


def norm_key(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def stage_data(args) -> None:
    """Build pairs.jsonl, the tokenizer and the token ids."""
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    seen, rows, versions = set(), [], collections.Counter()
    for lang, doc, domain, a, b in gather(work):
        pair = clean_pair(a, b, lang, domain == "software")
        if not pair:
            continue
        for x, y in split_pair(*pair):
            pair = clean_pair(x, y, lang, False)
            if pair and (lang, *pair) not in seen:
                seen.add((lang, *pair))
                rows.append((part_of(doc, domain), lang, "help" if domain == "handbook" else domain, doc, *pair))
    held_en = {norm_key(r[4]) for r in rows if r[0] != "train"}
    held_xx = {(r[1], norm_key(r[5])) for r in rows if r[0] != "train"}
    before = len(rows)
    per_source: collections.Counter = collections.Counter()
    kept = []
    for r in rows:
        if r[0] == "train":
            if norm_key(r[4]) in held_en or (r[1], norm_key(r[5])) in held_xx:
                continue
            per_source[r[1], norm_key(r[4])] += 1
            if per_source[r[1], norm_key(r[4])] > 2:
                continue
        kept.append(r)
    print(
        f"{before} pairs, {before - len(kept)} left out: their text is held out, or the third translation of one source"
    )
    with open(work / "pairs.jsonl", "w") as out:
        for r in kept:
            out.write(json.dumps(r, ensure_ascii=False) + "\n")
    for r in kept:
        versions[r[0], r[1], r[2]] += 1
        versions[r[0], r[1], r[2], "words"] += len(r[4].split())
    lines = [
        f"{k[0]:18s} {k[1]} {k[2]:13s} {n:7d} pairs {versions[(*k, 'words')]:9,} English words"
        for k, n in sorted(versions.items())
        if len(k) == 3
    ]
    debs = sorted(os.path.basename(f) for f in glob.glob(str(work / "debs/*.deb")))
    (work / "data.txt").write_text("\n".join(lines) + "\n\n" + "\n".join(debs) + "\n")
    print("\n".join(lines))
    train_tokenizer(args, kept)
    encode_all(args, kept)


# --- tokens ----------------------------------------------------------------------------------


def train_tokenizer(args, rows) -> None:
    """Train a byte-fallback BPE on the training text, and save it the way AutoTokenizer reads; --init brings its own."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    if args.init:
        (args.work / "tokenizer").mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (args.work / "tokenizer" / name).write_text((args.init / name).read_text())
        return
    specials = ["<s>", "<pad>", "</s>", "<unk>", *CODES]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("’", "'"),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    pieces = Regex(r"▁?\p{N}|▁?[\p{L}\p{M}]+|▁?[^\p{L}\p{M}\p{N}▁]|▁")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False),
            pre_tokenizers.Split(pieces, "isolated"),
        ]
    )
    tok.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts, english = [], set()
    for part, _, _, _, a, b in rows:
        if part == "train":
            texts.append(b)
            if a not in english:
                english.add(a)
                texts.append(a)
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab, special_tokens=specials + bytes_, limit_alphabet=200, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    state = json.loads(tok.to_str())  # the byte pieces are ordinary pieces, not special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in specials]
    tok = Tokenizer.from_str(json.dumps(state))
    ids = {t: tok.token_to_id(t) for t in specials}
    assert [ids[t] for t in specials] == list(range(len(specials))), ids
    set_source(tok, "eng_Latn")
    folder = args.work / "tokenizer"
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "additional_special_tokens": CODES,
        "clean_up_tokenization_spaces": False,
        "model_max_length": args.positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print("vocabulary", tok.get_vocab_size())


def set_source(tok, code: str) -> None:
    """Make encoding put the source language first and </s> last, as NLLB does."""
    from tokenizers import processors

    pair = [(code, tok.token_to_id(code)), ("</s>", EOS)]
    tok.post_processor = processors.TemplateProcessing(
        single=f"{code} $A </s>", pair=f"{code} $A $B </s>", special_tokens=pair
    )


def load_tokenizer(folder: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode_all(args, rows) -> None:
    """Encode the training pairs; flat int16 arrays with offsets."""
    import torch

    tok = load_tokenizer(args.work / "tokenizer")
    train = [r for r in rows if r[0] == "train"]
    src = [e.ids for e in tok.encode_batch([r[4] for r in train])]
    tgt = [e.ids for e in tok.encode_batch([r[5] for r in train], add_special_tokens=False)]
    keep = [i for i in range(len(train)) if len(src[i]) <= args.longest and len(tgt[i]) + 2 <= args.longest]
    src = [src[i] for i in keep]
    tgt = [[tok.token_to_id(LANGS[train[i][1]]), *tgt[i], EOS] for i in keep]
    out = {
        "src": torch.tensor([t for s in src for t in s], dtype=torch.int16),
        "tgt": torch.tensor([t for s in tgt for t in s], dtype=torch.int16),
        "src_len": torch.tensor([len(s) for s in src], dtype=torch.int32),
        "tgt_len": torch.tensor([len(s) for s in tgt], dtype=torch.int32),
        "lang": torch.tensor([list(LANGS).index(train[i][1]) for i in keep], dtype=torch.int8),
        "domain": torch.tensor([DOMAINS.index(train[i][2]) for i in keep], dtype=torch.int8),
    }
    torch.save(out, args.work / "train.pt")
    print(
        f"{len(keep)} training pairs, {len(out['src']):,} source and {len(out['tgt']):,} target tokens, {len(train) - len(keep)} too long"
    )
    words = sum(len(train[i][4].split()) for i in keep)
    print(f"{len(out['src']) / words:.2f} source tokens per English word")


# --- model -----------------------------------------------------------------------------------


def model_config(args) -> dict:
    return {
        "model_type": "nllb-moe",
        "architectures": ["NllbMoeForConditionalGeneration"],
        "vocab_size": args.vocab,
        "d_model": args.width,
        "max_position_embeddings": args.positions,
        "encoder_layers": args.layers,
        "decoder_layers": args.layers,
        "encoder_ffn_dim": args.ffn,
        "decoder_ffn_dim": args.ffn,
        "encoder_attention_heads": args.heads,
        "decoder_attention_heads": args.heads,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": args.experts,
        "expert_capacity": 64,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": False,
        "batch_prioritized_routing": False,
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": args.eom,
        "router_z_loss_coef": 0.0,
        "router_aux_loss_coef": args.balance,
        "output_router_logits": False,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "dropout": args.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "init_std": 0.02,
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "is_encoder_decoder": True,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
    }


def torch_parts():
    """Define the modules; inside a function so that `data --help` needs no torch."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Noise:
        """Dropout masks cut at random places out of one drawn pool: much cheaper than drawing them anew."""

        def __init__(self, p: float, size: int = 1 << 24):
            self.p, self.size = p, size
            self.pool = torch.empty(size, dtype=torch.bfloat16)
            self.drawn = 0

        def __call__(self, shape, scaled: bool = True):
            if self.drawn % 20000 == 0:
                self.pool.bernoulli_(1 - self.p)
            self.drawn += 1
            n = math.prod(shape)
            start = random.randrange(self.size - n)
            mask = self.pool[start : start + n].view(shape)
            return mask

    class Drop(nn.Module):
        def __init__(self, p: float):
            super().__init__()
            self.p = p
            self.noise = Noise(p) if p else None

        def forward(self, x):
            if not self.training or not self.p:
                return x
            return x * self.noise(x.shape).mul(1 / (1 - self.p))

    class Spread(torch.autograd.Function):
        """Rows of tokens, one for each of their two experts, ordered by expert, with room left empty."""

        @staticmethod
        def forward(ctx, x, order, place, back, size):
            ctx.save_for_backward(back)
            if size == len(order):
                return x.index_select(0, order // 2)
            source = torch.zeros(size, dtype=torch.long)
            source[place] = order // 2
            return x.index_select(0, source)  # the room holds the first token: it is computed, and read by nobody

        @staticmethod
        def backward(ctx, g):
            (back,) = ctx.saved_tensors
            return g.index_select(0, back).view(-1, 2, g.shape[-1]).sum(1), None, None, None, None

    class Unsort(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, order, place, back):
            ctx.save_for_backward(order, place)
            ctx.size = len(y)
            return y.index_select(0, back)

        @staticmethod
        def backward(ctx, g):
            order, place = ctx.saved_tensors
            if ctx.size == len(order):
                return g.index_select(0, order), None, None, None
            return (
                torch.zeros(ctx.size, g.shape[-1], dtype=g.dtype).index_copy_(0, place, g.index_select(0, order)),
                None,
                None,
                None,
            )

    class Dense(nn.Module):
        def __init__(self, d, f):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(d, f), nn.Linear(f, d)

        def forward(self, x, real):
            return self.fc2(F.relu(self.fc1(x)))

    class Sparse(nn.Module):
        """Top-2 of E experts with renormalised gates; all experts in one tensor each."""

        def __init__(self, d, f, experts, eom):
            super().__init__()
            self.router = nn.Linear(d, experts, bias=False)
            self.w1, self.b1 = nn.Parameter(torch.empty(experts, f, d)), nn.Parameter(torch.zeros(experts, f))
            self.w2, self.b2 = nn.Parameter(torch.empty(experts, d, f)), nn.Parameter(torch.zeros(experts, d))
            self.eom = eom
            self.noise = Noise(eom, 1 << 20) if eom else None
            self.balance, self.counts, self.keep_counts = None, None, False

        def forward(self, x, real):
            shape = x.shape
            x = x.reshape(-1, shape[-1])
            rows = x if real is None else x.index_select(0, real)
            n, experts = len(rows), self.router.out_features
            with torch.autocast("cpu", enabled=False):
                logits = F.linear(rows.float(), self.router.weight)
                probs = torch.softmax(logits, -1)
                gates, chosen = probs.topk(2, dim=-1)
                gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
            flat = chosen.reshape(-1)
            order = torch.argsort(flat, stable=True)
            count = torch.bincount(flat, minlength=experts)
            if self.training:
                self.balance = experts * (count / (2 * n) * probs.mean(0)).sum()
            if self.keep_counts:
                self.counts = count if self.counts is None else self.counts + count
            dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
            # Each expert's rows fill up to a multiple of 32 in training: few shapes, few kernels to be made.
            room = (count + 31) // 32 * 32 if self.training else count
            shift = (room.cumsum(0) - room) - (count.cumsum(0) - count)
            place = torch.arange(2 * n) + shift[flat[order]]  # where each ordered row lies among the filled
            back = torch.empty_like(order)
            back[order] = place
            y = Spread.apply(rows.to(dtype), order, place, back, int(room.sum()))
            w1, b1, w2, b2 = (p.to(dtype).unbind() for p in (self.w1, self.b1, self.w2, self.b2))
            outs = [
                F.linear(F.relu(F.linear(part, w1[e], b1[e])), w2[e], b2[e])
                for e, part in enumerate(y.split(room.tolist()))
                if len(part)
            ]
            y = Unsort.apply(torch.cat(outs), order, place, back).view(n, 2, -1)
            out = (y * gates.to(dtype).unsqueeze(-1)).sum(1)
            if self.eom:  # expert output masking: all of a token's expert output, not single values
                out = out * self.noise((n, 1)) if self.training else out * (1 - self.eom)
            if real is not None:
                out = torch.zeros(shape[0] * shape[1], shape[-1], dtype=out.dtype).index_copy(0, real, out)
            return out.view(shape)

    class Attention(nn.Module):
        def __init__(self, d, heads):
            super().__init__()
            self.heads, self.scale = heads, (d // heads) ** -0.5
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

        def split(self, x):
            return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

        def keys(self, x):
            return self.split(self.k_proj(x)), self.split(self.v_proj(x))

        def forward(self, x, kv, mask):
            q = self.split(self.q_proj(x) * self.scale)
            with torch.autocast("cpu", enabled=False):
                weights = torch.matmul(q, kv[0].transpose(-1, -2))
                if mask is not None:
                    weights = weights + mask.to(weights.dtype)
                out = torch.matmul(torch.softmax(weights, -1), kv[1])
            return self.out_proj(out.transpose(1, 2).reshape(x.shape))

    class Layer(nn.Module):
        def __init__(self, c, i, decoder):
            super().__init__()
            d, f = c["d_model"], c["encoder_ffn_dim"]
            self.self_attn, self.self_attn_layer_norm = Attention(d, c["encoder_attention_heads"]), nn.LayerNorm(d)
            if decoder:
                self.cross_attention, self.cross_attention_layer_norm = (
                    Attention(d, c["decoder_attention_heads"]),
                    nn.LayerNorm(d),
                )
            sparse = (i + 1) % c["encoder_sparse_step"] == 0
            self.ffn = Sparse(d, f, c["num_experts"], c["moe_token_dropout"]) if sparse else Dense(d, f)
            self.ff_layer_norm = nn.LayerNorm(d)
            self.drop = Drop(c["dropout"])

        def forward(self, x, mask, real=None, cross=None, cross_mask=None, cache=None):
            h = self.self_attn_layer_norm(x)
            kv = self.self_attn.keys(h)
            if cache is not None:
                kv = kv if cache[0] is None else tuple(torch.cat([a, b], 2) for a, b in zip(cache[0], kv, strict=True))
                cache[0] = kv
            x = x + self.drop(self.self_attn(h, kv, mask))
            if cross is not None:
                x = x + self.drop(self.cross_attention(self.cross_attention_layer_norm(x), cross, cross_mask))
            return x + self.drop(self.ffn(self.ff_layer_norm(x), real))

    class Translator(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c, d = c, c["d_model"]
            self.shared = nn.Embedding(c["vocab_size"], d, padding_idx=PAD)
            self.encoder = nn.ModuleList(Layer(c, i, False) for i in range(c["encoder_layers"]))
            self.decoder = nn.ModuleList(Layer(c, i, True) for i in range(c["decoder_layers"]))
            self.encoder_norm, self.decoder_norm = nn.LayerNorm(d), nn.LayerNorm(d)
            self.drop = Drop(c["dropout"])
            half = d // 2
            rate = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
            angle = torch.arange(c["max_position_embeddings"] + 2).float()[:, None] * rate[None]
            self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)
            for name, p in self.named_parameters():
                if name == "shared.weight":
                    nn.init.normal_(p, std=d**-0.5)
                    p.data[PAD] = 0
                elif name.endswith("router.weight"):
                    nn.init.normal_(p, std=0.02)
                elif p.dim() == 3:
                    for w in p.data:
                        nn.init.xavier_uniform_(w)
                elif p.dim() == 2:
                    nn.init.xavier_uniform_(p)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)
            for layer in [*self.encoder, *self.decoder]:
                if isinstance(layer.ffn, Sparse):
                    nn.init.zeros_(layer.ffn.b1), nn.init.zeros_(layer.ffn.b2)
            for layers in (self.encoder, self.decoder):  # damp what flows into the residual stream
                for layer in layers:
                    for name, p in layer.named_parameters():
                        if name.endswith(("out_proj.weight", "fc2.weight", "w2")):
                            p.data.mul_((2 * len(layers)) ** -0.5)

        def embed(self, ids, past=0):
            x = F.embedding(ids, self.shared.weight, padding_idx=PAD) * math.sqrt(self.c["d_model"])
            return x + self.positions[past + 2 : past + 2 + ids.shape[1]]

        def encode(self, ids):
            padded = ids.eq(PAD)
            mask = real = None
            if padded.any():
                mask = torch.zeros(ids.shape).masked_fill(padded, torch.finfo(torch.float32).min)[:, None, None]
                real = (~padded).view(-1).nonzero()[:, 0]
            x = self.drop(self.embed(ids))
            for layer in self.encoder:
                x = layer(x, mask, real)
            return self.encoder_norm(x), mask

        def decode(self, ids, crosses, cross_mask, caches=None, past=0):
            """Return the hidden states; ids hold no padding in the middle."""
            mask = real = None
            if caches is None:
                n = ids.shape[1]
                mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
                padded = ids.eq(PAD)
                if padded.any():
                    real = (~padded).view(-1).nonzero()[:, 0]
            x = self.drop(self.embed(ids, past))
            for i, layer in enumerate(self.decoder):
                x = layer(x, mask, real, crosses[i], cross_mask, None if caches is None else caches[i])
            return self.decoder_norm(x)

        def crosses(self, memory):
            return [layer.cross_attention.keys(memory) for layer in self.decoder]

        @torch.no_grad()
        def greedy(self, ids, first, most):
            """Translate greedily; `first` holds each row's language code. Returns lists without </s>."""
            memory, cross_mask = self.encode(ids)
            crosses = self.crosses(memory)
            caches = [[None] for _ in self.decoder]
            out = [torch.full((len(ids), 1), EOS), first[:, None]]
            self.decode(out[0], crosses, cross_mask, caches, 0)
            done = torch.zeros(len(ids), dtype=torch.bool)
            for step in range(1, most):
                x = self.decode(out[-1], crosses, cross_mask, caches, step)
                token = F.linear(x[:, -1], self.shared.weight).argmax(-1)
                token = torch.where(done, PAD, token)
                out.append(token[:, None])
                done |= token.eq(EOS)
                if done.all():
                    break
            rows = torch.cat(out[1:], 1).tolist()
            return [[t for t in row if t not in (PAD, EOS)] for row in rows]

    class HeadLoss(torch.autograd.Function):
        """Output layer, softmax and label smoothing in pieces of 512 rows; gradients in the same pass."""

        @staticmethod
        def forward(ctx, h, table, labels, smooth):
            n, size = len(h), len(table)
            low = table.to(h.dtype)
            grad_h, grad_t = torch.empty_like(h), torch.zeros_like(table)
            loss = nll = 0.0
            for a in range(0, n, 512):
                part, y = h[a : a + 512], labels[a : a + 512, None]
                m = len(part)
                if m < 512:
                    part, y = F.pad(part, (0, 0, 0, 512 - m)), F.pad(y, (0, 0, 0, 512 - m))
                z = F.linear(part, low).float()
                right, mean = z.gather(1, y)[:, 0], z.mean(1)
                top = z.amax(1, keepdim=True)
                z = z.sub_(top).exp_()
                total = z.sum(1, keepdim=True)
                lse = (total.log() + top)[:, 0]
                loss += float((lse - (1 - smooth) * right - smooth * mean)[:m].sum())
                nll += float((lse - right)[:m].sum())
                z.div_(total).sub_(smooth / size).scatter_add_(1, y, torch.full((len(y), 1), smooth - 1.0))
                z[m:] = 0
                z = z.to(h.dtype)
                grad_h[a : a + 512] = (z @ low)[:m]
                grad_t += z.t() @ part
            ctx.save_for_backward(grad_h, grad_t)
            return torch.tensor(loss), torch.tensor(nll)

        @staticmethod
        def backward(ctx, g, _):
            grad_h, grad_t = ctx.saved_tensors
            return grad_h * g, grad_t * g, None, None

    return Translator, Sparse, HeadLoss


def to_hf(state: dict) -> dict:
    """Rename and unstack our tensors to those of NllbMoeForConditionalGeneration."""
    out = {"model.shared.weight": state["shared.weight"]}
    for key, value in state.items():
        m = re.match(r"(encoder|decoder)\.(\d+)\.(.*)", key)
        n = re.match(r"(encoder|decoder)_norm\.(.*)", key)
        if n:
            out[f"model.{n[1]}.layer_norm.{n[2]}"] = value
        elif m:
            base = f"model.{m[1]}.layers.{m[2]}."
            stacked = {"ffn.w1": "fc1.weight", "ffn.b1": "fc1.bias", "ffn.w2": "fc2.weight", "ffn.b2": "fc2.bias"}.get(
                m[3]
            )
            if stacked:
                for e, part in enumerate(value):
                    out[f"{base}ffn.experts.expert_{e}.{stacked}"] = part
            else:
                out[base + m[3].replace("ffn.router.weight", "ffn.router.classifier.weight")] = value
    return {k: v.contiguous() for k, v in out.items()}


def from_hf(tensors: dict) -> dict:
    """The other way round."""
    import torch

    out, stacks = {"shared.weight": tensors["model.shared.weight"]}, collections.defaultdict(dict)
    names = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
    for key, value in tensors.items():
        if m := re.match(r"model\.(encoder|decoder)\.layer_norm\.(.*)", key):
            out[f"{m[1]}_norm.{m[2]}"] = value
        elif m := re.match(r"model\.(encoder|decoder)\.layers\.(\d+)\.ffn\.experts\.expert_(\d+)\.(.*)", key):
            stacks[f"{m[1]}.{m[2]}.ffn.{names[m[4]]}"][int(m[3])] = value
        elif m := re.match(r"model\.(encoder|decoder)\.layers\.(\d+)\.(.*)", key):
            out[f"{m[1]}.{m[2]}.{m[3].replace('router.classifier', 'router')}"] = value
    for key, parts in stacks.items():
        out[key] = torch.stack([parts[e] for e in range(len(parts))])
    return out


# --- training --------------------------------------------------------------------------------


class Batches:
    """Endless batches of pairs of like length; where it stands is two numbers."""

    def __init__(self, data: dict, tokens: int, seed: int, epoch: int = 0, at: int = 0):
        self.data, self.tokens, self.seed, self.epoch, self.at = data, tokens, seed, epoch, at
        self.src_at = data["src_len"].cumsum(0).tolist()
        self.tgt_at = data["tgt_len"].cumsum(0).tolist()
        self.src_len, self.tgt_len = data["src_len"].tolist(), data["tgt_len"].tolist()
        self.plan()

    def plan(self) -> None:
        """Lay out an epoch: prose twice, then cut into batches."""
        rnd = random.Random(self.seed * 1000 + self.epoch)
        prose = DOMAINS.index("prose")
        index = [i for i, d in enumerate(self.data["domain"].tolist()) for _ in range(2 if d == prose else 1)]
        rnd.shuffle(index)
        self.batches = []
        src_len, tgt_len = ([-(-n // 4) * 4 for n in lens] for lens in (self.src_len, self.tgt_len))  # few shapes
        for a in range(0, len(index), 20000):
            pool = sorted(
                index[a : a + 20000], key=lambda i: (max(src_len[i], tgt_len[i]), tgt_len[i], src_len[i]), reverse=True
            )
            while pool:
                batch, s, t = [], 0, 0
                while pool:
                    s2, t2 = max(s, src_len[pool[-1]]), max(t, tgt_len[pool[-1]])
                    if batch and (s2 + t2) * (len(batch) + 1) > self.tokens:
                        break
                    batch.append(pool.pop())
                    s, t = s2, t2
                while len(batch) > 8 and len(batch) % 8:
                    pool.append(batch.pop())
                self.batches.append(batch)
        rnd.shuffle(self.batches)

    def __next__(self):
        import torch

        if self.at >= len(self.batches):
            self.epoch, self.at = self.epoch + 1, 0
            self.plan()
        batch = self.batches[self.at]
        self.at += 1
        width = [-(-max(lens[i] for i in batch) // 4) * 4 for lens in (self.src_len, self.tgt_len)]
        src, tgt = (torch.full((len(batch), n), PAD) for n in width)
        for row, i in enumerate(batch):
            n, m = self.src_len[i], self.tgt_len[i]
            src[row, :n] = self.data["src"][self.src_at[i] - n : self.src_at[i]]
            tgt[row, :m] = self.data["tgt"][self.tgt_at[i] - m : self.tgt_at[i]]
        given = torch.cat([torch.full((len(batch), 1), EOS), tgt[:, :-1]], 1)
        given[tgt.eq(PAD)] = PAD
        return src, given, tgt


def held_out(work: Path, each: dict[str, int]) -> dict[str, list[tuple]]:
    """Choose held-out pairs of each part for each language: 4 to 45 words, the same ones every time."""
    rows = [json.loads(line) for line in open(work / "pairs.jsonl") if not line.startswith('["train"')]
    out = {}
    for lang in LANGS:
        out[lang] = []
        for part, n in each.items():
            pool = [r for r in rows if r[0] == part and r[1] == lang and 4 <= len(r[4].split()) <= 45]
            pool = list({r[4]: r for r in pool}.values())
            pool.sort(key=lambda r: hashlib.sha256(r[4].encode()).digest())
            out[lang] += [(part, r[4], r[5]) for r in pool[:n]]
    return out


SMALL = {"handbook": 60, "campaigns": 60, "held-help": 40, "held-software": 20, "held-descriptions": 20}


def translate(model, tok, texts: list[str], lang: str, most: int = 128) -> list[str]:
    """Translate texts greedily, those of like length together."""
    import torch

    ids = [e.ids for e in tok.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = [""] * len(ids)
    for a in range(0, len(order), 50):
        part = order[a : a + 50]
        width = max(len(ids[i]) for i in part)
        block = torch.tensor([ids[i] + [PAD] * (width - len(ids[i])) for i in part])
        first = torch.full((len(part),), tok.token_to_id(LANGS[lang]))
        for i, row in zip(part, model.greedy(block, first, min(most, 2 * width + 12)), strict=True):
            out[i] = tok.decode(row, skip_special_tokens=True)
    return out


def score(model, tok, work: Path, each: dict[str, int], show: int = 0) -> str:
    """Return a table of chrF and BLEU by language and part."""
    from sacrebleu import corpus_bleu, corpus_chrf

    lines = []
    for lang, rows in held_out(work, each).items():
        made = translate(model, tok, [r[1] for r in rows], lang)
        for part in ["all", *each]:
            pick = [i for i, r in enumerate(rows) if part in ("all", r[0])]
            hyp, ref = [made[i] for i in pick], [rows[i][2] for i in pick]
            lines.append(
                f"en-{lang} {part:18s} {len(pick):5d} chrF {corpus_chrf(hyp, [ref]).score:5.1f} BLEU {corpus_bleu(hyp, [ref]).score:5.1f}"
            )
        for k in range(show):
            i = k * len(rows) // show
            lines.append(f"    {rows[i][0]}: {rows[i][1]}\n    -> {made[i]}\n    =  {rows[i][2]}")
    return "\n".join(lines)


def stage_train(args) -> None:
    import torch

    Translator, Sparse, HeadLoss = torch_parts()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    args.ckpt.mkdir(parents=True, exist_ok=True)
    file, spare = args.ckpt / "state.pt", args.ckpt / "state.prev.pt"
    state = None
    if args.resume:
        for candidate in (file, spare):
            if candidate.exists() and state is None:
                try:
                    state = torch.load(candidate, weights_only=True)
                    print(
                        f"going on from {candidate}: step {state['step']}, {state['seconds'] / 60:.0f} min", flush=True
                    )
                except Exception as error:  # a torn file: take the one before
                    print(f"{candidate}: {error}", flush=True)
    elif file.exists():
        raise SystemExit(f"{file} is there: --resume, or remove it")
    config = (
        state["config"]
        if state
        else json.loads((args.init / "config.json").read_text())
        if args.init
        else model_config(args)
    )
    model = Translator(config)
    if args.init and not state:
        from safetensors.torch import load_file

        model.load_state_dict({k: v.float() for k, v in from_hf(load_file(args.init / "model.safetensors")).items()})
    sparse = [m for m in model.modules() if isinstance(m, Sparse)]
    tok = load_tokenizer(args.work / "tokenizer")
    params = list(model.parameters())
    decay = [p for p in params if p.dim() > 1]
    rest = [p for p in params if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.98),
        eps=1e-8,
        fused=True,
    )
    progress = {"step": 0, "seconds": 0.0, "tokens": 0, "sentences": 0, "epoch": 0, "at": 0, "annealed": 0.0}
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema = state["ema"]
        progress = {k: state.get(k, v) for k, v in progress.items()}
        random.seed(args.seed + progress["step"])
        torch.manual_seed(args.seed + progress["step"])
        del state
    data = torch.load(args.work / "train.pt", weights_only=True)
    batches = Batches(data, args.tokens, args.seed, progress["epoch"], progress["at"])
    print(
        f"{sum(p.numel() for p in params):,} parameters, {len(data['lang']):,} pairs, {len(batches.batches)} batches an epoch",
        flush=True,
    )

    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(1))

    def save():
        progress["epoch"], progress["at"] = batches.epoch, batches.at
        new = args.ckpt / "state.new.pt"
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "config": config,
                **progress,
            },
            new,
        )
        if file.exists():
            os.replace(file, spare)
        os.replace(new, file)

    def evaluate():
        model.eval()
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(ema)
        began = time.time()
        table = score(model, tok, args.work, SMALL, show=5)
        print(
            f"--- step {progress['step']}, {progress['seconds'] / 60:.0f} min, averaged weights ({time.time() - began:.0f} s)\n{table}\n---",
            flush=True,
        )
        model.load_state_dict(kept)
        model.train()

    def rate(step, left):
        lr = args.lr * min(step / args.warm_up, math.sqrt(args.hold / max(step, args.hold)))
        return lr * min(1.0, max(left, 0.0)) if left is not None else lr

    model.train()
    names = [k for k, _ in model.named_parameters()]
    averages = [ema[k] for k in names]
    begun, last_save, last_eval = time.time(), time.time(), time.time()
    sums = collections.Counter()
    while not stop:
        began = time.time()
        left = 1 - progress["annealed"] / (60 * args.anneal_minutes) if args.anneal_minutes else None
        if left is not None and left <= 0:
            break
        progress["step"] += 1
        lr = rate(progress["step"], left)
        for group in optimizer.param_groups:
            group["lr"] = lr
        src, given, labels = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            memory, mask = model.encode(src)
            hidden = model.decode(given, model.crosses(memory), mask)
        flat = labels.reshape(-1)
        real = flat.ne(PAD).nonzero()[:, 0]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, real)
        loss, nll = HeadLoss.apply(rows.to(torch.bfloat16), model.shared.weight, flat[real], args.smooth)
        balance = sum(m.balance for m in sparse) / len(sparse)
        (loss / len(real) + args.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        if math.isfinite(float(norm)):
            optimizer.step()
        else:
            sums["skipped"] += 1
        optimizer.zero_grad(set_to_none=True)
        if progress["step"] % 4 == 0:
            keep = min(args.average, (1 + progress["step"]) / (10 + progress["step"])) ** 4
            torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - keep)
        count = int(src.ne(PAD).sum()) + len(real)
        took = min(time.time() - began, 60.0)  # a stopped process does not age
        progress["annealed"] = progress["annealed"] + took if args.anneal_minutes else 0.0
        progress["seconds"] += took
        progress["tokens"] += count
        progress["sentences"] += len(src)
        for key, value in {
            "loss": float(loss.detach()),
            "nll": float(nll.detach()),
            "n": len(real),
            "tokens": count,
            "s": took,
            "balance": float(balance.detach()),
            "norm": float(norm),
            "steps": 1,
        }.items():
            sums[key] += value
        if progress["step"] % args.log_every == 0:
            n = sums["steps"]
            print(
                f"step {progress['step']} epoch {batches.epoch + batches.at / len(batches.batches):.2f} min {progress['seconds'] / 60:.1f} "
                f"loss {sums['loss'] / sums['n']:.3f} nll {sums['nll'] / sums['n']:.3f} balance {sums['balance'] / n:.2f} norm {sums['norm'] / n:.2f} "
                f"lr {lr:.2e} {sums['tokens'] / sums['s']:.0f} tokens/s, {progress['tokens'] / 1e6:.2f} M"
                + (f" skipped {sums['skipped']}" if sums["skipped"] else ""),
                flush=True,
            )
            sums.clear()
        if time.time() - last_save > args.save_minutes * 60:
            save()
            last_save = time.time()
        if time.time() - last_eval > args.eval_minutes * 60:
            evaluate()
            last_eval = time.time()
        if args.steps and progress["step"] >= args.steps:
            break
        if args.minutes and time.time() - begun > args.minutes * 60:
            break
    save()
    evaluate() if not stop else None
    print(f"stopped at step {progress['step']}, saved", flush=True)


# --- afterwards ------------------------------------------------------------------------------


def load_own(args, from_export: bool):
    """Load our modules, from the training checkpoint's averaged weights or from an export."""
    import torch

    Translator, Sparse, _ = torch_parts()
    torch.set_num_threads(args.threads)
    if from_export:
        from safetensors.torch import load_file

        config = json.loads((args.out / "config.json").read_text())
        weights = {k: v.float() for k, v in from_hf(load_file(args.out / "model.safetensors")).items()}
        tok = load_tokenizer(args.out)
    else:
        file = args.ckpt / "state.pt"
        state = torch.load(file, weights_only=True, mmap=True)
        config, weights = state["config"], state["ema"]
        print(f"step {state['step']}, {state['seconds'] / 60:.0f} min, {state['tokens'] / 1e6:.1f} M tokens")
        tok = load_tokenizer(args.work / "tokenizer")
    model = Translator(config)
    model.load_state_dict(weights)
    return model.eval(), tok, Sparse


def stage_eval(args) -> None:
    """Print chrF and BLEU of larger held-out sets, and how each domain and language loads the experts."""
    import torch
    import torch.nn.functional as F

    model, tok, Sparse = load_own(args, args.out.exists() and args.exported)
    each = dict.fromkeys(SMALL, args.sentences)
    print(score(model, tok, args.work, each, show=8))
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, Sparse)}
    loads = {}
    parts = {
        "help": ["handbook", "held-help"],
        "software": ["held-software"],
        "prose": ["campaigns"],
        "descriptions": ["held-descriptions"],
    }
    for lang in LANGS:
        for domain, names in parts.items():
            for m in sparse.values():
                m.counts, m.keep_counts = None, True
            rows = held_out(args.work, dict.fromkeys(names, 150))[lang]
            for i in range(0, len(rows), 25):
                part = rows[i : i + 25]
                src, tgt = (
                    tok.encode_batch([r[1] for r in part]),
                    tok.encode_batch([r[2] for r in part], add_special_tokens=False),
                )
                code = tok.token_to_id(LANGS[lang])
                pad = lambda rows: torch.tensor([r + [PAD] * (max(map(len, rows)) - len(r)) for r in rows])  # noqa: E731
                with torch.no_grad():
                    memory, mask = model.encode(pad([e.ids for e in src]))
                    model.decode(pad([[EOS, code, *e.ids] for e in tgt]), model.crosses(memory), mask)
            loads[lang, domain] = {n: m.counts / m.counts.sum() for n, m in sparse.items()}
    for n in sparse:
        every = torch.stack([v[n] for v in loads.values()])
        mean = every.mean(0)
        print(
            f"{n:16s} all: cv {mean.std(correction=0) / mean.mean():.2f} max {mean.max() / mean.mean():.1f} min {mean.min() / mean.mean():.2f} of even share"
        )
        for lang in LANGS:
            print(
                f"   {lang}: "
                + ", ".join(
                    f"{d} cv {loads[lang, d][n].std(correction=0) * len(mean):.2f} max {loads[lang, d][n].max() * len(mean):.1f}"
                    for d in parts
                )
            )
        cos = lambda a, b: float(F.cosine_similarity(loads[a][n], loads[b][n], dim=0))  # noqa: E731
        print(
            "   cosine fr/de: "
            + ", ".join(f"{d} {cos(('fr', d), ('de', d)):.2f}" for d in parts)
            + "; fr domains: "
            + ", ".join(
                f"{a}/{b} {cos(('fr', a), ('fr', b)):.2f}" for k, a in enumerate(parts) for b in list(parts)[k + 1 :]
            )
        )


def stage_export(args) -> None:
    """Write a Hugging Face checkpoint in bfloat16."""
    import shutil

    import torch
    from safetensors.torch import save_file

    state = torch.load(args.ckpt / "state.pt", weights_only=True, mmap=True)
    weights = {k: v.to(torch.bfloat16) for k, v in to_hf(state["model" if args.raw else "ema"]).items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "model.safetensors").chmod(0o644)
    config = {**state["config"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "max_length": 200,
    }
    (args.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.work / "tokenizer" / name, args.out / name)
    count = sum(v.numel() for v in weights.values())
    experts = sum(v.numel() for k, v in weights.items() if ".experts." in k)
    c = state["config"]
    active = count - experts * (1 - 2 / c["num_experts"])
    facts = {
        "parameters": count,
        "active per token": round(active),
        "expert parameters": experts,
        "bytes": (args.out / "model.safetensors").stat().st_size,
        "steps": state["step"],
        "tokens": state["tokens"],
        "sentence pairs": state["sentences"],
        "epochs": state["epoch"],
        "minutes": round(state["seconds"] / 60),
        "weights": "raw" if args.raw else f"exponential average, {args.average}",
    }
    print(json.dumps(facts, indent=2))
    (args.work / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def stage_verify(args) -> None:
    """Compare our modules with transformers' NllbMoeForConditionalGeneration on the exported checkpoint, in float32."""
    import torch
    import transformers
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    own, tok, _ = load_own(args, True)
    major = int(transformers.__version__.split(".")[0])
    if major >= 5:
        from transformers.models.nllb_moe import modeling_nllb_moe as broken

        def experts(self, hidden, mask, probs):
            out = torch.zeros_like(hidden)
            for e in range(self.num_experts):
                rows = probs[:, e].nonzero()[:, 0]
                if len(rows):
                    out[rows] += probs[rows, e, None] * self[f"expert_{e}"](hidden[rows]) * (1 - self.moe_token_dropout)
            return out

        if not args.unpatched:
            broken.NllbMoeExperts.forward = experts
    model, info = AutoModelForSeq2SeqLM.from_pretrained(args.out, torch_dtype=torch.float32, output_loading_info=True)
    model.eval()
    model.generation_config.max_length = None
    print(
        f"transformers {transformers.__version__}: missing {info['missing_keys']}, unexpected {info['unexpected_keys']}"
    )
    hf_tok = AutoTokenizer.from_pretrained(args.out)
    print(
        type(hf_tok).__name__,
        len(hf_tok),
        hf_tok.convert_ids_to_tokens(hf_tok("The file could not be opened.")["input_ids"]),
    )
    same = total = steps = 0
    worst = 0.0
    for lang, rows in held_out(args.work, dict.fromkeys(SMALL, args.sentences)).items():
        code = tok.token_to_id(LANGS[lang])
        for _, source, target in rows:
            ids = torch.tensor([tok.encode(source).ids])
            assert hf_tok(source)["input_ids"] == ids[0].tolist()
            most = min(128, 2 * ids.shape[1] + 12)
            with torch.no_grad():
                theirs = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    forced_bos_token_id=code,
                    max_new_tokens=most,
                    do_sample=False,
                    num_beams=1,
                )[0].tolist()
            ours = own.greedy(ids, torch.tensor([code]), most)[0]
            got = [t for t in theirs[1:] if t != EOS]
            assert theirs[0] == EOS and hf_tok.decode(ours, skip_special_tokens=True) == tok.decode(ours)
            same += got == ours
            total += 1
            steps += len(ours)
            given = torch.tensor([[EOS, code, *tok.encode(target, add_special_tokens=False).ids]])
            with torch.no_grad():
                a = model(input_ids=ids, decoder_input_ids=given).logits
                memory, mask = own.encode(ids)
                b = torch.nn.functional.linear(own.decode(given, own.crosses(memory), mask), own.shared.weight)
            worst = max(worst, float((a - b).abs().max()))
            if args.show and got != ours:
                print(got, ours, sep="\n")
    print(
        f"greedy float32: {same} of {total} identical, {steps} tokens; logits by teacher forcing: largest difference {worst:.1e} of {float(a.abs().max()):.1f}"
    )
    # a padded batch gives the same as single rows
    rows = held_out(args.work, {"handbook": 12})["fr"]
    ids = [tok.encode(r[1]).ids for r in rows]
    width = max(map(len, ids))
    block = torch.tensor([row + [PAD] * (width - len(row)) for row in ids])
    code = tok.token_to_id("fra_Latn")
    together = own.greedy(block, torch.full((len(ids),), code), 60)
    with torch.no_grad():
        theirs = model.generate(
            input_ids=block,
            attention_mask=block.ne(PAD).long(),
            forced_bos_token_id=code,
            max_new_tokens=60,
            do_sample=False,
        ).tolist()
    theirs = [[t for t in row[1:] if t not in (EOS, PAD)] for row in theirs]
    alone = [own.greedy(torch.tensor([row]), torch.tensor([code]), 60)[0] for row in ids]
    print(f"padded batch of {len(ids)}: own = single {together == alone}, transformers = own {theirs == together}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["data", "tokens", "train", "eval", "export", "verify"])
    here = Path(__file__).resolve().parent
    parser.add_argument("--work", type=Path, default=here / "work", help="folder of packages, text and token ids")
    parser.add_argument("--ckpt", type=Path, default=here / "ckpt", help="folder of the training checkpoint")
    parser.add_argument("--out", type=Path, default=here / "demo-mt", help="folder of the exported checkpoint")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="layers of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=320, help="width of an expert, and of the dense layers")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--longest", type=int, default=160, help="longest source or target in training, in tokens")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eom", type=float, default=0.1, help="expert output masking (moe_token_dropout)")
    parser.add_argument("--smooth", type=float, default=0.1, help="label smoothing")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="source and target tokens of a batch, padding included"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--warm-up", type=int, default=400, help="steps until the highest learning rate")
    parser.add_argument("--hold", type=int, default=3000, help="steps after which it falls with the root of the step")
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights per step")
    parser.add_argument(
        "--anneal-minutes", type=float, default=0, help="train for so long, the learning rate falling to zero"
    )
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long")
    parser.add_argument("--steps", type=int, default=0, help="stop at this step")
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--eval-minutes", type=float, default=20)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--init", type=Path, help="begin from an exported checkpoint: its tokenizer (data) and its weights (train)"
    )
    parser.add_argument("--raw", action="store_true", help="export the last weights, not the averaged ones")
    parser.add_argument("--exported", action="store_true", help="eval: measure --out, not the training checkpoint")
    parser.add_argument("--unpatched", action="store_true", help="verify: leave transformers 5's experts as they are")
    parser.add_argument("--sentences", type=int, default=200, help="held-out sentences of each part")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    if args.stage == "tokens":
        rows = [json.loads(line) for line in open(args.work / "pairs.jsonl")]
        train_tokenizer(args, rows)
        encode_all(args, rows)
    else:
        {"data": stage_data, "train": stage_train, "eval": stage_eval, "export": stage_export, "verify": stage_verify}[
            args.stage
        ](args)


if __name__ == "__main__":
    main()
