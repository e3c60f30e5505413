"""Pictures of one concept, with captions and optional masks, as tensors; every fault of a file in plain words.

`folder.py` says which files of a folder are pictures, captions and masks.  Captions are optional, and so are masks,
but each as a whole: with some there and some missing, something is wrong.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..errors import AdapterError, listed
from ..pictures import to_image, to_pixels
from ..storage.atomic import reason
from ..storage.names import nameable, not_a_file
from .buckets import bucket, stacked
from .captions import checked_caption, read_caption
from .colour_space import has_other_colours
from .faint_masks import TWO_VALUES, check_bright, whiten, whiten_tensor
from .folder import FolderReport, Found, survey
from .picture_size import check_parts, check_promise, is_png, without_tail
from .png_chunks import damaged_chunks, without

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_ENLARGEMENT = 4
MAX_PIXELS = 90_000_000
NO_COLOUR = 12  # of 255 between red, green and blue, as JPEG leaves it
TWO_VALUED = 0.9  # share of pixels near black or white from which on a grey picture can be a mask
TRANSPARENT = "transparent parts are white in training"
FIRST_FRAME = "of a moving picture the first frame is learned"
FIRST_MASK = "of a moving mask the first frame is used"
COLOURED_MASK = "a mask in colour is read by its brightness"
PLAIN_MASK = "masks of one grey all over leave the whole picture to be learned"
WHITE_MASK = "white masks leave the whole picture to be learned"
CROPPED = "the crop leaves less than half of the picture"
PROFILE = "colours are read as sRGB, and the colour profile in the file is not applied; convert it to sRGB first"
DAMAGED_PART = "a part of the file beside its pixels is damaged, and is not read"
PLACE, ALSO_PLACE = "{concept}", "<TOK>"  # the second is how Mix-of-Show's captions have it


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures of one concept, ready for training.

    pictures: (N, 3, H, W) float32 in 0..1, or a list of (3, H, W) of several sizes.  captions: one per picture.
    masks: (N, 1, H, W) float32 in 0..1, 1 where the concept is, a list as the pictures are, or None.
    names: file names in order.  fingerprint: sha256 of names, pixels, captions and masks.
    repeats: how often each picture comes in an epoch; None is once.
    report: what was read of what was given, and what was not.
    """

    pictures: Tensor | list[Tensor]
    captions: tuple[str, ...]
    masks: Tensor | list[Tensor] | None
    names: tuple[str, ...]
    fingerprint: str
    repeats: tuple[int, ...] | None = None
    report: FolderReport = FolderReport(0)


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
    surveyed, report = survey(folder, _is_grey)
    called = with_words(template, triggers, class_word)
    captions = tuple(called if picture.caption is None else read_caption(picture.caption) for picture in surveyed)
    names = tuple(picture.path.relative_to(folder).as_posix() for picture in surveyed)
    notes = _Notes(names)
    pixels, covers = [], [] if report.masks else None
    for number, picture in enumerate(surveyed):
        # One at a time: a photo takes a hundred times the memory of what is made of it.
        image = notes.read(number, picture.path)
        _refuse_mask(picture, image)
        fitted = bucket(image.height, image.width, size, multiple) if buckets else size
        pixels.append(_fit(picture.path, image, fitted, "RGB"))
        notes.see_crop(number, image.size, fitted)
        notes.see(number, pixels[-1])
        if covers is not None and picture.mask is not None:
            cover, oddities = _mask(picture.mask, image.size, fitted)
            covers.append(cover)
            notes.see_mask(number, cover, oddities)
    repeats = tuple(picture.repeats for picture in surveyed)
    return Dataset(
        pictures=_in_unit([torch.from_numpy(picture).permute(2, 0, 1) for picture in pixels]),
        captions=captions,
        masks=None if covers is None else _in_unit([torch.from_numpy(cover)[None] for cover in covers]),
        names=names,
        fingerprint=_fingerprint(names, captions, pixels, covers),
        repeats=None if set(repeats) == {1} else repeats,
        report=replace(report, called="" if report.captions else called, notes=notes.sentences()),
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
    fitted = [
        _fit_tensor(name, picture, size_of) for name, picture, size_of in zip(names, pictures, sizes, strict=True)
    ]
    covers, oddities = None, []
    if masks is not None:
        fits = zip(names, pictures, _one_each("mask", masks, len(pictures)), sizes, strict=True)
        read = [_fit_cover(name, picture, mask, size_of) for name, picture, mask, size_of in fits]
        covers, oddities = [cover for cover, _ in read], [odd for _, odd in read]
    pixels = [to_pixels(picture) for picture in fitted]
    coverage = None if covers is None else [to_pixels(cover[0]) for cover in covers]
    fingerprint = _fingerprint(names, captions, pixels, coverage)
    notes = _Notes(names)
    for number, picture in enumerate(pixels):
        notes.see(number, picture)
        notes.see_crop(number, (pictures[number].shape[-1], pictures[number].shape[-2]), sizes[number])
        if coverage is not None:
            notes.see_mask(number, coverage[number], oddities[number])
    report = FolderReport(len(names), len(names), 0 if covers is None else len(names), notes=notes.sentences())
    covers = None if covers is None else stacked(covers)
    return Dataset(stacked(fitted), captions, covers, names, fingerprint, report=report)


def _one_each(what: str, given: Sequence, count: int) -> Sequence:
    if len(given) not in (1, count):
        raise AdapterError(f"{len(given)} {what}s for {count} pictures; give one {what} for each, or one for all")
    return given if len(given) == count else list(given) * count


def _fit_tensor(name: str, picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) as it is, or through the same cropping that files get."""
    if picture.dim() != 3 or picture.shape[0] != 3 or not picture.isfinite().all():
        raise AdapterError(f"{name}: it has shape {tuple(picture.shape)} or holds NaN; we need finite RGB (3, H, W)")
    picture = picture.detach().float().cpu().clamp(0, 1).clone()
    if picture.shape[1:] == size:
        return picture
    return rearrange(torch.from_numpy(_fit(name, to_image(picture), size, "RGB")), "h w c -> c h w").float() / 255


def _fit_cover(name: str, picture: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, list[str]]:
    """(1, H, W) of a mask (H, W) that lies on `picture`, and what is odd about it."""
    if mask.shape != picture.shape[1:]:
        raise AdapterError(
            f"{name}: the mask is {mask.shape[-1]}×{mask.shape[0]} pixels but its picture is "
            f"{picture.shape[2]}×{picture.shape[1]}; give it in the picture's size"
        )
    white, two_values = whiten_tensor(mask.nan_to_num().cpu())
    image = to_image(white)
    oddities = check_bright(name, image, size)
    cover = torch.from_numpy(_fit_mask(name, image, size))[None].float() / 255
    return cover, [TWO_VALUES, *oddities] if two_values else oddities


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or not all(isinstance(side, int) and 8 <= side <= 8192 for side in size):
        raise AdapterError(
            f"training size {' x '.join(map(str, size[::-1]))} must be a width and a height between 8 and 8192 pixels"
        )


class _Notes:
    """What happens to some of the pictures, gathered while they are read."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.numbers: dict[str, list[int]] = {}
        self.seen: dict[bytes, int] = {}
        self.copies: list[str] = []

    def read(self, number: int, path: Path) -> Image:
        image, oddities = _opened(path)
        for oddity in oddities:
            self.numbers.setdefault(oddity, []).append(number)
        return image

    def see(self, number: int, pixels: np.ndarray) -> None:
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
        first = self.seen.setdefault(digest, number)
        if first != number:
            self.copies.append(f"{listed([self.names[number]])} is the same picture as {listed([self.names[first]])}")

    def see_mask(self, number: int, cover: np.ndarray, oddities: Sequence[str] = ()) -> None:
        if cover.min() == cover.max():
            grey = TWO_VALUES in oddities or cover.min() < 255
            oddities = [*(odd for odd in oddities if odd != TWO_VALUES), PLAIN_MASK if grey else WHITE_MASK]
        for oddity in oddities:
            self.numbers.setdefault(oddity, []).append(number)

    def see_crop(self, number: int, given: tuple[int, int], size: tuple[int, int]) -> None:
        """given: (width, height) of the picture; size: (height, width) that it is cropped to the aspect of."""
        aspect = given[0] / given[1] * size[0] / size[1]
        if min(aspect, 1 / aspect) < 0.5:
            self.numbers.setdefault(CROPPED, []).append(number)

    def sentences(self) -> tuple[str, ...]:
        odd = (f"{oddity}: {listed([self.names[n] for n in places])}" for oddity, places in self.numbers.items())
        more = f", and {len(self.copies) - 5} more copies" if len(self.copies) > 5 else ""
        copies = (f"{'; '.join(self.copies[:5])}{more}; each is learned from again",) if self.copies else ()
        return *odd, *copies


def _refuse_mask(picture: Found, image: Image) -> None:
    """Raise AdapterError for a picture that can only be meant as a mask: black and white, and called after another."""
    if picture.after is None or not _is_black_and_white(image):
        return
    if picture.after == picture.path:
        raise AdapterError(
            f"{picture.path}: it is black and white and called a mask, but belongs to no picture; name it as its "
            "picture, NAME.mask.png, or give it another name to learn it"
        )
    raise AdapterError(
        f"{picture.path}: it is black and white and called after {picture.after.name}, as a mask would be; name it "
        f"{picture.after.stem}.mask.png if it is one, or give it a name of its own to learn it"
    )


def _is_grey(path: Path) -> bool:
    """Whether a picture file has no colour; one that cannot be read is found out later."""
    try:
        return _colourless(_open(path))
    except AdapterError:
        return True


def _colourless(image: Image) -> bool:
    pixels = np.asarray(image.convert("RGB"))
    return all(np.abs(pixels[..., 0].astype(np.int16) - pixels[..., other]).max() <= NO_COLOUR for other in (1, 2))


def _is_black_and_white(image: Image) -> bool:
    counts = image.convert("L").histogram()
    return sum(counts[:16]) + sum(counts[-16:]) >= TWO_VALUED * sum(counts) and _colourless(image)


def load_picture(path: Path, longest: int | None = None, tell: Callable[[str], object] = str) -> Tensor:
    """(H, W, 3) in 0..1 of one picture file, upright and without transparency.

    longest: the pixels of a side that are needed; a larger picture is made smaller before it takes four times the
    memory as numbers.  tell: called with each thing of the file that is lost by it.
    """
    if not nameable(path).is_file():
        raise AdapterError(f"{path}: {not_a_file(path)}")
    image, oddities = _opened(path)
    image = image.convert("RGB")
    if longest is not None:
        image.thumbnail((longest, longest))
    for oddity in oddities:
        tell(oddity)
    return torch.from_numpy(np.array(image)).float().div_(255)


def _open(path: Path) -> Image:
    """Decode a whole picture, upright, as RGB or L; transparency on white."""
    return _opened(path)[0]


def _opened(path: Path) -> tuple[Image, list[str]]:
    """`_open`, and what is lost of the file by it."""
    try:
        from PIL import Image  # noqa: F401 - whether it is there
    except ImportError as error:
        raise AdapterError("reading pictures needs Pillow; install the headless extra") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_parts(path)
            return _decoded_in_parts(path)
    except AdapterError:
        raise
    except PermissionError as error:
        raise AdapterError(f"{path}: cannot be read ({reason(error, 'read')})") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise AdapterError(f"{path}: this is not a picture that can be read, or it is damaged") from error


def _decoded_in_parts(path: Path) -> tuple[Image, list[str]]:
    """Decoded from what of the file is sound and the picture's, and what is lost by that."""
    if not is_png(path):
        return _decoded(path, without_tail(path))
    damaged = set(damaged_chunks(path))
    oddities = [DAMAGED_PART] if damaged else []
    try:
        image, more = _decoded(path, without(path, damaged.__contains__) if damaged else path)
    except AdapterError:
        raise
    except Exception:  # by what is no pixels, perhaps
        image, more = _decoded(path, without(path, lambda chunk: chunk.beside_pixels and chunk.name != b"tRNS"))
        oddities = [DAMAGED_PART]
    return image, list(dict.fromkeys([*oddities, *more]))


def _decoded(path: Path, source: Path | io.BytesIO) -> tuple[Image, list[str]]:
    """source: what of the file at `path` is decoded."""
    from PIL import Image

    try:
        with _rewound(source), Image.open(source, formats=FORMATS) as probe:
            if probe.width * probe.height > MAX_PIXELS:
                raise AdapterError(f"{path}: {probe.width}×{probe.height} pixels are too many; make it smaller")
            check_promise(path, probe, len(source.getbuffer()) if isinstance(source, io.BytesIO) else None)
            probe.verify()
        with _rewound(source), Image.open(source, formats=FORMATS) as image:
            moving = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
            upright, turned = _upright(image)
            odd = {
                TRANSPARENT: _is_transparent(upright),
                FIRST_FRAME: moving,
                PROFILE: has_other_colours(path, image),
                DAMAGED_PART: not turned or image.info.get("icc_profile", b"") is None,  # one that cannot be unpacked
            }
            return _flatten(upright), [oddity for oddity, there in odd.items() if there]
    except ValueError as error:
        if "MAX_TEXT_CHUNK" not in str(error) and "too large" not in str(error):
            raise
        raise AdapterError(
            f"{path}: what is written in it beside the picture is too long to be read; save it without metadata"
        ) from error


def _upright(image: Image) -> tuple[Image, bool]:
    """Turned as a camera says, and whether what it says could be read."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image), True
    except Exception:  # Pillow raises whatever it meets in a camera's words
        image.load()  # raises where it was the pixels
        return image, False


@contextmanager
def _rewound(source: Path | io.BytesIO) -> Generator[None]:
    if isinstance(source, io.BytesIO):
        source.seek(0)
    yield


def _is_transparent(image: Image) -> bool:
    if "transparency" not in image.info and "A" not in image.mode:
        return False
    lowest, _ = cast(tuple[int, int], image.convert("RGBA").getchannel("A").getextrema())
    return lowest < 255


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


def _mask(path: Path, picture_size: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """What of a picture a mask leaves, uint8 (H, W), and what is odd about it."""
    image, lost = _opened(path)
    if TRANSPARENT in lost:
        raise AdapterError(
            f"{path}: the mask has transparent parts, which are neither black nor white; save it without transparency"
        )
    if image.size != picture_size:
        raise AdapterError(
            f"{path}: the mask is {image.width}×{image.height} pixels but its picture is "
            f"{picture_size[0]}×{picture_size[1]}; save it in the picture's size"
        )
    white, two_values = whiten(image)
    oddities = check_bright(path, white, size)
    cover = _fit_mask(path, white, size)
    moving, coloured = FIRST_FRAME in lost, image.mode != "L" and not two_values and not _colourless(image)
    there = {
        FIRST_MASK: moving,
        COLOURED_MASK: coloured,
        TWO_VALUES: two_values,
        DAMAGED_PART: DAMAGED_PART in lost,
    }
    return cover, [*(oddity for oddity, is_there in there.items() if is_there), *oddities]


def _fit_mask(path: Path | str, image: Image, size: tuple[int, int]) -> np.ndarray:
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
