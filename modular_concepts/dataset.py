"""Pictures of one concept, with captions and optional masks, as tensors; every fault of a file in plain words.

    kodo-1.png  kodo-1.txt  kodo-1.mask.png
    kodo-2.jpg  kodo-2.txt  kodo-2.mask.png
    3_rare/kodo-3.png  ...                          each of these three times as often

Captions are optional, and so are masks, but each as a whole: with some there and some missing, something is
wrong.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .buckets import bucket, stacked
from .captions import checked_caption, read_caption
from .errors import AdapterError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MASK_SUFFIX = ".mask.png"
MAX_ENLARGEMENT = 4
MAX_PIXELS = 90_000_000
MAX_REPEATS = 10_000
PLACE, ALSO_PLACE = "{concept}", "<TOK>"  # the second is how Mix-of-Show's captions have it
REPEATED = re.compile(r"(\d+)_.*")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures of one concept, ready for training.

    pictures: (N, 3, H, W) float32 in 0..1, or a list of (3, H, W) of several sizes.  captions: one per picture.
    masks: (N, 1, H, W) float32 in 0..1, 1 where the concept is, a list as the pictures are, or None.
    names: file names in order.  fingerprint: sha256 of names, pixels, captions and masks.
    repeats: how often each picture comes in an epoch; None is once.
    """

    pictures: Tensor | list[Tensor]
    captions: tuple[str, ...]
    masks: Tensor | list[Tensor] | None
    names: tuple[str, ...]
    fingerprint: str
    repeats: tuple[int, ...] | None = None


def load_folder(
    folder: Path | str,
    size: tuple[int, int],
    triggers: Sequence[str] = (),
    class_word: str = "",
    template: str = "a photo of {concept}",
    *,
    buckets: bool = False,
    multiple: int = 64,
) -> Dataset:
    """Load every picture of `folder`, sorted by name, centre-cropped and resized to `size` (height, width).

    Turned as EXIF says; transparency lies on white.  Hidden files are left alone, and subfolders but for those
    named N_anything: their pictures come N times as often.
    buckets: keep each picture's aspect, at sizes of about the same area whose sides are multiples of `multiple`.
    Without captions every picture gets `template`, where {concept} is the trigger words and the class word.
    Raises AdapterError that names the file, for anything that cannot be used.
    """
    _check_size(size)
    folder = Path(folder)
    repeats, paths, masks = _find(folder)
    captions = _captions(paths)
    if captions is None:
        captions = (with_words(template, triggers, class_word),) * len(paths)
    pixels, covers = [], None if masks is None else []
    for number, path in enumerate(paths):
        # One at a time: a photo takes a hundred times the memory of what is made of it.
        image = _open(path)
        fitted = bucket(image.height, image.width, size, multiple) if buckets else size
        pixels.append(_fit(path, image, fitted, "RGB"))
        if masks is not None:
            covers.append(_mask(masks[number], image.size, fitted))
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
    return Dataset(
        pictures=_in_unit([torch.from_numpy(picture).permute(2, 0, 1) for picture in pixels]),
        captions=captions,
        masks=None if covers is None else _in_unit([torch.from_numpy(cover)[None] for cover in covers]),
        names=names,
        fingerprint=_fingerprint(names, captions, pixels, covers),
        repeats=None if set(repeats) == {1} else repeats,
    )


def _in_unit(pictures: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Bytes (C, H, W) as float32 in 0..1, stacked where they have one size before they become four times as large."""
    whole = stacked(pictures)
    return whole.float().div_(255) if isinstance(whole, Tensor) else [picture.float() / 255 for picture in whole]


def with_words(caption: str, triggers: Sequence[str], class_word: str = "") -> str:
    """A caption with the trigger words, and the class word if one is given, where it says {concept} or <TOK>."""
    return caption.replace(ALSO_PLACE, PLACE).replace(PLACE, " ".join([*triggers, *class_word.split()]))


def filled_in(dataset: Dataset, triggers: Sequence[str], class_word: str = "") -> Dataset:
    """The data set with every {concept} and <TOK> in its captions filled in (`with_words`)."""
    captions = tuple(with_words(caption, triggers, class_word) for caption in dataset.captions)
    if captions == dataset.captions:
        return dataset
    digest = hashlib.sha256("\0".join([dataset.fingerprint, *captions]).encode())
    return replace(dataset, captions=captions, fingerprint=digest.hexdigest())


def refuse_single(dataset: Dataset) -> None:
    """Raise AdapterError for a data set of one picture."""
    if len(dataset.pictures) < 2:
        raise AdapterError("there is only one picture, which teaches that picture and not the concept; give at least 2")


def of_pictures(
    pictures: Sequence[Tensor],
    captions: Sequence[str],
    masks: Sequence[Tensor] | None,
    size: tuple[int, int],
    *,
    buckets: bool = False,
    multiple: int = 64,
) -> Dataset:
    """A data set of pictures that are loaded already, cropped and resized to `size` as `load_folder` does it.

    pictures: each (3, H, W) in 0..1, of any size.  captions: one each, or one for all.
    masks: each (H, W) in 0..1, in its picture's size; one each, or one for all.
    Raises AdapterError that says which picture cannot be used, and why.
    """
    _check_size(size)
    if not pictures:
        raise AdapterError("there is no picture to train on; give at least one")
    checked = [checked_caption(text, f"line {number + 1}") for number, text in enumerate(captions)]
    captions = tuple(_one_each("caption", checked, len(pictures)))
    names = tuple(f"picture {number + 1}" for number in range(len(pictures)))
    sizes = [bucket(*picture.shape[-2:], size, multiple) if buckets else size for picture in pictures]
    fitted = [_fit_tensor(name, picture, own) for name, picture, own in zip(names, pictures, sizes, strict=True)]
    covers = None
    if masks is not None:
        fits = zip(names, pictures, _one_each("mask", masks, len(pictures)), sizes, strict=True)
        covers = [_fit_cover(name, picture, mask, own) for name, picture, mask, own in fits]
    pixels = [(picture.permute(1, 2, 0) * 255).round().byte().numpy() for picture in fitted]
    coverage = None if covers is None else [(cover[0] * 255).round().byte().numpy() for cover in covers]
    fingerprint = _fingerprint(names, captions, pixels, coverage)
    return Dataset(stacked(fitted), captions, None if covers is None else stacked(covers), names, fingerprint)


def _one_each(what: str, given: Sequence, count: int) -> Sequence:
    if len(given) not in (1, count):
        raise AdapterError(f"{len(given)} {what}s for {count} pictures; give one {what} for each, or one for all")
    return given if len(given) == count else list(given) * count


def _fit_tensor(name: str, picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) as it is, or through the same cropping that files get."""
    from PIL import Image as images

    if picture.dim() != 3 or picture.shape[0] != 3 or not picture.isfinite().all():
        raise AdapterError(f"{name}: it has shape {tuple(picture.shape)} or holds NaN; we need finite RGB (3, H, W)")
    picture = picture.detach().float().cpu().clamp(0, 1).clone()
    if picture.shape[1:] == size:
        return picture
    image = images.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
    return torch.from_numpy(_fit(name, image, size, "RGB")).permute(2, 0, 1).float() / 255


def _fit_cover(name: str, picture: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, H, W) of a mask (H, W) that lies on `picture`."""
    from PIL import Image as images

    if mask.shape != picture.shape[1:]:
        raise AdapterError(
            f"{name}: the mask is {mask.shape[-1]}×{mask.shape[0]} pixels but its picture is "
            f"{picture.shape[2]}×{picture.shape[1]}; give it in the picture's size"
        )
    image = images.fromarray((mask.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte().numpy())
    cover = _fit(name, image, size, "L")
    if not cover.any():
        raise AdapterError(f"{name}: the mask is black all over, or where the crop keeps it; paint the concept white")
    return torch.from_numpy(cover)[None].float() / 255


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or not all(isinstance(side, int) and 8 <= side <= 8192 for side in size):
        raise AdapterError(f"training size {size} must be a height and a width between 8 and 8192 pixels")


def _find(folder: Path) -> tuple[tuple[int, ...], list[Path], list[Path] | None]:
    """How often each picture comes, the pictures sorted by name, and a mask for each or None."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder; give the folder that holds the pictures")
    repeats = {}
    for place, times in _places(folder).items():
        for path in _files(place):
            repeats[path] = times
    masks = {_place_and_name(path): path for path in repeats if path.name.lower().endswith(MASK_SUFFIX)}
    pictures = {
        path: times
        for path, times in repeats.items()
        if path.suffix.lower() in SUFFIXES and _place_and_name(path) not in masks
    }
    if not pictures:
        raise AdapterError(f"{folder}: there is no picture in this folder; we read {', '.join(SUFFIXES)}")
    paths = list(pictures)
    wanted = [_place_and_name(path.with_name(path.stem + MASK_SUFFIX)) for path in paths]
    orphans = sorted(masks[key].name.lower() for key in set(masks) - set(wanted))
    if orphans:
        raise AdapterError(f"{folder}: mask {_list(orphans)} belongs to no picture; rename it after its picture")
    missing = [path.name for path, mask in zip(paths, wanted, strict=True) if mask not in masks]
    if masks and missing:
        raise AdapterError(
            f"{folder}: some pictures have a mask, but not {_list(missing)}; add the masks or remove all"
        )
    return tuple(pictures.values()), paths, [masks[name] for name in wanted] if masks else None


def _places(folder: Path) -> dict[Path, int]:
    """The folder and its subfolders named N_anything, with how often the pictures in each come."""
    places = {folder: 1}
    for path in _listed(folder):
        named = REPEATED.fullmatch(path.name)
        if named and path.is_dir():
            if not 1 <= int(named[1]) <= MAX_REPEATS:
                raise AdapterError(
                    f"{path}: its name asks for each picture {named[1]} times; 1 to {MAX_REPEATS} can be had"
                )
            places[path] = int(named[1])
    return places


def _files(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if path.is_file() and not path.name.startswith(".")]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be listed ({error.strerror})") from error


def _place_and_name(path: Path) -> tuple[Path, str]:
    return path.parent, path.name.lower()


def _captions(paths: Sequence[Path]) -> tuple[str, ...] | None:
    files = [path.with_suffix(".txt") for path in paths]
    missing = [path.name for path, file in zip(paths, files, strict=True) if not file.is_file()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise AdapterError(
            f"{paths[0].parent}: some pictures have a caption, but not {_list(missing)}; "
            "write the missing .txt files, or remove all captions to use the trigger words alone"
        )
    return tuple(read_caption(file) for file in files)


def load_picture(path: Path) -> Tensor:
    """(H, W, 3) in 0..1 of one picture file, upright and without transparency."""
    return torch.from_numpy(np.array(_open(path).convert("RGB"))).float() / 255


def _open(path: Path) -> Image:
    """Decode a whole picture, upright, as RGB or L; transparency on white."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise AdapterError("reading pictures needs Pillow; install the headless extra") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as probe:
                if probe.width * probe.height > MAX_PIXELS:
                    raise AdapterError(f"{path}: {probe.width}×{probe.height} pixels are too many; make it smaller")
                probe.verify()
            with Image.open(path, formats=FORMATS) as image:
                return _flatten(ImageOps.exif_transpose(image))
    except AdapterError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise AdapterError(f"{path}: this is not a picture that can be read, or it is damaged") from error


def _flatten(image: Image) -> Image:
    from PIL import Image as images

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        return images.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if "transparency" in image.info or "A" in image.mode or image.mode == "P":
        image = image.convert("RGBA")
        white = images.new("RGBA", image.size, (255, 255, 255, 255))
        return images.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _fit(path: Path | str, image: Image, size: tuple[int, int], mode: str) -> np.ndarray:
    """Centre crop to the aspect of `size` and resize; uint8 (H, W, 3) or (H, W)."""
    from PIL import Image as images
    from PIL import ImageOps

    height, width = size
    enlargement = max(height / image.height, width / image.width)
    if enlargement > MAX_ENLARGEMENT:
        raise AdapterError(
            f"{path}: {image.width}×{image.height} pixels are too few to train at {width}×{height}; "
            f"each side needs at least {-(-width // MAX_ENLARGEMENT)}×{-(-height // MAX_ENLARGEMENT)} "
            "(width×height)"
        )
    # Lanczos rings at edges, which a mask must not.
    method = images.Resampling.LANCZOS if mode == "RGB" else images.Resampling.BOX
    fitted = ImageOps.fit(image.convert(mode), (width, height), method=method)
    return np.array(fitted)


def _mask(path: Path, picture_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    image = _open(path)
    if image.size != picture_size:
        raise AdapterError(
            f"{path}: the mask is {image.width}×{image.height} pixels but its picture is "
            f"{picture_size[0]}×{picture_size[1]}; save it in the picture's size"
        )
    cover = _fit(path, image, size, "L")
    if not cover.any():
        raise AdapterError(f"{path}: the mask is black all over, or where the crop keeps it; paint the concept white")
    return cover


def _fingerprint(
    names: Sequence[str], captions: Sequence[str], pixels: Sequence[np.ndarray], covers: Sequence[np.ndarray] | None
) -> str:
    """Every part with its length before it, so that no two different sets run together."""
    digest = hashlib.sha256()
    several = len({picture.shape for picture in pixels}) > 1
    for index, (name, caption) in enumerate(zip(names, captions, strict=True)):
        shape = str(pixels[index].shape).encode() if several else b""
        for part in (name.encode(errors="surrogateescape"), shape + pixels[index].tobytes(), caption.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        if covers is not None:
            digest.update(covers[index].tobytes())
    return digest.hexdigest()


def _list(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
