"""Everything in order: SFT, reward model, DPO, IPO, KTO, PPO, evaluations, and a report.

  python -m experiments.pipeline --workdir=runs/quickstart

Phases that are done are skipped, so the same command resumes an interrupted run.
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/quickstart.py")


def main():
  from align_jax.phases import pipeline

  pipeline.run(app.values(CONFIG), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
