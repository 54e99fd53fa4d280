"""MiniGPT-4, and the BLIP-2 under it, in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgpt4_jax.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """``load`` brings JAX along: imported when first used, so that ``mgpt4 --help`` is quick."""
    if name == "load":
        from mgpt4_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
