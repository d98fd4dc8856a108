"""Make a tokenizer.json of a checkpoint's older tokenizer files, as transformers reads them.

Run as `python -P -m collegium.model.convert_tokenizer MODEL_DIR OUT_DIR FILE...`, FILE being the older files that are
there. Runs no code of the checkpoint's. Prints the class that read them, if it was a guess; or why none can, and exits
with 3.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

FAILED = 3
_CONFIG = "tokenizer_config.json"


class ConversionError(Exception):
    """The files cannot be converted; says why."""


def convert(model_dir: Path, out: Path, sources: list[str]) -> str:
    """Write tokenizer.json and what belongs to it to `out`. Returns the class that read them, if it was a guess, or "".

    Files that AutoTokenizer cannot read are tried with the class that the checkpoint names, then, if their vocabulary
    is one of bytes, with its model type's or GPT-2's. ConversionError with AutoTokenizer's reason if all fail.
    """
    if not _is_installed("transformers"):
        raise ConversionError("transformers is not installed here")
    failure: ConversionError | None = None
    for reader in _readers(model_dir, sources):
        try:
            _convert_with(reader, model_dir, out, sources)
        except ConversionError as error:
            failure = failure or error
        else:
            named = _text_field(model_dir / _CONFIG, "tokenizer_class").removesuffix("Fast")
            return "" if failure is None or reader.__name__ == named else reader.__name__
    assert failure is not None
    raise failure


def _readers(model_dir: Path, sources: list[str]) -> Iterator[Any]:
    """Yield classes that may read the files, AutoTokenizer first."""
    import transformers  # here, so that a machine without it is told so

    library: Any = transformers
    yield library.AutoTokenizer
    # It goes by model_type where it has a class for it, and by a class that the checkpoint may name wrongly.
    names = [_text_field(model_dir / _CONFIG, "tokenizer_class").removesuffix("Fast")]
    if {"vocab.json", "merges.txt"} <= set(sources) and _has_bytes(model_dir / "vocab.json"):
        is_qwen = _text_field(model_dir / "config.json", "model_type").startswith("qwen")
        names.append("Qwen2Tokenizer" if is_qwen else "GPT2Tokenizer")
    for name in names:
        reader = getattr(library, name, None)
        if isinstance(reader, type) and issubclass(reader, library.PreTrainedTokenizerFast):
            yield reader


def _convert_with(reader: Any, model_dir: Path, out: Path, sources: list[str]) -> None:
    try:
        tokenizer = reader.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
        name = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ConversionError(f"transformers reads it with {name}, which has no tokenizer.json")
        if len(tokenizer) < _num_entries(model_dir, sources):  # some classes begin empty instead of failing
            raise ConversionError(f"transformers' {name} does not read these files")
        tokenizer.save_pretrained(str(out))
        _forget_class(out / _CONFIG)
    except ConversionError:
        raise
    except Exception as error:  # whatever a library makes of a stranger's files
        raise ConversionError(_told(error, sources)) from error
    if not (out / "tokenizer.json").is_file():
        raise ConversionError(f"transformers' {name} wrote no tokenizer.json")


def _told(error: Exception, sources: list[str]) -> str:
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if any(name.endswith(".model") for name in sources) and not _is_installed("sentencepiece"):
        why = "sentencepiece is not installed here"
    return f"transformers cannot convert it: {why}"


def _forget_class(config: Path) -> None:
    """Name no class that would build the tokenizer's steps anew: tokenizer.json has all of them."""
    if config.is_file():
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(fields, ensure_ascii=False, indent=2), encoding="utf-8")


def _text_field(path: Path, name: str) -> str:
    """Read a text from a JSON file; "" if there is none."""
    value = _json(path).get(name)
    return value if isinstance(value, str) else ""


def _has_bytes(vocab: Path) -> bool:
    """Return True if tokens are runs of bytes in disguise, in which a space is a Ġ."""
    return any("Ġ" in token for token in _json(vocab))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _num_entries(model_dir: Path, sources: list[str]) -> int:
    """Return the least number of tokens that a tokenizer of these files has."""
    if "vocab.json" in sources:
        return len(json.loads((model_dir / "vocab.json").read_text(encoding="utf-8")))
    if "vocab.txt" in sources:
        return len(set((model_dir / "vocab.txt").read_text(encoding="utf-8").splitlines()))
    return 16


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def main() -> int:
    """Convert what the command line names."""
    model_dir, out, *sources = sys.argv[1:]
    try:
        sys.stdout.write(convert(Path(model_dir), Path(out), sources))
    except ConversionError as error:
        sys.stdout.write(str(error))
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
