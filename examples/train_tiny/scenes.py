"""What a clip can show, how it is captioned, and which combinations training never sees.

Lengths are in units of the frame's shorter side, x to the right, y down, the origin in the top left corner.
"""

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")

COLOURS = {  # of things, RGB in 0..1
    "red": (0.90, 0.16, 0.22),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (1.00, 0.86, 0.22),
    "green": (0.20, 0.76, 0.24),
    "cyan": (0.20, 0.84, 0.90),
    "blue": (0.22, 0.36, 1.00),
    "purple": (0.62, 0.28, 0.90),
    "pink": (1.00, 0.52, 0.76),
}

BACKGROUNDS = {  # mid-height colour; a clip fades from a lighter top to a darker bottom
    "black": (0.09, 0.09, 0.11),
    "gray": (0.48, 0.50, 0.53),
    "white": (0.90, 0.90, 0.88),
    "blue": (0.11, 0.20, 0.42),
    "green": (0.12, 0.33, 0.24),
    "brown": (0.39, 0.26, 0.15),
}
FADE = 0.12  # the top is this much lighter than mid-height, the bottom this much darker

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

SPEEDS = {"slowly": (0.20, 0.28), "": (0.34, 0.44), "quickly": (0.50, 0.60)}  # way covered in one clip

RADII = (0.12, 0.18)
MARGIN = 0.02  # a thing stays this far inside the frame

MAX_THINGS = 4
THING_FIELDS = ("shape", "red", "green", "blue", "radius", "x", "y", "way_x", "way_y")
ABSENT = (0.0, 0.0, 0.0, 0.0, 0.01, -9.0, -9.0, 0.0, 0.0)  # far outside the frame


@dataclass(frozen=True, kw_only=True)
class Thing:
    shape: str
    colour: str
    direction: str
    speed: str = ""

    def __str__(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return " ".join(f"{article} {self.colour} {self.shape} moves {self.speed} {self.direction}".split())


@dataclass(frozen=True, kw_only=True)
class Scene:
    things: tuple[Thing, ...]
    background: str

    def caption(self) -> str:
        """The sentence the model is prompted with: "a red circle moves left over a blue background"."""
        return " and ".join(map(str, self.things)) + f" over a {self.background} background"


def is_held_out(thing: Thing, background: str) -> bool:
    """Whether this (shape, colour, background, direction) is among the seventh that training never draws.

    A Latin pattern: every pair of attributes still occurs in training, only the whole combination is new.
    """
    code = (
        SHAPES.index(thing.shape)
        + 2 * list(COLOURS).index(thing.colour)
        + 3 * list(BACKGROUNDS).index(background)
        + 5 * list(DIRECTIONS).index(thing.direction)
    )
    return code % 7 == 0


def all_single_scenes(held_out: bool) -> list[Scene]:
    """Every scene of one thing at ordinary speed, of the held-out part or of the other; colours differ from the background."""
    scenes = [
        Scene(things=(Thing(shape=shape, colour=colour, direction=direction),), background=background)
        for shape in SHAPES
        for colour in COLOURS
        for background in BACKGROUNDS
        for direction in DIRECTIONS
        if colour != background
    ]
    return [scene for scene in scenes if is_held_out(scene.things[0], scene.background) == held_out]


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` different held-out scenes of one thing, drawn with a fixed seed."""
    scenes = all_single_scenes(held_out=True)
    return [scenes[i] for i in np.random.default_rng(seed).permutation(len(scenes))[:count]]


def sample_scene(rng: np.random.Generator, two_things: float = 0.15) -> Scene:
    """A random scene of the training part; with probability `two_things` it shows two, in different colours."""
    background = rng.choice(list(BACKGROUNDS))
    things: list[Thing] = []
    while len(things) < 1 + (rng.random() < two_things):
        thing = Thing(
            shape=str(rng.choice(SHAPES)),
            colour=str(rng.choice(list(COLOURS))),
            direction=str(rng.choice(list(DIRECTIONS))),
            speed=str(rng.choice(list(SPEEDS))),
        )
        taken = {background, *(other.colour for other in things)}
        if thing.colour not in taken and not is_held_out(thing, background):
            things.append(thing)
    return Scene(things=tuple(things), background=str(background))


def layout(scene: Scene, rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random sizes and places for a scene: rows of `THING_FIELDS` [MAX_THINGS, 9] and top and bottom colours [6]."""
    frame = np.array([width, height]) / min(width, height)
    rows = [ABSENT] * MAX_THINGS
    for i, thing in enumerate(scene.things):
        radius = rng.uniform(*RADII)
        way = np.array(DIRECTIONS[thing.direction]) * rng.uniform(*SPEEDS[thing.speed])
        low = radius + MARGIN + np.maximum(-way, 0)
        high = frame - radius - MARGIN - np.maximum(way, 0)
        rows[i] = (SHAPES.index(thing.shape), *COLOURS[thing.colour], radius, *rng.uniform(low, high), *way)
    middle = np.array(BACKGROUNDS[scene.background])
    background = np.concatenate([middle + (1 - middle) * FADE, middle * (1 - FADE)])
    return np.array(rows, np.float32), background.astype(np.float32)


def random_layout(rng: np.random.Generator, count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` scenes without a caption, for the VAE: four overlapping things of any colour that go anywhere.

    Returns rows of `THING_FIELDS` [count, MAX_THINGS, 9] and top and bottom colours [count, 6].
    """
    frame = np.array([width, height]) / min(width, height)
    size = (count, MAX_THINGS, 1)
    columns = (
        rng.integers(len(SHAPES), size=size),
        rng.random((count, MAX_THINGS, 3)),
        rng.uniform(0.06, 0.26, size),
        rng.random((count, MAX_THINGS, 2)) * frame,
        rng.normal(0, 0.3, (count, MAX_THINGS, 2)),
    )
    things = np.concatenate(columns, -1).astype(np.float32)
    top, change = rng.random((count, 3)), rng.normal(0, 0.1, (count, 3))
    return things, np.concatenate([top, np.clip(top + change, 0, 1)], -1).astype(np.float32)
