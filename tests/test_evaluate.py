"""The metrics against values known in closed form or from independent implementations; the protocols on a small world."""
import contextlib
import io
import json
import math
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_video
from PIL import Image

import data
import evaluate
import experiments
import sdit
from sdit import UserError


def faces(M=6, seed=0):
    """Landmarks of a made-up face that moves."""
    rng = np.random.default_rng(seed)
    return (0.5 + 0.2 * rng.standard_normal((478, 3)) + 0.05 * rng.standard_normal((M, 1, 3))).astype(np.float32)


def test_lmse_of_a_known_shift():
    points = faces()
    assert evaluate.lmse(points, points) == 0
    assert evaluate.lmse(points + np.float32([1, 2, 3]) / 256, points) == pytest.approx((1 + 4 + 9) / 3, rel=1e-3)
    assert evaluate.lmse(points + np.float32([1, 2, 3]) / 256, points, axes=2) == pytest.approx((1 + 4) / 2, rel=1e-3)
    lips = points.copy()
    lips[:, evaluate.data.EXPRESSIVE, 0] += 1 / 256
    assert len(evaluate.data.EXPRESSIVE) == 82
    assert evaluate.lmse(lips, points, evaluate.data.EXPRESSIVE) == pytest.approx(1 / 3, rel=1e-3)
    assert evaluate.lmse(lips, points) == pytest.approx(82 / 478 / 3, rel=1e-3)
    lips[2] = np.nan                                                            # a frame that was missed
    assert evaluate.lmse(lips, points, evaluate.data.EXPRESSIVE) == pytest.approx(1 / 3, rel=1e-3)
    assert math.isnan(evaluate.lmse(np.full_like(points, np.nan), points))


def test_laid_onto_takes_out_pose_and_size(world):
    points, turn = faces(), world.rotation(20, 10, 5)
    moved = 0.8 * points @ turn.T + np.float32([0.1, -0.2, 0.3])
    assert evaluate.lmse(moved, points) > 100
    assert evaluate.lmse(evaluate.laid_onto(moved, points), points) < 1e-3


def test_csim_of_known_vectors():
    angles = np.radians([0, 10, 40, 25])
    made = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert evaluate.csim(np.array([1.0, 0]), made) == pytest.approx(math.cos(math.radians(40)))
    driving = made[[0, 1, 3, 1]]
    assert evaluate.self_csim(made, driving) == pytest.approx(math.cos(math.radians(25)) - math.cos(math.radians(40)))
    assert evaluate.self_csim(made, made) == 0


def test_frechet_distance_of_two_gaussians():
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), here with diagonal covariances; samples are made to have them exactly."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T                    # mean 0, covariance 1
    a, b = x * [1, 2, 3, 4], x * [2, 2, 1, 5] + [1, 0, 0, 2]
    assert evaluate.frechet(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4 + 1, rel=1e-6)
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert abs(evaluate.kernel_distance(a[:250], a[250:])) < evaluate.kernel_distance(a, b)


def test_ssim_and_psnr():
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert evaluate.ssim(x, x) == pytest.approx(1)
    flat = torch.full_like(x, 0.0)                                              # 0.5 and 0.25 in 0..1: only the means differ
    assert evaluate.ssim(flat, flat - 0.5) == pytest.approx((2 * 0.5 * 0.25 + 1e-4) / (0.5 ** 2 + 0.25 ** 2 + 1e-4), rel=1e-3)
    assert evaluate.psnr(flat, flat + 0.2) == pytest.approx(20, rel=1e-4)       # 0.1 of the range


def test_clustering_indices_of_made_up_clusters():
    """Two clusters on the unit circle; the indices by their formulae."""
    angles = np.radians([0, 10, 90, 100])
    x, y = np.stack([np.cos(angles), np.sin(angles)], 1), np.array([0, 0, 1, 1])
    centres = [x[:2].mean(0), x[2:].mean(0)]
    spread = [np.linalg.norm(x[2 * i:2 * i + 2] - centres[i], axis=1) for i in (0, 1)]
    apart = np.linalg.norm(centres[0] - centres[1])
    db, ch = experiments.clustering(3 * x, y)                                      # vectors are made unit vectors
    assert db == pytest.approx((spread[0].mean() + spread[1].mean()) / apart)
    between = sum(2 * np.sum((c - x.mean(0)) ** 2) for c in centres)
    assert ch == pytest.approx(between / (sum((s ** 2).sum() for s in spread) / 2))


@pytest.mark.parametrize("kind", ["centre", "ArcFace", "focal"])
def test_heads_learn_and_their_losses_are_as_published(kind):
    torch.manual_seed(0)
    y = torch.arange(4).repeat(50)
    x = torch.randn(4, 16)[y] + 0.1 * torch.randn(200, 16)
    head = experiments.Head(16, 4)
    with torch.no_grad():
        h = head.hidden(x)
        logits = h @ head.classes.T
        if kind == "centre":
            expected = torch.nn.functional.cross_entropy(logits, y) + 0.003 * (h ** 2).sum(1).mean()                # centres start at 0
        elif kind == "focal":
            p = logits.softmax(1)[range(200), y]
            expected = ((1 - p) ** 2 * -p.log()).mean()
        else:
            cosine = logits / h.norm(dim=1, keepdim=True) / head.classes.norm(dim=1)
            cosine[range(200), y] = torch.cos(torch.acos(cosine[range(200), y]) + 0.5)
            expected = torch.nn.functional.cross_entropy(30 * cosine, y)
    assert head.loss(x, y, kind).item() == pytest.approx(expected.item(), rel=1e-4)
    made = experiments.train_head(x, y, kind, 0, epochs=60)(x).detach().numpy()
    assert experiments.clustering(made, y.numpy())[0] < experiments.clustering(torch.randn(200, 16).numpy(), y.numpy())[0] / 5


def test_hyperiqa_has_the_published_names_and_shapes():
    with torch.device("meta"):                                                  # without memory, and the time to fill it
        shapes = {k: list(v.shape) for k, v in evaluate.HyperIQA().state_dict().items()}
    assert shapes == json.loads((Path(__file__).parent / "hyperiqa_keys.json").read_text())


def test_arcface_points_fit_the_template(clip, landmarker):
    """The five points of a face, laid onto the template by a similarity, are within a few of its 112 pixels."""
    points = evaluate.arcface_points(landmarker.landmarks(clip[0][0]))
    warp = evaluate.similarity(points, evaluate.ARCFACE_TEMPLATE)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert np.allclose(evaluate.similarity(points, 2 * points @ turn.T + [3, 4]), np.c_[2 * turn, [3, 4]])
    error = np.linalg.norm(points @ warp[:, :2].T + warp[:, 2] - evaluate.ARCFACE_TEMPLATE, axis=1)
    assert error.mean() < 8


def test_deal_gives_every_frame_one_place():
    for M in (1, 2, 5, 12, 24, 25):
        for T in (3, 4, 8):
            for how in ("strided", "contiguous", "random"):
                rows, keep = experiments.deal_frames(M, T, how, seed=M)
                assert sorted(rows[keep]) == list(range(M))
                assert (np.diff(rows, axis=1) >= 0).all() and (rows[:, T // 2] == rows[0, T // 2]).all()
    rows, keep = experiments.deal_frames(13, 4, "contiguous")
    assert rows[:, :2].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and rows[:, 3].tolist() == [9, 10, 11, 12]


def test_columns_rest_on_the_same_clips():
    found = evaluate.measured_by_all({"a": dict(x=1, y=2), "b": dict(y=3, z=4)})
    assert found == {"a": dict(y=2), "b": dict(y=3)}
    with pytest.raises(UserError, match="no clip"):
        evaluate.measured_by_all({"a": dict(x=1), "b": {}})


@pytest.mark.parametrize("text, reason", [("source,driving,out\n", "and jobs below it"), ("source,driving,out\na,b,c.mp4\nd,e,c.mp4\n", "names one result twice"),
                                          ("source,driving,out\na,b,\n", "cannot read the table"), ("a,b\n1,2\n", "cannot read the table")])
def test_bad_tables(text, reason, tmp_path):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=f"^(cannot read the table )?.*pairs.csv.*{reason.removeprefix('cannot read the table')}"):
        evaluate.read_pairs(tmp_path / "pairs.csv")


def test_bootstrap():
    mean, half = evaluate.bootstrap(np.random.default_rng(0).standard_normal(400))
    assert abs(mean) < 0.15 and half == pytest.approx(1.96 / 20, rel=0.15)


@pytest.fixture(scope="module")
def small_world(world, tmp_path_factory):
    """OUT with three rendered pairs of 12 frames."""
    out = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(3)
    lines = []
    for folder in ("clips", "pictures", "truth"):
        (out / "world" / folder).mkdir(parents=True)
    for i in range(3):
        a, b, motion = world.sample_face(rng), world.sample_face(rng), world.sample_motion(rng, 12)
        for folder, face in (("clips", b), ("truth", a)):
            write_video(out / "world" / folder / f"{i}.mp4", world.render_clip(face, motion, 128))
        Image.fromarray(world.render(a, {k: v[0] for k, v in motion.items()}, 128)).save(out / "world" / "pictures" / f"{i}.png")
        lines.append(dict(source=f"pictures/{i}.png", driving=f"clips/{i}.mp4", out=f"out/{i}.mp4"))
    experiments.write_pairs(out / "world" / "pairs.csv", lines)
    return out


def run(out, command, *rest):
    """(exit code, stderr) of the command line, in this process."""
    errors, before = io.StringIO(), sys.argv
    sys.argv = ["evaluate.py", command, "--out", str(out), "--steps", "1", *map(str, rest)]
    try:
        with contextlib.redirect_stderr(errors):
            data.run_main(evaluate.main)
        return 0, errors.getvalue()
    except SystemExit as e:
        return e.code, errors.getvalue()
    finally:
        sys.argv = before


def result(out, name):
    about = json.loads((out / f"{name}.json").read_text())
    lines = [line.strip("| ").split(" | ") for line in about["markdown"].splitlines() if line.startswith("|")]
    return about, {line[0]: line[1:] for line in lines}


def test_cross_by_the_model_and_by_given_videos(small_world):
    assert run(small_world, "cross", "--frames", 4)[0] == 0
    about, table = result(small_world, "cross")
    assert {"LMSE", "CSIM", "PSNR against the truth, dB"} <= set(table) and "Self-CSIM" in table and "FID" not in table
    assert all(name in about["markdown"] for name in ("weights-inception", "i3d_torchscript.pt", "koniq_pretrained.pkl"))
    assert about["settings"]["frames"] == 4 and about["model"] and about["versions"]["torch"]
    began = sorted(p.stat().st_mtime_ns for p in (small_world / "cache").rglob("*.safetensors"))
    assert run(small_world, "cross", "--frames", 4)[0] == 0             # nothing is measured twice
    assert sorted(p.stat().st_mtime_ns for p in (small_world / "cache").rglob("*.safetensors")) == began


def test_perfect_videos_have_perfect_values_and_bad_ones_are_named(small_world, tmp_path):
    given, clips = tmp_path / "given", small_world / "world" / "clips"
    shutil.copytree(clips, given)
    assert run(small_world, "same", "--clips", clips, "--videos", given, "--frames", 4)[0] == 0
    _, table = result(small_world, "same-given")
    assert table["LMSE"][0] == "0.0 ± 0.0" and table["Self-CSIM"][0] == "0.000 ± 0.000" and table["yaw: correlation"][0] == "1.00 ± 0.00"
    assert table["SSIM"][0] == "1.00 ± 0.00" and table["Fréchet distance, CLIP features"][0] in ("0.000", "-0.000")
    (given / "0.mp4").write_text("not a video")
    write_video(given / "1.mp4", np.zeros((5, 128, 128, 3), np.uint8))
    code, errors = run(small_world, "same", "--clips", clips, "--videos", given, "--frames", 4)
    assert code == 1 and "left out: 0: " in errors and "left out: 1: " in errors and "5 frames, the driving video 12" in errors
    (given / "2.mp4").unlink()
    code, errors = run(small_world, "same", "--clips", clips, "--videos", given, "--frames", 4)
    assert code == 2 and "nothing could be measured" in errors


def test_lmse_orders_qualities(small_world, tmp_path):
    """Re-encodings of a clip, worse and worse, are further and further from it."""
    import data
    frames, errors = np.stack(list(data.Video(small_world / "world" / "clips" / "0.mp4"))), []
    landmarker = data.FaceLandmarker()
    true = evaluate.find_landmarks(landmarker, frames)
    for noise in (2, 10, 40):
        noisy = (frames + np.random.default_rng(0).normal(0, noise, frames.shape)).clip(0, 255).astype(np.uint8)
        errors.append(evaluate.lmse(evaluate.find_landmarks(landmarker, noisy), true))
    assert errors == sorted(errors) and errors[0] > 0


def test_missing_and_wrong_weights(tmp_path):
    nets, missing = evaluate.load_nets(tmp_path)
    assert not nets and set(missing) == {"inception", "i3d", "hyperiqa"}
    assert all("fetch https://" in reason for reason in missing.values())
    (tmp_path / "koniq_pretrained.pkl").write_bytes(b"torn")
    with pytest.raises(UserError, match="not the published file"):
        evaluate.find_network("koniq_pretrained.pkl", tmp_path)


def test_hyperiqa_is_read_from_a_file(tmp_path, monkeypatch):
    net, path = evaluate.HyperIQA().eval(), tmp_path / "koniq_pretrained.pkl"
    torch.save(net.state_dict(), path)
    monkeypatch.setitem(evaluate.NETWORKS, path.name, ("https://x", data.sha256(path)))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    [quality] = evaluate.load_hyperiqa(tmp_path)(image[None])
    assert quality == evaluate.hyperiqa(net, image[None]) and np.isfinite(quality)


def test_report_and_pairs(small_world, tmp_path, capsys):
    assert run(tmp_path, "pairs", small_world / "world" / "clips", small_world / "world" / "pictures", "--n", 9)[0] == 0
    assert "--n 9 is more than there are" in capsys.readouterr().out
    assert len({files.source for files in evaluate.read_pairs(tmp_path / "pairs.csv").values()}) == 3       # each picture once before one comes again
    code, _ = run(tmp_path, "pairs", small_world / "world" / "clips", small_world / "world" / "pictures", "--n", 2)
    assert code == 0 and len(evaluate.read_pairs(tmp_path / "pairs.csv")) == 2
    assert all(Path(p).exists() for files in evaluate.read_pairs(tmp_path / "pairs.csv").values() for p in (files.driving, files.source))
    assert run(tmp_path, "report")[0] == 2
    (tmp_path / "cross.json").write_text(json.dumps(dict(name="cross", markdown="**A table**", picture=None, model="0" * 64)))
    assert run(tmp_path, "report")[0] == 0 and "**A table**" in (tmp_path / "report.md").read_text()
    assert run(tmp_path, "same", "--clips", tmp_path / "none")[0] == 2


@pytest.mark.parametrize("line, n", [("same", 50), ("same --clips c", None), ("cross --pairs p.csv", None), ("pairs a b", None), ("all --clips c", 50),
                                     ("cross --pairs p.csv --n 3", 3)])
def test_all_of_ones_own_videos_are_judged(line, n, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *line.split()])
    assert evaluate.arguments().n == n


def test_frames_of_a_slower_rate(small_world, landmarker, monkeypatch):
    """Of 12 frames at 24 a second every third is taken at 8, and the source is the frame furthest from them."""
    chosen, models = [], type("", (), dict(size=64, landmarker=landmarker))
    monkeypatch.setattr(evaluate, "read_crops", lambda path, tracked, video, frames, size: chosen.append(frames) or np.zeros((len(frames), 1)))
    files = evaluate.Files(small_world / "world" / "clips" / "0.mp4")
    for seed in range(20):
        evaluate.read_case(files, models, 4, seed, fps=8)
    assert all(np.diff(frames[1:]).tolist() == [3, 3, 3] for frames in chosen) and {frames[1] for frames in chosen} == {0, 1, 2}
    assert all(frames[0] == (0 if frames[1] else 11) for frames in chosen)
    with pytest.raises(UserError, match="12 frames; 5 and a source need 14"):
        evaluate.read_case(files, models, 5, 0, fps=8)
    picture = small_world / "world" / "pictures" / "0.png"                      # of a picture no frame is needed
    assert len(evaluate.read_case(files._replace(source=picture), models, 12, 0).driving) == 12
    with pytest.raises(UserError, match="12 frames; 13 need 13"):
        evaluate.read_case(files._replace(source=picture), models, 13, 0)


def test_long_videos_of_ones_own_may_be_shorter(small_world, monkeypatch):
    """Lengths that no clip has are left out; `--n` limits the clips."""
    seen = []

    def measured(a, title, files, M, *_, **__):
        seen.append((M, len(files)))
        return {name: dict(made_clip=np.eye(M), driving_clip=np.eye(M)) for name in files}
    monkeypatch.setattr(evaluate, "measure_videos", measured)
    monkeypatch.setattr(evaluate, "clip_metrics", lambda r: {"Self-CSIM": 0.0})
    a = type("", (), dict(model=evaluate.DEMO / "sdit.safetensors", out=small_world, clips=small_world / "world" / "clips", pairs=None, n=2, left_out=[]))
    for lengths, expected in (((4, 11, 12), [4, 4, 11, 11]), ((48, 96), [11, 11])):
        seen.clear()
        experiments.long(a, lengths)
        assert seen == [(M, 2) for M in expected]
        (small_world / "long.json").unlink()


def made_elsewhere(path, clip, landmarker, side, rate, codec):
    """A clip as another program gives it back: its square alone, at another size and rate, by another codec."""
    import av
    video = data.Video(clip)
    square = data.track(video, landmarker, clip).square
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=dict(qscale="2"))
        stream.width = stream.height = side
        stream.pix_fmt, stream.bit_rate = "yuvj420p" if codec == "mjpeg" else "yuv420p", 4_000_000
        for frame in video:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(data.crop(frame, square, side), "rgb24")))
        out.mux(stream.encode())


def test_videos_made_elsewhere(small_world, landmarker, tmp_path):
    """The true results as FOMM's and others' programs would write them. By name in `--videos`, or by the column out."""
    clips, pairs = small_world / "world" / "clips", small_world / "world" / "pairs.csv"
    for i, (ending, codec) in enumerate([("avi", "mjpeg"), ("webm", "libvpx"), ("mov", "mpeg4")]):
        made_elsewhere(tmp_path / "peer" / f"{i}.{ending}", clips / f"{i}.mp4", landmarker, 160 + 32 * i, 25 + i, codec)
    assert run(small_world, "same", "--clips", clips, "--videos", tmp_path / "peer", "--frames", 6)[0] == 0
    _, table = result(small_world, "same-peer")
    assert float(table["LMSE"][0].split()[0]) < 2.5 and float(table["PSNR against the truth, dB"][0].split()[0]) > 28

    lines = [files._asdict() for files in evaluate.read_pairs(pairs).values()]
    for i, line in enumerate(lines):
        line["out"] = tmp_path / "other" / f"source_{i} driving_{i}, result.mkv"
        made_elsewhere(line["out"], small_world / "world" / "truth" / f"{i}.mp4", landmarker, 224, 30, "libx264")
    experiments.write_pairs(tmp_path / "pairs.csv", [{k: line[k] for k in ("source", "driving", "out")} for line in lines])
    assert run(small_world, "cross", "--pairs", tmp_path / "pairs.csv", "--frames", 6)[0] == 0
    _, table = result(small_world, "cross-given")
    assert len(table["LMSE"]) == 2 and float(table["yaw: correlation"][0].split()[0]) > 0.6


def test_ratios_of_errors_have_intervals_over_people():
    base = np.random.default_rng(0).uniform(1, 2, (100, 5))
    assert experiments.ratio(base / 2, base) == "0.500 ± 0.000"
    mean, half = map(float, experiments.ratio(base * np.random.default_rng(1).uniform(0.4, 0.6, (100, 1)), base).split(" ± "))
    assert abs(mean - 0.5) < 0.02 and half == pytest.approx(1.96 * 0.2 / 12 ** 0.5 / 10, rel=0.25)


def test_periodicity():
    noise, frames = np.random.default_rng(0).standard_normal(1000), np.arange(1000)
    assert experiments.periodicity(noise) < 0.15
    assert experiments.periodicity(np.sin(frames / 10) + 0.1 * noise) > 0.8
    assert experiments.periodicity(np.cumsum(noise) * 0 + (frames % 50 == 0)) > 0.8         # falls back every 50 frames
    assert math.isnan(experiments.periodicity(noise[:12]))


def test_probes_read_what_a_person_wears(world, tmp_path, landmarker):
    """Of rendered faces that they were fitted on; and they tell the changes of a video that changes."""
    folder = tmp_path / "world" / "faces"
    folder.mkdir(parents=True)
    for i in range(24):
        Image.fromarray(world.sample_clip([experiments.FACES_SEED, i], 1, 128)[0][0]).save(folder / f"{i:04d}.png")
    a = type("", (), dict(model=evaluate.DEMO / "sdit.safetensors", out=tmp_path, clips=None, pairs=None))
    read = evaluate.attribute_nets(a)["attributes"]
    models, right = evaluate.load_models(a.model), []
    for i in range(24):
        crop = evaluate.sample.read_source(folder / f"{i:04d}.png", landmarker, models.size, 0)[0]
        face = world.sample_face(np.random.default_rng([experiments.FACES_SEED, i]))
        true = [list(t).index(face[k]) for k, t in dict(hair=world.HAIR, shirt=world.CLOTH, back=world.CLOTH, skin=world.SKIN).items()]
        right.append(read(evaluate.clip_vectors(models, crop[None]))[0] == true)
    assert np.mean(right) > 0.95

    points = faces(2)
    r = dict(made_landmarks=points, driving_landmarks=points, source_clip=np.ones((1, 2)), made_clip=np.ones((2, 2)), driving_clip=np.ones((2, 2)))
    r |= dict(source_attributes=np.array([[1, 2, 3, 4]]), made_attributes=np.array([[1, 2, 3, 4], [1, 2, 3, 0]]), driving_attributes=np.zeros((2, 4)))
    values = evaluate.clip_metrics(r)
    assert values[evaluate.KEPT] == 87.5 and values[evaluate.CHANGES] == 25 and values[f"{evaluate.CHANGES}: of the driving video"] == 0
    a.clips = folder
    assert not evaluate.attribute_nets(a)


def test_the_whole_evaluation_runs_every_part(tmp_path, monkeypatch, capsys, landmarker):
    """Its commands are understood, and a part that fails is named, with its last lines."""
    seen, lock = [], threading.Lock()

    def started(command, **_):
        script, rest = Path(command[1]).name, command[2:]
        with lock:
            monkeypatch.setattr("sys.argv", [script, *rest])
            seen.append((script, rest[0], evaluate.arguments() if script == "evaluate.py" else data.arguments()))
        return type("", (), dict(communicate=lambda: ("a table", "Traceback\n  File\nKeyError: 'x'\n"), returncode=int(rest[0] == "scenes")))
    monkeypatch.setattr(experiments.subprocess, "Popen", started)
    monkeypatch.setattr(experiments, "render_world", lambda a, more: None)
    (tmp_path / "same.json").write_text(json.dumps(dict(name="same", markdown="**A table**", picture=None, model="0" * 64)))
    code, errors = run(tmp_path, "all", "--guidance", "1.5")
    assert code == 1 and "1 left out" in errors and "KeyError: 'x'" in errors + capsys.readouterr().out
    commands = [first for script, first, _ in seen if script == "evaluate.py"]
    assert sorted(commands) == ["ablation", "cross", "figures", "guidance", "length", "long", "same", "scenes"]
    assert all(a.guidance == 1.5 and a.steps == 1 for script, _, a in seen if script == "evaluate.py")
    assert [script for script, *_ in seen].index("data.py") < commands.index("guidance") + 2 and (tmp_path / "report.md").exists()


def test_an_interrupted_evaluation_ends_its_parts(tmp_path, monkeypatch):
    """No part goes on alone, and none is begun."""
    begun, interrupted = [], threading.Event()

    class Part:
        returncode = -15

        def __init__(self, command, **_):
            begun.append(self)
            self.ended = threading.Event()
            if len(begun) == 2:
                interrupted.set()

        def communicate(self):
            assert self.ended.wait(20), "nobody ended it"
            return "", ""

        def terminate(self):
            self.ended.set()

    def wait(tasks):
        assert interrupted.wait(20)
        raise KeyboardInterrupt
    monkeypatch.setattr(experiments.subprocess, "Popen", Part)
    monkeypatch.setattr(experiments, "as_completed", wait)
    monkeypatch.setattr(experiments, "render_world", lambda a, more: None)
    monkeypatch.setattr(evaluate, "attribute_nets", lambda a: {})
    (tmp_path / "cache" / "faces").mkdir(parents=True)
    (tmp_path / "cache" / "faces" / "index.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "all", "--out", str(tmp_path)])
    a = evaluate.arguments()
    a.left_out = []
    with pytest.raises(KeyboardInterrupt):
        experiments.run_all(a)
    assert len(begun) == 2 and all(part.ended.is_set() for part in begun)


def test_denoisers_with_less_see_less(tmp_path):
    """A condition that is not given changes nothing; the others do."""
    torch.manual_seed(0)
    model = sdit.SDiT(sdit.SDiTConfig(name="test", depth=1, width=32, heads=2, frames=1, latent_channels=2, latent_size=4, scene_width=8))
    for m in (*model.blocks, model.final_layer):
        torch.nn.init.normal_(m.adaLN_modulation[1].weight, std=0.2)
    torch.nn.init.xavier_uniform_(model.final_layer.linear.weight)

    def draw(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def errors(signals, landmarks, scene):
        row = dict(latents=draw(0, 1, 2, 4, 4), landmarks=draw(landmarks, 1, 478, 3), scene=draw(scene, 8), mask=torch.zeros(1, 4, 4))
        return experiments.denoising_errors(model, [row] * 2, signals, [100, 900], 0, 2)
    for signals in experiments.SIGNALS.values():
        base = errors(signals, 1, 1)
        assert base.shape == (2, 2)
        assert (errors(signals, 2, 1) == base).all() == ("landmarks" not in signals)
        assert (errors(signals, 1, 2) == base).all() == ("scene" not in signals)
    full, mapping = errors(("landmarks", "scene"), 1, 1), model.mapping
    model.mapping = None                                                        # as `sample.load_models` has it where bfloat16 is fast
    model.to(torch.bfloat16).mapping = mapping
    np.testing.assert_allclose(errors(("landmarks", "scene"), 1, 1), full, rtol=0.05)
