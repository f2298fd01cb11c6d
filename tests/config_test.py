"""Settings become dataclasses only if every name is known and every type right."""

import dataclasses

import pytest

from align_jax import config
from align_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float
  names: tuple[str, ...] = ("a",)


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: int
  inner: Inner
  note: str | None = None
  runs: dict[str, Inner] = dataclasses.field(default_factory=dict)


GOOD = {"steps": 3, "inner": {"rate": 1, "names": ["x", "y"]}, "runs": {"a": {"rate": 0.5}}}


def test_builds_nested_sections_and_widens_integers():
  built = config.build(Outer, GOOD)
  assert built == Outer(3, Inner(1.0, ("x", "y")), None, {"a": Inner(0.5)})
  assert isinstance(built.inner.rate, float)
  assert config.build(Outer, config.to_dict(built)) == built


@pytest.mark.parametrize(
  "change, message",
  [
    ({"stps": 1}, "config.stps is not a setting of Outer; did you mean 'steps'"),
    ({"inner": {"rate": "high"}}, "config.inner.rate must be of type float, not 'high'"),
    ({"inner": {}}, "config.inner.rate must be set"),
    ({"inner": 3}, "config.inner must be a section"),
    ({"steps": True}, "config.steps must be of type int, not True"),
    ({"steps": 1.5}, "config.steps must be of type int, not 1.5"),
    ({"inner": {"rate": 1.0, "names": "xy"}}, "config.inner.names must be a tuple"),
    ({"runs": {"b": {"rte": 1.0}}}, "config.runs.b.rte is not a setting of Inner"),
  ],
)
def test_every_mistake_names_its_field(change, message):
  with pytest.raises(InputError, match=message):
    config.build(Outer, GOOD | change)


def test_difference_lists_only_what_changed():
  other = GOOD | {"inner": {"rate": 2, "names": ("x", "y")}}
  assert config.difference(GOOD, other) == ["config.inner.rate: 1 there, 2 here"]
