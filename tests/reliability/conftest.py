"""Runs in processes of their own, that can be killed, on models so small that only reliability is left."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import ppo, preference, quickstart

STEPS, EVERY = 8, 2  # of every run, and between its checkpoints
WORLD, HELD_OUT = "microworld:n=32", "microworld:n=8,split=heldout,draw=1"


def said(folder: pathlib.Path) -> str:
  """What the attempts at this run have printed."""
  return pathlib.Path(str(folder) + ".log").read_text()[-4000:]


def lines_of(folder: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
  """A file of JSON lines without the columns of the clock."""
  if not (folder / name).exists():
    return []
  clock = ("time/", "tokens_per_s")
  rows = [json.loads(line) for line in (folder / name).read_text().split("\n")[:-1]]
  return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in rows]


def state_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The whole last state as it lies on disk, by path."""
  import jax
  from orbax.checkpoint import v1 as ocp

  from align_jax.training import checkpoints

  path = folder.absolute() / "checkpoints" / str(checkpoints.latest_step(folder))
  leaves = jax.tree.leaves_with_path(ocp.load(path, checkpointable_name="state"))

  def plain(x):
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)

  return {jax.tree_util.keystr(path): plain(x) for path, x in leaves}


def steps_of(folder: pathlib.Path) -> list[int]:
  """The checkpoints of a run, in order."""
  if not (folder / "checkpoints").exists():
    return []
  return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


class Runner:
  """Starts runs through a zygote; see zygote.py."""

  steps, every = STEPS, EVERY
  said, lines_of, state_of, steps_of = map(staticmethod, (said, lines_of, state_of, steps_of))

  def __init__(self, root: pathlib.Path):
    self.root = root
    script = pathlib.Path(__file__).with_name("zygote.py")
    repository = str(script.parents[2])
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", str(script)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": repository},
      cwd=repository,
    )

  def start(self, phase, config, folder, *, bomb=None) -> int:
    """The process of a run that has begun."""
    task = {"phase": phase, "config": config, "workdir": str(folder), "bomb": bomb}
    task |= {
      "log": str(folder) + ".log",
      "cache": os.environ["JAX_COMPILATION_CACHE_DIR"] + "-runs",
    }
    self._process.stdin.write(json.dumps(task) + "\n")
    self._process.stdin.flush()
    return self._answer()["pid"]

  def wait(self) -> int:
    """The exit status of the run that was started last; the negative signal if one ended it."""
    return self._answer()["status"]

  def run(self, *args, **named) -> int:
    self.start(*args, **named)
    return self.wait()

  def close(self):
    self._process.stdin.close()
    self._process.wait(timeout=60)

  def _answer(self):
    return json.loads(self._process.stdout.readline())


@dataclasses.dataclass(frozen=True)
class Whole:
  """An uninterrupted run of a phase."""

  phase: str
  config: dict
  folder: pathlib.Path


def settings_of(phase: str, root: pathlib.Path) -> dict:
  """SFT from scratch; DPO and PPO with all that has a state, from the runs under `root`."""
  quick = quickstart.get_config()
  config = {"sft": quick.sft, "reward": quick.reward}.get(phase)
  if phase == "dpo":
    config = preference.get_config()
    config.model.update(init=str(root / "sft"), remat="none", logits_chunk=16)
    config.reference = "cached"
  if phase == "ppo":
    config = ppo.get_config()
    config.model.init, config.reward_model = str(root / "sft"), str(root / "reward")
    config.prompts.update(train=WORLD, batch_size=4)
    config.sampling.update(max_new_tokens=5, samples_per_prompt=2)
    config.rollouts.update(every=1, rows=2)
  else:
    config.data.update(train=WORLD, eval=HELD_OUT, batch_size=8)
    config.loop.eval_every = 3
  if phase == "sft":
    config.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  if phase == "reward":
    config.model.init = str(root / "sft")
  config.loop.update(steps=STEPS, checkpoint_every=EVERY)
  values = config.to_dict()
  if phase == "ppo":
    values["policy_gradient"]["kl"] = {"coef": 0.1, "target": 1.0, "horizon": 100.0}
    values["shaping"]["normalise"], values["ema_decay"] = True, 0.5
  return values


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
  runner = Runner(tmp_path_factory.mktemp("reliability"))
  yield runner
  runner.close()


@pytest.fixture(scope="session")
def whole(runner):
  """`(phase) -> Whole`: what comes before a phase is run first, everything once."""
  done = {}

  def run(phase: str) -> Whole:
    needs = {"sft": (), "reward": ("sft",), "dpo": ("sft",), "ppo": ("sft", "reward")}[phase]
    for other in needs:
      run(other)
    if phase not in done:
      folder, config = runner.root / phase, settings_of(phase, runner.root)
      assert runner.run(phase, config, folder) == 0, said(folder)
      done[phase] = Whole(phase, config, folder)
    return done[phase]

  return run
