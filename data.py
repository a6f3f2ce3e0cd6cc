"""Clips and pictures -> face crops, landmarks, scene vectors -> cached records -> training rows.

    python data.py CLIPS --out cache                 # with the demo's autoencoder and CLIP
    python data.py CLIPS --out cache --autoencoder A.safetensors --clip C.safetensors --size 256

`sample.py` prepares a driving video and a source picture with the same functions.
"""

import argparse
import contextvars
import ctypes
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import filelock
import huggingface_hub
import numpy as np
import safetensors
import torch
from av.stream import Disposition
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin
from tqdm import tqdm

import sdit
from sdit import LANDMARK_COMPONENTS, LANDMARKS, UserError

DEMO = Path(__file__).resolve().parent / "demo"
REAL_FACES = "--autoencoder sd-vae-ft-mse --clip ViT-L-14"  # the demo's know rendered ones only

# --------------------------------------------------------------------------------------------------
# What a training row is


def choose_frames(rng, found, T):
    """(T increasing frame numbers, source frame) of a clip; found (M,) bool: landmarks are real.

    Paper 3.1: a non-uniform sequence, and as source the end of the clip furthest from it. Paper
    silent on the distribution: uniform without replacement. Neither end is a target."""
    inner = np.flatnonzero(found[1:-1]) + 1
    if len(inner) < T:  # interpolated landmarks must do
        inner = np.arange(1, len(found) - 1)

    times = np.sort(rng.choice(inner, T, replace=False))
    last = len(found) - 1
    before, after = times[0], last - times[-1]
    return times, 0 if before >= after else last


HELD_OUT = 8  # last clips of a cache, for train.py's previews


class Rows(torch.utils.data.Dataset):
    """Rows of a cache, or of several "FOLDER:SHARE", sampled in these shares: latents (T, C, H, W),
    landmarks (T, 478, 3), mask (T, H, W) in 0..1, scene (S,), float32. Row n depends on (seed, n)
    alone. `held_out`: the last clips; below 80 clips, training sees them too."""

    def __init__(self, caches, frames, seed=0, held_out=False):
        self.frames, self.seed, self.held_out = frames, seed, held_out
        caches = [caches] if isinstance(caches, str | Path) else caches
        self.folders, shares = zip(*map(split_share, caches))
        self.shares = np.array(shares) / sum(shares)

        indices = [read_index(folder, frames) for folder in self.folders]
        self.about, self.folder = indices[0], self.folders[0]
        for folder, index in zip(self.folders, indices):
            settings = {k: v for k, v in index.items() if k not in ("clips", "size")}
            both = f"{folder} and {self.folder} were made with"
            must_agree(settings, self.about, both, "caches that are mixed must agree")

        # Arrays, which worker processes share
        names, lengths = zip(*[zip(*index["clips"]) for index in indices])
        self.names, self.lengths = list(map(np.array, names)), list(map(np.array, lengths))
        self.ranges = []
        for clips in map(range, map(len, names)):
            seen = clips[:-HELD_OUT] if len(clips) >= 10 * HELD_OUT else clips
            self.ranges.append(clips[-HELD_OUT:] if held_out else seen)

    def __len__(self):
        """Clips. (Row numbers have no end.)"""
        return sum(map(len, self.ranges))

    def __getitem__(self, n):
        clip = self._clip(n)
        found = clip.get_tensor("found").numpy()
        times, source = choose_frames(np.random.default_rng([self.seed, 1, n]), found, self.frames)
        names = "latent", "landmarks", "weight"  # the last: 255 where lips and eyes are
        latents, landmarks, mask = (clip.get_tensor(k)[times].float() for k in names)
        scene = clip.get_tensor("scene")[0 if source == 0 else 1].float()  # (2, S): of both ends
        return dict(latents=latents, landmarks=landmarks, mask=mask / 255, scene=scene)

    def _clip(self, n):
        """The record of row n, which draws its cache by share. The N clips of a cache are permuted
        anew every N rows, counted over all caches, and row n takes place n % N: an epoch of several
        caches shows only a share of each one's clips. A clip that is too short gives way to the
        next."""
        rng = np.random.default_rng([self.seed, 2, n])
        cache = rng.choice(len(self.shares), p=self.shares)
        clips = self.ranges[cache]
        epoch, i = divmod(n, len(clips))
        order = range(len(clips))
        if not self.held_out:
            order = shuffle(self.seed, epoch, len(clips))
        for k in range(len(clips)):
            clip = clips[order[(i + k) % len(clips)]]
            if self.lengths[cache][clip] >= self.frames + 2:
                return self._open(cache, clip)
        raise too_short(self.folders[cache], self.frames)

    def _open(self, cache, clip):
        """A record, memory-mapped."""
        path = self.folders[cache] / str(self.names[cache][clip])
        try:
            return sdit.open_tensors(path)
        except (OSError, safetensors.SafetensorError) as e:
            again = f"remove {path.parent / 'index.json'} and give the data.py command again"
            raise UserError(f"{path} is gone or torn ({e}); {again}")

    def statistics(self, clips=2000):
        """The buffers that `sdit.Mapping` normalises by, from evenly spaced clips: landmark_basis
        (1434, LANDMARK_COMPONENTS) holds principal components of standardised landmarks, scaled to
        unit variance, or to 0 where theirs is jitter alone; scene_gain gives scenes the total
        variance of the whitened landmarks."""
        points, scenes = [], []
        for cache, (share, there) in enumerate(zip(self.shares, self.ranges)):
            count = min(math.ceil(clips * share), len(there))
            for i in np.linspace(0, len(there) - 1, count).astype(int):
                clip = self._open(cache, there[i])
                landmarks = clip.get_tensor("landmarks").flatten(1)  # (frames, 1434)
                points.append(landmarks[:: max(4, len(landmarks) // 64)])
                scenes.append(clip.get_tensor("scene").float())  # (2, S)

        points = torch.cat(points).double()  # (frames, 1434); float32 mixes axes of like variance
        mean, deviation = points.mean(0), points.std(0, correction=0).clamp_min(1e-3)
        scaled = (points - mean) / deviation
        variance, axes = torch.linalg.eigh(scaled.T @ scaled / len(scaled))  # ascending
        variance = variance[-LANDMARK_COMPONENTS:].flip(0)
        axes = axes[:, -LANDMARK_COMPONENTS:].flip(1)
        gain = variance.clamp_min(1e-3).rsqrt() * (variance > 1e-3)  # below: MediaPipe's jitter

        scenes = torch.cat(scenes)  # (2 * clips, S)
        scene_mean = scenes.mean(0)
        scene_variance = (scenes - scene_mean).square().sum(1).mean().clamp_min(1e-2)
        return dict(
            landmark_mean=mean.view(LANDMARKS, 3).float(),
            landmark_basis=(axes * gain / deviation[:, None]).float(),
            scene_mean=scene_mean,  # (S,)
            scene_gain=(LANDMARK_COMPONENTS / scene_variance).sqrt(),
        )


@functools.lru_cache(8)
def shuffle(seed, epoch, count):
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def split_share(text):
    """ "FOLDER:SHARE" or "FOLDER" -> (folder, share)."""
    folder, _, share = str(text).rpartition(":")
    try:
        share = float(share if folder else 1)
    except ValueError:  # the colon belongs to the name
        return Path(text), 1.0
    if not 0 < share < math.inf:
        raise UserError(f"{text} is not CACHE or CACHE:SHARE with a positive share: cache:0.9")
    return Path(folder or text), share


def too_short(folder, frames):
    return UserError(f"no clip in {folder} has {frames + 2} frames; cache longer clips")


def must_agree(ours, theirs, before, after):
    """UserError that names the settings that differ. A file with a sha256 may have any name."""
    differ = [k for k, v in ours.items() if theirs.get(k) != v and f"{k}_sha256" not in ours]
    if other := [k.removesuffix("_sha256") for k in differ]:
        raise UserError(f"{before} another {' and '.join(other)}; {after}")


# What a model must know of the cache that it is trained on
SETTINGS = "latent_channels", "latent_size", "scene_width"
SETTINGS += "autoencoder", "autoencoder_sha256", "clip", "clip_sha256"


def read_index(folder, frames):
    """The index of a cache that has rows of `frames` frames."""
    path = folder / "index.json"
    if not path.is_file():
        if any(folder.glob("clip-*")):
            raise UserError(f"{folder} is unfinished: give the data.py command that began it again")
        cure = f"make one: python data.py CLIPS --out {folder}, for real faces with {REAL_FACES}"
        raise UserError(f"no cache in {folder} (no index.json); {cure}")

    index = read_json(path, ["clips", *SETTINGS])
    try:
        usable = sum(length >= frames + 2 for _, length in index["clips"])
    except (TypeError, ValueError):  # mended by hand
        raise UserError(f"{path} is torn; remove it and give the data.py command again")
    if not usable:
        raise too_short(folder, frames)
    return index


# --------------------------------------------------------------------------------------------------
# Faces

FACE_WIDTH, FACE_HEIGHT = 0.45, 0.53  # mean mesh box in the paper's crops (paper B, Fig. 13)
# The 82 expressive points of MediaPipe's mesh (paper 4.1: "around the mouth and eyes")
# fmt: off
LIPS = [0, 13, 14, 17, 37, 39, 40, 61, 78, 80, 81, 82, 84, 87, 88, 91, 95, 146, 178, 181, 185, 191,
        267, 269, 270, 291, 308, 310, 311, 312, 314, 317, 318, 321, 324, 375, 402, 405, 409, 415]
RIGHT_EYE = [7, 33, 133, 144, 145, 153, 154, 155, 157, 158, 159, 160, 161, 163, 173, 246]
LEFT_EYE = [249, 263, 362, 373, 374, 380, 381, 382, 384, 385, 386, 387, 388, 390, 398, 466]
# fmt: on
IRISES = list(range(468, 478))
EXPRESSIVE = LIPS + RIGHT_EYE + LEFT_EYE + IRISES

MEDIAPIPE = threading.RLock()  # neither MediaPipe nor the redirection of stderr is thread-safe


@contextmanager
def quiet():
    """Alone with MediaPipe, whose C++ remarks on stderr are silenced."""
    with MEDIAPIPE, ExitStack() as stack:
        with suppress(OSError):  # there is no stderr
            saved = os.dup(2)
            stack.callback(os.close, saved)
            if sys.stderr:
                sys.stderr.flush()
            os.dup2(NULL, 2)
            stack.callback(os.dup2, saved, 2)
        yield


class FaceLandmarker:
    """MediaPipe in image mode, where order and gaps in time do not matter: the full-range detector
    finds faces, the mesh looks at a square around each."""

    name = "mediapipe 0.10.21 face_mesh refine_landmarks"

    def __init__(self):
        self.process = os.getpid()
        with quiet():
            from mediapipe.python.solutions import face_detection, face_mesh

            self.detector = face_detection.FaceDetection(model_selection=1)
            self.mesh = face_mesh.FaceMesh(static_image_mode=True, refine_landmarks=True)
            for network in (self.detector, self.mesh):
                network.process(np.zeros((64, 64, 3), np.uint8))

    def run(self, network, image):
        if self.process != os.getpid():
            raise UserError("MediaPipe does not survive a fork: load the models in the child")
        with quiet():
            return network.process(image)

    def faces(self, image):
        """Squares (x, y, side) in pixels around the faces of image (h, w, 3), the largest first."""
        h, w = image.shape[:2]
        squares = []
        for d in self.run(self.detector, resize_to(image, 720)).detections or ():
            box = d.location_data.relative_bounding_box
            side = 2 * max(box.width * w, box.height * h)
            x = (box.xmin + box.width / 2) * w - side / 2
            y = (box.ymin + box.height / 2) * h - side / 2
            squares.append((round(x), round(y), round(side)))
        return sorted((s for s in squares if s[2] > 8), key=lambda s: -s[2])

    def landmarks(self, image, square=None):
        """(478, 3) float32, in pixels of the image, of the face in `square`, or None."""
        x, y = square[:2] if square else (0, 0)
        picture = crop(image, square) if square else image
        found = self.run(self.mesh, picture).multi_face_landmarks
        if not found:
            return None
        h, w = picture.shape[:2]
        points = [(x + p.x * w, y + p.y * h, p.z * w) for p in found[0].landmark]
        return np.array(points, np.float32)

    def everyone(self, image):
        """Yield the landmarks of every face of `image`, the largest first."""
        squares = self.faces(image)
        if not squares:
            # A face that fills the picture escapes the detector. The mesh sees faces in other
            # things too, so it must find the face again in its own square.
            whole = self.landmarks(image)
            squares = [] if whole is None else [face_square(whole[None])]

        seen = []
        for square in squares:
            points = self.landmarks(image, square)
            if points is None:
                continue
            box = mesh_box(points)
            if all(overlap(box, other) < 0.5 for other in seen):
                seen.append(box)
                yield points

    def __call__(self, image, near=None):
        """Landmarks of the largest face, or of the one that overlaps most with the landmarks `near`
        of an earlier frame; None without one."""
        faces = self.everyone(image)
        if near is None:
            return next(faces, None)

        def closeness(points):
            return overlap(mesh_box(points), mesh_box(near))

        return max((p for p in faces if closeness(p) > 0.1), key=closeness, default=None)


def mesh_box(points):
    """[x0, y0, x1, y1] around landmarks (478, 3), without the irises."""
    return [*points[:468, :2].min(0).tolist(), *points[:468, :2].max(0).tolist()]


def overlap(a, b):
    """Intersection over union of boxes (x0, y0, x1, y1)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return both / max(areas - both, 1e-9)


def face_square(points):
    """The square (x, y, side), whole pixels, of a clip with landmarks (M, 478, 3): the median face
    at its centre, FACE_WIDTH wide or FACE_HEIGHT high in it. The head moves inside it."""
    low, high = points[:, :468, :2].min(1), points[:, :468, :2].max(1)  # (M, 2)
    side = max(np.median(high - low, 0) / (FACE_WIDTH, FACE_HEIGHT))
    x, y = np.median((low + high) / 2, 0) - side / 2
    return round(x), round(y), max(round(side), 8)


TOO_LARGE = "the face is too large: more than a tenth of its square would be mirrored"


def keep_inside(square, shape):
    """The square, shifted so that at most a tenth of its side leaves the picture at any edge;
    None where that cannot be."""
    (x, y, side), (h, w) = square, shape[:2]
    margin = side // 10
    if side - 2 * margin > min(h, w):
        return None
    x = min(max(x, -margin), w - side + margin)
    y = min(max(y, -margin), h - side + margin)
    return x, y, side


def mirrored(square, shape):
    """Fraction of the square's side outside the picture, at the worst edge."""
    (x, y, side), (h, w) = square, shape[:2]
    return round(max(0, -x, -y, x + side - w, y + side - h) / side, 3)


def crop(image, square, size=None):
    """Cut the square (x, y, side) out of image (h, w, 3), mirrored outside; resized to `size`."""
    (x, y, side), (h, w) = square, image.shape[:2]
    left, top = max(-x, 0), max(-y, 0)
    right, bottom = max(x + side - w, 0), max(y + side - h, 0)
    if left or top or right or bottom:
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REFLECT_101)
    image = image[y + top : y + top + side, x + left : x + left + side]
    return np.ascontiguousarray(resize(image, size) if size else image)


def resize(image, size):
    """A square picture (h, h, 3) at another size: averaged when it shrinks, else bicubic."""
    how = cv2.INTER_AREA if len(image) > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=how)


def resize_to(image, longest):
    """A picture with its longer side at most `longest`."""
    scale = min(1, longest / max(image.shape[:2]))
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


@dataclass
class Track:
    """The face of a clip."""

    landmarks: np.ndarray  # (M, 478, 3) float32, x and y 0..1 across the crop, z in the same unit
    found: np.ndarray  # (M,) bool; elsewhere they are interpolated
    square: tuple  # (x, y, side) in pixels
    faces: int = 1  # in the first frame with one


def no_face(name):
    return UserError(f"no face found in {name}; use one with a clear face of 100 pixels or more")


def pick_face(faces, number, name):
    """Face `number` of a list, from 0, the largest."""
    if not 0 <= number < len(faces):
        there = f"its first frame has {len(faces)}, from 0"
        raise UserError(f"no face number {number} in {name}: {there}")
    return faces[number]


def track(frames, landmarker, name, total=None, number=0):
    """The Track of face `number` (0: the largest) of the first frame with a face, followed through
    `frames` (h, w, 3) uint8. After 24 frames without it, the largest face is followed."""
    points, last, lost, faces = [], None, 0, []
    missing = np.full((LANDMARKS, 3), np.nan, np.float32)
    for image in progress(frames, "landmarks", "frame", total, total is None):
        if last is None:
            faces = list(landmarker.everyone(image))
            here = pick_face(faces, number, name) if faces else None
        else:
            here = landmarker(image, last if lost < 24 else None)

        if here is None:
            here, lost = missing, lost + 1
        else:
            last, lost = here, 0
        points.append(here)

    if last is None:
        raise no_face(name)
    return in_square(np.stack(points), len(faces))


def in_square(points, faces=1):
    """The Track of landmarks (M, 478, 3) in pixels of the frames, NaN where not found."""
    found = ~np.isnan(points[:, 0, 0])
    square = face_square(points[found])
    landmarks = (points - np.float32((*square[:2], 0))) / np.float32(square[2])

    known, missing = np.flatnonzero(found), np.flatnonzero(~found)
    for column in landmarks.reshape(len(found), -1).T:  # a view, filled in place
        column[missing] = np.interp(missing, known, column[known])
    return Track(landmarks, found, square, faces)


def expressive_mask(landmarks, size):
    """(size, size) uint8: how much of each cell of the crop is lips or eyes, 255 for all. Paper
    silent on how: hulls are filled at 256 x 256 and averaged."""
    canvas = np.zeros((256, 256), np.uint8)
    for part in (LIPS, RIGHT_EYE + IRISES[:5], LEFT_EYE + IRISES[5:]):
        hull = cv2.convexHull(np.float32(landmarks[part, :2] * 256 - 0.5))
        cv2.fillConvexPoly(canvas, np.int32(np.round(hull * 16)), 255, shift=4)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def to_tensor(images):
    """uint8 (..., h, w, 3) -> float32 (..., 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3).float() / 127.5 - 1


def to_images(tensor):
    """float (..., 3, h, w) in [-1, 1] -> uint8 (..., h, w, 3)."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.movedim(-3, -1).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Frozen models


def send(x, device):
    """x on the device. To a GPU it goes from pinned memory, so that the host need not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def get_device(name=None):
    """torch.device of "cpu", "cuda", "cuda:1" ...; None: a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"no device {name} here ({reason}); give cpu, cuda or cuda:1")


def sha256(path):
    """Hex digest of a file."""
    return read_sha256(path, changed(Path(path)))


@functools.cache
def read_sha256(path, _):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


HOME = os.path.expanduser("~")  # still "~" for a user without an entry in passwd
DOWNLOADS = Path(tempfile.gettempdir() if HOME == "~" else HOME) / ".cache" / "anchored-diffusion"
VAE, CLIP = "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors"
# Third-party weights by name: repository, file and revision at huggingface.co, and sha256 if known
WEIGHTS = {
    "sd-vae-ft-mse": (
        "stabilityai/sd-vae-ft-mse",
        VAE,
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "sd-vae-ft-ema": (
        "stabilityai/sd-vae-ft-ema",
        VAE,
        "f04b2c4b98319346dad8c65879f680b1997b204a",
        None,
    ),
    "ViT-L-14": ("timm/vit_large_patch14_clip_224.openai", CLIP, "main", None),
}


def fetch(name):
    """Path of weights given as a file, or as a name of WEIGHTS, which is downloaded once."""
    if str(name) not in WEIGHTS:
        if Path(name).is_file():
            return Path(name)
        known = ", ".join(WEIGHTS)
        raise UserError(f"no such file: {name} (and no name of weights; those are {known})")

    path = DOWNLOADS / f"{name}.safetensors"
    if path.is_file():
        return path
    repository, file, revision, digest = WEIGHTS[str(name)]
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    huggingface_hub.logging.set_verbosity_error()  # of its retries
    try:
        got = Path(huggingface_hub.hf_hub_download(repository, file, revision=revision)).resolve()
        if digest and sha256(got) != digest:
            raise OSError(f"{got} has another sha256 than {digest}")
        safetensors.safe_open(got, "pt")
        with sdit.atomic(path) as temporary:
            temporary.symlink_to(got)
        return path
    except Exception as e:  # the hub has a dozen kinds
        reason = str(e).partition("\n")[0]
        cure = f"fetch {file} of https://huggingface.co/{repository} by hand and put it at {path}"
        raise UserError(f"cannot download {name} ({reason}); {cure}")


def find_weights(name, digest, beside):
    """Path of the file `name` with the sha256 `digest`: beside the model file `beside`, in the
    download folder, or the demo's; or by named download."""
    for folder in (Path(beside).parent, DOWNLOADS, DEMO):
        path = folder / name
        if path.is_file() and sha256(path) == digest:
            return path

    known = name.removesuffix(".safetensors")
    if known in WEIGHTS and sha256(fetch(known)) == digest:
        return fetch(known)
    missing = f"{name} (sha256 {digest[:12]}...), which is neither beside it nor in {DOWNLOADS}"
    raise UserError(f"{beside} was made with {missing}; put that file there")


OPENAI_VIT_L14 = "ViT-L-14-quickgelu"  # open_clip's plain ViT-L-14 has another GELU than OpenAI's
# What a CLIP file may configure; open_clip would take more, and download what it names
CLIP_KEYS = dict(
    embed_dim=1,
    quick_gelu=True,
    vision_cfg=dict(image_size=1, layers=1, width=1, patch_size=1, head_width=1, mlp_ratio=1.0),
    text_cfg=dict(context_length=1, vocab_size=1, width=1, heads=1, layers=1),
)


def is_clip_config(config):
    """Whether a file's configuration is one of open_clip's, with a vision transformer or ResNet."""
    vision, known = config.get("vision_cfg"), CLIP_KEYS
    if isinstance(vision, dict) and isinstance(vision.get("layers"), list):  # of a ResNet
        known = known | dict(vision_cfg=known["vision_cfg"] | dict(layers=[1]))
        if len(vision["layers"]) != 4:
            return False
    return sdit.is_like(config, known)


class SceneEncoder:
    """The global signal (paper 3.1): a frozen CLIP, of pictures and texts. Its file has open_clip's
    configuration as metadata; without, it is taken for OpenAI's ViT-L/14."""

    def __init__(self, path, device="cpu"):
        import open_clip

        tensors, config = sdit.read_tensors(path)
        config = config or open_clip.get_model_config(OPENAI_VIT_L14)
        if not is_clip_config(config):
            raise UserError(f"{path} is not a CLIP file: it has no known open_clip configuration")
        model = sdit.build(lambda: open_clip.CLIP(**config), tensors, path)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
        self.size, self.device = config["vision_cfg"].get("image_size", 224), device

    def images(self, pixels):
        """(B, 3, h, w) in [-1, 1] -> (B, S)."""
        pixels = clip_pixels(pixels.to(self.device), self.size)
        return self.model.encode_image(pixels, normalize=True).float()

    def texts(self, sentences):
        """List of B strings -> (B, S)."""
        tokens = self.tokenizer(sentences).to(self.device)
        return self.model.encode_text(tokens, normalize=True).float()


def clip_pixels(pixels, size):
    """CLIP's input from pictures (B, 3, h, w) in [-1, 1]."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import InterpolationMode, functional

    if min(pixels.shape[-2:]) != size:
        pixels = functional.resize(pixels, size, InterpolationMode.BICUBIC).clamp(-1, 1)
    pixels = functional.center_crop((pixels + 1) / 2, size)
    return functional.normalize(pixels, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


# --------------------------------------------------------------------------------------------------
# What a run cost


def ranks():
    """(rank, world size, local rank), from torchrun's environment; (0, 1, 0) without it."""
    defaults = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    return tuple(int(os.environ.get(k, default)) for k, default in defaults.items())


def peak_memory(device="cpu"):
    """GiB: of the GPU's allocator, or of the process."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Stopwatch:
    """Seconds by part: `with watch("part"): ...`."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, part):
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def __str__(self):
        parts = ", ".join(f"{part} {s:.1f} s" for part, s in self.seconds.items())
        gpu = f", of the GPU {peak_memory('cuda'):.1f}" if torch.cuda.is_available() else ""
        return f"{parts}; peak memory {peak_memory():.1f} GiB{gpu}"


SHOW = contextvars.ContextVar("show", default=None)  # see `sample.reenact`


def progress(items, part, unit, total=None, hide=False):
    """A progress bar, which tells SHOW, too. Under torchrun one process shows it."""
    show = SHOW.get()
    hide = hide or ranks()[0] > 0 or None  # None: where stderr is no terminal
    bar = tqdm(items, part, total, unit=unit, leave=False, disable=hide)
    for done, item in enumerate(bar, 1):
        yield item
        if show:
            show(part, done, bar.total)


# --------------------------------------------------------------------------------------------------
# Videos and pictures as players show them

VIDEOS = set(".mp4 .mov .mkv .webm .avi .m4v .ts .mts .mpg .3gp .wmv .flv".split())
PICTURES = set(".jpg .jpeg .png .webp .bmp .tif .tiff .avif .heic".split())
with suppress(ImportError):  # optional
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()
# For other formats PIL would start programs: Ghostscript for PostScript
FORMATS = {"JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "HEIF"} & set(Image.OPEN)


def must_be_file(path):
    """UserError where there is nothing to read at a path."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if not Path(path).is_file():
        cure = "; download it first" if str(path).startswith(("http:", "https:")) else ""
        raise UserError(f"no such file: {path}{cure}")
    if not os.path.getsize(path):
        raise UserError(f"{path} is empty")


def open_video(path):
    """An open PyAV container with a video stream."""
    must_be_file(path)
    try:
        container = av.open(f"file:{path}", metadata_errors="replace")  # 12:30.mp4: no protocol
    except av.FFmpegError as e:
        reason = f"{path} is not a video that can be read ({e.strerror or e})"
        raise UserError(f"{reason}; re-encode it as H.264 .mp4")

    stream = video_stream(container)
    if not stream:
        container.close()
        raise UserError(f"{path} has no video stream, only sound, text or a cover")
    stream.thread_type = "AUTO"
    return container


def video_stream(container):
    """The default video stream, covers and thumbnails left out; None without one."""
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & covers]
    return default_stream([s for s in streams if s.frames != 1] or streams)


def default_stream(streams):
    """The one that players take, or None."""
    return max(streams, key=lambda s: s.disposition & Disposition.default, default=None)


def decode(container, path):
    """Yield the frames of the video stream. Broken packets before the first frame are skipped."""
    count = 0
    try:
        for packet in container.demux(video_stream(container)):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                if count:
                    raise
                continue
            for frame in frames:
                count += 1
                yield frame
    except av.FFmpegError as e:
        broken = f"cannot be decoded beyond frame {count} ({e.strerror})"
        raise UserError(f"{path} {broken}; re-encode it")
    if not count:
        raise UserError(f"{path} holds no frame that can be decoded; re-encode it")


# Code points of H.273: BT.709 (matrix, primaries and transfer), BT.2020's primaries, PQ, HLG
BT709, UNSPECIFIED, BT2020, PQ, HLG = 1, 2, 9, 16, 18


class Screen:
    """FFmpeg filters from decoded frames to pictures (h, w, 3) uint8 as players show them: upright,
    square pixels, BT.709 colours, all of the first one's size."""

    def __init__(self, stream):
        aspect = float(stream.sample_aspect_ratio or 1)
        self.aspect = aspect if 0.05 < aspect < 20 else 1  # a tag gone mad
        self.size, self.kind = None, None
        self.name = stream.container.name.removeprefix("file:")

    def __call__(self, frame):
        matrix = bytes(frame.side_data.get("DISPLAYMATRIX") or b"")
        colors = frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries
        kind = frame.width, frame.height, frame.format.name, *colors, matrix
        if kind != self.kind:  # a stream may change midway
            self.kind, self.graph = kind, self._graph(frame, matrix)
        self.graph.push(frame)
        return self.graph.pull().to_ndarray()

    def _graph(self, frame, rotation):
        w, h = frame.width, frame.height
        self.size = self.size or (round(w * self.aspect), h)

        wide = frame.color_primaries == BT2020 or frame.color_trc in (PQ, HLG)
        matrix = "auto"
        if frame.colorspace == UNSPECIFIED and (wide or h >= 720 or w >= 1280):
            matrix = "bt2020" if wide else "bt709"

        graph = av.filter.Graph()
        kind = f"video_size={w}x{h}:pix_fmt={frame.format.name}:time_base=1/25"
        chain = [
            graph.add("buffer", f"{kind}:colorspace={frame.colorspace}:range={frame.color_range}"),
            graph.add("scale", f"{self.size[0]}:{self.size[1]}:in_color_matrix={matrix}"),
        ]
        if wide:
            table = standard_range(frame.color_trc)
            chain += [graph.add("format", "gbrp16le"), graph.add("lut3d", file=table.name)]

        a, b, _, c, d = np.frombuffer(rotation, np.int32)[:5] if rotation else (1, 0, 0, 0, 1)
        transposed = abs(b) > abs(a)
        across, down = (c, b) if transposed else (a, d)
        turns = dict(transpose=transposed, hflip=across < 0, vflip=down < 0)
        chain += [graph.add(name) for name, needed in turns.items() if needed]

        chain += [graph.add("format", "rgb24"), graph.add("buffersink")]
        try:
            graph.link_nodes(*chain).configure()
        except av.FFmpegError as e:  # such as YCgCo
            reason = f"{self.name} has colours that cannot be shown ({e.strerror})"
            raise UserError(f"{reason}; re-encode it")
        return graph


@functools.cache
def standard_range(transfer, n=33):
    """A file for FFmpeg's lut3d, from BT.2020 with an HDR `transfer` to BT.709, white at 100 cd/m2:
    what zscale (not in PyAV) and tonemap=mobius:desat=0 do."""
    v = np.indices((n, n, n))[::-1].reshape(3, -1).T / (n - 1)  # (n**3, 3), red runs fastest
    if transfer == PQ:  # SMPTE ST 2084
        p = v ** (1 / 78.84375)
        light = 100 * (np.maximum(p - 0.8359375, 0) / (18.8515625 - 18.6875 * p)) ** 6.277394636
    elif transfer == HLG:  # ARIB STD-B67, on a display of 1000 cd/m2
        high = (np.exp((v - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = 10 * np.where(v <= 0.5, v * v / 3, high) ** 1.2
    else:
        light = v**2.4
    bt709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    light = light @ np.transpose(bt709)

    if transfer in (PQ, HLG):  # unchanged up to 0.3, above compressed so that 10 becomes 1
        top = light.max(1, keepdims=True).clip(1e-6)
        light *= np.where(top > 0.3, 1.05401 * (top - 0.085381) / (top + 0.454444), top) / top

    file, head = tempfile.NamedTemporaryFile(suffix=".cube"), f"LUT_3D_SIZE {n}"
    np.savetxt(file.name, light.clip(0, 1) ** (1 / 2.4), "%.5f", header=head, comments="")
    return file


GAP = 60  # seconds; a longer step is a clock that was reset


class Video:
    """A video or picture as frames (h, w, 3) uint8 at a constant rate: `fps` (Fraction), `start`
    (seconds, of the first frame), `len()`. Missing frames are repeated; a variable rate is
    resampled by time to its average; where the clock is reset (joined recordings), the next frame
    follows at the usual distance."""

    def __init__(self, path):
        self.path = path
        times, rates = read_times(path, changed(Path(path)))
        self.start, M, steps = times[0], len(times), np.diff(times)

        # The usual step: the mean of those near the median, since some clocks count milliseconds
        usual = 1 / float(rates[0])
        forward = steps[(steps > 0.001) & (steps <= GAP)]
        if len(forward):
            middle = np.median(forward)
            usual = forward[abs(forward - middle) <= middle / 10].mean()

        # Joined recordings: the clock's shift after each seam
        seams = (steps < -2.5 * usual) | (steps > GAP)
        self.shifts = np.cumsum([0, *(usual - steps[seams])]).tolist()
        times = np.sort(np.cumsum([0, *np.where(seams, usual, steps)]))
        times -= times[0]

        self.repeats = np.ones(M, int)  # how often each frame of the file is shown
        if times[-1] < M / 1000:  # there is no clock
            self.fps = rates[0]
            return

        # Constant rate: one of these rates explains all times
        steady = next((r for r in rates if abs(r * usual - 1) < 0.02), to_rate(1 / usual))
        average = to_rate((M - 1) / times[-1])
        for rate in (*rates, steady, average):
            if abs(times - np.arange(M) / float(rate)).max() <= 0.6 / rate:
                self.fps = rate
                return

        # Constant with frames missing, or variable
        missing = np.mean(abs(forward - usual) < usual / 10) > 0.8
        self.fps, late = (steady, 0.5 / steady) if missing else (average, 1e-6)
        ticks = np.arange(round(times[-1] * self.fps) + 1) / float(self.fps) + float(late)
        shown = np.searchsorted(times, ticks, "right") - 1
        self.repeats = np.bincount(shown, minlength=M)

    def __len__(self):
        return int(self.repeats.sum())

    def __iter__(self):
        for frame, repeat in zip(read_frames(self.path), self.repeats):
            yield from [frame] * repeat


def to_rate(rate):
    return Fraction(rate).limit_denominator(1001)


def read_frames(path):
    """Yield each frame of a video, or each picture of a picture file, once, as shown."""
    frame = None
    for frame, _ in read_pictures(path):
        yield frame
    if frame is None:
        with open_video(path) as container:
            yield from map(Screen(video_stream(container)), decode(container, path))


@functools.lru_cache(256)
def read_times(path, version):
    """(seconds at which each frame begins, [rates that the file claims]), by decoding: a packet may
    hold no frame. `version` is for the cache."""
    if seconds := [seconds for _, seconds in read_pictures(path)]:
        return np.cumsum([0, *seconds[:-1]]), [Fraction(25)]

    with open_video(path) as container:
        stream = video_stream(container)
        stream.codec_context.options = dict(skip_loop_filter="all", skip_idct="all")  # faster
        frames = tqdm(decode(container, path), "frames", leave=False, disable=None, delay=5)
        times, unit = [f.pts for f in frames], float(stream.time_base)
        claims = (stream.average_rate, stream.guessed_rate, 25)
        rates = [Fraction(r) for r in claims if r and 1 <= r <= 240]
    if None in times:  # a raw stream
        return np.arange(len(times)) / float(rates[0]), rates
    return np.array(times) * unit, rates[:-1] or rates


def read_picture(path):
    """(h, w, 3) uint8 of a picture file, the first if it holds several; None for another file.
    UserError where it is a picture by name only."""
    return next((picture for picture, _ in read_pictures(path)), None)


def read_pictures(path):
    """Yield (picture (h, w, 3) uint8, seconds shown): one, or those of an animation."""
    must_be_file(path)
    try:
        with Image.open(path, formats=sorted(FORMATS)) as image:
            moves = image.format in ("GIF", "PNG", "WEBP", "AVIF")  # others hold thumbnails, pages
            for page in ImageSequence.Iterator(image) if moves else [image]:
                yield as_shown(page), (page.info.get("duration") or 100) / 1000
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # Syntax: of PNG
        with open(path, "rb") as f:
            heic = f.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1")
        reason = "HEIC needs pip install pillow-heif" if heic else e
        if heic or Path(path).suffix.lower() in PICTURES:
            raise UserError(f"{path} is not a picture that can be read ({reason}); save it again")


def as_shown(image):
    """(h, w, 3) uint8 of a PIL image, as viewers show it; transparency over white."""
    profile, image = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "P"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if profile:
        srgb = ImageCms.createProfile("sRGB")
        with suppress(ImageCms.PyCMSError, OSError):  # broken, or for other colours
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return np.array(image.convert("RGB"))


# --------------------------------------------------------------------------------------------------
# Videos and files, written

WHOLE = (0.0, math.inf)  # seconds


def check_output(path, *inputs):
    """Refuse an output name that would fail, or overwrite an input, at the end of the work."""
    path, endings = Path(path), (".mp4", ".mov", ".mkv", ".m4v", ".png")
    if path.suffix.lower() not in endings or path.is_dir():
        raise UserError(f"cannot write {path}; name it .mp4, .mov, .mkv or, for one frame, .png")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is not a folder you may write to")
    if path.exists() and any(Path(i).exists() and path.samefile(i) for i in inputs):
        raise UserError(f"the output {path} is also an input; choose another --out")


def shifted_sound(video, source, audio, copy, span):
    """Yield the packets (`copy`), else the decoded frames, of a Video's sound within `span`, with
    times that begin at 0. Where the clock is reset, sound is shifted as the frames are."""
    begin, end = (float(video.start + seconds) for seconds in span)
    shifts, last, written = list(video.shifts), None, -math.inf
    for packet in source.demux(audio):
        try:
            pieces = [packet] if copy else packet.decode()
        except av.InvalidDataError:  # as players do, go on with the next
            continue

        for piece in pieces:
            if piece.pts is None:
                continue
            now = float(piece.pts * piece.time_base)
            if last is not None and not -0.1 < now - last <= GAP and len(shifts) > 1:
                shifts.pop(0)
            last, now = now, now + shifts[0]
            if max(begin, written - 0.01) <= now < end:  # joined sounds may overlap
                written = now + float((piece.duration or 0) * piece.time_base)
                piece.pts += round((shifts[0] - begin) / piece.time_base)
                yield piece


def write_sound(video, target, way, span=WHOLE):
    """Write a Video's sound to an open container: its packets ("copy"), or coded as AAC ("code").
    A generator, whose first step adds the stream."""
    with open_video(video.path) as source:
        audio, copy = default_stream(source.streams.audio), way == "copy"
        if copy:
            stream = target.add_stream_from_template(audio)
        else:
            rate = audio.rate if audio.rate in (8000, 16000, 22050, 24000, 32000, 44100) else 48000
            layout = "mono" if audio.channels == 1 else "stereo"
            stream = target.add_stream("aac", rate, layout=layout)
        yield

        for piece in shifted_sound(video, source, audio, copy, span):
            if copy:
                piece.dts, piece.stream = piece.pts, stream
            target.mux(piece if copy else stream.encode(piece))
            yield
        if not copy:
            target.mux(stream.encode(None))


@functools.lru_cache(8)
def sound_way(video, suffix):
    """How a Video's sound gets into a file with this ending, tried in memory: "copy" where every
    player knows the codec, else "code", else None, with a printed reason."""
    if read_picture(video.path) is not None:
        return None
    with open_video(video.path) as container:
        audio = default_stream(container.streams.audio)
        if not audio:
            return None
        codec = audio.codec_context and audio.codec_context.name

    ways = ["code"] if codec else []
    if codec in ("aac", "mp3", "mp3float", "ac3", "eac3", "alac"):
        ways = ["copy", "code"]
    kind, reason = {".mkv": "matroska", ".m4v": "ipod"}.get(suffix, suffix[1:]), "cannot be decoded"
    for way in ways:
        try:
            with av.open(io.BytesIO(), "w", kind) as trial:
                if len(list(itertools.islice(write_sound(video, trial, way), 64))) > 1:
                    return way
        except (av.FFmpegError, ValueError) as e:
            reason = e
    print(f"the sound of {video.path} is left out ({reason})")


class VideoWriter(ExitStack):
    """Write an H.264 video of exactly the frames given, atomically; a name in .png takes one frame.

        with VideoWriter("out.mp4", fps, "comment", sound=Video("driving.mp4")) as out:
            out.write(frame)  # (h, w, 3) uint8, h and w even

    `span`: seconds (from, to) of the sound."""

    def __init__(self, path, fps, comment="", sound=None, span=WHOLE):
        super().__init__()
        self.path, self.fps, self.comment = Path(path), Fraction(fps), comment
        self.ending, self.sound, self.span = self.path.suffix.lower(), sound, span
        self.stream, self.sound_pieces, self.count = None, (), 0

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.enter_context(sdit.atomic(self.path))
        if self.ending == ".png":
            return self
        try:  # without bitexact, .mkv gets random numbers
            container = av.open(f"file:{self.temporary}", "w", options=dict(fflags="+bitexact"))
        except (ValueError, av.FFmpegError) as e:
            raise UserError(f"cannot write {self.path} ({e}); name it like out.mp4")
        self.container = self.enter_context(container)
        self.container.metadata["comment"] = self.comment
        self.push(self._finish)
        return self

    def write(self, frame):
        if self.ending == ".png":
            notes = PngImagePlugin.PngInfo()
            notes.add_text("Comment", self.comment)
            Image.fromarray(frame).save(self.temporary, pnginfo=notes)
            return
        if not self.stream:
            self._add_streams(*frame.shape[:2])
        picture = av.VideoFrame.from_ndarray(frame, "rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=1)
        picture.pts, picture.time_base = self.count, 1 / self.fps
        self.count += 1
        self.container.mux(self.stream.encode(picture))

    def _add_streams(self, height, width):
        # x264's macroblock tree reads uninitialised memory at sizes like 64: files would differ
        options = dict(crf="16", preset="fast", mbtree="0")
        size = dict(width=width, height=height, pix_fmt="yuv420p")
        self.stream = self.container.add_stream("libx264", self.fps, options, **size)
        context = self.stream.codec_context
        self.stream.time_base = context.time_base = 1 / self.fps
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = 1  # limited
        if way := self.sound and sound_way(self.sound, self.ending):
            self.sound_pieces = write_sound(self.sound, self.container, way, self.span)
            next(self.sound_pieces)

    def _finish(self, error, *_):
        if error or not self.stream:
            return
        self.container.mux(self.stream.encode(None))
        try:
            list(self.sound_pieces)
        except (av.FFmpegError, ValueError) as e:  # the pictures are worth more
            print(f"the end of the sound of {self.sound.path} could not be taken over ({e})")


@contextmanager
def owned(path):
    """Hold the lock of an output; a second run is refused. It is free when its owner dies."""
    file = sdit.hidden(path, ".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file)
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
    except filelock.Timeout:
        owner = file.exists() and file.read_text() or "another process"
        cure = "wait for it, or name another --out"
        raise UserError(f"{path} is being made by {owner}; {cure}")
    try:
        file.write_text(f"process {os.getpid()}")
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def list_files(folder, kinds):
    """Sorted files of a folder tree with one of the endings; links to folders are followed, hidden
    (unfinished) files left out."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(root)
        if here in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(here)
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found += [p for p in paths if p.suffix.lower() in kinds]
    return sorted(p for p in found if p.is_file() or p.is_symlink())


def write_text(path, text):
    """Write a text file atomically."""
    with sdit.atomic(path) as temporary:
        temporary.write_text(text, "utf-8", "surrogateescape")


def read_text(path):
    """A user's text file: UTF-8 or UTF-16, with or without a mark; other bytes as in file names."""
    content = Path(path).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")


def read_json(path, keys=()):
    """A JSON file that holds an object with these keys; UserError for another, or a torn one."""
    with suppress(ValueError, RecursionError):
        found = json.loads(read_text(path))
        if isinstance(found, dict) and set(keys) <= set(found):
            return found
    cure = "remove it, and give the command that made it again"
    raise UserError(f"{path} is torn, or not what its name says; {cure}")


def read_lines(paths):
    """All objects of JSON-lines files, torn lines left out."""
    entries = []
    for line in "\n".join(map(read_text, paths)).splitlines():
        with suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def append_line(path, entry):
    """Add a line to a JSON-lines file, on a new line even after a torn one."""
    with open(path, "a") as f:
        f.write(f"\n{json.dumps(entry)}\n")


def changed(path):
    """When a file was last changed; None where it is not there."""
    return path.stat().st_mtime_ns if path.exists() else None


MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ESTALE}
MEMORY = MemoryError | torch.OutOfMemoryError
OF_TORCH = "cuda|cudnn|cublas|can't allocate memory"


def of_machine(error):
    """Whether memory, a disk or a GPU is at fault."""
    of_torch = isinstance(error, RuntimeError) and re.search(OF_TORCH, str(error), re.I)
    broken = of_torch or isinstance(error, MEMORY | torch.AcceleratorError)
    return broken or getattr(error, "errno", 0) in MACHINE


def describe(error):
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def blame(error, path):
    """Why the clip at `path` is left out for good. UserError where the machine is at fault (memory,
    disk, a folder that is away, torn weights): the next run tries again."""
    reason = describe(error)
    machine = any(map(of_machine, (error, error.__cause__, error.__context__)))
    gone = not path.is_file() and not path.is_symlink()  # a dangling link is at fault itself
    elsewhere = isinstance(error, UserError) and path.name not in reason
    if machine or gone or elsewhere:
        what = type(error).__name__ if machine else error
        cure = "which is not the clip's fault; the same command goes on from here"
        raise UserError(f"{path}: {what}, {cure}")
    return reason


def enough_disk(folder, needed):
    free = shutil.disk_usage(folder).free
    if free < needed * 1.1:
        sizes = f"about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        cure = "make room and give the same command again: it goes on where it was"
        raise UserError(f"{folder} needs {sizes}; {cure}")


# --------------------------------------------------------------------------------------------------
# Clips -> cached records


@torch.no_grad()
def encode_clip(pixels, tracked, fps, autoencoder, scene_encoder):
    """Cache record of a clip: an iterable of M crops (size, size, 3) uint8, its Track and rate.

    latent (M, C, H, W) f16, landmarks (M, 478, 3) f16, found (M,) bool, weight (M, H, W) u8 (the
    expressive mask), scene (2, S) f16 of the first and last frame, fps (numerator, denominator)."""
    device, pixels = next(autoencoder.parameters()).device, iter(pixels)
    latent, first, last = [], None, None
    while part := list(itertools.islice(pixels, 32)):  # a long clip does not fit in memory
        first, last = part[0] if first is None else first, part[-1]
        images = to_tensor(np.stack(part)).to(device)
        latent.append(autoencoder.encode(images).half().cpu())

    latent = torch.cat(latent)  # (M, C, H, W)
    weight = [expressive_mask(points, latent.shape[-1]) for points in tracked.landmarks]
    ends = to_tensor(np.stack([first, last]))
    return dict(
        latent=latent,
        landmarks=tracked.landmarks.astype(np.float16),
        found=tracked.found,
        weight=np.stack(weight),
        scene=scene_encoder.images(ends).half().cpu(),
        fps=np.array(fps.as_integer_ratio()),
    )


class CacheWriter:
    """A cache: one safetensors file a clip, with its manifest entry and the settings `about` as
    metadata; no tensors for a clip that is left out. Several ranks write into one folder."""

    def __init__(self, folder, about):
        self.folder, self.about = Path(folder), about
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("clip-*"):
            if self.read(path):  # the first whole record must agree
                break

    def path(self, file):
        digest = hashlib.sha256(os.fsencode(file)).hexdigest()
        return self.folder / f"clip-{digest[:16]}.safetensors"

    def add(self, record, entry):
        tensors = {k: torch.as_tensor(v) for k, v in record.items()}
        sdit.write_tensors(self.path(entry["file"]), tensors, dict(about=self.about, entry=entry))

    def entry(self, name, path):
        """The manifest entry of the clip `name` at `path`; None where it is missing or torn, or the
        clip was left out and has changed since."""
        entry = self.read(self.path(name))
        if entry and entry.get("changed", changed(path)) == changed(path):
            return entry

    def read(self, path):
        """The manifest entry of a record; None where it is missing or torn. UserError where it was
        made with other settings."""
        try:
            with sdit.open_tensors(path) as f:
                config = json.loads(f.metadata()["config"])
        except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError):
            return None
        again = "give the same command again, or another --out"
        must_agree(self.about, config["about"], f"{self.folder} was begun with", again)
        return config["entry"]

    def finish(self, entries):
        """Write manifest.jsonl, a line for every clip, then index.json, which completes a cache."""
        entries = sorted(entries, key=lambda entry: entry["file"])
        clips = [[self.path(e["file"]).name, e["frames"]] for e in entries if "rejected" not in e]
        lines = "".join(json.dumps(e) + "\n" for e in entries)
        write_text(self.folder / "manifest.jsonl", lines)
        write_text(self.folder / "index.json", json.dumps(self.about | dict(clips=clips)))


def cache_about(autoencoder_path, clip_path, autoencoder, scene_width, size):
    """The settings of a cache, which train.py passes on to the model."""
    return dict(
        size=size,
        latent_channels=autoencoder.config.latent_channels,
        latent_size=size // autoencoder.config.factor,
        scene_width=scene_width,
        landmarker=FaceLandmarker.name,
        autoencoder=Path(autoencoder_path).name,
        autoencoder_sha256=sha256(autoencoder_path),
        clip=Path(clip_path).name,
        clip_sha256=sha256(clip_path),
    )


def pseudo_clip(picture, points, seed, M=16):
    """Yield M frames of a moving still picture, with its landmarks (478, 3) in pixels (paper A:
    drawn faces "animated" by geometric transforms; silent on which). Rotation, scale, shift and
    perspective follow slow sine waves of random phase."""
    rng = np.random.default_rng(seed)
    h, w = picture.shape[:2]
    corners = np.float32([[0, 0], [w, 0], [w, h], [0, h]])
    reach = np.array([0.25, 0.12, 0.06, 0.06, 0.08, 0.08])  # radians, then fractions of the size
    rate, phase = rng.uniform(0.5, 1.2, 6), rng.uniform(0, 2 * np.pi, 6)

    for m in range(M):
        angle, zoom, dx, dy, *tilt = reach * np.sin(2 * np.pi * rate * m / M + phase)
        rotation = np.float32([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        centre = w * (0.5 + dx), h * (0.5 + dy)
        moved = (corners - (w / 2, h / 2)) @ (rotation * (1 + zoom)) + centre
        moved += np.float32(tilt) * [[1], [-1], [1], [-1]] * (w, h)

        warp = cv2.getPerspectiveTransform(corners, np.float32(moved))
        frame = cv2.warpPerspective(picture, warp, (w, h), borderMode=cv2.BORDER_REFLECT_101)
        across = cv2.perspectiveTransform(points[None, :, :2], warp)[0]  # (478, 2)
        yield frame, np.column_stack([across, points[:, 2] * (1 + zoom)]).astype(np.float32)


def read_clip(path, landmarker, size):
    """(iterator of crops (size, size, 3) uint8, Track, fps, mirrored fraction) of a face clip, from
    the first to the last frame with the face, or of a picture as a pseudo-clip of 8 frames/s."""
    if path.suffix.lower() in PICTURES:
        picture = resize_to(read_picture(path), 768)
        points = landmarker(picture)
        if points is None:
            raise no_face(path)
        seed = zlib.crc32(os.fsencode(path.name))
        frames, points = zip(*pseudo_clip(picture, points, seed))
        tracked, fps = in_square(np.stack(points)), Fraction(8)
        shape, square = picture.shape, tracked.square  # a moving picture is mirrored anyway
    else:
        frames = Video(path)
        tracked, fps = track(frames, landmarker, path), frames.fps
        shape = next(iter(frames)).shape
        square = keep_inside(tracked.square, shape)
    if square is None:
        raise UserError(f"{path}: {TOO_LARGE}")

    # Both ends may be the source, so they must show the face
    known = np.flatnonzero(tracked.found)
    shown = slice(known[0], known[-1] + 1)
    shift = np.float32((*np.subtract(tracked.square, square)[:2], 0)) / square[2]
    kept = Track(tracked.landmarks[shown] + shift, tracked.found[shown], square)
    crops = (crop(f, square, size) for f in itertools.islice(frames, shown.start, shown.stop))
    return crops, kept, fps, mirrored(square, shape)


def cache_clips(clips, writer, landmarker, autoencoder, scene_encoder, size):
    """Make the missing records of clips [(name, path)]. A bad clip is left out, with its reason."""
    rank, world, _ = ranks()
    watch, frames = Stopwatch(), 0
    todo = [clip for clip in clips if not writer.entry(*clip)]
    for name, path in tqdm(todo, f"clips, rank {rank}" if world > 1 else "clips", unit="clip"):
        try:
            with watch("landmarks"):
                crops, tracked, fps, margin = read_clip(path, landmarker, size)
            with watch("decoding, autoencoder and CLIP"):
                record = encode_clip(crops, tracked, fps, autoencoder, scene_encoder)
        except Exception as e:  # whatever is wrong with a file, the rest goes on
            record, entry = {}, dict(rejected=blame(e, path), changed=changed(path))
        else:
            missed, M = int((~tracked.found).sum()), len(tracked.found)
            entry = dict(missed=missed, square=tracked.square, mirrored=margin, frames=M)
            frames += M
        writer.add(record, dict(file=name) | entry)
    speeds = ", ".join(f"{part} {frames / s:.0f}" for part, s in watch.seconds.items())
    print(f"{frames} frames; frames a second: {speeds}")


def finish_cache(writer, clips):
    """Write the index if every clip is there or left out: of several ranks, the last one does."""
    clips = tqdm(clips.items(), "index", leave=False, disable=None)
    entries = [writer.entry(*clip) for clip in clips]
    if missing := entries.count(None):
        return print(f"{missing} clips are left for the other ranks; the last one writes the index")
    try:
        with owned(writer.folder / "index.json"):
            writer.finish(entries)
    except UserError:  # another rank was as quick
        return
    left_out = sum("rejected" in e for e in entries)
    reasons = f"{left_out} left out, reasons in {writer.folder / 'manifest.jsonl'}"
    print(f"{len(entries) - left_out} clips in {writer.folder}; {reasons}")


def check_finished(folder, about, names):
    """UserError where a finished cache is not what the command asks for."""
    before, index = f"{folder} already holds a cache", folder / "index.json"
    must_agree(about, read_json(index), f"{before} of", "name another --out")
    there = {e.get("file") for e in read_lines([folder / "manifest.jsonl"])}
    if new := len(set(names) - there):
        raise UserError(f"{before}, without {new} of these; to add them, remove {index} first")
    print(f"{before} of these clips")


# --------------------------------------------------------------------------------------------------
# The command line

while (NULL := os.open(os.devnull, os.O_RDWR)) < 3:
    pass  # stderr is closed: no other file may get its number
sys.stdout = sys.stdout or open(os.devnull, "w")
sys.stderr = sys.stderr or open(os.devnull, "w")


class Parser(argparse.ArgumentParser):
    """argparse with every default in --help, and one sentence for a mistake."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def add_argument(self, *names, help="", **options):
        if options.get("default") not in (None, False, argparse.SUPPRESS):
            help += " (default: %(default)s)"
        return super().add_argument(*names, help=help, **options)

    def error(self, message):
        if message.startswith("argument "):
            message = message[9:].replace(": ", " ", 1)
        raise UserError(f"{message}; --help says what can be given")


def number(kind, low, high=math.inf):
    """For argparse's `type`: an int or float from `low` to `high`, never nan or inf."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            end = "" if high == math.inf else f", up to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not a number of {low} or more{end}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def end_with_parent(*_):
    """Of a worker process: end when the process that started it is gone, even by kill -9. Ctrl-C
    and SIGTERM, which a group of processes gets together, are that one's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def interrupt(number, _):
    if SAID and SAID.exists():  # this rank only follows
        with suppress(RuntimeError, OSError):
            sys.stdout.flush()
        os._exit(2)
    raise KeyboardInterrupt(number)


def run_main(main):
    """Run a script's `main`. What a user can mend is one sentence on stderr and exit code 2;
    Ctrl-C and SIGTERM are one line."""
    signal.signal(signal.SIGTERM, interrupt)
    if launcher():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: do not outlive it
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # terminals in ASCII, names that are not UTF-8
            stream.reconfigure(errors="backslashreplace")
    code = 2
    try:
        main()
        flush()
        if SAID:  # gloo's threads may still let go of tensors, which aborts when Python ends
            os._exit(0)
        return
    except UserError as e:
        code, text = e.code, f"error: {e}"
    except KeyboardInterrupt as e:
        code = 128 + (e.args[0] if e.args else signal.SIGINT)
        text = "stopped; the same command goes on from what is finished"
    except BrokenPipeError:  # `| head`
        text = ""
    except Exception as e:
        text = f"error: {explain(e)}"
    finally:  # worker processes would keep this one from ending
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()
    leave(code, text)


def explain(e):
    """The sentence for an error of the machine; other errors are faults of ours, and go on."""
    if isinstance(e, MEMORY) or "can't allocate memory" in str(e):
        return "out of memory; give smaller sizes or numbers, or use a machine that has more"
    if not isinstance(e, OSError | safetensors.SafetensorError):
        if SAID and SAID.exists():  # another rank went, and a broadcast with it
            sys.exit(2)
        raise e
    what = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
    if getattr(e, "errno", 0) == errno.ENOSPC:
        return f"{what}; make room and give the same command again: what was whole is still there"
    return f"{what}; is it there, and may you read and write it?"


def flush():
    """Print what is left. A reader that went away is no fault."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(NULL, 1)


# Of the ranks that torchrun starts on a machine, the one that made this file has said why all end.
ERRORS = os.environ.get("TORCHELASTIC_ERROR_FILE")
SAID = ERRORS and Path(ERRORS).parents[1] / "said"


def launcher():
    """Process number of the torchrun that started this rank; None without one."""
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")[:4]
        names = {os.path.basename(word) for word in words}
        if SAID and names & {b"torchrun", b"torch.distributed.run"}:
            return os.getppid()


def leave(code, text):
    """End this process with one sentence. Under torchrun one rank speaks and ends the launcher,
    which would add a traceback; the others follow. (Not by SIGKILL, whose 137 looks like a lack of
    memory.)"""
    try:
        if SAID:
            SAID.touch(exist_ok=False)
    except FileExistsError:
        sys.exit(code)
    except OSError:  # the launcher has tidied up
        pass
    if text:
        print(text, file=sys.stderr, flush=True)
    flush()
    if code < 128 and (above := launcher()):
        os.kill(above, signal.SIGUSR1)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------


def arguments():
    ap = Parser(__doc__)
    add = ap.add_argument
    add("clips", type=Path, help="folder tree of face videos and pictures")
    add("--out", type=Path, default=Path("cache"), help="folder of the cache")
    add("--autoencoder", default=DEMO / "autoencoder.safetensors", help="file, sd-vae-ft-mse, -ema")
    add("--clip", default=DEMO / "clip.safetensors", help="file, or ViT-L-14")
    add("--size", type=number(int, 1, 4096), help="pixels (default: 128 for the demo, else 256)")
    return ap.parse_args()


def find_clips(folder):
    """{name: path} of the videos and pictures in a folder tree."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    paths = {str(p.relative_to(folder)): p for p in list_files(folder, VIDEOS | PICTURES)}
    if not paths:
        kinds = " ".join(sorted(VIDEOS | PICTURES))
        raise UserError(f"no videos and no pictures ({kinds}) under {folder}")
    return paths


def main():
    a = arguments()
    paths = find_clips(a.clips)

    # Frozen models
    rank, world, local = ranks()
    gpus = torch.cuda.device_count()
    device = f"cuda:{local % gpus}" if gpus else "cpu"
    a.autoencoder, a.clip = fetch(a.autoencoder), fetch(a.clip)
    autoencoder = sdit.load_autoencoder(a.autoencoder, device)
    scene_encoder, landmarker = SceneEncoder(a.clip, device), FaceLandmarker()
    demo = [path.resolve().parent == DEMO for path in (a.autoencoder, a.clip)]
    if any(demo) and rank == 0:
        known = "the bundled autoencoder and CLIP know rendered faces"
        print(f"note: {known}; for real ones give {REAL_FACES}")

    # Settings of the cache
    a.size = a.size or (128 if demo[0] else 256)
    factor = autoencoder.config.factor
    if a.size % factor:
        raise UserError(f"--size {a.size} is not a multiple of {factor}, a cell of the autoencoder")
    width = scene_encoder.model.visual.output_dim
    about = cache_about(a.autoencoder, a.clip, autoencoder, width, a.size)
    if (a.out / "index.json").exists():
        return check_finished(a.out, about, paths)

    with owned(a.out / f"rank-{rank}"):
        writer = CacheWriter(a.out, about)
        mine = list(paths.items())[rank::world]
        cache_clips(mine, writer, landmarker, autoencoder, scene_encoder, a.size)
        finish_cache(writer, paths)


if __name__ == "__main__":
    run_main(main)
