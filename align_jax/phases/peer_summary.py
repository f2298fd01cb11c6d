"""From what the processes of the peer benchmark measured to its numbers and its table."""

import statistics
from typing import Any

from align_jax.phases import benchmark_data
from align_jax.phases.peer_config import PEERS, PeerTask

DEFINITIONS = {
  "examples_per_s": "records (a pair is one) of a pass / its seconds; median over passes",
  "speedup": "seconds of the first side / seconds of this side, of passes that are neighbours in time",
  "useful_tokens": "tokens of a pass's records, no padding, the prompt of a pair once (of sampling,"
  " those of the responses): alike for all sides",
  "padded_tokens": "token places that go through the trunk in a pass, one forward pass, padding included;"
  " not counted of sampling",
  "peak_bytes": "the most memory resident in any process of the side: VmHWM of Linux; first start, which"
  " compiles, included",
  "mfu": "3 (4 with the reference recomputed, 1 of sampling) times the FLOPs of a forward pass over the"
  " useful tokens, allowed attention scores and scored tokens / seconds / matmul peak; none for padding or"
  " recomputation",
  "mfu_of_passes": "the same of each pass, but against the mean of the products measured right before and"
  " right behind it: a machine's pace changes",
  "matmul_peak": "the best product of two square matrices, measured in the same processes",
  "compile_first_s": "tracing and compiling the steps of a pass with an empty compilation cache",
  "compile_again_s": "the same in a new process with the cache of the first",
  "steps": "optimizer steps of a pass; of packed rows a step holds about batch_size records",
}


def summary(
  task: PeerTask, examples: int, useful: int, agreement: dict[str, Any], found: dict[str, dict]
) -> dict[str, Any]:
  """The numbers of one task; found: {side: {"starts": [...], "passes": [...]}}, first side first."""
  seconds = {side: [p["seconds"] for p in of["passes"]] for side, of in found.items()}
  first = seconds[next(iter(found))]
  passes = [p for of in found.values() for p in of["passes"]]
  peak = max((rate for p in passes for rate in p.get("matmul_flops_per_s", ())), default=0.0)
  rows = {}
  for side, of in found.items():
    rows[side] = _row(examples, useful, first, seconds[side], of)
    rows[side] |= _of_peer(of) if side in PEERS else _of_ours(of, seconds[side], peak)
  base = next(iter(rows.values()))
  for row in rows.values():
    row["memory_ratio"] = row["memory_bytes"] / base["memory_bytes"]
  return {
    "phase": task.phase,
    "batch_size": task.data.batch_size,
    "examples": examples,
    "matmul_peak": peak,
    "check": agreement,
    "variants": rows,
  }


def _row(examples: int, useful: int, first: list[float], own: list[float], of) -> dict[str, Any]:
  peaks = {
    name: max((p[name] or 0 for p in [*of["starts"], *of["passes"]]), default=0)
    for name in ("peak_bytes", "peak_device_bytes")
  }
  return {
    "examples_per_s": examples / statistics.median(own),
    "examples_per_s_range": [examples / max(own), examples / min(own)],
    "seconds": own,
    **benchmark_data.speedup(first, own),
    "useful_tokens": useful,
    "useful_tokens_per_s": useful / statistics.median(own),
    "memory_bytes": peaks["peak_device_bytes"] or peaks["peak_bytes"],
    **peaks,
    "settings": of["starts"][0]["settings"],
  }


def _of_peer(of: dict[str, list]) -> dict[str, Any]:
  return {"padded_tokens": of["passes"][0].get("padded_tokens")}


def _of_ours(of: dict[str, list], seconds: list[float], peak: float) -> dict[str, Any]:
  start, again = of["starts"][0], of["starts"][1:]
  rates = [statistics.mean(p["matmul_flops_per_s"]) for p in of["passes"]]
  cached = start["reference_pass"]
  return {
    **{name: start.get(name) for name in ("padded_tokens", "steps", "shapes")},
    "mfu": start["flops"] / (statistics.median(seconds) * peak),
    "mfu_of_passes": [start["flops"] / (s * rate) for s, rate in zip(seconds, rates)],
    "flops": start["flops"],
    "compile_first_s": start["compile_s"],
    "compile_again_s": statistics.median(s["compile_s"] for s in again),
    "reference_pass": cached and cached | {"s_per_pair": cached["s"] / cached["pairs"]},
  }


def table(name: str, found: dict[str, Any]) -> str:
  """One line a side; then what was compared, what compiling took and how the peers run."""
  lines = [
    f"{name} ({found['phase']}): {found['examples']} examples a pass, {found['batch_size']} a step; "
    f"matmul peak {found['matmul_peak'] / 1e9:.0f} GFLOP/s",
    f"{'side':32} {'examples/s':>10} {'speed-up':>20} {'useful tok/s':>12} {'padded':>8} {'GB':>6} "
    f"{'memory':>6} {'MFU':>5}",
  ]
  for side, row in found["variants"].items():
    low, high = row["speedup_range"]
    padded = row["padded_tokens"] or "-"
    share = f" {100 * row['mfu']:4.0f}%" if "mfu" in row else "     -"
    lines.append(
      f"{side:32} {row['examples_per_s']:10.3f} {row['speedup']:7.2f} [{low:.2f}, {high:.2f}] "
      f"{row['useful_tokens_per_s']:12.1f} {padded:>8} {row['memory_bytes'] / 1e9:6.2f} "
      f"{row['memory_ratio']:6.2f}{share}"
    )
  return "\n".join(lines + _remarks(found))


def _remarks(found: dict[str, Any]) -> list[str]:
  lines = []
  for side, value in found["check"]["largest_difference"].items():
    lines.append(f"  {side}: what was compared differs by at most {value:.1e} (relative)")
  for side, row in found["variants"].items():
    if side in PEERS:
      told = {k: v for k, v in row["settings"].items() if k != "versions"}
      lines.append(f"  {side} runs with {told}, {row['settings']['versions']}")
      continue
    shapes = f"shapes {', '.join(row['shapes'])}; " if row["shapes"] else ""
    lines.append(
      f"  {side}: compiled in {row['compile_first_s']:.1f} s, from the cache in "
      f"{row['compile_again_s']:.1f} s; {shapes}{row['settings']}"
    )
    own = ", ".join(f"{100 * x:.0f}" for x in row["mfu_of_passes"])
    lines.append(f"  {side}: MFU of each pass, by the products right around it: {own} %")
    if row["reference_pass"]:
      cost = row["reference_pass"]["s_per_pair"]
      lines.append(f"  {side}: filling the reference's cache takes {cost:.3f} s a pair, once")
  return lines
