"""What a name such as v5e-256, v5p-128 or 2xv5p-128 stands for, and what one chip of it can do.

Figures: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x (Ironwood)" and "TPU software
versions" of Google's public Cloud TPU documentation.  Bandwidths are one way, in bytes a second; the
pages give ICI both ways.
"""

import dataclasses
import difflib
import math
import re

from align_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of TPU.  `named_by_cores`: v5p-128 has 128 TensorCores in 64 chips, v5e-16 has 16 chips."""

  name: str
  cores_per_chip: int  # TensorCores
  devices_per_chip: int  # what JAX calls a device: two cores of a v4 or v5p are one, of a tpu7x two
  named_by_cores: bool
  chips_per_host: int  # in a slice of several hosts
  chips_of_one_host: int  # the largest slice that is one virtual machine
  hbm_bytes: int  # per chip
  hbm_bandwidth: float  # per chip
  peak_flops: float  # per chip, bfloat16
  ici_links: int  # per chip, in the full torus
  ici_link_bandwidth: float
  dcn_bandwidth: float  # per chip
  accelerator: str  # prefix of gcloud's accelerator type
  runtime_version: str | None  # None: the Cloud TPU API does not know this generation
  max_chips: int  # of one slice
  shapes: tuple[tuple[int, ...], ...]  # of the sizes below one cube, or all there are

  @property
  def dimensions(self) -> int:
    return len(self.shapes[0])

  @property
  def ici_bandwidth(self) -> float:
    """Bytes a second that a chip can send over all of its links."""
    return self.ici_links * self.ici_link_bandwidth

  @property
  def dcn_bandwidth_per_host(self) -> float:
    return self.dcn_bandwidth * self.chips_per_host

  def chips(self, number: int) -> int:
    """How many chips the number in a name of this generation stands for; 0 if it can be none."""
    if not self.named_by_cores:
      return number
    return 0 if number % self.cores_per_chip else number // self.cores_per_chip

  def shape(self, chips: int) -> tuple[int, ...] | None:
    """The default topology of `chips` chips; None if no slice has that size."""
    for shape in self.shapes:
      if math.prod(shape) == chips:
        return shape
    if self.dimensions == 3 and chips % 64 == 0 and 64 < chips <= self.max_chips:
      return tuple(4 * n for n in _cubes(chips // 64))
    return None

  def names(self) -> list[str]:
    """The names of the common sizes, small to large."""
    chips = sorted(math.prod(s) for s in self.shapes)
    while self.dimensions == 3 and 2 * chips[-1] <= self.max_chips:
      chips.append(2 * chips[-1])
    factor = self.cores_per_chip if self.named_by_cores else 1
    return [f"{self.name}-{c * factor}" for c in chips]


def _cubes(n: int) -> tuple[int, int, int]:
  """n = a·b·c with a ≤ b ≤ c and the least a + b + c: the most compact block of 4×4×4 cubes."""
  found = (1, 1, n)
  for a in range(1, round(n ** (1 / 3)) + 1):
    if n % a:
      continue
    for b in range(a, math.isqrt(n // a) + 1):
      if n // a % b == 0 and a + b + n // a // b < sum(found):
        found = (a, b, n // a // b)
  return found


_PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))

GENERATIONS = {
  g.name: g
  for g in (
    Generation(
      name="v4",
      cores_per_chip=2,
      devices_per_chip=1,
      named_by_cores=True,
      chips_per_host=4,
      chips_of_one_host=4,
      hbm_bytes=32 * GIB,
      hbm_bandwidth=1200e9,
      peak_flops=275e12,
      ici_links=6,
      ici_link_bandwidth=50e9,
      dcn_bandwidth=6.25e9,
      accelerator="v4",
      runtime_version="tpu-ubuntu2204-base",
      max_chips=4096,
      shapes=_CUBE,
    ),
    Generation(
      name="v5e",
      cores_per_chip=1,
      devices_per_chip=1,
      named_by_cores=False,
      chips_per_host=4,
      chips_of_one_host=8,
      hbm_bytes=16 * GIB,
      hbm_bandwidth=819e9,
      peak_flops=197e12,
      ici_links=4,
      ici_link_bandwidth=50e9,
      dcn_bandwidth=3.125e9,
      accelerator="v5litepod",
      runtime_version="v2-alpha-tpuv5-lite",
      max_chips=256,
      shapes=_PLANE,
    ),
    Generation(
      name="v5p",
      cores_per_chip=2,
      devices_per_chip=1,
      named_by_cores=True,
      chips_per_host=4,
      chips_of_one_host=4,
      hbm_bytes=95 * GIB,
      hbm_bandwidth=2765e9,
      peak_flops=459e12,
      ici_links=6,
      ici_link_bandwidth=100e9,
      dcn_bandwidth=6.25e9,
      accelerator="v5p",
      runtime_version="v2-alpha-tpuv5",
      max_chips=6144,
      shapes=_CUBE,
    ),
    Generation(
      name="v6e",
      cores_per_chip=1,
      devices_per_chip=1,
      named_by_cores=False,
      chips_per_host=4,
      chips_of_one_host=8,
      hbm_bytes=32 * GIB,
      hbm_bandwidth=1638e9,
      peak_flops=918e12,
      ici_links=4,
      ici_link_bandwidth=100e9,
      dcn_bandwidth=12.5e9,
      accelerator="v6e",
      runtime_version="v2-alpha-tpuv6e",
      max_chips=256,
      shapes=_PLANE,
    ),
    Generation(
      name="tpu7x",
      cores_per_chip=2,
      devices_per_chip=2,
      named_by_cores=True,
      chips_per_host=4,
      chips_of_one_host=4,
      hbm_bytes=192 * GIB,
      hbm_bandwidth=7380e9,
      peak_flops=2307e12,
      ici_links=6,
      ici_link_bandwidth=100e9,
      dcn_bandwidth=12.5e9,
      accelerator="tpu7x",
      runtime_version=None,
      max_chips=9216,
      shapes=_CUBE,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """`slices` equal slices of `chips` chips each, every one wired as `shape`."""

  generation: Generation
  chips: int  # per slice
  slices: int
  shape: tuple[int, ...]

  @property
  def number(self) -> int:
    """What stands behind the dash of the name."""
    g = self.generation
    return self.chips * (g.cores_per_chip if g.named_by_cores else 1)

  @property
  def name(self) -> str:
    return f"{f'{self.slices}x' if self.slices > 1 else ''}{self.generation.name}-{self.number}"

  @property
  def topology(self) -> str:
    return "x".join(map(str, self.shape))

  @property
  def accelerator_type(self) -> str:
    """What gcloud calls one of the slices."""
    return f"{self.generation.accelerator}-{self.number}"

  @property
  def hosts(self) -> int:
    """Virtual machines of one slice."""
    g = self.generation
    return 1 if self.chips <= g.chips_of_one_host else self.chips // g.chips_per_host

  @property
  def devices(self) -> int:
    """JAX devices of all slices together."""
    return self.slices * self.chips * self.generation.devices_per_chip

  @property
  def hbm_bytes_per_device(self) -> int:
    return self.generation.hbm_bytes // self.generation.devices_per_chip


_NAME = re.compile(r"(?:(\d+)x)?(v5litepod|tpu7x|v\d+[a-z]*)(?:-(\d+)|:(\d+(?:x\d+){1,2}))")
_ALIASES = {"v5litepod": "v5e"}


def parse(text: str) -> Slice:
  """`v5e-256`, `v5p-128`, `2xv5p-128` or, with a shape of one's own, `v5p:4x4x8`.

  Raises InputError on any other name, with near ones.
  """
  match = _NAME.fullmatch(text.strip().lower()) if isinstance(text, str) else None
  kind = match and _ALIASES.get(match[2], match[2])
  if not match or kind not in GENERATIONS:
    raise InputError(f"{text!r} is not a TPU this project knows; {_near(text)}")
  generation, slices = GENERATIONS[kind], int(match[1] or 1)
  if slices < 1:
    raise InputError(f"{text!r} asks for {slices} slices; there must be at least one")
  if match[4]:
    shape = tuple(map(int, match[4].split("x")))
    return Slice(generation, _checked(generation, shape, text), slices, shape)
  chips = generation.chips(int(match[3]))
  shape = generation.shape(chips)
  if shape is None:
    unit = "TensorCores, 2 a chip" if generation.named_by_cores else "chips"
    raise InputError(
      f"{text!r} is not a size of {kind}, whose names count {unit}; {_near(text, generation)}"
    )
  return Slice(generation, chips, slices, shape)


def _checked(generation: Generation, shape: tuple[int, ...], text: str) -> int:
  """The chips of a shape that someone wrote out; raises InputError where no slice is wired so."""
  chips = math.prod(shape)
  cubes = len(shape) == 3 and all(n > 0 and n % 4 == 0 for n in shape)
  if shape in generation.shapes or (
    generation.dimensions == 3 and cubes and chips <= generation.max_chips
  ):
    return chips
  known = ", ".join("x".join(map(str, s)) for s in generation.shapes)
  more = " or multiples of 4 in each of three dimensions" if generation.dimensions == 3 else ""
  raise InputError(f"{text!r}: no {generation.name} slice has this shape; there are {known}{more}")


def _near(text, generation: Generation | None = None) -> str:
  among = [generation] if generation else GENERATIONS.values()
  names = [name for g in among for name in g.names()]
  wanted = re.sub(r"^\d+x(?=v|tpu)", "", str(text).lower()).replace("v5litepod", "v5e")
  near = difflib.get_close_matches(wanted, names, n=4, cutoff=0.6)
  if near and not generation:
    return f"did you mean {' or '.join(near)}?"
  return f"known are {', '.join(names if generation else (g.names()[3] for g in among))}"
