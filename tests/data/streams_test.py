"""Order, packing and buckets, on plain integers."""

import numpy as np
import pytest

from align_jax.data import streams
from align_jax.data.streams import Stream, Windows
from align_jax.errors import InputError


def stream(size=10, *, shuffle=True, total=None, seed=0):
  return Stream((0, size), (1.0,), seed, shuffle, total)


def test_every_epoch_is_another_order_of_everything():
  epochs = stream().take(0, 30).reshape(3, 10)
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in epochs}) == 3
  assert stream(seed=1).take(0, 10).tolist() != epochs[0].tolist()


def test_a_stretch_does_not_depend_on_where_reading_began():
  whole = stream().take(0, 100)
  for start, stop in ((0, 7), (7, 13), (9, 11), (95, 100)):
    np.testing.assert_array_equal(stream().take(start, stop), whole[start:stop])


def test_a_finite_stream_ends():
  assert len(stream(total=25).take(20, 30)) == 5
  assert len(stream(total=25).take(30, 40)) == 0


def test_unshuffled_is_the_order_of_the_file():
  assert stream(4, shuffle=False).take(0, 10).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_orders_are_random():
  """Chi-square of who comes first over 2,000 epochs; 27.9 is p = 0.001 at 9 degrees of freedom."""
  first = stream().take(0, 20_000)[::10]
  counts = np.bincount(first, minlength=10)
  assert ((counts - 200) ** 2 / 200).sum() < 27.9


def rows_needed(lengths, capacity, small):
  """At least so many rows (Martello and Toth 1990): items over half a row share none, and what of
  the others of at least `small` does not fit beside them needs more."""
  halves = lengths[lengths > capacity / 2]
  room = (capacity - halves)[halves <= capacity - small].sum()
  rest = lengths[(lengths >= small) & (lengths <= capacity / 2)].sum()
  return len(halves) + max(0, -(-(rest - room) // capacity))


@pytest.mark.parametrize("seed", range(5))
def test_packing_holds_everything_once_and_is_dense(seed):
  lengths = np.random.default_rng(seed).integers(1, 33, 500)
  rows = streams.best_fit(lengths, 32)
  assert sorted(sum(rows, [])) == list(range(500))
  assert max(lengths[row].sum() for row in rows) <= 32
  assert len(rows) <= 1.01 * max(rows_needed(lengths, 32, k) for k in range(1, 17))


def test_packing_by_hand():
  """Lengths 5 6 3 2 8 2 in rows of 8: 8, then 6 + 2, then 5 + 3, and 2 is left over."""
  assert streams.best_fit(np.array([5, 6, 3, 2, 8, 2]), 8) == [[4], [1, 3], [0, 2], [5]]


def test_buckets_lose_nothing_and_only_the_last_batch_is_partial():
  lengths = np.random.default_rng(0).integers(1, 65, 101)
  batches = streams.bucket(lengths, (16, 32, 64), 8)
  assert sorted(np.concatenate([items for _, items in batches])) == list(range(101))
  assert all(lengths[items].max() <= size for size, items in batches)
  assert [len(items) for _, items in batches] == [8] * 12 + [5]
  used = sum(size * len(items) for size, items in batches)
  assert lengths.sum() / used > 0.65 > lengths.sum() / (64 * 101)


def test_windows_resume_anywhere():
  def halves(indices, rng):
    return [indices[:3] + rng.integers(0, 1000), indices[3:]]

  windows = Windows(stream(total=47), 6, halves)
  iterator = iter(windows)
  states, elements = [], []
  for element in iterator:
    elements.append(element)
    states.append(iterator.get_state())
  for state, rest in zip(states, range(1, len(elements) + 1)):
    again = iter(windows)
    again.set_state(state)
    following = list(again)
    assert len(following) == len(elements) - rest
    for a, b in zip(following, elements[rest:]):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "options, size, complaint",
  [({"size": 9}, 6, "records 10, this has 9"), ({"seed": 1}, 6, "seed 0"), ({}, 5, "size 6")],
)
def test_other_data_is_not_resumed(options, size, complaint):
  """[33] The state says what it was counted in."""
  state = iter(Windows(stream(), 6, lambda indices, rng: [indices])).get_state()
  other = iter(Windows(stream(**options), size, lambda indices, rng: [indices]))
  with pytest.raises(InputError, match="the data to resume had " + complaint):
    other.set_state(state)


def test_iterators_side_by_side_resume_each_where_it_was():
  def make():
    sets = [streams.Stream((0, n), (1.0,), seed=n, shuffle=True, total=None) for n in (5, 7)]
    windows = [streams.Windows(s, 4, lambda indices, rng: list(indices)) for s in sets]
    return streams.Zipped(first=iter(windows[0]), second=iter(windows[1]))

  plain, resumed = make(), make()
  expected = [next(plain) for _ in range(9)]
  for _ in range(4):
    next(resumed)
  again = make()
  again.set_state(resumed.get_state())
  assert [next(again) for _ in range(5)] == expected[4:]
  assert expected[0].keys() == {"first", "second"}
