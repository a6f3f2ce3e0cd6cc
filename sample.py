"""Reenactment: a picture of a face and a driving video in, a video of that face with those movements out (paper 3.2, Alg. 1).

    python sample.py                                                   # the bundled picture, clip and models, under a minute
    python sample.py --source x.jpg --driving y.mp4 --compare
    python sample.py --source x.jpg --driving y.mp4 --model runs/XL-2-8/model.safetensors --out z.mp4

The driving video may have any length: its frames are dealt to rows of T that share one frame, the anchor (`plan_rows`).
`sample_plain` is the paper's rule as it stands, all rows in one batch; `sample_first` and `sample_rest` compute the same
in the memory of a few rows, and are what runs.
"""
import argparse
import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import sdit
from sdit import NoiseSchedule, UserError

DEMO = Path(__file__).resolve().parent / "demo"
CHUNK_TOKENS = 4096                                # tokens that are denoised at once; bounds memory, not the result

# ----------------------------------------------------------------------------------------------------------------------
# From a video to rows


def plan_rows(M, T, anchor=None):
    """Deal the M frames of a video to rows of T (Alg. 1, step 1; Eq. 1). Returns (rows, keep), both (B, T).

    rows holds frame numbers. Slot T // 2 is the anchor in every row; frames before it in time lie in the slots before,
    frames after it in those after, in order of time, dealt strided: rows look like training sequences, sorted and wide. The
    anchor is the frame that needs the fewest rows, among those the most central, then the earlier; or the frame given. (The
    paper says "the central frame" and leaves dealing open; where T is even the exact centre can cost more rows.)
    keep marks each frame's one place in the result; elsewhere stand the anchor of rows 1.. and repetitions that fill slots."""
    slot = T // 2                                                               # of the anchor in every row

    def count(f):
        """Rows needed with the anchor at frame f."""
        sides = [(f, slot), (M - 1 - f, T - 1 - slot)]
        return max(1, *(math.ceil(n / slots) if slots else (math.inf if n else 0) for n, slots in sides))

    f = min(range(M), key=lambda f: (count(f), abs(f - (M - 1) / 2), f)) if anchor is None else anchor
    B = count(f)
    if B == math.inf:
        raise UserError(f"{M} frames cannot share frame {f} in rows of {T}")
    rows, keep = np.full((B, T), f), np.zeros((B, T), bool)
    keep[0, slot] = True
    for side, first, end in ((range(f), 0, slot), (range(f + 1, M), slot + 1, T)):
        for b in range(B if side else 0):
            own = side[b::B]
            rows[b, first:end] = [*own, *[(own or side)[-1]] * (end - first - len(own))]
            keep[b, first:first + len(own)] = True
    return rows, keep


def frame_noise(seed, frames, shape):
    """Starting noise (len(frames), *shape) float64: it belongs to the frame of the video, whatever row or batch it is in."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, f]).standard_normal(shape) for f in frames]))


# ----------------------------------------------------------------------------------------------------------------------
# Denoising. x are latents (B, T, C, H, W), c conditioning (B, T, D), `anchor` the slot of the anchor

def ddim_timesteps(steps):
    """Timesteps from 999 down to 0, evenly spaced, and for each the one after it; -1 stands for clean latents."""
    t = np.linspace(NoiseSchedule.steps - 1, 0, steps).round().astype(int).tolist()
    return list(zip(t, t[1:] + [-1]))


def ddim_update(schedule, x, output, t, after):
    """One deterministic step from timestep t to `after` (DDIM, Eq. 12, eta = 0); output (B, T, 2C, H, W) of the model."""
    noise = output[:, :, :x.shape[2]].to(x.dtype)
    clean = schedule.predict_x0(x, noise, torch.full((len(x),), t, device=x.device))
    rest = schedule.alpha_bar[after] if after >= 0 else torch.ones((), dtype=torch.float64)
    return float(rest.sqrt()) * clean + float((1 - rest).sqrt()) * noise


@torch.no_grad()
def sample_plain(model, x, c, steps, anchor):
    """The paper's rule: all rows in one batch, the anchor overridden at the start, in every layer (`SDiT.forward`) and after
    every step (Alg. 1, step 3). Memory grows with the video; kept as the definition, and as what the tests compare with."""
    schedule, x, c = NoiseSchedule(x.device), sdit.override(x, anchor), sdit.override(c, anchor)
    for t, after in ddim_timesteps(steps):
        output = model(x, torch.full((len(x),), t, device=x.device), c, anchor)
        x = sdit.override(ddim_update(schedule, x, output, t, after), anchor)
    return x


@torch.no_grad()
def sample_first(model, x, c, steps, anchor, progress=lambda: None):
    """Row 0 (B = 1) through all steps. Returns its latents and the anchor bank: for every step the keys and values of its
    anchor, which is all that other rows need of it."""
    schedule, bank = NoiseSchedule(x.device), []
    for t, after in ddim_timesteps(steps):
        output, anchor_kv = model.forward_first(x, torch.full((1,), t, device=x.device), c, anchor)
        x = ddim_update(schedule, x, output, t, after)
        bank.append(anchor_kv)
        progress()
    return x, bank


@torch.no_grad()
def sample_rest(model, x, c, steps, anchor, bank, progress=lambda: None):
    """Any rows but row 0, without their anchor slots, x (B, T - 1, C, H, W); in any batch and order, with the same result as
    `sample_plain`."""
    schedule = NoiseSchedule(x.device)
    for (t, after), anchor_kv in zip(ddim_timesteps(steps), bank):
        output = model.forward_rest(x, torch.full((len(x),), t, device=x.device), c, anchor, anchor_kv)
        x = ddim_update(schedule, x, output, t, after)
        progress()
    return x


def sample_rows(model, rows, keep, wanted, conditioning, steps, seed):
    """Latents of at least the frames in `wanted` (a set): dict frame -> (C, H, W). rows, keep from `plan_rows`; conditioning
    (M, D). Row 0 is always sampled; of the others those that hold a wanted frame."""
    config, device, dtype = model.config, conditioning.device, next(model.parameters()).dtype
    shape, anchor = (config.latent_channels, config.latent_size, config.latent_size), rows.shape[1] // 2
    own = [s for s in range(rows.shape[1]) if s != anchor]
    needed = [b for b in range(1, len(rows)) if wanted & set(rows[b][keep[b]].tolist())]
    size = max(1, CHUNK_TOKENS // (config.tokens * rows.shape[1]))
    chunks = [needed[i:i + size] for i in range(0, len(needed), size)]
    latents = {}

    def start(frames):
        x = frame_noise(seed, frames.ravel(), shape).view(*frames.shape, *shape)
        return x.to(device, dtype), conditioning[torch.from_numpy(frames)].to(dtype)

    with tqdm(total=steps * (1 + len(needed)), desc="denoising", unit="row-step", leave=False) as bar:
        x, bank = sample_first(model, *start(rows[:1]), steps, anchor, bar.update)
        latents |= {f: z for f, z, k in zip(rows[0].tolist(), x[0].cpu(), keep[0]) if k}
        for chunk in chunks:
            frames, kept = rows[chunk][:, own], keep[chunk][:, own]
            x = sample_rest(model, *start(frames), steps, anchor, bank, lambda: bar.update(len(chunk)))
            latents |= {f: z for f, z, k in zip(frames.ravel().tolist(), x.flatten(0, 1).cpu(), kept.ravel()) if k}
    return latents


# ----------------------------------------------------------------------------------------------------------------------
# The whole job

def read_source(path, landmarker, size):
    """The source's face crop (size, size, 3) uint8: a picture, or the first frame with a face of a video."""
    picture = data.read_picture(path)
    for frame in data.Video(path) if picture is None else [picture]:
        points = landmarker(frame)
        if points is not None:
            return data.crop(frame, data.face_square(points[None]), size)
    raise data.no_face(path)


def parse_only(text, M):
    """"a:b" -> range of frames; both ends may be missing."""
    try:
        a, b = (int(part) if part else None for part in text.split(":"))
        wanted = range(M)[a:b]
    except ValueError:
        wanted = ()
    if not wanted:
        raise UserError(f"--only {text} names none of the {M} frames of the driving video; write it as in 0:24")
    return wanted


def write_frames(paths, latents, wanted, autoencoder, driving, square, source, comment, watch):
    """Decode, put in order and write: the result to paths[0], the comparison to a second path. Frames go out as they are
    decoded, eight at a time."""
    span = [float(f / driving.fps) for f in (wanted[0], wanted[-1] + 1)]
    span = span if len(wanted) < len(driving) else (0.0, math.inf)               # a whole video keeps its sound to the end
    device = next(autoencoder.parameters()).device
    shown = (frame for i, frame in enumerate(driving) if i in wanted)
    with ExitStack() as stack, tqdm(total=len(wanted), desc="writing", unit="frame", leave=False) as bar:
        files = [stack.enter_context(data.VideoWriter(p, driving.fps, comment, driving, span)) for p in paths]
        for i in range(0, len(wanted), 8):
            with watch("decoding"), torch.no_grad():
                images = data.to_images(autoencoder.decode(torch.stack([latents[f] for f in wanted[i:i + 8]]).to(device)))
            with watch("writing"):
                for image in images:
                    files[0].write(image)
                    for comparison in files[1:]:
                        panels = source, data.crop(next(shown), square), image
                        comparison.write(np.concatenate([data.resize(panel, max(256, len(image))) for panel in panels], 1))
                    bar.update()


def reenact(source, driving, out="reenacted.mp4", model=DEMO / "sdit.safetensors", steps=50, seed=0, only=None, compare=False,
            device=None):
    """Write the video `out` of the face in `source` (picture or video) moving like the one in `driving` (video).

    out has the frames, rate and sound of `driving`, or of its frames `only` ("a:b"); `compare` writes, beside it,
    OUT-compare.mp4: source, driving face, result. Returns the seconds by part. Raises UserError on bad input; then nothing is written."""
    watch, paths = data.Stopwatch(), [Path(out), Path(out).with_name(f"{Path(out).stem}-compare.mp4")][:1 + compare]
    for path in paths:
        data.check_output(path, source, driving)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with watch("models"):
        sdiff = sdit.load_model(model, device)
        config = sdiff.config
        autoencoder = sdit.load_autoencoder(sdit.find_weights(config.autoencoder, config.autoencoder_sha256, model), device)
        landmarker = data.FaceLandmarker()
        size = autoencoder.config.factor * config.latent_size
    with watch("landmarks"):
        video = data.Video(driving)
        wanted = parse_only(only, len(video)) if only else range(len(video))
        face = read_source(source, landmarker, size)
        tracked = data.track(video, landmarker, driving, len(video))
    missed = int((~tracked.found).sum())
    if missed:
        print(f"no face found in {missed} of {len(video)} frames of {driving}; their landmarks are interpolated")
    with watch("CLIP"), torch.no_grad():
        encoder = data.SceneEncoder(sdit.find_weights(config.clip, config.clip_sha256, model), device)
        scene = encoder.images(data.to_tensor(face[None]))
    with watch("denoising"), torch.no_grad():
        landmarks = torch.from_numpy(tracked.landmarks).to(device)
        conditioning = sdiff.mapping(scene, landmarks[None])[0]                 # (M, D)
        rows, keep = plan_rows(len(video), config.frames)
        latents = sample_rows(sdiff, rows, keep, set(wanted), conditioning, steps, seed)
    comment = "synthetic, AI-generated face video; " + json.dumps(dict(tool="anchored-diffusion", model=sdit.sha256(model)[:16],
                                                                       seed=seed, steps=steps))
    write_frames(paths, latents, wanted, autoencoder, video, tracked.square, face, comment, watch)
    print(f"{' and '.join(map(str, paths))}: {len(wanted)} frames of {size} x {size}, {len(rows)} rows of {config.frames}, "
          f"anchor frame {rows[0, config.frames // 2]}\n{watch}")
    return dict(watch.seconds)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--source", type=Path, default=DEMO / "source.png", help="picture of a face, or a video (its first frame with a face)")
    ap.add_argument("--driving", type=Path, default=DEMO / "driving.mp4", help="video whose movements are taken")
    ap.add_argument("--out", type=Path, default=Path("reenacted.mp4"))
    ap.add_argument("--model", type=Path, default=DEMO / "sdit.safetensors", help="model file made by train.py")
    ap.add_argument("--steps", type=int, default=50, help="denoising steps, 1 to 1000")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--only", metavar="A:B", help="make only these frames of the driving video, as in 0:24")
    ap.add_argument("--compare", action="store_true", help="also write OUT-compare.mp4: source, driving, result side by side")
    a = ap.parse_args()
    if not 1 <= a.steps <= NoiseSchedule.steps:
        raise UserError(f"--steps {a.steps} is not between 1 and {NoiseSchedule.steps}")
    bundled = {DEMO / "source.png", DEMO / "driving.mp4"}
    if a.model.resolve() == DEMO / "sdit.safetensors" and not {a.source.resolve(), a.driving.resolve()} <= bundled:
        print("note: the bundled demo model knows only rendered faces, and those roughly: the result is a face of that world, led by the "
              "driving person; for real faces train a model on real clips (README, Train) and pass it with --model")
    reenact(**vars(a))


if __name__ == "__main__":
    sdit.run_main(main)
