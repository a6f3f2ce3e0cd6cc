"""Made-up videos for the tests of curation: what each holds is known beforehand."""
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT, rendered_world, write_video

import data

SIDE, RATE = 192, 24


def shot(person, frames=30, where=(60, 40), seed=None, still=False):
    """Frames (frames, 280, 400, 3): a rendered person in front of a grey-blue ramp, SIDE pixels wide at `where`."""
    world = rendered_world()
    face = world.sample_face(np.random.default_rng(person + 3))
    motion = world.sample_motion(np.random.default_rng((seed or person) + 3), 1 if still else frames)
    canvas, (x, y) = background(frames, person), where
    for f, picture in enumerate(world.render_clip(face, motion, 128)):
        picture = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        canvas[f:None if still else f + 1, y:y + SIDE, x:x + SIDE] = picture
    return canvas


def background(frames, tone=0):
    ramp = np.linspace(40, 200, 400, dtype=np.uint8)[None, :, None] * np.ones((280, 1, 3), np.uint8)
    return np.repeat(np.roll(ramp, 60 * tone, 1)[None], frames, 0)


def pasted(frames, other, x):
    """Two shots in one picture, the second from column x on."""
    frames = frames.copy()
    frames[:, :, x:] = other[:, :, x:]
    return frames


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """The folder of made-up videos."""
    folder = tmp_path_factory.mktemp("videos")
    one, two = shot(1), shot(2)
    write_video(folder / "cut.mp4", np.concatenate([one[:28], two]), RATE)   # no face is looked for just there
    write_video(folder / "leaves.mp4", np.concatenate([one, background(20, 1)]), RATE)
    write_video(folder / "nobody.mp4", background(30), RATE)
    write_video(folder / "short.mp4", np.concatenate([one[:20], background(20, 1)]), RATE)
    write_video(folder / "small.mp4", np.stack([cv2.copyMakeBorder(cv2.resize(f, (240, 168)), 56, 56, 80, 80, cv2.BORDER_REPLICATE) for f in one]), RATE)
    write_video(folder / "still.mp4", shot(3, still=True), RATE)
    write_video(folder / "two.mp4", pasted(shot(1, where=(2, 40)), shot(2, where=(206, 40)), 200), RATE)
    write_video(folder / "variable.mp4", one, RATE, times=np.cumsum(np.where(np.arange(30) % 2, 1.5, 0.5)) / RATE)
    write_rotated(folder / "phone.mp4", one)
    whole = write_video(folder / "torn.mp4", one, RATE).read_bytes()
    (folder / "torn.mp4").write_bytes(whole[:len(whole) // 3])
    (folder / "text.mp4").write_text("not a video")
    (folder / "notes.txt").write_text("not for us")
    return folder


def write_rotated(path, frames):
    """A file of frames turned by 90 degrees, with the note that players turn them back."""
    plain = write_video(path.with_name("turned.mov"), np.rot90(frames, 1, (1, 2)).copy(), RATE)
    raw = bytearray(plain.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40                                            # the display matrix of the first track
    raw[at:at + 36] = np.array([0, 0x10000, 0, -0x10000, 0, 0, 280 << 16, 0, 0x40000000], ">i4").tobytes()
    path.write_bytes(raw)
    plain.unlink()
    assert next(iter(data.Video(path))).shape == (280, 400, 3)


def run(videos, out, *rest):
    return [sys.executable, ROOT / "curate.py", "run", videos, "--out", out, "--min-seconds", "1", "--min-side", "120", "--min-clip", "0.3", "--size", "128",
            "--test", "0.5", *rest]


def tree(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.suffix in (".mp4", ".jsonl")}


@pytest.fixture(scope="session")
def few_videos(tmp_path_factory):
    """What a comparison of whole runs needs: clips, of two people, and rejections."""
    folder = tmp_path_factory.mktemp("few")
    one, two = shot(1), shot(2)
    write_video(folder / "cut.mp4", np.concatenate([one[:28], two]), RATE)   # no face is looked for just there
    write_video(folder / "first.mp4", one, RATE)
    write_video(folder / "nobody.mp4", background(30), RATE)
    write_video(folder / "second.mp4", two, RATE)
    (folder / "text.mp4").write_text("not a video")
    return folder


@pytest.fixture(scope="session")
def curated(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated")
    done = subprocess.run(run(videos, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out
