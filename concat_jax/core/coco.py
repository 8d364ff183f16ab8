"""COCO's panoptic format: PNGs whose colour is the segment id, and one json that describes them.

Format: https://cocodataset.org/#format-data, panoptic segmentation. What `PanopticWriter` writes is
what panopticapi's `evaluation.py --pred_json_file --pred_folder` takes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from concat_jax.core.streamed_json import StreamedJson
from concat_jax.core.vocabulary import Vocabulary

MAX_ID = 256**3 - 1  # three bytes a pixel


def ids_to_rgb(id_map: np.ndarray) -> np.ndarray:
    """Id map [H, W] of ints in 0..MAX_ID to COCO's colours [H, W, 3] uint8, id = R + 256G + 65536B.

    Raises:
      ValueError: if an id does not fit.
    """
    ids = np.asarray(id_map).astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > MAX_ID):
        raise ValueError(
            f"Segment ids from {ids.min()} to {ids.max()} do not fit a COCO panoptic PNG; they "
            f"must lie in 0..{MAX_ID}."
        )
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def rgb_to_ids(rgb: np.ndarray) -> np.ndarray:
    """COCO's colours [H, W, 3] uint8 to the id map [H, W] int32.

    Raises:
      ValueError: if the array is not [H, W, 3] (a palette or greyscale PNG, for example).
    """
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[-1] != 3:
        raise ValueError(
            f"A COCO panoptic PNG decodes to [H, W, 3], got {rgb.shape}; open it as RGB."
        )
    channels = rgb.astype(np.int32)
    return channels[..., 0] + (channels[..., 1] << 8) + (channels[..., 2] << 16)


def bounding_box(mask: np.ndarray) -> list[int]:
    """COCO box [x, y, width, height] of a non-empty [H, W] bool mask, in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


class PanopticWriter(StreamedJson):
    """Writes predictions image by image: `<out_dir>/<name>/*.png`, then `<out_dir>/<name>.json`.

    Attributes:
      png_folder: of the PNGs.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike,
        vocabulary: Vocabulary,
        *,
        name: str = "panoptic_predictions",
    ):
        """Creates the folders and opens the partial json.

        Args:
          out_dir: folder that gets the json and the folder of PNGs.
          vocabulary: maps class indices to the data set's category ids.
          name: of the json and of the PNG folder beside it (panopticapi's default layout).
        """
        categories = [
            {"id": int(i), "name": n, "isthing": int(t)}
            for i, n, t in zip(
                vocabulary.category_ids, vocabulary.names, vocabulary.is_thing, strict=True
            )
        ]
        self.png_folder = pathlib.Path(out_dir) / name
        self.png_folder.mkdir(parents=True, exist_ok=True)
        start = f'{{"categories": {json.dumps(categories)},\n"annotations": ['
        super().__init__(f"{self.png_folder}.json", start)
        self._vocabulary = vocabulary
        self._written: set[str] = set()
        self._images: list[dict] = []

    def add(
        self,
        image_id: int,
        file_name: str,
        id_map: np.ndarray,
        segments: Sequence[dict],
        *,
        source: str = "",
    ) -> None:
        """Writes one image.

        Args:
          image_id: as in the ground truth json.
          file_name: of the image; the PNG takes its stem.
          id_map: [H, W] int, 0 void.
          segments: dicts with "id" and "label" (class index), optionally "score" and "iscrowd";
            `ImageSegments.segments` is of this form. Areas and boxes are measured on the map.
          source: name of the image's own file, which "images" of the json then holds.

        Raises:
          ValueError: if ids of map and list differ (the official tool refuses such files), a label
            is outside the vocabulary, or the PNG name was written before.
        """
        png_name = pathlib.PurePath(file_name).stem + ".png"
        if png_name in self._written:
            raise ValueError(
                f"{png_name} was already written by this writer; image {image_id} needs another "
                "file name."
            )
        listed = [int(segment["id"]) for segment in segments]
        ids, areas = np.unique(id_map, return_counts=True)
        area_of = {int(i): int(a) for i, a in zip(ids, areas, strict=True) if i != 0}
        if sorted(listed) != sorted(area_of):
            raise ValueError(
                f"Image {image_id}: the map holds the ids {sorted(area_of)[:8]} but {listed[:8]} "
                "are listed; list every non-zero id of the map exactly once."
            )
        infos = []
        for segment in segments:
            label = int(segment["label"])
            if not 0 <= label < len(self._vocabulary):
                raise ValueError(
                    f"Image {image_id}: class index {label} of segment {segment['id']} is outside "
                    f"the vocabulary of {len(self._vocabulary)}."
                )
            info = {
                "id": int(segment["id"]),
                "category_id": int(self._vocabulary.category_ids[label]),
                "area": area_of[int(segment["id"])],
                "bbox": bounding_box(id_map == segment["id"]),
                "iscrowd": int(segment.get("iscrowd", 0)),
            }
            if "score" in segment:
                info["score"] = round(float(segment["score"]), 5)
            infos.append(info)
        Image.fromarray(ids_to_rgb(id_map)).save(self.png_folder / png_name)
        self._append({"image_id": int(image_id), "file_name": png_name, "segments_info": infos})
        self._written.add(png_name)
        if source:
            height, width = np.shape(id_map)
            self._images.append(
                {"id": int(image_id), "file_name": source, "height": height, "width": width}
            )

    def _ending(self) -> str:
        images = f',\n"images": {json.dumps(self._images)}' if self._images else ""
        return f"{images}}}"


@dataclasses.dataclass(frozen=True)
class PanopticAnnotation:
    """One annotated image.

    Attributes:
      image_id: of the json.
      file_name: of the PNG.
      id_map: [H, W] int32, 0 void.
      segments: the json's segments_info: dicts with "id", "category_id" and more.
    """

    image_id: int
    file_name: str
    id_map: np.ndarray
    segments: list[dict]

    def labels_by_id(self, vocabulary: Vocabulary) -> dict[int, int]:
        """Class index of every segment id, in the json's order.

        Raises:
          ValueError: if a category id is not in the vocabulary.
        """
        index_of = vocabulary.index_of_category
        for segment in self.segments:
            if segment["category_id"] not in index_of:
                raise ValueError(
                    f"{self.file_name}: segment {segment['id']} has category "
                    f"{segment['category_id']}, which the vocabulary lacks; use the vocabulary "
                    "of this annotation file."
                )
        return {s["id"]: index_of[s["category_id"]] for s in self.segments}

    def crowd_by_id(self) -> dict[int, bool]:
        """Crowd flag of every segment id; False where the json has none."""
        return {s["id"]: bool(s.get("iscrowd", 0)) for s in self.segments}


def read_panoptic(
    json_path: str | os.PathLike, png_folder: str | os.PathLike | None = None
) -> Iterator[PanopticAnnotation]:
    """Reads a COCO panoptic json, ground truth or prediction, in the order of its annotations.

    Args:
      json_path: of the json.
      png_folder: of its PNGs; by default the folder beside the json with its name, as panopticapi.

    Yields:
      PanopticAnnotation; PNGs are decoded one by one.

    Raises:
      ValueError: if the json or a PNG is missing or the json has no "annotations".
    """
    json_path = pathlib.Path(json_path)
    png_folder = pathlib.Path(png_folder) if png_folder else json_path.with_suffix("")
    if not json_path.is_file():
        raise ValueError(f"There is no panoptic json at {json_path}; check the path.")
    content = json.loads(json_path.read_text(encoding="utf-8"))
    if "annotations" not in content:
        raise ValueError(f"{json_path} has no 'annotations'; is it a COCO panoptic json?")
    for annotation in content["annotations"]:
        path = png_folder / annotation["file_name"]
        if not path.is_file():
            raise ValueError(f"{json_path} names {path}, which does not exist; give png_folder.")
        with Image.open(path) as image:
            id_map = rgb_to_ids(np.asarray(image.convert("RGB")))
        yield PanopticAnnotation(
            int(annotation["image_id"]),
            annotation["file_name"],
            id_map,
            annotation["segments_info"],
        )
