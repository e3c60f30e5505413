"""The toy world: procedural pixel-art scenes with named classes and unnamed identities.

A picture is 32 pixels high and 32 wide per subject.  A subject has a class and an identity: three colours,
a pattern, an accessory, skin and build.  Everything is drawn in batches from tensors, so a picture is a pure
function of what is asked for, and a seed gives the same picture on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .vocabulary import CLASSES, COLOURS, SCENES

TILE = 32
PALETTE = torch.tensor(list(COLOURS.values()))
COLOUR_JITTER = 0.07


@dataclass(frozen=True)
class _Rows:
    """Shared by the batches of the world: index and concatenate all tensors at once."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index):
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def cat(cls, parts: Sequence):
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Subjects(_Rows):
    """N subjects.  `*_name` index COLOURS; the colours themselves carry a jitter finer than the names."""

    kind: Tensor  # (N,) class index
    primary_name: Tensor  # (N,)
    secondary_name: Tensor  # (N,)
    accent_name: Tensor  # (N,)
    primary: Tensor  # (N, 3) in 0..1
    secondary: Tensor  # (N, 3)
    accent: Tensor  # (N, 3)
    pattern: Tensor  # (N,) index of PATTERNS
    accessory: Tensor  # (N,) 0..2, index of ACCESSORIES[kind]
    skin: Tensor  # (N, 3)
    build: Tensor  # (N, 2) width and height factors


@dataclass(frozen=True)
class Poses(_Rows):
    """Where and how a subject stands in its tile; offsets in pixels."""

    offset: Tensor  # (N, 2) x, y
    scale: Tensor  # (N,)
    flip: Tensor  # (N,) -1 or 1
    raised: Tensor  # (N,) 0..1, arms, wings, tails


@dataclass(frozen=True)
class Scenes(_Rows):
    """Backgrounds.  `kind` picks the props; the colours may be anything (a scene concept uses its own)."""

    kind: Tensor  # (N,) index of SCENES
    sky: Tensor  # (N, 3)
    low_sky: Tensor  # (N, 3)
    ground: Tensor  # (N, 3)
    prop: Tensor  # (N, 3)
    horizon: Tensor  # (N,) in pixels from the top
    shift: Tensor  # (N, 3) positions of props in pixels
    light: Tensor  # (N, 3) multiplies the whole picture


# sky, sky at the horizon, ground, prop
_SCENE_COLOURS = torch.tensor(
    [
        [[0.45, 0.75, 0.97], [0.75, 0.90, 0.98], [0.94, 0.84, 0.58], [0.13, 0.47, 0.76]],  # beach: sea
        [[0.72, 0.80, 0.88], [0.86, 0.90, 0.95], [0.95, 0.97, 1.00], [0.30, 0.46, 0.46]],  # snow: firs
        [[0.55, 0.78, 0.66], [0.36, 0.60, 0.42], [0.26, 0.47, 0.20], [0.36, 0.24, 0.14]],  # forest: trunks
        [[0.05, 0.05, 0.18], [0.13, 0.12, 0.34], [0.10, 0.16, 0.17], [0.97, 0.94, 0.74]],  # night: moon
        [[0.97, 0.72, 0.42], [0.99, 0.86, 0.62], [0.85, 0.57, 0.30], [0.22, 0.50, 0.26]],  # desert: cactus
        [[0.62, 0.68, 0.78], [0.78, 0.78, 0.80], [0.38, 0.38, 0.41], [0.44, 0.47, 0.56]],  # city: towers
    ]
)


def _uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def random_subjects(count: int, generator: torch.Generator, kind: Tensor | int | None = None) -> Subjects:
    """Draw identities; `kind` fixes the class, one for all or one each."""
    if kind is None:
        kind = torch.randint(len(CLASSES), (count,), generator=generator)
    elif isinstance(kind, int):
        kind = torch.full((count,), kind)
    names = torch.randint(len(PALETTE), (3, count), generator=generator)
    # The two large areas never share a name: a subject in one colour has no parts to tell apart.
    clash = names[0] == names[1]
    names[1] = torch.where(clash, (names[1] + 3) % len(PALETTE), names[1])
    jitter = _uniform((3, count, 3), -COLOUR_JITTER, COLOUR_JITTER, generator)
    primary, secondary, accent = (PALETTE[names] + jitter).clamp(0, 1)
    tone = _uniform((count, 1), 0.0, 1.0, generator)
    skin = tone * torch.tensor([0.98, 0.83, 0.70]) + (1 - tone) * torch.tensor([0.45, 0.29, 0.19])
    return Subjects(
        kind=kind,
        primary_name=names[0],
        secondary_name=names[1],
        accent_name=names[2],
        primary=primary,
        secondary=secondary,
        accent=accent,
        # Half of all cloth is plain: patterns are the hardest thing to draw at this size.
        pattern=(torch.randint(4, (count,), generator=generator) - 1).clamp(min=0),
        accessory=torch.randint(3, (count,), generator=generator),
        skin=skin,
        build=_uniform((count, 2), 0.86, 1.14, generator),
    )


def random_poses(count: int, generator: torch.Generator) -> Poses:
    return Poses(
        offset=_uniform((count, 2), -1.0, 1.0, generator) * torch.tensor([2.5, 1.0]),
        scale=_uniform((count,), 0.92, 1.06, generator),
        flip=torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0,
        raised=torch.rand(count, generator=generator),
    )


def random_scenes(count: int, generator: torch.Generator, kind: Tensor | int | None = None) -> Scenes:
    if kind is None:
        kind = torch.randint(len(SCENES), (count,), generator=generator)
    elif isinstance(kind, int):
        kind = torch.full((count,), kind)
    colours = _SCENE_COLOURS[kind] + _uniform((count, 4, 3), -0.03, 0.03, generator)
    sky, low_sky, ground, prop = colours.clamp(0, 1).unbind(1)
    light = _uniform((count, 1), 0.90, 1.06, generator) + _uniform((count, 3), -0.03, 0.03, generator)
    return Scenes(
        kind=kind,
        sky=sky,
        low_sky=low_sky,
        ground=ground,
        prop=prop,
        horizon=_uniform((count,), 16.0, 21.0, generator),
        shift=_uniform((count, 3), 0.0, float(TILE), generator),
        light=light,
    )


# --- drawing ------------------------------------------------------------------------------------------------


class _Canvas:
    """Paint shapes with a one-pixel soft edge, in a frame (u, v) of pixels around a subject's centre."""

    def __init__(self, u: Tensor, v: Tensor, scale: Tensor | float = 1.0):
        self.u, self.v, self.scale = u, v, scale
        self.rgb = torch.zeros(u.shape[0], 3, *u.shape[1:])
        self.alpha = torch.zeros(u.shape[0], 1, *u.shape[1:])

    def paint(self, distance: Tensor, colour: Tensor) -> None:
        """distance (N, H, W): signed, in pixels, negative inside; colour (N, 3) or (N, 3, H, W) or (3,)."""
        cover = (0.5 - distance * self.scale).clamp(0, 1)[:, None]
        if colour.ndim < 4:
            colour = colour.reshape(-1, 3, 1, 1)
        self.rgb = self.rgb + cover * (colour - self.rgb)
        self.alpha = self.alpha + cover * (1 - self.alpha)

    def ellipse(self, x, y, rx, ry) -> Tensor:
        near = ((self.u - x) / rx) ** 2 + ((self.v - y) / ry) ** 2
        radius = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
        return ((near + 1e-9).sqrt() - 1) * radius

    def box(self, x, y, hx, hy) -> Tensor:
        return torch.maximum((self.u - x).abs() - hx, (self.v - y).abs() - hy)

    def wedge(self, x, top, bottom, top_half, bottom_half) -> Tensor:
        """Trapezoid between two heights; a triangle when one half-width is 0."""
        part = ((self.v - top) / (bottom - top)).clamp(0, 1)
        half = top_half + (bottom_half - top_half) * part
        return torch.maximum((self.u - x).abs() - half, torch.maximum(top - self.v, self.v - bottom))


def _fabric(canvas: _Canvas, colour: Tensor, pattern: Tensor) -> Tensor:
    """(N, 3, H, W): the first colour as cloth: plain, striped or dotted with a lighter or darker shade."""
    dark = colour.mean(1, keepdim=True) < 0.5
    shade = torch.where(dark, colour * 0.4 + 0.6, colour * 0.35)[:, :, None, None]
    stripes = torch.remainder(canvas.v + 0.5, 4.0) < 2.0
    dots = (torch.remainder(canvas.v + 1.0, 4.0) < 2.0) & (torch.remainder(canvas.u + 1.0, 4.0) < 2.0)
    kind = pattern[:, None, None]
    mixed = ((kind == 1) & stripes) | ((kind == 2) & dots)
    return torch.where(mixed[:, None], shade, colour[:, :, None, None])


_DARK = torch.tensor([0.12, 0.12, 0.16])
_TROUSERS = torch.tensor([0.25, 0.27, 0.36])
_GLASS = torch.tensor([0.70, 0.87, 0.95])
_METAL = torch.tensor([0.62, 0.64, 0.68])
_BEAK = torch.tensor([0.97, 0.68, 0.15])


def _person(canvas: _Canvas, subject: Subjects, raised: Tensor, dress: bool) -> None:
    width = subject.build[:, 0, None, None]
    height = subject.build[:, 1, None, None]
    lift = raised[:, None, None]
    cloth = _fabric(canvas, subject.primary, subject.pattern)
    shoulder = 1.0 - 1.5 * (height - 1.0)
    head = shoulder - 5.5
    if dress:  # long hair lies behind the body
        canvas.paint(canvas.box(0.0, head + 2.0, 5.2, 5.0), subject.secondary)
    leg = 13.0
    legs = subject.skin if dress else _TROUSERS
    for side in (-1, 1):
        canvas.paint(canvas.box(side * 2.2 * width, leg - 2.5, 1.4, 3.0), legs)
        canvas.paint(canvas.box(side * 2.5 * width, leg, 1.8, 0.9), _DARK)
        arm = shoulder + 3.2 - 3.4 * lift
        canvas.paint(canvas.box(side * (4.9 * width + 0.3), arm, 1.2, 2.6), cloth)
        hand = arm + 3.2 * (1 - 2 * (lift > 0.5).float())
        canvas.paint(canvas.ellipse(side * (4.9 * width + 0.3), hand, 1.4, 1.4), subject.skin)
    if dress:
        canvas.paint(canvas.wedge(0.0, shoulder, 11.0, 3.0 * width, 6.4 * width), cloth)
    else:
        canvas.paint(canvas.box(0.0, shoulder + 4.6, 4.2 * width, 4.8), cloth)
    canvas.paint(canvas.ellipse(0.0, head, 4.2, 4.6), subject.skin)
    if dress:
        canvas.paint(
            torch.maximum(canvas.ellipse(0.0, head - 0.6, 5.0, 5.0), canvas.v - (head - 1.4)),
            subject.secondary,
        )
    else:
        canvas.paint(
            torch.maximum(canvas.ellipse(0.0, head - 0.4, 4.8, 5.2), canvas.v - (head - 1.0)),
            subject.secondary,
        )
    for side in (-1, 1):
        canvas.paint(canvas.box(side * 1.7, head + 0.6, 0.6, 0.8), _DARK)
    _wear(canvas, subject, head - 4.2, shoulder + 0.4, 0.0, 4.6, 3.4)


def _wear(canvas: _Canvas, subject: Subjects, top, neck, x, brim: float, ring: float) -> None:
    """A hat (accessory 1) on `top`, a scarf or collar (accessory 2) at `neck`."""
    hat = (subject.accessory == 1)[:, None, None]
    far = torch.full_like(canvas.u, 99.0)
    canvas.paint(torch.where(hat, canvas.box(x, top, brim + 0.8, 0.9), far), subject.accent)
    canvas.paint(torch.where(hat, canvas.box(x, top - 2.2, brim - 1.6, 1.8), far), subject.accent)
    band = (subject.accessory == 2)[:, None, None]
    canvas.paint(torch.where(band, canvas.box(x, neck, ring, 1.2), far), subject.accent)
    canvas.paint(torch.where(band, canvas.box(x + ring - 1.4, neck + 2.0, 1.1, 1.8), far), subject.accent)


def _man(canvas, subject, raised):
    _person(canvas, subject, raised, dress=False)


def _woman(canvas, subject, raised):
    _person(canvas, subject, raised, dress=True)


def _dog(canvas: _Canvas, subject: Subjects, raised: Tensor) -> None:
    width, height = subject.build[:, 0, None, None], subject.build[:, 1, None, None]
    fur = _fabric(canvas, subject.primary, subject.pattern)
    lift = raised[:, None, None]
    tail = canvas.box(-9.0 * width, 3.0 - 3.0 * lift, 1.0, 3.0)
    canvas.paint(tail, fur)
    for x in (-6.0, -3.0, 3.0, 5.5):
        canvas.paint(canvas.box(x * width, 11.0, 1.2, 3.2), fur)
    canvas.paint(canvas.ellipse(-0.8, 6.0, 8.2 * width, 4.2 * height), fur)
    canvas.paint(canvas.ellipse(6.2, -1.6, 4.8, 4.4), fur)
    canvas.paint(canvas.ellipse(10.2, -0.2, 2.6, 1.9), fur)
    canvas.paint(canvas.box(12.0, -1.0, 0.9, 0.9), _DARK)
    canvas.paint(canvas.ellipse(3.2, -1.4, 2.2, 4.6), subject.secondary)
    canvas.paint(canvas.box(7.2, -2.4, 0.7, 0.9), _DARK)
    _wear(canvas, subject, -6.0, 3.2, 5.6, 3.8, 3.6)


def _cat(canvas: _Canvas, subject: Subjects, raised: Tensor) -> None:
    width, height = subject.build[:, 0, None, None], subject.build[:, 1, None, None]
    fur = _fabric(canvas, subject.primary, subject.pattern)
    lift = raised[:, None, None]
    canvas.paint(canvas.box(8.0, 7.0 - 2.0 * lift, 1.5, 6.5), subject.secondary)
    canvas.paint(canvas.box(6.0, 12.6, 2.6, 1.4), subject.secondary)
    canvas.paint(canvas.ellipse(0.0, 7.5, 5.6 * width, 6.6 * height), fur)
    for x in (-2.6, 2.6):
        canvas.paint(canvas.box(x, 12.4, 1.6, 1.8), fur)
    for side in (-1, 1):
        canvas.paint(canvas.wedge(side * 4.0, -10.0, -4.0, 0.0, 2.6), subject.secondary)
    canvas.paint(canvas.ellipse(0.0, -2.6, 6.2, 5.0), fur)
    for side in (-1, 1):
        canvas.paint(canvas.box(side * 2.5, -3.0, 0.9, 1.1), _DARK)
    canvas.paint(canvas.box(0.0, -0.6, 0.8, 0.6), torch.tensor([0.95, 0.55, 0.6]))
    _wear(canvas, subject, -7.4, 2.6, 0.0, 3.6, 4.0)


def _robot(canvas: _Canvas, subject: Subjects, raised: Tensor) -> None:
    width, height = subject.build[:, 0, None, None], subject.build[:, 1, None, None]
    shell = _fabric(canvas, subject.primary, subject.pattern)
    lift = raised[:, None, None]
    for side in (-1, 1):
        canvas.paint(canvas.box(side * 3.2, 11.4, 1.5, 2.6), _METAL)
        canvas.paint(canvas.box(side * 3.6, 13.6, 2.4, 1.0), _DARK)
        canvas.paint(canvas.box(side * (7.2 * width + 0.6), 4.0 - 4.0 * lift, 1.2, 4.2), _METAL)
    canvas.paint(canvas.box(0.0, 4.4, 6.4 * width, 5.2 * height), shell)
    canvas.paint(canvas.box(0.0, -1.6, 1.6, 1.4), _METAL)
    canvas.paint(canvas.box(0.0, -6.0, 5.4, 4.0), subject.secondary)
    canvas.paint(canvas.box(0.0, -6.4, 4.0, 1.5), _DARK)
    for side in (-1, 1):
        canvas.paint(canvas.box(side * 2.0, -6.4, 0.9, 0.9), torch.tensor([0.55, 0.98, 0.92]))
    far = torch.full_like(canvas.u, 99.0)
    mast = (subject.accessory == 2)[:, None, None]
    canvas.paint(torch.where(mast, canvas.box(0.0, -11.6, 0.7, 2.0), far), _METAL)
    canvas.paint(torch.where(mast, canvas.ellipse(0.0, -13.2, 2.1, 1.9), far), subject.accent)
    _wear(canvas, replace(subject, accessory=subject.accessory % 2), -10.4, 0.0, 0.0, 4.4, 0.0)


def _bird(canvas: _Canvas, subject: Subjects, raised: Tensor) -> None:
    width, height = subject.build[:, 0, None, None], subject.build[:, 1, None, None]
    plumage = _fabric(canvas, subject.primary, subject.pattern)
    lift = raised[:, None, None]
    for x in (-1.6, 1.8):
        canvas.paint(canvas.box(x, 12.2, 0.7, 2.6), _BEAK)
    canvas.paint(canvas.wedge(-8.5 * width, 1.0, 7.0, 3.2, 1.0), subject.secondary)
    canvas.paint(canvas.ellipse(-0.6, 5.0, 7.4 * width, 5.8 * height), plumage)
    canvas.paint(canvas.ellipse(5.0, -3.2, 4.2, 4.2), plumage)
    canvas.paint(canvas.wedge(10.0, -4.6, -1.2, 0.6, 1.8), _BEAK)
    canvas.paint(canvas.box(6.2, -4.0, 0.9, 0.9), _DARK)
    canvas.paint(canvas.ellipse(-2.6, 4.6 - 5.4 * lift, 4.4, 2.4 + 2.4 * lift), subject.secondary)
    _wear(canvas, subject, -7.2, 1.0, 4.6, 3.6, 3.4)


def _car(canvas: _Canvas, subject: Subjects, raised: Tensor) -> None:
    width, height = subject.build[:, 0, None, None], subject.build[:, 1, None, None]
    paint = _fabric(canvas, subject.primary, subject.pattern)
    roof = 2.4 - 6.4 * height
    far = torch.full_like(canvas.u, 99.0)
    flag = (subject.accessory == 1)[:, None, None]
    canvas.paint(torch.where(flag, canvas.box(-6.5, roof - 1.0, 0.6, 5.4), far), _METAL)
    canvas.paint(torch.where(flag, canvas.box(-3.8, roof - 4.6, 2.6, 2.0), far), subject.accent)
    load = (subject.accessory == 2)[:, None, None]
    canvas.paint(torch.where(load, canvas.box(-0.5, roof - 2.8, 4.0, 2.2), far), subject.accent)
    canvas.paint(canvas.wedge(-0.5, roof, 4.0, 5.0 * width, 8.4 * width), subject.secondary)
    canvas.paint(canvas.wedge(-0.5, roof + 2.0, 3.6, 3.8 * width, 6.2 * width), _GLASS)
    canvas.paint(canvas.box(-0.5, 1.6, 0.8, 3.0), subject.secondary)
    canvas.paint(canvas.box(0.0, 7.0, 12.4 * width, 3.8), paint)
    canvas.paint(canvas.box(11.6 * width, 5.6, 0.9, 0.9), torch.tensor([0.99, 0.95, 0.6]))
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 7.0 * width, 11.4, 3.1, 3.1), _DARK)
        canvas.paint(canvas.ellipse(side * 7.0 * width, 11.4, 1.2, 1.2), _METAL)


def _house(canvas: _Canvas, subject: Subjects, raised: Tensor) -> None:
    width, height = subject.build[:, 0, None, None], subject.build[:, 1, None, None]
    walls = _fabric(canvas, subject.primary, subject.pattern)
    eaves = 14.0 - 13.0 * height
    far = torch.full_like(canvas.u, 99.0)
    flag = (subject.accessory == 1)[:, None, None]
    canvas.paint(torch.where(flag, canvas.box(0.0, eaves - 10.0, 0.6, 4.6), far), _METAL)
    canvas.paint(torch.where(flag, canvas.box(3.0, eaves - 12.4, 2.8, 1.9), far), subject.accent)
    stack = (subject.accessory == 2)[:, None, None]
    canvas.paint(torch.where(stack, canvas.box(5.6 * width, eaves - 5.4, 1.9, 4.4), far), subject.accent)
    canvas.paint(canvas.box(0.0, (14.0 + eaves) / 2, 9.4 * width, (14.0 - eaves) / 2), walls)
    canvas.paint(canvas.wedge(0.0, eaves - 8.4, eaves + 0.6, 0.4, 12.0 * width), subject.secondary)
    canvas.paint(canvas.box(0.0, 10.6, 2.1, 3.6), torch.tensor([0.35, 0.22, 0.14]))
    for side in (-1, 1):
        canvas.paint(canvas.box(side * 5.8 * width, 6.2, 1.9, 1.9), _GLASS)


_DRAW = (_man, _woman, _dog, _cat, _robot, _bird, _car, _house)


def draw_subjects(subjects: Subjects, poses: Poses) -> Tensor:
    """(N, 4, 32, 32): each subject alone on a transparent tile, colours not multiplied by alpha."""
    centre = (TILE - 1) / 2
    rows, columns = torch.meshgrid(torch.arange(TILE) - centre, torch.arange(TILE) - centre, indexing="ij")
    out = torch.zeros(len(subjects), 4, TILE, TILE)
    for kind, draw in enumerate(_DRAW):
        picked = (subjects.kind == kind).nonzero()[:, 0]
        if not len(picked):
            continue
        pose = poses[picked]
        scale = pose.scale[:, None, None]
        u = (columns - pose.offset[:, 0, None, None]) / scale * pose.flip[:, None, None]
        v = (rows - pose.offset[:, 1, None, None] - 0.5) / scale
        canvas = _Canvas(u, v, scale)
        draw(canvas, subjects[picked], pose.raised)
        out[picked] = torch.cat([canvas.rgb, canvas.alpha], 1)
    return out


def draw_scenes(scenes: Scenes, tiles: int = 1) -> Tensor:
    """(N, 3, 32, 32·tiles): the backgrounds alone, unlit."""
    width = TILE * tiles
    v, u = torch.meshgrid(torch.arange(TILE) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    v, u = v.expand(len(scenes), -1, -1), u.expand(len(scenes), -1, -1)
    horizon = scenes.horizon[:, None, None]
    canvas = _Canvas(u, v)
    blend = (v / horizon).clamp(0, 1)[:, None]
    sky = scenes.sky[:, :, None, None] * (1 - blend) + scenes.low_sky[:, :, None, None] * blend
    canvas.rgb = sky
    far = torch.full_like(u, 99.0)

    def only(name: str, distance: Tensor) -> Tensor:
        return torch.where((scenes.kind == SCENES.index(name))[:, None, None], distance, far)

    def repeated(period: float, shift: Tensor) -> Tensor:
        """Pixels from the nearest of a row of props, one every `period`."""
        return torch.remainder(u - shift[:, None, None] + period / 2, period) - period / 2

    prop = scenes.prop
    first, second, third = scenes.shift.unbind(1)
    sun = torch.tensor([1.0, 0.93, 0.45])
    canvas.paint(only("beach", canvas.ellipse(first[:, None, None], 5.0, 3.2, 3.2)), sun)
    canvas.paint(only("beach", canvas.box(width / 2, horizon - 2.0, width, 3.0)), prop)
    canvas.paint(only("desert", canvas.ellipse(first[:, None, None], 6.0, 4.0, 4.0)), torch.tensor([1.0, 0.97, 0.8]))
    canvas.paint(only("night", canvas.ellipse(first[:, None, None], 6.0, 3.4, 3.4)), prop)
    for shift, height, period in ((second, 3.0, 11.0), (third, 10.0, 13.0), (first, 14.0, 17.0)):
        star = torch.maximum(repeated(period, shift).abs() - 0.5, (v - height).abs() - 0.5)
        canvas.paint(only("night", star), torch.tensor([0.9, 0.9, 0.8]))
    for shift, tall, period in ((second, 9.0, 14.0), (third, 13.0, 19.0)):
        step = repeated(period, shift)
        tower = torch.maximum(step.abs() - 4.0, torch.maximum(horizon - tall - v, v - horizon - 1))
        canvas.paint(only("city", tower), prop)
        lit = torch.maximum((torch.remainder(step, 3.0) - 1.5).abs() - 0.6, (torch.remainder(v, 4.0) - 2).abs() - 0.7)
        canvas.paint(only("city", torch.maximum(lit, tower + 0.8)), torch.tensor([0.98, 0.90, 0.55]))
    for shift, period in ((second, 13.0), (third, 21.0)):
        step = repeated(period, shift)
        height = v - (horizon - 11.0)
        fir = torch.maximum(step.abs() - 0.45 * height, torch.maximum(-height, v - horizon - 1.0))
        canvas.paint(only("snow", fir), prop)
        trunk = torch.maximum(step.abs() - 1.6, v - horizon - 1.0)
        canvas.paint(only("forest", trunk), prop)
        crown = ((step / 5.0) ** 2 + ((v - 3.0) / 5.5) ** 2 + 1e-9).sqrt() * 5 - 5
        canvas.paint(only("forest", crown), torch.tensor([0.14, 0.42, 0.16]))
    canvas.paint(horizon - v, scenes.ground)
    for shift, period in ((second, 27.0), (third, 41.0)):
        step = repeated(period, shift)
        stem = torch.maximum(step.abs() - 1.3, (v - horizon + 2.0).abs() - 6.0)
        arm = torch.maximum((step - 2.4).abs() - 2.6, (v - horizon + 1.5).abs() - 1.1)
        tip = torch.maximum((step - 4.4).abs() - 1.0, (v - horizon + 3.4).abs() - 2.2)
        canvas.paint(only("desert", torch.minimum(stem, torch.minimum(arm, tip))), prop)
    dash = torch.maximum(repeated(12.0, first).abs() - 3.0, (v - 29.0).abs() - 0.8)
    canvas.paint(only("city", dash), torch.tensor([0.90, 0.88, 0.70]))
    return canvas.rgb


def apply_style(pictures: Tensor, style: Tensor, duotone: Tensor | None = None) -> Tensor:
    """pictures (N, 3, H, W) in 0..1, style (N,) index of STYLES; duotone (N, 2, 3) maps dark and light."""
    grey = (pictures * torch.tensor([0.30, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)
    sepia = grey * torch.tensor([1.08, 0.86, 0.62])[:, None, None] + torch.tensor([0.06, 0.03, 0.0])[:, None, None]
    padded = torch.nn.functional.pad(pictures, (0, 1, 0, 1), mode="replicate")
    edge = (padded[:, :, :-1, 1:] - pictures).abs().sum(1, keepdim=True) + (padded[:, :, 1:, :-1] - pictures).abs().sum(
        1, keepdim=True
    )
    line = (edge * 1.6 - 0.35).clamp(0, 1)
    outline = (1 - line) * (0.35 * pictures + 0.65)
    neon = (pictures * 0.22 + line * (0.25 + 1.1 * pictures)).clamp(0, 1)
    versions = torch.stack([pictures, sepia, neon, outline]).clamp(0, 1)
    out = versions[style, torch.arange(len(pictures))]
    if duotone is not None:
        dark, light = duotone[:, 0, :, None, None], duotone[:, 1, :, None, None]
        out = dark + (light - dark) * grey
    return out


def draw(subjects: Sequence[Subjects], poses: Sequence[Poses], scenes: Scenes, style: Tensor | None = None) -> Tensor:
    """Draw pictures with one subject per tile, left to right: (N, 3, 32, 32·tiles) in 0..1."""
    backdrop = draw_scenes(scenes, max(len(subjects), 1))
    if subjects:
        layers = draw_subjects(Subjects.cat(subjects), Poses.cat(poses)).chunk(len(subjects))
        layer = torch.cat(layers, dim=-1)
        backdrop = backdrop + layer[:, 3:] * (layer[:, :3] - backdrop)
    lit = (backdrop * scenes.light[:, :, None, None]).clamp(0, 1)
    return lit if style is None else apply_style(lit, style)
