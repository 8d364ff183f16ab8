"""What tests read of COCO panoptic files: each annotation with its id map."""

from pathlib import Path

from concat_jax.core.coco import read_panoptic
from concat_jax.core.mask_codes import read_id_map


def panoptic_maps(json_path, *, prediction=False):
    """(annotation, id map [H, W]) of each image, in the file's order."""
    file = read_panoptic(json_path, prediction=prediction)
    folder = Path(json_path).with_suffix("")
    return [
        (one, read_id_map(folder / one.file_name, file.path)) for one in file.annotations.values()
    ]


def labels_of(annotation, vocabulary):
    """Segment id to class index."""
    classes = (vocabulary.index_of_category[category] for category in annotation.category_ids)
    return dict(zip(annotation.ids, classes, strict=True))


def crowd_of(annotation):
    """Segment id to whether it is a crowd."""
    return dict(zip(annotation.ids, annotation.is_crowd, strict=True))
