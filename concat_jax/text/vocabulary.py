"""`concat_jax.core.vocabulary` under the name that older scripts import."""

from concat_jax.core.vocabulary import Vocabulary as Vocabulary
