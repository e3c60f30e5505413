"""Where files of each kind lie: the host's own folders, and names that cannot lead out of them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...modular_concepts.errors import AdapterError
from ...modular_concepts.storage.names import not_a_file, safe_child

KINDS = {"concepts": {".safetensors"}, "ortho_bases": {".safetensors", ".npy"}}
# Example files that come with the pack, listed beside the user's own.
EXAMPLES = {kind: Path(__file__).resolve().parents[2] / kind for kind in ("loras", "embeddings")}


def register() -> None:
    """Make the host list our kinds of files; folders that its own configuration names for them are kept."""
    for kind, suffixes in KINDS.items():
        folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))
        folders, endings = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = (folders, set(endings) | suffixes)
    for kind, folder in EXAMPLES.items():
        if folder.is_dir():
            folder_paths.add_model_folder_path(kind, str(folder))


def names(kind: str) -> list[str]:
    """The files of a kind, as a combo lists them."""
    return folder_paths.get_filename_list(kind) if kind in folder_paths.folder_names_and_paths else []


def path_of(kind: str, name: str) -> Path:
    """The file of that name, with / or \\ between folders.

    Raises AdapterError for one that is not there or leads out of the folder.
    """
    # What the host lists it also reads, so links that people put into their folders work.
    listed = {one.replace("\\", "/"): one for one in names(kind)}.get(str(name).replace("\\", "/"))
    if listed is not None and (full := folder_paths.get_full_path(kind, listed)) is not None:
        return Path(full)
    for folder in folder_paths.get_folder_paths(kind):
        if listed is not None and (link := Path(folder) / listed).is_symlink():
            raise AdapterError(f"models/{kind}/{listed}: {not_a_file(link)}; put the file there, or remove the link")
    for folder in folder_paths.get_folder_paths(kind):
        path = safe_child(folder, name)
        if path.is_file():
            return path
    raise AdapterError(
        f"there is no file {name!r} in models/{kind}; put it there or save one first, then press R to refresh the list"
    )


def embedding_folders() -> list[str]:
    """Where the host looks `embedding:name` up."""
    return folder_paths.get_folder_paths("embeddings")


def input_folder(name: str) -> Path:
    """A folder under the host's input folder.  Raises AdapterError for one that is elsewhere or not there."""
    root = Path(folder_paths.get_input_directory())
    path = safe_child(root, name.strip())
    if not path.is_dir():
        raise AdapterError(
            f"there is no folder {name!r} in {root}; put the pictures' folder there, or correct its name"
        )
    return path
