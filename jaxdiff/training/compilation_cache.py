"""JAX's persistent compilation cache, so that the second run of a script starts in seconds. Called by scripts only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache


def enable_compilation_cache(directory: str | Path) -> None:
    """Cache programs that take more than half a second to compile in `directory`.

    A directory set by the user (JAX_COMPILATION_CACHE_DIR) takes precedence.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser().absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Disable the cache: to time a compilation, or for absent chips, whose programs cannot be read back."""
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # jax decides at the first compilation whether to use one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        reset_cache()
