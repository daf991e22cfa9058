"""Arrays on a mesh: examples spread over its axis `data`, everything else on each of its devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh whose shardings the compiler chooses, whatever kind its axes are of (`jax.make_mesh` makes explicit ones).

    Raises:
      TypeError: it is no mesh.
      ValueError: it has no axis `data`.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r} is a {type(mesh).__name__}. Write jax.make_mesh((jax.device_count(),), ('data',)).")
    if mesh is not None and AXIS not in mesh.axis_names:
        raise ValueError(f"mesh: its axes are {mesh.axis_names}. Call one 'data', as jax.make_mesh((jax.device_count(),), ('data',)) does.")
    return None if mesh is None else Mesh(mesh.devices, mesh.axis_names)


def over_examples(mesh: Mesh) -> NamedSharding:
    """Axis 0 is cut into as many parts as the mesh's axis `data` is long."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def spread(mesh: Mesh | None, array: np.ndarray, batch_size: int = 1) -> jax.Array:
    """An array of examples, a part of it on each device; the last example again until batches of this size can be shared out evenly."""
    count = len(array) + -len(array) % (parts(mesh) * batch_size)

    def rows(start: int, stop: int) -> np.ndarray:
        return array[start:stop] if stop <= len(array) else array[np.minimum(np.arange(start, stop), len(array) - 1)]

    if mesh is None:
        return jnp.asarray(rows(0, count))
    return jax.make_array_from_callback((count, *array.shape[1:]), over_examples(mesh), lambda index: rows(*index[0].indices(count)[:2]))


def parts(mesh: Mesh | None) -> int:
    """How many batches pass at once: one on each device along `data`."""
    return 1 if mesh is None else mesh.shape[AXIS]


def side_by_side(mesh: Mesh | None, run: Callable, sharded: tuple[bool, ...]) -> Callable:
    """`run` for one batch on each device along `data`, each by itself: what it makes of a batch is what one device would, bit for bit.

    `sharded`: of each argument, whether its axis 0 is examples, of `parts` batches then, as results' is; the others are whole on each device.
    """
    if mesh is None:
        return run
    specs = tuple(PartitionSpec(AXIS) if s else PartitionSpec() for s in sharded)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)


def each_batch(mesh: Mesh | None, run: Callable, sharded: tuple[bool, ...]) -> Callable:
    """`side_by_side` for what `run` makes of a batch as a whole, as sums: of each device's batch, on a first axis of its own."""
    return side_by_side(mesh, lambda *arguments: jax.tree.map(lambda a: jnp.asarray(a)[None], run(*arguments)), sharded)


def gathered(mesh: Mesh | None, array: jax.Array, count: int | None = None) -> np.ndarray:
    """The first `count` of an array of examples, or all, on this process's host."""
    count = array.shape[0] if count is None else count
    if mesh is None or array.is_fully_addressable:
        return np.asarray(array)[:count] if mesh is None else _of_shards(array, count)
    return np.asarray(_everywhere(mesh, count, array).addressable_data(0))


def _of_shards(array: jax.Array, count: int) -> np.ndarray:
    found = np.empty((count, *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        start, stop, _ = shard.index[0].indices(array.shape[0])
        if start < count:
            found[start:stop] = np.asarray(shard.data)[: count - start]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _everywhere(mesh: Mesh, count: int, array):
    return replicated(mesh, array[:count])


def replicated(mesh: Mesh, tree: Any) -> Any:
    """In a compiled program: all of each array on each device."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def everywhere(mesh: Mesh | None, tree: Any) -> Any:
    """A tree of arrays, all of it on each device."""
    return tree if mesh is None else jax.tree.map(lambda a: _copied(mesh, a), tree)


def _copied(mesh: Mesh, array: Any) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_copied(mesh, jax.random.key_data(array)), impl=jax.random.key_impl(array))
    sharding = NamedSharding(mesh, PartitionSpec())
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def here(mesh: Mesh | None, tree: Any) -> Any:
    """A tree that is on each device, on the first one of this process."""
    return tree if mesh is None else jax.tree.map(lambda a: jnp.asarray(np.asarray(a.addressable_data(0))), tree)
