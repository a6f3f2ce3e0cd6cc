"""How good a model of the demo world is, against the truth: a face's true reenactment is `render(face_a, motion_b)`.

    python demo/world_metrics.py                       # the bundled model, 50 clips of 24 frames
    python demo/world_metrics.py --n 8 --sheet sheet.png --held-out
    python demo/world_metrics.py --task text --n 100   # sentences in place of pictures; also edit, retarget

Cross-identity: source picture of one unseen face, driving video of another (seeds from 1,000,000 up, never trained on). Every
figure stands beside two ceilings measured the same way: the true rendering itself, and the true rendering through the
autoencoder. The last line is JSON.
"""
import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO.parent), str(DEMO)]

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import sample
import sdit
import world
from evaluate import correlation, find_landmarks, laid_onto, lmse, motions, psnr, reenact, ssim

COLOURS = {"hair": world.HAIR, "shirt": world.CLOTH, "back": world.CLOTH}
UNSEEN = 1_000_000


def make_case(seed, frames, held_out):
    """Source face (a), driving face (b) and motion: (face_a, face_b, motion), from seeds that were never trained on."""
    rng = np.random.default_rng(UNSEEN + seed)
    face_a, face_b = world.sample_face(rng, held_out), world.sample_face(rng)
    while face_a["style"] == "no" or face_a["hat"] != "none":                   # the colour of the hair must be there to be seen
        face_a = world.sample_face(rng, held_out)
    return face_a, face_b, world.sample_motion(rng, frames)


def render_clip(face, motion, size):
    """(M, size, size, 3) uint8."""
    M = len(motion["yaw"])
    return np.stack([world.render(face, {k: v[i] for k, v in motion.items()}, size) for i in range(M)])


def regions(face, controls, square, size):
    """For hair, shirt and background the pixels (size, size) bool that show it: those that change fully with its colour. `square`
    is that of the crop in pictures of 256 pixels."""
    def cut(f):
        return data.crop(world.render(f, controls, 128), tuple(round(x / 2) for x in square), size).astype(float)
    base = cut(face)
    found = {}
    for name, table in COLOURS.items():
        other = next(c for c in table if c != face[name])
        change = np.abs(cut(face | {name: other}) - base).sum(-1)
        found[name] = change > 0.5 * np.quantile(change[change > 8], 0.8) if (change > 8).any() else np.zeros_like(change, bool)
    return found


def nearest_colour(rgb, table):
    """Name of the colour of `table` nearest to rgb (3,), whatever the light: each may be shaded down to 0.5 or lit up to 1.15."""
    def distance(name):
        colour = np.array(table[name])
        return np.abs(rgb - colour * np.clip(rgb @ colour / (colour @ colour), 0.5, 1.15)).sum()
    return min(table, key=distance)


def colours(images, masks, name):
    """Median colour (frames, 3), 0..1, inside the true region, of the frames where that is large enough."""
    return np.array([np.median(im[m[name]], 0) for im, m in zip(images, masks) if m[name].sum() > 8]) / 255


def shown_colour(images, masks, name):
    """Name of the colour that hair, shirt or background of a clip shows; None where too little of it is in the picture."""
    medians = colours(images, masks, name)
    return nearest_colour(np.median(medians, 0), COLOURS[name]) if len(medians) else None


def score(images, true, driving, masks, face, landmarker):
    """All figures of one clip: images and true (M, h, w, 3) uint8, driving landmarks (M, 478, 3) in the crop, masks by frame."""
    found = [landmarker.landmarks(data.resize(im, 256)) for im in images]   # enlarged: MediaPipe wants 96 pixels and more
    seen = np.array([p is not None for p in found])
    result = dict(found=float(seen.mean()))
    if seen.sum() > 2:
        points = np.stack([p for p in found if p is not None]) / 256
        here, there = motions(points), motions(driving[seen])
        result |= {k: correlation(here[k], there[k]) for k in here}
        result["expressive_lmse"] = lmse(points, driving[seen], data.EXPRESSIVE)
    for name in COLOURS:
        medians = colours(images, masks, name)
        if len(medians):
            result |= {f"{name}_right": float(shown_colour(images, masks, name) == face[name]), f"{name}_drift": float(medians.std(0).mean() * 255)}
    a, b = data.to_tensor(images), data.to_tensor(true)
    return result | dict(psnr=psnr(a, b), ssim=ssim(a, b))


@torch.no_grad()
def through_autoencoder(models, images):
    return data.to_images(models.autoencoder.decode(models.autoencoder.encode(data.to_tensor(images))))


@dataclasses.dataclass
class Case:
    """A person, somebody else's movements, and what the result should be; pictures are crops at the model's size."""
    face: dict
    motion: dict
    tracked: data.Track                            # of the driving video
    driving: np.ndarray
    source: np.ndarray
    shape: np.ndarray                              # (478, 3) landmarks of the source
    redraw: callable

    def truth(self, size, face=None):
        """(M, size, size, 3): the person, or one changed, with the driving movements."""
        return np.stack([data.crop(im, self.tracked.square, size) for im in self.redraw(render_clip(face or self.face, self.motion, 256))])

    def masks(self, size, face=None):
        M = len(self.tracked.landmarks)
        return [regions(face or self.face, {k: v[i] for k, v in self.motion.items()}, self.tracked.square, size) for i in range(M)]


def read_case(seed, a, models):
    face_a, face_b, motion = make_case(seed, a.frames, a.held_out or a.task == "text")
    size, still = models.size, world.sample_motion(np.random.default_rng(UNSEEN + seed), 1)
    driving = render_clip(face_b, motion, 256)
    tracked = data.track(driving, models.landmarker, f"driving case {seed}")
    redraw = (lambda pictures: world.painted(pictures, UNSEEN + seed)) if a.painted else np.asarray
    source = render_clip(face_a, still, 256)
    of_source = data.track(source, models.landmarker, f"source case {seed}")
    crop = data.crop(redraw(source)[0], of_source.square, size)
    driving = np.stack([data.crop(im, tracked.square, size) for im in driving])
    return Case(face_a, motion, tracked, driving, crop, of_source.landmarks[0], redraw)


def reenact_case(seed, a, models):
    """Scores of generated (with each number of steps), true, and true-through-the-autoencoder, and a sheet row of pictures."""
    case, size = read_case(seed, a, models), models.size
    true, masks = case.truth(size), [] if a.painted else case.masks(size)
    videos = {f"{steps} steps": reenact(models, case.source, case.tracked.landmarks, settings(a, seed, steps=steps)) for steps in a.steps}
    made = videos[f"{a.steps[-1]} steps"]
    videos |= {"autoencoder": through_autoencoder(models, true), "true": true}
    scores = {name: score(im, true, case.tracked.landmarks, masks, case.face, models.landmarker) for name, im in videos.items()}
    return scores, sheet_row(case.source, case.driving, true, made)


def text_case(seed, a, models):
    """The person by a sentence in place of the picture, colours in combinations that no training saw (paper 4.4)."""
    case, size = read_case(seed, a, models), models.size
    true, masks = case.truth(size), case.masks(size)
    with torch.no_grad():
        scenes = {"text": sample.make_scene(models, None, world.caption(case.face), None), "picture": sample.make_scene(models, case.source, None, None)}
    videos = {name: reenact(models, None, case.tracked.landmarks, settings(a, seed), scene=scene) for name, scene in scenes.items()}
    scores = {name: score(im, true, case.tracked.landmarks, masks, case.face, models.landmarker) for name, im in (videos | {"true": true}).items()}
    return scores, sheet_row(case.source, case.driving, true, videos["text"])


def edit_case(seed, a, models):
    """One colour of the source changed by words, hair, shirt and background in turn: is it as asked, and are the other two as without the
    edit?"""
    case, size = read_case(seed, a, models), models.size
    name = list(COLOURS)[seed % 3]
    words = dict(hair="{} hair", shirt="{} shirt", back="{} background")[name]
    table = [c for c in COLOURS[name] if c != case.face[name]]
    new = case.face | {name: table[seed // 3 % len(table)]}
    edit = f"{words.format(case.face[name])} -> {words.format(new[name])}:{a.weight:g}"
    with torch.no_grad():
        scenes = {"plain": sample.make_scene(models, case.source, None, None), "edited": sample.make_scene(models, case.source, None, edit)}
    videos = {k: reenact(models, None, case.tracked.landmarks, settings(a, seed), scene=scene) for k, scene in scenes.items()}
    masks, true = case.masks(size), case.truth(size, new)
    seen = {k: {c: shown_colour(im, masks, c) for c in COLOURS} for k, im in videos.items()}
    kept = float(np.mean([seen["plain"][c] == seen["edited"][c] for c in COLOURS if c != name]))
    scores = {k: dict(changed=float(seen[k][name] == new[name])) | {f"changed_{name}": float(seen[k][name] == new[name])} for k in videos}
    scores["edited"] |= dict(kept=kept)
    shown = float(shown_colour(true, masks, name) == new[name])
    scores["true"] = {"changed": shown, f"changed_{name}": shown}
    return scores, sheet_row(case.source, videos["plain"], true, videos["edited"])


def retarget_case(seed, a, models):
    """Raw and retargeted landmarks: how far the generated face's shape is from the source's, and whether it still follows the driver. `shape`:
    root mean square distance, of 256 pixels, of the neutral frame's landmarks, laid onto the source's by their rigid points; `mean_shape`:
    of the difference to the true rendering's landmarks, averaged over the clip, which quiets the noise of single frames."""
    case, size = read_case(seed, a, models), models.size
    neutral = sample.neutral_frame(case.tracked.landmarks)
    given = {"raw": case.tracked.landmarks, "retargeted": sample.retargeted(case.tracked.landmarks, case.shape)}
    videos = {k: reenact(models, case.source, points, settings(a, seed)) for k, points in given.items()}
    true, scores = case.truth(size), {}
    expected = find_landmarks(models.landmarker, true)
    for k, images in (videos | {"true": true}).items():
        found = find_landmarks(models.landmarker, images)
        apart = laid_onto(found, expected) - expected                           # (M, 478, 3)
        scores[k] = dict(found=float((~np.isnan(found[:, 0, 0])).mean()))
        if not np.isnan(apart).all():
            scores[k]["mean_shape"] = 256 * math.sqrt((np.nanmean(apart, 0) ** 2).mean())
        for what, points in (("shape", found[neutral][None]), ("asked", given[k][neutral][None] if k in given else None)):
            if points is not None and not np.isnan(points).any():
                scores[k][what] = math.sqrt(lmse(laid_onto(points, case.shape[None]), case.shape[None]))
        ok = ~np.isnan(found[:, 0, 0])
        if ok.sum() > 3:
            here, there = motions(found[ok]), motions(case.tracked.landmarks[ok])
            scores[k] |= {m: correlation(here[m], there[m]) for m in ("yaw", "mouth")}
    return scores, sheet_row(case.source, case.driving, true, videos["retargeted"])


def settings(a, seed, **rest):
    return sample.Settings(**dict(dict(steps=a.steps[-1], sampler=a.sampler, guidance=a.guidance, seed=seed), **rest))


def sheet_row(source, *videos):
    shown = np.linspace(0, len(videos[0]) - 1, 8).astype(int)
    row = [np.concatenate([np.full_like(source, 255) if i else source, *im[shown]], 1) for i, im in enumerate(videos)]
    return np.concatenate(row)


TASKS = dict(reenact=reenact_case, text=text_case, edit=edit_case, retarget=retarget_case)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--task", choices=list(TASKS), default="reenact")
    ap.add_argument("--model", type=Path, default=DEMO / "sdit.safetensors")
    ap.add_argument("--n", type=int, default=50, help="clips")
    ap.add_argument("--frames", type=int, default=24)
    ap.add_argument("--steps", type=int, nargs="+", default=[sample.Settings.steps], help="denoising steps; several are compared")
    ap.add_argument("--sampler", default=sample.Settings.sampler)
    ap.add_argument("--guidance", type=float, default=sample.Settings.guidance)
    ap.add_argument("--held-out", action="store_true", help="sources with the triples of colours that no training saw")
    ap.add_argument("--painted", action="store_true", help="sources, and so the truth, redrawn as paintings")
    ap.add_argument("--weight", type=float, default=1.0, help="of --task edit")
    ap.add_argument("--sheet", type=Path, help="contact sheet of the first 8 cases: source and driving, true, generated")
    a = ap.parse_args()
    if a.sheet and not a.sheet.absolute().parent.is_dir():
        raise sdit.UserError(f"no such folder: {a.sheet.parent}")
    models, scores, sheet = sample.load_models(a.model), [], []
    for seed in tqdm(range(a.n), "cases"):
        one, row = TASKS[a.task](seed, a, models)
        scores.append(one)
        sheet += [row] * (seed < 8)
    if a.sheet:
        half = (len(sheet) + 1) // 2
        sheet += [np.full_like(sheet[0], 255)] * (2 * half - len(sheet))
        Image.fromarray(np.concatenate([np.concatenate(sheet[:half]), np.concatenate(sheet[half:])], 1)).save(a.sheet)
    names = list(dict.fromkeys(k for s in scores for one in s.values() for k in one))
    gathered = {kind: {k: [s[kind][k] for s in scores if k in s[kind]] for k in names} for kind in scores[0]}
    mean = {kind: {k: float(np.mean(v)) if v else math.nan for k, v in g.items()} for kind, g in gathered.items()}
    print(f"{'':16}" + "".join(f"{kind:>12}" for kind in mean))
    for k in names:
        print(f"{k:16}" + "".join(f"{mean[kind][k]:12.3f}" for kind in mean))
    about = {k: v for k, v in vars(a).items() if k not in ("sheet", "model")}
    print(json.dumps(about | dict(model=models.sha256[:16]) | mean))


if __name__ == "__main__":
    sdit.run_main(main)
