"""In the host: LoRAs of every origin, merges taken out again, as activations, in hooks and in checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.sd
import torch
from app.model_manager import ModelFileManager
from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes
from comfy_extras.nodes_model_merging import CheckpointSave
from left_behind import hooks_on, weights
from modular_concepts_pack.host import toy_base as toy
from modular_concepts_pack.host.files import concepts as files
from modular_concepts_pack.host.layers import host_layers
from modular_concepts_pack.host.merging import notices as merging_words
from modular_concepts_pack.host.merging import text_features as wording
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.regions import sampling
from modular_concepts_pack.host.text import words as telling
from modular_concepts_pack.modular_concepts.regions.geometry import Region
from modular_concepts_pack.nodes import concepts as loading
from modular_concepts_pack.nodes import merging
from modular_concepts_pack.nodes.concepts import ConceptSave
from safetensors.torch import load_file, save_file

import nodes


@torch.inference_mode()
def exchanged(plan: dict, folder: Path, warnings: list[str], replaced) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts); `folder` is the host's, with the plan's files in it."""
    model, clip, vae = toy.load_toy_base()
    layers = host_layers(model, clip)
    before, found, facts = weights(model, clip), {}, {"untouched": [], "unused": {}}

    def key_of(name: str) -> str:
        return f"{'model' if layers[name].part == 'unet' else 'clip'}.{layers[name].key}"

    def back_to_base() -> None:
        comfy.model_management.unload_all_models()
        after = weights(model, clip)
        facts["untouched"].append(all(torch.equal(before[key], after[key]) for key in before))
        facts["untouched"].append(hooks_on(model, clip) == 0)

    def look(title: str, patched, patched_clip) -> None:
        comfy.model_management.load_models_gpu([patched, patched_clip.patcher])
        now = weights(patched, patched_clip)
        found.update({f"{title}|{name}": now[key_of(name)] for name in plan["layers"]})
        patched.unpatch_model()
        patched_clip.patcher.unpatch_model()
        back_to_base()

    found |= {f"base|{name}": before[key_of(name)] for name in plan["layers"]}
    concepts = {
        name: loading.ConceptLoader.execute(f"{name}.safetensors", 1.0)[0][0][0] for name in ("tom", "rex", "wide")
    }

    # The host's own form: module paths, and convolutions whose lora_down is flat, as its trainer saves them.
    own_form = {}
    for name, adapter in concepts["wide"].layers.items():
        if layers[name].part == "unet":
            stem = layers[name].key.removesuffix(".weight")
            own_form |= {
                f"{stem}.lora_up.weight": adapter.full_up(),
                f"{stem}.lora_down.weight": adapter.lora_down.flatten(1),
                f"{stem}.alpha": torch.tensor(adapter.alpha),
                f"{stem}.diff_b": torch.zeros(adapter.out_features),
            }
    save_file({key: value.contiguous() for key, value in own_form.items()}, folder / "loras/own.safetensors")

    # Every file and model through core's loader and through ours.
    for file in plan["files"]:
        # Core reads diffusers' files in older keys alone.
        core = nodes.LoraLoader().load_lora(model, clip, plan["twins"].get(file, file), 0.7, 0.7)
        look(f"core {file}", *core)
        stack, facts["unused"][file] = loading.LoRAToConcept.execute([(file, 0.7, 0.7)], "", model, clip).args
        facts.setdefault("names", {})[file] = stack[0][0].name
        look(f"ours {file}", *merging.ConceptMerge.execute(model, clip, {"a": stack}, "sum").args[:2])
    as_model = loading.LoRAToConcept.execute(own_form, "trained", model, None).args[0]
    look("LORA_MODEL", *merging.ConceptMerge.execute(model, clip, {"a": [(as_model[0][0], 0.7)]}, "sum").args[:2])

    # A stack of other packs: folders either way, two strengths, an empty row.
    rows = [("people/tom.safetensors", 0.7, 0.3), ("None", 1.0, 1.0), ("people\\rex.safetensors", 0.0, 1.2)]
    core = (model, clip)
    for file, strength, text_strength in (rows[0], rows[2]):
        core = nodes.LoraLoader().load_lora(*core, file.replace("\\", "/"), strength, text_strength)
    look("core stack", *core)
    stack, facts["unused"]["stack"] = loading.LoRAToConcept.execute(rows, "", None, None).args
    look("ours stack", *merging.ConceptMerge.execute(model, clip, {"a": stack}, "sum").args[:2])
    facts["stack"] = [[concept.name, strength] for concept, strength in stack]

    # LoRAs that bring the words they were trained with.
    core = nodes.LoraLoader().load_lora(model, clip, "bundled.safetensors", 0.7, 0.3)
    look("core bundled", *core)
    for title, strengths in {"loud": (1.0, 1.0), "two": (0.7, 0.3), "silent": (1.0, 0.0), "off": (0.0, 0.0)}.items():
        row = ("bundled.safetensors", *strengths)
        stack, facts["unused"][title] = loading.LoRAToConcept.execute([row], "", model, clip).args
        found[f"words|{title}"] = telling.encode_prompt(clip, plan["prompt"], stack)[0][0]
        if title == "two":
            look("ours bundled", *merging.ConceptMerge.execute(model, clip, {"a": stack}, "sum").args[:2])
    found["words|plain"] = telling.encode_prompt(clip, plan["prompt"])[0][0]
    shown = []
    replaced.setattr(loading, "show_text", shown.append)
    stack, _ = loading.LoRAToConcept.execute([("bundled.safetensors", 1.0, 1.0)], "", None, None).args
    facts["bundled"] = [stack[0][0].recipe.triggers, list(shown)]
    merged = merging.ConceptMerge.execute(model, clip, {"a": stack, "b": concepts["tom"]}, "sum").args
    found["words|merged"] = telling.encode_prompt(merged[1], plan["prompt"])[0][0]
    wordless = {"a": [(replace(stack[0][0], tokens={}), 1.0)], "b": concepts["tom"]}
    merged = merging.ConceptMerge.execute(model, clip, wordless, "sum").args
    found["words|merged without"] = telling.encode_prompt(merged[1], plan["prompt"])[0][0]
    save = ConceptSave.execute
    facts["bundled saved"] = [
        save(stack, "bundled", form, True).ui.as_dict()["text"][0] for form in loading.FORMATS[::2]
    ]
    clear = torch.ones(2, 8, 8, 4)
    clear[0, 0, 0, 3] = 0
    facts["thumbnails"] = [
        save(concepts["tom"], "seen", loading.FORMATS[0], True, picture).ui.as_dict()["text"][0]
        for picture in (clear, clear[1:], clear[..., :3])
    ]
    back_to_base()

    # Two merges of two families, one on top of the other, taken out as one concept.
    first = merging.ConceptMerge.execute(
        model, clip, {"a": concepts["tom"], "b": (concepts["rex"], 0.5)[0]}, "ties", density=0.6
    ).args
    second = merging.ConceptMerge.execute(*first[:2], {"a": [(concepts["wide"], -0.5)]}, "sum").args
    look("in turn", *second[:2])
    taken, lora = merging.ConceptFromModel.execute(second[0], "all of them").args
    facts["taken"] = [taken.name, sorted(taken.tokens), taken.recipe.origin["merge"]]
    look("taken out", *merging.ConceptMerge.execute(model, clip, {"a": taken}, "sum").args[:2])
    look("taken out by core", *comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0))

    # Saved, loaded by core; with a picture, which the host's own browser then shows.
    picture = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    pair = [(concepts["tom"], 0.7), (concepts["wide"], -0.5)]
    for number, form in enumerate(loading.FORMATS):
        if "compact" in form:
            continue
        saved = loading.ConceptSave.execute(pair, f"saved/{number}", form, True, picture, "Two friends", "Ana").args[0]
        kind = "concepts" if form == "concept" else "loras"
        path = folder / kind / saved
        previews = ModelFileManager().get_model_previews(str(path))
        facts.setdefault("previews", []).append([type(shown).__name__ for shown in previews])
        if kind == "concepts":
            (folder / "loras" / saved).parent.mkdir(exist_ok=True)
            path.rename(folder / "loras" / saved)
        warned = len(warnings)
        if "diffusers" in form:  # which core reads in older keys alone
            stack = loading.LoRAToConcept.execute([(saved, 1.0, 1.0)], "").args[0]
            look(f"saved {form}", *merging.ConceptMerge.execute(model, clip, {"a": stack}, "sum").args[:2])
        else:
            look(f"saved {form}", *nodes.LoraLoader().load_lora(model, clip, saved, 1.0, 1.0))
        facts.setdefault("load warnings", []).extend(warnings[warned:])
    look("stacked", *patching.merge_into(model, clip, pair))

    # Custom Diffusion's merge with what the host's text encoder says.
    pair = [(concepts["tom"], 0.7), (concepts["rex"], 1.0)]
    evidence = wording.read_evidence(wording.HostModel(model, clip), pair)
    found |= {f"evidence|{number}": rows for number, rows in enumerate(evidence.texts)}
    found["evidence|usual"] = evidence.usual
    look("custom", *merging.ConceptMerge.execute(model, clip, {"a": pair}, "custom_diffusion").args[:2])

    # As activations: the same pictures, also after a changed strength, a clone, and a second merge on top.
    noise, encode = nodes.EmptyLatentImage().generate(32, 32)[0], nodes.CLIPTextEncode().encode

    def draw(drawn_model, drawn_clip, hooks=None, steps=2) -> torch.Tensor:
        said = [encode(drawn_clip, text)[0] for text in ("a <tom> man and a dog", "")]
        if hooks is not None:
            said = [[[context, {**about, "hooks": hooks}] for context, about in one] for one in said]
        (result,) = nodes.KSampler().sample(drawn_model, 3, steps, 2.0, "euler", "normal", *said, noise)
        return result["samples"]

    wide = [(concepts["tom"], 0.7), (concepts["wide"], -0.5)]
    ways = {
        apply: merging.ConceptMerge.execute(model, clip, {"a": wide}, "sum", apply=apply).args for apply in plan["ways"]
    }
    facts["patches"] = {apply: len(way[0].patches) for apply, way in ways.items()}
    for apply, (changed, changed_clip, _) in ways.items():
        found[f"drawn|{apply}"] = draw(changed, changed_clip)
        found[f"drawn again|{apply}"] = draw(changed.clone(), changed_clip)
        louder = [(concept, 2 * strength) for concept, strength in wide]
        changed, changed_clip, _ = merging.ConceptMerge.execute(model, clip, {"a": louder}, "sum", apply=apply).args
        found[f"drawn louder|{apply}"] = draw(changed, changed_clip)
        further = merging.ConceptMerge.execute(changed, changed_clip, {"a": concepts["rex"]}, "ties", apply=apply).args
        found[f"drawn in turn|{apply}"] = draw(*further[:2])
    found["drawn|base"] = draw(model, ways["weights"][1])
    back_to_base()

    # In a hook: the same strength all along, and one that comes half way.
    half = [(concept, 0.4 * strength) for concept, strength in wide]
    words = ways["weights"][1]
    hooks = merging.ConceptHook.execute(model, clip, {"a": wide}).args[0]
    for title, frames in {"steady": [(0.4, 0.0)], "late": [(0.0, 0.0), (1.0, 0.5)]}.items():
        keyframes = None
        for strength, begin in frames:
            (keyframes,) = CreateHookKeyframe().create_hook_keyframe(strength, begin, keyframes)
        (framed,) = SetHookKeyframes().set_hook_keyframes(hooks, keyframes)
        found[f"hook|{title}"] = draw(model, words, framed, 4)
    only_model = patching.merge_into(model, clip, [(replace(c, tokens={}), s) for c, s in half])[0]
    found["hook|weights"], found["hook|base"] = draw(only_model, words, None, 4), draw(model, words, None, 4)
    back_to_base()

    # A checkpoint by core's node holds the merge.
    changed, changed_clip, _ = merging.ConceptMerge.execute(model, clip, {"a": wide}, "sum").args
    look("before saving", changed, changed_clip)
    CheckpointSave().save(changed, changed_clip, vae, "checkpoints/merged")
    saved = load_file(next((folder / "output/checkpoints").glob("merged*")))
    facts["checkpoint keys"] = sorted(saved)[:3]
    for name in plan["layers"]:
        stem = layers[name].key
        [match] = [key for key in saved if key.endswith(stem.removeprefix("diffusion_model.").removeprefix("clip_l."))]
        found[f"checkpoint|{name}"] = saved[match]
    back_to_base()

    # What does not belong together is said; what a file holds beside its layers is named.
    other = replace(
        concepts["rex"],
        recipe=replace(concepts["rex"].recipe, base_hash="f" * 16, origin={"base_sample": plan["sample"]}),
    )
    facts["warnings"] = merging_words.warnings_of(
        merging_words.HostModel(model, clip), [(concepts["tom"], 1.0), (other, 1.0)]
    )
    facts["no warnings"] = merging_words.warnings_of(merging_words.HostModel(model, clip), [(concepts["tom"], 1.0)])
    regional, said = sampling, []
    replaced.setattr(regional, "show_text", said.append)
    places = [Region("a man", (0.0, 0.0, 1.0, 1.0))]
    for mode in ("merged", "gated"):
        for stack in ([(concepts["tom"], 1.0), (other, 1.0)], [(concepts["tom"], 1.0)]):
            regional.with_regions(regional.HostModel(model, clip), regional.Scene(stack, places, ("a man", ""), mode))
    facts["regional warnings"] = said
    warned = len(warnings)
    strange = files.load_concept_named("strange.safetensors")
    facts["strange"] = warnings[warned:]
    facts["kept"] = [files.load_concept_named("strange.safetensors") is strange]
    path = folder / "concepts/strange.safetensors"
    path.write_bytes((folder / "concepts/tom.safetensors").read_bytes())
    facts["kept"].append(files.load_concept_named("strange.safetensors") is strange)
    facts["refused"] = {}
    for title, attempt in {
        "not there": lambda: loading.LoRAToConcept.execute([("nobody.safetensors", 1.0, 1.0)], ""),
        "outside": lambda: loading.LoRAToConcept.execute([("../plan.json", 1.0, 1.0)], ""),
        "no stack": lambda: loading.LoRAToConcept.execute([3], ""),
        "plain model": lambda: merging.ConceptFromModel.execute(model, ""),
    }.items():
        try:
            attempt()
            facts["refused"][title] = ""
        except ValueError as error:
            facts["refused"][title] = f"{type(error).__name__}: {error}"
    back_to_base()
    return {key: value if value.dtype == torch.float64 else value.float() for key, value in found.items()}, facts
