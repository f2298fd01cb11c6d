"""Iterated preference collection: sample, label, train on the labels, measure the drift, and again.

  python -m experiments.rounds --config=configs/rounds.py --workdir=runs/rounds

Steps that are done are skipped, so the same command resumes an interrupted run.
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/rounds.py")


def main():
  from align_jax.phases import rounds

  rounds.run(app.values(CONFIG), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
