"""In the host: train concepts on FOLDER/asked's pictures, stop some, break some; write down what is left."""

from __future__ import annotations

import dataclasses
import json
import types

from in_host import FOLDER, pack_module, start

start()

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_extras.nodes_train import LoraModelLoader
from left_behind import traces
from safetensors.torch import load_file

torch.set_num_threads(1)
# Every step is told, however fast the machine: the cases stop at steps by their number.
comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = 0.0
folder_paths.set_output_directory(str(FOLDER / "output"))
folder_paths.set_temp_directory(str(FOLDER / "temp"))
folder_paths.add_model_folder_path("concepts", str(FOLDER / "concepts"))

host_base, layers, training = (
    pack_module("host.training.base"),
    pack_module("host.layers"),
    pack_module("host.training.train"),
)
files, bases = pack_module("modular_concepts.files.concept"), pack_module("modular_concepts.adapters.basis")
customisation, dataset = (pack_module("modular_concepts.training.teach"), pack_module("modular_concepts.data.dataset"))
attach, AdapterError = (
    pack_module("modular_concepts.adapters.attach"),
    pack_module("modular_concepts.errors").AdapterError,
)

asked, plan = load_file(FOLDER / "asked.safetensors"), json.loads((FOLDER / "asked.json").read_text())
facts: dict = {}


class Seen:
    """Stands where the host's server listens to progress bars."""

    def __init__(self, stop_at: int | None = None):
        self.steps, self.previews, self.stop_at = [], [], stop_at
        comfy.utils.set_progress_bar_global_hook(self)

    def __call__(self, value, total, preview, node_id=None):
        self.steps.append((value, total))
        if preview is not None:
            self.previews.append((preview[0], *preview[1].size))
        if value == self.stop_at:
            comfy.model_management.interrupt_current_processing(True)
        # The server's own hook raises here too.
        comfy.model_management.throw_exception_if_processing_interrupted()


find_family = pack_module("modular_concepts.families").find_family


def lesson(case: dict, prefix: str = "") -> training.Plan:
    """A plan as the trainer nodes make it."""
    pictures = asked[f"{prefix}pictures"]
    masks = list(asked[f"{prefix}masks"]) if case.get("masks") else None
    data = dataset.of_pictures(list(pictures), plan["captions"], masks, tuple(pictures.shape[2:]))
    subject = training.subject_of(data, case["name"], case.get("class_word", "man"), case.get("description", ""))
    rates = training.Rates(case.get("learning_rate", 1e-3), case.get("token_learning_rate", 3e-2))
    settings = training.settings_for(
        find_family("sd15" if prefix else "toy"), rates, name=subject.name, **case["settings"]
    )
    unet, text = tuple(case.get("targets", ["attention"])), ("attention",) if case.get("text_encoder") else None
    return training.Plan(
        subject,
        settings,
        customisation.Targets(unet, text),
        bases.OrthogonalBasis(),
        case.get("prior", 0),
        case.get("preview_every", 0),
        (f"a {subject.trigger}",),
        case.get("resume", False),
        case.get("accept_changes", False),
    )


@torch.no_grad()
def fixed_loss(base, subject, concept=None) -> float:
    """Mean loss on 32 fixed draws of picture, noise and timestep, with the class word's own rows without a concept."""
    generator = torch.Generator().manual_seed(7)
    latents = base.encode(subject.pictures)
    picked = torch.arange(32) % len(latents)
    latents, captions = latents[picked], [subject.captions[i] for i in picked.tolist()]
    noise, timesteps = torch.randn(latents.shape, generator=generator), torch.randint(1000, (32,), generator=generator)
    signal = base.schedule.alphas_cumprod[timesteps][:, None, None, None]
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    v = base.schedule.prediction == "v_prediction"
    wanted = signal.sqrt() * noise - (1 - signal).sqrt() * latents if v else noise
    adapters = concept.layers if concept else {}
    tokens = dict(concept.tokens) if concept else {subject.trigger: base.word_rows(subject.class_word)}
    with base.trainable(), attach.attached(base.layers(("all_linear",), ("all_linear",)), adapters):
        told = dict.fromkeys(captions)
        context = dict(zip(told, base.context(list(told), tokens), strict=True))
        context = torch.stack([context[caption] for caption in captions])
        predicted = torch.cat(
            [base.predict(noisy[i : i + 8], timesteps[i : i + 8], context[i : i + 8]) for i in range(0, 32, 8)]
        )
    return float((predicted - wanted).square().mean())


def train_cases(loaded, prefix: str = "") -> None:
    """Train to the end; keep the concept and how the loss, the progress and the model came out."""
    base = host_base.host_base(*loaded)
    facts[f"{prefix}base"] = [base.architecture, base.hash, base.multiple]
    for case in plan[f"{prefix}cases"]:
        own, seen, before = lesson(case, prefix), Seen(), traces(*loaded[:2])
        concept, result = training.train_in_host(base, own)
        files.save_concept(concept, FOLDER / f"{prefix}{case['name']}.safetensors")
        facts[f"{prefix}{case['name']}"] = {
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


def stop_and_resume(loaded) -> None:
    """Cancel by the progress bar, cancel from inside a layer, resume: the same bits as without a pause."""
    base, before = host_base.host_base(*loaded), traces(*loaded[:2])
    case = plan["stopped"]
    whole, _ = training.train_in_host(base, lesson(case))
    place = training.checkpoint_folder("stopped")
    place.rename(place.with_name("whole"))
    Seen(stop_at=case["stop_at"])
    facts["stopped"] = [outcome(lambda: training.train_in_host(base, lesson(case)))]
    facts["stopped"] += [comfy.model_management.processing_interrupted(), traces(*loaded[:2]) == before]
    Seen(stop_at=5)
    early = {**case, "name": "early", "prior": 2, "preview_every": 0}
    facts["stopped_before_the_first_step"] = [outcome(lambda: training.train_in_host(base, lesson(early)))]
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
    facts["stopped_inside"] = outcome(lambda: training.train_in_host(base, lesson({**case, "resume": True})))
    handle.remove()
    seen = Seen()
    resumed, result = training.train_in_host(base, lesson({**case, "resume": True}))
    facts["resumed"] = [
        seen.steps[0][0],
        len(result.losses),
        all(torch.equal(resumed.layers[name].lora_up, adapter.lora_up) for name, adapter in whole.layers.items()),
        torch.equal(resumed.tokens["<stopped>"], whole.tokens["<stopped>"]),
    ]
    facts["kept"] = sorted(path.name for path in (FOLDER / "concepts").iterdir())
    facts["checkpoints"] = sorted(path.name for path in place.iterdir())
    training.train_in_host(base, lesson({**case, "settings": {**case["settings"], "steps": 2}}))
    facts["checkpoints_of_a_new_start"] = sorted(str(path.relative_to(place)) for path in place.rglob("*.safetensors"))
    facts["other_steps"] = outcome(
        lambda: training.train_in_host(
            base, lesson({**case, "resume": True, "settings": {**case["settings"], "steps": 3}})
        )
    )


def break_it(loaded) -> None:
    """A fault in mid-training leaves no trace either."""
    base, before = host_base.host_base(*loaded), traces(*loaded[:2])
    deep, count = loaded[0].model.diffusion_model.out[1], {"calls": 0}

    def fail(*_):
        count["calls"] += 1
        if count["calls"] == 5:  # the estimate asks twice
            raise ZeroDivisionError("a fault of somebody else's")

    handle = deep.register_forward_hook(fail)
    facts["broken"] = [outcome(lambda: training.train_in_host(base, lesson({**plan["stopped"], "name": "broken"})))]
    handle.remove()
    facts["broken"] += [traces(*loaded[:2]) == before]
    facts["left_by_the_broken"] = [path.name for path in training.checkpoint_folder("broken").iterdir()]
    facts["left_by_the_broken"] += [path.name for path in (FOLDER / "concepts").glob("broken*")]
    wild = {**plan["stopped"], "name": "wild", "learning_rate": 1e30, "token_learning_rate": 1.0}
    wild["settings"] = {**wild["settings"], "clip_norm": 0.0, "alpha": 1e6}
    facts["diverged"] = [outcome(lambda: training.train_in_host(base, lesson(wild))), traces(*loaded[:2]) == before]


def core_lora(loaded) -> None:
    """Core's own node puts our LORA_MODEL into the weights: W + strength * delta."""
    concept = files.load_concept(FOLDER / "ortho.safetensors")
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
    facts["core"] = [worst, moved, len(patched.patches) == len(unet), patched.patches.keys() <= weights.keys()]
    facts["patched_base"] = outcome(lambda: host_base.host_base(patched, *loaded[1:]))
    facts["hash_while_patched"] = layers.base_hash(loaded[0], loaded[1])
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([loaded[0]])
    facts["core"].append(all(torch.equal(value, weights[key]) for key, value in loaded[0].model.state_dict().items()))


def refusals(loaded) -> None:
    base, case = host_base.host_base(*loaded), plan["stopped"]

    def with_settings(**changes):
        return lambda: training.train_in_host(base, lesson({**case, "settings": {**case["settings"], **changes}}))

    def pictures(height, width, captions=("a {concept}",), masks=None):
        return lambda: dataset.of_pictures([torch.rand(3, height, width)], captions, masks, (32, 32))

    odd = dict(case, name="odd")
    facts["refusals"] = {
        "rank": outcome(with_settings(rank=500)),
        "slot": outcome(with_settings(slot=99)),
        "no vae": outcome(lambda: host_base.host_base(*loaded[:2], None)),
        "no clip": outcome(lambda: host_base.host_base(loaded[0], None, loaded[2])),
        "no class word": outcome(lambda: lesson({**case, "class_word": " "})),
        "unknown class word": outcome(lambda: training.train_in_host(base, lesson({**case, "class_word": "zebra"}))),
        "unknown description": outcome(
            lambda: training.train_in_host(base, lesson({**case, "description": "man zebra"}))
        ),
        "no name": outcome(lambda: lesson({**case, "name": "../"})),
        "name that would change": outcome(lambda: lesson({**case, "name": "../two words"})),
        "no trigger": outcome(lambda: training.train_in_host(base, without_trigger(lesson(odd)))),
        "one picture": outcome(pictures(32, 32)),
        "tiny picture": outcome(pictures(4, 4)),
        "captions": outcome(pictures(32, 32, ("a", "b"))),
        "mask size": outcome(pictures(32, 32, masks=[torch.ones(16, 16)])),
        "empty mask": outcome(pictures(32, 32, masks=[torch.zeros(32, 32)])),
        "odd size": outcome(lambda: base.encode(torch.rand(1, 3, 30, 32))),
        "flow model": outcome(lambda: host_base.host_base(flow_model(loaded[0]), *loaded[1:])),
        "not a unet": outcome(lambda: layers.architecture_of(types.SimpleNamespace(model=torch.nn.Linear(2, 2)))),
    }


def without_trigger(own):
    captions = ["a man on the beach"] * len(own.subject.captions)
    return dataclasses.replace(own, subject=dataclasses.replace(own.subject, captions=captions))


def flow_model(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (changed,) = ModelSamplingDiscrete().patch(model, "lcm", False)
    return changed


def outcome(attempt) -> str:
    try:
        attempt()
    except comfy.model_management.InterruptProcessingException:
        return "interrupted"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "worked"


@torch.inference_mode()
def keep_and_save() -> None:
    """Cancelled concepts beside those before, and where their folder is none; names in every part of a path."""
    concept = files.load_concept(FOLDER / "ortho.safetensors")
    result = types.SimpleNamespace(step=3)
    kept = [training.keep_unfinished(concept, result).name for _ in range(2)]
    place = FOLDER / "concepts"
    place.rename(FOLDER / "aside")
    place.write_text("no folder")
    (FOLDER / "output/modular_concepts/ortho").mkdir(parents=True, exist_ok=True)
    kept.append(str(training.keep_unfinished(concept, result).relative_to(FOLDER)))
    place.unlink()
    (FOLDER / "aside").rename(place)
    facts["kept_unfinished"] = kept
    (place / "aux").mkdir()
    saving, saved = pack_module("host.files.concepts"), {}
    for typed in plan["typed"]:
        saved[typed] = outcome(lambda typed=typed: facts.update(said=saving.save([concept], [1.0], typed, *AS_IT_IS)))
        saved[typed] = facts.pop("said").message.splitlines()[0] if saved[typed] == "worked" else saved[typed]
    facts["saved"] = saved

    # Folders that take nothing: the concept goes elsewhere, and what lies there stays.
    nowhere, output = FOLDER / "nowhere", FOLDER / "output"
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
    facts["problems"] = {typed: saving.name_problem(typed) for typed in plan["typed"]}


AS_IT_IS = (pack_module("host.files.concepts").Format.CONCEPT, True)


def main() -> None:
    if "cases" in plan:
        loaded = pack_module("host.toy_base").load_toy_base()
        train_cases(loaded)
        core_lora(loaded)
        stop_and_resume(loaded)
        break_it(loaded)
        refusals(loaded)
        keep_and_save()
        headless = files.load_concept(FOLDER / "headless.safetensors")
        base = host_base.host_base(*loaded)
        facts["headless"] = [
            headless.recipe.base_hash == base.hash,
            headless.recipe.architecture == base.architecture,
            fixed_loss(base, lesson({**plan["stopped"], "name": "headless"}).subject, headless),
        ]
    if "sd_cases" in plan:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(FOLDER / "tiny_sd15.safetensors"))
        train_cases((model, clip, vae), "sd_")
    (FOLDER / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
