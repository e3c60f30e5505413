"""What a file says of itself to programs that list models: Stability's ModelSpec 1.0.1, and kohya's hash and preview.

`Concept.about` holds what a person says of a concept (`OWN`); everything else follows from the concept itself.  The
host's own model browser reads a preview from `ssmd_cover_images`, other managers from `modelspec.thumbnail`.
Source: github.com/Stability-AI/ModelSpec; architecture and implementation are spelled as sd-scripts spells them.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

from torch import Tensor

from ..concept import Concept
from ..errors import AdapterError, listed
from ..families import families, find_family
from ..pictures import to_image
from ..storage.safetensors import data_hash

VERSION = "1.0.1"
PREFIX = "modelspec."
COVERS = "ssmd_cover_images"
COMMENT = "ss_training_comment"  # what a person writes into kohya's trainer
OWN = ("title", "description", "author", "license", "tags", "usage_hint", "date", "thumbnail")
MAX_TEXT, MAX_WORDS = 4096, 400
THUMBNAIL_SIDE, MAX_THUMBNAIL = 256, 96 * 1024  # pixels, characters
JPEG = "data:image/jpeg;base64,"

DIFFUSERS, STABILITY = "diffusers", "https://github.com/Stability-AI/generative-models"


def modelspec(concept: Concept, tensors: Mapping[str, Tensor], form: str = "lora") -> dict[str, str]:
    """The metadata entries of a file that holds `tensors`.

    form: "lora", "lora/diffusers" (diffusers' own keys) or "textual-inversion".
    Raises AdapterError for an `about` that `check_about` refuses.
    """
    about = check_about(concept)
    recipe = concept.recipe
    kind, _, keys = form.partition("/")
    family = find_family(recipe.architecture)
    model = recipe.architecture or "unknown" if family is None else family.modelspec
    implementation = family.implementation if family is not None and keys != "diffusers" else DIFFUSERS
    digest = data_hash(tensors)
    entries = {
        "sai_model_spec": VERSION,
        "architecture": f"{model}/{kind}",
        "implementation": STABILITY if kind == "textual-inversion" else implementation,
        "title": concept.name,
        "hash_sha256": f"0x{digest}",
    }
    if family is not None:
        entries["resolution"] = f"{family.side}x{family.side}"
    if words := trigger_phrase(concept):
        entries["trigger_phrase"] = words
    parts = recipe.origin.get("parts")
    if isinstance(parts, Sequence) and parts:
        names = [str(part["name"]) for part in parts if isinstance(part, Mapping) and "name" in part]
        entries["merged_from"] = ", ".join(names)
    metadata = {PREFIX + key: value for key, value in (entries | about).items()} | {"sshs_model_hash": digest}
    if "thumbnail" in about:
        metadata[COVERS] = json.dumps([about["thumbnail"].removeprefix(JPEG)])
    return metadata


def trigger_phrase(concept: Concept) -> str:
    """The words that call a concept, as a prompt has them; those of a merge's parts with commas between."""
    words = concept.recipe.triggers or tuple(concept.tokens)
    return (", " if "parts" in concept.recipe.origin else " ").join(words)


def about_of(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """What a person said of a concept, from a file's metadata; what is too long is cut, what is no picture left out.

    Other programs let people edit these entries, so nothing in them makes a file unreadable.
    name: the concept's, which is its title unless it has another.
    """
    entries = {key: metadata[PREFIX + key] for key in OWN if PREFIX + key in metadata}
    if entries.get("title") == name:
        del entries["title"]
    about = {}
    for key, value in entries.items():
        if key == "thumbnail":
            if _is_jpeg(value):
                about[key] = value
        elif text := "".join(c for c in value[:MAX_TEXT] if c.isprintable() or c == "\n").strip():
            about[key] = text
    return about


def architecture_said(metadata: Mapping[str, str]) -> str:
    """The family that another program's file names, as concepts call it, or "" where it names none that we know."""
    architecture = metadata.get(PREFIX + "architecture", "")
    if "refiner" not in architecture:
        for family in families():
            if architecture.startswith(family.modelspec):
                return family.name
    version = metadata.get("ss_base_model_version", "")  # what older files say instead, in kohya's own entry
    return next((family.name for family in families() if version.startswith(tuple(family.kohya_versions))), "")


def triggers_said(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words by which another program's file says it is called."""
    phrase = metadata.get(PREFIX + "trigger_phrase", "")
    if len(phrase) > MAX_WORDS:
        phrase = phrase[: MAX_WORDS + 1].rpartition(",")[0]  # a word that is cut in two calls nothing
    words = (" ".join("".join(c if c.isprintable() else " " for c in part).split()) for part in phrase.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def tell_left_out(metadata: Mapping[str, str]) -> list[str]:
    """Sentences on what a file says of itself and a concept does not keep."""
    sentences = []
    picture = metadata.get(PREFIX + "thumbnail", "")
    if picture and not _is_jpeg(picture):
        sentences.append(f"its thumbnail is no JPEG of at most {MAX_THUMBNAIL:,} characters, and is left out")
    long = [key for key in OWN if key != "thumbnail" and len(metadata.get(PREFIX + key, "")) > MAX_TEXT]
    if long:
        sentences.append(f"of its {listed(long)}, {MAX_TEXT:,} letters are kept")
    if len(phrase := metadata.get(PREFIX + "trigger_phrase", "")) > MAX_WORDS:
        words = triggers_said(metadata)
        behind = f"what stands behind {words[-1]!r}" if words else "all of it"
        sentences.append(
            f"its trigger phrase has {len(phrase):,} letters, and {MAX_WORDS} are read: {behind} is left out"
        )
    if metadata.get(COMMENT, "").strip() not in ("", "None"):
        sentences.append("its ss_training_comment is not kept by a merge or an export")
    return sentences


def check_about(concept: Concept) -> dict[str, str]:
    """`about` as it will be written and read again.  Raises AdapterError that names the entry."""
    for key, value in concept.about.items():
        if key not in OWN:
            raise AdapterError(f"{concept.name}: {key!r} is nothing that a file says; choose from {', '.join(OWN)}")
        good = _is_jpeg(value) if key == "thumbnail" else about_of({PREFIX + key: value}, "").get(key) == value
        if not good:
            wanted = f"printable text of at most {MAX_TEXT} characters, without spaces around it"
            wanted = f"a JPEG of at most {MAX_THUMBNAIL} characters" if key == "thumbnail" else wanted
            raise AdapterError(f"{concept.name}: its {key} cannot be written; give {wanted}")
    return {key: value for key, value in concept.about.items() if (key, value) != ("title", concept.name)}


def saying(concept: Concept, **about: str) -> Concept:
    """The concept with these entries of `about`; empty ones change nothing."""
    texts = {key: value.strip() for key, value in about.items() if value.strip()}
    return replace(concept, about={**concept.about, **texts}) if texts else concept


def dated(concept: Concept) -> Concept:
    """With today's date, unless it has one already: a concept keeps the date of its first file."""
    now = datetime.now(timezone.utc).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    return concept if "date" in concept.about else saying(concept, date=now)


def thumbnail(picture: Tensor) -> str:
    """A picture (H, W, 3) in 0..1 as a small JPEG in a data URI, at most 256 pixels wide and high.

    The same picture gives the same text on one machine.
    """
    from PIL import Image

    image = to_image(picture[..., :3].movedim(-1, 0))
    if max(image.size) < THUMBNAIL_SIDE // 2:
        factor = THUMBNAIL_SIDE // 2 // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    for quality in (85, 60, 30):
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        text = JPEG + base64.b64encode(data.getvalue()).decode("ascii")
        if len(text) <= MAX_THUMBNAIL:
            break
    return text


def _is_jpeg(text: str) -> bool:
    if not text.startswith(JPEG) or len(text) > MAX_THUMBNAIL:
        return False
    try:
        return base64.b64decode(text.removeprefix(JPEG), validate=True).startswith(b"\xff\xd8")
    except (binascii.Error, ValueError):
        return False
