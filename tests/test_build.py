"""demo/build.py from nothing to a video, at the smallest size."""
import functools
import importlib
import multiprocessing.dummy
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("warp", reason="the demo's world needs demo/requirements.txt")

import build
import data
import sdit


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    recipe = build.Recipe(folder=folder, clips=6, more=1, frames=5, paintings=2, render=72, size=64, autoencoder_clips=6, clip_clips=6, autoencoder_steps=4,
                          clip_steps=2, unseen=4, example=8, processes=1, runs=((1, 3, 2, 1e-3, 0), (2, 2, 2, 1e-3, 0.15)))
    with pytest.MonkeyPatch.context() as patch:                                 # in this process: each other one would load everything anew

        def run(command, check, env):
            assert check
            patch.setattr("sys.argv", command[1:])
            importlib.import_module(Path(command[1]).stem).main()

        patch.setattr(build, "subprocess", SimpleNamespace(run=run))
        patch.setattr(build, "multiprocessing", SimpleNamespace(get_context=dict(spawn=multiprocessing.dummy).get))
        pickle.dumps(functools.partial(build.make_clip, recipe))                # what a pool of processes is sent
        for part, _ in build.PARTS.values():
            part(recipe)
    return recipe


def test_the_chain_from_nothing_to_a_video(built):
    model = sdit.load_model(built.folder / "shipped" / "sdit.safetensors")
    assert model.config.prediction == "v" and model.config.frames == 2
    assert list(data.Rows(built.folder / "cache", 2).lengths[0]) == ([5] * 6 + [8]) * 2
    state = torch.load(built.folder / "sdit-2" / "state-00000002.pt", weights_only=True)
    assert state["recipe"]["lambda_ex"] == 10                                   # lips and eyes: it reached train.py
    assert len(data.Video(built.folder / "reenacted.mp4")) == 8
    assert {p.name for p in (built.folder / "shipped").iterdir()} >= {"source.png", "driving.mp4", "reenacted.webp", "strip.png"}


def test_clips_and_paintings_come_as_their_mirror_images_too(built):
    clip, mirrored = (np.load(built.folder / "clips" / f"{i:06d}.npz") for i in (1, 8))
    nose, of_mirrored = (c["landmarks"][:, 1] for c in (clip, mirrored))         # (frames, 3), of a crop's side
    assert abs(nose[:, 0] - 0.5).max() > 0.05, "this head looks straight ahead: take another"
    assert abs(of_mirrored[:, 0] - (1 - nose[:, 0])).max() < 0.03 and abs(of_mirrored[:, 1] - nose[:, 1]).max() < 0.03
    assert len(list((built.folder / "paintings").glob("*-mirrored.png"))) == 2


def test_channels_of_latents_are_alike(built):
    """Mean 0 and standard deviation 1 each, and the pictures decode as before."""
    pixels, = build.load_clips(5, built.folder, "pixels")                       # the sixth is held out
    pictures = data.to_tensor(pixels.reshape(-1, *pixels.shape[2:]))
    before, after = (sdit.load_autoencoder(built.folder / f"autoencoder{name}.safetensors") for name in ("-unfinished", ""))
    latents = after.encode(pictures)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert (after.decode(latents) - before.decode(before.encode(pictures))).abs().max() < 0.02


def test_captions_lie_where_their_pictures_do(built):
    """Nearer than contrast alone has brought them."""
    pixels, = build.load_clips(6, built.folder, "pixels")
    people = [build.world.sample_face(np.random.default_rng(seed)) for seed in range(6)]
    captions = [build.world.caption(person) for person in people]
    gaps = []
    for name in ("-unfinished", ""):
        encoder = data.SceneEncoder(built.folder / f"clip{name}.safetensors")
        images = encoder.images(data.to_tensor(pixels[:, 0]))
        gaps.append(float((images - encoder.texts(captions)).square().sum(1).mean()))
    assert gaps[1] < 0.5 * gaps[0], gaps


def test_described_clips_have_captions_for_pictures(built):
    pictures, described = (data.Rows(built.folder / f"{name}cache", 2) for name in ("", "described-"))
    assert len(described.names[0]) == 3                                         # of 7 clips: 0, 3, 6
    encoder = data.SceneEncoder(built.folder / "clip.safetensors")
    caption = encoder.texts([build.world.caption(build.world.sample_face(np.random.default_rng(3)))])[0]
    tensors = [sdit.read_tensors(built.folder / f"{name}cache" / described.names[0][1])[0] for name in ("", "described-")]
    assert (tensors[1]["scene"][0].float() - caption).abs().max() < 1e-2
    assert not torch.equal(tensors[0]["scene"], tensors[1]["scene"])
    assert torch.equal(tensors[0]["latent"], tensors[1]["latent"])
