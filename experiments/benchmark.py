"""Speed and memory of the preference step, as ratios measured side by side in one run.

python -m experiments.benchmark --config=configs/benchmark.py --workdir=runs/benchmark
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/benchmark.py")


def main():
  from align_jax.phases import benchmark

  benchmark.run(app.settings(CONFIG, benchmark.BenchmarkConfig), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
