"""In the host: each method's training on FOLDER/asked's pictures, stopped and resumed, and short of what it needs."""

from __future__ import annotations

import json
import types

from host_training import (
    Seen,
    facts,
    files,
    fixed_loss,
    host_base,
    lesson,
    outcome,
    pack_module,
    plan,
    traces,
    training,
)
from in_host import FOLDER

import comfy.sd  # isort: skip
import torch  # isort: skip

methods = pack_module("modular_concepts.training.methods")


def learn(base, loaded, case: dict, prefix: str) -> None:
    own, seen, before = lesson(case, prefix), Seen(), traces(*loaded[:2])
    said = []
    training.show_text = said.append
    concept, result = training.train_in_host(base, own)
    files.save_concept(concept, FOLDER / f"{prefix}{case['name']}.safetensors")
    facts[f"{prefix}{case['name']}"] = {
        "losses": result.losses,
        "fixed": [fixed_loss(base, own.subject, fresh(base, own)), fixed_loss(base, own.subject, concept)],
        "previews": list(seen.previews),
        "said": said,
        "untouched": traces(*loaded[:2]) == before,
    }


def fresh(base, own) -> types.SimpleNamespace:
    """What the training starts from: its new word, and no layer that differs."""
    start = {own.subject.trigger: base.word_rows(own.subject.class_word)}
    words = methods.new_words(start, own.settings, base.cross_attention_layers)
    return types.SimpleNamespace(layers={}, tokens={word: rows.detach() for word, rows in words.items()})


def stop_and_go_on(base, loaded, case: dict) -> None:
    """A cancel, then the rest: the same bits as without; then with another setting, refused and let through."""
    before = traces(*loaded[:2])
    whole, _ = training.train_in_host(base, lesson(case))
    place = training.checkpoint_folder(case["name"])
    place.rename(place.with_name(f"{case['name']}-whole"))
    Seen(stop_at=5)
    stopped = outcome(lambda: training.train_in_host(base, lesson(case)))
    Seen()
    resumed, result = training.train_in_host(base, lesson({**case, "resume": True}))
    other = {**case, "settings": {**case["settings"], "steps": case["settings"]["steps"] + 2}, "resume": True}
    refused = outcome(lambda: training.train_in_host(base, lesson(other)))
    accepted, longer = training.train_in_host(base, lesson({**other, "accept_changes": True}))
    facts[f"resumed {case['name']}"] = [
        stopped,
        len(result.losses),
        whole.layers.keys() == resumed.layers.keys(),
        all(torch.equal(resumed.layers[name].lora_up, adapter.lora_up) for name, adapter in whole.layers.items()),
        all(torch.equal(resumed.tokens[word], rows) for word, rows in whole.tokens.items()),
        traces(*loaded[:2]) == before,
    ]
    facts[f"changed {case['name']}"] = [
        refused,
        len(longer.losses),
        longer.losses[: len(result.losses)] == result.losses,
    ]


def short_of_something(base, loaded, case: dict) -> None:
    """What each option needs, and memory that runs out before, in and between steps: a sentence, and no trace."""
    before = traces(*loaded[:2])

    def with_settings(**changes):
        own = {**case, "name": "short", "settings": {**case["settings"], **changes}}
        return outcome(lambda: training.train_in_host(base, lesson(own)))

    facts["short"] = {
        "masks": with_settings(attention_regularisation=0.01),
        "bitsandbytes": with_settings(optimizer="adamw8bit"),
        "optimizer": with_settings(optimizer="sgd"),
    }
    deep = loaded[0].model.diffusion_model.out[1]
    for when, call in (("estimate", 1), ("step", 5)):
        count = {"calls": 0}

        def fail(*_, count=count, call=call):
            count["calls"] += 1
            if count["calls"] == call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        handle = deep.register_forward_hook(fail)
        facts["short"][f"memory in {when}"] = with_settings()
        handle.remove()
    encode = loaded[2].encode

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    loaded[2].encode = full
    facts["short"]["memory in the VAE"] = with_settings()
    loaded[2].encode = encode
    facts["short"]["untouched"] = traces(*loaded[:2]) == before


@torch.inference_mode()
def main() -> None:
    if "cases" in plan:
        loaded = pack_module("host.toy_base").load_toy_base()
        base = host_base.host_base(*loaded)
        for case in plan["cases"]:
            learn(base, loaded, case, "")
        for case in plan["stopped"]:
            stop_and_go_on(base, loaded, case)
        short_of_something(base, loaded, plan["stopped"][0])
    if "sd_cases" in plan:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(FOLDER / "tiny_sd15.safetensors"))
        base = host_base.host_base(model, clip, vae)
        for case in plan["sd_cases"]:
            learn(base, (model, clip, vae), case, "sd_")
    (FOLDER / "facts.json").write_text(json.dumps(facts))


main()
