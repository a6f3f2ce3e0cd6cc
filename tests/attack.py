"""Bad inputs and kills over all scripts: two figures. Not part of the tests; minutes on an idle machine.

    python tests/attack.py                  # all bad inputs, 100 kills
    python tests/attack.py --bad 20 --kills 12 --seed 1

A bad input is handled if the script ends in time, with exit code 0, 1 or 2, without a traceback, and if every file that was
there before is as it was. A kill (kill -9 or SIGTERM at a random moment) is survived if the same command, given again until
it ends, makes what an undisturbed run makes; one that ended before its moment counts as none. Scripts, and curate's workers, run
in forks of this process, which has imported what they need: so a kill costs a second or two, even on a busy machine.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import mediapipe.python.solutions.face_mesh  # noqa: F401
import numpy as np
import open_clip  # noqa: F401
import torch

import curate
import data
import evaluate
import export
import sample
import sdit
import train

FORK = multiprocessing.get_context("fork")
SCRIPTS = dict(curate=curate, data=data, evaluate=evaluate, export=export, sample=sample, train=train)
LIMIT = 240                                        # seconds that a script may take


def start(script, given, folder):
    """Process number of a script that runs in a fork, in `folder`; what it says is in folder/said."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.chdir(folder)
    log = os.open(folder / "said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    multiprocessing.get_context = lambda _: FORK
    sys.argv, code = [f"{script}.py", *given], 0
    try:
        data.run_main(SCRIPTS[script].main)
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def wait(process, seconds):
    """Exit code of a process, negative for a signal; None where it goes on after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)


def run(script, given, folder):
    """(exit code or None, what it said) of a script that runs to its end."""
    process = start(script, given, folder)
    code = wait(process, LIMIT)
    if code is None:
        os.killpg(process, signal.SIGKILL)
        wait(process, 10)
    return code, (folder / "said").read_text(errors="replace")


# --------------------------------------------------------------------------------------------------
# Bad inputs

def make_inputs(folder):
    """A user's files, good and bad."""
    for name in ("source.png", "sdit.safetensors", "autoencoder.safetensors", "clip.safetensors"):
        shutil.copy(ROOT / "demo" / name, folder)
    frames = [f for _, f in zip(range(8), data.Video(ROOT / "demo" / "driving.mp4"))]
    for name, shown in ("good.mp4", frames), ("nobody.mp4", [np.full_like(frames[0], 90)] * 4), ("one.mp4", frames[:1]):
        with data.VideoWriter(folder / name, 24) as out:
            for frame in shown:
                out.write(frame)

    whole, model = (folder / "good.mp4").read_bytes(), (folder / "sdit.safetensors").read_bytes()
    texts = {"empty.mp4": b"", "text.mp4": b"no video", "torn.mp4": whole[:len(whole) // 2], "noise.mp4": bytes(random.Random(0).randbytes(5000)),
             "empty.png": b"", "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n", "torn.safetensors": model[:2000],
             "empty.safetensors": b"", "zeros.safetensors": bytes(4096), "junk.pt": b"junk", "late.safetensors": model[:-100],
             "empty.csv": b"", "words.csv": b"these are\nno columns\n", "nul.csv": b"source,driving,out\n\0,\0,\0\n",
             "short.csv": b"source,driving,out\nsource.png\n", "over.csv": b"source,driving,out\nsource.png,good.mp4,one.mp4\nsource.png,one.mp4,o.mp4\n",
             "twice.csv": b"source,driving,out\nnone.png,good.mp4,o.mp4\nnone.png,good.mp4,o.mp4\n", "queries.txt": b"--exec=touch pwned x://y\n"}
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    torch.save(dict(a=Path("x")), folder / "pickle.pt")
    tensors, config = sdit.read_tensors(folder / "sdit.safetensors")
    for name, wrong in ("wide", dict(width=20_000)), ("deep", dict(depth=10 ** 9)), ("words", dict(depth="six")), ("lost", dict(clip_sha256="0" * 64)):
        sdit.write_tensors(folder / f"{name}.safetensors", tensors, config | wrong)
    sdit.write_tensors(folder / "nan.safetensors", {k: v * torch.nan for k, v in tensors.items()}, config)

    for name, index in ("torn", "{"), ("old", '{"shards": []}'), ("list", "[]"), ("gone", json.dumps(dict(clips=[["clip-0.safetensors", 99]], size=64))):
        (folder / f"cache-{name}").mkdir()
        (folder / f"cache-{name}" / "index.json").write_text(index)
    for name in ("nothing", "videos", "bad", "export", "stages/detect", "states", "report"):
        (folder / name).mkdir(parents=True)
    shutil.copy(folder / "good.mp4", folder / "videos" / os.fsdecode(b"caf\xe9:1.mp4"))
    for name in ("empty.mp4", "torn.mp4", "noise.mp4", "script.png"):
        shutil.copy(folder / name, folder / "bad")
    (folder / "bad" / "link.mp4").symlink_to("nowhere")
    (folder / "bad" / "loop").symlink_to("..")
    (folder / "export" / "manifest.json").write_text('{"files": 1}')
    (folder / "stages" / "detect" / "x.json").write_text("[" * 50_000)
    (folder / "states" / "state-00000001.pt").write_bytes(b"torn")
    (folder / "report" / "same.json").write_text("[]")


NEW = ["--driving", "good.mp4", "--source", "source.png", "--steps", "1", "--guidance", "1", "--out", "new.mp4"]
TINY = ["--size", "demo", "--frames", "2", "--steps", "2", "--batch", "2", "--preview", "0"]
BAD = [*(("sample", [*NEW, *given]) for given in (
           ["--source", "none.png"], ["--source", "empty.png"], ["--source", "script.png"], ["--source", "nothing"], ["--source", "nobody.mp4"], ["--source", "queries.txt"],
           ["--driving", "none.mp4"], ["--driving", "empty.mp4"], ["--driving", "text.mp4"], ["--driving", "torn.mp4"], ["--driving", "noise.mp4"],
           ["--driving", "nobody.mp4"], ["--driving", "nothing"], ["--driving", "script.png"], ["--driving", "one.mp4"],
           ["--out", "good.mp4"], ["--out", "nothing"], ["--out", "x.txt"], ["--out", "good.mp4/x.mp4"], ["--out", "a" * 300 + ".mp4"], ["--out", "a" * 250 + ".mp4"],
           ["--out", "take:2.mp4"], ["--out", ""], ["--model", "torn.safetensors"], ["--model", "empty.safetensors"], ["--model", "zeros.safetensors"],
           ["--model", "late.safetensors"], ["--model", "junk.pt"], ["--model", "pickle.pt"], ["--model", "wide.safetensors"], ["--model", "deep.safetensors"],
           ["--model", "words.safetensors"], ["--model", "lost.safetensors"], ["--model", "nan.safetensors"], ["--model", "clip.safetensors"], ["--model", "nothing"],
           ["--engine", "export"], ["--engine", "nothing"], ["--steps", "0"], ["--steps", "many"], ["--guidance", "nan"], ["--guidance", "1e38"], ["--seed", "-1"],
           ["--seed", "9" * 40], ["--sampler", "ddim:2"], ["--face", "9"], ["--only", "9:1"], ["--only", "x"], ["--edit", "red"], ["--device", "cuda:99"],
           ["--pairs", "none.csv"], ["--pairs", "empty.csv"], ["--pairs", "words.csv"], ["--pairs", "nul.csv"], ["--pairs", "short.csv"], ["--pairs", "over.csv"],
           ["--pairs", "twice.csv"], ["--pairs", "nothing"], ["--nonsense"])),
       *(("data", ["--out", "new", *given]) for given in (
           [], ["none"], ["nothing"], ["good.mp4"], ["bad"], ["videos"], ["videos", "--size", "7"], ["videos", "--size", "-64"], ["videos", "--autoencoder", "torn.safetensors"],
           ["videos", "--autoencoder", "wide.safetensors"], ["videos", "--clip", "autoencoder.safetensors"], ["videos", "--clip", "torn.safetensors"],
           ["videos", "--out", "good.mp4"], ["videos", "--out", "cache-torn"])),
       *(("train", [*TINY, "--out", "new", *given]) for given in (
           ["--data", "none"], ["--data", "cache-torn"], ["--data", "cache-old"], ["--data", "cache-list"], ["--data", "cache-gone"], ["--data", "a:0"], ["--lr", "nan"],
           ["--ema", "nan"], ["--drop", "2"], ["--batch", "0"], ["--size", "XXL/3"], ["--frames", "-1"], ["--out", "good.mp4"], ["--data", "cache-gone", "--init", "junk.pt"])),
       *(("curate", given) for given in (
           ["run"], ["run", "none", "--out", "new"], ["run", "nothing", "--out", "new"], ["detect", "bad", "--out", "new"], ["validate", "--out", "stages"], ["write", "--out", "new"],
           ["stats", "--out", "new"], ["search", "queries.txt", "--out", "new"], ["search", "none.txt", "--out", "new"], ["run", "videos", "--size", "3"],
           ["run", "videos", "--min-clip", "nan"], ["run", "videos", "--out", "new", "--clip", "torn.safetensors"], ["run", "videos", "--drop", "none.txt"])),
       *(("export", given) for given in (["--onnx", "--model", "torn.safetensors"], ["--onnx", "--rows", "3", "1"], ["--onnx", "--size", "XXL"], ["--onnx", "--frames", "x"],
                                         ["--onnx", "--out", "good.mp4"], [])),
       *(("evaluate", given) for given in (["report", "--out", "report"], ["report", "--out", "new"], ["same", "--clips", "none", "--out", "new"], ["cross", "--pairs", "words.csv", "--out", "new"],
                                           ["same", "--n", "0"], ["pairs", "nothing", "--out", "new"], ["guidance", "--data", "cache-torn", "--out", "new"]))]


def digests(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def bad_inputs(most, folder):
    make_inputs(folder)
    before, handled, tried = digests(folder), 0, random.sample(BAD, min(most, len(BAD)))
    for number, (script, given) in enumerate(tried):
        if number % 10 == 0:
            print(f"{number} of {len(tried)} bad inputs, {handled} handled", flush=True)
        code, said = run(script, given, folder)
        after = digests(folder)
        changed = [p.name for p in before if after.get(p) != before[p]]
        good = code in (0, 1, 2) and "Traceback" not in said and not changed and not (folder / "pwned").exists()
        handled += good
        if not good:
            print(f"not handled: {script}.py {' '.join(given)[:120]}: exit {code}, changed {changed}\n{said[-600:]}", flush=True)
        for p in set(after) - set(before):
            p.unlink()
        for name in ("new", "new.mp4.partial"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return len(tried), handled


# --------------------------------------------------------------------------------------------------
# Kills

def result_of(script, out):
    """What must be the same whatever happened on the way; leftovers of killed runs are a difference."""
    hidden = sorted(p.name for p in out.parent.rglob(".*") if p.name != ".matplotlib")
    if script == "train":
        return hidden, [v.sum().item() for v in sdit.load_model(out / "model.safetensors").state_dict().values()]
    if script == "sample":
        return hidden, len(list(data.Video(out))), sorted(p.name for p in out.parent.iterdir())
    if script == "curate":
        lines = [{k: v for k, v in line.items() if k != "bytes"} for line in data.read_lines([out / "manifest.jsonl"])]
        return hidden, lines, sorted(p.name for p in out.rglob("*.mp4"))
    return hidden, {p.name: data.sha256(p) for p in out.glob("clip-*")}, (out / "index.json").read_text(), (out / "manifest.jsonl").read_text()


def kills(number, folder):
    rng, tried, survived = random.Random(0), 0, 0
    videos = folder / "videos"
    videos.mkdir()
    frames = list(data.Video(ROOT / "demo" / "driving.mp4"))
    for name in "ab":
        with data.VideoWriter(videos / f"{name}.mp4", 24) as out:
            for frame in frames[:26]:
                out.write(frame)
    code, said = run("data", [str(videos), "--out", "cache"], folder)
    assert code == 0, said
    commands = dict(
        data=("out", lambda out: [str(videos), "--out", str(out)]),
        train=("out", lambda out: ["--size", "demo", "--frames", "2", "--data", str(folder / "cache"), "--batch", "2", "--steps", "8", "--save-minutes", "0", "--preview", "0",
                                   "--precision", "fp32", "--out", str(out)]),
        sample=("out.mp4", lambda out: ["--driving", str(videos / "a.mp4"), "--steps", "2", "--guidance", "1", "--out", str(out)]),
        curate=("out", lambda out: ["run", str(videos), "--out", str(out), "--min-seconds", "1", "--min-side", "32", "--min-clip", "-1", "--size", "64"]))
    whole, seconds = {}, {}
    for script, (name, given) in commands.items():
        (folder / script).mkdir()
        began = time.monotonic()
        code, said = run(script, given(folder / script / name), folder)
        assert code == 0, said
        whole[script], seconds[script] = result_of(script, folder / script / name), time.monotonic() - began

    rounds = 0
    while tried < number:
        script = list(commands)[rounds % 4]
        name, given = commands[script]
        home = folder / f"{script}-{rounds}"
        home.mkdir()
        rounds, here = rounds + 1, 0
        for _ in range(min(5, number - tried)):                                 # one after the other on the same output
            process = start(script, given(home / name), folder)
            if wait(process, rng.uniform(0, seconds[script])) is not None:
                break                                                           # it had ended
            os.kill(process, rng.choice([signal.SIGKILL, signal.SIGTERM]))
            if wait(process, LIMIT) is None:
                os.killpg(process, signal.SIGKILL)
                print(f"{script}.py went on after SIGTERM", flush=True)
            here += 1
        code, said = run(script, given(home / name), folder)
        found = result_of(script, home / name) if code == 0 else None
        tried += here
        if found == whole[script] and "Traceback" not in said:
            survived += here
        else:
            print(f"not survived: {script}.py after {here} kills: exit {code}\n{said[-600:]}\n{str(found)[:500]}\n{str(whole[script])[:500]}", flush=True)
        shutil.rmtree(home)
        print(f"{tried} of {number} kills, {survived} survived", flush=True)
    return tried, survived


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--bad", type=int, default=len(BAD), help=f"bad inputs to try, of {len(BAD)}")
    ap.add_argument("--kills", type=int, default=100)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    random.seed(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("bad", "kills"):
            (folder / name).mkdir()
        tried, handled = bad_inputs(a.bad, folder / "bad")
        print(f"bad inputs: {tried} tried, {handled} handled", flush=True)
        killed, survived = kills(a.kills, folder / "kills")
        print(f"kills: {killed} tried, {survived} survived")
    sys.exit(handled < tried or survived < killed)


if __name__ == "__main__":
    main()
