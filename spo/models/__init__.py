"""Diffusion models as the core's Denoiser: an adapter for each family, its LoRA, and loading."""
