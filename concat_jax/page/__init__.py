"""The page of `python -m concat_jax.demo`: what it answers, as HTML, and what it refuses."""
