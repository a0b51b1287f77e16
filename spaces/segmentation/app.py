"""The Space: segment an image before and after adaptation. ``python spaces/segmentation/app.py`` serves it."""

import tempfile
from functools import cache
from html import escape
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

from glare.data.landcover import scene
from glare.errors import UserError
from glare.run_folder import atomic_write_png
from pairs import load_pair
from segmentation import LONG_SIDE, MAX_PIXELS, Answer, answer, read_picture

EXAMPLES = (("arid", 0), ("arid", 1), ("arid", 2), ("temperate", 0))
EXAMPLE_SERIES = 5  # of scenes on which nothing was trained, fitted or measured
EXAMPLE_SIDE = 384  # px

INTRO = """# Segmentation before and after adaptation

A self-supervised ViT is adapted to images of a new domain without labels by training small adapters
([GLARE](https://arxiv.org/abs/2509.17816)). See what that changes in a segmentation: pick a scene or upload an
image."""

CSS = """
.prose .shares { width: 100%; max-width: 32rem; border: 0; border-collapse: collapse; }
.shares td { font-variant-numeric: tabular-nums; }
.shares thead, .shares tbody, .shares tr { border: 0; }
.shares th, .shares td { padding: 0.3rem 0.5rem; border: 0; border-bottom: 1px solid var(--border-color-primary); }
.shares tbody th { font-weight: normal; text-align: left; }
.shares thead th { font-weight: 600; text-align: right; }
.shares thead th:first-child { text-align: left; }
.shares td { text-align: right; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.6em; vertical-align: -0.1em;
  border: 1px solid #8888; border-radius: 2px; }
"""
FONTS = ["system-ui", "sans-serif"]  # of the visitor's device: nothing is fetched

Shown = tuple[dict[str, object], Image.Image, str, str]
"""Update of the picture before adaptation, picture after it, table, text."""


def segment_file(path: str | None, model: str | None = None, baseline: str | None = None) -> Shown:
    """Segment an uploaded file with a pair of models.

    ``model`` and ``baseline``: Hub id or folder, both empty for the built-in pair. Raises gr.Error, which the page
    shows as a message, for what the user can put right.
    """
    try:
        if path is None:
            raise UserError("there is no image; pick a scene or upload a file")
        picture, notice = read_picture(path)
        return shown(answer(load_pair((model or "").strip(), (baseline or "").strip()), picture, notice))
    except UserError as error:
        raise gr.Error(escape(str(error), quote=False), print_exception=False) from error


def shown(result: Answer) -> Shown:
    """An answer as values of the page's fields."""
    return gr.update(value=result.before, visible=result.before is not None), result.after, result.table, result.text


@cache
def examples() -> list[str]:
    """Files of the example scenes, rendered once into a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="glare_scenes_"))
    files = []
    for domain, index in EXAMPLES:
        file = folder / f"{domain}_{index}.png"
        made = scene(domain, EXAMPLE_SERIES, index=index, size=EXAMPLE_SIDE)
        atomic_write_png(file, Image.fromarray(made.image))
        files.append(str(file))
    return files


def build() -> gr.Blocks:
    """The page, with the first scene segmented by the built-in pair."""
    files = examples()
    first = answer(load_pair("", ""), read_picture(files[0])[0])
    page = gr.Blocks(title="GLARE segmentation", analytics_enabled=False)
    with page:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = upload_field(files[0])
                scenes = gr.Examples(files, picture, label="Scenes", cache_examples=False)
                with gr.Accordion("Your own model", open=False):
                    model = gr.Textbox(
                        "", label="Adapted model", info="Hub id or folder that glare finetune has written"
                    )
                    baseline = gr.Textbox(
                        "", label="Before adaptation (optional)", info="the same, fine-tuned without adaptation"
                    )
                button = gr.Button("Segment", variant="primary")
                gr.Markdown(
                    f"Up to {MAX_PIXELS // 10**6} million pixels; the longer side is reduced to {LONG_SIDE} px."
                )
            with gr.Column(scale=2, min_width=320):
                with gr.Row():
                    before = overlay_field(first.before, "Before adaptation")
                    after = overlay_field(first.after, "After adaptation")
                table = gr.HTML(first.table)
                text = gr.Markdown(first.text)
        fields, results = [picture, model, baseline], [before, after, table, text]
        # one at a time: two passes at once would only slow each other down
        for event, visible in ((button.click, "public"), (scenes.load_input_event.success, "private")):
            event(
                segment_file,
                fields,
                results,
                show_progress_on=after,
                api_name="segment",
                api_visibility=visible,
                concurrency_id="segment",
                concurrency_limit=1,
            )
    return page


def upload_field(file: str) -> gr.Image:
    """A field that passes on the path of the file as it was uploaded."""
    field = gr.Image(file, type="filepath", label="Image", sources=["upload", "clipboard"], height=300, buttons=[])
    # gradio would open it here, and fail without a word about a file that is no image
    field.preprocess = uploaded_path  # type: ignore[method-assign]
    return field


def uploaded_path(payload: ImageData | None) -> str | None:
    """The path of an upload, None without one."""
    return None if payload is None else payload.path


def overlay_field(picture: Image.Image | None, label: str) -> gr.Image:
    """A field that shows an overlay as it is, without losses."""
    return gr.Image(picture, label=label, format="png", min_width=240, buttons=["download", "fullscreen"])


def serve() -> None:
    """Serve the page, where gradio's environment variables say."""
    theme = gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"])
    build().launch(theme=theme, css=CSS, max_file_size="50mb", ssr_mode=False, footer_links=["api"])


if __name__ == "__main__":
    serve()
