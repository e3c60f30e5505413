"""A Stable Diffusion 1.x or 2.x model in diffusers' folder layout as a `BaseModel`; `models/diffusers_xl.py` has XL.

    model_index.json  unet/  text_encoder/  vae/  tokenizer/  scheduler/

Networks are built without memory and take the file's own tensors as their weights, so nothing is held twice.
Only safetensors are read, nothing is fetched, and what such a folder says is not trusted.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError, listed
from ..families.stable_diffusion import SD2, SD15
from ..storage.names import nameable
from ..storage.safetensors import FLOATS, check_finite, check_fits, read_header, read_safetensors
from ..text.words import spelled
from .base import BaseModel, weights_hash
from .diffusers_configs import (
    SCHEDULER,
    TEXT_ENCODER,
    UNET,
    VAE,
    Fact,
    check_depth,
    check_facts,
    check_plain,
    check_tokenizer,
    check_words,
    is_there,
    read_json,
    why,
)
from .diffusers_trial import check_draws, read_words
from .library import LibraryNetwork
from .schedules import NoiseSchedule

PIPELINE, XL_PIPELINE = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
XL_PARTS = PARTS | {"text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": PARTS["tokenizer"]}
_DTYPES = (*FLOATS, "I64")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = (
    "convert a model that you trust with diffusers: "
    "StableDiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)
_FROM_FILE = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
_BETAS = (
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
# Further inputs that a U-Net of another family waits for, and nobody here gives.
_UNMET = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim")
VARIANTS = (".fp16", ".bf16")
SHARDS_FIRST = "diffusion_pytorch_model"  # where diffusers finds both; transformers takes the whole file first
_OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def family_of_width(width: int) -> str:
    """What concept files call Stable Diffusion by the width of its text; a width that is no family's by its number."""
    named = {family.text_encoders[0].width: family.name for family in (SD15, SD2)}
    return named.get(width, f"sd-{width}")


def load_diffusers_base(folder: Path | str) -> BaseModel:
    """The model in `folder`, in float32 on the CPU, frozen; half precision weights are widened.

    Prompts become what StableDiffusionPipeline gives the U-Net; a prompt too long for the text encoder loses
    its end.  Pictures become the mode of the VAE's posterior, times its scaling factor.
    Raises AdapterError, naming the file, for other models and for folders that are damaged or incomplete.
    """
    folder = Path(folder)
    if check_index(folder) == XL_PIPELINE:
        from .diffusers_xl import load_xl

        return load_xl(folder)
    schedule, betas = read_schedule(folder / "scheduler" / "scheduler_config.json")
    tokenizer = read_tokenizer(folder / "tokenizer")
    opened = (
        open_network(folder / "unet", "diffusion_pytorch_model", UNET, build_unet),
        open_network(folder / "text_encoder", "model", TEXT_ENCODER, build_text_encoder),
        open_network(folder / "vae", "diffusion_pytorch_model", VAE, build_vae),
    )
    unet, text_encoder, vae = (each.network for each in opened)
    check_fit(folder, unet, vae, {"tokenizer": (text_encoder, tokenizer)})
    size = size_in_pixels(folder / "unet" / "config.json", unet.config.sample_size, downscale_of(vae))
    for each in opened:
        each.read()
    downscale = downscale_of(vae)
    multiple = downscale * 2 ** (len(unet.config.block_out_channels) - 1)
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    width = unet.config.cross_attention_dim
    base = BaseModel(
        architecture=family_of_width(width),
        unet=unet,
        text_encoder=text_encoder,
        tokenize=lambda prompts, triggers: tokenized(tokenizer, length, prompts, triggers),
        encode=lambda pictures: encode_pictures(vae, multiple, pictures),
        decode=lambda latents: decode_latents(vae, latents),
        schedule=schedule,
        betas=betas,
        latent_channels=vae.config.latent_channels,
        downscale=downscale,
        multiple=multiple,
        size=size,
        hash=weights_hash(unet, text_encoder),
    )
    check_draws(folder, base, read_words(base))
    return base


# --- what the networks do -----------------------------------------------------------------------------------


def tokenized(tokenizer, length: int, prompts: Sequence[str], triggers: Mapping[str, Sequence[int]]) -> Tensor:
    """(B, length) int64: start, words, end, padding."""

    def words(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = torch.full((len(prompts), length), end if pad is None else pad)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [start, *spelled(prompt, triggers, words)[: length - 2], end]
        row[: len(ids)] = torch.tensor(ids)
    return rows


@torch.no_grad()
def encode_pictures(vae: LibraryNetwork, multiple: int, pictures: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 -> (N, C, H/8, W/8), one picture at a time: a VAE needs much memory for each."""
    height, width = pictures.shape[2:]
    if height % multiple or width % multiple:
        raise AdapterError(
            f"pictures of {width} x {height} pixels do not fit this base; choose multiples of {multiple}"
        )
    modes = [vae.encode(_as_weights(vae, picture[None] * 2 - 1)).latent_dist.mode() for picture in pictures]
    latents = torch.cat(modes) * vae.config.scaling_factor
    if not latents.isfinite().all():
        raise AdapterError(
            "the base's VAE makes NaN or infinity of a picture, which nothing can be learned from; its weights are "
            "damaged, or of a precision that is too low"
        )
    return latents


@torch.no_grad()
def decode_latents(vae: LibraryNetwork, latents: Tensor) -> Tensor:
    """(N, C, h, w) -> pictures (N, 3, 8h, 8w) in 0..1, one at a time."""
    decoded = [
        vae.decode(_as_weights(vae, latent[None] / vae.config.scaling_factor), return_dict=False)[0]
        for latent in latents
    ]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def _as_weights(network: nn.Module, tensor: Tensor) -> Tensor:
    """Where the network is, and as precise."""
    return tensor.to(next(network.parameters()))


# --- reading the folder -------------------------------------------------------------------------------------


def check_index(folder: Path) -> str:
    """The pipeline's name; refuses what is not a Stable Diffusion 1.x, 2.x or XL folder, in words that name it."""
    if nameable(folder).is_file():
        raise AdapterError(
            f"{folder}: this is a file, and a base is a folder in diffusers' layout; "
            f"convert a checkpoint with diffusers: {_FROM_FILE}"
        )
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder; a base is toy, or a folder in diffusers' layout")
    path = folder / "model_index.json"
    if not path.is_file():
        raise AdapterError(
            f"{folder}: there is no model_index.json in it, so it is not a model in diffusers' layout; "
            "give the folder that holds unet, text_encoder, vae, tokenizer and scheduler"
        )
    index = read_json(path)
    pipeline = index.get("_class_name")
    if pipeline not in (PIPELINE, XL_PIPELINE):
        raise AdapterError(
            f"{path}: this is a {ascii(pipeline)[:80]}; only Stable Diffusion 1.x and 2.x ({PIPELINE}) and XL "
            f"({XL_PIPELINE}) can be the base"
        )
    for part, classes in (PARTS if pipeline == PIPELINE else XL_PARTS).items():
        entry = index.get(part)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name not in classes:
            raise AdapterError(f"{path}: its {part} is {ascii(name)[:80]}; it must be a {classes[0]}")
    return pipeline


def read_schedule(path: Path) -> tuple[NoiseSchedule, dict]:
    from diffusers import DPMSolverMultistepScheduler

    config = read_json(path)
    betas = {key: config[key] for key in _BETAS if config.get(key) is not None}
    if "trained_betas" not in betas and not {"beta_start", "beta_end", "beta_schedule"} <= set(betas):
        raise AdapterError(
            f"{path}: {ascii(config.get('_class_name'))[:80]} has no betas; "
            "we need beta_start, beta_end and beta_schedule, as Stable Diffusion 1.x and 2.x have them"
        )
    check_facts(path, config, SCHEDULER)
    try:
        scheduler: Any = DPMSolverMultistepScheduler(**betas)
        alphas_cumprod = scheduler.alphas_cumprod
        schedule = NoiseSchedule(alphas_cumprod, betas.get("prediction_type", "epsilon"))
    except Exception as error:  # an entry that is wrong in a way of its own meets any line of the scheduler
        raise AdapterError(f"{path}: {why(error)}") from error
    length = betas.get("num_train_timesteps", 1000)
    if len(alphas_cumprod) != length or not bool(((alphas_cumprod > 0) & (alphas_cumprod < 1)).all()):
        raise AdapterError(
            f"{path}: its betas do not make {length} noise levels between picture and noise; the file is damaged"
        )
    return schedule, betas


def read_tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    check_tokenizer(folder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library under it raises plain Exception for a damaged vocabulary
        raise AdapterError(f"{folder}: the tokenizer cannot be read ({why(error)}); a file in it is damaged") from error
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)  # without those that the library makes up
    if tokenizer.bos_token not in words or tokenizer.eos_token not in words:
        raise AdapterError(f"{folder}: the vocabulary has no start or end token; a file in it is damaged")
    return tokenizer


def build_unet(config: Mapping) -> LibraryNetwork:
    from diffusers import UNet2DConditionModel

    return _built(UNet2DConditionModel, config)


def build_text_encoder(config: Mapping) -> LibraryNetwork:
    from transformers import CLIPTextConfig, CLIPTextModel

    return cast(LibraryNetwork, CLIPTextModel(CLIPTextConfig(**text_entries(config))))


def text_entries(config: Mapping) -> dict:
    """What a text encoder is built from: no weights and no way of running come of what else a config says."""
    unused = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}  # ids come from the tokenizer
    return unused | {name: config[name] for name in TEXT_ENCODER if name in config}


def build_vae(config: Mapping) -> LibraryNetwork:
    from diffusers import AutoencoderKL

    return _built(AutoencoderKL, config)


def _built(network: Any, config: Mapping) -> LibraryNetwork:
    """A class of diffusers from its own entries; those that start with an underscore tell of the file."""
    names = inspect.signature(network.__init__).parameters
    return network(**{name: config[name] for name in config if name in names and name not in ("self", "dropout")})


@dataclass(frozen=True)
class Opened:
    """A network without memory, and the files that have a weight for each of its names and shapes."""

    folder: Path
    network: LibraryNetwork
    files: Sequence[Path]

    def read(self) -> LibraryNetwork:
        """The network, frozen, its weights the very tensors that were read, as float32."""
        wanted = {_short(name): name for name in self.network.state_dict()}
        state: dict[str, Tensor] = {}
        for file in self.files:
            try:
                read, _ = read_safetensors(file, _DTYPES)
            except AdapterError as error:
                raise AdapterError(f"{self.folder}: {error}") from error
            while read:
                name, tensor = read.popitem()
                if _short(name) in wanted:
                    state[wanted[_short(name)]] = _as_float(self.folder, file, name, tensor)
        if len(state) < len(wanted):
            raise AdapterError(f"{self.folder}: its files changed while they were read; try again")
        _refuse_hollow(self.folder, state)
        self.network.load_state_dict(state, assign=True)
        _fill_positions(self.folder, self.network)
        return self.network.requires_grad_(False).eval()


def open_network(
    folder: Path, stem: str, facts: Mapping[str, Fact], build: Callable[[Mapping], LibraryNetwork]
) -> Opened:
    """The network that config.json describes, when it and the weights' names and shapes are sound; reads no weight."""
    path = folder / "config.json"
    config, files = read_json(path, facts), _weight_files(folder, stem)
    shapes = _shapes(folder, files)
    check_words(path, config)
    check_depth(path, config, len(shapes))
    try:
        with torch.device("meta"):
            network = build(config)
    except Exception as error:  # a wrong entry meets any line of the networks' constructors
        raise AdapterError(f"{path}: no network can be built from it ({why(error)}); the file is damaged") from error
    _check_shapes(files[0], {name: tuple(weight.shape) for name, weight in network.state_dict().items()}, shapes)
    return Opened(folder, network, files)


def _refuse_hollow(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Raise AdapterError for a network that is zeros for the most part, as a file is that was made room for alone."""
    matrices = [tensor for tensor in state.values() if tensor.dim() >= 2]
    hollow = sum(not tensor.any() for tensor in matrices)
    if 2 * hollow > len(matrices):
        raise AdapterError(
            f"{folder}: in {hollow} of its {len(matrices)} matrices every number is 0, as where a download was not "
            "finished; get the model again"
        )


def _as_float(folder: Path, file: Path, name: str, tensor: Tensor) -> Tensor:
    narrowed = tensor.float()
    if tensor.dtype == torch.float64:
        check_finite(f"{folder}: {file.name}: {name} as float32", narrowed)
    return narrowed


def _shapes(folder: Path, files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """The name that `_short` gives -> shape of every tensor, before any is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            header = read_header(file, _DTYPES)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {error}") from error
        for name, (dtype, shape) in header.tensors.items():
            if _short(name) in shapes:
                raise AdapterError(f"{file}: {name} is there twice; the file is damaged")
            if dtype not in FLOATS and not name.endswith("position_ids"):
                raise AdapterError(f"{file}: {name} has dtype {dtype}; weights are one of {', '.join(FLOATS)}")
            shapes[_short(name)] = shape
    check_fits(files[0], 4 * sum(map(math.prod, shapes.values())))
    return shapes


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """In one file or in shards, as the libraries look for them; those of a variant only where there are no others."""
    for variant in ("", *VARIANTS):
        whole = folder / f"{stem}{variant}.safetensors"
        # diffusers writes .index.fp16.json, transformers .fp16.safetensors.index.json
        index = next(
            (
                path
                for name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json")
                if is_there(path := folder / name)
            ),
            None,
        )
        if index is not None and (stem == SHARDS_FIRST or not is_there(whole)):
            return _shards(folder, index)
        if is_there(whole):
            check_plain(whole)
            return [whole]
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise AdapterError(
            f"{pickles[0]}: this is a pickle, which can run programs and is never opened here; {CONVERT}"
        )
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = f"; of weights in parts their list {stem}.safetensors.index.json is needed too" if len(other) > 1 else ""
    beside = f"; {listed(other)} is not called as weights are, so rename it if it holds them{shards}" if other else ""
    raise AdapterError(f"{folder / stem}.safetensors: is missing; the model's folder is incomplete{beside}")


def _shards(folder: Path, index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(n, str) for n in shards.values()):
        raise AdapterError(f"{index}: the list of weight files is missing or empty; the file is damaged")
    names = sorted(set(shards.values()))
    for name in names:
        if not name.isprintable() or "\\" in name or Path(name).name != name:
            raise AdapterError(f"{index}: {ascii(name)[:80]} is not the name of a file beside it")
        check_plain(folder / name)
    return [folder / name for name in names]


def _short(name: str) -> str:
    """One name for what versions of the libraries call differently: the text model's level, the VAE's attention."""
    name = name.removeprefix("text_model.")
    if ".attentions." in name:
        for old, new in _OLD_VAE_NAMES.items():
            name = name.replace(old, new)
    return name


def _check_shapes(file: Path, network: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """network: its own names -> shape.  shapes: what `_short` makes of the files' names -> shape."""
    wanted = {_short(name): (name, shape) for name, shape in network.items()}
    missing = [name for short, (name, _) in wanted.items() if short not in shapes]
    odd = [name for name in shapes if name not in wanted and not name.endswith("position_ids")]
    if missing or odd:
        name, fault = (missing[0], "is missing") if missing else (odd[0], "is not part of the network")
        raise AdapterError(
            f"{file}: {name} {fault} ({len(missing)} missing, {len(odd)} too many); "
            "the file is damaged or does not belong to the config.json beside it"
        )
    for short, (name, shape) in wanted.items():
        if shapes[short] != shape:
            raise AdapterError(
                f"{file}: {name} has shape {shapes[short]}, config.json asks for {shape}; "
                "the two files do not belong together"
            )


def _fill_positions(folder: Path, network: nn.Module) -> None:
    """Positions 0, 1, 2, ... are a text model's only buffer that no file holds."""
    for path, buffer in list(network.named_buffers()):
        if not buffer.is_meta:
            continue
        parent, _, name = path.rpartition(".")
        if name != "position_ids":
            raise AdapterError(f"{folder / 'config.json'}: {path} has no weights in the file; other model family")
        network.get_submodule(parent).position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)


def check_fit(
    folder: Path,
    unet: LibraryNetwork,
    vae: LibraryNetwork,
    texts: Mapping[str, tuple[LibraryNetwork, Any]],
    met: Sequence[str] = (),
) -> None:
    """The parts fit each other, and the U-Net wants nothing but latents, timesteps, text and what is `met`.

    texts: the tokenizer's folder -> (text encoder, tokenizer), in the order in which the U-Net has their columns.
    """
    where = folder / "unet" / "config.json"
    unmet = [name for name in _UNMET if name not in met and getattr(unet.config, name, None) is not None]
    if unmet:
        raise AdapterError(
            f"{where}: the U-Net has {unmet[0]}, so it is of another family (LCM, upscaler, ...) than its "
            "model_index.json says; only plain Stable Diffusion 1.x, 2.x and XL can be the base"
        )
    channels, latent_channels = unet.config.in_channels, vae.config.latent_channels
    if channels != latent_channels or unet.config.out_channels != latent_channels:
        raise AdapterError(
            f"{where}: the U-Net takes {channels} channels where the VAE gives {latent_channels}, as models for "
            "inpainting, depth and upscaling do; only a plain text-to-image model can be the base"
        )
    hidden = sum(text_encoder.config.hidden_size for text_encoder, _ in texts.values())
    if unet.config.cross_attention_dim != hidden:
        raise AdapterError(
            f"{where}: the U-Net listens to text {unet.config.cross_attention_dim} wide, the text encoder gives "
            f"{hidden}; the two do not belong together"
        )
    for name, (text_encoder, tokenizer) in texts.items():
        rows = text_encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise AdapterError(
                f"{folder / name}: the tokenizer has {len(tokenizer)} tokens, the text encoder {rows}; "
                "the two do not belong together"
            )
        _check_numbers(folder / name, tokenizer.get_vocab(), rows)


def _check_numbers(folder: Path, words: Mapping[str, int], rows: int) -> None:
    """Each word has a number of its own, which is a row of the text encoder's."""
    word, last = max(words.items(), key=lambda entry: entry[1])
    if last >= rows:
        raise AdapterError(
            f"{folder}: {ascii(word)[:40]} has the number {last}, and the text encoder has {rows} tokens; "
            "the two do not belong together"
        )
    if len(set(words.values())) < len(words):
        raise AdapterError(f"{folder}: two words have the same number; a file in it is damaged")


def downscale_of(vae: LibraryNetwork) -> int:
    """Pixels to a latent's side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def size_in_pixels(path: Path, sample_size: Any, downscale: int) -> tuple[int, int]:
    """(height, width) in pixels; sample_size is one number or two, in latents."""
    sides = list(sample_size) if isinstance(sample_size, (list, tuple)) else [sample_size] * 2
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= 1024 for side in sides):
        raise AdapterError(f"{path}: sample_size is {ascii(sample_size)[:40]}; it must be a whole number, as 64")
    return sides[0] * downscale, sides[1] * downscale
