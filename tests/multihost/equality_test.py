"""One process of 8 devices, four of 2 and one device give the same runs: SFT, DPO and PPO.

To the rounding of sums in another order, through the phases themselves: the numbers of every step, and
what is left in the end. What one of them saved another goes on from, on another mesh.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from align_jax import sharding
from align_jax.phases import workspace
from align_jax.training import checkpoints, loop
from configs import ppo, preference, reward, sft
from tests.multihost import host

pytestmark = pytest.mark.skipif(
  not os.environ.get("ALIGN_JAX_HOSTS"),
  reason="minutes of fourteen processes: ALIGN_JAX_HOSTS=1 runs them",
)
STOP, STEPS = 2, 5
RUNS = ("1x1", "1x8", "4x2")  # processes x devices of each
CLOCK = ("time/", "tokens_per_s")


def settings(base, init=None, **mesh):
  """A config file's settings made small, as plain dictionaries."""
  config = base.get_config()
  if init is None:
    config.model.scratch.update(layers=2, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  else:
    config.model.init = str(init)
  config.model.remat = "none"
  config.mesh.update(mesh)
  config.loop.update(steps=STEPS, checkpoint_every=STOP, keep=STEPS)
  config.optimizer.eps = 1e-3  # at 1e-8 Adam makes steps of the rounding of gradients near 0
  if hasattr(config, "data"):
    config.loop.eval_every = STOP
    config.data.update(train="microworld:n=40", eval="microworld:n=12,split=heldout,draw=1")
    config.data.batch_size = 8
  return config


def online(root):
  config = settings(ppo, root / "start")
  config.reward_model = str(root / "reward")
  config.prompts.update(train="microworld:n=24", batch_size=8)
  config.sampling.update(max_new_tokens=5, samples_per_prompt=2, slots=8)
  config.policy_gradient.update(minibatches=2, epochs=1, row_length=64)
  config.rollouts.update(every=1, rows=3)
  return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(folder of all runs, statuses on four hosts): few processes, each for many runs."""
  root = tmp_path_factory.mktemp("hosts")
  begin, judge = settings(sft), settings(reward, root / "start")
  begin.loop.steps = judge.loop.steps = 2
  kinds = {"sft": settings(sft), "preference": settings(preference, root / "start")}
  kinds["online"] = online(root)

  def job(name, config=None, **stop):
    kind = name.split("-")[0]
    config = kinds[kind] if config is None else config
    return host.job(kind, config.to_dict(), root / name, **stop)

  def each(*names, count, devices):
    return host.run_hosts([job(name) for name in names], root, count=count, devices=devices)

  first = [host.job("sft", begin.to_dict(), root / "start"), job("reward", judge), job("sft-1x8")]
  host.run_hosts(first, root, count=1, devices=8)
  cut(root, "sft-1x8", "sft-1x8-4x2")
  four = [
    job("sft-4x2", stop=STOP - 1),
    job("sft-4x2"),
    # `tensor` goes across pairs of hosts, which then read the same rows.
    job("sft-1x8-4x2", settings(sft, fsdp=2, tensor=4)),
    job("preference-4x2"),
    job("online-4x2"),
  ]
  with concurrent.futures.ThreadPoolExecutor() as beside:
    one = beside.submit(each, "sft-1x1", "preference-1x1", "online-1x1", count=1, devices=1)
    eight = beside.submit(each, "preference-1x8", "online-1x8", count=1, devices=8)
    statuses = host.run_hosts(four, root, count=4, devices=2)
    one.result(), eight.result()
    for name in ("sft-4x2-1x1", "sft-4x2-1x8", "online-4x2-1x1"):
      cut(root, name[: -len("-1x1")], name)
    one = beside.submit(each, "sft-4x2-1x1", "online-4x2-1x1", count=1, devices=1)
    spread = [job("sft-4x2-1x8", settings(sft, fsdp=4, tensor=2))]
    host.run_hosts(spread, root, count=1, devices=8)
    one.result()
  return root, statuses


def cut(root, name, copy):
  """A copy of a run as it was when it had made STOP steps and saved."""
  folder = pathlib.Path(shutil.copytree(root / name, root / copy))
  (folder / "lineage.json").unlink()
  for step in (folder / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > STOP:
      shutil.rmtree(step)
  assert checkpoints.latest_step(folder) == STOP
  return folder


def lines(folder):
  found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in found]


def params(folder):
  """The policy's arrays by name, as the next phase would find them."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  leaves = jax.tree.leaves_with_path(workspace.load(str(folder), mesh).params)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same_run(folder, other):
  """Every number of every step, and every parameter in the end."""
  ours, theirs = lines(folder), lines(other)
  assert [row["step"] for row in ours] == [row["step"] for row in theirs]
  for row, expected in zip(ours, theirs):
    assert set(row) == set(expected)
    for name, value in row.items():
      assert value == pytest.approx(expected[name], rel=2e-4, abs=2e-5), (row["step"], name)
  trained = params(other)
  for name, x in params(folder).items():
    np.testing.assert_allclose(x, trained[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["sft", "preference", "online"])
@pytest.mark.parametrize("other", ["1x8", "4x2"])
def test_devices_and_hosts_do_not_change_a_run(runs, kind, other):
  root, _ = runs
  assert_same_run(root / f"{kind}-{other}", root / f"{kind}-1x1")


def test_the_comparison_would_notice(runs):
  """A step less or other rows: the numbers of one step are not those of another, nor parameters."""
  root, _ = runs
  trained, start = (params(root / name) for name in ("sft-1x1", "start"))
  assert max(np.abs(trained[name] - start[name]).max() for name in trained) > 1e-3
  losses = [row["loss"] for row in lines(root / "sft-1x1") if "loss" in row]
  assert min(abs(a - b) for a, b in zip(losses, losses[1:])) > 1e-3


@pytest.mark.parametrize("name", ["sft-1x8-4x2", "sft-4x2-1x8", "sft-4x2-1x1", "online-4x2-1x1"])
def test_what_some_hosts_saved_others_go_on_from(runs, name):
  """Also on a mesh of another shape: `tensor` over four devices of two hosts, or over two of one."""
  root, _ = runs
  assert_same_run(root / name, root / f"{name.split('-')[0]}-1x1")
  before, after = (
    [row for row in lines(root / n) if row["step"] < STOP] for n in (name, name[:-4])
  )
  assert before == after  # to the last digit: they were not made again


def test_a_notice_to_one_host_stops_all_of_them_at_one_step(runs):
  """SIGTERM reached the last host; all left with "resume me", and the same command went on."""
  _, statuses = runs
  assert statuses == [[loop.RESUME_STATUS, 0, 0, 0, 0]] * 4


def test_hosts_answer_with_the_same_words(runs):
  """Sampled tokens do not depend on where a row was decoded; one host writes them down."""
  root, _ = runs
  said = [
    [(row["step"], row["row"], row["response"]) for row in map(json.loads, text.splitlines())]
    for text in ((root / f"online-{n}" / "rollouts.jsonl").read_text() for n in RUNS)
  ]
  assert said[0] == said[1] == said[2] and len(said[0]) == 3 * STEPS
  assert len({response for _, _, response in said[0]}) > 3


def test_one_host_writes(runs):
  root, _ = runs
  for kind in ("sft", "preference", "online"):
    files = [sorted(f.name for f in (root / f"{kind}-{n}").iterdir()) for n in RUNS]
    counts = [[name.split(".")[0] for name in found].count("events") for found in files]
    assert counts[0] == counts[1]
    assert {n for n in files[0] if "events" not in n} == {n for n in files[2] if "events" not in n}
