"""A Stable Diffusion folder in diffusers' layout with random weights: 16 x 16 pictures, a second to build."""

import json
from pathlib import Path

import torch

WORDS = ("photo", "man", "dog", "beach", "of")
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
WIDTH = 32


def write_tokenizer(folder: Path, pad: str) -> int:
    """vocab.json, merges.txt and the rest as SD 1.5 folders have them; returns the size of the vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        left = word[0]
        for index, letter in enumerate(word[1:], start=2):
            right = f"{letter}</w>" if index == len(word) else letter
            merges.append(f"{left} {right}")
            left += right
            tokens.append(left)
    vocab = {token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    settings = {**special, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(vocab)


def write_tiny_sd(folder: Path, prediction: str = "epsilon", pad: str = END, zero_snr: bool = False) -> Path:
    """Save the whole folder; the same weights each time."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocab_size = write_tokenizer(folder / "tokenizer", pad)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
                initializer_factor=8.0,  # words that differ enough to be seen in the prediction
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.5,
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # SD 1.5 folders have none
    if zero_snr:
        edit_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    return folder


def edit_json(path: Path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
