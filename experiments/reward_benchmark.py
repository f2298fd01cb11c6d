"""A reward model, a policy's implicit reward or the longer answer on the benchmarks of reward models.

  python -m experiments.reward_benchmark --config=configs/reward_benchmark.py --config.model=runs/reward \
    --config.benchmarks.llmbar=LLMBAR.jsonl --config.benchmarks.rmb=RMB.jsonl --workdir=runs/benchmarks
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/reward_benchmark.py")


def main():
  from align_jax.phases import reward_benchmark

  config = app.settings(CONFIG, reward_benchmark.RewardBenchmarkConfig)
  reward_benchmark.run(config, WORKDIR.value, app.devices())


if __name__ == "__main__":
  app.run(main)
