"""The family tree of checkpoints."""

import dataclasses
import json
import xml.etree.ElementTree as xml

import pytest

from align_jax.errors import InputError
from align_jax.evals import lineage
from align_jax.evals.lineage import Parent


def entry(name, *parents):
  return lineage.Lineage(name, f"/runs/{name}", 10, parents, "abc", "123", "python")


def of(*names):
  return tuple(Parent(role, f"/runs/{name}", 10) for role, name in names)


PIPELINE = {
  "sft": entry("sft", Parent("init", "smollm2")),
  "reward": entry("reward", *of(("trunk", "sft"))),
  "dpo": entry("dpo", *of(("policy", "sft"), ("ref", "sft"))),
  "ppo": entry("ppo", *of(("policy", "sft"), ("score", "reward"), ("value", "reward"))),
}


def test_a_child_stands_after_all_its_parents():
  found = lineage.graph(PIPELINE)
  assert found.layers == (("smollm2",), ("sft",), ("reward", "dpo"), ("ppo",))
  assert found.roles["sft", "dpo"] == ("policy", "ref")
  assert found.roles["reward", "ppo"] == ("score", "value")


def test_a_parent_outside_with_the_name_of_a_run_is_not_that_run():
  found = lineage.graph({"sft": entry("sft", Parent("init", "/elsewhere/sft"))})
  assert found.layers == (("/elsewhere/sft",), ("sft",))


def test_the_drawing_is_well_formed_and_boxes_do_not_touch():
  drawing = xml.fromstring(str(lineage.to_svg(lineage.graph(PIPELINE), PIPELINE)))
  space = "{http://www.w3.org/2000/svg}"
  boxes = [
    tuple(float(box.get(side)) for side in ("x", "y", "width", "height"))
    for box in drawing.findall(f"{space}rect")
  ]
  assert len(boxes) == 5
  assert len(drawing.findall(f"{space}path")) == 5
  for i, (x, y, w, h) in enumerate(boxes):
    assert 0 <= x and x + w <= float(drawing.get("width"))
    assert 0 <= y and y + h <= float(drawing.get("height"))
    for left, top, _, _ in boxes[:i]:
      assert abs(left - x) >= w or abs(top - y) >= h


def test_names_in_the_drawing_are_escaped():
  runs = {"<b>": entry("<b>", Parent("init", "a&b"))}
  drawing = str(lineage.to_svg(lineage.graph(runs), runs))
  assert "<b>" not in drawing
  xml.fromstring(drawing)


def test_nothing_descends_from_itself():
  runs = {"a": entry("a", *of(("init", "b"))), "b": entry("b", *of(("init", "a")))}
  with pytest.raises(InputError, match="leads back to itself"):
    lineage.graph(runs)


def test_no_runs_make_an_empty_drawing():
  assert lineage.graph({}).layers == ()
  assert "<svg" in str(lineage.to_svg(lineage.graph({}), {}))


def test_the_file_is_read_strictly(tmp_path):
  file = tmp_path / "lineage.json"
  file.write_text(json.dumps(dataclasses.asdict(PIPELINE["ppo"])))
  assert lineage.load(tmp_path) == PIPELINE["ppo"]
  file.write_text('{"phase": "sft"}')
  with pytest.raises(InputError, match=r"lineage\.json\.workdir must be set"):
    lineage.load(tmp_path)
  file.write_text("[]")
  with pytest.raises(InputError, match=r"lineage\.json: an object is needed, not list"):
    lineage.load(tmp_path)
