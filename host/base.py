"""The host's MODEL, CLIP and VAE as a base that concepts are trained on: `host_base`, and how it draws.

The same face as the headless `BaseModel` (`modular_concepts/base_model.py`), so the same engine trains both.
Everything is computed in float32 whatever the weights are stored as: they are cast layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.sd1_clip
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..modular_concepts.errors import AdapterError
from ..modular_concepts.layers import chosen_layers
from ..modular_concepts.sampling import SampleSettings
from ..modular_concepts.toy import captions as toy_captions
from ..modular_concepts.training import Cancelled, NoiseSchedule
from ..modular_concepts.training.attention_regularisation import CrossAttention, cross_attentions_of
from ..modular_concepts.training.frozen import frozen_forward, own_weights
from .clip import trigger_positions, with_tokens
from .layers import architecture_of, base_hash, host_layers, text_encoder_of

TRAINABLE = ("toy", "sd15", "sd2")
SAMPLER = ("euler", "normal")
DRAWN = 512  # pixels


def host_base(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> HostBase:
    """Raises AdapterError for anything missing, patched, or of a family that we cannot train."""
    for name, given in (("model", model), ("clip", clip), ("vae", vae)):
        if given is None:
            raise AdapterError(
                f"the {name} is missing: this checkpoint holds none; connect one that belongs to the model"
            )
    architecture = architecture_of(model)
    if architecture not in TRAINABLE:
        raise AdapterError(
            f"training is for Stable Diffusion 1.x and 2.x and the toy base; this model is {architecture}, "
            "for which concepts can be merged but not trained"
        )
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
    return HostBase(model, clip, vae, architecture, base_hash(model, clip), _schedule(model))


@dataclass(frozen=True, eq=False)
class HostBase:
    """A `Base` for training; `schedule` is what the host's own sampling goes by."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    architecture: str
    hash: str
    schedule: NoiseSchedule
    # Nothing for the engine to freeze: `trainable` keeps gradients from every weight, and the host's flags as they are.
    modules: Sequence[nn.Module] = ()

    @property
    def multiple(self) -> int:
        """Pictures' height and width must be multiples of it."""
        return self.downscale * 2 ** (len(self.model.model.model_config.unet_config["channel_mult"]) - 1)

    @property
    def downscale(self) -> int:
        return self.vae.spacial_compression_encode()

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Within the block both networks are loaded, and gradients go through them without a copy of a weight."""
        comfy.model_management.load_models_gpu([self.model, self.clip.patcher], force_full_load=True)
        networks = (self.model.model.diffusion_model, text_encoder_of(self.clip)[1].transformer)
        with torch.inference_mode(False), frozen_forward(networks, cast_weights):
            yield

    def layers(self, targets: Sequence[str], text_encoder_targets: Sequence[str] | None) -> dict[str, nn.Module]:
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

    def context(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        """(B, T, D): what the host's own text encoding gives, learned words standing for their rows.

        Brackets in a prompt are words, not weights.  Prompts longer than one section lengthen all of them.
        """
        _, encoder = text_encoder_of(self.clip)
        known = with_tokens(self.clip, tokens)
        sections = [next(iter(known.tokenize(prompt, disable_weights=True).values())) for prompt in prompts]
        longest = max(len(own) for own in sections)
        empty = next(iter(known.tokenize("", disable_weights=True).values()))
        ids = [[token for token, *_ in one] for own in sections for one in own + empty * (longest - len(own))]
        whole = self.clip.cond_stage_model
        whole.reset_clip_options()
        if self.clip.layer_idx is not None:
            whole.set_clip_options({"layer": self.clip.layer_idx})
        whole.set_clip_options({"execution_device": self.clip.patcher.load_device})
        with _cancellable():
            hidden = encoder(ids)[0]
        return hidden.unflatten(0, (len(prompts), longest)).flatten(1, 2).to(self.device)

    def predict(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        # Some of the host's attention kernels cannot go backward; torch's own can.
        options = {"optimized_attention_override": _differentiable}
        with _cancellable():
            return self.model.model.diffusion_model(
                noisy, timesteps.float(), context=context.to(noisy), transformer_options=options
            )

    @property
    def denoiser(self) -> nn.Module:
        return self.model.model.diffusion_model

    def cross_attentions(self) -> list[CrossAttention]:
        return cross_attentions_of(self.denoiser)

    def trigger_positions(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        return trigger_positions(self.clip, prompts, tokens)

    def word_rows(self, words: str) -> Tensor:
        """(k, width) rows of the token table for some words, without start, end and padding."""
        ids, bare = (
            [token for section in next(iter(self.clip.tokenize(text).values())) for token, *_ in section]
            for text in (words, "")
        )
        known = [token for token in ids if isinstance(token, int) and token not in bare]
        table = text_encoder_of(self.clip)[1].transformer.get_input_embeddings()
        with torch.no_grad():
            return table(torch.tensor(known, dtype=torch.long), out_dtype=torch.float32).float().cpu().clone()

    def unknown_words(self, prompt: str, triggers: Sequence[str]) -> list[str]:
        return toy_captions.unknown_words(prompt, triggers) if self.architecture == "toy" else []

    def prior_prompts(self, class_word: str, count: int) -> list[str]:
        if self.architecture == "toy":
            return toy_captions.prior_prompts(class_word, count)
        return [f"a photo of a {class_word}"] * count


@contextmanager
def cast_weights(module: nn.Module, like: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """(weight, bias) as the host's own layers take them, wherever they lie: cast, fetched, dequantised."""
    if module.weight is None or not isinstance(module, comfy.ops.CastWeightBiasOp):
        with own_weights(module, like) as found:
            yield found
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

    settings without height and width: 512 pixels.  callback(done, total) counts sampling steps over all batches.
    """
    pictures, settings = [], settings or SampleSettings()
    chunks = [slice(start, start + settings.batch) for start in range(0, len(prompts), settings.batch)]
    channels = base.model.get_model_object("latent_format").latent_channels
    height, width = settings.height or DRAWN, settings.width or DRAWN
    shape = (channels, height // base.downscale, width // base.downscale)
    for number, chunk in enumerate(chunks):
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds[chunk]]
        )
        context = base.context(prompts[chunk], tokens or {})
        negative = base.context([settings.negative], tokens or {}).expand(len(context), -1, -1)
        done = number * settings.steps

        def step_done(step: int, *_, done: int = done) -> None:
            # Layers of a training do not look for it as the host's own do.
            comfy.model_management.throw_exception_if_processing_interrupted()
            if callback is not None:
                callback(done + step + 1, settings.steps * len(chunks))

        latents = comfy.sample.sample(
            base.model,
            noise,
            settings.steps,
            settings.cfg,
            *SAMPLER,
            [[context, {}]],
            [[negative, {}]],
            torch.zeros_like(noise),
            callback=step_done,
            disable_pbar=True,
            seed=0,
        )
        pictures.append(base.decode(latents))
    return torch.cat(pictures)


def _schedule(model: comfy.model_patcher.ModelPatcher) -> NoiseSchedule:
    sampling = model.get_model_object("model_sampling")
    # The host's classes are made of one for the noise levels and one for what is predicted; others derive from these.
    parents = set(type(sampling).__bases__)
    kinds = {comfy.model_sampling.V_PREDICTION: "v_prediction", comfy.model_sampling.EPS: "epsilon"}
    kind = next((kinds[parent] for parent in parents if parent in kinds), None)
    if comfy.model_sampling.ModelSamplingDiscrete not in parents or kind is None:
        raise AdapterError(
            f"the model samples by {' and '.join(sorted(parent.__name__ for parent in parents))}, which training does "
            "not know; use a model that predicts noise or v at 1000 noise levels, as Stable Diffusion 1.x and 2.x do"
        )
    sigmas = sampling.sigmas.detach().double().cpu()
    return NoiseSchedule((1 / (1 + sigmas.square())).float(), kind)


def _differentiable(_kernel: Callable, *args, **kwargs) -> Tensor:
    return attention_pytorch(*args, **kwargs)


@contextmanager
def _cancellable() -> Iterator[None]:
    """The host's interrupt, which any of its layers may raise, as the engine's cancel."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException as interrupt:
        raise Cancelled from interrupt
