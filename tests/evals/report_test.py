"""The report: complete from full folders, honest from half-empty ones, and safe with any text."""

import html.parser
import json
import math
import re
import struct

import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.evals import report, results, reward_model, statistics

PROMPTS = 30
NASTY = "</p><script>alert('x')</script> & {{ 7 * 6 }}"


def policy_evaluation(name, gain, kl):
  rng = np.random.default_rng(0)
  base = rng.normal(1.0, 1.0, PROMPTS)
  noise = 0.2 if name != "ipo" else 20.0  # IPO's gain is lost in it
  sign = (-1.0) ** np.arange(PROMPTS)
  scores = base + gain * (1 + noise * sign * np.abs(rng.normal(size=PROMPTS)))
  length = statistics.mean(rng.integers(5, 15, PROMPTS))
  rates = {"score": statistics.mean(scores), "correct": statistics.proportion(scores > 1)}
  return results.PolicyEvaluation(
    policy=name,
    reference="sft",
    scorer="gold",
    n=PROMPTS,
    seed=0,
    temperature=1.0,
    max_new_tokens=24,
    score=statistics.mean(scores),
    reference_score=statistics.mean(base),
    score_gain=statistics.paired_difference(scores, base),
    length=length,
    reference_length=length,
    win_rate=statistics.win_rate(scores, base),
    kl=statistics.mean(np.full(PROMPTS, kl)),
    kl_k3=statistics.mean(np.full(PROMPTS, kl)),
    finished=statistics.proportion([1] * PROMPTS),
    families={"all": rates, "facts": rates, "lists": rates},
  )


def samples(name):
  def prompt(i):
    return ({"role": "user", "content": f"question {i} {NASTY}"},)

  return tuple(
    results.Sample(prompt(i), f"{name} answers {i} {NASTY}", 0.5 * i, ("facts", "lists")[i % 2])
    for i in range(PROMPTS)
  )


def write_phase(root, name, parents=(), step=100):
  folder = root / name
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps({"phase": name, "objective": {"beta": 0.1}}))
  rows = [{"step": t, "loss": math.exp(-t / 50), "grad_norm": 1.0} for t in range(step)]
  rows[3]["loss"] = math.nan
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  lineage = {
    "phase": name,
    "workdir": str(folder),
    "step": step,
    "git_revision": "abc",
    "parents": [{"role": r, "path": str(root / p), "step": 100} for r, p in parents],
    "data_fingerprint": "123",
    "command": f"python -m experiments.{name} --config.note='{NASTY}'",
  }
  (folder / "lineage.json").write_text(json.dumps(lineage))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs") / "first & only"
  for name in ("ppo", "ipo", "dpo", "sft"):
    given = {
      "sft": [],
      "dpo": [("policy", "sft")],
      "ipo": [("policy", "sft")],
      "ppo": [("policy", "sft"), ("score", "reward")],
    }
    write_phase(root, name, given[name])
    gain, kl = {"sft": (0, 0), "dpo": (0.5, 4), "ipo": (0.01, 1), "ppo": (-0.4, 9)}[name]
    results.save(root / name, policy_evaluation(name, gain, kl), samples(name))
  write_phase(root, "reward", [("trunk", "sft")])
  margins = np.random.default_rng(1).normal(0.5, 1.0, 200)
  pairs = reward_model.evaluate_pairs(
    margins,
    0 * margins,
    chosen_lengths=np.arange(200),
    gold_margins=margins + 0.2,
    rejected_lengths=np.full(200, 100),
  )
  results.save(root / "reward", pairs)
  (root / "notes").mkdir()  # no phase: it is left alone
  return root


@pytest.fixture(scope="module")
def page(root):
  return report.build_report(root).read_text()


class Outline(html.parser.HTMLParser):
  """Open tags that were never closed, ids, links, and everything that a browser would fetch."""

  VOID = {"meta", "img", "path", "rect", "br"}

  def __init__(self, text):
    super().__init__()
    self.stack, self.ids, self.links, self.fetched, self.text = [], set(), [], [], []
    self.tags, self.alts = set(), []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.add(tag)
    self.ids |= {attrs["id"]} if "id" in attrs else set()
    self.links += [attrs["href"]] if tag == "a" else []
    self.fetched += [attrs[name] for name in ("src", "srcset", "data") if name in attrs]
    self.alts += [attrs.get("alt")] if tag == "img" else []
    if tag not in self.VOID or tag == "path":
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.add(tag)

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(page):
  outline = Outline(page)
  assert outline.stack == []
  assert not {"script", "link", "iframe"} & outline.tags
  assert all(source.startswith("data:image/png;base64,") for source in outline.fetched)
  assert all(outline.alts) and len(outline.alts) == len(outline.fetched) >= 8
  assert {link.removeprefix("#") for link in outline.links} <= outline.ids
  assert "url(" not in page and "@import" not in page


def test_every_text_from_outside_is_escaped(page):
  assert "<script" not in page
  assert "{{ 7 * 6 }}" in page  # shown, not run
  text = "".join(Outline(page).text)
  assert f"dpo answers 0 {NASTY}" in text
  assert f"--config.note='{NASTY}'" in text
  assert "Alignment report: first & only" in text


def test_the_phases_stand_in_the_order_of_the_pipeline(page):
  titles = re.findall(r"<h3>.*?</span>(.*?)</h3>", page)
  assert titles == ["SFT", "Reward model", "DPO", "IPO", "PPO"]


def test_the_findings_say_what_the_intervals_allow(root, page):
  told = report.findings(report.read_runs(root))
  unclear = results.load(root / "ipo").score_gain
  assert unclear.low < 0 < unclear.high
  assert told[0] == (
    "1 of 3 aligned policies score above SFT by more than their 95 % interval; below it: PPO."
  )
  assert told[1].startswith("The highest mean score is DPO’s")
  assert "the gold judge itself agrees with" in told[-1]
  assert all(finding in "".join(Outline(page).text) for finding in told)


def test_the_table_has_the_numbers_of_the_evaluations(root, page):
  dpo = results.load(root / "dpo")
  row = re.search(r"<tr>\s*<th scope=\"row\"><span[^>]*></span>DPO</th>.*?</tr>", page, re.S)
  cells = " ".join(Outline(row.group()).text)
  assert f"+{dpo.score_gain.value:.2f}" in cells
  assert f"{dpo.score_gain.low:.2f} to {dpo.score_gain.high:.2f}" in cells
  assert f"{dpo.win_rate.wins} / {dpo.win_rate.ties} / {dpo.win_rate.losses}" in cells
  assert "4.00" in cells


def test_samples_stand_side_by_side_and_are_chosen_by_place(root):
  rows = report.side_by_side(report.read_runs(root))
  assert len(rows) == 12
  assert [row["family"] for row in rows] == ["facts"] * 6 + ["lists"] * 6
  assert list(rows[0]["replies"]) == ["sft", "dpo", "ipo", "ppo"]
  for place, row in enumerate(rows[:6]):
    assert row["prompt"][0]["content"].startswith(f"question {2 * place} ")
    assert row["replies"]["ppo"].response.startswith(f"ppo answers {2 * place} ")


def test_the_pictures_lie_beside_the_page(root, page):
  pictures = sorted(file.name for file in root.glob("report_*.png"))
  assert pictures == sorted(
    f"report_{name}.png"
    for name in (
      "behaviour",
      "curves_dpo",
      "curves_ipo",
      "curves_ppo",
      "curves_reward",
      "curves_sft",
      "families",
      "frontier",
      "lengths",
      "overview",
      "reward_model",
    )
  )
  for name in pictures:
    head = (root / name).read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:])) > 200


def test_a_page_built_twice_is_the_same(root, page):
  assert report.build_report(root).read_text() == page


def test_a_sweep_and_a_run_that_has_only_begun_are_shown(tmp_path):
  results.save(tmp_path / "dpo-beta0.05", policy_evaluation("dpo-beta0.05", 0.4, 3.0))
  results.save(tmp_path / "dpo-beta0.5", policy_evaluation("dpo-beta0.5", 0.2, 0.5))
  (tmp_path / "ppo").mkdir()
  (tmp_path / "ppo/metrics.jsonl").write_text('{"step": 0, "score": 0.1}\n{"step": 1, "sco')
  page = "".join(Outline(report.build_report(tmp_path).read_text()).text)
  assert "DPO beta0.05" in page and "DPO beta0.5" in page
  assert "3 phases" in page and "Lineage" not in page


def test_what_cannot_be_reported_is_named(tmp_path):
  with pytest.raises(InputError, match="is not a folder"):
    report.build_report(tmp_path / "nowhere")
  with pytest.raises(InputError, match="holds no phase"):
    report.build_report(tmp_path)
  (tmp_path / "sft").mkdir()
  file = tmp_path / "sft/metrics.jsonl"
  file.write_text('{"step": 0}\n{"loss": 1.0}\n')
  with pytest.raises(InputError, match=r"metrics\.jsonl:2: field 'step' must be a number"):
    report.build_report(tmp_path)
  file.write_text("[]\n")
  with pytest.raises(InputError, match=r"metrics\.jsonl:1: an object is needed, not list"):
    report.build_report(tmp_path)


@pytest.mark.parametrize(
  "value, shown",
  [
    (0.0, "0"),
    (-0.25, "−0.25"),
    (12.345, "12.3"),
    (0.0123, "0.012"),
    (2345.6, "2,346"),
    (math.nan, "–"),
  ],
)
def test_numbers_are_shown_as_people_write_them(value, shown):
  assert report.number(value) == shown
