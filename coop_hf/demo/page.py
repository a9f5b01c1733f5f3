"""The demo's page, in Gradio: one tab to try prompts, one to learn a new one.

The page needs no network: it uses the system's fonts, and Gradio is told not to call home.
"""

import html
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402 (it reads the environment when it is imported)

from ..modeling import CoOpModel  # noqa: E402
from .answers import Answer, Message, Shelf, ask, facts, words  # noqa: E402
from .learn import images_of_folder, images_of_zip, learn, split_images  # noqa: E402


__all__ = ["CSS", "HEAD", "make_page", "make_theme"]

TOP_K = 5
_TITLES = ("Learned prompt", "Hand-written prompt")
_NONE = "There is no learned prompt yet: learn one first."
KEEP_SECONDS = 3600  # how long the files of visitors stay

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

# The browser tells where in a folder a file lies, and Gradio sends names alone: the place becomes a part of the name.
# An image on the clipboard is put where a chosen file goes.
HEAD = f"<script>\n{Path(__file__).with_name('page.js').read_text(encoding='utf-8')}</script>\n"


def _path_alone(payload: Any) -> str | None:
    """Instead of `gr.Image.preprocess`, which opens the file: a broken one gets a message of ours."""
    return None if payload is None else payload.path


def _paths_and_places(payload: Any) -> list[tuple[str, str]]:
    """Instead of `gr.File.preprocess`, which forgets where each file lies in the visitor's folder."""
    return [] if payload is None else [(file.path, file.orig_name or file.path) for file in payload.root]


def make_theme() -> Any:
    """The page's look, with fonts that every system has."""
    font = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]
    return gr.themes.Default(font=font, font_mono=["ui-monospace", "Menlo", "monospace"])


def _say(text: str) -> str:
    return f'<div class="say" role="status">{html.escape(text)}</div>' if text else ""


def _about(model: CoOpModel | None) -> str:
    """Facts and nearest words of an adapter."""
    if model is None:
        return ""
    by_class = words(model)
    lines = [facts(model)]
    lines += [] if by_class else ["This method has no context vectors, so no words are near to them."]
    parts = []
    for name, rows in by_class.items():
        items = "".join(
            f"<li>{' '.join(f'<code>{html.escape(word)}</code>' for word in row[: 3 if name else None])}</li>"
            for row in rows
        )
        parts.append(f"<div>{f'<b>{html.escape(name)}</b>' if name else ''}<ol>{items}</ol></div>")
    text = "".join(f'<p class="faint">{html.escape(line)}</p>' for line in lines)
    return f'{text}<div class="words">{"".join(parts)}</div>'


def _names_box(model: CoOpModel | None) -> dict[str, Any]:
    """The box of class names, for an adapter."""
    if model is None:
        return {"value": "", "interactive": False}
    bound = model.adapter.is_class_bound
    info = "One in a line. Edit them: the answer follows."
    if bound:
        info = "What was learned belongs to these classes, so they cannot be edited."
    return {"value": "\n".join(model.class_names or []), "interactive": not bound, "info": info}


def _answers(model: CoOpModel | None, result: Answer | None = None) -> tuple[str, str]:
    """The two columns of bars."""
    result = result or Answer()
    about = ("", "") if model is None else (f"method {model.config.method}", model.config.template)
    columns = []
    for title, line, scores in zip(_TITLES, about, (result.learned, result.template)):
        top = f'<div class="top">{html.escape(scores[0][0])}</div>' if scores else ""
        bars = "".join(_bar(name, score) for name, score in scores) or '<p class="faint">No answer yet.</p>'
        head = f'<b>{title}</b><div class="faint">{html.escape(line)}</div>'
        columns.append(f'<div class="answer">{head}{top}{bars}</div>')
    return columns[0], columns[1]


def _bar(name: str, share: float) -> str:
    return (
        f'<div class="share"><div class="name">{html.escape(name)}</div><div class="track">'
        f'<div class="fill" style="width: {100 * share:.1f}%"></div></div><div class="number">{share:.1%}</div></div>'
    )


def make_page(
    shelf: Shelf, base: CoOpModel | None = None, examples: list[str] | None = None, title: str = "Learned prompts"
) -> gr.Blocks:
    """The page.

    Args:
        shelf (`Shelf`): the adapters to try.
        base (`CoOpModel`, *optional*): a model on the base that visitors may learn prompts for; without it there is
            no tab for that.
        examples (`list[str]`, *optional*): files of images to try.
        title (`str`, *optional*, defaults to `"Learned prompts"`): the heading.

    Returns:
        `gradio.Blocks`, to be launched with `make_theme()`, `CSS` and `HEAD`.
    """
    keys = [(name, name) for name in shelf.models]
    first = next(iter(shelf.models), None)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(f"# {html.escape(title)}")
        mine = gr.State([])  # what this visitor has learned: (name, key)
        with gr.Tabs() as tabs:
            with gr.Tab("Try", id="try"):
                key = _try_tab(shelf, keys, first, examples or [])
            if base is not None:
                with gr.Tab("Learn", id="learn"):
                    _learn_tab(shelf, base, keys, mine, key, tabs)
    return page


def _try_tab(shelf: Shelf, keys: list, first: str | None, examples: list[str]) -> Any:
    model = shelf.models[first] if first is not None else None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            sources = ["upload", "clipboard", "webcam"]
            image = gr.Image(
                label="Image", type="filepath", height=300, elem_id="image", buttons=["fullscreen"], sources=sources
            )
            image.preprocess = _path_alone
            if examples:
                gr.Examples(
                    examples, image, label="Examples", cache_examples=False, examples_per_page=12, elem_id="examples"
                )
        with gr.Column(scale=3, min_width=300):
            key = gr.Dropdown(keys, value=first, label="Prompt", elem_id="prompt", visible=len(keys) > 1)
            said = gr.HTML(_say("" if keys else _NONE), elem_id="said", elem_classes="message", padding=False)
            left, right = _answers(model)
            with gr.Row():
                learned = gr.HTML(left, elem_id="learned", min_height=90, padding=False)
                template = gr.HTML(right, elem_id="template", min_height=90, padding=False)
            names = gr.Textbox(label="Class names", lines=6, max_lines=10, elem_id="names", **_names_box(model))
    with gr.Accordion("What was learned: the nearest words", open=False):
        about = gr.HTML(_about(model), elem_id="about", padding=False)

    def answer(key: str | None, image: str | None, names: str) -> tuple:
        model = None
        try:
            if key is None:
                raise Message(_NONE)
            model = shelf.get(key)
            result = ask(shelf, key, image, names, TOP_K)
        except Message as message:
            return *_answers(model), _say(str(message))
        return *_answers(model, result), _say(result.note)

    def choose(key: str, image: str | None) -> tuple:
        try:
            model = shelf.get(key)
        except Message as message:
            return gr.skip(), "", *_answers(None), _say(str(message))
        own = "\n".join(model.class_names or [])
        return gr.update(**_names_box(model)), _about(model), *answer(key, image, own)

    outputs = [learned, template, said]
    quiet = {"show_progress": "hidden", "concurrency_limit": 4, "api_visibility": "private"}
    image.change(answer, [key, image, names], outputs, **quiet)
    # `always_last`: while one answer is on its way, of all further keystrokes only the last is answered.
    names.input(answer, [key, image, names], outputs, trigger_mode="always_last", **quiet)
    key.change(choose, [key, image], [names, about, *outputs], **quiet)
    return key


def _learn_tab(shelf: Shelf, base: CoOpModel, keys: list, mine: Any, key: Any, tabs: Any) -> None:
    gr.Markdown(
        "Images in one folder for each class, its name the name of the class. A quarter of each class is set apart to "
        "measure accuracy on, unless there are folders `train` and `test`. Files go to the server that runs this page "
        "and are removed there within two hours."
    )
    downloads = tempfile.TemporaryDirectory(prefix="coop_hf-")  # goes when the page does
    with gr.Row():
        with gr.Column(min_width=300):
            archive = gr.File(label="A zip", file_types=[".zip"], elem_id="zip", height=150)
            folder = gr.File(label="Or a folder", file_count="directory", elem_id="folder", height=150)
            folder.preprocess = _paths_and_places
        with gr.Column(min_width=300):
            template = gr.Textbox(
                base.config.template, label="Hand-written prompt", info="{} stands for the name of the class.",
                elem_id="hand", max_lines=1,
            )  # fmt: skip
            kind = gr.Radio(
                [("one for all classes", False), ("one for each class", True)], value=False, label="Prompt to learn",
                info="One for all takes other class names later; one for each often fits better.", elem_id="kind",
            )  # fmt: skip
            shots = gr.Slider(1, 32, value=16, step=1, label="Images of each class, at most", elem_id="shots")
            start = gr.Button("Learn", variant="primary", elem_id="start")
    said = gr.HTML("", elem_id="learn-said", elem_classes="message", padding=False)
    result = gr.HTML("", elem_id="result", min_height=110)
    with gr.Row(visible=False) as done:
        download = gr.DownloadButton("Download the prompt (zip)", elem_id="download")
        use = gr.Button("Try it", variant="primary", elem_id="use")

    def run(archive: str | None, folder: list, template: str, kind: bool, shots: float, mine: list,
            progress: gr.Progress = gr.Progress()) -> tuple:  # fmt: skip # noqa: B008 (that is how Gradio finds it)
        tell: Callable[[float, str], Any] = lambda share, text: progress(share, desc=text)  # noqa: E731
        try:
            with tempfile.TemporaryDirectory() as work:
                if archive is None and not folder:
                    raise Message("Choose a zip or a folder first.")
                found = images_of_zip(archive, work) if archive else images_of_folder(folder)
                train, test, note = split_images(found, int(shots), tell=tell)
                place = tempfile.mkdtemp(dir=downloads.name)
                timer = threading.Timer(KEEP_SECONDS, shutil.rmtree, (place,), {"ignore_errors": True})
                timer.daemon = True
                timer.start()
                got = learn(base, train, test, place, template, kind, tell=tell)
        except Message as message:
            return _say(str(message)), "", gr.update(visible=False), gr.update(), mine
        name = f"learned here, {len(mine) + 1}"
        mine = [*mine, (name, shelf.keep(got.model))]
        text = (
            f"<p>Accuracy on {got.num_test} test images, {len(got.model.class_names or [])} classes, learned from "
            f"{got.num_train} images</p>"
            + _bar(f"before: hand-written prompt “{got.model.config.template}”", got.before)
            + _bar("after: learned prompt", got.after)
        )
        return _say(note), text, gr.update(visible=True), gr.update(value=got.archive), mine

    start.click(
        run, [archive, folder, template, kind, shots, mine], [said, result, done, download, mine],
        show_progress_on=result, concurrency_limit=1, api_visibility="private",
    )  # fmt: skip

    def show(mine: list) -> tuple:
        choices = [*keys, *mine]
        return gr.update(choices=choices, value=mine[-1][1], visible=len(choices) > 1), gr.update(selected="try")

    use.click(show, mine, [key, tabs], api_visibility="private", show_progress="hidden")
