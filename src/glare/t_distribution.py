"""Quantiles of Student's t, which PyTorch lacks."""

import math

import torch

MOST_DEGREES = 10_000.0  # here t is within 0.02 % of the normal distribution
POINTS = 8_001


def t_quantile(probability: float, degrees: float) -> float:
    """The value below which Student's t lies with ``probability`` (0.5..1), with ``degrees`` >= 1 of freedom.

    With t = sqrt(degrees) tan(angle) the density is cos(angle) ** (degrees - 1), which is summed up by trapezoids.
    """
    degrees = min(degrees, MOST_DEGREES)
    angle = torch.linspace(0, math.pi / 2, POINTS, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (degrees - 1), angle)
    mass = torch.cat((mass.new_zeros(1), mass)) / mass[-1]
    wanted = 2 * probability - 1
    place = int(torch.searchsorted(mass, wanted, right=True)) - 1
    part = (wanted - mass[place]) / (mass[place + 1] - mass[place])
    return math.sqrt(degrees) * math.tan(float(torch.lerp(angle[place], angle[place + 1], part)))
