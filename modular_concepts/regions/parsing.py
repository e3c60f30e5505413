"""Regions from JSON, from the host's boxes and from masks, so that scripts and other packs can drive them.

    [{"prompt": "a <tom> on the beach", "box": [0, 0, 0.5, 1], "concepts": ["tom"]},
     {"prompt": "a <minka> on the beach", "box": [256, 0, 512, 512], "units": "pixels", "priority": 1}]

A box is left, top, right, bottom.  A region needs a prompt and a box or mask; `FIELDS` lists what else there is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..concept import clip, is_number
from ..errors import AdapterError
from ..settings.drawing import END, FEATHER, PRIORITY, START, STRENGTH, UNITS
from ..storage.strict_json import is_deep
from .geometry import Region

FIELDS = {
    "prompt": "text: what is there",
    "negative": "text: what is not; left out, the global negative prompt holds",
    "box": 'four numbers: left, top, right, bottom; or "automatic": the sampler finds the place',
    "mask": "a whole number: which picture of the connected masks, from 0",
    "units": '"fractions" (of the picture) or "pixels", for box and feather',
    "concepts": "a list of names; left out, those whose trigger word is in the prompt; [] for none",
    "feather": "a number: width of the soft edge",
    "strength": f"a number {STRENGTH.reach}",
    "start": f"a number {START.reach}: the part of the sampling from which it holds",
    "end": f"a number {END.reach}: the part of the sampling up to which it holds",
    "priority": "a whole number; the higher lies on top",
}
MOST_REGIONS = 64
MOST_TEXT = 1_000_000
_UNITS = UNITS.choices


def regions_from_json(text: str, masks: Tensor | None = None) -> list[Region]:
    """Regions from a JSON list, or from an object whose entry "regions" is one.

    masks: (N, H, W), which entries name as "mask".  A list without entries gives no region.
    Raises AdapterError that says which entry is wrong and what it should be.
    """
    return [_read_region(f"region {number}", entry, masks) for number, entry in enumerate(_entries(text), 1)]


def _entries(text: str) -> list:
    """What a text lists, of whatever kind; also behind a byte order mark.  AdapterError for what is no list."""
    if len(text) > MOST_TEXT:
        raise AdapterError(f"the regions are {len(text)} characters of JSON; at most {MOST_TEXT} are read")
    try:
        bare = text.removeprefix("\ufeff")
        data = json.loads(bare, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant)
    except AdapterError:
        raise
    except json.JSONDecodeError as error:
        raise AdapterError(
            f"the regions are no JSON: {error.msg} in line {error.lineno}, column {error.colno}; "
            'write [{"prompt": "a dog", "box": [0, 0, 0.5, 1]}]'
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError("the regions' JSON is nested too deeply or holds a number that is too long") from error
    if is_deep(data):
        raise AdapterError("the regions' JSON is nested too deeply; a region's entries are texts, numbers and lists")
    if isinstance(data, dict) and set(data) == {"regions"}:
        data = data["regions"]
    if not isinstance(data, list):
        raise AdapterError(f"the regions must be a JSON list of objects; got {clip(data)}")
    if len(data) > MOST_REGIONS:
        raise AdapterError(f"there are {len(data)} regions; at most {MOST_REGIONS} fit in one picture")
    return data


def json_problem(text: str) -> str:
    """Why `regions_from_json` would refuse this text whatever masks are connected; empty if it would not."""
    try:
        regions_from_json(text, torch.ones(1, 1, 1).expand(2**30 + 1, 1, 1))  # as many as any index, in no memory
    except AdapterError as error:
        return str(error)
    return ""


def unnamed_masks(text: str, masks: Tensor) -> list[int]:
    """Which of the masks, (H, W) or (N, H, W), no entry of a text names that `regions_from_json` has read."""
    named = {entry.get("mask") for entry in _entries(text)}
    return [number for number in range(1 if masks.dim() == 2 else len(masks)) if number not in named]


def region_box(bounding_box: object) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels from the host's BOUNDING_BOX: x, y, width and height, alone or in lists.

    Raises AdapterError for several boxes, for none, and for what is no box.
    """
    boxes = _flatten(bounding_box)
    if len(boxes) != 1:
        raise AdapterError(f"there are {len(boxes)} bounding boxes; give one, a region for each")
    (box,) = boxes
    if not isinstance(box, Mapping) or not {"x", "y", "width", "height"} <= set(box):
        raise AdapterError(f"a bounding box has x, y, width and height; got {clip(box)}")
    left, top, width, height = (
        _read_number(f"the bounding box's {key}", box[key]) for key in ("x", "y", "width", "height")
    )
    return left, top, left + width, top + height


def one_mask(what: str, masks: Tensor, index: int | None = None) -> Tensor:
    """(H, W) from the host's MASK, (H, W) or (N, H, W): the one that there is, or that of the index."""
    masks = masks[None] if masks.dim() == 2 else masks
    if masks.dim() != 3:
        raise AdapterError(f"{what} has a mask of shape {tuple(masks.shape)}; give (height, width)")
    if index is None and len(masks) != 1:
        raise AdapterError(f"{what} has {len(masks)} masks; give one, a region for each")
    if not 0 <= (index or 0) < len(masks):
        raise AdapterError(f"{what} asks for mask {index}, but there are {len(masks)}, counted from 0")
    return masks[index or 0]


def names_from(text: str) -> tuple[str, ...] | None:
    """Names of concepts from a text with commas; None, for those that the prompt calls, where it is empty.

    A dash, or "none", alone means that no concept acts there.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names and names[0].lower() in ("-", "none") and len(names) == 1:
        return ()
    return names or None


def _read_region(what: str, entry: object, masks: Tensor | None) -> Region:
    if not isinstance(entry, dict):
        raise AdapterError(f"{what} must be a JSON object; got {clip(entry)}")
    unknown = sorted(set(entry) - set(FIELDS))
    if unknown:
        raise AdapterError(f"{what} has the unknown entry {clip(unknown[0])}; there are {', '.join(FIELDS)}")
    if "prompt" not in entry:
        raise AdapterError(f"{what} has no prompt; say what is there")
    units = entry.get("units", UNITS.default)
    if units not in _UNITS:
        raise AdapterError(f"{what}: units is {clip(units)}; write fractions or pixels")
    box, mask = entry.get("box"), None
    if "mask" in entry:
        if box is not None:
            raise AdapterError(f"{what} has a box and a mask; give one of them")
        if masks is None:
            raise AdapterError(f"{what} asks for mask {clip(entry['mask'])}, but no masks are connected")
        mask = one_mask(what, masks, _read_whole(f"{what}: mask", entry["mask"]))
    elif box is None:
        raise AdapterError(
            f'{what} has neither box nor mask; the whole picture is the box [0, 0, 1, 1], and "automatic" has its '
            "place found"
        )
    elif box == "automatic":
        box = None
    try:
        return Region(
            prompt=_read_text(f"{what}: prompt", entry["prompt"]),
            box=None if box is None else _read_box(what, box, units),
            mask=mask,
            negative=_read_text(f"{what}: negative", entry["negative"]).strip() or None
            if "negative" in entry
            else None,
            feather=_read_number(f"{what}: feather", entry.get("feather", FEATHER.default)),
            strength=_read_number(f"{what}: strength", entry.get("strength", STRENGTH.default)),
            pixels=units == "pixels",
            concepts=_read_names(what, entry.get("concepts")),
            start=_read_number(f"{what}: start", entry.get("start", START.default)),
            end=_read_number(f"{what}: end", entry.get("end", END.default)),
            priority=_read_whole(f"{what}: priority", entry.get("priority", PRIORITY.default)),
        )
    except AdapterError as error:
        message = str(error)
        raise error if message.startswith(what) else AdapterError(f"{what}: {message}") from error


def _read_box(what: str, value: object, units: str) -> tuple[float, float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise AdapterError(f"{what}: box must be four numbers (left, top, right, bottom); got {clip(value)}")
    left, top, right, bottom = (_read_number(f"{what}: box", edge) for edge in value)
    box = (left, top, right, bottom)
    if units == "fractions" and max(box) > 1:
        raise AdapterError(
            f"{what}: the box {list(value)} reaches outside the picture: as fractions all four are at most 1; "
            'correct them, or add "units": "pixels"'
        )
    return box


def _read_names(what: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise AdapterError(f"{what}: concepts must be a list of names; got {clip(value)}")
    return tuple(_read_text(f"{what}: concepts", name) for name in value)


def _read_text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise AdapterError(f"{what} must be text; got {clip(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise AdapterError(f"{what} holds half a character: {clip(value)}") from error
    return value


def _read_number(what: str, value: object) -> float:
    if not is_number(value) or not abs(value) <= 2**30:
        raise AdapterError(f"{what} must be a finite number; got {clip(value)}")
    return float(value)


def _read_whole(what: str, value: object) -> int:
    if type(value) is not int or abs(value) > 2**30:
        raise AdapterError(f"{what} must be a whole number; got {clip(value)}")
    return value


def _flatten(value: object, lists: int = 8) -> list:
    """What lies in lists, within so many of each other; a list within more comes as it is."""
    if lists and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [box for part in value for box in _flatten(part, lists - 1)]
    return [value]


def _refuse_repeats(pairs: list[tuple[str, object]]) -> dict:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise AdapterError(f"the regions' JSON has the entry {clip(twice)} twice in one object; keep one")
    return entries


def _refuse_constant(name: str) -> float:
    raise AdapterError(f"the regions' JSON holds {name}; numbers must be finite")
