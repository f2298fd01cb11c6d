"""What every phase does first and last: devices, workdir, model in, checkpoint out."""

import dataclasses
import pathlib
from typing import Any

import jax

from align_jax import config as config_lib
from align_jax import hosts, models, sharding
from align_jax.errors import InputError
from align_jax.phases import reward_heads
from align_jax.phases.reward_heads import RewardHead
from align_jax.phases.sections import LoraConfig, ModelSection, ScratchConfig
from align_jax.training import checkpoints, workdir


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model with its weights on the mesh; `head` only for reward models."""

  model: models.Transformer
  params: Any
  tokenizer: Any
  head: Any = None
  step: int | None = None  # of the checkpoint it came from


AVERAGE = (
  "average:"  # of the weights of reward models: "average:runs/ensemble", "average:runs/a,runs/b"
)


def load(
  init: str, mesh, *, dtype: str = "float32", remat: str = "none", attention: str = "auto"
) -> Loaded:
  """The model that `init` names: a finished phase's workdir (adapters merged), a folder or a name.

  Of an ensemble on one trunk, the model of its mean reward.
  """
  if init.startswith(AVERAGE):
    sources = init.removeprefix(AVERAGE).split(",")
    return _averaged([m for part in sources for m in load_members(part, mesh, dtype=dtype)], init)
  if not (pathlib.Path(init) / "model.json").exists():
    model, params = models.load_pretrained(init, dtype="float32", mesh=mesh)
    model = compute_as(model, mesh, dtype, remat, attention)
    return Loaded(model, params, models.load_tokenizer(init))
  members = load_members(init, mesh, dtype=dtype, remat=remat, attention=attention)
  return mean_model(members, init)


def mean_model(members: tuple[Loaded, ...], init: str) -> Loaded:
  """The one model whose reward is the members' mean; InputError where their trunks differ."""
  if len(members) == 1:
    return members[0]
  if any(member.params is not members[0].params for member in members):
    raise InputError(
      f"{init} is an ensemble of {len(members)} reward models: name it where an ensemble can be used, "
      f"or '{AVERAGE}{init}', the model of its mean weights"
    )
  mean = reward_heads.mean_of([member.head for member in members])
  return dataclasses.replace(members[0], head=mean)


@dataclasses.dataclass(frozen=True)
class Description:
  """What model.json says: which weights a workdir holds, and what they are to be added to."""

  kind: str  # policy or reward
  model: models.ModelConfig
  base: str
  lora: LoraConfig = LoraConfig()
  inside: str | None = None
  head: RewardHead | None = None


def read_description(folder: str | pathlib.Path) -> Description:
  """Reads model.json; InputError that names the file and the field at fault."""
  file = pathlib.Path(folder) / "model.json"
  return config_lib.build(Description, workdir.read_json(file), str(file))


def load_members(
  init: str, mesh, *, dtype: str = "float32", remat: str = "none", attention: str = "auto"
) -> tuple[Loaded, ...]:
  """The reward models of an ensemble's workdir, in order; of any other `init` the one model it is."""
  folder = pathlib.Path(init)
  if init.startswith(AVERAGE) or not (folder / "model.json").exists():
    return (load(init, mesh, dtype=dtype, remat=remat, attention=attention),)
  if not workdir.is_finished(folder):
    raise InputError(f"{init} is a run that has not finished: run its command again first")
  description = read_description(folder)
  model = compute_as(models.Transformer(description.model), mesh, dtype, remat, attention)
  tokenizer = models.load_tokenizer(str(folder / "tokenizer"))
  return tuple(
    Loaded(model, params, tokenizer, head, step)
    for params, head, step in _read_weights(folder, description, model, mesh)
  )


def member_count(init: str) -> int:
  """How many reward models the workdir `init` holds, without loading any."""
  head = read_description(init).head
  return (head.members if head else 0) or 1


def _averaged(members: list[Loaded], init: str) -> Loaded:
  """WARM: the reward model of the mean weights, heads included (Rame et al. 2024, 2401.12187)."""
  first = members[0]
  if len(members) < 2 or any(m.head is None for m in members):
    raise InputError(f"{init!r} must name two reward models or more, or an ensemble of them")
  for other in members[1:]:
    if other.model.config != first.model.config:
      raise InputError(f"{init!r}: the reward models differ in shape: their weights have no mean")
    same_vocabulary(first, other, init)
  mean = reward_heads.mean_of([{"params": m.params, "head": m.head} for m in members])
  return dataclasses.replace(first, **mean, step=None)


def _read_weights(folder, description, model, mesh):
  """[(params, head, step)]: one model, or the members of an ensemble; head None for a policy."""
  has_head = description.kind == "reward"
  lora, found = description.lora, description.head or RewardHead()
  name = "lora" if lora.rank else "trunk"
  abstract = abstract_lora(model, lora, mesh) if lora.rank else abstract_params(model, mesh)
  if has_head:
    abstract = {name: abstract, "head": abstract_head(model, mesh, found.width)}
    if found.stacked:
      abstract = stacked(abstract, found.stacked)
  step = checkpoints.latest_step(folder)
  inside = description.inside
  weights = checkpoints.load_params(folder, {inside: abstract} if inside else abstract, step=step)
  weights = weights[inside] if inside else weights
  base = frozen_base(load(description.base, mesh), lora, mesh).params if lora.rank else None
  if not has_head:
    return [(_merged(base, weights, lora), None, step)]
  return [(params, head, step) for params, head in reward_models(base, weights, lora, found)]


def reward_models(base, trained, lora: LoraConfig, found: RewardHead) -> list[tuple[Any, Any]]:
  """(trunk, head) of every member of what was trained; one and the same trunk where they share it."""
  own = trained["lora" if lora.rank else "trunk"]
  if found.stacked:
    trunks = [_merged(base, _member(own, i), lora) for i in range(found.stacked)]
  else:
    trunks = [_merged(base, own, lora)] * max(1, found.members)
  heads = [reward_heads.one_reward(trained["head"], found, i) for i in range(len(trunks))]
  return list(zip(trunks, heads))


def _member(tree, number: int):
  return jax.tree.map(lambda x: x[number], tree)


def _merged(base, trained, lora: LoraConfig):
  return models.merge_lora(base, trained, lora.scale) if lora.rank else trained


def stacked(abstract, count: int):
  """Shapes, types and placements of `count` such trees side by side on axis 0."""

  def one(x):
    spec = jax.sharding.PartitionSpec(None, *x.sharding.spec)
    placed = jax.sharding.NamedSharding(x.sharding.mesh, spec)
    return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=placed)

  return jax.tree.map(one, abstract)


def start(section: ModelSection, mesh, *, seed: int) -> Loaded:
  """The policy a phase begins with: loaded, or random with the scratch section's shape."""
  if section.scratch is None:
    loaded = load(
      section.init, mesh, dtype=section.dtype, remat=section.remat, attention=section.attention
    )
    if loaded.head is not None:
      raise InputError(f"model.init: {section.init} is a reward model; a policy is needed")
    return frozen_base(loaded, section.lora, mesh)
  tokenizer = _scratch_tokenizer(section.scratch)
  config = scratch_config(section.scratch, len(tokenizer))
  model = models.Transformer(config)
  model = compute_as(model, mesh, section.dtype, section.remat, section.attention)
  return Loaded(model, new_params(model, mesh, seed), tokenizer)


def frozen_base(loaded: Loaded, lora: LoraConfig, mesh) -> Loaded:
  """The weights, or their shapes, in the type in which they rest under adapters; itself if they are."""
  if lora.base_dtype == "float32":
    return loaded
  shapes = jax.eval_shape(models.quantise_base, loaded.params)
  if jax.tree.structure(shapes) == jax.tree.structure(loaded.params):
    return loaded  # a value model may start from the policy's base: it is held once
  where = sharding.tree_shardings(models.logical_axes(loaded.model), shapes, mesh)
  if isinstance(jax.tree.leaves(loaded.params)[0], jax.ShapeDtypeStruct):
    return dataclasses.replace(loaded, params=_placed(shapes, where))
  quantise = jax.jit(models.quantise_base, out_shardings=where)
  return dataclasses.replace(loaded, params=quantise(loaded.params))


def tokenizer_of(section: ModelSection):
  """The tokenizer alone, so that records are checked and tokenised before any weight is loaded."""
  if section.scratch is not None:
    return _scratch_tokenizer(section.scratch)
  folder = pathlib.Path(section.init)
  return models.load_tokenizer(
    str(folder / "tokenizer") if (folder / "model.json").exists() else section.init
  )


def scratch_config(scratch: ScratchConfig, vocab_size: int) -> models.ModelConfig:
  """The Llama config of a scratch section; sizes were checked when the section was built."""
  return models.ModelConfig(
    vocab_size=vocab_size,
    embed_dim=scratch.embed_dim,
    num_layers=scratch.layers,
    num_heads=scratch.heads,
    num_kv_heads=scratch.kv_heads,
    head_dim=scratch.embed_dim // scratch.heads,
    mlp_dim=scratch.mlp_dim,
    max_length=scratch.max_length,
    tie_embeddings=False,
  )


def _scratch_tokenizer(scratch: ScratchConfig):
  if scratch.tokenizer == "microworld":
    from align_jax import worlds

    return worlds.Microworld().tokenizer()
  return models.load_tokenizer(scratch.tokenizer)


def check_batch(rows: int, accumulate: int, mesh):
  """Raises InputError unless a batch splits evenly into microbatches and over the mesh."""
  ways = sharding.batch_ways(mesh)
  if accumulate < 1 or rows % (accumulate * ways):
    raise InputError(
      f"a batch of {rows} rows does not split into accumulate = {accumulate} parts over "
      f"{ways} devices (mesh data x fsdp)"
    )


def same_vocabulary(policy: Loaded, other: Loaded, name: str):
  """Raises InputError unless `other` reads the policy's tokens as the policy means them."""
  if policy.tokenizer.get_vocab() != other.tokenizer.get_vocab():
    raise InputError(f"{name} has another vocabulary than the policy: it cannot score its tokens")


def compute_as(model, mesh, dtype: str, remat: str, attention: str = "auto"):
  """The module with activations of that type, rematerialised and attending so, split over the mesh."""
  how = dict(dtype=dtype, remat=remat, attention_impl=attention)
  try:
    config = dataclasses.replace(model.config, **how)
  except ValueError as error:
    raise InputError(f"model: {error}") from error
  return model.clone(config=config, mesh=mesh)


def param_shardings(model, mesh):
  return sharding.tree_shardings(models.logical_axes(model), models.abstract_params(model), mesh)


def _placed(abstract, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )


def new_params(model, mesh, seed: int):
  """Random weights, each made where it belongs on the mesh."""
  init = jax.jit(
    lambda key: models.init_params(model, key), out_shardings=param_shardings(model, mesh)
  )
  return init(jax.random.key(seed))


def abstract_params(model, mesh):
  """Shapes, types and shardings of the weights: what a checkpoint or an AOT compile is given."""
  return _placed(models.abstract_params(model), param_shardings(model, mesh))


def abstract_lora(model, lora: LoraConfig, mesh):
  """Adapters are small: one copy on every device."""
  shapes = jax.eval_shape(lambda key: init_lora(model, lora, key), jax.random.key(0))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), shapes
  )


def init_lora(model, lora: LoraConfig, key):
  return models.init_lora(key, model, rank=lora.rank, targets=lora.targets)


def new_lora(model, lora: LoraConfig, mesh, seed: int):
  init = jax.jit(lambda key: init_lora(model, lora, key), out_shardings=sharding.replicated(mesh))
  return init(jax.random.key(seed))


def abstract_head(model, mesh, outputs: int | None = None):
  shapes = jax.eval_shape(lambda key: init_head(model, key, outputs), jax.random.key(0))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), shapes
  )


def init_head(model, key, outputs: int | None = None):
  return models.init_scalar_head(key, model.config.embed_dim, outputs)


def new_head(model, mesh, seed: int, outputs: int | None = None):
  init = jax.jit(
    lambda key: init_head(model, key, outputs), out_shardings=sharding.replicated(mesh)
  )
  return init(jax.random.key(seed))


def single_process(what: str):
  """Raises InputError on several hosts, for what works within one process only."""
  if jax.process_count() > 1:
    raise InputError(f"{what} works within one process; several hosts are not supported yet")


def describe(
  folder: pathlib.Path,
  loaded: Loaded,
  section: ModelSection,
  kind: str,
  inside: str | None = None,
  head: RewardHead | None = None,
):
  """Writes model.json and the tokenizer, so that the next phase needs nothing but this folder.

  `inside` names the part of the trained parameters that is the policy, if there are others; `head`
  says what a reward model's head means.
  """
  if jax.process_index() != 0:
    return
  base = pathlib.Path(section.init)
  workdir.write_json(
    folder / "model.json",
    {
      "kind": kind,
      "model": dataclasses.asdict(loaded.model.config),
      "lora": dataclasses.asdict(section.lora),
      "base": str(base.absolute()) if base.exists() else section.init,
      "inside": inside,
      "head": head and dataclasses.asdict(head),
    },
  )
  loaded.tokenizer.save_pretrained(str(folder / "tokenizer"))


def parents(**roles: tuple[str, Loaded]) -> tuple[dict[str, Any], ...]:
  """Lineage entries `{"role", "path", "step"}` of `role=(init, loaded)`; scratch has no parent."""
  return tuple(
    {"role": role, "path": init, "step": loaded.step}
    for role, (init, loaded) in roles.items()
    if init != "scratch"
  )


@dataclasses.dataclass(frozen=True)
class Lineage:
  """What a checkpoint was made from; inside it while the phase runs, beside it when it is done."""

  phase: str
  parents: tuple[dict[str, Any], ...]
  data_fingerprint: str

  def metadata(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"parents": [dict(p) for p in self.parents]}

  def write(self, folder: pathlib.Path, step: int):
    workdir.write_lineage(folder, step=step, **dataclasses.asdict(self))
    hosts.wait("phase finished")  # the next one reads what only the first host has written
