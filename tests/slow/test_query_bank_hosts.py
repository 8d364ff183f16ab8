"""A query bank extracted by two processes that share a folder, as hosts of a cluster do."""

import pathlib
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Global batches of four images, two of them a host's own. Image i has queries and labels i.
HOST = """
import sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from concat_jax.stages.bank_files import BankConfig, fill_bank
from concat_jax.training.sharding import make_mesh, shard_batch
from pathlib import Path

folder, index, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
assert jax.process_count() == 2
mesh = make_mesh()
repeat = jax.jit(lambda x: jax.numpy.broadcast_to(x[:, None, None], (4, 3, 2)))
asked = []

def extract(batch):
    with jax.set_mesh(mesh):
        queries = repeat(shard_batch(batch, mesh)["image"])
    return multihost_utils.process_allgather((queries, queries[..., 0]), tiled=True)

def batches(steps):
    asked.extend(steps)
    first = [4 * step + 2 * index for step in steps]
    return ({"image": np.arange(x, x + 2, dtype=np.float32)} for x in first)

queries, labels = fill_bank(
    folder, {}, extract, batches, num_batches=5, batch_size=4, config=BankConfig("float16", 4),
    progress=lambda done, total: lambda done: None, process_index=index, process_count=2)
assert (queries[np.arange(20)] == np.arange(20)[:, None, None]).all(), queries[np.arange(20)]
assert (labels == np.arange(20)[:, None]).all(), labels
print("asked", *asked)
"""


def run_hosts(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(folder), str(index), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,  # where Python finds the packages
        )
        for index in range(2)
    ]
    try:
        printed = [host.communicate(timeout=900)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(printed)
    return [[line for line in text.splitlines() if "asked" in line] for text in printed]


def test_two_hosts_fill_one_bank_and_go_on_with_what_is_missing(tmp_path):
    assert run_hosts(tmp_path) == [["asked 0 1 2 3 4"]] * 2
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 5
    for shard in shards[1:3]:  # one of either host
        shard.unlink()
    assert run_hosts(tmp_path) == [["asked 1 2"]] * 2
