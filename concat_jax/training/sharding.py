"""One mesh for every stage: the batch is split over all devices, parameters are replicated."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices: int | None = None) -> Mesh:
    """Mesh ("data", "fsdp") of Auto axes over the first `devices` devices, all by default.

    Raises:
      ValueError: if the devices cannot be split so.
    """
    available = jax.devices()
    count = devices or len(available)
    if count > len(available) or count % fsdp:
        raise ValueError(
            f"A mesh of {count} devices with fsdp={fsdp} does not fit the {len(available)} devices "
            "at hand; change config.mesh."
        )
    return Mesh(
        np.asarray(available[:count]).reshape(count // fsdp, fsdp),
        AXES,
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put a host's part of a batch on its devices.

    Args:
      batch: arrays with the batch on axis 0; each host gives its own rows.
      mesh: of `make_mesh`.

    Raises:
      ValueError: if the rows cannot be split evenly over this host's devices.
    """
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
