"""What this code does on a GPU, in under ten minutes on one card of 40 GB or more:

    python demo/gpu_check.py                                # XL/2 -> gpu_check.json, gpu_check.md
    python demo/gpu_check.py --device cpu --size S/2        # a rehearsal, on few frames and steps

Weights are random: speed, memory and equality do not depend on them. A part that fails is a line of
the table. Sampling that would not end within --minutes is left out, and says so.
"""

import contextlib
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import data
import export
import sample
import sdit
import train

# Rows a second of one of the paper's four A100, of its largest model (XL, T = 8).
PAPER = 1.8 * 16 / 4

# Milliseconds of a training step on paper, 16 rows of XL/2, T = 8: (eager, compiled). Matrix
# products and attention at the speeds that are published, all else at the memory's bandwidth.
ROOFLINE = {"A100": (888, 787), "H100": (362, 300), "H200": (318, 275)}


class Bench:
    """What the parts share, and their lines: (part, case, {name: value})."""

    def __init__(self, a):
        self.a, self.device, self.lines = a, a.device, []
        self.cuda = a.device.type == "cuda"
        self.ends = time.monotonic() + 60 * a.minutes

    def add(self, part, case, **values):
        self.lines.append((part, case, values))
        print(f"{part}, {case}: {show(values)}", flush=True)

    @contextlib.contextmanager
    def part(self, part, case):
        """What fails in it is a line; memory is given back, and its peak counted anew."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        except Exception as e:
            if not isinstance(e, sdit.UserError):
                traceback.print_exc()
            reason = str(e).partition("\n")[0]
            self.add(part, case, failed=f"{type(e).__name__}: {reason}")
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def model(self, frames, dtype=torch.float32, depth=None):
        """A random model, none of whose weights is zero."""
        model = export.random_model(self.a.size, frames)
        if depth:
            model.blocks = model.blocks[:depth]
            model.config.depth = depth
        return model.to(self.device, dtype)


def show(values):
    rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in rounded.items())


def environment(bench):
    found = export.versions("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "triton")
    if bench.cuda:
        about = torch.cuda.get_device_properties(bench.device)
        found |= dict(
            gpu=about.name,
            gib=round(about.total_memory / 2**30, 1),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    bench.add("environment", str(bench.device), **found)


def relative(x, y):
    """Largest difference, as a part of the standard deviation."""
    return ((x.double() - y.double()).abs().max() / y.double().std()).item()


def sample_frames(model, conditions, settings):
    """The latents (M, C, H, W) of a video, sampled with the bank."""
    latent = sample.sample_video(model, conditions, settings)
    return torch.stack([latent[f] for f in range(len(conditions[0]))])


def sample_by_rule(model, conditions, settings):
    """The same by the paper's rule, all rows in one batch."""
    c, T, M = model.config, model.config.frames, len(conditions[0])
    rows, keep = sample.plan_rows(M, T)
    noise = sample.frame_noise(0, rows, (c.latent_channels, c.latent_size, c.latent_size))
    noise = noise.float().to(conditions[0].device)
    of_rows = [condition[torch.from_numpy(rows)] for condition in conditions]  # (B, T, D) each
    latents = sample.sample_plain(model, noise, rows, of_rows, settings, T // 2)
    order = torch.from_numpy(rows[keep].argsort())
    return latents.cpu()[torch.from_numpy(keep)][order]  # (M, C, H, W)


def not_captured(model):
    return model


@torch.no_grad()
def equality(bench):
    """The bank against the paper's rule in one batch, and recorded launches against single ones.

    In bfloat16 both differ from float32 by rounding; the difference should be smaller than that."""
    T, results = 4, {}
    M, settings = 3 * (T - 1) + 1, sample.Settings(bench.a.steps[0], "ddim:1", 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        model = bench.model(T, dtype)
        g = torch.Generator().manual_seed(0)
        condition = torch.randn(M, model.config.width, generator=g).to(bench.device, dtype)
        plain = sample_by_rule(model, [condition], settings)
        results[dtype] = plain
        banked = sample_frames(model, [condition], settings)
        values = dict(bank_against_rule=relative(banked, plain))
        if dtype is torch.bfloat16:
            values["rule_against_float32"] = relative(plain, results[torch.float32])

        if bench.cuda:
            captured, sample.Captured = sample.Captured, not_captured
            try:
                single = sample_frames(model, [condition], settings)
            finally:
                sample.Captured = captured
            values["recorded_is_equal_to_the_bit"] = torch.equal(banked, single)
        bench.add("equality", str(dtype).removeprefix("torch."), **values)


def make_training_step(bench, frames, compiled):
    """(A function of the step's number that trains as `train.py` does, the model's config.)"""
    a, device = bench.a, bench.device
    with device:
        model, ema = (sdit.SDiT(sdit.make_config(a.size, frames)) for _ in range(2))
    optimizer, meter = train.build_optimizer(model, 1e-4, 1e-5, 0.01), train.Meter(device)
    a.compile, a.lambda_ex, a.world = compiled, 1.0, 1
    objective = train.build_objective(model, sdit.NoiseSchedule(device), a)
    c = model.config
    shape = (a.rows, frames, c.latent_channels, c.latent_size, c.latent_size)
    batch = dict(
        latents=torch.randn(shape),
        landmarks=torch.rand(a.rows, frames, 478, 3),
        mask=torch.rand(a.rows, frames, *shape[-2:]),
        scene=torch.randn(a.rows, c.scene_width),
    )
    bf16 = sdit.has_bf16(device.type)

    def step(n):
        optimizer.zero_grad(set_to_none=True)
        given = {name: data.send(x, device) for name, x in batch.items()}
        t, noise, drop = train.sample_noise(0, n, shape, 0.1, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            error, bound = objective(given, t, noise, drop)
        (error + bound).mean().backward()
        meter.add(n, t, error, bound)
        optimizer.step()
        train.update_ema(ema, model, n, 0.9999)

    return step, c


def training(bench, frames, compiled):
    """Steps of `train.py`, on one process; on a GPU for at least 8 seconds."""
    a, device = bench.a, bench.device
    step, config = make_training_step(bench, frames, compiled)

    began = time.monotonic()
    for n in range(3 if bench.cuda else 1):
        step(n)
    bench.wait()
    warm = time.monotonic() - began
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats(device)
    fewest, shortest = (3, 8) if bench.cuda else (1, 0)
    began, count = time.monotonic(), 0
    while count < fewest or time.monotonic() - began < shortest:
        step(count)
        count += 1
        bench.wait()
    seconds = (time.monotonic() - began) / count

    rows = a.rows / seconds
    dtype = torch.bfloat16 if sdit.has_bf16(device.type) else torch.float32
    peak = train.device_peak(device, dtype)
    values = dict(
        rows=a.rows,
        steps_per_s=1 / seconds,
        rows_per_s=rows,
        mfu=rows * train.row_flops(config) / 1e12 / peak,
        peak_gib=data.peak_memory(device.type),
        warm_up_s=warm,
    )
    if frames == 8 and a.size == "XL/2":
        values["times_an_A100_of_the_paper"] = rows / PAPER
        name = torch.cuda.get_device_name(device) if bench.cuda else ""
        limits = [limit for card, limit in ROOFLINE.items() if f" {card}" in name]
        if limits:
            values["part_of_roofline"] = limits[0][compiled] / 1000 * a.rows / 16 / seconds
    bench.add("training", training_case(frames, compiled), **values)


def training_case(frames, compiled):
    return f"T = {frames}, {'compiled' if compiled else 'eager'}"


@torch.no_grad()
def sampling(bench):
    """Frames a second, with guidance and decoding, T = 8; the shortest first, which foretells the
    others."""
    device = bench.device
    dtype = torch.bfloat16 if sdit.has_bf16(device.type) else torch.float32
    model = bench.model(8, dtype)
    widths = (128, 256, 512, 512) if bench.cuda else (32, 32, 32, 32)
    channels = model.config.latent_channels
    config = sdit.AutoencoderConfig(widths, latent_channels=channels)
    autoencoder = sdit.AutoencoderKL(config).eval()
    autoencoder.to(device, memory_format=torch.channels_last)

    per_frame_step = None
    for M, steps in itertools.product(bench.a.videos, bench.a.steps):
        case = f"{M} frames, {steps} steps"
        if per_frame_step and time.monotonic() + per_frame_step * M * steps > bench.ends:
            bench.add("sampling", case, left_out=f"about {per_frame_step * M * steps:.0f} s")
            continue
        with bench.part("sampling", case):
            conditions = [torch.randn(M, model.config.width).to(device, dtype) for _ in range(2)]
            settings = sample.Settings(steps, "ddim:1", 2.0)
            began = time.monotonic()
            latents = sample_frames(model, conditions, settings)
            denoised = time.monotonic()
            for part in latents.split(8):
                data.to_images(autoencoder.decode(part.to(device)))
            ended = time.monotonic()
            per_frame_step = (ended - began) / M / steps
            values = dict(
                frames_per_s=M / (ended - began),
                denoising_s=denoised - began,
                decoding_s=ended - denoised,
                peak_gib=data.peak_memory(device.type),
            )
            bench.add("sampling", case, **values)


@torch.no_grad()
def engines(bench):
    """One evaluation of `packed`, of a few blocks of the model, two guidance branches, by every
    backend that is there."""
    device, blocks = bench.device, bench.a.blocks
    precision = "bf16" if bench.cuda else "fp32"
    dtype = export.PRECISIONS[precision]
    model = bench.model(4, depth=blocks)
    inputs = export.example(model.config, "packed", 4, 2, 2, device=device)
    expected = export.reference(model, "packed", inputs)[0]
    graph = export.build_graph(model, "packed", precision).to(device)

    def make_runner(kind, folder):
        if kind == "eager":
            return functools.partial(export.run_module, graph, dtype)
        if kind == "compiled":
            return functools.partial(export.run_module, torch.compile(graph), dtype)
        a = SimpleNamespace(precision=precision, branches=2, rows=[4, 4], out=folder)
        path = export.write_graph(model, kind, "packed", a, folder, device)
        return export.load_runner(kind, path, dtype, device)

    kinds = ["eager", "compiled", "onnx", "trt"] if bench.cuda else ["eager", "onnx", "trt"]
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            with bench.part("engines", kind):
                run = make_runner(kind, Path(folder))
                error = export.relative_error(run(inputs)[0], expected)
                ms = 1000 * median_seconds(bench, functools.partial(run, inputs))
                case = f"{kind} {precision}, {blocks} blocks"
                bench.add("engines", case, ms=ms, relative_error=error)


def median_seconds(bench, run):
    seconds = []
    for _ in range(10 if bench.cuda else 2):
        bench.wait()
        began = time.perf_counter()
        run()
        bench.wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def write(bench):
    """gpu_check.json, and the same as a table."""
    entries = [dict(part=part, case=case, **values) for part, case, values in bench.lines]
    with sdit.atomic(bench.a.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(dict(size=bench.a.size, lines=entries), indent=1))
    table = ["| part | case | found |", "|---|---|---|"]
    table += [f"| {part} | {case} | {show(values)} |" for part, case, values in bench.lines]
    with sdit.atomic(bench.a.out.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(table) + "\n")


def arguments():
    count, minutes = data.number(int, 1), data.number(float, 0)
    ap = data.Parser(__doc__)
    ap.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU)")
    ap.add_argument("--size", default="XL/2", help="model size")
    rows = "rows of a training step (default: 16 from 70 GiB on, else 4; on a CPU 1)"
    ap.add_argument("--rows", type=count, help=rows)
    videos = "frames to sample (default: 25 100 1003; on a CPU 9)"
    ap.add_argument("--videos", type=count, nargs="+", help=videos)
    steps = "denoising steps (default: 10 20 50; on a CPU 1)"
    ap.add_argument("--steps", type=count, nargs="+", help=steps)
    ap.add_argument("--blocks", type=count, default=4, help="of the model, to time engines with")
    ap.add_argument("--minutes", type=minutes, default=9, help="after which no sampling begins")
    ap.add_argument("--out", type=Path, default=Path("gpu_check"), help="OUT.json, OUT.md")
    a = ap.parse_args()

    given, a.device = a.device, data.get_device(a.device)
    if not given and a.device.type == "cpu":
        raise sdit.UserError("no GPU here; for a rehearsal give --device cpu --size S/2")
    rows, videos, steps = 1, [9], [1]
    if a.device.type == "cuda":
        memory = torch.cuda.get_device_properties(a.device).total_memory / 2**30
        rows, videos, steps = 16 if memory > 70 else 4, [25, 100, 1003], [10, 20, 50]
    a.rows, a.videos, a.steps = a.rows or rows, a.videos or videos, a.steps or steps
    return a


def main():
    a = arguments()
    if a.device.type == "cuda":
        torch.cuda.set_device(a.device.index or 0)
    bench = Bench(a)
    with bench.part("environment", str(a.device)):
        environment(bench)
    with bench.part("equality", "both precisions"):
        equality(bench)
    for frames in (4, 8):
        for compiled in (False, True) if bench.cuda else (False,):
            with bench.part("training", training_case(frames, compiled)):
                training(bench, frames, compiled)
                torch.compiler.reset()
    with bench.part("engines", "all"):
        engines(bench)
    with bench.part("sampling", "all"):
        sampling(bench)
    write(bench)


if __name__ == "__main__":
    data.run_main(main)
