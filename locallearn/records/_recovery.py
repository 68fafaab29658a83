"""What killed processes left, brought to its end."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from locallearn.records._folder import RunFolder, stem, tidy
from locallearn.records._keys import ENDINGS, LOCK, UNRECORDED
from locallearn.records._lock import Lock, alone
from locallearn.records._reading import Record, read_json


def recover(runs_dir: Path, tell: Callable[[str], None] | None = None) -> list[Path]:
    """Gives the folders of killed runs their final name, and clears away what killed processes left half-written.

    A folder is taken only if its lock can be had, that is if no process works on it any more. Its status becomes
    ``interrupted``, unless the run had ended already and only the new name was missing. Of two that recover at the same
    moment one adopts a folder.

    Args:
        runs_dir: the folder of all runs.
        tell: told one sentence for every folder that nobody owns and that could not be adopted, with the reason.

    Returns:
        The final paths of the folders that were adopted.
    """
    adopted: list[Path] = []
    for path in sorted(runs_dir.glob(".*.part")):
        try:
            final = _adopt(path)
        except (OSError, ValueError) as error:
            if tell is not None and os.path.lexists(path):
                tell(f"{path} is left as it is: {error}")
        else:
            if final is not None:
                adopted.append(final)
    _tidy_all(runs_dir)
    return adopted


def _adopt(path: Path) -> Path | None:
    """Finishes one part folder; ``None`` when its owner lives.

    Raises:
        ValueError: there is nothing to adopt, or it leads elsewhere.
        OSError: it cannot be locked or written.
    """
    if path.is_symlink() or not path.is_dir():
        raise ValueError("it is no folder, or a link to one, and links are not followed.")
    try:
        lock = Lock.take(path / LOCK)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            raise ValueError(
                f"its place has no file locks ({error.strerror}), so nobody can tell whether its process still runs; if it "
                f"does not, rename the folder to {stem(path)}."
            ) from None
        raise
    if lock is None:
        return None
    try:
        if not os.path.lexists(path / "record.json"):
            raise ValueError(UNRECORDED)
        if (path / "record.json").is_symlink():
            raise ValueError("its record.json is a link, and links are not followed.")
        data = read_json(path)
        ended = data.get("status") in ENDINGS and data.get("id") == stem(path)
        data["id"] = stem(path)
        folder = RunFolder(path, data, lock)
        if ended:
            return folder._publish()
        if data.get("status") in ENDINGS:
            return folder.finish(str(data["status"]), Record(path, data).text("error"))
        return folder.finish("interrupted", "The process was killed before the run ended.")
    except BaseException:
        lock.release(remove=True)
        raise


def _tidy_all(runs_dir: Path) -> None:
    """The last steps of runs that were killed after they had got their name, and unfinished indices."""
    for path in runs_dir.glob("[!.]*/" + LOCK):
        folder = path.parent
        if folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            lock = Lock.take(path)
            if lock is None:
                continue
            with contextlib.suppress(ValueError):
                tidy(folder, done=read_json(folder).get("status") == "done")
            lock.release(remove=True)
    if next(runs_dir.glob(".index.*"), None) is None:
        return
    with alone(runs_dir, wait_s=0.0) as undisturbed:
        for path in runs_dir.glob(".index.*") if undisturbed else ():
            with contextlib.suppress(OSError):
                path.unlink()
