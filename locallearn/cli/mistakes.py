"""What went wrong, in one sentence for the user and with an exit code."""

from __future__ import annotations

import errno
import pickle
import re
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from locallearn.cli.settings import GROUPS, PLACES, UsageError, compose_settings, options, setting_names, takes_mapping

_FULL = (errno.ENOSPC, errno.EDQUOT)  # no room, or none left for this user


def explain(error: Exception, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and one sentence for whatever went wrong."""
    if isinstance(error, UsageError):
        return 2, str(error)  # at once: what follows takes a second to import, and Lightning many
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, InstantiationException):
        return 2, _instantiation(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 2, _configuration(error, words)
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from locallearn.strategies.local import Diverged
    from locallearn.study.train import CHECKPOINT, Interrupted

    text = str(error).strip()
    if isinstance(error, Interrupted):
        folder = error.run_folder
        if error.ended is not None:
            return 130, f"interrupted when the training was over: the run is done, {folder} holds all of it"
        if folder is None or not (folder / CHECKPOINT).is_file():
            return 130, "interrupted before there was anything to go on from"
        return 130, f"interrupted; go on with: locallearn train resume={folder}"
    if isinstance(error, Diverged):
        return 1, text
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        return 2, _unusable(error)
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's own message advises to run what is in the file
        return 2, "a file cannot be read as tensors: it is damaged, or holds Python objects, which are never loaded"
    if isinstance(error, ValueError | FileNotFoundError | MisconfigurationException):
        return 2, _without_advice(_one_line(text))
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}; --debug shows all"
    return 1, f"{type(error).__name__}: {_one_line(text) or 'no message'} ({place})"


def _unusable(error: OSError) -> str:
    """A file that cannot be read or written: which, what is lost, and how to go on."""
    from locallearn.study.train import CHECKPOINT

    full = error.errno in _FULL
    file = error.filename2 or error.filename or "a file"  # of a copy or a new name: where it was going
    what = f"{file} cannot be used ({error.strerror})"
    if full:
        what = f"the disk is full: {file} could not be written ({error.strerror})"
    folder = getattr(error, "run_folder", None)
    if folder is None:
        return what + (
            "; make room, or choose another runs_dir or place for the report; nothing that was there before is lost"
            if full
            else ": choose another runs_dir, data_dir or place for the report"
        )
    if (folder / CHECKPOINT).is_file():
        return (
            f"{what}; {folder} keeps the run up to its last checkpoint, and what came after it is lost: when the place can be "
            f"written again, go on with: locallearn train resume={folder}"
        )
    return (
        f"{what}; {folder} keeps the figures so far, but there was no checkpoint yet, so the run has to start again when "
        "the place can be written"
    )


def _without_advice(text: str) -> str:
    """Without what PyTorch says about files it does not take, which is how to have it run what is in them."""
    return re.sub(r"Weights only load failed.*?(?=\)|$)", "it holds more than tensors", text)


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _instantiation(error: Exception) -> str:
    cause = error.__cause__
    key = re.search(r"full_key: (\S+)", str(error))
    at = f"{key.group(1)}: " if key else ""
    unknown = re.search(r"unexpected keyword argument '([^']+)'", str(cause))
    if unknown:
        return f"{at}there is no setting {unknown.group(1)!r} here"
    return f"{at}{_one_line(str(cause or error))}"


def _configuration(error: Exception, words: Sequence[str]) -> str:
    """Hydra's own message as one sentence that lists the right names."""
    text = str(error)
    missing = re.search(r"Could not find '([^/']+)/([^']*)'", text)
    if missing and missing.group(1) in GROUPS:
        group, name = missing.groups()
        return f"there is no {group} {name!r}; {group} is one of {', '.join(options(group))}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        given = getattr(error, "overrides", words)
        return _inside_a_mapping(unknown.group(1), given) or _unknown_key(unknown.group(1), given)
    absent = re.search(r"Interpolation key '([^']+)' not found", text)
    if absent:
        return f"a setting is taken from {absent.group(1)!r}, which is not there: these choices do not go together"
    unread = getattr(error, "override", None)  # what Hydra's parser of overrides stumbled on
    if unread is not None:
        bare = re.search(
            r"""[\[,]\s*(\w+\([^()]*\))""", unread
        )  # an algorithm with settings, whose quotes a shell takes away
        if bare and '"' not in unread:
            whole = unread.replace(bare[1], f'"{bare[1]}"')
            return (
                f"{unread!r} cannot be read: what has brackets of its own stands in double quotes, and all of it in single "
                f"ones, because shells take quotes away: '{whole}'"
            )
        return f"{unread!r} cannot be read as KEY=VALUE: close brackets, and put text with signs in it into quotes"
    return _one_line(text.partition("full_key")[0])


def _chosen(words: Sequence[str]) -> list[str]:
    """The words that choose from a group, of several choices the first, and the places where Hydra looks for choices."""
    chosen = [word.partition(",")[0] for word in words if word.partition("=")[0] in GROUPS]
    return [*chosen, *(word for word in words if word.startswith(PLACES))]


def _inside_a_mapping(key: str, words: Sequence[str]) -> str | None:
    """How to give what belongs into a mapping that is empty by default; ``None`` where the key lies in none."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(compose_settings(_chosen(words))[0])
    assert isinstance(settings, dict)
    group, _, rest = key.partition(".")
    mapping, *inner = rest.split(".")
    made = settings.get(group)
    if not inner or not isinstance(made, dict) or made.get(mapping, 0) not in (None, {}):
        return None
    if not takes_mapping(str(made.get("_target_")), mapping):
        return None
    value = next((word.partition("=")[2] for word in words if word.partition("=")[0] == key), "VALUE")
    whole = value
    for name in reversed(inner):
        whole = f"{{{name}:{whole}}}"
    return f"{key!r} is not there by default: write '+{key}={value}', or all at once, '{group}.{mapping}={whole}'"


def _unknown_key(key: str, words: Sequence[str]) -> str:
    """What stands beside a key that does not exist, in the groups that were chosen."""
    chosen = _chosen(words)
    keys = [k for k in setting_names(compose_settings(chosen)[0]) if not k.rpartition(".")[2].startswith("_")]
    parent, dot, last = key.rpartition(".")
    names = [word.partition("=")[2] for word in chosen if word.startswith(f"{parent}=")]
    what = f"{key!r} of {names[-1]}" if names else repr(key)
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    leaves = {k: k.rpartition(".")[2] for k in keys}
    beside = [
        f"{parent}{dot}{name}" for name in get_close_matches(last, [leaves[k] for k in siblings], n=2, cutoff=0.7)
    ]
    near = [k for k in keys if leaves[k] == last] + beside  # the right name in another group, or without one
    if not near:
        alike = get_close_matches(last, set(leaves.values()), n=1, cutoff=0.7)
        near = [k for k in keys if leaves[k] in alike]
    if near:
        own = "" if beside or not dot else f" {parent} has {', '.join(siblings)}"
        return f"there is no setting {what}; did you mean {' or '.join(dict.fromkeys(near[:3]))}?{own}"
    return f"there is no setting {what}; there are {', '.join(siblings)}"
