"""From raw videos to a training set like ReenactFaces-1M (paper 3.3 and B), in stages that can be stopped and given again at any point.

    python curate.py run VIDEOS --out clips            # detect, validate, write, stats: any folder of videos
    python curate.py search queries.txt --out clips    # first fetch videos by yt-dlp, into clips/videos (read the README on law and terms)
    python curate.py detect VIDEOS --out clips         # shots, faces, one square a clip
    python curate.py validate --out clips              # does it stay one scene: CLIP (and ArcFace), histogram.png for the thresholds
    python curate.py write --out clips                 # clips/train, clips/test and clips/manifest.jsonl: one line a candidate, with its reason
    python curate.py stats --out clips                 # the paper's Figs. 10 to 13: stats.png, and a table beside the paper's means
    torchrun --nproc_per_node=8 curate.py detect VIDEOS --out clips            # the same work shared, with nothing in common but the folder

If VIDEOS holds celebvhq_info.json or VFHQ's Clip+ID+...txt, only the videos, times and faces listed there are used; RAVDESS is known by its file
names. With torchrun, give the same command once more without it at the end: it writes the histogram or the manifest. Every stage keeps one
file a video in OUT/STAGE, so nothing is done twice, and a video that crashes the decoder is a line of the manifest.
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
import sdit
from sdit import UserError

DEMO = Path(__file__).resolve().parent / "demo"
SAMPLES = 5  # looks at a second
LONGEST = 10  # seconds a clip (paper B, Fig. 10, ends there)
PAPER = dict(duration=(3.29, 2.07), resolution=(745.1, 247.8), face_width=(0.45, 0.05), face_height=(0.53, 0.07), hyperiqa=(51.5, 10.72))

# ----------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass
class Source:
    """A video, and what of it is wanted: spans (from, to) in seconds, each with the face's box (x0, y0, x1, y1) as shares of the picture, or
    None; no spans: all of it. `identity`: what a test split must not share with training."""
    path: Path
    name: str  # within the folder that was given
    identity: str
    spans: list = None

    @property
    def key(self):
        """Name of the stages' files."""
        return f"{re.sub('[^A-Za-z0-9-]+', '_', self.path.stem)[:60]}-{zlib.crc32(os.fsencode(self.name)):08x}"


def celebvhq(path):
    """{video id: spans} of celebvhq_info.json."""
    spans = {}
    for clip in data.read_json(path, ["clips"])["clips"].values():
        box, when = clip["bbox"], clip["duration"]
        spans.setdefault(clip["ytb_id"], []).append((when["start_sec"], when["end_sec"], [box["left"], box["top"], box["right"], box["bottom"]]))
    return spans


def vfhq(path):
    """(video id, span) of one of VFHQ's text files; one frame is left out at both ends, which may belong to other shots."""
    video, first, last = re.fullmatch(r"Clip\+(.+)\+P\d+\+C\d+\+F(\d+)-(\d+)", path.stem).groups()
    lines = dict(line.split(None, 1) for line in data.read_text(path).replace(":", " ").splitlines() if " " in line.strip())
    h, w, fps = (float(lines[k]) for k in ("H", "W", "FPS"))
    box = [float(x) for x in lines["CROP"].split()]
    return video, ((int(first) + 1) / fps, int(last) / fps, [box[0] / w, box[1] / h, box[2] / w, box[3] / h])


def list_sources(folder, out):
    """The sources in a folder tree, in order of name; not what was written to `out`. The identity of a video is the first folder that it lies
    in, or itself."""
    if not Path(folder).is_dir():
        raise UserError(f"no such folder: {folder}")
    written = [(out / split).absolute() for split in ("train", "test")]
    files = [p for p in data.list_files(folder, data.VIDEOS | {".txt", ".json"}) if not any(w in p.absolute().parents for w in written)]
    videos = [p for p in files if p.suffix.lower() in data.VIDEOS]
    spans = {}
    for path in files:
        try:
            if path.name == "celebvhq_info.json":
                spans |= celebvhq(path)
            elif path.suffix == ".txt" and path.name.startswith("Clip+"):
                video, span = vfhq(path)
                spans.setdefault(video, []).append(span)
        except (ValueError, KeyError, AttributeError, TypeError, ArithmeticError, OSError) as e:
            raise UserError(f"{path} is not the list that its name says ({type(e).__name__}: {e}); fetch it again or rename it") from None
    sources = []
    for path in videos:
        fields = path.stem.split("-") if re.fullmatch(r"\d\d(-\d\d){6}", path.stem) else None
        if fields and (fields[0] == "02" and (path.with_name(f"01{path.name[2:]}")).exists() or fields[0] == "03"):
            continue  # RAVDESS: 02 is 01 without sound, 03 sound alone
        if spans and path.stem not in spans:
            continue
        relative = path.relative_to(folder)
        identity = f"actor-{fields[6]}" if fields else path.stem if spans or len(relative.parts) == 1 else relative.parts[0]
        sources.append(Source(path.absolute(), str(relative), identity, spans.get(path.stem)))
    if not sources:
        raise UserError(f"no videos ({', '.join(sorted(data.VIDEOS))}) under {folder}" + (f" named as its list names them, like {min(spans)}.mp4" if spans else ""))
    return sources


# ----------------------------------------------------------------------------------------------------------------------
# search: the paper's first step, by yt-dlp as a program

REFUSALS = ("HTTP Error 429", "not a bot", "rate-limit", "rate limit")


def search(a):
    """Fetch the first videos of every line of a file of queries (names, or addresses of channels). Stops where the site refuses."""
    program = shutil.which("yt-dlp")
    if not program:
        raise UserError("yt-dlp is not on PATH: pip install 'yt-dlp[default]', with a JavaScript runtime (deno) and ffmpeg; or use videos of your own")
    if not a.source or not a.source.is_file():
        raise UserError("name a file of queries, one a line: python curate.py search queries.txt")
    queries = [line.strip() for line in data.read_text(a.source).splitlines() if line.strip() and not line.startswith("#")]
    for query in queries:
        if query.startswith("-") or "\0" in query:  # yt-dlp would take it for an option, and some run programs
            raise UserError(f"{a.source}: {query!r} begins with a dash, or is no text; a query is words, or an address")
    a.out.mkdir(parents=True, exist_ok=True)
    log = a.out / "search.jsonl"
    done = {line.get("query") for line in data.read_lines([log]) if line.get("done")} if log.exists() else set()
    fetched = lambda: len((a.out / "archive.txt").read_text().splitlines()) if (a.out / "archive.txt").exists() else 0
    for query in tqdm([q for q in queries if q not in done], "queries", disable=None):
        target = query if "://" in query else f"ytsearch{a.top}:{query}"
        before = fetched()
        run = subprocess.run([program, "-I", f"1:{a.top}", "--match-filters", "height>=?720 & !is_live & duration<3600",
                              "-f", "bv*[height>=720][height<=1080][vcodec^=avc1]+ba/bv*[height>=720]+ba",
                              "--download-archive", a.out / "archive.txt", "-c", "--write-info-json", "--no-write-playlist-metafiles",
                              "-t", "sleep", "--retry-sleep", "exp=1:120", "-o", a.out / "videos" / "%(id)s.%(ext)s", "--", target],
                             capture_output=True, text=True, errors="replace")
        refused = run.returncode and any(word in run.stderr for word in REFUSALS)
        if refused:
            raise UserError(f"the site refuses ({run.stderr.strip().splitlines()[-1]}); wait some hours, then give the same command: it goes on "
                            f"at {query!r}")
        done_now = run.returncode == 0 or fetched() > before  # single videos that are gone do not stop a query; no network does
        data.append_line(log, dict(query=query, done=done_now, code=run.returncode, last=run.stderr.strip().splitlines()[-1:]))
        if not done_now:
            print(f"nothing came of {query!r} ({''.join(run.stderr.strip().splitlines()[-1:])}); the same command tries it again", file=sys.stderr)
    folder = a.out / "videos"
    count = len(data.list_files(folder, data.VIDEOS)) if folder.is_dir() else 0
    if not count and queries and not any(line.get("done") for line in data.read_lines([log])):
        raise UserError(f"no query of {a.source} brought a video; the reasons are above")
    print(f"{count} videos in {folder}; next: python curate.py run {folder} --out {a.out}")


# ----------------------------------------------------------------------------------------------------------------------
# detect: shots, tracks of faces, one fixed square a clip

# A clip's ends, in `detect`: (1) shots, by cuts and dissolves; (2) tracks of faces, by SAMPLES looks a second; (3) each track stretched to just
# short of the looks around it (`limits`); (4) listed times, if there are any; (5) `pieces`: trimmed to frames with landmarks, split evenly
# above LONGEST, halved while the face leaves its square. The square is the median face at its share of the paper's framing, pushed into the
# picture.
CUT, JUMP, DISSOLVE = 25, 8, 20  # mean differences of thumbnails, of 255


def transitions(thumbs, chunk=4096, margin=64):
    """Where shots end, of thumbnails (M, 24, 24, 3) uint8: [(end, begin)], frame numbers; a cut has both equal, a dissolve lies between. Long
    films are gone through in pieces, each with a margin."""
    found = []
    for first in range(0, len(thumbs), chunk):
        start = max(0, first - margin)
        some = shots_end(thumbs[start:first + chunk + margin].astype(np.float32))
        found += [(start + end, start + begin) for end, begin in some if first <= start + end < first + chunk]
    return found


def shots_end(x):
    """Cuts and dissolves in one piece, float."""
    step = np.abs(np.diff(x, axis=0)).mean((1, 2, 3))  # (M - 1,), between frames i and i + 1
    found = []
    for i, d in enumerate(step):
        around = np.concatenate([step[max(0, i - 6):i], step[i + 1:i + 7]])  # a cut stands alone; a shaken head does not
        if d > CUT or d > JUMP and len(around) and d > 4 * np.median(around) + 1:
            found.append((i + 1, i + 1))
    return sorted(found + dissolves(x, [0, *(cut for cut, _ in found), len(x)]))


def dissolves(x, cuts):
    """[(end of a shot, begin of the next)] of the dissolves between frames x (M, 24, 24, 3), none of them over one of `cuts`. In the middle
    of a dissolve a frame is the mean of those before and after, as hardly ever in motion; its ends are where the mixture, extrapolated, is 0
    and 1."""
    found = []
    for reach in (4, 8, 16):
        a, middle, b = x[:-2 * reach], x[reach:len(x) - reach], x[2 * reach:]
        apart, off = (np.abs(d).mean((1, 2, 3)) for d in (b - a, middle - (a + b) / 2))
        for i in np.flatnonzero((apart > DISSOLVE) & (off < 0.2 * apart)):
            centre = i + reach
            low, high = max(c for c in cuts if c <= centre), min(c for c in cuts if c > centre)
            first, last = max(low, centre - 2 * reach), min(high - 1, centre + 2 * reach)
            if first > i or last < i + 2 * reach:
                continue
            way = x[last] - x[first]
            mixture = ((x[first:last + 1] - x[first]) * way).sum((1, 2, 3)) / (way ** 2).sum()
            early, late = np.flatnonzero(mixture < 0.2), np.flatnonzero(mixture > 0.8)
            if not len(late) or not len(early) or late[0] <= early[-1] + 1:
                continue
            begin, end = (np.interp(v, mixture[early[-1]:late[0] + 1], np.arange(early[-1], late[0] + 1)) for v in (0.2, 0.8))
            mixed = np.abs(x[first:last + 1] - (x[first] + mixture[:, None, None, None] * way)).mean((1, 2, 3))[early[-1]:late[0] + 1].max()
            margin = (end - begin) / 3
            found.append((mixed / np.abs(way).mean(), first + round(begin - margin), first + round(end + margin) + 1))
    chosen = []
    for quality, begin, end in sorted(found):
        if quality < 0.25 and all(end <= b or begin >= e for b, e in chosen):
            chosen.append((max(0, begin), min(len(x), end)))
    return chosen


def overlap(a, b):
    """Intersection over union of boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / max((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both, 1e-9)


def mesh_box(points):
    """(x0, y0, x1, y1) of landmarks (478, 3), irises left out."""
    return [*points[:468, :2].min(0).tolist(), *points[:468, :2].max(0).tolist()]


def key_frames_have_a_face(video, landmarker):
    """Whether any key frame shows one: videos without faces are dropped for the price of these. True, too, where there is less than one key
    frame in five seconds, too few to tell."""
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
    """Tracks [(first, last, boxes by frame)] of faces: samples {frame: boxes}; no track goes over one of the frames `stops`. A face that has
    moved far from where its track began starts a new one, since one square must hold it."""
    open_tracks, done, before = [], [], -1
    for frame, boxes in sorted(samples.items()):
        if any(before < stop <= frame for stop in stops):
            done, open_tracks = done + open_tracks, []
        boxes, going = list(boxes), []
        for track in open_tracks:
            last = max(track)
            best = max(boxes, key=lambda box: overlap(box, track[last]), default=None)
            if best is not None and overlap(best, track[last]) >= 0.3:
                boxes.remove(best)
                if overlap(best, track[min(track)]) < 0.35:
                    done.append(track)
                    going.append({frame: best})
                else:
                    going.append(track | {frame: best})
            elif sum(last < f for f in samples if f <= frame) >= 2:  # missed twice
                done.append(track)
            else:
                going.append(track)
        open_tracks, before = going + [{frame: box} for box in boxes], frame
    return sorted(done + open_tracks, key=lambda track: (min(track), track[min(track)]))


def scan(video, spans, landmarker):
    """One pass over a video: (thumbnails (M, 24, 24, 3), {frame: boxes of faces}, (height, width)); faces are looked for within the spans."""
    every, thumbs, samples, shape = max(1, round(video.fps / SAMPLES)), [], {}, None
    for f, image in enumerate(video):
        shape = image.shape[:2]
        thumbs.append(cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA))
        if f % every == 0 and (spans is None or any(begin <= f / video.fps < end for begin, end, _ in spans)):
            samples[f] = [mesh_box(p) for p in landmarker.everyone(image)]
    return np.stack(thumbs), samples, shape


def limits(track, others, shots, every, M):
    """(first, end) frames that a track may cover. It is known at looks only, `every` frames apart: it is stretched by less than that each way,
    not beyond its shot; where another track takes over the same face, to that one's first look, or from its own."""
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
    """[(M', 478, 3)] landmarks, NaN where not found, of every frame of [(first, end, boxes by frame)], in one more pass."""
    points = [np.full((end - first, 478, 3), np.nan, np.float32) for first, end, _ in wanted]
    for f, image in enumerate(video):
        for (first, end, track), found in zip(wanted, points):
            if first <= f < end:
                box = track[min(track, key=lambda g: abs(g - f))]
                side = 1.6 * max(box[2] - box[0], box[3] - box[1])
                square = (round((box[0] + box[2] - side) / 2), round((box[1] + box[3] - side) / 2), round(side))
                mesh = landmarker.landmarks(image, square)
                if mesh is not None and overlap(mesh_box(mesh), box) > 0.2:
                    found[f - first] = mesh
    return points


def pieces(first, points, others, shape, fps, a):
    """Candidates of one track, landmarks (M, 478, 3) from frame `first`: [dict(start, end, square, face, reason)]. `others`: boxes of other
    faces by frame."""
    found = np.flatnonzero(~np.isnan(points[:, 0, 0]))
    if not len(found):
        return []
    first, points = first + found[0], points[found[0]:found[-1] + 1]
    seen, here = ~np.isnan(points[:, 0, 0]), dict(start=int(first), end=int(first + len(points)), square=None, face=None)
    seconds = len(points) / fps
    if seconds <= a.min_seconds:
        return [here | dict(reason=f"face for {a.min_seconds:g} s or less")]
    if seconds > LONGEST:
        parts = np.array_split(np.arange(len(points)), math.ceil(seconds / LONGEST))
        return [c for part in parts for c in pieces(first + part[0], points[part], others, shape, fps, a)]
    if seen.mean() < 0.9:
        return [here | dict(reason="face lost in more than a tenth of the frames")]
    square = data.keep_inside(data.face_square(points[seen]), shape)
    if square is None:
        return [here | dict(reason=data.TOO_LARGE)]
    here |= dict(square=[int(v) for v in square], mirrored=data.mirrored(square, shape))
    x, y, side = here["square"]
    boxes = np.array([mesh_box(p) for p in points[seen]])
    here["face"] = [float(v) for v in np.round(np.median(boxes[:, 2:] - boxes[:, :2], 0) / side, 3)]
    if side < a.min_side:
        return [here | dict(reason=f"square smaller than {a.min_side} pixels")]
    if (boxes[:, :2].min(0) < (x, y)).any() or (boxes[:, 2:].max(0) > (x + side, y + side)).any():
        half = len(points) // 2
        if half / fps > a.min_seconds:
            return [c for k in (slice(0, half), slice(half, None)) for c in pieces(first + (k.start or 0), points[k], others, shape, fps, a)]
        return [here | dict(reason="face moves out of its square")]
    looks = [f for f in range(here["start"], here["end"]) if f in others]
    inside = [any(overlap(box, (x, y, x + side, y + side)) > 0.02 for box in others[f]) for f in looks]
    if np.mean(inside or [0]) > 0.2:
        return [here | dict(reason="another face in its square")]
    if np.nanstd(points / side, 0).mean() < 5e-4:
        return [here | dict(reason="nothing moves")]
    return [here | dict(reason=None)]


def detect(source, a):
    """Candidates of a video."""
    landmarker = get_landmarker()
    video = data.Video(source.path)
    if source.spans is None and not key_frames_have_a_face(video, landmarker):
        return [dict(start=0, end=len(video), reason="no face in its key frames")]
    thumbs, samples, shape = scan(video, source.spans, landmarker)
    M, every, found = len(thumbs), max(1, round(video.fps / SAMPLES)), transitions(thumbs)
    begins, ends = [0, *(b for _, b in found)], [*(e for e, _ in found), M]
    shots = [(b, e) for b, e in zip(begins, ends) if e > b]
    samples = {f: boxes for f, boxes in samples.items() if any(b <= f < e for b, e in shots)}  # not within dissolves
    tracks = link(samples, [b for b, _ in shots])
    wanted = [(*limits(t, [o for o in tracks if o is not t], shots, every, M), t) for t in tracks if len(t) > 1]
    candidates = []
    for (first, end, track), points in zip(wanted, look_closer(video, wanted, landmarker) if wanted else ()):
        others = {f: [box for box in boxes if overlap(box, track.get(f, track[min(track, key=lambda g: abs(g - f))])) < 0.3]
                  for f, boxes in samples.items() if first <= f < end}
        for begin, stop, listed in source.spans or [(0, math.inf, None)]:
            low, high = max(first, math.ceil(begin * video.fps)), int(min(end, stop * video.fps)) if stop < math.inf else end
            if high <= low:
                continue
            if listed and overlap([v * shape[1 - i % 2] for i, v in enumerate(listed)], track[min(track)]) < 0.1:
                continue  # another face than the listed one
            candidates += pieces(low, points[low - first:high - first], others, shape, video.fps, a)
    about = dict(fps=str(video.fps), height=shape[0], width=shape[1])
    return [about | c for c in candidates] or [dict(start=0, end=M, reason="no face for two looks in a row")]


# ----------------------------------------------------------------------------------------------------------------------
# validate, write

def crops(source, candidates, size=None, every=None):
    """Yield (candidate number, frame, crop) in one pass over a video, of every frame or of some a second."""
    if all(c["reason"] for c in candidates):
        return
    video = data.Video(source.path)
    step = max(1, round(video.fps / every)) if every else 1
    for f, image in enumerate(video):
        for i, c in enumerate(candidates):
            if c["reason"] is None and c["start"] <= f < c["end"] and (f - c["start"]) % step == 0:
                yield i, f, data.crop(image, tuple(c["square"]), size or c["square"][2])


@torch.no_grad()
def validate(source, a, candidates):
    """Every candidate with its smallest cosine to its first frame, by CLIP and, where given, ArcFace (paper: "max ArcFace and CLIP distance
    from frame 1"); `write` has the thresholds, so that they can be set by the histogram without measuring again."""
    encoder, arcface, iqa = get_encoder(str(a.clip)), get_net("arcface", a.arcface), get_net("hyperiqa", a.hyperiqa)
    vectors = [dict(clip=[], arcface=[], hyperiqa=[]) for _ in candidates]
    for i, f, image in crops(source, candidates, 256, SAMPLES):
        vectors[i]["clip"].append(encoder.images(data.to_tensor(image[None]))[0].cpu().numpy())
        if arcface:
            points = get_landmarker().landmarks(image)
            if points is not None:
                vectors[i]["arcface"].append(arcface(image[None], points[None] / 256)[0])
        if iqa and len(vectors[i]["hyperiqa"]) < 3:
            vectors[i]["hyperiqa"].append(iqa(image[None])[0])
    result = []
    for c, v in zip(candidates, vectors):
        c = dict(c)
        for name in ("clip", "arcface"):
            if v[name]:
                c[f"{name}_cosine"] = round(float(min(np.stack(v[name]) @ v[name][0])), 4)
        if v["hyperiqa"]:
            c["hyperiqa"] = round(float(np.mean(v["hyperiqa"])), 2)
        result.append(c)
    return result


def split_of(identity, share):
    """"test" or "train", by identity alone."""
    return "test" if zlib.crc32(os.fsencode(identity)) % 10000 < share * 10000 else "train"


def another_scene(c, a):
    """The reason to leave a candidate out whose cosines are below the thresholds, or None."""
    for name, title, threshold in (("clip", "CLIP", a.min_clip), ("arcface", "ArcFace", a.min_arcface)):
        if c.get(f"{name}_cosine", 1) < threshold:
            return f"{title} cosine to the first frame below {threshold:g}"


def drop_entries(source, out):
    """Entries of the drop list that are about a video."""
    names = {source.name, source.path.stem, source.path.name, source.identity}
    return sorted(entry for entry in read_drop(out) if entry in names or source.key in entry)


@functools.cache
def written_before(out):
    """{key of a video: its clips in OUT/train and OUT/test when this process began}."""
    found = {}
    for path in (*(out / "train").glob("*"), *(out / "test").glob("*")):
        if match := re.match(r"\.?(.*-[0-9a-f]{8})-\d{6}(-|\.)", path.name):
            found.setdefault(match[1], []).append(path)
    return found


def write(source, a, candidates):
    """Write the clips of a video: square, `--size` pixels, H.264. Every candidate gets its name, or its reason."""
    dropped = drop_entries(source, a.out)
    folder, writers, result = a.out / split_of(source.identity, a.test), {}, []
    for c in candidates:
        name = "-".join([source.key, f"{c['start']:06d}", *(f"{v:04d}" for v in (c.get("square") or ())[:2])])  # by what it shows, so that it stays
        clip = f"{folder.name}/{name}.mp4"
        on_list = any(source.key not in entry or Path(entry).stem == name for entry in dropped)
        c = dict(c, reason=c["reason"] or another_scene(c, a) or ("on the drop list" if on_list else None))
        result.append(c | (dict(clip=clip) if c["reason"] is None else {}))
    keep = {c.get("clip") for c in result}
    for path in written_before(a.out).get(source.key, ()):  # of other settings, or of a run that was killed
        if f"{path.parent.name}/{path.name}" not in keep:
            path.unlink(missing_ok=True)
    try:
        for i, f, image in crops(source, result, a.size):
            if i not in writers:
                about = json.dumps(dict(source=source.path.name, frames=[result[i]["start"], result[i]["end"]], square=result[i]["square"]))
                writers[i] = data.VideoWriter(a.out / result[i]["clip"], result[i]["fps"], about).__enter__()
            writers[i].write(image)
            if f == result[i]["end"] - 1:
                writers.pop(i).__exit__(None, None, None)
                result[i]["bytes"] = (a.out / result[i]["clip"]).stat().st_size
    except BaseException:
        for writer in writers.values():
            writer.__exit__(*sys.exc_info())
        raise
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Stages: one file a video and stage, {"key": settings, "candidates": [...]}; whole or not there

@functools.cache
def get_landmarker():
    return data.FaceLandmarker()


@functools.cache
def get_encoder(path):
    local = int(os.environ.get("LOCAL_RANK", 0))
    return data.SceneEncoder(sdit.fetch(path), f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")


@functools.cache
def get_net(name, folder):
    """A network of evaluate.py whose weights lie in `folder`, or None."""
    import evaluate
    return getattr(evaluate, f"load_{name}")(folder) if folder else None


STAGES = dict(detect=(detect, ("min_seconds", "min_side")), validate=(validate, ("clip", "arcface", "hyperiqa")),
              write=(write, ("min_clip", "min_arcface", "size", "test")))


def read_drop(out):
    """What OUT/drop.txt asks to leave out; it grows by every --drop and is never forgotten."""
    path = out / "drop.txt"
    return {line.strip() for line in data.read_text(path).splitlines() if line.strip()} if path.exists() else set()


def stage_key(a, stage, source):
    """What the file of a stage and a video depends on: settings, and the video or the candidates of the stage before."""
    names = list(STAGES)
    values = {k: str(getattr(a, k)) for k in STAGES[stage][1]}
    if stage == "detect":
        return values | dict(path=str(source.path), modified=data.changed(source.path), spans=source.spans)
    if stage == "validate":
        values["clip"] = sdit.sha256(sdit.fetch(a.clip))  # not its name alone: it may have been torn
    before = read_stage(a.out / names[names.index(stage) - 1] / f"{source.key}.json") or {}
    values["before"] = zlib.crc32(json.dumps(before.get("candidates")).encode())
    return values | (dict(drop=drop_entries(source, a.out)) if stage == "write" else {})


def read_stage(path):
    """The content of a stage's file; None where it is not there or not whole."""
    try:
        return data.read_json(path, ["key", "candidates", "video", "identity", "path"])
    except (OSError, UserError):
        return None


def is_done(stage, source, a):
    """Whether a stage has a video's final result of these settings; of `write` also whether its clips are there, and whole."""
    found = read_stage(a.out / stage / f"{source.key}.json")
    if not found or found["key"] != json.loads(json.dumps(stage_key(a, stage, source))):
        return False
    clips = [(a.out / c["clip"], c.get("bytes")) for c in found["candidates"] if "clip" in c]
    return all(path.exists() and path.stat().st_size == size for path, size in clips)


def work(stage, source, a):
    """One stage on one video, in a process of its own. Returns the candidates, and why the video is left out, if it is at fault."""
    torch.set_num_threads(1)
    before = [read_stage(a.out / "detect" / f"{source.key}.json"), read_stage(a.out / "validate" / f"{source.key}.json")]
    inputs = dict(detect=(), validate=before[:1], write=before[1:])[stage]
    if None in inputs:
        raise UserError(f"{source.path.name} has not gone through {'detect' if stage == 'validate' else 'validate'} yet")
    load = dict(detect=(get_landmarker,), validate=(lambda: get_encoder(str(a.clip)),), write=())[stage]
    for network in load:  # what fails here is not the video's fault
        network()
    try:
        return STAGES[stage][0](source, a, *(i["candidates"] for i in inputs))
    except (UserError, av.FFmpegError, OSError, MemoryError) as e:
        return [dict(start=0, end=0, reason=data.blame(e, source.path).replace(str(source.path), source.path.name))]


@functools.cache
def worker():
    """One process that does the work: a video that crashes the decoder takes it down, and not the run."""
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), sdit.end_with_parent)


def attempt(stage, source, a):
    """(candidates, final): the result of one stage on one video. What the video is to blame for is final; a crash, or what nobody thought of,
    is tried again by the next run. UserError where the machine is at fault (memory, disk, weights): then there is no use in going on."""
    for _ in range(2):
        try:
            return worker().submit(work, stage, source, a).result(), True
        except concurrent.futures.process.BrokenProcessPool:
            worker.cache_clear()
        except UserError as e:
            if source.path.exists():
                raise
            return [dict(start=0, end=0, reason=str(e))], False
        except Exception as e:  # whatever goes wrong with a video, the rest goes on
            return [dict(start=0, end=0, reason=f"{type(e).__name__}: {e}")], False
    return [dict(start=0, end=0, reason="crashed the decoder")], False


def run_stage(stage, sources, a):
    """One stage over this rank's share of the sources."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    (a.out / stage).mkdir(parents=True, exist_ok=True)
    counts, frames, began = Counter(), 0, time.perf_counter()
    mine = [s for s in sources if zlib.crc32(s.key.encode()) % world == rank]  # the same share, whatever else there is
    todo = [s for s in mine if not is_done(stage, s, a)]
    bar = tqdm(todo, f"{stage}, rank {rank}" if world > 1 else stage, unit="video", disable=None)
    for source in bar:
        if shutil.disk_usage(a.out).free < 2 ** 30:
            raise UserError(f"less than 1 GiB is free under {a.out}; make room and give the same command")
        key = stage_key(a, stage, source)
        candidates, final = attempt(stage, source, a)
        path = a.out / stage / f"{source.key}.json"
        about = dict(video=source.name, identity=source.identity, path=str(source.path))
        data.write_text(path, json.dumps(dict(about, key=key if final else None, candidates=candidates)))
        counts.update((c["reason"] or "kept").replace(source.path.name, "the video") for c in candidates)
        frames += sum(c["end"] - c["start"] for c in candidates)
        bar.set_postfix(kept=counts["kept"], left_out=sum(counts.values()) - counts["kept"])
    seconds = time.perf_counter() - began
    speed = f", {len(todo) / seconds * 3600:,.0f} an hour, {frames / seconds:.0f} frames of candidates a second" if todo else ""
    print(f"{stage}: {len(todo)} videos{speed}")
    for reason, n in counts.most_common():
        print(f"  {n:6} {reason}")


def list_done(a, stage):
    """[(source, content)] of the videos that went through a stage, in order."""
    files = sorted(p for p in (a.out / stage).glob("*.json") if not p.name.startswith("."))
    found = [c for p in files if (c := read_stage(p))]
    if not found:
        raise UserError(f"nothing in {a.out / stage}; run the stage before, or all: python curate.py run VIDEOS --out {a.out}")
    return [(Source(Path(c["path"]), c["video"], c["identity"]), c) for c in found]


def write_manifest(a):
    """OUT/manifest.jsonl: a line for every candidate of every video that went through `write`, in order."""
    lines = [json.dumps(dict(video=c["video"], identity=c["identity"], split=split_of(c["identity"], a.test), **candidate))
             for _, c in list_done(a, "write") for candidate in c["candidates"]]
    data.write_text(a.out / "manifest.jsonl", "\n".join(lines) + "\n")
    kept = sum('"reason": null' in line for line in lines)
    for name in ("train", "test"):
        if kept and not any(f'"clip": "{name}/' in line for line in lines):
            print(f"note: no identity fell to {name}; --test sets the share, and videos in one folder count as one person")
    print(f"{kept} clips in {a.out / 'train'} and {a.out / 'test'}, {len(lines) - kept} candidates left out: {a.out / 'manifest.jsonl'}")


def histogram(a):
    """OUT/histogram.png: smallest cosines to the first frame, by which the thresholds are set."""
    import matplotlib.pyplot as plt
    every = [c for _, found in list_done(a, "validate") for c in found["candidates"]]
    figure, ax = plt.subplots(figsize=(6, 4))
    for name, threshold in (("clip", a.min_clip), ("arcface", a.min_arcface)):
        values = [c[f"{name}_cosine"] for c in every if f"{name}_cosine" in c]
        if values:
            ax.hist(values, 40, alpha=0.6, label=name)
            ax.axvline(threshold, linestyle="--", color="black")
            low = np.percentile(values, [1, 5, 25, 50])
            print(f"{name}: percentiles 1, 5, 25, 50 of the smallest cosine: {', '.join(f'{v:.3f}' for v in low)}; threshold {threshold:g}")
    ax.set(xlabel="smallest cosine to the first frame", ylabel="candidates")
    ax.legend()
    figure.savefig(a.out / "histogram.png", dpi=120, bbox_inches="tight")


def stats(a):
    """OUT/stats.png, the paper's Figs. 10 to 13, and a table of means beside the paper's."""
    import matplotlib.pyplot as plt
    if not (a.out / "manifest.jsonl").exists():
        raise UserError(f"no {a.out / 'manifest.jsonl'}; run write first")
    clips = [c for c in data.read_lines([a.out / "manifest.jsonl"]) if c["reason"] is None]
    if not clips:
        raise UserError(f"no clip was kept in {a.out}; {a.out / 'manifest.jsonl'} says why")
    fps = [float(Fraction(c["fps"])) for c in clips]
    values = dict(duration=[(c["end"] - c["start"]) / r for c, r in zip(clips, fps)], hyperiqa=[c["hyperiqa"] for c in clips if "hyperiqa" in c],
                  resolution=[c["square"][2] for c in clips], face_width=[c["face"][0] for c in clips], face_height=[c["face"][1] for c in clips])
    shown = {k: v for k, v in values.items() if v}
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3), squeeze=False)
    print(f"{len(clips)} clips, {sum(values['duration']) / 3600:.2f} hours\n\n| | mean | spread | the paper |\n|---|---|---|---|")
    for ax, (name, v) in zip(axes[0], shown.items()):
        ax.hist(v, 30)
        ax.set(title=name.replace("_", " "))
        print(f"| {name.replace('_', ' ')} | {np.mean(v):.2f} | {np.std(v):.2f} | {PAPER[name][0]:g} ± {PAPER[name][1]:g} |")
    figure.savefig(a.out / "stats.png", dpi=120, bbox_inches="tight")


def arguments():
    number = sdit.number
    ap = sdit.Parser(__doc__)
    ap.add_argument("command", choices=["run", "search", *STAGES, "stats"])
    ap.add_argument("source", type=Path, nargs="?", help="folder of videos; of `search`: a file of queries")
    ap.add_argument("--out", type=Path, default=Path("clips"))
    ap.add_argument("--top", type=number(int, 1), default=20, help="of `search`: videos a query (the paper's 20)")
    ap.add_argument("--min-side", type=number(int, 0), default=400, help="pixels of a clip's square at least (the paper's 400 cannot be the "
                    "face's own box: its clips would be larger than they are)")
    ap.add_argument("--min-seconds", type=number(float, 0), default=2.0, help="clips are longer than this")
    ap.add_argument("--clip", default=DEMO / "clip.safetensors", help="CLIP of `validate`: a file, or ViT-L-14, the paper's")
    ap.add_argument("--min-clip", type=number(float, -2, 2), default=0.75, help="smallest CLIP cosine to the first frame; see histogram.png")
    ap.add_argument("--arcface", type=Path, help="folder with w600k_r50.onnx (weights for research only): ArcFace too")
    ap.add_argument("--min-arcface", type=number(float, -2, 2), default=0.4, help="smallest ArcFace cosine to the first frame")
    ap.add_argument("--hyperiqa", type=Path, help="folder with koniq_pretrained.pkl: quality for stats")
    ap.add_argument("--size", type=number(int, 2, 4096), default=512, help="pixels of the written clips")
    ap.add_argument("--test", type=number(float, 0, 1), default=0.02, help="share of identities that go to OUT/test")
    ap.add_argument("--drop", type=Path, help="file with a clip, video or identity a line to leave out, now and ever after (OUT/drop.txt); "
                    "clips already written go")
    a = ap.parse_args()
    if a.size % 2:
        raise UserError(f"--size {a.size} is not an even number of pixels")
    return a


def main():
    a = arguments()
    if a.command == "search":
        return search(a)
    if a.command == "stats":
        return stats(a)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if a.command == "run" and world > 1:
        raise UserError("with several processes give the stages one after the other: detect, validate, write; each waits for all")
    if a.drop and not a.drop.is_file():
        raise UserError(f"no such file: {a.drop}")
    sources = None
    if a.command in ("run", "detect"):
        if a.source is None:
            raise UserError(f"name the folder of videos: python curate.py {a.command} VIDEOS --out {a.out}")
        sources = list_sources(a.source, a.out)
    with sdit.owned(a.out / f"rank-{rank}"):
        run_stages(a, sources, world == 1)


def run_stages(a, sources, alone):
    if a.drop:
        dropped = read_drop(a.out) | {line.strip() for line in data.read_text(a.drop).splitlines()} - {""}
        data.write_text(a.out / "drop.txt", "\n".join(sorted(dropped)) + "\n")
    if a.command in ("run", "validate"):
        sdit.fetch(a.clip)  # a missing file is said before the work
        if Path(a.clip).resolve().parent == DEMO:
            print("note: the bundled CLIP has seen rendered faces only; for real ones give --clip ViT-L-14")
    for folder, name in (a.arcface, "w600k_r50.onnx"), (a.hyperiqa, "koniq_pretrained.pkl"):
        if folder:
            import evaluate
            evaluate.find_weights(name, folder)
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
    sdit.run_main(main)
