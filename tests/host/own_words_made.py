"""Concepts for their own words that nobody trained, and pictures of the toy base with them in the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from made_concepts import toy_base
from modular_concepts_pack.host.merging import by_word
from modular_concepts_pack.host.merging.weights import merge_into
from modular_concepts_pack.host.text.word_places import wording_of
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.modular_concepts.adapters.low_rank import LowRank
from modular_concepts_pack.modular_concepts.concept import Concept, Recipe

import nodes


def of_layers(shapes: Mapping[str, Sequence[int]], name: str, seed: int, width: int, **recipe) -> Concept:
    """Random factors of rank 4 on layers (canonical name -> weight's shape), and a word <name> of two rows."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for layer, (out, inp) in shapes.items():
        up, down = torch.randn(out, 4, generator=generator), torch.randn(4, inp, generator=generator)
        layers[layer] = LowRank(0.1 * up, down / inp**0.5, 4.0, "lora", None, out)
    word = f"<{name}>"
    rows = 0.1 * torch.randn(2, width, generator=generator)
    about = dict(method="own_words", architecture="toy", triggers=(word,), class_word="man", rank=4, alpha=4.0)
    return Concept(name, layers, {word: rows}, Recipe(**{**about, **recipe}))


def made(name: str, seed: int) -> Concept:
    base = toy_base()
    shapes = {layer: module.weight.shape for layer, module in base.layers(("cross_attention_kv",), None).items()}
    return of_layers(shapes, name, seed, 128)


class Drawn:
    """The toy base in the host, with several concepts and with one; how pictures are drawn with them."""

    def __init__(self):
        self.model, self.clip, self.vae = load_toy_base()
        self.concepts = [made(name, seed) for seed, name in enumerate(("tom", "ida", "rex"))]
        self.alone = self.merged(self.concepts[:1])
        self.sum = self.merged(self.concepts)

    def merged(self, concepts: Sequence[Concept], strength: float = 1.0, **more) -> tuple:
        return merge_into(self.model, self.clip, [(concept, strength) for concept in concepts], **more)

    @torch.inference_mode()
    def draw(self, model, positive, negative, count: int = 1, cfg: float = 2.0, size: tuple = (32, 32)) -> torch.Tensor:
        """Every call of the network is held to it that each text says what its rows say."""
        model = model.clone()

        def checked(apply, about):
            chunks, context = about["c"].get(by_word.WORDING), about["c"]["c_crossattn"]
            first = 0
            for wording, rows in chunks or ():
                text = context[first : first + 1, : wording.length]
                assert wording.mixed or wording.places == wording_of(text).places
                first += rows
            return apply(about["input"], about["timestep"], **about["c"])

        model.set_model_unet_function_wrapper(checked)
        noise = nodes.EmptyLatentImage().generate(*size, count)[0]
        how = (3, 3, cfg, "euler", "normal")
        return nodes.KSampler().sample(model, *how, positive, negative, noise)[0]["samples"].clone()

    @torch.inference_mode()
    def encoded(self, clip, text: str) -> list:
        return nodes.CLIPTextEncode().encode(clip, text)[0]

    def picture(self, loaded: tuple, text: str, negative: str = "", **more) -> torch.Tensor:
        model, clip = loaded
        return self.draw(model, self.encoded(clip, text), self.encoded(clip, negative), **more)

    def without(self, loaded: tuple) -> tuple:
        """The base with the words of a merge, of which nothing acts."""
        return self.model, loaded[1]
