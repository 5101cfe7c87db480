"""The engine behind any ASGI server: samples as PNGs, and metrics in Prometheus' text format.

``/sample?seed=7&steps=20&eta=0`` returns the image of a seed, and ``/metrics`` the engine's counts.
A client that goes away frees its slot. No web framework is needed; a server calls ``app``:

    uvicorn --app-dir examples serve_asgi:app

As a script this module calls ``app`` itself, with a few requests at once:

    python examples/serve_asgi.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qsl

from torch import Tensor

import fastddim
from fastddim import DDIM, Engine, QueueFull, Request, embedded
from fastddim.serving.metrics import Metrics
from fastddim.tools import images

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COUNTERS = ("submitted", "finished", "failed", "cancelled", "refused", "late", "ticks", "calls")


def garments() -> Engine:
    """Returns an engine of the model that ships."""
    return Engine(embedded.load(), embedded.SHAPE, slots=8)


class App:
    """An ASGI application around the engine that ``make`` returns when the server starts."""

    def __init__(self, make: Callable[[], Engine] = garments) -> None:
        self._make = make
        self._engine: Engine | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            status, kind, body = await self._answer(scope, receive)
            headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _live(self, receive: Receive, send: Send) -> None:
        """Starts the engine's thread, and at the end finishes the requests that it has."""
        await receive()
        try:
            engine = self._make()
            await asyncio.to_thread(engine.warm_up)
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        async with engine as self._engine:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Message, receive: Receive) -> tuple[int, str, bytes]:
        assert self._engine is not None, "the server must support ASGI's lifespan"
        if scope["path"] == "/metrics":
            return 200, "text/plain; version=0.0.4", exported(self._engine.metrics()).encode()
        if scope["path"] != "/sample":
            return 404, "text/plain", b"the paths are /sample and /metrics"
        try:
            ticket = self._engine.submit(request_of(scope["query_string"].decode()))
        except (TypeError, ValueError) as error:
            return 400, "text/plain", str(error).encode()
        except (QueueFull, RuntimeError) as error:  # RuntimeError: the engine is closed.
            return 503, "text/plain", str(error).encode()
        future, gone = asyncio.wrap_future(ticket), asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:  # Some servers cancel this task where the client goes.
            gone.cancel()
            ticket.cancel()  # The slot is free at the next tick, unless the sample is there.
        if not future.done():
            return 499, "text/plain", b""
        if future.cancelled():
            return 503, "text/plain", b"the engine is closed"
        if (failed := future.exception()) is not None:
            return 500, "text/plain", str(failed).encode()
        return 200, "image/png", png(future.result())


def request_of(query: str) -> Request:
    """Returns the request of a query such as ``seed=7&steps=20``.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    given = dict(parse_qsl(query))
    if unknown := given.keys() - {"seed", "steps", "eta"}:
        raise ValueError(f"the arguments are seed, steps and eta, got {min(unknown)!r}")
    try:
        seed, steps = int(given["seed"]), int(given.get("steps", 20))
        eta = float(given.get("eta", 0))
    except (KeyError, ValueError):
        raise ValueError(f"seed must be given, and all be numbers, got {query!r}") from None
    return Request(seed, ddim=DDIM(steps, eta=eta))


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def png(sample: Tensor) -> bytes:
    file = io.BytesIO()
    images.write_png(images.to_uint8(sample), file)
    return file.getvalue()


def exported(metrics: Metrics) -> str:
    """Returns the metrics in Prometheus' text format, by its client where that is installed."""
    values = asdict(metrics)
    with contextlib.suppress(ImportError):
        return by_client(values)
    lines = []
    for name, value in values.items():
        kind, end = ("counter", "_total") if name in COUNTERS else ("gauge", "")
        full = f"fastddim_{name}{end}"
        lines += [f"# HELP {full} {about(name)}", f"# TYPE {full} {kind}", f"{full} {value:.17g}"]
    return "\n".join(lines) + "\n"


def by_client(values: dict[str, float]) -> str:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    class Collector:
        def collect(self) -> Any:
            for name, value in values.items():
                family = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
                yield family(f"fastddim_{name}", about(name), value=value)

    registry = CollectorRegistry()
    registry.register(Collector())
    text: bytes = generate_latest(registry)
    return text.decode()


def about(name: str) -> str:
    return f"{name.replace('_', ' ')}, as fastddim.Engine.metrics describes"


app = App()


async def called(path: str, query: str = "") -> tuple[int, bytes]:
    """Calls ``app`` as a server does; returns the status and the body."""
    sent: list[Message] = []

    async def receive() -> Message:
        return await asyncio.Future()  # The client stays.

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode()}
    await app(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16, help="number of requests")
    count = parser.parse_args().requests
    life: asyncio.Queue[Message] = asyncio.Queue()
    sent: asyncio.Queue[Message] = asyncio.Queue()
    living = asyncio.create_task(app({"type": "lifespan"}, life.get, sent.put))
    await life.put({"type": "lifespan.startup"})
    start = await sent.get()
    if start["type"] == "lifespan.startup.failed":
        raise SystemExit(start["message"])
    queries = [f"seed={seed}&steps={8 + seed % 3}" for seed in range(count)]
    answers = await asyncio.gather(*(called("/sample", query) for query in queries))
    print(f"{sum(status == 200 for status, _ in answers)} of {count} samples came as PNGs")
    print((await called("/sample", "seed=1&steps=5000"))[1].decode())
    print((await called("/metrics"))[1].decode(), end="")
    await life.put({"type": "lifespan.shutdown"})
    await living


if __name__ == "__main__":
    print(f"fastddim {fastddim.__version__}")
    asyncio.run(main())
