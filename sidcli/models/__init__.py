"""Kinds of networks that sid can train and sample from: what each needs, and nobody else knows."""
