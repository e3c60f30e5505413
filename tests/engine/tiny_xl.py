"""A Stable Diffusion XL folder in diffusers' layout with random weights: 16 x 16 pictures, a second to build."""

from pathlib import Path

import torch
from tiny_sd import END, LENGTH, write_tokenizer

WIDTHS, POOLED = (32, 48), 24


def write_tiny_xl(folder: Path) -> Path:
    """Save the whole folder; the same weights each time.  The end mark's id is as in SDXL's own configs."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        vocab_size = write_tokenizer(folder / name, pad)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=sum(WIDTHS),
            attention_head_dim=4,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED,
        )
        first, second = (
            kind(
                CLIPTextConfig(
                    vocab_size=vocab_size,
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    max_position_embeddings=LENGTH,
                    bos_token_id=0,
                    eos_token_id=2,
                    projection_dim=POOLED,
                    initializer_factor=8.0,
                )
            )
            for kind, width in zip((CLIPTextModel, CLIPTextModelWithProjection), WIDTHS, strict=True)
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.13,
        )
    tokenizers = [
        CLIPTokenizer.from_pretrained(str(folder / name), local_files_only=True)
        for name in ("tokenizer", "tokenizer_2")
    ]
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
    ).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name / "tokenizer.json").unlink(missing_ok=True)  # SDXL folders have none
    return folder
