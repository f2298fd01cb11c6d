"""RLHF with PPO against a reward model.

python -m experiments.ppo --config=configs/ppo.py --workdir=runs/ppo
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/ppo.py")


def main():
  from align_jax.phases import ppo

  ppo.run(app.settings(CONFIG, ppo.PpoConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
