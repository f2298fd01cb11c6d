"""Where the time of an online iteration goes: sampling, scoring, learning."""

import dataclasses
import json
import pathlib
from typing import Any

from align_jax.errors import InputError
from align_jax.evals import dashboard, dashboard_plots
from align_jax.phases import online
from align_jax.training import workdir


@dataclasses.dataclass(frozen=True)
class OnlineBenchmarkConfig:
  """An online run to be timed; its first iteration, which compiles, is not counted."""

  online: online.OnlineConfig

  def __post_init__(self):
    if self.online.loop.steps < 3:
      raise InputError("online.loop.steps must be at least 3: the first compiles, two are measured")


def run(config: OnlineBenchmarkConfig, path: str, devices) -> dict[str, Any]:
  """Runs the iterations, prints the shares, and writes benchmark.json."""
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  online.run(config.online, str(folder / "run"), devices)
  metrics = dashboard.read_run(folder / "run").metrics
  seconds = dashboard_plots.time_shares(metrics)
  total = sum(seconds.values())
  rates = metrics["sampling/tokens_per_s"].values[1:]
  results = {
    "device": devices[0].device_kind,
    "devices": len(devices),
    "iterations": len(rates),
    "seconds": seconds,
    "shares": {name: value / total for name, value in seconds.items()},
    "sampling_tokens_per_s": float(rates.mean()),
  }
  workdir.write_json(folder / "benchmark.json", results)
  print(json.dumps(results, indent=2), flush=True)
  return results
