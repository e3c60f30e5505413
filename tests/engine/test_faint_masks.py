"""A mask's white counts as white: label masks are read as meant, and what is nearly black is no mask."""

import numpy as np
import pytest
import torch

from modular_concepts.data.dataset import load_folder, of_pictures
from modular_concepts.data.faint_masks import DIM_MASK, TWO_VALUES
from modular_concepts.errors import AdapterError

Image = pytest.importorskip("PIL.Image")
SIZE = (32, 32)
LEFT = np.zeros((64, 64), np.uint8)
LEFT[:, :32] = 1


def load(folder, cover):
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        cover.save(folder / f"{number}.mask.png")
    return load_folder(folder, SIZE, ("<tom>",))


def palette() -> "Image.Image":
    image = Image.fromarray(LEFT, "P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    return image


TWO = {
    "0 and 1": Image.fromarray(LEFT),
    "0 and 3": Image.fromarray(LEFT * 3),
    "0 and 128": Image.fromarray(LEFT * 128),
    "16 bits, 0 and 255": Image.fromarray(LEFT.astype(np.uint16) * 255),
    "dark red": Image.fromarray(np.stack([LEFT, LEFT * 0, LEFT * 0], -1)),
    "blue": Image.fromarray(np.stack([LEFT * 0, LEFT * 0, LEFT * 255], -1)),
    "of a palette": palette(),
}


@pytest.mark.parametrize("kind", TWO)
def test_black_and_one_other_value_is_black_and_white_and_that_is_told(tmp_path, kind):
    white = load(tmp_path, Image.fromarray(LEFT * 255))
    labels = load(tmp_path, TWO[kind])
    assert torch.equal(labels.masks, white.masks) and labels.masks.max() == 1
    assert labels.report.notes == (f"{TWO_VALUES}: 0.png, 1.png",) and not white.report.notes


def test_a_grey_all_over_leaves_the_whole_picture_as_white_does(tmp_path):
    plain = load(tmp_path, Image.new("L", (64, 64), 7))
    assert plain.masks.min() == 1
    assert plain.report.notes == ("masks of one grey all over leave the whole picture to be learned: 0.png, 1.png",)


@pytest.mark.parametrize("values", [(1, 2), (3, 10), (24, 25)])
def test_a_mask_that_is_nearly_black_is_refused(tmp_path, values):
    cover = LEFT * values[0]
    cover[:9, :9] = values[1]
    words = rf"0\.mask\.png: the mask is nearly black .* brightest grey is {values[1]} of 255; paint the concept white"
    with pytest.raises(AdapterError, match=words):
        load(tmp_path, Image.fromarray(cover))
    pictures = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    with pytest.raises(AdapterError, match="picture 1: the mask is nearly black"):
        of_pictures(pictures, ["a"], [torch.from_numpy(cover) / 255], SIZE)


def test_what_is_bright_beside_the_crop_makes_no_faint_mask_bright(tmp_path):
    for name, mode in (("0.png", "RGB"), ("1.png", "RGB")):
        Image.effect_noise((200, 64), 60).convert(mode).save(tmp_path / name)
    cover = np.zeros((64, 200), np.uint8)
    cover[:, :20], cover[:, 90:110] = 255, 4
    for number in range(2):
        Image.fromarray(cover).save(tmp_path / f"{number}.mask.png")
    with pytest.raises(AdapterError, match="nearly black"):
        load_folder(tmp_path, SIZE, ("<tom>",))


def test_a_dim_mask_is_used_and_told_and_a_soft_edge_is_not(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    dim = load(tmp_path, Image.fromarray(ramp))
    assert dim.report.notes == (f"{DIM_MASK}: 0.png, 1.png",) and dim.masks.max() < 0.25
    assert not load(tmp_path, Image.fromarray(ramp * 4)).report.notes


def test_loaded_masks_become_what_their_files_become(tmp_path):
    pictures = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for value in (1 / 255, 1e-4, 0.5):
        data = of_pictures(pictures, ["a"], [torch.from_numpy(LEFT).float() * value], SIZE)
        assert torch.equal(data.masks, load(tmp_path, TWO["0 and 1"]).masks)
        assert data.report.notes == (f"{TWO_VALUES}: picture 1, picture 2",)
    with pytest.raises(AdapterError, match="picture 1: the mask is black"):
        of_pictures(pictures, ["a"], [torch.zeros(64, 64)], SIZE)
