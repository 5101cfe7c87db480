"""The timesteps that ``fastddim.tune`` finds for a model, one τ for each S, and their file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from fastddim.check import shown, whole
from fastddim.files import replacing
from fastddim.levels import GaussianPath

FORMAT = "fastddim tau 1"


@dataclass(frozen=True)
class Tuned:
    """Timesteps that were searched for one model: ``DDIM(steps=8, spacing=tuned, order=2)``.

    ``DDIM`` warns where the schedule or the order is another than in the search. It does not know
    the model; the commands compare the weights too.

    Attributes:
        timesteps: τ for each number of steps, each from the noisiest level to the cleanest.
        order: the sampler's order in the search.
        T: the number of noise levels.
        schedule: the schedule's name and digest: see ``schedule_id``.
        model: the SHA-256 of the network's weights; "" for a model without weights.
        about: how the search went, as JSON: its seeds, its distances and its version.
    """

    timesteps: tuple[tuple[int, ...], ...]
    order: int
    T: int
    schedule: str = ""
    model: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        T = whole("T", self.T, low=1)
        whole("order", self.order, low=1, high=2)
        if not self.timesteps:
            raise ValueError("timesteps must hold one or more lists, got none")
        for tau in self.timesteps:
            if not tau:
                raise ValueError("timesteps must hold lists of levels, got an empty one")
            for t in tau:
                whole("timesteps", t, low=0, high=T - 1)
            for before, after in pairwise(tau):
                if before <= after:
                    raise ValueError(
                        f"timesteps must go from the noisiest down, got {before} before {after}"
                    )
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"timesteps must differ in length, got the lengths {self.steps}")
        for name in ("schedule", "model", "about"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {shown(getattr(self, name))}")

    def __str__(self) -> str:
        return "tuned"

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps for which there is a τ."""
        return tuple(map(len, self.timesteps))

    def tau(self, steps: Any) -> tuple[int, ...]:
        """Returns τ of ``steps`` steps, from the noisiest level to the cleanest.

        ``steps`` may be None where there is one τ.

        Raises:
            ValueError: τ was not searched for this number of steps.
        """
        for tau in self.timesteps:
            if len(tau) == steps or (steps is None and len(self.timesteps) == 1):
                return tau
        raise ValueError(
            f"steps must be {' or '.join(map(str, self.steps))}, for which these timesteps were "
            f"tuned, got {steps!r}"
        )

    def differences(self, schedule: GaussianPath, order: int) -> list[str]:
        """Returns one line for each way in which a sampler differs from the searched one."""
        found = [
            ("T", self.T, len(schedule)),
            ("schedule", self.schedule, schedule_id(schedule)),
            ("order", self.order, order),
        ]
        if len(schedule) != self.T:
            del found[1]
        return [
            f"the timesteps were tuned for {name} {mine}, and are used with {name} {other}"
            for name, mine, other in found
            if mine and other and mine != other
        ]

    def write(self, path: str | PathLike[str]) -> None:
        """Writes the file as a whole: an interruption leaves the old one."""
        with replacing(Path(path)) as file:
            file.write(self._text().encode())

    def _text(self) -> str:
        """Returns the file's JSON, with one line for each entry and each τ."""
        entries = {name: getattr(self, name) for name in ("order", "T", "schedule", "model")}
        entries = {"format": FORMAT, **entries, "about": json.loads(self.about or "{}")}
        head = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in entries.items()]
        taus = [f'    "{len(tau)}": {json.dumps(tau)}' for tau in self.timesteps]
        return "\n".join(["{", *head, '  "timesteps": {', ",\n".join(taus), "  }", "}", ""])

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Tuned:
        """Returns the timesteps of a file that ``fastddim tune`` has written.

        Raises:
            FileNotFoundError: ``path`` is missing.
            ValueError: the file is of another kind, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"spacing must be a name or an existing file, got {path}")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            found["timesteps"] = tuple(map(tuple, found["timesteps"].values()))
            found["about"] = json.dumps(found.get("about", {}))
            return cls(**found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"spacing must be a file of fastddim tune, got {path} ({found})"
            ) from None


def schedule_id(schedule: GaussianPath) -> str:
    """Returns a schedule's name and the first digits of the SHA-256 of its levels."""
    return f"{schedule.name} {schedule.digest[:12]}"
