"""Make a tokenizer.json of a checkpoint's older tokenizer files, as transformers reads them.

Run as `python -P -m collegium.model.convert_tokenizer MODEL_DIR OUT_DIR FILE...`, FILE being the older files that are
there. Runs no code of the checkpoint's. Prints one line and exits with 3 if it cannot.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, cast

FAILED = 3


class ConversionError(Exception):
    """The files cannot be converted; says why."""


def convert(model_dir: Path, out: Path, sources: list[str]) -> None:
    """Write tokenizer.json and what belongs to it to `out`. ConversionError if transformers cannot."""
    if not _is_installed("transformers"):
        raise ConversionError("transformers is not installed here")
    try:
        tokenizer = _read(model_dir)
        size = len(tokenizer)
        if not tokenizer.is_fast:
            raise ConversionError(f"transformers reads it with {type(tokenizer).__name__}, which has no tokenizer.json")
        if size < _num_entries(model_dir, sources):  # some classes begin empty instead of failing
            raise ConversionError(f"transformers' {type(tokenizer).__name__} does not read these files")
        tokenizer.save_pretrained(str(out))
    except ConversionError:
        raise
    except Exception as error:  # whatever a library makes of a stranger's files
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if any(name.endswith(".model") for name in sources) and not _is_installed("sentencepiece"):
            why = "sentencepiece is not installed here"
        raise ConversionError(f"transformers cannot convert it: {why}") from error
    if not (out / "tokenizer.json").is_file():
        raise ConversionError(f"transformers' {type(tokenizer).__name__} wrote no tokenizer.json")


def _read(model_dir: Path) -> Any:
    """Read the tokenizer as AutoTokenizer does, or with the class that the checkpoint names if that fails."""
    import transformers  # here, so that a machine without it is told so

    library: Any = transformers
    try:
        return library.AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, OSError):  # it goes by model_type, whose class may know no such files
        config = model_dir / "tokenizer_config.json"
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.is_file() else None
        reader = getattr(library, str(named).removesuffix("Fast"), None)
        if not (isinstance(reader, type) and issubclass(reader, library.PreTrainedTokenizerFast)):
            raise
        return cast("Any", reader).from_pretrained(str(model_dir), local_files_only=True)


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
        convert(Path(model_dir), Path(out), sources)
    except ConversionError as error:
        sys.stdout.write(str(error))
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
