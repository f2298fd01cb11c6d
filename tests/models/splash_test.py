"""The splash kernel, interpreted, is attention by its definition."""

import pytest

from align_jax.models import splash
from tests.models.whole_rows import Case, compare


@pytest.mark.parametrize(
  "case",
  [
    Case(384, "splash", branches=False, window=30, batch=1),
    Case(300, "splash", window=30, softcap=3.0, batch=1),  # padded to three tiles
    Case(256, "splash", mesh=(1, 1, 2, 4), window=30),  # four devices share two key heads
    Case(512, "splash", mesh=(1, 2, 2, 2), branches=False, softcap=3.0),
  ],
  ids=str,
)
def test_the_kernel_is_attention_by_its_definition(case):
  assert compare(case) < 3e-6


def test_a_window_longer_by_one_is_told_apart():
  case = Case(128, "splash", window=9, batch=1, kv_heads=1)
  assert compare(case, wrong_window=10) > 1e-2


@pytest.mark.parametrize(
  "length, padded, block", [(40, 128, 128), (300, 384, 128), (1000, 1024, 512), (8192, 8192, 512)]
)
def test_rows_are_padded_to_tiles(length, padded, block):
  assert splash.padded_length(length) == padded
  assert splash.block_sizes(padded, padded).block_q == block
