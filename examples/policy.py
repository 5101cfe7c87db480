"""A robot policy, a small model whose whole sampling loop is one CUDA graph.

The policy turns an observation into 16 actions of 7 numbers by ten steps of DDIM. ``DDIM.capture``
records these steps once. Each call replays them with a new seed and a new observation. A CPU has no
graphs: there a call runs the loop and returns the same actions.

    python examples/policy.py
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import fastddim


class Policy(nn.Module):
    """ε(x, t, obs) for actions x of shape (batch, 16, 7), with random weights."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16 * 7 + 1 + 10, width), nn.SiLU(), nn.Linear(width, 16 * 7)
        )

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        inputs = torch.cat([x.flatten(1), t.view(-1, 1) / 1000, obs], 1)
        out: Tensor = self.layers(inputs)
        return out.view_as(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=20, help="number of calls of the policy")
    ticks = parser.parse_args().ticks

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = Policy().to(device).eval()
    ddim = fastddim.DDIM(steps=10, clip=1.0)
    act = ddim.capture(policy, (1, 16, 7), cond={"obs": torch.zeros(1, 10, device=device)})

    observations = torch.rand(ticks, 1, 10, device=device)
    began = time.perf_counter()
    actions = [act(seeds=[tick], cond={"obs": obs}) for tick, obs in enumerate(observations)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = (time.perf_counter() - began) / ticks

    last = {"obs": observations[-1]}
    plain = ddim.sample(policy, shape=(1, 16, 7), seeds=[ticks - 1], cond=last)
    print(f"{took * 1e3:.2f} ms a call on {device}")
    print(f"the last actions equal those of DDIM.sample: {torch.equal(actions[-1], plain)}")


if __name__ == "__main__":
    main()
