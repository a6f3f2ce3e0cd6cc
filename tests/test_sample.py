"""Sampling: rows, anchoring against the oracle, the command on real input."""
import json
import re
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

import data
import sample
import sdit
from conftest import ROOT, random_sdit, write_video


@pytest.mark.parametrize("T", [2, 4, 5, 8])
def test_rows_hold_every_frame_once(T):
    for M in [1, 2, 3, 5, 7, 8, 9, 24, 29, 100]:
        rows, keep = sample.plan_rows(M, T)
        a, f = T // 2, rows[0, T // 2]
        assert (rows[:, a] == f).all() and (np.diff(rows, axis=1) >= 0).all()
        assert sorted(rows[keep]) == list(range(M)) and keep[:, a].tolist() == [True] + [False] * (len(rows) - 1)
        assert (rows[:, :a] < f).all() or f == 0
        cost = lambda f: max([1] + [-(-n // slots) if slots else 10 ** 9 * (n > 0) for n, slots in ((f, a), (M - 1 - f, T - 1 - a))])
        assert len(rows) == cost(f) == min(map(cost, range(M)))
        ties = [g for g in range(M) if cost(g) == cost(f)]
        assert f == min(ties, key=lambda g: (abs(g - (M - 1) / 2), g))


def test_rows_are_wide_and_take_any_anchor():
    rows, keep = sample.plan_rows(29, 8)
    assert len(rows) == 4 and keep.all(1)[0]                                    # 4 * 7 + 1 frames: nothing is repeated in row 0
    assert all(row[0] < 4 and row[-1] > 24 for row in rows)
    rows, _ = sample.plan_rows(12, 4, anchor=6)
    assert (rows[:, 2] == 6).all() and len(rows) == 5
    assert len(sample.plan_rows(12, 4)[0]) == 4
    with pytest.raises(sdit.UserError, match="cannot share"):
        sample.plan_rows(5, 1)


def test_noise_belongs_to_the_frame():
    a, b = sample.frame_noise(3, [5, 9, 2], (4, 8, 8)), sample.frame_noise(3, [2, 5], (4, 8, 8))
    assert torch.equal(a[0], b[1]) and torch.equal(a[2], b[0]) and not torch.equal(a[0], a[1])
    assert not torch.equal(sample.frame_noise(4, [5], (4, 8, 8))[0], a[0])


def test_ddim_recovers_what_a_perfect_denoiser_knows():
    schedule, x0, noise = sdit.NoiseSchedule(), torch.randn(2, 3, 4, 8, 8).double(), torch.randn(2, 3, 4, 8, 8).double()
    for steps in (1, 7, 50):
        pairs = sample.ddim_timesteps(steps)
        assert pairs[0][0] == 999 and pairs[-1][1] == -1 and len(pairs) == steps
        x = schedule.add_noise(x0, noise, torch.tensor([999, 999]))
        for t, after in pairs:
            known = (x - schedule.alpha_bar[t].sqrt() * x0) / (1 - schedule.alpha_bar[t]).sqrt()
            x = sample.ddim_update(schedule, x, torch.cat([known, known * 9], 2), t, after)
        torch.testing.assert_close(x, x0)


@pytest.mark.parametrize("T,B,anchor", [(4, 5, 2), (8, 3, 4), (2, 3, 1), (4, 1, 2)])
def test_anchored_equals_the_oracle(T, B, anchor):
    """The bank, rows in chunks and in reverse order, against the plain override of all rows in one batch, float64."""
    model = random_sdit(frames=T, depth=3, dtype=torch.float64)
    x, c = torch.randn(B, T, 4, 8, 8).double(), torch.randn(B, T, 32).double()
    oracle = sample.sample_plain(model, x, c, 6, anchor)
    own = [s for s in range(T) if s != anchor]
    first, bank = sample.sample_first(model, x[:1], sdit.override(c, anchor)[:1], 6, anchor)
    torch.testing.assert_close(first, oracle[:1], rtol=0, atol=1e-10)
    for chunk in (1, 2):
        for b in reversed(range(1, B, chunk)):
            rest = sample.sample_rest(model, x[b:b + chunk][:, own], c[b:b + chunk][:, own], 6, anchor, bank)
            torch.testing.assert_close(rest, oracle[b:b + chunk][:, own], rtol=0, atol=1e-10)
    for b in range(1, B):                                                       # the control: without anchoring rows differ
        alone = sample.sample_first(model, x[b:b + 1], c[b:b + 1], 6, anchor)[0]
        assert (alone[0, own] - oracle[b, own]).abs().max() > 1e-2


def test_whole_video_equals_the_oracle_in_float64(monkeypatch):
    """`sample_rows`: noise, conditioning and frames end up in the right places; --only gives the same frames."""
    model, M = random_sdit(frames=4, dtype=torch.float64), 11
    monkeypatch.setattr(sample, "CHUNK_TOKENS", 2 * 4 * model.config.tokens)
    conditioning = torch.randn(M, 32).double()
    rows, keep = sample.plan_rows(M, 4)
    latents = sample.sample_rows(model, rows, keep, set(range(M)), conditioning, 5, seed=7)
    noise = sample.frame_noise(7, rows.ravel(), (4, 8, 8)).view(*rows.shape, 4, 8, 8)
    oracle = sample.sample_plain(model, noise, conditioning[torch.from_numpy(rows)], 5, 2)
    assert sorted(latents) == list(range(M))
    for frame, value in zip(rows[keep], oracle[torch.from_numpy(keep)]):
        torch.testing.assert_close(latents[frame], value, rtol=0, atol=1e-10)
    part = sample.sample_rows(model, rows, keep, {0, 1}, conditioning, 5, seed=7)
    assert {0, 1} <= set(part) and len(part) < M
    for frame in part:
        torch.testing.assert_close(part[frame], latents[frame], rtol=0, atol=1e-10)


def test_the_bundled_example(tmp_path):
    """`python sample.py`, with two steps in place of the default: real MediaPipe, CLIP, autoencoder, sDiT."""
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--steps", "2", "--compare"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reenacted-compare.mp4", "reenacted.mp4"]
    result, driving = data.Video(tmp_path / "reenacted.mp4"), data.Video(ROOT / "demo" / "driving.mp4")
    assert len(list(result)) == len(driving) and result.fps == driving.fps
    assert re.search(r"landmarks [\d.]+ s, CLIP [\d.]+ s, denoising [\d.]+ s, decoding [\d.]+ s, writing [\d.]+ s; peak memory", done.stdout)
    with av.open(str(tmp_path / "reenacted.mp4")) as f:
        about = f.metadata["comment"]
    assert about.startswith("synthetic") and json.loads(about.partition("; ")[2])["steps"] == 2
    size = sdit.load_model(ROOT / "demo" / "sdit.safetensors").config.latent_size * 4
    assert next(iter(result)).shape == (size, size, 3)
    assert next(iter(data.Video(tmp_path / "reenacted-compare.mp4"))).shape == (256, 768, 3)


def test_other_input_only_and_sound(tmp_path, clip):
    """A video as source, a driving video of odd rate with sound, a part of it: equal to the same frames of the whole."""
    driving = write_video(tmp_path / "driving.mp4", np.concatenate([clip[0], clip[0][::-1]]), Fraction(30000, 1001), sound="aac")
    source = write_video(tmp_path / "source.mp4", np.concatenate([np.full_like(clip[0][:2], 127), clip[0]]))
    note = sample.reenact(source, driving, tmp_path / "whole.mp4", steps=2)
    assert set(note) >= {"landmarks", "CLIP", "denoising", "decoding", "writing"}
    sample.reenact(source, driving, tmp_path / "part.mp4", steps=2, only="10:20")
    whole, part = (np.stack(list(data.Video(tmp_path / f"{name}.mp4"))).astype(int) for name in ("whole", "part"))
    assert len(whole) == 24 and len(part) == 10 and data.Video(tmp_path / "whole.mp4").fps == Fraction(30000, 1001)
    assert abs(whole[10:20] - part).mean() < 4 and abs(whole[:10] - part).mean() > 2 * abs(whole[10:20] - part).mean()
    for name, seconds in (("whole", 24 * 1001 / 30000), ("part", 10 * 1001 / 30000)):
        with av.open(str(tmp_path / f"{name}.mp4")) as f:
            assert abs(float(f.streams.audio[0].duration * f.streams.audio[0].time_base) - seconds) < 0.06


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, clip, monkeypatch, capsys):
    write_video(tmp_path / "empty.mp4", np.full((4, 64, 64, 3), 127, np.uint8))
    write_video(tmp_path / "face.mp4", clip[0][:2])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "out.mp4").write_text("older")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for args, message in ((["--source", "none.png"], "no such file: none.png"), (["--source", "empty.mp4"], "no face found in empty.mp4"),
                          (["--driving", "text.mp4"], "text.mp4 is not a video"), (["--driving", "empty.mp4"], "no face found in empty.mp4"),
                          (["--model", "text.mp4"], "text.mp4 is not a whole file of weights"), (["--steps", "0"], "--steps 0"),
                          (["--only", "99:", "--driving", "face.mp4"], "none of the 2 frames"), (["--out", "x.nonsense"], "cannot write x.nonsense"),
                          (["--driving", "face.mp4", "--out", "face.mp4"], "is also an input")):
        monkeypatch.setattr("sys.argv", ["sample.py", "--out", "out.mp4", *args])
        with pytest.raises(SystemExit) as leave:
            sdit.run_main(sample.main)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert leave.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "out.mp4").read_text() == "older"


def test_weights_that_the_model_was_not_trained_with_are_refused(tmp_path):
    tensors, config = sdit.read_tensors(ROOT / "demo" / "sdit.safetensors")
    sdit.write_tensors(tmp_path / "model.safetensors", tensors, config | dict(autoencoder_sha256="0" * 64))
    (tmp_path / "autoencoder.safetensors").write_bytes((ROOT / "demo" / "autoencoder.safetensors").read_bytes())
    with pytest.raises(sdit.UserError, match="trained with autoencoder.safetensors .sha256 000000000000...., which is neither"):
        sample.reenact(ROOT / "demo" / "source.png", ROOT / "demo" / "driving.mp4", tmp_path / "o.mp4", tmp_path / "model.safetensors")
