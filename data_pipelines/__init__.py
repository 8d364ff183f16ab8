import concat_jax  # noqa: F401  # its word for Ctrl-C
