"""Test sets, and the paper's experiments on the demo's world: `python evaluate.py COMMAND`.

world      OUT/world: rendered people: clips, pictures, true reenactments, pairs.csv, and faces
pairs      OUT/pairs.csv: random pairs of one's own clips and pictures
long       videos of up to 1,000 frames: do they stay consistent?
ablation   how frames are dealt to rows, which frame is the anchor
scenes     Table 2 and Fig. 14: scene recognition
guidance   Fig. 7: impact of the guidance signals, on small denoisers that are trained for it
figures    Figs. 1, 4, 6 and 20: pictures
report     OUT/report.md: every result that is there
all        all of these, and evaluate.py's own, on the demo's world
"""

import copy
import csv
import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import evaluate
import sample
import sdit
import train
from evaluate import PIXELS, with_interval
from sdit import NoiseSchedule, UserError

# --------------------------------------------------------------------------------------------------
# Test sets. Their seeds are unseen in training

WORLD = 144  # pixels of rendered frames, a little more than the model sees
FRAMES = 72  # of a clip: 24 at 8 a second, and a source
FACES = 2000  # people, one picture each, for probes and denoisers
FACES_SEED, LONG_SEED = 2_500_000, 3_500_000


def load_world():
    """The module of rendered people, with its packages."""
    try:
        import world
    except ModuleNotFoundError as e:
        cure = "pip install -r demo/requirements.txt"
        raise UserError(f"rendering people needs {e.name}: {cure}") from None
    return world


def render_pair(root, i):
    """A clip, a picture of somebody else, and the true reenactment of it."""
    world, truth = load_world(), root / "truth" / f"{i:04d}.mp4"
    if truth.exists():  # it is written last
        return
    rng = np.random.default_rng([2_000_000, i])
    driver, person = world.sample_face(rng), world.sample_face(rng)
    motion, still = world.sample_motion(rng, FRAMES), world.sample_motion(rng, 1)
    picture = world.render_clip(person, still, WORLD)[0]
    Image.fromarray(picture).save(root / "pictures" / f"{i:04d}.png")
    write_video(root / "clips" / f"{i:04d}.mp4", world.render_clip(driver, motion, WORLD))
    write_video(truth, world.render_clip(person, motion, WORLD))


def render_sample(folder, seed, frames, i):
    path = folder / f"{i:04d}.mp4"
    if not path.exists():
        write_video(path, load_world().sample_clip([seed, i], frames, WORLD)[0])


def render_face(folder, i):
    path = folder / f"{i:04d}.png"
    if not path.exists():
        picture = load_world().sample_clip([FACES_SEED, i], 1, WORLD)[0][0]
        with sdit.atomic(path) as temporary:
            Image.fromarray(picture).save(temporary)


@contextmanager
def ending(pool, children=()):
    """The pool; where this process is interrupted, tasks that have not begun are dropped, and the
    `children` that others wait for are ended."""
    with pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise


def render_all(jobs):
    """Call render(*arguments, i) for i below n, {(render, *arguments): n}, on every core."""
    load_world()
    spawn, tasks = multiprocessing.get_context("spawn"), []
    with ending(ProcessPoolExecutor(os.cpu_count(), spawn, data.end_with_parent)) as pool:
        for (render, *arguments), n in jobs.items():
            Path(arguments[0]).mkdir(parents=True, exist_ok=True)
            tasks += [pool.submit(render, *arguments, i) for i in range(n)]
        finished = as_completed(tasks)
        for task in tqdm(finished, "rendering", len(tasks), unit="file", disable=None):
            task.result()


def render_world(a, more=False):
    """OUT/world: `--n` pairs, and a picture each of many other people. With `more` clips for
    `long`."""
    root = a.out / "world"
    for folder in ("clips", "pictures", "truth"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = {(render_pair, root): a.n, (render_face, root / "faces"): FACES}
    if more:
        jobs[render_sample, root / "long", LONG_SEED, LONGEST + 1] = 3
    render_all(jobs)

    names = [f"{i:04d}" for i in range(a.n)]
    lines = [
        dict(source=f"pictures/{i}.png", driving=f"clips/{i}.mp4", out=f"out/{i}.mp4")
        for i in names
    ]
    write_pairs(root / "pairs.csv", lines)


def write_video(path, frames):
    with data.VideoWriter(path, 24, "synthetic, rendered") as out:
        for frame in frames:
            out.write(frame)


def write_pairs(path, lines):
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, ["source", "driving", "out"])
        table.writeheader()
        table.writerows(lines)
    print(f"{path}: {len(lines)} pairs, each with a clip of its own")


def random_pairs(a):
    """pairs.csv of N random clips with as many random pictures, for `cross` and sample.py."""
    if len(a.folders) != 2:
        raise UserError("name two folders: python evaluate.py pairs CLIPS PICTURES")
    clips = data.list_files(a.folders[0], data.VIDEOS)
    pictures = data.list_files(a.folders[1], data.PICTURES)
    if not clips or not pictures:
        what, folder = ("pictures", a.folders[1]) if clips else ("videos", a.folders[0])
        raise UserError(f"no {what} in {folder}")

    rng, lines, left = np.random.default_rng(a.seed), [], []
    for i, j in enumerate(rng.permutation(len(clips))[: a.n]):
        left = left or rng.permutation(len(pictures)).tolist()  # none again before all were taken
        picture = pictures[left.pop()].resolve()
        out = f"out/{i:05d}-{clips[j].stem}.mp4"
        lines.append(dict(source=picture, driving=clips[j].resolve(), out=out))
    if len(lines) < (a.n or 0):
        print(f"note: every clip drives once, so that --n {a.n} is more than there are")
    write_pairs(a.out / "pairs.csv", lines)


# --------------------------------------------------------------------------------------------------
# What CSIM should measure: do a person's colours stay?


def attribute_probe(a):
    """A function of CLIP's vectors (M, S) -> (M, 4): which hair, shirt, background and skin, as
    numbers, a linear probe reads in them. It is fitted on the faces of the world. (In latents such
    a probe is far weaker.)"""
    models, path = evaluate.load_models(a.model), a.out / "cache"
    path /= f"probe-{models.sha256[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = evaluate.read_or_make(path, lambda: fit_probe(models, a.out / "world" / "faces"))

    def read(vectors):
        scores = vectors @ probe["weight"] + probe["bias"]
        parts = np.split(scores, probe["sizes"].cumsum()[:-1], 1)
        return np.stack([part.argmax(1) for part in parts], 1)

    return read


def fit_probe(models, folder):
    """Ridge regression from CLIP vectors to one-hot names, one after the other."""
    world = load_world()
    from world_metrics import Ridge

    tables = dict(hair=world.HAIR, shirt=world.CLOTH, back=world.CLOTH, skin=world.SKIN)
    x, y = [], []
    for path in tqdm(sorted(folder.glob("*.png"))[:1000], "probes", leave=False, disable=None):
        try:
            crop = sample.read_source(path, models.landmarker, models.size, 0)[0]
        except UserError:  # no face is found in it
            continue
        face = world.sample_face(np.random.default_rng([FACES_SEED, int(path.stem)]))
        x.append(evaluate.clip_vectors(models, crop[None])[0])
        y.append([float(face[part] == name) for part, table in tables.items() for name in table])

    ridge = Ridge(np.stack(x), np.array(y), strength=0.05)
    weight = ridge.weight / ridge.deviation[:, None]
    sizes = [len(table) for table in tables.values()]
    return dict(weight=weight, bias=ridge.offset - ridge.mean @ weight, sizes=sizes)


# --------------------------------------------------------------------------------------------------
# Not in the paper: long videos

LONGEST = 1000


def long(a, lengths=(48, 96, 240, LONGEST)):
    """Self-reenactments of OUT/world/long, or --clips: is a long video as consistent as a short
    one? Does it fall back to the anchor now and then, as long videos by a shared frame may?

    `excess` of a frame: how much nearer it is to the anchor, by the cosine of CLIP, than the
    driving frame is to the driving anchor. A fall-back is a frame whose excess is far from the
    mean; a period shows in the excess's autocorrelation."""
    files = evaluate.list_videos(a.clips or a.out / "world" / "long")
    longest = max(len(data.Video(path)) for path in files.values())
    lengths = [M for M in lengths if M < longest] or [longest - 1]
    files = {name: evaluate.Files(path) for name, path in list(files.items())[: a.n]}
    nets, T = evaluate.attribute_nets(a), evaluate.load_models(a.model).sdit.config.frames
    rows, curves = [], {}
    for M in lengths:
        for method in ("anchored", "independent"):
            title = f"long {M}, {method}"
            found = evaluate.measure_videos(a, title, files, M, nets, method=method).values()
            anchor = sample.plan_rows(M, T)[0][0, T // 2]
            clips = [evaluate.clip_metrics(r) for r in found]
            made, driving = (
                np.stack([r[f"{who}_clip"] @ r[f"{who}_clip"][anchor] for r in found])
                for who in ("made", "driving")
            )  # (videos, M)
            excess = np.delete(made - driving, anchor, 1)
            far = abs(excess - excess.mean(1, keepdims=True)) > 4 * excess.std(1, keepdims=True)
            row = [f"{100 * far.mean():.2f}", f"{np.mean([periodicity(e) for e in excess]):.2f}"]
            for metric, digits in {evaluate.KEPT: 1, evaluate.CHANGES: 1, "Self-CSIM": 3}.items():
                if metric in clips[0]:
                    row.append(evaluate.with_interval([c[metric] for c in clips], digits))
            rows.append([M, method, f"{made.mean():.3f}", f"{driving.mean():.3f}", *row])
            if M == lengths[-1]:
                curves |= {method: [made[0]], "driving video": [driving[0]]}

    metrics = [m for m in (evaluate.KEPT, evaluate.CHANGES, "Self-CSIM") if m in clips[0]]
    header = ["frames", "", "cosine to the anchor", "of the driving video"]
    header += ["fall-backs, % of frames", "strongest period's autocorrelation", *metrics]
    figure = evaluate.plot(range(M), curves, xlabel="frame", ylabel="cosine to the anchor (CLIP)")
    figure.set_size_inches(12, 4)
    notes = [f"{len(files)} videos, one start each; the plot shows the first."]
    evaluate.write_table(a, "long", "Long videos", header, rows, notes, figure)


def periodicity(x, shortest=8):
    """The largest autocorrelation of x (M,) at a lag from its first zero, and `shortest`, on to a
    third of its length: about 0 for noise, 1 for a periodic signal."""
    x = x - x.mean()
    spectrum = np.fft.rfft(x, 2 * len(x))
    curve = np.fft.irfft(abs(spectrum) ** 2)[: len(x) // 3] / max((x * x).sum(), 1e-12)
    after = max(shortest, int(np.argmax(curve < 0))) if (curve < 0).any() else shortest
    return float(curve[after:].max()) if len(curve) > after else math.nan


# --------------------------------------------------------------------------------------------------
# Not in the paper: how frames are dealt to rows, which frame is the anchor


def deal_frames(M, T, how, anchor=None, seed=0):
    """`sample.plan_rows`, with the frames of each side dealt strided, contiguous or at random."""
    rows, keep = sample.plan_rows(M, T, anchor)
    if how == "strided":
        return rows, keep

    slot, centre = T // 2, rows[0, T // 2]
    sides = (0, slot, np.arange(centre)), (slot + 1, T, np.arange(centre + 1, M))
    for first, end, side in sides:
        if not len(side):
            continue
        width, last = end - first, side[-1]
        if how == "random":
            side = np.random.default_rng(seed).permutation(side)
        for b in range(len(rows)):
            dealt = np.sort(side[b * width : (b + 1) * width])
            rows[b, first:end] = dealt[-1] if len(dealt) else last
            rows[b, first : first + len(dealt)] = dealt
            keep[b, first:end] = np.arange(width) < len(dealt)
    return rows, keep


def ablation(a, M=24):
    files, T = evaluate.list_clips(a), evaluate.load_models(a.model).sdit.config.frames
    variants = {f"dealt {how}": (how, None) for how in ("strided", "random", "contiguous")}
    variants["anchor first"] = "strided", 0

    found = {}
    for name, (how, anchor) in variants.items():

        def plan(number):
            return deal_frames(M, T, how, anchor, a.seed + number)

        title = f"ablation, {name}"
        found[name] = evaluate.measure_videos(a, title, files, M, plan=plan)

    digits = {"Self-CSIM": 3, "LMSE": 1, "Expressive-LMSE": 1}
    scores = {}  # variant -> (3 metrics, clips)
    for name, results in evaluate.measured_by_all(found).items():
        clips = [evaluate.clip_metrics(r) for r in results.values()]
        scores[name] = np.array([[values[metric] for values in clips] for metric in digits])

    base, rows = scores["dealt strided"], []
    for name, score in scores.items():
        count = len(sample.plan_rows(M, T, variants[name][1])[0])
        row = [with_interval(s, n) for s, n in zip(score, digits.values())]
        gaps = [with_interval(s, n) for s, n in zip((score - base)[:2], digits.values())]
        if name == "dealt strided":
            name, gaps = f"{name} (as planned)", ["", ""]
        rows.append([name, count, *row, *gaps])

    gaps = [f"{metric} minus the first line's" for metric in list(digits)[:2]]
    note = f"{base.shape[1]} self-reenactments of {M} frames; differences video by video."
    header = ["", "rows", *digits, *gaps]
    evaluate.write_table(a, "ablation", "Dealing and anchor", header, rows, [note])


# --------------------------------------------------------------------------------------------------
# Scene recognition (paper 4.5.1, Table 2, Fig. 14)

PAPER_SCENES = {
    "ArcFace": "1.516 / 113",
    "CLIP": "0.611 / 641",
    "MLP, centre loss": "0.819 / 411",
    "MLP, ArcFace loss": "0.810 / 413",
    "MLP, focal loss": "0.673 / 493",
}


class Head(nn.Module):
    """MLP with 5 hidden layers (paper 4.5.1; width unsaid) from CLIP vectors to the video."""

    def __init__(self, width, classes):
        super().__init__()
        layers = [(nn.Linear(width, width), nn.ReLU()) for _ in range(5)]
        self.hidden = nn.Sequential(*sum(layers, ()))
        self.classes = nn.Parameter(torch.randn(classes, width) * width**-0.5)
        self.centres = nn.Parameter(torch.zeros(classes, width))

    def loss(self, x, y, kind):
        """Of vectors x (B, S) with classes y (B,)."""
        h = self.hidden(x)
        logits = h @ self.classes.T
        if kind == "centre":  # Wen et al. 2016
            distance = ((h - self.centres[y]) ** 2).sum(1).mean()
            return F.cross_entropy(logits, y) + 0.003 * distance
        if kind == "ArcFace":  # Deng et al. 2019
            cosine = F.normalize(h, dim=1) @ F.normalize(self.classes, dim=1).T
            angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
            margin = torch.cos(angle + 0.5 * F.one_hot(y, len(self.classes)))
            return F.cross_entropy(30 * margin, y)
        p = logits.softmax(1).gather(1, y[:, None])[:, 0].clamp_min(1e-9)
        return (-((1 - p) ** 2) * p.log()).mean()  # focal: Lin et al. 2017


def train_head(x, y, kind, seed, epochs=30):
    torch.manual_seed(seed)
    head = Head(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            head.loss(x[part], y[part], kind).backward()
            optimizer.step()
    return head.hidden.eval()


def clustering(x, y):
    """(Davies-Bouldin, Calinski-Harabasz) of x (n, S), made unit vectors, with labels y."""
    from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

    x = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
    return davies_bouldin_score(x, y), calinski_harabasz_score(x, y)


def scene_vectors(a, arcface, frames=64):
    """[{"clip": (frames, S), with `arcface` also "arcface": (frames, 512)}] of every clip."""
    models, files = evaluate.load_models(a.model), evaluate.list_clips(a)

    def measure(number, name):
        path = files[name].driving
        video, tracked = data.Video(path), evaluate.track(path, models.landmarker)
        chosen = np.unique(np.linspace(0, len(video) - 1, frames).round().astype(int)).tolist()
        size = PIXELS if arcface else models.size
        crops = evaluate.read_crops(path, tracked, video, chosen, size)
        vectors = dict(clip=evaluate.clip_vectors(models, crops))
        if arcface:
            vectors["arcface"] = arcface(crops, tracked.landmarks[chosen])
        return vectors

    key = [f"scenes, {frames} frames", models.sha256, a.clips, arcface is not None]
    return list(evaluate.measure_all(a, key, files, measure).values())


def stack_vectors(clips, key):
    """(vectors (n, S), number of the clip (n,)) of all frames."""
    labels = np.repeat(np.arange(len(clips)), [len(vectors[key]) for vectors in clips])
    return np.concatenate([vectors[key] for vectors in clips]), labels


def scenes(a):
    """Table 2: how well frames' vectors cluster by video; heads learn on half of the videos and are
    judged on the other. Fig. 14: t-SNE."""
    try:
        arcface, missing = evaluate.load_arcface(a.weights), []
    except UserError as e:
        arcface, missing = None, [f"Missing: ArcFace: {e}"]
    clips = scene_vectors(a, arcface)
    half = len(clips) // 2
    if half < 2:
        raise UserError("scenes needs four videos: half train the heads, half are clustered")

    x, y = map(torch.from_numpy, stack_vectors(clips[:half], "clip"))
    test, labels = stack_vectors(clips[half:], "clip")
    vectors = {"ArcFace": stack_vectors(clips[half:], "arcface")[0]} if arcface else {}
    vectors["CLIP"] = test
    figure = tsne(vectors, labels)
    for kind in ("centre", "ArcFace", "focal"):
        head = train_head(x, y, kind, a.seed)
        vectors[f"MLP, {kind} loss"] = head(torch.from_numpy(test)).detach().numpy()

    rows = []
    for name, v in vectors.items():
        bouldin, harabasz = clustering(v, labels)
        rows.append([name, f"{bouldin:.3f}", f"{harabasz:.0f}", PAPER_SCENES[name]])
    header = ["", "Davies-Bouldin, lower is better", "Calinski-Harabasz, higher is better", "paper"]
    others = f"heads trained on {half} other videos"
    note = f"{len(test)} frames of {len(clips) - half} videos; {others}."
    title = "Scene recognition (Table 2, Fig. 14)"
    evaluate.write_table(a, "scenes", title, header, rows, [note, *missing], figure)


def tsne(vectors, labels, videos=24):
    """Fig. 14: a matplotlib figure, one panel for each kind of vectors."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(5 * len(vectors), 5))
    axes = figure.subplots(1, len(vectors), squeeze=False)
    shown = labels < videos
    for ax, (name, x) in zip(axes[0], vectors.items()):
        perplexity = min(30, shown.sum() // 4)
        flat = TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(x[shown])
        ax.scatter(*flat.T, c=labels[shown], cmap="tab20", s=4)
        ax.set(title=f"{name}, {len(set(labels[shown].tolist()))} videos", xticks=[], yticks=[])
    return figure


# --------------------------------------------------------------------------------------------------
# Impact of the guidance signals (Fig. 7)

SIGNALS = {
    "none": (),
    "landmarks": ("landmarks",),
    "CLIP": ("scene",),
    "landmarks + CLIP": ("landmarks", "scene"),
}


def keep_signals(batch, signals):
    """A batch without the conditions that are not among the signals."""
    return batch | {k: None for k in ("landmarks", "scene") if k not in signals}


def split_rows(cache, frames, seed):
    """(rows to train on, rows of other clips, their count): an eighth of the cache, 256 at most."""
    rows = data.Rows(cache, frames, seed)
    unseen, clips = copy.deepcopy(rows), len(rows.names[0])
    held = min(256, clips // 8)
    if not held:
        raise UserError(f"{cache} has {clips} clips; `guidance` needs 8, and wants 1,000 and more")
    rows.ranges[0] = range(clips - held)
    unseen.ranges[0], unseen.held_out = range(clips - held, clips), True
    return rows, unseen, held


def train_denoiser(rows, signals, a, device, batch=16):
    """A denoiser of single frames with some of the conditions; the seed alone decides its start,
    data and noise."""
    torch.manual_seed(a.seed)
    model = train.build_model(rows, a.size, 1, a.prediction).to(device)
    schedule, rate = NoiseSchedule(device), 0.35 / model.config.width  # the demo's at its width
    optimizer = train.build_optimizer(model, rate, rate, 0.01)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=sdit.has_bf16(device.type))

    steps = a.train_steps
    sampler = [range(n * batch, (n + 1) * batch) for n in range(steps)]
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler)
    title = "training with " + (" + ".join(signals) or "none")
    for step, one in enumerate(tqdm(loader, title, unit="step", leave=False, disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = rate * train.learning_rate(step, steps, steps // 20)
        sampled = train.sample_noise(a.seed, step, one["latents"].shape, 0)
        t, noise, drop = (data.send(x, device) for x in sampled)
        one = keep_signals({k: data.send(x, device) for k, x in one.items()}, signals)
        with precision:
            error, bound = train.diffusion_loss(model, schedule, one, t, noise, drop)
        optimizer.zero_grad()
        (error + bound).mean().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def denoising_errors(model, rows, signals, times, seed, n):
    """Mean squared error of the noise (n, len(times)) on n held-out rows; every model gets the
    same noise."""
    device = model.x_embedder.proj.weight.device
    batch, schedule = torch.utils.data.default_collate([rows[i] for i in range(n)]), NoiseSchedule()
    batch, errors = keep_signals(batch, signals), []
    for time in times:
        generator = torch.Generator().manual_seed(seed + time)
        noise, t = torch.randn(batch["latents"].shape, generator=generator), torch.full((n,), time)
        xt, parts = schedule.add_noise(batch["latents"], noise, t), []
        for k in torch.arange(n).split(32):
            given = [
                None if batch[x] is None else batch[x][k].to(device) for x in ("scene", "landmarks")
            ]
            # the network may be in bfloat16, its mapping never is
            conditioning = model.mapping(*given).to(model.position.dtype)
            output = model(xt[k].to(device), t[k].to(device), conditioning).float()
            parts.append((output.cpu().chunk(2, 2)[0] - noise[k]).square().flatten(1).mean(1))
        errors.append(torch.cat(parts).numpy())
    return np.stack(errors, 1)


def ratio(errors, base):
    """Text: mean over timesteps of errors / errors of the unguided, (n, timesteps) of the same n
    people, ± half of its 95 % interval over people."""
    chosen = np.random.default_rng(0).integers(0, len(base), (1000, len(base)))
    found = (errors[chosen].mean(1) / base[chosen].mean(1)).mean(1)
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{(errors.mean(0) / base.mean(0)).mean():.3f} ± {(high - low) / 2:.3f}"


def guidance(a):
    """Fig. 7: the error of four denoisers, trained alike on cached pictures (--data), over
    timesteps against that of the unguided one. A second look that needs no training: the model
    itself, with conditions replaced by their null vectors."""
    rows, unseen, n = split_rows(a.data, 1, a.seed)
    models = evaluate.load_models(a.model)
    times = list(range(25, NoiseSchedule.steps, 50))

    def measure(number, name):
        kind, signals = name.split(": ")
        if kind == "trained":
            model = train_denoiser(rows, SIGNALS[signals], a, models.device)
            found = denoising_errors(model, unseen, SIGNALS[signals], times, a.seed, n)
        else:
            model = models.sdit
            settings = {k: getattr(model.config, k) for k in data.SETTINGS}
            data.must_agree(settings, rows.about, f"{a.data} was made with", "it is left out")
            several = split_rows(a.data, model.config.frames, a.seed)[1]
            found = denoising_errors(model, several, SIGNALS[signals], times, a.seed, n)
        return dict(errors=found)

    key = ["guidance", a.data, data.sha256(a.data / "index.json"), a.seed, a.train_steps]
    key += [a.size, a.prediction, models.sha256]
    names = [f"{kind}: {name}" for kind in ("trained", "the model") for name in SIGNALS]
    found = evaluate.measure_all(a, key, dict.fromkeys(names, ()), measure)
    errors = {name: values["errors"] for name, values in found.items()}
    if "trained: none" not in errors:
        raise UserError("the unguided denoiser could not be trained; the reason is above")

    # x0's error is the noise's, times (1 - alpha_bar) / alpha_bar
    alpha_bar = NoiseSchedule().alpha_bar[times].numpy()
    latents = torch.stack([unseen[i]["latents"] for i in range(n)])
    to_x0 = (1 - alpha_bar) / alpha_bar / latents.var().item()
    quarters, table, lines = np.array_split(np.arange(len(times)), 4), [], {}
    for name, error in errors.items():
        base = errors.get(name.split(": ")[0] + ": none")
        if base is None:
            continue
        if not name.endswith("none"):
            lines[name] = [error.mean(0) / base.mean(0)]
            cells = [ratio(error[:, q], base[:, q]) for q in quarters]
            table.append([f"{name}: error / error with none", *cells])
        cells = [f"{(error[:, q] * to_x0[q]).mean():.3f}" for q in quarters]
        table.append([f"{name}: error of x0 / variance of the latents", *cells])

    labels = dict(xlabel="timestep", ylabel="error / error with no signal")
    figure = evaluate.plot(times, lines, **labels)
    header = ["", *(f"t = {times[q[0]]} to {times[q[-1]]}" for q in quarters)]
    title = "Impact of the guidance signals (Fig. 7)"
    paper = "landmarks help most at large t, both are best, the gains are largest in the middle"
    many = f"{rows.ranges[0].stop} pictures or clips trained on, {n} others tested"
    notes = [
        f"{many}; {a.train_steps} steps of 16, {a.size}, prediction {a.prediction}.",
        "The ratio is the same for errors of the noise and of x0. Interval: 95 %, over people.",
        f"The paper: {paper}.",
    ]
    details = dict(errors={k: error.mean(0).tolist() for k, error in errors.items()})
    evaluate.write_table(a, "guidance", title, header, table, notes, figure, **details)


# --------------------------------------------------------------------------------------------------
# Figures of pictures

PROMPT = "a face with red hair, wearing a blue shirt"
EDIT = "black hair -> blond hair"


def picture_grid(rows, size=96):
    """One picture of rows of square pictures, or None for a gap, (rows * size, .., 3) uint8."""
    gap = np.full((size, size, 3), 255, np.uint8)
    rows = [[gap if p is None else data.resize(p, size) for p in row] for row in rows]
    return np.concatenate([np.concatenate(row, 1) for row in rows])


def figures(a):
    """The paper's picture figures from the first pairs: OUT/figure-1.png (reenactment, text, edit),
    -4 (anchored, MultiDiffusion), -6 (pairs), -20 (24 frames)."""
    models = evaluate.load_models(a.model)
    pairs = list(evaluate.read_pairs(a.pairs or a.out / "world" / "pairs.csv").values())[:4]
    cases = []
    for i, files in enumerate(tqdm(pairs, "reading", leave=False, disable=None)):
        files = evaluate.Files(files.driving, files.source)
        cases.append(evaluate.read_case(files, models, 24, [a.seed, i]))

    def sampled(case, M=24, scene=None, **settings):
        settings, points = evaluate.sampling(a, **settings), case.landmarks[:M]
        return evaluate.sample_images(models, case.source, points, settings, scene=scene)

    results = [sampled(case) for case in tqdm(cases, "sampling", leave=False, disable=None)]
    first, result, eight = cases[0], results[0], np.linspace(0, 23, 8).astype(int)
    with torch.no_grad():
        text = sample.make_scene(models, None, PROMPT, None)
        edited = sample.make_scene(models, first.source, None, EDIT)

    driven = [None, *first.driving[eight]]
    reenacted = [first.source, *result[eight]]
    of_text = [None, *sampled(first, scene=text)[eight]]
    of_edit = [first.source, *sampled(first, scene=edited)[eight]]
    caption = f'driving frames; reenactment; the text "{PROMPT}"; the edit "{EDIT}"'
    write_figure(a, 1, caption, [driven, reenacted, of_text, of_edit])

    driven = [first.source, *first.driving[:12]]
    made = [[None, *sampled(first, 12, method=m)] for m in ("anchored", "multidiffusion")]
    write_figure(a, 4, "driving frames; anchored; MultiDiffusion", [driven, *made])

    rows = []
    for case, made in zip(cases, results):
        rows += [None, *case.driving[eight]], [case.source, *made[eight]]
    write_figure(a, 6, "driving frames above results", rows)

    begin = [None, *first.driving[:12]], [first.source, *result[:12]]
    end = [None, *first.driving[12:]], [None, *result[12:]]
    write_figure(a, 20, "24 frames: driving above results", [*begin, *end])


def write_figure(a, number, caption, rows):
    """OUT/figure-NUMBER.png, and its .json for the report."""
    name = f"figure-{number}"
    Image.fromarray(picture_grid(rows)).save(a.out / f"{name}.png")
    evaluate.write_result(a, name, f"**Figure {number}**: {caption}.", f"{name}.png")
    print(a.out / f"{name}.png")


# --------------------------------------------------------------------------------------------------
# Everything, and the page of all results


def report(a):
    """OUT/report.md: every result that is there, in the paper's order."""
    tables = [p.stem for k in ("same", "cross") for p in sorted(a.out.glob(f"{k}*.json"))]
    pictures = [f"figure-{n}" for n in (1, 4, 6, 20)]
    order = [*tables, "length", "length-8", "long", "ablation", "scenes", "guidance", *pictures]
    paths = [path for name in order if (path := a.out / f"{name}.json").exists()]
    found = [data.read_json(path, ["name", "markdown", "picture", "model"]) for path in paths]
    if not found:
        raise UserError(f"nothing is in {a.out} yet; run the other commands first")

    models = ", ".join(sorted({r["model"][:16] for r in found if r["model"]}))
    parts = ["# Evaluation", f"Models, by sha256: {models}."]
    for r in found:
        picture = f"\n\n![{r['name']}]({r['picture']})" if r["picture"] else ""
        parts.append(r["markdown"] + picture)
    data.write_text(a.out / "report.md", "\n\n".join(parts) + "\n")
    print(a.out / "report.md")


def run_all(a):
    """The whole evaluation on the demo's world: its parts, each a command, two at a time on a CPU,
    where two processes of one thread are faster than one of two."""
    scripts, lanes = Path(__file__).parents[1], 1 if torch.cuda.is_available() else 2
    children = []
    render_world(a, more=True)

    root, cache = a.out / "world", a.out / "cache" / "faces"
    names = "out model weights frames steps guidance seed size prediction".split()
    given = [x for name in names for x in (f"--{name}", getattr(a, name))]
    given += ["--train-steps", a.train_steps]

    def run(script, *arguments):
        command = list(map(str, [sys.executable, scripts / script, *arguments]))
        env = os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // lanes)))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        child = subprocess.Popen(command, env=env, **pipes)
        children.append(child)
        out, err = child.communicate()
        said = [line for line in err.splitlines() if "left out:" in line or "error:" in line]
        if child.returncode:
            said = said or err.splitlines()[-3:]  # of a traceback
            a.left_out.append(f"{arguments[0]}: exit code {child.returncode}")
        tqdm.write("\n".join([out.strip(), *said]))

    def run_guidance():
        if not (cache / "index.json").exists():
            config, size = models.sdit.config, models.size
            clip = data.find_weights(config.clip, config.clip_sha256, a.model)
            vae = data.find_weights(config.autoencoder, config.autoencoder_sha256, a.model)
            weights = "--autoencoder", vae, "--clip", clip, "--size", size
            run("data.py", root / "faces", "--out", cache, *weights)
        run("evaluate.py", "guidance", "--data", cache, *given)

    def run_part(command, *arguments):
        run("evaluate.py", command, *given, *arguments)

    models, _ = evaluate.load_models(a.model), evaluate.attribute_nets(a)  # which all parts share
    parts = [[run_guidance], [run_part, "length", "--n", min(a.n, 24)], [run_part, "long"]]
    parts += [[run_part, "ablation", "--n", min(a.n, 16)], [run_part, "same", "--n", a.n]]
    parts += [[run_part, "cross", "--n", a.n], [run_part, "figures"]]
    parts += [[run_part, "scenes", "--clips", root]]  # drivers, and the truth: as many others
    with ending(ThreadPoolExecutor(lanes), children) as pool:  # the longest first
        tasks = [pool.submit(*part) for part in parts]
        for task in tqdm(as_completed(tasks), "parts", len(tasks), unit="part", disable=None):
            task.result()
    report(a)


COMMANDS = dict(
    world=render_world,
    pairs=random_pairs,
    long=long,
    ablation=ablation,
    scenes=scenes,
    guidance=guidance,
    figures=figures,
    report=report,
    all=run_all,
)
