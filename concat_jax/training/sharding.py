"""One mesh for every stage, data x fsdp: the batch is split over both, parameters over fsdp."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from concat_jax.core.runtime import FUSION_MB

AXES = ("data", "fsdp")
# Numbers of the smallest array that is split. Norms and biases stay whole: of R50's segmentor they
# are 437 of 627 arrays, each of which would be a collective of its own, and 0.4 % of the numbers.
MIN_SPLIT = 4096


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Section `mesh` of a config: of `make_mesh`, and what a fusion of a training step may fill.

    `fusion_mb` is as of `step_compiler_options`.
    """

    devices: int = 0
    fsdp: int = 1
    fusion_mb: int = FUSION_MB


def make_mesh(devices: int = 0, fsdp: int = 1) -> Mesh:
    """The mesh of the first `devices` devices, all of them for 0, as `mesh_of` lays them out.

    Raises ValueError if there are fewer.
    """
    available = jax.devices()
    if devices > len(available):
        raise ValueError(
            f"A mesh of {devices} devices does not fit the {len(available)} devices at hand; "
            "change config.mesh.devices."
        )
    return mesh_of(available[: devices or len(available)], fsdp)


def mesh_of(devices: Sequence[jax.Device], fsdp: int = 1) -> Mesh:
    """Mesh ("data", "fsdp") of Auto axes; neighbours, which links join best, are along "fsdp".

    Raises ValueError if `fsdp` does not divide their number.
    """
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"Parameters cannot be split over config.mesh.fsdp = {fsdp} of {len(devices)} devices; "
            f"set --config.mesh.fsdp={max(math.gcd(fsdp, len(devices)), 1)} or another divisor."
        )
    types = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.asarray(devices).reshape(-1, fsdp), AXES, axis_types=types)


def check_batch_size(size: int, mesh: Mesh, where: str) -> None:
    """ValueError for a batch that the mesh's devices cannot share evenly; `where` says its key."""
    if size % mesh.size:
        raise ValueError(
            f"The batch of {size} cannot be split over {mesh.size} devices; set "
            f"--{where}={-(-size // mesh.size) * mesh.size} or another multiple."
        )


def split_by_rule(tree: Any, mesh: Mesh) -> Any:
    """Where the arrays of a tree of parameters, or of an optimizer's state, lie: NamedShardings.

    Of an array of `MIN_SPLIT` numbers the largest dimension that the axis "fsdp" divides is split
    over it; any other is replicated. The arrays may be abstract.
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % parts == 0]
        if parts == 1 or math.prod(leaf.shape) < MIN_SPLIT or not axes:
            return replicated(mesh)
        split = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * split, "fsdp"))

    return jax.tree.map(sharding, tree)


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
