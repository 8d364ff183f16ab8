"""Time and memory of FC-CLIP (R50, 800 x 800), ours beside its modules, by number of names.

    python -m tests.golden.time_fcclip CHECKOUT

Random weights, 250 queries, networks and names without post-processing, texts embedded before, each
side in a process of its own; CHECKOUT and what has to be installed are as for `make_fcclip`.
"""

import multiprocessing
import resource
import statistics
import sys
import time

import numpy as np

from tests.golden import cases

NAMES, SIDE, CALLS = (20, 150, 847, 5000), 800, 3
CONFIG = cases.FCCLIPS["fcclip_r50"] | {"num_queries": 250}


def measure(call) -> float:
    """Median seconds after a call to warm up."""
    call()
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def texts(count: int) -> np.ndarray:
    found = np.random.default_rng(count).normal(size=(count, CONFIG["embed_dim"]))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def theirs(checkout: str) -> None:
    import torch

    from tests.golden import make_fcclip

    make_fcclip.prepare(checkout)
    cases.FCCLIPS["fcclip_r50"] = CONFIG
    reference = make_fcclip.model("fcclip_r50")
    reference.semantic_on = reference.panoptic_on = False
    image = torch.from_numpy(cases.fcclip_image((SIDE, SIDE)).transpose(2, 0, 1).copy()).float()
    for count in NAMES:
        reference.test_text_classifier = torch.from_numpy(texts(count))
        reference.test_num_templates = [1] * count
        reference.category_overlapping_mask = torch.zeros(count, dtype=torch.long)
        with torch.no_grad():
            report("FC-CLIP's modules", count, measure(lambda: reference([{"image": image}])))


def ours(_: str) -> None:
    import jax
    import jax.numpy as jnp

    from concat_jax.inference.heads import EnsembleHead
    from concat_jax.inference.programs import Network, run_segmentor
    from concat_jax.models.segmentor import make_segmentor
    from concat_jax.models.semantic_projector import SemanticProjector

    module = make_segmentor({"kind": "fcclip", "clip": {"variant": "RN50"}})
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    network, image = Network(params, module), cases.fcclip_image((SIDE, SIDE))[None]
    projector = SemanticProjector(joint_width=CONFIG["embed_dim"], hidden_width=256)
    zeros = jnp.zeros((1, 1, 256)), jnp.asarray(texts(2))
    params = projector.init(jax.random.key(1), *zeros, method="predict")["params"]
    name = jax.jit(lambda head, queries: head(queries).class_probs)
    size, how = np.array([[SIDE, SIDE]]), {"is_padded": False, "canvas": (SIDE, SIDE)}
    for count in NAMES:
        head = EnsembleHead(
            params=params, text=jnp.asarray(texts(count)), is_name=None, training_text=None,
            projector=projector, is_seen=jnp.zeros(count, bool), scale=jnp.float32(100),
            needs_places=True,
        )  # fmt: skip

        def call(head=head):
            masks, queries = run_segmentor(network, image, size, **how)
            jax.block_until_ready((masks, name(head, queries)))

        report("ours", count, measure(call))


def report(side: str, count: int, seconds: float) -> None:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{side}, {count} names: {seconds:.2f} s, at most {most:.2f} GB so far", flush=True)


if __name__ == "__main__":
    for side in (ours, theirs):
        process = multiprocessing.get_context("spawn").Process(target=side, args=sys.argv[1:])
        process.start()
        process.join()
