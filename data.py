"""Data: videos and pictures -> face crops, landmarks, scene vectors; clips -> cached records -> training rows.

    python data.py CLIPS --out cache                                      # a folder of face clips, the demo's autoencoder and CLIP
    python data.py CLIPS --out cache --autoencoder A.safetensors --clip C.safetensors --size 256

What `sample.py` does to a driving video and a source picture and what training sees of a clip is the same code: `track`
finds the face in every frame and the one square of the clip, `crop` cuts it, `SceneEncoder` is CLIP.
"""
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import safetensors
import safetensors.torch
import torch
from av.stream import Disposition
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin
from tqdm import tqdm

import sdit
from sdit import LANDMARK_COMPONENTS, LANDMARKS, UserError

DEMO = Path(__file__).resolve().parent / "demo"
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts", ".mpg", ".3gp", ".wmv", ".flv"}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
with contextlib.suppress(ImportError):             # optional
    import pillow_heif
    pillow_heif.register_heif_opener()
Image.init()
# Named, as PIL hands others to programs of their own: PostScript to Ghostscript
FORMATS = [f for f in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "HEIF") if f in Image.OPEN]

# ----------------------------------------------------------------------------------------------------------------------
# Video and pictures, in and out


def open_video(path):
    """An open PyAV container with a video stream."""
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    try:
        container = av.open(f"file:{path}", metadata_errors="replace")         # 12:30.mp4 has no protocol "12"
    except (av.FFmpegError, OSError) as e:
        raise UserError(f"{path} is not a video that can be read ({e.strerror or e}); re-encode it, for example as H.264 in .mp4") from None
    if not video_stream(container):
        container.close()
        raise UserError(f"{path} has no video stream, only sound, text or a cover")
    video_stream(container).thread_type = "AUTO"
    return container


def video_stream(container):
    """The video stream that players show: the default one. Covers and thumbnails are none."""
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & covers]
    rank = [(s.frames != 1, s.disposition & Disposition.default, -s.index, s) for s in streams]
    return max(rank)[-1] if rank else None


def audio_stream(container):
    """The default audio stream, or None."""
    streams = container.streams.audio
    return max(streams, key=lambda s: s.disposition & Disposition.default, default=None)


def decode(container, path):
    """Frames of the video stream. Packets before the first that decodes are skipped."""
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
        reason = f"{path} cannot be decoded beyond frame {count} ({e.strerror}); re-encode it"
        raise UserError(reason) from None
    if not count:
        raise UserError(f"{path} holds no frame that can be decoded; re-encode it")


# Numbers of H.273: BT.709 (of matrix, primaries and transfer alike), BT.2020's primaries, PQ, HLG
BT709, UNSPECIFIED, BT2020, PQ, HLG = 1, 2, 9, 16, 18
LIMITED = 1  # range


class Screen:
    """Turns decoded frames into the pictures (h, w, 3) uint8 that players show: upright, pixels
    square, colours of BT.709, all of the first one's size. It is a filter graph of FFmpeg."""

    def __init__(self, stream):
        aspect, self.size, self.kind = float(stream.sample_aspect_ratio or 1), None, None
        self.aspect = aspect if 0.05 < aspect < 20 else 1  # a tag gone mad
        self.name = stream.container.name.removeprefix("file:")

    def __call__(self, frame):
        turn = bytes(frame.side_data.get("DISPLAYMATRIX") or b"")
        colors = frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries
        kind = frame.width, frame.height, frame.format.name, *colors, turn
        if kind != self.kind:  # a stream may change on its way
            self.kind, self.graph = kind, self._graph(frame, turn)
        self.graph.push(frame)
        return self.graph.pull().to_ndarray()

    def _graph(self, frame, turn):
        w, h = frame.width, frame.height
        self.size = self.size or (round(w * self.aspect), h)
        wide = frame.color_primaries == BT2020 or frame.color_trc in (PQ, HLG)

        matrix = "auto"
        if frame.colorspace == UNSPECIFIED and (wide or h >= 720 or w >= 1280):
            matrix = "bt2020" if wide else "bt709"
        a, b, _, c, d = np.frombuffer(turn, np.int32)[:5] if turn else (1, 0, 0, 0, 1)
        turned = abs(b) > abs(a)
        across, down = (c, b) if turned else (a, d)

        graph = av.filter.Graph()
        kind = f"video_size={w}x{h}:pix_fmt={frame.format.name}:time_base=1/25"
        chain = [
            graph.add("buffer", f"{kind}:colorspace={frame.colorspace}:range={frame.color_range}"),
            graph.add("scale", f"{self.size[0]}:{self.size[1]}:in_color_matrix={matrix}"),
        ]
        if wide:
            table = standard_range(frame.color_trc)
            chain += [graph.add("format", "gbrp16le"), graph.add("lut3d", file=table.name)]
        turns = (turned, "transpose"), (across < 0, "hflip"), (down < 0, "vflip")
        chain += [graph.add(name) for needed, name in turns if needed]
        chain += [graph.add("format", "rgb24"), graph.add("buffersink")]
        try:
            graph.link_nodes(*chain).configure()
        except av.FFmpegError as e:  # such as YCgCo
            reason = f"{self.name} has colours that cannot be shown ({e.strerror})"
            raise UserError(f"{reason}; re-encode it") from None
        return graph


@functools.cache
def standard_range(transfer, n=33):
    """A file of FFmpeg's lut3d from RGB of BT.2020, of HDR with `transfer`, to BT.709. It does what
    zscale, which PyAV lacks, and tonemap=mobius:desat=0 do: 1 is 100 cd/m2."""
    v = np.stack(np.meshgrid(*[np.linspace(0, 1, n)] * 3, indexing="ij")[::-1], -1)
    v = v.reshape(-1, 3)  # red runs fastest
    if transfer == PQ:  # SMPTE ST 2084
        p = v ** (1 / 78.84375)
        light = 100 * (np.maximum(p - 0.8359375, 0) / (18.8515625 - 18.6875 * p)) ** 6.277394636
    elif transfer == HLG:  # ARIB STD-B67, on a display of 1000 cd/m2
        high = (np.exp((v - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = 10 * np.where(v <= 0.5, v * v / 3, high) ** 1.2
    else:
        light = v**2.4
    to_bt709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    light = light @ np.transpose(to_bt709)

    if transfer in (PQ, HLG):  # up to 0.3 as it is, above bent, so that 10 becomes 1
        top = light.max(1, keepdims=True).clip(1e-6)
        light *= np.where(top > 0.3, 1.05401 * (top - 0.085381) / (top + 0.454444), top) / top

    file = tempfile.NamedTemporaryFile("w", suffix=".cube")
    np.savetxt(file, light.clip(0, 1) ** (1 / 2.4), "%.5f", header=f"LUT_3D_SIZE {n}", comments="")
    file.flush()
    return file


GAP = 60  # seconds; a longer step is a clock set anew


class Video:
    """A video or picture as a sequence of frames (h, w, 3) uint8 as shown, at a constant rate:
    `fps` (Fraction), `start` (seconds, of the first frame), `len()`.

    A file of constant rate gives its frames one to one; for those left out, others are repeated.
    One of variable rate (phones, screen captures) is resampled by true time to its average rate:
    tick k shows the last frame that began by then. Where the clock goes back or leaps (recordings
    joined), the next frame follows at the usual distance."""

    def __init__(self, path):
        self.path, self.is_picture = path, read_picture(path) is not None
        about = Path(path).stat()
        times, rates = read_times(path, about.st_mtime_ns, about.st_size)
        self.start, M, steps = times[0], len(times), np.diff(times)

        usual = 1 / float(rates[0])
        forward = steps[(steps > 0.001) & (steps <= GAP)]
        if len(forward):  # the mean of those near the median: some clocks count milliseconds
            middle = np.median(forward)
            usual = forward[abs(forward - middle) <= middle / 10].mean()

        seams = (steps < -2.5 * usual) | (steps > GAP)
        self.shifts = np.cumsum([0, *(usual - steps[seams])]).tolist()  # of the clock, after each
        times = np.sort(np.cumsum([0, *np.where(seams, usual, steps)]))  # smaller steps back: slips
        times -= times[0]

        steady = next((r for r in rates if abs(r * usual - 1) < 0.02), to_rate(1 / usual))
        timeless = times[-1] < M / 1000
        average = rates[0] if timeless else to_rate((M - 1) / times[-1])
        candidates = (*rates, steady, average)
        fits = [r for r in candidates if abs(times - np.arange(M) / float(r)).max() <= 0.6 / r]
        self.repeats = np.ones(M, int)  # how often each frame of the file is shown
        if fits or timeless:
            self.fps = (fits or rates)[0]
        else:
            gaps = np.mean(abs(forward - usual) < usual / 10) > 0.8
            self.fps, late = (steady, 0.5 / steady) if gaps else (average, 1e-6)
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
    """Yield the frames of a video, or the pictures of a picture file, as shown, each once."""
    frame = None
    for frame, _ in read_pictures(path):
        yield frame
    if frame is None:
        with open_video(path) as container:
            yield from map(Screen(video_stream(container)), decode(container, path))


@functools.lru_cache(256)
def read_times(path, *version):
    """(seconds at which each frame begins, [rates that the file claims]). Only decoding tells:
    packets may hold no frame, or one that does not decode. `version` is for the cache."""
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
    """(h, w, 3) uint8 of a picture file, the first if it holds several; None for another file (a
    video, perhaps). UserError where it is a picture by name only."""
    return next((picture for picture, _ in read_pictures(path)), None)


def read_pictures(path):
    """Yield (picture (h, w, 3) uint8, seconds that it is shown): one, or those of an animation."""
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            moves = image.format in ("GIF", "PNG", "WEBP", "AVIF")  # others hold thumbnails, pages
            for page in ImageSequence.Iterator(image) if moves else [image]:
                yield as_shown(page), (page.info.get("duration") or 100) / 1000
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # Syntax: of a PNG
        with open(path, "rb") as f:
            heic = f.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1")
        if not heic and Path(path).suffix.lower() not in PICTURES:
            return
        reason = "HEIC needs pip install pillow-heif" if heic else e
        raise UserError(f"{path} is not a picture that can be read ({reason}); save it again") from None


def as_shown(image):
    """(h, w, 3) uint8 of a PIL image as viewers show it: EXIF rotation and colour profile applied,
    16 bits scaled to 8, transparency over white."""
    profile, image = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "P"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if profile:
        srgb = ImageCms.createProfile("sRGB")
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # broken, or for other colours
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return np.array(image.convert("RGB"))


def check_output(path, *inputs):
    """Refuse an output name that could only fail, or destroy an input, at the end of the work."""
    endings = {".mp4", ".mov", ".mkv", ".m4v", ".png"}
    if Path(path).suffix.lower() not in endings or Path(path).is_dir():
        raise UserError(f"cannot write {path}; name a file that ends in .mp4, .mov, .mkv or, for one frame, .png")
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is not a folder you may write to")
    if Path(path).exists() and any(Path(other).exists() and os.path.samefile(path, other) for other in inputs):
        raise UserError(f"the output {path} is also an input; choose another --out")


def write_sound(video, target, way, span=(0.0, math.inf)):
    """Write the sound of a Video, or `span` (seconds) of it, to an open container: "copy" its packets
    or "code" it as AAC. A generator: its first step adds the stream, the others write a piece."""
    with open_video(video.path) as source:
        audio, copy = audio_stream(source), way == "copy"
        if copy:
            stream = target.add_stream_from_template(audio)
        else:
            rate = audio.rate if audio.rate in (8000, 16000, 22050, 24000, 32000, 44100) else 48000
            layout = "mono" if audio.channels == 1 else "stereo"
            stream = target.add_stream("aac", rate, layout=layout)
        yield

        begin, end = (float(video.start + seconds) for seconds in span)
        shifts, last, written = list(video.shifts), None, -math.inf
        for packet in source.demux(audio):
            pieces = [packet]
            if not copy:
                try:
                    pieces = packet.decode()
                except av.InvalidDataError:  # as players do: on with the next
                    continue
            for piece in (p for p in pieces if p.pts is not None):
                time = float(piece.pts * piece.time_base)
                if last is not None and not -0.1 < time - last <= GAP and len(shifts) > 1:
                    shifts.pop(0)  # a clock set anew, as for the frames
                last, time = time, time + shifts[0]
                if not max(begin, written - 0.01) <= time < end:  # joined sounds may overlap
                    continue
                written = time + float((piece.duration or 0) * piece.time_base)
                piece.pts += round((shifts[0] - begin) / piece.time_base)
                if copy:
                    piece.dts, piece.stream = piece.pts, stream
                target.mux(piece if copy else stream.encode(piece))
                yield
        if not copy:
            target.mux(stream.encode(None))


@functools.lru_cache(8)
def sound_way(video, suffix):
    """How the sound of a Video gets into a file with this ending, tried out in memory: "copy" where
    every player knows its codec, else "code", else None, which is said, once."""
    if video.is_picture:
        return None
    with open_video(video.path) as container:
        audio = audio_stream(container)
        if not audio:
            return None
        codec = audio.codec_context and audio.codec_context.name
    known = codec in ("aac", "mp3", "mp3float", "ac3", "eac3", "alac")
    kind, reason = {".mkv": "matroska", ".m4v": "ipod"}.get(suffix, suffix[1:]), "cannot be decoded"
    for way in ["copy", "code"] if known else ["code"] if codec else []:
        try:
            with av.open(io.BytesIO(), "w", kind) as trial:
                if len(list(itertools.islice(write_sound(video, trial, way), 64))) > 1:
                    return way
        except (av.FFmpegError, ValueError) as e:
            reason = str(e)
    print(f"the sound of {video.path} is left out ({reason})")


class VideoWriter:
    """Write an H.264 video of exactly the frames given, with the sound of another file.

        with VideoWriter("out.mp4", fps, "comment", sound=Video("driving.mp4")) as out:
            out.write(frame)  # (h, w, 3) uint8, h and w even

    The file appears under its name when all is written; after an exception nothing is left. `span`,
    seconds (from, to) of the other file, cuts the sound. A name in .png takes one frame."""

    def __init__(self, path, fps, comment="", sound=None, span=(0.0, math.inf)):
        self.path, self.fps, self.comment = Path(path), Fraction(fps), comment
        self.sound, self.span = sound, span
        self.temporary = sdit.hidden(self.path, f".tmp{self.path.suffix}")
        self.still = self.path.suffix.lower() == ".png"

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stream, self.writes_sound, self.count = None, (), 0
        if self.still:
            return self
        try:
            plain = dict(fflags="+bitexact")  # or .mkv gets random numbers
            self.container = av.open(f"file:{self.temporary}", "w", options=plain)
        except (ValueError, av.FFmpegError, OSError) as e:
            raise UserError(f"cannot write {self.path} ({e}); name it like out.mp4, in a folder you may write to") from None
        self.container.metadata["comment"] = self.comment
        return self

    def write(self, frame):
        if self.still:
            about = PngImagePlugin.PngInfo()
            about.add_text("Comment", self.comment)
            return Image.fromarray(frame).save(self.temporary, pnginfo=about)
        if self.stream is None:
            self._open(*frame.shape[:2])
        picture = av.VideoFrame.from_ndarray(frame, "rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)
        picture.pts, picture.time_base = self.count, 1 / self.fps
        self.count += 1
        self.container.mux(self.stream.encode(picture))

    def _open(self, height, width):
        # x264's macroblock tree reads memory it never wrote at sizes like 64: other files each run
        options = dict(crf="16", preset="fast", mbtree="0")
        self.stream = self.container.add_stream("libx264", rate=self.fps, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        context = self.stream.codec_context
        self.stream.time_base = context.time_base = 1 / self.fps
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        if way := self.sound and sound_way(self.sound, self.path.suffix.lower()):
            self.writes_sound = write_sound(self.sound, self.container, way, self.span)
            next(self.writes_sound)

    def __exit__(self, kind, *_):
        try:
            if kind is None and self.stream:
                self.container.mux(self.stream.encode(None))
                try:
                    list(self.writes_sound)
                except (av.FFmpegError, ValueError) as e:  # the pictures are worth more
                    print(f"the end of the sound of {self.sound.path} could not be taken over ({e})")
            if not self.still:
                self.container.close()
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Faces

FACE_WIDTH, FACE_HEIGHT = 0.45, 0.53               # mean size of the mesh box in the paper's clips (paper B, Fig. 13)
# Points of MediaPipe's mesh: lips, both eyes, irises (82 "expressive" points; paper 4.1: "around the mouth and eyes").
LIPS = [0, 13, 14, 17, 37, 39, 40, 61, 78, 80, 81, 82, 84, 87, 88, 91, 95, 146, 178, 181, 185, 191, 267, 269, 270, 291, 308,
        310, 311, 312, 314, 317, 318, 321, 324, 375, 402, 405, 409, 415]
RIGHT_EYE = [7, 33, 133, 144, 145, 153, 154, 155, 157, 158, 159, 160, 161, 163, 173, 246]
LEFT_EYE = [249, 263, 362, 373, 374, 380, 381, 382, 384, 385, 386, 387, 388, 390, 398, 466]
IRISES = list(range(468, 478))
EXPRESSIVE = LIPS + RIGHT_EYE + LEFT_EYE + IRISES


MEDIAPIPE = threading.RLock()                      # neither it nor the turning of stderr is for two threads


@contextlib.contextmanager
def quiet():
    """Alone with MediaPipe, whose remarks on stderr, from C++, are silenced."""
    with MEDIAPIPE, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):                                      # there is no stderr
            saved = os.dup(2)
            stack.callback(os.close, saved)
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            if sys.stderr:
                sys.stderr.flush()
            os.dup2(null, 2)
            stack.callback(os.dup2, saved, 2)
        yield


class FaceLandmarker:
    """MediaPipe in image mode: every frame by itself, so that order and gaps in time do not matter.

    The full-range detector finds small faces too; the mesh then looks at a square around each."""

    name = "mediapipe 0.10.21 face_mesh refine_landmarks"

    def __init__(self):
        self.process = os.getpid()
        with quiet():
            from mediapipe.python.solutions import face_detection, face_mesh
            self.detector = face_detection.FaceDetection(model_selection=1)
            self.mesh = face_mesh.FaceMesh(static_image_mode=True, refine_landmarks=True)
            blank = np.zeros((64, 64, 3), np.uint8)
            self.detector.process(blank)
            self.mesh.process(blank)

    def faces(self, image):
        """Squares (x, y, side) in pixels around the faces of image (h, w, 3) uint8, the largest first."""
        h, w = image.shape[:2]
        if max(h, w) > 720:
            image = cv2.resize(image, None, fx=720 / max(h, w), fy=720 / max(h, w), interpolation=cv2.INTER_AREA)
        self.check_process()
        found = []
        with quiet():
            detections = self.detector.process(image).detections
        for d in detections or ():
            box = d.location_data.relative_bounding_box
            side = 2 * max(box.width * w, box.height * h)
            found.append((round((box.xmin + box.width / 2) * w - side / 2), round((box.ymin + box.height / 2) * h - side / 2), round(side)))
        return sorted((box for box in found if box[2] > 8), key=lambda box: -box[2])

    def check_process(self):
        if self.process != os.getpid():
            raise UserError("MediaPipe does not survive a fork: load the models in the child, or start it with multiprocessing's spawn")

    def landmarks(self, image, square=None):
        """(478, 3) float32 landmarks in pixels of the image (z in the same unit) of the face in `square`, or None."""
        self.check_process()
        x, y = square[:2] if square else (0, 0)
        picture = crop(image, square) if square else image
        with quiet():
            found = self.mesh.process(picture).multi_face_landmarks
        if not found:
            return None
        h, w = picture.shape[:2]
        return np.array([(x + p.x * w, y + p.y * h, p.z * w) for p in found[0].landmark], np.float32)

    def everyone(self, image):
        """Landmarks of every face of `image`, one after the other, the largest first."""
        squares, seen = self.faces(image), []
        # A face that fills the picture escapes the detector: the mesh is tried on the whole. It sees faces in other things too, so the
        # face must be found again in its own square
        whole = None if squares else self.landmarks(image)
        if whole is not None:
            squares = [face_square(whole[None])]
        for square in squares:
            points = self.landmarks(image, square)
            if points is not None and all(overlap(points, other) < 0.5 for other in seen):
                seen.append(points)
                yield points

    def __call__(self, image, near=None):
        """Landmarks of the face of `image`: the largest, or, with `near` (landmarks of an earlier frame), the same
        person's, which is the one whose mesh overlaps most; None where there is none."""
        faces = self.everyone(image)
        if near is None:
            return next(faces, None)
        points = max(faces, key=lambda points: overlap(points, near), default=None)
        return points if points is not None and overlap(points, near) > 0.1 else None


def overlap(a, b):
    """Intersection over union of the boxes around two sets of landmarks (478, 3)."""
    low, high = np.maximum(a[:, :2].min(0), b[:, :2].min(0)), np.minimum(a[:, :2].max(0), b[:, :2].max(0))
    both = np.prod(np.maximum(high - low, 0))
    return both / (np.prod(np.ptp(a[:, :2], 0)) + np.prod(np.ptp(b[:, :2], 0)) - both)


def face_square(points):
    """The square (x, y, side), in whole pixels, of a clip from its landmarks (M, 478, 3): one for all frames, the median face
    at its centre, FACE_WIDTH wide or FACE_HEIGHT high in it. The head moves inside it, as in training."""
    low, high = points[:, :468, :2].min(1), points[:, :468, :2].max(1)          # (M, 2)
    side = max(np.median(high - low, 0) / (FACE_WIDTH, FACE_HEIGHT))
    x, y = np.median((low + high) / 2, 0) - side / 2
    return round(x), round(y), max(round(side), 8)


def keep_inside(square, shape):
    """The square moved so far that at most a tenth of its side is outside the picture, (h, w, ...), at any
    edge, where `crop` mirrors; None where it cannot be. The rule for all clips of training."""
    (x, y, side), (h, w) = square, shape[:2]
    margin = side // 10
    if side - 2 * margin > min(h, w):
        return None
    return min(max(x, -margin), w - side + margin), min(max(y, -margin), h - side + margin), side


def mirrored(square, shape):
    """Share of the square's side that is outside the picture, at the edge where it is most."""
    (x, y, side), (h, w) = square, shape[:2]
    return round(max(0, -x, -y, x + side - w, y + side - h) / side, 3)


TOO_LARGE = "the face is too large: more than a tenth of its square would be mirrored"


def crop(image, square, size=None):
    """Cut the square (x, y, side) out of image (h, w, 3), mirrored where it leaves the picture; resized to `size`."""
    (x, y, side), (h, w) = square, image.shape[:2]
    left, top, right, bottom = max(-x, 0), max(-y, 0), max(x + side - w, 0), max(y + side - h, 0)
    if left or top or right or bottom:
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REFLECT_101)
    image = image[y + top:y + top + side, x + left:x + left + side]
    return np.ascontiguousarray(resize(image, size) if size else image)


def resize(image, size):
    """A square picture (h, h, 3) at another size: averaged when it shrinks, bicubic when it grows."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if len(image) > size else cv2.INTER_CUBIC)


@dataclass
class Track:
    """The face of a clip: landmarks (M, 478, 3) float32 in the coordinates of the crop (x and y 0..1 across it, z in the same
    unit), which frames they were found in (M,) bool (elsewhere interpolated), and the crop's square in pixels."""
    landmarks: np.ndarray
    found: np.ndarray
    square: tuple
    faces: int = 1                                 # in the first frame with one


def no_face(name):
    return UserError(f"no face found in {name}; use a picture or video with one clear human face, at least about 100 pixels high")


def pick_face(faces, number, name):
    """The face `number` of those of a picture, from 0, the largest."""
    if not 0 <= number < len(faces):
        raise UserError(f"there is no face number {number} in {name}, whose first frame with a face has {len(faces)}; count from 0, the largest")
    return faces[number]


def track(frames, landmarker, name, total=None, number=0):
    """Follow a face through `frames`, an iterable of (h, w, 3) uint8: of the first frame that has one, the largest, or face `number`. After
    24 frames without it (a cut, a walk out of the picture) the largest face is followed."""
    points, last, lost, faces = [], None, 0, []
    for image in tqdm(frames, "landmarks", total, unit="frame", leave=False, disable=True if total is None else None):
        if last is None:
            faces = list(landmarker.everyone(image))
            here = pick_face(faces, number, name) if faces else None
        else:
            here = landmarker(image, last if lost < 24 else None)
        last, lost = (last, lost + 1) if here is None else (here, 0)
        points.append(np.full((LANDMARKS, 3), np.nan, np.float32) if here is None else here)
    if last is None:
        raise no_face(name)
    return in_square(np.stack(points), len(faces))


def in_square(points, faces=1):
    """The Track of landmarks (M, 478, 3) in pixels of the frames, NaN where they were not found."""
    found = ~np.isnan(points[:, 0, 0])
    square = face_square(points[found])
    landmarks = (points - np.float32((*square[:2], 0))) / np.float32(square[2])
    M, known = np.arange(len(found)), np.flatnonzero(found)
    for column in landmarks.reshape(len(found), -1).T:                          # a view: filled in place
        column[~found] = np.interp(M[~found], known, column[found])
    return Track(landmarks, found, square, faces)


def expressive_mask(landmarks, size):
    """Share of each cell of a size x size grid over the crop that lies on lips or eyes, (size, size) uint8, 255 for all.

    The paper is silent on how pixels become latents: the outlines are filled at 256 x 256 and averaged over cells."""
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
    return ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# What work cost

def peak_memory(device="cpu"):
    """GiB: of the GPU's allocator, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


class Stopwatch:
    """Seconds by part, for the line at the end."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part):
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def __str__(self):
        return ", ".join(f"{part} {s:.1f} s" for part, s in self.seconds.items()) + f"; peak memory {peak_memory():.1f} GiB"


# ----------------------------------------------------------------------------------------------------------------------
# CLIP

# What a CLIP file may configure; open_clip would take more, and fetch what it names.
CLIP_KEYS = dict(embed_dim=1, quick_gelu=True,
                 vision_cfg=dict(image_size=1, layers=1, width=1, patch_size=1, head_width=1, mlp_ratio=1.0),
                 text_cfg=dict(context_length=1, vocab_size=1, width=1, heads=1, layers=1))


class SceneEncoder:
    """The global signal (paper 3.1): a CLIP model of open_clip, frozen; pictures and texts -> unit vectors (B, S).

    Its file is safetensors with open_clip's own configuration (embed_dim, vision_cfg, text_cfg) as metadata; a file without
    metadata is taken for OpenAI's ViT-L/14 as open_clip publishes it."""

    def __init__(self, path, device="cpu"):
        tensors, config = sdit.read_tensors(path)
        config = config or openai_vit_l14()
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config) or not sdit.is_like(config, CLIP_KEYS):
            raise UserError(f"{path} is not a CLIP file: its metadata has no open_clip configuration that is known here")
        import open_clip
        model = sdit.build(lambda: open_clip.CLIP(**config), tensors, path)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
        self.size, self.device = config["vision_cfg"].get("image_size", 224), device

    def images(self, pixels):
        """(B, 3, h, w) in [-1, 1] -> (B, S)."""
        return self.model.encode_image(clip_pixels(pixels.to(self.device), self.size), normalize=True).float()

    def texts(self, sentences):
        """List of B strings -> (B, S)."""
        return self.model.encode_text(self.tokenizer(sentences).to(self.device), normalize=True).float()


def openai_vit_l14():
    """OpenAI's models have "quick" GELU, which open_clip's configuration ViT-L-14 has not."""
    import open_clip
    return open_clip.get_model_config("ViT-L-14-quickgelu")


def clip_pixels(pixels, size):
    """CLIP's input of pictures (B, 3, h, w) in [-1, 1]: OpenAI's size, centre, mean and deviation."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import functional
    if min(pixels.shape[-2:]) != size:
        bicubic = functional.InterpolationMode.BICUBIC
        pixels = functional.resize(pixels, size, bicubic, antialias=True).clamp(-1, 1)
    pixels = functional.center_crop(pixels, size)
    return functional.normalize((pixels + 1) / 2, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


# ----------------------------------------------------------------------------------------------------------------------
# Clips -> cached records

@torch.no_grad()
def encode_clip(pixels, tracked, fps, autoencoder, scene_encoder, watch=lambda part: contextlib.nullcontext()):
    """Cache record of a clip of M frames: pixels, an iterable of (size, size, 3) uint8 cut by `crop`, its Track, its rate.

    Numpy arrays: latent (M, C, H, W) f16, landmarks (M, 478, 3) f16, weight (M, H, W) u8, found (M,) bool, scene (2, S) f16 of the first and
    the last frame (the only ones that can be a source; see `choose_frames`), fps (2,) numerator and denominator (not used in training)."""
    device, pixels, latent, ends = next(autoencoder.parameters()).device, iter(pixels), [], []
    while True:                                                                 # a long clip is never in memory as a whole
        with watch("decoding, crops"):
            part = list(itertools.islice(pixels, 32))
        if not part:
            break
        ends = [*ends[:1], part[-1]] if ends else [part[0], part[-1]]
        with watch("autoencoder"):
            latent.append(autoencoder.encode(to_tensor(np.stack(part)).to(device)).half().cpu())

    latent = torch.cat(latent).numpy()
    with watch("masks"):
        weight = np.stack([expressive_mask(points, latent.shape[-1]) for points in tracked.landmarks])
    with watch("CLIP"):
        scene = scene_encoder.images(to_tensor(np.stack(ends))).half().cpu().numpy()
    return dict(latent=latent, landmarks=tracked.landmarks.astype(np.float16), found=tracked.found, weight=weight, scene=scene,
                fps=np.array(Fraction(fps).as_integer_ratio()))


class CacheWriter:
    """One safetensors file a clip, which is there when it is whole; it carries the clip's entry in
    the manifest, and what it was made with. Several ranks write into one folder."""

    def __init__(self, folder, about):
        self.folder, self.about = Path(folder), about
        self.folder.mkdir(parents=True, exist_ok=True)
        next(filter(None, map(self.read, self.folder.glob("clip-*"))), None)    # one is enough to see that they are of this kind

    def path(self, file):
        return self.folder / f"clip-{hashlib.sha256(os.fsencode(file)).hexdigest()[:16]}.safetensors"

    def add(self, record, entry):
        tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in record.items()}
        sdit.write_tensors(self.path(entry["file"]), tensors, dict(about=self.about, entry=entry | dict(frames=len(record["found"]))))

    def read(self, path):
        """The manifest's entry of a record; None where it is not there or torn. UserError where it
        was made with something else."""
        try:
            with sdit.open_tensors(path) as f:
                config = json.loads(f.metadata()["config"])
        except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError):
            return None
        if other := [k for k, v in self.about.items() if config["about"].get(k) != v]:
            raise UserError(f"{self.folder} was begun with another {' and '.join(other)}; give the same command again, or another --out")
        return config["entry"]

    def finish(self, entries):
        """manifest.jsonl, a line for every clip, taken or rejected; then index.json, with which the folder is a cache."""
        entries = sorted(entries, key=lambda entry: entry["file"])
        clips = [[self.path(e["file"]).name, e["frames"]] for e in entries if "rejected" not in e]
        write_text(self.folder / "manifest.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
        write_text(self.folder / "index.json", json.dumps(self.about | dict(clips=clips)))


def list_files(folder, kinds):
    """Files of a folder tree, links to folders followed, with one of the endings, sorted; hidden ones (unfinished) are left out."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:                                  # a link to a folder above
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        found += [Path(root, name) for name in names if Path(name).suffix.lower() in kinds and not name.startswith(".")]
    return sorted(p for p in found if p.is_file() or p.is_symlink())


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with sdit.atomic(path) as temporary:
        temporary.write_text(text, "utf-8", "surrogateescape")


def read_text(path):
    """A text file of a user: UTF-8 or UTF-16 with or without the mark that some editors put first; of other encodings, the bytes of names."""
    content = Path(path).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")


def read_json(path, keys=(), cure="remove it, and give the command that made it again"):
    """A JSON file that holds an object with these keys; UserError for another, or a torn one."""
    try:
        found = json.loads(read_text(path))
        if isinstance(found, dict) and set(keys) <= set(found):
            return found
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path} is torn, or not what its name says; {cure}")


def read_lines(paths):
    """All entries of JSON-lines files; a line that was cut off in writing is left out. (Who appends begins with a new line.)"""
    entries = []
    for line in (line for path in paths for line in read_text(path).splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def append_line(path, entry):
    """Add a line to a JSON-lines file; one that was cut off before stays by itself."""
    with open(path, "a") as f:
        f.write(f"\n{json.dumps(entry)}\n")


MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ESTALE}


def blame(error, path):
    """Why the clip at `path` is left out for good; or raise the error, if the machine is at fault: memory, disk, a folder that
    is away, weights that are torn. The next run tries that again."""
    causes = [error, error.__cause__, error.__context__]
    at_fault = any(isinstance(c, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError) or getattr(c, "errno", 0) in MACHINE for c in causes)
    gone = not path.is_file() and not path.is_symlink()                         # a link to nothing is to blame itself
    if at_fault or gone or isinstance(error, UserError) and path.name not in str(error):
        raise UserError(f"{path}: {type(error).__name__ if at_fault else error}, which is not the clip's fault; "
                        f"the same command goes on from here") from None
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def enough_disk(folder, needed):
    free = shutil.disk_usage(folder).free
    if free < needed * 1.1:
        raise UserError(f"{folder} needs about {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; make room and give the same command "
                        f"again: it goes on where it was")


def cache_about(autoencoder_path, clip_path, autoencoder, scene_width, size):
    """What a cache says of itself; train.py passes it on to the model."""
    return dict(size=size, latent_channels=autoencoder.config.latent_channels, latent_size=size // autoencoder.config.factor,
                scene_width=scene_width, landmarker=FaceLandmarker.name,
                autoencoder=Path(autoencoder_path).name, autoencoder_sha256=sdit.sha256(autoencoder_path),
                clip=Path(clip_path).name, clip_sha256=sdit.sha256(clip_path))


# ----------------------------------------------------------------------------------------------------------------------
# Training rows

def choose_frames(rng, found, T):
    """A non-uniform sequence and its source (paper 3.1): T frames of a clip, and the source, which is the first or the last.

    found (M,) bool, the frames whose landmarks are real: only these are drawn; of fewer than T, all inner frames count alike. The
    distribution is not in the paper: uniform without replacement, in order of time. The source is the frame "furthest in
    time from the chosen sequence, effectively making it either the first or last frame of the entire video"; both ends are
    left out of the sequence, so that the source is never one of the frames to denoise."""
    inner = np.flatnonzero(found[1:-1]) + 1
    if len(inner) < T:
        inner = np.arange(1, len(found) - 1)
    times, last = np.sort(rng.choice(inner, T, replace=False)), len(found) - 1
    return times, 0 if times[0] >= last - times[-1] else last


HELD_OUT = 8                                       # last clips of a cache, which train.py's previews show and training never sees


class Rows(torch.utils.data.Dataset):
    """Training rows of one or more caches. Row number n is a function of (seed, n) alone, so that data order needs no state, and
    any number of processes sees the same rows.

    `caches` is a folder, or several as "FOLDER:SHARE", from which rows are drawn in these shares. A row is a dict: latents
    (T, C, H, W), landmarks (T, 478, 3), mask (T, H, W) in 0..1 (the record's weight), scene (S,), all float32. Clips with fewer
    than T + 2 frames give way to the next one (see `choose_frames`). With `held_out` the rows are of the held-out clips (of a
    cache of fewer than 80 clips nothing is held out: they are its last training clips)."""

    def __init__(self, caches, frames, seed=0, held_out=False):
        self.frames, self.seed, self.held_out = frames, seed, held_out
        caches = [split_share(c) for c in ([caches] if isinstance(caches, (str, Path)) else caches)]
        self.folders, shares = zip(*caches)
        self.shares = np.array(shares) / sum(shares)
        indices = [read_index(folder, frames) for folder in self.folders]
        self.about, self.folder = indices[0], self.folders[0]
        for folder, index in zip(self.folders, indices):
            if other := [k for k in index if k not in ("clips", "size") and index[k] != self.about.get(k)]:
                raise UserError(f"{folder} and {self.folder} were made with another {' and '.join(other)}; caches that are mixed must agree")
        self.names = [np.array([name for name, _ in index["clips"]]) for index in indices]           # arrays: worker processes share them
        self.lengths = [np.array([frames for _, frames in index["clips"]]) for index in indices]
        self.ranges = []
        for lengths in self.lengths:
            n, held = len(lengths), HELD_OUT if len(lengths) >= 10 * HELD_OUT else 0
            self.ranges.append(range(max(0, n - HELD_OUT), n) if held_out else range(n - held))
        self.orders = {}

    def __len__(self):
        return sum(map(len, self.ranges))

    def _open(self, cache, clip):
        """The record of a clip of a cache, memory-mapped."""
        path = self.folders[cache] / str(self.names[cache][clip])
        try:
            return sdit.open_tensors(path)
        except (OSError, safetensors.SafetensorError) as e:
            raise UserError(f"{path} is gone or torn ({e}); remove {path.parent / 'index.json'} and give the data.py command again: "
                            f"it makes what is missing") from None

    def _clip(self, n):
        """The record of row n: number n of a cache gone through in a new random order each epoch. Of several caches one is drawn by share
        first, with the same n: an epoch then visits only that share of its clips, another part each time."""
        cache = np.random.default_rng([self.seed, 2, n]).choice(len(self.shares), p=self.shares) if len(self.shares) > 1 else 0
        clips = self.ranges[cache]
        epoch, i = divmod(n, len(clips))
        if self.orders.get(cache, (-1,))[0] != epoch:
            shuffled = np.arange(len(clips)) if self.held_out else np.random.default_rng([self.seed, 0, epoch]).permutation(len(clips))
            self.orders[cache] = epoch, shuffled
        order = self.orders[cache][1]
        for k in range(len(clips)):
            clip = clips[order[(i + k) % len(clips)]]
            if self.lengths[cache][clip] >= self.frames + 2:
                return self._open(cache, clip)
        raise UserError(f"no clip in {self.folders[cache]} for training has {self.frames + 2} frames; cache longer clips")

    def __getitem__(self, n):
        clip = self._clip(n)
        times, source = choose_frames(np.random.default_rng([self.seed, 1, n]), clip.get_tensor("found").numpy(), self.frames)
        latents, landmarks, weight = (clip.get_tensor(k)[times].float() for k in ("latent", "landmarks", "weight"))
        scene = clip.get_tensor("scene")[0 if source == 0 else 1].float()
        return dict(latents=latents, landmarks=landmarks, mask=weight / 255, scene=scene)

    def statistics(self, clips=2000):
        """What `sdit.Mapping` normalises its signals by, over evenly spaced clips: buffers by name.

        landmark_mean (478, 3); landmark_basis (1434, LANDMARK_COMPONENTS), which whitens them: the
        principal components of landmarks scaled to unit standard deviation; scene_mean (S,), and
        scene_gain, which brings scenes to the total variance of the whitened landmarks."""
        points, scenes = [], []
        for cache, (share, there) in enumerate(zip(self.shares, self.ranges)):
            for i in np.linspace(0, len(there) - 1, min(math.ceil(clips * share), len(there))).astype(int):
                clip = self._open(cache, there[i])
                points.append(clip.get_tensor("landmarks")[::4].flatten(1).float())                 # neighbouring frames are alike
                scenes.append(clip.get_tensor("scene").float())
        points = torch.cat(points)                                                                  # (frames, 1434)
        mean, spread = points.mean(0), points.std(0, correction=0).clamp_min(1e-3)
        scaled = (points - mean) / spread
        variance, axes = torch.linalg.eigh(scaled.T @ scaled / len(scaled))                         # ascending
        variance, axes = variance[-LANDMARK_COMPONENTS:].flip(0), axes[:, -LANDMARK_COMPONENTS:].flip(1)
        gain = variance.clamp_min(1e-3).rsqrt() * (variance > 1e-3)                                 # less is jitter, or no movement of so few frames

        scenes = torch.cat(scenes)                                              # (clips x 2, S)
        scene_mean = scenes.mean(0)
        scene_variance = (scenes - scene_mean).square().sum(1).mean()           # total, over S
        scene_gain = (LANDMARK_COMPONENTS / scene_variance.clamp_min(1e-2)).sqrt()

        return dict(landmark_mean=mean.view(LANDMARKS, 3),
                    landmark_basis=axes * gain / spread[:, None],
                    scene_mean=scene_mean, scene_gain=scene_gain)


def split_share(text):
    """"FOLDER:SHARE" or "FOLDER" -> (folder, share)."""
    folder, colon, share = str(text).rpartition(":")
    try:
        share = float(share if colon else 1)
    except ValueError:
        colon = ""
    if not colon:
        return Path(text), 1.0
    if not 0 < share < math.inf:
        raise UserError(f"{text} is not CACHE or CACHE:SHARE with a positive share, as in cache:0.9")
    return Path(folder), share


def read_index(folder, frames):
    """The index of a cache that has rows of `frames` frames."""
    path = folder / "index.json"
    if not path.is_file():
        unfinished = f"{folder} is unfinished: give the data.py command that began it again" if list(folder.glob("clip-*")) else \
            f"no cache in {folder} (no index.json); make one: python data.py CLIPS --out {folder}, " \
            f"for real faces with --autoencoder sd-vae-ft-mse --clip ViT-L-14"
        raise UserError(unfinished)
    index = read_json(path)
    if "shards" in index:
        raise UserError(f"{folder} was made by an older data.py; make it again: python data.py CLIPS --out NEW_FOLDER")
    clips = index.get("clips")
    if not isinstance(clips, list) or not all(isinstance(c, list) and [type(v) for v in c] == [str, int] for c in clips):
        raise UserError(f"{path} is torn; remove it and give the data.py command again")
    if max((n for _, n in clips), default=0) < frames + 2:
        raise UserError(f"no clip in {folder} has {frames + 2} frames, which rows of {frames} need; cache longer clips")
    return index


# ----------------------------------------------------------------------------------------------------------------------

def pseudo_clip(picture, points, seed, M=16):
    """Yield M frames of a still picture that moves, and its landmarks `points` (478, 3), in pixels, moved along: a stand-in for a clip (paper
    A: drawn faces "animated" by geometric transforms; which ones it does not say). Turn, size, place and perspective swing smoothly, each as
    one slow wave of random phase; the picture is mirrored at its border."""
    rng = np.random.default_rng(seed)
    h, w = picture.shape[:2]
    corners = np.float32([[0, 0], [w, 0], [w, h], [0, h]])
    reach = np.array([0.25, 0.12, 0.06, 0.06, 0.08, 0.08])                      # radians; share of size; shares of the picture's side
    rate, phase = rng.uniform(0.5, 1.2, 6), rng.uniform(0, 2 * np.pi, 6)
    for m in range(M):
        turn, grow, dx, dy, lean_x, lean_y = reach * np.sin(2 * np.pi * rate * m / M + phase)
        spin = np.float32([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * (1 + grow)
        moved = (corners - (w / 2, h / 2)) @ spin + (w * (0.5 + dx), h * (0.5 + dy))
        moved += np.float32([[lean_x, lean_y], [-lean_x, -lean_y], [lean_x, lean_y], [-lean_x, -lean_y]]) * (w, h)
        warp = cv2.getPerspectiveTransform(corners, np.float32(moved))
        across = cv2.perspectiveTransform(points[None, :, :2], warp)[0]         # (478, 2)
        frame = cv2.warpPerspective(picture, warp, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        yield frame, np.column_stack([across, points[:, 2] * (1 + grow)]).astype(np.float32)


def resize_to(picture, longest):
    """`picture` with its longer side at most `longest`."""
    scale = longest / max(picture.shape[:2])
    return picture if scale >= 1 else cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def read_clip(path, landmarker, size, watch):
    """(crops, an iterator of (size, size, 3) uint8, Track, fps, mirrored share) of a face clip, from the first frame with the face to the
    last, or of a still picture as a pseudo-clip of 8 frames a second."""
    with watch("decoding, landmarks"):
        if path.suffix.lower() in PICTURES:
            picture = resize_to(read_picture(path), 768)
            points = landmarker(picture)
            if points is None:
                raise no_face(path)
            frames, points = zip(*pseudo_clip(picture, points, zlib.crc32(os.fsencode(path.name))))
            tracked, fps, shape = in_square(np.stack(points)), Fraction(8), picture.shape
            square = tracked.square                                             # it moves, so what it leaves is mirrored anyway
        else:
            frames = Video(path)
            tracked, fps, shape = track(frames, landmarker, path), frames.fps, next(iter(frames)).shape
            square = keep_inside(tracked.square, shape)
    if square is None:
        raise UserError(f"{path}: {TOO_LARGE}")

    shift = np.float32((*np.subtract(tracked.square, square)[:2], 0)) / square[2]
    known = np.flatnonzero(tracked.found)                                       # the ends may be the source: they must show the face
    shown = slice(int(known[0]), int(known[-1]) + 1)

    def crops():
        for frame in itertools.islice(frames, shown.start, shown.stop):
            yield crop(frame, square, size)
    tracked = Track(tracked.landmarks[shown] + shift, tracked.found[shown], square)
    return crops(), tracked, fps, mirrored(square, shape)


def bench(cache, frames=8, rows=2000):
    """Print the rows a second that one process loads from a cache, in random order, as training does."""
    loader = Rows(cache, frames)
    for n in range(rows // 10):                                                 # the files come into memory
        loader[n]
    began = time.perf_counter()
    for n in tqdm(range(rows // 10, rows + rows // 10), "rows", leave=False):
        loader[n]
    seconds = time.perf_counter() - began
    print(f"{rows} rows of {frames} frames in {seconds:.1f} s: {rows / seconds:.0f} rows a second from {len(loader)} clips in {cache}")


def arguments():
    ap = sdit.Parser(__doc__)
    ap.add_argument("clips", type=Path, nargs="?", help="folder tree of videos of one face each, and of pictures, which become short clips by moving them")
    ap.add_argument("--out", type=Path, default=Path("cache"), help="folder of the cache")
    ap.add_argument("--autoencoder", default=DEMO / "autoencoder.safetensors", help="file, or sd-vae-ft-mse or sd-vae-ft-ema")
    ap.add_argument("--clip", default=DEMO / "clip.safetensors", help="file, or ViT-L-14")
    ap.add_argument("--size", type=sdit.number(int, 1, 4096), help="pixels a side (default: 64 for the demo's autoencoder, else 256)")
    ap.add_argument("--bench", action="store_true", help="measure how fast training rows load from the finished cache --out")
    return ap.parse_args()


def main():
    a = arguments()
    if a.bench:
        return bench(a.out)
    if a.clips is None:
        raise UserError("name the folder of clips: python data.py CLIPS --out cache")
    if not a.clips.is_dir():
        raise UserError(f"no such folder: {a.clips}")
    paths = {str(p.relative_to(a.clips)): p for p in list_files(a.clips, VIDEOS | PICTURES)}
    if not paths:
        raise UserError(f"no videos ({', '.join(sorted(VIDEOS))}) and no pictures ({', '.join(sorted(PICTURES))}) under {a.clips}")

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    a.autoencoder, a.clip = sdit.fetch(a.autoencoder), sdit.fetch(a.clip)
    autoencoder, scene_encoder, landmarker = sdit.load_autoencoder(a.autoencoder, device), SceneEncoder(a.clip, device), FaceLandmarker()
    ours = DEMO in (a.autoencoder.resolve().parent, a.clip.resolve().parent)
    if ours and rank == 0:
        print("note: the bundled autoencoder and CLIP are for the demo's rendered faces; for real ones give --autoencoder sd-vae-ft-mse --clip ViT-L-14")
    a.size = a.size or (64 if a.autoencoder.resolve().parent == DEMO else 256)
    if a.size % autoencoder.config.factor:
        raise UserError(f"--size {a.size} is not a multiple of {autoencoder.config.factor}, the pixels that the autoencoder makes one cell of")
    about = cache_about(a.autoencoder, a.clip, autoencoder, scene_encoder.model.visual.output_dim, a.size)

    if (a.out / "index.json").exists():
        return check_finished(a.out, about, paths)
    with sdit.owned(a.out / f"rank-{rank}"):
        writer = CacheWriter(a.out, about)
        cache_clips(list(paths.items())[rank::world], writer, landmarker, autoencoder, scene_encoder, a.size)
        finish_cache(writer, paths)


def check_finished(folder, about, paths):
    """Whether a finished cache is what the command asks for: then there is nothing to do."""
    index, there = read_json(folder / "index.json"), {e.get("file") for e in read_lines([folder / "manifest.jsonl"])}
    if other := [k for k, v in about.items() if index.get(k) != v]:
        raise UserError(f"{folder} already holds a cache of another {' and '.join(other)}; name another --out")
    if new := len(set(paths) - there):
        raise UserError(f"{folder} already holds a cache, without {new} of these clips; to add them, remove {folder / 'index.json'} first")
    print(f"{folder} already holds a cache of these clips")


def rejections(folder):
    """{file: entry} of the clips that were left out; not of those that changed since."""
    return {e["file"]: e for e in read_lines(sorted(folder.glob("rejected-*.jsonl"))) if {"file", "rejected", "changed"} <= set(e)}


def cache_clips(mine, writer, landmarker, autoencoder, scene_encoder, size):
    """Make the records of clips [(name, path)] that are not there yet. A clip that is at fault itself is left out, with the reason."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    left_out, watch, frames = rejections(writer.folder), Stopwatch(), 0
    known = {name for name, path in mine if name in left_out and left_out[name]["changed"] == changed(path)}
    todo = [(name, path) for name, path in mine if name not in known and not writer.read(writer.path(name))]

    for name, path in tqdm(todo, f"clips, rank {rank}" if world > 1 else "clips", unit="clip"):
        try:
            crops, tracked, fps, margin = read_clip(path, landmarker, size, watch)
            record = encode_clip(crops, tracked, fps, autoencoder, scene_encoder, watch)
        except Exception as e:                                                  # whatever is wrong with a file, the rest goes on
            append_line(writer.folder / f"rejected-{rank:04d}.jsonl", dict(file=name, rejected=blame(e, path), changed=changed(path)))
        else:
            frames += len(record["found"])
            writer.add(record, dict(file=name, missed=int((~tracked.found).sum()), square=[int(v) for v in tracked.square], mirrored=margin))
    print(f"{frames} frames; frames a second: " + ", ".join(f"{part} {frames / s:.0f}" for part, s in watch.seconds.items()))


def changed(path):
    """When a file was last changed; None where it is not there."""
    return path.stat().st_mtime_ns if path.exists() else None


def finish_cache(writer, paths):
    """Write the index, if every clip is there or left out: so of several ranks the last one does it."""
    left_out = rejections(writer.folder)
    entries = [writer.read(writer.path(name)) or left_out.get(name) for name in tqdm(paths, "index", leave=False, disable=None)]
    if missing := entries.count(None):
        return print(f"{missing} clips are left for the other ranks; the last one writes the index")
    try:
        with sdit.owned(writer.folder / "index.json"):
            writer.finish(entries)
    except UserError:                                                           # another rank was as quick
        return
    for path in writer.folder.glob(".clip-*.tmp.safetensors"):              # of killed runs
        path.unlink(missing_ok=True)
    count = sum("rejected" in e for e in entries)
    print(f"{len(entries) - count} clips in {writer.folder}; {count} left out, reasons in {writer.folder / 'manifest.jsonl'}")


if __name__ == "__main__":
    sdit.run_main(main)
