"""What several tests share: small random models, rendered faces, videos of known content."""
import importlib.util
import os
import sys
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "tests")]
if "PYTEST_XDIST_WORKER" in os.environ:                                         # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import pytest
import torch

import data
import sdit


class NumberSchedule(sdit.NoiseSchedule):
    """For `sample` among tensors without data: numbers that stay numbers."""

    alpha_bars = sdit.NoiseSchedule().alpha_bar.numpy()

    def __init__(self):
        self.alpha_bar = self.alpha_bars


def random_sdit(frames=4, depth=2, dtype=torch.float32, seed=0, prediction="epsilon"):
    """A small SDiT whose every layer does something: adaLN-Zero's zeros are replaced by random weights."""
    torch.manual_seed(seed)
    model = sdit.SDiT(sdit.SDiTConfig(name="test", depth=depth, width=32, heads=4, patch=2, frames=frames, latent_channels=4,
                                      latent_size=8, scene_width=16, prediction=prediction))
    for m in (*model.blocks, model.final_layer):
        torch.nn.init.normal_(m.adaLN_modulation[1].weight, std=0.2)
        torch.nn.init.normal_(m.adaLN_modulation[1].bias, std=0.2)
    torch.nn.init.xavier_uniform_(model.final_layer.linear.weight)
    return model.to(dtype).eval().requires_grad_(False)


def cache_settings(**more):
    """What a CacheWriter must be told, invented."""
    return dict.fromkeys(data.SETTINGS, 0) | more


def write_video(path, frames, rate=25, sound=None, times=None):
    """H.264 file of frames (M, h, w, 3) uint8; with `times`, seconds of each frame; with `sound`, a codec, a tone as long as the video."""
    rate = Fraction(rate)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 90000)
        if sound:
            voice = out.add_stream(sound, rate=44100)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            frame.time_base, frame.pts = (1 / rate, i) if times is None else (Fraction(1, 90000), round(times[i] * 90000))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound:
            samples = np.sin(np.arange(int(44100 * len(frames) / rate)) * 0.05).astype(np.float32)[None]
            tone = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            tone.rate = 44100
            out.mux(voice.encode(tone))
            out.mux(voice.encode(None))
    return path


def rendered_world():
    """The demo's world; where the packages it needs are not installed, the test is skipped."""
    missing = [name for name in ("anny", "warp") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"rendered people need demo/requirements.txt ({' and '.join(missing)} missing)")
    import world
    return world


@pytest.fixture(scope="session")
def world():
    return rendered_world()


@pytest.fixture(scope="session")
def clip(world):
    """(frames (12, 128, 128, 3), its motion) of a rendered face that nothing was trained on."""
    video, _, _, motion = world.sample_clip(1_000_100, 12, 128, 12)
    return video, motion


@pytest.fixture(scope="session")
def landmarker():
    return data.FaceLandmarker()


pytest_plugins = ["films", "graphs"]
