"""Merging on the command line: every method under its one name, exact files, and warnings in plain words."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws import relative_error
from untrained_toy import write_untrained

from modular_concepts.cli import main as cli
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.moments import load_moments, moments_path
from modular_concepts.merging import METHOD_HELP, Evidence, MergeOptions, merge_concepts
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.recording import recorded, text_features, usual_text
from modular_concepts.storage.safetensors import read_header
from modular_concepts.toy import model
from modular_concepts.toy.base import load_toy_base
from modular_concepts.training.methods import new_adapters, seeded
from modular_concepts.training.run import TrainResult
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, concept_from
from modular_concepts.unread import MERGE

Image = pytest.importorskip("PIL.Image")
STRENGTHS = {"tom": 0.7, "rex": 1.0}
OPTIONS = {"density": 0.3, "rank": 3, "seed": 5, "ridge": 1e-3}


@pytest.fixture(autouse=True)
def here(weights, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(model, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(base, name: str, method: str = "lora", seed: int = 3, **settings):
    """A concept of the untrained base, random where a training would have learned something; written to NAME."""
    chosen = TrainSettings(method=method, name=name, **{"rank": 4, "slot": 0, **settings})
    generator, targets = seeded(seed, name), Targets(("cross_attention",))
    layers = {
        layer: adapter.replace(lora_up=0.05 * torch.randn(adapter.lora_up.shape, generator=generator))
        for layer, adapter in new_adapters(concept_layers(base, targets), chosen).items()
    }
    tokens = {f"<{name}>": base.word_rows("dog") + 0.1 * torch.randn(2, 128, generator=generator)}
    result = TrainResult(layers, tokens, [], 1, True, chosen)
    subject = Subject(name, torch.zeros(2, 3, 32, 32), [f"a <{name}>"] * 2, "dog")
    from modular_concepts.adapters.basis import OrthogonalBasis

    concept = concept_from(base, subject, result, OrthogonalBasis(), targets)
    save_concept(concept, f"{name}.safetensors")
    return concept


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def merge(capsys, how: str, *more, names=STRENGTHS) -> tuple[int, str, str]:
    files = [f"{name}.safetensors:{strength}" for name, strength in names.items()]
    # Those that this method reads: of any other it is said that it changes nothing.
    options = [text for name, value in OPTIONS.items() if how in MERGE[name].by for text in (f"--{name}", value)]
    return run(capsys, "merge", *files, "--out", f"{how}.safetensors", "--how", how, "--overwrite", *options, *more)


@pytest.mark.parametrize("how", METHOD_HELP)
def test_every_method_writes_its_exact_merge(capsys, how):
    base = load_toy_base()
    settings = {"method": "block", "blocks": 3} if how == "block" else {}
    concepts = [made(base, name, **settings, slot=slot) for slot, name in enumerate(STRENGTHS)]
    code, out, err = merge(capsys, how, "--base", "toy")
    assert code == 0 and "note" not in err, err
    evidence = Evidence()
    if how == "fusion":
        kept = [load_moments(moments_path(f"{name}.safetensors")) for name in STRENGTHS]
        assert "wrote tom.moments: what the layers of tom read" in out
        evidence = Evidence(kept)
    if how == "custom_diffusion":
        evidence = Evidence(texts=[text_features(base, concept) for concept in concepts], usual=usual_text(base))
    options = MergeOptions(**OPTIONS)
    wanted = merge_concepts(concepts, list(STRENGTHS.values()), how, options=options, evidence=evidence)
    merged = load_concept(f"{how}.safetensors")
    assert set(merged.layers) == set(wanted) and set(merged.tokens) == {"<tom>", "<rex>"}
    for layer, adapter in merged.layers.items():
        assert relative_error(adapter.delta(), wanted[layer].delta()) < 1e-5
        assert adapter.delta().norm() > 1e-3
    assert ("rank 3 keeps" in out) == (how == "svd")
    assert ("crosstalk tom and rex" in out) and merged.recipe.origin["merge"] == how


def test_the_help_says_what_each_method_does_to_orthogonal_concepts(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {words}" in said for name, words in METHOD_HELP.items())
    assert said.count("destroys orthogonality") >= 3


def test_a_sum_is_one_lora_of_the_ranks_together_and_says_its_parts(capsys):
    base = load_toy_base()
    for slot, name in enumerate(STRENGTHS):
        made(base, name, method="orthogonal", slot=slot)
    assert merge(capsys, "sum", "--title", "Two friends", "--author", "Ana")[0] == 0
    merged = load_concept("sum.safetensors")
    assert {adapter.rank for adapter in merged.layers.values()} == {8}
    said = read_header("sum.safetensors").metadata
    assert (said["modelspec.title"], said["modelspec.author"]) == ("Two friends", "Ana")
    assert said["modelspec.merged_from"] == "tom, rex" and said["modelspec.trigger_phrase"] == "<tom>, <rex>"
    assert said["modelspec.date"].endswith("Z") and merged.recipe.base_hash == base.hash


def test_fusion_reads_moments_from_files_or_says_how_to_have_them(capsys):
    base = load_toy_base()
    concepts = [made(base, name, slot=slot) for slot, name in enumerate(STRENGTHS)]
    code, _, err = merge(capsys, "fusion")
    assert code == 2 and "tom: there are no moments" in err and "give --base" in err
    from modular_concepts.files.moments import save_moments

    for concept in concepts:
        save_moments(recorded(base, concept, count=1).moments(), f"of {concept.name}.safetensors")
    files = [f"of {name}.safetensors" for name in STRENGTHS]
    assert merge(capsys, "fusion", "--moments", *files)[0] == 0
    code, _, err = merge(capsys, "fusion", "--moments", files[0])
    assert code == 2 and "1 of 2 concepts have a file of moments" in err
    code, _, err = merge(capsys, "custom_diffusion")
    assert code == 2 and "give --base" in err
    code, _, err = merge(capsys, "fusion", "--moments", *files, "--exact")
    assert code == 2 and "--exact is fusion without damping, and --ridge is the damping" in err
    both = ["tom.safetensors", "rex.safetensors", "--how", "fusion", "--moments", *files]
    assert run(capsys, "merge", *both, "--exact", "--out", "exact.safetensors")[0] == 0
    assert run(capsys, "merge", *both, "--ridge", "1e-6", "--out", "least.safetensors")[0] == 0
    one, other = (load_concept(f"{name}.safetensors").layers for name in ("exact", "least"))
    assert all(torch.equal(adapter.delta(), other[name].delta()) for name, adapter in one.items())


def test_moments_hold_for_the_weights_and_the_base_that_they_were_recorded_with(capsys, here, monkeypatch):
    base = load_toy_base()
    for slot, name in enumerate(STRENGTHS):
        made(base, name, slot=slot)
    assert merge(capsys, "fusion", "--base", "toy")[0] == 0
    first = {name: moments_path(f"{name}.safetensors").read_bytes() for name in STRENGTHS}
    code, out, err = merge(capsys, "fusion")
    assert code == 0 and "wrote tom.moments" not in out and "recorded" not in err
    # Another tom under the same name, and with an older date than its moments.
    made(base, "tom", slot=0, seed=7)
    os.utime("tom.safetensors", (0, 0))
    Path("fusion.safetensors").unlink()
    code, _, err = merge(capsys, "fusion")
    assert code == 2 and "recorded with other weights than those of tom now; give --base" in err
    files = [str(moments_path(f"{name}.safetensors")) for name in STRENGTHS]
    code, _, err = merge(capsys, "fusion", "--moments", *files)
    assert code == 2 and "other weights than those of tom now; leave --moments out" in err
    code, _, err = merge(capsys, "fusion", "--moments", *reversed(files))
    assert code == 2 and "rex.moments" in err and "of tom now" in err
    assert not Path("fusion.safetensors").exists()
    code, out, err = merge(capsys, "fusion", "--base", "toy")
    assert code == 0 and "tom is drawn and recorded again" in err and "rex is drawn" not in err
    anew = {name: moments_path(f"{name}.safetensors").read_bytes() for name in STRENGTHS}
    assert anew["rex"] == first["rex"] and anew["tom"] != first["tom"]
    # The same concepts on another base.
    (here / "other").mkdir()
    other = write_untrained(here / "other", seed=1)
    monkeypatch.setattr(model, "WEIGHTS", other)
    code, _, err = merge(capsys, "fusion", "--base", "toy", names={"tom": 0.7})
    assert code == 0 and "recorded on another base model, where tom reads other inputs; tom is drawn" in err
    assert moments_path("tom.safetensors").read_bytes() != anew["tom"]
    code, _, err = merge(capsys, "fusion")
    assert code == 2 and "were recorded on two base models; give --base" in err


def test_what_does_not_belong_together_is_said(capsys):
    base = load_toy_base()
    tom, rex = (made(base, name, method="orthogonal", slot=0) for name in STRENGTHS)
    code, _, err = merge(capsys, "sum")
    assert code == 0 and "note: tom and rex were trained in the same slot, 0; retrain one in slot 1" in err
    origin = {**rex.recipe.origin, "base_sample": ""}
    other = replace(rex, recipe=replace(rex.recipe, slot=1, base_hash="f" * 16, origin=origin))
    save_concept(other, "rex.safetensors")
    code, _, err = merge(capsys, "sum", "--base", "toy")
    assert code == 0 and "were trained on different models of one family" in err
    assert "note: rex was trained on another checkpoint" in err and "tom was trained on another" not in err
    assert load_concept("sum.safetensors").recipe.base_hash == ""
    for changes, words in (
        ({"architecture": "sd15"}, "different architectures"),
        ({"basis": "x" * 16}, "trained on shared basis"),
    ):
        save_concept(replace(other, recipe=replace(other.recipe, **changes)), "rex.safetensors")
        (Path.cwd() / "sum.safetensors").unlink(missing_ok=True)
        code, _, err = merge(capsys, "sum")
        assert code == 2 and words in err and not Path("sum.safetensors").exists()
    for slot, (name, blocks) in enumerate({"tom": 3, "rex": 4}.items()):
        made(base, name, method="block", blocks=blocks, slot=slot)
    made(base, "rex", method="block", blocks=3, slot=0)
    code, _, err = merge(capsys, "sum")
    assert code == 0 and "were trained in the same block of rows, 0; retrain one in slot 1" in err
    made(base, "rex", method="block", blocks=4, slot=1)
    code, _, err = merge(capsys, "block")
    assert code == 2 and "tom was trained with 3 contiguous blocks but rex was trained with 4" in err
    code, _, err = merge(capsys, "sum")
    assert code == 0 and "a block merge needs one partition" in err


def test_any_programs_lora_is_merged_and_each_unknown_key_named(capsys, here):
    from safetensors.torch import load_file, save_file

    base = load_toy_base()
    tom, rex = (made(base, name, slot=slot) for slot, name in enumerate(STRENGTHS))
    export_kohya(rex, here / "rex.safetensors")
    strange = {"lora_unet_nowhere_9.alpha": torch.ones(()), "a.b.diff": torch.ones(2)}
    save_file(load_file("rex.safetensors") | strange, "rex.safetensors")
    code, _, err = merge(capsys, "sum")
    assert code == 0 and all(key in err for key in strange)
    merged, wanted = load_concept("sum.safetensors"), merge_concepts([tom, rex], list(STRENGTHS.values()))
    for layer, adapter in merged.layers.items():
        assert relative_error(adapter.delta(), wanted[layer].delta()) < 1e-5
    assert set(merged.tokens) == {"<tom>"}


def test_exports_in_every_form_with_a_picture(capsys, here):
    base = load_toy_base()
    tom = made(base, "tom", method="orthogonal")
    Image.new("RGB", (90, 60), "red").save(here / "red.png")
    for form in ("kohya", "diffusers", "concept", "compact"):
        code, out, err = run(
            capsys, "export", "tom.safetensors", "--format", form, "--out", f"{form}.st", "--thumbnail", "red.png"
        )
        assert code == 0 and f"wrote {form}.st" in out, err
        said = read_header(here / f"{form}.st").metadata
        assert said["modelspec.thumbnail"].startswith("data:image/jpeg;base64,") and said["modelspec.title"] == "tom"
    compact = load_concept(here / "compact.st")
    assert all(torch.equal(compact.layers[name].lora_down, own.lora_down) for name, own in tom.layers.items())
    assert (here / "compact.st").stat().st_size < (here / "concept.st").stat().st_size
    code, out, _ = run(capsys, "inspect", "compact.st")
    assert code == 0 and "thumbnail: a picture" in out
    (here / "red.png").write_bytes(b"no picture")
    code, _, err = run(capsys, "export", "tom.safetensors", "--out", "x.st", "--thumbnail", "red.png")
    assert code == 2 and "not a picture" in err and not (here / "x.st").exists()
