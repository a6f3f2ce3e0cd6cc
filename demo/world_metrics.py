"""How good a model of the demo world is, against the truth: a face's true reenactment is `render(face_a, motion_b)`.

    python demo/world_metrics.py                       # the bundled model, 50 clips of 24 frames
    python demo/world_metrics.py --n 8 --sheet sheet.png --held-out

Cross-identity: source picture of one unseen face, driving video of another (seeds from 1,000,000 up, never trained on). Every
figure stands beside two ceilings measured the same way: the true rendering itself, and the true rendering through the
autoencoder. The last line is JSON.
"""
import argparse
import json
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
from evaluate import correlation, motions, psnr, reenact, ssim

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


def score(images, true, driving, masks, face, landmarker):
    """All figures of one clip: images and true (M, h, w, 3) uint8, driving landmarks (M, 478, 3) in the crop, masks by frame."""
    found = [landmarker.landmarks(data.resize(im, 256)) for im in images]   # enlarged: MediaPipe wants 96 pixels and more
    seen = np.array([p is not None for p in found])
    result = dict(found=float(seen.mean()))
    if seen.sum() > 2:
        points = np.stack([p for p in found if p is not None]) / 256
        here, there = motions(points), motions(driving[seen])
        result |= {k: correlation(here[k], there[k]) for k in here}
        result["expressive_lmse"] = float(((256 * (points - driving[seen])[:, data.EXPRESSIVE]) ** 2).mean())
    for name, table in COLOURS.items():
        medians = np.array([np.median(im[m[name]], 0) for im, m in zip(images, masks) if m[name].sum() > 8]) / 255
        if len(medians):
            result |= {f"{name}_right": float(nearest_colour(np.median(medians, 0), table) == face[name]), f"{name}_drift": float(medians.std(0).mean() * 255)}
    a, b = data.to_tensor(images), data.to_tensor(true)
    return result | dict(psnr=psnr(a, b), ssim=ssim(a, b))


@torch.no_grad()
def through_autoencoder(models, images):
    return data.to_images(models.autoencoder.decode(models.autoencoder.encode(data.to_tensor(images))))


def run_case(seed, a, models):
    """Scores of generated (with each number of steps), true, and true-through-the-autoencoder, and a sheet row of pictures."""
    frames, landmarker = a.frames, models.landmarker
    face_a, face_b, motion = make_case(seed, frames, a.held_out)
    size, still = models.size, world.sample_motion(np.random.default_rng(UNSEEN + seed), 1)
    driving = render_clip(face_b, motion, 256)
    tracked = data.track(driving, landmarker, f"driving case {seed}")
    redraw = (lambda pictures: world.painted(pictures, UNSEEN + seed)) if a.painted else np.asarray
    source = render_clip(face_a, still, 256)
    source = data.crop(redraw(source)[0], data.track(source, landmarker, f"source case {seed}").square, size)
    true = np.stack([data.crop(im, tracked.square, size) for im in redraw(render_clip(face_a, motion, 256))])
    driving = np.stack([data.crop(im, tracked.square, size) for im in driving])
    masks = [] if a.painted else [regions(face_a, {k: v[i] for k, v in motion.items()}, tracked.square, size) for i in range(frames)]
    videos = {f"{steps} steps": reenact(models, source, tracked.landmarks, sample.Settings(steps, a.sampler, a.guidance, seed=seed)) for steps in a.steps}
    made = videos[f"{a.steps[-1]} steps"]
    videos |= {"autoencoder": through_autoencoder(models, true), "true": true}
    scores = {name: score(im, true, tracked.landmarks, masks, face_a, landmarker) for name, im in videos.items()}
    shown = np.linspace(0, frames - 1, 8).astype(int)
    row = [np.concatenate([np.full_like(source, 255) if i else source, *im[shown]], 1) for i, im in enumerate((driving, true, made))]
    return scores, np.concatenate(row)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, default=DEMO / "sdit.safetensors")
    ap.add_argument("--n", type=int, default=50, help="clips")
    ap.add_argument("--frames", type=int, default=24)
    ap.add_argument("--steps", type=int, nargs="+", default=[sample.Settings.steps], help="denoising steps; several are compared")
    ap.add_argument("--sampler", default=sample.Settings.sampler)
    ap.add_argument("--guidance", type=float, default=sample.Settings.guidance)
    ap.add_argument("--held-out", action="store_true", help="sources with the triples of colours that no training saw")
    ap.add_argument("--painted", action="store_true", help="sources, and so the truth, redrawn as paintings")
    ap.add_argument("--sheet", type=Path, help="contact sheet of the first 8 cases: source and driving, true, generated")
    a = ap.parse_args()
    models, scores, sheet = sample.load_models(a.model), [], []
    for seed in tqdm(range(a.n), "cases"):
        one, row = run_case(seed, a, models)
        scores.append(one)
        sheet += [row] * (seed < 8)
    if a.sheet:
        half = (len(sheet) + 1) // 2
        sheet += [np.full_like(sheet[0], 255)] * (2 * half - len(sheet))
        Image.fromarray(np.concatenate([np.concatenate(sheet[:half]), np.concatenate(sheet[half:])], 1)).save(a.sheet)
    names = list(dict.fromkeys(k for s in scores for k in s["true"]))
    mean = {kind: {k: float(np.mean([s[kind][k] for s in scores if k in s[kind]])) for k in names} for kind in scores[0]}
    print(f"{'':16}" + "".join(f"{kind:>12}" for kind in mean))
    for k in names:
        print(f"{k:16}" + "".join(f"{mean[kind][k]:12.3f}" for kind in mean))
    settings = {k: v for k, v in vars(a).items() if k not in ("sheet", "model")}
    print(json.dumps(settings | dict(model=models.sha256[:16]) | mean))


if __name__ == "__main__":
    sdit.run_main(main)
