"""Sharding: maps the logical names of tensors' axes to mesh axes.

Models and losses name the axes of a tensor ("batch", "embed", ...); a rules table maps each name to
a mesh axis, a tuple of mesh axes, or None (replicated). Nothing else in the package mentions a mesh
axis, so a new layout is a new table.

  mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 2})
  params = jax.device_put(params, param_shardings(params, mesh))
  @jax.jit
  def step(params, batch):
    with use(mesh):            # inside the traced function: `constrain` is read while tracing
      return model(...)

A parameter carries its names as flax's metadata `out_sharding`, written by `layers.Maker`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]
Names = Sequence[str | None]

MESH_AXES = ("data", "fsdp", "context", "tensor")

DEFAULT_RULES: Rules = MappingProxyType({
  # Parameters: fsdp splits the model dimension, tensor the dimension a matmul fans out to.
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  # Of a mixture of experts: split to be stored. Its model dimension cannot be split over the same axis.
  "expert": "fsdp",
  "expert_in": None,
  "vision_embed": "fsdp",
  "vision_heads": "tensor",
  "vision_mlp": "tensor",
  "patch": None,
  "norm": None,
  "rank": None,
  # Activations: rows over data and fsdp, a row's tokens over context, features over tensor. Queries
  # of attention stay where they are; keys and values are gathered.
  "batch": ("data", "fsdp"),
  "length": "context",
  "act_embed": None,
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_mlp": "tensor",
  "act_vocab": "tensor",
  "vision_rows": ("data", "fsdp", "context"),
  "patches": None,
  # Tables that are looked up by index are split by width, so that all devices look up at once.
  "lookup_batch": "data",
  "lookup_embed": "fsdp",
})
# Axes of parameters that are split to be stored, and whole where the parameter is used.
_STORED_SPLIT = ("embed", "vision_embed")

_context: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
  "axpo_sharding", default=None)


class ShardingError(ValueError):
  """A rules table, a mesh, and a tensor's names or sizes that do not fit together."""


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes data, fsdp, context, tensor (missing ones have size 1).

  Args:
    shape: size of each axis; one of them may be -1 and takes the devices that are left. If data and
      fsdp are -1 both, fsdp takes them. Where all devices are theirs, data takes `torus_side` or `gpu_hosts`
      of them first.
    devices: default all of `jax.devices()`. More devices than the shape needs are left out only
      when the list is given; with the default, every device must be used.
  Raises:
    ShardingError: unknown axis, two -1, or a product that does not fit the devices.
  """
  if unknown := sorted(set(shape) - set(MESH_AXES)):
    raise ShardingError(f"unknown mesh axes {unknown}; the mesh has {MESH_AXES}")
  sizes = {axis: int(shape.get(axis, 1)) for axis in MESH_AXES}
  if bad := {a: s for a, s in sizes.items() if s == 0 or s < -1}:
    raise ShardingError(f"mesh sizes must be positive or -1, got {bad}")
  given = devices is not None
  devices = list(jax.devices() if devices is None else devices)
  fill = [axis for axis, size in sizes.items() if size == -1]
  if fill == ["data", "fsdp"]:
    alone = sizes["context"] == sizes["tensor"] == 1
    sizes["data"] = torus_side(devices) * gpu_hosts(devices) if alone else 1
    fill = ["fsdp"]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(fill) > 1:
    raise ShardingError(f"only one mesh axis may be -1, or data and fsdp together, got {fill}")
  if fill:
    if len(devices) % known:
      raise ShardingError(f"{len(devices)} devices cannot be filled: {sizes} fixes {known} of them")
    sizes[fill[0]] = len(devices) // known
  needed = math.prod(sizes.values())
  if needed > len(devices) or (needed < len(devices) and not given):
    raise ShardingError(
      f"mesh {sizes} needs {needed} devices, there are {len(devices)}; "
      "set one axis to -1, or pass the devices to use")
  # A mesh axis need not be a product of the slice's dimensions: data=2, fsdp=32 over 4x4x4 splits one.
  grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices[:needed],
                                       allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def torus_side(devices: Sequence[jax.Device]) -> int:
  """The shortest side of a TPU slice with three sides of four chips or more; of all others 1.

  Where fsdp spans all three dimensions of such a torus, libtpu gathers weights by summing whole
  zero-padded arrays, twice the bytes. Where one side is the axis data's, it does not.
  """
  if devices[0].platform != "tpu":
    return 1
  coords = [getattr(device, "coords", ()) for device in devices]
  sides = sorted(max(axis) + 1 for axis in zip(*coords, strict=True))
  whole = len(sides) == 3 and math.prod(sides) == len(devices)
  return sides[0] if whole and sides[0] >= 4 else 1


def gpu_hosts(devices: Sequence[jax.Device]) -> int:
  """Hosts of GPUs: fsdp gathers weights in every layer, which NVLink within a host does several times as fast
  as the network. 1 on TPUs, and where each process has one GPU, since processes then say nothing of hosts."""
  hosts = len({device.process_index for device in devices})
  return hosts if devices[0].platform == "gpu" and len(devices) > hosts and len(devices) % hosts == 0 else 1


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Rules | None = None) -> Iterator[None]:
  """Makes `constrain` place tensors on `mesh` by `rules`.

  Enter it inside the function that is jitted: the constraint is read while tracing, and jax's
  cache knows nothing of this context, so a trace made outside could be reused inside. A mesh of None
  switches constraints off.
  """
  rules = DEFAULT_RULES if rules is None else rules
  if mesh is not None:
    check_rules(rules, mesh)
  token = _context.set(None if mesh is None else (mesh, rules))
  try:
    yield
  finally:
    _context.reset(token)


def current() -> tuple[Mesh, Rules] | None:
  """The mesh and rules of the innermost `use`, or None."""
  return _context.get()


def platform() -> str:
  """"cpu", "gpu" or "tpu": of the devices of the innermost `use`, which may not be here."""
  context = _context.get()
  return context[0].devices.flat[0].platform if context else jax.default_backend()


def parts(name: str, mesh: Mesh | None = None, rules: Rules | None = None) -> int:
  """Into how many parts an axis is split: on this mesh, or in the innermost `use` (1 outside)."""
  if mesh is None:
    if _context.get() is None:
      return 1
    mesh, rules = _context.get()
  return math.prod(mesh.shape[axis] for axis in _as_tuple(spec((name,), rules)[0]))


def check_rules(rules: Rules, mesh: Mesh) -> None:
  """Raises ShardingError when a rule names a mesh axis that `mesh` does not have."""
  for name, axes in rules.items():
    if missing := [a for a in _as_tuple(axes) if a not in mesh.shape]:
      raise ShardingError(
        f"rule {name!r} -> {axes!r} names {missing}; the mesh has {tuple(mesh.shape)}")


def spec(names: Names, rules: Rules | None = None) -> PartitionSpec:
  """The PartitionSpec of a tensor whose axes are called `names` (None: replicated).

  Raises:
    ShardingError: a name without a rule, or two names on one mesh axis.
  """
  rules = DEFAULT_RULES if rules is None else rules
  seen: dict[str, str] = {}
  entries = []
  for name in names:
    if name is not None and name not in rules:
      raise ShardingError(f"no rule for the logical axis {name!r}; known: {sorted(rules)}")
    axes = None if name is None else rules[name]
    for axis in _as_tuple(axes):
      if axis in seen:
        raise ShardingError(
          f"{tuple(names)}: {seen[axis]!r} and {name!r} both map to the mesh axis {axis!r}")
      seen[axis] = name
    entries.append(axes)
  return PartitionSpec(*entries)


def sharding_for(names: Names, shape: Sequence[int], mesh: Mesh, rules: Rules | None = None,
                 *, label: str = "") -> NamedSharding:
  """The NamedSharding of one tensor of `shape`.

  Args:
    label: what an error calls the tensor; default its axis names.

  Raises:
    ShardingError: mesh axes that do not divide a dimension. To replicate it instead would make every
      device compute and hold all of it, and only a profile would show that. Also if the number of
      names is not the number of dimensions, or see `spec`.
  """
  label = label or str(tuple(names))
  if len(names) != len(shape):
    raise ShardingError(f"{label}: names {tuple(names)} for shape {tuple(shape)}")
  entries = spec(names, rules)
  for name, size, axes in zip(names, shape, entries, strict=True):
    sizes = {axis: mesh.shape[axis] for axis in _as_tuple(axes) if mesh.shape[axis] > 1}
    if size % (parts := math.prod(sizes.values())):
      split = " x ".join(f"{axis}={count}" for axis, count in sizes.items())
      raise ShardingError(
        f"{label}: the axis {name!r} of size {size} cannot be split into the {parts} parts of the "
        f"mesh axes {split}; set config.mesh to sizes that divide {size}")
  return NamedSharding(mesh, entries)


def constrain(x: jax.Array, names: Names) -> jax.Array:
  """`x` with the sharding its axis names ask for; `x` itself outside `use`."""
  context = _context.get()
  if context is None:
    return x
  return jax.lax.with_sharding_constraint(x, sharding_for(names, x.shape, *context))


def local(function: Callable[..., Any], *names: Names, out: tuple[Names, ...] | None = None
          ) -> Callable[..., Any]:
  """`function`, run by every device on its own part of the arguments; itself outside `use`.

  For code that the compiler cannot split, such as kernels.

  Args:
    function: of as many arrays as there are names.
    names: of the axes of each argument. What they do not split, every device gets whole.
    out: of the axes of each array that it returns; default one like its first argument.
  """
  context = _context.get()
  if context is None:
    return function

  def mapped(*arrays):
    specs = tuple(sharding_for(n, x.shape, *context).spec for n, x in zip(names, arrays, strict=True))
    out_specs = specs[0] if out is None else tuple(spec(n, context[1]) for n in out)
    return jax.shard_map(function, mesh=context[0], in_specs=specs, out_specs=out_specs,
                         check_vma=False)(*arrays)

  return mapped


def collected(x: jax.Array, axis: int, name: str) -> jax.Array:
  """Within `local`: the whole of an axis that the rule of `name` splits. Its gradient is split again."""
  axes = _split(name)
  return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def summed(x: jax.Array, name: str) -> jax.Array:
  """Within `local`: the sum over the devices among which the rule of `name` splits an axis."""
  axes = _split(name)
  return jax.lax.psum(x, axes) if axes else x


def _split(name: str) -> tuple[str, ...]:
  """The mesh axes of more than one device that a logical axis is split over in the innermost `use`."""
  if _context.get() is None:
    return ()
  mesh, rules = _context.get()
  return tuple(axis for axis in _as_tuple(spec((name,), rules)[0]) if mesh.shape[axis] > 1)


def gather_stored(x: jax.Array, names: Names) -> jax.Array:
  """A parameter (or a cast of it) for use with larger activations: its fsdp shards are gathered.

  Without this constraint the compiler may instead contract shard by shard, and sum whole batches of activations
  over all devices.
  """
  return constrain(x, [None if name in _STORED_SPLIT else name for name in names])


def stays(kernel: jax.Array, x: jax.Array) -> bool:
  """Whether a kernel should stay sharded as it is stored, since it is much larger than what it is multiplied by.

  Then `x` and the sums are sent between devices, the sums in float32. This holds in decoding alone.
  """
  return 8 * x.size <= kernel.size


def with_stored(product: Callable[[jax.Array], jax.Array], x: jax.Array, names: Names, fan_in: int
                ) -> jax.Array:
  """product(x) with a kernel whose axes are called `names`, and which stays sharded as it is stored (see `stays`).

  `x` goes to the kernel's shards, each device multiplies its own shard for all rows, and the sums go back to
  the rows' devices. Without these constraints the compiler would gather all weights for every token.
  """
  y = product(constrain(x, (*(None,) * (x.ndim - fan_in), *names[:fan_in])))
  outputs = names[fan_in:]
  if not set(outputs) & set(_STORED_SPLIT):
    return y
  return constrain(y, (*(None,) * (y.ndim - len(outputs)), *outputs))


def put(x: Any, target: NamedSharding) -> jax.Array:
  """The array with the sharding `target`. In a run of several processes all of them pass the same values,
  and each puts only its own devices' part on them."""
  if isinstance(x, jax.Array) or target.is_fully_addressable:
    return jax.device_put(x, target)
  return jax.make_array_from_callback(np.shape(x), target, lambda index: np.asarray(x)[index])


def names_of(variable: nnx.Variable) -> tuple[str | None, ...] | None:
  """The logical axis names a variable carries (flax's `out_sharding`), or None."""
  return variable.get_metadata().get("out_sharding")


def param_shardings(abstract_state: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
  """A tree like `abstract_state` with a NamedSharding in the place of every array.

  Works on any tree whose arrays sit in nnx.Variables (parameters, gradients, optax moments);
  a bare array, such as a step counter or a key, is replicated.

  Args:
    abstract_state: arrays or jax.ShapeDtypeStruct, e.g. from `nnx.eval_shape`.
  Raises:
    ShardingError: a variable without names (unless scalar), or see `sharding_for`.
  """
  rules = DEFAULT_RULES if rules is None else rules
  check_rules(rules, mesh)

  def of(path, leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, PartitionSpec())
    label, value = path_name(path), leaf.get_value()
    if not jax.tree.leaves(value):  # optax's stand-in for a parameter that it does not update
      return leaf
    names = names_of(leaf)
    if names is None:
      if np.ndim(value):
        raise ShardingError(
          f"{label}: shape {value.shape} carries no logical names; create it with `out_sharding`")
      names = ()
    return leaf.replace(sharding_for(names, value.shape, mesh, rules, label=label))

  return jax.tree_util.tree_map_with_path(
    of, abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def local_bytes(tree: Any, dtype: Any = None) -> float:
  """Bytes of one device's part of (abstract) arrays with shardings, of their own dtype or another."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * jax.numpy.dtype(dtype or x.dtype).itemsize
                   for x in jax.tree.leaves(tree)))


def path_name(path: Sequence[Any]) -> str:
  """A jax key path as `a/b/c`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)
