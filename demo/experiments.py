"""Test sets, and the paper's experiments on the demo's world: `python evaluate.py COMMAND`.

world      OUT/world: clips of rendered people, pictures, true reenactments, and pairs.csv
pairs      OUT/pairs.csv: random pairs of one's own clips and pictures
ablation   how frames are dealt to rows, which frame is the anchor, how many steps
scenes     Table 2 and Fig. 14: scene recognition
guidance   Fig. 7: impact of the guidance signals, on small denoisers that are trained for it
figures    Figs. 1, 4, 6 and 20: pictures
report     OUT/report.md: every result that is there
all        all of these, and evaluate.py's own, on the demo's world
"""

import argparse
import csv
import functools
import subprocess
import sys
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
# Test sets


def render_world(a, many=0):
    """OUT/world: `--n` clips of rendered people, each with a picture of somebody else and the true
    reenactment of it; and `many` clips of other people, for the heads and denoisers below."""
    try:
        import world
    except ModuleNotFoundError as e:
        cure = "pip install -r demo/requirements.txt"
        raise UserError(f"rendering people needs {e.name}: {cure}") from None

    root, lines = a.out / "world", []
    for folder in ("clips", "pictures", "truth", "many"):
        (root / folder).mkdir(parents=True, exist_ok=True)

    for i in tqdm(range(a.n), "rendering", unit="pair", disable=None):
        rng = np.random.default_rng([2_000_000, i])  # unseen in training
        driver, person = world.sample_face(rng), world.sample_face(rng)
        motion, still = world.sample_motion(rng, 48), world.sample_motion(rng, 1)
        picture, clip, out = f"pictures/{i:04d}.png", f"clips/{i:04d}.mp4", f"out/{i:04d}.mp4"
        lines.append(dict(source=picture, driving=clip, out=out))

        truth = root / "truth" / f"{i:04d}.mp4"
        if not truth.exists():  # it is written last
            Image.fromarray(world.render_clip(person, still, PIXELS)[0]).save(root / picture)
            write_video(root / clip, world.render_clip(driver, motion, PIXELS))
            write_video(truth, world.render_clip(person, motion, PIXELS))

    for i in tqdm(range(many), "rendering", unit="clip", disable=None):
        path = root / "many" / f"{i:04d}.mp4"
        if not path.exists():
            write_video(path, world.sample_clip([2_500_000, i], 64)[0])
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
    print(f"{path}: {len(lines)} pairs")


def random_pairs(a):
    """pairs.csv of N random clips with as many random pictures, for `cross` and sample.py."""
    if len(a.folders) != 2:
        raise UserError("name two folders: python evaluate.py pairs CLIPS PICTURES")
    clips = data.list_files(a.folders[0], data.VIDEOS)
    pictures = data.list_files(a.folders[1], data.PICTURES)
    if not clips or not pictures:
        what, folder = ("pictures", a.folders[1]) if clips else ("videos", a.folders[0])
        raise UserError(f"no {what} in {folder}")

    rng, lines = np.random.default_rng(a.seed), []
    for i, j in enumerate(rng.permutation(len(clips))[: a.n]):
        picture = pictures[rng.integers(len(pictures))].resolve()
        out = f"out/{i:05d}-{clips[j].stem}.mp4"
        lines.append(dict(source=picture, driving=clips[j].resolve(), out=out))
    write_pairs(a.out / "pairs.csv", lines)


# --------------------------------------------------------------------------------------------------
# Not in the paper: how frames are dealt to rows, which frame is the anchor, how many steps


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
    variants = {f"dealt {how}": (how, None, a.steps) for how in ("strided", "random", "contiguous")}
    variants["anchor central"] = "strided", (M - 1) // 2, a.steps
    variants["anchor first"] = "strided", 0, a.steps
    variants |= {f"{steps} steps": ("strided", None, steps) for steps in (50, 100)}

    found = {}
    for name, (how, anchor, steps) in variants.items():

        def plan(number):
            return deal_frames(M, T, how, anchor, a.seed + number)

        title = f"ablation, {name}"
        found[name] = evaluate.measure_videos(a, title, files, M, plan=plan, steps=steps)

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
            name, gaps = f"{name} (as planned, {a.steps} steps)", ["", ""]
        rows.append([name, count, *row, *gaps])

    gaps = [f"{metric} minus the first line's" for metric in list(digits)[:2]]
    note = f"{base.shape[1]} self-reenactments of {M} frames; differences video by video."
    header = ["", "rows", *digits, *gaps]
    evaluate.write_table(a, "ablation", "Dealing, anchor, steps", header, rows, [note])


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


def train_denoiser(rows, signals, steps, seed, size="demo", prediction="epsilon", batch=16):
    """A denoiser of single frames with some of the conditions; the seed alone decides its start,
    data and noise."""
    torch.manual_seed(seed)
    model, schedule = train.build_model(rows, size, 1, prediction), NoiseSchedule()
    optimizer = train.build_optimizer(model, 1e-3, 1e-4, 0.01)
    rule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=sdit.has_bf16("cpu"))

    sampler = [range(n * batch, (n + 1) * batch) for n in range(steps)]
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler)
    title = "training with " + (" + ".join(signals) or "none")
    for step, one in enumerate(tqdm(loader, title, unit="step", leave=False, disable=None)):
        t, noise, _ = train.sample_noise(seed, step, one["latents"].shape, 0)
        drop = torch.zeros(batch, dtype=torch.bool)
        one = keep_signals(one, signals)
        with precision:
            error, bound = train.diffusion_loss(model, schedule, one, t, noise, drop)
        optimizer.zero_grad()
        (error + bound).mean().backward()
        optimizer.step()
        rule.step()
    return model.eval()


@torch.no_grad()
def denoising_errors(model, rows, signals, times, seed, n=64):
    """Mean squared error of the noise (n, len(times)) on n held-out frames; every model gets the
    same noise."""
    one, schedule = torch.utils.data.default_collate([rows[i] for i in range(n)]), NoiseSchedule()
    one = keep_signals(one, signals) | dict(mask=torch.zeros_like(one["mask"]))
    drop, errors = torch.zeros(n, dtype=torch.bool), []
    for time in times:
        generator = torch.Generator().manual_seed(seed + time)
        noise, t = torch.randn(one["latents"].shape, generator=generator), torch.full((n,), time)
        errors.append(train.diffusion_loss(model, schedule, one, t, noise, drop)[0].numpy())
    return np.stack(errors, 1)


def guidance(a, size="demo", prediction="epsilon"):
    """Fig. 7: the error of four denoisers, trained alike on cached frames (--data), over timesteps
    against that of the unconditional one."""
    rows = data.Rows(a.data, 1, a.seed)
    unseen = data.Rows(a.data, 1, a.seed, held_out=True)
    times = list(range(25, NoiseSchedule.steps, 50))

    def measure(number, name):
        signals, n = SIGNALS[name], min(256, 8 * len(unseen))
        model = train_denoiser(rows, signals, a.train_steps, a.seed, size, prediction)
        return dict(errors=denoising_errors(model, unseen, signals, times, a.seed, n))

    index = data.sha256(a.data / "index.json")
    key = ["guidance", a.data, index, a.seed, a.train_steps, size, prediction]
    found = evaluate.measure_all(a, key, dict.fromkeys(SIGNALS, ()), measure)
    if "none" not in found:
        raise UserError("the unguided denoiser could not be trained; the reason is above")
    errors = {name: values["errors"].mean(0) for name, values in found.items()}
    ratios = {k: error / errors["none"] for k, error in errors.items() if k != "none"}

    lines = {k: [ratio] for k, ratio in ratios.items()}
    labels = dict(xlabel="timestep", ylabel="error / error of the unguided")
    figure = evaluate.plot(times, lines, **labels)
    quarters = np.array_split(np.arange(len(times)), 4)
    table = [[k, *(f"{ratio[q].mean():.3f}" for q in quarters)] for k, ratio in ratios.items()]
    header = ["", *(f"t = {times[q[0]]} to {times[q[-1]]}" for q in quarters)]
    title = "Impact of the guidance signals (Fig. 7): error / error of the unguided denoiser"
    note = (
        "The paper: landmarks help most at large t, both together are best, gains are largest in "
        "the middle."
    )
    details = dict(with_model=False, errors={k: error.tolist() for k, error in errors.items()})
    evaluate.write_table(a, "guidance", title, header, table, [note], figure, **details)


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
    order = [*tables, "length", "ablation", "scenes", "guidance", *pictures]
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


def cache_frames(clips, cache):
    """A cache of the clips for `guidance`, as data.py makes it."""
    script = Path(__file__).parents[1] / "data.py"
    if not (cache / "index.json").exists():
        if subprocess.run([sys.executable, script, clips, "--out", cache]).returncode:
            raise UserError("the clips for Fig. 7 could not be cached; the reason is above")


def run_all(a):
    """The whole evaluation on the demo's world, part by part."""

    def run(command, **changes):
        part = argparse.Namespace(**vars(a) | changes | dict(left_out=[]))
        command(part)
        a.left_out += part.left_out

    run(functools.partial(render_world, many=256), n=max(a.n, 50))
    for same in (True, False):
        run(functools.partial(evaluate.table1, same=same))
    run(evaluate.length)
    run(ablation, n=min(a.n, 30))

    many, cache = a.out / "world" / "many", a.out / "cache" / "frames"
    run(scenes, n=256, clips=many)
    cache_frames(many, cache)
    run(guidance, data=cache, n=256, clips=many)
    run(figures)
    run(report)


COMMANDS = dict(
    world=render_world,
    pairs=random_pairs,
    ablation=ablation,
    scenes=scenes,
    guidance=guidance,
    figures=figures,
    report=report,
    all=run_all,
)
