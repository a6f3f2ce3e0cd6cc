"""From raw videos to a training set like ReenactFaces-1M (paper 3.3 and B), in restartable stages.

    python curate.py run VIDEOS --out clips         # detect, validate, write, stats
    python curate.py search queries.txt --out clips # first download videos, into clips/videos
    python curate.py detect VIDEOS --out clips      # shots, faces, one square a clip
    python curate.py validate --out clips           # is it one scene: CLIP, histogram.png
    python curate.py write --out clips              # clips/train, clips/test, clips/manifest.jsonl
    python curate.py stats --out clips              # the paper's Figs. 10 to 13: stats.png, a table
    torchrun --nproc_per_node=8 curate.py detect VIDEOS --out clips   # the work shared

If VIDEOS holds celebvhq_info.json or VFHQ's Clip+ID+...txt, only the videos, times and faces listed
there are used; RAVDESS is known by its file names. After torchrun, give the same command once
without it: it writes the histogram or the manifest. Stages keep one file a video in OUT/STAGE.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
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
from sdit import UserError

DEMO = Path(__file__).resolve().parent / "demo"
SAMPLES = 5  # sampled frames a second
LONGEST = 10  # seconds a clip (paper B, Fig. 10, ends there)
PAPER = dict(  # mean, standard deviation
    duration=(3.29, 2.07),
    resolution=(745.1, 247.8),
    face_width=(0.45, 0.05),
    face_height=(0.53, 0.07),
    hyperiqa=(51.5, 10.72),
)

# --------------------------------------------------------------------------------------------------
# Sources


@dataclass
class Source:
    """A video, and what of it is wanted."""

    path: Path
    name: str  # within the folder that was given
    identity: str  # what training and test must not share
    # [(from, to, box)], seconds and the face's (x0, y0, x1, y1) in 0..1 or None; None: all of it
    spans: list = None

    @property
    def key(self):
        """Name of the stages' files."""
        stem = re.sub("[^A-Za-z0-9-]+", "_", self.path.stem)[:60]
        return f"{stem}-{zlib.crc32(os.fsencode(self.name)):08x}"


def celebvhq(path):
    """Yield (video id, span) of celebvhq_info.json."""
    for clip in data.read_json(path, ["clips"])["clips"].values():
        box, when = clip["bbox"], clip["duration"]
        box = [box[k] for k in ("left", "top", "right", "bottom")]
        yield clip["ytb_id"], (when["start_sec"], when["end_sec"], box)


def vfhq(path):
    """Yield (video id, span) of one of VFHQ's text files, without the frames at both ends."""
    pattern = r"Clip\+(.+)\+P\d+\+C\d+\+F(\d+)-(\d+)"
    video, first, last = re.fullmatch(pattern, path.stem).groups()
    lines = data.read_text(path).replace(":", " ").splitlines()
    fields = dict(line.split(None, 1) for line in lines if " " in line.strip())
    h, w, fps = (float(fields[k]) for k in ("H", "W", "FPS"))
    x0, y0, x1, y1 = (float(x) for x in fields["CROP"].split())
    yield video, ((int(first) + 1) / fps, int(last) / fps, [x0 / w, y0 / h, x1 / w, y1 / h])


def list_spans(files):
    """{video id: spans} of all published lists among the files."""
    spans = {}
    for path in files:
        listed = ()
        if path.name == "celebvhq_info.json":
            listed = celebvhq(path)
        elif path.suffix == ".txt" and path.name.startswith("Clip+"):
            listed = vfhq(path)
        try:
            for video, span in listed:
                spans.setdefault(video, []).append(span)
        except (ValueError, KeyError, AttributeError, TypeError, ArithmeticError, OSError) as e:
            raise UserError(
                f"{path} is not the list that its name says ({e!r}); fetch it again"
            ) from None
    return spans


def list_sources(folder, out):
    """The sources in a folder tree, sorted, without what was written to `out`. The identity of a
    video is the first folder that it lies in, or itself."""
    if not Path(folder).is_dir():
        raise UserError(f"no such folder: {folder}")
    written = {(out / split).absolute() for split in ("train", "test")}
    files = data.list_files(folder, data.VIDEOS | {".txt", ".json"})
    files = [p for p in files if written.isdisjoint(p.absolute().parents)]
    spans, sources = list_spans(files), []

    for path in (p for p in files if p.suffix.lower() in data.VIDEOS):
        relative = path.relative_to(folder)
        identity = path.stem if spans or len(relative.parts) == 1 else relative.parts[0]
        if re.fullmatch(r"\d\d(-\d\d){6}", path.stem):
            # RAVDESS: 02 is 01 without sound, 03 is sound alone
            kind, *_, actor = path.stem.split("-")
            twin = path.with_name(f"01{path.name[2:]}")
            if kind == "03" or kind == "02" and twin.exists():
                continue
            identity = f"actor-{actor}"
        if not spans or path.stem in spans:
            sources.append(Source(path.absolute(), str(relative), identity, spans.get(path.stem)))

    if not sources:
        named = f" named as its list names them, like {min(spans)}.mp4" if spans else ""
        raise UserError(f"no videos ({', '.join(sorted(data.VIDEOS))}) under {folder}{named}")
    return sources


# --------------------------------------------------------------------------------------------------
# search: the paper's first step, by the program yt-dlp

YT_DLP = "pip install 'yt-dlp[default]', with a JavaScript runtime (deno) and ffmpeg"
REFUSALS = ("HTTP Error 429", "not a bot", "rate-limit", "rate limit")


def read_queries(path):
    """Queries, one a line; lines of # are comments."""
    if not path or not path.is_file():
        raise UserError("name a file of queries, one a line: python curate.py search queries.txt")
    lines = map(str.strip, data.read_text(path).splitlines())
    queries = [line for line in lines if line and not line.startswith("#")]
    if options := [q for q in queries if q.startswith("-") or "\0" in q]:  # some run programs
        raise UserError(
            f"{path}: {options[0]!r} begins with a dash, or is no text; give words, or an address"
        )
    return queries


def search(a):
    """Download the first videos of every query (words, or addresses of channels)."""
    program = shutil.which("yt-dlp")
    if not program:
        raise UserError(f"yt-dlp is not on PATH: {YT_DLP}")
    queries, folder = read_queries(a.source), a.out / "videos"
    a.out.mkdir(parents=True, exist_ok=True)
    archive, log = a.out / "archive.txt", a.out / "search.jsonl"
    logged = lambda: data.read_lines([log] if log.exists() else [])
    fetched = lambda: len(archive.read_text().splitlines()) if archive.exists() else 0
    done = {line.get("query") for line in logged() if line.get("done")}

    options = f"-I 1:{a.top} -c --write-info-json --no-write-playlist-metafiles -t sleep".split()
    options += ["--match-filters", "height>=?720 & !is_live & duration<3600"]
    options += ["-f", "bv*[height>=720][height<=1080][vcodec^=avc1]+ba/bv*[height>=720]+ba"]
    options += ["--download-archive", archive, "--retry-sleep", "exp=1:120"]
    options += ["-o", folder / "%(id)s.%(ext)s"]

    for query in tqdm([q for q in queries if q not in done], "queries", disable=None):
        target, before = query if "://" in query else f"ytsearch{a.top}:{query}", fetched()
        command = [program, *options, "--", target]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
        reason = run.stderr.strip().splitlines()[-1:]
        if run.returncode and any(word in run.stderr for word in REFUSALS):
            later = "wait some hours, then give the same command: it goes on"
            raise UserError(f"the site refuses ({reason[0]}); {later} at {query!r}")
        success = run.returncode == 0 or fetched() > before  # single videos may be gone
        data.append_line(log, dict(query=query, done=success, code=run.returncode, last=reason))
        if not success:
            again = "the same command tries it again"
            print(f"nothing came of {query!r} ({''.join(reason)}); {again}", file=sys.stderr)

    count = len(data.list_files(folder, data.VIDEOS)) if folder.is_dir() else 0
    if not count and queries and not any(line.get("done") for line in logged()):
        raise UserError(f"no query of {a.source} brought a video; the reasons are above")
    print(f"{count} videos in {folder}; next: python curate.py run {folder} --out {a.out}")


# --------------------------------------------------------------------------------------------------
# detect: shots, tracks of faces, one fixed square a clip

CUT, JUMP, DISSOLVE = 25, 8, 20  # mean differences of thumbnails, of 255


def transitions(thumbs, chunk=4096, margin=64):
    """[(end of a shot, begin of the next)], frame numbers, of thumbnails (M, 24, 24, 3) uint8:
    equal at a cut, apart at a dissolve. Long films go in chunks."""
    found = []
    for first in range(0, len(thumbs), chunk):
        start = max(0, first - margin)
        part = thumbs[start : first + chunk + margin].astype(np.float32)
        ends = [(start + end, start + begin) for end, begin in shots_end(part)]
        found += [(end, begin) for end, begin in ends if first <= end < first + chunk]
    return found


def shots_end(x):
    """`transitions` of one chunk, float. A cut is a large step, or one that stands alone."""
    step = np.abs(np.diff(x, axis=0)).mean((1, 2, 3))  # (M - 1,)
    cuts = []
    for i, d in enumerate(step):
        around = np.concatenate([step[max(0, i - 6) : i], step[i + 1 : i + 7]])
        alone = len(around) and d > 4 * np.median(around) + 1
        if d > CUT or d > JUMP and alone:
            cuts.append(i + 1)
    return sorted([(cut, cut) for cut in cuts] + dissolves(x, [0, *cuts, len(x)]))


def dissolves(x, cuts):
    """[(end of a shot, begin of the next)] of the dissolves between frames x (M, 24, 24, 3).

    In the middle of a dissolve a frame is the mean of those before and after, as motion hardly ever
    is; its ends are where the mixture, extrapolated, is 0 and 1."""
    found = []
    for reach in (4, 8, 16):
        a, middle, b = x[: -2 * reach], x[reach : len(x) - reach], x[2 * reach :]
        apart, off = (np.abs(d).mean((1, 2, 3)) for d in (b - a, middle - (a + b) / 2))
        for i in np.flatnonzero((apart > DISSOLVE) & (off < 0.2 * apart)):
            # Widen the window, within the shot
            centre = i + reach
            low, high = max(c for c in cuts if c <= centre), min(c for c in cuts if c > centre)
            first, last = max(low, centre - 2 * reach), min(high - 1, centre + 2 * reach)
            if first > i or last < i + 2 * reach:
                continue

            # Each frame as a mixture of the window's ends
            way = x[last] - x[first]
            moved = x[first : last + 1] - x[first]
            mixture = (moved * way).sum((1, 2, 3)) / (way**2).sum()
            early, late = np.flatnonzero(mixture < 0.2), np.flatnonzero(mixture > 0.8)
            if not len(late) or not len(early) or late[0] <= early[-1] + 1:
                continue
            inside = slice(early[-1], late[0] + 1)
            frames = np.arange(early[-1], late[0] + 1)
            begin, end = (np.interp(v, mixture[inside], frames) for v in (0.2, 0.8))

            rest = np.abs(moved - mixture[:, None, None, None] * way).mean((1, 2, 3))
            quality = rest[inside].max() / np.abs(way).mean()
            margin = (end - begin) / 3
            found.append((quality, first + round(begin - margin), first + round(end + margin) + 1))

    # The best of those that overlap
    chosen = []
    for quality, begin, end in sorted(found):
        if quality < 0.25 and all(end <= b or begin >= e for b, e in chosen):
            chosen.append((max(0, begin), min(len(x), end)))
    return chosen


def key_frames_have_a_face(video, landmarker):
    """Whether any key frame shows a face; also True below one key frame in five seconds."""
    count = 0
    with data.open_video(video.path) as container:
        stream = data.video_stream(container)
        stream.codec_context.skip_frame, show = "NONKEY", data.Screen(stream)
        with contextlib.suppress(UserError):  # no key frame at all
            for count, frame in enumerate(data.decode(container, video.path), 1):
                if next(landmarker.everyone(show(frame)), None) is not None:
                    return True
    return count < len(video) / video.fps / 5


def link(samples, stops):
    """Tracks {frame: box} of faces, from samples {frame: boxes}; none crosses a frame of `stops`. A
    face that has moved far from its track's begin starts a new one: one square must hold it."""
    open_tracks, done, before = [], [], -1
    for frame, boxes in sorted(samples.items()):
        if any(before < stop <= frame for stop in stops):
            done, open_tracks = done + open_tracks, []
        boxes, going = list(boxes), []

        for track in open_tracks:
            last = max(track)
            best = max(boxes, key=lambda box: overlap(box, track[last]), default=None)
            if best is None or overlap(best, track[last]) < 0.3:
                missed = sum(last < f <= frame for f in samples)
                (done if missed >= 2 else going).append(track)
                continue
            boxes.remove(best)
            if overlap(best, track[min(track)]) < 0.35:
                done.append(track)
                track = {}
            going.append(track | {frame: best})
        open_tracks, before = going + [{frame: box} for box in boxes], frame
    return sorted(done + open_tracks, key=lambda track: (min(track), track[min(track)]))


def nearest(track, frame):
    """The box of a track at the sampled frame nearest to `frame`."""
    return track[min(track, key=lambda f: abs(f - frame))]


def scan(video, spans, landmarker):
    """One pass over a video: (thumbnails (M, 24, 24, 3), {frame: boxes of faces within the spans},
    (height, width))."""
    every, thumbs, samples = max(1, round(video.fps / SAMPLES)), [], {}
    wanted = lambda f: not spans or any(begin <= f / video.fps < end for begin, end, _ in spans)
    for f, image in enumerate(video):
        thumbs.append(cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA))
        if f % every == 0 and wanted(f):
            samples[f] = [mesh_box(p) for p in landmarker.everyone(image)]
    return np.stack(thumbs), samples, image.shape[:2]


def limits(track, others, shots, every, M):
    """(first, end) frames that a track may cover: less than `every` beyond its samples, within its
    shot, and not where another track takes over the same face."""
    first, last = min(track), max(track)
    begin, end = next((b, e) for b, e in shots if b <= first < e)
    begin = begin if first - begin < every else first - every + 1
    end = end if end - last <= every else last + every
    for other in others:
        if last < min(other) <= end and overlap(track[last], other[min(other)]) > 0.1:
            end = min(other)
        if first > max(other) >= begin - every and overlap(track[first], other[max(other)]) > 0.1:
            begin = max(begin, first)
    return max(0, begin), min(M, end)


def look_closer(video, wanted, landmarker):
    """[(M', 478, 3)] landmarks, NaN where not found, of all frames of [(first, end, track)]."""
    points = [np.full((end - first, 478, 3), np.nan, np.float32) for first, end, _ in wanted]
    for f, image in enumerate(video if wanted else ()):
        for (first, end, track), found in zip(wanted, points):
            if not first <= f < end:
                continue
            x0, y0, x1, y1 = box = nearest(track, f)
            side = 1.6 * max(x1 - x0, y1 - y0)
            square = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), round(side)
            mesh = landmarker.landmarks(image, square)
            if mesh is not None and overlap(mesh_box(mesh), box) > 0.2:
                found[f - first] = mesh
    return points


def pieces(first, points, others, shape, fps, a):
    """Candidates [dict(start, end, square, face, reason)] of one track: landmarks (M, 478, 3) from
    frame `first`, trimmed to frames with a face, split evenly above LONGEST, halved while the face
    leaves its square. `others`: boxes of other faces by frame."""
    found = np.flatnonzero(~np.isnan(points[:, 0, 0]))
    if not len(found):
        return []
    first, points = int(first + found[0]), points[found[0] : found[-1] + 1]
    here = dict(start=first, end=first + len(points), square=None, face=None)
    rejected = lambda reason: [here | dict(reason=reason)]

    def split(count):
        parts = np.array_split(np.arange(len(points)), count)
        return [c for p in parts for c in pieces(first + p[0], points[p], others, shape, fps, a)]

    # Length
    seconds = len(points) / fps
    if seconds <= a.min_seconds:
        return rejected(f"face for {a.min_seconds:g} s or less")
    if seconds > LONGEST:
        return split(math.ceil(seconds / LONGEST))
    seen = points[~np.isnan(points[:, 0, 0])]
    if len(seen) < 0.9 * len(points):
        return rejected("face lost in more than a tenth of the frames")

    # Square
    square = data.keep_inside(data.face_square(seen), shape)
    if square is None:
        return rejected(data.TOO_LARGE)
    x, y, side = (int(v) for v in square)
    here |= dict(square=[x, y, side], mirrored=data.mirrored(square, shape))
    boxes = np.array([mesh_box(p) for p in seen])
    size = np.median(boxes[:, 2:] - boxes[:, :2], 0) / side
    here["face"] = [float(v) for v in np.round(size, 3)]
    if side < a.min_side:
        return rejected(f"square smaller than {a.min_side} pixels")

    # What is in it
    if (boxes[:, :2] < (x, y)).any() or (boxes[:, 2:] > (x + side, y + side)).any():
        if len(points) // 2 / fps > a.min_seconds:
            return split(2)
        return rejected("face moves out of its square")
    frame = x, y, x + side, y + side
    samples = [others[f] for f in range(here["start"], here["end"]) if f in others]
    crowded = [any(overlap(box, frame) > 0.02 for box in boxes) for boxes in samples]
    if np.mean(crowded or [0]) > 0.2:
        return rejected("another face in its square")
    if np.nanstd(points / side, 0).mean() < 5e-4:
        return rejected("nothing moves")
    return rejected(None)


def detect(source, a):
    """Candidates of a video: shots, tracks of faces within them, `pieces` of the tracks."""
    landmarker, video = get_landmarker(), data.Video(source.path)
    if source.spans is None and not key_frames_have_a_face(video, landmarker):
        return [dict(start=0, end=len(video), reason="no face in its key frames")]
    thumbs, samples, shape = scan(video, source.spans, landmarker)
    M, every = len(thumbs), max(1, round(video.fps / SAMPLES))

    # Shots, and tracks of faces within them
    found = transitions(thumbs)
    begins, ends = [0, *(b for _, b in found)], [*(e for e, _ in found), M]
    shots = [(b, e) for b, e in zip(begins, ends) if e > b]
    samples = {f: boxes for f, boxes in samples.items() if any(b <= f < e for b, e in shots)}
    tracks = link(samples, [b for b, _ in shots])
    wanted = []
    for track in (t for t in tracks if len(t) > 1):
        others = [t for t in tracks if t is not track]
        wanted.append((*limits(track, others, shots, every, M), track))

    candidates = []
    for (first, end, track), points in zip(wanted, look_closer(video, wanted, landmarker)):
        others = {
            f: [box for box in boxes if overlap(box, nearest(track, f)) < 0.3]
            for f, boxes in samples.items()
            if first <= f < end
        }
        for begin, stop, listed in source.spans or [(0, math.inf, None)]:
            low = max(first, math.ceil(begin * video.fps))
            high = end if stop == math.inf else int(min(end, stop * video.fps))
            box = listed and [v * shape[1 - i % 2] for i, v in enumerate(listed)]
            if low < high and (not box or overlap(box, track[min(track)]) >= 0.1):
                part = points[low - first : high - first]
                candidates += pieces(low, part, others, shape, video.fps, a)
    about = dict(fps=str(video.fps), height=shape[0], width=shape[1])
    nobody = dict(start=0, end=M, reason="no face for two looks in a row")
    return [about | c for c in candidates] or [nobody]


# --------------------------------------------------------------------------------------------------
# validate, write


def crops(source, candidates, size=None, every=None):
    """Yield (candidate number, frame, crop) in one pass, of all frames or of `every` a second."""
    if all(c["reason"] for c in candidates):
        return
    video = data.Video(source.path)
    step = max(1, round(video.fps / every)) if every else 1
    for f, image in enumerate(video):
        for i, c in enumerate(candidates):
            inside = c["reason"] is None and c["start"] <= f < c["end"]
            if inside and (f - c["start"]) % step == 0:
                yield i, f, data.crop(image, tuple(c["square"]), size or c["square"][2])


@torch.no_grad()
def validate(source, a, candidates):
    """Every candidate with its smallest CLIP (and ArcFace) cosine to its first frame (paper: "max
    ArcFace and CLIP distance from frame 1"). `write` applies the thresholds."""
    encoder = get_encoder(str(a.clip))
    arcface, iqa = get_net("arcface", a.arcface), get_net("hyperiqa", a.hyperiqa)
    values = [dict(clip=[], arcface=[], hyperiqa=[]) for _ in candidates]
    for i, _, image in crops(source, candidates, 256, SAMPLES):
        v = values[i]
        v["clip"].append(encoder.images(data.to_tensor(image[None]))[0].cpu().numpy())
        points = get_landmarker().landmarks(image) if arcface else None
        if points is not None:
            v["arcface"].append(arcface(image[None], points[None] / 256)[0])
        if iqa and len(v["hyperiqa"]) < 3:
            v["hyperiqa"].append(iqa(image[None])[0])

    result = [dict(c) for c in candidates]
    for c, v in zip(result, values):
        for name in ("clip", "arcface"):
            if v[name]:
                c[f"{name}_cosine"] = round(float(min(np.stack(v[name]) @ v[name][0])), 4)
        if v["hyperiqa"]:
            c["hyperiqa"] = round(float(np.mean(v["hyperiqa"])), 2)
    return result


def split_of(identity, fraction):
    """ "test" or "train", by identity alone."""
    return "test" if zlib.crc32(os.fsencode(identity)) % 10000 < fraction * 10000 else "train"


def another_scene(c, a):
    """The reason to leave out a candidate with cosines below the thresholds, or None."""
    for name, title in (("clip", "CLIP"), ("arcface", "ArcFace")):
        threshold = getattr(a, f"min_{name}")
        if c.get(f"{name}_cosine", 1) < threshold:
            return f"{title} cosine to the first frame below {threshold:g}"


def read_drop(path):
    """Entries of a drop list, one a line; OUT/drop.txt is what every --drop adds to."""
    lines = data.read_text(path).splitlines() if path.exists() else ()
    return set(map(str.strip, lines)) - {""}


def drop_entries(source, out):
    """Entries of the drop list that are about a video."""
    names = {source.name, source.path.stem, source.path.name, source.identity}
    entries = read_drop(out / "drop.txt")
    return sorted(entry for entry in entries if entry in names or source.key in entry)


@functools.cache
def written_before(out):
    """{key of a video: its clips in OUT/train and OUT/test when this process began}."""
    found = {}
    for path in (*(out / "train").glob("*"), *(out / "test").glob("*")):
        if match := re.match(r"\.?(.*-[0-9a-f]{8})-\d{6}(-|\.)", path.name):
            found.setdefault(match[1], []).append(path)
    return found


def write(source, a, candidates):
    """Write the clips of a video. Every candidate gets the name of its clip, or its reason."""
    dropped, result = drop_entries(source, a.out), []
    split = split_of(source.identity, a.test)
    for c in candidates:
        place = [f"{v:04d}" for v in (c.get("square") or ())[:2]]
        name = "-".join([source.key, f"{c['start']:06d}", *place])  # by content, so it stays
        listed = any(source.key not in entry or Path(entry).stem == name for entry in dropped)
        reason = c["reason"] or another_scene(c, a) or ("on the drop list" if listed else None)
        result.append(
            c | dict(reason=reason) | ({} if reason else dict(clip=f"{split}/{name}.mp4"))
        )

    # Clips of other settings, or of a killed run
    keep = {c.get("clip") for c in result}
    for path in written_before(a.out).get(source.key, ()):
        if f"{path.parent.name}/{path.name}" not in keep:
            path.unlink(missing_ok=True)

    writers = {}
    with contextlib.ExitStack() as stack:
        for i, f, image in crops(source, result, a.size):
            c, path = result[i], a.out / result[i]["clip"]
            if i not in writers:
                frames = [c["start"], c["end"]]
                about = dict(source=source.path.name, frames=frames, square=c["square"])
                writer = data.VideoWriter(path, c["fps"], json.dumps(about))
                writers[i] = stack.enter_context(writer)
            writers[i].write(image)
            if f == c["end"] - 1:
                writers[i].close()
                c["bytes"] = path.stat().st_size
    return result


# --------------------------------------------------------------------------------------------------
# Stages: one file a video and stage, {"key": settings, "candidates": [...]}, written atomically


@functools.cache
def get_landmarker():
    return data.FaceLandmarker()


def get_device():
    *_, local = data.ranks()
    gpu = torch.cuda.is_available()
    return f"cuda:{local % torch.cuda.device_count()}" if gpu else "cpu"


@functools.cache
def get_encoder(path):
    return data.SceneEncoder(data.fetch(path), get_device())


@functools.cache
def get_net(name, folder):
    """A network of evaluate.py whose weights lie in `folder`, or None."""
    import evaluate

    device = dict(device=get_device()) if name == "hyperiqa" else {}
    return getattr(evaluate, f"load_{name}")(folder, **device) if folder else None


# (function, settings that its results depend on)
STAGES = dict(
    detect=(detect, ("min_seconds", "min_side")),
    validate=(validate, ("clip", "arcface", "hyperiqa")),
    write=(write, ("min_clip", "min_arcface", "size", "test")),
)
BEFORE = dict(validate="detect", write="validate")


def stage_file(a, stage, source):
    return a.out / stage / f"{source.key}.json"


def stage_key(a, stage, source):
    """What a stage's result depends on: settings, and the video or the stage before."""
    values = {k: str(getattr(a, k)) for k in STAGES[stage][1]}
    if stage == "detect":
        modified = data.changed(source.path)
        return values | dict(path=str(source.path), modified=modified, spans=source.spans)

    if stage == "validate":
        values["clip"] = data.sha256(data.fetch(a.clip))
    if stage == "write":
        values["drop"] = drop_entries(source, a.out)
    before = read_stage(stage_file(a, BEFORE[stage], source)) or {}
    return values | dict(before=zlib.crc32(json.dumps(before.get("candidates")).encode()))


def read_stage(path):
    """The content of a stage's file; None where it is missing or torn."""
    try:
        return data.read_json(path, ["key", "candidates", "video", "identity", "path"])
    except (OSError, UserError):
        return None


def is_done(stage, source, a):
    """Whether a stage has a video's final result of these settings, and its clips are whole."""
    found = read_stage(stage_file(a, stage, source))
    if not found or found["key"] != json.loads(json.dumps(stage_key(a, stage, source))):
        return False
    clips = [(a.out / c["clip"], c.get("bytes")) for c in found["candidates"] if "clip" in c]
    return all(path.exists() and path.stat().st_size == size for path, size in clips)


def work(stage, source, a):
    """Candidates of one stage on one video, in the worker process. UserError where the machine or
    the weights are at fault, not the video."""
    torch.set_num_threads(1)
    inputs = []
    if before := BEFORE.get(stage):
        found = read_stage(stage_file(a, before, source))
        if not found:
            raise UserError(f"{source.path.name} has not gone through {before} yet")
        inputs = [found["candidates"]]
    if stage == "detect":
        get_landmarker()
    if stage == "validate":
        get_encoder(str(a.clip))
    try:
        return STAGES[stage][0](source, a, *inputs)
    except (UserError, av.FFmpegError, OSError, MemoryError) as e:
        return no_candidate(data.blame(e, source.path).replace(str(source.path), source.path.name))


def no_candidate(reason):
    return [dict(start=0, end=0, reason=reason)]


@functools.cache
def worker():
    """The process that does the work: a video that crashes the decoder kills it, not the run."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, spawn, data.end_with_parent)


def attempt(stage, source, a):
    """(candidates, whether they are final): after a crash or an unexpected error the next run tries
    again. UserError where the machine is at fault."""
    for _ in range(2):
        try:
            return worker().submit(work, stage, source, a).result(), True
        except concurrent.futures.process.BrokenProcessPool:
            worker.cache_clear()
        except UserError as e:
            if source.path.exists():
                raise
            return no_candidate(str(e)), False
        except Exception as e:  # whatever goes wrong with a video, the rest goes on
            return no_candidate(f"{type(e).__name__}: {e}"), False
    return no_candidate("crashed the decoder"), False


def run_stage(stage, sources, a):
    """One stage over this rank's part of the sources."""
    rank, world, _ = data.ranks()
    (a.out / stage).mkdir(parents=True, exist_ok=True)
    mine = [s for s in sources if zlib.crc32(s.key.encode()) % world == rank]
    todo = [s for s in mine if not is_done(stage, s, a)]
    counts, frames, began = Counter(), 0, time.perf_counter()

    title = f"{stage}, rank {rank}" if world > 1 else stage
    bar = tqdm(todo, title, unit="video", disable=None)
    for source in bar:
        if shutil.disk_usage(a.out).free < 2**30:
            raise UserError(
                f"less than 1 GiB is free under {a.out}; make room, give the command again"
            )
        key = stage_key(a, stage, source)
        candidates, final = attempt(stage, source, a)
        about = dict(video=source.name, identity=source.identity, path=str(source.path))
        about |= dict(key=key if final else None, candidates=candidates)
        data.write_text(stage_file(a, stage, source), json.dumps(about))

        reasons = [c["reason"] or "kept" for c in candidates]
        counts.update(reason.replace(source.path.name, "the video") for reason in reasons)
        frames += sum(c["end"] - c["start"] for c in candidates)
        bar.set_postfix(kept=counts["kept"], left_out=counts.total() - counts["kept"])

    speed = ""
    if todo:
        seconds = time.perf_counter() - began
        speed = f", {len(todo) / seconds * 3600:,.0f} an hour"
        speed += f", {frames / seconds:.0f} frames of candidates a second"
    print(f"{stage}: {len(todo)} videos{speed}")
    for reason, n in counts.most_common():
        print(f"  {n:6} {reason}")


def list_done(a, stage):
    """[(source, content)] of the videos that went through a stage, in order."""
    files = sorted(p for p in (a.out / stage).glob("*.json") if not p.name.startswith("."))
    found = list(filter(None, map(read_stage, files)))
    if not found:
        raise UserError(f"nothing in {a.out / stage}; run the stage before, or all: curate.py run")
    return [(Source(Path(c["path"]), c["video"], c["identity"]), c) for c in found]


def write_manifest(a):
    """OUT/manifest.jsonl: a line for every candidate that went through `write`, in order."""
    entries = []
    for _, c in list_done(a, "write"):
        split = split_of(c["identity"], a.test)
        about = dict(video=c["video"], identity=c["identity"], split=split)
        entries += [about | candidate for candidate in c["candidates"]]
    path = a.out / "manifest.jsonl"
    data.write_text(path, "\n".join(map(json.dumps, entries)) + "\n")

    kept = [e for e in entries if e["reason"] is None]
    for name in ("train", "test"):
        if kept and all(e["split"] != name for e in kept):
            why = "--test sets the fraction, and videos in one folder count as one person"
            print(f"note: no identity fell to {name}; {why}")
    left_out = len(entries) - len(kept)
    folders = f"{a.out / 'train'} and {a.out / 'test'}"
    print(f"{len(kept)} clips in {folders}, {left_out} candidates left out: {path}")


def histogram(a):
    """OUT/histogram.png: smallest cosines to the first frame, to choose the thresholds by."""
    import matplotlib.pyplot as plt

    candidates = [c for _, found in list_done(a, "validate") for c in found["candidates"]]
    figure, ax = plt.subplots(figsize=(6, 4))
    for name, threshold in (("clip", a.min_clip), ("arcface", a.min_arcface)):
        values = [c[f"{name}_cosine"] for c in candidates if f"{name}_cosine" in c]
        if values:
            ax.hist(values, 40, alpha=0.6, label=name)
            ax.axvline(threshold, linestyle="--", color="black")
            low = ", ".join(f"{v:.3f}" for v in np.percentile(values, [1, 5, 25, 50]))
            title = f"{name}: percentiles 1, 5, 25, 50 of the smallest cosine"
            print(f"{title}: {low}; threshold {threshold:g}")
    ax.set(xlabel="smallest cosine to the first frame", ylabel="candidates")
    ax.legend()
    figure.savefig(a.out / "histogram.png", dpi=120, bbox_inches="tight")


def stats(a):
    """OUT/stats.png, the paper's Figs. 10 to 13, and a table of means beside the paper's."""
    import matplotlib.pyplot as plt

    path = a.out / "manifest.jsonl"
    if not path.exists():
        raise UserError(f"no {path}; run write first")
    clips = [c for c in data.read_lines([path]) if c["reason"] is None]
    if not clips:
        raise UserError(f"no clip was kept in {a.out}; {path} says why")

    values = dict(
        duration=[(c["end"] - c["start"]) / float(Fraction(c["fps"])) for c in clips],
        hyperiqa=[c["hyperiqa"] for c in clips if "hyperiqa" in c],
        resolution=[c["square"][2] for c in clips],
        face_width=[c["face"][0] for c in clips],
        face_height=[c["face"][1] for c in clips],
    )
    shown = {k: v for k, v in values.items() if v}
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3), squeeze=False)
    print(f"{len(clips)} clips, {sum(values['duration']) / 3600:.2f} hours\n")
    print("| | mean | standard deviation | the paper |\n|---|---|---|---|")
    for ax, (name, v) in zip(axes[0], shown.items()):
        title, (mean, deviation) = name.replace("_", " "), PAPER[name]
        ax.hist(v, 30)
        ax.set(title=title)
        print(f"| {title} | {np.mean(v):.2f} | {np.std(v):.2f} | {mean:g} ± {deviation:g} |")
    figure.savefig(a.out / "stats.png", dpi=120, bbox_inches="tight")


def arguments():
    ap = data.Parser(__doc__)
    add, number = ap.add_argument, data.number
    cosine = number(float, -2, 2)
    add("command", choices=["run", "search", *STAGES, "stats"])
    add("source", type=Path, nargs="?", help="folder of videos; of `search`: a file of queries")
    add("--out", type=Path, default=Path("clips"))
    add(
        "--top",
        type=number(int, 1),
        default=20,
        help="of `search`: videos a query (the paper's 20)",
    )
    # Paper: 400, which cannot be the face's own box: its clips would be larger than they are
    add("--min-side", type=number(int, 0), default=400, help="least pixels of a clip's square")
    add("--min-seconds", type=number(float, 0), default=2.0, help="clips are longer than this")
    add("--clip", default=DEMO / "clip.safetensors", help="CLIP: a file, or ViT-L-14, the paper's")
    add("--min-clip", type=cosine, default=0.75, help="least CLIP cosine to the first frame")
    add("--arcface", type=Path, help="folder with w600k_r50.onnx (for research only): ArcFace too")
    add("--min-arcface", type=cosine, default=0.4, help="least ArcFace cosine to the first frame")
    add("--hyperiqa", type=Path, help="folder with koniq_pretrained.pkl: quality for stats")
    add("--size", type=number(int, 2, 4096), default=512, help="pixels of the written clips")
    add(
        "--test", type=number(float, 0, 1), default=0.02, help="fraction of identities for OUT/test"
    )
    drop = "file with a clip, video or identity a line to leave out from now on (OUT/drop.txt)"
    add("--drop", type=Path, help=drop)
    a = ap.parse_args()
    if a.size % 2:
        raise UserError(f"--size {a.size} is not an even number of pixels")
    return a


def main():
    a = arguments()
    if a.command in ("search", "stats"):
        return dict(search=search, stats=stats)[a.command](a)

    rank, world, _ = data.ranks()
    if a.command == "run" and world > 1:
        raise UserError("with several processes give detect, validate, write one after the other")
    if a.drop and not a.drop.is_file():
        raise UserError(f"no such file: {a.drop}")
    sources = None
    if a.command in ("run", "detect"):
        if a.source is None:
            example = f"python curate.py {a.command} VIDEOS --out {a.out}"
            raise UserError(f"name the folder of videos: {example}")
        sources = list_sources(a.source, a.out)
    with data.owned(a.out / f"rank-{rank}"):
        run_stages(a, sources, world == 1)


def run_stages(a, sources, alone):
    # Missing files are named before the work
    if a.command in ("run", "validate"):
        data.fetch(a.clip)
        if Path(a.clip).resolve().parent == DEMO:
            only = "the bundled CLIP has seen rendered faces only"
            print(f"note: {only}; for real ones give --clip ViT-L-14")
    for folder, name in (a.arcface, "w600k_r50.onnx"), (a.hyperiqa, "koniq_pretrained.pkl"):
        if folder:
            import evaluate

            evaluate.find_network(name, folder)
    if a.drop:
        path = a.out / "drop.txt"
        data.write_text(path, "\n".join(sorted(read_drop(path) | read_drop(a.drop))) + "\n")

    if sources:
        run_stage("detect", sources, a)
    if a.command in ("run", "validate"):
        run_stage("validate", [s for s, _ in list_done(a, "detect")], a)
        if alone:
            histogram(a)
    if a.command in ("run", "write"):
        sources = [s for s, _ in list_done(a, "validate")]
        if a.test < 1 and all(split_of(s.identity, a.test) == "test" for s in sources):
            a.test = 0  # the only identity is for training
        run_stage("write", sources, a)
        if alone:
            write_manifest(a)
    if a.command == "run":
        stats(a)


if __name__ == "__main__":
    data.run_main(main)
