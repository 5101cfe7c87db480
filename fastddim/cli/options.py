"""The vocabulary of the command line: each option once, and what the text given to it means.

Nothing here imports torch, so that ``--help`` shows at once and a mistake is told at once. The
names that the library knows are therefore written out, and a test compares them with its own.

Every option has its name spelled out: some versions of Typer (0.27.0 to 0.27.3) otherwise take
the metavar for the name.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fastddim.check import finite, whole
from fastddim.tools.seeds import parse_ranges

MOST_IMAGES = 10_000
"""What one picture holds: beyond it nobody sees one, and a 256x256 grid outgrows memory."""

SPACINGS = (
    "uniform",
    "quad",
    "leading",
    "trailing",
    "linspace",
    "uniform-ermongroup",
    "quad-ermongroup",
)
CONFIGS = ("cifar10", "celeba64", "lsun256")
FORMATS = ("npy", "png", "npz")
DTYPES = ("float32", "bfloat16", "float16")
PREDICTIONS = ("epsilon", "v", "sample")
SCHEDULES = ("linear", "scaled_linear", "cosine")
LARGEST_BATCH = 65_536


class RefusedError(ValueError):
    """What was asked for cannot be done, and all processes of a machine find the same."""


@contextmanager
def for_all() -> Iterator[None]:
    """What is refused here all processes of a machine refuse alike, and one of them says so."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise RefusedError(str(error)) from error


def integer(text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be an integer, got {text!r}") from None


def option(name: str, metavar: str, help: str, **rest: Any) -> Any:
    return typer.Option(name, metavar=metavar, help=help, **rest)


def number(name: str, metavar: str, help: str, **rest: Any) -> Any:
    return option(name, metavar, help, parser=integer, **rest)


def flag(name: str, help: str, **rest: Any) -> Any:
    return typer.Option(name, help=help, **rest)


def seeds_option(what: str, such_as: str = "7, 0-63 or 0-9,20,30-39") -> Any:
    return option(
        "--seeds",
        "SEEDS",
        f"{what}: {such_as}, in this order. A seed is an integer from 0 to 2^63-1; at most "
        f"{MOST_IMAGES} of them.",
    )


def columns_option(what: str, **rest: Any) -> Any:
    return number("--columns", "N", what, **rest)


Steps = Annotated[
    int,
    number(
        "--steps",
        "S",
        "The number of model calls per image, from 1 to the T of the model's noise, which is "
        "1000 for most.",
    ),
]
Eta = Annotated[
    str,
    option(
        "--eta",
        "NUMBER|hat",
        "How much noise each step adds: 0 adds none (DDIM), 1 as much as DDPM, other numbers "
        ">= 0 something between or a little more; hat is DDPM's larger variance.",
    ),
]
Spacing = Annotated[
    str, option("--spacing", "NAME", f"How the timesteps are chosen: {', '.join(SPACINGS)}.")
]
BatchSize = Annotated[
    int,
    number(
        "--batch-size",
        "N",
        f"Images per model call, 1 to {LARGEST_BATCH}. Batches are always full, "
        "the last one padded.",
    ),
]
Out = Annotated[
    Path, option("--out", "FILE.png", "The PNG to write or replace, in a folder that exists.")
]
Labels = Annotated[
    bool,
    flag("--labels", "Write in the picture what its rows and columns are, or each image's seed."),
]

MACHINE = "Machine"
NETWORK = "Model"


@dataclass(frozen=True)
class Machine:
    """Where a command runs, and how much it says."""

    device: Annotated[
        str | None,
        option(
            "--device",
            "DEVICE",
            "Where to compute: cpu, cuda, cuda:1, mps, ... Of several processes that a launcher "
            "starts, each takes its share of the GPUs for cuda.",
            show_default="cuda if there is one, else cpu",
            rich_help_panel=MACHINE,
        ),
    ] = None
    threads: Annotated[
        int | None,
        number(
            "--threads",
            "N",
            "Threads of each process on a CPU. Sums round differently on another number: the "
            "last bits of an image depend on it.",
            show_default="PyTorch's",
            rich_help_panel=MACHINE,
        ),
    ] = None
    quiet: Annotated[
        bool,
        flag(
            "--quiet",
            "Print what was measured and what is wrong, and nothing else.",
            rich_help_panel=MACHINE,
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.threads is not None:
            whole("threads", self.threads, low=1, high=1024)


@dataclass(frozen=True)
class Network:
    """The model, and what is asked of it beside x and t."""

    checkpoint: Annotated[
        Path | None,
        option(
            "--checkpoint",
            "PATH",
            "A folder with a diffusers UNet2DModel (or with one in unet/), or a file with the "
            "weights of ermongroup/ddim (of a whole checkpoint the EMA), guided-diffusion or "
            "garments, as safetensors or as torch.save writes them. The kind is found out from "
            "the content and said on stderr. No code in a file is run, and nothing is fetched.",
            show_default="the garment model that ships",
            rich_help_panel=NETWORK,
        ),
    ] = None
    model: Annotated[
        str | None,
        option(
            "--model",
            "MODULE:FACTORY",
            "Or your own model: package.module:factory, in the current folder or anywhere on "
            "Python's path. The factory takes no arguments and returns a model, called as "
            "model(x, t), or (model, (channels, height, width)), or a "
            "fastddim.models.checkpoints.Loaded.",
            show_default="none",
            rich_help_panel=NETWORK,
        ),
    ] = None
    config: Annotated[
        str | None,
        option(
            "--config",
            "NAME|FILE.json",
            f"What the checkpoint's tensors do not tell: {', '.join(CONFIGS)} for "
            "ermongroup/ddim's; for guided-diffusion's a file of its scripts' flags, such as "
            '{"image_size": 64, "num_heads": 4, "noise_schedule": "cosine"}, in which its own '
            "defaults may be left out; for diffusers weights their config.json.",
            show_default="what is beside the weights, or as published",
            rich_help_panel=NETWORK,
        ),
    ] = None
    shape: Annotated[
        str | None,
        option(
            "--shape",
            "C,H,W",
            "Channels, height and width of an image, such as 3,32,32, where neither model nor "
            "config says it, or another size.",
            show_default="the model's own",
            rich_help_panel=NETWORK,
        ),
    ] = None
    ema: Annotated[
        bool | None,
        flag(
            "--ema/--last",
            "Of a checkpoint that has both: the average of the weights over the training (EMA), "
            "or the last weights.",
            show_default="the average where there is one",
            rich_help_panel=NETWORK,
        ),
    ] = None
    prediction: Annotated[
        str | None,
        option(
            "--prediction",
            "NAME",
            f"What the model predicts: {', '.join(PREDICTIONS)} (sample is x0).",
            show_default="what the model's files say, else epsilon",
            rich_help_panel=NETWORK,
        ),
    ] = None
    schedule: Annotated[
        str | None,
        option(
            "--schedule",
            "NAME",
            f"The noise it was trained on: {', '.join(SCHEDULES)} (Stable Diffusion's is "
            "scaled_linear).",
            show_default="what the model's files say, else linear",
            rich_help_panel=NETWORK,
        ),
    ] = None
    levels: Annotated[
        int | None,
        number(
            "--train-steps",
            "T",
            "The number of noise levels it was trained on.",
            show_default="what the model's files say, else 1000",
            rich_help_panel=NETWORK,
        ),
    ] = None
    label: Annotated[
        int | None,
        number(
            "--class",
            "N",
            "The class to draw, of a network that is told one: its number, from 0.",
            show_default="none",
            rich_help_panel=NETWORK,
        ),
    ] = None
    guidance: Annotated[
        str | None,
        option(
            "--guidance",
            "W",
            "Classifier-free guidance towards the class: what is predicted without it, plus W "
            "times the difference. 1 is none; each step asks the model for twice the batch.",
            show_default="none",
            rich_help_panel=NETWORK,
        ),
    ] = None
    no_class: Annotated[
        int | None,
        number(
            "--no-class",
            "N",
            "The class that stands for none, which --guidance needs.",
            show_default="what the model says",
            rich_help_panel=NETWORK,
        ),
    ] = None
    dtype: Annotated[
        str,
        option(
            "--dtype",
            "NAME",
            f"What the model computes in: {', '.join(DTYPES)}. The samples stay float32 "
            "between its calls.",
            rich_help_panel=NETWORK,
        ),
    ] = "float32"

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        if self.prediction is not None:
            one_of("prediction", self.prediction, PREDICTIONS)
        if self.schedule is not None:
            one_of("schedule", self.schedule, SCHEDULES)
        if self.levels is not None:
            whole("train-steps", self.levels, low=1, high=1_000_000)
        if self.model is not None and (self.checkpoint is not None or self.config is not None):
            raise ValueError("model must be given without checkpoint and config")
        if self.ema is not None and self.checkpoint is None:
            raise ValueError(
                f"{'ema' if self.ema else 'last'} must be left out without checkpoint, which has "
                f"the weights to choose from"
            )
        if self.model is None and self.checkpoint is None:
            for name, value in (
                ("prediction", self.prediction),
                ("schedule", self.schedule),
                ("train-steps", self.levels),
                ("class", self.label),
            ):
                if value is not None:
                    raise ValueError(
                        f"{name} must be left out with the garment model, got {value}: it goes "
                        f"with --checkpoint or --model"
                    )
        for name, number in (("class", self.label), ("no-class", self.no_class)):
            if number is not None:
                whole(name, number, low=0)
        if (self.guidance is None) != (self.no_class is None) and self.guidance is None:
            raise ValueError(f"no-class must be left out without guidance, got {self.no_class}")
        if self.guidance is not None:
            parse_number("guidance", self.guidance)
            if self.label is None:
                raise ValueError(f"guidance must be given with class, got {self.guidance} alone")
        if self.shape is not None:
            parse_shape(self.shape)

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults, by their names on the command line."""
        names = {"label": "class", "levels": "train-steps", "no_class": "no-class"}
        return {
            names.get(f.name, f.name): getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with each parameter that is a dataclass replaced by the options it is made of.

    The dataclass's own checks run here, before the command. Typer sees one flat list of options.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            kept = parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]
            )
            parameters.append(kept)
            continue
        group: Any = groups[parameter.name]
        inner = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=inner[field.name],
            )
            for field in fields(group)
        ]

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        with for_all():
            for name, group in groups.items():
                made: Any = group
                given[name] = made(**{f.name: given.pop(f.name) for f in fields(made)})
        command(**given)

    # Typer looks at these two; the wrapped function's would show the dataclasses.
    del flat.__dict__["__wrapped__"]
    flat.__dict__["__signature__"] = inspect.Signature(parameters)
    flat.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": type(None)}
    return flat


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """``value``, if it is among ``allowed``; else one line, with the nearest of them."""
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{meant}")
    return value


def parse_eta(text: str) -> Any:
    """A number, or hat; what the number may be depends on the steps."""
    text = text.strip()
    if text == "hat":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'eta must be a number ≥ 0 or "hat", got {text!r}') from None


def parse_etas(text: str) -> list[Any]:
    """ "0,0.5,hat" → each of them."""
    parts = text.split(",")
    if not all(part.strip() for part in parts):
        raise ValueError(f"eta must be such as 0 or 0,0.5,1,hat, got {text!r}")
    return distinct("eta", [parse_eta(part) for part in parts], text)


def parse_number(name: str, text: str) -> float:
    try:
        return finite(name, float(text))
    except ValueError:
        raise ValueError(f"{name} must be a finite number, got {text!r}") from None


def parse_steps(text: str) -> list[int]:
    """ "10,20,50" → its numbers; what they may be is the sampler's to say."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,19}\s*", part) for part in parts):
        raise ValueError(f"steps must be such as 50 or 10,20,50, got {text!r}")
    return distinct("steps", [int(part) for part in parts], text)


def distinct(name: str, values: list[Any], text: str) -> list[Any]:
    """``values``, if none of them is there twice: nothing is measured twice."""
    if twice := [v for i, v in enumerate(values) if v in values[:i]]:
        raise ValueError(f"{name} must differ from each other, got {twice[0]} twice in {text!r}")
    return values


def parse_shape(text: str) -> tuple[int, ...]:
    """ "3,32,32" → its numbers."""
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9}){2}", text) is None:
        raise ValueError(f"shape must be C,H,W, such as 3,32,32, got {text!r}")
    return tuple(map(int, text.split(",")))


def parse_seeds(text: str) -> list[int]:
    """ "0-9,20,30-39" → its seeds, in order; no more than a picture holds."""
    ranges = parse_ranges(text)
    # Not len(), which ends at 2^63.
    if (count := sum(r.stop - r.start for r in ranges)) > MOST_IMAGES:
        raise ValueError(f"seeds must be at most {MOST_IMAGES}, got {count}")
    return [seed for r in ranges for seed in r]


def check_cells(what: str, rows: int, columns: int) -> None:
    if rows * columns > MOST_IMAGES:
        raise ValueError(
            f"{what} must be at most {MOST_IMAGES} images for one picture, got {rows} x {columns}"
        )


def check_common(batch_size: int, spacing: str) -> None:
    """What can be said of these two before the model is known."""
    whole("batch-size", batch_size, low=1, high=LARGEST_BATCH)
    one_of("spacing", spacing, SPACINGS)


def counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
