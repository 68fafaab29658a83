"""A launcher of Hydra's whose jobs are processes of their own, as those of joblib or of a cluster.

Run as a file it is such a process: ``python apart.py JOB.pickle``.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import version
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, run_job, setup_globals
from hydra.plugins.launcher import Launcher

# A job composes its settings once more, so its process needs it, too.
ConfigStore.instance().store(group="hydra/launcher", name="apart", node={"_target_": "hydra_plugins.apart.Apart"})


class Apart(Launcher):
    """Gives up at the first job whose process leaves no result; what jobs print goes to ``printed.txt``."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        returned = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            file = Path(f"{number}.pickle").absolute()
            job = (number, list(overrides), self.context, self.function, self.config)
            file.write_bytes(pickle.dumps(job))
            with open("printed.txt", "a", encoding="utf-8") as printed:
                command = [sys.executable, __file__, str(file)]
                done = subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"job {number} ended with {done.returncode}")
            returned.append(pickle.loads(file.read_bytes()))
            file.unlink()
        return returned


def offer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it known to Hydra as ``hydra/launcher=apart``."""
    plugins = Plugins.instance()  # imports hydra_plugins where anything is installed there
    # Hydra takes no plugin from outside of this package, whether it has been registered or not.
    package = sys.modules.get("hydra_plugins", ModuleType("hydra_plugins"))
    monkeypatch.setitem(sys.modules, "hydra_plugins", package)
    monkeypatch.setitem(sys.modules, "hydra_plugins.apart", sys.modules[__name__])
    monkeypatch.setattr(package, "apart", sys.modules[__name__], raising=False)
    monkeypatch.setattr(Apart, "__module__", "hydra_plugins.apart")
    plugins.register(Apart)


def _run(file: Path) -> None:
    Plugins.instance()  # before anything of theirs is unpickled, because it imports their modules anew
    version.setbase("1.3")
    setup_globals()
    JobRuntime.instance().set("name", "apart")
    number, overrides, context, function, config = pickle.loads(file.read_bytes())
    own = context.config_loader.load_sweep_config(config, overrides)
    own.hydra.job.num = number
    returned = run_job(
        function, own, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir", hydra_context=context
    )
    file.write_bytes(pickle.dumps(returned))


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
