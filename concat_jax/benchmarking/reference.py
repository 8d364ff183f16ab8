"""The reference's side: transformers' Mask2Former or EoMT in PyTorch, with the same weights.

The only module of the package that imports PyTorch, and only inside functions.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from concat_jax.benchmarking import cases
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Work
from concat_jax.models.segmentor_output import IMAGENET_MEAN, IMAGENET_STD
from concat_jax.training.optimizer import OptimizerConfig


def is_installed() -> bool:
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("torch", "transformers"))


def works(case: Case) -> dict[str, Work]:
    """ "forward", "postprocess" or "train" by a Hugging Face folder's weights."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    transformers.logging.set_verbosity_error()  # of the batch norms' counters, which are not ours
    transformers.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, case.dtype)
    network = transformers.AutoModelForUniversalSegmentation.from_pretrained(case.model)
    # Evaluation mode: the batch norms keep their statistics, as training from ImageNet does.
    network = network.to(device).eval()
    if hasattr(network, "attn_mask_probs"):  # of EoMT: what share of queries each block masks
        network.attn_mask_probs.fill_(float(case.task == "train"))
    autocast = torch.autocast(device.type, dtype, enabled=case.dtype != "float32")

    mean, std = (np.asarray(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (cases.images(case) - mean) / std
    pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    forward = torch.compile(network) if case.compiled else network
    if case.task == "forward":

        def work() -> Any:
            with torch.no_grad(), autocast:
                return forward(pixel_values=pixels)

        def read(output: Any) -> dict[str, np.ndarray]:
            return {
                "class_logits": output.class_queries_logits.float().cpu().numpy(),
                "mask_logits": output.masks_queries_logits.float().cpu().numpy(),
            }

    elif case.task == "postprocess":
        work, read = _postprocess(case, network, device)
    else:
        ids, labels = cases.segments(case, network.config.num_labels)
        values = np.arange(1, case.segments + 1)[:, None, None]
        masks = [torch.from_numpy((one == values).astype(np.float32)).to(device) for one in ids]
        classes = [torch.from_numpy(one.astype(np.int64)).to(device) for one in labels]
        settings, parameters = OptimizerConfig(), list(network.parameters())
        decay = settings.weight_decay
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=decay)

        def work() -> Any:
            optimizer.zero_grad(set_to_none=True)
            with autocast:
                output = forward(pixel_values=pixels, mask_labels=masks, class_labels=classes)
                loss = output.loss.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            return loss

        def read(loss: Any) -> dict[str, np.ndarray]:
            return {"loss": loss.detach().float().cpu().numpy()}

    flops = 0.0
    if not case.compiled and case.task == "forward":
        with FlopCounterMode(display=False) as counter:
            work()
        flops = float(counter.get_total_flops())

    start = time.perf_counter()
    if case.compiled:
        work()
        wait()
    compile_seconds = time.perf_counter() - start if case.compiled else 0.0

    def call() -> dict[str, np.ndarray]:
        output = work()
        wait()
        return read(output)

    peak = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()

        def peak() -> int:
            return torch.cuda.max_memory_allocated() - held

    name = "torch.compile" if case.compiled else "torch"
    return {name: Work(call, compile_seconds, flops, peak_bytes=peak)}


def _postprocess(case: Case, network: Any, device: Any) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerForUniversalSegmentationOutput,
    )

    logits, masks = cases.logits(case, network.config.num_queries, network.config.num_labels)
    output = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=torch.from_numpy(logits).to(device),
        masks_queries_logits=torch.from_numpy(masks).to(device),
    )
    processor = transformers.Mask2FormerImageProcessor()

    def work() -> Any:
        with torch.no_grad():
            return processor.post_process_panoptic_segmentation(
                output,
                threshold=0.8,
                mask_threshold=0.5,
                overlap_mask_area_threshold=0.8,
                label_ids_to_fuse=set(),
                target_sizes=[cases.native_size(case)] * case.batch,
            )

    def read(results: Any) -> dict[str, np.ndarray]:
        for result in results:  # as ours: the maps are wanted on the host
            result["segmentation"].cpu().numpy()
        return {"segments": np.array([len(result["segments_info"]) for result in results])}

    return work, read
