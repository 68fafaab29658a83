"""Where a search is kept, and who takes part in it: files shared by locks, databases shared by heartbeats.

A trial whose process has died must be found, run again and counted once. On files, locks of the operating system tell who
lives (``_workers``). On a database they cannot, so Optuna's heartbeats do: a running trial's time is renewed in the
database, by the database's clock, and a trial whose time is old is free. Whoever takes a trial does so alone, under a lock
that ends with its process or its connection.
"""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import optuna
import sqlalchemy
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial
from sqlalchemy.pool import NullPool

from locallearn.study._workers import Worker, lock

T = TypeVar("T")

JOURNALS = (".journal", ".log", ".jsonl")
"""Endings of a storage's name that mean Optuna's journal."""

# One lock for whoever takes a trial from this database; the number is ours alone. PostgreSQL waits for it however long. MySQL
# and MariaDB answer 1 where it is held, 0 when the seconds are over, NULL otherwise; MariaDB has no word for "however long".
_ALONE = {
    "postgresql": "SELECT pg_advisory_xact_lock(5487120163)",
    "mysql": "SELECT GET_LOCK('locallearn.tune', 60)",
    "mariadb": "SELECT GET_LOCK('locallearn.tune', 60)",
}
# Heartbeats may come late by two of themselves before their trial is taken for dead.
_GRACE = 3
# A database that was restarted is back after seconds; a training of hours must not end with it.
_PATIENCE_S = 60.0


class Shared(Protocol):
    """A storage that several processes search on; use it in a ``with`` statement."""

    base: optuna.storages.BaseStorage
    name: str
    """Of this process among those that search."""

    def __enter__(self) -> Shared: ...
    def __exit__(self, *_: object) -> None: ...

    def alone(self) -> AbstractContextManager[None]:
        """No other process is in here meanwhile."""

    def left(self, study: optuna.Study, running: Sequence[FrozenTrial]) -> set[int]:
        """Numbers of those unfinished trials that nobody runs any more."""

    def beat(self, trial: Trial) -> None:
        """Say that the trial is run by this process now."""

    def alive(self, trial: Trial) -> AbstractContextManager[None]:
        """The trial is run by this process meanwhile."""

    def patiently(self, do: Callable[[], T]) -> T:
        """Do something with the storage, again where it was away for a moment."""


def shared(storage: Path | str, heartbeat_s: int = 60) -> Shared:
    """The storage of a search.

    Args:
        storage: a path, or a text: an URL as Optuna takes it (``sqlite:///FILE``, ``postgresql://USER@HOST/DATABASE``),
            ``journal:///FILE``, or a file's name: one that ends in :data:`JOURNALS` is a journal, any other SQLite.
        heartbeat_s: seconds between two signs of life of a trial in a database.

    Raises:
        ValueError: nothing that can be shared, its driver is not installed, or it cannot be reached.
    """
    file = file_of(storage)
    if file is None:
        return _Database(str(storage), heartbeat_s)
    if isinstance(storage, Path):
        return _Files(file, journal=False)
    scheme, found, _ = storage.partition("://")
    return _Files(file, journal=scheme == "journal" if found else file.suffix in JOURNALS)


def file_of(storage: Path | str) -> Path | None:
    """The file that a storage is; ``None``: a database that is none.

    Raises:
        ValueError: an URL of a file that names none.
    """
    if isinstance(storage, Path):
        return storage
    scheme, found, rest = storage.partition("://")
    if not found:
        return Path(storage).expanduser()
    if scheme not in ("sqlite", "journal"):
        return None
    if not rest.strip("/") or ":memory:" in rest or "?" in rest:
        raise ValueError(f"tune.storage is {storage}, expected a file that keeps the trials: {scheme}:///FILE")
    return Path(rest.removeprefix("/")).expanduser()


def masked(storage: str) -> str:
    """A storage's name without its password."""
    if "://" not in storage:
        return storage
    try:
        return sqlalchemy.make_url(storage).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return storage.partition("://")[0] + "://***"


class _Files:
    """SQLite, or Optuna's journal: shared by the processes of one machine, or of all that its file locks reach."""

    def __init__(self, path: Path, journal: bool) -> None:
        self._path = path
        self._journal = journal
        self._worker = Worker(path)
        self.name = self._worker.name
        self.base: optuna.storages.BaseStorage

    def __enter__(self) -> _Files:
        self._worker.__enter__()
        try:
            with self.alone():  # tables are made once
                self.base = self._open()
        except BaseException:
            self._worker.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()
        if isinstance(self.base, RDBStorage):
            self.base.remove_session()
            self.base.engine.dispose()

    def _open(self) -> optuna.storages.BaseStorage:
        try:
            if self._journal:
                path = str(self._path)
                return JournalStorage(JournalFileBackend(path, lock_obj=_JournalLock(path)))
            # The path is handed over as a path, since in a URL ``?``, ``#`` and ``{`` mean something.
            return RDBStorage("sqlite:///tune.sqlite", engine_kwargs={"creator": self._connect})
        except (sqlalchemy.exc.DatabaseError, ValueError) as error:
            kind = "journal" if self._journal else "SQLite database"
            raise ValueError(
                f"{self._path} is no {kind} of Optuna ({_first(error)}): choose another tune.storage, or move the file away"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60, check_same_thread=False)

    def alone(self) -> AbstractContextManager[None]:
        return self._worker.alone()

    def left(self, study: optuna.Study, running: Sequence[FrozenTrial]) -> set[int]:
        return {trial.number for trial in running if not self._worker.is_at_work(trial.user_attrs.get("worker"))}

    def beat(self, trial: Trial) -> None:
        """Nothing is to be said: this process's lock does."""

    def alive(self, trial: Trial) -> AbstractContextManager[None]:
        return nullcontext()

    def patiently(self, do: Callable[[], T]) -> T:
        return do()


class _JournalLock(JournalFileOpenLock):
    """Optuna's own locks outlive a process that was killed, by half a minute; the kernel's do not."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        self._held = os.open(f"{self._path}.lock", os.O_CREAT | os.O_RDWR)
        lock(self._held)
        _mend(self._path)
        return True

    def release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _mend(path: str) -> None:
    """Take away a last line that a full disk or a machine's end has cut short: the next one would be joined to it."""
    with suppress(FileNotFoundError), open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


class _Database:
    """A database server: shared by every machine that reaches it."""

    def __init__(self, storage: str, heartbeat_s: int) -> None:
        try:
            url = _with_driver(sqlalchemy.make_url(storage))
            statement = _ALONE.get(url.get_backend_name())
        except (sqlalchemy.exc.ArgumentError, ValueError) as error:
            raise ValueError(f"tune.storage is {masked(storage)}, which is no URL of a database") from error
        self._where = masked(storage)
        if statement is None:
            raise ValueError(
                f"tune.storage is {self._where}: expected postgresql://, mysql://, sqlite:///FILE or journal:///FILE"
            )
        self._statement = sqlalchemy.text(statement)
        self._url = url
        self._heartbeat_s = heartbeat_s
        self.name = uuid.uuid4().hex
        self.base: optuna.storages.BaseStorage
        self._database: RDBStorage
        try:
            self._locks = sqlalchemy.create_engine(url, poolclass=NullPool)
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            extra = f"pip install 'locallearn[{'postgresql' if url.get_backend_name() == 'postgresql' else 'mysql'}]'"
            raise ValueError(f"tune.storage is {self._where}, whose driver is not here ({error}): {extra}") from error

    def __enter__(self) -> _Database:
        try:
            with self.alone(), warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats, since 2021
                self.base = self._database = RDBStorage(
                    self._url.render_as_string(hide_password=False),
                    # Few connections are kept, since there may be many workers; they may have ended when they are needed again.
                    engine_kwargs={"pool_size": 2, "pool_pre_ping": True},
                    heartbeat_interval=self._heartbeat_s,
                    grace_period=_GRACE * self._heartbeat_s,
                )
        except (sqlalchemy.exc.DatabaseError, sqlalchemy.exc.InterfaceError) as error:
            raise ValueError(f"tune.storage {self._where} cannot be used: {_first(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._database.remove_session()
        self._database.engine.dispose()
        self._locks.dispose()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._locks.connect() as connection:
            while (held := connection.execute(self._statement).scalar()) == 0:
                pass  # somebody else is in there for longer
            if held is None:
                raise ValueError(
                    f"tune.storage {self._where} gives no lock, without which a trial would be taken twice"
                )
            yield

    def left(self, study: optuna.Study, running: Sequence[FrozenTrial]) -> set[int]:
        # A trial without a worker's name is one that was being taken, and whoever asks here is alone.
        stale = set(
            self._database._get_stale_trial_ids(study._study_id)
        )  # Optuna's public way would fail them for good
        return {trial.number for trial in running if "worker" not in trial.user_attrs or trial._trial_id in stale}

    def beat(self, trial: Trial) -> None:
        self._database.record_heartbeat(trial._trial_id)

    @contextmanager
    def alive(self, trial: Trial) -> Iterator[None]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._heartbeat_s):
                with suppress(sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
                    self.beat(trial)

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def patiently(self, do: Callable[[], T]) -> T:
        deadline, pause = time.monotonic() + _PATIENCE_S, 0.5
        while True:
            try:
                return do()
            except (sqlalchemy.exc.OperationalError, optuna.exceptions.StorageInternalError):
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
                pause *= 2


def _with_driver(url: sqlalchemy.URL) -> sqlalchemy.URL:
    """The URL as it is, or with the driver that is here where none was named."""
    if url.drivername in ("postgres", "postgresql"):
        drivers = [name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)]
        return url.set(drivername=f"postgresql+{drivers[0] if drivers else 'psycopg'}")
    if url.drivername in ("mysql", "mariadb") and not importlib.util.find_spec("MySQLdb"):
        return url.set(drivername=f"{url.drivername}+pymysql")
    return url


def _first(error: Exception) -> str:
    """The first line of what a database said."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
