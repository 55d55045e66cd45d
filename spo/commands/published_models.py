"""The configurations of the published models, as their repositories have them, without the libraries' own defaults.

A model whose configuration is not at hand is taken to be one of these.
"""

from typing import Any

_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "projection_dim": 768,
}
_BIG_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    "projection_dim": 1280,
}
_T5 = {
    "architectures": ["T5EncoderModel"],
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_FLOW_VAE = {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SD15 = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    **SD35_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {"unet": SD15, "text_encoder": _CLIP_L, "vae": _VAE},
    "sdxl": {"unet": SDXL, "text_encoder": _CLIP_L, "text_encoder_2": _BIG_G, "vae": _VAE},
    "sd3": {
        "transformer": SD35_MEDIUM,
        "text_encoder": {**_CLIP_L, "architectures": ["CLIPTextModelWithProjection"]},
        "text_encoder_2": _BIG_G,
        "text_encoder_3": _T5,
        "vae": _FLOW_VAE,
    },
    "flux": {"transformer": FLUX, "text_encoder": _CLIP_L, "text_encoder_2": _T5, "vae": _FLOW_VAE},
}
CLIP_H = {  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which PickScore has, too
    "text_config": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    },
    "vision_config": {
        **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
        **{"image_size": 224, "patch_size": 14},
    },
    "projection_dim": 1024,
}
