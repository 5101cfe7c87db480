"""Ray Serve around the engine: each replica has an engine, and Ray shares out the requests.

A request that waits holds no thread: the handler awaits the engine's future. The script needs the
extra ``ray``. It starts two replicas, calls them by a handle and by HTTP, and stops them:

    python examples/serve_ray.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import asyncio
import io
import urllib.request
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray import serve
from starlette.requests import Request as Http
from starlette.responses import Response

from fastddim import DDIM, Engine, Request, embedded
from fastddim.tools import images


class Sampler:
    """A replica: an engine of the garment model, whose thread takes the ticks."""

    def __init__(self, slots: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._engine = Engine(embedded.load(), embedded.SHAPE, slots)
        self._engine.warm_up()
        self._engine.start()

    async def sample(self, seed: int, steps: int) -> npt.NDArray[Any]:
        """Returns the sample of a seed. A cancelled call frees its slot."""
        future = self._engine.submit(Request(seed, ddim=DDIM(steps)))
        return (await asyncio.wrap_future(future)).numpy()

    async def __call__(self, http: Http) -> Response:
        """Returns the PNG of ``/?seed=7&steps=20``."""
        try:
            asked = (int(http.query_params.get(name, "20")) for name in ("seed", "steps"))
            x = torch.from_numpy(await self.sample(*asked))
        except (TypeError, ValueError) as error:
            return Response(str(error), status_code=400)
        file = io.BytesIO()
        images.write_png(images.to_uint8(x), file)
        return Response(file.getvalue(), media_type="image/png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2, help="number of engines")
    parser.add_argument("--slots", type=int, default=4, help="number of samples in a batch")
    parser.add_argument("--requests", type=int, default=12, help="number of requests")
    parser.add_argument("--port", type=int, default=8000, help="port of the HTTP server")
    given = parser.parse_args()

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    deployment = serve.deployment(
        Sampler,
        num_replicas=given.replicas,
        # More requests than slots reach a replica, so that a free slot finds the next one there.
        max_ongoing_requests=4 * given.slots,
        ray_actor_options={"num_cpus": 1},
    )
    handle = serve.run(deployment.bind(given.slots, 1))
    calls = [handle.sample.remote(seed, 8 + seed % 5) for seed in range(given.requests)]
    samples = [torch.from_numpy(np.array(call.result())) for call in calls]

    torch.set_num_threads(1)
    model = embedded.load()
    same = all(
        torch.equal(
            sample,
            DDIM(8 + seed % 5).sample(
                model, shape=(1, *embedded.SHAPE), seeds=[seed], batch_size=given.slots
            )[0],
        )
        for seed, sample in enumerate(samples)
    )
    print(f"{len(samples)} samples, equal to those of DDIM.sample: {same}")
    url = f"http://127.0.0.1:{given.port}/?seed=3&steps=8"
    with urllib.request.urlopen(url) as answer:
        png = answer.read()
    print(f"by HTTP: {answer.headers['content-type']} of {len(png)} bytes")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
