"""Speed of the preference step or of sampling, as ratios of one run; or what a PPO step spends its time on.

python -m experiments.benchmark --config=configs/benchmark.py --workdir=runs/benchmark
python -m experiments.benchmark --config=configs/benchmark_sampling.py --workdir=runs/sampling
python -m experiments.benchmark --config=configs/benchmark_online.py --workdir=runs/benchmark_online
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/benchmark.py")


def main():
  from align_jax.phases import benchmark, online_benchmark, sampling_benchmark

  values = app.values(CONFIG)
  if "sets" in values:  # requests to a sampler
    phase, settings = sampling_benchmark, sampling_benchmark.SamplingBenchmarkConfig
  elif "online" in values:
    phase, settings = online_benchmark, online_benchmark.OnlineBenchmarkConfig
  else:  # a preference step
    phase, settings = benchmark, benchmark.BenchmarkConfig
  phase.run(app.settings(CONFIG, settings), WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
