"""TPU topologies that need not exist, for the compiler to compile for."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from concat_jax.core.config import check_choice
from concat_jax.training.sharding import mesh_of

# What libtpu asks of its surroundings before it describes a topology it does not run on. It opens
# no chip, so that another process may have it too.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Memory of a chip in bytes, by the platform part of a topology's name (Google Cloud's TPU pages).
HBM_BYTES = {"v4": 32e9, "v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_CUBES |= {256: "4x8x8", 512: "8x8x8"}
# Accelerator types as Google Cloud rents them -> topologies. Of v4 and v5p they count cores, two a
# chip, which JAX sees as one device.
SLICES = {f"{kind}-{n}": f"{kind}:{shape}" for kind in ("v5e", "v6e") for n, shape in _FLAT.items()}
SLICES |= {
    f"{kind}-{2 * n}": f"{kind}:{shape}" for kind in ("v4", "v5p") for n, shape in _CUBES.items()
}


def topology_of(name: str) -> str:
    """libtpu's name of a topology, as "v5e:4x4", from that or from an accelerator type, "v5e-16".

    "v5litepod-16" is the same. Raises ValueError for a type that there is not, naming the nearest.
    """
    if ":" in name:
        return name
    name = name.replace("v5litepod", "v5e")
    check_choice(name, SLICES, "There is no TPU slice")
    return SLICES[name]


def make_topology_mesh(topology: str, fsdp: int = 1) -> Mesh:
    """The training mesh over the chips of a topology that need not exist, such as "v5e:16x16".

    Raises ValueError as `mesh_of`, or if libtpu is not installed or does not know the topology.
    """
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(
            'The TPU compiler is not installed; run `pip install "jax[tpu]"` (Linux, x86-64).'
        ) from None
    kind, _, shape = topology.partition(":")
    options: dict[str, Any] = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # else each core is a device
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        check_choice(topology, SLICES.values(), "libtpu knows no topology")
        says = str(error).splitlines()[0]
        raise ValueError(f"libtpu cannot describe {topology}: {says}") from error
    return mesh_of(devices, fsdp)
