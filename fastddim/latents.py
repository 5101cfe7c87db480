"""Interpolation between two latents along the sphere, on which noise keeps its norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastddim.check import finite, kind


def slerp(a: Tensor, b: Tensor, fractions: float | Sequence[float] | Tensor) -> Tensor:
    """Interpolates latents spherically, sample by sample (Song et al. 2021, eq. 67).

        sin((1−α)·θ)/sin θ · a + sin(α·θ)/sin θ · b,   θ = arccos(aᵀb / ‖a‖‖b‖)

    in float64. Latents that point the same way, or of which one is zero, are interpolated linearly.
    Opposite latents are refused, since no path between them is the shortest.

    Args:
        a, b: latents, (batch, ...), floating point, of one shape.
        fractions: α, a number or several: 0 gives a, and 1 gives b.

    Returns:
        a's dtype: (batch, ...) for one number, (len(fractions), batch, ...) for several.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.

    >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else kind(tensor)
            raise TypeError(f"{name} must be a floating point tensor, got {got}")
        if tensor.dim() < 2 or tensor.shape != a.shape or tensor.device != a.device:
            raise ValueError(
                f"a and b must have one shape (batch, ...) and device, got {tuple(a.shape)} on "
                f"{a.device} and {tuple(tensor.shape)} on {tensor.device}"
            )
    one = isinstance(fractions, (int, float)) or (
        isinstance(fractions, Tensor) and fractions.dim() == 0
    )
    if not one and not (isinstance(fractions, Iterable) and not isinstance(fractions, str)):
        raise TypeError(f"fractions must be a number or numbers, got {kind(fractions)}")
    values = [fractions] if one else list(fractions)  # type: ignore[arg-type]
    alphas = [finite(f"fractions[{i}]", value) for i, value in enumerate(values)]
    p, q = (tensor.detach().double().flatten(1) for tensor in (a, b))
    cosine = (p * q).sum(1) / (p.norm(dim=1) * q.norm(dim=1))
    # arccos loses half the digits near ±1; the tangent of the half angle loses none.
    u, v = (tensor / tensor.norm(dim=1, keepdim=True) for tensor in (p, q))
    theta = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)).unsqueeze(1)
    if bool((cosine < -1 + 1e-12).any()):
        raise ValueError("b must not be opposite to a: no path between them is the shortest")
    straight = ~(theta > 1e-6)  # also where θ is NaN, for a zero vector
    sine = torch.where(straight, 1.0, theta.sin())
    points = []
    for alpha in alphas:
        w_a = torch.where(straight, 1 - alpha, ((1 - alpha) * theta).sin() / sine)
        w_b = torch.where(straight, alpha, (alpha * theta).sin() / sine)
        points.append((w_a * p + w_b * q).view(a.shape).to(a.dtype))
    if one:
        return points[0]
    return torch.stack(points) if points else a.new_empty((0, *a.shape))
