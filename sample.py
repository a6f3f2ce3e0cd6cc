"""Reenactment: a picture of a face and a driving video in, a video of that face with those
movements out (paper 3.2, Alg. 1).

    # the bundled picture, clip and models: a quarter of a minute
    python sample.py
    python sample.py --source x.jpg --driving y.mp4 --compare
    # a sentence in place of the picture
    python sample.py --prompt "a man with red hair" --driving y.mp4
    torchrun --nproc_per_node=4 sample.py --source x.jpg --driving y.mp4 --model runs/XL-2-8/model.safetensors --out z.mp4

The driving video may have any length: its frames are dealt to rows of T that share one frame, the
anchor (`plan_rows`). `sample_plain` is the paper's rule as it stands, all rows in one batch;
`sample_first` and `sample_rest` compute the same in the memory of a few rows, and are what runs by
default. An interrupted command, given again, goes on from the rows in OUT.partial/."""

import csv
import dataclasses
import datetime
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
from torch.utils._pytree import tree_map
from tqdm import tqdm

import data
import sdit
from sdit import NoiseSchedule, UserError

DEMO = Path(__file__).resolve().parent / "demo"
# tokens that are denoised at once: bounds memory; the result is the same, to rounding
CHUNK_TOKENS = dict(cpu=2048, cuda=8192)

# --------------------------------------------------------------------------------------------------
# From a video to rows


def plan_rows(M, T, anchor=None):
    """Deal the M frames of a video to rows of T (Alg. 1, step 1; Eq. 1): (rows, keep), both (B, T).

    rows holds frame numbers. Slot T // 2 of every row is the anchor; earlier frames lie before it
    and later ones after it, in order of time and strided, so that rows look like training
    sequences. The anchor is the frame that needs the fewest rows, then the most central, or the
    frame given. (The paper says "the central frame"; where T is even that can cost more rows.) keep
    marks each frame's one place in the result; elsewhere are anchors of rows 1.. and repetitions
    that fill slots."""
    slot = T // 2  # of the anchor in every row

    def count(f):
        """Rows needed with the anchor at frame f."""
        sides = [(f, slot), (M - 1 - f, T - 1 - slot)]
        return max(
            1, *(math.ceil(n / slots) if slots else (math.inf if n else 0) for n, slots in sides)
        )

    f = (
        min(range(M), key=lambda f: (count(f), abs(f - (M - 1) / 2), f))
        if anchor is None
        else anchor
    )
    B = count(f)
    if B == math.inf:
        raise UserError(
            f"{M} frames cannot share frame {f} in rows of {T}; rows of two frames and more can (train.py --frames)"
        )
    rows, keep = np.full((B, T), f), np.zeros((B, T), bool)
    keep[0, slot] = True
    for side, first, end in ((range(f), 0, slot), (range(f + 1, M), slot + 1, T)):
        for b in range(B if side else 0):
            dealt = side[b::B]
            rows[b, first:end] = [*dealt, *[(dealt or side)[-1]] * (end - first - len(dealt))]
            keep[b, first : first + len(dealt)] = True
    return rows, keep


def plan_windows(M, T):
    """MultiDiffusion's rows: T consecutive frames, every T // 2 frames (paper silent on the
    overlap), the last one flush with the end, (windows, T); a video shorter than T repeats its last
    frame."""
    starts = [*range(0, max(M - T, 0), max(T // 2, 1)), max(M - T, 0)]
    return np.minimum(np.add.outer(starts, np.arange(T)), M - 1)


def frame_noise(seed, frames, shape, step=0):
    """Noise (*frames.shape, *shape) float64 for frames (an integer array): it belongs to the frame
    of the video, whatever row, batch or process it is in. `step` 0 is the start, others are for
    samplers that add noise on the way."""
    drawn = [
        np.random.default_rng([seed, f, step]).standard_normal(shape) for f in np.ravel(frames)
    ]
    return torch.from_numpy(np.stack(drawn)).view(*np.shape(frames), *shape)


# --------------------------------------------------------------------------------------------------
# Samplers. x (..., C, H, W); output (..., 2C, H, W) of the model; a, b: alpha_bar now and after
# this step (1: clean latents); z: fresh noise like x; `state`: what the sampler returned beside x
# one step before, None at first

METHODS = ("anchored", "multidiffusion", "independent")


@dataclass(frozen=True)
class Settings:
    """How a video is sampled: all that decides the result besides model and inputs. Raises
    UserError on what is not there. The paper is silent on steps, sampler and guidance; ours were
    chosen on the demo (README, Where the paper is silent)."""

    steps: int = 20
    sampler: str = "ddim:1"  # ddim, ddim:ETA, ddpm or dpm++
    guidance: float = 2.0  # 1: none
    method: str = "anchored"  # multidiffusion and independent are there to compare with
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.steps <= NoiseSchedule.steps:
            raise UserError(f"--steps {self.steps} is not between 1 and {NoiseSchedule.steps}")
        if self.method not in METHODS:
            raise UserError(f"no method {self.method!r}; choose {', '.join(METHODS)}")
        if not math.isfinite(self.guidance) or self.seed < 0:
            raise UserError("--guidance is a number, --seed one from 0 up")
        self.sampler_step()  # refuses what it does not know

    def sampler_step(self):
        """(function of one step of the sampler, whether it needs fresh noise)."""
        name, _, eta = self.sampler.partition(":")
        try:
            if name == "ddim" and 0 <= (eta := float(eta or 0)) <= 1:
                return (lambda *step: ddim(*step, eta)), eta > 0
        except ValueError:
            pass
        if self.sampler not in SAMPLERS:
            raise UserError(
                f"no sampler {self.sampler!r}; choose ddim, ddim:ETA with ETA in 0..1, {' or '.join(SAMPLERS)}"
            )
        return SAMPLERS[self.sampler]

    def timesteps(self):
        """[(t, after)]: timesteps from 999 down to 0, and for each the one after it; -1 stands for
        clean latents. Evenly spaced, but for DPM-Solver++ in the logarithm of signal to noise:
        there its steps are of one size, in t it overshoots at the end."""
        last, n = NoiseSchedule.steps - 1, np.arange(self.steps)
        t = np.linspace(last, 0, self.steps)[::-1]  # ascending; a single step starts at the last
        if self.sampler == "dpm++" and self.steps > 1:
            ratio = torch.logit(NoiseSchedule().alpha_bar).numpy()  # falls with t
            t = np.interp(
                np.linspace(ratio[0], ratio[-1], self.steps), ratio[::-1], np.arange(last, -1, -1)
            )
        # no timestep twice: each above the one before,
        t = np.maximum.accumulate(t.round().astype(int) - n) + n
        # and low enough to leave room for those after it
        t = np.minimum(t, last - n[::-1])[::-1].tolist()
        return list(zip(t, t[1:] + [-1]))


def predict_clean(x, noise, a):
    return (x - (1 - a) ** 0.5 * noise) / a**0.5


def ddim(x, output, a, b, z, state, eta):
    """DDIM, Eq. 12 and 16; eta = 0 adds no noise."""
    noise, _ = output.chunk(2, -3)
    sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    x = b**0.5 * predict_clean(x, noise, a) + (1 - b - sigma**2) ** 0.5 * noise
    return (x + sigma * z if sigma else x), None


def ddpm(x, output, a, b, z, state):
    """Ancestral sampling with the learned sigma, on the process that has only these timesteps
    (Improved DDPM, Eq. 15, 19)."""
    noise, v = output.chunk(2, -3)
    beta = 1 - a / b
    mean = (
        beta * b**0.5 / (1 - a) * predict_clean(x, noise, a)
        + (1 - b) * (a / b) ** 0.5 / (1 - a) * x
    )
    if b == 1:
        return mean, None
    low, high = math.log(beta * (1 - b) / (1 - a)), math.log(beta)
    return mean + torch.exp((low + (v + 1) / 2 * (high - low)) / 2) * z, None


def dpm_plus(x, output, a, b, z, state):
    """DPM-Solver++ (2M), Lu et al. 2022, Alg. 2: state is the clean latents and the step in log
    signal-to-noise before."""
    clean = predict_clean(x, output.chunk(2, -3)[0], a)
    if b == 1:
        return clean, None
    h = (math.log(b / (1 - b)) - math.log(a / (1 - a))) / 2
    target = clean if state is None else clean + (clean - state[0]) * h / (2 * state[1])
    return ((1 - b) / (1 - a)) ** 0.5 * x - b**0.5 * math.expm1(-h) * target, (clean, h)


SAMPLERS = {"ddpm": (ddpm, True), "dpm++": (dpm_plus, False)}


def denoise(settings, x, frames, evaluate, progress, anchor=None):
    """From noise x (..., C, H, W), one latent for each of `frames` (their numbers in the video,
    (...)), to clean latents. evaluate(i, x, t) is the model's output at step i and timestep t. With
    `anchor`, a slot, x is overridden at the start and after every step (Alg. 1, step 3): for
    `sample_plain`; with the bank there is nothing to override. (As noise belongs to the frame, rows
    agree on their anchor's latents by themselves, to rounding.)"""
    alpha_bar, state, (update, stochastic) = (
        NoiseSchedule().alpha_bar,
        None,
        settings.sampler_step(),
    )
    x = sdit.override(x, anchor)
    for i, (t, after) in enumerate(settings.timesteps()):
        a, b = alpha_bar[t].item(), alpha_bar[after].item() if after >= 0 else 1.0
        z = None
        if stochastic and after >= 0:
            z = frame_noise(settings.seed, frames, x.shape[-3:], i + 1)
            z = data.send(z.to(x.dtype), x.device)
        x, state = update(x, evaluate(i, x, t), a, b, z, state)
        x = sdit.override(x, anchor)
        progress()
    return x


# --------------------------------------------------------------------------------------------------
# Anchored diffusion. conditions: the conditioning of every branch (one, or with guidance also the
# unconditional one), (B, T, D) each for rows, (M, D) for a whole video


def guided(outputs, guidance):
    """Classifier-free guidance over the noise, all channels of it; the learned sigma is the
    conditional one's. `outputs` of the branches, (..., 2C, H, W) each. (DiT's own code guides 3 of
    4 channels, by an oversight.)"""
    if len(outputs) == 1:
        return outputs[0]
    (noise, v), (base, _) = (output.chunk(2, -3) for output in outputs)
    return torch.cat([base + guidance * (noise - base), v], -3)


def run_model(function, x, t, c, *rest):
    """`function`, of the model, whatever its precision, on latents x; its output is like x."""
    output = function(x, torch.full((len(x),), t, device=x.device), c, *rest)
    return (output[0].to(x.dtype), output[1]) if isinstance(output, tuple) else output.to(x.dtype)


class Captured:
    """An SDiT on a GPU whose `forward_first` and `forward_rest` are recorded as CUDA graphs, once
    for every shape of rows: an evaluation is then one launch in place of hundreds. The same kernels
    compute the same bits. One of these serves one thread; what it returns is the caller's."""

    recording = threading.Lock()  # CUDA records for one thread at a time

    def __init__(self, model):
        self.model, self.config, self.graphs = model, model.config, {}

    def forward_first(self, *given):
        return self._run(self.model.forward_first, given)

    def forward_rest(self, *given):
        return self._run(self.model.forward_rest, given)

    def _run(self, function, given):
        """Numbers among `given`, the anchor's slot, are recorded as they are."""
        key = function.__name__, *(x.shape if isinstance(x, torch.Tensor) else x for x in given)
        if key not in self.graphs:
            self.graphs[key] = self._record(function, given)
        graph, inputs, outputs = self.graphs[key]
        for kept, x in zip(inputs, given):
            if isinstance(x, torch.Tensor):
                kept.copy_(x)
        graph.replay()
        return tree_map(torch.clone, outputs)

    def _record(self, function, given):
        """(graph, the tensors that it reads, the tensors that it writes)."""
        inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        graph = torch.cuda.CUDAGraph()
        with self.recording, torch.cuda.device(given[0].device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # the libraries choose their kernels
                function(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(*inputs)
        return graph, inputs, outputs


@torch.no_grad()
def sample_plain(model, x, frames, conditions, settings, anchor, progress=lambda: None):
    """The paper's rule: all rows x (B, T, C, H, W) in one batch, the anchor overridden at the
    start, in every layer (`SDiT.forward`) and after every step (Alg. 1 overrides before the step:
    the same, since rows agree on their anchor's output and noise). Memory grows with the video; it
    is the definition, and what the tests compare with (the "oracle"). With anchor None nothing is
    shared: rows are independent (`--method independent`, and train.py's previews)."""

    def evaluate(i, x, t):
        return guided([run_model(model, x, t, c, anchor) for c in conditions], settings.guidance)

    return denoise(settings, x, frames, evaluate, progress, anchor)


@torch.no_grad()
def sample_first(model, x, frames, conditions, settings, anchor, progress=lambda: None):
    """Row 0 (B = 1) through all steps. Returns its latents and the anchor bank: for every step and
    branch the keys and values of its anchor, which is all that other rows need of it. `model`: the
    SDiT, whose bank has a tensor for every branch, or an engine of export.py, which has all
    branches inside, and one tensor."""
    bank = []

    def evaluate(i, x, t):
        if hasattr(model, "first"):  # an engine
            output, anchor_kv = model.first(x, t, conditions, anchor, settings.guidance)
        else:
            outputs, anchor_kv = zip(
                *(run_model(model.forward_first, x, t, c, anchor) for c in conditions)
            )
            output = guided(outputs, settings.guidance)
        bank.append(anchor_kv)
        return output

    return denoise(settings, x, frames, evaluate, progress), bank


@torch.no_grad()
def sample_rest(model, x, frames, conditions, settings, anchor, bank, progress=lambda: None):
    """Any rows but row 0, without their anchor slots, x (B, T - 1, C, H, W); in any batch and
    order, with the same result as `sample_plain`. The latents are one for both branches; each reads
    the keys and values that it computed itself for the anchor."""

    def evaluate(i, x, t):
        if hasattr(model, "rest"):
            return model.rest(x, t, conditions, anchor, settings.guidance, bank[i])
        return guided(
            [
                run_model(model.forward_rest, x, t, c, anchor, kv)
                for c, kv in zip(conditions, bank[i])
            ],
            settings.guidance,
        )

    return denoise(settings, x, frames, evaluate, progress)


@torch.no_grad()
def sample_multidiffusion(model, x, conditions, settings, chunk, progress=lambda: None):
    """MultiDiffusion (Bar-Tal et al. 2023), to compare with: x (M, C, H, W), the whole video; what
    the windows that hold a frame predict for it is averaged, every step. conditions (M, D)."""
    windows = plan_windows(len(x), model.config.frames)  # (windows, T)
    counts = np.bincount(windows.ravel(), minlength=len(x)).reshape(-1, 1, 1, 1)
    windows, counts = (data.send(torch.from_numpy(n), x.device) for n in (windows, counts))

    def evaluate(i, x, t):
        total = x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:])
        for part in windows.split(chunk):
            output = guided(
                [run_model(model, x[part], t, c[part]) for c in conditions], settings.guidance
            )
            total.index_add_(0, part.flatten(), output.flatten(0, 1))
        return total / counts

    return denoise(settings, x, range(len(x)), evaluate, progress)


def sample_video(model, conditions, settings, wanted=None, finished=None, share=(0, 1), plan=None):
    """Sample a video of M frames, conditions (M, D) each. Returns a function frame -> latent (C, H,
    W), on the CPU, for the frames `wanted` (default: all), which costs the rows that hold them.

    `finished`, a mapping from row to its kept latents (n, C, H, W), receives rows as they get done;
    what is there is not made again. `share` (rank, processes): only this part of the rows. `plan`
    (rows, keep): in place of `plan_rows`'."""
    M, T, method = len(conditions[0]), model.config.frames, settings.method
    # MultiDiffusion cannot be cut: one row of all frames
    rows, keep = plan or (
        plan_rows(M, T)
        if method != "multidiffusion"
        else (np.arange(M)[None], np.ones((1, M), bool))
    )
    finished, wanted = (
        {} if finished is None else finished,
        set(range(M) if wanted is None else wanted),
    )
    needed = [b for b in range(len(rows)) if wanted & set(rows[b][keep[b]].tolist())]
    if share[0] == 0 and len(wanted) < M:
        first = ", and row 0, which holds the anchor" if needed[0] and method == "anchored" else ""
        print(f"{len(wanted)} of {M} frames: {len(needed)} of {len(rows)} rows{first}")
    mine = [b for b in needed[share[0] :: share[1]] if b not in finished]
    with tqdm(
        total=settings.steps * len(mine),
        desc="denoising",
        unit="row-step",
        leave=False,
        disable=True if share[0] else None,
    ) as bar:
        for chunk, slots, x in (
            sample_some(model, rows, mine, conditions, settings, bar) if mine else ()
        ):
            if not x.isfinite().all():
                raise UserError(
                    "the model's numbers are no longer finite: its weights are damaged, or --guidance is too large"
                )
            for b, latents in zip(chunk, x.cpu()):
                finished[b] = latents[np.flatnonzero(keep[b][slots])]
    place = {int(f): (b, i) for b in needed for i, f in enumerate(rows[b][keep[b]])}
    return lambda frame: finished[place[frame][0]][place[frame][1]]


def sample_some(model, rows, numbers, conditions, settings, bar):
    """Sample the rows `numbers` of a video, a few at a time: yields (their numbers, slots, latents
    (B, slots, C, H, W))."""
    config, device = model.config, conditions[0].device
    shape, anchor = (
        (config.latent_channels, config.latent_size, config.latent_size),
        config.frames // 2,
    )
    size = min(
        getattr(model, "most_rows", math.inf),
        max(1, CHUNK_TOKENS.get(device.type, 2048) // (config.tokens * config.frames)),
    )
    every = np.arange(rows.shape[1])  # slots
    others = np.delete(every, anchor)

    def inputs(chunk, slots):
        """(noise, frames, conditions); latents are at least in float32 on the way, whatever the
        model's precision."""
        frames = rows[chunk][:, slots]
        dtype = torch.promote_types(conditions[0].dtype, torch.float32)
        x = data.send(frame_noise(settings.seed, frames, shape).to(dtype), device)
        places = data.send(torch.from_numpy(frames), device)
        return x, frames, [condition[places] for condition in conditions]

    def chunks(numbers):
        for i in range(0, len(numbers), size):
            chunk = numbers[i : i + size]
            yield chunk, lambda: bar.update(len(chunk))

    if settings.method == "multidiffusion":  # in one process only
        yield (
            [0],
            every,
            sample_multidiffusion(
                model, inputs([0], every)[0][0], conditions, settings, size, bar.update
            )[None],
        )
    elif settings.method == "independent":
        for chunk, progress in chunks(numbers):
            yield chunk, every, sample_plain(model, *inputs(chunk, every), settings, None, progress)
    else:
        if device.type == "cuda" and isinstance(model, sdit.SDiT):
            model = Captured(model)
        # the bank is not kept on disk: every process, and a continued run, samples row 0 for itself
        bar.total += settings.steps * (0 not in numbers)
        x, bank = sample_first(model, *inputs([0], every), settings, anchor, bar.update)
        yield [0], every, x
        for chunk, progress in chunks([b for b in numbers if b]):
            yield (
                chunk,
                others,
                sample_rest(model, *inputs(chunk, others), settings, anchor, bank, progress),
            )


class Partial:
    """Finished rows on disk, OUT.partial/KEY-ROW.safetensors: a mapping from row to latents, for
    `sample_video`. KEY stands for all that decides the result; rows of another key are removed.
    Other files in the folder are not ours."""

    def __init__(self, out, key):
        self.folder, self.key = Path(f"{Path(out)}.partial"), key
        if len(os.fsencode(self.folder.name)) > 255:
            self.folder = sdit.hidden(out, ".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        others = [p for p in self.folder.glob("*-??????.safetensors") if not p.name.startswith(key)]
        for other in others:
            other.unlink(missing_ok=True)  # other processes do the same
        if others:
            print(
                f"{self.folder}: {len(others)} finished rows of another model, input or setting removed"
            )

    def _path(self, row):
        return self.folder / f"{self.key}-{row:06d}.safetensors"

    def __contains__(self, row):
        """Whether a row is there, and whole."""
        with suppress(UserError, KeyError):
            return self._path(row).exists() and self[row].isfinite().all().item()
        return False

    def __getitem__(self, row):
        return sdit.read_tensors(self._path(row))[0]["latents"]

    def __setitem__(self, row, latents):
        sdit.write_tensors(self._path(row), dict(latents=latents), {})

    def remove(self):
        for path in (
            *self.folder.glob("*-??????.safetensors"),
            *self.folder.glob(".*-??????.safetensors.tmp.safetensors"),
        ):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a user's files are in it
            self.folder.rmdir()


# --------------------------------------------------------------------------------------------------
# What a video is conditioned on


def edit_scene(encoder, scene, edit):
    """The scene (1, S) moved by `edit`, "BEFORE -> AFTER" or "BEFORE -> AFTER:WEIGHT", along the
    direction between the two texts (paper 4.4 combines vectors of pictures and texts and leaves
    open how; this is StyleGAN-NADA's)."""
    before, arrow, after = edit.partition("->")
    after, colon, weight = after.rpartition(":") if ":" in after else (after, "", "1")
    try:
        weight = float(weight)
    except ValueError:
        weight = math.nan
    if not arrow or not before.strip() or not after.strip() or not math.isfinite(weight):
        raise UserError(
            f'--edit "{edit}" is not of the form "blond hair -> red hair" or "blond hair -> red hair:0.5"'
        )
    old, new = encoder.texts([before.strip(), after.strip()])
    return F.normalize(scene + weight * (new - old), dim=-1)


def make_scene(models, face, prompt, edit):
    """The scene (1, S) of a face crop (h, w, 3) uint8, a sentence, or both (the mean direction),
    edited.

    A sentence's vector stands in as it is (paper 4.4), though pictures and texts lie apart in CLIP.
    """
    parts = [models.encoder.images(data.to_tensor(face[None]))] if face is not None else []
    parts += [models.encoder.texts([prompt])] if prompt else []
    scene = F.normalize(sum(parts), dim=-1)
    return edit_scene(models.encoder, scene, edit) if edit else scene


# Points that expressions hardly move: upper outline of the face, bridge of the nose, corners of the
# eyes
RIGID = [
    10,
    338,
    297,
    332,
    284,
    251,
    389,
    356,
    454,
    127,
    162,
    21,
    54,
    103,
    67,
    109,
    234,
    168,
    6,
    197,
    195,
    33,
    133,
    362,
    263,
]


def head_pose(points, onto):
    """(scale, rotation (3, 3)) that best take the rigid points of one face (478, 3) to another's
    (Umeyama 1991, without the shift)."""
    a, b = (p[RIGID] - p[RIGID].mean(0) for p in (points, onto))
    u, s, vt = np.linalg.svd(b.T @ a)
    flip = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    return (s * flip).sum() / (a**2).sum(), (u * flip) @ vt


def neutral_frame(landmarks):
    """Number of the frame of landmarks (M, 478, 3) with the smallest mouth opening and rotation of
    the head."""
    # from eye to eye, from brow to chin
    across, down = landmarks[:, 263] - landmarks[:, 33], landmarks[:, 152] - landmarks[:, 10]
    turned = abs(np.arctan2(across[:, [2, 1]], across[:, :1])).sum(1) + abs(
        np.arctan2(down[:, 2], down[:, 1])
    )
    gap = np.linalg.norm(landmarks[:, 13] - landmarks[:, 14], axis=1) / np.linalg.norm(
        across, axis=1
    )
    return int((turned + gap).argmin())


# The outline of the face
OVAL = [
    10,
    338,
    297,
    332,
    284,
    251,
    389,
    356,
    454,
    323,
    361,
    288,
    397,
    365,
    379,
    378,
    400,
    377,
    152,
    148,
    176,
    149,
    150,
    136,
    172,
    58,
    132,
    93,
    234,
    127,
    162,
    21,
    54,
    103,
    67,
    109,
]


def retargeted(driving, source):
    """Landmarks (M, 478, 3) with the source's proportions and the driver's motion (paper silent;
    raw landmarks carry the driver's shape over). driving (M, 478, 3); source (478, 3), any unit.

    The neutral driving frame is compared with the source, laid onto it by its rigid points: how
    much wider and higher is the outline, along the head's own axes? Half of that is applied to
    every frame. The whole of it, or the difference point by point, was further from the truth on
    the demo world."""
    neutral = driving[neutral_frame(driving)]
    scale, rotation = head_pose(source, neutral)
    # between the eyes, from chin to brow
    right, up = neutral[263] - neutral[33], neutral[10] - neutral[152]
    right = right / np.linalg.norm(right)
    up = up - up @ right * right
    up = up / np.linalg.norm(up)
    axes = np.stack([right, up, np.cross(right, up)], 1)  # (3, 3), of the head, in columns
    ours, theirs = ((p - p[RIGID].mean(0)) @ axes for p in (neutral, scale * source @ rotation.T))
    # of width, height, depth; depth is hardly seen
    stretch = (ours[OVAL] * theirs[OVAL]).sum(0) / (ours[OVAL] ** 2).sum(0)
    difference = ours * ((stretch - 1) / 2 * (1, 1, 0)) @ axes.T  # (478, 3)
    poses = (head_pose(neutral, frame) for frame in driving)
    return np.stack(
        [frame + size * difference @ turn.T for frame, (size, turn) in zip(driving, poses)]
    ).astype(np.float32)


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


def load_models(path=DEMO / "sdit.safetensors", device=None, engine=None):
    """Models for `reenact`, from the model file of train.py and the weights it names; `engine`, a
    folder that export.py made of it. The sDiT is in bfloat16 on a GPU, but for the mapping network:
    landmarks rounded to it would move in steps of a pixel. (An engine has a precision of its own.)
    """
    device = data.get_device(device)
    model = sdit.load_model(path)
    config = model.config
    if engine:
        from export import load_engine

        engine = load_engine(engine, data.sha256(path), device)
        model.mapping.to(device)  # nothing else of it runs
    else:
        if device.type == "cuda" and sdit.has_bf16("cuda"):
            mapping, model.mapping = model.mapping, None  # out of the way of `to`, then back
            model.to(torch.bfloat16).mapping = mapping
        model.to(device)
    return Models(
        model,
        sdit.load_autoencoder(
            data.find_weights(config.autoencoder, config.autoencoder_sha256, path), device
        ),
        data.SceneEncoder(data.find_weights(config.clip, config.clip_sha256, path), device),
        data.FaceLandmarker(),
        data.sha256(path),
        device,
        engine,
    )


def read_source(path, landmarker, size, number):
    """(face crop (size, size, 3) uint8, landmarks (478, 3), how many faces there are) of face
    `number` of a picture, or of a video's first frame with a face."""
    for frame in data.read_frames(path):
        if faces := list(landmarker.everyone(frame)):
            points = data.pick_face(faces, number, path)
            return data.crop(frame, data.face_square(points[None]), size), points, len(faces)
    raise data.no_face(path)


def parse_only(text, M):
    """ "a:b" -> range of frames; both ends may be missing."""
    try:
        a, b = (int(part) if part else None for part in text.split(":"))
        wanted = range(M)[a:b]
    except ValueError:
        wanted = ()
    if not wanted:
        raise UserError(
            f"--only {text} names none of the {M} frames of the driving video; write it as in 0:24"
        )
    return wanted


def write_frames(paths, latent, wanted, autoencoder, driving, square, source, comment, watch):
    """Decode, put in order and write: the result to paths[0], the comparison to a second path.
    latent(frame) gives a latent; frames go out as they are decoded, eight at a time."""
    span = [float(f / driving.fps) for f in (wanted[0], wanted[-1] + 1)]
    # a whole video keeps its sound to the end
    span = span if len(wanted) < len(driving) else (0.0, math.inf)
    device = next(autoencoder.parameters()).device
    shown = (frame for i, frame in enumerate(driving) if i in wanted)
    with (
        ExitStack() as stack,
        tqdm(total=len(wanted), desc="writing", unit="frame", leave=False, disable=None) as bar,
    ):
        files = [
            stack.enter_context(data.VideoWriter(p, driving.fps, comment, driving, span))
            for p in paths
        ]
        for i in range(0, len(wanted), 8):
            with watch("decoding"), torch.no_grad():
                images = data.to_images(
                    autoencoder.decode(
                        torch.stack([latent(f) for f in wanted[i : i + 8]]).to(
                            device, torch.float32
                        )
                    )
                )
            with watch("writing"):
                for image in images:
                    image = data.resize(image, max(256, len(image)))  # H.264 blurs smaller ones
                    files[0].write(image)
                    for comparison in files[1:]:
                        panels = [
                            *([] if source is None else [source]),
                            data.crop(next(shown), square),
                            image,
                        ]
                        comparison.write(
                            np.concatenate([data.resize(panel, len(image)) for panel in panels], 1)
                        )
                    bar.update()


@contextmanager
def together():
    """Under torchrun: what fails on one rank fails on all, when all have come here. So they agree
    on what comes next."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if dist.is_initialized():
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(
            texts,
            error
            and (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            ),
        )
        error = error or next((UserError(text) for text in texts if text), None)
    if error:
        raise error


def reenact(
    source=None,
    driving=DEMO / "driving.mp4",
    out="reenacted.mp4",
    model=DEMO / "sdit.safetensors",
    steps=Settings.steps,
    seed=0,
    only=None,
    compare=False,
    method="anchored",
    sampler=Settings.sampler,
    guidance=Settings.guidance,
    prompt=None,
    edit=None,
    retarget=False,
    face=(0,),
    device=None,
    engine=None,
):
    """Write the video `out` of the face in `source` (picture or video), of a sentence `prompt`, or
    of both, moving like the one in `driving` (video). Returns the seconds by part.

    model: a file, or what `load_models` made of it. only: frames "a:b". compare: also write
    OUT-compare.mp4. face: which face of driving and source, by size. The rest is as on the command
    line. Threads may call it at once, with one `model` and an `out` each. Raises UserError on bad
    input; then nothing is written."""
    watch, paths = data.Stopwatch(), outputs(out, compare)
    still = Path(out).suffix.lower() == ".png"
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    driving_face, source_face = (*face, 0)[:2]
    with ExitStack() as stack, torch.no_grad():
        with together():
            settings, source = (
                Settings(steps, sampler, guidance, method, seed),
                source if source or prompt else DEMO / "source.png",
            )
            if retarget and not source:
                raise UserError("--retarget needs the shape of a face; give a --source")
            for path in paths:
                data.check_output(path, *filter(None, (source, driving)))
            with watch("models"):
                models = model if isinstance(model, Models) else load_models(model, device, engine)
            if models.engine and method != "anchored":
                raise UserError(f"an --engine samples by --method anchored, not {method}")
            if models.engine and models.engine.branches == 1 and guidance != 1:
                raise UserError(
                    f"{models.engine.name} was exported without guidance; give --guidance 1, or export it with --branches 2"
                )

            with watch("landmarks"):
                video = data.Video(driving)
                wanted = parse_only(only, len(video)) if only else range(len(video))
                if still and len(wanted) > 1:
                    raise UserError(f"{out} cannot hold {len(wanted)} frames; name it like out.mp4")
                for path in paths if rank == 0 and not still else ():
                    data.sound_way(video, path.suffix.lower())  # says now what cannot be taken over
                picture, shape, people = (
                    read_source(source, models.landmarker, models.size, source_face)
                    if source
                    else (None, None, 0)
                )
                tracked = data.track(video, models.landmarker, driving, len(video), driving_face)
                landmarks = retargeted(tracked.landmarks, shape) if retarget else tracked.landmarks
            with watch("CLIP"):
                scene = make_scene(models, picture, prompt, edit)
                conditions = make_conditions(models, scene, landmarks, settings.guidance)
            if rank == 0:
                stack.enter_context(data.owned(out))

        for path, count, number in (
            (driving, tracked.faces, driving_face),
            (source, people, source_face),
        ):
            if count > 1 and rank == 0:
                print(f"{path} shows {count} faces; number {number} by size is taken (--face)")
        missed = int((~tracked.found).sum())
        if missed and rank == 0:
            print(
                f"no face found in {missed} of {len(video)} frames of {driving}; their landmarks are interpolated"
            )
        if world > 1:  # those of rank 0, should ranks differ by a bit
            shared = [[c.cpu() for c in conditions]]
            dist.broadcast_object_list(shared)
            conditions = [c.to(models.device) for c in shared[0]]

        with together(), watch("denoising"):
            settings_used = dict(
                dataclasses.asdict(settings), engine=models.engine and models.engine.name
            )
            asked = json.dumps(dict(settings_used, model=models.sha256), sort_keys=True)
            key = hashlib.sha256(
                asked.encode() + b"".join(c.float().cpu().numpy().tobytes() for c in conditions)
            ).hexdigest()[:16]
            finished = Partial(out, key)
            latent = sample_video(
                models.engine or models.sdit, conditions, settings, wanted, finished, (rank, world)
            )

        with together():  # the next line may drive with this result
            if rank == 0:
                about = dict(
                    tool="anchored-diffusion",
                    model=models.sha256[:16],
                    **settings_used,
                    prompt=prompt,
                    edit=edit,
                    retarget=retarget,
                )
                comment = "synthetic, AI-generated face video; " + json.dumps(
                    {k: v for k, v in about.items() if v is not None}
                )
                write_frames(
                    paths,
                    latent,
                    wanted,
                    models.autoencoder,
                    video,
                    tracked.square,
                    picture,
                    comment,
                    watch,
                )
                finished.remove()
                for path in outputs(out, True):  # of killed runs
                    sdit.hidden(path, f".tmp{path.suffix}").unlink(missing_ok=True)
                side = max(256, models.size)
                print(
                    f"{' and '.join(map(str, paths))}: {len(wanted)} frames of {side} x {side}\n{watch}"
                )
    return dict(watch.seconds)


def outputs(out, compare):
    """The files that a job writes."""
    if not Path(out).name:
        raise UserError(f"--out {out} names no file; name one like out.mp4")
    ending = ".png" if Path(out).suffix.lower() == ".png" else ".mp4"
    return [Path(out), Path(out).with_name(f"{Path(out).stem}-compare{ending}")][: 1 + compare]


def make_conditions(models, scene, landmarks, guidance):
    """Conditioning (M, D) of every branch, in the model's precision, of a scene (1, S) and
    landmarks (M, 478, 3)."""
    mapping, dtype = models.sdit.mapping, models.sdit.final_layer.linear.weight.dtype
    landmarks, scene = (
        x.to(models.device, mapping.null_scene.dtype)
        for x in (torch.from_numpy(landmarks)[None], scene)
    )
    conditions = [mapping(scene, landmarks)[0].to(dtype)]
    return (
        conditions
        if guidance == 1
        else conditions + [mapping()[0].to(dtype).expand(len(conditions[0]), -1)]
    )


def read_pairs(path):
    """The lines of a CSV file with the columns source, driving, out and, if you like, prompt, as
    dicts."""
    try:
        text = data.read_text(path)
        lines = list(csv.DictReader(io.StringIO(text, newline="")))
        if "\0" in text:
            raise csv.Error("it is not a text file")
    except (OSError, csv.Error) as e:
        raise UserError(
            f"cannot read the table {path} ({e}); it is a CSV file with the columns source,driving,out[,prompt]"
        ) from None
    if (
        not lines
        or not {"driving", "out"} <= set(lines[0])
        or not {"source", "prompt"} & set(lines[0])
    ):
        raise UserError(f"{path} has no lines under the columns source,driving,out[,prompt]")
    return lines


def made_here(path):
    """Whether a video, if it is there, is a result of this script."""
    if not Path(path).exists():
        return True
    with suppress(UserError), data.open_video(path) as container:
        return "anchored-diffusion" in container.metadata.get("comment", "")
    return False


def destroyed(jobs, compare):
    """{number of a job: why it must not run}: it would write over a file that a job reads, or that
    an earlier one writes. A job may read what an earlier one made."""
    place = os.path.realpath
    reads = [
        (i, place(job[k])) for i, job in enumerate(jobs) for k in ("source", "driving") if k in job
    ]
    reasons, written = {}, {}
    for i, job in enumerate(jobs):
        for path in outputs(job["out"], compare) if "out" in job else ():
            readers = [r for r, read in reads if read == place(path)]
            if readers and not (min(readers) > i and made_here(path)):
                reasons[i] = f"{path} would be written over, and line {min(readers) + 2} reads it"
            elif place(path) in written:
                reasons[i] = f"line {written[place(path)] + 2} writes {path} too"
            written.setdefault(place(path), i)
    return reasons


def reenact_pairs(path, models, **options):
    """Run every line of a CSV file (see `read_pairs`), paths relative to it. A line that fails is
    reported, and the rest goes on; at the end UserError, with exit code 1 if some were written."""
    lines, written = read_pairs(path), 0
    jobs = [
        {k: Path(path).parent / line[k] for k in ("source", "driving", "out") if line.get(k)}
        for line in lines
    ]
    reasons = destroyed(jobs, options.get("compare", False))
    for i, (job, line) in enumerate(zip(jobs, lines)):
        prompt = line.get("prompt") or options.get("prompt")
        try:
            if not {"driving", "out"} <= set(job):
                raise UserError("driving or out is missing")
            if "source" not in job and not prompt:
                raise UserError("source is missing, and so is a prompt")
            if i in reasons:
                raise UserError(reasons[i])
            reenact(model=models, **options | job | dict(prompt=prompt))
            written += 1
        except Exception as e:  # whatever is wrong with a line, the rest goes on
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(
                    f"{path}, line {i + 2}: {e if isinstance(e, UserError) else f'{type(e).__name__}: {e}'}; skipped",
                    file=sys.stderr,
                )
    with together():
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{written} of {len(lines)} written")
    if written < len(lines):
        raise UserError(
            f"{len(lines) - written} lines of {path} could not be done, for the reasons above",
            code=1 if written else 2,
        )


def arguments():
    number, whole = data.number, data.number(int, 0)
    ap = data.Parser(__doc__)
    ap.add_argument(
        "--source",
        type=Path,
        help="picture of a face, or a video (its first frame with a face); default: the bundled one",
    )
    ap.add_argument(
        "--driving",
        type=Path,
        default=DEMO / "driving.mp4",
        help="video (or picture) whose movements are taken",
    )
    ap.add_argument(
        "--out", type=Path, default=Path("reenacted.mp4"), help="video, or for one frame .png"
    )
    ap.add_argument(
        "--pairs",
        type=Path,
        help="CSV file with the columns source,driving,out[,prompt]: many jobs, models loaded once",
    )
    ap.add_argument(
        "--model", type=Path, default=DEMO / "sdit.safetensors", help="model file made by train.py"
    )
    ap.add_argument(
        "--prompt", help="a sentence in place of the source, or, with one, mixed into it"
    )
    ap.add_argument(
        "--edit",
        metavar="A -> B[:W]",
        help='change the source, as in "blond hair -> red hair", with weight W',
    )
    ap.add_argument(
        "--retarget",
        action="store_true",
        help="take half of the source's proportions of face, width and height, into the movements",
    )
    ap.add_argument(
        "--face",
        type=whole,
        nargs="+",
        default=[0],
        metavar="N",
        help="which face of the driving video and of the source, by size from 0",
    )
    ap.add_argument(
        "--steps",
        type=number(int, 1, NoiseSchedule.steps),
        default=Settings.steps,
        help="denoising steps",
    )
    ap.add_argument(
        "--sampler",
        default=Settings.sampler,
        help="ddim, ddim:ETA, ddpm (with --steps 250: DiT's setting) or dpm++",
    )
    ap.add_argument(
        "--guidance",
        type=number(float, -100, 100),
        default=Settings.guidance,
        help="weight of classifier-free guidance; 1: none, half the work",
    )
    ap.add_argument(
        "--method", choices=METHODS, default="anchored", help="the others are to compare with"
    )
    ap.add_argument("--seed", type=whole, default=0, help="of the noise")
    ap.add_argument(
        "--only", metavar="A:B", help="make only these frames of the driving video, as in 0:24"
    )
    ap.add_argument(
        "--compare",
        action="store_true",
        help="also write OUT-compare.mp4: source, driving, result side by side",
    )
    ap.add_argument(
        "--engine",
        type=Path,
        help="folder made by export.py from the same model: sample with its graphs",
    )
    ap.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    return ap.parse_args()


def main():
    a = arguments()
    # under torchrun rank 0's conditions are everyone's, and one waits for all
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        if torch.cuda.is_available() and not a.device:
            a.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    bundled = {None, DEMO / "source.png", DEMO / "driving.mp4"}
    given = {a.source and a.source.resolve(), a.driving.resolve()}
    foreign = a.pairs or not given <= bundled
    if (
        os.environ.get("RANK", "0") == "0"
        and a.model.resolve() == DEMO / "sdit.safetensors"
        and foreign
    ):
        print(
            "note: the bundled model knows rendered faces only: the result is a rendered face that "
            "moves like the driving person, not the person in the picture; for real faces train a "
            "model on real clips (README, Train) and give it with --model",
            flush=True,
        )

    own = ("pairs", "source", "driving", "out", "model", "device", "engine")
    options = {k: v for k, v in vars(a).items() if k not in own}
    if a.pairs:
        reenact_pairs(a.pairs, load_models(a.model, a.device, a.engine), **options)
    else:
        reenact(a.source, a.driving, a.out, a.model, device=a.device, engine=a.engine, **options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_main(main)
