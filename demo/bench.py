"""How fast every form and backend of export.py is on this machine: `python export.py --bench`."""

import functools
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import export
from sdit import UserError

FORMS = ("unanchored", "override", "packed")
KINDS = ("torchscript", "onnx", "trt")
PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt")


def peak_memory(run, device):
    """MiB of the GPU that a call takes at its peak beyond what is held before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def make_runners(model, a, device, folder):
    """{(backend, form): runner}, and {(backend, form): the reason why there is none}."""
    runners, missing, dtype = {}, {}, export.PRECISIONS[a.precision]
    for form in FORMS:
        graph = export.build_graph(model, form, a.precision, a.branches).to(device)
        runners["eager", form] = functools.partial(export.run_module, graph, dtype)
        compiled = torch.compile(graph)
        runners["compiled", form] = functools.partial(export.run_module, compiled, dtype)
        for kind in KINDS:
            try:
                (folder / kind).mkdir(exist_ok=True)
                path = export.write_graph(model, kind, form, a, folder / kind, device)
                runners[kind, form] = export.load_runner(kind, path, dtype, device)
            except (UserError, RuntimeError) as e:
                missing[kind, form] = str(e).partition("\n")[0]
    return runners, missing


def warm_up(model, a, device, runners, inputs):
    """Run everything twice. Returns {key: peak MiB}, {key: the reason why it does not run}."""
    memory, missing = {}, {}
    expected = {form: export.reference(model, form, inputs)[0] for form in FORMS}
    for key, run in tqdm(runners.items(), "warming up", unit="graph", leave=False, disable=None):
        backend, form = key
        try:
            error = export.relative_error(run(inputs)[0], expected[form])
            if not error <= export.TOLERANCE[a.precision]:
                raise RuntimeError(f"differs from the model by {error:.2g}")
            run(inputs)
            # ONNX Runtime and TensorRT allocate beside PyTorch
            if device.type == "cuda" and backend not in ("onnx", "trt"):
                memory[key] = peak_memory(functools.partial(run, inputs), device)
        except Exception as e:  # a backend that fails is a row of the table
            missing[key] = str(e).partition("\n")[0]
    return memory, missing


def time_runners(runners, inputs, device, repeat):
    """Median seconds of a call, each runner in turn."""
    seconds = {key: [] for key in runners}
    for _ in tqdm(range(repeat), "timing", unit="round", leave=False, disable=None):
        for key, run in runners.items():
            start = time.perf_counter()
            run(inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def bench(model, a, device, repeat=7):
    """Time one evaluation of the typical number of rows by every backend and form."""
    slot = model.config.frames // 2
    inputs = export.example(model.config, "packed", a.rows[0], a.branches, slot, device=device)
    with tempfile.TemporaryDirectory() as folder:
        a.out = Path(folder)
        runners, missing = make_runners(model, a, device, a.out)
        memory, failed = warm_up(model, a, device, runners, inputs)
        runners = {key: run for key, run in runners.items() if key not in failed}
        seconds = time_runners(runners, inputs, device, repeat)
    report(model, a, device, seconds, memory, missing | failed, repeat)


def report(model, a, device, seconds, memory, missing, repeat):
    """Print the table, medians and their ratios to eager `override`; the last line is JSON."""
    name = f"{platform.processor() or platform.machine()} CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    hardware = f"{name}, {torch.get_num_threads()} threads"
    versions, config = export.versions(*PACKAGES), model.config
    print(
        f"{config.name}, T = {config.frames}, {a.rows[0]} rows, {a.branches} guidance branch(es), "
        f"{a.precision}; {hardware}; {versions}; median of {repeat}\n"
    )

    base = seconds.get(("eager", "override"), math.nan)
    print(f"| | {' | '.join(FORMS)} | peak memory of a GPU, packed |\n|---|---|---|---|---|")
    for backend in dict.fromkeys(backend for backend, _ in seconds):
        cells = ["-"] * len(FORMS)
        for i, form in enumerate(FORMS):
            if (backend, form) in seconds:
                median = seconds[backend, form]
                cells[i] = f"{median * 1e3:,.1f} ms ({median / base:.2f})"
        peak = memory.get((backend, "packed")) or 0
        cells.append(f"{peak:,.0f} MiB" if peak else "-")
        print(f"| {backend} | {' | '.join(cells)} |")
    for why in dict.fromkeys(missing.values()):
        names = ", ".join(" ".join(key) for key, reason in missing.items() if reason == why)
        print(f"no {names}: {why}")

    about = dict(
        model=config.name,
        frames=config.frames,
        rows=a.rows[0],
        branches=a.branches,
        precision=a.precision,
        hardware=hardware,
        versions=versions,
        repeat=repeat,
        ms={" ".join(key): 1e3 * value for key, value in seconds.items()},
        peak_mib={" ".join(key): value for key, value in memory.items()},
    )
    print(json.dumps(about))
