"""Text-to-image generation in pure-functional JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """`from_pretrained` and `save_pretrained`, which import jax and the networks only once they are asked for."""
    if name in ("from_pretrained", "save_pretrained"):
        from jaxdiff.weights import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
