"""Diffusion models as the core's Denoiser: one small adapter a family, its LoRA, and how both are loaded."""
