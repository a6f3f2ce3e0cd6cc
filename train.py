"""Train the sDiT and its mapping network on a cache (paper 3.1, 4.1, D). Autoencoder, CLIP and landmarks are frozen: the cache
holds what they made.

    python train.py --size demo --data cache --steps 3200 --batch 8 --lr 8e-4      # a laptop, an hour, at 64 pixels
    python train.py                                                # the paper's XL/2, T = 8, batch 16, from ./cache

The same command again goes on from the newest state in --out.
"""
import argparse
import copy
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import sdit
from data import Rows
from sdit import NoiseSchedule, UserError

# ----------------------------------------------------------------------------------------------------------------------
# The loss


def expressive_weight(mask, lambda_ex):
    """Weight of every latent, (B, T, 1, H, W), from the share of its pixels on lips and eyes, mask (B, T, H, W) in 0..1.

    Paper 4.1: "expressive landmark pixels are assigned a weight of (1 + lambda_ex) ... other pixels receive a weight of 1"."""
    return 1 + lambda_ex * mask[:, :, None]


def variational_bound(schedule, x0, xt, noise, v, t):
    """The learned sigma's term of the variational bound, in bits a dimension, (B,) (Improved DDPM, Sec. 3.1; DiT's routine).

    KL of the true posterior from the model's; at t = 0, where there is no posterior, the likelihood of x0 in bins of
    2 / 255. That width belongs to 8-bit pixels and means little for latents; kept as DiT has it. `noise`, the prediction,
    comes detached: this term teaches the network its variance, never its mean."""
    log_variance = schedule.log_variance(v, t)
    predicted = schedule.predict_x0(xt, noise, t)
    mean = schedule.at(schedule.mean_x0, t, xt) * predicted + schedule.at(schedule.mean_xt, t, xt) * xt
    true_mean = schedule.at(schedule.mean_x0, t, xt) * x0 + schedule.at(schedule.mean_xt, t, xt) * xt
    true_log = schedule.at(schedule.posterior.log(), t, xt)
    kl = (log_variance - true_log + torch.exp(true_log - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance) - 1) / 2
    upper, lower = (torch.special.ndtr((x0 + edge - mean) * torch.exp(-log_variance / 2)) for edge in (1 / 255, -1 / 255))
    upper, lower = torch.where(x0 > 0.999, 1.0, upper), torch.where(x0 < -0.999, 0.0, lower)
    decoder = -(upper - lower).clamp_min(1e-12).log()
    first = (t == 0).view(-1, *[1] * (x0.dim() - 1))
    return torch.where(first, decoder, kl).flatten(1).mean(1) / math.log(2)


def diffusion_loss(model, schedule, batch, t, noise, drop, lambda_ex=1.0):
    """Loss of every row: (weighted mean squared error (B,), bound (B,)); their sum is what is trained.

    batch: see `data.Rows`; t (B,) timesteps, one a row (paper silent: all frames of a row share it); noise like the
    latents; drop (B,) bool, rows that lose scene and landmarks. The weights are not normalised (paper silent: plain mean)."""
    x0 = batch["latents"]
    xt = schedule.add_noise(x0, noise, t)
    output = model(xt, t, model.mapping(batch["scene"], batch["landmarks"], drop)).float()
    predicted, v = output.chunk(2, dim=2)                                        # (B, T, C, H, W) each
    error = (expressive_weight(batch["mask"], lambda_ex) * (predicted - noise) ** 2).flatten(1).mean(1)
    return error, variational_bound(schedule, x0, xt, predicted.detach(), v, t)


def draw(seed, step, shape, p_drop):
    """(timesteps (B,), noise of `shape` (B, ...), drop (B,)) of a step: a function of (seed, step) alone.

    t is uniform over 0..999 (DiT); conditions are dropped with probability `p_drop` (paper silent; DiT's 0.1)."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + step)
    t = torch.randint(NoiseSchedule.steps, shape[:1], generator=g)
    return t, torch.randn(shape, generator=g), torch.rand(shape[0], generator=g) < p_drop


# ----------------------------------------------------------------------------------------------------------------------
# States on disk

# What a run is; a state of another recipe is refused. The other arguments may change between sessions.
RECIPE = ("steps", "batch", "lr", "weight_decay", "lambda_ex", "drop", "ema", "precision", "seed")


def save_state(out, step, model, ema, optimizer, recipe):
    """RUN/state-STEP.pt (the last two are kept) and RUN/model.safetensors, the EMA weights. Names appear when files are whole."""
    state = dict(step=step, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                 recipe=dataclasses.asdict(model.config) | recipe)
    temporary = out / "state.tmp"
    torch.save(state, temporary)
    os.replace(temporary, out / f"state-{step:08d}.pt")
    sdit.save_model(out / "model.safetensors", ema)
    for old in sorted(out.glob("state-*.pt"))[:-2]:
        old.unlink()


def load_state(out, model, ema, optimizer, recipe):
    """Fill all three from the newest state in `out`; returns the steps done, 0 where there is none."""
    states = sorted(out.glob("state-*.pt"))
    if not states:
        return 0
    state, recipe = torch.load(states[-1], map_location="cpu", weights_only=True), dataclasses.asdict(model.config) | recipe
    changed = [k for k, v in recipe.items() if v != state["recipe"][k]]
    if changed:
        raise UserError(f"{states[-1]} was trained with another {' and '.join(changed)}; use another --out or the same settings")
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# The loop

def build_model(rows, size, frames):
    """An untrained SDiT for a cache: it takes over the cache's latent shape, names of the frozen models, and statistics."""
    mean, spread, scene_mean = rows.statistics()
    passed = {k: rows.about[k] for k in ("latent_channels", "latent_size", "scene_width", "autoencoder", "autoencoder_sha256",
                                         "clip", "clip_sha256")}
    model = sdit.SDiT(sdit.make_config(size, frames, scene_mean=[round(x, 5) for x in scene_mean.tolist()], **passed))
    model.mapping.landmark_mean.copy_(mean)
    model.mapping.landmark_std.copy_(spread)
    return model


def build_optimizer(model, lr, weight_decay):
    """AdamW with PyTorch's defaults (paper D: "default parameter values"), the mapping network ten times slower (paper 4.1)."""
    mapping = list(model.mapping.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("mapping.")]
    groups = [dict(params=rest, lr=lr, initial=lr), dict(params=mapping, lr=lr / 10, initial=lr / 10)]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--size", default="XL/2", help="model size: S, B, L or XL with /2, /4 or /8; or demo")
    ap.add_argument("--frames", type=int, default=8, help="T, frames of a row")
    ap.add_argument("--data", type=Path, default=Path("cache"), help="cache made by data.py")
    ap.add_argument("--out", type=Path, help="folder of the run (default: runs/SIZE-FRAMES)")
    ap.add_argument("--steps", type=int, default=1_000_000)
    ap.add_argument("--batch", type=int, default=16, help="rows a step")
    ap.add_argument("--lr", type=float, default=6.4e-5, help="learning rate at the start, cosine to 0; a tenth for the mapping network")
    ap.add_argument("--weight-decay", type=float, default=0.01, help="PyTorch's default; DiT has 0")
    ap.add_argument("--lambda-ex", type=float, default=1.0, help="extra weight of lips and eyes")
    ap.add_argument("--drop", type=float, default=0.1, help="probability that a row loses scene and landmarks")
    ap.add_argument("--ema", type=float, default=0.9999, help="decay of the weight average (less in the first steps)")
    ap.add_argument("--precision", choices=("bf16", "fp32"), help="of the matrix products (default: bf16 where the device has it); weights stay float32")
    ap.add_argument("--workers", type=int, default=0, help="processes that load rows")
    ap.add_argument("--log", type=int, default=50, help="steps between log lines")
    ap.add_argument("--save", type=int, default=500, help="steps between states")
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    a.out = a.out or Path("runs") / f"{a.size.replace('/', '-')}-{a.frames}"
    return a


def main():
    a = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a.precision = a.precision or ("bf16" if sdit.has_bf16(device) else "fp32")
    autocast = torch.autocast(device, torch.bfloat16, enabled=a.precision == "bf16")
    rows = Rows(a.data, a.frames, a.seed)
    torch.manual_seed(a.seed)
    model = build_model(rows, a.size, a.frames).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(model, a.lr, a.weight_decay)
    schedule = NoiseSchedule(device)
    a.out.mkdir(parents=True, exist_ok=True)
    recipe = {k: getattr(a, k) for k in RECIPE}
    start = load_state(a.out, model, ema, optimizer, recipe)
    if start >= a.steps:
        return print(f"{a.out} is finished: {start} steps")
    count = sum(p.numel() for p in model.parameters())
    print(f"{a.size}, {a.frames} frames: {count / 1e6:.1f} M parameters; {len(rows)} clips; {device}, {a.precision}; from step {start}")
    loader = DataLoader(Subset(rows, range(start * a.batch, a.steps * a.batch)), a.batch, num_workers=a.workers)
    totals, began, log = torch.zeros(4, 2), time.time(), open(a.out / "log.jsonl", "a")
    bar = tqdm(loader, initial=start, total=a.steps, unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar, start):
        progress = step / a.steps
        for group in optimizer.param_groups:                                    # cosine to 0, no warm-up (paper silent on both)
            group["lr"] = group["initial"] * (1 + math.cos(math.pi * progress)) / 2
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        t, noise, drop = (x.to(device) for x in draw(a.seed, step, batch["latents"].shape, a.drop))
        with autocast:
            error, bound = diffusion_loss(model, schedule, batch, t, noise, drop, a.lambda_ex)
        loss = (error + bound).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        decay = min(a.ema, (1 + step) / (10 + step))                             # follows closely at first
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        totals.index_add_(0, (t * 4 // NoiseSchedule.steps).cpu(), torch.stack([error.detach(), torch.ones_like(error)], 1).cpu())
        if (step + 1) % a.log and step + 1 < a.steps and (step + 1) % a.save:
            continue
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise UserError(f"loss is {loss.item()} and gradient norm {norm.item()} at step {step + 1}; nothing was saved since step "
                            f"{step // a.save * a.save}")
        if (step + 1) % a.log == 0:
            seconds, began = time.time() - began, time.time()
            quarters = (totals[:, 0] / totals[:, 1].clamp_min(1)).tolist()
            entry = dict(step=step + 1, loss=totals[:, 0].sum().item() / totals[:, 1].sum().item(), bound=bound.mean().item(),
                         quarters=quarters, lr=optimizer.param_groups[0]["lr"], norm=norm.item(), rows_per_s=a.log * a.batch / seconds)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            bar.set_postfix_str(f"mse {entry['loss']:.4f} by t {'/'.join(f'{q:.3f}' for q in quarters)} bound {entry['bound']:.3f} "
                                f"norm {entry['norm']:.2f} {entry['rows_per_s']:.1f} rows/s")
            totals.zero_()
        if (step + 1) % a.save == 0 or step + 1 == a.steps:
            save_state(a.out, step + 1, model, ema, optimizer, recipe)


if __name__ == "__main__":
    sdit.run_main(main)
