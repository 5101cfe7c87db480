"""Each script in examples/ runs, and prints what its docstring says."""

from __future__ import annotations

import asyncio
import io
import re
import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddim import DDIM, Engine
from fastddim.tools import images

FOLDER = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "edit": ["--steps", "10"],
    "guidance": ["--points", "500"],
    "inpainting": ["--steps", "5"],
    "policy": ["--ticks", "3"],
    "serve_asgi": ["--requests", "3"],
}
WITH_RAY = ["generate_ray", "serve_ray"]
"""The scripts that ``test_ray.py`` runs."""


class Printed:
    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def by(self, name: str) -> str:
        path = FOLDER / f"{name}.py"
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr("sys.argv", [str(path), *ARGUMENTS[name]])
        runpy.run_path(str(path), run_name="__main__")
        return self.capsys.readouterr().out


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Printed:
    """Runs a script in an empty folder, as ``python examples/...`` would."""
    return Printed(tmp_path, monkeypatch, capsys)


def test_every_example_is_run_here_and_says_how_to_run_it() -> None:
    scripts = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    assert sorted(scripts) == sorted([*ARGUMENTS, *WITH_RAY])
    for name, text in scripts.items():
        assert f"    python examples/{name}.py" in text.split('"""')[1]


def test_policy_captures_what_sample_gives(printed: Printed) -> None:
    assert "equal those of DDIM.sample: True" in printed.by("policy")


def test_guidance_moves_points_away_and_together(printed: Printed) -> None:
    found = re.findall(r"mean (\S+), deviation (\S+)", printed.by("guidance"))
    means, deviations = ([float(n) for n in column] for column in zip(*found, strict=True))
    assert len(means) == 3
    assert means[0] == pytest.approx(1.0, abs=0.1)
    assert deviations[0] == pytest.approx(0.5, abs=0.05)
    assert means == sorted(means)
    assert deviations == sorted(deviations, reverse=True)


def test_inpainting_keeps_the_upper_half(printed: Printed) -> None:
    assert "those of the first image: True" in printed.by("inpainting")
    assert (printed.folder / "inpainting.png").stat().st_size > 500


def test_edit_prints_errors_that_refinement_lessens(printed: Printed) -> None:
    found = re.findall(r"refine=(\d): root mean square error (\S+)", printed.by("edit"))
    (_, plain), (_, refined) = found
    assert float(refined) < 0.5 * float(plain)
    assert (printed.folder / "edit.png").stat().st_size > 300


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 * x


class Served:
    """The application of ``serve_asgi.py`` with a small engine, called as a server calls it."""

    def __init__(self, network: Any = network, **options: Any) -> None:
        self.names = runpy.run_path(str(FOLDER / "serve_asgi.py"), run_name="serve_asgi")
        self.engine = Engine(network, (1, 4, 4), slots=2, **options)
        self.app = self.names["App"](lambda: self.engine)

    async def __aenter__(self) -> Served:
        self.life: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.create_task(
            self.app({"type": "lifespan"}, self.life.get, self.sent.put)
        )
        await self.life.put({"type": "lifespan.startup"})
        assert (await self.sent.get())["type"] == "lifespan.startup.complete"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.life.put({"type": "lifespan.shutdown"})
        assert (await self.sent.get())["type"] == "lifespan.shutdown.complete"
        await self.task

    async def get(self, path: str, query: str = "", stays: bool = True) -> tuple[int, str, bytes]:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(60 if stays else 0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "query_string": query.encode()}
        await self.app(scope, receive, send)
        start, body = sent
        headers = dict(start["headers"])
        assert int(headers[b"content-length"]) == len(body["body"])
        return start["status"], headers[b"content-type"].decode(), body["body"]


def test_serve_asgi_calls_itself(printed: Printed) -> None:
    out = printed.by("serve_asgi")
    assert "3 of 3 samples came as PNGs" in out
    assert "steps must be an integer in [1, 1000], got 5000" in out
    assert re.search(r"^fastddim_submitted_total 3(\.0)?$", out, flags=re.MULTILINE)


def test_serve_asgi_returns_the_bits_of_sample() -> None:
    async def run() -> list[tuple[int, str, bytes]]:
        async with Served() as served:
            queries = [f"seed={seed}&steps={8 + seed}&eta=0.5" for seed in range(5)]
            return await asyncio.gather(*(served.get("/sample", query) for query in queries))

    for seed, (status, kind, body) in enumerate(asyncio.run(run())):
        assert (status, kind) == (200, "image/png")
        x = DDIM(8 + seed, eta=0.5).sample(network, shape=(1, 1, 4, 4), seeds=[seed], batch_size=2)
        found = torch.from_numpy(np.array(Image.open(io.BytesIO(body))))
        assert torch.equal(found, images.to_uint8(x)[0, 0])


def test_serve_asgi_answers_errors_in_one_line() -> None:
    broken = False

    def failing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if broken:
            raise ArithmeticError("the model fails")
        return network(x, t)

    async def run() -> None:
        nonlocal broken
        async with Served(failing) as served:
            broken = True
            for query, line in (
                ("steps=5", b"seed must be given, and all be numbers, got 'steps=5'"),
                ("seed=1&size=3", b"the arguments are seed, steps and eta, got 'size'"),
                ("seed=-1", b"seed must be an integer in [0, 9223372036854775807], got -1"),
            ):
                assert await served.get("/sample", query) == (400, "text/plain", line)
            assert (await served.get("/other"))[0] == 404
            assert await served.get("/sample", "seed=1") == (500, "text/plain", b"the model fails")

    asyncio.run(run())


def test_serve_asgi_does_not_start_with_a_failing_model() -> None:
    def failing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("the model fails")

    async def run() -> None:
        served = Served(failing)
        messages = asyncio.Queue[Any]()
        received = asyncio.Queue[Any]()
        await received.put({"type": "lifespan.startup"})
        await served.app({"type": "lifespan"}, received.get, messages.put)
        failed = {"type": "lifespan.startup.failed", "message": "the model fails"}
        assert messages.get_nowait() == failed

    asyncio.run(run())


def held_network() -> tuple[threading.Event, Callable[..., torch.Tensor]]:
    """Returns an event, which is set, and a network that waits while the event is clear."""
    held = threading.Event()
    held.set()

    def waiting(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        held.wait(10)
        return network(x, t)

    return held, waiting


async def begun(served: Served) -> asyncio.Task[Any]:
    """Requests a sample, and returns the task once the request has a slot."""
    task = asyncio.create_task(served.get("/sample", "seed=1"))
    while not served.engine.metrics().active:
        await asyncio.sleep(0.001)
    return task


def test_serve_asgi_frees_the_slot_of_a_client_that_goes() -> None:
    held, waiting = held_network()

    async def run() -> None:
        async with Served(waiting, limit=1) as served:
            held.clear()
            assert (await served.get("/sample", "seed=1", stays=False))[0] == 499
            held.set()
        found = served.engine.metrics()
        assert (found.submitted, found.cancelled, found.finished) == (1, 1, 0)

    asyncio.run(run())


def test_serve_asgi_frees_the_slot_of_a_cancelled_task() -> None:
    held, waiting = held_network()

    async def run() -> None:
        async with Served(waiting) as served:
            held.clear()
            task = await begun(served)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            others = {asyncio.current_task(), served.task}
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == others
            held.set()
        found = served.engine.metrics()
        assert (found.submitted, found.cancelled, found.finished) == (1, 1, 0)

    asyncio.run(run())


def test_serve_asgi_answers_while_its_engine_closes() -> None:
    held, waiting = held_network()

    async def run() -> None:
        async with Served(waiting) as served:
            held.clear()
            task = await begun(served)
            closing = asyncio.create_task(asyncio.to_thread(served.engine.close))
            await asyncio.sleep(0.01)
            held.set()
            await closing
            assert await task == (503, "text/plain", b"the engine is closed")
            refused = await served.get("/sample", "seed=1")
            assert refused == (503, "text/plain", b"the engine is closed, and takes no requests")

    asyncio.run(run())


def test_serve_asgi_exports_every_metric_with_its_type() -> None:
    async def run() -> str:
        async with Served() as served:
            await served.get("/sample", "seed=1&steps=8")
            assert (await served.get("/metrics"))[:2] == (200, "text/plain; version=0.0.4")
        exported: str = served.names["exported"](served.engine.metrics())
        return exported

    text = asyncio.run(run())
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE))
    values = {k: float(v) for k, v in re.findall(r"^(\w+) (\S+)$", text, flags=re.MULTILINE)}
    assert types.keys() == values.keys()
    assert types["fastddim_ticks_total"] == types["fastddim_calls_total"] == "counter"
    assert types["fastddim_latency_p99"] == "gauge"
    assert values["fastddim_ticks_total"] == 8
    assert values["fastddim_finished_total"] == 1
    assert values["fastddim_latency_p50"] > 0
    assert len(values) == 16
