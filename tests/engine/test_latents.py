"""Pictures are encoded once; latents on disk are used again for the same pictures, base and VAE, and never else."""

from dataclasses import replace

import pytest
import torch
from tiny_problem import learned
from untrained_toy import untrained_base

from modular_concepts.data.latents import encoded, latent_masks
from modular_concepts.errors import AdapterError
from modular_concepts.sampling import SampleSettings
from modular_concepts.training.loop import Keeping
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Prior, Subject, prior_examples, problem_for, train_concept

SETTINGS = TrainSettings(method="lora", rank=2, steps=3, batch=2, flip=True)


def pictures(count=4, size=(32, 32), seed=3):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def counting(base):
    """The base, and how many pictures it has encoded; the small one that tells VAEs apart is not counted."""
    seen = []

    def encode(given):
        seen.append(len(given) if given.shape[2] != 64 else 0)
        return base.encode(given)

    return replace(base, encode=encode), seen


def test_a_second_training_encodes_nothing_and_learns_the_same(tmp_path):
    base, seen = counting(untrained_base())
    subject = Subject("x", pictures(), ["a <x>"] * 4, "man")
    _, plain = train_concept(base, subject, SETTINGS)
    assert sum(seen) == 8, "four pictures, and four mirrored"
    _, first = train_concept(base, subject, SETTINGS, keeping=Keeping(latents=tmp_path))
    assert sum(seen) == 16
    captioned = replace(subject, captions=["a <x> on the beach", *subject.captions[1:]])
    _, other = train_concept(base, captioned, SETTINGS, keeping=Keeping(latents=tmp_path))
    _, again = train_concept(base, subject, SETTINGS, keeping=Keeping(latents=tmp_path))
    assert sum(seen) == 16
    for result in (first, again):
        assert all(torch.equal(tensor, learned(result)[name]) for name, tensor in learned(plain).items())
    assert other.losses != plain.losses
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 2


def test_other_pictures_bases_and_vaes_are_encoded_anew(tmp_path):
    base, seen = counting(untrained_base())
    first = encoded(base, pictures(), tmp_path)
    other = encoded(base, pictures(seed=4), tmp_path)
    assert sum(seen) == 8 and not torch.equal(first, other)
    encoded(replace(base, hash="another"), pictures(), tmp_path)
    assert sum(seen) == 12
    brighter = replace(base, encode=lambda given: 1.5 * base.encode(given))
    assert torch.equal(encoded(brighter, pictures(), tmp_path), 1.5 * first)
    assert sum(seen) == 16


def test_a_damaged_file_is_made_anew(tmp_path):
    base, seen = counting(untrained_base())
    first = encoded(base, pictures(), tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not latents"):
        path.write_bytes(damaged)
        assert torch.equal(encoded(base, pictures(), tmp_path), first)
    assert sum(seen) == 16 and path.read_bytes() == whole


def test_class_pictures_are_drawn_once(tmp_path):
    base, drawn = untrained_base(), []

    def draw(*args, **options):
        drawn.append(args)
        return pictures(3)

    first, again = (
        prior_examples(base, Prior("man", 3, settings=SampleSettings(steps=2), draw=draw), cache=tmp_path)
        for _ in range(2)
    )
    assert len(drawn) == 1 and torch.equal(first.latents, again.latents) and first.fingerprint == again.fingerprint
    prior_examples(base, Prior("man", 3, 7, SampleSettings(steps=2), draw), cache=tmp_path)
    assert len(drawn) == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AdapterError, match="file.inside cannot be made .* train without keeping latents"):
        encoded(untrained_base(), pictures(), tmp_path / "file" / "inside")


def test_pictures_of_several_sizes_keep_theirs():
    base = untrained_base()
    several = [*pictures(2, (32, 48)), *pictures(1, (48, 32))]
    masks = [(picture[:1] > 0.5).float() for picture in several]
    problem = problem_for(base, Subject("x", several, ["a <x>"] * 3, "man", masks, repeats=(1, 2, 1)), flip=True)
    examples = problem.examples
    assert [latent.shape[1:] for latent in examples.latents] == [(16, 24), (16, 24), (24, 16)]
    assert [mask.shape for mask in examples.masks] == [(1, 16, 24), (1, 16, 24), (1, 24, 16)]
    assert torch.equal(examples.latents[0], base.encode(several[0][None])[0])
    assert torch.equal(examples.mirrored[2], base.encode(several[2].flip(-1)[None])[0])
    assert torch.allclose(examples.masks[0], latent_masks(masks[0][None], examples.latents[0][None])[0])
    assert examples.entries().tolist() == [0, 1, 1, 2] and examples.groups() == [0, 0, 2]


def test_a_mirrored_picture_has_its_mask_mirrored():
    problem = problem_for(
        untrained_base(), Subject("x", pictures(), ["a <x>"] * 4, "man", pictures(4)[:, :1]), flip=True
    )
    examples, turned = problem.examples, torch.tensor([True, False])
    latents, masks = examples.at(torch.tensor([1, 2]), turned)
    assert torch.equal(latents[0], examples.mirrored[1]) and torch.equal(latents[1], examples.latents[2])
    assert torch.equal(masks[0], examples.masks[1].flip(-1)) and torch.equal(masks[1], examples.masks[2])
    assert not torch.equal(examples.mirrored[1], examples.latents[1])
