"""Files as Scenic writes them, without Scenic."""

from flax import serialization, traverse_util

from concat_jax.weights.names import scenic_clip
from concat_jax.weights.names.table import to_theirs


def as_scenic(params, image_heads, text_heads):
    """Name -> array with heads apart, as Scenic's CLIP has them."""
    arrays = to_theirs(params, scenic_clip.naming(()))
    arrays["logit_scale"] = arrays["logit_scale"].reshape(())
    for name, array in arrays.items():
        heads = text_heads if name.startswith("text/") else image_heads
        if "/attn/out/kernel" in name:
            arrays[name] = array.reshape(heads, -1, array.shape[-1])
        elif "/attn/" in name and "/out/" not in name:
            arrays[name] = array.reshape(*array.shape[:-1], heads, -1)
    return {name.replace("resblocks_", "resblocks."): array for name, array in arrays.items()}


def save(path, arrays, **state):
    params = traverse_util.unflatten_dict(arrays, sep="/")
    path.write_bytes(serialization.msgpack_serialize(state or {"global_step": 3, "params": params}))
    return path
