"""sid: one-step students of text-to-image diffusion models. Importing this package imports nothing else."""

__version__ = "0.1.0"
