"""Data: true timing of real video files, the face crop, the expressive mask, records and training rows."""
import json
import os
from fractions import Fraction

import av
import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

import data
import sdit
from conftest import cache_settings, write_video


def shades(M, h=64, w=96):
    """Frames of rising brightness, the left half darker than the right, so that order and rotation can be read off."""
    frames = np.full((M, h, w, 3), 0, np.uint8) + (20 + np.arange(M) * 200 // max(M - 1, 1)).astype(np.uint8)[:, None, None, None]
    frames[:, :, :w // 2] //= 2
    return frames


def test_constant_rate_ntsc(tmp_path):
    path, frames = tmp_path / "ntsc.mp4", shades(30)
    write_video(path, frames, Fraction(30000, 1001))
    video = data.Video(path)
    read = np.stack(list(video))
    assert video.fps == Fraction(30000, 1001) and len(video) == 30 and read.shape == frames.shape
    assert abs(read.astype(int) - frames).mean() < 3


def test_variable_rate_is_resampled_by_time(tmp_path):
    times = np.concatenate([np.arange(10) / 30, 10 / 30 + np.arange(10) / 10])  # ten frames fast, ten slow
    write_video(tmp_path / "vfr.mp4", shades(20), 30, times=times)
    video = data.Video(tmp_path / "vfr.mp4")
    read = np.stack(list(video))
    assert len(read) == len(video) == 20 and abs(float(video.fps) - 19 / times[-1]) < 0.1
    shown = [np.searchsorted(times, k / float(video.fps) + 2e-5, "right") - 1 for k in range(20)]
    assert abs(read.astype(int) - shades(20)[shown]).mean() < 3 and len(set(shown)) < 20


def test_rotation_is_applied(tmp_path):
    path, frames = tmp_path / "phone.mp4", shades(3)
    write_video(path, frames)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40                                            # the display matrix of the first track
    raw[at:at + 36] = np.array([0, 0x10000, 0, -0x10000, 0, 0, 64 << 16, 0, 0x40000000], ">i4").tobytes()
    path.write_bytes(raw)
    read = next(iter(data.Video(path)))
    assert read.shape == (96, 64, 3)
    assert read[:40].mean() < 0.7 * read[56:].mean()                            # turned clockwise: the dark left half is on top


def test_what_is_not_a_video(tmp_path):
    for name, content, message in (("text.mp4", b"hello" * 100, "not a video"), ("empty.mp4", b"", "is empty")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(sdit.UserError, match=message):
            data.Video(tmp_path / name)
    with pytest.raises(sdit.UserError, match="no such file"):
        data.Video(tmp_path / "none.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        voice = out.add_stream("aac", rate=44100)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        tone.rate = 44100
        out.mux(voice.encode(tone))
        out.mux(voice.encode(None))
    with pytest.raises(sdit.UserError, match="no video stream"):
        data.Video(tmp_path / "sound.mp4")


def probe(path):
    with av.open(str(path)) as f:
        sound = [(s.codec_context.name, float(sum(p.duration for p in f.demux(s)) * s.time_base)) for s in f.streams.audio]
        return f.streams.video[0].average_rate, dict(f.metadata), sound


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
def test_writer_keeps_frames_rate_sound_and_says_synthetic(tmp_path, rate):
    driving = write_video(tmp_path / "driving.mp4", shades(50), rate, sound="aac")
    with data.VideoWriter(tmp_path / "out.mp4", rate, "synthetic", data.Video(driving)) as out:
        for frame in shades(50, 32, 32):
            out.write(frame)
    found, metadata, sound = probe(tmp_path / "out.mp4")
    assert found == rate and metadata["comment"] == "synthetic" and len(list(data.Video(tmp_path / "out.mp4"))) == 50
    (codec, seconds), = sound
    assert codec == "aac" and abs(seconds - 50 / rate) < 0.1
    with data.VideoWriter(tmp_path / "part.mp4", rate, "", data.Video(driving), (0.4, 1.2)) as out:
        out.write(shades(1, 32, 32)[0])
    assert abs(probe(tmp_path / "part.mp4")[2][0][1] - 0.8) < 0.06


def test_sound_that_mp4_players_do_not_know_is_recoded(tmp_path):
    driving = write_video(tmp_path / "driving.mkv", shades(20), 25, sound="pcm_s16le")
    with data.VideoWriter(tmp_path / "out.mp4", 25, "", data.Video(driving)) as out:
        out.write(shades(1, 32, 32)[0])
    (codec, seconds), = probe(tmp_path / "out.mp4")[2]
    assert codec == "aac" and abs(seconds - 0.8) < 0.06


def test_writer_leaves_nothing_after_a_failure(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"older")
    with pytest.raises(RuntimeError):
        with data.VideoWriter(tmp_path / "out.mp4", 25) as out:
            out.write(shades(1, 32, 32)[0])
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"] and (tmp_path / "out.mp4").read_bytes() == b"older"
    with pytest.raises(sdit.UserError, match="cannot write"):
        with data.VideoWriter(tmp_path / "out.nonsense", 25):
            pass


def test_pictures_of_all_kinds(tmp_path):
    grey = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (20, 1))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([grey, grey, grey, np.full_like(grey, 0)])).save(tmp_path / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6                                                          # the camera was held upright
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "turned.png", exif=turned)
    assert abs(data.read_picture(tmp_path / "grey.png")[..., 0].astype(int) - grey).max() == 0
    assert abs(data.read_picture(tmp_path / "deep.png")[..., 0].astype(int) - grey).max() <= 1
    assert (data.read_picture(tmp_path / "clear.png") == 255).all()
    assert data.read_picture(tmp_path / "turned.png").shape == (40, 20, 3)
    (tmp_path / "x.bin").write_bytes(b"no picture")
    assert data.read_picture(tmp_path / "x.bin") is None
    whole = (tmp_path / "clear.png").read_bytes()
    for torn in (b"no picture", whole[:len(whole) // 2], whole[:40]):
        (tmp_path / "x.png").write_bytes(torn)
        with pytest.raises(sdit.UserError, match="x.png is not a picture"):
            data.read_picture(tmp_path / "x.png")


def test_crop_mirrors_outside_and_landmarks_follow(clip, landmarker):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    cut = data.crop(image, (-2, 0, 6))
    assert (cut[:4, 2:] == image).all() and (cut[:4, 1] == image[:, 1]).all() and (cut[4] == cut[2]).all()
    tracked = data.track(clip[0], landmarker, "clip")
    assert tracked.found.all() and tracked.landmarks.shape == (12, 478, 3)
    box = np.median(np.ptp(tracked.landmarks[:, :468, :2], 1), 0)
    assert max(box / (data.FACE_WIDTH, data.FACE_HEIGHT)) == pytest.approx(1, abs=0.02)
    centre = np.median((tracked.landmarks[:, :468, :2].min(1) + tracked.landmarks[:, :468, :2].max(1)) / 2, 0)
    assert abs(centre - 0.5).max() < 0.02
    again = landmarker.landmarks(data.crop(clip[0][3], tracked.square, 256)) / 256  # found in the crop itself: the same place
    assert np.abs(again - tracked.landmarks[3])[:, :2].mean() < 0.01


def test_missed_frames_are_interpolated_and_counted(clip, landmarker):
    frames = clip[0].copy()
    frames[4:6] = 127
    tracked, whole = data.track(frames, landmarker, "clip"), data.track(clip[0], landmarker, "clip")
    assert len(tracked.found) == 12 and np.flatnonzero(~tracked.found).tolist() == [4, 5]
    step = tracked.landmarks[4] - tracked.landmarks[3]
    np.testing.assert_allclose(tracked.landmarks[6] - tracked.landmarks[3], 3 * step, atol=1e-5)
    np.testing.assert_allclose(tracked.landmarks[7], whole.landmarks[7], atol=0.02)
    with pytest.raises(sdit.UserError, match="no face found in blank"):
        data.track(np.full((3, 64, 64, 3), 127, np.uint8), landmarker, "blank")


def test_a_face_elsewhere_after_a_cut_is_followed_again(monkeypatch):
    """After 24 frames without the face the largest is taken; before that, another person's is not."""
    here, there = np.zeros((478, 3), np.float32), np.zeros((478, 3), np.float32)
    here[:, :2] = np.random.default_rng(0).uniform(10, 20, (478, 2))
    there[:, :2] = here[:, :2] + 100
    landmarker = data.FaceLandmarker.__new__(data.FaceLandmarker)
    monkeypatch.setattr(landmarker, "everyone", lambda image: iter([here if image == 0 else there]), raising=False)
    tracked = data.track([0] * 3 + [1] * 30, landmarker, "a film")
    assert tracked.found.tolist() == [True] * 3 + [False] * 24 + [True] * 6
    near = here + np.float32([1, 1, 0])
    monkeypatch.setattr(landmarker, "everyone", lambda image: iter([there, here + np.float32([6, 0, 0]), near]))
    assert landmarker(0, here) is near                                          # of those that overlap, the one that does most


def test_a_small_face_is_found_and_the_same_person_followed(clip, landmarker):
    scene = np.full((480, 854, 3), 90, np.uint8)
    scene[40:168, 60:188] = clip[0][0]                                          # about 70 pixels high: too small for the mesh alone
    assert landmarker.landmarks(scene) is None
    points = landmarker(scene)
    assert 60 < points[:, 0].min() and points[:, 0].max() < 188
    scene[200:456, 500:756] = np.kron(clip[0][5], np.ones((2, 2, 1), np.uint8))
    assert landmarker(scene)[:, 0].min() > 500                                  # the largest
    assert landmarker(scene, near=points)[:, 0].max() < 188                     # the one followed


def test_a_face_seen_only_in_the_whole_picture_must_be_found_again(landmarker, clip, monkeypatch):
    """What MediaPipe's mesh does to a llama: points in the whole picture, none in the square around them."""
    points = landmarker.landmarks(clip[0][0])
    monkeypatch.setattr(landmarker, "faces", lambda image: [])
    assert landmarker(clip[0][0]) is not None                                   # a face that fills the picture
    monkeypatch.setattr(landmarker, "landmarks", lambda image, square=None: None if square else points)
    assert landmarker(clip[0][0]) is None


def test_expressive_points_and_mask():
    from mediapipe.python.solutions import face_mesh_connections as facts
    points = lambda *sets: {i for s in sets for pair in s for i in pair}
    assert set(data.LIPS) == points(facts.FACEMESH_LIPS) and len(data.LIPS) == 40
    assert set(data.RIGHT_EYE) == points(facts.FACEMESH_RIGHT_EYE) and set(data.LEFT_EYE) == points(facts.FACEMESH_LEFT_EYE)
    assert len(set(data.EXPRESSIVE)) == 82
    landmarks = np.zeros((478, 3), np.float32)
    square = lambda n: np.array([(0, 0), (1, 0), (1, 1), (0, 1)])[np.arange(n) % 4]
    landmarks[data.LIPS, :2] = 0.5 + 0.25 * square(40)                          # cells 4 and 5 of 8, both ways
    for part in (data.RIGHT_EYE + data.IRISES[:5], data.LEFT_EYE + data.IRISES[5:]):
        landmarks[part, :2] = 0.25 + 0.125 * square(21)
    mask = data.expressive_mask(landmarks, 8) / 255.0
    expected = np.zeros((8, 8))
    expected[4:6, 4:6] = expected[2, 2] = 1
    assert abs(mask - expected).max() < 0.1


def test_source_is_the_furthest_frame_and_never_a_target():
    """Paper 3.1: "furthest in time from the chosen sequence ... either the first or last frame of the entire video"."""
    rng, ends = np.random.default_rng(0), set()
    for _ in range(500):
        M, T = int(rng.integers(10, 40)), 8
        times, source = data.choose_frames(rng, np.ones(M, bool), T)
        assert len(set(times)) == T and (np.diff(times) > 0).all()
        distance = [min(abs(times - f)) for f in range(M)]
        assert source in (0, M - 1) and distance[source] == max(distance[0], distance[M - 1])
        assert distance[source] > 0
        ends.add(source == 0)
    assert ends == {True, False}
    gaps = np.concatenate([np.diff(data.choose_frames(rng, np.ones(40, bool), 8)[0]) for _ in range(200)])
    assert gaps.min() == 1 and gaps.max() > 10 and gaps.std() > 2               # non-uniform
    found = np.arange(40) % 2 == 0
    assert all(found[data.choose_frames(rng, found, 8)[0]].all() for _ in range(20))


def record(M, value, C=4, H=8, S=16):
    return dict(latent=np.full((M, C, H, H), value, np.float16) + np.arange(M, dtype=np.float16)[:, None, None, None] / 64,
                landmarks=np.random.default_rng(value).random((M, 478, 3)).astype(np.float16), found=np.ones(M, bool),
                weight=np.full((M, H, H), 51, np.uint8), scene=np.stack([np.full(S, value), np.full(S, -value)]).astype(np.float16),
                fps=np.array([25, 1]))


def write_cache(folder, values, frames=12, **about):
    writer = data.CacheWriter(folder, cache_settings(size=32) | about)
    entries = [dict(file=f"{value:03d}", frames=frames) for value in values]
    for value, entry in zip(values, entries):
        writer.add(record(frames, value), entry)
    old = data.read_lines(sorted(folder.glob("manifest.jsonl")))
    writer.finish(old + entries)
    return folder


def clip_of(row):
    """The value of `record` that a row was cut from."""
    return int(row["latents"][0, 0, 0, 0])


def test_cache_rows(tmp_path):
    write_cache(tmp_path, range(1, 5))
    write_cache(tmp_path, [5], frames=9)                                        # too short for rows of 8
    assert [n for _, n in json.loads((tmp_path / "index.json").read_text())["clips"]] == [12] * 4 + [9]
    rows = data.Rows(tmp_path, 8, seed=1)
    assert len(rows) == 5
    seen = [rows[n] for n in range(10)]
    for row in seen:
        assert row["latents"].shape == (8, 4, 8, 8) and row["landmarks"].shape == (8, 478, 3)
        value = clip_of(row)
        times = ((row["latents"][:, 0, 0, 0] - value) * 64).round()
        assert row["scene"][0].abs() == value
        first = times[0] >= 11 - times[-1]
        assert (row["scene"][0] > 0) == first                                   # the scene is the furthest end's
        assert torch.allclose(row["mask"], torch.tensor(0.2))
    for epoch in (seen[:5], seen[5:]):                                          # every clip once; in place of the short one its follower
        assert {clip_of(r) for r in epoch} == {1, 2, 3, 4}
    again = data.Rows(tmp_path, 8, seed=1)[5]
    assert all(torch.equal(again[k], seen[5][k]) for k in again)                # a function of (seed, n) alone
    statistics = rows.statistics()
    assert {k: tuple(v.shape) for k, v in statistics.items()} == dict(landmark_mean=(478, 3), landmark_basis=(1434, 64),
                                                                      scene_mean=(16,), scene_gain=())
    with pytest.raises(sdit.UserError, match="no cache in"):
        data.Rows(tmp_path / "none", 8)
    with pytest.raises(sdit.UserError, match="no clip in"):
        data.Rows(tmp_path, 11)


def test_signals_are_normalised(tmp_path):
    """Three movements, the least a hundred times smaller than the first: three components of unit variance, uncorrelated; then nothing.
    Scenes that are nearly alike: mean 0, and the total variance of 64 whitened components."""
    rng, writer = np.random.default_rng(0), data.CacheWriter(tmp_path, cache_settings(size=32))
    moves = rng.normal(size=(3, 478, 3)) * np.array([0.1, 0.01, 0.001])[:, None, None]
    amounts = rng.normal(size=(20, 12, 3))
    scenes = (1 + 0.5 * rng.normal(size=(20, 2, 16))).astype(np.float16)
    for number, amount in enumerate(amounts):
        landmarks = 0.5 + np.tensordot(amount, moves, 1)                        # (12, 478, 3)
        writer.add(record(12, number) | dict(landmarks=landmarks.astype(np.float16), scene=scenes[number]), dict(file=str(number), frames=12))
    writer.finish([dict(file=str(number), frames=12) for number in range(20)])
    mapping, seen = sdit.Mapping(32, 16), []
    for name, value in data.Rows(tmp_path, 8).statistics().items():
        getattr(mapping, name).copy_(value)
    mapping.input.register_forward_pre_hook(lambda _, x: seen.append(x[0][0, :, 16:] if not seen else x[0][:, 0, :16]))
    mapping(None, 0.5 + torch.from_numpy(np.tensordot(amounts[:, ::4].reshape(1, -1, 3), moves, 1)).float())
    covariance = seen[0].T @ seen[0] / len(seen[0])
    torch.testing.assert_close(covariance[:3, :3], torch.eye(3), atol=0.05, rtol=0)
    assert covariance[3:, 3:].abs().max() < 0.2                                 # rounding to float16

    mapping(torch.from_numpy(scenes).flatten(0, 1).float())
    torch.testing.assert_close(seen[1].mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[1].square().sum(1).mean(), torch.tensor(64.0))


def test_long_clips_do_not_fill_the_memory(tmp_path, monkeypatch):
    """The statistics of a clip of 10,000 frames come from a hundred of them at the most."""
    writer = data.CacheWriter(tmp_path, cache_settings(size=32))
    for frames in (12, 10_000):
        few = record(12, frames)                                                # its latents do not matter here
        landmarks = np.random.default_rng(0).normal(size=(frames, 478, 3)).astype(np.float16)
        writer.add(few | dict(landmarks=landmarks), dict(file=str(frames), frames=frames))
    writer.finish([dict(file=str(frames), frames=frames) for frames in (12, 10_000)])
    seen, cat = [], torch.cat
    monkeypatch.setattr(data.torch, "cat", lambda parts, *rest: seen.extend(map(len, parts)) or cat(parts, *rest))
    data.Rows(tmp_path, 8).statistics()
    assert sorted(seen)[-1] <= 100 and 3 in seen


def test_the_digest_of_a_file_that_changes(tmp_path):
    (tmp_path / "model").write_bytes(b"one")
    before = data.sha256(tmp_path / "model")
    (tmp_path / "model").write_bytes(b"two")
    os.utime(tmp_path / "model", ns=(1, 1))
    assert data.sha256(tmp_path / "model") != before


def test_a_mended_clip_is_waited_for(tmp_path, monkeypatch):
    """A rank that comes to the end while another makes a clip anew, which was left out before, does not write the index."""
    writer, path = data.CacheWriter(tmp_path / "cache", cache_settings(size=32)), tmp_path / "clip.mp4"
    path.write_bytes(b"bad")
    writer.add({}, dict(file="clip.mp4", rejected="bad", changed=data.changed(path)))
    os.utime(path, ns=(1, 1))
    data.finish_cache(writer, {"clip.mp4": path})
    assert not (tmp_path / "cache" / "index.json").exists()
    writer.add(record(12, 1), dict(file="clip.mp4", frames=12))
    data.finish_cache(writer, {"clip.mp4": path})
    assert (tmp_path / "cache" / "index.json").exists()


def test_caches_mix_in_shares(tmp_path):
    a, b = write_cache(tmp_path / "a", range(1, 5)), write_cache(tmp_path / "b", range(11, 14))
    rows = data.Rows([f"{a}:0.75", f"{b}:0.25"], 8, seed=1)
    seen = [clip_of(rows[n]) for n in range(400)]
    assert len(rows) == 7 and set(seen) == {1, 2, 3, 4, 11, 12, 13}
    assert abs(np.mean([v > 10 for v in seen]) - 0.25) < 0.06
    again = data.Rows([f"{a}:3", f"{b}:1"], 8, seed=1)
    assert [clip_of(again[n]) for n in (399, 7, 120)] == [seen[n] for n in (399, 7, 120)]
    with pytest.raises(sdit.UserError, match="c and .*a were made with another autoencoder;"):
        data.Rows([a, write_cache(tmp_path / "c", [1], autoencoder_sha256="other")], 8)
    data.Rows([a, write_cache(tmp_path / "d", [1], autoencoder="another name of the same")], 8)
    with pytest.raises(sdit.UserError, match="positive share"):
        data.Rows([f"{a}:-1"], 8)


def test_held_out_clips_are_never_trained_on(tmp_path):
    write_cache(tmp_path, range(1, 91))
    train, held = data.Rows(tmp_path, 8), data.Rows(tmp_path, 8, held_out=True)
    assert {clip_of(train[n]) for n in range(82)} == set(range(1, 83))
    assert [clip_of(held[n]) for n in range(8)] == list(range(83, 91))


def test_a_picture_becomes_a_moving_clip(clip, landmarker):
    still, points = clip[0][0], landmarker(clip[0][0])
    frames, moved = map(np.stack, zip(*data.pseudo_clip(still, points, 5)))
    assert frames.shape == (16, *still.shape) and moved.shape == (16, 478, 3)
    for frame, there in zip(frames[::5], moved[::5]):                            # where the moved face is indeed
        seen = landmarker(frame)
        assert np.abs(seen - there).mean() < 0.02 * np.ptp(there[:, 1])
    eyes = moved[:, 263, :2] - moved[:, 33, :2]
    angle = np.degrees(np.arctan2(eyes[:, 1], eyes[:, 0]))
    assert 5 < np.ptp(angle) < 40 and abs(np.diff(angle)).max() < 15            # it turns, smoothly
    again, other = (next(data.pseudo_clip(still, points, seed))[0] for seed in (5, 6))
    assert np.array_equal(again, frames[0]) and not np.array_equal(other, frames[0])


def caching(clips, out, monkeypatch, rank=0, world=1, *more):
    monkeypatch.setattr("sys.argv", ["data.py", str(clips), "--out", str(out), *more])
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    data.main()
    return {e["file"]: e for e in map(json.loads, open(out / "manifest.jsonl"))} if (out / "index.json").exists() else None


def records(cache):
    """Every clip of a cache by file name: its latents and scenes."""
    found = {}
    for path in cache.glob("clip-*"):
        with safetensors.safe_open(path, "pt") as f:
            entry = json.loads(f.metadata()["config"])["entry"]
            if "rejected" not in entry:
                found[entry["file"]] = torch.cat([f.get_tensor(k).flatten() for k in ("latent", "scene")])
    return found


def test_caching_from_videos(tmp_path, clip, monkeypatch, capsys):
    """`python data.py`: a good clip, a picture, a faceless one, a broken one; then in two ranks, one of which dies and comes again."""
    (tmp_path / "clips" / "a").mkdir(parents=True)
    write_video(tmp_path / "clips" / "a" / "good.mp4", clip[0], 12)
    write_video(tmp_path / "clips" / "b.mp4", clip[0][::-1], 12)
    write_video(tmp_path / "clips" / "faceless.mp4", shades(5), 12)
    Image.fromarray(clip[0][3]).save(tmp_path / "clips" / "still.png")
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no")
    late = np.concatenate([np.full((3, 128, 128, 3), 90, np.uint8), clip[0]])
    write_video(tmp_path / "clips" / "late.mp4", late, 12)                      # the face comes after three frames
    entries = caching(tmp_path / "clips", tmp_path / "cache", monkeypatch)
    shown = capsys.readouterr().out
    assert "4 clips" in shown and "note: the bundled autoencoder and CLIP" in shown and entries["late.mp4"]["frames"] == 12
    assert entries["a/good.mp4"]["frames"] == 12 and entries["a/good.mp4"]["missed"] == 0 and entries["still.png"]["frames"] == 16
    assert "no face" in entries["faceless.mp4"]["rejected"] and "not a video" in entries["broken.mp4"]["rejected"]
    row = data.Rows(tmp_path / "cache", 8)[0]
    assert row["latents"].shape == (8, 16, 16, 16) and 0.3 < row["latents"].std() < 3
    assert row["scene"].norm() == pytest.approx(1, abs=0.01) and 0.004 < row["mask"].mean() < 0.2
    assert caching(tmp_path / "clips", tmp_path / "cache", monkeypatch) == entries      # torchrun starts a rank again
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(sdit.UserError, match="already holds a cache of another size"):
        caching(tmp_path / "clips", tmp_path / "cache", monkeypatch, 0, 1, "--size", "32")

    def dies(*_):
        raise KeyboardInterrupt

    def lacks_memory(*_):
        raise MemoryError
    parts, encode = tmp_path / "parts", data.encode_clip
    assert caching(tmp_path / "clips", parts, monkeypatch, 1, 2) is None        # rank 1 has b.mp4, faceless.mp4, still.png
    monkeypatch.setattr(data, "encode_clip", dies)
    with pytest.raises(KeyboardInterrupt):
        caching(tmp_path / "clips", parts, monkeypatch, 0, 2)
    monkeypatch.setattr(data, "encode_clip", lacks_memory)                      # nor is this the clip's fault: it comes again
    with pytest.raises(sdit.UserError, match="MemoryError, which is not the clip's fault"):
        caching(tmp_path / "clips", parts, monkeypatch, 0, 2)
    with pytest.raises(sdit.UserError, match="was begun with another size and latent_size"):
        caching(tmp_path / "clips", parts, monkeypatch, 0, 2, "--size", "32")
    with pytest.raises(sdit.UserError, match="is unfinished"):
        data.Rows(parts, 8)
    monkeypatch.setattr(data, "encode_clip", encode)
    assert caching(tmp_path / "clips", parts, monkeypatch, 0, 2) == entries
    whole, split = records(tmp_path / "cache"), records(parts)
    assert not list(parts.glob(".*")) and whole.keys() == split.keys() and all(torch.equal(whole[k], split[k]) for k in whole)


def test_openais_clip_has_its_own_activation():
    """Quick GELU, which open_clip's plain name leaves out and would load without a word."""
    import open_clip
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(data.OPENAI_VIT_L14))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 427.6
    assert {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__} == {"QuickGELU"}


def test_world_writes_clips_for_the_cache(world, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["world.py", str(tmp_path), "--clips", "2", "--frames", "3", "--size", "64"])
    world.main()
    assert [len(data.Video(tmp_path / f"{i:04d}.mp4")) for i in range(2)] == [3, 3]
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 2
