"""Online learning: PPO against a reward model, or by another config GRPO, RLOO and their relatives.

python -m experiments.ppo --config=configs/ppo.py --workdir=runs/ppo
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/ppo.py")


def main():
  from align_jax.phases import online

  online.run(app.settings(CONFIG, online.OnlineConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
