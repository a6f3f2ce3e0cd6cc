"""Build everything the demo needs from nothing: rendered clips, autoencoder, CLIP, cache, sDiT, example inputs.

    python demo/build.py                     # all parts, in order; a part whose result is there is skipped
    python demo/build.py clips autoencoder   # only these

Work stands in demo/build/ (about 1 GB, ignored by git); the three models, half precision, and the two example inputs go to
demo/. To make a part again, delete its result.

Measured on two CPU cores: clips 11 minutes, autoencoder 19 for the first of its three rounds (the others were not timed), CLIP 8, cache 2,
paintings 4, sDiT six and a half hours in ten rounds, partly beside other work (452,000 rows of 4 frames, 26 to 35 a second alone; 640,000 of
one, 140 a second).

Where the shipped sDiT's history differs from what this does: landmarks of its painted pseudo-clips were found in every frame anew; its first
round followed a cosine of 34,000 steps up to step 14,838, then one of 30,000; six rounds read the landmarks scaled to unit spread, not
whitened, then the input layer was rewritten to do the same on whitened ones, and before the ninth small random weights were added there.
"""
import argparse
import dataclasses
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO.parent), str(DEMO)]

import imageio.v3 as imageio
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
import sdit
import world

BUILD = DEMO / "build"
CLIPS, PAINTINGS, FRAMES, FPS = 3000, 500, 16, 8       # rows reach over up to two seconds; seeds 0 .. CLIPS - 1
RENDER, SIZE = 128, 64                         # landmarks need 128 pixels (eyes are 6 pixels high there), the models see 64
AUTOENCODER = sdit.AutoencoderConfig(widths=(16, 32, 64), layers=1, latent_channels=6, groups=8, scale=1.0)
CLIP = dict(embed_dim=128,
            vision_cfg=dict(image_size=64, patch_size=8, width=128, layers=4, head_width=32, mlp_ratio=3.0),
            text_cfg=dict(context_length=48, vocab_size=49408, width=64, heads=2, layers=2))
AUTOENCODER_ROUNDS = [dict(steps=3500, lr=2e-3, kl=1e-4, expressive=0, smooth=0),         # the KL term alone brings all channels into use
                      dict(steps=800, lr=1e-3, kl=1e-6, expressive=4, smooth=0.25),
                      dict(steps=1500, lr=1.2e-3, kl=1e-6, expressive=4, smooth=1)]
CLIP_STEPS = 800
# Each a cosine of its own, from the weights of the one before. Rows of one frame show 16 faces a step for the work of 4, and the scene
# alone tells them apart: colours are learned there.
SDIT_ROUNDS = [dict(frames=4, batch=4, steps=30000, lr=1.2e-3), dict(frames=4, batch=4, steps=26000, lr=5e-4),
               dict(frames=4, batch=4, steps=16000, lr=4e-4), dict(frames=4, batch=4, steps=22000, lr=3e-4),
               dict(frames=1, batch=16, steps=12000, lr=6e-4), dict(frames=4, batch=4, steps=4500, lr=3e-4),
               dict(frames=1, batch=16, steps=17000, lr=6e-4), dict(frames=4, batch=4, steps=8000, lr=3e-4),
               dict(frames=1, batch=16, steps=11000, lr=6e-4), dict(frames=4, batch=4, steps=6500, lr=3e-4)]
SOURCE_SEED, DRIVING_SEED, PAINTING_SEED = 1_000_021, 1_000_010, 2_000_000
device = "cuda" if torch.cuda.is_available() else "cpu"
autocast = torch.autocast(device, torch.bfloat16, enabled=sdit.has_bf16(device))


# ----------------------------------------------------------------------------------------------------------------------
# Rendered clips

def make_clip(seed):
    """Render, track and crop one clip with data.py's own functions; saved as BUILD/clips/SEED.npz. Returns misses."""
    path = BUILD / "clips" / f"{seed:06d}.npz"
    if path.exists():
        return 0
    frames, caption, _, _ = world.sample_clip(seed, FRAMES, RENDER, FPS)
    if not hasattr(make_clip, "landmarker"):
        make_clip.landmarker = data.FaceLandmarker()
    tracked = data.track(frames, make_clip.landmarker, f"clip {seed}")
    pixels = np.stack([data.crop(frame, tracked.square, SIZE) for frame in frames])
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, pixels=pixels, caption=caption, **dataclasses.asdict(tracked))
    os.replace(temporary, path)
    return int((~tracked.found).sum())


def build_clips():
    (BUILD / "clips").mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool() as pool:                   # MediaPipe does not survive a fork
        missed = sum(tqdm(pool.imap(make_clip, range(CLIPS), 8), "clips", CLIPS))
    print(f"{CLIPS} clips of {FRAMES} frames; faces missed in {missed} frames")
    (BUILD / "clips" / "done").write_text("")


def load_clips(*keys):
    """Arrays of all clips, stacked: for "pixels" (CLIPS, FRAMES, SIZE, SIZE, 3) uint8, and so on."""
    clips = []
    for seed in range(CLIPS):
        with np.load(BUILD / "clips" / f"{seed:06d}.npz") as clip:
            clips.append([clip[key] for key in keys])
    return [np.stack(arrays) for arrays in zip(*clips)]


def cosine(optimizer, start, progress):
    """Learning rate `start`, falling to 0 as `progress` goes from 0 to 1, after a short ramp."""
    for group in optimizer.param_groups:
        group["lr"] = start * min(1, progress * 50) * (1 + math.cos(math.pi * progress)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder

def build_autoencoder(batch=16):
    """Stable Diffusion's network, small: squared error, a light KL term, and in later rounds two more terms. Pixels of lips and
    eyes weigh 1 + `expressive`; and latents averaged over 2 x 2 or 4 x 4 cells must decode to the picture averaged likewise,
    with weight `smooth` (scale equivariance: Skorokhodov et al. 2025), which makes neighbouring latents more alike. The usual adversarial
    and perceptual losses need networks of their own, and are left out."""
    torch.manual_seed(0)
    pixels, landmarks = (x.reshape(-1, *x.shape[2:]) for x in load_clips("pixels", "landmarks"))
    masks = torch.from_numpy(np.stack([data.expressive_mask(points, SIZE) for points in tqdm(landmarks, "masks")]))
    test, pixels = data.to_tensor(pixels[-256:]), pixels[:-256]                 # 16 faces are left out
    model = sdit.AutoencoderKL(AUTOENCODER).to(device)
    for number, r in enumerate(AUTOENCODER_ROUNDS, 1):
        optimizer = torch.optim.AdamW(model.parameters(), r["lr"], weight_decay=0.01, fused=True)
        bar = tqdm(range(r["steps"]), f"autoencoder, round {number} of {len(AUTOENCODER_ROUNDS)}", unit="step")
        for step in bar:
            cosine(optimizer, r["lr"], step / r["steps"])
            chosen = torch.randint(len(pixels), (batch,))
            images, mask = data.to_tensor(pixels[chosen]).to(device), masks[chosen, None].to(device) / 255
            loss, error = autoencoder_loss(model, images, mask, cell=2 + 2 * (step % 2), **r)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                bar.set_postfix_str(f"PSNR {10 * math.log10(4 / error.item()):.1f} dB")
    model.eval()
    with torch.no_grad():
        latents = model.encode(test.to(device))
        model.config = dataclasses.replace(model.config, scale=float(1 / latents.std()))
        error = F.mse_loss(model.decode(model.encode(test.to(device))).cpu(), test)
    print(f"autoencoder: PSNR {10 * math.log10(4 / error):.2f} dB on 16 unseen faces, scale {model.config.scale:.3f}")
    sdit.save_model(BUILD / "autoencoder.safetensors", model, torch.float16)


def autoencoder_loss(model, images, mask, cell, kl, expressive, smooth, **_):
    """(loss, mean squared error) of images (B, 3, h, w) with their expressive mask (B, 1, h, w) in 0..1."""
    with autocast:
        mean, logvar = model.moments(images)
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        output = model.reconstruct(z).float()
        coarse = model.reconstruct(F.avg_pool2d(z, cell)).float() if smooth else None
    mean, logvar = mean.float(), logvar.float()
    error = (output - images) ** 2
    loss = ((1 + expressive * mask) * error).mean() + kl * (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
    if smooth:
        loss = loss + smooth * F.mse_loss(coarse, F.avg_pool2d(images, cell))
    return loss, error.mean()


# ----------------------------------------------------------------------------------------------------------------------
# CLIP

def build_clip(steps=CLIP_STEPS, batch=128, lr=1e-3):
    """An open_clip model on pictures and captions of the world. Its text table keeps CLIP's own tokens, 64 wide."""
    torch.manual_seed(0)
    pixels, captions = load_clips("pixels", "caption")
    model, tokenizer = open_clip.CLIP(**CLIP).to(device).train(), open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])
    tokens = tokenizer([str(c) for c in captions])
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1, betas=(0.9, 0.98))
    bar = tqdm(range(steps), "CLIP", unit="step")
    for step in bar:
        cosine(optimizer, lr, step / steps)
        chosen = torch.randperm(CLIPS)[:batch]
        images = data.to_tensor(pixels[chosen, torch.randint(FRAMES, (batch,))])
        with autocast:
            seen = model.encode_image(data.clip_pixels(images.to(device), SIZE), normalize=True)
            read = model.encode_text(tokens[chosen].to(device), normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * seen.float() @ read.float().T
        target = torch.arange(batch, device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    sdit.write_tensors(BUILD / "clip.safetensors", {k: v.half() for k, v in model.state_dict().items()}, CLIP)
    print(f"CLIP: {steps} steps of {batch}, top-1 of 40 unseen captions {clip_accuracy():.1%}")


@torch.no_grad()
def clip_accuracy(groups=10):
    """Share of unseen faces, in groups of 40, whose caption is the nearest of the 40."""
    encoder, right = data.SceneEncoder(BUILD / "clip.safetensors", device), []
    landmarker = data.FaceLandmarker()
    for group in range(groups):
        clips = [world.sample_clip(1_000_000 + 40 * group + i, 1, RENDER) for i in range(40)]
        squares = [data.track(frames, landmarker, "a test face").square for frames, *_ in clips]
        pixels = np.stack([data.crop(c[0][0], square, SIZE) for c, square in zip(clips, squares)])
        likeness = encoder.images(data.to_tensor(pixels)) @ encoder.texts([c[1] for c in clips]).T
        right += (likeness.argmax(1).cpu() == torch.arange(40)).tolist()
    return np.mean(right)


# ----------------------------------------------------------------------------------------------------------------------
# Cache, sDiT, and what is shipped

def build_cache():
    """Records of all clips. Unlike data.py's, a clip keeps ends where MediaPipe missed the face: it is rendered there all the same."""
    autoencoder = sdit.load_autoencoder(BUILD / "autoencoder.safetensors", device)
    encoder = data.SceneEncoder(BUILD / "clip.safetensors", device)
    about = data.cache_about(BUILD / "autoencoder.safetensors", BUILD / "clip.safetensors", autoencoder, CLIP["embed_dim"], SIZE)
    shutil.rmtree(BUILD / "cache", ignore_errors=True)                          # of a run that was stopped
    writer, entries = data.CacheWriter(BUILD / "cache", about), []
    for seed in tqdm(range(CLIPS), "cache"):
        clip = np.load(BUILD / "clips" / f"{seed:06d}.npz")
        tracked = data.Track(clip["landmarks"], clip["found"], clip["square"])
        entries.append(dict(file=f"{seed:06d}", frames=FRAMES))
        writer.add(data.encode_clip(clip["pixels"], tracked, FPS, autoencoder, encoder), entries[-1])
    writer.finish(entries)


def build_paintings():
    """Still pictures of other faces, painted, as pseudo-clips: no painting ever moves its mouth in training (paper A: the artistic
    tenth of its set). Where MediaPipe finds no face in one, data.py leaves it out."""
    (BUILD / "paintings").mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(PAINTINGS), "paintings"):
        imageio.imwrite(BUILD / "paintings" / f"{i:06d}.png", world.painted(world.sample_clip(PAINTING_SEED + i, 1, 2 * RENDER)[0], i)[0])
    subprocess.run([sys.executable, DEMO.parent / "data.py", BUILD / "paintings", "--out", BUILD / "painted-cache", "--size", str(SIZE),
                    "--autoencoder", BUILD / "autoencoder.safetensors", "--clip", BUILD / "clip.safetensors"], check=True)


def sdit_round(number):
    """Folder of a round's run; the states and the model of the last one are what is shipped."""
    return BUILD / ("sdit" if number == 1 else f"sdit-{number}")


def build_sdit():
    for number, r in enumerate(SDIT_ROUNDS, 1):
        recipe = dict(size="demo", ema=0.9995, out=sdit_round(number), **r)
        if number > 1:
            recipe["init"] = sdit_round(number - 1) / "model.safetensors"
        caches = [f"{BUILD / 'cache'}:0.9", f"{BUILD / 'painted-cache'}:0.1"]
        subprocess.run([sys.executable, DEMO.parent / "train.py", "--data", *caches, *(str(x) for k, v in recipe.items() for x in (f"--{k}", v))],
                       check=True)


def build_shipped():
    """Half-precision copies of the models, and one source picture and driving clip of unseen faces, into demo/."""
    for name in ("autoencoder", "clip"):
        (DEMO / f"{name}.safetensors").write_bytes((BUILD / f"{name}.safetensors").read_bytes())
    sdit.save_model(DEMO / "sdit.safetensors", sdit.load_model(sdit_round(len(SDIT_ROUNDS)) / "model.safetensors"), torch.float16)
    imageio.imwrite(DEMO / "source.png", world.sample_clip(SOURCE_SEED, 1, 256)[0][0])
    imageio.imwrite(DEMO / "driving.mp4", world.sample_clip(DRIVING_SEED, 48, 256)[0], fps=24, codec="libx264", plugin="pyav")


def build_strip():
    """demo/strip.png for the README, from what `python sample.py` makes: source, eight driving frames, the result's."""
    sample.reenact(DEMO / "source.png", DEMO / "driving.mp4", BUILD / "strip.mp4", compare=True)
    frames = imageio.imread(BUILD / "strip-compare.mp4", plugin="pyav")
    chosen = frames[np.linspace(0, len(frames) - 1, 8).astype(int)]             # (8, 256, 768, 3): source, driving, result
    source, driving, result = (np.concatenate([data.resize(f[:, i * 256:(i + 1) * 256], 128) for f in chosen], 1) for i in range(3))
    rows = np.concatenate([driving, result])
    left = np.full((256, 128 + 8, 3), 255, np.uint8)
    left[64:192, :128] = source[:, :128]
    imageio.imwrite(DEMO / "strip.png", np.concatenate([left, rows], 1))


PARTS = {"clips": (build_clips, "clips/done"), "autoencoder": (build_autoencoder, "autoencoder.safetensors"),
         "clip": (build_clip, "clip.safetensors"), "cache": (build_cache, "cache/index.json"),
         "paintings": (build_paintings, "painted-cache/index.json"),
         "sdit": (build_sdit, sdit_round(len(SDIT_ROUNDS)) / f"state-{SDIT_ROUNDS[-1]['steps']:08d}.pt"), "shipped": (build_shipped, None), "strip": (build_strip, None)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("parts", nargs="*", help=f"what to build: {', '.join(PARTS)} (default: all)")
    parts = ap.parse_args().parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise sdit.UserError(f"no part named {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    for name in parts:
        build, result = PARTS[name]
        if result and (BUILD / result).exists():
            print(f"{name}: {BUILD / result} is there")
        else:
            build()


if __name__ == "__main__":
    sdit.run_main(main)
