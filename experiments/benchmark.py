"""Speed of the preference step or of sampling, as ratios measured side by side in one run.

python -m experiments.benchmark --config=configs/benchmark.py --workdir=runs/benchmark
python -m experiments.benchmark --config=configs/benchmark_sampling.py --workdir=runs/sampling
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/benchmark.py")


def main():
  from align_jax.phases import benchmark, sampling_benchmark

  if "sets" in app.values(CONFIG):  # requests to a sampler; a preference step has data
    phase, settings = sampling_benchmark, sampling_benchmark.SamplingBenchmarkConfig
  else:
    phase, settings = benchmark, benchmark.BenchmarkConfig
  phase.run(app.settings(CONFIG, settings), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
