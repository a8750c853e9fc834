"""The shapes of Pebble's networks: SD1.5's anatomy at a size that any CPU runs.

Written as diffusers and open_clip configurations, because those are the formats the weights ship in.
"""

from __future__ import annotations

from typing import Any

IMAGE_SIZE = 128
LATENT_CHANNELS = 4
DOWNSCALE = 8
TEXT_WIDTH = 64
NUM_HEADS = 4

# KL autoencoder, 8x down, 4 latent channels.
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": (32, 64, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": IMAGE_SIZE,
}

# UNet with self- and cross-attention at 16x16 and 8x8 latents.
UNET: dict[str, Any] = {
    "sample_size": IMAGE_SIZE // DOWNSCALE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": NUM_HEADS,  # diffusers reads this as the number of heads for SD1.x UNets
    "norm_num_groups": 32,
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

# Contrastive image-text model (open_clip form). Its text tower is the one that conditions the UNet.
CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": NUM_HEADS, "layers": 3},
}
