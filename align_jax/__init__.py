"""align_jax: a laboratory for language-model alignment in JAX.

Import the rooms by name, e.g. `from align_jax import losses, models`; nothing heavy is imported here.
"""

__version__ = "0.1.0"
