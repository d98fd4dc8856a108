"""Find the tokenizer of a checkpoint, and have transformers convert it if it is not a tokenizer.json.

Owns the names of the older files, and the cache of what was made of them. The conversion is done by a child process,
since a gateway itself does without transformers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import collegium
from collegium.fabric import logs
from collegium.fabric.errors import CollegiumError, FailedPrecondition
from collegium.model.cache_root import cache_file

TOKENIZER = "tokenizer.json"
_VERSION = 2
_LIMIT_S = 300.0  # transformers and torch are imported, from a cold disk in tens of seconds
# What transformers' tokenizer classes read, newest first.
_SOURCES = (
    *("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model", "sentencepiece.model", "bpe.codes"),
)
_ALSO_READ = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FAILED = 3  # the child's exit status if it has said why
_MAX_CHARS = 500  # of what a child says
_ROOT = str(Path(collegium.__file__).resolve().parent.parent)
_log = logs.get("gateway")


async def tokenizer_folder(model_dir: Path) -> Path | None:
    """Return the folder with the checkpoint's tokenizer.json: its own, or one that was converted to.

    None if there is no tokenizer or it cannot be converted; then one line at level warning has said why.
    """
    if (model_dir / TOKENIZER).is_file():
        return model_dir
    sources = [name for name in _SOURCES if (model_dir / name).is_file()]
    if not sources:
        _log.warning("this checkpoint has no tokenizer: requests need token_ids", model=model_dir)
        return None
    try:
        return await _converted(model_dir, sources)
    except (CollegiumError, OSError) as error:
        _log.warning(
            "this checkpoint has no tokenizer.json, so requests need token_ids",
            model=model_dir,
            found=", ".join(sources),
            conversion=str(error),
            remedy=_remedy(sources),
        )
        return None


def _remedy(sources: Sequence[str]) -> str:
    call = "AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)"
    if any(name.endswith(".model") for name in sources):
        return f"convert it once where transformers and sentencepiece are installed: {call}"
    return f"name its class in tokenizer_config.json (tokenizer_class), or convert it where {call} works"


async def _converted(model_dir: Path, sources: Sequence[str]) -> Path:
    path, partial = _places(model_dir, sources)
    if partial is None:
        return path
    try:
        arguments = (str(model_dir), str(partial), *sources)
        reader = await run_child("collegium.model.convert_tokenizer", arguments, limit_s=_LIMIT_S)
        _move(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = ", ".join(sources)
    _log.info("tokenizer converted", model=model_dir, found=found, folder=path)
    if reader:
        _log.warning(
            "transformers' AutoTokenizer cannot read this checkpoint's tokenizer; another class was taken",
            model=model_dir,
            found=found,
            tokenizer_class=reader,
            remedy="name the right class in tokenizer_config.json (tokenizer_class)",
        )
    return path


def _places(model_dir: Path, sources: Sequence[str]) -> tuple[Path, Path | None]:
    """Return where the converted tokenizer belongs, and where to make it; None if it is there already."""
    name = _digest(model_dir.resolve(), sources)
    path = cache_file(f"tokenizers/{name}/{TOKENIZER}").parent
    if (path / TOKENIZER).is_file():
        return path, None
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, Path(tempfile.mkdtemp(prefix="partial-", dir=path.parent))


def _move(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError:
        if not (path / TOKENIZER).is_file():  # else another gateway was faster
            raise


def _digest(model_dir: Path, sources: Sequence[str]) -> str:
    names = [*sources, *_ALSO_READ, "chat_template.jinja"]
    stats = {name: (model_dir / name).stat() for name in names if (model_dir / name).is_file()}
    files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    try:
        library = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        library = ""
    form = json.dumps([_VERSION, library, str(model_dir), files])
    return hashlib.blake2b(form.encode(), digest_size=12).hexdigest()


async def run_child(module: str, arguments: Sequence[str], *, limit_s: float) -> str:
    """Run `python -P -m module arguments`; return its words, and raise FailedPrecondition with them if it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": _ROOT, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        start_new_session=True,  # signals of a terminal are for the gateway
    )
    try:
        async with asyncio.timeout(limit_s):
            said, _ = await process.communicate()
    except TimeoutError:
        raise FailedPrecondition(f"it took longer than {limit_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    words = said.decode(errors="replace").strip()
    if process.returncode != 0:
        if process.returncode != _FAILED or not words:
            words = f"its process exited with status {process.returncode}"
        raise FailedPrecondition(words[:_MAX_CHARS])
    return words
