"""The command ``profile``, which measures each cell of a grid of samplers."""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastddim.cli import bars, values
from fastddim.cli.options import BatchSize, Machine, Network, flag, option, seeds_option
from fastddim.cli.values import PATHS, SPACINGS, distinct

if TYPE_CHECKING:
    from fastddim.loop.sampler import DDIM
    from fastddim.tools.profile import Cell, Judge, Settings


def profile(
    context: typer.Context,
    machine: Machine,
    network: Network,
    steps: Annotated[
        str, option("--steps", "S,S,...", "The numbers of steps to measure, each from 1 to 1000.")
    ] = "10,20,50,100",
    eta: Annotated[
        str,
        option(
            "--eta",
            "ETA,ETA,...",
            "The etas to measure: numbers >= 0, or hat for DDPM's larger variance. 0 is DDIM, and "
            "1 adds as much noise as DDPM.",
        ),
    ] = "0,0.2,0.5,1,hat",
    order: Annotated[
        str,
        option(
            "--order",
            "ORDER,ORDER,...",
            "The orders to measure. 1 is DDIM. 2 also uses the x0 of the step before "
            "(DPM-Solver++(2M)): fewer steps give the same quality. Order 2 with eta hat does not "
            "exist; such cells are left out, and a line on stderr says so.",
        ),
    ] = "1",
    spacing: Annotated[
        str,
        option(
            "--spacing",
            "NAME|FILE.json,...",
            f"The spacings of the timesteps to measure: {', '.join(SPACINGS)}, or files that "
            "fastddim tune has written. Cells with a number of steps that a file lacks are left "
            "out, and a line on stderr says so.",
        ),
    ] = "uniform",
    seeds: Annotated[str, seeds_option("The images to draw in each cell")] = "0-255",
    oracle: Annotated[
        bool,
        flag(
            "--oracle",
            "Use the exact epsilon of a mixture of eight Gaussians in 64 dimensions instead of a "
            "model. FD is then the Frechet distance of the samples to the mixture's exact mean "
            "and covariance, which shows the error of the sampler alone.",
        ),
    ] = False,
    path: Annotated[
        str | None,
        option(
            "--path",
            "NAME",
            f"The path of the oracle: {', '.join(PATHS)} (ddpm is that of linear beta, the "
            "default). Needs --oracle.",
        ),
    ] = None,
    trace: Annotated[
        bool,
        flag(
            "--trace",
            "Also write DIR/trace.json, which ui.perfetto.dev opens: three steps for each order "
            'and eta, in ranges named "model" and "update".',
        ),
    ] = False,
    batch_size: BatchSize = 16,
    out: Annotated[
        Path,
        option(
            "--out",
            "DIR",
            "The folder for profile.html (one page with all results, for a browser), profile.png, "
            "profile.csv, profile.json, and images/ with the first images of each cell. It is made "
            "if it does not exist. The command continues a profile in it without measuring "
            "finished cells again, and refuses a profile with other settings.",
        ),
    ] = Path("profile"),
) -> None:
    """Measure time, memory and image quality for each number of steps, order, spacing and eta.

    The grid follows table 1 of the DDIM paper (Song et al. 2021). For each cell the command
    prints the milliseconds that a step of a full batch spends in the update (all work outside the
    model) and in the model, the images per second, and the peak memory of the tensors, weights
    included, in MB.

    Images of 1x28x28 are compared with real garments by FD-clf: the Frechet distance between 64
    features of a small classifier for these images and for Fashion-MNIST's test set (not FID).
    FD-clf falls as the number of images grows, so the last column gives the FD-clf of as many real
    garments, as mean ± standard deviation over draws: some draws of real garments, and also a
    good model, may score less. Classifier and features ship with the package, so no data set is
    needed. Images of other sizes have no distance.

    The default grid takes 15 to 30 minutes on two CPU cores, and about a minute with --oracle.
    After Ctrl-C the finished cells are kept, and the same command measures the others.

    For example: fastddim profile --steps 6,10,50 --order 1,2 --spacing uniform,mixed --eta 0
    """
    etas = values.parse_etas(eta)
    numbers = values.parse_steps(steps)
    orders, spacings = parse_orders(order), parse_spacings(spacing)
    wanted = values.parse_seeds(seeds)
    if len(wanted) < 2:
        raise ValueError(f"seeds must be two or more to measure a distance, got {seeds!r}")
    for each in spacings:
        values.check_common(batch_size, each)
    if oracle and network.given:
        name, value = next(iter(network.given.items()))
        raise ValueError(f"{name} must be left out with oracle, got {str(value)!r}")
    if path is not None:
        values.one_of("path", path, PATHS)
        if not oracle:
            raise ValueError(f"path must be left out without oracle, got {path!r}")
    with bars.spinner("loading", machine.quiet):
        from fastddim import embedded
        from fastddim.cli.network import prepare, usable
        from fastddim.loop.sampler import DDIM
        from fastddim.tools import profile as measured

        measured.check_folder(out)
        model: Any
        size: Sequence[int]
        make: Callable[..., DDIM] = DDIM
        judge: Judge | None
        model_options: dict[str, Any] = {}
        if oracle:
            where, data = usable(machine), measured.oracle(path)
            model, size = measured.oracle(path).to(where), data.means.shape[1:]
            predicted: Any = data.prediction
            make = partial(DDIM, schedule=data.schedule, prediction=predicted)
            judge = measured.mixture(data)
        else:
            prepared = prepare(machine, network)
            model, size, where, make = (
                prepared.model,
                prepared.shape,
                prepared.device,
                prepared.ddim,
            )
            model_options = prepared.options(batch_size)
            judge = measured.garments() if size == embedded.SHAPE else None
        ddims = measured.grid(numbers, etas, spacings, make, orders=orders)
        missing = measured.left_out(numbers, etas, spacings, orders=orders)
        if missing and not machine.quiet:
            print(f"left out: {'; '.join(missing)}", file=sys.stderr)
        text = "".join(seeds.split())
        more = {
            name: getattr(network, field)
            for name, field in (
                ("class", "label"),
                ("guidance", "guidance"),
                ("no_class", "no_class"),
                ("dtype", "dtype"),
            )
        }
        more["path"] = path
        settings = measured.settings(model, ddims[0], text, batch_size, where, judge, **more)
        done = measured.read(out, settings)
        rest = measured.remaining(ddims, done)
        measured.make_folder(out)
        if trace:
            file, traced = out / measured.TRACE, longest(ddims)
            measured.trace(traced, model, size, batch_size, file, device=where, **model_options)
    total = measured.model_calls(rest, len(wanted), batch_size)
    command = command_line(context)
    if done:  # of an earlier run, perhaps without a page
        measured.write_page(settings, done, out, command)
    try:
        with bars.bar("profiling", total, machine.quiet) as progress:
            for cell in measured.cells(
                rest,
                model,
                wanted,
                size,
                batch_size,
                judge=judge,
                keep=measured.keep_images(out),
                device=where,
                progress=progress,
                **model_options,
            ):
                done.append(cell)
                measured.save(out, settings, done)
                measured.write_page(settings, done, out, command)
    finally:  # Ctrl-C too
        if done:
            print_cells(done, settings)
            measured.plot(settings, done, out / measured.PNG)
    if not machine.quiet:
        print(f"{out}: {', '.join(sorted(path.name for path in out.glob('*.*')))}")


def longest(ddims: "Sequence[DDIM]") -> "list[DDIM]":
    """Returns the sampler with the most steps of each order and eta."""
    kept = {(ddim.order, ddim.eta): ddim for ddim in sorted(ddims, key=lambda d: len(d.pairs))}
    return list(kept.values())


def parse_orders(text: str) -> list[int]:
    """Returns the orders of a text such as ``1,2``."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[12]\s*", part) for part in parts):
        raise ValueError(f"order must be 1 (DDIM), 2 or 1,2, got {text!r}")
    return distinct("order", [int(part) for part in parts], text)


def parse_spacings(text: str) -> list[str]:
    """Returns the spacings of a text such as ``uniform,tau.json``, which are not checked."""
    return distinct("spacing", [part.strip() for part in text.split(",")], text)


def command_line(context: typer.Context) -> str:
    """Returns the command with the options that were given, quoted for a shell."""
    words = ["fastddim", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)


def print_cells(done: "list[Cell]", settings: "Settings") -> None:
    from fastddim.tools.profile import label

    """Prints a row for each cell; order and spacing have columns if they vary."""
    judged = settings["distance"]
    orders, spacings = ({getattr(cell, name) for cell in done} for name in ("order", "spacing"))
    varying = {"order": len(orders) > 1, "spacing": len(spacings) > 1}
    names = ["S", *(name for name, varies in varying.items() if varies), "eta"]
    names += ["update ms", "model ms", "images/s", "MB"]
    names += [judged, "real"] if judged else []
    rows = []
    for cell in done:
        memory = "?" if cell.memory_mb is None else f"{cell.memory_mb:.1f}"
        times = f"{cell.update_ms:.3f}", f"{cell.model_ms:.2f}", f"{cell.images_per_second:.1f}"
        quality: tuple[str, ...] = ()
        if judged:
            spread = "" if cell.spread is None else f" ± {cell.spread:.3f}"
            quality = f"{cell.distance:.3f}", f"{cell.floor:.3f}{spread}"
        axes = (str(getattr(cell, name)) for name, varies in varying.items() if varies)
        rows.append((str(cell.steps), *axes, label(cell.eta), *times, memory, *quality))
    same = "order 2, " if orders == {2} else ""
    same += "" if varying["spacing"] else f"{done[0].spacing} spacing, "
    bars.print_table(
        f"Seeds {settings['seeds']}, {same}on {settings['device']}, "
        f"steps by {settings['backend']}. "
        f"Milliseconds are for a step of {settings['batch_size']} images:",
        names,
        rows,
    )
    if not judged:
        print("No FD-clf: it compares garments, and these images are not 1x28x28.")
