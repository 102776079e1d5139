"""How much of a series is a sine: the judge of the free-running forecasts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SineFit:
    """The best fitting amplitude * sin(omega * n + phase) + offset."""

    amplitude: float
    omega: float  # radians per step
    r_squared: float  # share of the variance that the fit explains: 1 for a pure sine


def fit_sine(values: Tensor, omega: float, tolerance: float = 0.2) -> SineFit:
    """Least squares over amplitude, phase and offset for 401 frequencies within `tolerance` (relative) of `omega`.

    values [n]. The frequency is free: a forecast that feeds on itself drifts in phase and is a sine all the same.
    """
    values = values.detach().cpu().double()
    n = torch.arange(len(values), dtype=torch.float64)
    omegas = omega * torch.linspace(1 - tolerance, 1 + tolerance, 401, dtype=torch.float64)
    angle = omegas[:, None] * n
    basis = torch.stack([angle.sin(), angle.cos(), torch.ones_like(angle)], dim=-1)  # [401, n, 3]
    coefficients = torch.linalg.lstsq(basis, values.expand(len(omegas), -1).unsqueeze(-1)).solution  # [401, 3, 1]
    residual = (values - (basis @ coefficients).squeeze(-1)).square().sum(-1)
    best = int(residual.argmin())
    a, b = coefficients[best, :2, 0].tolist()
    variance = (values - values.mean()).square().sum().clamp_min(1e-300)
    return SineFit((a * a + b * b) ** 0.5, omegas[best].item(), 1 - (residual[best] / variance).item())
