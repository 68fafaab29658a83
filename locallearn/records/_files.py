"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_LARGEST_BYTES = 64 * 2**20


def encoded(text: str) -> bytes:
    """UTF-8; a lone surrogate, of a name that is not UTF-8, becomes an escape that JSON reads as what it was."""
    return text.encode("utf-8", "backslashreplace")


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: what stood there before is there until the new content is complete.

    Raises:
        OSError: it cannot be written, with the file's name; nothing half-written is left.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with naming(path), cleared(aside):
        with aside.open("xb", buffering=0) as file:
            write_all(file, content)
            os.fsync(file.fileno())
        os.replace(aside, path)


def write_all(file: IO[bytes], content: bytes) -> None:
    """Writes without a buffer, which would try again, and fail again, when it is closed."""
    while content:
        content = content[file.write(content) :]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system say which file they are about: those of a full disk do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def cleared(aside: Path) -> Iterator[None]:
    """A file that is gone afterwards; that it cannot be deleted hides nothing of why it was not finished."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def plain_file(path: Path, most: int = _LARGEST_BYTES) -> bytes:
    """The content of a file of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a link (which could show any file of this machine), no plain file, too large or not readable.
    """
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no file of its own but a link, a folder or a device")
        if about.st_size > most:
            raise ValueError(f"it has {about.st_size:,} bytes, more than the {most:,} that are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(str(error.strerror)) from None
