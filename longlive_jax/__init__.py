"""longlive_jax: minutes-long, multi-shot video from text in JAX."""

__version__ = "0.1.0"
