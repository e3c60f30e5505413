"""In the host: what Concept Pictures makes of FOLDER/input/set, cropped and with its aspects kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

from in_host import FOLDER, pack_module, start

start()

import folder_paths
import torch

folder_paths.set_input_directory(str(FOLDER / "input"))
folder_paths.set_temp_directory(str(FOLDER / "temp"))
node = pack_module("nodes.datasets").ConceptDataset
node.hidden = SimpleNamespace(unique_id="1")


def made(**widgets) -> dict:
    given = {"captions": ["a photo of {concept}"], "width": [64], "height": [64], "folder": ["set"]} | widgets
    output = node.execute(**given)
    (dataset,) = output.args
    shown = [FOLDER / "temp" / image["subfolder"] / image["filename"] for image in output.ui["images"]]
    return {
        "sizes": [list(picture.shape[1:]) for picture in dataset.pictures],
        "masks": [list(mask.shape[1:]) for mask in dataset.masks],
        "repeats": dataset.repeats,
        "said": output.ui["text"][0].splitlines(),
        "shown": [path.is_file() for path in shown],
        "stamp": node.fingerprint_inputs(folder=["set"]),
    }


def refused(**widgets) -> str:
    try:
        made(**widgets)
    except Exception as error:
        return str(error)
    return ""


white = torch.ones(1, 96, 96)
facts = {"cropped": made(), "kept": made(keep_aspect=[True])}
facts["own captions"] = made(captions=["a man"])["said"]
facts["two kinds of masks"] = refused(masks=[white])
half = torch.rand(1, 96, 96, 4, generator=torch.Generator().manual_seed(0))
copies = dict(images=[half, half], masks=[white], folder=[""])
facts["copies"] = made(**copies)["said"]
facts["other trainer"] = made(folder=["other"])
facts["look like captions"] = refused(folder=["tags"])
(FOLDER / "input" / "set" / "3_often" / "high.txt").write_text("{concept}, close")
facts["stamp"] = node.fingerprint_inputs(folder=["set"])
(FOLDER / "facts.json").write_text(json.dumps(facts))
