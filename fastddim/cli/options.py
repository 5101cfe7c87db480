"""Every option of the command line once.

Nothing here imports torch, so that ``--help`` and errors appear at once.

Every option spells its name out, because some versions of Typer (0.27.0 to 0.27.3) otherwise use
the metavar as the name.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fastddim.check import whole
from fastddim.cli.values import (
    CONFIGS,
    DTYPES,
    LARGEST_BATCH,
    MOST_IMAGES,
    PREDICTIONS,
    SCHEDULES,
    SPACINGS,
    one_of,
    parse_number,
    parse_shape,
)


class RefusedError(ValueError):
    """The command refuses its arguments, and does so alike in all processes of a machine."""


@contextmanager
def for_all() -> Iterator[None]:
    """Turns errors into ``RefusedError``: all processes fail alike, and one prints the error."""
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


def seeds_option(use: str, example: str = "7, 0-63 or 0-9,20,30-39") -> Any:
    return option(
        "--seeds",
        "SEEDS",
        f"{use}, in the order given: {example}. A seed is an integer from 0 to 2^63-1; at most "
        f"{MOST_IMAGES} seeds.",
    )


def columns_option(help: str, **rest: Any) -> Any:
    return number("--columns", "N", help, **rest)


Steps = Annotated[
    int,
    number(
        "--steps",
        "S",
        "The number of model calls per image, from 1 to the number T of noise levels that the "
        "model was trained on, 1000 for most models.",
    ),
]
Eta = Annotated[
    str,
    option(
        "--eta",
        "NUMBER|hat",
        "The noise that each step adds, a number >= 0: 0 adds none (DDIM), 1 as much as DDPM. "
        "hat is DDPM's larger variance.",
    ),
]
Spacing = Annotated[
    str,
    option(
        "--spacing",
        "NAME|FILE.json",
        f"The spacing of the timesteps: {', '.join(SPACINGS)}, or a file that fastddim tune has "
        "written.",
    ),
]
Order = Annotated[
    int,
    number(
        "--order",
        "1|2",
        "1 is DDIM. 2 also uses the x0 of the step before (DPM-Solver++(2M)): fewer steps give the "
        "same quality, best with --spacing mixed.",
    ),
]
BatchSize = Annotated[
    int,
    number(
        "--batch-size",
        "N",
        f"The number of images per model call, 1 to {LARGEST_BATCH}. Batches are always full; "
        "the last one is padded.",
    ),
]
Out = Annotated[
    Path, option("--out", "FILE.png", "The PNG to write or replace, in a folder that exists.")
]
Labels = Annotated[
    bool,
    flag("--labels", "Label the rows and columns of the picture, or each image with its seed."),
]

MACHINE = "Machine"
NETWORK = "Model"


@dataclass(frozen=True)
class Machine:
    """The device and the threads of a command, and whether it prints messages."""

    device: Annotated[
        str | None,
        option(
            "--device",
            "DEVICE",
            "The device to compute on: cpu, cuda, cuda:1, mps, ... With cuda, processes that a "
            "launcher starts share out the GPUs.",
            show_default="cuda if present, else cpu",
            rich_help_panel=MACHINE,
        ),
    ] = None
    threads: Annotated[
        int | None,
        number(
            "--threads",
            "N",
            "The number of threads of each process on a CPU. Sums round differently with another "
            "number, so the last bits of an image depend on it.",
            show_default="PyTorch's",
            rich_help_panel=MACHINE,
        ),
    ] = None
    quiet: Annotated[
        bool,
        flag(
            "--quiet",
            "Print measurements and errors only.",
            rich_help_panel=MACHINE,
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.threads is not None:
            whole("threads", self.threads, low=1, high=1024)


@dataclass(frozen=True)
class Network:
    """The model, and its class, guidance and dtype."""

    checkpoint: Annotated[
        Path | None,
        option(
            "--checkpoint",
            "PATH",
            "A folder with a diffusers UNet2DModel (or with one in unet/), or a file with the "
            "weights of ermongroup/ddim, guided-diffusion or the garment model, in safetensors or "
            "torch.save format. The kind is detected from the content and printed on stderr. No "
            "code in a file is run, and nothing is downloaded.",
            show_default="the garment model that ships",
            rich_help_panel=NETWORK,
        ),
    ] = None
    model: Annotated[
        str | None,
        option(
            "--model",
            "MODULE:FACTORY",
            "Your own model: package.module:factory, in the current folder or on Python's path. "
            "The factory takes no arguments and returns a model, which is called as model(x, t), "
            "or (model, (channels, height, width)), or a fastddim.models.checkpoints.Loaded.",
            show_default="none",
            rich_help_panel=NETWORK,
        ),
    ] = None
    config: Annotated[
        str | None,
        option(
            "--config",
            "NAME|FILE.json",
            f"The configuration of the checkpoint: {', '.join(CONFIGS)} for ermongroup/ddim; "
            "for guided-diffusion a JSON file of its scripts' flags, such as "
            '{"image_size": 64, "num_heads": 4, "noise_schedule": "cosine"}, where flags at their '
            "defaults may be left out; for diffusers weights their config.json.",
            show_default="the file beside the weights, or as published",
            rich_help_panel=NETWORK,
        ),
    ] = None
    shape: Annotated[
        str | None,
        option(
            "--shape",
            "C,H,W",
            "Channels, height and width of an image, such as 3,32,32: needed if neither the "
            "model nor the config gives them, or to draw another size.",
            show_default="the model's own",
            rich_help_panel=NETWORK,
        ),
    ] = None
    ema: Annotated[
        bool | None,
        flag(
            "--ema/--last",
            "For a checkpoint with both: use the average of the weights over the training (EMA), "
            "or the last weights.",
            show_default="the EMA if the file has it",
            rich_help_panel=NETWORK,
        ),
    ] = None
    prediction: Annotated[
        str | None,
        option(
            "--prediction",
            "NAME",
            f"The quantity that the model predicts: {', '.join(PREDICTIONS)} (sample is x0).",
            show_default="from the model's files, else epsilon",
            rich_help_panel=NETWORK,
        ),
    ] = None
    schedule: Annotated[
        str | None,
        option(
            "--schedule",
            "NAME",
            f"The noise schedule of the model's training: {', '.join(SCHEDULES)} (Stable "
            "Diffusion's is scaled_linear).",
            show_default="from the model's files, else linear",
            rich_help_panel=NETWORK,
        ),
    ] = None
    levels: Annotated[
        int | None,
        number(
            "--train-steps",
            "T",
            "The number of noise levels of the model's training.",
            show_default="from the model's files, else 1000",
            rich_help_panel=NETWORK,
        ),
    ] = None
    label: Annotated[
        int | None,
        number(
            "--class",
            "N",
            "The number of the class to draw, from 0, for a class-conditional network.",
            show_default="none",
            rich_help_panel=NETWORK,
        ),
    ] = None
    guidance: Annotated[
        str | None,
        option(
            "--guidance",
            "W",
            "Classifier-free guidance: the prediction without the class plus W times its "
            "difference to the prediction with the class. 1 means no guidance. Each model call "
            "gets twice the batch.",
            show_default="none",
            rich_help_panel=NETWORK,
        ),
    ] = None
    no_class: Annotated[
        int | None,
        number(
            "--no-class",
            "N",
            "The null class, which --guidance needs.",
            show_default="the model's own",
            rich_help_panel=NETWORK,
        ),
    ] = None
    dtype: Annotated[
        str,
        option(
            "--dtype",
            "NAME",
            f"The dtype that the model computes in: {', '.join(DTYPES)}. The samples stay "
            "float32 between the model's calls.",
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
        """Returns the options that differ from their defaults, by their command-line names."""
        names = {"label": "class", "levels": "train-steps", "no_class": "no-class"}
        return {
            names.get(f.name, f.name): getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Returns ``command`` with each dataclass parameter replaced by one option for each field.

    Typer then sees one flat list of options. The dataclasses check their values before the
    command runs.
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

    # Typer reads these attributes; those of the wrapped function have the dataclasses.
    del flat.__dict__["__wrapped__"]
    flat.__dict__["__signature__"] = inspect.Signature(parameters)
    flat.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": type(None)}
    return flat
