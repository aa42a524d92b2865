"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, suffix: str | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary file (or folder) beside `path` that takes its place once the block is done.

    A reader, a crash or a full disk never meets half a file: if the block fails, nothing is left
    and an existing file is kept.

    Args:
        suffix: what the file's name must end with, ``".nc"``, say.
        overwrite: replace what exists; otherwise it is refused.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        FileNotFoundError: the folder that `path` lies in does not exist.
        ValueError: another suffix.
    """
    path = Path(path)
    if suffix is not None and path.suffix != suffix:
        raise ValueError(f"{path.name!r} does not end in {suffix!r}, the suffix of this format")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to save {path.name} in; make it first")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    # Beside the target, for a move is atomic within one file system only.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    old = partial.with_suffix(".old")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as written:
                os.fsync(written.fileno())
        else:
            _open_to_others(partial)
            if path.is_dir():
                os.replace(path, old)  # a folder that is not empty cannot be replaced in one move
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (partial, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _open_to_others(folder: Path) -> None:
    """Let whom the umask lets read a folder read its files; safetensors keeps its own to their owner."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with suppress(OSError):  # a file system that has no permissions
                file.chmod(mode)


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: a file that is not JSON, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found
