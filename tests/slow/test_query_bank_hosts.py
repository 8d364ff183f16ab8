"""A query bank extracted by two processes that share a folder, as hosts of a cluster do."""

import pytest

pytestmark = pytest.mark.slow

# Global batches of four images, two of them a host's own. Image i has queries and labels i.
HOST = """
import sys
import jax
import numpy as np
from concat_jax.core.cli import join_hosts
from concat_jax.core.hosts import gathered
from concat_jax.experiment.batches import BankConfig, fill_bank
from concat_jax.training.sharding import make_mesh, shard_batch
from pathlib import Path
from types import SimpleNamespace

join_hosts(SimpleNamespace(distributed=True))
assert jax.process_count() == 2
folder, index = Path(sys.argv[1]), jax.process_index()
mesh = make_mesh()
repeat = jax.jit(lambda x: jax.numpy.broadcast_to(x[:, None, None], (4, 3, 2)))
asked = []

def extract(batch):
    with jax.set_mesh(mesh):
        queries = repeat(shard_batch(batch, mesh)["image"])
    return gathered({"queries": queries, "query_labels": queries[..., 0]})

def batches(steps):
    asked.extend(steps)
    first = [4 * step + 2 * index for step in steps]
    return ({"image": np.arange(x, x + 2, dtype=np.float32)} for x in first)

queries, labels, _ = fill_bank(
    folder, {}, extract, batches, num_batches=5, batch_size=4, config=BankConfig("float16", 4),
    process_index=index, process_count=2)
assert (queries[np.arange(20)] == np.arange(20)[:, None, None]).all(), queries[np.arange(20)]
assert (labels == np.arange(20)[:, None]).all(), labels
print("asked", *asked)
"""


def test_two_hosts_fill_one_bank_and_go_on_with_what_is_missing(run_hosts, tmp_path):
    def asked():
        printed = run_hosts("-c", HOST, str(tmp_path))
        return [[line for line in text.splitlines() if "asked" in line] for text in printed]

    assert asked() == [["asked 0 1 2 3 4"]] * 2
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 5
    for shard in shards[1:3]:  # one of either host
        shard.unlink()
    assert asked() == [["asked 1 2"]] * 2
