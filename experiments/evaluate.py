"""Evaluation of a policy or a reward model.

python -m experiments.evaluate --config=configs/evaluate.py --workdir=runs/dpo
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/evaluate.py")


def main():
  from align_jax.phases import evaluate

  evaluate.run(app.settings(CONFIG, evaluate.EvaluateConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
