"""Reenactment in a browser: a picture and a driving video in, a video out. `sample.reenact` does
the work.

    pip install -r demo/requirements.txt
    python demo/app.py          # then open http://127.0.0.1:7860

Only this machine can open the page, unless --host or --share is given."""

import base64
import html
import io
import os
import queue
import shutil
import sys
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import sample
from sdit import UserError

try:
    import gradio as gr
except ImportError:
    cure = "pip install -r requirements.txt -r demo/requirements.txt"
    sys.exit(f"error: this page needs Gradio: {cure}")

NOTE = """# Anchored Diffusion
A picture of a face, or a sentence, moves like the face in a video. **The result is synthetic**, and
its file says so. Do this only to people who have agreed. What you upload is removed when you close
the page."""
BUNDLED = """

The bundled model knows rendered faces only: of a photograph it makes a rendered face."""
EXAMPLES = [  # picture, sentence, driving video, edit
    [str(sample.SOURCE), "", str(sample.DRIVING), ""],
    [None, "a woman with red hair", str(sample.DRIVING), ""],
    [str(sample.SOURCE), "", str(sample.DRIVING), "black hair -> red hair:0.8"],
]
STYLE = """#state label, #state progress {display: block; width: 100%}
#state img {float: left; width: 12.5%; margin: 0}"""
FRAMES_SHOWN = 24

WORKER = ThreadPoolExecutor(1)  # one job at a time, whoever asks
LEAVING = threading.Event()  # the server ends, and with it its job

# --------------------------------------------------------------------------------------------------
# A job


def thumbnail(image):
    """HTML of a frame (h, w, 3) uint8."""
    small, file = Image.fromarray(image), io.BytesIO()
    small.thumbnail((128, 128))
    small.save(file, "JPEG")
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def draw(bars, frames):
    """HTML of progress bars {part: (done, total)} and of frames {number: HTML}."""
    lines = [
        f'<label>{part} {done} of {total}<progress value="{done}" max="{total}"></progress></label>'
        for part, (done, total) in bars.items()
    ]
    return "".join([*lines, *(frames[number] for number in sorted(frames))])


def failure(message, **options):
    """What Gradio shows as a sentence."""
    return gr.Error(html.escape(message, quote=False), print_exception=False, **options)


def run(models, source, prompt, driving, edit, steps, guidance, seed, face, source_face, compare):
    """Yield (state, result, comparison, download) as a job goes on. Closing the generator ends
    the job."""
    if not driving or not (source or prompt):
        raise failure("Give a picture or a sentence, and a driving video.")
    yield "waiting for the model", None, None, None

    events, closed = queue.SimpleQueue(), threading.Event()

    def show(part, done, total, image=None):
        if closed.is_set() or LEAVING.is_set():
            raise UserError("stopped")
        events.put((part, done, total, image))

    options = dict(steps=int(steps), guidance=guidance, seed=seed, compare=compare)
    options |= dict(prompt=prompt or None, edit=edit or None, face=[face, source_face])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "reenacted.mp4")
        inputs = source, driving, out, models.result(), show
        job = WORKER.submit(sample.reenact, *inputs, **options)
        job.add_done_callback(lambda _: events.put(None))

        bars, frames = {}, {}
        try:
            for part, done, total, image in iter(events.get, None):
                if image is None:
                    bars[part] = done, total
                else:
                    frames[done] = thumbnail(image)
                    frames = dict(list(frames.items())[-FRAMES_SHOWN:])
                if events.empty():
                    yield draw(bars, frames), None, None, None
        finally:  # also when the page is closed
            closed.set()
            job.cancel()
            wait([job])

        if error := job.exception():
            text = data.describe(error)
            for path in filter(None, (source, driving)):
                text = text.replace(path, Path(path).name)
            raise failure(text, duration=None)

        result, *comparison = map(str, sample.output_paths(out, compare))
        yield draw(bars, frames), result, comparison[0] if comparison else None, result


# --------------------------------------------------------------------------------------------------
# The page


class Files:
    """Files of the open pages, uploads and results, by Gradio's folder of each. The same file of
    two pages has the same folder."""

    def __init__(self):
        self.of_page = defaultdict(set)
        cache = Path(os.environ["GRADIO_TEMP_DIR"])
        self.of_examples = set(cache.iterdir()) if cache.exists() else set()

    def remember(self, path, request: gr.Request):
        if path and Path(path).parent not in self.of_examples:
            self.of_page[request.session_hash].add(Path(path).parent)

    def forget(self, request: gr.Request):
        mine = self.of_page.pop(request.session_hash, set())
        for folder in mine - set().union(*self.of_page.values()):
            shutil.rmtree(folder, ignore_errors=True)


def build_inputs():
    """The components that are the arguments of `run`, in order."""
    settings = sample.Settings
    number = partial(gr.Number, 0, precision=0, minimum=0, min_width=80)
    with gr.Row():
        picture = dict(type="filepath", image_mode=None, height=300)
        source = gr.Image(label="Picture of a face", elem_id="source", **picture)
        video = dict(webcam_options=gr.WebcamOptions(mirror=False), height=300)
        driving = gr.Video(label="Driving video", elem_id="driving", **video)
    prompt = gr.Textbox(label="or a sentence", placeholder="a woman with red hair")
    edit = gr.Textbox(label="Edit", placeholder="blond hair -> red hair:0.8")
    with gr.Row():
        steps = gr.Slider(1, 250, settings.steps, step=1, label="Steps")
        guidance = gr.Slider(1, 10, settings.guidance, step=0.1, label="Guidance")
    with gr.Row():
        seed = number(label="Seed")
        face = number(label="Driving face (0: largest)")
        source_face = number(label="Source face (0: largest)")
        compare = gr.Checkbox(label="Comparison", min_width=80)
    return source, prompt, driving, edit, steps, guidance, seed, face, source_face, compare


def build_page(models, bundled):
    """The page; models: a Future of `sample.Models`."""
    with gr.Blocks(title="Anchored Diffusion", analytics_enabled=False) as page:
        gr.Markdown(NOTE + BUNDLED * bundled)
        with gr.Row():
            with gr.Column():
                inputs = build_inputs()
            with gr.Column():
                with gr.Row():
                    start = gr.Button("Reenact", variant="primary")
                    stop = gr.Button("Stop")
                state = gr.HTML(elem_id="state", min_height=80)
                shown = dict(interactive=False, height=300)
                result = gr.Video(label="Result (synthetic)", autoplay=True, **shown)
                download = gr.DownloadButton("Download the result")
                comparison = gr.Video(label="Picture, driving video, result", **shown)
        table = gr.Examples(EXAMPLES, list(inputs[:4]), label="Examples: a click runs them")

        outputs = [state, result, comparison, download]
        job = dict(fn=partial(run, models), inputs=list(inputs), outputs=outputs)
        job |= dict(concurrency_limit=1, concurrency_id="job", show_progress_on=state)
        clicked = start.click(**job, api_name="reenact")
        example = table.load_input_event.then(**job, api_visibility="private")
        stop.click(None, cancels=[clicked, example])

        files = Files()
        for part in (*inputs[:3:2], result, comparison):
            part.change(files.remember, part, show_progress="hidden", api_visibility="private")
        page.unload(files.forget)
    return page


def arguments():
    ap = data.Parser(__doc__)
    add = ap.add_argument
    add("--model", type=Path, default=sample.MODEL, help="model file made by train.py")
    add("--engine", type=Path, help="folder that export.py made of the model: use its graphs")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: the whole network")
    port = data.number(int, 1, 65535)
    add("--port", type=port, help="of that address (default: the first free one from 7860)")
    add("--share", action="store_true", help="a public address, by a tunnel of gradio.live")
    return ap.parse_args()


def main():
    a = arguments()
    with tempfile.TemporaryDirectory(prefix="reenact-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        models = Future()
        page = build_page(models, a.model.resolve() == sample.MODEL)

        # The page answers while the model is loaded.
        where = dict(server_name=a.host, server_port=a.port, share=a.share)
        plain = dict(css=STYLE, ssr_mode=False, run_history=False, footer_links=[])
        page.launch(**where, **plain, prevent_thread_lock=True)
        models.set_result(sample.load_models(a.model, a.device, a.engine))
        page.block_thread()
        LEAVING.set()


if __name__ == "__main__":
    data.run_main(main)
