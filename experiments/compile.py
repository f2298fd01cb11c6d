"""Compiles the step of any phase for a TPU slice, on a machine without one: does it fit, how fast at best?

  python -m experiments.compile --config=configs/preference.py --phase=preference \\
    --shape=llama3-8b --topology=v5e-64 --config.model.dtype=bfloat16 --config.model.remat=full
  python -m experiments.compile --config=configs/pods.py --output=pods.json    # a table of jobs
"""

from absl import flags

from align_jax import app

CONFIG = app.define_config("configs/pods.py")
PHASE = flags.DEFINE_string(
  "phase", None, "Whose config --config is: sft, reward, preference, ppo, prefill or decode."
)
SHAPE = flags.DEFINE_string("shape", None, "Of the model: a name such as llama3-8b, or a folder.")
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slices by commas, such as v5e-256,2xv5p-128.")
SUGGEST = flags.DEFINE_integer(
  "suggest", 0, "Compile so many meshes and remat policies; keep the best."
)
OUTPUT = flags.DEFINE_string("output", None, "A JSON file for all figures.")


def main():
  app.coordinate()
  from align_jax.errors import InputError
  from align_jax.phases import compile as phase

  values = app.values(CONFIG)
  given = [flag.name for flag in (PHASE, SHAPE, TOPOLOGY) if flag.value]
  if "jobs" in values:
    if given:
      raise InputError(f"--{given[0]} is not used by a config that lists jobs")
    config = phase.build(values)
  else:
    missing = {"phase", "shape", "topology"} - set(given)
    if missing:
      raise InputError(f"--{sorted(missing)[0]} is needed with the config of a phase")
    config = phase.job_of(PHASE.value, SHAPE.value, TOPOLOGY.value, values)
  phase.run(config, suggest=SUGGEST.value, output=OUTPUT.value)


if __name__ == "__main__":
  app.run(main)
