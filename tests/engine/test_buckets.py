"""Pictures that keep their aspect: sizes near the training area, and what is asked for twice comes twice."""

import math

import pytest
import torch

from modular_concepts.data.buckets import LONGEST, bucket
from modular_concepts.data.dataset import load_folder, of_pictures
from modular_concepts.errors import AdapterError
from modular_concepts.training.loop import Keeping, Listeners, train
from modular_concepts.training.problem import Examples
from modular_concepts.training.settings import TrainSettings

Image = pytest.importorskip("PIL.Image")
SIZE = (64, 64)


@pytest.mark.parametrize("size", [(512, 512), (768, 512), (1024, 1024)])
def test_a_bucket_has_about_the_area_and_nearly_the_aspect(size):
    area, seen = size[0] * size[1], set()
    for percent in range(50, 201, 5):
        height, width = 1000, 10 * percent
        high, wide = bucket(height, width, size, 64)
        seen.add((high, wide))
        assert high % 64 == wide % 64 == 0
        assert 0.8 * area < high * wide <= area
        assert abs(math.log(wide / high) - math.log(width / height)) < 0.15
        assert width == height or bucket(width, height, size, 64) == (wide, high)
    assert len(seen) > 5
    assert bucket(512, 512, (512, 512), 64) == (512, 512)


def test_extreme_pictures_are_cropped_to_the_longest_bucket():
    high, wide = bucket(100, 5000, (512, 512), 64)
    assert wide / high <= LONGEST and (high, wide) == (256, 1024)
    assert bucket(64, 64, (32, 32), 64) == (64, 64)


def folder_of(folder, **sizes):
    for name, size in sizes.items():
        image = Image.new("RGB", size, (255, 0, 0))
        image.paste((0, 0, 255), (size[0] // 2, 0, *size))
        (folder / name).parent.mkdir(exist_ok=True)
        image.save(folder / f"{name}.png")
    return folder


def test_a_folder_keeps_each_pictures_aspect(tmp_path):
    folder = folder_of(tmp_path, wide=(192, 96), high=(96, 192), square=(128, 128), again=(200, 100))
    for name in ("wide", "high", "square", "again"):
        Image.new("L", Image.open(folder / f"{name}.png").size, 255).save(folder / f"{name}.mask.png")
    data = load_folder(folder, SIZE, buckets=True, multiple=8)
    sizes = dict(zip(data.names, (tuple(picture.shape) for picture in data.pictures), strict=True))
    assert sizes["square.png"] == (3, 64, 64)
    assert sizes["wide.png"] == sizes["again.png"] == (3, 40, 88) and sizes["high.png"] == (3, 88, 40)
    assert [mask.shape[1:] for mask in data.masks] == [picture.shape[1:] for picture in data.pictures]
    wide = data.pictures[data.names.index("wide.png")]
    assert wide[0, :, :40].min() > 0.9 and wide[2, :, 48:].min() > 0.9, "nothing is squeezed or cut to one side"
    one = load_folder(folder_of(tmp_path / "one", a=(96, 96), b=(64, 64)), SIZE, buckets=True, multiple=8)
    assert isinstance(one.pictures, torch.Tensor), "one size is one tensor"
    pictures = [torch.rand(3, 96, 192), torch.rand(3, 96, 96)]
    loaded = of_pictures(pictures, ["a"], None, SIZE, buckets=True, multiple=8)
    assert [tuple(picture.shape[1:]) for picture in loaded.pictures] == [(40, 88), (64, 64)]


def test_subfolders_with_a_number_repeat_their_pictures(tmp_path):
    folder = folder_of(tmp_path, a=(64, 64))
    folder_of(folder / "3_close", b=(64, 64), c=(64, 64))
    folder_of(folder / "notes", d=(64, 64))
    data = load_folder(folder, SIZE)
    assert data.names == ("a.png", "3_close/b.png", "3_close/c.png") and data.repeats == (1, 3, 3)
    (folder / "3_close").rename(folder / "4_close")
    assert load_folder(folder, SIZE).fingerprint != data.fingerprint
    (folder / "4_close").rename(folder / "0_close")
    with pytest.raises(AdapterError, match="0_close: its name asks for each picture 0 times"):
        load_folder(folder, SIZE)
    (folder / "0_close" / "b.txt").write_text("a {concept}")
    (folder / "0_close").rename(folder / "1_close")
    with pytest.raises(AdapterError, match=r"some pictures have a caption, but not a\.png, c\.png"):
        load_folder(folder, SIZE)


def test_sizes_are_part_of_the_fingerprint():
    stripes = torch.arange(3 * 40 * 80).reshape(3, 40, 80) / 9600
    wide = of_pictures([stripes, torch.ones(3, 64, 64)], ["a"], None, SIZE, buckets=True, multiple=8)
    high = of_pictures([stripes.mT, torch.ones(3, 64, 64)], ["a"], None, SIZE, buckets=True, multiple=8)
    assert wide.fingerprint != high.fingerprint


def test_an_edited_caption_in_the_folder_is_noticed_on_resume(tmp_path):
    from tiny_problem import tiny_basis, tiny_problem

    folder = folder_of(tmp_path / "pictures", a=(64, 64), b=(128, 64))
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("a <x> man")

    def training(callback=None, **options):
        data = load_folder(folder, SIZE, buckets=True, multiple=8)
        latents = [torch.nn.functional.avg_pool2d(picture, 8)[[0, 1, 2, 0]] for picture in data.pictures]
        examples = Examples(latents, data.captions, None, data.fingerprint)
        settings = TrainSettings(rank=2, slot=1, steps=4, batch=2)
        problem = tiny_problem(examples=examples)
        return train(problem, settings, Listeners(callback), Keeping(**options), tiny_basis())

    training(checkpoints=tmp_path / "kept", callback=lambda at: at.step == 2)
    (folder / "b.txt").write_text("the <x> man")
    with pytest.raises(AdapterError, match="the pictures, captions or masks have changed"):
        training(resume=tmp_path / "kept")
    (folder / "b.txt").write_text("a <x> man")
    assert training(resume=tmp_path / "kept").finished
