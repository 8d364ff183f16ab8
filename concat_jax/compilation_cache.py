"""Where compiled programs are kept between runs of the command lines."""

from __future__ import annotations

from pathlib import Path

import jax

DEFAULT_FOLDER = Path.home() / ".cache" / "concat_jax" / "xla"


def enable_compilation_cache() -> None:
    """Keeps programs in `DEFAULT_FOLDER` unless JAX_COMPILATION_CACHE_DIR names another."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(DEFAULT_FOLDER))
