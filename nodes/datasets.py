"""The pictures, captions and masks that a concept is learned from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..host.files.folders import input_folder
from ..host.messages import show_text
from ..modular_concepts.data.buckets import sizes_of
from ..modular_concepts.data.dataset import Dataset, load_folder, of_pictures, refuse_single
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.settings.training import BUCKETS
from .widgets import widget

CONCEPT_DATASET = io.Custom("CONCEPT_DATASET")
SIDE = 512  # of pictures in a folder, where no size is chosen
STEP = 8
TEMPLATE = "a photo of {concept}"
BUCKET_STEP = 64  # where pictures are large enough for it, so that few sizes come about


class ConceptDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptDataset",
            display_name="Concept Pictures",
            category="modular concepts/training",
            description="Pictures of one person, thing, place or style, with captions and masks, for the concept "
            "trainers. Cropped to the middle and resized; what you see on the node is what is trained on.",
            search_aliases=["training data", "dataset", "dreambooth images", "lora dataset", "captions"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images", optional=True, tooltip="A batch or a list of pictures; or name a folder below"
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the concept is, one for each picture or one for all; only there it is learned",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    optional=True,
                    tooltip="A folder inside ComfyUI's input folder, instead of images: pictures, a .txt caption of "
                    "the same name for each (or none at all), and NAME.mask.png masks (or none at all). Pictures in "
                    "a subfolder 3_anything come three times as often",
                ),
                io.String.Input(
                    "captions",
                    default=TEMPLATE,
                    multiline=True,
                    tooltip="One line for all pictures, or one line for each. {concept} becomes the trigger "
                    "word. A folder's .txt files come first",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=4096,
                    step=STEP,
                    tooltip=f"Training size in pixels; 0: as wide as the first picture ({SIDE} for a folder)",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=4096,
                    step=STEP,
                    tooltip=f"Training size in pixels; 0: as high as the first picture ({SIDE} for a folder)",
                ),
                widget(BUCKETS, optional=True),
            ],
            outputs=[
                CONCEPT_DATASET.Output("dataset", display_name="CONCEPT_DATASET", tooltip="For the concept trainers")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder=("",), **_widgets) -> str:
        """What lies in the folder, so that a changed picture or caption is noticed."""
        name = (folder or [""])[0] or ""
        if not name.strip():
            return ""
        folder = input_folder(name)
        files = sorted(path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern) if path.is_file())
        stats = ((path.relative_to(folder), path.stat()) for path in files)
        return " ".join(f"{path} {stat.st_mtime_ns} {stat.st_size}" for path, stat in stats)

    @classmethod
    def execute(cls, captions, width, height, images=None, masks=None, folder=None, keep_aspect=None) -> io.NodeOutput:
        lines = [line for text in captions for line in (text or "").splitlines() if line.strip()]
        name = ((folder or [""])[0] or "").strip()
        pictures = [picture for batch in images or [] if batch is not None for picture in batch]
        covers = [cover for batch in masks or [] if batch is not None for cover in batch.reshape(-1, *batch.shape[-2:])]
        dataset = _make_dataset(
            pictures, covers, name, lines, (height[0], width[0]), bool(keep_aspect and keep_aspect[0])
        )
        refuse_single(dataset)
        text = "\n".join([describe(dataset), *_find_unused(dataset, name, lines, pictures)])
        show_text(text)
        preview: Any = ui.PreviewImage  # which takes pictures of several sizes too, in a list
        shown = {
            **preview([picture.movedim(0, -1) for picture in dataset.pictures], cls=None).as_dict(),
            **ui.PreviewText(text).as_dict(),
        }
        return io.NodeOutput(dataset, ui=shown)


def describe(dataset: Dataset) -> str:
    """How many pictures of what size, and what is said of them."""
    masked = "" if dataset.masks is None else ", with masks"
    sizes = Counter(sizes_of(dataset.pictures)).most_common()
    lines = [f"{count} pictures of {width} x {height} pixels{masked}" for (height, width), count in sizes]
    if dataset.repeats is not None:
        lines.append(f"{sum(dataset.repeats)} with repeats")
    lines += dataset.report.remarks()
    captions = dict.fromkeys(dataset.captions)
    lines += list(captions)[:8]
    if len(captions) > 8:
        lines.append(f"... and {len(captions) - 8} more captions")
    return "\n".join(lines)


def _find_unused(dataset: Dataset, folder: str, captions: list[str], pictures: list[torch.Tensor]) -> list[str]:
    """A sentence for each thing that the node was given and does not use."""
    unused = []
    if folder and dataset.report.captions and captions != [TEMPLATE]:
        unused.append("the captions on the node are not used: the folder has its own")
    clear = sum(picture.shape[-1] > 3 and bool((picture[..., 3] < 1).any()) for picture in pictures)
    if clear:
        unused.append(f"{clear} pictures have transparent parts; they are learned with the colours that lie under them")
    return unused


def _make_dataset(
    pictures: list[torch.Tensor],
    covers: list[torch.Tensor],
    folder: str,
    captions: list[str],
    size: tuple[int, int],
    keep_aspect: bool,
) -> Dataset:
    if pictures and folder:
        raise AdapterError(f"there are images and the folder {folder!r}; disconnect the images or empty the folder")
    if not pictures and not folder:
        raise AdapterError("there is no picture to train on; connect images, or name a folder in the input folder")
    if not captions:
        raise AdapterError("captions are empty; write at least one line, such as: a photo of {concept}")
    if folder and covers:
        raise AdapterError(
            "there are masks and a folder; a folder's masks lie in it as NAME.mask.png, so disconnect the masks"
        )
    if folder:
        return _load_from_folder(input_folder(folder), captions, (size[0] or SIDE, size[1] or SIDE), keep_aspect)
    height, width = (int(side) // STEP * STEP for side in pictures[0].shape[:2])
    size = size[0] or height, size[1] or width
    pictures = [picture[..., :3].movedim(-1, 0) for picture in pictures]
    return of_pictures(
        pictures, captions, covers or None, size, buckets=keep_aspect, multiple=_choose_bucket_step(size)
    )


def _load_from_folder(folder: Path, captions: list[str], size: tuple[int, int], keep_aspect: bool) -> Dataset:
    # {concept} stays in the captions: the trainer knows the trigger.
    dataset = load_folder(
        folder, size, ("{concept}",), template=captions[0], buckets=keep_aspect, multiple=_choose_bucket_step(size)
    )
    if len(captions) > 1 and not dataset.report.captions:
        raise AdapterError(
            f"{len(captions)} lines of captions for a folder; write one line for all, or a .txt file for each picture"
        )
    return dataset


def _choose_bucket_step(size: tuple[int, int]) -> int:
    return BUCKET_STEP if min(size) >= 4 * BUCKET_STEP else STEP
