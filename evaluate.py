"""The paper's metrics, protocols, tables and figures.

    python evaluate.py world                       # test clips, pictures, truths of the demo world
    python evaluate.py pairs CLIPS PICTURES --n 1000            # your own cross-identity pairs.csv
    python evaluate.py same --clips CLIPS                       # Table 1, same identity, by --model
    python evaluate.py same --clips CLIPS --videos FOLDER       # the same of given videos
    python evaluate.py cross --pairs pairs.csv                  # Table 1, cross identity
    python evaluate.py length      # Fig. 5;  also: ablation (dealing of frames), scenes (Table 2),
                                   # guidance (Fig. 7), figures (Figs. 1, 4, 6, 20)
    python evaluate.py report      # all that is there on one page, OUT/report.md
    python evaluate.py all         # everything, on the demo world

Each writes a table, OUT/NAME.json with every setting, and a picture where the paper has one. Values
of a clip are kept in OUT/cache, so the same command goes on. Metrics without weights are left out
with the reason; clips that cannot be measured are named, and the exit code is 1.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import math
import subprocess
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
PIXELS = 256  # LMSE is in pixels of a crop of this width (paper silent; its values fit)

# --------------------------------------------------------------------------------------------------
# Motion (paper 4.2). Landmarks (M, 478, 3) in the crop's coordinates, NaN in frames without a face


def lmse(made, driving, points=slice(None), axes=3):
    """Mean squared difference per coordinate, pixels², over frames where both were found."""
    error = (PIXELS * (made - driving)[:, points, :axes]) ** 2
    found = ~np.isnan(error).any((1, 2))
    return float(error[found].mean()) if found.any() else math.nan


def laid_onto(made, driving):
    """`made` shifted, rotated and scaled, frame by frame, onto the rigid points of `driving`, since
    raw LMSE rewards copying the driver's face."""
    moved = np.full_like(made, np.nan)
    for i in np.flatnonzero(~np.isnan(made[:, 0, 0]) & ~np.isnan(driving[:, 0, 0])):
        scale, rotation = sample.head_pose(made[i], driving[i])
        centred = made[i] - made[i][sample.RIGID].mean(0)
        moved[i] = scale * centred @ rotation.T + driving[i][sample.RIGID].mean(0)
    return moved


def motions(points):
    """Movements in landmarks (M, 478, 3), as (M,) arrays: angles in radians, the rest in units of
    the eyes' distance."""

    def gap(a, b, axes=2):
        return np.linalg.norm(points[:, a, :axes] - points[:, b, :axes], axis=-1)

    across, down = points[:, 263] - points[:, 33], points[:, 152] - points[:, 10]
    unit = gap(33, 263, 3)
    irises = points[:, 468] + points[:, 473]
    corners = points[:, [33, 362]].mean(1) + points[:, [133, 263]].mean(1)
    return dict(
        yaw=np.arctan2(across[:, 2], across[:, 0]),
        pitch=np.arctan2(down[:, 2], down[:, 1]),
        roll=np.arctan2(across[:, 1], across[:, 0]),
        mouth=gap(13, 14) / unit,
        eyes=(gap(159, 145) + gap(386, 374)) / unit,
        smile=(gap(61, 291, 3) - 0.3 * gap(13, 14)) / unit,
        gaze=(irises - corners)[:, 0] / unit,
    )


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum() + 1e-12))


# --------------------------------------------------------------------------------------------------
# Consistency (paper 4.2): cosines of CLIP's unit vectors


def csim(source, made):
    """Smallest cosine of the source (S,) and the made frames (M, S)."""
    return float((made @ source).min())


def self_csim(made, driving):
    """Difference of the smallest cosine to the first frame in two videos (M, S); 0 is best. Paper
    silent on the pairs of frames."""
    return abs(csim(made[0], made) - csim(driving[0], driving))


# --------------------------------------------------------------------------------------------------
# Fidelity (paper 4.2)


def frechet(a, b):
    """Fréchet distance of features (n, d) and (m, d): FID of Inception's, FVD of I3D's."""
    from torch_fidelity import metric_fid

    if min(len(a), len(b)) < 2:
        return math.nan
    a, b = (metric_fid.fid_features_to_statistics(torch.as_tensor(x)) for x in (a, b))
    found = metric_fid.fid_statistics_to_metric(a, b, False)
    return float(found["frechet_inception_distance"])


def kernel_distance(a, b):
    """KID times 1000: unlike FID, unbiased for few samples."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b, size = torch.as_tensor(a), torch.as_tensor(b), min(1000, len(a), len(b))
    options = dict(kid_subsets=100, kid_subset_size=size, rng_seed=0, verbose=False)
    return 1e3 * float(kid_features_to_metric(a, b, **options)["kernel_inception_distance_mean"])


def ssim(a, b):
    """Mean structural similarity of (B, 3, h, w) in [-1, 1] (Wang et al. 2004: sigma 1.5)."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 4.5)
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)
    blur = lambda x: F.conv2d(x, window, groups=3)
    a, b = (a + 1) / 2, (b + 1) / 2
    ma, mb = blur(a), blur(b)
    va, vb, vab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    structure = (2 * vab + 9e-4) / (va + vb + 9e-4)
    return ((2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4) * structure).mean().item()


def psnr(a, b):
    """dB, of images in [-1, 1]."""
    return 10 * math.log10(4 / max(F.mse_loss(a, b).item(), 1e-10))


class HyperIQA(nn.Module):
    """Su et al. 2020: features of the whole picture become the weights of a small network that
    judges features of four depths of a ResNet-50. Parameter names as in the published weights,
    trained on KonIQ-10k: 0 (bad) to 100."""

    sizes = [224, 112, 56, 28, 14]  # widths of the small network

    def __init__(self):
        super().__init__()
        import torchvision

        self.res = torchvision.models.resnet50()
        del self.res.fc
        for i, (width, pooled) in enumerate([(256, 16), (512, 32), (1024, 64)], 1):
            pool = nn.Sequential(nn.Conv2d(width, pooled, 1, bias=False), nn.AvgPool2d(7))
            setattr(self.res, f"lda{i}_pool", pool)
            setattr(self.res, f"lda{i}_fc", nn.Linear(pooled * (16 >> i) ** 2, 16))
        self.res.lda4_fc = nn.Linear(2048, 176)

        convolutions = [nn.Conv2d(2048, 1024, 1), nn.Conv2d(1024, 512, 1), nn.Conv2d(512, 112, 1)]
        self.conv1 = nn.Sequential(*[m for c in convolutions for m in (c, nn.ReLU())])
        for i, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:]), 1):
            weights = nn.Conv2d(112, inputs * outputs // 49, 3, padding=1)
            setattr(self, f"fc{i}w_conv", weights)
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

        x = self.conv1(x)  # (B, 112, 7, 7)
        whole, y = x.mean((2, 3)), torch.cat(seen, 1)  # (B, 112), (B, 224)
        for i, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:]), 1):
            weight = getattr(self, f"fc{i}w_conv")(x).reshape(-1, outputs, inputs)
            bias = getattr(self, f"fc{i}b_fc")(whole)
            y = torch.sigmoid((weight @ y[:, :, None])[..., 0] + bias)
        return (self.fc5w_fc(whole) * y).sum(1) + self.fc5b_fc(whole)[:, 0]


@torch.no_grad()
def hyperiqa(net, images):
    """Quality (M,) of images (M, h, w, 3) uint8: the mean over 5 x 5 crops of 224 of the picture at
    512 x 384 (the original's crops are random)."""
    from torchvision.transforms.functional import normalize

    scores = []
    for image in images:
        x = torch.from_numpy(image).to(net.fc5b_fc.weight.device).movedim(-1, 0)[None].float() / 255
        x = F.interpolate(x, (512, 384), mode="bilinear", antialias=True)[0]
        x = normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        tops, lefts = np.linspace(0, 288, 5).astype(int), np.linspace(0, 160, 5).astype(int)
        crops = [x[:, y : y + 224, z : z + 224] for y in tops for z in lefts]
        scores.append(net(torch.stack(crops)).mean().item())
    return np.array(scores)


# Networks of the metrics, looked for in --weights: (address, sha256)
# fmt: off
HUB, INCEPTION = "https://huggingface.co", "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS = {
    INCEPTION: (
        f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "i3d_torchscript.pt": (
        f"{HUB}/flateon/FVD-I3D-torchscript/resolve/1c2d61711c52571ad617a1063e6fa691b212e184/i3d_torchscript.pt",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"),
    "koniq_pretrained.pkl": (
        f"{HUB}/ByteDance/LatentSync-1.5/resolve/main/auxiliary/koniq_pretrained.pkl",
        "ff9277bcc68ecc10e77d88b6d0a32825ec3c85562095542734ec6212eaaf6d81"),
    "w600k_r50.onnx": (
        f"{HUB}/public-data/insightface/resolve/main/models/buffalo_l/w600k_r50.onnx",
        "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"),
}
# fmt: on


def find_weights(name, folder):
    """Path of a file of WEIGHTS in a folder; UserError says where to get it."""
    (url, digest), path = WEIGHTS[name], Path(folder) / name
    source = f"fetch {url} (sha256 {digest[:12]}...)"
    if not path.is_file():
        raise UserError(f"{name} is not in {folder}; {source}")
    if data.sha256(path) != digest:
        raise UserError(f"{path} is not the published file; {source} again")
    return path


def load_inception(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (M, 2048): the network of FID, with TensorFlow's resizing."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = find_weights(INCEPTION, folder)
    torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity loads any pickle
    net = FeatureExtractorInceptionV3("inception", ["2048"], str(path)).to(device)

    def features(images):
        parts = torch.from_numpy(images).movedim(-1, 1).split(16)
        return torch.cat([net(x.to(device))[0] for x in parts]).cpu().numpy()

    return features


def load_i3d(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (1, 400), of the first 16 frames. I3D needs 9 (paper silent on its 8):
    fewer than 16 are repeated evenly to 16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.load(find_weights("i3d_torchscript.pt", folder), device).eval()

    @torch.no_grad()
    def features(images):
        images = images[np.arange(16) * min(len(images), 16) // 16]
        x = torch.from_numpy(images).to(device).movedim(-1, 0)[None].float()  # (1, 3, 16, h, w)
        return net(x, rescale=True, resize=True, return_features=True).cpu().numpy()

    return features


def load_hyperiqa(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (M,)."""
    path = find_weights("koniq_pretrained.pkl", folder)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    net = sdit.fill(HyperIQA().to(device), tensors, path.name).eval()
    return functools.partial(hyperiqa, net)


# fmt: off
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
# fmt: on


def arcface_points(points):
    """ArcFace's five points (5, 2) of landmarks (478, 3): eyes, nose, corners of the mouth."""
    eyes = points[[33, 133]].mean(0), points[[362, 263]].mean(0)
    return np.stack([*eyes, points[4], points[61], points[291]])[:, :2]


def similarity(points, onto):
    """(2, 3) matrix: the rotation, scale and shift that best take points (n, 2) to others."""
    a, b = ((p - p.mean(0)) @ (1, 1j) for p in (points, onto))  # rotation and scale: one factor
    factor = np.vdot(a, b) / np.vdot(a, a)
    turn = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.c_[turn, onto.mean(0) - turn @ points.mean(0)]


def load_arcface(folder):
    """(images (M, h, w, 3) uint8, landmarks (M, 478, 3) in 0..1) -> unit vectors (M, 512). The
    weights are for research only."""
    import cv2
    import onnxruntime

    path = find_weights("w600k_r50.onnx", folder)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features(images, landmarks):
        faces = []
        for image, points in zip(images, landmarks):
            warp = similarity(arcface_points(points) * len(image), ARCFACE_TEMPLATE)
            faces.append(cv2.warpAffine(image, warp, (112, 112)))
        x = data.to_tensor(np.stack(faces)).numpy()
        x = session.run(None, {session.get_inputs()[0].name: x})[0]
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return features


# --------------------------------------------------------------------------------------------------
# What a protocol works on


@dataclasses.dataclass
class Case:
    """One reenactment to be judged; crops are uint8, (.., h, h, 3)."""

    source: np.ndarray
    driving: np.ndarray  # (M, ...)
    landmarks: np.ndarray  # (M, 478, 3) of the driving face
    truth: np.ndarray = None  # (M, ...), where it is known
    given: np.ndarray = None  # (M, ...), a result made elsewhere


def cut(path, tracked, like, frames, size):
    """Frames (numbers) of a video as crops (len(frames), size, size, 3). A video of the size of
    `like` is cut by its square; sample.py's results and other sizes are square crops."""
    video = data.Video(path)
    if len(video) != len(like):
        raise UserError(f"{path} has {len(video)} frames, the driving video {len(like)}")
    made_here = path != like.path and sample.made_here(path)
    shape, crops = next(iter(like)).shape, {}
    for f, image in enumerate(video):
        if f not in frames:
            continue
        if image.shape == shape and not made_here:
            crops[f] = data.crop(image, tracked.square, size)
        elif image.shape[0] == image.shape[1]:
            crops[f] = data.resize(image, size)
        else:
            raise UserError(f"{path} is neither square nor of the driving video's size")
    return np.stack([crops[f] for f in frames])


@functools.lru_cache(2048)
def track(path, landmarker):
    """`data.track` of a video file, for every method and length once."""
    return data.track(data.Video(path), landmarker, path)


def stem(path, folder):
    """A video's name: its path within the folder, without ending."""
    return str(path.relative_to(folder).with_suffix(""))


@functools.cache
def videos_of(folder):
    return {stem(p, folder): p for p in data.list_files(folder, data.VIDEOS)}


def named(folder, name):
    """The video of a clip in a folder of results."""
    if name not in videos_of(folder):
        raise UserError(f"{folder} has no video {name}.*")
    return videos_of(folder)[name]


def read_case(path, a, models, number, M, source=None, truth=None, given=None):
    """A Case of a driving video: M consecutive frames from a random start (paper 4.3.1); the source
    is the face of the picture `source`, or the frame furthest in time. `truth`, `given`: videos."""
    video = data.Video(path)
    if len(video) <= M:
        raise UserError(f"{path} has {len(video)} frames; {M} and a source need {M + 1}")
    tracked = track(path, models.landmarker)
    after = len(video) - M
    first = int(np.random.default_rng([a.seed, number]).integers(0, after + 1))
    chosen = np.arange(first, first + M)
    furthest = 0 if first >= after - first else len(video) - 1

    size = PIXELS if given else models.size
    picture, *driving = cut(path, tracked, video, [furthest, *chosen.tolist()], size)
    if source is not None:
        picture = sample.read_source(source, models.landmarker, size, 0)[0]
    others = [p and cut(p, tracked, video, chosen.tolist(), size) for p in (truth, given)]
    return Case(picture, np.stack(driving), tracked.landmarks[chosen], *others)


def read_pairs(path):
    """[(name, driving, source, result)] of a table with the columns source,driving,out, whose paths
    are relative to it."""
    try:
        found = []
        for line in sample.read_pairs(path):
            paths = [Path(path).parent / line[k] for k in ("driving", "source", "out")]
            found.append((str(Path(line["out"]).with_suffix("")), *paths))
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} has a line without source, driving or out") from None
    if len({name for name, *_ in found}) < len(found):
        raise UserError(f"{path} names one result twice in the column out")
    return found


@torch.no_grad()
def sample_latents(models, source, landmarks, settings, plan=None, scene=None):
    """source (h, w, 3) uint8, landmarks (M, 478, 3) -> latents (M, C, H, W) on the CPU. `plan`: in
    place of sample.plan_rows; `scene`: in place of the source's."""
    if scene is None:
        scene = sample.make_scene(models, source, None, None)
    conditions = sample.make_conditions(models, scene, landmarks, settings.guidance)
    latents = sample.sample_video(models.sdit, conditions, settings, plan=plan)
    return torch.stack([latents[f] for f in range(len(landmarks))]).float()


@torch.no_grad()
def reenact(models, source, landmarks, settings, plan=None, scene=None):
    """The same decoded: (M, size, size, 3) uint8."""
    latents = sample_latents(models, source, landmarks, settings, plan, scene)
    return data.to_images(models.autoencoder.decode(latents.to(models.device)))


def find_landmarks(landmarker, images):
    """(M, 478, 3) in 0..1, NaN where there is no face. MediaPipe needs 96 pixels."""
    found = [landmarker.landmarks(data.resize(im, PIXELS)) for im in images]
    missing = np.full((LANDMARKS, 3), np.nan, np.float32)
    return np.stack([missing if p is None else p / PIXELS for p in found])


@torch.no_grad()
def clip_vectors(models, images):
    return models.encoder.images(data.to_tensor(images)).cpu().numpy()


def describe(images, models, nets):
    """Arrays that the metrics need of images (M, h, h, 3)."""
    landmarks = find_landmarks(models.landmarker, images)
    features = {name: net(images) for name, net in nets.items() if callable(net)}
    return dict(landmarks=landmarks, clip=clip_vectors(models, images)) | features


def load_nets(folder, device="cpu"):
    """Networks of the fidelity metrics by name; where the weights are missing, the reason."""
    nets = dict(inception=load_inception, i3d=load_i3d, hyperiqa=load_hyperiqa)
    for name, load in nets.items():
        try:
            nets[name] = load(folder, device)
        except UserError as e:
            nets[name] = str(e)
    return nets


LEFT_OUT, REPORTED = [], []  # clips that could not be measured, since the last table and before


def measured_by_all(found):
    """{column: {name: result}} with the names that every column has, so columns can be compared."""
    names = set.intersection(*map(set, found.values()))
    if not names:
        raise UserError("no clip could be measured in every column of the table")
    return {c: {n: r for n, r in results.items() if n in names} for c, results in found.items()}


def stamp(paths):
    """What changes when one of these files does."""
    return [
        [p.stat().st_size, p.stat().st_mtime_ns] if p.exists() else None for p in map(Path, paths)
    ]


def measured(key, names, measure, a, files=lambda name: ()):
    """{name: measure(number, name)}, arrays kept in OUT/cache under `key` and the state of `files`
    (name -> paths): all that decides the values."""
    text = json.dumps(key, sort_keys=True, default=str)
    folder = a.out / "cache" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, name in enumerate(tqdm(names, key[0], unit="clip", disable=None)):
        try:
            mark = zlib.crc32(json.dumps([number, stamp(filter(None, files(name)))]).encode())
            path = folder / f"{name.replace('/', '__')}-{mark:08x}.safetensors"
            try:
                tensors = sdit.read_tensors(path)[0]
            except UserError:  # not there yet, or torn
                values = measure(number, name)
                tensors = {k: torch.as_tensor(np.asarray(v)) for k, v in values.items()}
                sdit.write_tensors(path, tensors, {})
            found[name] = {k: v.numpy() for k, v in tensors.items()}
        except Exception as e:  # whatever is wrong with a clip, the rest goes on
            kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
            LEFT_OUT.append(f"{name}: {kind}{e}")
            print(f"left out: {LEFT_OUT[-1]}", file=sys.stderr)
    if not found:
        raise UserError(f"nothing could be measured for {key[0]}")
    return found


def bootstrap(values, repeat=1000):
    """(mean, half of the 95 % interval) over videos; one video has no interval."""
    values = np.array([v for v in values if not math.isnan(v)])
    if len(values) < 2:
        return float(values[0]) if len(values) else math.nan, math.nan
    chosen = np.random.default_rng(0).integers(0, len(values), (repeat, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [0.025, 0.975])
    return float(values.mean()), float(high - low) / 2


def plus(values, digits=2):
    """ "mean ± half interval"."""
    mean, half = bootstrap(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def finish(a, models, name, title, header, rows, notes=(), figure=None, **protocol):
    """Print the table; write OUT/NAME.json and, with a matplotlib figure, OUT/NAME.png."""
    table = [header, ["---"] * len(header), *rows]
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    text = "\n".join([f"**{title}**", "", *lines, "", *notes])
    a.out.mkdir(parents=True, exist_ok=True)
    if figure is not None:
        import matplotlib.pyplot as plt

        figure.savefig(a.out / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)

    packages = ("torch", "mediapipe", "torch-fidelity", "scikit-learn", "open_clip_torch")
    about = dict(
        name=name,
        markdown=text,
        picture=f"{name}.png" if figure is not None else None,
        settings=vars(a),
        model=models and models.sha256,
        sampler=sample.Settings.sampler,
        versions={p: metadata.version(p) for p in packages},
        left_out=list(LEFT_OUT),
        crop="face box 0.45 x 0.53 of a fixed square",
        **protocol,
    )
    REPORTED.extend(LEFT_OUT)
    LEFT_OUT.clear()
    data.write_text(a.out / f"{name}.json", json.dumps(about, indent=1, default=str))
    print(f"\n{text}")


def plot(x, lines, **labels):
    """A matplotlib figure of lines {name: (y,) or (y, half of its interval)} over x."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4))
    for name, line in lines.items():
        ax.errorbar(x, *line, label=name, capsize=3, marker=".")
    ax.set(**labels)
    ax.legend()
    return figure


def settings_of(a, number=0, **rest):
    settings = dict(steps=a.steps, guidance=a.guidance, method="anchored", seed=a.seed + number)
    return sample.Settings(**settings | rest)


# --------------------------------------------------------------------------------------------------
# Table 1 (paper 4.3)

METHODS = ("anchored", "multidiffusion", "independent")
PAPER = {  # of its XL model on its own clips, same and cross identity
    "FID": ("38.2", "34.4"),
    "FVD": ("111", "236"),
    "HyperIQA": ("50.4", "52.1"),
    "LMSE": ("8.92", "9.61"),
    "Expressive-LMSE": ("9.07", "9.39"),
    "CSIM": ("0.83", "0.74"),
    "Self-CSIM": ("0.04", "0.04"),
}


def judge(case, made, models, nets):
    """All that is measured of a case: dict of arrays."""
    ours = describe(made, models, nets)
    theirs = describe(case.driving, models, {k: v for k, v in nets.items() if k != "hyperiqa"})
    result = {f"made_{k}": v for k, v in ours.items()}
    result |= {f"driving_{k}": v for k, v in theirs.items()}
    result["source_clip"] = clip_vectors(models, case.source[None])[0]
    if case.truth is not None:
        a, b = data.to_tensor(made), data.to_tensor(case.truth)
        result |= dict(psnr=psnr(a, b), ssim=ssim(a, b))
    return result


def table_columns(found, nets):
    """{metric: text} of one method's cases."""
    results, column = list(found.values()), {}

    def both(key):
        return [np.concatenate([r[f"{who}_{key}"] for r in results]) for who in ("made", "driving")]

    # Fidelity
    if callable(nets["inception"]):
        column["FID"] = f"{frechet(*both('inception')):.1f}"
        column["KID x 1000"] = f"{kernel_distance(*both('inception')):.2f}"
    if callable(nets["i3d"]) and len(results) > 1:
        column["FVD"] = f"{frechet(*both('i3d')):.0f}"
    if callable(nets["hyperiqa"]):
        column["HyperIQA"] = plus([r["made_hyperiqa"].mean() for r in results], 1)
    column["Fréchet distance, CLIP features"] = f"{frechet(*both('clip')):.3f}"

    # Motion
    pairs = [(r["made_landmarks"], r["driving_landmarks"]) for r in results]
    seen = [[~np.isnan(points[:, 0, 0]) for points in pair] for pair in pairs]
    column["LMSE"] = plus([lmse(*p) for p in pairs], 1)
    column["Expressive-LMSE"] = plus([lmse(*p, data.EXPRESSIVE) for p in pairs], 1)
    column["LMSE, x and y"] = plus([lmse(*p, axes=2) for p in pairs], 1)
    laid = [lmse(laid_onto(*p), p[1]) for p in pairs]
    column["LMSE, heads laid onto each other"] = plus(laid, 1)
    missed = [f"{100 * np.mean([1 - s[i].mean() for s in seen]):.1f} %" for i in (0, 1)]
    column["frames without a face, made and driving"] = ", ".join(missed)

    # Consistency
    column["CSIM"] = plus([csim(r["source_clip"], r["made_clip"]) for r in results], 3)
    column["Self-CSIM"] = plus([self_csim(r["made_clip"], r["driving_clip"]) for r in results], 3)
    if known := [r for r in results if "psnr" in r]:
        column["PSNR against the truth, dB"] = plus([float(r["psnr"]) for r in known], 1)
        column["SSIM"] = plus([float(r["ssim"]) for r in known], 2)

    # Movements
    moved = []
    for (made, driving), (ours, theirs) in zip(pairs, seen):
        if (ours & theirs).sum() > 3:
            moved.append((motions(made[ours & theirs]), motions(driving[ours & theirs])))
    for k in ("yaw", "mouth", "eyes"):
        column[f"{k}: correlation"] = plus([correlation(m[k], d[k]) for m, d in moved], 2)
    errors = lambda k: [abs(m[k] - d[k]).mean() for m, d in moved]
    for k in ("yaw", "pitch", "roll"):
        column[f"{k}: error, degrees"] = plus(np.degrees(errors(k)), 1)
    column["mouth: error, share of the eyes' distance"] = plus(errors("mouth"), 3)
    return column


def list_clips(a):
    """{name: path} of the first `--n` videos, or of all."""
    folder = a.clips or a.out / "world" / "clips"
    paths = data.list_files(folder, data.VIDEOS)
    if not paths:
        raise UserError(f"no videos in {folder}; give --clips, or make some: evaluate.py world")
    names = [stem(p, folder) for p in paths]
    if twice := {n for n in names if names.count(n) > 1}:
        raise UserError(f"{folder} has two videos named {min(twice)}, with different endings")
    return dict(list(zip(names, paths))[: a.n])


def table_items(a, same):
    """{name: (driving video, source picture, true result, place of a given result)}; the last three
    may be None. With the same identity, the source is a frame of the clip, the truth the clip."""
    if same:
        return {name: (path, None, path, None) for name, path in list_clips(a).items()}
    table = a.pairs or a.out / "world" / "pairs.csv"
    truths = {p.stem: p for p in data.list_files(table.parent / "truth", data.VIDEOS)}
    items = {}
    for name, driving, source, out in read_pairs(table)[: a.n]:
        items[name] = driving, source, truths.get(Path(name).name), out
    return items


def table1(a, models, same):
    """Table 1 for one protocol: of videos made by each method of sampling, or of given ones, in the
    folder `--videos` or where the column out names them."""
    protocol = "same" if same else "cross"
    nets, items, found = load_nets(a.weights, models.device), table_items(a, same), {}
    given = bool(a.videos or any(out and out.exists() for *_, out in items.values()))

    def result_of(name):
        if given:
            return named(a.videos, name) if a.videos else items[name][3]

    for method in ["given"] if given else METHODS:

        def measure(number, name):
            driving, source, truth, _ = items[name]
            place = result_of(name)
            case = read_case(driving, a, models, number, a.frames, source, truth, place)
            made = case.given
            if not given:
                settings = settings_of(a, number, method=method)
                made = reenact(models, case.source, case.landmarks, settings)
            return judge(case, made, models, nets)

        settings = dataclasses.astuple(
            settings_of(a, method=sample.Settings.method if given else method)
        )
        there = sorted(k for k, v in nets.items() if callable(v))
        places = [str(p) for p in (a.videos, a.pairs, a.clips)]
        key = [f"{protocol}, {method}", models.sha256, *places, a.frames, settings, there]
        column = method
        if given:
            column = a.videos.resolve().name if a.videos else "column out"
        files = lambda name: [*items[name][:3], result_of(name)]
        found[column] = measured(key, list(items), measure, a, files)

    found = measured_by_all(found)
    columns = {column: table_columns(results, nets) for column, results in found.items()}
    metrics = dict.fromkeys(k for c in columns.values() for k in c)
    rows = []
    for k in metrics:
        paper = PAPER.get(k, ("", ""))[0 if same else 1]
        rows.append([k, *(c.get(k, "-") for c in columns.values()), paper])

    missing = [f"Missing: {k}: {reason}" for k, reason in nets.items() if not callable(reason)]
    count = len(next(iter(found.values())))
    note = (
        f"{count} videos of {a.frames} frames; mean ± half of the 95 % interval over videos; "
        f"LMSE in pixels² of a crop of 256."
    )
    name = protocol
    if given:
        name += f"-{a.videos.resolve().name if a.videos else 'given'}"
    finish(
        a,
        models,
        name,
        f"{protocol.title()}-identity reenactment (Table 1)",
        ["", *columns, "paper (XL, real faces)"],
        rows,
        [note, *missing],
        fvd=f"{a.frames} frames spread over 16" if a.frames < 16 else "first 16 frames",
        reference="frames of the driving clips",
        missing=missing,
    )


# --------------------------------------------------------------------------------------------------
# Consistency over length (Fig. 5) and the dealing of frames


def self_reenactments(a, models, title, M, plan=lambda number: None, **settings):
    """{name: what `judge` measures} of the clips, each driving its own face, M frames long. `plan`:
    (number of the clip) -> (rows, keep) instead of sample.plan_rows."""
    paths = list_clips(a)

    def measure(number, name):
        case, ours = (
            read_case(paths[name], a, models, number, M),
            settings_of(a, number, **settings),
        )
        made = reenact(models, case.source, case.landmarks, ours, plan(number))
        return judge(case, made, models, {})

    variant = dataclasses.astuple(settings_of(a, **settings))
    key = [title, models.sha256, str(a.clips), M, variant]
    return measured(key, list(paths), measure, a, lambda name: [paths[name]])


def length(a, models, lengths=(12, 16, 20, 24)):
    """Fig. 5: Self-CSIM of self-reenactment against the number of frames."""
    found = {}
    for M in lengths:
        for method in METHODS:
            title = f"length {M}, {method}"
            found[M, method] = self_reenactments(a, models, title, M, method=method)

    values = {}
    for column, results in measured_by_all(found).items():
        pairs = [(r["made_clip"], r["driving_clip"]) for r in results.values()]
        values[column] = [self_csim(*pair) for pair in pairs]
    lines = {m: zip(*(bootstrap(values[M, m]) for M in lengths)) for m in METHODS}
    labels = dict(xlabel="frames", ylabel="Self-CSIM (lower is better)", xticks=lengths)
    figure = plot(lengths, lines, **labels)
    rows = [[M, *(plus(values[M, m], 3) for m in METHODS)] for M in lengths]
    count = len(values[lengths[0], "anchored"])
    paper = "anchored below MultiDiffusion at every length, the gap growing with it"
    notes = [f"{count} videos a point. The paper: {paper}."]
    for M in lengths:
        for m in METHODS[1:]:
            gap = plus(np.subtract(values[M, "anchored"], values[M, m]), 3)
            notes.append(f"At {M} frames, anchored minus {m}, video by video: {gap}.")
    title = "Self-CSIM against length (Fig. 5)"
    finish(a, models, "length", title, ["frames", *METHODS], rows, notes, figure)


def deal(M, T, how, anchor=None, seed=0):
    """`sample.plan_rows`, with the frames of each side dealt strided, contiguous or at random."""
    rows, keep = sample.plan_rows(M, T, anchor)
    if how == "strided":
        return rows, keep
    slot, centre = T // 2, rows[0, T // 2]
    sides = (0, slot, np.arange(centre)), (slot + 1, T, np.arange(centre + 1, M))
    for first, end, side in sides:
        width, last = end - first, side.max(initial=0)
        if how == "random":
            side = np.random.default_rng(seed).permutation(side)
        for b in range(len(rows)) if len(side) else ():
            dealt = np.sort(side[b * width : (b + 1) * width])
            rows[b, first:end] = dealt[-1] if len(dealt) else last
            rows[b, first : first + len(dealt)] = dealt
            keep[b, first:end] = np.arange(width) < len(dealt)
    return rows, keep


def ablation(a, models, M=24):
    """Not in the paper: how frames are dealt to rows, which frame is the anchor, how many steps."""
    T = models.sdit.config.frames
    variants = {f"dealt {how}": (how, None, a.steps) for how in ("strided", "random", "contiguous")}
    variants["anchor central"] = "strided", (M - 1) // 2, a.steps
    variants["anchor first"] = "strided", 0, a.steps
    variants |= {f"{steps} steps": ("strided", None, steps) for steps in (50, 100)}
    found = {}
    for name, (how, anchor, steps) in variants.items():
        plan = lambda number: deal(M, T, how, anchor, a.seed + number)
        found[name] = self_reenactments(a, models, f"ablation, {name}", M, plan, steps=steps)

    scores = {}  # (clips, 3)
    for name, results in measured_by_all(found).items():
        scores[name] = []
        for r in results.values():
            pair = r["made_landmarks"], r["driving_landmarks"]
            consistency = self_csim(r["made_clip"], r["driving_clip"])
            scores[name].append([consistency, lmse(*pair), lmse(*pair, data.EXPRESSIVE)])
    base, rows = np.array(scores["dealt strided"]), []
    for name, score in scores.items():
        count = len(sample.plan_rows(M, T, variants[name][1])[0])
        row = [plus(s, digits) for s, digits in zip(np.transpose(score), (3, 1, 1))]
        if name == "dealt strided":
            name, gaps = f"{name} (as planned, {a.steps} steps)", ["", ""]
        else:
            gaps = [plus(s, digits) for s, digits in zip(np.transpose(score - base), (3, 1))]
        rows.append([name, count, *row, *gaps])

    metrics = ["Self-CSIM", "LMSE", "Expressive-LMSE"]
    header = ["", "rows", *metrics, *(f"{m} minus the first line's" for m in metrics[:2])]
    note = f"{len(base)} self-reenactments of {M} frames; differences video by video."
    finish(a, models, "ablation", "Dealing, anchor, steps", header, rows, [note])


# --------------------------------------------------------------------------------------------------
# Scene recognition (Table 2, Fig. 14)


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


def scenes(a, models, frames=64):
    """Table 2: how well frames' vectors cluster by video; heads learn on half of the videos and are
    judged on the other. Fig. 14: t-SNE."""
    paths = list_clips(a)
    try:
        arcface, missing = load_arcface(a.weights), []
    except UserError as e:
        arcface, missing = None, [f"Missing: ArcFace: {e}"]

    def measure(number, name):
        video, tracked = data.Video(paths[name]), track(paths[name], models.landmarker)
        chosen = np.unique(np.linspace(0, len(video) - 1, frames).round().astype(int)).tolist()
        crops = cut(paths[name], tracked, video, chosen, PIXELS if arcface else models.size)
        result = dict(clip=clip_vectors(models, crops))
        return result | (dict(arcface=arcface(crops, tracked.landmarks[chosen])) if arcface else {})

    key = [f"scenes, {frames} frames", models.sha256, str(a.clips), arcface is not None]
    found = list(measured(key, list(paths), measure, a, lambda n: [paths[n]]).values())
    half = len(found) // 2
    if half < 2:
        raise UserError("scenes needs four videos: half train the heads, half are clustered")

    def gather(key, part):
        labels = np.repeat(np.arange(len(part)), [len(r[key]) for r in part])
        return np.concatenate([r[key] for r in part]), labels

    x, y = map(torch.from_numpy, gather("clip", found[:half]))
    test, labels = gather("clip", found[half:])
    vectors = {"ArcFace": gather("arcface", found[half:])[0]} if arcface else {}
    vectors["CLIP"] = test
    for kind in ("centre", "ArcFace", "focal"):
        head = train_head(x, y, kind, a.seed)
        vectors[f"MLP, {kind} loss"] = head(torch.from_numpy(test)).detach().numpy()

    paper = {
        "ArcFace": "1.516 / 113",
        "CLIP": "0.611 / 641",
        "MLP, centre loss": "0.819 / 411",
        "MLP, ArcFace loss": "0.810 / 413",
        "MLP, focal loss": "0.673 / 493",
    }
    rows = []
    for k, v in vectors.items():
        bouldin, harabasz = clustering(v, labels)
        rows.append([k, f"{bouldin:.3f}", f"{harabasz:.0f}", paper[k]])
    header = ["", "Davies-Bouldin, lower is better", "Calinski-Harabasz, higher is better", "paper"]
    others = f"heads trained on {half} other videos"
    note = f"{len(test)} frames of {len(found) - half} videos; {others}."
    figure = tsne({k: v for k, v in vectors.items() if k in ("ArcFace", "CLIP")}, labels)
    title = "Scene recognition (Table 2, Fig. 14)"
    finish(a, models, "scenes", title, header, rows, [note, *missing], figure)


def tsne(vectors, labels, videos=24):
    """Fig. 14: a matplotlib figure, one panel for each kind of vectors."""
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    figure, axes = plt.subplots(1, len(vectors), figsize=(5 * len(vectors), 5), squeeze=False)
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


def only(batch, signals):
    """A batch without the conditions that are not among the signals."""
    return batch | {k: None for k in ("landmarks", "scene") if k not in signals}


def train_denoiser(rows, signals, a, batch=16):
    """A denoiser of single frames with some of the conditions; the seed alone decides its start,
    data and noise."""
    torch.manual_seed(a.seed)
    model, schedule = train.build_model(rows, "demo", 1), NoiseSchedule()
    optimizer = train.build_optimizer(model, 1e-3, 1e-4, 0.01)
    rule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, a.train_steps)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=sdit.has_bf16("cpu"))
    sampler = train.shares(0, a.train_steps, batch, 0, 1, 1)
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler)
    title = "training with " + (" + ".join(signals) or "none")
    for step, one in enumerate(tqdm(loader, title, unit="step", leave=False, disable=None)):
        t, noise, _ = train.draw(a.seed, step, one["latents"].shape, 0)
        keep = torch.zeros(batch, dtype=torch.bool)
        with precision:
            error, bound = train.diffusion_loss(model, schedule, only(one, signals), t, noise, keep)
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
    one = only(one, signals) | dict(mask=torch.zeros_like(one["mask"]))
    keep, errors = torch.zeros(n, dtype=torch.bool), []
    for time in times:
        generator = torch.Generator().manual_seed(seed + time)
        noise, t = torch.randn(one["latents"].shape, generator=generator), torch.full((n,), time)
        errors.append(train.diffusion_loss(model, schedule, one, t, noise, keep)[0].numpy())
    return np.stack(errors, 1)


def guidance(a, models):
    """Fig. 7: the error of four denoisers, trained alike on cached frames (--data), over timesteps
    against that of the unconditional one."""
    rows = data.Rows(a.data, 1, a.seed)
    unseen = data.Rows(a.data, 1, a.seed, held_out=True)
    times = list(range(25, NoiseSchedule.steps, 50))

    def measure(number, name):
        model, n = train_denoiser(rows, SIGNALS[name], a), min(256, 8 * len(unseen))
        return dict(errors=denoising_errors(model, unseen, SIGNALS[name], times, a.seed, n))

    index = data.sha256(a.data / "index.json")
    key = ["guidance", str(a.data), index, a.seed, a.train_steps]
    found = measured(key, list(SIGNALS), measure, a)
    if "none" not in found:
        raise UserError("the unguided denoiser could not be trained; the reason is above")
    errors = {k: found[k]["errors"].mean(0) for k in SIGNALS if k in found}
    ratios = {k: error / errors["none"] for k, error in errors.items() if k != "none"}

    lines = {k: [ratio] for k, ratio in ratios.items()}
    figure = plot(times, lines, xlabel="timestep", ylabel="error / error of the unguided")
    quarters = np.array_split(np.arange(len(times)), 4)
    table = [[k, *(f"{ratio[q].mean():.3f}" for q in quarters)] for k, ratio in ratios.items()]
    header = ["", *(f"t = {times[q[0]]} to {times[q[-1]]}" for q in quarters)]
    title = "Impact of the guidance signals (Fig. 7): error / error of the unguided denoiser"
    note = (
        "The paper: landmarks help most at large t, both together are best, gains are largest in "
        "the middle."
    )
    errors = {k: error.tolist() for k, error in errors.items()}
    finish(a, None, "guidance", title, header, table, [note], figure, errors=errors)


# --------------------------------------------------------------------------------------------------
# Figures of pictures


def strip(pictures, size=96):
    """Pictures, or None for a gap, side by side."""
    gap = np.full((size, size, 3), 255, np.uint8)
    return np.concatenate([gap if p is None else data.resize(p, size) for p in pictures], 1)


def figures(a, models):
    """The paper's picture figures from the first pairs: OUT/figure-1.png (reenactment, text, edit),
    -4 (anchored, MultiDiffusion), -6 (pairs), -20 (24 frames)."""
    a.out.mkdir(parents=True, exist_ok=True)
    pairs = read_pairs(a.pairs or a.out / "world" / "pairs.csv")[:4]
    cases = []
    for i, (_, driving, source, _) in enumerate(tqdm(pairs, "reading", leave=False, disable=None)):
        cases.append(read_case(driving, a, models, i, 24, source))
    one, eight, plain = cases[0], np.linspace(0, 23, 8).astype(int), settings_of(a)

    def made(case, M=24, settings=plain, **rest):
        return reenact(models, case.source, case.landmarks[:M], settings, **rest)

    with torch.no_grad():
        text = sample.make_scene(models, None, a.prompt, None)
        edited = sample.make_scene(models, one.source, None, a.edit)
    results = [made(case) for case in tqdm(cases, "sampling", leave=False, disable=None)]
    anchored, multi = (
        made(one, 12, settings_of(a, method=m)) for m in ("anchored", "multidiffusion")
    )

    sheets = {
        1: [
            [None, *one.driving[eight]],
            [one.source, *results[0][eight]],
            [None, *made(one, scene=text)[eight]],
            [one.source, *made(one, scene=edited)[eight]],
        ],
        4: [[one.source, *one.driving[:12]], [None, *anchored], [None, *multi]],
        6: [],
        20: [
            [None, *one.driving[:12]],
            [one.source, *results[0][:12]],
            [None, *one.driving[12:]],
            [None, *results[0][12:]],
        ],
    }
    for case, result in zip(cases, results):
        sheets[6] += [None, *case.driving[eight]], [case.source, *result[eight]]
    notes = {
        1: f'driving frames; reenactment; the text "{a.prompt}"; the edit "{a.edit}"',
        4: "driving frames; anchored; MultiDiffusion",
        6: "driving frames above results",
        20: "24 frames: driving above results",
    }
    for number, rows in sheets.items():
        name = f"figure-{number}"
        Image.fromarray(np.concatenate(list(map(strip, rows)))).save(a.out / f"{name}.png")
        about = dict(
            name=name,
            markdown=f"**Figure {number}**: {notes[number]}.",
            picture=f"{name}.png",
            model=models.sha256,
            settings=dataclasses.asdict(plain),
        )
        data.write_text(a.out / f"{name}.json", json.dumps(about, indent=1))
    print(f"{', '.join(f'figure-{n}.png' for n in sheets)} in {a.out}")


# --------------------------------------------------------------------------------------------------
# Test sets, and the page of all results


def world_set(a):
    """OUT/world: clips of rendered people, sources and true reenactments, with pairs.csv."""
    sys.path.insert(0, str(DEMO))
    try:
        import world
    except ModuleNotFoundError as e:
        cure = "pip install -r demo/requirements.txt"
        raise UserError(f"rendering people needs {e.name}: {cure}") from None

    root, lines = a.out / "world", []
    for folder in ("clips", "pictures", "truth", "many"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(a.n), "rendering", unit="pair", disable=None):
        rng, name = np.random.default_rng([2_000_000, i]), f"{i:04d}"  # unseen in training
        driver, person = world.sample_face(rng), world.sample_face(rng)
        motion = world.sample_motion(rng, 48)
        still = {k: v[0] for k, v in world.sample_motion(rng, 1).items()}
        picture, clip = f"pictures/{name}.png", f"clips/{name}.mp4"
        lines.append(dict(source=picture, driving=clip, out=f"out/{name}.mp4"))
        truth = root / "truth" / f"{name}.mp4"
        if truth.exists():  # the last of the three
            continue
        Image.fromarray(world.render(person, still, PIXELS)).save(root / picture)
        for path, face in ((root / clip, driver), (truth, person)):
            save_video(path, world.render_clip(face, motion, PIXELS))
    for i in tqdm(range(a.many), "rendering", unit="clip", disable=None):
        path = root / "many" / f"{i:04d}.mp4"
        if not path.exists():
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
    a.out.mkdir(parents=True, exist_ok=True)
    write_pairs(a.out / "pairs.csv", lines)


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


def everything(a):
    """The whole evaluation on the demo world, part by part."""
    but = lambda **changes: argparse.Namespace(**vars(a) | changes)
    world_set(but(n=max(a.n, 50), many=256))
    models = sample.load_models(a.model, a.device)
    table1(a, models, True)
    table1(a, models, False)
    length(a, models)
    ablation(but(n=min(a.n, 30)), models)

    many, cache = a.out / "world" / "many", a.out / "cache" / "frames"
    scenes(but(n=256, clips=many), models)
    if not (cache / "index.json").exists():
        command = [sys.executable, Path(__file__).with_name("data.py"), many, "--out", cache]
        if subprocess.run(command).returncode:
            raise UserError("the clips for Fig. 7 could not be cached; the reason is above")
    guidance(but(data=cache, n=256, clips=many), models)
    figures(a, models)
    report(a)


SETS = dict(world=world_set, pairs=pairs_set, report=report, all=everything)
PROTOCOLS = dict(
    same=functools.partial(table1, same=True),
    cross=functools.partial(table1, same=False),
    length=length,
    ablation=ablation,
    scenes=scenes,
    guidance=guidance,
    figures=figures,
)


def arguments():
    ap = data.Parser(__doc__)
    add, number, default = ap.add_argument, data.number, sample.Settings
    count = number(int, 1)
    add("command", choices=[*SETS, *PROTOCOLS])
    add("folders", type=Path, nargs="*", help="of `pairs`: clips and pictures")
    add("--out", type=Path, default=Path("evaluation"))
    add("--model", type=Path, default=DEMO / "sdit.safetensors")
    add("--clips", type=Path, help="folder of driving videos (default: the demo world's)")
    add("--pairs", type=Path, help="table source,driving,out (default: the demo world's)")
    add("--videos", type=Path, help="judge these, named like the clips or the column out")
    add("--data", type=Path, default=Path("cache"), help="of `guidance`: a cache by data.py")
    add("--weights", type=Path, default=data.DOWNLOADS, help="folder of the metrics' networks")
    n = "videos (default: 50 of the demo world, all of --clips or --pairs; paper: 1000)"
    add("--n", type=count, help=n)
    frames = "frames a video in same and cross; 16 and more for comparable FVD"
    add("--frames", type=count, default=8, help=frames)
    steps = number(int, 1, NoiseSchedule.steps)
    add("--steps", type=steps, default=default.steps, help="denoising steps")
    weight = number(float, -100, 100)
    add("--guidance", type=weight, default=default.guidance, help="classifier-free guidance weight")
    add("--train-steps", type=count, default=2000, help="of `guidance`: steps of each denoiser")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of noise and choices")
    a = ap.parse_intermixed_args()  # folders may stand behind options
    if a.folders and a.command != "pairs":
        raise UserError(f"{a.command} takes no folders by themselves; give --clips {a.folders[0]}")
    if a.n is None and (a.command == "all" or not (a.clips or a.pairs or a.folders)):
        a.n = 50
    a.device, a.many = None, 0
    a.prompt, a.edit = "a face with red hair, wearing a blue shirt", "black hair -> blond hair"
    return a


def main():
    a = arguments()
    LEFT_OUT.clear(), REPORTED.clear()
    with data.owned(a.out / a.command):
        if a.command in SETS:
            SETS[a.command](a)
        else:
            models = sample.load_models(a.model) if a.command != "guidance" else None
            PROTOCOLS[a.command](a, models)
    if LEFT_OUT or REPORTED:
        raise UserError(f"{len(LEFT_OUT + REPORTED)} left out, named above", code=1)


if __name__ == "__main__":
    data.run_main(main)
