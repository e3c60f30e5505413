"""What lies in a folder of pictures: which file is a picture, whose caption or mask, and what is left out and why.

    kodo-1.png  kodo-1.txt  kodo-1.mask.png         captions are NAME.txt or NAME.caption, in any case
    3_rare/kodo-3.png  ...                          each of these three times as often

Names are compared as people read them: without regard to case, and composed and decomposed letters alike.  Other
trainers' names for captions and masks are known; what only looks like one is refused, and never trained on.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AdapterError, listed
from ..storage.names import nameable, not_a_folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")
CAPTIONS = (".txt", ".caption")
MAX_REPEATS = 1000  # a larger number before a folder's name is a year or a date
REPEATED = re.compile(r"(\d+)_.*")
MASK_FOLDER = re.compile(r"(\d+_)?_?masks?(labels?)?_?")
# What a mask is called, with the name of its picture as `of`; what is called as the likely ones can be a picture too.
SURE_MASKS = (r"(?P<of>.+)\.mask", r"(?P<of>.+)[-_. ]masklabel")
LIKELY_MASKS = (r"(?P<of>.+)[-_. ](mask|matte)", r"(mask|matte)[-_. ](?P<of>.+)")
# Pictures of kinds that we do not read, and files in which some programs keep what is said of pictures.
UNREAD = {
    *(".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".xcf", ".svg", ".ico", ".tga"),
    *(".exr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".hdr", ".ppm", ".pgm", ".apng"),
    *(".mp4", ".mov", ".avi", ".webm", ".mkv"),
}
SAYING = {
    *(".json", ".jsonl", ".csv", ".tsv", ".tags", ".tag", ".cap", ".captions", ".prompt", ".text", ".md"),
    *(".rtf", ".doc", ".docx", ".xml", ".yaml", ".yml"),
}
COLLECTIONS = {
    *("metadata", "caption", "captions", "prompt", "prompts", "tags", "meta_cap", "meta_clean", "meta_lat"),
}

NOT_READ = "a kind of file that is not read; save it as PNG or JPEG"
NEITHER = "neither a picture nor a caption"
HIDDEN = "hidden"
NOWHERE = "a link to nothing, or no plain file"
OTHER_USED = "another caption of that picture is used"
OF_NONE = "a caption of no picture; name it as its picture, with .txt"
UNNUMBERED = "a subfolder is read only under a name such as 10_anything, which counts its pictures 10 times"
DATE = f"the number is above {MAX_REPEATS}, so it is taken for a date; such a subfolder is read as 1_anything"


@dataclass(frozen=True)
class Found:
    """A picture and what belongs to it.  repeats: how often it comes in an epoch.

    after: another picture of which its name says that it could be a mask; black and white, it must not be learned.
    """

    path: Path
    repeats: int = 1
    caption: Path | None = None
    mask: Path | None = None
    after: Path | None = None


@dataclass(frozen=True)
class FolderReport:
    """What a training reads, and what it leaves alone.

    repeats: subfolder -> (its pictures, how often each comes).  left_out: reason -> names.
    called: what each picture without a caption is called, or "" where there are captions.
    notes: sentences on what happens to some of the pictures.
    """

    pictures: int
    captions: int = 0
    masks: int = 0
    called: str = ""
    repeats: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """How many pictures, captions and masks there are, in one line."""
        counts = {"picture": self.pictures, "caption": self.captions, "mask": self.masks}
        text = ", ".join(_counted(count, what) for what, count in counts.items())
        return f"{text}; each is called {self.called!r}" if self.called else text

    def remarks(self) -> list[str]:
        """A sentence for each thing that a person should know before the first step."""
        often = [
            f"{place}: {_counted(count, 'picture')}, counted {times} times each"
            for place, (count, times) in self.repeats.items()
        ]
        return [*often, *self.notes, *(f"left out: {listed(names)} ({why})" for why, names in self.left_out.items())]

    def lines(self) -> list[str]:
        return [self.summary(), *self.remarks()]


def survey(folder: Path, grey: Callable[[Path], bool]) -> tuple[list[Found], FolderReport]:
    """The pictures of a folder, sorted by name, with what belongs to each; and a report of all the rest.

    grey: whether a picture file has no colour.
    Raises AdapterError for what is doubtful: captions or masks that some pictures lack, or that belong to none.
    """
    if nameable(folder).is_file():
        raise AdapterError(f"{folder}: this is a file; give the folder that holds the pictures")
    if not folder.is_dir():
        raise AdapterError(f"{folder}: {not_a_folder(folder)}; give the folder that holds the pictures")
    whole = _Survey(folder)
    pictures = [picture for place, times in whole.places() for picture in whole.pictures(place, times, grey)]
    if not pictures:
        beside = "".join(f"; {listed(names)}: {why}" for why, names in whole.left_out.items())
        raise AdapterError(f"{folder}: there is no picture in this folder; we read {', '.join(SUFFIXES)}{beside}")
    _refuse_partial(folder, pictures)
    if pictures[0].caption is None:
        whole.refuse_missed_captions(pictures)
    report = FolderReport(
        pictures=len(pictures),
        captions=sum(picture.caption is not None for picture in pictures),
        masks=sum(picture.mask is not None for picture in pictures),
        repeats=_repeats(folder, pictures),
        left_out={why: tuple(names) for why, names in whole.left_out.items()},
    )
    return pictures, report


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def name_key(name: str) -> str:
    """The same for names that a person reads as the same."""
    return unicodedata.normalize("NFC", name).casefold()


class _Survey:
    """One look into a folder.  left_out: reason -> names.

    missed: (file that may be meant as a caption, why it is left out); elsewhere: captions in subfolders not read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.left_out: dict[str, list[str]] = {}
        self.missed: list[tuple[Path, str]] = []
        self.elsewhere: list[Path] = []

    def leave(self, path: Path, why: str, more: str = "") -> None:
        self.left_out.setdefault(why, []).append(path.relative_to(self.folder).as_posix() + more)

    def places(self) -> list[tuple[Path, int]]:
        """The folder and its subfolders named N_anything, with how often the pictures in each come."""
        folders = [(self.folder, 1)]
        for path in _listed(self.folder):
            if not path.is_dir() or _is_mask_folder(path):
                continue
            named = None if path.name.startswith(".") else REPEATED.fullmatch(path.name)
            if named is None:
                self._leave_folder(path, HIDDEN if path.name.startswith(".") else UNNUMBERED)
            elif int(named[1]) > MAX_REPEATS:
                self._leave_folder(path, DATE)
            elif int(named[1]) < 1:
                raise AdapterError(
                    f"{path}: its name asks for each picture 0 times; name it 1_anything, or move it away"
                )
            else:
                folders.append((path, int(named[1])))
        return folders

    def _leave_folder(self, path: Path, why: str) -> None:
        inside = [one for one in _listed(path) if one.is_file()]
        self.elsewhere += [one for one in inside if one.suffix.lower() in CAPTIONS]
        count = sum(one.suffix.lower() in (*SUFFIXES, *UNREAD) for one in inside)
        self.leave(path, why, f"/ with {_counted(count, 'picture')}" if count else "/")

    def pictures(self, place: Path, repeats: int, grey: Callable[[Path], bool]) -> list[Found]:
        """The pictures of one place; what else is there is left out, or belongs to one of them."""
        drawn, captions, other = [], [], []
        for path in _listed(place):
            if path.is_dir():
                if place != self.folder and not _is_mask_folder(path):
                    self._leave_folder(path, UNNUMBERED)
            elif path.name.startswith("."):
                self.leave(path, HIDDEN)
            elif not path.is_file():
                self.leave(path, NOWHERE)
            elif path.suffix.lower() in SUFFIXES:
                drawn.append(path)
            else:
                (captions if path.suffix.lower() in CAPTIONS else other).append(path)
        pictures, masks = _apart(drawn, grey)
        keys = {key for path in pictures for key in _keys(path)}
        masks |= {path: _mask_in_folder(path, keys) for path in _masks_in_folders(place)}
        orphans = [path.name for path, key in masks.items() if key not in keys]
        if orphans:
            raise AdapterError(
                f"{self.folder}: mask {listed(orphans)} belongs to no picture; name it as its picture, NAME.mask.png"
            )
        mine = self._captions(captions, keys)
        covers, stems = _by_key(masks), {name_key(path.stem): path for path in pictures}
        entries = [
            Found(path, repeats, _one(path, mine), _one(path, covers), _named_after(path, stems)) for path in pictures
        ]
        used = {picture.caption for picture in entries}
        for path in (path for files in mine.values() for path in files if path not in used):
            self.leave(path, OTHER_USED)
        self._rest(other, entries)
        return entries

    def _captions(self, files: Sequence[Path], keys: set[str]) -> dict[str, list[Path]]:
        """Key of a picture -> its captions, the one that is used first."""
        captions: dict[str, list[Path]] = {}
        # .txt before .caption, lower case before upper, NAME.txt before NAME.png.txt
        for path in sorted(files, key=lambda path: (CAPTIONS.index(path.suffix.lower()), path.suffix, len(path.name))):
            if name_key(path.stem) in keys:
                captions.setdefault(name_key(path.stem), []).append(path)
            else:
                self.leave(path, OF_NONE)
                self.missed.append((path, OF_NONE))
        return captions

    def _rest(self, other: Sequence[Path], pictures: Sequence[Found]) -> None:
        """Reasons for what is neither a picture nor a caption, and for captions that another one takes the place of."""
        keys = {key for picture in pictures for key in _keys(picture.path)}
        for path in other:
            kind = path.suffix.lower()
            if kind in SAYING and (name_key(path.stem) in keys or name_key(path.stem) in COLLECTIONS):
                self.missed.append((path, NEITHER))
            self.leave(path, NOT_READ if kind in UNREAD else NEITHER)

    def refuse_missed_captions(self, pictures: Sequence[Found]) -> None:
        """Raise AdapterError where no caption was read, and files are there that must be meant as captions."""
        stems = {name_key(picture.path.stem) for picture in pictures}
        orphans = [path for path, why in self.missed if why == OF_NONE]
        near = [path for path in orphans if any(start in stems for start in _beginnings(name_key(path.stem)))]
        collections = [path for path in orphans if name_key(path.stem) in COLLECTIONS]
        other = [path for path, why in self.missed if why == NEITHER]
        elsewhere = [path for path in self.elsewhere if name_key(path.stem) in stems]
        many = orphans if len(orphans) >= len(pictures) else []
        meant = list(dict.fromkeys([*near, *collections, *other, *elsewhere, *many]))
        if meant:
            names = listed([path.relative_to(self.folder).as_posix() for path in meant])
            raise AdapterError(
                f"{self.folder}: no picture has a caption that is read, and {names} look like captions; put each "
                "beside its picture as NAME.txt, or move them away to train without captions"
            )


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be listed ({error.strerror})") from error


def _is_mask_folder(path: Path) -> bool:
    return MASK_FOLDER.fullmatch(path.name.lower()) is not None


def _masks_in_folders(place: Path) -> Iterator[Path]:
    for folder in _listed(place):
        if folder.is_dir() and _is_mask_folder(folder):
            yield from (
                path
                for path in _listed(folder)
                if path.is_file() and not path.name.startswith(".") and path.suffix.lower() in SUFFIXES
            )


def _apart(drawn: Sequence[Path], grey: Callable[[Path], bool]) -> tuple[list[Path], dict[Path, str]]:
    """(pictures, masks with the key of their picture).  In colour, what is likely called so is a picture."""
    keys = {key for path in drawn for key in _keys(path)}
    masks = {}
    for path in drawn:
        sure, likely = _masked(path, SURE_MASKS), _masked(path, LIKELY_MASKS)
        if sure is not None:
            masks[path] = sure
        elif likely in keys and grey(path):
            masks[path] = likely
    return [path for path in drawn if path not in masks], masks


def _masked(path: Path, patterns: Sequence[str]) -> str | None:
    """The key of the picture that a file is called the mask of."""
    named = (re.fullmatch(pattern, name_key(path.stem)) for pattern in patterns)
    return next((match["of"] for match in named if match), None)


def _mask_in_folder(path: Path, keys: Collection[str]) -> str:
    """The key of the picture that a file in a folder of masks is for: its own name, or with more to it."""
    of = _masked(path, (*SURE_MASKS, *LIKELY_MASKS))
    return of if of is not None and of in keys else name_key(path.stem)


def _by_key(masks: Mapping[Path, str]) -> dict[str, list[Path]]:
    by_key: dict[str, list[Path]] = {}
    for path, key in masks.items():
        if key in by_key:
            raise AdapterError(
                f"{path.parent}: {by_key[key][0].name} and {path.name} are masks of one picture; keep one of them"
            )
        by_key[key] = [path]
    return by_key


def _one(path: Path, files: Mapping[str, Sequence[Path]]) -> Path | None:
    """The file that belongs to a picture, by its name without or with the ending."""
    return next((files[key][0] for key in _keys(path) if key in files), None)


def _keys(path: Path) -> tuple[str, str]:
    return name_key(path.stem), name_key(path.name)


def _named_after(path: Path, stems: Mapping[str, Path]) -> Path | None:
    """Another picture whose name this one's begins or ends with, as a mask could; itself if it is called a mask."""
    stem = name_key(path.stem)
    if stem in ("mask", "masks", "matte") or _masked(path, LIKELY_MASKS) is not None:
        return path
    cuts = [number for number, letter in enumerate(stem) if not letter.isalnum()]
    parts = (part for cut in cuts for part in (stem[:cut], stem[cut + 1 :]))
    return next((stems[part] for part in parts if part in stems), None)


def _beginnings(name: str) -> list[str]:
    """Names that this one could begin with: it is cut where something is that is no letter or digit, and at its end."""
    return [name[:cut] for cut, letter in enumerate(f"{name}.") if not letter.isalnum()]


def _refuse_partial(folder: Path, pictures: Sequence[Found]) -> None:
    bare = [picture.path.name for picture in pictures if picture.mask is None]
    if 0 < len(bare) < len(pictures):
        raise AdapterError(f"{folder}: some pictures have a mask, but not {listed(bare)}; add the masks or remove all")
    unsaid = [picture.path.name for picture in pictures if picture.caption is None]
    if 0 < len(unsaid) < len(pictures):
        raise AdapterError(
            f"{folder}: some pictures have a caption, but not {listed(unsaid)}; "
            "write the missing .txt files, or remove all captions to use the trigger words alone"
        )


def _repeats(folder: Path, pictures: Sequence[Found]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for picture in pictures:
        if picture.path.parent != folder:
            count, _ = counts.get(picture.path.parent.name, (0, 0))
            counts[picture.path.parent.name] = count + 1, picture.repeats
    return counts
