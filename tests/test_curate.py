"""Curation on made-up videos whose every clip and rejection is known beforehand."""
import argparse
import json
import os
import shutil
import stat
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT
from films import RATE

import curate
import data
from sdit import UserError


def arguments(out, **rest):
    return argparse.Namespace(**dict(dict(command="run", out=out, min_seconds=1.0, min_side=120, clip=ROOT / "demo" / "clip.safetensors", min_clip=0.3, arcface=None,
                                          min_arcface=0.4, hyperiqa=None, size=128, test=0.5, drop=None, top=20, source=None), **rest))


def test_every_clip_and_every_rejection(curated):
    lines = [json.loads(line) for line in (curated / "manifest.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        found.setdefault(line["video"], []).append((line["start"], line["end"], line["reason"]))
    assert all(abs(s - t) <= 1 and abs(e - u) <= 1 and r is None for (s, e, r), (t, u) in zip(found["cut.mp4"], [(0, 28), (28, 58)], strict=True))
    [(start, end, reason)] = found["leaves.mp4"]
    assert start == 0 and abs(end - 30) <= 1 and reason is None
    assert found["nobody.mp4"] == [(0, 30, "no face in its key frames")]
    assert [r for *_, r in found["short.mp4"]] == ["face for 1 s or less"]
    assert [r for *_, r in found["small.mp4"]] == ["square smaller than 120 pixels"]
    assert [r for *_, r in found["still.mp4"]] == ["nothing moves"]
    assert [(s, e, r) for s, e, r in found["two.mp4"]] == [(0, 30, None)] * 2
    assert [r for *_, r in found["variable.mp4"]] == [None] and [r for *_, r in found["phone.mp4"]] == [None]
    for name in ("torn.mp4", "text.mp4"):
        assert len(found[name]) == 1 and name in found[name][0][2] and "/" not in found[name][0][2]
    assert set(found) == {"cut.mp4", "leaves.mp4", "nobody.mp4", "short.mp4", "small.mp4", "still.mp4", "two.mp4", "variable.mp4", "phone.mp4", "torn.mp4", "text.mp4"}


def test_clips_are_square_and_framed(curated, landmarker):
    lines = [line for line in data.read_lines([curated / "manifest.jsonl"]) if line["reason"] is None]
    assert len(lines) == len({line["clip"] for line in lines}) == len(list(curated.glob("t*/*.mp4"))) == 7 and {line["split"] for line in lines} == {"train", "test"}
    for line in lines:
        video = data.Video(curated / line["clip"])
        assert len(video) == line["end"] - line["start"]
        frames = np.stack(list(video))
        assert frames.shape[1:] == (128, 128, 3)
        box = np.array(curate.mesh_box(landmarker.landmarks(data.resize(frames[len(frames) // 2], 256)))) / 256
        assert abs((box[:2] + box[2:]) / 2 - 0.5).max() < 0.15 and 0.35 < max((box[2] - box[0]) / 0.45, (box[3] - box[1]) / 0.53) < 1.3
        assert line["clip"].startswith(line["split"])
    identities = {s: {line["identity"] for line in lines if line["split"] == s} for s in ("train", "test")}
    assert not identities["train"] & identities["test"]
    assert (curated / "histogram.png").exists() and (curated / "stats.png").exists()


def die(*_):
    os._exit(11)


def test_a_crash_of_the_decoder_is_a_line(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "make_candidates", die)
    (tmp_path / "in").mkdir()
    for name in ("nobody.mp4", "text.mp4"):
        shutil.copy(videos / name, tmp_path / "in")
    curate.run_stage("detect", curate.list_sources(tmp_path / "in", tmp_path), arguments(tmp_path))
    assert [c["reason"] for _, found in curate.list_done("detect", arguments(tmp_path)) for c in found["candidates"]] == ["crashed the decoder"] * 2


def test_another_folder_with_the_same_names_is_refused(videos, tmp_path):
    """Or its clips would take the place of the first one's, without a word."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(videos / "nobody.mp4", tmp_path / folder)
    a = arguments(tmp_path / "out")
    curate.run_stage("detect", curate.list_sources(tmp_path / "a", a.out), a)
    with pytest.raises(UserError, match="a/nobody.mp4 and .*b/nobody.mp4 have one name"):
        curate.run_stage("detect", curate.list_sources(tmp_path / "b", a.out), a)
    shutil.rmtree(tmp_path / "a")                                               # it was moved
    curate.run_stage("detect", curate.list_sources(tmp_path / "b", a.out), a)


def test_a_drop_list_takes_clips_away(curated, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(curated, out)
    before = [p.name for p in out.rglob("*.mp4")]
    (tmp_path / "drop.txt").write_text("two.mp4\nttwo.mp4\n")
    done = subprocess.run([sys.executable, ROOT / "curate.py", "write", "--out", out, "--min-seconds", "1", "--min-side", "120", "--min-clip", "0.3", "--size", "128",
                           "--test", "0.5", "--drop", tmp_path / "drop.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "note: nothing here is ttwo.mp4" in done.stdout and "here is two.mp4" not in done.stdout
    assert sorted(p.name for p in out.rglob("*.mp4")) == sorted(n for n in before if not n.startswith("two-"))
    assert sum(line["reason"] == "on the drop list" for line in data.read_lines([out / "manifest.jsonl"])) == 2


def test_thresholds_are_set_without_measuring_again(curated, tmp_path, capsys):
    """`write` alone applies them; and only videos on the drop list are written again."""
    out = tmp_path / "copy"
    shutil.copytree(curated, out)
    sources = [s for s, _ in curate.list_done("validate", arguments(out))]
    curate.run_stage("validate", sources, arguments(out, min_clip=0.99))
    curate.run_stage("write", sources, arguments(out))
    assert capsys.readouterr().out.count(": 0 videos") == 2
    (out / "drop.txt").write_text("two.mp4\n")
    curate.run_stage("write", sources, arguments(out))
    assert "write: 1 videos" in capsys.readouterr().out
    curate.run_stage("write", sources, arguments(out, min_clip=1.01))
    assert not list(out.glob("t*/*.mp4"))
    reasons = {c["reason"] for _, found in curate.list_done("write", arguments(out)) for c in found["candidates"] if "clip_cosine" in c}
    assert reasons == {"CLIP cosine to the first frame below 1.01"}


def test_a_folder_that_is_not_there_is_not_the_videos_fault(tmp_path):
    source = curate.Source(tmp_path / "gone.mp4", "gone.mp4", "gone")
    source.path.write_bytes(b"")
    key = curate.stage_key("detect", source, arguments(tmp_path))
    assert curate.stage_key("detect", curate.Source(tmp_path / "." / ".." / tmp_path.name / "gone.mp4", "gone.mp4", "gone"), arguments(tmp_path)) != key
    assert curate.attempt("detect", source, arguments(tmp_path))[1]             # an empty file is to blame itself
    source.path.unlink()
    assert not curate.attempt("detect", source, arguments(tmp_path))[1]


def test_key_frames_that_are_too_few_do_not_decide():
    """A video of ten seconds whose one key frame is empty is looked at in full; of one second, it is not."""
    blind = type("Blind", (), dict(everyone=lambda self, image: iter(())))()
    for name, fps, expected in (("slow", 3, True), ("fast", 30, False)):
        video = type("Video", (), dict(path=ROOT / "demo" / "driving.mp4", fps=fps, __len__=lambda self: 30))()
        assert curate.key_frames_have_a_face(video, blind) == expected, name


def scenes(seed):
    """Thumbnails of a made-up film and its true transitions: shots of a figure that moves before a ground that sways, joined by hard cuts,
    cuts that keep the ground or the figure, and dissolves of 12 frames."""
    rng = np.random.default_rng(seed)

    def ground():
        return cv2.resize(rng.uniform(0, 255, (7, 7, 3)).astype(np.float32), (120, 120), interpolation=cv2.INTER_CUBIC)
    frames, true, behind, figure = [], [], ground(), ground()
    for number in range(4):
        kind = "begin" if not number else ("hard", "keeps the ground", "keeps the figure", "dissolve", "hard", "dissolve")[int(rng.integers(6))]
        behind = behind if kind == "keeps the ground" else ground()
        figure = figure if kind == "keeps the figure" else ground()
        new, speed, phase = [], rng.uniform(0.1, 0.35), rng.uniform(0, 6)
        for f in range(40):
            sway, x, y = 4 * np.sin(0.1 * f + phase), 60 + 9 * np.sin(speed * f + phase), 66 + 5 * np.sin(1.3 * speed * f)
            image = cv2.warpAffine(behind, np.float32([[1, 0, sway], [0, 1, 0]]), (120, 120), borderMode=cv2.BORDER_REFLECT)
            mask = cv2.ellipse(np.zeros((120, 120), np.uint8), ((x, y), (56, 76), 20 * np.sin(speed * f)), 255, -1, cv2.LINE_AA)[..., None] / 255
            moved = cv2.warpAffine(figure, np.float32([[1, 0, x - 60], [0, 1, y - 66]]), (120, 120), borderMode=cv2.BORDER_REFLECT)
            new.append(cv2.resize(image * (1 - mask) + moved * mask, (24, 24), interpolation=cv2.INTER_AREA))
        if kind == "dissolve":
            mix = np.linspace(0, 1, 14)[1:-1, None, None, None]                 # 12 frames between the last and the first
            frames[-12:] = list(np.array(frames[-12:]) * (1 - mix) + np.array(new[:12]) * mix)
            true.append((len(frames) - 12, len(frames)))
            new = new[12:]
        elif number:
            true.append((len(frames), len(frames)))
        frames += new
    return np.clip(frames, 0, 255).astype(np.uint8), true


def test_cuts_and_dissolves_are_found():
    """Precision and recall over 40 films of four shots; a third of the cuts keep the ground or the figure. Ends within 3 frames."""
    hits = wrong = missed = 0
    for seed in range(40):
        thumbs, true = scenes(seed)
        found = curate.transitions(thumbs)
        for end, begin in true:
            near = [t for t in found if abs(t[0] - end) <= 3 and abs(t[1] - begin) <= 3]
            hits, missed = hits + bool(near), missed + (not near)
        wrong += sum(not any(end - 3 <= e <= begin + 3 for end, begin in true) for e, _ in found)
    assert hits / (hits + wrong) >= 0.98 and hits / (hits + missed) >= 0.95, (hits, wrong, missed)


def test_a_cut_within_shaking_is_found():
    """Every frame differs by 9 from the one before, so that a cut of 30 does not stand alone; it is large enough by itself."""
    levels = np.where(np.arange(40) % 2, 109, 100) + np.where(np.arange(40) >= 20, 39, 0)
    thumbs = np.broadcast_to(levels[:, None, None, None], (40, 24, 24, 3)).astype(np.uint8)
    assert (20, 20) in curate.transitions(thumbs)


def test_search_stops_where_the_site_refuses_and_goes_on(tmp_path, monkeypatch, capsys):
    """A stand-in for yt-dlp writes down its arguments; the second call is refused."""
    program = tmp_path / "bin" / "yt-dlp"
    program.parent.mkdir()
    program.write_text(f"""#!{sys.executable}
import json, pathlib, sys
log = pathlib.Path({str(tmp_path / 'calls')!r})
calls = log.read_text().splitlines() if log.exists() else []
log.write_text("\\n".join(calls + [json.dumps(sys.argv[1:])]) + "\\n")
if len(calls) == 1:
    sys.exit(print("ERROR: Sign in to confirm you're not a bot", file=sys.stderr) or 1)
""")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "queries.txt").write_text("# names\nsomebody known\nhttps://example.org/channel\n")
    a = arguments(tmp_path / "out", source=tmp_path / "queries.txt")
    with pytest.raises(UserError, match="not a bot.*goes on at 'https://example.org/channel'"):
        curate.search(a)
    curate.search(a)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [c[-2:] for c in calls] == [["--", q] for q in ("ytsearch20:somebody known", "https://example.org/channel", "https://example.org/channel")]
    assert calls[1][:2] == ["-I", "1:20"] and all("--download-archive" in c and "height>=?720 & !is_live & duration<3600" in c for c in calls)
    curate.search(a)                                                            # all done: nothing is asked again
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="yt-dlp is not on PATH"):
        curate.search(a)


def test_published_lists(tmp_path):
    for name in ("abc.mp4", "def_-1.mp4", "other.mp4"):
        (tmp_path / name).write_bytes(b"")
    clip = dict(ytb_id="abc", duration=dict(start_sec=1.5, end_sec=4), bbox=dict(top=0.1, bottom=0.9, left=0.2, right=0.6))
    (tmp_path / "celebvhq_info.json").write_text(json.dumps(dict(meta_info={}, clips=dict(one=clip))))
    (tmp_path / "Clip+def_-1+P0+C2+F100-200.txt").write_text("H 720\nW 1280\nFPS 25.0\n\nCROP 128 72 640 432\n")
    found = {s.name: s for s in curate.list_sources(tmp_path, tmp_path / "out")}
    assert set(found) == {"abc.mp4", "def_-1.mp4"}
    assert found["abc.mp4"].spans == [(1.5, 4, [0.2, 0.1, 0.6, 0.9])] and found["abc.mp4"].identity == "abc"
    assert found["def_-1.mp4"].spans == [(101 / 25, 8.0, [0.1, 0.1, 0.5, 0.6])]
    actors = tmp_path / "ravdess"
    actors.mkdir()
    for name in ("01-01-03-01-01-01-07.mp4", "02-01-03-01-01-01-07.mp4", "02-01-04-01-01-01-08.mp4"):
        (actors / name).write_bytes(b"")
    assert [(s.name, s.identity) for s in curate.list_sources(actors, tmp_path / "out")] == [("01-01-03-01-01-01-07.mp4", "actor-07"), ("02-01-04-01-01-01-08.mp4", "actor-08")]
    with pytest.raises(UserError, match="no such folder"):
        curate.list_sources(tmp_path / "none", tmp_path)


def test_listed_times_and_faces_are_taken(videos):
    """Of two faces the listed one, within the listed time."""
    source = curate.Source(videos / "two.mp4", "two.mp4", "two", [(0.0, 1.1, [0.0, 0.1, 0.5, 0.9])])
    [c] = curate.detect(source, arguments(videos))
    assert c["start"] == 0 and c["end"] == int(1.1 * RATE) and c["square"][0] < 100 and c["reason"] is None


@pytest.mark.parametrize("given, reason", [(("detect",), "name the folder"), (("detect", "none"), "no such folder: none"), (("write",), "nothing in"),
                                           (("stats",), "run write first"), (("search", "none.txt"), "yt-dlp|file of queries")])
def test_bad_arguments(given, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["curate.py", *given])
    with pytest.raises(SystemExit) as stop:
        data.run_main(curate.main)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and any(r in errors for r in reason.split("|"))
