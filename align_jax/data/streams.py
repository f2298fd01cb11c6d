"""The order in which records are met: shuffled, mixed, packed into rows, grouped by length.

All of it moves record indices, is computed alike on every host, and is a function of a position in
an endless stream; so the state of an iterator is a few integers, and a restored one continues
exactly.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from align_jax.data.mixture import interleave
from align_jax.errors import InputError

Regroup = Callable[[np.ndarray, np.random.Generator], list[Any]]


@dataclasses.dataclass(frozen=True)
class Stream:
  """Record indices by position: set c holds indices [edges[c], edges[c+1]).

  Every set is met in another random order each epoch (or in its own order with shuffle=False), and
  the sets are dealt out by `weights`. `total` is the number of positions, None if there is no end.
  """

  edges: tuple[int, ...]
  weights: tuple[float, ...]
  seed: int
  shuffle: bool
  total: int | None

  def take(self, start: int, stop: int) -> np.ndarray:
    """The indices at positions [start, stop), cut at the end of the stream."""
    positions = np.arange(start, stop if self.total is None else max(start, min(stop, self.total)))
    component, draw = interleave(positions, self.weights)
    indices = np.empty_like(positions)
    for c in range(len(self.weights)):
      mine = component == c
      size = self.edges[c + 1] - self.edges[c]
      epochs, places = np.divmod(draw[mine], size)
      if self.shuffle:
        for epoch in np.unique(epochs):
          at = epochs == epoch
          places[at] = _permutation(size, self.seed, c, int(epoch))[places[at]]
      indices[mine] = self.edges[c] + places
    return indices


@functools.lru_cache(maxsize=32)
def _permutation(size: int, seed: int, component: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, component, epoch)).permutation(size)


def best_fit(lengths: np.ndarray, capacity: int, *, most: int | None = None) -> list[list[int]]:
  """Packs items, the longest first, each into the fullest row that still holds it.

  most: items a row may hold; None for any number.
  """
  rows: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> rows
  for item in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[item])
    room = next((r for r in range(length, capacity) if by_room[r]), capacity)
    if room == capacity:
      rows.append([])
      row = len(rows) - 1
    else:
      row = by_room[room].pop()
    rows[row].append(item)
    if len(rows[row]) != most:
      by_room[room - length].append(row)
  return rows


def bucket(
  lengths: np.ndarray, buckets: Sequence[int], batch_size: int
) -> list[tuple[int, np.ndarray]]:
  """Groups items into batches of like length: [(padded length, item numbers)].

  What does not fill a batch moves up to the next bucket, so only the last batch of all can be
  partial.
  """
  batches, carried = [], np.empty(0, np.int64)
  shortest = 0
  for size in buckets:
    own = np.flatnonzero((lengths > shortest) & (lengths <= size))
    carried, shortest = np.concatenate([carried, own]), size
    full = len(carried) - len(carried) % batch_size
    batches += [(size, carried[i : i + batch_size]) for i in range(0, full, batch_size)]
    carried = carried[full:]
  return batches + ([(buckets[-1], carried)] if len(carried) else [])


class Windows(grain.IterDataset):
  """A stream in windows of `size` positions, each regrouped to elements: packed rows, or batches.

  regroup(indices [≤ size], rng) -> list of elements; their order is shuffled with the stream's.
  """

  def __init__(self, stream: Stream, size: int, regroup: Regroup):
    super().__init__()
    self.stream, self.size, self.regroup = stream, size, regroup

  def __iter__(self) -> grain.DatasetIterator:
    return _WindowIterator(self)

  def elements(self, window: int) -> list[Any] | None:
    """The elements of a window, None past the end."""
    indices = self.stream.take(window * self.size, (window + 1) * self.size)
    if not len(indices):
      return None
    rng = np.random.default_rng((self.stream.seed, window))
    elements = self.regroup(indices, rng)
    order = rng.permutation(len(elements)) if self.stream.shuffle else range(len(elements))
    return [elements[i] for i in order]


class _WindowIterator(grain.DatasetIterator):
  """Its state is the window and the place in it, and what they are counted in."""

  def __init__(self, windows: Windows):
    super().__init__()
    self._windows = windows
    stream = windows.stream
    self._counted = {"records": stream.edges[-1], "seed": stream.seed, "size": windows.size}
    self._window, self._item, self._elements = 0, 0, None

  def __next__(self) -> Any:
    while True:
      if self._elements is None:
        self._elements = self._windows.elements(self._window)
        if self._elements is None:
          raise StopIteration
      if self._item < len(self._elements):
        self._item += 1
        return self._elements[self._item - 1]
      self._window, self._item, self._elements = self._window + 1, 0, None

  def get_state(self) -> dict[str, int]:
    return {"window": self._window, "item": self._item, **self._counted}

  def set_state(self, state: dict[str, int]) -> None:
    for name, value in self._counted.items():
      if state[name] != value:
        raise InputError(f"the data to resume had {name} {state[name]}, this has {value}")
    self._window, self._item, self._elements = state["window"], state["item"], None


class Traced(grain.DatasetIterator):
  """The elements of a dataset made into batches, and the names of the records in each.

  make(element) -> batch; name(element) -> names.  Names are found by looking again at a place.
  """

  def __init__(self, dataset: grain.IterDataset, make: Callable, name: Callable):
    super().__init__()
    self._iterator = iter(dataset.map(make))
    self._again = dataset.map(name)

  def __next__(self) -> Any:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    return self._iterator.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._iterator.set_state(state)

  def names(self, state: dict[str, Any]) -> list[str]:
    """Those of the batch that comes next at a state."""
    iterator = iter(self._again)
    iterator.set_state(state)
    return next(iterator)


def describe(batches: grain.DatasetIterator, state: dict[str, Any], *, most: int = 4) -> str:
  """A phrase that names the first records of the batch that comes next at a state."""
  if not isinstance(batches, (Traced, Zipped)):
    return f"the batch at {state}"
  names = list(dict.fromkeys(batches.names(state)))
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return f"the batch of {', '.join(names[:most])}{more}"


class Zipped(grain.DatasetIterator):
  """Elements of several iterators side by side; its state is theirs, by name."""

  def __init__(self, **iterators: grain.DatasetIterator):
    super().__init__()
    self._iterators = iterators

  def __next__(self) -> dict[str, Any]:
    return {name: next(iterator) for name, iterator in self._iterators.items()}

  def get_state(self) -> dict[str, Any]:
    return {name: iterator.get_state() for name, iterator in self._iterators.items()}

  def set_state(self, state: dict[str, Any]) -> None:
    for name, iterator in self._iterators.items():
      iterator.set_state(state[name])

  def names(self, state: dict[str, Any]) -> list[str]:
    """Of all of them, as `Traced` does."""
    return [
      name for key, iterator in self._iterators.items() for name in iterator.names(state[key])
    ]
