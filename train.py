"""Train the sDiT and its mapping network on a cache (paper 3.1, 4.1, D). Autoencoder, CLIP and
landmarks are frozen: the cache holds what they made.

    # a laptop, at 64 pixels
    python train.py --size demo --frames 4 --data cache --steps 16000 --batch 4 --lr 8e-4
    torchrun --nproc_per_node=4 train.py    # the paper's XL/2, T = 8, batch 16, from ./cache

The same command again goes on from the newest state in --out, on any number of processes. SIGTERM
saves and leaves."""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import sample
import sdit
from sdit import NoiseSchedule, UserError

# --------------------------------------------------------------------------------------------------
# The loss


def expressive_weight(mask, lambda_ex):
    """Weight of every latent, (B, T, 1, H, W), from the share of its pixels on lips and eyes, mask
    (B, T, H, W) in 0..1.

    Paper 4.1: "expressive landmark pixels are assigned a weight of (1 + lambda_ex) ... other pixels
    receive a weight of 1"."""
    return 1 + lambda_ex * mask[:, :, None]


def variational_bound(schedule, x0, xt, predicted, v, t):
    """The learned sigma's term of the variational bound, in bits a dimension, (B,) (Improved DDPM,
    Sec. 3.1; DiT's routine).

    KL of the true posterior from the model's; at t = 0, where there is no posterior, the likelihood
    of x0 in bins of 2 / 255. That width belongs to 8-bit pixels and means little for latents; kept
    as DiT has it. `predicted`, the noise, comes detached: this term teaches the network its
    variance, never its mean."""
    log_variance = schedule.log_variance(v, t)
    clean = schedule.predict_x0(xt, predicted, t)
    mean = schedule.at(schedule.mean_x0, t, xt) * clean + schedule.at(schedule.mean_xt, t, xt) * xt
    true_mean = (
        schedule.at(schedule.mean_x0, t, xt) * x0 + schedule.at(schedule.mean_xt, t, xt) * xt
    )
    true_log = schedule.at(schedule.posterior_variance.log(), t, xt)
    kl = (
        log_variance
        - true_log
        + torch.exp(true_log - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        - 1
    ) / 2
    upper, lower = (
        torch.special.ndtr((x0 + edge - mean) * torch.exp(-log_variance / 2))
        for edge in (1 / 255, -1 / 255)
    )
    upper, lower = torch.where(x0 > 0.999, 1.0, upper), torch.where(x0 < -0.999, 0.0, lower)
    decoder = -(upper - lower).clamp_min(1e-12).log()
    first = (t == 0).view(-1, *[1] * (x0.dim() - 1))
    return torch.where(first, decoder, kl).flatten(1).mean(1) / math.log(2)


def diffusion_loss(model, schedule, batch, t, noise, drop, lambda_ex=1.0):
    """Loss of every row: (weighted mean squared error (B,), bound (B,)); their sum is what is
    trained.

    batch: see `data.Rows`; t (B,) timesteps, one a row (paper silent: all frames of a row share
    it); noise like the latents; drop (B,) bool, rows that lose scene and landmarks. The weights are
    not normalised (paper silent: plain mean)."""
    x0 = batch["latents"]
    xt = schedule.add_noise(x0, noise, t)
    output = model(xt, t, model.mapping(batch["scene"], batch["landmarks"], drop)).float()
    predicted, v = output.chunk(2, dim=2)  # (B, T, C, H, W) each

    weight = expressive_weight(batch["mask"], lambda_ex)  # (B, T, 1, H, W)
    error = (weight * (predicted - noise) ** 2).flatten(1).mean(1)  # (B,)
    if model.config.prediction == "v":
        # epsilon's error is sqrt(alpha_bar) times v's: this is the squared error of v
        error = error / schedule.at(schedule.alpha_bar, t, error)

    return error, variational_bound(schedule, x0, xt, predicted.detach(), v, t)


class Objective(nn.Module):
    """`diffusion_loss` as a module: gradients of several processes are averaged around one forward
    call."""

    def __init__(self, model, schedule, lambda_ex):
        super().__init__()
        self.model, self.schedule, self.lambda_ex = model, schedule, lambda_ex

    def forward(self, batch, t, noise, drop):
        return diffusion_loss(self.model, self.schedule, batch, t, noise, drop, self.lambda_ex)


def draw(seed, step, shape, p_drop):
    """(timesteps (B,), noise of `shape` (B, ...), drop (B,)), a function of (seed, step) alone.

    t is uniform over 0..999, and conditions are dropped with probability `p_drop` (DiT's 0.1; paper
    silent)."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + step)
    t = torch.randint(NoiseSchedule.steps, shape[:1], generator=g)
    return t, torch.randn(shape, generator=g), torch.rand(shape[0], generator=g) < p_drop


# --------------------------------------------------------------------------------------------------
# States on disk

# What a run is, with the model's configuration; a state of another recipe, or of a cache with
# another mean scene, is refused. The other arguments, the number of processes and the machine may
# change between sessions (name --precision where its default would change with it).
RECIPE = "steps batch lr mapping_lr warmup weight_decay lambda_ex drop ema precision seed".split()


class Saver:
    """Writes the states of a run in a thread: RUN/model.safetensors, the EMA weights, and
    RUN/state-STEP.pt, the last two of which are kept. A step waits only for the copy to host
    memory; a second save waits for the first. Used as a context, it ends when all is written."""

    def __init__(self, out):
        self.out, self.thread, self.error, self.host = out, None, None, []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.busy:
            self.thread.join()
        if kind is None:
            self.check()

    @property
    def busy(self):
        return self.thread is not None and self.thread.is_alive()

    def check(self):
        """Raise what went wrong in the thread."""
        if self.error:
            raise self.error

    @torch.no_grad()
    def save(self, step, model, ema, optimizer, recipe):
        if self.busy:
            self.thread.join()
        self.check()

        largest = torch.stack(torch._foreach_norm(list(model.parameters()), math.inf)).max()
        if not largest < 1e10:  # nor nan
            raise UserError(f"the weights have no sensible size after step {step}; {NOTHING_SAVED}")

        state = dict(
            step=step,
            model=model.state_dict(),
            ema=ema.state_dict(),
            optimizer=optimizer.state_dict(),
            recipe=dataclasses.asdict(model.config) | recipe,
        )
        state = self.to_host(state)
        self.thread = threading.Thread(target=self.write, args=(state, model.config))
        self.thread.start()

    def to_host(self, state):
        """The state with its tensors in host memory, which is kept for the next time: of a GPU
        pinned, which is copied to several times faster and takes seconds to get."""
        leaves, structure = tree_flatten(state)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        data.enough_disk(self.out, sum(x.nbytes for x in tensors))  # PyTorch aborts on a full one
        cuda = tensors[0].is_cuda
        if not self.host:
            self.host = [
                torch.empty_like(x, device="cpu", pin_memory=cuda and x.is_cuda) for x in tensors
            ]
        for copied, x in zip(self.host, tensors, strict=True):
            copied.copy_(x, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        copies = iter(self.host)
        leaves = [next(copies) if isinstance(x, torch.Tensor) else x for x in leaves]
        return tree_unflatten(leaves, structure)

    def write(self, state, config):
        """The model first: a run whose last state is there counts as finished."""
        try:
            model, path = self.out / "model.safetensors", self.out / f"state-{state['step']:08d}.pt"
            sdit.write_tensors(model, state["ema"], dataclasses.asdict(config))
            with sdit.atomic(path) as temporary:
                torch.save(state, temporary)
            for old in states(self.out)[:-2]:
                old.unlink()
            for left in self.out.glob(".state-*.tmp.pt"):  # of killed runs
                left.unlink()
        except Exception as e:
            self.error = e


def states(out):
    """The states of a run, the newest last; copies that a user keeps beside them, as state-best.pt,
    are not of them."""
    return sorted(p for p in out.glob("state-*.pt") if re.fullmatch(r"state-\d+\.pt", p.name))


def read_state(path):
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if set(state) != {"step", "model", "ema", "optimizer", "recipe"}:
        raise ValueError("it is not a state")
    return state


def newest_state(out):
    """(path, state) of the newest state in `out` that is whole, reporting those that are not;
    (None, None) where there is none."""
    paths = states(out)[::-1]
    for path in paths:
        try:
            return path, read_state(path)
        except Exception as e:  # torch raises a dozen kinds for a damaged file
            print(
                f"{path} is damaged: it does not load ({type(e).__name__}); taking the one before",
                file=sys.stderr,
            )
    if paths:
        raise UserError(f"every state in {out} is damaged; remove them to start again")
    return None, None


def load_state(out, model, ema, optimizer, recipe):
    """Fill all three from the newest state in `out`; returns the steps done, 0 where there is none.
    Of several processes, rank 0 says which state that is."""
    if not dist.is_initialized():
        path, state = newest_state(out)
    else:
        chosen = [None]
        if dist.get_rank() == 0:
            chosen = [newest_state(out)[0]]
        dist.broadcast_object_list(chosen)
        path = chosen[0]
        state = path and read_state(path)
    if path is None:
        return 0
    recipe = dataclasses.asdict(model.config) | recipe
    saved = state["recipe"]
    changed = [
        f"{k} ({saved.get(k)}, now {v})"
        for k, v in recipe.items()
        if k != "scene_mean" and v != saved.get(k)
    ]
    means = [recipe["scene_mean"], saved["scene_mean"]]
    # not to the bit: another processor rounds differently
    if len(means[0]) != len(means[1]) or not np.allclose(*means, atol=1e-4):
        changed.append("data")
    if changed:
        raise UserError(
            f"{path} was trained with another {' and '.join(changed)}; give the same settings, or go on from its weights: "
            f"--init {out / 'model.safetensors'} and another --out"
        )
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# --------------------------------------------------------------------------------------------------
# Speed

# Dense bf16 TFLOP/s of the data sheets, by the whole name that the driver gives after "NVIDIA ".
PEAKS = {
    "A100-SXM4-40GB": 312,
    "A100-SXM4-80GB": 312,
    "A100-PCIE-40GB": 312,
    "A100 80GB PCIe": 312,
    "H100 80GB HBM3": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200": 989,
    "H200 NVL": 835,
}


def row_flops(config):
    """Floating-point operations of one training row: 3 times those of the forward pass, 2 for a
    multiplication and addition.

    A frame costs, in every block, 24 D^2 N for the linear layers, 4 D N^2 T for attention, 12 D^2
    for its modulation."""
    D, N, T = config.width, config.tokens, config.frames
    frame = (
        config.depth * (24 * D**2 * N + 4 * D * N**2 * T + 12 * D**2)
        + 6 * N * config.patch**2 * config.latent_channels * D
    )
    return 3 * T * frame


def device_peak(device, dtype):
    """TFLOP/s of the device: from PEAKS, or, for what is not there, measured on a product of square
    matrices."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
        if name in PEAKS:
            return PEAKS[name]
    n = 8192 if device.type == "cuda" else 1024
    a, seconds = torch.ones(n, n, device=device, dtype=dtype), []
    for _ in range(7):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the result
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds) / 1e12


class Meter:
    """Gathers what the log line says on the device, and the time since the last one; only `read`
    waits for the device and for the other processes."""

    def __init__(self, device):
        self.sums = torch.zeros(4, 3, device=device)  # by quarter of t: error, bound, rows
        # first step with a loss that is not finite
        self.bad = torch.full((), torch.inf, device=device)
        self.began = time.monotonic()

    def add(self, step, t, error, bound):
        values = torch.stack([error, bound, torch.ones_like(error)], 1).detach()
        self.sums.index_add_(0, t * 4 // NoiseSchedule.steps, values)
        bad = ~torch.isfinite(error + bound).all()
        self.bad = torch.where(bad, self.bad.clamp(max=step), self.bad)

    def read(self, stopping, saving, clear):
        """(mean weighted squared error, mean bound, the error by quarter, first bad step or None,
        whether a process was told to stop, whether one wants to save), over all ranks."""
        sums, told = self.sums.clone(), [torch.full_like(self.bad, x) for x in (stopping, saving)]
        flags = torch.stack([-self.bad, *told])
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        if clear:
            self.sums.zero_()

        sums, (bad, stopping, saving) = sums.cpu(), flags.tolist()
        error, bound, rows = sums.sum(0).tolist()
        quarters = (sums[:, 0] / sums[:, 2].clamp_min(1)).tolist()
        bad = None if bad == -math.inf else int(-bad)
        return error / rows, bound / rows, quarters, bad, bool(stopping), bool(saving)

    @contextlib.contextmanager
    def pause(self):
        """States and pictures do not count as time of training."""
        if self.bad.is_cuda:
            torch.cuda.synchronize()
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def lap(self):
        """Seconds since the last call."""
        seconds, self.began = time.monotonic() - self.began, time.monotonic()
        return seconds


# --------------------------------------------------------------------------------------------------
# The loop


def start_processes():
    """(rank, processes, device). Under torchrun they are a group: a GPU each, or CPUs over gloo."""
    numbers = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, world, local = (int(os.environ.get(name, default)) for name, default in numbers)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"process {local} finds no GPU of its own, there are {count}; give torchrun "
                f"--nproc_per_node={count}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def build_model(rows, size, frames, prediction="epsilon"):
    """An untrained SDiT for a cache: it takes over the cache's latent shape, names of the frozen
    models, and statistics. (--init from a model of ours then brings that model's statistics, which
    its weights have learned to read.)"""
    passed = (
        "latent_channels",
        "latent_size",
        "scene_width",
        "autoencoder",
        "autoencoder_sha256",
        "clip",
        "clip_sha256",
    )
    statistics = rows.statistics()
    scene_mean = [round(x, 5) for x in statistics["scene_mean"].tolist()]
    config = sdit.make_config(
        size,
        frames,
        prediction=prediction,
        scene_mean=scene_mean,
        **{k: rows.about[k] for k in passed},
    )
    model = sdit.SDiT(config)
    for name, value in statistics.items():
        getattr(model.mapping, name).copy_(value)
    return model


def build_optimizer(model, lr, mapping_lr, weight_decay):
    """AdamW with PyTorch's defaults (paper D: "default parameter values"), and a learning rate of
    its own for the mapping network (paper 4.1: ten times smaller)."""
    mapping = list(model.mapping.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("mapping.")]
    groups = [
        dict(params=rest, lr=lr, initial=lr),
        dict(params=mapping, lr=mapping_lr, initial=mapping_lr),
    ]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def learning_rate(step, steps, warmup):
    """Factor of the learning rates: a linear warm-up, and cosine to 0 (paper silent on both)."""
    return min(1, (step + 1) / max(1, warmup)) * (1 + math.cos(math.pi * step / steps)) / 2


def shares(start, steps, batch, rank, world, accumulate):
    """Row numbers that a rank loads, batch by batch: its share of every step's `batch` rows, in
    `accumulate` parts."""
    part = batch // world // accumulate
    for step in range(start, steps):
        for k in range(accumulate):
            first = step * batch + (rank * accumulate + k) * part
            yield list(range(first, first + part))


class Preview:
    """A picture of how far training is, RUN/preview-STEP.png: held-out clips as they are, and below
    each what the average model makes of its source and landmarks."""

    def __init__(self, rows, model_config, beside, device, precision):
        self.bf16 = precision == "bf16"
        batch = torch.utils.data.default_collate([rows[n] for n in range(min(4, len(rows)))])
        self.batch = {name: x.to(device) for name, x in batch.items()}

        path = data.find_weights(model_config.autoencoder, model_config.autoencoder_sha256, beside)
        self.autoencoder = sdit.load_autoencoder(path, device)
        g = torch.Generator().manual_seed(0)
        self.noise = torch.randn(self.batch["latents"].shape, generator=g).to(device)

    @torch.no_grad()
    def __call__(self, model, path):
        with torch.autocast(self.noise.device.type, torch.bfloat16, enabled=self.bf16):
            conditions = [model.mapping(self.batch["scene"], self.batch["landmarks"])]
            settings = sample.Settings(20, "ddim")
            # (rows, T, C, H, W)
            made = sample.sample_plain(model, self.noise, None, conditions, settings, None)

        decode = self.autoencoder.decode
        strips = [data.to_images(decode(z)) for z in (self.batch["latents"], made)]
        picture = np.stack(strips, 1).swapaxes(2, 3)  # (rows, 2, h, T, w, 3)
        rows, _, h, T, w, _ = picture.shape
        with sdit.atomic(path) as temporary:
            Image.fromarray(picture.reshape(rows * 2 * h, T * w, 3)).save(temporary)


NOTHING_SAVED = "nothing was saved over; start again with a lower --lr and another --out"


def build_preview(a, config, beside, device):
    """A Preview, or None, with a word, where the cache's autoencoder is not there to decode."""
    try:
        rows = data.Rows(a.data, a.frames, a.seed, held_out=True)
        return Preview(rows, config, beside, device, a.precision)
    except UserError as e:
        print(f"no previews: {e}")


def arguments(world):
    number, count = data.number, data.number(int, 1)
    rate, share = number(float, 0), number(float, 0, 1)
    ap = data.Parser(__doc__)
    ap.add_argument(
        "--size", default="XL/2", help="model size: S, B, L or XL with /2, /4 or /8; or demo"
    )
    ap.add_argument("--frames", type=count, default=8, help="T, frames of a row")
    ap.add_argument(
        "--data",
        nargs="+",
        default=["cache"],
        metavar="CACHE[:SHARE]",
        help="caches made by data.py; several with shares, as in a:0.9 b:0.1",
    )
    ap.add_argument("--out", type=Path, help="folder of the run (default: runs/SIZE-FRAMES)")
    ap.add_argument(
        "--init",
        type=Path,
        help="start from these weights: a model file of train.py, or DiT-XL-2-256x256.pt",
    )
    ap.add_argument(
        "--prediction",
        choices=("epsilon", "v"),
        default="epsilon",
        help="what the network predicts; v learns faster in short trainings",
    )
    ap.add_argument("--steps", type=count, default=1_000_000, help="of the whole run")
    ap.add_argument("--batch", type=count, default=16, help="rows a step, over all processes")
    ap.add_argument(
        "--accumulate",
        type=count,
        default=1,
        help="parts in which a process works through its rows, to save memory",
    )
    ap.add_argument("--lr", type=rate, default=6.4e-5, help="largest learning rate; cosine to 0")
    ap.add_argument(
        "--mapping-lr", type=rate, help="the mapping network's (default: a tenth of --lr)"
    )
    ap.add_argument(
        "--warmup",
        type=data.number(int, 0),
        default=0,
        metavar="STEPS",
        help="linear warm-up of both learning rates",
    )
    ap.add_argument("--weight-decay", type=rate, default=0.01, help="PyTorch's default; DiT has 0")
    ap.add_argument("--lambda-ex", type=rate, default=1.0, help="extra weight of lips and eyes")
    ap.add_argument(
        "--drop", type=share, default=0.1, help="probability that a row loses scene and landmarks"
    )
    ap.add_argument(
        "--ema",
        type=share,
        default=0.9999,
        help="decay of the weight average (less in the first steps)",
    )
    ap.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the matrix products (default: bf16 where the device has it); weights stay float32",
    )
    ap.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the blocks: a minute of waiting, then faster steps (default: on a GPU)",
    )
    ap.add_argument(
        "--workers",
        type=number(int, 0, 256),
        help="processes that load rows (default: 4 with a GPU, else 0)",
    )
    ap.add_argument(
        "--log-every",
        type=count,
        default=50,
        help="steps between log lines (torchrun takes --log for its own)",
    )
    ap.add_argument(
        "--save-minutes",
        type=number(float, 0),
        default=15,
        help="minutes between states; 0: after every step",
    )
    ap.add_argument(
        "--preview",
        type=number(int, 0),
        default=2000,
        help="steps between pictures of held-out clips, RUN/preview-STEP.png; 0 for none",
    )
    ap.add_argument(
        "--seed", type=number(int, 0, 2**31), default=0, help="of weights, rows and noise"
    )
    a = ap.parse_args()
    a.mapping_lr = a.lr / 10 if a.mapping_lr is None else a.mapping_lr
    a.out = a.out or Path("runs") / f"{a.size.replace('/', '-')}-{a.frames}"
    if a.batch % (world * a.accumulate):
        raise UserError(
            f"--batch {a.batch} does not divide into {world} processes of {a.accumulate} parts; give a multiple of {world * a.accumulate}"
        )
    if a.init and a.init.resolve() == (a.out / "model.safetensors").resolve():
        raise UserError(f"{a.init} would be written over; name another --out")
    return a


def init_weights(model, path):
    """Start training of `model` from a file: a model file of ours (all weights), or a checkpoint of
    DiT trained on images (DiT-XL-2-256x256.pt): those are the transformer's weights; the mapping
    network, which DiT lacks, starts from scratch, and DiT's class embedding is left out."""
    tensors, config = sdit.read_tensors(path)
    prediction = config.get("prediction", "epsilon")
    if prediction != model.config.prediction:
        raise UserError(f"{path} predicts {prediction}; give --prediction {prediction}")

    if not config:
        tensors = {
            k: v
            for k, v in tensors.items()
            if k not in ("pos_embed", "y_embedder.embedding_table.weight")
        }
        tensors |= {k: v for k, v in model.state_dict().items() if k.startswith("mapping.")}
        print(
            f"{path}: weights of an image model without our metadata, taken as DiT's; those are licensed CC BY-NC 4.0, not for commercial use, "
            f"and so is what is trained from them"
        )
    for part in ("autoencoder", "clip"):
        if config and config.get(f"{part}_sha256") != getattr(model.config, f"{part}_sha256"):
            print(
                f"note: {path} was trained with another {part} ({config.get(part)}) than this cache was made with ({getattr(model.config, part)})"
            )
    sdit.fill(model, tensors, path)


def next_rows(loader):
    """The next batch; UserError where the system killed a process that loads rows."""
    try:
        return next(loader)
    except UserError as e:  # of the other process, with its traceback
        raise UserError(str(e).strip().splitlines()[-1].removeprefix("sdit.UserError: ")) from None
    except RuntimeError as e:
        if "DataLoader worker" not in str(e) or "Traceback" in str(e):
            raise
        raise UserError(
            "the system killed a process that loads rows, for lack of memory perhaps; the same command goes on, with fewer --workers"
        ) from None


def report(log, bar, entry):
    """One log line: the bar's text, and the same as JSON in RUN/log.jsonl.

    mse: of what is predicted, weighted as in the loss, of all t and by quarters of t."""
    log.write(json.dumps(entry) + "\n")
    log.flush()
    e, days = entry, entry["eta_s"] / 86400
    left = (
        f"{days:,.0f} days"
        if days > 30
        else f"{int(days)}d {time.strftime('%H:%M:%S', time.gmtime(entry['eta_s'] % 86400))}"
    )
    bar.write(
        f"step {e['step']} mse {e['mse']:.4f} by t {'/'.join(f'{q:.3f}' for q in e['quarters'])} bound {e['bound']:.4f} lr {e['lr']:.1e} "
        f"norm {e['norm']:.2f} {e['rows_per_s']:.1f} rows/s {e['tflops']:.3g} TFLOP/s {e['mfu']:.0%} of peak {e['memory_gib']:.1f} GiB "
        f"{left} left"
    )


def main():
    a = arguments(int(os.environ.get("WORLD_SIZE", 1)))
    rows = data.Rows(a.data, a.frames, a.seed)
    with (
        data.owned(a.out / "run")
        if os.environ.get("RANK", "0") == "0"
        else contextlib.nullcontext()
    ):
        train(a, rows)


def train(a, rows):
    rank, world, device = start_processes()
    part = a.batch // world // a.accumulate  # rows of one forward pass
    a.precision = a.precision or ("bf16" if sdit.has_bf16(device.type) else "fp32")
    bf16 = a.precision == "bf16"
    torch.manual_seed(a.seed)

    # the model, its average and the optimiser: new, or from the newest state
    model = build_model(rows, a.size, a.frames, a.prediction)
    if a.init and not states(a.out):
        init_weights(model, a.init)
    model.to(device)
    if world > 1:
        for buffer in model.buffers():  # another processor may turn the components around
            dist.broadcast(buffer, 0)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(model, a.lr, a.mapping_lr, a.weight_decay)
    a.out.mkdir(parents=True, exist_ok=True)
    recipe = {k: getattr(a, k) for k in RECIPE}
    start = load_state(a.out, model, ema, optimizer, recipe)
    if start >= a.steps:
        return print(f"{a.out} is finished: {start} steps")

    peak = device_peak(device, torch.bfloat16 if bf16 else torch.float32)
    flops = row_flops(model.config)
    preview = None
    if a.preview and rank == 0:
        preview = build_preview(a, model.config, rows.folder / "index.json", device)
    objective = wrap(model, NoiseSchedule(device), a, world)
    if rank == 0:
        mapping, count = (
            sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.mapping, model)
        )
        print(
            f"{a.size}, {a.frames} frames: {count:.1f} M parameters ({mapping:.1f} M of them mapping); "
            f"{len(rows)} clips; {world} x {device.type}, {a.precision}, peak {peak:.3g} TFLOP/s; "
            f"from step {start}"
        )

    stop = []  # filled by Ctrl-C and SIGTERM
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(signal.Signals(number).name))
    cuda = device.type == "cuda"
    loader = iter(
        DataLoader(
            rows,
            batch_sampler=shares(start, a.steps, a.batch, rank, world, a.accumulate),
            num_workers=4 * cuda if a.workers is None else a.workers,
            pin_memory=cuda,
            worker_init_fn=data.end_with_parent,
        )
    )
    c = model.config
    shape = (a.batch, a.frames, c.latent_channels, c.latent_size, c.latent_size)
    log = open(a.out / "log.jsonl", "a") if rank == 0 else None
    bar = tqdm(
        range(start, a.steps),
        initial=start,
        total=a.steps,
        unit="step",
        dynamic_ncols=True,
        disable=rank > 0,
    )
    meter, logged, saved = Meter(device), start, time.monotonic()

    with Saver(a.out) as saver:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * learning_rate(step, a.steps, a.warmup)
            drawn = draw(a.seed, step, shape, a.drop)

            # gradients of all parts; the processes average theirs with the last one
            optimizer.zero_grad(set_to_none=True)
            for k in range(a.accumulate):
                batch = {name: data.send(x, device) for name, x in next_rows(loader).items()}
                first = (rank * a.accumulate + k) * part
                t, noise, drop = (data.send(x[first : first + part], device) for x in drawn)
                alone = world > 1 and k + 1 < a.accumulate
                with objective.no_sync() if alone else contextlib.nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        error, bound = objective(batch, t, noise, drop)
                    ((error + bound).mean() / a.accumulate).backward()
                meter.add(step + 1, t, error, bound)

            # what several processes must agree on, they ask each other every ten steps
            last, logging = step + 1 == a.steps, (step + 1) % a.log_every == 0
            due = time.monotonic() - saved >= a.save_minutes * 60 and not saver.busy
            saving = last or a.save_minutes == 0
            asking = logging or saving or ((step + 1) % 10 == 0 if world > 1 else stop or due)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item() if asking else None

            optimizer.step()
            decay = min(a.ema, (1 + step) / (10 + step))  # follows closely at first
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

            if preview and (step + 1) % a.preview == 0:
                with meter.pause():
                    preview(ema, a.out / f"preview-{step + 1:08d}.png")
            if not asking:
                continue

            due = due and rank == 0  # whose clock is everyone's
            mse, bound, quarters, bad, stopping, due = meter.read(bool(stop), due, clear=logging)
            if bad is not None or not math.isfinite(norm):
                raise UserError(
                    f"the loss or its gradient was not finite at step {bad or step + 1}; "
                    f"{NOTHING_SAVED}"
                )
            if (logging or stopping) and rank == 0 and step + 1 > logged:
                speed = (step + 1 - logged) * a.batch / meter.lap()
                entry = dict(step=step + 1, mse=mse, bound=bound, quarters=quarters, norm=norm)
                entry |= dict(lr=optimizer.param_groups[0]["lr"], rows_per_s=speed)
                entry |= dict(tflops=speed * flops / 1e12, mfu=speed * flops / 1e12 / peak / world)
                entry |= dict(memory_gib=data.peak_memory(device.type))
                report(log, bar, entry | dict(eta_s=(a.steps - step - 1) * a.batch / speed))
                logged = step + 1
            saver.check()
            if saving or due or stopping:
                saved = time.monotonic()
                if rank == 0:
                    with meter.pause():
                        saver.save(step + 1, model, ema, optimizer, recipe)
            if stopping and not last:
                break
        bar.close()

    if stopping and not last and rank == 0:
        print(
            f"stopped by {(stop or ['another process'])[0]}; saved after step {step + 1}; "
            f"the same command goes on"
        )
    if world > 1:
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()


def wrap(model, schedule, a, world):
    """The objective to train: its blocks compiled, its gradients averaged over the processes."""
    cuda = schedule.beta.is_cuda
    if cuda if a.compile is None else a.compile:
        # one graph a block; else it would be cut in three
        torch._dynamo.config.optimize_ddp = False
        for block in model.blocks:  # one compilation serves all blocks
            block.compile()
    objective = Objective(model, schedule, a.lambda_ex)
    if world == 1:
        return objective
    # older PyTorch has no other name for it
    warnings.filterwarnings("ignore", "`broadcast_buffers`")
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, broadcast_buffers=False)


if __name__ == "__main__":
    data.run_main(main)
