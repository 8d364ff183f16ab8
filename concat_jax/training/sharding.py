"""One mesh for every stage: the batch is split over all devices, parameters are replicated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The second has size 1: it is where parameters would be split.
AXES = ("data", "fsdp")


def make_mesh(devices: int = 0) -> Mesh:
    """The mesh of the first `devices` devices, all of them for 0; ValueError if there are fewer."""
    available = jax.devices()
    if devices > len(available):
        raise ValueError(
            f"A mesh of {devices} devices does not fit the {len(available)} devices at hand; "
            "change config.mesh.devices."
        )
    return mesh_of(available[: devices or len(available)])


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Mesh ("data", "fsdp") of Auto axes with all devices along the first."""
    types = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.asarray(devices).reshape(-1, 1), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def inference_mesh(mesh: Mesh, batch_size: int) -> Mesh:
    """Of this host's devices as many as a batch of its own can be split over evenly.

    Inference exchanges nothing between hosts, so that each can take images of another size and
    compile programs of its own.
    """
    local = mesh.local_devices
    return mesh_of(local[: math.gcd(batch_size, len(local))])


def copy_to_host(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are replicated over all hosts, replicated over the devices of one.

    Args:
      tree: jax.Array on every device of the mesh of which `mesh` is a part, or numpy arrays.
      mesh: of `inference_mesh`.
    """
    sharding = replicated(mesh)

    def copy(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        here = {shard.device: shard.data for shard in leaf.addressable_shards}
        copies = [here[device] for device in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(copy, tree)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a host's rows on its devices; ValueError if they cannot be split evenly."""
    local = len(mesh.local_devices)
    for name, value in batch.items():
        if len(value) % local:
            raise ValueError(
                f"Batch field {name!r} has {len(value)} rows for {local} devices; make the batch "
                "size a multiple of the device count."
            )
    sharding = along_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }
