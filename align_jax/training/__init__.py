"""State, step, loop, checkpoints: the only files that know optax, Orbax or a mesh."""
