"""What the fuzz tests share: how much is tried, values that files should not hold, and what a refusal says.

`ALIGN_JAX_FUZZ=20 pytest tests/fuzz` tries twenty times as much, by another draw each time.
"""

import os
import re

import hypothesis
from hypothesis import strategies as st

from align_jax.errors import InputError

SCALE = int(os.environ.get("ALIGN_JAX_FUZZ", "0"))
QUIET = (hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large)


def tried(examples: int):
  """Settings of a test with that many inputs, the same in every run; more, and others, when asked."""
  return hypothesis.settings(
    max_examples=examples * max(SCALE, 1),
    derandomize=not SCALE,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],  # the first that fails is shown; shrinking it takes minutes
    suppress_health_check=QUIET,
  )


TEXTS = st.one_of(
  st.sampled_from(
    ["", " ", "a", "yes", "\0", "\ud800", "x\udfff", "é\u0301", "\u2028", "\ufeff", "🙂" * 3]
    + ["\n\nHuman: hi\n\nAssistant:", "\n\nHuman:\n\nAssistant:", "Human: a\n\nAssistant: b"]
    + ["A>B", "chat", "Math", "ref:1", "Helpfulness/x", "1", "nan", "a" * 5000]
  ),
  st.text(max_size=8),
)
NUMBERS = st.one_of(
  st.sampled_from(
    [0, 1, -1, 2, 0.5, 1.5, -0.0, 1e308, 5e-324, 2**31, 2**63, 2**64, 10**400, -(10**4200)]
    + [float("nan"), float("inf"), -float("inf")]
  ),
  st.integers(),
  st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
  SCALARS,
  lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
  max_leaves=6,
)


def clear(error: InputError, *names: str, line: bool = False) -> None:
  """Fails unless the message is one sentence of bearable length that names the file (and line)."""
  text = str(error)
  assert text.strip() and text.isprintable(), repr(text)
  assert len(text) < 2000, len(text)
  assert any(name in text for name in names), (names, text)
  if line:
    assert re.search(rf"{re.escape(names[0])}:\d+: ", text), text
