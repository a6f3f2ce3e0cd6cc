"""Evaluation: the paper's metrics, protocols, tables and figures, in its order.

    python evaluate.py world --out evaluation                            # test clips, pictures and truths of the demo world
    python evaluate.py pairs CLIPS PICTURES --n 1000                     # a cross-identity test set of your own: pairs.csv
    python evaluate.py same --clips CLIPS                                # Table 1, same identity, by --model
    python evaluate.py same --clips CLIPS --videos FOLDER                # the same of videos that any other system made
    python evaluate.py cross --pairs pairs.csv                           # Table 1, cross identity
    python evaluate.py length | ablation | scenes | guidance | figures   # Fig. 5; dealing of frames; Table 2; Fig. 7; Fig. 1, 4, 6, 20
    python evaluate.py report                                            # all that is there on one page, OUT/report.md
    python evaluate.py all                                               # everything, on the demo world

Each ends with a table, OUT/NAME.json with every setting that it depends on, and a picture where the paper has one. What was measured of a
clip is kept in OUT/cache, so a command that was interrupted, given again, goes on. Metrics whose weights are not there are left out of the
table with the reason; a clip that cannot be measured is named, the others go on, and the exit code is 1.
"""
import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import math
import sys
import warnings
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import sample
import sdit
import train
from sdit import LANDMARKS, NoiseSchedule, UserError

DEMO = Path(__file__).resolve().parent / "demo"
PIXELS = 256                                       # LMSE is in pixels of a crop this wide (paper silent; its values are of this size)

# ----------------------------------------------------------------------------------------------------------------------
# Motion (paper 4.2). Landmarks (M, 478, 3) in the crop's coordinates, NaN in frames without a face


def lmse(made, driving, points=slice(None), axes=3):
    """Mean squared difference per coordinate (x, y and z), in pixels of a crop of 256, over the frames where both were found; NaN where none was."""
    error = (PIXELS * (made - driving)[:, points, :axes]) ** 2
    found = ~np.isnan(error).any((1, 2))
    return float(error[found].mean()) if found.any() else math.nan


def laid_onto(made, driving):
    """`made` moved, turned and sized, frame by frame, so that its rigid points lie on those of `driving`: what is left is expression and
    shape of the face. Raw LMSE rewards copying the driver's shape in cross-identity mode."""
    moved = np.full_like(made, np.nan)
    for i in np.flatnonzero(~np.isnan(made[:, 0, 0]) & ~np.isnan(driving[:, 0, 0])):
        scale, turn = sample.head_pose(made[i], driving[i])
        moved[i] = scale * (made[i] - made[i][sample.RIGID].mean(0)) @ turn.T + driving[i][sample.RIGID].mean(0)
    return moved


def motions(points):
    """What moves, of landmarks (M, 478, 3): dict of (M,) arrays; angles in radians, the rest in units of the eyes' distance."""
    def gap(a, b, axes=2):
        return np.linalg.norm(points[:, a, :axes] - points[:, b, :axes], axis=-1)
    across, down = points[:, 263] - points[:, 33], points[:, 152] - points[:, 10]
    unit = gap(33, 263, 3)
    iris = (points[:, 468] + points[:, 473] - points[:, [33, 362]].mean(1) - points[:, [133, 263]].mean(1))[:, 0]
    return dict(yaw=np.arctan2(across[:, 2], across[:, 0]), pitch=np.arctan2(down[:, 2], down[:, 1]),
                roll=np.arctan2(across[:, 1], across[:, 0]), mouth=gap(13, 14) / unit, eyes=(gap(159, 145) + gap(386, 374)) / unit,
                smile=gap(61, 291, 3) / unit - 0.3 * gap(13, 14) / unit, gaze=iris / unit)


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum() + 1e-12))


# ----------------------------------------------------------------------------------------------------------------------
# Consistency (paper 4.2): cosines of unit vectors of CLIP

def csim(source, made):
    """Smallest cosine of the source's vector (S,) and those of the made frames (M, S)."""
    return float((made @ source).min())


def self_csim(made, driving):
    """|smallest cosine of a frame to the first, in the made video, minus the same in the driving one|: 0 is best. Vectors (M, S) each (paper
    silent on the pairs of frames)."""
    return abs(csim(made[0], made) - csim(driving[0], driving))


# ----------------------------------------------------------------------------------------------------------------------
# Fidelity (paper 4.2)

def frechet(a, b):
    """Fréchet distance of the Gaussians of features a (n, d) and b (m, d): FID of Inception's, FVD of I3D's."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    if min(len(a), len(b)) < 2:
        return math.nan
    found = fid_statistics_to_metric(*(fid_features_to_statistics(torch.as_tensor(x)) for x in (a, b)), False)
    return float(found["frechet_inception_distance"])


def kernel_distance(a, b):
    """KID, times 1000: without the bias that few samples give FID."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    size = min(1000, len(a), len(b))
    found = kid_features_to_metric(torch.as_tensor(a), torch.as_tensor(b), kid_subsets=100, kid_subset_size=size, rng_seed=0, verbose=False)
    return 1e3 * float(found["kernel_inception_distance_mean"])


def ssim(a, b):
    """Mean structural similarity of images (B, 3, h, w) in [-1, 1] (Wang et al. 2004: Gaussian window of 11, sigma 1.5)."""
    line = torch.exp(-(torch.arange(11.) - 5) ** 2 / 4.5)
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)
    blur = lambda x: F.conv2d(x, window, groups=3)
    a, b = (a + 1) / 2, (b + 1) / 2
    ma, mb = blur(a), blur(b)
    va, vb, vab = blur(a * a) - ma ** 2, blur(b * b) - mb ** 2, blur(a * b) - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))).mean().item()


def psnr(a, b):
    """dB, of images in [-1, 1]."""
    return 10 * math.log10(4 / max(F.mse_loss(a, b).item(), 1e-10))


class HyperIQA(nn.Module):
    """Su et al. 2020: a ResNet-50 whose features of the whole picture write the weights of a small network that judges it from features of
    four depths. Parameter names are those of the published weights, trained on KonIQ-10k: 0 (bad) to 100."""

    def __init__(self):
        super().__init__()
        import torchvision
        self.res = torchvision.models.resnet50()
        del self.res.fc
        for i, (width, pooled, out) in enumerate([(256, 16, 16), (512, 32, 16), (1024, 64, 16)], 1):
            setattr(self.res, f"lda{i}_pool", nn.Sequential(nn.Conv2d(width, pooled, 1, bias=False), nn.AvgPool2d(7)))
            setattr(self.res, f"lda{i}_fc", nn.Linear(pooled * (8 >> (i - 1)) ** 2, out))
        self.res.lda4_fc = nn.Linear(2048, 176)
        self.conv1 = nn.Sequential(nn.Conv2d(2048, 1024, 1), nn.ReLU(), nn.Conv2d(1024, 512, 1), nn.ReLU(), nn.Conv2d(512, 112, 1), nn.ReLU())
        self.sizes = [224, 112, 56, 28, 14]                                     # of the network that is written
        for i, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:]), 1):
            setattr(self, f"fc{i}w_conv", nn.Conv2d(112, inputs * outputs // 49, 3, padding=1))
            setattr(self, f"fc{i}b_fc", nn.Linear(112, outputs))
        self.fc5w_fc, self.fc5b_fc = nn.Linear(112, 14), nn.Linear(112, 1)

    def forward(self, x):
        """(B, 3, 224, 224), normalised as for ImageNet -> (B,)."""
        r, seen = self.res, []
        x = r.maxpool(r.relu(r.bn1(r.conv1(x))))
        for i in range(1, 5):
            x = getattr(r, f"layer{i}")(x)
            pooled = getattr(r, f"lda{i}_pool")(x) if i < 4 else x.mean((2, 3))
            seen.append(getattr(r, f"lda{i}_fc")(pooled.flatten(1)))
        x = self.conv1(x)                                                       # (B, 112, 7, 7)
        whole, y = x.mean((2, 3)), torch.cat(seen, 1)                           # (B, 112), (B, 224)
        for i, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:]), 1):
            weight = getattr(self, f"fc{i}w_conv")(x).reshape(-1, outputs, inputs)
            y = torch.sigmoid((weight @ y[:, :, None])[..., 0] + getattr(self, f"fc{i}b_fc")(whole))
        return (self.fc5w_fc(whole) * y).sum(1) + self.fc5b_fc(whole)[:, 0]


def hyperiqa(net, images):
    """Quality of images (M, h, w, 3) uint8, (M,): mean over a fixed grid of 5 x 5 crops of 224 of the picture at 384 x 512, as in the
    original, whose crops are random."""
    mean, spread = net.fc5b_fc.weight.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    scores = []
    for image in images:
        x = F.interpolate(torch.from_numpy(image).to(mean.device).movedim(-1, 0)[None].float() / 255, (512, 384), mode="bilinear", antialias=True)
        tiles = [x[0, :, y:y + 224, z:z + 224] for y in np.linspace(0, 288, 5).astype(int) for z in np.linspace(0, 160, 5).astype(int)]
        with torch.no_grad():
            scores.append(net((torch.stack(tiles) - mean) / spread).mean().item())
    return np.array(scores)


# Third-party weights: address, sha256. They are looked for, by name, in --weights.
WEIGHTS = {
    "weights-inception-2015-12-05-6726825d.pth": (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "i3d_torchscript.pt": ("https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/1c2d61711c52571ad617a1063e6fa691b212e184/i3d_torchscript.pt",
                           "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"),
    "koniq_pretrained.pkl": ("https://huggingface.co/ByteDance/LatentSync-1.5/resolve/main/auxiliary/koniq_pretrained.pkl",
                             "ff9277bcc68ecc10e77d88b6d0a32825ec3c85562095542734ec6212eaaf6d81"),
    "w600k_r50.onnx": ("https://huggingface.co/public-data/insightface/resolve/main/models/buffalo_l/w600k_r50.onnx",
                       "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"),
}


def find_weights(name, folder):
    """Path of a file of WEIGHTS in a folder; UserError says where to get it."""
    url, digest = WEIGHTS[name]
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{name} is not in {folder}; fetch {url} (sha256 {digest[:12]}...)")
    if sdit.sha256(path) != digest:
        raise UserError(f"{path} is not the published file (sha256 {digest[:12]}...); fetch {url} again")
    return path


def load_inception(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (M, 2048): the network of FID, TensorFlow's resizing."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    path = find_weights("weights-inception-2015-12-05-6726825d.pth", folder)
    torch.load(path, map_location="cpu", weights_only=True)                     # torch-fidelity does not look: tensors and nothing else
    net = FeatureExtractorInceptionV3("inception", ["2048"], str(path)).to(device)
    parts = lambda images: np.array_split(images, -(-len(images) // 16))
    return lambda images: torch.cat([net(torch.from_numpy(x).to(device).movedim(-1, 1))[0] for x in parts(images)]).cpu().numpy()


def load_i3d(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (1, 400). I3D needs 9 frames (paper silent on its 8): fewer than 16 are spread evenly over 16, so that 8 are each
    shown twice; longer videos give their first 16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.load(find_weights("i3d_torchscript.pt", folder), map_location=device).eval()

    def features(images):
        images = images[np.arange(16) * min(len(images), 16) // 16]
        with torch.no_grad():
            x = torch.from_numpy(images).to(device).movedim(-1, 0)[None].float()                   # (1, 3, 16, h, w)
            return net(x, rescale=True, resize=True, return_features=True).cpu().numpy()
    return features


def load_hyperiqa(folder, device="cpu"):
    net = HyperIQA().to(device)
    sdit.fill(net, torch.load(find_weights("koniq_pretrained.pkl", folder), map_location="cpu", weights_only=True), "koniq_pretrained.pkl")
    return lambda images: hyperiqa(net.eval(), images)


ARCFACE_TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])


def arcface_points(points):
    """The five points of ArcFace's template, (5, 2), of landmarks (478, 3): eyes (mean of their corners), nose, corners of the mouth."""
    return np.stack([points[[33, 133]].mean(0), points[[362, 263]].mean(0), points[4], points[61], points[291]])[:, :2]


def similarity(points, onto):
    """(2, 3) matrix of the turn, size and shift that take points (n, 2) nearest to others."""
    a, b = ((p - p.mean(0)) @ (1, 1j) for p in (points, onto))                  # as complex numbers, a turn and size is one factor
    factor = np.vdot(a, b) / np.vdot(a, a)
    turn = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.c_[turn, onto.mean(0) - turn @ points.mean(0)]


def load_arcface(folder):
    """(images (M, h, w, 3) uint8, landmarks (M, 478, 3) in 0..1) -> unit vectors (M, 512). The weights are for research only."""
    import cv2
    import onnxruntime
    session = onnxruntime.InferenceSession(find_weights("w600k_r50.onnx", folder), providers=["CPUExecutionProvider"])

    def features(images, landmarks):
        faces = []
        for image, points in zip(images, landmarks):
            faces.append(cv2.warpAffine(image, similarity(arcface_points(points) * len(image), ARCFACE_TEMPLATE), (112, 112)))
        x = session.run(None, {session.get_inputs()[0].name: (np.stack(faces).transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5})[0]
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    return features


# ----------------------------------------------------------------------------------------------------------------------
# What a protocol works on

@dataclasses.dataclass
class Case:
    """One reenactment to be judged: crops are uint8 at the model's size, or 256 where videos are given."""
    source: np.ndarray                             # (h, h, 3)
    driving: np.ndarray                            # (M, h, h, 3)
    landmarks: np.ndarray                          # (M, 478, 3) of the driving face
    truth: np.ndarray = None                       # (M, h, h, 3), where it is known
    given: np.ndarray = None                       # (M, h, h, 3), a result made elsewhere


def cut(path, tracked, like, frames, size):
    """Some frames of a video as crops (len(frames), size, size, 3): by the driving video's square where it is of the same size, so of the same
    framing; else, and where sample.py made it, it is a square crop as it is. UserError where it has another number of frames."""
    video = data.Video(path)
    with data.open_video(path) as container:
        ours = path != like.path and "anchored-diffusion" in container.metadata.get("comment", "")
    if len(video) != len(like):
        raise UserError(f"{path} has {len(video)} frames, the driving video {len(like)}; a result has a frame for every frame of the driving video")
    wanted, crops = {int(f): i for i, f in enumerate(frames)}, [None] * len(frames)
    shape = next(iter(like)).shape
    for f, image in enumerate(video):
        if f in wanted:
            framed = image.shape == shape and not ours
            if not framed and image.shape[0] != image.shape[1]:
                raise UserError(f"{path} is neither square nor of the driving video's size")
            crops[wanted[f]] = data.crop(image, tracked.square, size) if framed else data.resize(image, size)
    return np.stack(crops)


@functools.lru_cache(2048)
def track(path, landmarker):
    """`data.track` of a video file; every method and length asks again."""
    return data.track(data.Video(path), landmarker, path)


@functools.cache
def videos_of(folder):
    """{name without ending: path} of the videos in a folder of results."""
    return {str(p.relative_to(folder).with_suffix("")): p for p in data.list_files(folder, data.VIDEOS)}


def named(folder, name):
    """The video of a clip, by its name without ending, in a folder of results."""
    if name not in videos_of(folder):
        raise UserError(f"{folder} has no video {name}.*")
    return videos_of(folder)[name]


def read_case(path, a, models, number, M, source=None, truth=None, given=None):
    """A case of a driving video: M consecutive frames from a random start (paper 4.3.1), and as source the frame furthest from them in time, or the face
    of the picture `source`. `truth`, `given`: videos."""
    video = data.Video(path)
    if len(video) <= M:
        raise UserError(f"{path} has {len(video)} frames; {M} and a source need {M + 1}")
    tracked = track(path, models.landmarker)
    first = int(np.random.default_rng([a.seed, number]).integers(0, len(video) - M + 1))
    chosen = np.arange(first, first + M)
    furthest = 0 if first >= len(video) - first - M else len(video) - 1
    size = PIXELS if given else models.size
    crops = cut(path, tracked, video, [furthest, *chosen], size)
    picture = crops[0] if source is None else sample.read_source(source, models.landmarker, size, 0)[0]
    others = [p and cut(p, tracked, video, chosen, size) for p in (truth, given)]
    return Case(picture, crops[1:], tracked.landmarks[chosen], *others)


def read_pairs(path):
    """[(name, driving, source, result)] of a table with the columns source,driving,out; paths are relative to it."""
    try:
        found = [(str(Path(line["out"]).with_suffix("")), *(Path(path).parent / line[k] for k in ("driving", "source", "out")))
                 for line in sample.read_pairs(path)]
    except (ValueError, KeyError, TypeError) as e:
        raise e if isinstance(e, UserError) else UserError(f"{path} has a line without source, driving or out") from None
    if len({name for name, *_ in found}) < len(found):
        raise UserError(f"{path} names one result twice in the column out")
    return found


@torch.no_grad()
def sample_latents(models, source, landmarks, settings, plan=None, scene=None):
    """source (h, w, 3) uint8 face crop, landmarks (M, 478, 3) -> latents (M, C, H, W) on the CPU, by sample.py's own functions; `plan`: (rows,
    keep) that deals the frames another way; `scene`: in place of the source's."""
    scene = sample.make_scene(models, source, None, None) if scene is None else scene
    conditions = sample.make_conditions(models, scene, landmarks, settings.guidance)
    latent = sample.sample_video(models.sdit, conditions, settings, plan=plan)
    return torch.stack([latent(f) for f in range(len(landmarks))]).float()


@torch.no_grad()
def reenact(models, source, landmarks, settings, plan=None, scene=None):
    """The same decoded: (M, size, size, 3) uint8."""
    latents = sample_latents(models, source, landmarks, settings, plan, scene)
    return data.to_images(models.autoencoder.decode(latents.to(models.device)))


def find_landmarks(landmarker, images):
    """(M, 478, 3) in 0..1, NaN where there is no face. Small pictures are enlarged: MediaPipe wants 96 pixels and more."""
    found = [landmarker.landmarks(data.resize(im, PIXELS)) for im in images]
    return np.stack([np.full((LANDMARKS, 3), np.nan, np.float32) if p is None else p / PIXELS for p in found])


@torch.no_grad()
def describe(images, models, nets):
    """What the metrics need of images (M, h, h, 3): dict of arrays."""
    features = dict(landmarks=find_landmarks(models.landmarker, images), clip=models.encoder.images(data.to_tensor(images)).cpu().numpy())
    return features | {name: net(images) for name, net in nets.items() if callable(net)}


def load_nets(folder, device="cpu"):
    """Networks of the fidelity metrics by name; where the weights are missing, the reason."""
    nets = {}
    for name, load in dict(inception=load_inception, i3d=load_i3d, hyperiqa=load_hyperiqa).items():
        try:
            nets[name] = load(folder, device)
        except UserError as e:
            nets[name] = str(e)
    return nets


LEFT_OUT, REPORTED = [], []                        # clips that could not be measured: since the last table, and before it; the exit code says so


def measured_by_all(found):
    """{column: {name: result}} with only those names that every column has: columns are compared over the same clips."""
    names = set.intersection(*(set(results) for results in found.values()))
    if not names:
        raise UserError("no clip could be measured in every column of the table")
    return {column: {name: r for name, r in results.items() if name in names} for column, results in found.items()}


def stamp(paths):
    """What changes when one of these files does."""
    return [[p.stat().st_size, p.stat().st_mtime_ns] if p.exists() else None for p in map(Path, paths)]


def measured(key, names, measure, a, files=lambda name: ()):
    """{name: measure(number, name)}, dicts of arrays, each kept in OUT/cache; `key` and `files` (name -> paths): all that decides the values."""
    folder = a.out / "cache" / hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, name in enumerate(tqdm(names, key[0], unit="clip", disable=None)):
        try:
            mark = zlib.crc32(json.dumps([number, stamp(filter(None, files(name)))]).encode())
            path = folder / f"{name.replace('/', '__')}-{mark:08x}.safetensors"
            try:
                tensors = sdit.read_tensors(path)[0]
            except UserError:                                                   # not there yet, or torn
                tensors = {k: torch.as_tensor(np.asarray(v)) for k, v in measure(number, name).items()}
                sdit.write_tensors(path, tensors, {})
            found[name] = {k: v.numpy() for k, v in tensors.items()}
        except Exception as e:                                                  # whatever is wrong with a clip, the rest goes on
            LEFT_OUT.append(f"{name}: {e if isinstance(e, UserError) else f'{type(e).__name__}: {e}'}")
            print(f"left out: {LEFT_OUT[-1]}", file=sys.stderr)
    if not found:
        raise UserError(f"nothing could be measured for {key[0]}")
    return found


def bootstrap(values, repeat=1000):
    """(mean, half of the 95 % interval) over videos; one video has no interval."""
    values = np.array([v for v in values if not math.isnan(v)])
    if len(values) < 2:
        return float(values[0]) if len(values) else math.nan, math.nan
    means = values[np.random.default_rng(0).integers(0, len(values), (repeat, len(values)))].mean(1)
    return float(values.mean()), float(np.diff(np.quantile(means, [0.025, 0.975]))[0] / 2)


def finish(a, models, name, title, header, rows, notes=(), figure=None, **protocol):
    """Print the table, and write OUT/NAME.json and, with a matplotlib figure, OUT/NAME.png."""
    table = [header, ["---"] * len(header), *rows]
    text = "\n".join([f"**{title}**", "", *(f"| {' | '.join(map(str, row))} |" for row in table), "", *notes])
    a.out.mkdir(parents=True, exist_ok=True)
    if figure is not None:
        figure.savefig(a.out / f"{name}.png", dpi=120, bbox_inches="tight")
        import matplotlib.pyplot as plt
        plt.close(figure)
    versions = {p: metadata.version(p) for p in ("torch", "mediapipe", "torch-fidelity", "scikit-learn", "open_clip_torch")}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    about = dict(name=name, markdown=text, picture=f"{name}.png" if figure is not None else None, settings=settings, model=models and models.sha256,
                 sampler=sample.Settings.sampler, versions=versions, left_out=list(LEFT_OUT), crop="face box 0.45 x 0.53 of a fixed square",
                 **protocol)
    REPORTED.extend(LEFT_OUT)
    LEFT_OUT.clear()
    data.write_text(a.out / f"{name}.json", json.dumps(about, indent=1, default=str))
    print(f"\n{text}")


def plus(values, digits=2):
    mean, half = bootstrap(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def settings_of(a, method="anchored", number=0, **rest):
    return sample.Settings(**dict(dict(steps=a.steps, guidance=a.guidance, method=method, seed=a.seed + number), **rest))


# ----------------------------------------------------------------------------------------------------------------------
# Table 1 (paper 4.3)

METHODS = ("anchored", "multidiffusion", "independent")
# What the paper reports for its XL model on its own clips, same and cross identity
PAPER = dict(FID=("38.2", "34.4"), FVD=("111", "236"), HyperIQA=("50.4", "52.1"), LMSE=("8.92", "9.61"), CSIM=("0.83", "0.74"),
             **{"Expressive-LMSE": ("9.07", "9.39"), "Self-CSIM": ("0.04", "0.04")})


def judge(case, made, models, nets):
    """All that is measured of a case: dict of arrays."""
    result = {f"made_{k}": v for k, v in describe(made, models, nets).items()}
    result |= {f"driving_{k}": v for k, v in describe(case.driving, models, {k: v for k, v in nets.items() if k != "hyperiqa"}).items()}
    with torch.no_grad():
        result["source_clip"] = models.encoder.images(data.to_tensor(case.source[None])).cpu().numpy()[0]
    if case.truth is not None:
        a, b = data.to_tensor(made), data.to_tensor(case.truth)
        result |= dict(psnr=psnr(a, b), ssim=ssim(a, b))
    return result


def table_columns(found, nets):
    """{metric: text} of one method's cases."""
    r = list(found.values())
    gather = lambda key: np.concatenate([x[key] for x in r])
    column = {}
    if callable(nets["inception"]):
        column |= {"FID": f"{frechet(gather('made_inception'), gather('driving_inception')):.1f}",
                   "KID x 1000": f"{kernel_distance(gather('made_inception'), gather('driving_inception')):.2f}"}
    if callable(nets["i3d"]) and len(r) > 1:
        column["FVD"] = f"{frechet(gather('made_i3d'), gather('driving_i3d')):.0f}"
    if callable(nets["hyperiqa"]):
        column["HyperIQA"] = plus([x["made_hyperiqa"].mean() for x in r], 1)
    column["Fréchet distance, CLIP features"] = f"{frechet(gather('made_clip'), gather('driving_clip')):.3f}"
    pairs = [(x["made_landmarks"], x["driving_landmarks"]) for x in r]
    missed = [100 * np.mean([np.isnan(p[i][:, 0, 0]).mean() for p in pairs]) for i in (0, 1)]
    column |= {"LMSE": plus([lmse(*p) for p in pairs], 1), "Expressive-LMSE": plus([lmse(*p, data.EXPRESSIVE) for p in pairs], 1),
               "LMSE, x and y": plus([lmse(*p, axes=2) for p in pairs], 1),
               "LMSE, heads laid onto each other": plus([lmse(laid_onto(*p), p[1]) for p in pairs], 1),
               "frames without a face, made and driving": f"{missed[0]:.1f} %, {missed[1]:.1f} %",
               "CSIM": plus([csim(x["source_clip"], x["made_clip"]) for x in r], 3),
               "Self-CSIM": plus([self_csim(x["made_clip"], x["driving_clip"]) for x in r], 3)}
    if known := [x for x in r if "psnr" in x]:
        column |= {"PSNR against the truth, dB": plus([float(x["psnr"]) for x in known], 1), "SSIM": plus([float(x["ssim"]) for x in known], 2)}
    both = [(motions(p[seen]), motions(q[seen])) for p, q in pairs if (seen := ~np.isnan(p[:, 0, 0]) & ~np.isnan(q[:, 0, 0])).sum() > 3]
    column |= {f"{k}: correlation": plus([correlation(m[k], d[k]) for m, d in both], 2) for k in ("yaw", "mouth", "eyes")}
    column |= {f"{k}: error, degrees": plus([np.degrees(abs(m[k] - d[k]).mean()) for m, d in both], 1) for k in ("yaw", "pitch", "roll")}
    return column | {"mouth: error, share of the eyes' distance": plus([abs(m["mouth"] - d["mouth"]).mean() for m, d in both], 3)}


def list_clips(a):
    """{name: path} of the first `--n` videos, or of all; a name is the path within the folder, without ending."""
    folder = a.clips or a.out / "world" / "clips"
    paths = data.list_files(folder, data.VIDEOS)
    if not paths:
        raise UserError(f"no videos in {folder}; give --clips, or make those of the demo world: python evaluate.py world --out {a.out}")
    names = [str(p.relative_to(folder).with_suffix("")) for p in paths]
    if twice := {n for n in names if names.count(n) > 1}:
        raise UserError(f"{folder} has two videos named {min(twice)}, with different endings")
    return dict(list(zip(names, paths))[:a.n])


def table_items(a, same):
    """What a table is about: {name: (driving video, source picture or None, true result or None, where a result may lie or None)}."""
    if same:                                                                    # the source is a frame of the clip, the truth the clip itself
        return {name: (path, None, path, None) for name, path in list_clips(a).items()}
    table = a.pairs or a.out / "world" / "pairs.csv"
    truths = {p.stem: p for p in data.list_files(table.parent / "truth", data.VIDEOS)}
    return {name: (driving, source, truths.get(Path(name).name), out) for name, driving, source, out in read_pairs(table)[:a.n]}


def table1(a, models, same):
    """Table 1 for one protocol: of videos made by each method of sampling; or of videos that are there, in the folder `--videos`, or under the
    names of the column out."""
    nets, items, found, protocol = load_nets(a.weights, models.device), table_items(a, same), {}, "same" if same else "cross"
    there = bool(a.videos or any(out and out.exists() for *_, out in items.values()))
    for method in ["given"] if there else METHODS:
        def given(name):
            return named(a.videos, name) if a.videos else items[name][3]

        def files(name):
            return [*items[name][:3], given(name) if there else None]

        def measure(number, name):
            driving, source, truth, _ = items[name]
            case = read_case(driving, a, models, number, a.frames, source, truth, given(name) if there else None)
            made = case.given if there else reenact(models, case.source, case.landmarks, settings_of(a, method, number))
            return judge(case, made, models, nets)
        settings = dataclasses.astuple(settings_of(a, sample.Settings.method if there else method))
        key = [f"{protocol}, {method}", models.sha256, str(a.videos), str(a.pairs), str(a.clips), a.frames, settings,
               sorted(k for k, v in nets.items() if callable(v))]
        column = method if not there else a.videos.resolve().name if a.videos else "column out"
        found[column] = measured(key, list(items), measure, a, files)
    found = measured_by_all(found)
    columns = {column: table_columns(results, nets) for column, results in found.items()}
    names = list(dict.fromkeys(k for c in columns.values() for k in c))
    rows = [[k, *(c.get(k, "-") for c in columns.values()), PAPER.get(k, ("", ""))[not same]] for k in names]
    missing = [f"Missing: {name}: {reason}" for name, reason in nets.items() if not callable(reason)]
    count = len(next(iter(found.values())))
    notes = [f"{count} videos of {a.frames} frames; mean ± half of the 95 % interval over videos; LMSE in pixels² of a crop of 256.", *missing]
    name = protocol + (f"-{a.videos.resolve().name if a.videos else 'given'}" if there else "")
    finish(a, models, name, f"{protocol.title()}-identity reenactment (Table 1)", ["", *columns, "paper (XL, real faces)"], rows, notes,
           fvd=f"{a.frames} frames spread over 16" if a.frames < 16 else "first 16 frames", reference="frames of the driving clips", missing=missing)


# ----------------------------------------------------------------------------------------------------------------------
# Consistency over length (Fig. 5) and the dealing of frames

def length(a, models, lengths=(12, 16, 20, 24)):
    """Fig. 5: Self-CSIM of self-reenactment against the number of frames."""
    paths, found = list_clips(a), {}
    for M in lengths:
        for method in METHODS:
            def measure(number, name):
                case = read_case(paths[name], a, models, number, M)
                made = reenact(models, case.source, case.landmarks, settings_of(a, method, number))
                return {f"{k}_clip": models.encoder.images(data.to_tensor(x)).cpu().numpy() for k, x in (("made", made), ("driving", case.driving))}
            key = [f"length {M}, {method}", models.sha256, str(a.clips), dataclasses.astuple(settings_of(a, method))]
            found[M, method] = measured(key, list(paths), measure, a, lambda n: [paths[n]])
    found = {column: [self_csim(r["made_clip"], r["driving_clip"]) for r in results.values()] for column, results in measured_by_all(found).items()}
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(6, 4))
    for method in METHODS:
        ax.errorbar(lengths, *zip(*(bootstrap(found[M, method]) for M in lengths)), label=method, capsize=3, marker="o")
    ax.set(xlabel="frames", ylabel="Self-CSIM (lower is better)", xticks=lengths)
    ax.legend()
    rows = [[M, *(plus(found[M, m], 3) for m in METHODS)] for M in lengths]
    verdicts = [f"At {M} frames, anchored minus {m}, video by video: {plus(np.subtract(found[M, 'anchored'], found[M, m]), 3)}."
                for M in lengths for m in METHODS[1:]]
    notes = [f"{len(found[lengths[0], 'anchored'])} videos a point. The paper: anchored below MultiDiffusion at every length, the gap growing with it.",
             *verdicts]
    finish(a, models, "length", "Self-CSIM against length (Fig. 5)", ["frames", *METHODS], rows, notes, figure)


def deal(M, T, how, anchor=None, seed=0):
    """`sample.plan_rows` with the frames of each side dealt strided, contiguous or at random over the rows."""
    rows, keep = sample.plan_rows(M, T, anchor)
    if how == "strided":
        return rows, keep
    slot, centre = T // 2, rows[0, T // 2]
    for first, end, side in ((0, slot, np.arange(centre)), (slot + 1, T, np.arange(centre + 1, M))):
        if not len(side):
            continue
        if how == "random":
            side = np.random.default_rng(seed).permutation(side)
        width = end - first
        for b in range(len(rows)):
            dealt = np.sort(side[b * width:(b + 1) * width])
            rows[b, first:end] = [*dealt, *[dealt[-1] if len(dealt) else side.max()] * (width - len(dealt))]
            keep[b, first:end] = np.arange(width) < len(dealt)
    return rows, keep


def ablation(a, models, M=24):
    """An ablation that the paper lacks: how frames are dealt to rows, which frame is the anchor, how many steps."""
    paths, found, T = list_clips(a), {}, models.sdit.config.frames
    variants = {f"dealt {how}": (how, None, a.steps) for how in ("strided", "random", "contiguous")}
    variants |= {f"anchor {name}": ("strided", frame, a.steps) for name, frame in (("central", (M - 1) // 2), ("first", 0))}
    variants |= {f"{steps} steps": ("strided", None, steps) for steps in (50, 100)}
    for name, (how, anchor, steps) in variants.items():
        def measure(number, clip):
            case = read_case(paths[clip], a, models, number, M)
            made = reenact(models, case.source, case.landmarks, settings_of(a, number=number, steps=steps), deal(M, T, how, anchor, a.seed + number))
            return judge(case, made, models, {})
        key = [f"ablation, {name}", models.sha256, str(a.clips), M, dataclasses.astuple(settings_of(a, steps=steps))]
        found[name] = measured(key, list(paths), measure, a, lambda n: [paths[n]])
    rows, scores = [], {}
    for name, results in measured_by_all(found).items():
        pairs = [(r["made_landmarks"], r["driving_landmarks"]) for r in results.values()]
        scores[name] = np.array([[self_csim(r["made_clip"], r["driving_clip"]) for r in results.values()], [lmse(*p) for p in pairs],
                                 [lmse(*p, data.EXPRESSIVE) for p in pairs]])                       # (3, clips)
    base = scores["dealt strided"]
    for name, score in scores.items():
        default = name == "dealt strided"
        rows.append([name + f" (as planned, {a.steps} steps)" * default, len(sample.plan_rows(M, T, variants[name][1])[0]),
                     *(plus(s, digits) for s, digits in zip(score, (3, 1, 1))),
                     *("" if default else plus(s - b, digits) for s, b, digits in zip(score, base, (3, 1)))])
    finish(a, models, "ablation", "Dealing, anchor, steps", ["", "rows", "Self-CSIM", "LMSE", "Expressive-LMSE", "Self-CSIM minus the first line's",
                                                             "LMSE minus the first line's"], rows,
           [f"{base.shape[1]} self-reenactments of {M} frames; differences video by video."])


# ----------------------------------------------------------------------------------------------------------------------
# Scene recognition (Table 2, Fig. 14)

class Head(nn.Module):
    """MLP with 5 hidden layers on CLIP vectors (paper 4.5.1; width unsaid: that of the vector); its class is the video."""

    def __init__(self, width, classes):
        super().__init__()
        self.hidden = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(width, width), nn.ReLU())])
        self.classes = nn.Parameter(torch.randn(classes, width) * width ** -0.5)
        self.centres = nn.Parameter(torch.zeros(classes, width))

    def loss(self, x, y, kind):
        """Of vectors x (B, S) with classes y (B,): Wen et al. 2016, Deng et al. 2019, Lin et al. 2017."""
        h = self.hidden(x)
        logits = h @ self.classes.T
        if kind == "centre":
            return F.cross_entropy(logits, y) + 0.003 * ((h - self.centres[y]) ** 2).sum(1).mean()
        if kind == "ArcFace":
            cosine = (F.normalize(h, dim=1) @ F.normalize(self.classes, dim=1).T).clamp(-1 + 1e-6, 1 - 1e-6)
            margin = torch.cos(cosine.acos() + 0.5 * F.one_hot(y, len(self.classes)))
            return F.cross_entropy(30 * margin, y)
        p = logits.softmax(1).gather(1, y[:, None])[:, 0].clamp_min(1e-9)
        return (-(1 - p) ** 2 * p.log()).mean()


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
    """(Davies-Bouldin, Calinski-Harabasz) of unit vectors x (n, S) with labels y."""
    from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score
    x = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
    return davies_bouldin_score(x, y), calinski_harabasz_score(x, y)


def scenes(a, models, frames=64):
    """Table 2: how well vectors of frames cluster by video; heads are trained on the other half of the videos. Fig. 14: t-SNE."""
    paths = list_clips(a)
    try:
        arcface, missing = load_arcface(a.weights), []
    except UserError as e:
        arcface, missing = None, [f"Missing: ArcFace: {e}"]

    def measure(number, name):
        video = data.Video(paths[name])
        tracked = track(paths[name], models.landmarker)
        chosen = np.linspace(0, len(video) - 1, frames).round().astype(int)     # a short video gives fewer
        crops = cut(paths[name], tracked, video, np.unique(chosen), PIXELS if arcface else models.size)
        with torch.no_grad():
            result = dict(clip=models.encoder.images(data.to_tensor(crops)).cpu().numpy())
        return result | (dict(arcface=arcface(crops, tracked.landmarks[np.unique(chosen)])) if arcface else {})
    key = [f"scenes, {frames} frames", models.sha256, str(a.clips), arcface is not None]
    found = list(measured(key, list(paths), measure, a, lambda n: [paths[n]]).values())
    half = len(found) // 2
    if half < 2:
        raise UserError("scenes needs four videos at least: one half trains the heads, the other is clustered")
    split = lambda key, part: (np.concatenate([r[key] for r in part]), np.repeat(np.arange(len(part)), [len(r[key]) for r in part]))
    (x, y), (test, labels) = split("clip", found[:half]), split("clip", found[half:])
    vectors = {"ArcFace": split("arcface", found[half:])[0]} if arcface else {}
    vectors["CLIP"] = test
    for kind in ("centre", "ArcFace", "focal"):
        head = train_head(torch.from_numpy(x), torch.from_numpy(y), kind, a.seed)
        vectors[f"MLP, {kind} loss"] = head(torch.from_numpy(test)).detach().numpy()
    paper = dict(zip(["ArcFace", "CLIP", "MLP, centre loss", "MLP, ArcFace loss", "MLP, focal loss"],
                     ["1.516 / 113", "0.611 / 641", "0.819 / 411", "0.810 / 413", "0.673 / 493"]))
    rows = [[k, *(f"{s:.3f}" if i == 0 else f"{s:.0f}" for i, s in enumerate(clustering(v, labels))), paper[k]] for k, v in vectors.items()]
    finish(a, models, "scenes", "Scene recognition (Table 2, Fig. 14)",
           ["", "Davies-Bouldin, lower is better", "Calinski-Harabasz, higher is better", "paper"], rows,
           [f"{len(test)} frames of {len(found) - half} videos; heads trained on {half} other videos.", *missing],
           tsne({k: vectors[k] for k in ("ArcFace", "CLIP") if k in vectors}, labels))


def tsne(vectors, labels, videos=24):
    """Fig. 14: a matplotlib figure, one panel for each kind of vectors."""
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE
    figure, axes = plt.subplots(1, len(vectors), figsize=(5 * len(vectors), 5), squeeze=False)
    shown = labels < videos
    for ax, (name, x) in zip(axes[0], vectors.items()):
        flat = TSNE(2, init="pca", perplexity=min(30, shown.sum() // 4), random_state=0).fit_transform(x[shown])
        ax.scatter(*flat.T, c=labels[shown], cmap="tab20", s=4)
        ax.set(title=f"{name}, {len(set(labels[shown].tolist()))} videos", xticks=[], yticks=[])
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Impact of the guidance signals (Fig. 7)

SIGNALS = {"none": (), "landmarks": ("landmarks",), "CLIP": ("scene",), "landmarks + CLIP": ("landmarks", "scene")}


def train_denoiser(rows, signals, a, batch=16):
    """A denoiser of single frames with some of the conditions, trained on rows of one frame; the seed alone decides its start, data and noise."""
    torch.manual_seed(a.seed)
    model, schedule = train.build_model(rows, "demo", 1), NoiseSchedule()
    optimizer = train.build_optimizer(model, 1e-3, 0.01)
    rule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, a.train_steps)
    precise = torch.autocast("cpu", torch.bfloat16, enabled=sdit.has_bf16("cpu"))
    loader = torch.utils.data.DataLoader(rows, batch_sampler=train.shares(0, a.train_steps, batch, 0, 1, 1))
    for step, one in enumerate(tqdm(loader, "training with " + (" + ".join(signals) or "none"), unit="step", leave=False, disable=None)):
        one |= {k: None for k in ("landmarks", "scene") if k not in signals}
        t, noise, _ = train.draw(a.seed, step, one["latents"].shape, 0)
        with precise:
            error, bound = train.diffusion_loss(model, schedule, one, t, noise, torch.zeros(batch, dtype=torch.bool))
        optimizer.zero_grad()
        (error + bound).mean().backward()
        optimizer.step()
        rule.step()
    return model.eval()


@torch.no_grad()
def denoising_errors(model, rows, signals, times, seed, n=64):
    """Mean squared error of the noise on n held-out frames (n, len(times)), the same noise for every model."""
    one, schedule = torch.utils.data.default_collate([rows[i] for i in range(n)]), NoiseSchedule()
    one["mask"] = torch.zeros_like(one["mask"])
    one |= {k: None for k in ("landmarks", "scene") if k not in signals}
    keep = torch.zeros(n, dtype=torch.bool)
    draws = [(torch.full((n,), t), torch.randn(one["latents"].shape, generator=torch.Generator().manual_seed(seed + t))) for t in times]
    return np.stack([train.diffusion_loss(model, schedule, one, t, noise, keep)[0].numpy() for t, noise in draws], 1)


def guidance(a, models):
    """Fig. 7: four denoisers trained alike on cached frames (--data), their error over timesteps against that of the unconditional one."""
    rows, unseen = data.Rows(a.data, 1, a.seed), data.Rows(a.data, 1, a.seed, held_out=True)
    times = list(range(25, NoiseSchedule.steps, 50))

    def measure(number, name):
        model = train_denoiser(rows, SIGNALS[name], a)
        return dict(errors=denoising_errors(model, unseen, SIGNALS[name], times, a.seed, min(256, 8 * len(unseen))))
    key = ["guidance", str(a.data), sdit.sha256(a.data / "index.json"), a.seed, a.train_steps]
    found = {k: v["errors"] for k, v in measured(key, list(SIGNALS), measure, a).items()}
    if "none" not in found:
        raise UserError("the unguided denoiser could not be trained; the reason is above")
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(6, 4))
    ratios = {k: found[k].mean(0) / found["none"].mean(0) for k in SIGNALS if k != "none" and k in found}
    for k, ratio in ratios.items():
        ax.plot(times, ratio, label=k)
    ax.set(xlabel="timestep", ylabel="error / error of the unguided")
    ax.legend()
    quarters = np.array_split(np.arange(len(times)), 4)
    table = [[k, *(f"{r[q].mean():.3f}" for q in quarters)] for k, r in ratios.items()]
    finish(a, None, "guidance", "Impact of the guidance signals (Fig. 7): error / error of the unguided denoiser",
           ["", *(f"t = {times[q[0]]} to {times[q[-1]]}" for q in quarters)], table,
           ["The paper: landmarks help most at large t, both together are best, gains are largest in the middle."], figure,
           errors={k: v.mean(0).tolist() for k, v in found.items()})


# ----------------------------------------------------------------------------------------------------------------------
# Figures of pictures

def strip(pictures, size=96):
    """Pictures, or None for a gap, side by side."""
    return np.concatenate([np.full((size, size, 3), 255, np.uint8) if p is None else data.resize(p, size) for p in pictures], 1)


def figures(a, models):
    """The paper's picture figures by the model at hand, from the first pairs: OUT/figure-1.png (reenactment, text, edit), -4 (anchored against
    MultiDiffusion, 12 frames), -6 (pairs), -20 (24 frames)."""
    a.out.mkdir(parents=True, exist_ok=True)
    pairs = read_pairs(a.pairs or a.out / "world" / "pairs.csv")[:4]
    numbered = enumerate(tqdm(pairs, "reading", leave=False, disable=None))
    cases = [read_case(driving, a, models, i, 24, source) for i, (_, driving, source, _) in numbered]

    def made(case, M, settings, **rest):
        return reenact(models, case.source, case.landmarks[:M], settings, **rest)
    one, eight = cases[0], np.linspace(0, 23, 8).astype(int)
    with torch.no_grad():
        text = sample.make_scene(models, None, a.prompt, None)
        edited = sample.make_scene(models, one.source, None, a.edit)
    plain = settings_of(a)
    results = [made(case, 24, plain) for case in tqdm(cases, "sampling", leave=False, disable=None)]
    sheets = {1: [[None, *one.driving[eight]], [one.source, *results[0][eight]], [None, *made(one, 24, plain, scene=text)[eight]],
                  [one.source, *made(one, 24, plain, scene=edited)[eight]]],
              4: [[one.source, *one.driving[:12]], *([None, *made(one, 12, settings_of(a, method))] for method in ("anchored", "multidiffusion"))],
              6: [row for case, result in zip(cases, results) for row in ([None, *case.driving[eight]], [case.source, *result[eight]])],
              20: [[None, *one.driving[:12]], [one.source, *results[0][:12]], [None, *one.driving[12:]], [None, *results[0][12:]]]}
    notes = {1: f'driving frames; reenactment; the text "{a.prompt}"; the edit "{a.edit}"', 4: "driving frames; anchored; MultiDiffusion",
             6: "driving frames above results", 20: "24 frames: driving above results"}
    for number, rows in tqdm(sheets.items(), "drawing", leave=False, disable=None):
        Image.fromarray(np.concatenate([strip(row) for row in rows])).save(a.out / f"figure-{number}.png")
        about = dict(name=f"figure-{number}", markdown=f"**Figure {number}**: {notes[number]}.", picture=f"figure-{number}.png", model=models.sha256,
                     settings=dataclasses.asdict(plain))
        data.write_text(a.out / f"figure-{number}.json", json.dumps(about, indent=1))
    print(f"{', '.join(f'figure-{n}.png' for n in sheets)} in {a.out}")


# ----------------------------------------------------------------------------------------------------------------------
# Test sets, and the page of all results

def world_set(a):
    """OUT/world: clips of rendered people, sources, and the true reenactments, with pairs.csv; unseen in training."""
    sys.path.insert(0, str(DEMO))
    try:
        import world
    except ModuleNotFoundError as e:
        raise UserError(f"rendering people needs {e.name}: pip install -r demo/requirements.txt") from None
    root, lines = a.out / "world", []
    for folder in ("clips", "pictures", "truth", "many"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(a.n), "rendering", unit="pair", disable=None):
        rng, name = np.random.default_rng([2_000_000, i]), f"{i:04d}"
        driver, person, motion = world.sample_face(rng), world.sample_face(rng), world.sample_motion(rng, 48)
        still = {k: v[0] for k, v in world.sample_motion(rng, 1).items()}
        lines.append(dict(source=f"pictures/{name}.png", driving=f"clips/{name}.mp4", out=f"out/{name}.mp4"))
        if not (root / "truth" / f"{name}.mp4").exists():                       # the last of the three
            Image.fromarray(world.render(person, still, PIXELS)).save(root / "pictures" / f"{name}.png")
            for folder, face in (("clips", driver), ("truth", person)):
                save_video(root / folder / f"{name}.mp4", world.render_clip(face, motion, PIXELS))
    for i in tqdm(range(a.many), "rendering", unit="clip", disable=None):
        if not (path := root / "many" / f"{i:04d}.mp4").exists():
            save_video(path, world.sample_clip([2_500_000, i], 64)[0])
    write_pairs(root / "pairs.csv", lines)


def save_video(path, frames):
    with data.VideoWriter(path, 24, "synthetic, rendered") as out:
        for frame in frames:
            out.write(frame)


def write_pairs(path, lines):
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, ["source", "driving", "out"])
        table.writeheader()
        table.writerows(lines)
    print(f"{path}: {len(lines)} pairs")


def pairs_set(a):
    """pairs.csv of N random clips with as many random pictures, for `cross`, and for sample.py --pairs."""
    if len(a.folders) != 2:
        raise UserError("name two folders: python evaluate.py pairs CLIPS PICTURES")
    clips, pictures = (data.list_files(folder, kinds) for folder, kinds in zip(a.folders, (data.VIDEOS, data.PICTURES)))
    if not clips or not pictures:
        raise UserError(f"no {'videos' if not clips else 'pictures'} in {a.folders[bool(clips)]}")
    rng = np.random.default_rng(a.seed)
    lines = [dict(source=pictures[rng.integers(len(pictures))].resolve(), driving=p.resolve(), out=f"out/{i:05d}-{p.stem}.mp4")
             for i, p in enumerate(clips[j] for j in rng.permutation(len(clips))[:a.n])]
    a.out.mkdir(parents=True, exist_ok=True)
    write_pairs(a.out / "pairs.csv", lines)


def report(a):
    """OUT/report.md: every result that is there, in the paper's order."""
    tables = [p.stem for k in ("same", "cross") for p in sorted(a.out.glob(f"{k}*.json"))]
    order = [*tables, "length", "ablation", "scenes", "guidance", *(f"figure-{n}" for n in (1, 4, 6, 20))]
    found = [data.read_json(p, ["name", "markdown", "picture", "model"]) for name in order if (p := a.out / f"{name}.json").exists()]
    if not found:
        raise UserError(f"nothing is in {a.out} yet; run the other commands first")
    parts = [r["markdown"] + (f"\n\n![{r['name']}]({r['picture']})" if r["picture"] else "") for r in found]
    models = sorted({r["model"][:16] for r in found if r["model"]})
    data.write_text(a.out / "report.md", "\n\n".join(["# Evaluation", f"Models, by sha256: {', '.join(models)}.", *parts]) + "\n")
    print(a.out / "report.md")


def everything(a):
    """The whole evaluation on the demo world, part by part."""
    import subprocess
    n = a.n
    a.n, a.many = max(n, 50), 256
    world_set(a)
    a.n = n
    models = sample.load_models(a.model, a.device)
    table1(a, models, True)
    table1(a, models, False)
    length(a, models)
    ablation(argparse.Namespace(**dict(vars(a), n=min(n, 30))), models)
    many = argparse.Namespace(**dict(vars(a), n=256, clips=a.out / "world" / "many"))
    scenes(many, models)
    if not (a.out / "cache" / "frames" / "index.json").exists():
        if subprocess.run([sys.executable, Path(__file__).with_name("data.py"), many.clips, "--out", a.out / "cache" / "frames"]).returncode:
            raise UserError("the clips for Fig. 7 could not be cached; the reason is above")
    guidance(argparse.Namespace(**dict(vars(a), data=a.out / "cache" / "frames")), models)
    figures(a, models)
    report(a)


def arguments():
    count = sdit.number(int, 1)
    ap = sdit.Parser(__doc__)
    ap.add_argument("command", choices=["world", "pairs", "same", "cross", "length", "ablation", "scenes", "guidance", "figures", "report", "all"])
    ap.add_argument("folders", type=Path, nargs="*", help="of `pairs`: clips and pictures")
    ap.add_argument("--out", type=Path, default=Path("evaluation"))
    ap.add_argument("--model", type=Path, default=DEMO / "sdit.safetensors")
    ap.add_argument("--clips", type=Path, help="folder of driving videos (default: those of the demo world)")
    ap.add_argument("--pairs", type=Path, help="table with the columns source,driving,out (default: that of the demo world)")
    ap.add_argument("--videos", type=Path, help="judge these videos, named like the clips, or like the column out, instead of making some")
    ap.add_argument("--data", type=Path, default=Path("cache"), help="of `guidance`: cache of clips made by data.py")
    ap.add_argument("--weights", type=Path, default=sdit.DOWNLOADS, help="folder with the networks of FID, FVD, HyperIQA, ArcFace")
    ap.add_argument("--n", type=count, help="videos (default: 50 of the demo world, all of --clips or --pairs; the paper: "
                    "1000; of `scenes` half train the heads, so 1024 give its 512)")
    ap.add_argument("--frames", type=count, default=8, help="frames a video in same and cross; 16 and more for comparable FVD")
    ap.add_argument("--steps", type=sdit.number(int, 1, NoiseSchedule.steps), default=sample.Settings.steps, help="denoising steps")
    ap.add_argument("--guidance", type=sdit.number(float, -100, 100), default=sample.Settings.guidance, help="weight of classifier-free guidance")
    ap.add_argument("--train-steps", type=count, default=2000, help="of `guidance`: training steps of each denoiser")
    ap.add_argument("--seed", type=sdit.number(int, 0, 2 ** 31), default=0, help="of noise and choices")
    a = ap.parse_intermixed_args()                                              # folders may stand behind options
    if a.folders and a.command != "pairs":
        raise UserError(f"{a.command} takes no folders by themselves; give --clips {a.folders[0]}")
    if a.n is None and (a.command == "all" or not (a.clips or a.pairs or a.folders)):
        a.n = 50
    a.device, a.many, a.prompt, a.edit = None, 0, "a face with red hair, wearing a blue shirt", "black hair -> blond hair"
    return a


def main():
    a = arguments()
    LEFT_OUT.clear(), REPORTED.clear()
    with sdit.owned(a.out / a.command):
        run(a)
    if LEFT_OUT or REPORTED:
        raise UserError(f"{len(LEFT_OUT + REPORTED)} left out, named above", code=1)


def run(a):
    if a.command in ("world", "pairs", "report", "all"):
        dict(world=world_set, pairs=pairs_set, report=report, all=everything)[a.command](a)
    else:
        models = sample.load_models(a.model) if a.command != "guidance" else None
        if a.command in ("same", "cross"):
            table1(a, models, a.command == "same")
        else:
            dict(length=length, ablation=ablation, scenes=scenes, guidance=guidance, figures=figures)[a.command](a, models)


if __name__ == "__main__":
    sdit.run_main(main)
