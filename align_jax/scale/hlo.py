"""A compiled module's text, read for what it moves: collectives by kind, memory traffic, largest arrays.

`cost_analysis` counts the body of a loop once; here every instruction counts as often as it runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
  "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation|called_computations)"
  r"=(\{[^}]*\}|%?[\w.\-]+)"
)
# The ways that groups of devices are written.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)
_FREE = frozenset(
  ("parameter constant tuple get-tuple-element bitcast after-all partition-id while conditional call "
   "dynamic-update-slice optimization-barrier").split()
)  # fmt: skip
_IN_PLACE = ("scatter", "dynamic-update-slice")
_SLICED = 8


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _places(dims: str, order: str | None) -> np.ndarray:
  """0, 1, 2... in an array of these dimensions, transposed."""
  places = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return places.transpose(_numbers(order)) if order else places


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a result: its type and shape on one device."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def bytes(self) -> float:
    return self.size * BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str

  @property
  def bytes(self) -> float:
    return sum(array.bytes for array in self.arrays)

  @property
  def called(self) -> tuple[str, ...]:
    """The computations that it runs, loop bodies and branches among them."""
    found = (re.split(r"[\s,]+", names.strip("{}")) for names in _CALLED.findall(self.text))
    return tuple(name.lstrip("%") for names in found for name in names if name)

  @functools.cached_property
  def groups(self) -> np.ndarray:
    """The devices that take part in this collective together, [groups, size] by place in the mesh."""
    if listed := _LISTED.search(self.text):
      return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if iota := _IOTA.search(self.text):
      return _places(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if named := _NAMED.search(self.text):
      sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
      taken = re.findall(r"'([^']+)'", named[4])
      order = [list(sizes).index(a) for a in [*(a for a in sizes if a not in taken), *taken]]
      shape = ",".join(map(str, sizes.values()))
      places = _places(named[2] or shape, named[3]).reshape(_numbers(shape))
      return places.transpose(order).reshape(-1, math.prod(sizes[a] for a in taken))
    return np.zeros((1, 1), int)

  @property
  def group_size(self) -> int:
    return self.groups.shape[1]


@dataclasses.dataclass(frozen=True)
class Module:
  entry: str
  computations: dict[str, tuple[Instruction, ...]]

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How often every computation outside fusions runs, of branches all."""
    runs: dict[str, int] = collections.Counter()

    def visit(name: str, times: int):
      runs[name] += times
      for instruction in self.computations.get(name, ()):
        if instruction.opcode != "fusion" and not _reduces(instruction):
          for called in instruction.called:
            visit(called, times * self.trips(instruction))

    visit(self.entry, 1)
    return dict(runs)

  def trips(self, instruction: Instruction) -> int:
    """How often a loop's body runs; 1 for all else, and where neither compiler nor condition says.

    A condition says so that is one comparison with a constant. Of a loop that ends for several reasons,
    as decoding does, one turn is counted.
    """
    if instruction.opcode != "while":
      return 1
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text):
      return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.text)
    lines = self.computations.get(condition[1], ()) if condition else ()
    bounds = [re.match(r"constant\((\d+)\)", i.text) for i in lines if i.opcode == "constant"]
    bounds = [int(bound[1]) for bound in bounds if bound]
    comparisons = sum(i.opcode == "compare" for i in lines)
    return bounds[0] if len(bounds) == comparisons == 1 else 1

  def collectives(self) -> Iterator[tuple[Instruction, int]]:
    """All collectives with how often they run, those inside of fusions among them.

    An asynchronous one is listed once though several fusions hold a part of it: its channel tells.
    """
    channels = set()
    for name, times in self.runs.items():
      for instruction in self.computations.get(name, ()):
        for found in self._inside(instruction):
          channel = re.search(r"channel_id=(\d+)", found.text)
          if channel is None or channel[1] not in channels:
            channels.add(channel and channel[1])
            yield found, times

  def _inside(self, instruction: Instruction):
    if kind(instruction.opcode):
      yield instruction
    elif instruction.opcode == "fusion" or instruction.opcode.startswith("async"):
      for called in instruction.called:
        for inner in self.computations.get(called, ()):
          yield from self._inside(inner)


def parse(text: str) -> Module:
  """The computations of `compiled.as_text()`."""
  computations, entry, body = {}, "", None
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header and " = " not in line.split("(")[0]:
      body = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif body is not None and " = " in line:
      instruction = _instruction(line)
      if instruction is not None:
        body.append(instruction)
  return Module(entry, {name: tuple(found) for name, found in computations.items()})


def _instruction(line: str) -> Instruction | None:
  name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  shape, rest = _split_shape(rest)
  opcode = _OPCODE.match(rest)
  if opcode is None:
    return None
  arrays = tuple(
    Array(dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _ARRAY.findall(shape)
    if dtype in BYTES
  )
  inside = rest[opcode.end() :].split(")")[0]
  operands = tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(name.lstrip("%"), opcode[1], arrays, operands, rest)


def _split_shape(text: str) -> tuple[str, str]:
  """A result's type, which may be a tuple of types with layouts, and what follows."""
  if not text.startswith("("):
    shape, _, rest = text.partition(" ")
    return shape, rest
  depth = 0
  for at, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return text[: at + 1], text[at + 1 :]
  return text, ""


def kind(opcode: str) -> str | None:
  """Which collective an opcode is; None for all others, and for the `-done` of an asynchronous one."""
  plain = opcode.removesuffix("-start")
  return plain if plain in COLLECTIVES else None


def _reduces(instruction: Instruction) -> bool:
  """Whether what it calls is an element-wise function, run inside of it."""
  return bool(kind(instruction.opcode)) or instruction.opcode in (
    "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter", "all-reduce-done"
  )  # fmt: skip


def payload(instruction: Instruction) -> float:
  """The whole array that a collective assembles, sums or moves on one device, in bytes."""
  arrays = instruction.arrays
  if instruction.opcode == "collective-permute-start":
    arrays = arrays[:1]  # (operand, result, two words of context)
  elif instruction.opcode.endswith("-start") and len(arrays) > 1:
    arrays = arrays[len(arrays) // 2 :]  # (operands, results)
  size = sum(array.bytes for array in arrays)
  return size * instruction.group_size if kind(instruction.opcode) == "reduce-scatter" else size


def sent(instruction: Instruction) -> float:
  """Bytes that a device sends, by the ring algorithms: (n-1)/n of the payload, twice for a sum."""
  n = instruction.group_size
  if kind(instruction.opcode) in ("collective-permute", "collective-broadcast"):
    return payload(instruction)
  factor = 2 if kind(instruction.opcode) == "all-reduce" else 1
  return factor * payload(instruction) * (n - 1) / n


def collective_bytes(module: Module) -> dict[str, float]:
  """Bytes that a device sends in one run of the module, by kind of collective."""
  totals = collections.Counter()
  for instruction, times in module.collectives():
    totals[kind(instruction.opcode)] += times * sent(instruction)
  return {name: totals[name] for name in COLLECTIVES if totals[name]}


def bytes_between_slices(module: Module) -> float:
  """Bytes that a device sends to other slices: there the compiler writes `send` and `recv`."""
  return sum(
    times * instruction.arrays[0].bytes
    for name, times in module.runs.items()
    for instruction in module.computations.get(name, ())
    if instruction.opcode == "send"
  )


def memory_traffic(module: Module) -> float:
  """Bytes that a device reads and writes, if every instruction outside fusions reads its operands from
  memory and writes its result there.

  An operand far larger than the result counts as read in part: it is a slice of what is stacked over
  layers.  What is written into an array in place, as into a cache, counts by itself.
  """
  total = 0.0
  for name, times in module.runs.items():
    body = module.computations.get(name, ())
    sizes = {i.name: i.bytes for i in body}
    for instruction in body:
      if instruction.opcode not in _FREE:
        operands = [sizes.get(operand, 0.0) for operand in instruction.operands]
        total += times * _moved(module, instruction, operands)
  return total


def _moved(module: Module, instruction: Instruction, operands: list[float]) -> float:
  """Bytes that one instruction reads and writes; operands: the bytes of each."""
  inner = [instruction]
  if instruction.opcode == "fusion":
    inner = [i for name in instruction.called for i in module.computations.get(name, ())]
  in_place = any(i.opcode in _IN_PLACE and i.bytes == instruction.bytes for i in inner)
  if in_place and instruction.bytes in operands:
    operands.remove(instruction.bytes)
    return 2 * sum(operands)
  most = _SLICED * max(instruction.bytes, 1)
  return instruction.bytes + sum(min(size, most) for size in operands)


def largest(module: Module, count: int = 5) -> list[Array]:
  """The largest arrays that any instruction outside fusions makes, without repeats."""
  found = {a for name in module.runs for i in module.computations.get(name, ()) for a in i.arrays}
  return sorted(found, key=lambda a: (-a.bytes, a.dtype, a.shape))[:count]
