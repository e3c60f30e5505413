"""The host's MODEL, CLIP and VAE as a base that concepts are trained on: `host_base`, and how it draws.

The same face as the headless `BaseModel` (`modular_concepts/models/base.py`), so the same engine trains both.
Everything is computed in float32 whatever the weights are stored as: they are cast layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sample
import comfy.sd
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...modular_concepts.adapters.own_words import residuals_in
from ...modular_concepts.adapters.sites import Layer
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.models.cross_attention import CrossAttention, cross_attentions_of
from ...modular_concepts.models.layers import chosen_layers
from ...modular_concepts.models.schedules import FlowSchedule, NoiseSchedule, Schedule
from ...modular_concepts.sampling import SampleSettings
from ...modular_concepts.text.learned_word import LearnedWord, layers_of
from ...modular_concepts.training.frozen import frozen_forward, own_weights
from ...modular_concepts.training.loop import Cancelled
from ..called import uncompiled
from ..families.cross_attention import TEXT_PATCHES
from ..families.lookup import host_family_of
from ..layers import base_hash, host_layers, text_encoders_of
from ..merging.by_word import WORDING, let_act
from ..merging.weights import at_words
from ..model import HostModel
from ..text.encode import HostContext, check_text_models, contexts
from ..text.layerwise import LAYERS, PickLayer, stacked, with_layers
from ..text.word_places import Wording
from ..text.words import trigger_positions, word_places

SAMPLER = ("euler", "normal")
LATENT_PIXEL = 8  # what the host takes a latent's cell for when it tells SDXL the picture's size


def host_base(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> HostBase:
    """Raises AdapterError for anything missing, patched, or of a family that we cannot train."""
    for name, part in (("model", model), ("clip", clip), ("vae", vae)):
        if part is None:
            raise AdapterError(
                f"the {name} is missing: this checkpoint holds none; connect one that belongs to the model"
            )
    family = host_family_of(model)
    check_text_models(clip, family)
    needs, gives = model.model.model_config.unet_config["in_channels"], model.model.latent_format.latent_channels
    if needs != gives:
        raise AdapterError(
            f"the model wants {needs} channels where a picture has {gives}: it is for inpainting or editing; "
            "train on the ordinary model of its family, the concept then works on both"
        )
    for name, patcher in (("model", model), ("clip", clip.patcher)):
        if patcher.patches:
            raise AdapterError(
                f"the {name} is changed already by a LoRA or a concept; train on the model as its loader gives it"
            )
    return HostBase(model, clip, vae, base_hash(model, clip), _schedule(model))


@dataclass(frozen=True, eq=False)
class HostBase(HostModel):
    """A `Base` for training; `schedule` is what the host's own sampling goes by.

    class_words: trigger word -> what text models read for it that cannot learn words (T5 of SD3).
    """

    vae: comfy.sd.VAE
    hash: str
    schedule: Schedule
    class_words: Mapping[str, str] = field(default_factory=dict)
    read_by_t5: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)
    # Nothing for the engine to freeze: `trainable` keeps gradients from every weight, and the host's flags as they are.
    modules: Sequence[nn.Module] = ()

    @property
    def lean(self) -> bool:
        return self.family.family.lean

    @property
    def multiple(self) -> int:
        """Pictures' height and width must be multiples of it."""
        return self.downscale * self.family.cells(self.model.model.model_config.unet_config)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the family was trained on."""
        return self.family.family.side, self.family.family.side

    @property
    def downscale(self) -> int:
        return self.vae.spacial_compression_encode()

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    @contextmanager
    def trainable(self) -> Generator[None]:
        """Within the block all networks are loaded, and gradients go through them without a copy of a weight."""
        comfy.model_management.load_models_gpu([self.model, self.clip.patcher], force_full_load=True)
        texts = (encoder.transformer for encoder in text_encoders_of(self.clip).values())
        networks = (self.network, *texts)
        with torch.inference_mode(False), uncompiled(), frozen_forward(networks, cast_weights):
            yield

    def layers(self, targets: Sequence[str], text_encoder_targets: Sequence[str] | None) -> dict[str, Layer]:
        named = {name: layer.module for name, layer in host_layers(self.model, self.clip).items()}
        return chosen_layers(named, targets, text_encoder_targets)

    def encode(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..1 -> latents as the U-Net knows them."""
        height, width = pictures.shape[2:]
        if height % self.multiple or width % self.multiple:
            raise AdapterError(
                f"pictures of {width} x {height} pixels do not fit this base; choose multiples of {self.multiple}"
            )
        with torch.no_grad():
            latents = self.vae.encode(pictures.movedim(1, -1))
            # A copy, for the host may have made an inference tensor.
            return self.model.model.process_latent_in(latents).to(self.device, torch.float32, copy=True)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, as the host's samplers return them, -> pictures (N, 3, H, W) in 0..1."""
        with torch.no_grad():
            return self.vae.decode(latents).movedim(-1, 1)[:, :3].float().cpu().clamp(0, 1).clone()

    def context(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor | HostContext:
        """What the host's own text encoding gives, learned words standing for their rows: see `texts.contexts`."""
        with _cancellable():
            words = [LearnedWord(word, rows, self.class_words.get(word, "")) for word, rows in tokens.items()]
            context = contexts(self.clip, prompts, words, self.read_by_t5)
        if isinstance(context, HostContext):
            return HostContext(*(part.to(self.device) for part in context))
        return context.to(self.device)

    def predict(self, noisy: Tensor, timesteps: Tensor, context: Tensor | HostContext) -> Tensor:
        text, pooled = context if isinstance(context, HostContext) else (context, None)
        # Some of the host's attention kernels cannot go backward; torch's own can.
        options = {"optimized_attention_override": _differentiable}
        if text.dim() == 4:
            options["patches"] = {TEXT_PATCHES: [PickLayer(text.shape[1])]}
            text = stacked(text)
        with _cancellable():
            return self.network(
                noisy, timesteps.float(), transformer_options=options, **self._told(noisy, text, pooled)
            )

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    def cross_attentions(self) -> list[CrossAttention]:
        return cross_attentions_of(self.denoiser)

    def trigger_positions(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        return trigger_positions(self.clip, prompts, tokens)

    def word_places(self, prompt: str, tokens: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return word_places(self.clip, prompt, tokens)

    def _told(self, noisy: Tensor, text: Tensor, pooled: Tensor | None) -> dict[str, Tensor]:
        """What the host's own sampling tells the network: the text, pooled text, and the picture's size for SDXL."""
        if pooled is None:
            return {"context": text.to(noisy)}
        height, width = (LATENT_PIXEL * side for side in noisy.shape[2:])
        conditions = self.model.model.extra_conds(
            cross_attn=text,
            pooled_output=pooled,
            noise=noisy,
            device=noisy.device,
            width=width,
            height=height,
            prompt_type="positive",
        )
        names = {"c_crossattn": "context"}
        return {names.get(name, name): value.cond.to(noisy) for name, value in conditions.items()}

    def unknown_words(self, prompt: str, triggers: Sequence[str]) -> list[str]:
        return self.family.family.unknown_words(prompt, triggers)

    def prior_prompts(self, class_word: str, count: int) -> list[str]:
        return self.family.family.prior_prompts(class_word, count)

    def company(self, class_word: str, count: int) -> list[str]:
        return self.family.family.company(class_word, count)


@contextmanager
def cast_weights(module: nn.Module, like: Tensor) -> Generator[tuple[Tensor | None, Tensor | None]]:
    """(weight, bias) as the host's own layers take them, wherever they lie: cast, fetched, dequantised."""
    if module.weight is None or not isinstance(module, comfy.ops.CastWeightBiasOp):
        with own_weights(module, like) as weights:
            yield weights
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        yield tuple(value.dequantize() if isinstance(value, QuantizedTensor) else value for value in (weight, bias))
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


@torch.no_grad()
def draw(
    base: HostBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tokens: Mapping[str, Tensor] | None = None,
    settings: SampleSettings | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One picture per (prompt, seed) by the host's own sampler: (N, 3, H, W) in 0..1.

    settings without height and width: the size that the family draws best.
    callback(done, total) counts sampling steps over all batches.
    """
    pictures, settings, tokens = [], settings or SampleSettings(), tokens or {}
    model, layerwise = base.model, any(map(layers_of, tokens.values()))
    if layerwise or residuals_in(tokens):
        model = model.clone()
        let_act(model, [at_words(base, residual) for residual in residuals_in(tokens)])
    if layerwise:
        with_layers(model)
    chunks = [slice(start, start + settings.batch) for start in range(0, len(prompts), settings.batch)]
    height, width = (side or base.family.family.side for side in (settings.height, settings.width))
    shape = (base.latent_format.latent_channels, height // base.downscale, width // base.downscale)
    for number, chunk in enumerate(chunks):
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds[chunk]]
        )
        positive, negative = (
            _conditioning(base, texts, tokens, len(noise)) for texts in (prompts[chunk], [settings.negative])
        )
        done = number * settings.steps

        def step_done(step: int, *_, done: int = done) -> None:
            # Layers of a training do not look for it as the host's own do.
            comfy.model_management.throw_exception_if_processing_interrupted()
            if callback is not None:
                callback(done + step + 1, settings.steps * len(chunks))

        latents = comfy.sample.sample(
            model,
            noise,
            settings.steps,
            settings.cfg,
            *SAMPLER,
            positive,
            negative,
            torch.zeros_like(noise),
            callback=step_done,
            disable_pbar=True,
            seed=0,
        )
        pictures.append(base.decode(latents))
    return torch.cat(pictures)


def _conditioning(base: HostBase, texts: Sequence[str], tokens: Mapping[str, Tensor], rows: int) -> list:
    """A CONDITIONING of one text for each row of a batch, or of one for all of them."""
    context = base.context(texts, tokens)
    text, pooled = context if isinstance(context, HostContext) else (context, None)
    text, about = text.expand(rows, *text.shape[1:]), {}
    if residuals_in(tokens):
        places = [base.word_places(each, tokens) for each in texts]
        words = {word: tuple(tuple(each.get(word, ())) for each in places) for word in tokens}
        about[WORDING] = Wording(len(texts), text.shape[-2], words)
    if pooled is not None:
        about["pooled_output"] = pooled.expand(rows, -1)
    if text.dim() == 4:
        about[LAYERS], text = text, text.mean(1)
    return [[text, about]]


def _schedule(model: comfy.model_patcher.ModelPatcher) -> Schedule:
    sampling: Any = model.get_model_object("model_sampling")
    # The host's classes are made of one for the noise levels and one for what is predicted; others derive from these.
    parents = set(type(sampling).__bases__)
    kinds = {comfy.model_sampling.V_PREDICTION: "v_prediction", comfy.model_sampling.EPS: "epsilon"}
    kind = next((kinds[parent] for parent in parents if parent in kinds), None)
    if comfy.model_sampling.ModelSamplingDiscrete in parents and kind is not None:
        sigmas = sampling.sigmas.detach().double().cpu()
        return NoiseSchedule((1 / (1 + sigmas.square())).float(), kind)
    flow = {comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST}
    if parents == flow and getattr(sampling, "noise_scale", 1.0) == 1:
        sigmas = sampling.sigmas.detach().float().cpu().clone()
        return FlowSchedule(sigmas, sampling.timestep(sigmas))
    raise AdapterError(
        f"the model samples by {' and '.join(sorted(parent.__name__ for parent in parents))}, which training does "
        "not know; use a model that predicts noise or v at 1000 noise levels, as Stable Diffusion 1.x, 2.x and XL do, "
        "or flow, as 3 does"
    )


def _differentiable(_kernel: Callable, *args, **kwargs) -> Tensor:
    return attention_pytorch(*args, **kwargs)


@contextmanager
def _cancellable() -> Generator[None]:
    """The host's interrupt, which any of its layers may raise, as the engine's cancel."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException as interrupt:
        raise Cancelled from interrupt
