"""A result as HTML: segments to point at, a legend that hides classes, files to download.

Names come from visitors and file names from their disks, so every text is escaped here. Nothing is
written to disk: pictures and files are inside the HTML.
"""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import PurePath

import cv2
import numpy as np
from PIL import Image

from concat_jax.core.mask_codes import ids_to_rgb
from concat_jax.inference.result import Result, Segment
from concat_jax.visualize.overlay import UNSEEN_MARK, segment_colour

# What the page calls the settings that it has.
CALLED = {
    "objectness_threshold": "the object threshold",
    "score_threshold": "the score threshold",
    "mask_threshold": "the mask threshold",
}
# Longer side of the drawing, in its own units; the photograph in it is no larger either.
VIEW_SIDE = 1024
# Outlines may be off by so many units, and parts of fewer square units are left out.
_TOLERANCE, _SPECK = 0.7, 9.0


def result_html(result: Result) -> str:
    """The picture with its segments, its legend and its files."""
    segments = result.segments
    height, width = result.panoptic.shape
    count = f"{len(segments)} segment{'s' * (len(segments) != 1)}"
    facts = f"<p class=facts>{count}<span>{width} × {height}</span></p>"
    if not segments:
        facts += f"<p class=empty>{escape(result.explain(CALLED))}</p>"
    body = f"{_drawing(result)}<div class=beside>{facts}{_legend(result)}{_files(result)}</div>"
    return f"<div class=result>{body}</div>"


def notice_html(sentence: str) -> str:
    """One sentence that a screen reader says at once."""
    return f"<p class=notice role=alert>{escape(sentence)}</p>" if sentence else ""


def png_url(image: Image.Image) -> str:
    """A picture as a URL that holds it."""
    return _image_url(image, "PNG")


def outline(mask: np.ndarray, height: int, width: int) -> str:
    """The path of a mask [h, w] bool in a drawing of another size, for SVG's rule evenodd.

    The mask's own pixels do not show: its edge is smoothed by half of one. "" where nothing is.
    """
    scale = max(height / mask.shape[0], width / mask.shape[1])
    size, grey = (width, height), mask.astype(np.float32)
    if scale > 1:
        soft = cv2.GaussianBlur(cv2.resize(grey, size), (0, 0), 0.5 * scale)
        soft = soft if soft.max() > 0.5 else cv2.resize(grey, size)
    else:
        soft = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    bits = (soft > 0.5 if soft.max() > 0.5 else soft > 0).astype(np.uint8)
    found, _ = cv2.findContours(bits, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    large = [part for part in found if cv2.contourArea(part) >= _SPECK]
    parts = []
    for part in large or found:
        points = cv2.approxPolyDP(part, _TOLERANCE, closed=True)[:, 0]
        parts.append("M" + "L".join(f"{x} {y}" for x, y in points) + "Z")
    return "".join(parts)


def _drawing(result: Result) -> str:
    height, width = result.panoptic.shape
    scale = VIEW_SIDE / max(height, width)
    to_height, to_width = (max(1, round(side * scale)) for side in (height, width))
    picture = Image.fromarray(result.image)
    if scale < 1:
        picture = picture.resize((to_width, to_height), Image.Resampling.BOX)
    url = png_url(picture) if scale > 1 else _image_url(picture, "JPEG", quality=88)
    paths, seen = [], {}
    for segment in result.segments:
        label = result.vocabulary.names.index(segment.name)
        rank = seen[label] = seen.get(label, -1) + 1
        said = escape(f"{_marked(segment)} · {segment.score:.0%}")
        paths.append(
            f'<path tabindex=0 role=img data-class="{label}" data-say="{said}" aria-label="{said}" '
            f'fill-rule=evenodd fill="{_colour(segment, label, rank)}" '
            f'd="{outline(segment.mask, to_height, to_width)}"></path>'
        )
    return (
        f'<div><svg class=drawing viewBox="0 0 {to_width} {to_height}" role=group '
        f'aria-label="{escape(result.source)} and its segments">'
        f'<image href="{url}" width="{to_width}" height="{to_height}" '
        f"preserveAspectRatio=none></image>{''.join(paths)}</svg>"
        "<p class=note>Point at a segment, or tap it, for its name and score.</p></div>"
    )


def _legend(result: Result) -> str:
    classes: dict[int, list[Segment]] = {}
    for segment in result.segments:
        classes.setdefault(result.vocabulary.names.index(segment.name), []).append(segment)
    rows = []
    for label, found in classes.items():
        times = f"{len(found)} × up to " if len(found) > 1 else ""
        rows.append(
            f'<li data-class="{label}"><label><input type=checkbox checked value="{label}" '
            f'data-name="{escape(found[0].name)}"><i style="background:{_colour(found[0], label)}">'
            f"</i><b>{escape(_marked(found[0]))}</b>"
            f"<span>{times}{max(s.score for s in found):.0%}</span></label></li>"
        )
    if not rows:
        return ""
    is_marked = any(not segment.is_seen for segment in result.segments)
    note = f"<p class=note>{UNSEEN_MARK} never segmented in training</p>" if is_marked else ""
    return f'<ul class=legend aria-label="Classes to show">{"".join(rows)}</ul>{note}'


def _files(result: Result) -> str:
    stem = PurePath(result.source).stem or "image"
    content = json.dumps(result.to_coco(), indent=1).encode()
    files = (
        ("Picture", f"{stem}.overlay.png", png_url(result.overlay())),
        ("JSON", f"{stem}.json", _url("application/json", content)),
        ("Ids", f"{stem}.png", png_url(Image.fromarray(ids_to_rgb(result.panoptic)))),
    )
    links = (
        f'<a download="{escape(name)}" href="{url}" title="{escape(name)}">{what}</a>'
        for what, name, url in files
    )
    return f"<p class=files><span>Download</span>{''.join(links)}</p>"


def _marked(segment: Segment) -> str:
    return segment.name + UNSEEN_MARK * (not segment.is_seen)


def _colour(segment: Segment, label: int, rank: int = 0) -> str:
    return f"rgb{segment_colour(label, segment.is_thing, rank)}"


def _image_url(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return _url(f"image/{kind.lower()}", buffer.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
