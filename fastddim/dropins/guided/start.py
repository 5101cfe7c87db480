"""Where a loop starts and what changes between its steps, by the options of crowsonkb's fork."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddim.check import kind, whole
from fastddim.dropins._shared import Buffers, pack_rows
from fastddim.dropins.guided.call import Call
from fastddim.levels import Float64
from fastddim.step.arguments import OUTPUTS


class Start(NamedTuple):
    """The options ``skip_timesteps``, ``init_image`` and ``randomize_class`` of a loop.

    ``cond_fn_with_grad`` must be false, because no step carries gradients.
    """

    skip_timesteps: int = 0
    init_image: Tensor | None = None
    randomize_class: bool = False
    cond_fn_with_grad: bool = False

    def check(
        self,
        model: Callable[..., Tensor],
        step: Call,
        shape: Sequence[int],
        device: torch.device,
    ) -> None:
        """Refuses options that the loop of ``step`` from a state of this shape cannot honour."""
        whole("skip_timesteps", self.skip_timesteps, low=0, high=step.count - 1)
        image = self.init_image
        if image is not None and (not isinstance(image, Tensor) or image.dtype not in OUTPUTS):
            got = image.dtype if isinstance(image, Tensor) else kind(image)
            raise TypeError(f"init_image must be float32, bfloat16 or float16, got {got}")
        if image is not None and (image.shape != tuple(shape) or image.device != device):
            raise ValueError(
                f"init_image must have the shape and device of the noise, {tuple(shape)} on "
                f"{device}, got {tuple(image.shape)} on {image.device}"
            )
        if self.cond_fn_with_grad:
            raise ValueError(
                f"cond_fn_with_grad must be False, got {self.cond_fn_with_grad!r}: no step carries "
                f"gradients of the model"
            )
        if self.randomize_class and "y" in step.model_kwargs:
            whole("model.num_classes", getattr(model, "num_classes", None), low=1)

    def state(self, step: Call, x: Tensor) -> Tensor:
        """Returns the first state: x, or init_image (or 0) with x as its noise.

        x_t = √ᾱ_t·init_image + √(1−ᾱ_t)·x, at the first timestep t that is not skipped
        """
        image = self.init_image
        if image is None:
            if not self.skip_timesteps:
                return x
            image = torch.zeros_like(x)
        abar: Float64 = step.schedule.alphas_cumprod[-1 - self.skip_timesteps :][:1]
        a, b = (torch.from_numpy(np.sqrt(level)).float() for level in (abar, 1.0 - abar))
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        # The fused step from clean data adds noise: x0 is the image, and ε the noise.
        table = pack_rows(one, zero, a, zero, b).to(x.device)
        x_t, _ = Buffers().stepped(table, image.float(), x.float(), 0, want_x0=False)
        return x_t

    def changed(self, model: Any, step: Call) -> None:
        """Draws the classes of the next step, if ``randomize_class`` asks for it."""
        if self.randomize_class and "y" in step.model_kwargs:
            y = step.model_kwargs["y"]
            step.model_kwargs["y"] = torch.randint(
                low=0, high=model.num_classes, size=y.shape, device=y.device
            )
