"""`collegium manifest`: record where a checkpoint's experts lie, with a checksum each, for the workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from collegium.cli import target as t
from collegium.cli.preflight import check_model_dir
from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from collegium.model.cache_root import cache_notice
from collegium.model.manifest import ManifestPathError, ensure_manifest


def manifest(
    model_dir: Annotated[Path, typer.Argument(help="Folder of the checkpoint.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: the cache.")] = None,
    shared_experts: t.SharedExperts = "router",
) -> None:
    """Write a checkpoint's manifest, or find the one that was written before; prints its path."""
    check_model_dir(model_dir)
    notice = cache_notice() if out is None else ""
    if notice:
        sys.stderr.write(f"manifest | {notice}\n")
    columns = (TextColumn("manifest"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task("manifest", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        try:
            shares = t.read_shared_experts(shared_experts)
            path = ensure_manifest(model_dir, out=out, progress=show, shares=shares)
        except ManifestPathError as error:
            field = "--out" if out is not None else "XDG_CACHE_HOME"
            raise FailedPrecondition(str(error), reason="MANIFEST_PATH", field=field) from error
        except ValueError as error:  # CheckpointError, UnsupportedModelError
            raise InvalidArgument(str(error), reason="CHECKPOINT", field="MODEL_DIR") from error
    t.print_line(str(path))
