"""Diffusion maths: paths between clean latents and noise, guidance, sampling. Pure functions of tensors."""
