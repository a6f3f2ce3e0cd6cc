"""What this code does on a GPU, in under ten minutes on one card of 40 GB or more:

    python demo/gpu_check.py                                # XL/2 -> gpu_check.json, gpu_check.md
    python demo/gpu_check.py --device cpu --size S/2        # a rehearsal, on few frames and steps

Weights are random: speed, memory and equality do not depend on them. A part that fails is a line of
the table. Sampling that would not end within --minutes is left out, and says so.
"""

import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import data
import export
import sample
import sdit
import train

PAPER = (
    1.8 * 16 / 4
)  # rows a second of one of the paper's four A100, of its largest model (XL, T = 8)

# Milliseconds of a training step on paper, 16 rows of XL/2, T = 8: (eager, compiled). Matrix products
# and attention at the speeds that are published, everything else at the memory's bandwidth.
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
            self.add(part, case, failed=f"{type(e).__name__}: {str(e).partition(chr(10))[0]}")
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
    return ", ".join(
        f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in values.items()
    )


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


@torch.no_grad()
def equality(bench):
    """The bank against the paper's rule in one batch, and recorded launches against single ones.

    In bfloat16 both differ from float32 by rounding; the difference should be smaller than that."""
    T, results = 4, {}
    M, settings = 3 * (T - 1) + 1, sample.Settings(bench.a.steps[0], "ddim:1", 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        model = bench.model(T, dtype)
        g = torch.Generator().manual_seed(0)
        conditions = [torch.randn(M, model.config.width, generator=g).to(bench.device, dtype)]
        rows, keep = sample.plan_rows(M, T)
        c = model.config
        noise = sample.frame_noise(0, rows, (c.latent_channels, c.latent_size, c.latent_size))
        plain = sample.sample_plain(
            model,
            noise.float().to(bench.device),
            rows,
            [conditions[0][torch.from_numpy(rows)]],
            settings,
            T // 2,
        )
        latent = sample.sample_video(model, conditions, settings)
        banked = torch.stack([latent[f] for f in range(M)])
        order = torch.from_numpy(rows[keep].argsort())
        plain = plain.cpu()[torch.from_numpy(keep)][order]
        values = dict(bank_against_rule=relative(banked, plain))
        results[dtype] = plain
        if dtype is torch.bfloat16:
            values["rule_against_float32"] = relative(plain, results[torch.float32])
        if bench.cuda:
            captured, sample.Captured = sample.Captured, lambda model: model
            try:
                latent = sample.sample_video(model, conditions, settings)
            finally:
                sample.Captured = captured
            same = torch.equal(banked, torch.stack([latent[f] for f in range(M)]))
            values["recorded_is_equal_to_the_bit"] = same
        bench.add("equality", str(dtype).removeprefix("torch."), **values)


def training(bench, frames, compiled):
    """Steps of `train.py`, on one process."""
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
        t, noise, drop = (data.send(x, device) for x in train.sample_noise(0, n, shape, 0.1))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            error, bound = objective(given, t, noise, drop)
        (error + bound).mean().backward()
        meter.add(n, t, error, bound)
        optimizer.step()
        train.update_ema(ema, model, n, 0.9999)

    began = time.monotonic()
    for n in range(3 if bench.cuda else 1):
        step(n)
    bench.wait()
    warm = time.monotonic() - began
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began, count = time.monotonic(), 0
    while count < 3 * bench.cuda or time.monotonic() - began < 8 * bench.cuda or not count:
        step(count)
        count += 1
        bench.wait()
    seconds = (time.monotonic() - began) / count

    rows = a.rows / seconds
    peak = train.device_peak(device, torch.bfloat16 if bf16 else torch.float32)
    values = dict(
        rows=a.rows,
        steps_per_s=1 / seconds,
        rows_per_s=rows,
        mfu=rows * train.row_flops(c) / 1e12 / peak,
        peak_gib=data.peak_memory(device.type),
        warm_up_s=warm,
    )
    if frames == 8 and a.size == "XL/2":
        values["times_an_A100_of_the_paper"] = rows / PAPER
        name = torch.cuda.get_device_name(device) if bench.cuda else ""
        limits = [limit for card, limit in ROOFLINE.items() if f" {card}" in name]
        if limits:
            values["part_of_roofline"] = limits[0][compiled] / 1000 * a.rows / 16 / seconds
    bench.add("training", f"T = {frames}, {'compiled' if compiled else 'eager'}", **values)


@torch.no_grad()
def sampling(bench):
    """Frames a second, with guidance and decoding, T = 8; the shortest first, to foresee the others."""
    dtype = torch.bfloat16 if sdit.has_bf16(bench.device.type) else torch.float32
    model = bench.model(8, dtype)
    widths = (128, 256, 512, 512) if bench.cuda else (32, 32, 32, 32)
    autoencoder = sdit.AutoencoderKL(sdit.AutoencoderConfig(widths)).eval()
    autoencoder.to(bench.device, memory_format=torch.channels_last)
    per_frame_step = None
    for M in bench.a.videos:
        conditions = [torch.randn(M, model.config.width).to(bench.device, dtype) for _ in range(2)]
        for steps in bench.a.steps:
            case = f"{M} frames, {steps} steps"
            if per_frame_step and time.monotonic() + per_frame_step * M * steps > bench.ends:
                bench.add("sampling", case, left_out=f"about {per_frame_step * M * steps:.0f} s")
                continue
            with bench.part("sampling", case):
                began = time.monotonic()
                latent = sample.sample_video(
                    model, conditions, sample.Settings(steps, "ddim:1", 2.0)
                )
                denoised = time.monotonic()
                for f in range(0, M, 8):
                    part = torch.stack([latent[i] for i in range(f, min(f + 8, M))])
                    data.to_images(autoencoder.decode(part.to(bench.device)))
                seconds = time.monotonic() - began
                per_frame_step = seconds / M / steps
                bench.add(
                    "sampling",
                    case,
                    frames_per_s=M / seconds,
                    denoising_s=denoised - began,
                    decoding_s=seconds - (denoised - began),
                    peak_gib=data.peak_memory(bench.device.type),
                )


@torch.no_grad()
def engines(bench):
    """One evaluation of `packed`, of a few blocks of the model, two guidance branches, by every
    backend that is there."""
    model = bench.model(4, depth=bench.a.blocks)
    precision = "bf16" if bench.cuda else "fp32"
    dtype, inputs = (
        export.PRECISIONS[precision],
        export.example(model.config, "packed", 4, 2, 2, device=bench.device),
    )
    expected = export.reference(model, "packed", inputs)[0]
    graph = export.build_graph(model, "packed", precision).to(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        a = type(
            "Arguments", (), dict(precision=precision, branches=2, rows=[4, 4], out=Path(folder))
        )()
        for kind in ("eager", "compiled", "onnx", "trt"):
            if kind == "compiled" and not bench.a.compile_too:
                continue
            with bench.part("engines", kind):
                if kind == "eager":
                    run = functools.partial(export.run_module, graph, dtype)
                elif kind == "compiled":
                    run = functools.partial(export.run_module, torch.compile(graph), dtype)
                else:
                    path = export.write_graph(model, kind, "packed", a, Path(folder), bench.device)
                    run = export.load_runner(kind, path, dtype, bench.device)
                error, seconds = export.relative_error(run(inputs)[0], expected), []
                for _ in range(10 if bench.cuda else 2):
                    bench.wait()
                    began = time.perf_counter()
                    run(inputs)
                    bench.wait()
                    seconds.append(time.perf_counter() - began)
                bench.add(
                    "engines",
                    f"{kind} {precision}, {bench.a.blocks} blocks",
                    ms=1000 * statistics.median(seconds),
                    relative_error=error,
                )


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
    count = data.number(int, 1)
    ap = data.Parser(__doc__)
    ap.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    ap.add_argument("--size", default="XL/2", help="model size")
    ap.add_argument(
        "--rows",
        type=count,
        help="rows of a training step (default: 16 from 70 GiB on, else 4; on a CPU 1)",
    )
    ap.add_argument(
        "--videos",
        type=count,
        nargs="+",
        help="frames to sample (default: 25 100 1003; on a CPU 9)",
    )
    ap.add_argument(
        "--steps", type=count, nargs="+", help="denoising steps (default: 10 20 50; on a CPU 1)"
    )
    ap.add_argument("--blocks", type=count, default=4, help="of the model, to time engines with")
    ap.add_argument(
        "--minutes", type=data.number(float, 0), default=9, help="after which no sampling begins"
    )
    ap.add_argument("--out", type=Path, default=Path("gpu_check"), help="OUT.json, OUT.md")
    a = ap.parse_args()
    a.device = data.get_device(a.device)
    cuda = a.device.type == "cuda"
    memory = torch.cuda.get_device_properties(a.device).total_memory / 2**30 if cuda else 0
    a.compile_too = cuda
    a.rows = a.rows or ((16 if memory > 70 else 4) if cuda else 1)
    a.videos = a.videos or ([25, 100, 1003] if cuda else [9])
    a.steps = a.steps or ([10, 20, 50] if cuda else [1])
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
        for compiled in (False, True)[: 1 + a.compile_too]:
            with bench.part("training", f"T = {frames}, {'compiled' if compiled else 'eager'}"):
                training(bench, frames, compiled)
                torch.compiler.reset()
    with bench.part("engines", "all"):
        engines(bench)
    with bench.part("sampling", "all"):
        sampling(bench)
    write(bench)


if __name__ == "__main__":
    data.run_main(main)
