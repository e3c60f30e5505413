"""In the host: trainings that end, that are stopped and that break; what is learned, kept and left behind."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_train import LoraModelLoader
from left_behind import traces
from lessons import Material, Seen, fixed_loss, lesson, outcome
from modular_concepts_pack.host import layers
from modular_concepts_pack.host.files import concepts as saving
from modular_concepts_pack.host.training import train as training
from modular_concepts_pack.host.training.base import host_base
from modular_concepts_pack.modular_concepts.data.dataset import of_pictures
from modular_concepts_pack.modular_concepts.files import concept as files

AS_IT_IS = (saving.Format.CONCEPT, True)


def train_cases(loaded, material: Material, cases: Sequence[dict], folder: Path) -> dict:
    """Train to the end; keep the concept and how the loss, the progress and the model came out."""
    base = host_base(*loaded)
    facts = {"base": [base.architecture, base.hash, base.multiple]}
    for case in cases:
        own, seen, before = lesson(material, case), Seen(), traces(*loaded[:2])
        concept, result = training.train_in_host(base, own)
        files.save_concept(concept, folder / f"{case['name']}.safetensors")
        facts[case["name"]] = {
            "losses": result.losses,
            "fixed": [fixed_loss(base, own.subject), fixed_loss(base, own.subject, concept)],
            "steps": list(seen.steps),
            "previews": list(seen.previews),
            "untouched": traces(*loaded[:2]) == before,
            "plain": not any(
                part.is_inference()
                for adapter in concept.layers.values()
                for part in (adapter.lora_up, adapter.lora_down)
            ),
        }
    return facts


def stop_and_resume(loaded, material: Material, case: dict, folder: Path) -> dict:
    """Cancel by the progress bar, cancel from inside a layer, resume: the same bits as without a pause."""
    base, before, facts = host_base(*loaded), traces(*loaded[:2]), {}
    whole, _ = training.train_in_host(base, lesson(material, case))
    place = training.checkpoint_folder("stopped")
    place.rename(place.with_name("whole"))
    Seen(stop_at=case["stop_at"])
    facts["stopped"] = [outcome(lambda: training.train_in_host(base, lesson(material, case)))]
    facts["stopped"] += [comfy.model_management.processing_interrupted(), traces(*loaded[:2]) == before]
    Seen(stop_at=5)
    early = {**case, "name": "early", "prior": 2, "preview_every": 0}
    facts["stopped_before_the_first_step"] = [outcome(lambda: training.train_in_host(base, lesson(material, early)))]
    facts["stopped_before_the_first_step"] += [traces(*loaded[:2]) == before]
    Seen()
    asked_to = {"count": 0}
    deep = loaded[0].model.diffusion_model.out[1]

    def interrupt(*_):
        asked_to["count"] += 1
        if asked_to["count"] == 5:  # in the second step: the estimate before the first asks three times
            comfy.model_management.interrupt_current_processing(True)
            comfy.model_management.throw_exception_if_processing_interrupted()

    handle = deep.register_forward_hook(interrupt)
    facts["stopped_inside"] = outcome(lambda: training.train_in_host(base, lesson(material, {**case, "resume": True})))
    handle.remove()
    seen = Seen()
    resumed, result = training.train_in_host(base, lesson(material, {**case, "resume": True}))
    facts["resumed"] = [
        seen.steps[0][0],
        len(result.losses),
        all(torch.equal(resumed.layers[name].lora_up, adapter.lora_up) for name, adapter in whole.layers.items()),
        torch.equal(resumed.tokens["<stopped>"], whole.tokens["<stopped>"]),
    ]
    facts["kept"] = sorted(path.name for path in (folder / "concepts").iterdir())
    facts["checkpoints"] = sorted(path.name for path in place.iterdir())
    training.train_in_host(base, lesson(material, {**case, "settings": {**case["settings"], "steps": 2}}))
    facts["checkpoints_of_a_new_start"] = sorted(str(path.relative_to(place)) for path in place.rglob("*.safetensors"))
    facts["other_steps"] = outcome(
        lambda: training.train_in_host(
            base, lesson(material, {**case, "resume": True, "settings": {**case["settings"], "steps": 3}})
        )
    )
    return facts


def break_it(loaded, material: Material, case: dict, folder: Path) -> dict:
    """A fault in mid-training leaves no trace either."""
    base, before, facts = host_base(*loaded), traces(*loaded[:2]), {}
    deep, count = loaded[0].model.diffusion_model.out[1], {"calls": 0}

    def fail(*_):
        count["calls"] += 1
        if count["calls"] == 5:  # the estimate asks twice
            raise ZeroDivisionError("a fault of somebody else's")

    handle = deep.register_forward_hook(fail)
    facts["broken"] = [outcome(lambda: training.train_in_host(base, lesson(material, {**case, "name": "broken"})))]
    handle.remove()
    facts["broken"] += [traces(*loaded[:2]) == before]
    facts["left_by_the_broken"] = [path.name for path in training.checkpoint_folder("broken").iterdir()]
    facts["left_by_the_broken"] += [path.name for path in (folder / "concepts").glob("broken*")]
    wild = {**case, "name": "wild", "learning_rate": 1e30, "token_learning_rate": 1.0}
    wild["settings"] = {**wild["settings"], "clip_norm": 0.0, "alpha": 1e6}
    facts["diverged"] = [
        outcome(lambda: training.train_in_host(base, lesson(material, wild))),
        traces(*loaded[:2]) == before,
    ]
    return facts


def core_lora(loaded, folder: Path) -> dict:
    """Core's own node puts our LORA_MODEL into the weights: W + strength * delta."""
    concept = files.load_concept(folder / "ortho.safetensors")
    keys = {name: layer.key for name, layer in layers.host_layers(*loaded[:2]).items()}
    weights = {key: value.clone() for key, value in loaded[0].model.state_dict().items()}
    (patched,) = LoraModelLoader.execute(loaded[0], training.lora_of(concept), 0.7).result
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    found = patched.model.state_dict()
    unet = {name: adapter for name, adapter in concept.layers.items() if name.startswith("unet.")}
    worst = max(
        float((found[keys[name]] - weights[keys[name]] - 0.7 * adapter.delta()).abs().max())
        for name, adapter in unet.items()
    )
    moved = min(float((found[keys[name]] - weights[keys[name]]).abs().max()) for name in unet)
    facts = {}
    facts["core"] = [worst, moved, len(patched.patches) == len(unet), patched.patches.keys() <= weights.keys()]
    facts["patched_base"] = outcome(lambda: host_base(patched, *loaded[1:]))
    facts["hash_while_patched"] = layers.base_hash(loaded[0], loaded[1])
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([loaded[0]])
    facts["core"].append(all(torch.equal(value, weights[key]) for key, value in loaded[0].model.state_dict().items()))
    return facts


def refusals(loaded, material: Material, case: dict) -> dict[str, str]:
    base = host_base(*loaded)

    def with_settings(**changes):
        return lambda: training.train_in_host(
            base, lesson(material, {**case, "settings": {**case["settings"], **changes}})
        )

    def pictures(height, width, captions=("a {concept}",), masks=None):
        return lambda: of_pictures([torch.rand(3, height, width)], captions, masks, (32, 32))

    odd = dict(case, name="odd")
    return {
        "rank": outcome(with_settings(rank=500)),
        "slot": outcome(with_settings(slot=99)),
        "no vae": outcome(lambda: host_base(*loaded[:2], None)),
        "no clip": outcome(lambda: host_base(loaded[0], None, loaded[2])),
        "no class word": outcome(lambda: lesson(material, {**case, "class_word": " "})),
        "unknown class word": outcome(
            lambda: training.train_in_host(base, lesson(material, {**case, "class_word": "zebra"}))
        ),
        "unknown description": outcome(
            lambda: training.train_in_host(base, lesson(material, {**case, "description": "man zebra"}))
        ),
        "no name": outcome(lambda: lesson(material, {**case, "name": "../"})),
        "name that would change": outcome(lambda: lesson(material, {**case, "name": "../two words"})),
        "no trigger": outcome(lambda: training.train_in_host(base, without_trigger(lesson(material, odd)))),
        "one picture": outcome(pictures(32, 32)),
        "tiny picture": outcome(pictures(4, 4)),
        "captions": outcome(pictures(32, 32, ("a", "b"))),
        "mask size": outcome(pictures(32, 32, masks=[torch.ones(16, 16)])),
        "empty mask": outcome(pictures(32, 32, masks=[torch.zeros(32, 32)])),
        "odd size": outcome(lambda: base.encode(torch.rand(1, 3, 30, 32))),
        "flow model": outcome(lambda: host_base(flow_model(loaded[0]), *loaded[1:])),
        "not a unet": outcome(lambda: layers.architecture_of(types.SimpleNamespace(model=torch.nn.Linear(2, 2)))),
    }


def without_trigger(own):
    captions = ["a man on the beach"] * len(own.subject.captions)
    return dataclasses.replace(own, subject=dataclasses.replace(own.subject, captions=captions))


def flow_model(model):
    (changed,) = ModelSamplingDiscrete().patch(model, "lcm", False)
    return changed


@torch.inference_mode()
def keep_and_save(folder: Path, names: Sequence[str]) -> dict:
    """Cancelled concepts beside those before, and where their folder is none; names in every part of a path."""
    concept = files.load_concept(folder / "ortho.safetensors")
    result, facts = types.SimpleNamespace(step=3), {}
    kept = [training.keep_unfinished(concept, result).name for _ in range(2)]
    place = folder / "concepts"
    place.rename(folder / "aside")
    place.write_text("no folder")
    (folder / "output/modular_concepts/ortho").mkdir(parents=True, exist_ok=True)
    kept.append(str(training.keep_unfinished(concept, result).relative_to(folder)))
    place.unlink()
    (folder / "aside").rename(place)
    facts["kept_unfinished"] = kept
    (place / "aux").mkdir()
    saved = {}
    for typed in names:
        done: list = []
        attempt = outcome(lambda typed=typed, done=done: done.append(saving.save([concept], [1.0], typed, *AS_IT_IS)))
        saved[typed] = done[0].message.splitlines()[0] if done else attempt
    facts["saved"] = saved

    # Folders that take nothing: the concept goes elsewhere, and what lies there stays.
    nowhere, output = folder / "nowhere", folder / "output"
    nowhere.write_text("no folder")
    before = dict(folder_paths.folder_names_and_paths)
    for kind in ("concepts", "loras", "embeddings"):
        folder_paths.folder_names_and_paths[kind] = ([str(nowhere / kind)], {".safetensors"})
    word = dataclasses.replace(concept, layers={})
    facts["fallback"] = {}
    for title, own, form in (
        ("concept", concept, saving.Format.CONCEPT),
        ("again", concept, saving.Format.CONCEPT),
        ("lora", concept, saving.Format.LORA),
        ("word", word, saving.Format.LORA),
    ):
        there = {path.name for path in output.glob("*.safetensors")}
        done = saving.save([own], [1.0], f"far/{title[:4]}" if title == "again" else "kept", form, True)
        new = sorted(path.name for path in output.glob("*.safetensors") if path.name not in there)
        facts["fallback"][title] = [done.name, done.message, new]
    folder_paths.folder_names_and_paths.update(before)
    facts["problems"] = {typed: saving.name_problem(typed) for typed in names}
    return facts
