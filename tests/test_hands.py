"""Hands that do odd things: names, two at once, interruptions, files of a user's, hostile files, silly numbers."""
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin

import curate
import data
import evaluate
import sample
import sdit
import train
from conftest import cache_settings, ROOT, random_sdit, write_video
from test_data import shades, write_cache
from test_sample import frames_of
from test_train import cache, run, same  # noqa: F401 (a fixture)


def ended(main, capsys):
    """(exit code, what was said on stderr) of a script."""
    with pytest.raises(SystemExit) as leave:
        data.run_main(main)
    return leave.value.code, capsys.readouterr().err


# Names and places

def test_videos_of_any_name(tmp_path):
    plain = write_video(tmp_path / "plain.mp4", shades(3))
    for name in (b"take:2.mp4", b"file:x.mp4", b"caf\xe9.mp4", b"a" * 251 + b".mp4"[:4], "ö".encode() * 120 + b".mp4"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        with data.VideoWriter(path, 25, sound=data.Video(plain)) as out:
            for frame in shades(3):
                out.write(frame)
        assert len(data.Video(path)) == 3, name
    assert len(list(tmp_path.iterdir())) == 6                                   # and nothing else


def test_rows_and_caches_of_any_name(tmp_path):
    """The library of safetensors takes no name that is not UTF-8."""
    home = tmp_path / os.fsdecode(b"caf\xe9")
    home.mkdir()
    rows = sample.LatentStore(f"{home}/o.mp4/", "k")
    assert not (home / "o.mp4").exists()
    rows[1] = torch.ones(3)
    assert 1 in rows and rows[1].sum() == 3
    assert len(data.Rows(write_cache(home / "cache", [1, 2]), 8)[0]["latents"]) == 8
    assert all(map(data.CacheWriter(home / "cache", {}).read, (home / "cache").glob("clip-*")))


def test_folders_behind_links(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "a.mp4").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "real").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")                     # a loop
    (tmp_path / "in" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(tmp_path / "in" / "pipe.mp4")                                     # would be waited for
    found = [str(p.relative_to(tmp_path / "in")) for p in data.list_files(tmp_path / "in", data.VIDEOS)]
    assert found == ["gone.mp4", "real/a.mp4"]


def test_text_files_of_all_editors(tmp_path):
    for content in ("é,b".encode(), "\ufeffé,b".encode(), "é,b".encode("utf-16")):
        (tmp_path / "t").write_bytes(content)
        assert data.read_text(tmp_path / "t") == "é,b"
    (tmp_path / "t").write_bytes(b"caf\xe9.mp4")
    assert os.fsencode(data.read_text(tmp_path / "t")) == b"caf\xe9.mp4"
    name = os.fsdecode(b"caf\xe9")
    assert curate.Source(Path(f"{name}.mp4"), f"{name}.mp4", name).key and curate.split_of(name, 0.5) in ("train", "test")


def test_no_home_no_terminal(monkeypatch):
    code = "import os, pwd\ndef none(*_): raise KeyError\npwd.getpwuid = none\nos.environ.pop('HOME')\nimport data; print(data.DOWNLOADS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("/"), done.stderr
    monkeypatch.setattr(os, "dup", lambda _: (_ for _ in ()).throw(OSError(errno.EBADF, "closed")))
    monkeypatch.setattr(sys, "stderr", None)
    with data.quiet():
        pass
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    data.run_main(lambda: print("é", os.fsdecode(b"caf\xe9")))
    assert b"\\xe9 caf\\udce9" in ascii_only.buffer.getvalue()


# Two at once

def test_an_output_has_one_owner(tmp_path):
    (tmp_path / ".o.mp4.lock").write_text("process 1")                          # of a run that was killed: the system freed it
    with data.owned(tmp_path / "o.mp4"):
        with pytest.raises(sdit.UserError, match=f"o.mp4 is being made by process {os.getpid()}; wait"):
            with data.owned(tmp_path / "o.mp4"):
                pass
        with data.owned(tmp_path / "other.mp4"):
            pass
    with data.owned(tmp_path / "o.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_threads_share_mediapipe_and_stderr(landmarker, clip, capfd):
    expected, found = landmarker(clip[0][0]), []
    threads = [threading.Thread(target=lambda: found.extend(landmarker(clip[0][0]) for _ in range(5))) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 20 and all(np.array_equal(f, expected) for f in found)
    os.write(2, b"still here")
    assert "still here" in capfd.readouterr().err


def test_a_forked_child_says_so(landmarker, clip, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(sdit.UserError, match="does not survive a fork"):
        landmarker(clip[0][0])


# Interrupted

def test_interruptions_are_one_line(capsys):
    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    def torn():
        raise KeyboardInterrupt
    for main, code in (stopped, 143), (torn, 130):
        left, said = ended(main, capsys)
        assert left == code and said == "stopped; the same command goes on from what is finished\n"


@pytest.mark.parametrize("error, text", [(OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device; make room"),
                                         (MemoryError(), "out of memory"), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
                                         (PermissionError(13, "Permission denied", "y"), "y: Permission denied"), (sdit.UserError("z"), "error: z")])
def test_errors_of_the_machine_are_one_sentence(error, text, capsys):
    def main():
        raise error
    code, said = ended(main, capsys)
    assert code == 2 and text in said and said.count("\n") == 1
    with pytest.raises(ZeroDivisionError):                                      # ours are not hidden
        data.run_main(lambda: 1 / 0)


def test_a_write_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("older")
    (tmp_path / ".a.txt.tmp.txt").write_text("half of what a killed run wrote")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="No space left"):                         # whatever PyTorch makes of it
        with sdit.atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError("unexpected pos 64 vs 0")
    assert (tmp_path / "a.txt").read_text() == "older"
    data.write_text(tmp_path / "a.txt", "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "newer"


def test_torn_rows_and_records_are_made_again(tmp_path):
    rows = sample.LatentStore(tmp_path / "o.mp4", "k")
    for row in range(4):
        rows[row] = torch.ones(2, 4, 8, 8)
    whole = rows._path(0).read_bytes()
    for row, torn in enumerate((b"", whole[:-9], bytes(len(whole)))):
        rows._path(row).write_bytes(torn)
    rows._path(4).write_bytes(whole.replace(b"latent", b"patent"))
    assert [row in rows for row in range(6)] == [False, False, False, True, False, False]
    folder = write_cache(tmp_path / "cache", [1, 2])
    writer = data.CacheWriter(folder, cache_settings(size=32))
    record_of_2 = writer.path("002")
    record_of_2.write_bytes(record_of_2.read_bytes()[:-5])
    assert writer.read(writer.path("001")) and writer.read(record_of_2) is None
    with pytest.raises(sdit.UserError, match="gone or torn .*; remove .*index.json"):
        [data.Rows(folder, 8)[n] for n in range(2)]
    about = json.loads((folder / "index.json").read_text())
    for mended in ([["a", None]], [["b", 30], ["a"]], [["b", 30], ["a", None]], 7):   # by hand
        (folder / "index.json").write_text(json.dumps(about | dict(clips=mended)))
        with pytest.raises(sdit.UserError, match="is torn; remove it"):
            data.Rows(folder, 8)
    for torn in ('{"clips": [[1', '{"clips": [["a", 9], ["b", 30]]}', "[]", '{"clips": [["a", null]]}', '{"shards": []}'):
        (folder / "index.json").write_text(torn)
        with pytest.raises(sdit.UserError, match="torn|older data.py"):
            data.Rows(folder, 8)


def test_ctrl_c_saves_and_logs(cache, tmp_path, monkeypatch, capsys):  # noqa: F811
    run(cache, tmp_path / "whole", monkeypatch, "--save-minutes", "9", "--log-every", "9")
    draw = train.sample_noise

    def interrupted(seed, step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(seed, step, *rest)
    with monkeypatch.context() as m:
        m.setattr(train, "sample_noise", interrupted)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            run(cache, tmp_path / "parts", monkeypatch, "--save-minutes", "9", "--log-every", "9")
    assert "stopped by SIGINT; saved after step 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "parts" / "log.jsonl").read_text())["step"] == 2
    (tmp_path / "parts" / ".state-00000009.pt.tmp.pt").write_text("of a run that was killed")
    run(cache, tmp_path / "parts", monkeypatch, "--save-minutes", "9", "--log-every", "9")
    assert same(tmp_path / "whole", tmp_path / "parts") and not list((tmp_path / "parts").glob(".*"))
    assert [json.loads(line)["step"] for line in open(tmp_path / "parts" / "log.jsonl")] == [2, 4]        # the end, too
    with monkeypatch.context() as m:                                            # at the last step: it is finished, not stopped
        m.setattr(train, "sample_noise", lambda seed, step, *rest: interrupted(seed, step - 2, *rest))
        run(cache, tmp_path / "late", monkeypatch, "--save-minutes", "9", "--log-every", "9")


def test_a_worker_ends_with_its_parent(tmp_path):
    code = f"""
import concurrent.futures, multiprocessing, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data
if __name__ == "__main__":
    pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), data.end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, signal.SIGTERM)                                             # which a group gets together: not its affair
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


# Nothing of the user's is destroyed or run

def test_no_line_of_pairs_destroys_anything(tmp_path):
    for name in ("a", "b", "c-compare"):
        write_video(tmp_path / f"{name}.mp4", shades(2))
    job = lambda driving, out: dict(driving=tmp_path / driving, out=tmp_path / out)
    jobs = [job("a.mp4", "b.mp4"), job("b.mp4", "x.mp4"), job("a.mp4", "c.mp4"), job("c-compare.mp4", "y.mp4"), job("a.mp4", "../" + tmp_path.name + "/y.mp4"),
            job("a.mp4", "new.mp4"), job("new.mp4", "z.mp4"), dict(driving=tmp_path / "a.mp4"), job("late.mp4", "w.mp4"), job("a.mp4", "late.mp4")]
    assert set(sample.find_conflicts(jobs, False)) == {0, 4, 9} and set(sample.find_conflicts(jobs, True)) == {0, 2, 4, 9}
    with data.VideoWriter(tmp_path / "new.mp4", 25, 'synthetic; {"tool": "anchored-diffusion"}') as out:
        out.write(shades(1)[0])
    assert set(sample.find_conflicts(jobs, False)) == {0, 4, 9}                      # our own earlier result is made again


def test_copies_of_states_and_rows_of_others_stay(cache, tmp_path, monkeypatch):  # noqa: F811
    run(cache, tmp_path / "run", monkeypatch, "--save-minutes", "0")
    best = tmp_path / "run" / "state-best.pt"
    shutil.copy(tmp_path / "run" / "state-00000003.pt", best)
    (tmp_path / "run" / "state-00000004.pt").unlink()
    run(cache, tmp_path / "run", monkeypatch, "--save-minutes", "0")
    assert sorted(p.name for p in (tmp_path / "run").glob("state*")) == ["state-00000003.pt", "state-00000004.pt", "state-best.pt"]
    rows = sample.LatentStore(tmp_path / "o.mp4", "k")
    rows[1] = torch.ones(1)
    (rows.folder / "mine.txt").touch()
    rows.remove()
    assert [p.name for p in rows.folder.iterdir()] == ["mine.txt"]
    with pytest.raises(sdit.UserError, match="model.safetensors would be written over"):
        run(cache, tmp_path / "run", monkeypatch, "--init", str(tmp_path / "run" / "model.safetensors"))


def test_postscript_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n%%EOF\n")
    with pytest.raises(sdit.UserError, match="x.png is not a picture"):
        data.read_picture(tmp_path / "x.png")


def test_a_query_is_no_option(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: "yt-dlp")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    for line in ("--exec=touch x://y", "-o x", "\ufeff--help", "a\0b"):
        (tmp_path / "q.txt").write_text(f"{line}\n")
        with pytest.raises(sdit.UserError, match="begins with a dash"):
            curate.search(type("A", (), dict(source=tmp_path / "q.txt", out=tmp_path, top=1)))


@pytest.mark.parametrize("wrong", [dict(width=20_000), dict(depth=10 ** 9), dict(depth="2"), dict(heads=0), dict(frames=10 ** 9), dict(patch=3), dict(latent_size=2 ** 15),
                                   dict(scene_mean=[None]), dict(width=float("nan")), dict(clip=["x"])])
def test_sizes_in_a_file_are_not_believed(wrong, tmp_path):
    model = random_sdit()
    sdit.save_model(tmp_path / "m.safetensors", model)
    tensors, config = sdit.read_tensors(tmp_path / "m.safetensors")
    sdit.write_tensors(tmp_path / "m.safetensors", tensors, config | wrong)
    began = time.perf_counter()
    with pytest.raises(sdit.UserError, match="m.safetensors"):
        sdit.load_model(tmp_path / "m.safetensors")
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("wrong", [dict(widths=[]), dict(widths=[8] * 9), dict(scale=math.nan), dict(latent_channels=0), dict(groups=3), dict(layers="2")])
def test_configurations_that_no_model_can_have(tmp_path, wrong):
    """A file whose metadata lie about its network is one sentence, before memory is taken for it."""
    config = dataclasses.asdict(sdit.AutoencoderConfig(widths=(8, 8), layers=1, groups=4)) | wrong
    sdit.write_tensors(tmp_path / "x.safetensors", dict(a=torch.zeros(1)), config)
    with pytest.raises(sdit.UserError, match="x.safetensors is not a model of ours"):
        sdit.load_autoencoder(tmp_path / "x.safetensors")


def test_hostile_clip_files_and_pickles(tmp_path):
    tensors, config = sdit.read_tensors(ROOT / "demo" / "clip.safetensors")
    for wrong in (dict(vision_cfg=config["vision_cfg"] | dict(timm_model_name="x")), dict(text_cfg=config["text_cfg"] | dict(hf_model_name="x")),
                  dict(vision_cfg=config["vision_cfg"] | dict(width=30_000)), dict(vision_cfg=config["vision_cfg"] | dict(layers=10 ** 9)), dict(text_cfg=[])):
        sdit.write_tensors(tmp_path / "c.safetensors", tensors, config | wrong)
        with pytest.raises(sdit.UserError, match="c.safetensors"):
            data.SceneEncoder(tmp_path / "c.safetensors")
    torch.save(dict(a=Path("x")), tmp_path / "p.pt")
    with pytest.raises(sdit.UserError, match="more than tensors") as e:
        sdit.read_tensors(tmp_path / "p.pt")
    assert "weights_only" not in str(e.value)
    torch.save(dict(a=torch.zeros(9)), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as a, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as b:
        for part in a.namelist():
            b.writestr(part, a.read(part))
    assert sdit.read_tensors(tmp_path / "plain.pt")[0]["a"].shape == (9,)
    with pytest.raises(sdit.UserError, match="compressed"):
        sdit.read_tensors(tmp_path / "bomb.pt")


# Curation

def test_one_rule_for_squares_that_leave_the_picture():
    assert data.keep_inside((10, 20, 100), (200, 200)) == (10, 20, 100)
    assert data.keep_inside((-9, 120, 100), (200, 200)) == (-9, 110, 100) and data.mirrored((-9, 110, 100), (200, 200)) == 0.1
    assert data.keep_inside((-40, 0, 100), (200, 200)) == (-10, 0, 100)
    assert data.keep_inside((-30, -13, 120), (96, 200)) == (-12, -12, 120)
    assert data.keep_inside((-15, -15, 121), (96, 200)) is None


def test_a_clip_that_was_torn_is_written_again(tmp_path):
    source = curate.Source(tmp_path / "v.mp4", "v.mp4", "v")
    a = type("A", (), dict(out=tmp_path, min_clip=0, min_arcface=0, size=64, test=0))
    clip = tmp_path / "train" / f"{source.key}-000000-0000-0000.mp4"
    clip.parent.mkdir()
    clip.write_bytes(b"whole")
    (tmp_path / "write").mkdir()
    found = dict(video="v.mp4", identity="v", path=str(source.path), key=curate.stage_key("write", source, a),
                 candidates=[dict(reason=None, clip=f"train/{clip.name}", bytes=5)])
    (tmp_path / "write" / f"{source.key}.json").write_text(json.dumps(found))
    assert curate.is_done("write", source, a)
    clip.write_bytes(b"who")
    assert not curate.is_done("write", source, a)
    for torn in ("", "[]", "[" * 100_000, '{"key": 1}'):
        (tmp_path / "write" / f"{source.key}.json").write_text(torn)
        assert curate.read_stage(tmp_path / "write" / f"{source.key}.json") is None
    curate.written_before.cache_clear()
    assert curate.written_before(tmp_path) == {source.key: [clip]}


def test_only_what_the_clip_is_to_blame_for_is_final(tmp_path):
    path = tmp_path / "v.mp4"
    path.touch()
    assert data.blame(sdit.UserError(f"{path} holds no frames"), path).endswith("holds no frames")
    assert data.blame(ZeroDivisionError("x"), path) == "ZeroDivisionError: x"
    gpu = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
    assert data.blame(RuntimeError("odd"), path) == "RuntimeError: odd"
    for error in (OSError(errno.ENOSPC, "full"), MemoryError(), sdit.UserError("clip.safetensors is torn"), gpu,
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(sdit.UserError, match="not the clip's fault"):
            data.blame(error, path)
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError:
            raise sdit.UserError(f"cannot write {path}") from None
    except sdit.UserError as e:
        with pytest.raises(sdit.UserError, match="not the clip's fault"):
            data.blame(e, path)
    path.unlink()
    with pytest.raises(sdit.UserError, match="not the clip's fault"):           # its folder is away
        data.blame(sdit.UserError(f"no such file: {path}"), path)
    path.symlink_to(tmp_path / "nowhere")
    assert data.blame(sdit.UserError(f"no such file: {path}"), path)


# Numbers and small words

@pytest.mark.parametrize("script, given", [(train, ["--lr", "nan"]), (train, ["--ema", "nan"]), (train, ["--drop", "2"]), (train, ["--lr", "-1"]), (train, ["--steps", "1e3"]),
                                           (train, ["--seed", str(10 ** 30)]), (sample, ["--guidance", "1e38"]), (sample, ["--guidance", "inf"]), (sample, ["--face", "-1"]), (sample, ["--face", "0", "1", "2"]),
                                           (sample, ["--seed", "-1"]), (sample, ["--method", "best"]), (curate, ["run", "--min-clip", "nan"]), (curate, ["run", "--test", "2"]),
                                           (curate, ["run", "--size", "0"]), (evaluate, ["same", "--n", "0"]), (data, ["--size", "-64"]), (data, ["--nonsense"])])
def test_silly_numbers_are_refused(script, given, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py", *given])
    code, said = ended(script.main, capsys)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("script", [train, sample, curate, evaluate, data])
def test_help_says_every_default(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    flags = re.findall(r" (--[a-z-]+) [A-Z{][^-]*?(?= --[a-z]| --|$)", shown)
    assert shown.count("default") >= len(set(flags)) // 3 and "--out OUT" in shown and "(default: None)" not in shown and "(default: False)" not in shown


def test_numbers_that_are_not_finite_make_no_video():
    model, conditions = random_sdit(), [torch.full((5, 32), torch.nan)]
    with pytest.raises(sdit.UserError, match="no longer finite"):
        sample.sample_video(model, conditions, sample.Settings(1))


def test_small_words(cache, tmp_path, monkeypatch):  # noqa: F811
    assert evaluate.with_interval([1.0]) == "1.00" and "±" in evaluate.with_interval([1.0, 2.0]) and evaluate.with_interval([]) == "-"
    entry = dict(step=1, mse=1, quarters=[1] * 4, bound=1, lr=1, norm=1, rows_per_s=1, tflops=1, mfu=1, memory_gib=1)
    said = [train.log_text(entry | dict(eta_s=days * 86400)) for days in (3, 400)]
    assert " 3 days, 0:00:00 left" in said[0] and " 400 days, 0:00:00 left" in said[1]
    run(cache, tmp_path / "run", monkeypatch)
    with pytest.raises(sdit.UserError, match="another steps .4, now 8.; .*--init .*model.safetensors"):
        run(cache, tmp_path / "run", monkeypatch, "--steps", "8")
    with pytest.raises(sdit.UserError, match="--autoencoder sd-vae-ft-mse --clip ViT-L-14"):
        data.Rows(tmp_path / "none", 8)
    with pytest.raises(sdit.UserError, match="no sensible size after step 1; the last state is intact"):
        run(cache, tmp_path / "wild", monkeypatch, "--lr", "1e30", "--save-minutes", "0")
    assert not list((tmp_path / "wild").glob("*.safetensors"))


def test_faces_are_not_for_git():
    lines = (ROOT / ".gitignore").read_text().split("\n")
    assert {"/clips*/", "/cache*/", "/videos*/", "*.partial/"} <= set(lines)


def test_the_note_on_photographs_comes_first(monkeypatch):
    """It is out before the work, even into a pipe, where errors would overtake it."""
    said, seen = io.BytesIO(), []
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(said))
    monkeypatch.setattr(sample, "reenact", lambda *_, **__: seen.append(said.getvalue()))
    for given in (["--source", "photo.jpg"], ["--driving", "film.mp4"], []):
        monkeypatch.setattr("sys.argv", ["sample.py", *given])
        sample.main()
    note = b"note: the bundled model knows rendered faces only"
    assert seen[0].startswith(note) and b"not the person in the picture" in seen[0]
    alone = seen[1].removeprefix(seen[0])                                       # no picture of theirs
    assert alone.startswith(note) and b"in the picture" not in alone and seen[2] == seen[1]


# Under torchrun

def launched(*given, **more):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={29600 + os.getpid() % 300}", *map(str, given)],
                          capture_output=True, text=True, **more)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="elsewhere the launcher's traceback stays")
def test_a_users_error_under_torchrun_is_one_message(tmp_path):
    done = launched(ROOT / "train.py", "--data", tmp_path / "none")
    assert done.returncode == -signal.SIGUSR1, done.stderr  # not 137, as for a lack of memory
    assert done.stderr.count("error: no cache in") == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_a_rank_ends_without_python_s_own_end(tmp_path):
    """Threads of gloo's that let go of tensors while Python ends abort the process."""
    script = "import atexit, os, data; atexit.register(os.abort); data.run_main(lambda: print('done'))"
    alone, rank = (subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
                   for env in ({}, dict(TORCHELASTIC_ERROR_FILE=str(tmp_path / "attempt/0/error.json"))))
    assert alone.returncode == -signal.SIGABRT                                  # so the trap works
    assert rank.returncode == 0 and rank.stdout == "done\n"


def test_lines_that_need_one_another_under_torchrun(tmp_path, clip):
    """A line fails, the next one drives with the result of the first, the last would write over that. What two processes make, one makes too."""
    write_video(tmp_path / "d.mp4", clip[0][:6])
    shutil.copy(ROOT / "demo" / "source.png", tmp_path / "s.png")
    (tmp_path / "p.csv").write_text("source,driving,out\ns.png,d.mp4,a.mp4\nnone.png,d.mp4,b.mp4\ns.png,a.mp4,c.mp4\ns.png,d.mp4,a.mp4\n")
    done = launched(ROOT / "sample.py", "--pairs", tmp_path / "p.csv", "--steps", "3", "--guidance", "1")
    assert "2 of 4 are there" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == -signal.SIGUSR1, done.stderr
    assert [done.stderr.count(text) for text in ("line 3: no such file", "line 5: ", "line 4 reads it", "error: 2 lines of")] == [1] * 4, done.stderr
    assert done.stdout.count("a.mp4: 6 frames") == 1
    assert sorted(p.name for p in tmp_path.glob("*")) == ["a.mp4", "c.mp4", "d.mp4", "p.csv", "s.png"]
    sample.reenact(tmp_path / "s.png", tmp_path / "d.mp4", tmp_path / "one.mp4", steps=3, guidance=1)
    one, two = (frames_of(tmp_path / f"{name}.mp4") for name in ("one", "a"))
    assert 3 * abs(one - two).mean() < abs(one - two[::-1]).mean()
