"""Denoising diffusion models in JAX: train, sample, score and ablate."""
