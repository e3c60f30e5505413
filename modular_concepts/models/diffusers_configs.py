"""What the texts of a base folder in diffusers' layout may say; read before anything is built of them.

A fact of a config is checked here where the libraries would take a wrong value and go wrong with it later, count
layers without end or draw nothing but NaN.  What the networks themselves refuse, they refuse when they are built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path

from ..concept import is_number
from ..errors import AdapterError
from ..storage.names import not_a_file
from ..storage.strict_json import parse_json

MAX_TEXT = 16 * 2**20  # bytes of one JSON file or vocabulary
MAX_TOKENIZER_ENTRIES = 2**21  # of tokenizer.json: five for each word and four for each merge
MAX_WORDS = 2**18  # of a vocabulary and merges; CLIP has a fifth
MAX_ADDED = 2**10  # words that somebody taught a text encoder
MAX_LEVELS = 8  # of a U-Net or VAE: each halves the picture
MAX_WIDTH = 2**20
DAMAGED = "the model's folder is incomplete or damaged"


@dataclass(frozen=True)
class Fact:
    """need: what an entry must be, in words.  fits: whether a value is."""

    need: str
    fits: Callable[[object], bool]


def _whole(low: int, high: int) -> Fact:
    need = f"{low}" if low == high else f"a whole number from {low} to {high}"
    return Fact(need, lambda value: type(value) is int and low <= value <= high)


def _between(low: float, high: float) -> Fact:
    return Fact(f"a number above {low:g} and below {high:g}", lambda v: is_number(v) and low < v < high)


def _or_null(fact: Fact) -> Fact:
    return Fact(f"{fact.need}, or null", lambda value: value is None or fact.fits(value))


def _each(fact: Fact, depth: int = 1) -> Fact:
    """One of them, or a list with one for each level; depth: of lists in lists."""

    def fits(value: object, left: int = depth) -> bool:
        if isinstance(value, list):
            return left > 0 and bool(value) and all(fits(each, left - 1) for each in value)
        return fact.fits(value)

    return Fact(f"{fact.need}, or a list of them", fits)


def _levels(fact: Fact) -> Fact:
    return Fact(
        f"a list of 1 to {MAX_LEVELS}, each {fact.need}",
        lambda value: isinstance(value, list) and 0 < len(value) <= MAX_LEVELS and all(map(fact.fits, value)),
    )


_TEXT = Fact("a text", lambda value: isinstance(value, str))
_SWITCH = Fact("true, false or null", lambda value: value is None or isinstance(value, bool))
_NOTHING = Fact("null, for a base without it", lambda value: value is None or (type(value) is int and value == 0))
_WIDTH, _COUNT = _whole(1, MAX_WIDTH), _whole(1, 2**16)
_EPSILON = _between(0, 1)
_TOKEN_PARTS = {"content", "lstrip", "rstrip", "normalized", "single_word", "special", "__type"}
_TOKEN = Fact(
    "a token's text",
    lambda value: value is None or isinstance(value, str) or _is_token(value),
)
_TOKENS = Fact(f"at most {MAX_ADDED} tokens", lambda value: not isinstance(value, Sized) or len(value) <= MAX_ADDED)


def _is_token(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str) and set(value) <= _TOKEN_PARTS


TEXT_ENCODER = {
    "vocab_size": _WIDTH,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "max_position_embeddings": _whole(3, 2**16),
    "projection_dim": _or_null(_WIDTH),
    "hidden_act": _TEXT,
    "layer_norm_eps": _EPSILON,
    "eos_token_id": _whole(0, MAX_WIDTH),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _or_null(_whole(0, MAX_WIDTH))),
}
VAE = {
    "in_channels": _whole(3, 3),
    "out_channels": _whole(3, 3),
    "latent_channels": _whole(1, 1024),
    "block_out_channels": _levels(_WIDTH),
    "down_block_types": _levels(_TEXT),
    "up_block_types": _levels(_TEXT),
    "layers_per_block": _COUNT,
    "norm_num_groups": _WIDTH,
    "act_fn": _TEXT,
    "scaling_factor": _between(1e-4, 1e4),
    **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), _SWITCH),
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std"), _NOTHING),
}
UNET = {
    **dict.fromkeys(("in_channels", "out_channels"), _whole(1, 1024)),
    "block_out_channels": _levels(_WIDTH),
    "down_block_types": _levels(_TEXT),
    "up_block_types": _levels(_TEXT),
    "layers_per_block": _each(_COUNT),
    "transformer_layers_per_block": _each(_whole(0, 2**16), 2),
    "reverse_transformer_layers_per_block": _or_null(_each(_whole(0, 2**16), 2)),
    "cross_attention_dim": _each(_WIDTH),
    "attention_head_dim": _each(_COUNT),
    "norm_num_groups": _WIDTH,
    "norm_eps": _EPSILON,
    "act_fn": _TEXT,
    "downsample_padding": _whole(0, 1),
    "freq_shift": _between(-2, 2),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), _between(1e-4, 1e4)),
    **dict.fromkeys(("flip_sin_to_cos", "center_input_sample", "use_linear_projection", "upcast_attention"), _SWITCH),
    **dict.fromkeys(("dual_cross_attention", "class_embeddings_concat", "resnet_skip_time_act"), _SWITCH),
    "only_cross_attention": _each(_SWITCH),
    **dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim"), _or_null(_WIDTH)),
}
_BETA = _between(0, 1)
MAX_NOISE_LEVELS = 10_000
SCHEDULER = {
    "num_train_timesteps": _whole(2, MAX_NOISE_LEVELS),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": _TEXT,
    "prediction_type": _TEXT,
    "rescale_betas_zero_snr": _SWITCH,
    "trained_betas": _or_null(
        Fact(
            f"a list of 2 to {MAX_NOISE_LEVELS} numbers above 0 and below 1",
            lambda v: isinstance(v, list) and 2 <= len(v) <= MAX_NOISE_LEVELS and all(map(_BETA.fits, v)),
        )
    ),
}
TOKENIZER = {
    "model_max_length": _or_null(Fact("a whole number from 3, as 77", lambda value: type(value) is int and value > 2)),
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"), _TOKEN
    ),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"), _TOKENS),
    "added_tokens_decoder": Fact(
        f"an object of at most {MAX_ADDED} tokens with their numbers",
        lambda value: (
            isinstance(value, dict)
            and len(value) <= MAX_ADDED
            and all(number.isdecimal() and _is_token(token) for number, token in value.items())
        ),
    ),
}
# What transformers would take from elsewhere than the files that it finds in the folder.
_ELSEWHERE = (
    *("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files", "gguf_file"),
    *("tokenizer_object", "post_processor", "init_inputs", "auto_map", "trust_remote_code"),
)
_WORDS = {"vocab.json": '"', "merges.txt": "\n"}  # what each word or merge has at least one of
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


def read_text(path: Path) -> str:
    """A plain file's text, of at most `MAX_TEXT` bytes.  Raises AdapterError that names it."""
    check_text(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "cannot be read" if isinstance(error, OSError) else "is not UTF-8 text"
        raise AdapterError(f"{path}: {reason}; {DAMAGED}") from error


def check_text(path: Path) -> None:
    """Raise AdapterError unless this is a plain file of at most `MAX_TEXT` bytes."""
    check_plain(path)
    size = path.stat().st_size
    if size > MAX_TEXT:
        raise AdapterError(
            f"{path}: it is {size / 2**20:.1f} MiB long, and at most {MAX_TEXT // 2**20} MiB of such a text are read; "
            "the file is damaged or another's"
        )


def check_plain(path: Path) -> None:
    """Raise AdapterError unless this is a file, and no folder, pipe, device or link to nothing."""
    if path.is_file():
        return
    if path.is_symlink() or path.exists():
        raise AdapterError(f"{path}: {not_a_file(path).partition(';')[0]}; {DAMAGED}")
    raise AdapterError(f"{path}: is missing; {DAMAGED}")


def read_json(path: Path, facts: Mapping[str, Fact] | None = None) -> dict:
    """A JSON object in which each of `facts` that is there is what it must be.  Raises AdapterError otherwise."""
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: this is not a JSON object; the file is damaged")
    check_facts(path, content, facts or {})
    return content


def check_facts(path: Path, config: Mapping, facts: Mapping[str, Fact]) -> None:
    """Raise AdapterError for the first of `facts` that is there and not what it must be."""
    for name, fact in facts.items():
        if name in config and not fact.fits(config[name]):
            raise AdapterError(f"{path}: {name} is {_shown(config[name])}; it must be {fact.need}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def check_words(path: Path, config: Mapping) -> None:
    """Raise AdapterError for a text encoder's config, its facts checked, whose tokens lie beyond its vocabulary."""
    size = config.get("vocab_size", MAX_WIDTH)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (config.get(name) or 0) >= size:
            raise AdapterError(f"{path}: {name} is {config[name]}, beyond vocab_size, which is {size}; it is damaged")


def check_depth(path: Path, config: Mapping, tensors: int) -> None:
    """Raise AdapterError for a config, its facts checked, that counts more layers than there are tensors of weights."""
    names = ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block")
    layers, blocks, inner = (_most(config.get(name)) for name in names)
    inner = max(inner, _most(config.get("reverse_transformer_layers_per_block")))
    levels = len(config.get("block_out_channels", ()))
    if layers > tensors or levels * blocks * (1 + inner) > tensors:
        depth = ", ".join(f"{name} is {_shown(config[name])}" for name in names if config.get(name) is not None)
        raise AdapterError(
            f"{path}: {depth}, and the weights beside it are {tensors} tensors, too few for so many layers; "
            "the two do not belong together"
        )


def _most(value: object) -> int:
    if isinstance(value, list):
        return max(map(_most, value), default=0)
    return value if type(value) is int else 0


def check_tokenizer(folder: Path) -> None:
    """Raise AdapterError for files of a tokenizer that lead elsewhere, have no end, or say what no tokenizer can be."""
    whole = folder / "tokenizer.json"
    for path in filter(is_there, [whole, *(folder / name for name in (*_WORDS, *_TOKENIZER_CONFIGS))]):
        if path.is_file() and read_text(path).startswith("\ufeff"):
            raise AdapterError(
                f"{path}: it begins with a mark of its encoding, which its library does not read; save it as "
                "UTF-8 without one"
            )
    if is_there(whole):
        content = parse_json(read_text(whole), str(whole), MAX_TOKENIZER_ENTRIES)
        added = content.get("added_tokens") if isinstance(content, dict) else None
        check_facts(whole, {"added_tokens": added}, {"added_tokens": _TOKENS})
    for name, sign in _WORDS.items():
        if (is_there(folder / name) or not is_there(whole)) and read_text(folder / name).count(sign) > 2 * MAX_WORDS:
            raise AdapterError(
                f"{folder / name}: it holds more than {MAX_WORDS} words; the file is damaged or another's"
            )
    if is_there(path := folder / "added_tokens.json"):
        check_facts(path, {"the list": read_json(path)}, {"the list": _TOKENS})
    templates = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for path in filter(is_there, templates):
        check_text(path)
    for path in filter(is_there, [folder / name for name in _TOKENIZER_CONFIGS]):
        config = read_json(path, TOKENIZER)
        elsewhere = [name for name in _ELSEWHERE if config.get(name) not in (None, False)]
        if elsewhere:
            raise AdapterError(
                f"{path}: it has the entry {elsewhere[0]}, which reads from elsewhere; only the files beside it are "
                "read, so take the entry out"
            )


def is_there(path: Path) -> bool:
    """Whether there is anything by this name, a link to nothing too."""
    return path.is_symlink() or path.exists()


def why(error: BaseException) -> str:
    """Another library's words for what went wrong, in one line of bounded length."""
    words = " ".join(str(error).split())
    words = words if len(words) <= 160 else f"{words[:159]}…"
    return words if isinstance(error, AdapterError) else f"{type(error).__name__}: {words}".removesuffix(": ")
