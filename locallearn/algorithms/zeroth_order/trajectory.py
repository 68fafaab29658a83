"""A training in a file: what the weights were, where the noise is found, and one number per direction and step.

The file holds nothing of the data, of activations or of gradients. That the weights can be rebuilt from it shows that a step
saw nothing else. It begins with eight bytes and a header of text; then come records:

======  =================================================================================================
``r``   the optimizer's rate and momentum (or first beta) of every parameter group, as doubles, where they change
``s``   the numbers of one step, float32; five signs to a byte where ``shaping=sign``
``c``   eight bytes of a checksum over everything since the last one, every 64 steps and at an epoch's end
``w``   eight bytes of a checksum of the weights, at an epoch's end
======  =================================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.optim import Optimizer

from locallearn.algorithms.zeroth_order._rule import ZerothOrder
from locallearn.functional.counter_noise import VERSION
from locallearn.nets.weights import digest

_MAGIC = b"LLZOTRJ\x01"
_EVERY = 64
Rates = tuple[tuple[float, float], ...]


def weights_of(rule: ZerothOrder) -> dict[str, Tensor]:
    """The network's weights by name; buffers, which come from data, are not among them."""
    return {name: p.detach() for name, p in rule.blocks.named_parameters()}


def header_of(rule: ZerothOrder) -> dict[str, Any]:
    """What has to be the same for a replay."""
    later = {  # settings that files from before them do not name
        "normalise": None if rule.normalise is None else [rule.normalise, rule.beta2],
        "curvature_exponent": rule.curvature_exponent,
        "losses": None if rule.losses_of == "global" else [rule.losses_of, rule.head_limit],
        "numbers": None if rule.numbers == rule.n else rule.numbers,
    }
    return {
        "generator": VERSION,
        "seed": rule.seed,
        "settings": {
            "variant": rule.variant_name,
            "n": rule.n,
            "eps": rule.eps,
            "antithetic": rule.antithetic,
            "shaping": rule.shaping,
            "noise": rule.noise,
            "rank": rule.rank,
            "decay": rule.decay,
            "exact": rule.exact,
            "bits": rule.bits,
            "residual_decay": rule.residual_decay,
            **{key: value for key, value in later.items() if value is not None},
        },
        "learns": [name for name, p in rule.blocks.named_parameters() if p.requires_grad],
        "dtype": sorted({str(p.dtype).removeprefix("torch.") for p in rule.blocks.parameters()}),
        "weights": digest(weights_of(rule)),
    }


def rates_of(optimizers: Sequence[Optimizer]) -> Rates:
    """Rate and momentum (or first beta) of every parameter group."""
    return tuple(
        (float(group["lr"]), float(group.get("momentum", group.get("betas", (0.0,))[0])))
        for optimizer in optimizers
        for group in optimizer.param_groups
    )


class Writer:
    """Writes a trajectory while a rule trains.

    In a loop of one's own::

        with Writer(path, rule, list(optimizers.values())) as trajectory:
            for batch in batches:
                trajectory.before()  # notes the rates
                for update in rule.updates(batch):
                    ...
                trajectory.step()

    Args:
        path: of a file that is not there yet.
        rule: attached, its weights as they are before the first step.
        optimizers: of its units.
        steps: go on with a file that is there, which is cut after so many steps.

    Attributes:
        path: of the file.
        steps: written so far.

    Raises:
        ValueError: the file is there already, or it has fewer steps than it is gone on with from, or is another training's.
    """

    def __init__(
        self, path: Path | str, rule: ZerothOrder, optimizers: Sequence[Optimizer], steps: int | None = None
    ) -> None:
        self.path, self._rule, self._optimizers = Path(path), rule, optimizers
        self.steps = steps or 0
        self._rates: Rates | None = None
        self._latest: Rates = ()
        self._check = hashlib.sha256()
        self._unchecked = 0
        self._file: BinaryIO
        if steps is None:
            if self.path.exists():
                raise ValueError(
                    f"{self.path} is there already, and a trajectory is never overwritten: name another file"
                )
            self._file = self.path.open("xb")
            text = json.dumps(header_of(rule)).encode()
            self._write(_MAGIC + struct.pack("<I", len(text)) + text)
            self._checked()
        else:
            known = read(self.path)
            if len(known.steps) < steps:
                raise ValueError(
                    f"{self.path} has {len(known.steps)} steps, and the training goes on after {steps}: this is not its "
                    "trajectory"
                )
            self._file = self.path.open("r+b")
            self._cut(known, steps)

    def _cut(self, known: Trajectory, steps: int) -> None:
        ends = [end for done, end in known.checks if done <= steps]
        place = [step.end for step in known.steps]
        # Steps behind the last checksum are hashed again, so that the next one holds for them.
        start = ends[-1]
        end = max(start, place[steps - 1]) if steps else start
        self._file.seek(start)
        self._check.update(self._file.read(end - start))
        self._file.truncate(end)
        self._file.seek(end)
        self._unchecked = sum(1 for p in place[:steps] if p > start)

    def before(self) -> None:
        """Note the rates that the coming step has; a scheduler may change them behind it."""
        self._latest = rates_of(self._optimizers)

    def step(self) -> None:
        """Write the step that the rule has just made.

        Raises:
            ValueError: it has made none.
        """
        c = self._rule.scalars
        if c is None:
            raise ValueError("the rule has made no step yet that could be written down")
        rates = self._latest or rates_of(self._optimizers)
        if rates != self._rates:
            self._rates = rates
            flat = [value for pair in rates for value in pair]
            self._write(b"r" + struct.pack("<B", len(rates)) + struct.pack(f"<{len(flat)}d", *flat))
        self._write(b"s" + _packed(c, self._rule.shaping == "sign"))
        self.steps += 1
        self._unchecked += 1
        if self._unchecked >= _EVERY:
            self._checked()

    def epoch(self) -> None:
        """Write checksums of the steps and of the weights."""
        self._write(b"w" + bytes.fromhex(digest(weights_of(self._rule)))[:8])
        self._checked()

    def _checked(self) -> None:
        """Write the checksum of everything since the last one."""
        self._file.write(b"c" + self._check.digest()[:8])
        self._check, self._unchecked = hashlib.sha256(), 0
        self._file.flush()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._check.update(content)

    def flush(self) -> None:
        """See to it that what was written is in the file."""
        self._file.flush()

    def close(self) -> None:
        """Write the last checksum, and close the file."""
        if not self._file.closed:
            if self._unchecked:
                self._checked()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _packed(c: Tensor, signs: bool) -> bytes:
    if not signs:
        return c.to(torch.float32).cpu().numpy().astype("<f4").tobytes()
    trits = [int(value) + 1 for value in c.sign().tolist()]
    trits += [0] * (-len(trits) % 5)
    return bytes(sum(t * 3**k for k, t in enumerate(trits[i : i + 5])) for i in range(0, len(trits), 5))


def _unpacked(content: bytes, n: int, signs: bool) -> Tensor:
    if not signs:
        return torch.tensor(struct.unpack(f"<{n}f", content), dtype=torch.float32)
    return torch.tensor([byte // 3**k % 3 - 1 for byte in content for k in range(5)][:n], dtype=torch.float32)


@dataclass(frozen=True)
class Step:
    """One step: its numbers, the rates that it was made with, and where it ends in the file."""

    c: Tensor
    rates: Rates
    end: int


@dataclass
class Trajectory:
    """A file that was read.

    Attributes:
        header: see :func:`header_of`.
        steps: in order.
        weights: checksum of the weights after so many steps, where one was written.
        checks: after how many steps a checksum ends, and where it ends in the file.
        size: of the file in bytes.
    """

    header: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    weights: dict[int, bytes] = field(default_factory=dict)
    checks: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0


def read(path: Path | str) -> Trajectory:
    """Read a trajectory, and check it against its checksums. What a kill cut off at its end is left out.

    Raises:
        ValueError: this is no trajectory, another generator made its noise, or it was changed; says between which steps.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    if not content.startswith(_MAGIC) or len(content) < len(_MAGIC) + 4:
        raise ValueError(f"{path} is no trajectory: it does not begin as one")
    (length,) = struct.unpack_from("<I", content, len(_MAGIC))
    start = len(_MAGIC) + 4
    place = start + length
    check = hashlib.sha256(content[:place]).digest()[:8]
    if content[place : place + 9] != b"c" + check:
        raise ValueError(f"{path} was changed or is damaged: its header does not agree with its checksum")
    try:
        header = json.loads(content[start:place])
        found = Trajectory(header, size=len(content))
        settings = header["settings"]
        n, signs = int(settings.get("numbers", settings["n"])), settings["shaping"] == "sign"
        generator = header["generator"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read") from error
    if generator != VERSION:
        raise ValueError(
            f"{path} was written with the generator {generator}, and here is {VERSION}: other noise, so it cannot be replayed"
        )
    place += 9
    found.checks.append((0, place))
    width = -(-n // 5) if signs else 4 * n
    since, checked = place, 0
    rates: Rates = ()
    while place < len(content):
        kind, body = content[place : place + 1], place + 1
        if kind == b"r":
            groups = content[body] if body < len(content) else 0
            end = body + 1 + 16 * groups
        elif kind == b"s":
            end = body + width
        elif kind in (b"c", b"w"):
            end = body + 8
        else:
            raise _changed(path, checked, None)
        if end > len(content):
            break  # a kill
        if kind == b"r":
            flat = struct.unpack_from(f"<{2 * groups}d", content, body + 1)
            rates = tuple(zip(flat[::2], flat[1::2], strict=True))
        elif kind == b"s":
            found.steps.append(Step(_unpacked(content[body:end], n, signs), rates, end))
        elif kind == b"w":
            found.weights[len(found.steps)] = content[body:end]
        else:
            if content[body:end] != hashlib.sha256(content[since:place]).digest()[:8]:
                raise _changed(path, checked, len(found.steps))
            checked, since = len(found.steps), end
            found.checks.append((checked, end))
        place = end
    return found


def _changed(path: Path | str, first: int, last: int | None) -> ValueError:
    where = f"steps {first + 1} to {last}" if last is not None else f"what comes after step {first}"
    return ValueError(f"{path} was changed or is damaged: {where} do not agree with their checksum")


def replay(rule: ZerothOrder, optimizers: Mapping[str, Optimizer], trajectory: Trajectory) -> Iterator[int]:
    """Make the steps of a trajectory again, without any data; yields after every step how many there have been.

    Args:
        rule: attached to a network whose weights are those at the beginning.
        optimizers: of its units, new ones of the kind that trained.
        trajectory: what was written.

    Raises:
        ValueError: the rule has other settings than the trajectory, the network other weights than at the beginning, or the
            optimizer other parameter groups.
    """
    here = header_of(rule)
    for key, value in trajectory.header.items():
        if here.get(key) != value:
            what = {"weights": "the network's weights are not those that the training began with"}
            told = what.get(key, f"its {key} is {value}, and here it is {here.get(key)}")
            raise ValueError(f"the trajectory is of another training: {told}")
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    for number, step in enumerate(trajectory.steps, 1):
        if len(step.rates) != len(groups):
            raise ValueError(
                f"the trajectory has rates of {len(step.rates)} parameter groups, and the optimizer has {len(groups)}"
            )
        for group, (lr, momentum) in zip(groups, step.rates, strict=True):
            group["lr"] = lr
            if "momentum" in group:
                group["momentum"] = momentum
            elif "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
        for update in rule.follow(step.c):
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
        yield number
