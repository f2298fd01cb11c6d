"""What a length bias of the labels does to a reward model and to a policy, and what takes it away.

  python -m experiments.length_bias --config=configs/length_bias.py --workdir=runs/length_bias

Steps that are done are skipped, so the same command resumes an interrupted run.
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/length_bias.py")


def main():
  from align_jax.phases import length_bias

  length_bias.run(app.values(CONFIG), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
