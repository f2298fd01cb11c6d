"""Commands: thin mains over align_jax.phases."""
