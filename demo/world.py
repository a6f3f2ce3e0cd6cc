"""Synthetic talking-face clips: a tiny ray-traced head whose landmarks MediaPipe's face mesh can follow.

The head is an egg-shaped implicit surface with Gaussian bumps (nose, brows, lips ...), sphere-traced per pixel. Eyes,
mouth, brows, beard, hair and hat are anti-aliased decals in the head's own coordinates; ears and loose hair are
ellipsoids; glasses are drawn on a plane in front of the eyes. Everything follows from two small dicts: a face (who,
from `sample_face`) and its controls at one moment (how, a column of `sample_motion`).

Coordinates ("head units"): origin in the centre of the skull, x to the right of the image, y up, z out of the face;
the head is about 2 units tall and 1.5 wide. Pixels, rays and points are arrays (N,) or (3, N); colours are in [0, 1].

    python demo/world.py OUT --clips 8 --frames 48 --size 128      # OUT/0000.mp4 ... and OUT/captions.json
"""
import argparse
import json
from pathlib import Path

import cv2
import numpy as np

SKIN = {"pale": (.98, .83, .75), "fair": (.93, .74, .62), "tan": (.82, .61, .46), "brown": (.64, .45, .33),
        "dark": (.47, .32, .25)}
HAIR = {"black": (.12, .11, .12), "brown": (.36, .22, .13), "blond": (.88, .70, .36), "red": (.72, .27, .10),
        "grey": (.62, .62, .64), "pink": (.90, .45, .65)}
EYES = {"brown": (.34, .19, .09), "blue": (.20, .45, .80), "green": (.22, .55, .28), "grey": (.45, .51, .56)}
CLOTH = {"red": (.78, .16, .16), "orange": (.93, .55, .15), "yellow": (.95, .83, .25), "green": (.18, .58, .30),
         "blue": (.18, .36, .78), "purple": (.50, .25, .65), "white": (.93, .93, .92), "black": (.15, .15, .18)}
PATTERN = {"plain": .5, "striped": .25, "dotted": .25}
# Hair styles: probability, then the height of the hair line at five directions from the forehead to the nape.
AROUND = -np.cos(np.radians([0, 45, 66, 86, 125]))
STYLE = {"no": (.08, 2, 2, 2, 2, 2), "short": (.22, .66, .58, .25, 0, -.5), "curly": (.12, .60, .5, .22, -.1, -.6),
         "fringed": (.16, .45, .41, .1, -.2, -.7), "bobbed": (.14, .62, .45, 0, -.6, -.7),
         "long": (.18, .68, .5, .05, -.7, -.7), "tied-up": (.10, .68, .60, .3, .05, -.6)}
LOOSE = {"bobbed": (0, -.10, -.25, .98, 1.02, .75), "long": (0, -.45, -.3, .98, 1.45, .65),   # centre and radii of
         "tied-up": (0, 1.09, -.15, .36, .32, .36), "curly": (0, .28, -.2, 1.06, 1.05, .95)}  # the hair behind
# Numbers of a face: widths, lengths and positions in head units; light is its sideways direction, scale the size of
# a head unit as a fraction of the image.
SHAPE = dict(width=(.70, .82), jaw=(.05, .35), eye_w=(.145, .18), eye_h=(.08, .11), eye_x=(.30, .345),
             nose_w=(.8, 1.25), nose_y=(-.30, -.22), mouth_w=(.24, .31), lips=(.7, 1.4), brow_t=(.022, .05),
             brow_tilt=(-.05, .05), light=(-.7, .7), scale=(.315, .365))
# Controls: degrees for the angles, head units for dx and dy, otherwise fractions of the full movement.
CONTROLS = dict(yaw=(-35, 35), pitch=(-20, 20), roll=(-20, 20), dx=(-.15, .15), dy=(-.12, .12), blink=(0, 1),
                open=(0, 1), smile=(-.4, 1), gaze_x=(-1, 1), gaze_y=(-1, 1), brow=(-.5, 1))


def is_held_out(face):
    """Whether the face has one of the (hair, shirt, background) triples of colours, one in ten, that nothing is ever trained on.
    Every single colour and every pair of them does occur in training."""
    hair, shirt, back = (list(table).index(face[k]) for table, k in ((HAIR, "hair"), (CLOTH, "shirt"), (CLOTH, "back")))
    return (hair + 3 * shirt + 3 * back) % 10 == 0


def sample_face(rng, held_out=False):
    """One person, outfit and background: a dict of named attributes (see `caption`) and numbers (see SHAPE).

    `held_out` says which triples of colours may be drawn (see `is_held_out`): False is for training."""
    def pick(table, p=None):
        return str(rng.choice(list(table), p=p))
    chances = list(PATTERN.values())
    face = dict(skin=pick(SKIN), style=pick(STYLE, [s[0] for s in STYLE.values()]), hair=pick(HAIR), eyes=pick(EYES),
                beard=pick(["none", "moustache", "beard"], [.7, .12, .18]),
                glasses=pick(["none", "round", "square"], [.66, .17, .17]),
                hat=pick(["none", *CLOTH], [.84] + [.02] * 8), shirt=pick(CLOTH), shirt_pattern=pick(PATTERN, chances),
                back=pick(CLOTH), back_pattern=pick(PATTERN, chances))
    while is_held_out(face) != held_out:
        face |= dict(hair=pick(HAIR), shirt=pick(CLOTH), back=pick(CLOTH))
    return face | {k: float(rng.uniform(*r)) for k, r in SHAPE.items()}


def caption(f):
    """English description of a face from `sample_face`."""
    def a(noun):
        return f"a{'n' * (noun[0] in 'aeiou')} {noun}"
    has = ["no hair" if f["style"] == "no" else f"{f['style']} {f['hair']} hair", f"{f['eyes']} eyes"]
    has += [a(f["beard"])] * (f["beard"] != "none") + [f"{f['glasses']} glasses"] * (f["glasses"] != "none")
    has += [a(f["hat"] + " hat")] * (f["hat"] != "none")
    shirt, back = (f"{f[k + '_pattern']} {f[k]}".removeprefix("plain ") for k in ("shirt", "back"))
    has = f"{', '.join(has[:-1])} and {has[-1]}"
    return f"a face with {f['skin']} skin, {has}, wearing {a(shirt)} shirt, {back} background"


def sample_motion(rng, frames, fps=24):
    """Smooth random motion: dict of control name -> (frames,) floats within the ranges of CONTROLS."""
    t, motion = np.arange(frames) / fps, {}
    for name, (lo, hi) in CONTROLS.items():
        hertz = (1.0 if name in ("open", "gaze_x", "gaze_y") else .45) * rng.uniform(.3, 1.2, (3, 1))
        wave = np.tanh(1.1 * np.sin(2 * np.pi * (hertz * t + rng.uniform(size=(3, 1)))).sum(0))
        motion[name] = (lo + hi) / 2 + (hi - lo) / 2 * wave * rng.uniform(.5, 1)
    motion["open"] *= np.clip(np.sin(2 * np.pi * (.25 * t + rng.uniform())) + .5, 0, 1)       # speaks in bursts
    motion["blink"], when = np.zeros(frames), rng.uniform(0, 1.5)
    while when < frames / fps + .3:                                             # each lasts a third of a second
        motion["blink"] = np.maximum(motion["blink"], np.clip(1.6 - 9 * abs(t - when), 0, 1))
        when += rng.uniform(.7, 3)
    return motion


def rotation(yaw, pitch, roll):
    """(3, 3) head-to-camera rotation from degrees: yaw to the right of the image, pitch up, roll clockwise."""
    (cy, cp, cr), (sy, sp, sr) = (g(np.radians([yaw, -pitch, -roll])) for g in (np.cos, np.sin))
    turn, nod = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]), np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return (np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ turn @ nod).astype(np.float32)


def ramp(x, lo, hi):
    """Linear ramp from 0 at `lo` to 1 at `hi`."""
    return np.clip((x - lo) * (1 / (hi - lo)), 0, 1)


def column(rgb):
    return np.array(rgb, np.float32)[:, None]


def paint(col, rgb, mask):
    """Blend the colour `rgb`, a triple or (3, N), into `col` (3, N) as far as `mask` (N,) says."""
    col += mask * ((rgb if isinstance(rgb, np.ndarray) else column(rgb)) - col)


def cloth(kind, rgb, u, v, step):
    """(3, N) plain, striped or dotted colours over plane coordinates u, v (N,)."""
    col = np.tile(column(rgb), u.size)
    if kind == "striped":
        col *= 1 - .3 * ramp(np.sin(2 * np.pi / step * (u + .3 * v)), -.2, .2)
    if kind == "dotted":
        paint(col, .5 + .5 * column(rgb), ramp(np.cos(2 * np.pi / step * u) + np.cos(2 * np.pi / step * v), .9, 1.3))
    return col


def hair(f, p, shade=1.0):
    """(3, N) hair colours with strands at points p (3, N)."""
    strands = np.sin(34 * np.arctan2(p[0], p[2] + .2 * p[1]) + 5 * np.sin(5 * p[1] + 3 * p[0]))
    return column(HAIR[f["hair"]]) * (shade + .16 * strands)


def hair_line(f, x, z):
    """Height above which the skull is covered by hair in the direction (x, z) around the head, (N,)."""
    return np.interp(-z / np.sqrt(x * x + z * z + 1e-6), AROUND, STYLE[f["style"]][1:]).astype(np.float32)


def relief_map(f, m, cell=.008):
    """Relief of the face over a grid of (|x|, y): heights, slopes along x and y, each (A, B), and the cell's size."""
    w, n, s, o = f["nose_w"], f["nose_y"], m["smile"], m["open"]
    cx, cy, sx, sy, height = np.array([                          # centre and widths along |x| and y, height
        (0, n + .20, .075 * w, .20, .10), (0, n + .03, .085 * w, .09, .15), (.085 * w, n - .03, .06, .06, .07),   # nose
        (f["eye_x"], .10, .20, .13, -.09), (f["eye_x"], .09, .11, .08, .05),                           # sockets, eyes
        (.25, .32 + .08 * m["brow"], .22, .09, .05), (.43 + .03 * s, -.25 + .06 * s, .20, .18, .05 + .05 * s),  # cheeks
        (0, -.56 - .1 * o, .20, .10, .06), (0, -.70 - .25 * o, .16, .05, -.03),                       # lips
        (0, -.88 - .28 * o, .20, .12, .08)], np.float32).T[:, :, None]                                 # chin
    dx, dy = (np.arange(0, 1, cell, np.float32) - cx) / sx, (np.arange(-1.4, 1.2, cell, np.float32) - cy) / sy
    gx, gy = np.exp(-dx * dx), np.exp(-dy * dy) * height
    return gx.T @ gy, (gx * dx / sx * -2).T @ gy, gx.T @ (gy * dy / sy * -2), cell


def head_surface(f, m, relief, p, normals=False):
    """Approximate signed distance (N,) of points p (3, N) to the head; or, with `normals`, its normals there (3, N)."""
    x, y, z = p
    y0 = y + .28 * m["open"] * ramp(-y, .5, .95)                              # the jaw follows the open mouth
    narrow = f["width"] * (1 - f["jaw"] * ramp(-y0, -.1, 1.1) ** 1.5)         # from the cheeks to the chin
    a, b, c = x / narrow, y0 * (1 / 1.02), z * (1 / .86)
    r = np.sqrt(a * a + b * b + c * c)
    height, slope_x, slope_y, cell = relief
    i = np.minimum(abs(x) / cell + .5, height.shape[0] - 1).astype(np.int32)
    j = np.clip((y + 1.4) / cell + .5, 0, height.shape[1] - 1).astype(np.int32)
    front = ramp(z, 0, .4)
    if normals:
        n = .86 / r * np.stack([a / narrow, b / 1.02, c / .86])
        n[:2] -= front * np.stack([np.sign(x) * slope_x[i, j], slope_y[i, j]])
        return n / np.sqrt((n * n).sum(0))
    cover = (.14 if f["style"] == "curly" else .07) * ramp(y - hair_line(f, x, z), -.03, .06)
    if f["hat"] != "none":
        cover = np.maximum(cover, .12 * ramp(y - .1 * z, .40, .44))
    return (r - 1) * .86 - height[i, j] * front - cover


def ellipsoid(o, d, centre, radii):
    """First hit of rays o + t d (o is (3, N), d is (3, 1)) with an ellipsoid: t (N,), normals (3, N), and the
    distance inside its outline (N,), negative where the ray misses."""
    radii = column(radii)
    a, b = (o - column(centre)) / radii, d / radii
    bb, ab = float((b * b).sum()), (a * b).sum(0)
    miss = np.sqrt(np.maximum((a * a).sum(0) - ab * ab / bb, 0))              # closest approach, 1 at the outline
    t = (np.sqrt(np.maximum(1 - miss * miss, 0) * bb) - ab) / bb
    n = (a + t * b) / radii
    return t, n / np.sqrt((n * n).sum(0) + 1e-9), (1 - miss) * float(radii.min())


def trace_head(f, m, o, d, px):
    """Sphere-trace rays o + t d from the camera's side to the head; px is the size of a pixel.

    Returns the indices of the rays that hit (K,), their t (K,), coverage (K,), points (3, K) and normals (3, K)."""
    relief = relief_map(f, m)
    t, _, edge = ellipsoid(o, d, (0, -.05, .05), (f["width"] + .16, 1.28, 1.15))            # a hull around the head
    best, closest, live = t.copy(), np.full(t.size, 9, np.float32), np.flatnonzero(edge > 0)
    for _ in range(20):
        dist = head_surface(f, m, relief, o[:, live] + t[live] * d)
        closer = dist < closest[live]
        best[live[closer]], closest[live[closer]] = t[live[closer]], dist[closer]
        t[live] -= .75 * dist
        live = live[(abs(dist) > .2 * px) & (t[live] > -.6)]
    hit = np.flatnonzero(closest < 1.2 * px)
    p = o[:, hit] + best[hit] * d
    return hit, best[hit], np.clip(1.2 - closest[hit] / px, 0, 1), p, head_surface(f, m, relief, p, normals=True)


def head_colour(f, m, p, px):
    """Albedo (3, N) of the head at surface points p (3, N); px is the size of a pixel in head units."""
    x, y, z = p
    ax, side, front = abs(x), np.sign(x), ramp(z, .1, .3)
    skin, s, o, n = column(SKIN[f["skin"]]), m["smile"], m["open"], f["nose_y"]

    def inside(d):                                                             # anti-aliased d > 0, on the face only
        return np.clip(.5 + d * (1 / px), 0, 1) * front
    col = np.tile(skin, x.size)
    paint(col, skin * column((1, .70, .66)), .45 * front * np.exp(-((ax - .45) / .17) ** 2 - ((y + .28) / .14) ** 2))
    paint(col, skin * .25, .8 * inside(.028 - np.hypot((ax - .062 * f["nose_w"]) * .8, (y - n + .085) * 1.4)))
    # Mouth: parabolas over x between its corners bound the lips (up, low) and their outer borders (up + thick ...).
    width = f["mouth_w"] * (1 + .30 * s - .20 * o)
    arch = 1 - (x / width) ** 2
    middle = -.54 - .16 * s * (arch - .5)
    up, low, thick = middle + .05 * o * arch, middle - .30 * o * arch, .062 * f["lips"] * (1 - .3 * max(s, 0))
    if f["beard"] != "none":
        grown = inside(middle + .15 * (1 - (x / width / 1.3) ** 2) - y) * inside(y - middle)
        if f["beard"] == "beard":
            line = np.interp(ax, [.2, .32, .45, .6, .72], [-.6, -.5, -.5, -.3, .05]).astype(np.float32)
            grown = np.maximum(grown, ramp(line - y, 0, .05) * front)
        paint(col, hair(f, p, .9), .9 * grown)
    lips = skin * column((.86, .52, .50))
    paint(col, lips, inside(up + thick * arch * (1 - .25 * np.exp(-(x / .05) ** 2)) - y) * inside(y - middle))
    paint(col, lips * 1.12, inside(y - low + 1.25 * thick * arch) * inside(middle - y))
    hole = inside(up - y) * inside(y - low) * (arch > 0)
    paint(col, (.25, .05, .06), hole)
    paint(col, (.96, .95, .92), hole * inside(y - up + .075 * arch))
    paint(col, (.70, .25, .27), hole * inside(.6 * (middle - .30 * o) + .4 * up - y))
    paint(col, lips * .45, inside(.009 - np.minimum(abs(y - up), abs(y - low))) * (arch > 0))
    # Eyes: parabolas between the corners too; the upper lid comes down with the blink.
    e = (ax - f["eye_x"]) / f["eye_w"]
    arch, ey = np.maximum(1 - e * e, 0), y - .10 - .02 * e
    bottom = -.5 * f["eye_h"] * arch
    wide = 1 - .15 * max(s, 0) + .20 * m["gaze_y"] + .10 * m["brow"]
    top = f["eye_h"] * (wide - (wide + .5) * m["blink"]) * arch
    crease = f["eye_h"] * (1.75 + .4 * m["brow"]) * (1 - .8 * e * e)
    paint(col, skin * .72, .6 * inside(.010 - abs(ey - crease)) * (arch > 0))
    ball = inside(top - ey) * inside(ey - bottom) * (arch > 0)
    paint(col, (.97, .97, .98), ball)
    gx, gy = side * (ax - f["eye_x"]) - m["gaze_x"] * .45 * f["eye_w"], ey - .015 - m["gaze_y"] * .055
    for rgb, radius in (np.array(EYES[f["eyes"]]) * .5, .074), (EYES[f["eyes"]], .064), ((.02, .02, .03), .034):
        paint(col, tuple(rgb), ball * inside(radius - np.hypot(gx, gy)))
    paint(col, (1, 1, 1), ball * inside(.018 - np.hypot(gx + .022, gy - .024)))
    paint(col, skin * .55, .7 * inside(.007 - abs(ey - bottom)) * (arch > 0))
    paint(col, (.13, .08, .07), inside(.016 * (1 + .3 * e) - abs(ey - top - .008)) * (arch > 0))
    b = (ax - f["eye_x"] - .01) / .215                                         # brows
    line = .31 + .12 * m["brow"] - .045 * b * b + f["brow_tilt"] * b
    brow = inside(f["brow_t"] * (1 - .35 * b) - abs(y - line)) * inside(.2 - .2 * abs(b))
    paint(col, column(HAIR[f["hair"]]) * .7, .9 * brow)
    if f["glasses"] != "none":                                                 # only their arms; see `render`
        paint(col, (.08, .08, .1), np.clip(.5 + (.02 - abs(y - .14)) / px, 0, 1) * (ax > .52) * (z > -.1))
    above = y - hair_line(f, x, z)
    paint(col, skin * .6, .5 * ramp(above, -.09, 0))
    paint(col, hair(f, p), np.clip(.5 + above / px, 0, 1))
    if f["hat"] != "none":
        brim = y - .1 * z - .42
        paint(col, skin * .5, .6 * ramp(brim, -.08, 0) * front)
        paint(col, column(CLOTH[f["hat"]]) * .75, np.clip(.5 + brim / px, 0, 1))
        paint(col, CLOTH[f["hat"]], np.clip(.5 + (brim - .18) / px, 0, 1))
    return col


def render(f, m, size=128):
    """Image (size, size, 3) uint8 of the face `f` with controls `m` (name -> number)."""
    m, skin = {k: float(c) for k, c in m.items()}, column(SKIN[f["skin"]])
    px = 1 / (f["scale"] * size)                                               # size of a pixel in head units
    axis = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * px
    u, v = (a.ravel() for a in np.meshgrid(axis - m["dx"], -axis - m["dy"]))
    rot, light = rotation(m["yaw"], m["pitch"], m["roll"]), np.array([f["light"], .55, .9], np.float32)
    o, d = rot.T @ np.stack([u, v, 0 * u]), rot[2][:, None]                   # rays to the camera in head coordinates
    depth = np.full(u.size, -9, np.float32)

    def draw(where, alpha, albedo, n):
        """Blend lit surface points (albedo and head-space normals, both (3, K)) into the pixels `where` (K,)."""
        lit = np.clip((rot.T @ light / np.linalg.norm(light)) @ n, 0, 1)
        img[:, where] += alpha * (albedo * (.58 + .55 * lit) + .07 * (lit * lit * lit) ** 2 - img[:, where])

    def draw_ellipsoid(colour, centre, radii):
        t, n, edge = ellipsoid(o, d, centre, radii)
        where = np.flatnonzero((edge > -.5 * px) & (t > depth))
        draw(where, np.clip(.5 + edge[where] / px, 0, 1), colour(o[:, where] + t[where] * d), n[:, where])

    img = cloth(f["back_pattern"], CLOTH[f["back"]], u + m["dx"], v + m["dy"], .5) * (.97 - .12 * np.hypot(u, v))
    if f["style"] in LOOSE:
        draw_ellipsoid(lambda p: hair(f, p, .8), LOOSE[f["style"]][:3], LOOSE[f["style"]][3:])
    # The neck and the shoulders stay upright and follow the head loosely.
    x, y = u + .25 * m["dx"] - .12 * np.sin(np.radians(m["yaw"])), v + .3 * m["dy"]
    shadow = .85 - .35 * ramp(y, -1.3, -.95) - .3 * ramp(-x * np.sign(f["light"]), .05, .5)
    paint(img, skin * shadow, np.clip(.5 + (.36 + .14 * ramp(-y, 1, 1.3) - abs(x)) / px, 0, 1) * (y < -.3))
    body = 1 - (abs(x / 1.35) ** 2.6 + abs((y + 2.16) / 1.02) ** 2.6) ** (1 / 2.6)
    collar = .3 * np.hypot(x / .46, (y + 1.12) / .26) - .3
    shade = (.92 - .35 * ramp(abs(x), .2, 1.5)) * (.7 + .3 * ramp(collar, .005, .03))
    paint(img, cloth(f["shirt_pattern"], CLOTH[f["shirt"]], x, y, .28) * shade,
          np.clip(.5 + np.minimum(body, collar) / px, 0, 1))
    where, t, alpha, p, n = trace_head(f, m, o, d, px)
    draw(where, alpha, head_colour(f, m, p, px), n)
    depth[where] = t
    if f["style"] not in ("bobbed", "long", "curly"):
        for side in (-1, 1):
            ear = side * (f["width"] + .02), -.03, -.08
            draw_ellipsoid(lambda p: skin * column((.95, .85, .82)), ear, (.09, .21, .13))
    if f["glasses"] != "none":
        x, y, _ = abs(o + d * (.93 - o[2]) / d[2] - column((0, .09, 0)))       # on the plane z = .93
        qx, qy = (abs(x - f["eye_x"]), y) if f["glasses"] == "round" else \
            (np.maximum(abs(x - f["eye_x"]) - .15, 0), np.maximum(y - .10, 0))
        ring = np.hypot(qx, qy) - (.215 if f["glasses"] == "round" else .065)
        bridge = np.maximum(y - .018, x - f["eye_x"] + .2)
        paint(img, (1, 1, 1), .10 * np.clip(.5 - ring / px, 0, 1))
        paint(img, (.08, .08, .10), np.clip(.5 - np.minimum(abs(ring) - .016, bridge) / px, 0, 1))
    return (np.clip(img.T, 0, 1) * 255 + .5).astype(np.uint8).reshape(size, size, 3)


def sample_clip(seed, frames=48, size=128, fps=24):
    """One random clip: frames (M, size, size, 3) uint8, its caption, its face and its motion (see above)."""
    rng = np.random.default_rng(seed)
    face, motion = sample_face(rng), sample_motion(rng, frames, fps)
    video = np.stack([render(face, {k: c[i] for k, c in motion.items()}, size) for i in range(frames)])
    return video, caption(face), face, motion


def painted(frames, seed):
    """frames (M, size, size, 3) uint8 as one painter would show them: colours mixed anew, soft edges, few tones."""
    rng = np.random.default_rng(seed)
    mix, tint = np.eye(3) * .55 + rng.dirichlet(np.ones(3), 3) * .45, rng.uniform(.8, 1.1, 3)
    tones, reach = int(rng.integers(5, 9)), frames.shape[1] / 128 * rng.uniform(1, 1.8)
    soft = [cv2.bilateralFilter(cv2.GaussianBlur(frame, (0, 0), reach), 0, 40, 2 * reach) for frame in frames]
    mixed = np.clip(np.stack(soft) / 255 @ mix.T * tint, 0, 1) * tones
    low = np.floor(mixed)
    return ((low + np.clip(4 * (mixed - low) - 1.5, 0, 1)) / tones * 255).round().astype(np.uint8)


def main():
    ap = argparse.ArgumentParser(description="Write random clips OUT/0000.mp4 ... and OUT/captions.json.")
    ap.add_argument("out", type=Path)
    for name, default in dict(clips=8, frames=48, size=128, fps=24, seed=0).items():
        ap.add_argument(f"--{name}", type=int, default=default)
    a = ap.parse_args()
    import imageio.v3 as imageio
    a.out.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i in range(a.clips):
        video, captions[f"{i:04d}.mp4"], _, _ = sample_clip([a.seed, i], a.frames, a.size, a.fps)
        imageio.imwrite(a.out / f"{i:04d}.mp4", video, fps=a.fps, codec="libx264", plugin="pyav")
    (a.out / "captions.json").write_text(json.dumps(captions, indent=1))


if __name__ == "__main__":
    main()
