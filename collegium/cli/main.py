"""The command `collegium`: which subcommands there are, and how errors end them.

Owns exit statuses: 0 done, 1 refused or failed (one line on stderr that begins with the canonical status), 2 a wrong
command line, 130 interrupted. Commands of services' extras are imported only when they are asked for.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import typer
from rich.markup import escape

from collegium.cli.complaint import told
from collegium.cli.generate import generate
from collegium.cli.scale import scale
from collegium.cli.score import score
from collegium.cli.status import status
from collegium.cli.top import top
from collegium.cli.translate import translate
from collegium.fabric import streams
from collegium.fabric.errors import CollegiumError, SettingsError

# Commands that need more than the base package: where they are.
_LAZY: Mapping[str, str] = {
    "up": "collegium.cli.up",
    "manifest": "collegium.cli.manifest",
    "plan": "collegium.cli.plan",
    "replay": "collegium.cli.replay",
    "trace": "collegium.cli.trace",
}
_HERE: Mapping[str, Callable[..., None]] = {
    "generate": generate,
    "score": score,
    "scale": scale,
    "status": status,
    "top": top,
    "translate": translate,
}
_INTERRUPTED = 130
# Nobody reads the output, or there is no room for it.
_NOT_WRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_INSTALL = "run pip install '.[all]' in a checkout of the project"


def build(argv: Sequence[str]) -> typer.Typer:
    """Make the command for this command line: lazy commands are loaded only where they may be meant."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Serve Mixture-of-Experts models as a cluster, and talk to one.",
    )
    meant = next((word for word in argv if not word.startswith("-")), None)
    for name, module in _LAZY.items():
        if meant == name or meant not in (*_HERE, *_LAZY):
            _add_lazy(app, name, module)
    for name, command in _HERE.items():
        app.command(name)(command)
    return app


def main() -> int:
    """Run the command line of this process; gives its exit status."""
    streams.prepare()
    try:
        status = _run()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        if error.errno != errno.EPIPE:
            streams.complain(f"collegium: the output cannot be written: {error.strerror}")
        streams.silence()  # as far as anything is left to say
        return 1
    return status


def _run() -> int:
    try:
        build(sys.argv[1:])()
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            return _complain("interrupted", _INTERRUPTED)
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except SettingsError as error:
        return _complain(str(error), 2)
    except CollegiumError as error:
        return _complain(told(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted", _INTERRUPTED)
    return 0


def _add_lazy(app: typer.Typer, name: str, module: str) -> None:
    try:
        command: Callable[..., None] = getattr(import_module(module), name)
    except ImportError as error:
        why = str(error)
    else:
        app.command(name)(command)
        return

    def refuse() -> None:
        raise SettingsError(f"`{name}` needs more than the base package ({why}); {_INSTALL}")

    unchecked = {"ignore_unknown_options": True, "allow_extra_args": True}
    needs = escape(f"Needs more than the base package; {_INSTALL}.")
    app.command(name, help=needs, context_settings=unchecked)(refuse)


def _complain(text: str, exit_status: int) -> int:
    streams.complain(f"collegium: {text}")
    return exit_status
