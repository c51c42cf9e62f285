"""Draws scenes as anti-aliased clips, all at once, on any device.

Shape letters: B clips, K things, T frames, H x W pixels.
"""

import math

import torch

SOFT_EDGE = 3.0  # pixels around a thing that still count as foreground
FOREGROUND_WEIGHT = 2.0


def _circle(x, y):
    return torch.sqrt(x * x + y * y) - 0.92


def _square(x, y):
    return torch.maximum(x.abs(), y.abs()) - 0.8


def _triangle(x, y):
    y = y - 0.2
    return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - 0.5 * y) - 0.58


def _star(x, y):
    """Five points, the first one up: fold the plane into one half point, then measure to its straight edge."""
    sector = math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector, 2 * sector) - sector
    radius = torch.sqrt(x * x + y * y)
    along, across = radius * torch.cos(angle), radius * torch.sin(angle).abs()
    tip, notch = 1.05, 0.48
    edge_along, edge_across = notch * math.cos(sector) - tip, notch * math.sin(sector)
    length = math.hypot(edge_along, edge_across)
    return ((along - tip) * edge_across - across * edge_along) / length


def _heart(x, y):
    """Two round lobes above a right-angled tip (Inigo Quilez, "2D distance functions")."""
    scale = 0.64
    x, y = x.abs() * scale, 0.58 - y * scale
    lobe = torch.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(2) / 4
    diagonal = 0.5 * (x + y).clamp(min=0)
    tip = torch.minimum(x**2 + (y - 1) ** 2, (x - diagonal) ** 2 + (y - diagonal) ** 2)
    tip = torch.sqrt(tip) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, tip) / scale


def _ring(x, y):
    return (torch.sqrt(x * x + y * y) - 0.7).abs() - 0.24


DISTANCES = (_circle, _square, _triangle, _star, _heart, _ring)  # in the order of scenes.SHAPES, in radii


def render(
    things: torch.Tensor, background: torch.Tensor, frames: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw clips and say where the things are.

    things: [B, K, 9], rows of `scenes.THING_FIELDS`; later rows cover earlier ones.
    background: [B, 6], RGB in 0..1 at the top and at the bottom.
    Returns video [B, 3, T, H, W] in -1..1 and loss weights [B, 1, T, H, W], 1 on plain background and more near things.
    """
    device, pixels = things.device, float(min(height, width))
    x = ((torch.arange(width, device=device) + 0.5) / pixels).view(1, 1, 1, width)
    y = ((torch.arange(height, device=device) + 0.5) / pixels).view(1, 1, height, 1)
    time = torch.linspace(0, 1, frames, device=device).view(1, frames, 1, 1)
    fade = ((torch.arange(height, device=device) + 0.5) / height).view(1, 1, 1, height, 1)

    top, bottom = background.view(-1, 2, 3, 1, 1, 1).unbind(1)
    video = (top + (bottom - top) * fade).expand(-1, -1, frames, -1, width)
    near = torch.zeros(1, device=device)
    for thing in things.unbind(1):
        shape, red, green, blue, radius, x0, y0, way_x, way_y = thing.view(-1, 9, 1, 1, 1).unbind(1)
        u = (x - x0 - way_x * time) / radius
        v = (y - y0 - way_y * time) / radius
        distance = torch.zeros(1, device=device)
        for index, of_shape in enumerate(DISTANCES):
            distance = torch.where(shape == index, of_shape(u, v), distance)
        distance = distance * (radius * pixels)
        cover = (0.5 - distance).clamp(0, 1).unsqueeze(1)
        video = torch.lerp(video, torch.stack([red, green, blue], 1), cover)
        near = torch.maximum(near, (SOFT_EDGE + 0.5 - distance).clamp(0, 1).unsqueeze(1))
    return video * 2 - 1, 1 + FOREGROUND_WEIGHT * near
