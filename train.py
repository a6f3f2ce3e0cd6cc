"""Train the sDiT and its mapping network on a cache (Anchored Diffusion, arXiv 2407.15153: 3.1, 4.1
and D). Autoencoder, CLIP and landmarks are frozen: the cache holds what they made.

    python train.py --size demo --frames 4 --prediction v --lr 1e-3 --steps 20000    # a laptop
    torchrun --nproc_per_node=4 train.py    # the paper's XL/2, T = 8, batch 16, from ./cache

The same command again resumes from the newest state in --out, on any number of processes. SIGTERM
and Ctrl-C save, then stop."""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import math
import re
import signal
import statistics
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import data
import sample
import sdit
from sdit import NoiseSchedule, UserError

# --------------------------------------------------------------------------------------------------
# Hyper-parameters. Defaults are the paper's (4.1, D), except where a comment says whose


def arguments():
    ap = data.Parser(__doc__)
    count, natural = data.number(int, 1), data.number(int, 0)
    positive, fraction = data.number(float, 0), data.number(float, 0, 1)

    def add(name, kind, default, text, **more):
        ap.add_argument(name, type=kind, default=default, help=text, **more)

    # the model: the paper trains T = 4 and T = 8, and predicts epsilon, as DiT does
    add("--size", str, "XL/2", "S, B, L or XL with /2, /4 or /8; or demo")
    add("--frames", count, 8, "T, frames of a row")
    add("--prediction", str, "epsilon", "v learns faster at first", choices=("epsilon", "v"))

    # files
    add("--data", str, ["cache"], "by data.py; mixed: a:0.9 b:0.1", nargs="+", metavar="CACHE")
    add("--out", Path, None, "folder of the run (default: runs/SIZE-FRAMES)")
    add("--init", Path, None, "initial weights: a model file of train.py, or DiT-XL-2-256x256.pt")

    # the loss; paper silent: for classifier-free guidance, conditions are dropped as DiT's class is
    add("--lambda-ex", positive, 1.0, "extra weight of lips and eyes")
    add("--drop", fraction, 0.1, "probability that a row loses scene and landmarks")

    # optimisation; paper silent on warm-up (none) and average (DiT's decay, see `update_ema`).
    # Weight decay is PyTorch's default (paper D: "default parameter values"); DiT has 0.
    add("--steps", count, 1_000_000, "of the whole run")
    add("--batch", count, 16, "rows a step, over all processes")
    add("--lr", positive, 6.4e-5, "largest learning rate; cosine to 0")
    add("--mapping-lr", positive, None, "the mapping network's (default: a tenth of --lr)")
    add("--warmup", natural, 0, "steps of linear warm-up")
    add("--weight-decay", positive, 0.01, "of AdamW")
    add("--ema", fraction, 0.9999, "decay of the average of the weights")
    add("--seed", data.number(int, 0, 2**31), 0, "of weights, rows and noise")

    # the machine
    add("--precision", str, None, "default: bf16 where it is fast", choices=("bf16", "fp32"))
    add("--accumulate", count, 1, "parts of a process's rows, one after another, to save memory")
    compile_help = "torch.compile the blocks: a minute's wait, then faster (default: on a GPU)"
    ap.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compile_help)
    add("--workers", data.number(int, 0, 256), None, "load rows (default: 4 with a GPU, else 0)")
    add("--log-every", count, 50, "steps between log lines")  # torchrun takes --log for its own
    add("--save-minutes", positive, 15, "minutes between states; 0: after every step")
    add("--preview", natural, 2000, "steps between pictures, RUN/preview-STEP.png; 0: none")
    add("--plot", Path, None, "only draw losses and speed of a run: RUN/log.png", metavar="RUN")

    a = ap.parse_args()
    a.rank, a.world, _ = data.ranks()
    a.out = a.out or Path("runs", f"{a.size.replace('/', '-')}-{a.frames}")
    a.mapping_lr = a.lr / 10 if a.mapping_lr is None else a.mapping_lr
    parts = a.world * a.accumulate
    if a.batch % parts:
        raise UserError(
            f"--batch {a.batch} does not divide into {a.world} processes of {a.accumulate} parts; "
            f"give a multiple of {parts}"
        )
    if a.init and a.init.resolve() == (a.out / "model.safetensors").resolve():
        raise UserError(f"{a.init} would be written over; name another --out")
    return a


# These and the model's configuration define a run; a state of another run is not resumed.
RECIPE = "steps batch lr mapping_lr warmup weight_decay lambda_ex drop ema precision seed shares"

# --------------------------------------------------------------------------------------------------
# The loss


def variational_bound(schedule, x0, xt, predicted, variance_mix, t):
    """The learned sigma's term of the variational bound (Improved DDPM, Sec. 3.1). Returns (B,), in
    bits a dimension. The `predicted` noise is detached: the gradient goes by variance_mix alone."""
    at = schedule.at
    log_variance = schedule.log_variance(variance_mix, t)
    true_log_variance = at(schedule.posterior_variance.log(), t, xt)
    # the means of the posterior q(x_{t-1} | x_t, x_0), of the true x_0 and of the predicted
    weight_x0, weight_xt = at(schedule.mean_x0, t, xt), at(schedule.mean_xt, t, xt)
    true_mean = weight_x0 * x0 + weight_xt * xt  # (B, T, C, H, W)
    mean = weight_x0 * schedule.predict_x0(xt, predicted, t) + weight_xt * xt

    # KL divergence of the true posterior from the model's, both normal
    kl = log_variance - true_log_variance + torch.exp(true_log_variance - log_variance)
    kl = (kl + (true_mean - mean) ** 2 * torch.exp(-log_variance) - 1) / 2

    # At t = 0 there is no posterior, but the likelihood of x0 in a bin of width 2 / 255, that of an
    # 8-bit pixel. For latents it means little; DiT has it.
    edges = (x0 + 1 / 255 - mean, x0 - 1 / 255 - mean)
    upper, lower = (torch.special.ndtr(x * torch.exp(-log_variance / 2)) for x in edges)
    upper = torch.where(x0 > 0.999, 1.0, upper)
    lower = torch.where(x0 < -0.999, 0.0, lower)
    likelihood = (upper - lower).clamp_min(1e-12)

    at_zero = (t == 0).view(-1, 1, 1, 1, 1)
    nats = torch.where(at_zero, -likelihood.log(), kl)  # (B, T, C, H, W)
    return nats.flatten(1).mean(1) / math.log(2)


def diffusion_loss(model, schedule, batch, t, noise, drop, lambda_ex=1.0):
    """(weighted squared error (B,), bound (B,)); their sum is minimised (Improved DDPM: 0.001 times
    the bound, a sum of 1000 steps, of which one is sampled here). batch: of `data.Rows`. t (B,):
    one for all frames of a row (paper silent). drop (B,): rows that lose their conditions."""
    x0 = batch["latents"]
    xt = schedule.add_noise(x0, noise, t)
    conditioning = model.mapping(batch["scene"], batch["landmarks"], drop)  # (B, T, D)
    output = model(xt, t, conditioning).float()  # (B, T, 2C, H, W)
    predicted, variance_mix = output.chunk(2, 2)  # the first is noise, with v-prediction too

    # paper 4.1: "expressive landmark pixels are assigned a weight of (1 + lambda_ex)"; paper
    # silent: not divided by the sum of the weights
    weight = 1 + lambda_ex * batch["mask"][:, :, None]  # (B, T, 1, H, W), fractional at edges
    error = (weight * (predicted - noise) ** 2).flatten(1).mean(1)  # (B,)
    if model.config.prediction == "v":
        # (predicted - noise)^2 = alpha_bar * (v's error)^2: divided, it is the error of v
        error = error / schedule.at(schedule.alpha_bar, t, error)

    return error, variational_bound(schedule, x0, xt, predicted.detach(), variance_mix, t)


class Objective(nn.Module):
    """`diffusion_loss` as a module, for DistributedDataParallel."""

    def __init__(self, model, schedule, lambda_ex):
        super().__init__()
        self.model, self.schedule, self.lambda_ex = model, schedule, lambda_ex

    def forward(self, batch, t, noise, drop):
        return diffusion_loss(self.model, self.schedule, batch, t, noise, drop, self.lambda_ex)


def sample_noise(seed, step, shape, p_drop, device="cpu"):
    """Of all rows of a step: timesteps (B,), uniform over 0..999; noise of `shape` (B, ...); drop
    (B,), true with probability `p_drop`. Seed, step and the kind of device decide them."""
    g = torch.Generator(device).manual_seed(seed * 1_000_003 + step)  # for fewer steps all differ
    of = dict(generator=g, device=device)
    t = torch.randint(NoiseSchedule.steps, shape[:1], **of)
    return t, torch.randn(shape, **of), torch.rand(shape[0], **of) < p_drop


# --------------------------------------------------------------------------------------------------
# Optimiser, learning rate, average


def build_optimizer(model, lr, mapping_lr, weight_decay):
    """AdamW (paper D: "default parameter values"); the mapping network has a learning rate of its
    own (paper 4.1: ten times smaller)."""
    mapping = list(model.mapping.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("mapping.")]
    rates = ((rest, lr), (mapping, mapping_lr))
    groups = [dict(params=params, lr=rate, initial=rate) for params, rate in rates]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def learning_rate(step, steps, warmup):
    """Factor of both learning rates: cosine, which would reach 0 one step after the last (paper
    4.1), times a linear warm-up."""
    return min(1, (step + 1) / max(1, warmup)) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Exponential moving average of the weights, which follows closely at first. (Buffers are
    constants.)"""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# Set-up


def start_processes():
    """The device of this process; under torchrun it joins the others, over NCCL or gloo."""
    _, world, local = data.ranks()
    gpus = torch.cuda.device_count()
    if 0 < gpus <= local:
        raise UserError(
            f"process {local} finds no GPU of its own; give torchrun --nproc_per_node={gpus}"
        )
    device = torch.device(f"cuda:{local}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if gpus else "gloo")
    return device


def build_model(rows, size, frames, prediction="epsilon"):
    """An untrained SDiT for a cache, with its latent shape, frozen models and statistics.
    `load_state` recognises the data by the configuration's `scene_mean`."""
    settings = {name: rows.about[name] for name in data.SETTINGS}
    buffers = rows.statistics()
    settings["scene_mean"] = [round(x, 5) for x in buffers["scene_mean"].tolist()]
    model = sdit.SDiT(sdit.make_config(size, frames, prediction=prediction, **settings))
    for name, value in buffers.items():
        getattr(model.mapping, name).copy_(value)
    return model


def init_weights(model, path):
    """Start from a model file of ours, with its statistics, or from an image DiT's transformer."""
    tensors, config = sdit.read_tensors(path)
    prediction = config.get("prediction", "epsilon")
    if prediction != model.config.prediction:
        raise UserError(f"{path} predicts {prediction}; give --prediction {prediction}")

    if config:
        for part in ("autoencoder", "clip"):
            here, there = getattr(model.config, part), config.get(part)
            if config.get(f"{part}_sha256") != getattr(model.config, f"{part}_sha256"):
                note = f"was trained with another {part} ({there}) than the cache ({here})"
                print(f"note: {path} {note}")
    else:
        for foreign in ("pos_embed", "y_embedder.embedding_table.weight"):
            tensors.pop(foreign, None)
        tensors |= {k: v for k, v in model.state_dict().items() if k.startswith("mapping.")}
        print(
            f"{path}: weights of an image model without our metadata, taken as DiT's; those are "
            f"licensed CC BY-NC 4.0, not for commercial use, and so is what is trained from them"
        )
    sdit.fill(model, tensors, path)


def build_networks(a, rows, device):
    """((model, its average, optimiser), steps done), from the newest state if there is one."""
    model = build_model(rows, a.size, a.frames, a.prediction)
    if a.init and not states(a.out):
        init_weights(model, a.init)
    model.to(device)
    if a.world > 1:
        for buffer in model.buffers():  # signs of principal components differ between machines
            dist.broadcast(buffer, 0)
    ema = copy.deepcopy(model).requires_grad_(False)
    networks = model, ema, build_optimizer(model, a.lr, a.mapping_lr, a.weight_decay)
    return networks, load_state(a.out, *networks, a.recipe)


def build_objective(model, schedule, a):
    """The loss to call: its blocks compiled, its gradients averaged over the processes."""
    compiled = schedule.beta.is_cuda if a.compile is None else a.compile
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts each compiled block in three
        for block in model.blocks:  # one compilation serves all
            block.compile()
    objective = Objective(model, schedule, a.lambda_ex)
    if a.world == 1:
        return objective
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # deprecated; older PyTorch needs it
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, broadcast_buffers=False)


def load_batches(rows, a, start, passes, device):
    """The rows of each forward pass, on the device. `passes`: slices of the batch of a step."""
    ranges = (
        range(step * a.batch + part.start, step * a.batch + part.stop)
        for step in range(start, a.steps)
        for part in passes
    )
    cuda = device.type == "cuda"
    loader = DataLoader(
        rows,
        batch_sampler=ranges,
        num_workers=4 * cuda if a.workers is None else a.workers,
        pin_memory=cuda,
        worker_init_fn=data.end_with_parent,
    )
    try:
        for batch in loader:
            yield {name: data.send(x, device) for name, x in batch.items()}
    except UserError as e:  # of a worker, with its traceback
        raise UserError(str(e).strip().splitlines()[-1].removeprefix("sdit.UserError: ")) from None
    except RuntimeError as e:
        if not str(e).startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            "the system killed a process that loads rows, for lack of memory perhaps; "
            "the same command goes on, with fewer --workers"
        ) from None


# --------------------------------------------------------------------------------------------------
# The loop


def train(a, rows):
    """Seed and step alone decide rows, noise and timesteps, on one kind of device. So the result
    does not depend, but for rounding, on the number of processes, nor on stops (on a CPU to the
    bit)."""
    device = start_processes()
    a.precision = a.precision or ("bf16" if sdit.has_bf16(device.type) else "fp32")
    a.shares = rows.shares.tolist() if len(rows.shares) > 1 else None
    a.recipe = {name: getattr(a, name) for name in RECIPE.split()}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=a.precision == "bf16")
    torch.manual_seed(a.seed)

    networks, start = build_networks(a, rows, device)
    if start >= a.steps:
        print(f"{a.out} is finished: {start} steps")
        return
    model, ema, optimizer = networks
    objective = build_objective(model, NoiseSchedule(device), a)
    run = Run(a, rows, networks, start, device)

    # the batch in world * accumulate parts: those of this process, in order
    size = a.batch // (a.world * a.accumulate)
    parts = range(a.rank * a.accumulate, (a.rank + 1) * a.accumulate)
    passes = [slice(i * size, (i + 1) * size) for i in parts]
    batches = load_batches(rows, a, start, passes, device)
    shape = (a.batch, *rows[0]["latents"].shape)  # (B, T, C, H, W), of all processes

    with run.saver, tqdm(total=a.steps, initial=start, unit="step", disable=a.rank > 0) as bar:
        for step in range(start, a.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * learning_rate(step, a.steps, a.warmup)
            sampled = sample_noise(a.seed, step, shape, a.drop, device)

            optimizer.zero_grad()
            for part in passes:
                batch = next(batches)
                t, noise, drop = (x[part] for x in sampled)

                objective.require_backward_grad_sync = part == passes[-1]  # as DDP.no_sync() does
                with autocast:
                    error, bound = objective(batch, t, noise, drop)
                ((error + bound).mean() / a.accumulate).backward()
                run.meter.add(step + 1, t, error, bound)

            optimizer.step()  # gradients are not clipped (DiT); `Run.decide` sees losses not finite
            update_ema(ema, model, step, a.ema)
            bar.update()

            run.after(step + 1)
            if run.stopping:
                break

    unfinished = run.stopping and step + 1 < a.steps
    if unfinished and a.rank == 0:
        by = signal.Signals(run.signals[0]).name if run.signals else "another process"
        print(f"stopped by {by}; saved after step {step + 1}; the same command goes on")
    if a.world > 1:
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()
    elif unfinished:
        sys.exit(128 + run.signals[0])  # `train.py && ...` stops, too


class Run:
    """What happens beside learning: log, states, previews, and Ctrl-C or SIGTERM."""

    def __init__(self, a, rows, networks, start, device):
        self.a, self.networks = a, networks
        self.signals, self.stopping = [], False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.signals.append(number))

        model, self.preview = networks[0], None
        if a.rank == 0 and a.preview:
            try:
                self.preview = Preview(a, model.config, device)
            except UserError as e:  # the cache's autoencoder is not there
                print(f"no previews: {e}")
        if a.rank == 0:
            million = sum(p.numel() for p in model.parameters()) / 1e6
            print(
                f"{a.size}, {a.frames} frames: {million:.1f} M parameters; {len(rows)} clips; "
                f"{a.world} x {device.type}, {a.precision}; from step {start}"
            )

        self.meter, self.saver = Meter(device), Saver(a.out)
        self.logged_step, self.saved_at = start, time.monotonic()

    def after(self, step):
        """Log, save and preview where the flags say so; log and save at a signal and at the end."""
        log, save = self.decide(step)
        preview = self.preview and step % self.a.preview == 0
        if log:
            self.log(step)
        if self.a.rank == 0 and (save or preview):
            with self.meter.pause():
                if save:
                    self.saved_at = time.monotonic()
                    self.saver.save(step, *self.networks, self.a.recipe)
                if preview:
                    self.preview(self.networks[1], self.a.out / f"preview-{step:08d}.png")

    @functools.cached_property
    def peak(self):
        dtype = torch.bfloat16 if self.a.precision == "bf16" else torch.float32
        with self.meter.pause():
            return device_peak(self.meter.sums.device, dtype)

    def decide(self, step):
        """(log, save): whether to, after `step` steps; sets `stopping` at a signal, and `norm`.
        Processes communicate at every tenth step, and where they log or save. UserError where loss
        or gradient are not finite, or a state could not be written."""
        a, last = self.a, step == self.a.steps
        log = last or step % a.log_every == 0
        save = last or a.save_minutes == 0
        idle = self.saver.writing.done()
        save_due = idle and time.monotonic() - self.saved_at >= a.save_minutes * 60
        ask = step % 10 == 0 if a.world > 1 else self.signals or save_due
        if not (log or save or ask):
            return False, False

        # from here on it waits for the device and the other processes
        gradients = [p.grad for p in self.networks[0].parameters() if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients).item()
        save_due = save_due and a.rank == 0  # rank 0's clock is everyone's
        bad, self.stopping, save_due = self.meter.agree(self.signals, save_due)
        if bad <= step or not math.isfinite(self.norm):
            first = int(min(bad, step))
            raise UserError(
                f"the loss or its gradient was not finite at step {first}; {NOTHING_SAVED}"
            )
        if idle:
            self.saver.writing.result()  # raises what went wrong
        return log or self.stopping, save or save_due or self.stopping

    def log(self, step):
        """A line of text, and the same in RUN/log.jsonl. mse: the weighted error (with --prediction
        v, of v), over all t and by quarters of t."""
        a = self.a
        means = self.meter.means()  # all processes take part in it
        if a.rank > 0:
            return

        model, _, optimizer = self.networks
        rate = (step - self.logged_step) * a.batch / self.meter.lap()
        self.logged_step = step
        tflops = rate * row_flops(model.config) / 1e12
        entry = dict(
            step=step,
            **means,
            norm=self.norm,
            lr=optimizer.param_groups[0]["lr"],
            rows_per_s=rate,
            tflops=tflops,
            mfu=tflops / self.peak / a.world,
            memory_gib=data.peak_memory(self.meter.sums.device),
            eta_s=(a.steps - step) * a.batch / rate,
        )
        with open(a.out / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")
        tqdm.write(log_text(entry))


def log_text(entry):
    by_t = "/".join(f"{quarter:.3f}" for quarter in entry["quarters"])
    left = datetime.timedelta(seconds=round(entry["eta_s"]))
    return (
        "step {step} mse {mse:.4f} by t {by_t} bound {bound:.4f} lr {lr:.1e} norm {norm:.2f} "
        "{rows_per_s:.1f} rows/s {tflops:.3g} TFLOP/s {mfu:.0%} of peak {memory_gib:.1f} GiB "
        "{left} left"
    ).format(**entry, by_t=by_t, left=left)


# --------------------------------------------------------------------------------------------------
# States on disk

NOTHING_SAVED = "the last state is intact; start again with a lower --lr and another --out"


class Saver(ThreadPoolExecutor):
    """A thread that writes RUN/model.safetensors (the EMA weights) and RUN/state-STEP.pt (the last
    two stay). A step waits only for the copy to host memory. A second save waits for the first. The
    end of the context waits until all is written."""

    def __init__(self, out):
        super().__init__(1)
        self.out, self.host, self.writing = out, [], Future()
        self.writing.set_result(None)  # nothing yet

    def __exit__(self, kind, *_):
        self.shutdown()
        if kind is None:
            self.writing.result()

    @torch.no_grad()
    def save(self, step, model, ema, optimizer, recipe):
        self.writing.result()  # or raises what went wrong
        if not nn.utils.get_total_norm(model.parameters(), math.inf) < 1e10:  # nor nan
            raise UserError(f"the weights have no sensible size after step {step}; {NOTHING_SAVED}")

        networks = dict(model=model, ema=ema, optimizer=optimizer)
        state = {name: network.state_dict() for name, network in networks.items()}
        state |= dict(step=step, recipe=dataclasses.asdict(model.config) | recipe)
        self.writing = self.submit(self.write, self.to_host(state), model.config)

    def to_host(self, state):
        """The state with its tensors in host memory. Pinned memory is fast, but takes seconds to
        get: it is kept for the next time."""
        tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
        model = state["ema"].values()  # a file of its own
        data.enough_disk(self.out, sum(x.nbytes for x in (*tensors, *model)))  # else PyTorch aborts
        if not self.host:
            self.host = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda) for x in tensors]
        torch._foreach_copy_(self.host, tensors, non_blocking=True)
        if tensors[0].is_cuda:
            torch.cuda.synchronize()
        copies = iter(self.host)
        return tree_map_only(torch.Tensor, lambda _: next(copies), state)

    def write(self, state, config):
        """The model first: a state is never newer than the model."""
        model, path = self.out / "model.safetensors", self.out / f"state-{state['step']:08d}.pt"
        sdit.write_tensors(model, state["ema"], dataclasses.asdict(config))
        with sdit.atomic(path) as temporary:
            torch.save(state, temporary)
        of_killed_runs = self.out.glob(".state-*.tmp.pt")
        for old in (*states(self.out)[:-2], *of_killed_runs):
            old.unlink()


def states(out):
    """States of a run, the newest last. (A user may keep a state-best.pt beside them.)"""
    return sorted(p for p in out.glob("state-*.pt") if re.fullmatch(r"state-\d+\.pt", p.name))


def read_state(path):
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if set(state) != {"step", "model", "ema", "optimizer", "recipe"}:
        raise ValueError("it is not a state")
    return state


def newest_state(out):
    """Path of the newest state that loads, or None; damaged ones are reported."""
    paths = states(out)[::-1]
    for path in paths:
        try:
            read_state(path)
            return path
        except Exception as e:  # torch raises a dozen kinds
            kind = type(e).__name__
            print(f"{path} is damaged ({kind}); taking the one before", file=sys.stderr)
    if paths:
        raise UserError(f"every state in {out} is damaged; remove them to start again")


def load_state(out, model, ema, optimizer, recipe):
    """Fill all three from the newest state, which rank 0 chooses; returns its step, or 0."""
    chosen = [newest_state(out) if data.ranks()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    path = chosen[0]
    if path is None:
        return 0

    state = read_state(path)
    saved, settings = state["recipe"], dataclasses.asdict(model.config) | recipe
    means = [s.pop("scene_mean") for s in (saved, settings)]
    differ = [k for k, v in settings.items() if v != saved.get(k) and f"{k}_sha256" not in settings]
    changed = [f"{k} ({saved.get(k)}, now {settings[k]})" for k in differ]
    if any(abs(x - y) >= 1e-4 for x, y in zip(*means)):  # another processor rounds differently
        changed.append("data")
    if changed:
        raise UserError(
            f"{path} was trained with another {' and '.join(changed)}; give the same settings, or "
            f"go on from its weights: --init {out / 'model.safetensors'} and another --out"
        )
    for name, network in dict(model=model, ema=ema, optimizer=optimizer).items():
        network.load_state_dict(state[name])
    return state["step"]


# --------------------------------------------------------------------------------------------------
# Previews


class Preview:
    """RUN/preview-STEP.png: held-out clips, and below each what the average model makes of its
    source and landmarks."""

    def __init__(self, a, config, device):
        rows = data.Rows(a.data, a.frames, a.seed, held_out=True)
        batch = default_collate([rows[n] for n in range(min(4, len(rows)))])
        self.batch = {name: x.to(device) for name, x in batch.items()}
        g = torch.Generator().manual_seed(0)
        self.noise = torch.randn(batch["latents"].shape, generator=g).to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=a.precision == "bf16")

        beside = rows.folder / "index.json"
        path = data.find_weights(config.autoencoder, config.autoencoder_sha256, beside)
        self.autoencoder = sdit.load_autoencoder(path, device)

    @torch.no_grad()
    def __call__(self, model, path):
        from torchvision.utils import save_image  # takes seconds

        with self.autocast:
            conditions = [model.mapping(self.batch["scene"], self.batch["landmarks"])]
            settings = sample.Settings(steps=20, sampler="ddim")
            # (rows, T, C, H, W)
            made = sample.sample_plain(model, self.noise, None, conditions, settings, anchor=None)

        pairs = torch.stack([self.batch["latents"], made], 1).flatten(0, 1)  # (rows * 2, T, ...)
        pictures = torch.cat([self.autoencoder.decode(z) for z in pairs])  # (rows * 2 * T, 3, h, w)
        pictures = (pictures + 1) / 2
        with sdit.atomic(path) as temporary:
            save_image(pictures, temporary, nrow=made.shape[1], padding=0)


def plot(run):
    """RUN/log.png of RUN/log.jsonl: loss by quarter of t, learning rate, rows a second."""
    from matplotlib.figure import Figure

    # after a resume, steps come again: the later ones count
    entries = {entry["step"]: entry for entry in data.read_lines([run / "log.jsonl"])}
    if not entries:
        raise UserError(f"{run / 'log.jsonl'} has no line of train.py yet")
    steps = sorted(entries)

    figure = Figure(figsize=(7, 8), layout="constrained")
    loss, rate, speed = figure.subplots(3, sharex=True)
    quarters = [entries[step]["quarters"] for step in steps]
    for i, quarter in enumerate(zip(*quarters)):
        first = NoiseSchedule.steps * i // 4
        loss.plot(steps, quarter, label=f"t from {first}")
    loss.set(ylabel="weighted squared error", yscale="log")
    loss.legend()
    for axes, name, label in (rate, "lr", "learning rate"), (speed, "rows_per_s", "rows a second"):
        axes.plot(steps, [entries[step][name] for step in steps])
        axes.set(ylabel=label, ylim=(0, None))
    speed.set(xlabel="step")

    with sdit.atomic(run / "log.png") as temporary:
        figure.savefig(temporary, dpi=120)
    print(run / "log.png")


# --------------------------------------------------------------------------------------------------
# Speed

# Dense bf16 TFLOP/s of the data sheets, by the whole name that the driver gives after "NVIDIA ".
PEAKS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835}
A100 = "A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"
PEAKS |= dict.fromkeys(A100, 312)


def row_flops(config):
    """Floating-point operations of one training row: 3 times those of the forward pass."""
    D, N, T = config.width, config.tokens, config.frames
    # a frame in a block: linear layers, attention, modulation; before and after the blocks: patches
    block = 24 * D**2 * N + 4 * D * N**2 * T + 12 * D**2
    ends = 6 * N * config.patch**2 * config.latent_channels * D
    return 3 * T * (config.depth * block + ends)


def device_peak(device, dtype):
    """TFLOP/s of the device, from PEAKS, or measured on a product of square matrices."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
        if name in PEAKS:
            return PEAKS[name]
    n = 8192 if device.type == "cuda" else 1024
    matrix, seconds = torch.ones(n, n, device=device, dtype=dtype), []
    for _ in range(7):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the result
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds) / 1e12


class Meter:
    """Losses, summed on the device, and the time since the last log line. `agree` and `means` wait
    for the device and the other processes."""

    def __init__(self, device):
        self.sums = torch.zeros(4, 3, device=device)  # by quarter of t: error, bound, rows
        self.bad = torch.full((), torch.inf, device=device)  # first step with a loss not finite
        self.began = time.monotonic()

    def add(self, step, t, error, bound):
        values = torch.stack([error, bound, torch.ones_like(error)], 1).detach()
        self.sums.index_add_(0, t * 4 // NoiseSchedule.steps, values)
        bad = ~torch.isfinite(error + bound).all()
        self.bad = torch.where(bad, self.bad.clamp(max=step), self.bad)

    def agree(self, *flags):
        """[first bad step or inf, and of each flag whether it is set in any process]."""
        values = torch.stack([-self.bad, *(torch.full_like(self.bad, bool(x)) for x in flags)])
        if dist.is_initialized():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        bad, *flags = values.tolist()
        return [-bad, *map(bool, flags)]

    def means(self):
        """Over all processes, since the last call."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        sums = self.sums.cpu()
        self.sums = torch.zeros_like(self.sums)
        error, bound, rows = sums.sum(0).tolist()
        quarters = sums[:, 0] / sums[:, 2]
        return dict(mse=error / rows, bound=bound / rows, quarters=quarters.tolist())

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


def main():
    a = arguments()
    if a.plot:
        return plot(a.plot)
    rows = data.Rows(a.data, a.frames, a.seed)
    with data.owned(a.out / "run") if a.rank == 0 else contextlib.nullcontext():
        train(a, rows)


if __name__ == "__main__":
    data.run_main(main)
