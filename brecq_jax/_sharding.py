"""Arrays on a mesh: examples spread over its axis `data`, everything else on each of its devices."""

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


def spread(mesh: Mesh | None, array: np.ndarray) -> jax.Array:
    """An array of examples, a part of it on each device; the last example again until they can be shared out evenly."""
    if mesh is None:
        return jnp.asarray(array)
    missing = -len(array) % mesh.shape[AXIS]
    array = np.concatenate([array, array[-1:].repeat(missing, 0)]) if missing else np.asarray(array)
    return jax.make_array_from_callback(array.shape, over_examples(mesh), lambda index: array[index])


def everywhere(mesh: Mesh | None, tree: Any) -> Any:
    """A tree of arrays, all of it on each device."""
    return tree if mesh is None else jax.tree.map(lambda a: _copied(mesh, a), tree)


def _copied(mesh: Mesh, array: Any) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_copied(mesh, jax.random.key_data(array)), impl=jax.random.key_impl(array))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec()), lambda index: array[index])


def here(mesh: Mesh | None, tree: Any) -> Any:
    """A tree that is on each device, on the first one of this process."""
    return tree if mesh is None else jax.tree.map(lambda a: jnp.asarray(np.asarray(a.addressable_data(0))), tree)
