"""A Stable Diffusion XL model in diffusers' layout as a base: two text encoders, pooled text, the picture's size.

    model_index.json  unet/  text_encoder/  text_encoder_2/  vae/  tokenizer/  tokenizer_2/  scheduler/

Learned words have the rows of both text encoders side by side, CLIP-L's columns first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..adapters.sites import Layer
from ..errors import AdapterError
from ..families.stable_diffusion import SDXL
from ..text.contexts import Context, PooledContext, hidden_states
from ..text.layerwise import routed
from ..text.learned_word import layers_of
from ..text.words import check_layer_count, layer_count, learned_tokens, token_ids
from .base import BaseModel, check_reach, weights_hash
from .diffusers_configs import TEXT_ENCODER, UNET, VAE
from .diffusers_folder import (
    build_text_encoder,
    build_unet,
    build_vae,
    check_fit,
    decode_latents,
    downscale_of,
    encode_pictures,
    open_network,
    read_schedule,
    read_tokenizer,
    size_in_pixels,
    text_entries,
    tokenized,
)
from .diffusers_trial import check_draws, checked_ids, part, whole
from .layers import find_layers
from .library import LibraryNetwork


@dataclass(frozen=True, eq=False, kw_only=True)
class XLBaseModel(BaseModel):
    """text_encoder is CLIP-L, text_encoder_2 CLIP-G, which pools; end: the id that ends a prompt in the latter."""

    text_encoder_2: LibraryNetwork
    tokenize_2: Callable[[Sequence[str], Mapping[str, Sequence[int]]], Tensor]
    end: int

    @property
    def modules(self) -> tuple[LibraryNetwork, ...]:
        return self.unet, self.text_encoder, self.text_encoder_2

    def layers(self, targets: Sequence[str], text_encoder_targets: Sequence[str] | None) -> dict[str, Layer]:
        return find_layers(self.unet, self.text_encoder, targets, text_encoder_targets, self.text_encoder_2)

    def context(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> PooledContext:
        """Text of both encoders side by side, from before their last layer, and CLIP-G's pooled text.

        With a layer-wise word text is (B, L, T, D), and pooled that of the layers' mean.
        Raises AdapterError for a prompt so long that a trigger word in it is cut off, and for words of other models.
        """
        check_layer_count(tokens, self.cross_attention_layers if layer_count(tokens) else 0)
        tables = self.embedding, self.text_encoder_2.get_input_embeddings()
        widths = [table.embedding_dim for table in tables]
        for trigger, rows in tokens.items():
            if rows.shape[-1] != sum(widths):
                raise AdapterError(
                    f"{trigger}: the learned word is {rows.shape[-1]} wide, the two text models {sum(widths)}; "
                    "it was trained on another base"
                )
        columns = {trigger: rows.split(widths, dim=-1) for trigger, rows in tokens.items()}
        texts, pooled = [], []
        encoders = (self.text_encoder, self.tokenize), (self.text_encoder_2, self.tokenize_2)
        for number, (table, (encoder, tokenize)) in enumerate(zip(tables, encoders, strict=True)):
            vectors = {trigger: parts[number] for trigger, parts in columns.items()}
            extra = token_ids(vectors, table.num_embeddings)
            ids = tokenize(prompts, extra)
            check_reach(prompts, extra, ids)
            ids = ids.to(table.weight.device)
            texts.append(hidden_states(ids, vectors, table, lambda ids, encoder=encoder: _before_last(encoder, ids)))
            if number == 1:
                mean = {trigger: rows.mean(0) if layers_of(rows) else rows for trigger, rows in vectors.items()}
                with learned_tokens(table, mean):
                    pooled.append(self._pooled(ids))
        return PooledContext(torch.cat(texts, dim=-1), *pooled)

    def _pooled(self, ids: Tensor) -> Tensor:
        """CLIP-G's last state at the prompt's end, projected; learned words' ids must not be taken for the end."""
        last = self.text_encoder_2(ids, output_hidden_states=True).last_hidden_state
        at_end = (ids == self.end).int().argmax(dim=1)
        return self.text_encoder_2.text_projection(last[torch.arange(len(ids), device=ids.device), at_end])

    def predict(self, noisy: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """The U-Net is told that pictures are whole and were of this size."""
        text, pooled = cast(PooledContext, context)
        height, width = (self.downscale * side for side in noisy.shape[2:])
        dtype, noisy = noisy.dtype, noisy.to(self.precision)
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=noisy.dtype, device=noisy.device)
        conditions = {"text_embeds": pooled, "time_ids": sizes.expand(len(noisy), -1)}
        with routed(self.unet, text) if text.dim() == 4 else nullcontext():
            return self.unet(noisy, timesteps, text, added_cond_kwargs=conditions, return_dict=False)[0].to(dtype)

    def word_rows(self, words: str) -> Tensor:
        """(k, width) rows of both token tables for some words, side by side."""
        second = self.text_encoder_2.get_input_embeddings()
        ids, bare = self.tokenize([words, ""], {})
        numbers = [int(i) for i, b in zip(ids, bare, strict=True) if i != b and i not in bare]
        return torch.cat([self.embedding.weight[numbers], second.weight[numbers]], dim=1)


def load_xl(folder: Path) -> XLBaseModel:
    """The model in `folder`, in float32 on the CPU, frozen.  Raises AdapterError that names the file."""
    schedule, betas = read_schedule(folder / "scheduler" / "scheduler_config.json")
    tokenizers = [read_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    opened = (
        open_network(folder / "unet", "diffusion_pytorch_model", UNET, build_unet),
        open_network(folder / "text_encoder", "model", TEXT_ENCODER, build_text_encoder),
        open_network(folder / "text_encoder_2", "model", TEXT_ENCODER, _build_pooling_text_encoder),
        open_network(folder / "vae", "diffusion_pytorch_model", VAE, build_vae),
    )
    unet, text_encoder, text_encoder_2, vae = (each.network for each in opened)
    texts = {"tokenizer": (text_encoder, tokenizers[0]), "tokenizer_2": (text_encoder_2, tokenizers[1])}
    check_fit(folder, unet, vae, texts, met=("addition_embed_type",))
    _check_xl(folder, unet, text_encoder_2, tokenizers)
    downscale = downscale_of(vae)
    size = size_in_pixels(folder / "unet" / "config.json", unet.config.sample_size, downscale)
    for each in opened:
        each.read()
    multiple = downscale * 2 ** (len(unet.config.block_out_channels) - 1)
    length = min(
        *(tokenizer.model_max_length for tokenizer in tokenizers),
        *(encoder.config.max_position_embeddings for encoder in (text_encoder, text_encoder_2)),
    )
    read = [
        lambda prompts, triggers, reader=reader: tokenized(reader, length, prompts, triggers) for reader in tokenizers
    ]
    base = XLBaseModel(
        architecture=SDXL.name,
        unet=unet,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenize=read[0],
        tokenize_2=read[1],
        end=tokenizers[1].eos_token_id,
        encode=lambda pictures: encode_pictures(vae, multiple, pictures),
        decode=lambda latents: decode_latents(vae, latents),
        schedule=schedule,
        betas=betas,
        latent_channels=vae.config.latent_channels,
        downscale=downscale,
        multiple=multiple,
        size=size,
        hash=weights_hash(unet, text_encoder, text_encoder_2),
    )
    check_draws(folder, base, lambda folder: _read_words(folder, base))
    return base


@torch.no_grad()
def _read_words(folder: Path, base: XLBaseModel) -> PooledContext:
    """As `XLBaseModel.context` reads them, one text encoder after the other."""
    texts = []
    encoders = (
        ("text_encoder", base.text_encoder, base.tokenize),
        ("text_encoder_2", base.text_encoder_2, base.tokenize_2),
    )
    for name, encoder, tokenize in encoders:
        table = encoder.get_input_embeddings()
        ids = checked_ids(folder, name.replace("text_encoder", "tokenizer"), tokenize, table.num_embeddings)
        with part(folder, name):
            texts.append(whole("the text", _before_last(encoder, ids), (*ids.shape, table.embedding_dim)))
    with part(folder, "text_encoder_2"):
        pooled = whole("the pooled text", base._pooled(ids), (1, base.text_encoder_2.config.projection_dim))
    return PooledContext(torch.cat(texts, dim=-1), pooled)


def _before_last(encoder: LibraryNetwork, ids: Tensor) -> Tensor:
    return encoder(ids, output_hidden_states=True).hidden_states[-2]


def _build_pooling_text_encoder(config: Mapping) -> LibraryNetwork:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return cast(LibraryNetwork, CLIPTextModelWithProjection(CLIPTextConfig(**text_entries(config))))


def _check_xl(folder: Path, unet: LibraryNetwork, text_encoder_2: LibraryNetwork, tokenizers: Sequence) -> None:
    where = folder / "unet" / "config.json"
    if unet.config.addition_embed_type != "text_time":
        raise AdapterError(f"{where}: addition_embed_type is not text_time, so this is no Stable Diffusion XL")
    wanted = unet.config.projection_class_embeddings_input_dim
    time, pooled = unet.config.addition_time_embed_dim, text_encoder_2.config.projection_dim
    if None in (time, pooled) or wanted != 6 * time + pooled:
        raise AdapterError(
            f"{where}: the U-Net takes {wanted} numbers of pooled text and sizes, 6 x {time} + {pooled} are given; it "
            "is a refiner, or does not belong to these text encoders"
        )
    first, second = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if first != second:
        raise AdapterError(
            f"{folder / 'tokenizer_2'}: its words have other ids than those of {folder / 'tokenizer'}; "
            "the two do not belong together"
        )
