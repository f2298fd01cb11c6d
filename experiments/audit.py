"""An audit of a reward model, or of anything else that scores responses.

  python -m experiments.audit --config=configs/audit.py --workdir=runs/audit \
    --config.scorer=runs/quickstart/reward
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/audit.py")


def main():
  from align_jax.phases import audit

  audit.run(app.settings(CONFIG, audit.AuditConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
