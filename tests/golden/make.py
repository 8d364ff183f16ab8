"""What the references say of the golden cases: torch, transformers and nothing of ours.

`python -m tests.golden.make` writes every file; tests/golden/test_files.py says whether the files
are what the references say now.
"""

import gzip
import json
import os
import pathlib
import sys
import tempfile
import types
import unittest.mock

import numpy as np

from tests.golden import cases

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BPE = "clip_bpe/bpe_simple_vocab_16e6.txt.gz"


def to_torch(images: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def give_weights(model) -> dict[str, np.ndarray]:
    """The golden weights into a model; the entry of its file that says how they are laid out."""
    import torch

    state = model.state_dict()
    layout = {
        name: list(tensor.shape)
        for name, tensor in state.items()
        if tensor.is_floating_point() and "empty_weight" not in name
    }
    with torch.no_grad():
        for name, array in cases.draw_weights(layout).items():
            state[name].copy_(torch.from_numpy(array))
    return {"layout": cases.pack_text(layout)}


def mask2former_model(name: str):
    """transformers' Mask2Former of a golden config."""
    import transformers

    config = cases.MASK2FORMERS[name]
    fields = config["backbone"]
    if fields["kind"] == "resnet":
        backbone = transformers.ResNetConfig(
            depths=list(fields["stage_sizes"]), out_features=STAGES
        )
    else:
        backbone = transformers.SwinConfig(
            embed_dim=fields["width"],
            depths=list(fields["stage_sizes"]),
            num_heads=list(fields["num_heads"]),
            window_size=fields.get("window_size", 7),
            out_features=STAGES,
        )
    return transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            backbone_config=backbone,
            encoder_layers=config["num_encoder_layers"],
            # transformers counts the prediction from the learned queries as a layer.
            decoder_layers=config["num_decoder_layers"] + 1,
            num_labels=cases.NUM_CLASSES,
        )
    ).eval()


def mask2former(name: str) -> dict[str, np.ndarray]:
    import torch

    # RGB statistics of ImageNet, as Mask2Former's image processor has them.
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = (cases.mask2former_images(name) / 255 - mean) / std
    model = mask2former_model(name)
    layout = give_weights(model)
    decoder = model.model.transformer_module.decoder
    margins = []

    def record(module, args, result):
        """How near to zero, where attention is or is not blocked, the mask logits come."""
        resized = torch.nn.functional.interpolate(result[0], args[2], mode="bilinear")
        margins.append(float(resized.abs().min() / resized.abs().max()))

    decoder.mask_predictor.register_forward_hook(record)
    with torch.no_grad():
        found = model(to_torch(images.astype(np.float32)), output_auxiliary_logits=True)
        queries = decoder.layernorm(found.transformer_decoder_last_hidden_state)
    sets = [*found.auxiliary_logits, vars(found)]
    class_logits, masks = (
        np.stack([each[key].numpy() for each in sets], axis=1)
        for key in ("class_queries_logits", "masks_queries_logits")
    )
    features = found.pixel_decoder_last_hidden_state.permute(0, 2, 3, 1).numpy()
    # Rounding must flip no bit of an attention mask; the last set's mask blocks nobody.
    print(f"{name}: the mask logit nearest to zero is {min(margins[:-1]):.1e} of the largest")
    return layout | cases.mask2former_slices(class_logits, masks, features, queries.numpy())


def clip() -> dict[str, np.ndarray]:
    import torch
    import transformers

    config = {key: value for key, value in cases.CLIP.items() if key != "model_type"}
    model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    layout = give_weights(model)
    images, tokens = cases.clip_inputs()
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=to_torch(images))
    return layout | {
        "image": found.image_embeds.numpy(),
        "text": found.text_embeds.numpy(),
        "logits": found.logits_per_image.numpy(),
    }


def clip_tables(bpe_path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """vocab.json and merges.txt in `folder`, made of OpenAI's file as its own code does."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = gzip.open(bpe_path).read().decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m.split()) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def clip_ids(tokenizer, texts: list[str]) -> np.ndarray:
    """[T, 77] ids of transformers' tokenizer."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
    )["input_ids"]


def tokens(shared_data: pathlib.Path) -> dict[str, np.ndarray]:
    import transformers

    texts = cases.HARD_TEXTS + cases.random_texts(1000)
    with tempfile.TemporaryDirectory() as folder:
        tables = clip_tables(shared_data / BPE, pathlib.Path(folder))
        ids = clip_ids(transformers.CLIPTokenizer.from_pretrained(tables), texts)
    return {"texts": cases.pack_text(texts), "ids": ids.astype(np.uint16)}


def criterion(counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Terms, the matching [L, B, G] and gradients of transformers' Mask2FormerLoss.

    It draws set by set, the last first: points for the matching of each image, then candidates and
    uniform points with one row a matched query, image by image. Ours draws each kind once an image,
    candidates and uniform points together.
    """
    import torch
    import transformers
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = transformers.Mask2FormerConfig(
        num_labels=cases.CRITERION_CLASSES, train_num_points=cases.CRITERION_POINTS
    )
    weights = {
        "loss_cross_entropy": config.class_weight,
        "loss_mask": config.mask_weight,
        "loss_dice": config.dice_weight,
    }
    loss = Mask2FormerLoss(config, weights)
    matchings = []
    loss.matcher.register_forward_hook(lambda module, args, found: matchings.append(found))
    predictions, ids, labels = cases.criterion_inputs(counts)
    matching, points = cases.criterion_draws(counts)
    num_candidates = int(config.oversample_ratio * cases.CRITERION_POINTS)
    candidates, uniform = np.split(points, [num_candidates], axis=1)
    num_sets = predictions[0].shape[1]
    repeated = (x.repeat(counts, axis=0) for x in (candidates, uniform))
    calls = iter(num_sets * [matching[:1], matching[1:], *repeated])

    def rand(*shape, device=None):
        points = next(calls)
        assert points.shape == shape
        return torch.from_numpy(points)

    leaves = [torch.from_numpy(p).requires_grad_() for p in predictions]
    class_logits, embeddings, features = leaves
    masks = torch.einsum("blnd,bhwd->blnhw", embeddings, features)
    sets = [
        {"masks_queries_logits": masks[:, i], "class_queries_logits": class_logits[:, i]}
        for i in range(num_sets)
    ]
    binary = [
        torch.from_numpy((ids[b] == np.arange(1, n + 1)[:, None, None]).astype(np.float32))
        for b, n in enumerate(counts)
    ]
    classes = [torch.from_numpy(labels[b, :n]).long() for b, n in enumerate(counts)]
    with unittest.mock.patch.object(torch, "rand", rand):
        losses = loss(
            sets[-1]["masks_queries_logits"],
            sets[-1]["class_queries_logits"],
            binary,
            classes,
            auxiliary_predictions=sets[:-1],
        )
    assert next(calls, None) is None
    terms = [
        weight * sum(value for key, value in losses.items() if key.startswith(name))
        for name, weight in weights.items()
    ]
    sum(terms).backward()
    query_of_segment = np.full((num_sets, len(counts), max(counts)), -1)
    for index, found in zip((num_sets - 1, *range(num_sets - 1)), matchings, strict=True):
        for b, (queries, segments) in enumerate(found):
            query_of_segment[index, b, segments.numpy()] = queries.numpy()
    return {
        "terms": np.asarray([term.item() for term in terms], np.float32),
        "query_of_segment": query_of_segment,
        "class_logits": class_logits.grad.numpy(),
        "mask_embeddings": embeddings.grad.numpy(),
        "mask_features": features.grad.numpy(),
    }


def resize(mask_logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[N, h, w] to [N, H, W] as Mask2Former resizes."""
    import torch

    return torch.nn.functional.interpolate(
        torch.from_numpy(mask_logits)[None], size=size, mode="bilinear", align_corners=False
    )[0].numpy()


def panoptic_loop(mask_logits, probs, is_thing, size, rule, overlap=0.8):
    """Mask2Former's loop over the kept queries of one image; segments keep their query.

    Returns:
      Ids [H, W] and labels [N], -1 where a query holds no segment.
    """
    labels, weights, keep = cases.kept_queries(probs, rule)
    masks = 1 / (1 + np.exp(-resize(mask_logits, size)))
    ids = np.zeros(size, np.uint8)
    found = np.full(len(labels), -1)
    queries = np.flatnonzero(keep)
    if not len(queries):
        return ids, found
    owner = (weights[queries, None, None] * masks[queries]).argmax(0)
    first_of_stuff: dict[int, int] = {}
    for k, n in enumerate(queries):
        mask_area = (owner == k).sum()
        original_area = (masks[n] >= 0.5).sum()
        mask = (owner == k) & (masks[n] >= 0.5)
        if not (mask_area > 0 and original_area > 0 and mask.sum() > 0):
            continue
        if mask_area / original_area < overlap:
            continue
        target = n
        if not is_thing[labels[n]]:
            target = first_of_stuff.setdefault(labels[n], n)
        ids[mask] = target + 1
        if target == n:
            found[n] = labels[n]
    return ids, found


def panoptic() -> dict[str, np.ndarray]:
    """The reference's loop at every size and rule, and transformers' maps.

    transformers resizes to 384x384 first, whatever the logits' size; after fusing stuff it gives
    out ids that are taken, so nothing is fused here.
    """
    import torch
    import transformers

    made = {}
    masks, probs = cases.panoptic_inputs()
    for rule in cases.KEEP_RULES:
        for size in cases.PANOPTIC_SIZES:
            images = [
                panoptic_loop(mask, p, cases.PANOPTIC_IS_THING, size, rule)
                for mask, p in zip(masks, probs, strict=True)
            ]
            key = f"{rule}_{size[0]}x{size[1]}"
            made[f"{key}_ids"], made[f"{key}_labels"] = map(np.stack, zip(*images, strict=True))
    processor = transformers.Mask2FormerImageProcessorPil()
    for side in cases.TRANSFORMERS_SIDES:
        logits, class_logits = cases.transformers_inputs(side)
        outputs = types.SimpleNamespace(
            class_queries_logits=torch.from_numpy(class_logits),
            masks_queries_logits=torch.from_numpy(logits),
        )
        (theirs,) = processor.post_process_panoptic_segmentation(
            outputs,
            threshold=0.8,
            overlap_mask_area_threshold=0.2,
            label_ids_to_fuse=set(),
            target_sizes=[(384, 384)],
        )
        labels = [[s["id"], s["label_id"]] for s in theirs["segments_info"]]
        made[f"transformers_{side}_map"] = theirs["segmentation"].numpy().astype(np.int16)
        made[f"transformers_{side}_labels"] = np.asarray(labels)
    return made


FILES = {
    **{name: (lambda name=name: mask2former(name)) for name in cases.MASK2FORMERS},
    "clip": clip,
    **{
        f"criterion_{name}": (lambda counts=counts: criterion(counts))
        for name, counts in cases.CRITERION_COUNTS.items()
    },
    "panoptic": panoptic,
}


def main() -> None:
    default = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
    shared_data = pathlib.Path(os.environ.get("CONCAT_JAX_TEST_DATA", default))
    for name, make in {**FILES, "tokens": lambda: tokens(shared_data)}.items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            path = cases.FOLDER / f"{name}.npz"
            np.savez_compressed(path, **make())
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
