"""Scenes of coloured shapes: what there is to see, drawn at random and rendered as a small picture."""

import cmath
import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SIDE = 64  # pixels
OVERSAMPLING = 2  # pictures are drawn at twice the side and averaged down: smooth edges at little cost

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "blue": (45, 90, 225),
    "green": (40, 160, 70),
    "yellow": (240, 210, 40),
    "orange": (240, 135, 30),
    "purple": (135, 60, 175),
    "cyan": (50, 200, 215),
    "pink": (245, 130, 180),
}
RARE_COLOURS: dict[str, Colour] = {
    "lime": (180, 230, 60),
    "maroon": (130, 20, 60),
    "teal": (0, 120, 115),
    "lavender": (190, 165, 240),
}
PALETTE = COLOURS | RARE_COLOURS
BACKGROUNDS: dict[str, Colour] = {
    "white": (246, 246, 246),
    "black": (14, 14, 14),
    "gray": (130, 130, 130),
    "beige": (226, 210, 176),
    "navy": (18, 24, 78),
    "brown": (88, 56, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
RARE_SHAPES = ("crescent",)
RADII = {"small": (4.2, 5.2), "large": (8.6, 10.0)}  # pixels; a large shape still fits a third of the side


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` equal shapes; in a view of a scene (what a caption mentions), "" stands for what is not mentioned."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One group of shapes, or two of which the first is `left` of or `above` the second, on a background."""

    groups: tuple[Group, ...]
    relation: str
    background: str


def draw_scene(rng: Random, *, rare: bool) -> Scene:
    """A random scene; a rare one has a shape and colours of its own, to be learned from few examples."""
    pair = rng.random() < 0.6
    groups = [_draw_group(rng, rare, max_count=3 if pair else 4)]
    while pair and len(groups) < 2:
        other = _draw_group(rng, rare, max_count=3)
        if (other.colour, other.shape) != (groups[0].colour, groups[0].shape):
            groups.append(other)
    return Scene(
        groups=tuple(groups),
        relation=rng.choice(("left", "above")) if pair else "",
        background=rng.choice(tuple(BACKGROUNDS)),
    )


def _draw_group(rng: Random, rare: bool, max_count: int) -> Group:
    return Group(
        count=rng.randint(1, max_count),
        size=rng.choice(tuple(RADII)),
        colour=rng.choice(tuple(RARE_COLOURS if rare else COLOURS)),
        shape=rng.choice(RARE_SHAPES if rare else SHAPES),
    )


def render(scene: Scene, rng: Random, *, shift: complex = 0j, gain: float = 1.0) -> Image.Image:
    """The picture of a scene, RGB, SIDE x SIDE.

    `rng` places the shapes and shades the colours; the same state of it with another `shift` (pixels, x + iy)
    or `gain` (of brightness) gives a near duplicate.
    """
    side = SIDE * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), _shade(BACKGROUNDS[scene.background], 7, rng, gain))
    pen = ImageDraw.Draw(canvas)
    for group, cells in zip(scene.groups, _regions(scene)):
        colour = _shade(PALETTE[group.colour], 14, rng, gain)
        for left, top, width, height in rng.sample(cells, group.count):
            radius = rng.uniform(*RADII[group.size])
            slack_x, slack_y = width / 2 - radius, height / 2 - radius
            centre = complex(
                left + width / 2 + slack_x * rng.uniform(-1, 1),
                top + height / 2 + slack_y * rng.uniform(-1, 1),
            )
            turn = cmath.rect(radius * OVERSAMPLING, rng.uniform(-0.2, 0.2))  # up to 11 degrees
            _draw_shape(pen, group.shape, (centre + shift) * OVERSAMPLING, turn, colour)
    return canvas.reduce(OVERSAMPLING)


def _regions(scene: Scene) -> list[list[tuple[float, float, float, float]]]:
    """For each group the cells (left, top, width, height) in which its shapes may lie: none overlap."""
    half, third = SIDE / 2, SIDE / 3
    if len(scene.groups) == 1:
        return [[(x, y, half, half) for x in (0.0, half) for y in (0.0, half)]]
    if scene.relation == "left":
        return [[(x, row * third, half, third) for row in range(3)] for x in (0.0, half)]
    return [[(column * third, y, third, half) for column in range(3)] for y in (0.0, half)]


def _shade(colour: Colour, spread: int, rng: Random, gain: float) -> Colour:
    """The colour, up to `spread` off in each channel: a colour is a region to learn, not one constant."""
    shaded = (round((channel + rng.uniform(-spread, spread)) * gain) for channel in colour)
    red, green, blue = (min(255, max(0, channel)) for channel in shaded)
    return red, green, blue


def _star(points: int, inner: float) -> tuple[complex, ...]:
    """Corners of a star, alternately at radius 1 and `inner`, the first one upwards (y grows downwards)."""
    radii = (1.0, inner)
    return tuple(cmath.rect(radii[k % 2], math.pi * (k / points - 0.5)) for k in range(2 * points))


def _heart(steps: int = 28) -> tuple[complex, ...]:
    """The classic curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to radius one."""
    curve = []
    for step in range(steps):
        t = 2 * math.pi * step / steps
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append(complex(x, -y) / 16)
    return tuple(curve)


def _crescent(steps: int = 16) -> tuple[complex, ...]:
    """A disc of radius one without the disc of radius 0.85 about 0.5: it opens to the right."""
    horn = math.acos((1 + 0.5**2 - 0.85**2) / (2 * 0.5))  # where the two circles meet, seen from the first
    meet = cmath.phase(cmath.rect(1, horn) - 0.5)  # ... and from the second
    outer = [cmath.rect(1, horn + (2 * math.pi - 2 * horn) * k / steps) for k in range(steps + 1)]
    inner = [0.5 + cmath.rect(0.85, -meet - (2 * math.pi - 2 * meet) * k / steps) for k in range(steps + 1)]
    return tuple(outer + inner)


_ARM = 0.36  # half the width of an arm of the cross
_POLYGONS: dict[str, tuple[complex, ...]] = {
    "square": tuple(cmath.rect(1.15, math.pi * (k / 2 + 0.25)) for k in range(4)),
    "triangle": tuple(0.15j + cmath.rect(1.15, math.pi * (2 * k / 3 - 0.5)) for k in range(3)),
    "star": _star(5, 0.42),
    "diamond": (-1j, 0.62 + 0j, 1j, -0.62 + 0j),
    "cross": tuple(
        1j**quarter * corner
        for quarter in range(4)
        for corner in (complex(1, -_ARM), complex(1, _ARM), complex(_ARM, _ARM))
    ),
    "heart": _heart(),
    "crescent": _crescent(),
}


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: complex, turn: complex, colour: Colour) -> None:
    """Draws one shape; `turn` is its radius and rotation as one complex number."""
    if shape in _POLYGONS:
        corners = [centre + turn * corner for corner in _POLYGONS[shape]]
        pen.polygon([(corner.real, corner.imag) for corner in corners], fill=colour)
        return
    radius = abs(turn)
    box = (centre.real - radius, centre.imag - radius, centre.real + radius, centre.imag + radius)
    if shape == "ring":
        pen.ellipse(box, outline=colour, width=max(2, round(0.34 * radius)))
    else:
        pen.ellipse(box, fill=colour)
