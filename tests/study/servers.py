"""Database servers of the tests' own, started on sockets in folders of their own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.study.tuning import until


def _programs() -> Path | None:
    """The newest of PostgreSQL's folders of programs."""
    found = [Path(path) for path in (shutil.which("initdb"),) if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].resolve().parent if found else None


@contextmanager
def postgresql() -> Iterator[Callable[[], str]]:
    """A PostgreSQL server; what is given makes a database and tells its URL."""
    psycopg = pytest.importorskip("psycopg", reason="needs psycopg: pip install 'locallearn[postgresql]'")
    programs = _programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's initdb and postgres")

    def connect(folder: Path) -> Any:
        return psycopg.connect(host=str(folder), user="tester", dbname="postgres", autocommit=True)

    def commands(folder: Path) -> tuple[Sequence[Any], Sequence[Any]]:
        data = folder / "data"
        options = ("-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        return (
            (programs / "initdb", "-D", data, *options),
            (programs / "postgres", "-D", data, "-k", folder, "-h", "", "-c", "fsync=off"),
        )

    with _running("PostgreSQL", ("postgres", "nobody"), commands, connect, psycopg.OperationalError) as folder:

        def database() -> str:
            name = f"trials_{time.monotonic_ns()}"
            with connect(folder) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            return f"postgresql://tester@/{name}?host={folder}"

        yield database


@contextmanager
def mariadb() -> Iterator[Callable[[], str]]:
    """A MariaDB server; what is given makes a database and tells its URL."""
    pymysql = pytest.importorskip("pymysql", reason="needs pymysql: pip install 'locallearn[mysql]'")
    programs = [shutil.which(name) for name in ("mariadb-install-db", "mariadbd")]
    if not all(programs):
        pytest.skip("needs MariaDB's mariadb-install-db and mariadbd")

    def socket(folder: Path) -> str:
        return str(folder / "socket")

    def connect(folder: Path) -> Any:
        return pymysql.connect(unix_socket=socket(folder), user="tester")

    def commands(folder: Path) -> tuple[Sequence[Any], Sequence[Any]]:
        data, users = f"--datadir={folder / 'data'}", folder / "users.sql"
        users.write_text("CREATE USER tester@localhost;\nGRANT ALL ON *.* TO tester@localhost;\n")
        return (
            (programs[0], "--no-defaults", data, "--auth-root-authentication-method=normal", "--skip-test-db"),
            (
                *(programs[1], "--no-defaults", data, f"--socket={socket(folder)}", "--skip-networking"),
                *(f"--pid-file={folder / 'pid'}", f"--init-file={users}", "--innodb-flush-log-at-trx-commit=0"),
            ),
        )

    with _running("MariaDB", ("mysql", "nobody"), commands, connect, pymysql.err.OperationalError) as folder:

        def database() -> str:
            name = f"trials_{time.monotonic_ns()}"
            with connect(folder) as connection, connection.cursor() as cursor:
                cursor.execute(f"CREATE DATABASE {name}")
            return f"mysql://tester@localhost/{name}?unix_socket={socket(folder)}"

        yield database


@contextmanager
def _running(
    name: str,
    users: Sequence[str],
    commands: Callable[[Path], tuple[Sequence[Any], Sequence[Any]]],
    connect: Callable[[Path], Any],
    not_yet: type[Exception],
) -> Iterator[Path]:
    """A server that answers, and the folder with all that is its own."""
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # which servers refuse to be run by
        names = {entry.pw_name for entry in pwd.getpwall()}
        found = next((user for user in users if user in names), None)
        if found is None:
            pytest.skip(f"{name} refuses to run as root, and there is no user {' or '.join(users)}")
        user = {"user": found, "group": pwd.getpwnam(found).pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="db-", dir="/tmp"))  # short: a socket's path has a limit
    try:
        make, start = commands(folder)
        if user:
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, user["user"], user["group"])
        made = subprocess.run(make, capture_output=True, text=True, cwd=folder, check=False, **user)
        assert made.returncode == 0, made.stdout + made.stderr
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen(start, stdout=log, stderr=log, cwd=folder, **user) as run,
        ):
            try:

                def answers() -> bool:
                    assert run.poll() is None, (folder / "log").read_text()
                    try:
                        connect(folder).close()
                    except not_yet:
                        return False
                    return True

                until(answers)
                yield folder
            finally:
                # At once, whoever is connected; MariaDB knows no interrupt.
                run.send_signal(signal.SIGINT if name == "PostgreSQL" else signal.SIGTERM)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
