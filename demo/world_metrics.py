"""How good a model of the demo world is, beside the truth: any face is rendered with any motion.

    python demo/world_metrics.py                       # the bundled model, 50 clips of 24 frames
    python demo/world_metrics.py --n 8 --sheet sheet.png --held-out
    python demo/world_metrics.py --task text --n 100   # sentences as sources; also edit, retarget
    python demo/world_metrics.py --task controls       # the world itself: do landmarks follow it?
    python demo/world_metrics.py --task real --clips FOLDER       # photographs and videos of people

Cross-identity: a picture of one unseen face, a driving video of another, from seeds that nothing is
trained on. Every figure stands beside two ceilings measured the same way: the true rendering, and
the true rendering through the autoencoder. Errors of colours are distances in CIELAB. The last line
is JSON.
"""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO.parent), str(DEMO)]

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import world
from PIL import Image
from tqdm import tqdm

import data
import sample
import sdit
from evaluate import (
    Case,
    correlation,
    find_landmarks,
    has_face,
    laid_onto,
    lmse,
    motions,
    motions_of_both,
    psnr,
    sample_images,
    sample_latents,
    similarity,
    ssim,
)
from experiments import picture_grid

UNSEEN = 1_000_000  # seeds from here on are never trained on
RENDER = 144  # pixels of rendered frames, as in demo/build.py
COLOURS = {"hair": world.HAIR, "shirt": world.CLOTH, "back": world.CLOTH}


# --------------------------------------------------------------------------------------------------
# Colours

# Cheeks in MediaPipe's mesh, below the eyes and beside the nose.
CHEEKS = [[117, 118, 101, 36, 205, 187, 123], [346, 347, 330, 266, 425, 411, 352]]


def lab(rgb):
    """CIELAB under D65 of an sRGB colour (3,) in 0..255."""
    return cv2.cvtColor(np.float32(rgb)[None, None] / 255, cv2.COLOR_RGB2LAB)[0, 0]


def colour_distance(a, b):
    """Distance of two colours (3,) in 0..255 in CIELAB (CIE76); about 2 can just be seen."""
    return float(np.linalg.norm(lab(a) - lab(b)))


def cheek_mask(points, size):
    """Pixels (size, size) bool of both cheeks of landmarks (478, 3) in 0..1."""
    canvas = np.zeros((size, size), np.uint8)
    for side in CHEEKS:
        outline = np.int32(np.round(points[side, :2] * size - 0.5))
        cv2.fillConvexPoly(canvas, cv2.convexHull(outline), 1)
    return canvas > 0


def regions(face, motion, square, true):
    """The pixels that show hair, shirt and background: a dict of masks (h, h) bool for each frame.

    They are found by rendering the face once more with another colour: what changes with it fully
    is the region. `true` (M, h, h, 3) is the rendering, cut out by `square`."""
    masks = [{} for _ in true]
    for part, table in COLOURS.items():
        here = table[face[part]]
        other = max(table, key=lambda name: np.abs(np.subtract(table[name], here)).sum())
        repainted = render_crops(face | {part: other}, motion, square, len(true[0]))
        for mask, before, after in zip(masks, true, repainted):
            change = np.abs(before.astype(float) - after).sum(-1)
            visible = change > 8
            full = 0.5 * np.quantile(change[visible], 0.8) if visible.any() else 0
            mask[part] = visible & (change > full)
    return masks


def nearest_colour(rgb, table):
    """The name of the colour of `table` that is nearest to rgb (3,) in 0..1, whatever the light.

    Light shades a colour; white, grey and black differ in nothing else, so they are shaded less."""

    def distance(name):
        colour = np.array(table[name])
        achromatic = np.ptp(colour) < 0.08
        low, high = (0.68, 1.15) if achromatic else (0.5, 1.15)
        light = np.clip(rgb @ colour / (colour @ colour), low, high)
        return np.abs(rgb - light * colour).sum()

    return min(table, key=distance)


def medians(images, masks, part):
    """Median colour (frames, 3) of one part, of the frames in which enough of it is seen."""
    found = []
    for image, mask in zip(images, masks):
        if part in mask and mask[part].sum() > 8:
            found.append(np.median(image[mask[part]], 0))
    return np.array(found)


def shown_colour(images, masks, part):
    """The name of the colour that a part shows over a clip, or None where too little is seen."""
    found = medians(images, masks, part)
    return nearest_colour(np.median(found, 0) / 255, COLOURS[part]) if len(found) else None


def colour_scores(images, true, masks, face):
    """For each part of a clip: is the colour the named one, how far from the truth, how steady."""
    scores = {}
    for part in (*COLOURS, "skin"):
        found, expected = medians(images, masks, part), medians(true, masks, part)
        if not len(found):
            continue
        if part in COLOURS:
            scores[f"{part}_right"] = float(shown_colour(images, masks, part) == face[part])
        if part != "shirt":
            scores[f"{part}_error"] = colour_distance(np.median(found, 0), np.median(expected, 0))
        scores[f"{part}_drift"] = float(found.std(0).mean())
    return scores


# --------------------------------------------------------------------------------------------------
# Probes: what a linear map can read out of latents


class Ridge:
    """Linear regression from features (n, d) to targets (n, k), with standardised features and a
    penalty that is `strength` of their mean energy."""

    def __init__(self, x, y, strength):
        self.mean, self.deviation, self.offset = x.mean(0), x.std(0) + 1e-3, y.mean(0)
        x = (x - self.mean) / self.deviation
        kernel = x @ x.T  # (n, n)
        penalty = strength * np.trace(kernel) / len(x) * np.eye(len(x))
        self.weight = x.T @ np.linalg.solve(kernel + penalty, y - self.offset)  # (d, k)

    def __call__(self, x):
        return (x - self.mean) / self.deviation @ self.weight + self.offset


# Each control is read around the part of the face where it shows: points, and columns and rows of a
# grid over them.
AROUND_EYES = data.RIGHT_EYE + data.LEFT_EYE, (16, 6)
AROUND_LIPS = data.LIPS, (12, 8)
PROBED = dict(blink=AROUND_EYES, gaze_x=AROUND_EYES, jaw=AROUND_LIPS, smile=AROUND_LIPS)


class Probes:
    """Ridge regressions from the autoencoder's latents to controls, fitted on renderings of people
    of the training seeds. MediaPipe needs sharp pictures; these need none, so they tell what a
    model knows that its decoded pictures do not show."""

    frames = 2  # of each person

    def __init__(self, models, people):
        latents, landmarks, controls = [], [], []
        for seed in tqdm(range(people), "fitting the probes", leave=False, disable=None):
            images, _, _, motion = world.sample_clip(seed, self.frames, RENDER, fps=1)
            tracked = data.track(images, models.landmarker, f"person {seed}")
            crops = np.stack([data.crop(image, tracked.square, models.size) for image in images])
            latents.append(encode(models, crops))
            landmarks.append(tracked.landmarks)
            controls += [[motion[name][i] for name in PROBED] for i in range(self.frames)]

        latents, landmarks = torch.cat(latents), np.concatenate(landmarks)
        self.mean_face = landmarks.mean(0)
        self.of_control = {}
        for target, name in zip(np.array(controls).T, PROBED):
            features = self.around(latents, landmarks, name)
            self.of_control[name] = Ridge(features, target[:, None], strength=0.05)

    def around(self, latents, landmarks, name):
        """Latents (M, C, H, W) resampled on a grid that moves with the head -> (M, features)."""
        points, (columns, rows) = PROBED[name]
        box = self.mean_face[points, :2]
        middle, reach = (box.min(0) + box.max(0)) / 2, 0.625 * np.ptp(box, 0)
        x, y = np.meshgrid(np.linspace(-1, 1, columns), np.linspace(-1, 1, rows))
        grid = np.stack([x.ravel(), y.ravel()], 1) * reach + middle  # on the mean face

        # Only points that expressions hardly move say where the head is: they tell no control.
        rigid, places = self.mean_face[sample.RIGID, :2], []
        for face in landmarks:
            onto = similarity(rigid, face[sample.RIGID, :2])
            places.append(grid @ onto[:, :2].T + onto[:, 2])
        places = torch.from_numpy(np.stack(places)).to(latents)[:, None] * 2 - 1
        found = F.grid_sample(latents, places, padding_mode="border", align_corners=False)
        return found.flatten(1).numpy()

    def scores(self, latents, landmarks, motion):
        """Correlation over a clip with the true controls."""
        scores = {}
        for name, probe in self.of_control.items():
            read = probe(self.around(latents, landmarks, name))[:, 0]
            if np.ptp(motion[name]) > 0.1:
                scores[f"probe_{name}"] = correlation(read, motion[name])
        return scores


# --------------------------------------------------------------------------------------------------
# What a result should be


@dataclasses.dataclass(kw_only=True)
class RenderedCase(Case):
    """A person, somebody else's movements, and all that says what the result should be."""

    face: dict
    motion: dict
    square: tuple  # (x, y, side) of the driving video
    shape: np.ndarray = None  # (478, 3) landmarks of the source
    painter: int = None  # the seed of a painter who redraws source and truth

    def render(self, size, face=None):
        """The truth (M, size, size, 3): the person, or another `face`, moving like the driver."""
        return render_crops(face or self.face, self.motion, self.square, size, self.painter)

    def masks(self, true, landmarker, face=None):
        """Masks of hair, shirt, background and cheeks, a dict for each frame of the truth. A
        painting has none: its colours have no names."""
        if self.painter is not None:
            return [{} for _ in true]
        masks = regions(face or self.face, self.motion, self.square, true)
        for mask, points in zip(masks, find_landmarks(landmarker, true)):
            if not np.isnan(points).any():
                mask["skin"] = cheek_mask(points, len(true[0]))
        return masks


def redrawn(frames, painter):
    return frames if painter is None else world.painted(frames, painter)


def render_crops(face, motion, square, size, painter=None):
    """(M, size, size, 3): a face with every moment of a motion, cut out by `square`."""
    frames = redrawn(world.render_clip(face, motion, RENDER), painter)
    return np.stack([data.crop(frame, square, size) for frame in frames])


def sample_faces(seed, held_out):
    """(source, driver, random generator) of an unseen seed. The source has hair: its colour must be
    there to be seen."""
    rng = np.random.default_rng(UNSEEN + seed)
    person, driver = world.sample_face(rng, held_out), world.sample_face(rng)
    while person["style"] == "no":
        person = world.sample_face(rng, held_out)
    return person, driver, rng


def make_case(seed, a, models):
    person, driver, rng = sample_faces(seed, a.held_out or a.task == "text")
    motion, still = world.sample_motion(rng, a.frames), world.sample_motion(rng, 1)
    painter = UNSEEN + seed if a.painted else None

    video = world.render_clip(driver, motion, RENDER)
    tracked = data.track(video, models.landmarker, f"driving case {seed}")
    driving = np.stack([data.crop(frame, tracked.square, models.size) for frame in video])

    picture = world.render_clip(person, still, RENDER)
    of_source = data.track(picture, models.landmarker, f"source case {seed}")
    source = data.crop(redrawn(picture, painter)[0], of_source.square, models.size)
    truth = dict(face=person, motion=motion, square=tracked.square)
    shape = of_source.landmarks[0]
    return RenderedCase(source, driving, tracked.landmarks, **truth, shape=shape, painter=painter)


@torch.no_grad()
def encode(models, images):
    """Latents (M, C, H, W), on the CPU, of images (M, h, h, 3) uint8."""
    return models.autoencoder.encode(data.to_tensor(images).to(models.device)).float().cpu()


@torch.no_grad()
def decode(models, latents):
    return data.to_images(models.autoencoder.decode(latents.to(models.device)))


# --------------------------------------------------------------------------------------------------
# The tasks on rendered people. Each returns {column: {figure: value}} of a case, and its pictures


def score(images, true, masks, case, models):
    """All figures of one clip of images (M, h, h, 3) beside the true one."""
    landmarks = find_landmarks(models.landmarker, images)
    scores = dict(found=float(has_face(landmarks).mean()))
    frames, here, there = motions_of_both(landmarks, case.landmarks)
    if frames > 2:
        scores |= {name: correlation(here[name], there[name]) for name in here}
        scores["expressive_lmse"] = lmse(landmarks, case.landmarks, data.EXPRESSIVE)

    scores |= colour_scores(images, true, masks, case.face)
    a, b = data.to_tensor(images), data.to_tensor(true)
    return scores | dict(psnr=psnr(a, b), ssim=ssim(a, b))


def reenact_case(seed, a, models):
    """Generated, with each number of steps, true through the autoencoder, and true."""
    case = make_case(seed, a, models)
    true = case.render(models.size)
    masks = case.masks(true, models.landmarker)

    latents = {}
    for steps in a.steps:
        chosen = settings(a, seed, steps=steps)
        latents[f"{steps} steps"] = sample_latents(models, case.source, case.landmarks, chosen)
    latents["autoencoder"] = encode(models, true)
    videos = {name: decode(models, z) for name, z in latents.items()} | {"true": true}
    scores = {name: score(images, true, masks, case, models) for name, images in videos.items()}
    if a.probes:
        for name, z in latents.items():
            scores[name] |= a.probes.scores(z, case.landmarks, case.motion)
    return scores, sheet_row(case.source, case.driving, true, videos[f"{a.steps[-1]} steps"])


def text_case(seed, a, models):
    """The person by a sentence, in combinations of colours that no training saw (paper 4.4)."""
    case = make_case(seed, a, models)
    true = case.render(models.size)
    masks = case.masks(true, models.landmarker)
    with torch.no_grad():
        scenes = {
            "text": sample.make_scene(models, None, world.caption(case.face), None),
            "picture": sample.make_scene(models, case.source, None, None),
        }

    videos = reenact_scenes(models, case, scenes, settings(a, seed)) | {"true": true}
    scores = {name: score(images, true, masks, case, models) for name, images in videos.items()}
    return scores, sheet_row(case.source, case.driving, true, videos["text"])


def reenact_scenes(models, case, scenes, sampling):
    """{name: images} of scene vectors, {name: (1, S)}."""
    return {
        name: sample_images(models, None, case.landmarks, sampling, scene=scene)
        for name, scene in scenes.items()
    }


def edit_case(seed, a, models):
    """One colour of the source is changed by words: hair, shirt and background in turn. Is it as
    asked, and are the other two as they are without the edit?"""
    case = make_case(seed, a, models)
    part = list(COLOURS)[seed % 3]
    words = dict(hair="{} hair", shirt="{} shirt", back="{} background")[part]
    table = [name for name in COLOURS[part] if name != case.face[part]]
    new = case.face | {part: table[seed // 3 % len(table)]}
    edit = f"{words.format(case.face[part])} -> {words.format(new[part])}:{a.weight:g}"
    with torch.no_grad():
        scenes = {
            "plain": sample.make_scene(models, case.source, None, None),
            "edited": sample.make_scene(models, case.source, None, edit),
        }

    videos = reenact_scenes(models, case, scenes, settings(a, seed))
    videos["true"] = case.render(models.size, new)
    masks = case.masks(videos["true"], models.landmarker, new)
    seen = {
        name: {c: shown_colour(images, masks, c) for c in COLOURS}
        for name, images in videos.items()
    }
    scores = {}
    for name in videos:
        changed = float(seen[name][part] == new[part])
        scores[name] = {"changed": changed, f"changed_{part}": changed}
    others = [c for c in COLOURS if c != part]
    kept = [seen["plain"][c] == seen["edited"][c] for c in others]
    scores["edited"]["kept"] = float(np.mean(kept))
    return scores, sheet_row(case.source, videos["plain"], videos["true"], videos["edited"])


def retarget_case(seed, a, models):
    """Raw and retargeted landmarks: how near is the generated face's shape to the source's, and
    does it follow the driver? All in pixels of 256, root mean square, laid on by rigid points.

    `shape`: the neutral frame's landmarks from the source's. `asked`: the same of the landmarks
    that the model was given. `mean_shape`: from the true rendering's, averaged over the clip first,
    which quiets the noise of single frames."""
    case = make_case(seed, a, models)
    driving = case.landmarks
    neutral = sample.neutral_frame(driving)
    given = {"raw": driving, "retargeted": sample.retargeted(driving, case.shape)}
    videos = {
        name: sample_images(models, case.source, points, settings(a, seed))
        for name, points in given.items()
    }
    true = case.render(models.size)
    expected = find_landmarks(models.landmarker, true)

    scores = {}
    for name, images in (videos | {"true": true}).items():
        found = find_landmarks(models.landmarker, images)
        scores[name] = dict(found=float(has_face(found).mean()))
        apart = laid_onto(found, expected) - expected  # (M, 478, 3)
        if not np.isnan(apart).all():
            scores[name]["mean_shape"] = 256 * math.sqrt((np.nanmean(apart, 0) ** 2).mean())
        if has_face(found)[neutral]:
            scores[name]["shape"] = shape_distance(found[neutral], case.shape)
        if name in given:
            scores[name]["asked"] = shape_distance(given[name][neutral], case.shape)
        frames, here, there = motions_of_both(found, driving)
        if frames > 3:
            scores[name] |= {m: correlation(here[m], there[m]) for m in ("yaw", "mouth")}
    return scores, sheet_row(case.source, case.driving, true, videos["retargeted"])


def shape_distance(points, shape):
    """Root mean square distance, in pixels of 256, of landmarks (478, 3) laid onto others."""
    return math.sqrt(lmse(laid_onto(points[None], shape[None]), shape[None]))


def settings(a, seed, **rest):
    chosen = dict(steps=a.steps[-1], sampler=a.sampler, guidance=a.guidance, seed=seed)
    return sample.Settings(**chosen | rest)


def sheet_row(source, *videos):
    """A picture: the source, and below each other eight frames of each video."""
    shown = np.linspace(0, len(videos[0]) - 1, 8).astype(int)
    left = [source] + [None] * (len(videos) - 1)
    rows = [[first, *video[shown]] for first, video in zip(left, videos)]
    return picture_grid(rows, len(source))


CASES = dict(reenact=reenact_case, text=text_case, edit=edit_case, retarget=retarget_case)


def run_cases(a):
    """Any of CASES over `--n` seeds: a table of means. Returns them for the line of JSON."""
    models, scores, rows = sample.load_models(a.model), [], []
    probed = a.task == "reenact" and a.probes and not a.painted
    a.probes = Probes(models, a.probes) if probed else None
    for seed in tqdm(range(a.n), "cases", disable=None):
        one, row = CASES[a.task](seed, a, models)
        scores.append(one)
        if seed < 8:
            rows.append(row)

    if a.sheet:  # two columns of cases
        half = (len(rows) + 1) // 2
        rows += [np.full_like(rows[0], 255)] * (2 * half - len(rows))
        halves = [np.concatenate(rows[:half]), np.concatenate(rows[half:])]
        Image.fromarray(np.concatenate(halves, 1)).save(a.sheet)

    figures = list(dict.fromkeys(k for one in scores for column in one.values() for k in column))
    mean = {}
    for column in scores[0]:
        values = {k: [one[column][k] for one in scores if k in one[column]] for k in figures}
        mean[column] = {k: float(np.mean(v)) if v else math.nan for k, v in values.items()}
    print(f"{'':16}" + "".join(f"{column:>12}" for column in mean))
    for k in figures:
        print(f"{k:16}" + "".join(f"{column[k]:12.3f}" for column in mean.values()))
    return mean | dict(model=models.sha256[:16])


# --------------------------------------------------------------------------------------------------
# The world itself: is every face found, and do its landmarks follow the controls?

# The control that each of `evaluate.motions` should follow. Open eyes are the opposite of a blink.
FOLLOWS = dict(
    yaw="yaw", pitch="pitch", roll="roll", mouth="jaw", eyes="blink", smile="smile", gaze="gaze_x"
)


def measure_controls(a, size=128):
    """Landmarks of rendered frames beside their controls, without any model: fraction of frames in
    which a face is found; correlation of one simple measure each, within clips; correlation of a
    linear regression from aligned landmarks, on people that it was not fitted on."""
    landmarker = data.FaceLandmarker()
    landmarks, controls, people = [], [], []
    for seed in tqdm(range(a.n), "people", disable=None):
        rng = np.random.default_rng(UNSEEN + seed)
        face, motion = world.sample_face(rng), world.sample_motion(rng, 48, fps=8)
        chosen = np.linspace(0, 47, a.frames + 2)[1:-1].astype(int)
        moments = {name: values[chosen] for name, values in motion.items()}
        images = world.render_clip(face, moments, size)
        landmarks.append(find_landmarks(landmarker, images, size))
        controls.append(np.stack([moments[name] for name in world.CONTROLS], 1))
        people += [seed] * a.frames
    landmarks, people = np.concatenate(landmarks), np.array(people)

    found = has_face(landmarks)
    print(f"faces found: {found.sum()} of {len(found)} frames, {found.mean():.2%}")
    if missed := sorted(set(people[~found].tolist())):
        print(f"missed in the cases {missed}")
    landmarks, people = landmarks[found], people[found]
    targets = np.concatenate(controls)[found]  # (frames, controls)
    controls = dict(zip(world.CONTROLS, targets.T))

    simple = {
        FOLLOWS[name]: abs(within(values, controls[FOLLOWS[name]], people))
        for name, values in motions(landmarks).items()
    }

    reference = np.repeat(landmarks.mean(0)[None], len(landmarks), 0)
    aligned = laid_onto(landmarks, reference).reshape(len(landmarks), -1)
    fitted = people < 0.6 * a.n
    read = Ridge(aligned[fitted], targets[fitted], strength=0.03)(aligned[~fitted])
    held_out = {
        name: correlation(read[:, k], targets[~fitted, k]) for k, name in enumerate(controls)
    }

    print(f"{'control':10}{'simple r':>10}{'ridge r':>10}")
    for name in controls:
        first = f"{simple[name]:10.3f}" if name in simple else f"{'':10}"
        print(f"{name:10}{first}{held_out[name]:10.3f}")
    return dict(found=float(found.mean()), simple=simple, ridge=held_out)


def within(a, b, groups):
    """Correlation of a and b (n,), after the mean of its group is taken from each."""
    a, b = a.copy(), b.copy()
    for group in np.unique(groups):
        for values in (a, b):
            values[groups == group] -= values[groups == group].mean()
    return correlation(a, b)


# --------------------------------------------------------------------------------------------------
# Real people: are skin, hair and background of the result like the photograph's?

NEAR = dict(cheek=15, hair=25, background=25)  # distances in CIELAB that are still alike


def photograph_masks(points, size):
    """Where a picture shows cheeks, hair and background: masks (size, size) of landmarks (478, 3)
    in 0..1. Hair: a band above the forehead, of which the mesh leaves out the upper seventh.
    Background: the upper margins, left and right of the head."""
    (left, top), (right, bottom) = points[:, :2].min(0), points[:, :2].max(0)
    width, height = right - left, bottom - top
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    above = (y < top - 0.15 * height) & (y > top - 0.35 * height)
    central = abs(x - (left + right) / 2) < width / 4
    beside = (x < left - 0.3 * width) | (x > right + 0.3 * width)
    return dict(
        cheek=cheek_mask(points, size),
        hair=above & central,
        background=beside & (y < top + 0.25 * height),
    )


@dataclasses.dataclass
class Portrait:
    """A face of a file: a source, and, where the file is a video, a driver."""

    path: Path
    crop: np.ndarray  # (size, size, 3)
    colours: dict  # part -> median colour (1, 3)
    landmarks: np.ndarray = None  # (frames, 478, 3) of a video
    driving: np.ndarray = None  # (size, size, 3), its middle frame


def read_portrait(path, models, frames):
    crop, points, _ = sample.read_source(path, models.landmarker, models.size, 0)
    masks = photograph_masks(data.in_square(points[None]).landmarks[0], models.size)
    portrait = Portrait(path, crop, {part: medians(crop[None], [masks], part) for part in NEAR})
    if path.suffix.lower() in data.VIDEOS:
        images = list(itertools.islice(data.Video(path), 48))
        tracked = data.track(images, models.landmarker, path)
        chosen = np.linspace(0, len(images) - 1, frames).astype(int)
        portrait.landmarks = tracked.landmarks[chosen]
        portrait.driving = data.crop(images[chosen[frames // 2]], tracked.square, models.size)
    return portrait


def compare_portrait(images, source, landmarks, landmarker):
    """Distances in CIELAB of a result (M, h, h, 3): of its median colours from the photograph's,
    and the largest of one frame's from the clip's. Where no face is found, the driver's landmarks
    say where to look."""
    found = find_landmarks(landmarker, images)
    points = np.where(np.isnan(found), landmarks, found)
    masks = [photograph_masks(p, len(images[0])) for p in points]
    figures = dict(found=float(has_face(found).mean()))
    for part in NEAR:
        frames = medians(images, masks, part)
        if len(frames) and len(source.colours[part]):
            middle = np.median(frames, 0)
            figures[part] = colour_distance(middle, source.colours[part][0])
            figures[f"{part}_change"] = max(colour_distance(frame, middle) for frame in frames)
    return figures


def measure_real(a):
    """Every pair of a source and another driver of `--clips`; fractions of pairs that are near."""
    models, portraits = sample.load_models(a.model), []
    for path in data.list_files(a.clips, data.PICTURES | data.VIDEOS):
        try:
            portraits.append(read_portrait(path, models, a.frames))
        except sdit.UserError as e:
            print(f"left out: {e}", file=sys.stderr)
    drivers = [p for p in portraits if p.landmarks is not None]
    pairs = [(source, driver) for source in portraits for driver in drivers if source is not driver]
    if not pairs:
        raise sdit.UserError(f"{a.clips} holds no two files with a face, one of them a video")

    names = [*NEAR, *(f"{part}_change" for part in NEAR)]
    found, shown = [], {}
    print(f"{'source':14}{'driver':14}" + "".join(f"{name:>18}" for name in names))
    for source, driver in pairs[: a.n]:
        images = sample_images(models, source.crop, driver.landmarks, settings(a, 0))
        figures = compare_portrait(images, source, driver.landmarks, models.landmarker)
        found.append(figures)
        shown[source.path, driver.path] = images[len(images) // 2]
        values = "".join(f"{figures.get(name, math.nan):18.1f}" for name in names)
        print(f"{source.path.name:14}{driver.path.name:14}{values}")

    near = {}
    for name in names:
        limit = NEAR[name.removesuffix("_change")]
        values = np.array([figures[name] for figures in found if name in figures])
        near[name], median = math.nan, math.nan
        if len(values):
            near[name], median = float((values <= limit).mean()), np.median(values)
        pairs_near = f"{near[name]:.0%} of {len(values)} pairs within {limit}"
        print(f"{name}: {pairs_near}, median {median:.1f}")
    if a.sheet:
        rows = [[None, *(driver.driving for driver in drivers)]]
        rows += [[p.crop, *(shown.get((p.path, d.path)) for d in drivers)] for p in portraits]
        Image.fromarray(picture_grid(rows, models.size)).save(a.sheet)
    faces = float(np.mean([figures["found"] for figures in found]))
    return dict(pairs=len(found), found=faces, near=near, model=models.sha256[:16])


# --------------------------------------------------------------------------------------------------
# The command line

TASKS = {name: run_cases for name in CASES} | dict(controls=measure_controls, real=measure_real)
# (clips, frames of each) where --n and --frames are not given
DEFAULTS = dict(controls=(300, 3), real=(None, 8))


def arguments():
    ap, default = data.Parser(__doc__), sample.Settings
    add, count = ap.add_argument, data.number(int, 1)
    steps = data.number(int, 1, sdit.NoiseSchedule.steps)
    add("--task", choices=list(TASKS), default="reenact")
    add("--model", type=Path, default=DEMO / "sdit.safetensors")
    add("--n", type=count, help="clips, people or pairs (default: 50; controls: 300; real: all)")
    add("--frames", type=count, help="of each (default: 24; controls: 3; real: 8)")
    several = "denoising steps; several are compared"
    add("--steps", type=steps, nargs="+", default=[default.steps], help=several)
    add("--sampler", default=default.sampler)
    add("--guidance", type=data.number(float, -100, 100), default=default.guidance)
    triples = "sources with the triples of colours that no training saw"
    add("--held-out", action="store_true", help=triples)
    painted = "sources, and so the truth, redrawn as paintings"
    add("--painted", action="store_true", help=painted)
    people = "people to fit the probes on; 0: none"
    add("--probes", type=data.number(int, 0), default=400, help=people)
    add("--weight", type=data.number(float, -100, 100), default=1.0, help="of --task edit")
    add("--clips", type=Path, help="of --task real: folder of pictures and videos")
    sheet = (
        "picture of the first 8 cases: source and driving, true, generated; of --task real: one "
        "row a source, one column a driver"
    )
    add("--sheet", type=Path, help=sheet)
    a = ap.parse_args()

    if a.sheet and not a.sheet.absolute().parent.is_dir():
        raise sdit.UserError(f"no such folder: {a.sheet.parent}")
    if a.task == "real" and not (a.clips and a.clips.is_dir()):
        raise sdit.UserError("--task real needs --clips, a folder of pictures and videos")
    n, frames = DEFAULTS.get(a.task, (50, 24))
    a.n, a.frames = a.n or n, a.frames or frames
    return a


def main():
    a = arguments()
    asked = {k: v for k, v in vars(a).items() if k not in ("sheet", "model", "clips")}
    found = TASKS[a.task](a)
    print(json.dumps(asked | found))


if __name__ == "__main__":
    data.run_main(main)
