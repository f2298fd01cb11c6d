"""The dashboard: shows what was logged and nothing else, whole or half-empty, and never ends a run."""

import json
import math

import numpy as np
import pytest
from matplotlib import colors

from align_jax.errors import InputError
from align_jax.evals import dashboard, dashboard_plots, plots
from align_jax.training import workdir

NASTY = "</p><script>alert('x')</script> & {{ 7 * 6 }}"
REASON = "kl/ref was 41.2 nats at step 28, above stops.kl_max = 40"
STEPS = 30
EVERY = {
  "score": 0.1, "score/model": 0.2, "score/gold": 0.3, "score/std": 1.0, "kl/ref": 1.0,
  "kl/ref_k3": 1.1, "kl_coef": 0.05, "entropy": 2.0, "response_length": 10.0, "eos_rate": 0.9,
  "distinct/responses": 0.8, "distinct/bigrams": 0.4, "repetition/4grams": 0.0,
  "ppo/clip_fraction": 0.1, "ppo/ratio_max": 2.0, "ppo/sampler_mismatch": 1e-6,
  "ppo/sampler_mismatch_max": 1e-4, "ppo/importance_mean": 1.0, "value/explained_variance": 0.5,
  "value/loss": 0.1, "loss": 0.0, "grad_norm": 1.0, "time/sample": 3.0, "time/score": 1.0,
  "time/train": 2.0, "sampling/tokens_per_s": 900.0, "tokens_per_s": 300.0,
}  # fmt: skip


def lines_of(step):
  """One prompt that is asked at every step, and one of each step's own."""
  asked = ("again?", f"only at {step}?")
  return [
    {
      "step": step,
      "row": row,
      "prompt": [{"role": "user", "content": text}],
      "response": f"answer at {step} to {text} {NASTY}",
      "length": 3,
      "finished": row == 0,
      "scores": {"gold": None if row else 0.25},
      "kl": 1.5,
    }
    for row, text in enumerate(asked)
  ]


def write_run(folder, *, without=(), stop=None, finished=True, rollouts=(0, 10, 20), steps=STEPS):
  folder.mkdir(parents=True)
  kept = {n: v for n, v in EVERY.items() if not n.startswith(tuple(without))}
  rows = [{"step": t} | {n: v * (1 + 0.1 * t) for n, v in kept.items()} for t in range(steps)]
  if steps > 1 and "time/train" in kept:
    rows[0]["time/train"] = 900.0  # it compiles, and says nothing of the others
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "config.json").write_text(json.dumps({"phase": "ppo", "loop": {"steps": 60}}))
  if rollouts:
    lines = [json.dumps(line) + "\n" for step in rollouts for line in lines_of(step)]
    (folder / "rollouts.jsonl").write_text("".join(lines))
  workdir.write_stop(folder, stop)
  if finished:
    (folder / "lineage.json").write_text("{}")
  return folder


def grid(*folders):
  runs = {f.name: dashboard.read_run(f) for f in folders}
  return dashboard_plots.grid(
    {name: run.metrics for name, run in runs.items()},
    stops={name: run.stop for name, run in runs.items() if run.stop},
    title="title",
  )


def titles(figure):
  return [axes.get_title(loc="left") for axes in figure.axes]


def axes_of(figure, title):
  return next(a for a in figure.axes if a.get_title(loc="left") == title)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("runs") / "ppo", stop=(28, REASON))


def test_every_metric_that_is_logged_is_drawn(ppo):
  """A line ends at the value of its metric's last step: found for each, in some plot."""
  figure = grid(ppo)
  ends = [line.get_ydata()[-1] for a in figure.axes for line in a.get_lines()]
  for name, value in EVERY.items():
    if not name.startswith("time/"):
      assert any(np.isclose(end, value * (1 + 0.1 * (STEPS - 1))) for end in ends), name
  assert all(
    a.get_xlabel() and (a.get_ylabel() or "seconds" in a.get_xlabel()) for a in figure.axes
  )
  assert {"Reward: model", "Reward: gold"} <= set(titles(figure))
  assert "Reward: std" not in titles(figure)


def test_what_is_not_logged_has_no_plot(tmp_path):
  """GRPO has no value model; another phase logs neither times nor rollouts."""
  full, grpo, bare = (
    titles(grid(write_run(tmp_path / name, without=without)))
    for name, without in (("a", ()), ("b", ("value/",)), ("c", ("value/", "time/", "ppo/")))
  )
  assert set(full) - set(grpo) == {"Value: explained variance", "Value: loss"}
  assert set(grpo) - set(bare) == {
    "Clipped ratios", "Largest ratio", "Sampler − trainer gap", "Importance weight",
    "Time (15 s a step)",
  }  # fmt: skip


def test_raw_values_are_faint_behind_their_running_mean(tmp_path):
  folder = write_run(tmp_path / "run", steps=60)
  raw, bold = axes_of(grid(folder), "Score").get_lines()
  values = dashboard.read_run(folder).metrics["score"].values
  np.testing.assert_array_equal(raw.get_ydata(), values)
  np.testing.assert_array_equal(bold.get_ydata(), plots.smooth(values))
  assert not np.array_equal(values, plots.smooth(values))
  assert raw.get_alpha() < 0.5 and raw.get_linewidth() < bold.get_linewidth()


def test_a_stop_is_a_line_at_its_step_and_marks_the_plot_of_its_metric(ppo, tmp_path):
  figure = grid(ppo)
  for axes in figure.axes:
    assert any(list(line.get_xdata()) == [28, 28] for line in axes.get_lines()), axes.get_title()
  red = [t for t in titles(figure) if axes_of(figure, t)._left_title.get_color() == "#c1121f"]
  assert red == ["KL to the reference"]
  unstopped = grid(write_run(tmp_path / "run"))
  assert not any(list(x.get_xdata()) == [28, 28] for a in unstopped.axes for x in a.get_lines())


def test_time_is_split_into_shares_that_fill_the_step(ppo):
  sample, score, train = axes_of(grid(ppo), "Time (15 s a step)").collections
  tops = [c.get_paths()[0].vertices[:, 1].max() for c in (sample, score, train)]
  assert tops == pytest.approx([3 / 6, 4 / 6, 1.0], abs=1e-3)
  assert dashboard.sampling_share(dashboard.read_run(ppo).metrics) == pytest.approx(1 / 2)
  assert math.isnan(dashboard.sampling_share({}))


def test_several_runs_have_a_colour_each_and_metrics_a_dash_each(ppo, tmp_path):
  other = write_run(tmp_path / "grpo", without=("value/",))
  figure = grid(ppo, other)
  lines = [x for x in axes_of(figure, "KL to the reference").get_lines() if x.get_linewidth() > 1.5]
  tints = dashboard_plots.colours({"ppo": {}, "grpo": {}})
  found = {(colors.to_hex(x.get_color()), x.get_linestyle()) for x in lines}
  assert found == {(c, dash) for c in tints.values() for dash in ("-", "--")}
  labels = [t.get_text() for t in figure.legends[0].get_texts()]
  assert labels == ["ppo (stopped by step 28)", "grpo"]
  bars = axes_of(figure, "Time").patches
  assert [b.get_width() for b in bars] == pytest.approx([3 / 6, 1 / 6, 2 / 6] * 2)


def test_the_page_tells_why_the_run_stopped_and_is_safe_with_any_text(ppo):
  page = dashboard.write([ppo])
  text = page.read_text()
  assert page == ppo / "dashboard.html" and (ppo / "dashboard.png").read_bytes()[:4] == b"\x89PNG"
  assert f"stopped after 30 of 60 steps: {REASON}" in text
  assert "<script>alert" not in text and "&lt;script&gt;" in text and "{{ 7 * 6 }}" in text
  assert "data:image/png;base64," in text and 'src="dashboard.png"' not in text
  assert not list(ppo.glob("*.part"))
  first, last = np.mean([0.1, 0.11, 0.12]), 0.1 * (1 + 0.1 * 28)
  assert f"{first:.2f} → {last:.2f}" in text  # the score, over the first and the last three steps
  assert "gold 0.25" in text and "gold –" in text and "3 tokens, cut off" in text


@pytest.mark.parametrize(
  "stop, finished, words",
  [
    (None, True, "finished, 30 of 60 steps"),
    (None, False, "running or interrupted, 30 of 60 steps"),
    (
      (29, "the loss is nan at step 29"),
      False,
      "stopped after 30 of 60 steps: the loss is nan at step 29",
    ),
  ],
)
def test_the_state_of_a_run_in_words(tmp_path, stop, finished, words):
  folder = write_run(tmp_path / "run", stop=stop, finished=finished)
  assert dashboard.read_run(folder).state == words


def test_responses_are_paired_by_prompt_where_they_can_be():
  pairs = dashboard.early_and_late([line for step in (0, 10, 20) for line in lines_of(step)])
  shown = [(p["early"]["step"], p["late"]["step"], p["early"]["row"], p["same"]) for p in pairs]
  assert shown == [(0, 20, 0, True), (0, 20, 1, False)]  # and the asked-again prompt only once
  assert dashboard.early_and_late([]) == []
  alone = dashboard.early_and_late(lines_of(0))
  assert [(p["early"]["row"], p["late"]) for p in alone] == [(0, None), (1, None)]


def test_a_young_run_has_a_dashboard_too(tmp_path):
  """No step, one step, a line that is being written, values that are not finite."""
  folder = write_run(tmp_path / "run", steps=0, rollouts=())
  assert "No step has been logged yet" in dashboard.write([folder]).read_text()
  assert not (folder / "dashboard.png").exists()
  row = {"step": 0, "score": math.nan, "time/sample": 1.0, "kl/ref": math.inf, "eos_rate": 0.5}
  (folder / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 1, "sco')
  (folder / "rollouts.jsonl").write_text(json.dumps(lines_of(0)[0]) + '\n{"step": 0, "r')
  text = dashboard.write([folder]).read_text()
  assert "– → –" in text and "0.50 → 0.50" in text and "answer at 0" in text


def test_a_comparison_goes_to_its_own_folder_and_names_runs_apart(tmp_path):
  one, two = (write_run(tmp_path / name / "ppo", rollouts=()) for name in ("a", "b"))
  page = dashboard.write([one, two], tmp_path / "out")
  text = page.read_text()
  assert page == tmp_path / "out" / "dashboard.html" and "a/ppo" in text and "b/ppo" in text
  assert not (one / "dashboard.html").exists()


def test_what_cannot_be_shown_is_said(ppo, tmp_path):
  with pytest.raises(InputError, match="has no metrics.jsonl"):
    dashboard.write([tmp_path])
  with pytest.raises(InputError, match="an output folder"):
    dashboard.write([ppo, tmp_path])
  with pytest.raises(InputError, match="given twice"):
    dashboard.write([ppo, ppo], tmp_path)


@pytest.fixture
def clock(monkeypatch):
  """A clock that only drawing moves, by one second a time."""
  now, drawn = [100.0], []

  def write(folders):
    now[0] += 1.0
    drawn.append(now[0])

  monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(dashboard, "write", write)
  return now, drawn


def test_a_live_dashboard_takes_a_fiftieth_of_the_time(clock, tmp_path):
  now, drawn = clock
  live = dashboard.Live(tmp_path)
  for _ in range(1000):
    live()
    now[0] += 0.5
  assert 9 <= len(drawn) <= 11  # 500 s of steps, a second each
  assert drawn[0] == 100 + 15 + 1


@pytest.mark.parametrize("error, last", [(None, 1), (FloatingPointError, 1), (SystemExit, 0)])
def test_the_end_of_a_run_is_drawn_unless_it_is_in_a_hurry(clock, tmp_path, error, last):
  (tmp_path / "metrics.jsonl").write_text("")
  try:
    with dashboard.Live(tmp_path):
      if error:
        raise error
  except (FloatingPointError, SystemExit):
    assert error
  assert len(clock[1]) == last


def test_a_drawing_that_fails_is_said_and_ends_nothing(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(dashboard, "_FIRST_S", 0.0)
  (tmp_path / "metrics.jsonl").write_text("no JSON\n\n")
  with dashboard.Live(tmp_path) as live:
    live()
    assert "the dashboard was not drawn: " in capsys.readouterr().out
  assert "the dashboard was not drawn: " in capsys.readouterr().out
