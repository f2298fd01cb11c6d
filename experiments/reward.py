"""Reward modelling on preference pairs.

python -m experiments.reward --config=configs/reward.py --workdir=runs/reward
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/reward.py")


def main():
  from align_jax.phases import reward

  reward.run(app.settings(CONFIG, reward.RewardConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
