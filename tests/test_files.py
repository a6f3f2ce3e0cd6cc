"""The world's files: frames as players show them, their clocks, streams, pictures, sound, and what is
written. Every input is made here, of frames that carry their number or one colour."""
import io
from fractions import Fraction
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition
from PIL import EpsImagePlugin, Image, ImageCms

import data
import sample
import sdit
from conftest import write_video

QUARTERS = np.zeros((64, 96, 3), np.uint8)
QUARTERS[:32, :48], QUARTERS[:32, 48:], QUARTERS[32:, :48] = (220, 20, 20), (20, 200, 20), (20, 20, 220)


def coded(M, h=64, w=128):
    """Frames that carry their number as eight bright or dark columns."""
    frames = np.full((M, h, w, 3), 64, np.uint8)
    for k in range(M):
        for bit in range(8):
            column = slice(bit * w // 8, (bit + 1) * w // 8)
            frames[k, h // 4:3 * h // 4, column] = 220 if k >> bit & 1 else 10
    return frames


def number(frame):
    h, w = frame.shape[:2]
    columns = frame[h // 2 - 4:h // 2 + 4].reshape(8, 8, w // 8, 3)[:, :, w // 32:-w // 32].mean((0, 2, 3))
    return sum(int(bright > 115) << bit for bit, bright in enumerate(columns))


def numbers(path):
    return [number(frame) for frame in data.Video(path)]


def encode(path, frames, codec="libx264", rate=25, pixels="yuv420p", options=None, tags=None, clock=None):
    """A file of frames (M, h, w, 3) uint8, or of av.VideoFrames. `tags`: attributes of the codec.
    `clock`: the times that its packets get, in milliseconds."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        first = frames[0]
        shape = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape
        stream.height, stream.width, stream.pix_fmt = *shape[:2], pixels
        for key, value in (tags or {}).items():
            setattr(stream.codec_context, key, value)
        times = iter(clock or ())
        for i, frame in enumerate([*frames, None]):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, "rgb24")
            if frame is not None:
                frame.pts, frame.time_base = i, 1 / Fraction(rate)
            for packet in stream.encode(frame):
                if clock:
                    packet.pts = packet.dts = next(times)
                    packet.time_base = Fraction(1, 1000)
                out.mux(packet)
    return path


# Display matrices (a, b, c, d), and what they make of a picture
MATRICES = {"hflip": (-1, 0, 0, 1, lambda x: x[:, ::-1]), "vflip": (1, 0, 0, -1, lambda x: x[::-1]),
            "transpose": (0, 1, 1, 0, lambda x: x.swapaxes(0, 1)),
            "transverse": (0, -1, -1, 0, lambda x: x[::-1, ::-1].swapaxes(0, 1)),
            "right": (0, 1, -1, 0, lambda x: np.rot90(x, -1)), "left": (0, -1, 1, 0, np.rot90),
            "half": (-1, 0, 0, -1, lambda x: x[::-1, ::-1])}


@pytest.mark.parametrize("way", MATRICES)
def test_mirrored_and_turned_as_players_show_it(way, tmp_path):
    """With pixels that are not square, too: they are stretched before they are turned."""
    a, b, c, d, turn = MATRICES[way]
    path = encode(tmp_path / "x.mp4", [QUARTERS] * 2, options={"crf": "4", "x264-params": "sar=4/3"})
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 0]) * 65536
    raw[at:at + 36] = np.array([*matrix[:8], 0x40000000], ">i4").tobytes()
    path.write_bytes(raw)
    wide = cv2.resize(QUARTERS, (128, 64), interpolation=cv2.INTER_NEAREST)
    frame, = [next(iter(data.Video(path)))]
    assert frame.shape == turn(wide).shape and abs(frame.astype(int) - turn(wide)).mean() < 8


def test_a_size_that_changes_on_the_way(tmp_path):
    """As in recordings of calls: the second half is coded at half the size."""
    frames = coded(20)
    with av.open(str(tmp_path / "x.webm"), "w") as out:
        stream = out.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        small = av.CodecContext.create("libvpx", "w")
        small.width, small.height, small.pix_fmt, small.time_base = 64, 32, "yuv420p", Fraction(1, 25)
        for coder, begin in ((stream, 0), (small, 10)):
            for i in [*range(begin, begin + 10), None]:
                picture = None if i is None else cv2.resize(frames[i], (coder.width, coder.height))
                frame = None if i is None else av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
                if frame:
                    frame.pts, frame.time_base = i, Fraction(1, 25)
                for packet in coder.encode(frame):
                    packet.stream, packet.time_base = stream, Fraction(1, 25)
                    out.mux(packet)
    assert {frame.shape for frame in data.Video(tmp_path / "x.webm")} == {(64, 128, 3)}
    assert numbers(tmp_path / "x.webm") == list(range(20))


@pytest.mark.parametrize("height,matrix", [(720, "ITU709"), (480, "ITU601")])
def test_untagged_colours(height, matrix, tmp_path):
    """Of 720 lines and more they are BT.709, below BT.601, as players take them."""
    orange = np.full((height, 640, 3), (230, 120, 40), np.uint8)
    frame = av.VideoFrame.from_ndarray(orange, "rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
    frame.colorspace = 2
    path = encode(tmp_path / "x.mp4", [frame], options={"crf": "4", "preset": "ultrafast"})
    assert abs(next(iter(data.Video(path))).mean((0, 1)) - (230, 120, 40)).max() < 3


@pytest.mark.parametrize("space", [8, 14])
def test_colours_that_cannot_be_shown_are_one_sentence(space, tmp_path):
    """YCgCo and ICtCp, which FFmpeg's scaler does not know."""
    path = encode(tmp_path / "x.mp4", coded(2), tags=dict(colorspace=space))
    with pytest.raises(sdit.UserError, match="x.mp4 has colours that cannot be shown"):
        next(iter(data.Video(path)))


def test_a_mad_shape_of_pixels_takes_no_gigabytes():
    stream = SimpleNamespace(sample_aspect_ratio=Fraction(1000), container=SimpleNamespace(name="file:x.mp4"))
    assert data.Screen(stream)(av.VideoFrame.from_ndarray(coded(1)[0], "rgb24")).shape == (64, 128, 3)


def perceptual_quantizer(nits):
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hybrid_log_gamma(nits):
    scene = (nits / 1000) ** (1 / 1.2)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


@pytest.mark.parametrize("transfer,curve", [(16, perceptual_quantizer), (18, hybrid_log_gamma)])
def test_high_dynamic_range(transfer, curve, tmp_path):
    """Patches of known light, in BT.2020: skin as on BT.709's screen, a lamp of 1000 cd/m2 white."""
    skin = np.array([[200, 40, 40], [150, 110, 90], [60, 120, 60], [20, 30, 140], [128, 128, 128]])
    light = np.vstack([(skin / 255) ** 2.4 * 100, [[1000, 1000, 1000]]])        # cd/m2
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    y = curve(light @ to_2020.T)
    picture = np.repeat(np.repeat(y[None], 64, 0), 64, 1)                       # (64, 6 * 64, 3)
    deep = av.VideoFrame.from_ndarray((picture * 65535).astype(np.uint16), "rgb48le")
    deep = deep.reformat(format="yuv444p10le", dst_colorspace="bt2020")
    tags = dict(color_trc=transfer, color_primaries=9, colorspace=9, color_range=1)
    path = encode(tmp_path / "x.mkv", [deep], pixels="yuv444p10le", options={"crf": "4"}, tags=tags)
    seen = next(iter(data.Video(path)))[32, 32::64].astype(int)
    dim = ((skin / 255) ** 2.4).max(1) < 0.3                                    # what tone mapping leaves alone
    assert dim.sum() == 4 and abs(seen[:-1][dim] - skin[dim]).max() <= 4
    assert 225 < seen[0, 0] <= 255 or 170 < seen[0, 0] < 201                    # bent, not cut
    assert seen[-1].min() > 250


def test_profiles_of_pictures(tmp_path):
    """A profile whose red primary is sRGB's blue and the other way round: what is stored red shows blue."""
    raw = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    place = {raw[i:i + 4]: int.from_bytes(raw[i + 4:i + 8], "big") for i in range(132, 132 + 12 * raw[131], 12)}
    swapped = bytearray(raw)
    for ours, other in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        swapped[place[ours]:place[ours] + 20] = raw[place[other]:place[other] + 20]
    for ending in ("png", "jpg"):
        path = tmp_path / f"x.{ending}"
        Image.new("RGB", (32, 32), (220, 60, 30)).save(path, icc_profile=bytes(swapped), **dict(quality=97) if ending == "jpg" else {})
        assert abs(data.read_picture(path).mean((0, 1)) - (30, 60, 220)).max() < 4
        assert abs(next(iter(data.Video(path))).mean((0, 1)) - (30, 60, 220)).max() < 4
    Image.new("RGB", (32, 32), (220, 60, 30)).save(tmp_path / "torn.png", icc_profile=b"no profile" * 20)
    assert (data.read_picture(tmp_path / "torn.png") == (220, 60, 30)).all()


def stamped(path, clock):
    return encode(path, coded(len(clock)), "mjpeg", pixels="yuvj420p", clock=clock)


PACKET = 188                                                                    # bytes, of a transport stream


def test_clocks_of_transport_streams(tmp_path):
    """A recording that begins between key frames; two joined, whose clock begins again."""
    path = encode(tmp_path / "x.ts", coded(60), options={"bf": "2", "g": "30"})
    raw = path.read_bytes()
    quarter = len(raw) // PACKET // 4 * PACKET
    (tmp_path / "late.ts").write_bytes(raw[:3 * PACKET] + raw[quarter:])
    (tmp_path / "twice.ts").write_bytes(raw + raw)
    assert numbers(tmp_path / "late.ts") == list(range(30, 60)) and data.Video(tmp_path / "late.ts").fps == 25
    assert numbers(tmp_path / "twice.ts") == [*range(60)] * 2 and data.Video(tmp_path / "twice.ts").fps == 25


@pytest.mark.parametrize("clock", [
    [0] * 12, [5000] * 12, [0, 40, 80, 7200120, 7200160, 7200200], [0, 120000, 240000]])
def test_seams_are_no_rates(clock, tmp_path):
    video = data.Video(stamped(tmp_path / "x.mkv", clock))
    assert len(video) == len(clock) and video.fps == 25
    assert [number(frame) for frame in video] == list(range(len(clock)))


@pytest.mark.parametrize("begins", [(0, 0, 0), (7200, 0), (0, 7200, 14400), (3600, 0, 7200)])
def test_joined_clocks_that_go_back_or_leap(begins, tmp_path):
    raw = b""
    for begin in begins:
        clock = [1000 * begin + 40 * k for k in range(12)]
        raw += encode(tmp_path / "x.ts", coded(12), options={"bf": "0"}, clock=clock).read_bytes()
    (tmp_path / "x.ts").write_bytes(raw)
    assert numbers(tmp_path / "x.ts") == [*range(12)] * len(begins) and data.Video(tmp_path / "x.ts").fps == 25


def test_frames_left_out_of_a_constant_rate(tmp_path):
    clock = [40 * k for k in range(60) if k not in (7, 20, 21, 50)]
    video = data.Video(stamped(tmp_path / "x.mkv", clock))
    assert len(list(video)) == len(video) == 60 and video.fps == 25 and sorted(set(video.repeats)) == [1, 2, 3]


def test_invisible_frames_are_none(tmp_path):
    """VP8's alternate references are packets without a picture. Here: key frames again, not shown."""
    path = encode(tmp_path / "x.webm", coded(40), "libvpx", options={"g": "20", "b": "1M"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "y.webm"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if not packet.size:
                continue
            raw, pts, unit, key = bytes(packet), packet.pts, packet.time_base, packet.is_keyframe
            for later in range(1 + 3 * key):
                copy = av.Packet(bytes([raw[0] & ~16 if later else raw[0]]) + raw[1:])
                copy.pts = copy.dts = pts + 10 * later
                copy.time_base, copy.stream, copy.is_keyframe = unit, stream, key
                out.mux_one(copy)
    assert numbers(tmp_path / "y.webm") == list(range(40)) and data.Video(tmp_path / "y.webm").fps == 25


def test_frames_in_avi_that_has_no_times_for_them(tmp_path):
    path = encode(tmp_path / "x.avi", coded(40), "mpeg4", options={"bf": "2", "b": "2M"})
    assert numbers(path) == list(range(40)) and data.Video(path).fps == 25


def test_packets_that_do_not_decode(tmp_path):
    """At the beginning they are skipped, later they are named."""
    for broken, name in ((0, "early"), (6, "late")):
        with av.open(str(stamped(tmp_path / "x.mkv", [40 * k for k in range(12)]))) as source:
            with av.open(str(tmp_path / f"{name}.mkv"), "w") as out:
                stream = out.add_stream_from_template(source.streams.video[0])
                for k, packet in enumerate(p for p in source.demux(video=0) if p.size):
                    copy = av.Packet(b"noise" * 99 if k == broken else bytes(packet))
                    copy.pts = copy.dts = packet.pts
                    copy.time_base, copy.stream, copy.is_keyframe = packet.time_base, stream, True
                    out.mux_one(copy)
    assert numbers(tmp_path / "early.mkv") == list(range(1, 12))
    with pytest.raises(sdit.UserError, match="late.mkv cannot be decoded beyond frame 6"):
        data.Video(tmp_path / "late.mkv")


def test_cuts_and_offsets_stay(tmp_path):
    """An edit list that begins between key frames; a file that begins at five seconds."""
    path = encode(tmp_path / "x.mp4", coded(50), options={"g": "25", "bf": "0"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.pts is not None:
                packet.pts = packet.dts = packet.pts + round(5 / packet.time_base)
                packet.stream = stream
                out.mux(packet)
    late = data.Video(tmp_path / "late.mkv")
    assert late.start == pytest.approx(5, abs=0.002) and numbers(tmp_path / "late.mkv") == list(range(50)) and late.fps == 25
    raw = bytearray(path.read_bytes())
    at = raw.index(b"elst") + 16                                                # its length, in 1/1000 s, then its begin
    unit = int.from_bytes(raw[raw.index(b"mdhd") + 16:raw.index(b"mdhd") + 20], "big")
    raw[at - 4:at + 4] = (1600).to_bytes(4, "big") + (unit * 10 // 25).to_bytes(4, "big")
    path.write_bytes(raw)
    assert numbers(path) == list(range(10, 50)) and data.Video(path).fps == 25


def test_a_cover_is_no_video_and_the_default_stream_is_taken(tmp_path):
    def write(path, default, disposition=None):
        with av.open(str(path), "w") as out:
            cover = out.add_stream("mjpeg", rate=25)
            film, other = (out.add_stream("libx264", rate=25) for _ in range(2))
            cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
            for stream in (film, other):
                stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
                stream.disposition = Disposition.default if stream is (film, other)[default] else Disposition(0)
            cover.disposition = Disposition.attached_pic
            grey = np.full((64, 64, 3), 128, np.uint8)
            for stream, frames in ((cover, [grey]), (film, coded(12)), (other, coded(24)[12:])):
                for i, frame in enumerate([*frames, None]):
                    frame = frame if frame is None else av.VideoFrame.from_ndarray(frame, "rgb24")
                    if frame is not None:
                        frame.pts, frame.time_base = i, Fraction(1, 25)
                    out.mux(stream.encode(frame))
        return path
    assert numbers(write(tmp_path / "x.mp4", 0)) == list(range(12))
    assert numbers(write(tmp_path / "x.mkv", 1)) == list(range(12, 24))
    with av.open(str(tmp_path / "song.m4a"), "w", "mp4") as out:
        voice, cover = out.add_stream("aac", rate=44100), out.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 64, "yuvj420p", Disposition.attached_pic
        for packet in cover.encode(av.VideoFrame.from_ndarray(QUARTERS[:64, :64].copy(), "rgb24")):
            out.mux(packet)
        out.mux(voice.encode(None))
    with pytest.raises(sdit.UserError, match="no video stream"):
        data.Video(tmp_path / "song.m4a")


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "avif"])
def test_an_animation_gives_its_first_face(ending, clip, landmarker, tmp_path):
    face, grey = Image.fromarray(clip[0][0]), Image.new("RGB", (128, 128), "grey")
    path = tmp_path / f"x.{ending}"
    grey.save(path, save_all=True, append_images=[face, grey], duration=80)
    assert sample.read_source(path, landmarker, 64, 0)[2] == 1
    assert len(list(data.Video(path))) == len(data.Video(path)) > 1             # as a driving video


def test_heic_is_named_and_never_a_tile(tmp_path):
    raw = bytearray(encode(tmp_path / "x.mp4", coded(1)).read_bytes())
    raw[8:12] = b"heic"   # what the name of the format says; FFmpeg would decode one tile
    for name in ("x.heic", "x.jpg", "x.bin"):
        (tmp_path / name).write_bytes(raw)
        for read in (data.read_picture, data.Video):
            with pytest.raises(sdit.UserError, match="HEIC needs pip install pillow-heif"):
                read(tmp_path / name)


def test_postscript_is_no_picture(tmp_path, monkeypatch):
    """Whatever its name: PIL would hand it to Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a) or Image.new("RGB", (9, 9)))
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n%%EOF\n"
    for name in ("x.png", "x.jpg", "x.eps"):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(sdit.UserError):
            data.Video(tmp_path / name)
    assert not started


def voiced(path, rate=48000, codec="pcm_s16le", at=0.8, M=50):
    """Coded frames, of which one is white, and a beep at the same time, `at` seconds."""
    frames = coded(M, 64, 64)
    frames[:] = 0
    frames[round(at * 25)] = 255
    sound = np.zeros((1, rate * M // 25), np.float32)
    sound[0, round(at * rate):round((at + 0.04) * rate)] = np.sin(np.arange(round(0.04 * rate)) * 0.3)
    with av.open(str(path), "w") as out:
        stream, voice = out.add_stream("libx264", rate=25), out.add_stream(codec, rate=rate, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode(None))
        tone = av.AudioFrame.from_ndarray(sound, "fltp", "mono")
        tone.rate, tone.pts = rate, 0
        out.mux(voice.encode(tone))
        out.mux(voice.encode(None))
    return path


def written(source, path):
    """(codecs of the sound, milliseconds from each white frame to its beep) of a film written anew."""
    video = data.Video(source)
    with data.VideoWriter(path, video.fps, "", video) as out:
        for frame in video:
            out.write(frame)
    white = np.flatnonzero([frame.mean() > 100 for frame in data.Video(path)]) / float(video.fps)
    with av.open(str(path)) as f:
        codecs = [s.codec_context.name for s in f.streams.audio]
        loud = []
        for frame in f.decode(audio=0) if codecs else ():
            samples = abs(frame.to_ndarray().astype(float)).max(0)
            loud += (float(frame.pts * frame.time_base) + np.flatnonzero(samples > 0.2) / frame.rate).tolist()
    beeps = [t for i, t in enumerate(loud) if i == 0 or t - loud[i - 1] > 0.3]
    return codecs, [1000 * abs(a - b) for a, b in zip(white, beeps)]


@pytest.mark.parametrize("rate,source,out,codec", [
    (192000, "x.mov", "o.mp4", "aac"), (37800, "x.mov", "o.mp4", "aac"), (5512, "x.mov", "o.mkv", "aac")])
def test_sound_of_any_rate(rate, source, out, codec, tmp_path):
    codecs, apart = written(voiced(tmp_path / source, rate), tmp_path / out)
    assert codecs == [codec] and len(apart) == 1 and apart[0] < 2


def test_sound_that_the_container_refuses_is_coded_anew(tmp_path):
    codecs, apart = written(voiced(tmp_path / "x.mkv", 44100, "libmp3lame"), tmp_path / "o.m4v")
    assert codecs == ["aac"] and len(apart) == 1


def test_sound_stays_in_sync_over_seams(tmp_path):
    raw = voiced(tmp_path / "x.ts", 48000, "aac").read_bytes()
    (tmp_path / "cat.ts").write_bytes(raw * 3)
    codecs, apart = written(tmp_path / "cat.ts", tmp_path / "o.mp4")
    assert codecs == ["aac"] and len(apart) == 3 and max(apart) < 2


def test_sound_without_a_decoder_is_left_out_before_the_work(tmp_path, clip, capsys, monkeypatch):
    write_video(tmp_path / "x.mkv", clip[0], sound="libmp3lame")
    raw = (tmp_path / "x.mkv").read_bytes()
    (tmp_path / "x.mkv").write_bytes(raw.replace(b"A_MPEG", b"A_NONE"))

    def work(*args):
        said.append(capsys.readouterr().out)
        return make(*args)
    make, said = sample.sample_video, []
    monkeypatch.setattr(sample, "sample_video", work)
    sample.reenact(driving=tmp_path / "x.mkv", out=tmp_path / "o.mp4", steps=1, guidance=1)
    assert f"the sound of {tmp_path / 'x.mkv'} is left out" in said[0] and "left out" not in capsys.readouterr().out
    with av.open(str(tmp_path / "o.mp4")) as f:
        assert not f.streams.audio


@pytest.mark.parametrize("size,ending", [(64, "mp4"), (80, "mkv"), (400, "mov"), (256, "mkv")])
def test_two_runs_give_the_same_file(size, ending, tmp_path):
    driving = data.Video(voiced(tmp_path / "x.mov", M=24))
    noise = np.random.default_rng(0).integers(0, 255, (24, size // 8, size // 8, 3), np.uint8)
    frames, files = [cv2.resize(frame, (size, size)) for frame in noise], set()
    for run in range(2):
        dirt = np.full((40 + run, 2 ** 20), 255 * (run % 2), np.uint8)          # other memory each time
        del dirt
        with data.VideoWriter(tmp_path / f"o.{ending}", 25, "synthetic", driving) as out:
            for frame in frames:
                out.write(frame)
        files.add((tmp_path / f"o.{ending}").read_bytes())
    assert len(files) == 1 and b"mbtree=0" in files.pop()


def test_what_is_written_large_says_its_colours(tmp_path):
    orange = np.full((720, 128, 3), (230, 120, 40), np.uint8)
    with data.VideoWriter(tmp_path / "o.mp4", 25) as out:
        out.write(orange)
    with av.open(str(tmp_path / "o.mp4")) as f:
        frame = next(f.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    assert abs(next(iter(data.Video(tmp_path / "o.mp4"))).mean((0, 1)) - (230, 120, 40)).max() < 3


def test_a_still_for_a_still(tmp_path, clip, monkeypatch):
    """--driving of a picture, turned by its EXIF note, --out of a picture that says it is synthetic; enlarged to 256."""
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(clip[0][0]).copy()).save(tmp_path / "x.png", exif=turned)
    write_video(tmp_path / "x.mp4", clip[0])
    models, options = sample.load_models(), dict(steps=1, guidance=1)
    files = set()
    for _ in range(2):
        sample.reenact(driving=tmp_path / "x.png", out=tmp_path / "o.png", model=models, compare=True, **options)
        files.add((tmp_path / "o.png").read_bytes())
    image = Image.open(io.BytesIO(files.pop()))
    assert not files and image.size == (256, 256) and image.text["Comment"].startswith("synthetic")
    assert Image.open(tmp_path / "o-compare.png").size == (768, 256)
    monkeypatch.setattr(sample, "sample_video", None)
    with pytest.raises(sdit.UserError, match="o.png cannot hold 12 frames"):
        sample.reenact(driving=tmp_path / "x.mp4", out=tmp_path / "o.png", model=models, **options)


def test_frames_of_one_time_stop_neither_data_nor_sample(tmp_path, clip, monkeypatch):
    (tmp_path / "clips").mkdir()
    path = encode(tmp_path / "clips" / "x.mkv", list(clip[0]), "mjpeg", pixels="yuvj420p", clock=[0] * 12)
    sample.reenact(driving=path, out=tmp_path / "o.mp4", steps=1, guidance=1)
    assert len(list(data.Video(tmp_path / "o.mp4"))) == 12
    monkeypatch.setattr("sys.argv", ["data.py", str(tmp_path / "clips"), "--out", str(tmp_path / "cache")])
    data.main()
    assert len(data.Rows(tmp_path / "cache", 2)) == 1
