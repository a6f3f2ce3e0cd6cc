"""Reenactment: a picture of a face and a driving video in, a video of that face with those
movements out (paper 3.2, Algorithm 1).

    python sample.py  # the bundled picture, video and models: under half a minute
    python sample.py --source x.jpg --driving y.mp4 --compare
    python sample.py --prompt "a man with red hair" --driving y.mp4
    torchrun --nproc_per_node=4 sample.py --source x.jpg --driving y.mp4 --out z.mp4

Algorithm 1 is: 1 `plan_rows`, 2 `make_conditions`, 3 `denoise`, 4 `decode_frames`. (Conditions
belong to frames, not to rows, so here 2 comes first.) A video of any length is dealt to rows of T
frames that share one frame, the anchor. `sample_plain` is the paper's rule, all rows in one batch;
`sample_first` and `sample_rest` give the same result in the memory of a few rows and of the anchor
bank, which grows with the steps alone. `reenact` is the whole job: `prepare`, `sample`, `write`. An
interrupted command, given again, goes on from the finished frames in OUT.partial/."""

import argparse
import csv
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import os
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_map

import data
import sdit
from sdit import NoiseSchedule, UserError

DEMO = Path(__file__).resolve().parent / "demo"
SOURCE, DRIVING, MODEL = DEMO / "source.png", DEMO / "driving.mp4", DEMO / "sdit.safetensors"

# Tokens that are denoised at once: bounds the memory; the result is the same, to rounding.
CHUNK_TOKENS = dict(cpu=2048, cuda=8192)

# --------------------------------------------------------------------------------------------------
# Algorithm 1, step 1: from a video to rows


def count_rows(M, T, anchor_frame):
    """How many rows of T the M frames of a video need with this frame as the anchor, which is in
    slot T // 2 of every row (paper silent): of two in the middle the later one."""

    def rows_for(frames, slots):
        if frames == 0:
            return 0
        return math.ceil(frames / slots) if slots else math.inf

    slot = T // 2
    before, after = anchor_frame, M - 1 - anchor_frame
    return max(1, rows_for(before, slot), rows_for(after, T - 1 - slot))


def plan_rows(M, T, anchor_frame=None):
    """Deal the M frames of a video to rows of T (Eq. 1): frame numbers and `keep`, both (B, T).

    M = 5, T = 3 gives [[0, 2, 3], [1, 2, 4]]. `keep` marks one place of each frame,
    for the anchor its slot in row 0; elsewhere are copies of it and frames that fill slots."""
    slot = T // 2
    if anchor_frame is None:
        # paper: "the central frame". Where T is even, a row has one slot fewer after its anchor, so
        # that a later frame needs fewer rows: that at 2/3 of the video for T = 4
        centre = (M - 1) / 2
        anchor_frame = min(range(M), key=lambda f: (count_rows(M, T, f), abs(f - centre)))
    B = count_rows(M, T, anchor_frame)
    if B == math.inf:
        raise UserError(
            f"{M} frames cannot share frame {anchor_frame} in rows of {T}; rows of two frames and "
            f"more can (train.py --frames)"
        )

    rows, keep = np.full((B, T), anchor_frame), np.zeros((B, T), bool)
    keep[0, slot] = True

    # Paper silent on the order. Earlier frames lie before the anchor and later ones after it. They
    # are dealt in turn, so that a row is sorted and reaches over the whole video, as in training.
    earlier, later = range(anchor_frame), range(anchor_frame + 1, M)
    for frames, first, end in (earlier, 0, slot), (later, slot + 1, T):
        if not frames:
            continue
        for b in range(B):
            dealt = frames[b::B]
            rows[b, first:end] = (dealt or frames)[-1]  # fills slots that would stay empty
            rows[b, first : first + len(dealt)] = dealt
            keep[b, first : first + len(dealt)] = True
    return rows, keep


def plan_windows(M, T):
    """MultiDiffusion's rows (windows, T): T consecutive frames every T // 2 frames, the last flush
    with the end (paper silent on the overlap). A short video repeats its last frame."""
    last = max(M - T, 0)
    starts = [*range(0, last, max(T // 2, 1)), last]
    return np.minimum(np.add.outer(starts, np.arange(T)), M - 1)


def frame_noise(seed, frames, shape, step=0):
    """Noise (*frames.shape, *shape), float64, which depends on seed, frame and step only. So rows
    agree on their anchor, and chunks, processes and --only change nothing. `step` 0 is the start,
    i + 1 the noise that the sampler adds in its step i."""
    noise = [
        np.random.default_rng([seed, f, step]).standard_normal(shape) for f in np.ravel(frames)
    ]
    return torch.from_numpy(np.stack(noise)).view(*np.shape(frames), *shape)


# --------------------------------------------------------------------------------------------------
# Algorithm 1, step 2: what a video is conditioned on


def edit_scene(encoder, scene, edit):
    """The scene (1, S), moved from text to text by `edit`, "BEFORE -> AFTER[:WEIGHT]". Paper 4.4 is
    silent on how vectors are combined: along the difference of the two texts."""
    before, _, after = edit.partition("->")
    if ":" not in after:
        after = f"{after}:1"
    after, _, weight = after.rpartition(":")
    try:
        weight = float(weight)
    except ValueError:
        weight = math.nan
    if not before.strip() or not after.strip() or not math.isfinite(weight):
        raise UserError(f'--edit "{edit}" is not of the form "blond hair -> red hair[:WEIGHT]"')
    old, new = encoder.texts([before.strip(), after.strip()])
    return F.normalize(scene + weight * (new - old), dim=-1)


def make_scene(models, face, prompt, edit):
    """The scene (1, S) of a face crop (h, w, 3) uint8, of a sentence, whose vector stands in as it
    is (paper 4.4), or of both (their mean direction), edited."""
    parts = [models.encoder.images(data.to_tensor(face[None]))] if face is not None else []
    parts += [models.encoder.texts([prompt])] if prompt else []
    scene = F.normalize(sum(parts), dim=-1)
    return edit_scene(models.encoder, scene, edit) if edit else scene


def make_conditions(models, scene, landmarks, guidance):
    """Conditioning (M, D) of every branch, in the model's precision, from a scene (1, S) and
    landmarks (M, 478, 3)."""
    mapping, dtype = models.sdit.mapping, models.sdit.final_layer.linear.weight.dtype
    landmarks = torch.from_numpy(landmarks)[None]
    given = [x.to(models.device, mapping.null_scene.dtype) for x in (scene, landmarks)]
    conditions = [mapping(*given)[0].to(dtype)]
    if guidance != 1:
        unconditional = mapping()[0].to(dtype)  # (1, D)
        conditions.append(unconditional.expand_as(conditions[0]))
    return conditions


# Points of the face mesh: the outline, and those that expressions hardly move (the upper outline,
# the bridge of the nose, the corners of the eyes)
# fmt: off
OVAL = [10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
        152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109]
# fmt: on
RIGID = [*OVAL[:9], *OVAL[-7:], 234, 168, 6, 197, 195, 33, 133, 362, 263]


def head_pose(points, onto):
    """(scale, rotation (3, 3)) that best take the rigid points of one face (478, 3) to another's
    (Umeyama 1991, without the translation)."""
    a, b = (p[RIGID] - p[RIGID].mean(0) for p in (points, onto))
    u, s, vt = np.linalg.svd(b.T @ a)
    flip = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    return (s * flip).sum() / (a**2).sum(), (u * flip) @ vt


def neutral_frame(landmarks):
    """Number of the frame of landmarks (M, 478, 3) with the smallest mouth opening and rotation of
    the head."""
    eyes = landmarks[:, 263] - landmarks[:, 33]  # from one to the other
    face = landmarks[:, 152] - landmarks[:, 10]  # from brow to chin
    yaw_and_roll = abs(np.arctan2(eyes[:, [2, 1]], eyes[:, :1])).sum(1)
    pitch = abs(np.arctan2(face[:, 2], face[:, 1]))
    mouth = np.linalg.norm(landmarks[:, 13] - landmarks[:, 14], axis=1)
    opening = mouth / np.linalg.norm(eyes, axis=1)
    return int((yaw_and_roll + pitch + opening).argmin())


def retargeted(driving, source):
    """Landmarks (M, 478, 3) with the motion of `driving` (M, 478, 3) and half of the proportions of
    `source` (478, 3), in any unit; all of the proportions were less accurate on the demo. Paper
    silent: raw landmarks carry the driver's shape over."""
    neutral = driving[neutral_frame(driving)]
    scale, rotation = head_pose(source, neutral)

    # the head's own axes: from eye to eye, from chin to brow, towards the viewer
    right, up = neutral[263] - neutral[33], neutral[10] - neutral[152]
    right = right / np.linalg.norm(right)
    up = up - up @ right * right
    up = up / np.linalg.norm(up)
    axes = np.stack([right, up, np.cross(right, up)], 1)  # (3, 3), in columns

    # how much wider and higher the outline is; depth is hardly seen, and stays
    turned = scale * source @ rotation.T
    driver, person = ((p - p[RIGID].mean(0)) @ axes for p in (neutral, turned))
    stretch = (driver[OVAL] * person[OVAL]).sum(0) / (driver[OVAL] ** 2).sum(0)
    half_difference = (driver * (stretch - 1) / 2 * (1, 1, 0)) @ axes.T  # (478, 3)

    moved = []
    for frame in driving:
        scale, rotation = head_pose(neutral, frame)
        moved.append(frame + scale * half_difference @ rotation.T)
    return np.stack(moved).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Algorithm 1, step 3: samplers

METHODS = ("anchored", "multidiffusion", "independent")


@dataclass(frozen=True)
class Settings:
    """All that decides the result besides model and inputs. Paper silent on steps, sampler and
    guidance: these were chosen on the demo (README, Where the paper is silent)."""

    steps: int = 20
    sampler: str = "ddim:1"  # ddim, ddim:ETA, ddpm (the only one with the learned sigma) or dpm++
    guidance: float = 2.0  # 1: none
    method: str = "anchored"  # multidiffusion and independent are there to compare with
    seed: int = 0

    def __post_init__(self):
        assert 1 <= self.steps <= NoiseSchedule.steps and self.seed >= 0
        choose_sampler(self.sampler)
        if self.method not in METHODS:
            raise UserError(f"no method {self.method!r}; choose {', '.join(METHODS)}")

    def timesteps(self):
        """[(t, after)]: timesteps from 999 down to 0, each with the next one (-1: clean latents).
        Evenly spaced; for DPM-Solver++ in the log signal-to-noise ratio, or it would overshoot."""
        last, number = NoiseSchedule.steps - 1, np.arange(self.steps)
        t = np.linspace(last, 0, self.steps)
        if self.sampler == "dpm++":
            log_snr = torch.logit(NoiseSchedule().alpha_bar).numpy()  # falls with t
            even = np.linspace(log_snr[-1], log_snr[0], self.steps)
            t = np.interp(even, log_snr[::-1], np.arange(last, -1, -1))

        # no timestep twice, where several round to one
        rising = t[::-1].round().astype(int)
        rising = np.maximum.accumulate(rising - number) + number  # each above the one before
        t = np.minimum(rising, last - number[::-1])[::-1].tolist()  # leaves room for the others
        return list(zip(t, [*t[1:], -1]))


# A sampler's step: from x (..., C, H, W) at alpha_bar abar to the next x at abar_next, 1 for clean
# latents. eps, mix: the model's noise, and its weight of two log-variances, about -1 to 1.
# fresh_noise(): noise like x. history: a dict that lasts from step to step.


def predict_clean(x, eps, abar):
    return (x - (1 - abar) ** 0.5 * eps) / abar**0.5


def predict_next(x, eps, abar, abar_next, sigma):
    """The mean of the next x, to which noise times sigma is added (Song et al. 2021, Eq. 12)."""
    clean = predict_clean(x, eps, abar)
    return abar_next**0.5 * clean + (1 - abar_next - sigma**2) ** 0.5 * eps


def ddim(x, eps, mix, abar, abar_next, fresh_noise, history, eta=0.0):
    """DDIM (Song et al. 2021), Eq. 16. eta 0 adds no noise, 1 as much as DDPM's posterior
    has."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    x = predict_next(x, eps, abar, abar_next, sigma)
    return x + sigma * fresh_noise() if sigma else x


def ddpm(x, eps, mix, abar, abar_next, fresh_noise, history):
    """DDPM with the learned sigma, on the process that has only these timesteps (Improved DDPM,
    Eq. 15 and 19)."""
    beta = 1 - abar / abar_next
    variance = beta * (1 - abar_next) / (1 - abar)  # of the posterior, the smallest
    mean = predict_next(x, eps, abar, abar_next, variance**0.5)
    if abar_next == 1:
        return mean

    low, high = math.log(variance), math.log(beta)
    log_variance = low + (mix + 1) / 2 * (high - low)
    return mean + torch.exp(log_variance / 2) * fresh_noise()


def dpm_plus(x, eps, mix, abar, abar_next, fresh_noise, history):
    """DPM-Solver++ (2M), Lu et al. 2022, Alg. 2."""
    clean = predict_clean(x, eps, abar)
    if abar_next == 1:  # h is infinite
        return clean

    # the step in lambda, half of the log signal-to-noise ratio
    h = (math.log(abar_next / (1 - abar_next)) - math.log(abar / (1 - abar))) / 2
    target = clean
    if history:
        target = clean + (clean - history["clean"]) * h / (2 * history["h"])
    history.update(clean=clean, h=h)
    shrink = ((1 - abar_next) / (1 - abar)) ** 0.5
    return shrink * x - abar_next**0.5 * math.expm1(-h) * target


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpm_plus}


def choose_sampler(name):
    """The function that takes one step."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    kind, _, eta = name.partition(":")
    with suppress(ValueError):
        if kind == "ddim" and 0 <= float(eta) <= 1:
            return functools.partial(ddim, eta=float(eta))
    known = ", ".join(SAMPLERS)
    raise UserError(f"no sampler {name!r}; choose {known} or ddim:ETA with ETA from 0 to 1")


@torch.no_grad()
def denoise(settings, x, frames, evaluate, anchor=None):
    """Algorithm 1, step 3: from noise x (..., C, H, W) for `frames` (...) to clean latents.

    evaluate(i, x, t): the model's output at step i and timestep t. anchor: the slot whose latents
    become row 0's at the start and after every step. (This changes nothing: the rows' anchors start
    from the same noise, and the model's output for them is the same.)"""
    take_step, history = choose_sampler(settings.sampler), {}
    alpha_bar = [*NoiseSchedule().alpha_bar.tolist(), 1.0]  # the last one, at -1: clean latents

    x = sdit.override(x, anchor)
    steps = data.progress(settings.timesteps(), "denoising", "step")
    for i, (t, after) in enumerate(steps):

        def fresh_noise():
            noise = frame_noise(settings.seed, frames, x.shape[-3:], i + 1)
            return data.send(noise.to(x.dtype), x.device)

        eps, mix = evaluate(i, x, t).chunk(2, -3)
        x = take_step(x, eps, mix, alpha_bar[t], alpha_bar[after], fresh_noise, history)
        x = sdit.override(x, anchor)
    return x


# --------------------------------------------------------------------------------------------------
# Anchored diffusion of rows. A branch is the conditional or the unconditional evaluation;
# `conditions` holds one tensor for each, the conditional one first, (B, slots, D). `model`: an
# SDiT, one that is `Captured` on a GPU, or an engine of export.py.


def guided(outputs, guidance):
    """Classifier-free guidance of the outputs (..., 2C, H, W) of one branch or two, over all
    channels of the noise (DiT's code: three of four). The sigma is the conditional one's."""
    if len(outputs) == 1:
        return outputs[0]
    (eps, mix), (eps_unconditional, _) = (output.chunk(2, -3) for output in outputs)
    return torch.cat([eps_unconditional + guidance * (eps - eps_unconditional), mix], -3)


def run_model(function, x, t, c, *rest):
    """A model of any precision on latents x; the output is in x's precision."""
    output = function(x, torch.full((len(x),), t, device=x.device), c, *rest)
    return (output[0].to(x.dtype), output[1]) if isinstance(output, tuple) else output.to(x.dtype)


def sample_plain(model, x, frames, conditions, settings, anchor):
    """The paper's rule, the definition: all rows x (B, T, C, H, W) in one batch, so that memory
    grows with the video. Tests use it so; `--method independent` is it, on some rows at a time,
    with `anchor` None.

    Algorithm 1 overrides the model's output for the anchor, then takes a step. Here the model
    overrides in every layer, and the latents are overridden before the first and after every step.
    As rows also share the anchor's noise (in Eq. 2 they need not), both are the same."""

    def evaluate(i, x, t):
        return guided([run_model(model, x, t, c, anchor) for c in conditions], settings.guidance)

    return denoise(settings, x, frames, evaluate, anchor)


def sample_first(model, x, frames, conditions, settings, anchor):
    """Row 0, x (1, T, C, H, W): its latents and the anchor bank.

    Row 0 is the same alone, and other rows read only the keys and values of its anchor (see
    `sdit.AnchorBank`): bank[step][branch] is (depth, 2, 1, heads, N, d). Of an engine bank[step] is
    one tensor."""
    bank = []

    def evaluate(i, x, t):
        if hasattr(model, "first"):  # an engine of export.py: branches and guidance are inside
            output, anchor_kv = model.first(x, t, conditions, anchor, settings.guidance)
        else:
            pairs = [run_model(model.forward_first, x, t, c, anchor) for c in conditions]
            outputs, anchor_kv = zip(*pairs)
            output = guided(outputs, settings.guidance)
        bank.append(anchor_kv)
        return output

    return denoise(settings, x, frames, evaluate), bank


def sample_rest(model, x, frames, conditions, settings, anchor, bank):
    """Other rows, x (B, T - 1, C, H, W) without the anchor's slot: in any batch and order, what
    `sample_plain` makes of them. Each branch reads its own keys and values."""

    def evaluate(i, x, t):
        if hasattr(model, "rest"):  # an engine
            return model.rest(x, t, conditions, anchor, settings.guidance, bank[i])
        branches = zip(conditions, bank[i])
        outputs = [run_model(model.forward_rest, x, t, c, anchor, kv) for c, kv in branches]
        return guided(outputs, settings.guidance)

    return denoise(settings, x, frames, evaluate)


def sample_multidiffusion(model, x, conditions, settings, size):
    """MultiDiffusion (Bar-Tal et al. 2023), to compare with: the whole video x (M, C, H, W),
    conditions (M, D). A frame's output is averaged over the windows that hold it."""
    windows = plan_windows(len(x), model.config.frames)  # (windows, T)
    counts = np.bincount(windows.ravel(), minlength=len(x)).reshape(-1, 1, 1, 1)
    windows, counts = (data.send(torch.from_numpy(n), x.device) for n in (windows, counts))

    def evaluate(i, x, t):
        total = x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:])  # (M, 2C, H, W)
        for some in windows.split(size):
            outputs = [run_model(model, x[some], t, c[some]) for c in conditions]
            output = guided(outputs, settings.guidance)  # (windows, T, 2C, H, W)
            total.index_add_(0, some.flatten(), output.flatten(0, 1))
        return total / counts

    return denoise(settings, x, range(len(x)), evaluate)


class Captured:
    """An SDiT on a GPU, recorded as CUDA graphs, one for every shape: one launch in place of
    hundreds, and the same bits. For one thread."""

    recording = threading.Lock()  # CUDA records for one thread at a time

    def __init__(self, model):
        self.model, self.config, self.graphs = model, model.config, {}

    def forward_first(self, *given):
        return self._run(self.model.forward_first, given)

    def forward_rest(self, *given):
        return self._run(self.model.forward_rest, given)

    def _run(self, function, given):
        # numbers among `given`, such as the anchor's slot, are recorded as they are
        key = function.__name__, *(getattr(x, "shape", x) for x in given)
        if key not in self.graphs:
            self.graphs[key] = self._record(function, given)

        graph, inputs, outputs = self.graphs[key]
        for recorded, x in zip(inputs, given):
            if isinstance(x, torch.Tensor):
                recorded.copy_(x)
        graph.replay()
        return tree_map(torch.clone, outputs)

    def _record(self, function, given):
        """(graph, the tensors that it reads, the tensors that it writes)."""
        inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        graph = torch.cuda.CUDAGraph()
        with self.recording, torch.cuda.device(given[0].device):
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):  # the libraries choose their kernels
                function(*inputs)
            torch.cuda.current_stream().wait_stream(warm_up)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(*inputs)
        return graph, inputs, outputs


# --------------------------------------------------------------------------------------------------
# A video of any length


def sample_video(model, conditions, settings, wanted=None, finished=None, share=(0, 1), plan=None):
    """{frame: latent (C, H, W) on the CPU} of a video of M frames, conditions (M, D).

    wanted: frames to sample (default: all). finished: the mapping to fill, in which several
    processes meet; rows of which it holds all frames are not sampled again. share: (rank,
    processes). plan: (rows, keep) with the anchor in slot T // 2, in place of `plan_rows`'s."""
    M = len(conditions[0])
    rank, processes = share
    finished = {} if finished is None else finished
    wanted = set(range(M) if wanted is None else wanted)

    # Plan: deal the frames to rows that share the anchor. MultiDiffusion has one row, of all.
    if settings.method == "multidiffusion":
        plan = np.arange(M)[None], np.ones((1, M), bool)
    rows, keep = plan or plan_rows(M, model.config.frames)
    kept = [row[k].tolist() for row, k in zip(rows, keep)]  # the frames that each row gives

    # Choose the rows of this process that hold wanted frames which are not finished. With
    # an anchor each samples row 0 for itself: the bank is neither sent nor kept on disk.
    needed = [b for b in range(len(rows)) if wanted.intersection(kept[b])]
    mine = [b for b in needed[rank::processes] if not all(f in finished for f in kept[b])]
    to_sample = sorted({0, *mine}) if mine and settings.method == "anchored" else mine
    if rank == 0 and len(wanted) < M:
        print(f"{len(wanted)} of {M} frames; they need {len(needed)} of {len(rows)} rows")

    # Sample: row 0 with its anchor bank, if there is an anchor, then the other rows.
    sampled = sample_rows(model, rows, to_sample, conditions, settings)
    for b, latents in data.progress(sampled, "rows", "row", len(to_sample)):
        latents = latents.cpu()  # (slots, C, H, W)
        if not latents.isfinite().all():
            causes = "damaged weights, or --guidance too large"
            raise UserError(f"the model's numbers are no longer finite: {causes}")

        # Scatter the row to frames.
        if b in mine:
            for slot in np.flatnonzero(keep[b]):
                finished[int(rows[b, slot])] = latents[slot]
    return finished


def sample_rows(model, rows, numbers, conditions, settings):
    """Yield (number of a row, its latents (slots, C, H, W)) for the rows `numbers` of a plan, of
    which a few are sampled at once. With the method "anchored" `numbers` begins with 0, the row
    that makes the anchor bank."""
    if not numbers:
        return
    config, device = model.config, conditions[0].device
    anchor, shape = config.frames // 2, (config.latent_channels, *[config.latent_size] * 2)
    tokens = CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cpu"])
    rows_at_once = max(1, tokens // (config.tokens * config.frames))
    rows_at_once = min(rows_at_once, getattr(model, "most_rows", rows_at_once))

    all_slots = np.arange(rows.shape[1])
    other_slots = np.delete(all_slots, anchor)

    def inputs(chunk, slots):
        """(noise, frames, conditions) of some rows; noise is in float32 at least."""
        frames = rows[np.ix_(chunk, slots)]  # contiguous, and so is all that it picks
        dtype = torch.promote_types(conditions[0].dtype, torch.float32)
        x = data.send(frame_noise(settings.seed, frames, shape).to(dtype), device)
        frame_index = data.send(torch.from_numpy(frames), device)
        return x, frames, [c[frame_index] for c in conditions]

    if settings.method == "multidiffusion":
        x, _, _ = inputs([0], all_slots)  # (1, M, C, H, W)
        yield 0, sample_multidiffusion(model, x[0], conditions, settings, rows_at_once)

    elif settings.method == "independent":
        for chunk in batches(numbers, rows_at_once):
            yield from zip(chunk, sample_plain(model, *inputs(chunk, all_slots), settings, None))

    else:
        if device.type == "cuda" and isinstance(model, sdit.SDiT):
            model = Captured(model)
        first, bank = sample_first(model, *inputs([0], all_slots), settings, anchor)
        yield 0, first[0]

        for chunk in batches(numbers[1:], rows_at_once):
            x = sample_rest(model, *inputs(chunk, other_slots), settings, anchor, bank)
            anchors = first[:, anchor : anchor + 1].expand(len(x), -1, -1, -1, -1)  # (B, 1, ...)
            yield from zip(chunk, torch.cat([x[:, :anchor], anchors, x[:, anchor:]], 1))


def batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


class LatentStore:
    """{frame: latent} on disk, OUT.partial/KEY-FRAME.safetensors, for `sample_video`. KEY: a digest
    of all that decides the result; frames of another key are removed, other files stay. show: a
    function that sees every new frame."""

    ours = f"*-{'[0-9]' * 8}.safetensors*"  # also temporary ones, of runs that were killed

    def __init__(self, out, key, show=None):
        self.folder, self.key = Path(f"{Path(out)}.partial"), key
        self.show = show
        if len(os.fsencode(self.folder.name)) > 255:
            self.folder = sdit.hidden(out, ".partial")
        self.folder.mkdir(parents=True, exist_ok=True)

        found = list(self.folder.glob(self.ours))
        stale = [path for path in found if key not in path.name]
        self.resumed = len(found) > len(stale)
        for path in stale:
            path.unlink(missing_ok=True)  # other processes do the same
        if stale:
            text = "finished frames of another model, input or setting removed"
            print_once(f"{self.folder}: {len(stale)} {text}")

    def _path(self, frame):
        return self.folder / f"{self.key}-{frame:08d}.safetensors"

    def __contains__(self, frame):
        """Whether a frame is there, and whole."""
        with suppress(UserError, KeyError):
            return self[frame].isfinite().all().item()
        return False

    def __getitem__(self, frame):
        return sdit.read_tensors(self._path(frame))[0]["latent"]

    def __setitem__(self, frame, latent):
        sdit.write_tensors(self._path(frame), dict(latent=latent), {})
        if self.show:
            self.show(frame, latent)

    def remove(self):
        for path in self.folder.glob(self.ours):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a user's files are in it
            self.folder.rmdir()


# --------------------------------------------------------------------------------------------------
# The whole job


@dataclass
class Models:
    """What a job needs, loaded once."""

    sdit: sdit.SDiT
    autoencoder: sdit.AutoencoderKL
    encoder: data.SceneEncoder
    landmarker: data.FaceLandmarker
    sha256: str
    device: torch.device
    engine: object = None  # of export.py, in place of the SDiT's layers

    @property
    def size(self):
        """Pixels a side of the result."""
        return self.autoencoder.config.factor * self.sdit.config.latent_size


def load_models(path=MODEL, device=None, engine=None):
    """The Models of a file by train.py; `engine`: a folder that export.py made of it. Where the
    device multiplies in bfloat16, the SDiT is in it, but for the mapping network: there landmarks
    would move by whole pixels."""
    device, model = data.get_device(device), sdit.load_model(path)
    mapping, config = model.mapping, model.config
    if engine:
        from export import load_engine

        engine = load_engine(engine, data.sha256(path), device)
        mapping.to(device)  # nothing else of the SDiT runs
    else:
        if sdit.has_bf16(device):
            model.mapping = None  # out of the way of `to`
            model.to(torch.bfloat16).mapping = mapping
        model.to(device)

    autoencoder = data.find_weights(config.autoencoder, config.autoencoder_sha256, path)
    clip = data.find_weights(config.clip, config.clip_sha256, path)
    return Models(
        model,
        sdit.load_autoencoder(autoencoder, device),
        data.SceneEncoder(clip, device),
        data.FaceLandmarker(),
        data.sha256(path),
        device,
        engine,
    )


def reenact(
    source=None, driving=DRIVING, out="reenacted.mp4", model=MODEL, show=None, again=True, **options
):
    """Write the video `out` of the face in `source`, moving like the one in `driving`; `model`: a
    file or Models; `options`: those of the command line, by name. Returns the seconds by part.
    Raises UserError on bad input, and writes nothing then. Threads may call it at once.

    `show`, if given, is called as the work goes on: show(part, done, total), and with every frame
    that is newly sampled, in any order: show("frame", its number, total, image (h, w, 3) uint8).
    What it raises ends the work. `again` False: a result that is there already, of the same inputs
    and settings, stays."""
    defaults, watch = vars(arguments([])), data.Stopwatch()
    assert set(options) <= set(defaults), f"unknown: {set(options) - set(defaults)}"
    asked = argparse.Namespace(**defaults | options)
    asked.source, asked.driving, asked.out, asked.model = source, driving, Path(out), model
    leader = data.ranks()[0] == 0

    with ExitStack() as stack, torch.no_grad():
        stack.callback(data.SHOW.reset, data.SHOW.set(show))
        with together():
            job = prepare(asked, watch)
            if leader:
                stack.enter_context(data.owned(out))

        with together(), watch("denoising"):
            latents = sample(job, again)

        with together():  # wait until the file is there: a later job may drive with it
            if leader and latents:
                write(job, latents, watch)
                print(watch)
    return dict(watch.seconds)


@dataclass
class Job:
    """What sampling and writing need."""

    paths: list  # the result, and the comparison if it is asked for
    models: Models
    settings: Settings
    driving: data.Video
    wanted: range  # frames of it
    square: tuple  # of the face in it
    picture: np.ndarray  # (size, size, 3) uint8 of the source, or None
    conditions: list  # (M, D) of every branch
    about: dict  # all that decides the result besides source and driving video

    def comment(self, key):
        """What the result's metadata say. It is the same for the same result."""
        about = self.about | dict(frames=f"{self.wanted[0]}:{self.wanted[-1] + 1}", key=key)
        return f"synthetic, AI-generated face video; {json.dumps(about)}"


def prepare(asked, watch):
    """Check what is asked for and read it (Algorithm 1, step 2)."""
    settings = Settings(asked.steps, asked.sampler, asked.guidance, asked.method, asked.seed)
    if not asked.source and not asked.prompt:
        asked.source = SOURCE
    if asked.retarget and not asked.source:
        raise UserError("--retarget needs the shape of a face; give a --source")
    paths = output_paths(asked.out, asked.compare)
    for path in paths:
        data.check_output(path, *filter(None, (asked.source, asked.driving)))

    with watch("models"):
        models = asked.model
        if not isinstance(models, Models):
            models = load_models(models, asked.device, asked.engine)
    if engine := models.engine:
        if settings.method != "anchored":
            raise UserError(f"the engine {engine.name} needs --method anchored")
        if engine.branches == 1 and settings.guidance != 1:
            cure = "--guidance 1, or export.py --branches 2"
            raise UserError(f"the engine {engine.name} has no guidance; it needs {cure}")

    with watch("landmarks"):
        driving = data.Video(asked.driving)
        wanted = parse_only(asked.only, len(driving)) if asked.only else range(len(driving))
        check_kind(paths, driving, wanted)
        picture, landmarks, square = read_faces(asked, models, driving)

    with watch("CLIP"):
        scene = make_scene(models, picture, asked.prompt, asked.edit)
        conditions = make_conditions(models, scene, landmarks, settings.guidance)

    about = dict(tool="anchored-diffusion", model=models.sha256[:16])
    about |= dataclasses.asdict(settings) | dict(engine=engine and engine.name)
    about |= {name: getattr(asked, name) for name in ("prompt", "edit", "retarget")}
    about = {k: v for k, v in about.items() if v is not None}
    return Job(paths, models, settings, driving, wanted, square, picture, conditions, about)


def output_paths(out, compare):
    """The files that a job writes."""
    ending = ".png" if out.suffix.lower() == ".png" else ".mp4"
    comparison = out.parent / f"{out.stem}-compare{ending}"
    return [out, comparison] if compare else [out]


def check_kind(paths, driving, wanted):
    """Refuse many frames for a picture; say before the work which sound is left out."""
    if paths[0].suffix.lower() != ".png":
        for path in paths if data.ranks()[0] == 0 else ():
            data.sound_way(driving, path.suffix.lower())
    elif len(wanted) > 1:
        raise UserError(f"{paths[0]} cannot hold {len(wanted)} frames; name it like out.mp4")


def read_faces(asked, models, driving):
    """(source's crop or None, landmarks (M, 478, 3), square of the driving face)."""
    number, source_number = (*asked.face, 0)[:2]
    picture, shape, faces = None, None, 0
    if asked.source:
        source = read_source(asked.source, models.landmarker, models.size, source_number)
        picture, shape, faces = source
    track = data.track(driving, models.landmarker, asked.driving, len(driving), number)

    choices = (asked.driving, track.faces, number), (asked.source, faces, source_number)
    for path, count, taken in choices:
        if count > 1:
            print_once(f"{path} shows {count} faces; --face {taken} is taken (0: the largest)")
    if missed := int((~track.found).sum()):
        where = f"{missed} of {len(driving)} frames of {asked.driving}"
        print_once(f"no face found in {where}; their landmarks are interpolated")

    landmarks = retargeted(track.landmarks, shape) if asked.retarget else track.landmarks
    return picture, landmarks, track.square


def sample(job, again=True):
    """The wanted frames, on disk (Algorithm 1, steps 1 and 3): a `LatentStore`, {frame: latent}.
    None where not `again` and the result is there."""
    models, conditions = job.models, job.conditions
    rank, processes, _ = data.ranks()
    if processes > 1:  # all take rank 0's conditions: their own may differ by rounding
        of_rank_0 = [[c.cpu() for c in conditions]]
        dist.broadcast_object_list(of_rank_0)
        conditions = [c.to(models.device) for c in of_rank_0[0]]

    key = hashlib.sha256(json.dumps(job.about).encode())
    for c in conditions:
        key.update(c.float().cpu().numpy().tobytes())
    key = key.hexdigest()[:16]
    if not again and all(read_comment(path) == job.comment(key) for path in job.paths):
        return print_once(f"{job.paths[0]} is there already")
    show = data.SHOW.get()

    def show_frame(frame, latent):
        [image] = decode_frames(models, {frame: latent}, [frame], data.Stopwatch())
        show("frame", frame, len(job.driving), image)

    finished = LatentStore(job.paths[0], key, show and show_frame)
    denoiser, share = models.engine or models.sdit, (rank, processes)
    return sample_video(denoiser, conditions, job.settings, job.wanted, finished, share)


def decode_frames(models, latents, frames, watch):
    """Yield the frames (h, w, 3) uint8 in order of time (Algorithm 1, step 4)."""
    for chunk in batches(frames, 8):
        with watch("decoding"):
            z = torch.stack([latents[f] for f in chunk]).to(models.device, torch.float32)
            images = data.to_images(models.autoencoder.decode(z))
        for image in images:
            yield data.resize(image, max(256, len(image)))  # H.264 blurs smaller ones


def write(job, latents, watch):
    """Write the result and the comparison, frame by frame."""
    driving, wanted, rate = job.driving, job.wanted, job.driving.fps
    span = float(wanted[0] / rate), float((wanted[-1] + 1) / rate)
    if len(wanted) == len(driving):  # a whole video keeps its sound to the end
        span = 0.0, math.inf
    comment = job.comment(latents.key)
    writers = [data.VideoWriter(path, rate, comment, driving, span) for path in job.paths]
    shown = (frame for i, frame in enumerate(driving) if i in wanted)

    with ExitStack() as stack:
        result, *comparisons = map(stack.enter_context, writers)
        images = decode_frames(job.models, latents, wanted, watch)
        for image in data.progress(images, "writing", "frame", len(wanted)):
            with watch("writing"):
                result.write(image)
                for comparison in comparisons:
                    panels = [job.picture, data.crop(next(shown), job.square), image]
                    panels = [data.resize(p, len(image)) for p in panels if p is not None]
                    comparison.write(np.concatenate(panels, 1))

    if len(wanted) == len(driving) or not latents.resumed:  # else they may be a longer video's
        latents.remove()
    for path in output_paths(job.paths[0], True):  # of runs that were killed
        sdit.hidden(path, f".tmp{path.suffix}").unlink(missing_ok=True)
    names = " and ".join(map(str, job.paths))
    print(f"{names}: {len(wanted)} frames, {len(image)} pixels high")


def read_source(path, landmarker, size, number):
    """(crop (size, size, 3) uint8, landmarks (478, 3), count of faces) of face `number` of a
    picture, or of a video's first frame with a face."""
    for frame in data.read_frames(path):
        if faces := list(landmarker.everyone(frame)):
            points = data.pick_face(faces, number, path)
            return data.crop(frame, data.face_square(points[None]), size), points, len(faces)
    raise data.no_face(path)


def parse_only(text, M):
    """ "a:b" -> range of frames; both ends may be missing."""
    wanted = ()
    with suppress(ValueError):
        first, end = (int(number) if number else None for number in text.split(":"))
        wanted = range(M)[first:end]
    if not wanted:
        there = f"the {M} frames of the driving video"
        raise UserError(f"--only {text} names none of {there}; write it as in 0:24")
    return wanted


def print_once(text, file=None):
    """Under torchrun, one process speaks."""
    if data.ranks()[0] == 0:
        print(text, file=file, flush=True)


@contextmanager
def together():
    """Under torchrun: what fails on one rank fails on all, so that they agree on what is next."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if dist.is_initialized():
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, error and data.describe(error))
        error = error or next((UserError(text) for text in texts if text), None)
    if error:
        raise error


# --------------------------------------------------------------------------------------------------
# Many jobs


def read_pairs(path):
    """The lines of a CSV file with the columns source, driving, out[, prompt], as dicts."""
    text, lines = data.read_text(path), []
    with suppress(csv.Error):
        lines = list(csv.DictReader(io.StringIO(text, newline="")))
    columns = set(lines[0]) if lines and "\0" not in text else set()
    if not {"driving", "out"} <= columns or not {"source", "prompt"} & columns:
        columns = "source,driving,out[,prompt]"
        raise UserError(f"{path}: a CSV file is needed, with the line {columns} and jobs below it")
    return lines


def read_comment(path):
    """What `data.VideoWriter` wrote into the metadata of a file; "" where it did not."""
    with suppress(UserError, OSError):
        if Path(path).suffix.lower() == ".png":
            with Image.open(path) as picture:
                return picture.info.get("Comment", "")
        with data.open_video(path) as container:
            notes = {name.lower(): text for name, text in container.metadata.items()}
            return notes.get("comment", "")
    return ""


def made_here(path):
    """Whether a file, if it is there, is a result of this script."""
    return not Path(path).exists() or "anchored-diffusion" in read_comment(path)


def find_conflicts(jobs, compare):
    """{number of a job: why it must not run}: it would write over what a job reads or an earlier
    one writes. A job may read what an earlier one made."""
    readers, writers, reasons = {}, {}, {}  # of each file: its first job
    for i, job in enumerate(jobs):
        for name in {"source", "driving"} & set(job):
            readers.setdefault(os.path.realpath(job[name]), i)

    for i, job in enumerate(jobs):
        for path in output_paths(job["out"], compare) if "out" in job else ():
            place = os.path.realpath(path)
            reader = readers.get(place, math.inf)
            if place in readers and not (reader > i and made_here(path)):
                reasons[i] = f"{path} would be written over, and line {reader + 2} reads it"
            elif place in writers:
                reasons[i] = f"line {writers[place] + 2} writes {path} too"
            writers.setdefault(place, i)
    return reasons


def reenact_pairs(path, models, options):
    """Run every line of a CSV file, paths relative to it, but for those whose result is there. A
    line that fails is reported, and the rest goes on, unless the disk is full; at the end
    UserError, with exit code 1 if some were written."""
    lines, names, written = read_pairs(path), ("source", "driving", "out"), 0
    jobs = [{k: Path(path).parent / line[k] for k in names if line.get(k)} for line in lines]
    conflicts = find_conflicts(jobs, options["compare"])
    for i, (job, line) in enumerate(zip(jobs, lines)):
        prompt = line.get("prompt") or options["prompt"]
        needed = names[1:] if prompt else names
        missing = [name for name in needed if name not in job]
        try:
            if missing or i in conflicts:
                raise UserError(conflicts.get(i) or f"{' and '.join(missing)} is missing")
            given = dict(source=None, model=models, prompt=prompt, again=False)
            reenact(**options | given | job)
            written += 1
        except Exception as e:  # whatever is wrong with a line, the rest goes on
            if getattr(e, "errno", 0) in data.MACHINE:  # a full disk
                raise
            print_once(f"{path}, line {i + 2}: {data.describe(e)}; skipped", sys.stderr)

    with together():  # or the first to end would end the others
        print_once(f"{written} of {len(lines)} are there")
    if written < len(lines):
        raise UserError(
            f"{len(lines) - written} lines of {path} could not be done, for the reasons above",
            code=1 if written else 2,
        )


# --------------------------------------------------------------------------------------------------


def arguments(given=None):
    ap, number = data.Parser(__doc__), data.number
    add, whole = ap.add_argument, number(int, 0)
    add("--source", type=Path, help="picture or video of a face (default: bundled, if no --prompt)")
    add("--driving", type=Path, default=DRIVING, help="video or picture that gives the motion")
    add("--out", type=Path, default=Path("reenacted.mp4"), help="video, or for one frame .png")
    add("--pairs", type=Path, help="many jobs: CSV file with columns source,driving,out[,prompt]")
    add("--model", type=Path, default=MODEL, help="model file made by train.py")
    add("--prompt", help="a sentence in place of the source, or, with one, mixed into it")
    add("--edit", metavar="A -> B[:W]", help='as in "blond hair -> red hair", with weight W')
    add("--retarget", action="store_true", help="move with half of the source's proportions")
    faces = dict(nargs="+", default=[0], metavar="N")
    add("--face", type=whole, **faces, help="by size from 0: of the driving video, of the source")
    steps = number(int, 1, NoiseSchedule.steps)
    add("--steps", type=steps, default=Settings.steps, help="denoising steps")
    samplers = "ddim, ddim:ETA, ddpm (DiT's, with --steps 250) or dpm++"
    add("--sampler", default=Settings.sampler, help=samplers)
    guidance = dict(type=number(float, -100, 100), default=Settings.guidance)
    add("--guidance", **guidance, help="weight of classifier-free guidance; 1: none, half the work")
    add("--method", choices=METHODS, default=Settings.method, help="others are to compare with")
    add("--seed", type=whole, default=Settings.seed, help="of the noise")
    add("--only", metavar="A:B", help="only these frames of the driving video, as in 0:24")
    add("--compare", action="store_true", help="also OUT-compare.mp4: source, driving, result")
    add("--engine", type=Path, help="folder that export.py made of the model: use its graphs")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    a = ap.parse_args(given)
    if a.pairs and a.source:
        raise UserError("--source does not go with --pairs; name the picture in every line")
    if len(a.face) > 2:
        raise UserError("--face takes one number, or two: of the driving video, of the source")
    return a


def main():
    a = arguments()
    _, processes, local = data.ranks()
    if processes > 1:  # a rank may wait long for the others
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        if torch.cuda.is_available() and not a.device:
            a.device = f"cuda:{local % torch.cuda.device_count()}"

    given = {a.source and a.source.resolve(), a.driving.resolve()}
    if a.model.resolve() == MODEL and (a.pairs or not given <= {None, SOURCE, DRIVING}):
        who = ", not the person in the picture" if a.source or a.pairs else ""
        print_once(
            "note: the bundled model knows rendered faces only: the result is a rendered face that "
            f"moves like the driving person{who}; for real faces train a model on real clips "
            "(README, Train) and give it with --model"
        )

    options = vars(a)
    if a.pairs:
        reenact_pairs(a.pairs, load_models(a.model, a.device, a.engine), options)
    else:
        reenact(**options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_main(main)
