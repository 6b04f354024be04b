"""Compiled programs kept on disk, so that the second run of a script starts in seconds. Scripts call it, the library
never does."""

from pathlib import Path

import jax


def enable_compilation_cache(directory: str | Path) -> None:
    """Keep every program that takes over half a second to compile in `directory`, and read it from there next time.

    A directory set by the user (JAX_COMPILATION_CACHE_DIR) is left as it is.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser().absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
