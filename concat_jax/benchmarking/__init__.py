"""What `python -m concat_jax.benchmark` runs: cases, ours and the reference, one process each."""
