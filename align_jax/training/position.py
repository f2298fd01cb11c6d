"""Where a run is in its data, as a checkpoint holds it: one file, whatever the number of hosts."""

import asyncio
import json
from typing import Any

import jax

_FILE = "position.json"


class Position:
  """The state of a grain iterator as an item of a checkpoint; `load` moves the iterator in place.

  All hosts count the same global batches, so the first one writes for all of them, and a run may go on
  with another number of hosts. Grain by itself writes a file a host, and asks for as many again.
  """

  def __init__(self, iterator: Any):
    self._iterator = iterator

  async def save(self, directory):
    """Takes the state at once; what is returned writes it later."""
    return self._write(directory, json.dumps(self._iterator.get_state()))

  async def _write(self, directory, text: str):
    folder = await directory.await_creation()
    if jax.process_index() == 0:
      await asyncio.to_thread((folder / _FILE).write_text, text)

  async def load(self, directory):
    return self._read(directory)

  async def _read(self, directory):
    text = await asyncio.to_thread((directory / _FILE).read_text)
    self._iterator.set_state(json.loads(text))
