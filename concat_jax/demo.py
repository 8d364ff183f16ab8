"""A page in the browser: drop a picture, type names, see the segments.

    pip install -r requirements-page.txt
    python -m concat_jax.demo
    python -m concat_jax.demo --model=runs/demo --stage=con --port=8000

It is served on 127.0.0.1, to this machine alone, and loads nothing from elsewhere. Pictures stay in
memory and in a temporary folder that goes when the page does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from concat_jax import page
from concat_jax.core import cli, stopping
from concat_jax.experiment.model import DEMO, open_model
from concat_jax.page.desk import MAX_MEGABYTES, Desk
from concat_jax.page.view import notice_html, png_url, result_html

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
QUEUE = 64  # requests that wait; one more is told so
FILES = Path(page.__file__).parent
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
FAILED = "Something went wrong here, and the terminal says what; another picture may do."


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command."""
    flags.string("model", DEMO, "Folder that concat_jax.convert wrote, or a workdir.")
    flags.string("stage", "", "Of a workdir; the last that is evaluated by default.")
    flags.integer("port", None, "The first free one from 7860 on by default.", 1, 65535)


def build(desk: Desk) -> gradio.Blocks:
    """The page, not served yet; it opens with the first example segmented."""
    import gradio as gr

    def answer(picture: str | int | None, *rest: Any) -> tuple[Any, Any]:
        """The notice and the view; what was seen before stays where there is nothing new."""
        if picture is None:
            return notice_html("Drop a picture first, or take an example."), gr.skip()
        names, numbers = (rest[:2], rest[2:]) if reads_names else ((), rest)
        settings = dict(zip(SETTINGS[rule], numbers, strict=True))
        try:
            return "", desk.ask(picture, *names, answer=result_html, **settings)
        except ValueError as error:
            return notice_html(str(error)), gr.skip()
        except Exception:
            traceback.print_exc()
            return notice_html(FAILED), gr.skip()

    reads_names, rule = desk.model.card.text is not None, desk.model.keep_rule
    vocabulary = desk.model.vocabulary
    opening = desk.ask(0, answer=result_html) if desk.scenes else ""
    empty = "<p class=empty>Drop a picture, and its segments show here.</p>"
    with gr.Blocks(title="concat_jax", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        picture = gr.State(0 if desk.scenes else None)
        gr.HTML(HEADER)
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="pick"):
                upload = gr.File(
                    label="Drop a picture", show_label=False, file_types=["image"], elem_id="upload"
                )
                with gr.Row(elem_id="examples", visible=bool(desk.scenes)):
                    examples = [
                        gr.Button(f"Example {k + 1}", elem_id=f"example-{k}", min_width=0)
                        for k in range(len(desk.scenes))
                    ]
            with gr.Column(elem_id="look"):
                notice = gr.HTML("", elem_id="notice")
                view = gr.HTML(opening or empty, elem_id="view")
            with gr.Column(elem_id="ask"):
                fields = [
                    gr.Textbox(
                        label=label,
                        placeholder=_examples_of(vocabulary, is_thing),
                        info=f"Commas between names. Both empty: all {len(vocabulary)} of training."
                        if is_thing
                        else None,
                        lines=2,
                        max_length=20_000,
                    )
                    for label, is_thing in (("Things", True), ("Stuff", False))
                    if reads_names
                ]
                go = gr.Button("Segment", variant="primary", elem_id="go")
                sliders = [gr.Slider(**_slider(name, desk.model)) for name in SETTINGS[rule]]
                for slider in sliders:
                    slider.preprocess = functools.partial(_filled, slider.preprocess, slider.value)
        asked = dict(inputs=[picture, *fields, *sliders], outputs=[notice, view])
        how = dict(
            concurrency_id="model",
            concurrency_limit=1,
            trigger_mode="always_last",
            show_progress="minimal",
            show_progress_on=view,
        )
        gr.on(
            [go.click, *(slider.input for slider in sliders), *(f.submit for f in fields)],
            answer,
            **asked,
            **how,
            api_name="segment",
        )
        # The field is emptied at once, so that the next picture can be dropped.
        upload.upload(
            lambda path: (path, None), upload, [picture, upload], queue=False, api_name=False
        ).then(answer, **asked, **how, api_name=False)
        for number, example in enumerate(examples):
            example.click(
                lambda number=number: number, None, picture, queue=False, api_name=False
            ).then(answer, **asked, **how, api_name=False)
    return blocks.queue(max_size=QUEUE)


def _examples_of(vocabulary: Any, is_thing: bool) -> str:
    names = [
        n for n, flag in zip(vocabulary.names, vocabulary.is_thing, strict=True) if flag is is_thing
    ]
    return ", ".join(names[:: max(1, len(names) // 3)][:3])


# What a head's names are judged by, and what the page calls it; by the head's rule.
SETTINGS = {
    "objectness": ("objectness_threshold", "mask_threshold", "gamma"),
    "score": ("score_threshold", "mask_threshold"),
}
_SLIDERS = {
    "objectness_threshold": ("Object threshold", "Higher keeps fewer segments.", 0.5),
    "score_threshold": ("Score threshold", "Higher keeps fewer segments.", None),
    "mask_threshold": ("Mask threshold", "Higher draws them tighter.", 0.5),
    "gamma": ("γ", "Higher favours names that training never segmented.", 0.0),
}


def _filled(preprocess: Callable[[float], float], default: float, value: float | None) -> float:
    """A slider's number, of which somebody may have emptied the box."""
    return preprocess(default if value is None else value)


def _slider(name: str, model: Any) -> dict[str, Any]:
    label, info, value = _SLIDERS[name]
    value = model.score_threshold if value is None else value
    low, high, step = (-5, 5, 0.1) if name == "gamma" else (0, 1, 0.01)
    return dict(label=label, info=info, value=value, minimum=low, maximum=high, step=step)


HEADER = """<header><h1>Name it, see it</h1>
<p>Zero-shot panoptic segmentation: every object and every ground of a picture, by the names that
you ask for.</p></header>"""


def launch(blocks: gradio.Blocks, desk: Desk, port: int | None) -> str:
    """Serves the page; returns its address."""
    import gradio as gr

    pictures = [Image.fromarray(scene).resize((128, 128)) for scene in desk.scenes]
    examples = "".join(
        f"#example-{k} {{ background-image: url({png_url(picture)}); }}\n"
        for k, picture in enumerate(pictures)
    )
    script = (FILES / "page.js").read_text(encoding="utf-8")
    options = dict(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_MEGABYTES * 10**6,
        allowed_paths=[],
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        theme=gr.themes.Base(font=SANS, font_mono=MONO),
        css=(FILES / "page.css").read_text(encoding="utf-8") + examples,
        head=f"<script>{script}</script>",
    )
    try:
        return blocks.launch(**options)[1]
    except OSError as error:
        ports = f"The port {port} is taken" if port else "All ports of Gradio's are taken"
        # Below 1024 they are the system's.
        other = port + 1 if port and 1024 <= port < 65535 else 8123
        raise ValueError(f"{ports}, or not for us; give another, as --port={other}.") from error


@cli.command(__doc__, define_flags)
def main(given: cli.Flags) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    # SIGTERM, too, is to leave nothing of the visitors' pictures.
    folder_of_page = tempfile.TemporaryDirectory(prefix="concat_jax_page_")
    with stopping.catching_sigterm("Stopped."), folder_of_page as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read as it is imported
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            install = "pip install -r requirements-page.txt"
            raise ValueError(f"The page needs Gradio: {install}.") from error
        desk = Desk(open_model(given.model, stage=given.stage))
        with contextlib.closing(desk):
            address = launch(build(desk), desk, given.port)
            print(f"Open {address} in a browser; Ctrl-C ends it.", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
