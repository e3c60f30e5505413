"""In the host: what Concept Pictures makes of FOLDER/input/set, cropped and with its aspects kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

from in_host import FOLDER, pack_module, start

start()

import folder_paths

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


facts = {"cropped": made(), "kept": made(keep_aspect=[True])}
(FOLDER / "input" / "set" / "3_often" / "high.txt").write_text("{concept}, close")
facts["stamp"] = node.fingerprint_inputs(folder=["set"])
(FOLDER / "facts.json").write_text(json.dumps(facts))
