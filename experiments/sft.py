"""Supervised fine-tuning on demonstrations.

python -m experiments.sft --config=configs/sft.py --workdir=runs/sft
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/sft.py")


def main():
  from align_jax.phases import sft

  sft.run(app.settings(CONFIG, sft.SftConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
