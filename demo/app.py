"""Reenactment in a browser: a picture and a driving video in, a video out. `sample.reenact` does the
work.

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
    sys.exit("error: this page needs Gradio: pip install -r requirements.txt -r demo/requirements.txt")

NOTE = """# Anchored Diffusion
A picture of a face, or a sentence, moves like the face in a video. **The result is synthetic**, and its file says so. Do this
only to people who have agreed. What you upload is removed when you close the page."""
BUNDLED = "\n\nThe bundled model knows rendered faces only: of a photograph it makes a rendered face."
STYLE = """#state label, #state progress {display: block; width: 100%}
#state img {float: left; width: 12.5%; margin: 0}"""
SHOWN = 24  # finished frames on the page

WORKER, LEAVING = ThreadPoolExecutor(1), threading.Event()  # one job at a time, whoever asks


def picture(image):
    """An HTML image of a frame (h, w, 3) uint8."""
    small, file = Image.fromarray(image), io.BytesIO()
    small.thumbnail((128, 128))
    small.save(file, "JPEG")
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def draw(bars, frames):
    """HTML of bars {part: (done, total)} and frames {number: image}."""
    lines = [f'<label>{part} {n} of {total}<progress value="{n}" max="{total}"></progress></label>' for part, (n, total) in bars.items()]
    return "".join([*lines, *(frames[n] for n in sorted(frames))])


def run(models, source, prompt, driving, edit, steps, guidance, seed, face, source_face, compare):
    """Yield (state, result, comparison, download) as a job goes on. Closing the generator ends the job."""
    if not driving or not (source or prompt):
        raise gr.Error("Give a picture or a sentence, and a driving video.", print_exception=False)
    events, closed, bars, frames = queue.SimpleQueue(), threading.Event(), {}, {}

    def show(part, done, total, image=None):
        if closed.is_set() or LEAVING.is_set():
            raise UserError("stopped")
        events.put((part, done, total, image))

    yield "waiting for the model", None, None, None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "reenacted.mp4")
        options = dict(prompt=prompt or None, edit=edit or None, steps=int(steps), guidance=guidance, seed=seed, face=[face, source_face])
        job = WORKER.submit(sample.reenact, source, driving, out, models.result(), show, compare=compare, **options)
        job.add_done_callback(lambda _: events.put(None))
        try:
            for part, done, total, image in iter(events.get, None):
                if image is None:
                    bars[part] = done, total
                else:
                    frames[done] = picture(image)
                    frames = dict(list(frames.items())[-SHOWN:])
                if events.empty():
                    yield draw(bars, frames), None, None, None
        finally:
            closed.set()
            job.cancel()
            wait([job])

        if job.exception():
            text = sample.explain(job.exception())
            for path in filter(None, (source, driving)):
                text = text.replace(path, Path(path).name)
            raise gr.Error(html.escape(text, quote=False), duration=None, print_exception=False)
        paths = [str(path) for path in sample.output_paths(out, compare)]
        yield draw(bars, frames), paths[0], paths[1] if compare else None, paths[0]


def build_page(models, bundled):
    uploads = defaultdict(set)  # {page: folders of its files}
    examples = [[str(sample.SOURCE), "", str(sample.DRIVING), ""], [None, "a woman with red hair", str(sample.DRIVING), ""],
                [str(sample.SOURCE), "", str(sample.DRIVING), "blond hair -> red hair:0.8"]]

    def remember(path, request: gr.Request):
        if path and Path(path).parent not in kept:
            uploads[request.session_hash].add(Path(path).parent)

    def forget(request: gr.Request):
        mine = uploads.pop(request.session_hash, set())
        for folder in mine - set().union(*uploads.values()):  # the same file has the same folder
            shutil.rmtree(folder, ignore_errors=True)

    with gr.Blocks(title="Anchored Diffusion", analytics_enabled=False) as page:
        gr.Markdown(NOTE + BUNDLED * bundled)
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    source = gr.Image(elem_id="source", label="Picture of a face", type="filepath", image_mode=None, height=300)
                    driving = gr.Video(elem_id="driving", label="Driving video", webcam_options=gr.WebcamOptions(mirror=False), height=300)
                prompt = gr.Textbox(label="or a sentence", placeholder="a woman with red hair")
                edit = gr.Textbox(label="Edit", placeholder="blond hair -> red hair:0.8")
                with gr.Row():
                    steps = gr.Slider(1, 250, sample.Settings.steps, step=1, label="Steps")
                    guidance = gr.Slider(1, 10, sample.Settings.guidance, step=0.1, label="Guidance")
                with gr.Row():
                    natural = partial(gr.Number, 0, precision=0, minimum=0, min_width=80)
                    seed = natural(label="Seed")
                    face = natural(label="Driving face (0: largest)")
                    source_face = natural(label="Source face (0: largest)")
                    compare = gr.Checkbox(label="Comparison", min_width=80)
            with gr.Column():
                with gr.Row():
                    start, stop = gr.Button("Reenact", variant="primary"), gr.Button("Stop")
                state = gr.HTML(elem_id="state", min_height=80)
                result = gr.Video(label="Result (synthetic)", interactive=False, autoplay=True, height=300)
                download = gr.DownloadButton("Download the result")
                comparison = gr.Video(label="Picture, driving video, result", interactive=False)
        given = [source, prompt, driving, edit]
        table = gr.Examples(examples, given, label="Examples: a click runs them")

        job = dict(fn=partial(run, models), inputs=[*given, steps, guidance, seed, face, source_face, compare],
                   outputs=[state, result, comparison, download], concurrency_limit=1, concurrency_id="job", show_progress_on=state)
        jobs = [start.click(**job, api_name="reenact"), table.load_input_event.then(**job, api_visibility="private")]
        stop.click(None, cancels=jobs)
        for part in (source, driving, result, comparison):
            part.change(remember, part, show_progress="hidden", api_visibility="private")
        page.unload(forget)
    cache = Path(os.environ["GRADIO_TEMP_DIR"])
    kept = set(cache.iterdir()) if cache.exists() else set()
    return page


def arguments():
    ap = data.Parser(__doc__)
    ap.add_argument("--model", type=Path, default=sample.MODEL, help="model file made by train.py")
    ap.add_argument("--engine", type=Path, help="folder that export.py made of the model")
    ap.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    ap.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: everyone in the network")
    ap.add_argument("--port", type=data.number(int, 1, 65535), help="(default: the first free one from 7860)")
    ap.add_argument("--share", action="store_true", help="a public address, by a tunnel of gradio.live")
    return ap.parse_args()


def main():
    a = arguments()
    with tempfile.TemporaryDirectory(prefix="reenact-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        models = Future()
        page = build_page(models, a.model.resolve() == sample.MODEL)
        page.launch(server_name=a.host, server_port=a.port, share=a.share, css=STYLE, ssr_mode=False, run_history=False, footer_links=[], prevent_thread_lock=True)
        models.set_result(sample.load_models(a.model, a.device, a.engine))  # the page is there before
        page.block_thread()
        LEAVING.set()


if __name__ == "__main__":
    data.run_main(main)
