"""Short trainings at equal time, to choose the demo's recipe: how well does each variant predict
the clean latents of unseen people?

    python demo/recipes.py --minutes 6                   # every variant below, one after the other
    python demo/recipes.py --minutes 6 base muon         # only these

Each line: the error of the predicted clean latents of held-out clips, divided by their variance (1
is guessing the mean), at six timesteps; in brackets the same with the landmarks of other clips, and
with the scenes of other clips: what these add is what the model takes from them. Time is the
processor's own, so that other work on the machine does not count.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO.parent), str(DEMO)]

import torch
import torch.nn.functional as F

import data
import sdit
import train

TIMESTEPS = (100, 300, 500, 700, 850, 950)
HELD_OUT = 160  # clips
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
def measure_errors(model, batch, schedule):
    """For each of TIMESTEPS: error of x0 over its variance with the right conditions, with others'
    landmarks, with others' scenes."""
    x0, scene, landmarks = batch["latents"], batch["scene"], batch["landmarks"]
    other = torch.arange(len(x0)).roll(len(x0) // 2 + 1)
    conditions = (scene, landmarks), (scene, landmarks[other]), (scene[other], landmarks)
    errors = {}
    for step in TIMESTEPS:
        t = torch.full((len(x0),), step)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(step))
        xt = schedule.add_noise(x0, noise, t)
        errors[step] = []
        for condition in conditions:
            predicted = model(xt, t, model.mapping(*condition)).chunk(2, 2)[0]
            error = F.mse_loss(schedule.predict_x0(xt, predicted, t), x0) / x0.var()
            errors[step].append(error.item())
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
    """(errors, rows of training seen, millions of parameters) after so many minutes of the
    processor."""
    rows, test = split_rows(cache, v.frames, seed)
    torch.manual_seed(seed)
    sdit.DEMO_SIZE |= dict(width=v.width, depth=v.depth, heads=v.heads)
    model = train.build_model(rows, "demo", v.frames, v.prediction)
    ema = copy.deepcopy(model).requires_grad_(False)
    schedule, optimizers = sdit.NoiseSchedule(), build_optimizers(model, v)
    shape = (v.batch, *test["latents"].shape[1:])

    began, step, progress = time.process_time(), 0, 0.0
    while progress < 1:
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
        step += 1
        progress = (time.process_time() - began) / 60 / minutes

    million = sum(p.numel() for p in model.parameters()) / 1e6
    return measure_errors(ema, test, schedule), step * v.batch, million


def main():
    parser = data.Parser(__doc__)
    parser.add_argument("variants", nargs="*", choices=[[], *VARIANTS], help="default: all")
    parser.add_argument("--cache", default=DEMO / "build" / "cache", help="that of build.py")
    parser.add_argument("--minutes", type=float, default=6, help="for each variant")
    a = parser.parse_args()

    torch.set_num_threads(1)
    print(f"{'':12} million  rows  " + "".join(f"{f't = {t}':>22}" for t in TIMESTEPS))
    for name in a.variants or VARIANTS:
        v = argparse.Namespace(**BASE | VARIANTS[name])
        errors, seen, million = train_variant(v, a.cache, a.minutes)
        cells = "".join(f"{x[0]:8.4f} ({x[1]:.3f} {x[2]:.3f})" for x in errors.values())
        print(f"{name:12} {million:7.2f} {seen:6d} {cells}", flush=True)
        found = dict(variant=name, minutes=a.minutes, rows=seen, million=million, errors=errors)
        print(json.dumps(found), file=sys.stderr, flush=True)


if __name__ == "__main__":
    data.run_main(main)
