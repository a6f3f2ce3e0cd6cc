"""The paper's metrics and protocols (paper 4.2, 4.3), on anybody's videos.

    # Table 1, same identity: of the videos in FOLDER, named like the clips, or of our model's
    python evaluate.py same --clips CLIPS --videos FOLDER
    python evaluate.py same --clips CLIPS --model M
    # Table 1, cross identity, on random pairs; --videos as above
    python evaluate.py pairs CLIPS PICTURES --n 1000
    python evaluate.py cross --pairs evaluation/pairs.csv
    python evaluate.py length --clips CLIPS                  # Fig. 5, consistency over length
    python evaluate.py all                                   # and more: demo/experiments.py

Each writes a table, OUT/NAME.json with every setting, and a picture where the paper has one. Values
of a clip are kept in OUT/cache, so the same command goes on. Metrics without weights are left out
with the reason; clips that cannot be measured are named, and the exit code is 1.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sys
import typing
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import sample
import sdit
from data import DEMO
from sdit import LANDMARKS, NoiseSchedule, UserError

sys.path.append(str(DEMO))  # for experiments.py
PIXELS = 256  # LMSE is in pixels of a crop of this width (paper silent; its values fit)

# --------------------------------------------------------------------------------------------------
# Motion (paper 4.2). Landmarks (M, 478, 3) in the crop's coordinates, NaN in frames without a face


def has_face(points):
    """(M,) bool of landmarks (M, 478, 3)."""
    return ~np.isnan(points[:, 0, 0])


def lmse(made, driving, points=slice(None), axes=3):
    """Mean squared difference per coordinate, pixels², over frames where both were found."""
    error = (PIXELS * (made - driving)[:, points, :axes]) ** 2
    found = ~np.isnan(error).any((1, 2))
    return float(error[found].mean()) if found.any() else math.nan


def laid_onto(made, driving):
    """`made` shifted, rotated and scaled, frame by frame, onto the rigid points of `driving`, since
    raw LMSE rewards copying the driver's face."""
    moved = np.full_like(made, np.nan)
    for i in np.flatnonzero(has_face(made) & has_face(driving)):
        scale, rotation = sample.head_pose(made[i], driving[i])
        centred = made[i] - made[i][sample.RIGID].mean(0)
        moved[i] = scale * centred @ rotation.T + driving[i][sample.RIGID].mean(0)
    return moved


def motions(points):
    """Movements in landmarks (M, 478, 3), as (M,) arrays: angles in radians, the rest in units of
    the eyes' distance."""

    def gap(a, b, axes=2):
        return np.linalg.norm(points[:, a, :axes] - points[:, b, :axes], axis=-1)

    # from eye to eye, from brow to chin
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


def motions_of_both(made, driving):
    """(frames, `motions` of one, of the other), over the frames where both were found."""
    both = has_face(made) & has_face(driving)
    return both.sum(), motions(made[both]), motions(driving[both])


def correlation(a, b):
    """Pearson's, of (M,) arrays; 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum() + 1e-12))


# Consistency (paper 4.2): cosines of CLIP's unit vectors


def csim(source, made):
    """Smallest cosine of the source (S,) and the made frames (M, S)."""
    return float((made @ source).min())


def self_csim(made, driving):
    """Difference of the smallest cosine to the first frame in two videos (M, S); 0 is best (paper
    silent on the pairs of frames)."""
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
    from torchvision.transforms.functional import gaussian_blur

    def blur(x):
        return gaussian_blur(x, 11, 1.5)[..., 5:-5, 5:-5]  # where the window fits

    a, b = (a + 1) / 2, (b + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    structure = (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return (luminance * structure).mean().item()


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
        for i, pooled in enumerate((16, 32, 64), 1):
            pool = nn.Sequential(nn.Conv2d(16 * pooled, pooled, 1, bias=False), nn.AvgPool2d(7))
            setattr(self.res, f"lda{i}_pool", pool)
            setattr(self.res, f"lda{i}_fc", nn.Linear(pooled * (16 >> i) ** 2, 16))
        self.res.lda4_fc = nn.Linear(2048, 176)

        convolutions = [nn.Conv2d(2048, 1024, 1), nn.Conv2d(1024, 512, 1), nn.Conv2d(512, 112, 1)]
        self.conv1 = nn.Sequential(*[m for c in convolutions for m in (c, nn.ReLU())])
        for i, (inputs, outputs) in enumerate(itertools.pairwise(self.sizes), 1):
            weights = nn.Conv2d(112, inputs * outputs // 49, 3, padding=1)
            setattr(self, f"fc{i}w_conv", weights)
            setattr(self, f"fc{i}b_fc", nn.Linear(112, outputs))
        self.fc5w_fc, self.fc5b_fc = nn.Linear(112, 14), nn.Linear(112, 1)

    def forward(self, x):
        """(B, 3, 224, 224), normalised as for ImageNet -> (B,)."""
        net, seen = self.res, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for i in range(1, 5):
            x = getattr(net, f"layer{i}")(x)
            pooled = getattr(net, f"lda{i}_pool")(x) if i < 4 else x.mean((2, 3))
            seen.append(getattr(net, f"lda{i}_fc")(pooled.flatten(1)))

        x = self.conv1(x)  # (B, 112, 7, 7)
        whole, y = x.mean((2, 3)), torch.cat(seen, 1)  # (B, 112), (B, 224)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(self.sizes), 1):
            weight = getattr(self, f"fc{i}w_conv")(x).reshape(-1, outputs, inputs)
            bias = getattr(self, f"fc{i}b_fc")(whole)
            y = torch.sigmoid((weight @ y[:, :, None])[..., 0] + bias)
        return (self.fc5w_fc(whole) * y).sum(1) + self.fc5b_fc(whole)[:, 0]


@torch.no_grad()
def hyperiqa(net, images):
    """Quality (M,) of images (M, h, w, 3) uint8: the mean over 5 x 5 crops of 224 of the picture at
    512 x 384 (the original's crops are random)."""
    from torchvision.transforms.functional import normalize, resize, to_tensor

    scores = []
    for image in images:
        x = resize(to_tensor(image).to(net.fc5b_fc.weight.device), (512, 384))
        x = normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        crops = x.unfold(1, 224, 72).unfold(2, 224, 40)  # (3, 5, 5, 224, 224)
        scores.append(net(crops.flatten(1, 2).movedim(1, 0)).mean().item())
    return np.array(scores)


# --------------------------------------------------------------------------------------------------
# Networks of the metrics, looked for in --weights

HUB, INCEPTION = "https://huggingface.co", "weights-inception-2015-12-05-6726825d.pth"
# name: (the folder that it is fetched from, sha256)
NETWORKS = {
    INCEPTION: (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "i3d_torchscript.pt": (
        f"{HUB}/flateon/FVD-I3D-torchscript/resolve/1c2d61711c52571ad617a1063e6fa691b212e184",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    ),
    "koniq_pretrained.pkl": (
        f"{HUB}/ByteDance/LatentSync-1.5/resolve/main/auxiliary",
        "ff9277bcc68ecc10e77d88b6d0a32825ec3c85562095542734ec6212eaaf6d81",
    ),
    "w600k_r50.onnx": (
        f"{HUB}/public-data/insightface/resolve/main/models/buffalo_l",
        "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    ),
}


def find_network(name, folder):
    """Path of a file of NETWORKS in a folder; UserError says where to get it."""
    (url, digest), path = NETWORKS[name], Path(folder) / name
    source = f"fetch {url}/{name} (sha256 {digest[:12]}...)"
    if not path.is_file():
        raise UserError(f"{name} is not in {folder}; {source}")
    if data.sha256(path) != digest:
        raise UserError(f"{path} is not the published file; {source} again")
    return path


def load_inception(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (M, 2048): the network of FID, with TensorFlow's resizing."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = find_network(INCEPTION, folder)
    torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity loads any pickle
    net = FeatureExtractorInceptionV3("inception", ["2048"], str(path)).to(device)

    def features(images):
        parts = torch.from_numpy(images).movedim(-1, 1).split(16)
        return torch.cat([net(x.to(device))[0] for x in parts]).cpu().numpy()

    return features


def load_i3d(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (1, 400), of the first 16 frames. I3D needs 9 (paper silent on its 8):
    fewer than 16 are repeated evenly to 16."""
    with warnings.catch_warnings(action="ignore"):
        net = torch.jit.load(find_network("i3d_torchscript.pt", folder), device).eval()

    @torch.no_grad()
    def features(images):
        images = images[np.arange(16) * min(len(images), 16) // 16]
        x = torch.from_numpy(images).to(device).movedim(-1, 0)[None].float()  # (1, 3, 16, h, w)
        return net(x, rescale=True, resize=True, return_features=True).cpu().numpy()

    return features


def load_hyperiqa(folder, device="cpu"):
    """(M, h, w, 3) uint8 -> (M,)."""
    path = find_network("koniq_pretrained.pkl", folder)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    net = sdit.fill(HyperIQA().to(device), tensors, path.name).eval()
    return functools.partial(hyperiqa, net)


# ArcFace's input has these points here
ARCFACE_EYES = (38.2946, 51.6963), (73.5318, 51.5014)
ARCFACE_MOUTH = (41.5493, 92.3655), (70.7299, 92.2041)
ARCFACE_TEMPLATE = np.array([*ARCFACE_EYES, (56.0252, 71.7366), *ARCFACE_MOUTH])


def arcface_points(points):
    """Eyes, nose and corners of the mouth (5, 2) of landmarks (478, 3)."""
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

    path = find_network("w600k_r50.onnx", folder)
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


def load_nets(folder, device="cpu"):
    """({name: function of images (M, h, w, 3) uint8}, {name: why it is missing}) for fidelity."""
    nets, missing = {}, {}
    for name, load in dict(inception=load_inception, i3d=load_i3d, hyperiqa=load_hyperiqa).items():
        try:
            nets[name] = load(folder, device)
        except UserError as e:
            missing[name] = str(e)
    return nets, missing


# --------------------------------------------------------------------------------------------------
# What is judged


class Files(typing.NamedTuple):
    """Where one reenactment comes from."""

    driving: Path
    source: Path = None  # a picture; None: the driving frame that is furthest in time
    truth: Path = None  # what a perfect result is, where it is known
    result: Path = None  # made elsewhere; None: our model makes it


@dataclasses.dataclass
class Case:
    """The same in memory. Crops are uint8, (.., h, h, 3)."""

    source: np.ndarray
    driving: np.ndarray  # (M, ...)
    landmarks: np.ndarray  # (M, 478, 3) of the driving face
    truth: np.ndarray = None  # (M, ...)
    result: np.ndarray = None  # (M, ...)


def list_videos(folder):
    """{name: path}; a name is the path within the folder, without its ending."""
    paths = data.list_files(folder, data.VIDEOS)
    if not paths:
        raise UserError(f"no videos in {folder}; name another, or render some: evaluate.py world")
    names = [str(path.relative_to(folder).with_suffix("")) for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{folder} has two videos named {min(twice)}, with different endings")
    return dict(zip(names, paths))


def list_clips(a):
    """{name: Files} of the first `--n` driving videos, or of all."""
    clips = list_videos(a.clips or a.out / "world" / "clips")
    return {name: Files(path) for name, path in itertools.islice(clips.items(), a.n)}


def read_pairs(path):
    """{name: Files} of a table with the columns source,driving,out, whose paths are relative to it.
    Truths are looked for in a folder beside it."""
    lines, folder = sample.read_pairs(path), Path(path).parent
    if not all(line.get(k) for line in lines for k in ("source", "driving", "out")):
        raise UserError(f"{path} has a line without source, driving or out")

    truths = {p.stem: p for p in data.list_files(folder / "truth", data.VIDEOS)}
    pairs = {}
    for line in lines:
        source, driving, out = (folder / line[k] for k in ("source", "driving", "out"))
        name = str(Path(line["out"])).removesuffix(out.suffix)
        pairs[name] = Files(driving, source, truths.get(out.stem), out)
    if len(pairs) < len(lines):
        raise UserError(f"{path} names one result twice in the column out")
    return pairs


@functools.lru_cache(2048)
def track(path, landmarker):
    """`data.track` of a video file, once for every method and length."""
    return data.track(data.Video(path), landmarker, path)


def read_crops(path, tracked, driving, frames, size):
    """Frames (numbers) of a video as crops (len(frames), size, size, 3). A video of the size of
    `driving` (data.Video) is cut by its square; sample.py's, and those of other sizes, are squares.
    """
    video = data.Video(path)
    if len(video) != len(driving):
        raise UserError(f"{path} has {len(video)} frames, the driving video {len(driving)}")
    made_here = path != driving.path and sample.made_here(path)
    shape, crops = next(iter(driving)).shape, {}
    for f, image in enumerate(itertools.islice(video, max(frames) + 1)):
        if f not in frames:
            continue
        if image.shape == shape and not made_here:
            crops[f] = data.crop(image, tracked.square, size)
        elif image.shape[0] == image.shape[1]:
            crops[f] = data.resize(image, size)
        else:
            raise UserError(f"{path} is neither square nor of the driving video's size")
    return np.stack([crops[f] for f in frames])


def read_case(files, models, M, seed, fps=None):
    """A Case of M consecutive frames from a random start (paper 4.3.1). With `fps` frames of the
    driving video are left out, so that about so many a second stay."""
    path, video = files.driving, data.Video(files.driving)
    every = max(1, round(video.fps / fps)) if fps else 1
    span = (M - 1) * every + 1
    needed, source = (span, "") if files.source else (span + 1, " and a source")
    if len(video) < needed:
        raise UserError(f"{path} has {len(video)} frames; {M}{source} need {needed}")
    tracked = track(path, models.landmarker)
    after = len(video) - span
    first = int(np.random.default_rng(seed).integers(0, after + 1))
    chosen = list(range(first, first + span, every))
    # the source: the end of the clip that is further from these, as in training
    furthest = 0 if first >= after - first else len(video) - 1

    size = PIXELS if files.result else models.size
    source, *driving = read_crops(path, tracked, video, [furthest, *chosen], size)
    if files.source:
        source = sample.read_source(files.source, models.landmarker, size, 0)[0]
    places = (files.truth, files.result)
    known = [path and read_crops(path, tracked, video, chosen, size) for path in places]
    return Case(source, np.stack(driving), tracked.landmarks[chosen], *known)


load_models = functools.cache(sample.load_models)


def sampling(a, number=0, **changes):
    """sample.Settings of the command line, for clip `number`."""
    return sample.Settings(a.steps, guidance=a.guidance, seed=a.seed + number, **changes)


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
def sample_images(models, source, landmarks, settings, plan=None, scene=None):
    """The same decoded: (M, size, size, 3) uint8."""
    latents = sample_latents(models, source, landmarks, settings, plan, scene).to(models.device)
    decode = models.autoencoder.decode
    return np.concatenate([data.to_images(decode(part)) for part in latents.split(16)])


# --------------------------------------------------------------------------------------------------
# What is measured of it


def find_landmarks(landmarker, images, size=PIXELS):
    """(M, 478, 3) in 0..1, NaN where there is no face, of images at `size`: MediaPipe needs 96."""
    found = [landmarker.landmarks(data.resize(image, size)) for image in images]
    missing = np.full((LANDMARKS, 3), np.nan, np.float32)
    return np.stack([missing if points is None else points / size for points in found])


@torch.no_grad()
def clip_vectors(models, images):
    parts = data.to_tensor(images).split(16)
    return torch.cat([models.encoder.images(part) for part in parts]).cpu().numpy()


def measure_case(case, made, models, nets):
    """All that metrics need of the result `made` (M, h, h, 3) of a case: a dict of arrays."""
    nets, values = dict(nets), {}
    read_attributes = nets.pop("attributes", None)  # of CLIP's vectors
    for who, images in dict(source=case.source[None], made=made, driving=case.driving).items():
        vectors = values[f"{who}_clip"] = clip_vectors(models, images)
        if read_attributes:
            values[f"{who}_attributes"] = read_attributes(vectors)
        if who == "source":
            continue
        values[f"{who}_landmarks"] = find_landmarks(models.landmarker, images)
        for name, net in nets.items():
            if who == "made" or name != "hyperiqa":  # which needs no reference
                values[f"{who}_{name}"] = net(images)
    if case.truth is not None:
        a, b = data.to_tensor(made), data.to_tensor(case.truth)
        values |= dict(psnr=psnr(a, b), ssim=ssim(a, b))
    return values


def digest(value):
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_or_make(path, make):
    """Arrays of a safetensors file; where it is not there yet, or torn, those of make()."""
    try:
        tensors = sdit.read_tensors(path)[0]
    except UserError:
        tensors = {k: torch.as_tensor(np.asarray(v)) for k, v in make().items()}
        sdit.write_tensors(path, tensors, {})
    return {k: v.numpy() for k, v in tensors.items()}


def measure_all(a, key, files, measure):
    """{name: measure(number, name)} of `files` {name: paths}; a clip that fails is left out. Values
    are kept in OUT/cache under `key` and the state of the files: all that decides them."""
    folder = a.out / "cache" / digest(key)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, name in enumerate(tqdm(files, key[0], unit="clip", disable=None)):
        try:
            states = [path.stat() for path in filter(None, files[name]) if path.exists()]
            version = digest([number, [(s.st_size, s.st_mtime_ns) for s in states]])
            path = folder / f"{name.replace('/', '__')}-{version}.safetensors"
            found[name] = read_or_make(path, functools.partial(measure, number, name))
        except Exception as e:  # whatever is wrong with a clip, the rest goes on
            a.left_out.append(f"{name}: {data.describe(e)}")
            print(f"left out: {a.left_out[-1]}", file=sys.stderr)
    if not found:
        raise UserError(f"nothing could be measured for {key[0]}")
    return found


def measure_videos(a, title, files, M, nets={}, plan=None, fps=None, **settings):
    """{name: what `measure_case` returns} of the results in `files` {name: Files}, or of what our
    model makes with `settings`. plan(number of the clip): in place of sample.plan_rows."""
    models = load_models(a.model)

    def measure(number, name):
        case = read_case(files[name], models, M, [a.seed, number], fps)
        made = case.result
        if made is None:
            ours, rows = sampling(a, number, **settings), plan and plan(number)
            made = sample_images(models, case.source, case.landmarks, ours, rows)
        return measure_case(case, made, models, nets)

    chosen = dataclasses.astuple(sampling(a, **settings))
    key = [title, models.sha256, a.clips, a.pairs, a.videos, M, fps, chosen, sorted(nets)]
    return measure_all(a, key, files, measure)


def measured_by_all(found):
    """{column: {name: values}} with the names that every column has, so columns can be compared."""
    names = set.intersection(*map(set, found.values()))
    if not names:
        raise UserError("no clip could be measured in every column of the table")
    return {c: {n: v for n, v in values.items() if n in names} for c, values in found.items()}


# --------------------------------------------------------------------------------------------------
# Tables


def bootstrap(values, repeat=1000):
    """(mean, half of the 95 % interval) over videos; one video has no interval."""
    values = np.array([v for v in values if not math.isnan(v)])
    if len(values) < 2:
        return float(values[0]) if len(values) else math.nan, math.nan
    chosen = np.random.default_rng(0).integers(0, len(values), (repeat, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [0.025, 0.975])
    return float(values.mean()), float(high - low) / 2


def with_interval(values, digits=2):
    """Text: mean ± half of the interval."""
    mean, half = bootstrap(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def write_result(a, name, markdown, picture=None, **details):
    """OUT/NAME.json: a result for `report`, with every setting."""
    packages = ("torch", "mediapipe", "torch-fidelity", "scikit-learn", "open_clip_torch")
    about = dict(
        name=name,
        markdown=markdown,
        picture=picture,
        settings={k: v for k, v in vars(a).items() if k != "left_out"},
        model=data.sha256(a.model),
        sampler=sample.Settings.sampler,
        versions={package: metadata.version(package) for package in packages},
        left_out=a.left_out,
        crop="face box 0.45 x 0.53 of a fixed square",
        **details,
    )
    data.write_text(a.out / f"{name}.json", json.dumps(about, indent=1, default=str))


def write_table(a, name, title, header, rows, notes=(), figure=None, **details):
    """Print a table; write OUT/NAME.json and, with a matplotlib figure, OUT/NAME.png."""
    table = [header, ["---"] * len(header), *rows]
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    text = "\n".join([f"**{title}**", "", *lines, "", *notes])
    picture = None
    if figure is not None:
        picture = f"{name}.png"
        figure.savefig(a.out / picture, dpi=120, bbox_inches="tight")
    write_result(a, name, text, picture, **details)
    print(f"\n{text}")


def plot(x, lines, **labels):
    """A matplotlib figure of lines {name: (y,) or (y, half of its interval)} over x."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    ax = figure.subplots()
    for name, line in lines.items():
        ax.errorbar(x, *line, label=name, capsize=3, marker=".")
    ax.set(**labels)
    ax.legend()
    return figure


# --------------------------------------------------------------------------------------------------
# Table 1 (paper 4.3)

PAPER = {  # of its XL model on its own clips, same and cross identity
    "FID": ("38.2", "34.4"),
    "FVD": ("111", "236"),
    "HyperIQA": ("50.4", "52.1"),
    "LMSE": ("8.92", "9.61"),
    "Expressive-LMSE": ("9.07", "9.39"),
    "CSIM": ("0.83", "0.74"),
    "Self-CSIM": ("0.04", "0.04"),
}

# What CSIM should measure, on the demo's world, where probes read it (see demo/experiments.py)
KEPT = "hair, shirt, background, skin as the source's, % of frames"
CHANGES = "changes of these from a frame to the next, %"

# Digits of the metrics in the table, where it is not one
DIGITS = {"CSIM": 3, "Self-CSIM": 3, "SSIM": 2, "mouth: error, fraction of the eyes' distance": 3}
DIGITS |= {f"{k}: correlation": 2 for k in ("yaw", "mouth", "eyes")}


def attribute_nets(a):
    """{"attributes": function of CLIP's vectors (M, S)} on the demo's world, else nothing."""
    if a.clips or a.pairs or not (a.out / "world" / "faces").is_dir():
        return {}
    import experiments

    return dict(attributes=experiments.attribute_probe(a))


def clip_metrics(r):
    """{metric: value} of what `measure_case` returned for a clip."""
    made, driving = r["made_landmarks"], r["driving_landmarks"]
    values = {
        "LMSE": lmse(made, driving),
        "Expressive-LMSE": lmse(made, driving, data.EXPRESSIVE),
        "LMSE, x and y": lmse(made, driving, axes=2),
        "LMSE, heads laid onto each other": lmse(laid_onto(made, driving), driving),
        "CSIM": csim(r["source_clip"].ravel(), r["made_clip"]),
        "Self-CSIM": self_csim(r["made_clip"], r["driving_clip"]),
    }
    if "made_attributes" in r:
        here, there = r["made_attributes"], r["driving_attributes"]  # (M, 4) names, as numbers
        values[KEPT] = 100 * (here == r["source_attributes"]).mean()
        values[CHANGES] = 100 * (here[1:] != here[:-1]).mean()
        values[f"{CHANGES}: of the driving video"] = 100 * (there[1:] != there[:-1]).mean()
    if "made_hyperiqa" in r:
        values["HyperIQA"] = r["made_hyperiqa"].mean()
    if "psnr" in r:
        values |= {"PSNR against the truth, dB": float(r["psnr"]), "SSIM": float(r["ssim"])}

    frames, here, there = motions_of_both(made, driving)
    if frames < 4:
        here = there = dict.fromkeys(here, np.array([math.nan]))
    for k in ("yaw", "mouth", "eyes"):
        values[f"{k}: correlation"] = correlation(here[k], there[k])
    errors = {k: abs(here[k] - there[k]).mean() for k in here}
    for k in ("yaw", "pitch", "roll"):
        values[f"{k}: error, degrees"] = np.degrees(errors[k])
    values["mouth: error, fraction of the eyes' distance"] = errors["mouth"]
    return values


def table_column(results):
    """{metric: text} of what `measure_case` returned for every clip."""
    column = {}

    def both(key):
        return [np.concatenate([r[f"{who}_{key}"] for r in results]) for who in ("made", "driving")]

    # Of all clips together
    if "made_inception" in results[0]:
        column["FID"] = f"{frechet(*both('inception')):.1f}"
        column["KID x 1000"] = f"{kernel_distance(*both('inception')):.2f}"
    if "made_i3d" in results[0] and len(results) > 1:
        column["FVD"] = f"{frechet(*both('i3d')):.0f}"
    column["Fréchet distance, CLIP features"] = f"{frechet(*both('clip')):.3f}"
    missed = [f"{100 - 100 * has_face(points).mean():.1f} %" for points in both("landmarks")]
    column["frames without a face, made and driving"] = ", ".join(missed)

    # Of each clip
    clips = [clip_metrics(r) for r in results]
    for metric in dict.fromkeys(k for values in clips for k in values):
        known = [values[metric] for values in clips if metric in values]
        column[metric] = with_interval(known, DIGITS.get(metric, 1))
    return column


def table1_files(a):
    """({name: Files}, name of the method of given results): of those in the folder `--videos`, else
    of those that stand where the column out says; else None: our model makes them."""
    if a.command == "same":  # the source is a frame of the clip, the truth the clip
        files = {name: Files(path, truth=path) for name, (path, *_) in list_clips(a).items()}
    else:
        files = read_pairs(a.pairs or a.out / "world" / "pairs.csv")
        files = dict(itertools.islice(files.items(), a.n))

    if a.videos:
        given = list_videos(a.videos)
        for name, f in files.items():
            files[name] = f._replace(result=given.get(name, a.videos / f"{name}.*"))
        return files, a.videos.resolve().name
    if any(f.result and f.result.exists() for f in files.values()):
        return files, "given"
    return {name: f._replace(result=None) for name, f in files.items()}, None


def table1(a):
    """Table 1 for one protocol: of videos that each method of sampling makes, or of given ones."""
    protocol = a.command
    files, given = table1_files(a)
    nets, missing = load_nets(a.weights, load_models(a.model).device)
    nets |= attribute_nets(a)
    methods = {given: {}} if given else {method: dict(method=method) for method in sample.METHODS}
    found = {
        name: measure_videos(a, f"{protocol}, {name}", files, a.frames, nets, **settings)
        for name, settings in methods.items()
    }
    found = measured_by_all(found)
    columns = {k: table_column(list(results.values())) for k, results in found.items()}
    metrics = dict.fromkeys(k for column in columns.values() for k in column)
    rows = []
    for k in metrics:
        paper = PAPER.get(k, ("", ""))[0 if protocol == "same" else 1]
        rows.append([k, *(column.get(k, "-") for column in columns.values()), paper])

    missing = [f"Missing: {k}: {reason}" for k, reason in missing.items()]
    count = len(next(iter(found.values())))
    note = (
        f"{count} videos of {a.frames} frames; mean ± half of the 95 % interval over videos; "
        f"LMSE in pixels² of a crop of 256."
    )
    if a.frames <= load_models(a.model).sdit.config.frames and not given:
        note += " So few frames are one row, of which all methods make the same."
    write_table(
        a,
        f"{protocol}-{given}" if given else protocol,
        f"{protocol.title()}-identity reenactment (Table 1)",
        ["", *columns, "paper (XL, real faces)"],
        rows,
        [note, *missing],
        fvd=f"{a.frames} frames spread over 16" if a.frames < 16 else "first 16 frames",
        reference="frames of the driving clips",
        missing=missing,
    )


# --------------------------------------------------------------------------------------------------
# Consistency over length (Fig. 5)


def length(a, lengths=(12, 16, 20, 24)):
    """Self-CSIM of self-reenactment against the number of frames, consecutive ones and then of 8 a
    second, since frames of training rows are further apart than those of MultiDiffusion's windows.
    """
    for fps in (None, 8):
        length_at(a, fps, lengths)


def length_at(a, fps, lengths):
    files, nets, methods, found = list_clips(a), attribute_nets(a), sample.METHODS, {}
    rate = f", {fps} frames a second" if fps else ""
    for M in lengths:
        for method in methods:
            title = f"length {M}{rate}, {method}"
            found[M, method] = measure_videos(a, title, files, M, nets, fps=fps, method=method)

    rows, found = [], measured_by_all(found)
    clips = {k: [clip_metrics(r) for r in results.values()] for k, results in found.items()}
    for metric, digits in {"Self-CSIM": 3, CHANGES: 1}.items():
        if metric not in clips[lengths[0], "anchored"][0]:
            continue
        values = {k: np.array([c[metric] for c in some]) for k, some in clips.items()}
        for M in lengths:
            row = [with_interval(values[M, m], digits) for m in methods]
            ours = values[M, "anchored"]
            gaps = [with_interval(ours - values[M, m], digits) for m in methods[1:]]
            rows.append([metric, M, *row, *gaps])
        if metric == "Self-CSIM":
            lines = {m: zip(*(bootstrap(values[M, m]) for M in lengths)) for m in methods}

    labels = dict(xlabel="frames", ylabel="Self-CSIM (lower is better)", xticks=lengths)
    figure = plot(lengths, lines, **labels)
    header = ["", "frames", *methods, *(f"anchored minus {m}, video by video" for m in methods[1:])]
    paper = "anchored below MultiDiffusion at every length, the gap growing with it"
    notes = [f"{len(ours)} videos a point. The paper: {paper}."]
    title = f"Consistency against length{rate} (Fig. 5)"
    write_table(a, f"length-{fps}" if fps else "length", title, header, rows, notes, figure)


# --------------------------------------------------------------------------------------------------
# The command line. Test sets and experiments on the demo's world are in demo/experiments.py

COMMANDS = dict(same=table1, cross=table1, length=length)


def arguments():
    import experiments

    ap = data.Parser(__doc__)
    add, number, default = ap.add_argument, data.number, sample.Settings
    count = number(int, 1)
    add("command", choices=[*COMMANDS, *experiments.COMMANDS])
    add("folders", type=Path, nargs="*", help="of `pairs`: clips and pictures")
    add("--out", type=Path, default=Path("evaluation"))
    add("--model", type=Path, default=sample.MODEL)
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
    add("--train-steps", type=count, default=4000, help="of `guidance`: steps of each denoiser")
    add("--size", default="demo", help="of `guidance`: the denoisers' (paper: B/4)")
    kinds = dict(choices=("epsilon", "v"), default="v")
    add("--prediction", **kinds, help="of `guidance`: what the denoisers predict")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of noise and choices")
    a = ap.parse_intermixed_args()  # folders may stand behind options
    if a.folders and a.command != "pairs":
        raise UserError(f"{a.command} takes no folders by themselves; give --clips {a.folders[0]}")
    if a.n is None and (a.command == "all" or not (a.clips or a.pairs or a.folders)):
        a.n = 50
    return a


def main():
    import experiments

    a = arguments()
    a.left_out = []  # why clips could not be measured
    with data.owned(a.out / a.command):
        (COMMANDS | experiments.COMMANDS)[a.command](a)
    if a.left_out:
        raise UserError(f"{len(a.left_out)} left out, named above", code=1)


if __name__ == "__main__":
    import evaluate  # by this name experiments.py knows it: one copy, which loads models once

    data.run_main(evaluate.main)
