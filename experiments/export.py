"""Export of a checkpoint to a Hugging Face folder.

python -m experiments.export --config=configs/export.py --config.model=runs/dpo --workdir=exported/dpo
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/export.py")


def main():
  from align_jax.phases import export

  export.run(app.settings(CONFIG, export.ExportConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
