"""DDIM: the device, dtype and mode that it reads from the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.check import SamplingWarning
from fastddim.loop.devices import place_of
from fastddim.loop.model import device_of
from tests.loop.sampler_cases import SHAPE, model
from tests.loops import drawn
from tests.refusals import refused


class Net(torch.nn.Module):
    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), *layers)

    def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = scale * self.layers(x)
        return out


CALLED: list[Callable[[Net], Any]] = [
    lambda net: net,
    lambda net: net.forward,
    lambda net: functools.partial(net, scale=2.0),
    lambda net: functools.partial(functools.partial(net.forward), scale=2.0),
]


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("buffers", [False, True])
def test_noise_is_made_where_the_models_parameters_are(
    called: Callable[[Net], Any], buffers: bool
) -> None:
    net: Any = Net().eval()
    if buffers:
        net = torch.nn.Module()
        net.register_buffer("here", torch.zeros(1))
        net.forward = lambda x, t: net.here * x
    with torch.device("meta"):  # the default device, where no noise is drawn
        out = DDIM(3).sample(net if buffers else called(net), shape=(2, 3), seeds=[0, 1])
        nowhere = DDIM(3).sample(model, shape=(2, 3), seeds=[0, 1])
    assert out.device.type == "cpu"
    assert nowhere.device.type == "meta"


def test_a_given_device_outweighs_the_models() -> None:
    net = Net().to("meta")
    assert device_of(net) == torch.device("meta")
    assert place_of("cpu", net) == torch.device("cpu")
    assert place_of(None, net) == torch.device("meta")
    assert place_of(None, lambda x, t: net(x, t)) == torch.device("cpu")
    assert place_of(None, torch.nn.Identity()) == torch.device("cpu")  # without parameters


@pytest.mark.gpu
def test_on_a_gpu_a_network_that_is_there_gets_noise_there() -> None:
    net = Net().eval().cuda()
    out = DDIM(3).sample(net, shape=(2, 3), seeds=[0, 1])
    assert out.is_cuda
    assert torch.equal(out, DDIM(3).sample(net, shape=(2, 3), seeds=[0, 1], device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "layer", [torch.nn.Linear(3, 3), torch.nn.Conv1d(3, 3, 1), torch.nn.LayerNorm(3)]
)
def test_the_refusal_of_another_dtype_names_both(
    dtype: torch.dtype, layer: torch.nn.Module
) -> None:
    net = Net().to(dtype)
    net.layers = torch.nn.Sequential(layer.to(dtype))
    call = functools.partial(DDIM(3).sample, net, shape=(2, 3, 3), seeds=[0, 1])
    said = (f"got {torch.float32}", f"dtype={dtype}", "autocast")
    refused(call, ValueError, "dtype", *said)
    assert call(dtype=dtype).isfinite().all()


def test_a_network_that_casts_its_own_input_is_no_fault() -> None:
    net = Net().to(torch.bfloat16).eval()
    out = DDIM(3).sample(lambda x, t: net(x.bfloat16(), t), shape=(2, 3), seeds=[0, 1])
    net.register_forward_pre_hook(lambda m, a: (a[0].bfloat16(), a[1]))
    assert torch.equal(out, DDIM(3).sample(net, shape=(2, 3), seeds=[0, 1]))


def test_errors_of_the_model_itself_pass_unchanged() -> None:
    class Failing(Net):
        def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
            raise RuntimeError("of another type")

    with pytest.raises(RuntimeError, match="of another type"):
        DDIM(3).sample(Failing(), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        DDIM(3).sample(Net(), torch.zeros(2, 4))


def test_a_float64_models_output_is_rounded_once() -> None:
    seen: list[torch.dtype] = []

    def exact(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return 0.3 * torch.sin(x)

    x = drawn(*SHAPE)
    out = DDIM(5).sample(exact, x, dtype=torch.float64)
    assert seen == [torch.float64] * 5
    assert torch.equal(out, DDIM(5).sample(lambda x, t: exact(x.double(), t).float(), x))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (torch.nn.Dropout(0.1), "Dropout"),
        (torch.nn.BatchNorm1d(3), "BatchNorm1d"),
        (torch.nn.TransformerEncoderLayer(3, 1, 4, 0.2), "dropout of 0.2"),
    ],
)
def test_a_network_in_training_mode_is_warned_of_once(layer: torch.nn.Module, named: str) -> None:
    net, ddim, x = Net(layer), DDIM(3), torch.zeros(2, 3)
    with pytest.warns(SamplingWarning) as caught:
        ddim.sample(net, x)
    [warning] = caught
    assert named in str(warning.message)
    assert "model.eval()" in str(warning.message)
    assert warning.filename == __file__
    ddim.sample(net, x)
    list(ddim.iterate(net.forward, x))


@pytest.mark.parametrize(
    "layer", [torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.GroupNorm(1, 3)]
)
def test_training_mode_that_changes_nothing_is_not_warned_of(layer: torch.nn.Module) -> None:
    DDIM(3).sample(Net(layer), torch.zeros(2, 3))
    DDIM(3).sample(Net(torch.nn.Dropout(0.5)).eval(), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), [2, 3], torch.Size([2, 3])])
@pytest.mark.parametrize("run", ["sample", "iterate"])
def test_the_refusal_of_a_shape_as_x_T_names_the_argument(run: str, shape: Any) -> None:
    call = lambda: getattr(DDIM(3), run)(model, shape)  # noqa: E731
    refused(call, TypeError, "x_T", f"shape={tuple(shape)}")


def test_a_number_as_x_T_is_refused() -> None:
    number: Any = 3
    refused(lambda: DDIM(3).sample(model, number), TypeError, "x_T must be a tensor, got int")
