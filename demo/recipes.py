"""Short trainings at equal time, to choose the demo's recipe.

    python demo/recipes.py --minutes 3                   # every variant of the sDiT, one by one
    python demo/recipes.py --minutes 3 base muon         # only these
    python demo/recipes.py --minutes 4 pictures-128 pictures-64 pictures-64-absolute

The first --clips clips of build.py are rendered for them, into demo/build/recipes-CLIPS/. Of the
sDiT, in the latents of the bundled autoencoder, each line is the error of the predicted clean
latents of unseen people, divided by their variance (1 is guessing the mean), at six timesteps; in
brackets the same with the landmarks of other clips, and with the scenes of other clips: what these
add is what the model takes from them.

Of pictures each line is an autoencoder of that size, with its perceptual term or without, trained
for three times as long (pictures-bundled: the bundled one); then an sDiT in its latents, whose
predictions are decoded. Time is the processor's own, so that other work on the machine does not
count.
"""

import argparse
import copy
import json
import shutil
import sys
import time
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO.parent), str(DEMO)]

import numpy as np
import torch
import torch.nn.functional as F

import build
import data
import evaluate
import sdit
import train

TIMESTEPS = (100, 300, 500, 700, 850, 950)
HELD_OUT = 160  # clips
FRAME = 5  # of these that is shown, of `pictures`
BASE = dict(
    frames=1,
    batch=16,
    lr=2.4e-3,
    mapping=1.0,  # learning rate of the mapping network, in units of lr
    warmup=0.05,  # fraction of the time
    width=160,
    depth=6,
    heads=5,
    prediction="v",
    muon=0.0,  # its learning rate; 0: AdamW alone
    ema=0.999,
)
VARIANTS = {
    "base": {},
    "epsilon": dict(prediction="epsilon"),
    "lr-4.8e-3": dict(lr=4.8e-3),
    "lr-1.2e-3": dict(lr=1.2e-3),
    "mapping-0.1": dict(mapping=0.1),
    "muon": dict(muon=2e-3),
    "muon-4e-3": dict(muon=4e-3),
    "batch-32": dict(batch=32),
    "batch-64": dict(batch=64, lr=4e-3),
    "width-192": dict(width=192, heads=6),
    "width-224": dict(width=224, heads=7),
    "width-256": dict(width=256, heads=8),
    "depth-8": dict(width=192, heads=6, depth=8),
    "frames-4": dict(frames=4, batch=8),
    "frames-8": dict(frames=8, batch=4),
}
# Autoencoders, all with 16 x 16 latents: pixels, widths of the levels, whether features count
WIDTHS = build.AUTOENCODER.widths
PICTURES = {
    "pictures-128": (128, WIDTHS, True),
    "pictures-64": (64, (WIDTHS[0], *WIDTHS[2:]), True),
    "pictures-64-absolute": (64, (WIDTHS[0], *WIDTHS[2:]), False),
    "pictures-bundled": (128, None, True),
}


def build_optimizers(model, v):
    """AdamW; with `muon`, a learning rate, the matrices of attention and MLP go to Muon (Jordan et
    al. 2024)."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = name.startswith("blocks.") and p.ndim == 2 and "adaLN" not in name
        if v.muon and is_matrix:
            hidden.append(p)
        elif not name.startswith("mapping."):
            rest.append(p)

    mapping, slower = list(model.mapping.parameters()), v.lr * v.mapping
    groups = [
        dict(params=rest, lr=v.lr, initial=v.lr),
        dict(params=mapping, lr=slower, initial=slower),
    ]
    optimizers = [torch.optim.AdamW(groups, weight_decay=0.01, fused=True)]
    if hidden:
        group = dict(params=hidden, lr=v.muon, initial=v.muon)
        muon = torch.optim.Muon([group], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


@torch.no_grad()
def predictions(model, batch, schedule, scene, landmarks):
    """Yield (timestep, clean latents that the model predicts) for each of TIMESTEPS."""
    x0 = batch["latents"]
    for step in TIMESTEPS:
        t = torch.full((len(x0),), step)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(step))
        xt = schedule.add_noise(x0, noise, t)
        predicted = model(xt, t, model.mapping(scene, landmarks)).chunk(2, 2)[0]
        yield step, schedule.predict_x0(xt, predicted, t)


def measure_errors(model, batch, schedule):
    """For each of TIMESTEPS: error of x0 over its variance with the right conditions, with others'
    landmarks, with others' scenes."""
    x0, scene, landmarks = batch["latents"], batch["scene"], batch["landmarks"]
    other = torch.arange(len(x0)).roll(len(x0) // 2 + 1)
    conditions = (scene, landmarks), (scene, landmarks[other]), (scene[other], landmarks)
    errors = {step: [] for step in TIMESTEPS}
    for condition in conditions:
        for step, clean in predictions(model, batch, schedule, *condition):
            errors[step].append((F.mse_loss(clean, x0) / x0.var()).item())
    return errors


def split_rows(cache, frames, seed):
    """Rows to train on, and a batch of one row of each of HELD_OUT other clips."""
    rows = data.Rows(cache, frames, seed)
    unseen = rows.ranges[0][-HELD_OUT:]  # not the last clips of all: those train.py shows
    rows.ranges[0] = rows.ranges[0][:-HELD_OUT]
    held = data.Rows(cache, frames, 7)
    held.ranges[0], held.held_out = unseen, True
    return rows, torch.utils.data.default_collate([held[i] for i in range(HELD_OUT)])


def train_variant(v, cache, minutes, seed=0):
    """(average model, test batch, rows of training seen) after so many minutes of the processor."""
    rows, test = split_rows(cache, v.frames, seed)
    torch.manual_seed(seed)
    sdit.DEMO_SIZE |= dict(width=v.width, depth=v.depth, heads=v.heads)
    model = train.build_model(rows, "demo", v.frames, v.prediction)
    ema = copy.deepcopy(model).requires_grad_(False)
    schedule, optimizers = sdit.NoiseSchedule(), build_optimizers(model, v)
    shape = (v.batch, *test["latents"].shape[1:])

    for step, progress in steps_for(minutes):
        numbers = range(step * v.batch, (step + 1) * v.batch)
        batch = torch.utils.data.default_collate([rows[n] for n in numbers])
        t, noise, drop = train.sample_noise(seed, step, shape, 0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=sdit.has_bf16("cpu")):
            error, bound = train.diffusion_loss(model, schedule, batch, t, noise, drop)
        (error + bound).mean().backward()

        factor = min(1, (progress + 1e-3) / v.warmup) * (1 - progress)  # linear to 0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        train.update_ema(ema, model, step, v.ema)
    return ema, test, (step + 1) * v.batch


def steps_for(minutes):
    """Yield (step, progress from 0 to 1) until so many minutes of the processor are spent."""
    began, step, progress = time.process_time(), 0, 0.0
    while progress < 1:
        yield step, progress
        step += 1
        progress = (time.process_time() - began) / 60 / minutes


def try_variant(name, a):
    """Train a variant of the sDiT in the latents of the bundled autoencoder; print its line."""
    v = argparse.Namespace(**BASE | VARIANTS[name])
    model, test, seen = train_variant(v, a.folder / "cache", a.minutes)
    errors = measure_errors(model, test, sdit.NoiseSchedule())
    million = sum(p.numel() for p in model.parameters()) / 1e6
    cells = "".join(f"{x[0]:8.4f} ({x[1]:.3f} {x[2]:.3f})" for x in errors.values())
    print(f"{name:12} {million:7.2f} {seen:6d} {cells}", flush=True)
    found = dict(variant=name, minutes=a.minutes, rows=seen, million=million, errors=errors)
    print(json.dumps(found), file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Pictures


def resized(pictures, size):
    """(n, h, h, 3) uint8 at another size."""
    return np.stack([data.resize(picture, size) for picture in pictures])


def train_autoencoder(recipe, pixels, landmarks, widths, perceptual, minutes):
    """AUTOENCODER in the recipe's folder, by `build.autoencoder_loss`, on frames (n, h, h, 3).
    Returns the number of steps."""
    torch.manual_seed(0)
    config = dict(vars(build.AUTOENCODER), widths=widths)
    model = sdit.AutoencoderKL(sdit.AutoencoderConfig(**config))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    for step, progress in steps_for(minutes):
        build.set_learning_rate(optimizer, 1.5e-3, progress)
        images, mask = build.autoencoder_batch(pixels, landmarks, recipe.size, step, 8)
        kl, cell = 1e-4 * (1 - progress) ** 2 + 1e-6, 2 if step % 4 == 0 else 0
        loss, _ = build.autoencoder_loss(model, perceptual, images, mask, cell, kl)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    sdit.save_model(recipe.folder / "autoencoder-unfinished.safetensors", model)
    return step + 1


def read_frames(cache, clips, number):
    """A batch of rows of one frame, that of this number, of some clips."""
    names = data.read_json(cache / "index.json")["clips"]
    rows = []
    for clip in clips:
        record, _ = sdit.read_tensors(cache / names[clip][0])
        latents, landmarks = (record[k][number][None].float() for k in ("latent", "landmarks"))
        rows.append(dict(latents=latents, landmarks=landmarks, scene=record["scene"][1].float()))
    return torch.utils.data.default_collate(rows)


@torch.no_grad()
def try_pictures(name, a):
    """Train an autoencoder, then the base variant in its latents; print what both can do."""
    size, widths, features = PICTURES[name]
    recipe = build.Recipe(a.folder / name, a.clips, more=0, mirrored=False, size=size)
    (recipe.folder / "clips").mkdir(parents=True, exist_ok=True)
    shutil.copy(DEMO / "clip.safetensors", recipe.folder)
    pixels, landmarks = build.load_clips(a.clips, a.folder, "pixels", "landmarks")
    for number in range(a.clips):
        path = f"clips/{number:06d}.npz"
        with np.load(a.folder / path) as clip:
            smaller = dict(clip, pixels=resized(clip["pixels"], size))
        np.savez(recipe.folder / path, **smaller)

    seen = slice(a.clips - HELD_OUT - data.HELD_OUT)
    unseen = range(a.clips)[seen.stop :][:HELD_OUT]
    frames = resized(pixels[seen].reshape(-1, *pixels.shape[2:]), size)
    truth = pixels[unseen, FRAME]  # (HELD_OUT, 128, 128, 3)
    test = data.to_tensor(resized(truth, size))
    distance, steps = build.Perceptual(), 0
    if widths:
        perceptual = distance if features else lambda output, images: 0.0
        with torch.enable_grad():
            points = landmarks[seen].reshape(-1, *landmarks.shape[2:])
            steps = train_autoencoder(recipe, frames, points, widths, perceptual, 3 * a.minutes)
        build.finish_autoencoder(recipe, data.to_tensor(frames[:: len(frames) // 512]), test)
    else:
        shutil.copy(DEMO / "autoencoder.safetensors", recipe.folder)
    autoencoder = sdit.load_autoencoder(recipe.folder / "autoencoder.safetensors")

    # what it keeps, at 128 pixels
    decoded = resized(data.to_images(autoencoder.decode(autoencoder.encode(test))), 128)
    landmarker = data.FaceLandmarker()
    both = [evaluate.find_landmarks(landmarker, images) for images in (decoded, truth)]
    x, y = map(data.to_tensor, (decoded, truth))
    kept = dict(steps=steps, psnr=evaluate.psnr(x, y), perceptual=distance(x, y).item())
    kept["expressive_lmse"] = evaluate.lmse(*both, data.EXPRESSIVE)
    kept["missed"] = float(1 - evaluate.has_face(both[0]).mean())

    # what the sDiT predicts in its latents, at 64 pixels
    build.build_cache(recipe)
    v = argparse.Namespace(**BASE)
    with torch.enable_grad():
        model, _, rows = train_variant(v, recipe.folder / "cache", a.minutes)
    batch = read_frames(recipe.folder / "cache", unseen, FRAME)
    small, schedule = data.to_tensor(resized(truth, 64)), sdit.NoiseSchedule()
    errors = {}
    for step, clean in predictions(model, batch, schedule, batch["scene"], batch["landmarks"]):
        images = data.to_images(autoencoder.decode(clean[:, 0]))
        errors[step] = evaluate.psnr(data.to_tensor(resized(images, 64)), small)
    kept |= dict(rows=rows, predicted=errors)
    print(f"{name}: {json.dumps(kept)}", flush=True)


def main():
    parser = data.Parser(__doc__)
    known = [*VARIANTS, *PICTURES]
    parser.add_argument("variants", nargs="*", choices=[[], *known], help="default: of the sDiT")
    parser.add_argument("--clips", type=data.number(int, 320), default=1200, help="rendered clips")
    parser.add_argument("--minutes", type=float, default=6, help="for each training")
    a = parser.parse_args()
    a.folder = DEMO / "build" / f"recipes-{a.clips}"

    recipe = build.Recipe(a.folder, a.clips, more=0, mirrored=False)
    if not all((a.folder / f"clips/{n:06d}.npz").exists() for n in recipe.all_clips):
        build.build_clips(recipe)
    if not (a.folder / "cache" / "index.json").exists():
        for name in ("autoencoder", "clip"):
            shutil.copy(DEMO / f"{name}.safetensors", a.folder)
        build.build_cache(recipe)

    torch.set_num_threads(1)
    print(f"{'':12} million  rows  " + "".join(f"{f't = {t}':>22}" for t in TIMESTEPS))
    for name in a.variants or VARIANTS:
        if name in VARIANTS:
            try_variant(name, a)
        else:
            try_pictures(name, a)


if __name__ == "__main__":
    data.run_main(main)
