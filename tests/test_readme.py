"""The README's own commands, read from the file and run."""
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import torch

import data
import sample
import sdit
from conftest import ROOT, random_sdit, rendered_world

README = (ROOT / "README.md").read_text()


def commands(text):
    """The commands of the fenced blocks in a text, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line, comments=True) for line in "".join(blocks).splitlines()]


def smallest(command):
    """The command at a size that takes seconds."""
    script = command[1]
    values = {"--clips": "2", "--frames": "4", "--steps": "2", "--batch": "2"}
    small = [values.get(before, word) for before, word in zip([None, *command], command)]
    if script == "sample.py":
        small += ["--steps", "2", "--only", "0:2"]
    if script == "demo/world.py":
        small += ["--frames", "8", "--size", "128"]
    return [str(ROOT / script), *small[2:]]


def run(commands, folder):
    """One after the other, in one process, which loads PyTorch once."""
    code = """import json, runpy, sys, sdit
sdit.DEMO_SIZE["depth"] = 1  # the export of six blocks takes most of a minute
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name='__main__')"""
    process, paths = [sys.executable, "-c", code, json.dumps(commands)], os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(process, cwd=folder, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_whole_chain(tmp_path):
    """Clips, cache, training, sampling, export, sampling with the engine: each from what the one before made."""
    rendered_world()
    chain = commands(README.split("## The whole chain\n")[1].split("\n## ")[0])
    assert [command[1] for command in chain] == [
        "demo/world.py", "data.py", "train.py", "sample.py", "export.py", "sample.py"]
    run([smallest(command) for command in chain], tmp_path)
    with_engine, with_model = (np.stack(list(data.Video(tmp_path / f"runs/first/{name}.mp4"))) for name in ("engine", "model"))
    assert with_engine.shape == with_model.shape == (2, 256, 256, 3)
    assert abs(with_engine.astype(int) - with_model).mean() < 2


def test_algorithm_1_as_printed():
    """The twelve lines of the README give what sample.py gives."""
    code = README.split("```python\n")[1].split("```")[0]
    model, M, T, C, H, W, seed = random_sdit(frames=4).double(), 13, 4, 4, 8, 8, 5
    settings = sample.Settings(steps=3, sampler="ddim", guidance=1.0, seed=seed)
    alpha_bar = [*sdit.NoiseSchedule().alpha_bar.tolist(), 1.0]
    conditioning, video = torch.randn(M, 32, dtype=torch.float64), torch.zeros(M, C, H, W, dtype=torch.float64)
    names = dict(vars(sample) | locals(), override=sdit.override)
    with torch.no_grad():
        exec(code, names)
        expected = sample.sample_video(model, [conditioning], settings)
    assert len(code.strip().splitlines()) <= 16
    assert all(torch.allclose(video[f], expected[f], atol=1e-10) for f in range(M))


def test_every_command_is_understood(monkeypatch):
    """Names of flags and kinds of values, of every script of the top level."""
    seen = set()
    for command in commands(README):
        script = next((i for i, word in enumerate(command) if re.fullmatch(r"[a-z]+\.py", word)), None)
        if script is None:
            continue
        module = importlib.import_module(command[script].removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", command[script:])
        module.arguments()
        seen.add(module.__name__)
    assert seen == {"data", "train", "sample", "export", "curate", "evaluate"}


def test_counts_of_lines():
    told = re.findall(r"\| \[`(\w+\.py)`\]\(\1\) \| (\d+) \|", README)
    assert len(told) == 7
    for file, lines in told:
        assert abs(len((ROOT / file).read_text().splitlines()) - int(lines)) <= 0.05 * int(lines), file
