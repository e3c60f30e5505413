"""Training options of the headless face: presets, explicit options over them, and what they lead to."""

from pathlib import Path

import pytest
import torch
from test_cli import run

from modular_concepts.cli import main as cli
from modular_concepts.files.concept import load_concept
from modular_concepts.files.embeddings import import_embedding
from modular_concepts.toy import model
from modular_concepts.training.presets import PRESETS

pytest.importorskip("PIL.Image")

QUICK = ["--steps", "2", "--batch", "2", "--prior", "0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    assert cli.main(["pictures", "tom", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def train(pictures, weights, tmp_path, monkeypatch, capsys):
    """Runs `train` on tom's pictures in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.setattr(model, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    return lambda *more: run(capsys, "train", pictures, "--name", "tom", "--class-word", "man", *more)


def test_presets_are_listed_with_their_help(capsys):
    code, out, _ = run(capsys, "train", "--list-presets")
    assert code == 0
    assert all(name in out for name in PRESETS) and "needs many steps" in " ".join(out.split())


def test_a_preset_is_trained_and_explicit_options_win(train, tmp_path):
    code, out, err = train("--preset", "ed-lora", *QUICK, "--rank", "3", "--no-text-encoder", "--schedule", "linear")
    assert code == 0, err
    assert "a step" in out and "of memory" in out
    concept = load_concept(tmp_path / "concepts/tom.safetensors")
    assert concept.tokens["<tom>"].shape == (4, 8, 128)
    assert {adapter.rank for adapter in concept.layers.values()} == {3}
    assert all(".attn" in name and name.startswith("unet.") for name in concept.layers)
    said = concept.recipe.training
    assert (said["token_start"], said["noise_offset"], said["schedule"]) == ("random + class", 0.01, "linear")


def test_a_concept_is_trained_in_company(train, tmp_path):
    company = ["--company", "1", "--company-pictures", "2", "--method", "lora", "--rank", "2", *QUICK]
    for cache in ("first", "again"):
        code, _, err = train(*company, "--cache", "kept", "--out", f"{cache}.safetensors")
        assert code == 0 and "changes nothing" not in err, err
        assert ("draw company" in err) == (cache == "first"), err
    first, again = (load_concept(tmp_path / f"{name}.safetensors") for name in ("first", "again"))
    assert first.recipe.training["company"] == 1.0
    assert all(torch.equal(adapter.lora_up, again.layers[name].lora_up) for name, adapter in first.layers.items())


def test_company_that_does_not_fit_is_told(train, monkeypatch):
    monkeypatch.setattr("modular_concepts.models.budget.machine_memory", lambda: 2**36)
    code, _, err = train("--company", "0.5", "--size", "4608x1024", *QUICK)
    assert code == 2 and "--company trains on pictures twice as wide, and pictures of 9216 x 1024 pixels are too" in err
    assert err.count("\n") == 1 and "or leave --company away" in err
    code, _, err = train("--company", "0.5", "--company-pictures", "1", *QUICK)
    assert code == 2 and "--company-pictures is 1; it must be from 2 to 10000 pictures" in err


def test_a_word_alone_is_trained_shown_drawn_with_and_exported(train, tmp_path, capsys):
    code, out, err = train("--preset", "p+", *QUICK)
    assert code == 0 and "<tom>, no layers" in out, err
    file = tmp_path / "concepts/tom.safetensors"
    code, out, _ = run(capsys, "inspect", file)
    assert code == 0 and "no layers, the word alone" in out
    assert "learned word <tom>: 8 x 128, for each of 4 cross-attention layers" in out
    drawn = ["sample", "a <tom> on the beach", "--steps", "1", "--concept", file]
    assert run(capsys, *drawn, "--region", "0,0,0.5,1:a <tom>", "--out", "regions.png")[0] == 0
    code, out, _ = run(capsys, "export", file)
    assert code == 0 and "has rows for each layer" in out
    _, rows = import_embedding(tmp_path / "exports/embeddings/tom.safetensors")
    assert rows.shape == (8, 128)


def test_whole_weights_are_trained_and_exported(train, tmp_path, capsys):
    code, out, err = train("--preset", "custom diffusion", *QUICK, "--compact", "--token-norm", "none")
    assert code == 0 and "8 layers in full" in out, err
    concept = load_concept(tmp_path / "concepts/tom.safetensors")
    assert {adapter.kind for adapter in concept.layers.values()} == {"full"}
    assert min(adapter.delta().norm() for adapter in concept.layers.values()) > 0
    assert run(capsys, "export", tmp_path / "concepts/tom.safetensors")[0] == 0


def test_a_resume_with_other_settings_is_refused_until_accepted(train):
    steps = ["--method", "words", *QUICK, "--checkpoints", "steps"]
    assert train(*steps)[0] == 0
    again = [*steps, "--resume", "steps", "--token-lr", "0.5", "--steps", "3"]
    code, _, err = train(*again)
    assert code == 2 and "token_lr was 0.03, is now 0.5" in err and err.splitlines()[-1].startswith("error: ")
    assert "--accept-changes resumes all the same" in err
    code, out, err = train(*again, "--accept-changes")
    assert code == 0 and "for 1 more step after step 2" in out, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "words", "--compact"], "--compact leaves out what the recipe gives back"),
        (["--preset", "block lora"], "needs a slot"),
        (["--preset", "dora"], "invalid choice: 'dora'"),
        (["--attention-regularisation", "0.1"], "these pictures have none"),
        (["--caption-dropout", "1"], "caption_dropout is 1.0"),
        (["--min-snr", "much"], "invalid number value: 'much'"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(train, options, words):
    code, _, err = train(*QUICK, *options)
    assert code == 2 and words in err
