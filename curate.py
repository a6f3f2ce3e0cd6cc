"""From raw videos to a training set like ReenactFaces-1M (paper 3.3 and B), in restartable stages.

    python curate.py run VIDEOS --out clips         # detect, validate, write, stats
    python curate.py search queries.txt --out clips # before: download videos into clips/videos
    python curate.py detect VIDEOS --out clips      # shots, faces, one square a clip
    python curate.py validate --out clips           # is it one scene: CLIP, histogram.png
    python curate.py write --out clips              # clips/train, clips/test, clips/manifest.jsonl
    python curate.py stats --out clips              # the paper's Figs. 10 to 13: stats.png, a table
    torchrun --nproc_per_node=8 curate.py detect VIDEOS --out clips   # the work shared

After torchrun, give the same command without it for the histogram or the manifest. Where VIDEOS
holds celebvhq_info.json or VFHQ's Clip+ID+...txt, only what they list is used.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from tqdm import tqdm

import data
from data import mesh_box, overlap
from sdit import LANDMARKS, UserError

SAMPLES = 5  # sampled frames a second
LONGEST = 10  # seconds a clip (paper B, Fig. 10, ends there)
SPLITS = "train", "test"
COSINES = dict(clip="CLIP", arcface="ArcFace")


def read_entries(path):
    """Lines of a user's text file, without empty ones."""
    return [line for line in map(str.strip, data.read_text(path).splitlines()) if line]


# --------------------------------------------------------------------------------------------------
# Sources


@dataclass
class Source:
    """A video."""

    path: Path
    name: str  # path within the given folder
    identity: str  # what training and test must not share
    spans: list = None  # only these: [(begin, end, box of the face)], in seconds and in 0..1

    @property
    def key(self):
        """Name of the stages' files."""
        stem = re.sub("[^A-Za-z0-9-]+", "_", self.path.stem)[:60]
        return f"{stem}-{zlib.crc32(os.fsencode(self.name)):08x}"


def read_celebvhq(path):
    """Yield (video id, span) of celebvhq_info.json."""
    for clip in data.read_json(path, ["clips"])["clips"].values():
        seconds, box = clip["duration"], clip["bbox"]
        box = [box[side] for side in ("left", "top", "right", "bottom")]
        yield clip["ytb_id"], (seconds["start_sec"], seconds["end_sec"], box)


def read_vfhq(path):
    """Yield (video id, span) of a text file of VFHQ, without the frames at both ends."""
    video, first, last = re.fullmatch(r"Clip\+(.+)\+P\d+\+C\d+\+F(\d+)-(\d+)", path.stem).groups()
    fields = dict(re.findall(r"(\w+)[: ]+(.+)", data.read_text(path)))
    w, h, fps = (float(fields[k]) for k in ("W", "H", "FPS"))
    x0, y0, x1, y1 = map(float, fields["CROP"].split())
    yield video, ((int(first) + 1) / fps, int(last) / fps, [x0 / w, y0 / h, x1 / w, y1 / h])


def list_spans(files):
    """{video id: spans} of all published lists among the files."""
    spans = defaultdict(list)
    for path in files:
        listed = ()
        if path.name == "celebvhq_info.json":
            listed = read_celebvhq(path)
        elif path.match("Clip+*.txt"):
            listed = read_vfhq(path)
        try:
            for video, span in listed:
                spans[video].append(span)
        except Exception as e:  # whatever is wrong in the file
            raise UserError(f"{path} is not the list that its name says ({e!r}); fetch it again")
    return spans


def list_sources(folder, out):
    """The sources in a folder tree, sorted, without the clips in `out`. The identity of a video is
    the first folder that it lies in, or itself."""
    if not folder or not folder.is_dir():
        raise UserError(f"no such folder: {folder}; name the folder of videos")
    written = {(out / split).absolute() for split in SPLITS}
    found = data.list_files(folder, data.VIDEOS | {".txt", ".json"})
    files = [path for path in found if written.isdisjoint(path.absolute().parents)]
    spans, sources = list_spans(files), []

    for path in files:
        if path.suffix.lower() not in data.VIDEOS or spans and path.stem not in spans:
            continue
        relative = path.relative_to(folder)
        identity = path.stem if spans or len(relative.parts) == 1 else relative.parts[0]

        if re.fullmatch(r"\d\d(-\d\d){6}", path.stem):
            # RAVDESS: modality 02 is 01 without sound, 03 is sound alone
            modality, with_sound = path.name[:2], path.with_name(f"01{path.name[2:]}")
            if modality == "03" or modality == "02" and with_sound.exists():
                continue
            identity = f"actor-{path.stem[-2:]}"
        sources.append(Source(path.absolute(), str(relative), identity, spans.get(path.stem)))

    if not sources:
        named = f" named like {min(spans)}.mp4, as in its list" if spans else ""
        raise UserError(f"no videos ({', '.join(sorted(data.VIDEOS))}) under {folder}{named}")
    return sources


# --------------------------------------------------------------------------------------------------
# search (paper 3.3: top 20 results a query, 720p at least), by the program yt-dlp

YT_DLP = """-c --write-info-json --no-write-playlist-metafiles -t sleep --retry-sleep exp=1:120
    --match-filters 'height>=?720 & !is_live & duration<3600'
    -f 'bv*[height>=720][height<=1080][vcodec^=avc1]+ba/bv*[height>=720]+ba'"""


def read_queries(path):
    """Queries, one a line; lines of # are comments."""
    if not path or not path.is_file():
        raise UserError("name a file of queries, one a line: python curate.py search queries.txt")
    queries = [line for line in read_entries(path) if not line.startswith("#")]
    for query in queries:
        if query.startswith("-") or "\0" in query:  # some options run programs
            cure = "give words, or an address"
            raise UserError(f"{path}: {query!r} begins with a dash, or is no text; {cure}")
    return queries


def search(a):
    """Download the first videos of every query: words, or the address of a channel."""
    program = shutil.which("yt-dlp")
    if not program:
        install = "pip install 'yt-dlp[default]', with a JavaScript runtime (deno) and ffmpeg"
        raise UserError(f"yt-dlp is not on PATH: {install}")
    queries, folder = read_queries(a.source), a.out / "videos"
    archive, log = a.out / "archive.txt", a.out / "search.jsonl"
    a.out.mkdir(parents=True, exist_ok=True)
    archive.touch()
    log.touch()
    done = {line.get("query") for line in data.read_lines([log]) if line.get("done")}

    command = [program, "-I", f"1:{a.top}", *shlex.split(YT_DLP)]
    command += ["--download-archive", archive, "-o", folder / "%(id)s.%(ext)s", "--"]

    for query in tqdm([q for q in queries if q not in done], "queries", disable=None):
        target = query if "://" in query else f"ytsearch{a.top}:{query}"
        before = archive.stat().st_size
        run = subprocess.run([*command, target], capture_output=True, errors="replace")
        reason = run.stderr.strip().splitlines()[-1:]
        if run.returncode and re.search("HTTP Error 429|not a bot|rate.limit", run.stderr):
            cure = "wait some hours, then give the same command: it goes on"
            raise UserError(f"the site refuses ({reason[0]}); {cure} at {query!r}")

        success = run.returncode == 0 or archive.stat().st_size > before  # some may be gone
        data.append_line(log, dict(query=query, done=success, code=run.returncode, last=reason))
        if success:
            done.add(query)
        else:
            cure = "the same command tries it again"
            print(f"nothing came of {query!r} ({''.join(reason)}); {cure}", file=sys.stderr)

    count = len(data.list_files(folder, data.VIDEOS))
    if queries and not count and not done:
        raise UserError(f"no query of {a.source} brought a video; the reasons are above")
    print(f"{count} videos in {folder}; next: python curate.py run {folder} --out {a.out}")


# --------------------------------------------------------------------------------------------------
# detect: shots, from thumbnails x (M, 24, 24, 3); paper silent on how clips are kept within them

# Mean differences, of 255: a step that is a cut; one that is, where it stands alone; a dissolve's
CUT, JUMP, DISSOLVE = 25, 8, 20


def mean_difference(x):
    return np.abs(x).mean((1, 2, 3))


def transitions(thumbs, chunk=4096, margin=64):
    """[(end of a shot, begin of the next)], frame numbers, of thumbnails (M, 24, 24, 3) uint8:
    equal at a cut, apart at a dissolve. Chunks bound the memory of long films."""
    found = []
    for first in range(0, len(thumbs), chunk):
        start = max(0, first - margin)
        x = thumbs[start : first + chunk + margin].astype(np.float32)
        cuts = find_cuts(x)
        pairs = [(cut, cut) for cut in cuts] + find_dissolves(x, [0, *cuts, len(x)])
        for end, begin in sorted(pairs):
            if first <= start + end < first + chunk:
                found.append((start + end, start + begin))
    return found


def find_cuts(x):
    """Frames after a large step, or after a smaller one that stands alone."""
    steps = mean_difference(np.diff(x, axis=0))  # (M - 1,)
    cuts = []
    for i, step in enumerate(steps):
        around = [*steps[max(0, i - 6) : i], *steps[i + 1 : i + 7]]
        alone = around and step > 4 * np.median(around) + 1
        if step > CUT or step > JUMP and alone:
            cuts.append(i + 1)
    return cuts


def find_dissolves(x, cuts):
    """[(end of a shot, begin of the next)]. In the middle of a dissolve a frame is the mean of
    those before and after, as motion hardly ever is."""
    found = []
    for reach in (4, 8, 16):
        before, middle, after = x[: -2 * reach], x[reach:-reach], x[2 * reach :]
        change = mean_difference(after - before)
        error = mean_difference(middle - (before + after) / 2)
        centres = np.flatnonzero((change > DISSOLVE) & (error < 0.2 * change)) + reach
        found += filter(None, (fit_dissolve(x, centre, reach, cuts) for centre in centres))

    # The best of those that overlap
    chosen = []
    for error, begin, end in sorted(found):
        if error < 0.25 and all(end <= b or begin >= e for b, e in chosen):
            chosen.append((max(0, begin), min(len(x), end)))
    return chosen


def fit_dissolve(x, centre, reach, cuts):
    """(error, begin, end) of a dissolve, or None: frames of a window in the shot are fitted by
    mixtures of its ends; the dissolve is where the mixture, extrapolated, goes from 0 to 1."""
    first = max(centre - 2 * reach, *(c for c in cuts if c <= centre))
    last = min(centre + 2 * reach, *(c - 1 for c in cuts if c > centre))
    if first > centre - reach or last < centre + reach:
        return None

    change = x[last] - x[first]
    moved = x[first : last + 1] - x[first]
    mixture = (moved * change).sum((1, 2, 3)) / (change**2).sum()  # (frames of the window,)
    early, late = np.flatnonzero(mixture < 0.2), np.flatnonzero(mixture > 0.8)
    if not len(late) or late[0] <= early[-1] + 1:
        return None
    inside = np.arange(early[-1], late[0] + 1)
    begin, end = (np.interp(v, mixture[inside], inside) for v in (0.2, 0.8))

    error = mean_difference(moved - mixture[:, None, None, None] * change)[inside].max()
    margin = (end - begin) / 3
    begin, end = round(begin - margin), round(end + margin) + 1
    return error / np.abs(change).mean(), first + begin, first + end


# --------------------------------------------------------------------------------------------------
# detect: tracks [(frame, box), ...] of faces, and one fixed square a clip


def sample_step(fps):
    return max(1, round(fps / SAMPLES))


def rejection(reason, frames=0):
    return [dict(start=0, end=frames, reason=reason)]


def key_frames_have_a_face(video, landmarker):
    """Whether any key frame shows a face; also True below one key frame in five seconds."""
    count = 0
    with data.open_video(video.path) as container:
        stream = data.video_stream(container)
        stream.codec_context.skip_frame = "NONKEY"
        show = data.Screen(stream)
        with contextlib.suppress(UserError):  # no key frame at all
            for count, frame in enumerate(data.decode(container, video.path), 1):
                if any(True for _ in landmarker.everyone(show(frame))):
                    return True
    return count < len(video) / video.fps / 5


def scan(video, spans, landmarker):
    """(thumbnails (M, 24, 24, 3), {frame: boxes} of the samples within spans, (height, width))."""
    thumbs, samples, step = [], {}, sample_step(video.fps)
    for f, image in enumerate(video):
        thumbs.append(cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA))
        if f % step == 0 and any(begin <= f / video.fps < end for begin, end, _ in spans):
            samples[f] = [mesh_box(p) for p in landmarker.everyone(image)]
    return np.stack(thumbs), samples, image.shape[:2]


def link_faces(samples):
    """Tracks of the samples {frame: boxes} of a shot. A face that has moved far from its track's
    first box starts a new track: one square must hold it."""
    tracks, done, previous = [], [], None
    for frame, boxes in samples.items():
        boxes, going = list(boxes), []
        for track in tracks:
            last, before = track[-1]
            box = max(boxes, key=lambda box: overlap(box, before), default=(0, 0, 0, 0))
            if overlap(box, before) < 0.3:
                missed_once = last == previous
                (going if missed_once else done).append(track)
                continue

            boxes.remove(box)
            if overlap(box, track[0][1]) < 0.35:
                done.append(track)
                track = []
            going.append([*track, (frame, box)])
        tracks = going + [[(frame, box)] for box in boxes]
        previous = frame
    return sorted(done + tracks)


def extent(track, tracks, shot, step):
    """(begin, end) of the frames that a track may cover: less than `step` beyond its samples,
    within its shot, and not where another track takes over the same face."""
    (first, first_box), (last, last_box) = track[0], track[-1]
    begin, end = max(shot[0], first - step + 1), min(shot[1], last + step)
    for other in tracks:
        (start, start_box), (stop, stop_box) = other[0], other[-1]
        if last < start <= end and overlap(last_box, start_box) > 0.1:
            end = start
        if begin - step <= stop < first and overlap(first_box, stop_box) > 0.1:
            begin = first
    return begin, end


def nearest_box(track, frame):
    return min(track, key=lambda sample: abs(sample[0] - frame))[1]


def track_landmarks(video, extents, landmarker):
    """[(M', 478, 3)] landmarks, NaN where not found, of all frames of [(begin, end, track)]."""
    points = [np.full((end - begin, LANDMARKS, 3), np.nan, "f4") for begin, end, _ in extents]
    for f, image in enumerate(video if extents else ()):
        for (begin, end, track), found in zip(extents, points):
            if not begin <= f < end:
                continue
            x0, y0, x1, y1 = box = nearest_box(track, f)
            side = 1.6 * max(x1 - x0, y1 - y0)
            square = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), round(side)
            mesh = landmarker.landmarks(image, square)
            if mesh is not None and overlap(mesh_box(mesh), box) > 0.2:
                found[f - begin] = mesh
    return points


TOO_LONG, LEAVES = "too long", "face moves out of its square"


def split_track(start, points, track, samples, shape, fps, a):
    """Candidates [dict(start, end, square, face, reason)] of landmarks (M, 478, 3) from frame
    `start`, trimmed to frames with a face, split evenly above LONGEST, halved while the face leaves
    its square."""
    found = np.flatnonzero(~np.isnan(points[:, 0, 0]))
    if not len(found):
        return []
    start, points = int(start + found[0]), points[found[0] : found[-1] + 1]
    candidate = dict(start=start, end=start + len(points), square=None, face=None)
    reason = frame_face(candidate, points, track, samples, shape, fps, a)

    count = 1
    if reason == TOO_LONG:
        count = math.ceil(len(points) / fps / LONGEST)
    elif reason == LEAVES and len(points) // 2 / fps > a.min_seconds:
        count = 2
    if count == 1:
        return [candidate | dict(reason=reason)]
    candidates = []
    for part in np.array_split(points, count):
        candidates += split_track(start, part, track, samples, shape, fps, a)
        start += len(part)
    return candidates


def frame_face(candidate, points, track, samples, shape, fps, a):
    """Why a candidate is left out, or None; adds its square and the face's size in it. Paper 3.3:
    "stable detections larger than 400 pixels in segments longer than 2 seconds"."""
    if len(points) / fps <= a.min_seconds:
        return f"face for {a.min_seconds:g} s or less"
    if len(points) / fps > LONGEST:
        return TOO_LONG
    seen = points[~np.isnan(points[:, 0, 0])]
    if len(seen) < 0.9 * len(points):
        return "face lost in more than a tenth of the frames"

    square = data.keep_inside(data.face_square(seen), shape)
    if square is None:
        return data.TOO_LARGE
    x, y, side = square
    edges = x, y, x + side, y + side
    boxes = np.array([mesh_box(p) for p in seen])  # (M, 4)
    size = np.median(boxes[:, 2:] - boxes[:, :2], 0) / side
    margin = data.mirrored(square, shape)
    candidate.update(square=[x, y, side], face=size.round(3).tolist(), mirrored=margin)
    if side < a.min_side:
        return f"square smaller than {a.min_side} pixels"
    if (boxes < edges)[:, :2].any() or (boxes > edges)[:, 2:].any():
        return LEAVES

    crowded = []
    for f in samples.keys() & range(candidate["start"], candidate["end"]):
        face = nearest_box(track, f)
        others = [box for box in samples[f] if overlap(box, face) < 0.3]
        crowded.append(any(overlap(box, edges) > 0.02 for box in others))
    if np.mean(crowded or [0]) > 0.2:
        return "another face in its square"
    if np.nanstd(points / side, 0).mean() < 5e-4:
        return "nothing moves"


def detect(source, a):
    """Candidates of a video: its shots, tracks of faces within them, their parts as clips."""
    landmarker, video = get_landmarker(), data.Video(source.path)
    if source.spans is None and not key_frames_have_a_face(video, landmarker):
        return rejection("no face in its key frames", len(video))
    spans, fps = source.spans or [(0, math.inf, None)], video.fps
    thumbs, samples, (h, w) = scan(video, spans, landmarker)

    # Tracks of faces within shots, and the frames that they may cover
    extents, step = [], sample_step(fps)
    between = [(None, 0), *transitions(thumbs), (len(thumbs), None)]
    for (_, begin), (end, _) in itertools.pairwise(between):
        tracks = link_faces({f: boxes for f, boxes in samples.items() if begin <= f < end})
        extents += [(*extent(t, tracks, (begin, end), step), t) for t in tracks if len(t) > 1]
    landmarks = track_landmarks(video, extents, landmarker)

    candidates = []
    for (begin, end, track), points in zip(extents, landmarks):
        for since, until, box in spans:
            low, high = max(begin, math.ceil(since * fps)), int(min(end, until * fps))
            listed = not box or overlap(np.multiply(box, (w, h, w, h)), track[0][1]) >= 0.1
            if low < high and listed:
                part = points[low - begin : high - begin]
                candidates += split_track(low, part, track, samples, (h, w), fps, a)

    about = dict(fps=str(fps), height=h, width=w)
    why = "no listed face is found" if source.spans else "no face for two looks in a row"
    return [about | c for c in candidates] or rejection(why, len(thumbs))


# --------------------------------------------------------------------------------------------------
# validate (paper 3.3: "maximum ArcFace and CLIP distances from the first frame"), write

get_landmarker = functools.cache(data.FaceLandmarker)


@functools.cache
def get_networks(clip, arcface, hyperiqa):
    """(CLIP, ArcFace, HyperIQA); of the last two, None without a folder of weights."""
    import evaluate

    device = "cpu"
    if gpus := torch.cuda.device_count():
        device = f"cuda:{data.ranks()[2] % gpus}"
    encoder = data.SceneEncoder(data.fetch(clip), device)
    arcface = arcface and evaluate.load_arcface(arcface)
    return encoder, arcface, hyperiqa and evaluate.load_hyperiqa(hyperiqa, device)


def crops(source, candidates, size, sampled=False):
    """Yield (candidate's number, frame, crop) in one pass, of all frames or of samples."""
    if all(c["reason"] for c in candidates):
        return
    video = data.Video(source.path)
    step = sample_step(video.fps) if sampled else 1
    for f, image in enumerate(video):
        for i, c in enumerate(candidates):
            inside = c["reason"] is None and c["start"] <= f < c["end"]
            if inside and (f - c["start"]) % step == 0:
                yield i, f, data.crop(image, c["square"], size)


@torch.no_grad()
def validate(source, a, candidates):
    """Every candidate with its smallest CLIP (and ArcFace) cosine to its first frame. `write`
    applies the thresholds, on which the paper is silent."""
    encoder, arcface, hyperiqa = get_networks(a.clip, a.arcface, a.hyperiqa)
    measured = [defaultdict(list) for _ in candidates]
    for i, _, image in crops(source, candidates, 256, sampled=True):
        values = measured[i]
        values["clip"].append(encoder.images(data.to_tensor(image[None]))[0].cpu().numpy())
        points = get_landmarker().landmarks(image) if arcface else None
        if points is not None:
            values["arcface"].append(arcface(image[None], points[None] / 256)[0])
        if hyperiqa and len(values["hyperiqa"]) < 3:
            values["hyperiqa"].append(hyperiqa(image[None])[0])

    for c, values in zip(candidates, measured):
        for name in COSINES:
            if vectors := values[name]:
                c[f"{name}_cosine"] = round(float(min(np.stack(vectors) @ vectors[0])), 4)
        if values["hyperiqa"]:
            c["hyperiqa"] = round(float(np.mean(values["hyperiqa"])), 2)
    return candidates


def split_of(identity, fraction):
    """ "test" or "train", by identity alone."""
    return "test" if zlib.crc32(os.fsencode(identity)) % 10000 < fraction * 10000 else "train"


def another_scene(c, a):
    """The reason to leave out a candidate with cosines below the thresholds, or None."""
    for name, title in COSINES.items():
        threshold = getattr(a, f"min_{name}")
        if c.get(f"{name}_cosine", 1) < threshold:
            return f"{title} cosine to the first frame below {threshold:g}"


def drop_entries(source, out):
    """The entries about a video in OUT/drop.txt, which every --drop adds to."""
    path = out / "drop.txt"
    names = {source.name, source.path.stem, source.path.name, source.identity}
    entries = read_entries(path) if path.exists() else ()
    return [entry for entry in entries if entry in names or source.key in entry]


@functools.cache
def written_before(out):
    """{key of a video: its clips in OUT/train and OUT/test when this process began}."""
    found = defaultdict(list)
    for path in (*out.glob("train/*"), *out.glob("test/*")):
        if match := re.match(r"\.?(.*-[0-9a-f]{8})-\d{6}(-|\.)", path.name):
            found[match[1]].append(path)
    return found


def write(source, a, candidates):
    """Write the clips of a video. Every candidate gets the name of its clip, or its reason."""
    dropped, split = drop_entries(source, a.out), split_of(source.identity, a.test)
    for c in candidates:
        c["reason"] = c["reason"] or another_scene(c, a)
        if c["reason"]:
            continue
        x, y, _ = c["square"]
        name = f"{source.key}-{c['start']:06d}-{x:04d}-{y:04d}"  # by content, so it stays
        # an entry with the key in it names one clip, another the video or its person
        if any(source.key not in entry or Path(entry).stem == name for entry in dropped):
            c["reason"] = "on the drop list"
        else:
            c["clip"] = f"{split}/{name}.mp4"

    # Clips of other settings, or of a killed run
    keep = {a.out / c["clip"] for c in candidates if "clip" in c}
    for path in set(written_before(a.out).get(source.key, ())) - keep:
        path.unlink(missing_ok=True)

    writers = {}
    with contextlib.ExitStack() as stack:
        for i, f, image in crops(source, candidates, a.size):
            c = candidates[i]
            path = a.out / c["clip"]
            if i not in writers:
                frames, square = [c["start"], c["end"]], c["square"]
                about = json.dumps(dict(source=source.path.name, frames=frames, square=square))
                writers[i] = stack.enter_context(data.VideoWriter(path, c["fps"], about))
            writers[i].write(image)
            if f == c["end"] - 1:
                writers[i].close()
                c["bytes"] = path.stat().st_size
    return candidates


# --------------------------------------------------------------------------------------------------
# Stages: one file a video and stage, {"key": settings, "candidates": [...]}, written atomically

STAGES = dict(  # function, the stage before, settings that the candidates depend on
    detect=(detect, None, ("min_seconds", "min_side")),
    validate=(validate, "detect", ("clip", "arcface", "hyperiqa")),
    write=(write, "validate", ("min_clip", "min_arcface", "size", "test")),
)


def stage_file(stage, source, a):
    return a.out / stage / f"{source.key}.json"


def read_stage(path):
    """A stage's file; None where it is missing or torn."""
    with contextlib.suppress(OSError, UserError):
        return data.read_json(path, ["key", "candidates", "video", "identity", "path"])


def list_done(stage, a):
    """[(source, content)] of the videos that went through a stage, in order."""
    found = list(filter(None, map(read_stage, sorted((a.out / stage).glob("[!.]*.json")))))
    if not found:
        raise UserError(f"nothing in {a.out / stage}; run the stage before, or all: curate.py run")
    return [(Source(Path(c["path"]), c["video"], c["identity"]), c) for c in found]


def stage_key(stage, source, a):
    """What a result depends on: settings, and the video or the stage before."""
    _, before, settings = STAGES[stage]
    key = {k: str(getattr(a, k)) for k in settings}
    if stage == "detect":
        path, modified = str(source.path), data.changed(source.path)
        return key | dict(path=path, modified=modified, spans=source.spans)

    if stage == "validate":
        key["clip"] = data.sha256(data.fetch(a.clip))
    if stage == "write":
        key["drop"] = drop_entries(source, a.out)
    found = read_stage(stage_file(before, source, a)) or {}
    return key | dict(before=zlib.crc32(json.dumps(found.get("candidates")).encode()))


def is_done(stage, source, a):
    """Whether a stage has a video's final result of these settings, and its clips are whole."""
    found = read_stage(stage_file(stage, source, a))
    if not found or found["key"] != json.loads(json.dumps(stage_key(stage, source, a))):
        return False
    clips = [(a.out / c["clip"], c.get("bytes")) for c in found["candidates"] if "clip" in c]
    return all(path.exists() and path.stat().st_size == size for path, size in clips)


def make_candidates(stage, source, a):
    """(candidates of a video, whether they are final: else the next run tries again). UserError
    where the machine or the weights are at fault."""
    torch.set_num_threads(1)
    function, before, _ = STAGES[stage]
    try:
        inputs = [read_stage(stage_file(before, source, a))["candidates"]] if before else []
        return function(source, a, *inputs), True
    except Exception as e:  # whatever goes wrong with a video, the rest goes on
        there = source.path.exists()
        reason = data.blame(e, source.path) if there else str(e)
        reason = reason.replace(str(source.path), source.path.name)
        return rejection(reason), there and isinstance(e, UserError | av.FFmpegError)


@functools.cache
def worker():
    """The process that does the work: a video that crashes the decoder kills it, not the run."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, spawn, data.end_with_parent)


def attempt(stage, source, a):
    """`make_candidates`, in the worker process; a crash is not final either."""
    for _ in range(2):
        with contextlib.suppress(concurrent.futures.BrokenExecutor):
            return worker().submit(make_candidates, stage, source, a).result()
        worker.cache_clear()
    return rejection("crashed the decoder"), False


def run_stage(stage, sources, a):
    """One stage over this rank's part of the sources."""
    rank, world, _ = data.ranks()
    (a.out / stage).mkdir(parents=True, exist_ok=True)
    mine = [s for s in sources if zlib.crc32(s.key.encode()) % world == rank]
    todo = [s for s in mine if not is_done(stage, s, a)]
    counts, frames, began = Counter(), 0, time.perf_counter()

    bar = tqdm(todo, f"{stage}, rank {rank}", unit="video", disable=None)
    for source in bar:
        data.enough_disk(a.out, 1e9)
        path = stage_file(stage, source, a)
        before = read_stage(path)
        other = before and Path(before["path"])
        if other and other.exists() and other.resolve() != source.path.resolve():
            same = f"{other} and {source.path} have one name in {a.out}"
            raise UserError(f"{same}; name another --out, or give the folder above both")
        key = stage_key(stage, source, a)
        candidates, final = attempt(stage, source, a)
        about = dict(video=source.name, identity=source.identity, path=str(source.path))
        about |= dict(key=key if final else None, candidates=candidates)
        data.write_text(path, json.dumps(about))

        reasons = [c["reason"] or "kept" for c in candidates]
        counts.update(reason.replace(source.path.name, "the video") for reason in reasons)
        frames += sum(c["end"] - c["start"] for c in candidates)
        bar.set_postfix(kept=counts["kept"], left_out=counts.total() - counts["kept"])

    seconds = time.perf_counter() - began
    speed = f"{len(todo) / seconds * 3600:,.0f} an hour, {frames / seconds:.0f} frames a second"
    print(f"{stage}: {len(todo)} videos, {speed}")
    for reason, n in counts.most_common():
        print(f"  {n:6} x {reason}")


# --------------------------------------------------------------------------------------------------
# What came of it


def save_histograms(path, values, lines):
    """A picture with a histogram of each of {title: values}, and a line at {title: value}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(values), 3))
    axes = figure.subplots(1, len(values), squeeze=False)
    for ax, title in zip(axes[0], values):
        ax.hist(values[title], 30)
        ax.set(title=title, ylabel="count")
        if title in lines:
            ax.axvline(lines[title], linestyle="--", color="black")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def histogram(a):
    """OUT/histogram.png: smallest cosines to the first frame, to choose the thresholds by."""
    candidates = [c for _, found in list_done("validate", a) for c in found["candidates"]]
    values, thresholds = {}, {}
    for name, title in COSINES.items():
        cosines = [c[f"{name}_cosine"] for c in candidates if f"{name}_cosine" in c]
        if cosines:
            threshold = getattr(a, f"min_{name}")
            values[title], thresholds[title] = cosines, threshold
            low = ", ".join(f"{v:.3f}" for v in np.percentile(cosines, [1, 5, 25, 50]))
            what = f"smallest {title} cosine, percentiles 1, 5, 25, 50"
            print(f"{what}: {low}; threshold {threshold:g}")
    if values:
        save_histograms(a.out / "histogram.png", values, thresholds)


def write_manifest(a):
    """OUT/manifest.jsonl: a line for every candidate that went through `write`, in order."""
    entries = []
    for source, found in list_done("write", a):
        split = split_of(source.identity, a.test)
        about = dict(video=source.name, identity=source.identity, split=split)
        entries += [about | c for c in found["candidates"]]
    path = a.out / "manifest.jsonl"
    data.write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))

    kept = [entry["split"] for entry in entries if entry["reason"] is None]
    for split in SPLITS:
        if kept and split not in kept:
            why = "--test sets the fraction, and videos in one folder count as one person"
            print(f"note: no identity fell to {split}; {why}")
    left_out = len(entries) - len(kept)
    print(f"{len(kept)} clips in {a.out}, {left_out} candidates left out; why: {path}")


def stats(a):
    """OUT/stats.png, the paper's Figs. 10 to 13, and a table of means beside the paper's."""
    path = a.out / "manifest.jsonl"
    if not path.exists():
        raise UserError(f"no {path}; run write first")
    clips = [c for c in data.read_lines([path]) if c["reason"] is None]
    if not clips:
        raise UserError(f"no clip was kept in {a.out}; {path} says why")

    duration = [(c["end"] - c["start"]) / float(Fraction(c["fps"])) for c in clips]
    rows = [  # and the paper's mean and standard deviation
        ("duration, seconds", duration, 3.29, 2.07),
        ("hyperiqa", [c["hyperiqa"] for c in clips if "hyperiqa" in c], 51.5, 10.72),
        ("resolution, pixels", [c["square"][2] for c in clips], 745.1, 247.8),
        ("face width / crop", [c["face"][0] for c in clips], 0.45, 0.05),
        ("face height / crop", [c["face"][1] for c in clips], 0.53, 0.07),
    ]
    rows = [row for row in rows if row[1]]
    save_histograms(a.out / "stats.png", {title: values for title, values, *_ in rows}, {})
    print(f"{len(clips)} clips, {sum(duration) / 3600:.2f} hours\n")
    print("| | mean | standard deviation | the paper |\n|---|---|---|---|")
    for title, v, mean, deviation in rows:
        print(f"| {title} | {np.mean(v):.2f} | {np.std(v):.2f} | {mean:g} ± {deviation:g} |")


def arguments():
    ap = data.Parser(__doc__)
    add, number = ap.add_argument, data.number
    seconds, cosine, fraction = number(float, 0), number(float, -2, 2), number(float, 0, 1)
    add("command", choices=["run", "search", *STAGES, "stats"])
    add("source", type=Path, nargs="?", help="folder of videos; of `search`: a file of queries")
    add("--out", type=Path, default=Path("clips"))
    add("--top", type=number(int, 1), default=20, help="of `search`: videos a query (paper: 20)")
    # Paper: 400, which cannot be the face's own box: its clips would be larger than they are
    add("--min-side", type=number(int, 0), default=400, help="least pixels of a clip's square")
    add("--min-seconds", type=seconds, default=2.0, help="clips are longer than this")
    add("--clip", default=data.DEMO / "clip.safetensors", help="a file, or ViT-L-14, the paper's")
    add("--min-clip", type=cosine, default=0.75, help="least CLIP cosine to the first frame")
    add("--arcface", type=Path, help="folder of w600k_r50.onnx (research only)")
    add("--min-arcface", type=cosine, default=0.4, help="least ArcFace cosine to the first frame")
    add("--hyperiqa", type=Path, help="folder of koniq_pretrained.pkl")
    add("--size", type=number(int, 2, 4096), default=512, help="pixels of the written clips")
    add("--test", type=fraction, default=0.02, help="fraction of identities for OUT/test")
    add("--drop", type=Path, help="file of clips, videos, identities to leave out from now on")
    a = ap.parse_args()
    if a.size % 2:
        raise UserError(f"--size {a.size} is not an even number of pixels")
    return a


def check_weights(a):
    """Name missing files before the work."""
    import evaluate

    if data.fetch(a.clip).resolve().parent == data.DEMO:
        only = "the bundled CLIP has seen rendered faces only"
        print(f"note: {only}; for real ones give --clip ViT-L-14")
    for folder, name in (a.arcface, "w600k_r50.onnx"), (a.hyperiqa, "koniq_pretrained.pkl"):
        if folder:
            evaluate.find_network(name, folder)


def main():
    a = arguments()
    if a.command == "search":
        return search(a)
    if a.command == "stats":
        return stats(a)

    rank, world, _ = data.ranks()
    if a.command == "run" and world > 1:
        raise UserError("with several processes give detect, validate, write one after the other")
    stages = list(STAGES) if a.command == "run" else [a.command]
    if "detect" in stages:
        sources = list_sources(a.source, a.out)

    with data.owned(a.out / f"rank-{rank}"):
        if "validate" in stages:
            check_weights(a)
        if a.drop:
            entries, path = read_entries(a.drop), a.out / "drop.txt"
            path.touch()
            entries = sorted({*entries, *read_entries(path)})
            data.write_text(path, "\n".join(entries) + "\n")

        for stage in stages:
            if before := STAGES[stage][1]:
                sources = [source for source, _ in list_done(before, a)]
            if stage == "write" and a.test < 1:
                if all(split_of(s.identity, a.test) == "test" for s in sources):
                    a.test = 0  # the only identity is for training
            run_stage(stage, sources, a)
            if world == 1 and stage == "validate":
                histogram(a)
            if world == 1 and stage == "write":
                write_manifest(a)
        if a.drop:
            matched = {entry for source in sources for entry in drop_entries(source, a.out)}
            for entry in sorted({*read_entries(a.drop)} - matched):
                print(f"note: nothing here is {entry}, as {a.drop} has it")
    if worker.cache_info().currsize:
        worker().shutdown()
    if a.command == "run":
        stats(a)


if __name__ == "__main__":
    data.run_main(main)
