"""Find out at the start whether a checkpoint's chat template can be rendered at all.

A template is a program of a stranger's: it is tried in a child process, with bounds on time and memory.
Run as `python -P -m gateway.template_check FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from collegium.fabric.errors import CollegiumError, DeadlineExceeded, FailedPrecondition
from gateway.children import FAILED, limit_memory, run_child
from gateway.tokenizer import read_template

_LIMIT_S = 10.0  # a short conversation takes milliseconds, and starting the child about half a second
_LIMIT_BYTES = 4 << 30


async def template_fault(folder: Path, *, limit_s: float = _LIMIT_S) -> str:
    """Render a trivial conversation; return what is wrong with the folder's template, nothing if it can be rendered."""
    try:
        await run_child("gateway.template_check", (str(folder),), limit_s=limit_s)
    except DeadlineExceeded as error:
        return f"one short message was not rendered: {error.message}"
    except FailedPrecondition as error:
        return error.message
    return ""


def main() -> int:
    """Check the template of the folder named on the command line; say what is wrong with it."""
    limit_memory(_LIMIT_BYTES)
    try:
        template = read_template(Path(sys.argv[1]))
        if template is not None:
            template.check()
    except CollegiumError as error:
        sys.stdout.write(error.message)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
