"""MiniGPT-4, and the BLIP-2 under it, in JAX."""

__version__ = "0.1.0"
