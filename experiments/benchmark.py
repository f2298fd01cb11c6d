"""Speed of training and sampling, as ratios of one run; or what a PPO step spends its time on.

python -m experiments.benchmark --config=configs/benchmark.py --workdir=runs/benchmark
python -m experiments.benchmark --config=configs/benchmark_online.py --workdir=runs/benchmark_online
python -m experiments.benchmark --config=configs/benchmark_peers.py --workdir=runs/benchmark_peers
python -m experiments.benchmark --config=configs/benchmark_scaling.py --workdir=runs/benchmark_scaling
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/benchmark.py")


def main():
  from align_jax.phases import benchmark, online_benchmark, scaling_benchmark

  values = app.values(CONFIG)
  if "tasks" in values:  # next to its peers, each side in a process of its own
    return measure_peers()
  if "axes" in values:
    phase, settings = scaling_benchmark, scaling_benchmark.ScalingConfig
  elif "online" in values:
    phase, settings = online_benchmark, online_benchmark.OnlineBenchmarkConfig
  else:  # a preference step
    phase, settings = benchmark, benchmark.BenchmarkConfig
  phase.run(app.settings(CONFIG, settings), WORKDIR.value, app.devices())


def measure_peers():
  from align_jax.phases import peer_benchmark, peer_config

  app.coordinate()
  peer_benchmark.run(app.settings(CONFIG, peer_config.PeerBenchmarkConfig), WORKDIR.value)


if __name__ == "__main__":
  app.run(main)
