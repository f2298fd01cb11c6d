"""Preference optimisation by any objective of the family.

python -m experiments.preference --config=configs/preference.py --workdir=runs/preference
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/preference.py")


def main():
  from align_jax.phases import preference

  preference.run(app.settings(CONFIG, preference.PreferenceConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
