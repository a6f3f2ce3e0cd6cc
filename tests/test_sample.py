"""Sampling: rows, anchoring against the oracle, the command on real input."""
import json
import re
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import cv2
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

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
    rows, _ = sample.plan_rows(12, 4, anchor_frame=6)
    assert (rows[:, 2] == 6).all() and len(rows) == 5
    assert len(sample.plan_rows(12, 4)[0]) == 4
    with pytest.raises(sdit.UserError, match="cannot share"):
        sample.plan_rows(5, 1)


def test_noise_belongs_to_the_frame():
    a, b = sample.frame_noise(3, [5, 9, 2], (4, 8, 8)), sample.frame_noise(3, [2, 5], (4, 8, 8))
    assert torch.equal(a[0], b[1]) and torch.equal(a[2], b[0]) and not torch.equal(a[0], a[1])
    later = sample.frame_noise(3, np.array([[5], [2]]), (4, 8, 8), step=1)
    assert later.shape == (2, 1, 4, 8, 8) and not torch.equal(later[0, 0], a[0]) and later.std() > 0.9
    assert not torch.equal(sample.frame_noise(4, [5], (4, 8, 8))[0], a[0])


SAMPLERS = ["ddim", "ddim:0.5", "ddim:1", "ddpm", "dpm++"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_samplers_recover_what_a_perfect_denoiser_knows(sampler, steps):
    settings, x0 = sample.Settings(steps, sampler), torch.randn(2, 3, 4, 8, 8).double()
    pairs, alpha_bar = settings.timesteps(), sdit.NoiseSchedule().alpha_bar
    assert pairs[0][0] == 999 and pairs[-1][1] == -1 and len(pairs) == steps and (steps == 1 or pairs[-1][0] == 0)

    def known(i, x, t):
        noise = (x - alpha_bar[t].sqrt() * x0) / (1 - alpha_bar[t]).sqrt()
        return torch.cat([noise, torch.rand_like(noise)], 2)
    made = sample.denoise(settings, torch.randn_like(x0), np.arange(6).reshape(2, 3), known)
    torch.testing.assert_close(made, x0)


def gaussian_samples(settings, spread=0.5, v=-1.0):
    """Samples from data of normal distribution, whose best denoiser is known: they must have its spread."""
    alpha_bar = sdit.NoiseSchedule().alpha_bar

    def best(i, x, t):
        a = alpha_bar[t]
        noise = (1 - a).sqrt() * x / (a * spread ** 2 + 1 - a)
        return torch.cat([noise, torch.full_like(noise, v)], -3)
    frames = np.arange(4)
    return sample.denoise(settings, sample.frame_noise(0, frames, (4, 32, 32)), frames, best)


@pytest.mark.parametrize("sampler,steps", [("ddim", 500), ("ddim:1", 500), ("ddpm", 500), ("dpm++", 50)])
def test_samplers_keep_the_spread_of_the_data(sampler, steps):
    assert abs(gaussian_samples(sample.Settings(steps, sampler)).std() - 0.5) < 0.01


def test_samplers_agree_where_theory_says_so():
    small, eta = gaussian_samples(sample.Settings(20, "ddpm"), v=-1), gaussian_samples(sample.Settings(20, "ddim:1"))
    torch.testing.assert_close(small, eta)                                      # DDIM, Sec. 4.1: eta = 1 is DDPM with the posterior variance
    assert gaussian_samples(sample.Settings(20, "ddpm"), v=1).std() > small.std() * 1.02
    exact = gaussian_samples(sample.Settings(1000, "ddim"))
    first, second = ((gaussian_samples(sample.Settings(20, name)) - exact).abs().mean() for name in ("ddim", "dpm++"))
    assert second < first / 3                                                   # an order higher
    torch.testing.assert_close(*(gaussian_samples(sample.Settings(2, name)) for name in ("ddim", "dpm++")))    # one step and the last: the same
    for steps in (1, 2, 3, 50, 333, 999, 1000):
        for name in ("ddim", "dpm++"):
            t = [pair[0] for pair in sample.Settings(steps, name).timesteps()]
            assert len(t) == steps and t[0] == 999 and (np.diff(t) < 0).all() and (steps == 1 or t[-1] == 0)


def conditions_of(M, guidance, dtype, width=32):
    c = torch.randn(M, width, generator=torch.Generator().manual_seed(5)).to(dtype)
    return [c] if guidance == 1 else [c, c.flip(0)]


def oracle_of(model, conditions, settings):
    """The plain override of all rows in one batch: frame -> latent, as a tensor (M, C, H, W)."""
    rows, keep = sample.plan_rows(len(conditions[0]), model.config.frames)
    c = model.config
    dtype = torch.promote_types(conditions[0].dtype, torch.float32)
    x = sample.frame_noise(settings.seed, rows, (c.latent_channels, c.latent_size, c.latent_size)).to(dtype)
    made = sample.sample_plain(model, x, rows, [k[torch.from_numpy(rows)] for k in conditions], settings, model.config.frames // 2)
    return made[torch.from_numpy(keep)][torch.from_numpy(rows[keep]).argsort()]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("T,B,anchor", [(4, 5, 2), (8, 3, 4), (2, 3, 1), (4, 1, 2)])
def test_anchored_equals_the_oracle(T, B, anchor, prediction):
    """The bank, rows in chunks and in reverse order, against the plain override of all rows in one batch, float64."""
    model, settings = random_sdit(frames=T, depth=3, dtype=torch.float64, prediction=prediction), sample.Settings(6)
    x, c, frames = torch.randn(B, T, 4, 8, 8).double(), torch.randn(B, T, 32).double(), np.zeros((B, T), int)
    oracle = sample.sample_plain(model, x, frames, [c], settings, anchor)
    own = [s for s in range(T) if s != anchor]
    first, bank = sample.sample_first(model, x[:1], frames[:1], [c[:1]], settings, anchor)
    torch.testing.assert_close(first, oracle[:1], rtol=0, atol=1e-10)
    for chunk in (1, 2):
        for b in reversed(range(1, B, chunk)):
            part = slice(b, b + chunk)
            rest = sample.sample_rest(model, x[part][:, own], frames[part][:, own], [c[part][:, own]], settings, anchor, bank)
            torch.testing.assert_close(rest, oracle[part][:, own], rtol=0, atol=1e-10)
    for b in range(1, B):                                                       # the control: without anchoring rows differ
        alone = sample.sample_plain(model, x[b:b + 1], frames[b:b + 1], [c[b:b + 1]], settings, None)
        assert (alone[0, own] - oracle[b, own]).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler,prediction", [*((name, "epsilon") for name in SAMPLERS), ("ddim:1", "v"), ("dpm++", "v")])
def test_a_whole_video_equals_the_oracle(sampler, prediction, guidance, monkeypatch):
    """Noise, conditioning and frames end up in the right places, whatever the chunk, the share of a process, what is wanted, and what an
    interrupted run left: 1e-10 in float64, 1e-5 of the spread in float32; bfloat16 is nearer to its oracle than that to float64."""
    M, settings = 11, sample.Settings(5, sampler, guidance, seed=7)
    model, conditions = random_sdit(dtype=torch.float64, prediction=prediction), conditions_of(11, guidance, torch.float64)
    oracle = oracle_of(model, conditions, settings)
    for size in (1, 3):
        monkeypatch.setitem(sample.CHUNK_TOKENS, "cpu", size * 4 * model.config.tokens)
        latent = sample.sample_video(model, conditions, settings)
        torch.testing.assert_close(torch.stack([latent[f] for f in range(M)]), oracle, rtol=0, atol=1e-10)
    rows, keep = sample.plan_rows(M, 4)
    frames = [row[kept].tolist() for row, kept in zip(rows, keep)]              # of each row
    finished = {}
    for rank in reversed(range(3)):                                             # three processes, the last one first
        sample.sample_video(model, conditions, settings, finished=finished, share=(rank, 3))
    assert sorted(finished) == list(range(M))
    for f in (*frames[1], frames[3][0]):                                        # interrupted and continued
        del finished[f]
    for f in frames[2]:                                                         # what is there already is not made again
        finished[f] = finished[f] + 1
    latent = sample.sample_video(model, conditions, settings, finished=finished)
    for f in range(M):
        torch.testing.assert_close(latent[f], oracle[f] + (f in frames[2]), rtol=0, atol=1e-10)
    part = {}
    latent = sample.sample_video(model, conditions, settings, wanted=[1], finished=part)
    torch.testing.assert_close(latent[1], oracle[1], rtol=0, atol=1e-10)
    assert set(part) == next(set(row) for row in frames if 1 in row)            # of the row that holds it
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        small, c = random_sdit(dtype=dtype, prediction=prediction), [k.to(dtype) for k in conditions]
        latent = sample.sample_video(small, c, settings)
        made = torch.stack([latent[f] for f in range(M)])
        assert made.dtype is torch.float32
        errors[dtype] = [(made - target).std() / oracle.std() for target in (oracle_of(small, c, settings), oracle)]
    assert errors[torch.float32][0] < 1e-5 and errors[torch.bfloat16][0] < errors[torch.bfloat16][1]


class Replayed(sample.Captured):
    """Without a GPU: replaying computes anew, from the tensors that were kept into those kept."""

    def _record(self, function, given):
        inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        outputs = function(*inputs)

        def replay():
            tree_map(lambda kept, new: kept.copy_(new), outputs, function(*inputs))
        return SimpleNamespace(replay=replay), inputs, outputs


@pytest.mark.parametrize("captured, device", [
    (Replayed, "cpu"),
    pytest.param(sample.Captured, "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
])
def test_recorded_launches_are_equal_to_the_bit(captured, device, monkeypatch):
    """One recording for each shape: row 0, a full chunk, the last chunk."""
    monkeypatch.setitem(sample.CHUNK_TOKENS, device, 2 * 4 * 16)                # two rows
    model = random_sdit(prediction="v").to(device)
    conditions = [torch.randn(19, 32, device=device) for _ in range(2)]         # six rows
    with monkeypatch.context() as m:
        m.setattr(sample, "Captured", lambda model: model)
        plain = sample.sample_video(model, conditions, sample.Settings(3))
    recorded = captured(model)
    latent = sample.sample_video(recorded, conditions, sample.Settings(3))
    assert all(torch.equal(latent[f], plain[f]) for f in range(19))
    assert len(recorded.graphs) == 3


def test_v_is_read_with_latents_as_fine_as_they_are():
    """A model in bfloat16 does not round the latents that epsilon is made of."""
    model, x = random_sdit(dtype=torch.bfloat16, prediction="v"), torch.randn(1, 4, 4, 8, 8)
    torch.nn.init.zeros_(model.final_layer.linear.weight)                       # v = 0
    noise = sample.run_model(model, x, 500, torch.randn(1, 4, 32).bfloat16())[:, :, :4]
    torch.testing.assert_close(noise, (1 - sdit.NoiseSchedule().alpha_bar[500]).sqrt().float() * x)


def test_guidance_keeps_its_branches_apart():
    """Guidance 1 with a second branch is the first branch alone; at 0 the second; an anchor that leaks would show. All channels are guided."""
    model, both = random_sdit(dtype=torch.float64), conditions_of(9, 2, torch.float64)
    def make(conditions, guidance):
        latent = sample.sample_video(model, conditions, sample.Settings(4, guidance=guidance))
        return torch.stack([latent[f] for f in range(9)])
    torch.testing.assert_close(make(both, 1.0), make(both[:1], 1.0))
    torch.testing.assert_close(make(both, 0.0), make(both[1:], 1.0))
    outputs = [torch.randn(2, 3, 8, 4, 4) for _ in range(2)]
    output = sample.guided(outputs, 3.0)
    torch.testing.assert_close(output[:, :, :4], outputs[1][:, :, :4] + 3 * (outputs[0] - outputs[1])[:, :, :4])
    assert torch.equal(output[:, :, 4:], outputs[0][:, :, 4:])


def test_multidiffusion_averages_windows_and_independent_shares_nothing():
    windows = sample.plan_windows(11, 4)
    assert windows.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], [7, 8, 9, 10]]
    assert sample.plan_windows(2, 4).tolist() == [[0, 1, 1, 1]] and sample.plan_windows(4, 4).tolist() == [[0, 1, 2, 3]]
    model, conditions = random_sdit(dtype=torch.float64), conditions_of(11, 1, torch.float64)
    settings = sample.Settings(3, "ddim", method="multidiffusion", seed=7)
    x = sample.frame_noise(7, range(11), (4, 8, 8))
    alpha_bar = sdit.NoiseSchedule().alpha_bar
    for t, after in settings.timesteps():                                       # frame by frame, in its own words
        seen = [[] for _ in range(11)]
        for window in windows:
            output = model(x[window][None], torch.tensor([t]), conditions[0][window][None])[0, :, :4]
            for f, noise in zip(window, output):
                seen[f].append(noise)
        noise = torch.stack([sum(s) / len(s) for s in seen])
        clean = (x - (1 - alpha_bar[t]).sqrt() * noise) / alpha_bar[t].sqrt()
        rest = alpha_bar[after] if after >= 0 else torch.tensor(1.0).double()
        x = rest.sqrt() * clean + (1 - rest).sqrt() * noise
    latent = sample.sample_video(model, conditions, settings)
    torch.testing.assert_close(torch.stack([latent[f] for f in range(11)]), x)

    rows, keep = sample.plan_rows(11, 4)
    latent = sample.sample_video(model, conditions, sample.Settings(3, method="independent", seed=7))
    for b, row in enumerate(rows):
        alone = sample.sample_plain(model, sample.frame_noise(7, row, (4, 8, 8))[None], row[None], [conditions[0][row][None]],
                                    sample.Settings(3, seed=7), None)
        for f, z, k in zip(row, alone[0], keep[b]):
            if k:
                torch.testing.assert_close(latent[f], z)


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
    assert next(iter(result)).shape == (256, 256, 3)                            # enlarged: H.264 blurs 64 x 64
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
    assert abs(whole[:10] - part).mean() > 2 * abs(whole[10:20] - part).mean()       # H.264 codes the two a little differently
    for name, seconds in (("whole", 24 * 1001 / 30000), ("part", 10 * 1001 / 30000)):
        with av.open(str(tmp_path / f"{name}.mp4")) as f:
            assert abs(float(f.streams.audio[0].duration * f.streams.audio[0].time_base) - seconds) < 0.06


def test_finished_frames_and_progress_are_shown(tmp_path, clip):
    """Before the video is written, and a caller can end the work."""
    driving, told = write_video(tmp_path / "driving.mp4", clip[0]), []
    models, job = sample.load_models(), dict(source=driving, driving=driving, steps=2)
    sample.reenact(**job, out=tmp_path / "out.mp4", model=models, show=lambda *given: told.append(given))
    assert [given for given in told if given[0] == "landmarks"] == [("landmarks", n, 12) for n in range(1, 13)]
    assert [given for given in told if given[0] == "denoising"][:2] == [("denoising", 1, 2), ("denoising", 2, 2)]
    assert [given for given in told if given[0] == "rows"][-1] == ("rows", 4, 4)
    parts = list(dict.fromkeys(part for part, *_ in told))
    assert parts == ["landmarks", "denoising", "frame", "rows", "writing"]

    images = {number: image for part, number, _, *image in told if part == "frame"}
    shown, written = np.stack([images[n][0] for n in range(12)]).astype(int), frames_of(tmp_path / "out.mp4")
    assert abs(shown - written).mean() < min(5, 0.7 * abs(shown - np.roll(written, 6, 0)).mean())     # H.264 changes them a little
    assert sum(part == "frame" for part, *_ in told) == 12 and told.index(("writing", 1, 12)) > len(told) - 13

    def leave(*_):
        raise sdit.UserError("enough")
    with pytest.raises(sdit.UserError, match="enough"):
        sample.reenact(**job, out=tmp_path / "none.mp4", model=models, show=leave)
    assert not (tmp_path / "none.mp4").exists() and data.SHOW.get() is None


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, clip, monkeypatch, capsys):
    write_video(tmp_path / "empty.mp4", np.full((4, 64, 64, 3), 127, np.uint8))
    write_video(tmp_path / "face.mp4", clip[0][:2])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "out.mp4").write_text("older")
    (tmp_path / "nothing.mp4").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for args, message in ((["--source", "none.png"], "no such file: none.png"), (["--source", "empty.mp4"], "no face found in empty.mp4"),
                          (["--driving", "text.mp4"], "text.mp4 is not a video"), (["--driving", "empty.mp4"], "no face found in empty.mp4"),
                          (["--model", "text.mp4"], "text.mp4 is not a whole file of weights"), (["--steps", "0"], "--steps 0"),
                          (["--only", "99:", "--driving", "face.mp4"], "none of the 2 frames"), (["--out", "x.nonsense"], "cannot write x.nonsense"),
                          (["--driving", "face.mp4", "--out", "face.mp4"], "is also an input"), (["--driving", "nothing.mp4"], "nothing.mp4 is empty"),
                          (["--source", "folder"], "folder is a folder; name a file in it"), (["--driving", "https://x/y.mp4"], "y.mp4; download it first")):
        monkeypatch.setattr("sys.argv", ["sample.py", "--out", "out.mp4", *args])
        with pytest.raises(SystemExit) as leave:
            data.run_main(sample.main)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert leave.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "out.mp4").read_text() == "older"


def test_weights_that_the_model_was_not_trained_with_are_refused(tmp_path):
    tensors, config = sdit.read_tensors(ROOT / "demo" / "sdit.safetensors")
    sdit.write_tensors(tmp_path / "model.safetensors", tensors, config | dict(autoencoder_sha256="0" * 64))
    (tmp_path / "autoencoder.safetensors").write_bytes((ROOT / "demo" / "autoencoder.safetensors").read_bytes())
    with pytest.raises(sdit.UserError, match="made with autoencoder.safetensors .sha256 000000000000...., which is neither"):
        sample.reenact(ROOT / "demo" / "source.png", ROOT / "demo" / "driving.mp4", tmp_path / "o.mp4", tmp_path / "model.safetensors")


def frames_of(path):
    return np.stack(list(data.Video(path))).astype(int)


def test_an_interrupted_run_goes_on(tmp_path, clip, monkeypatch):
    """Killed before writing: frames stand in OUT.partial, the same command uses them, other settings do not; then the folder is gone."""
    driving, models = write_video(tmp_path / "driving.mp4", clip[0]), sample.load_models()
    sampled = []
    def counting(model, rows, numbers, *rest, real=sample.sample_rows):
        sampled.append(list(numbers))
        yield from real(model, rows, numbers, *rest)
    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "sample_rows", counting)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sample, "write", killed)
        sample.reenact(driving=driving, out=tmp_path / "out.mp4", model=models, steps=1)
    frames, (rows, keep) = sorted((tmp_path / "out.mp4.partial").iterdir()), sample.plan_rows(12, 4)
    assert len(frames) == 12 and not (tmp_path / "out.mp4").exists()
    frames[rows[2][keep[2]][0]].unlink()
    sample.reenact(driving=driving, out=tmp_path / "out.mp4", model=models, steps=1)
    sample.reenact(driving=driving, out=tmp_path / "whole.mp4", model=models, steps=1)
    assert sampled == [[0, 1, 2, 3], [0, 2], [0, 1, 2, 3]] and not list(tmp_path.glob("*.partial"))
    continued, whole = (frames_of(tmp_path / f"{name}.mp4") for name in ("out", "whole"))
    assert 3 * abs(continued - whole).mean() < abs(continued - whole[::-1]).mean()   # one step leaves noise, which H.264 codes as it likes
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sample, "write", killed)
        sample.reenact(driving=driving, out=tmp_path / "out.mp4", model=models, steps=1)
    sample.reenact(driving=driving, out=tmp_path / "out.mp4", model=models, steps=1, seed=1)
    assert sampled[-1] == [0, 1, 2, 3] and abs(frames_of(tmp_path / "out.mp4") - whole).mean() > 3 * abs(continued - whole).mean()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sample, "write", killed)
        sample.reenact(driving=driving, out=tmp_path / "out.mp4", model=models, steps=1)
    sample.reenact(driving=driving, out=tmp_path / "out.mp4", model=models, steps=1, only="0:4")       # a look at what is there
    assert sampled[-1] == [] and len(list((tmp_path / "out.mp4.partial").iterdir())) == 12


@pytest.mark.parametrize("name", ["o.mp4", "o.mkv", "o.MOV", "o.png"])
def test_a_result_knows_that_it_is_one(name, tmp_path, monkeypatch):
    """And the same line of --pairs, given again, leaves it alone; another one does not."""
    models, sampled = sample.load_models(), []
    monkeypatch.setattr(sample, "sample_rows", lambda *given, real=sample.sample_rows: sampled.append(1) or real(*given))
    job = dict(driving=ROOT / "demo" / "source.png", out=tmp_path / name, model=models, steps=1, again=False)
    for seed in (0, 0, 1):
        sample.reenact(**job, seed=seed)
    assert len(sampled) == 2 and sample.made_here(tmp_path / name) and not sample.made_here(job["driving"])
    with_look = sample.reenact(**job, seed=1, compare=True)                     # that one is not there yet
    assert len(sampled) == 3 and with_look["writing"] > 0


def test_frames_of_other_settings_are_removed(tmp_path, capsys):
    sample.LatentStore(tmp_path / "o.mp4", "one")[3] = torch.ones(2, 4, 8, 8)
    assert 3 in sample.LatentStore(tmp_path / "o.mp4", "one") and torch.equal(sample.LatentStore(tmp_path / "o.mp4", "one")[3], torch.ones(2, 4, 8, 8))
    assert not capsys.readouterr().out
    (tmp_path / "o.mp4.partial" / "mine").mkdir()
    assert 3 not in sample.LatentStore(tmp_path / "o.mp4", "two") and [p.name for p in (tmp_path / "o.mp4.partial").iterdir()] == ["mine"]
    assert "1 finished frames of another model, input or setting removed" in capsys.readouterr().out


def test_pairs_with_text_faces_and_bad_lines(world, tmp_path, clip, monkeypatch, capsys):
    """Models once, one file a line; a bad line is reported and the rest goes on. A sentence in place of a picture; the face by number."""
    small = np.stack([cv2.resize(f, (80, 80)) for f in clip[0]])
    both = np.full((12, 144, 288, 3), 200, np.uint8)
    both[:, 8:136, 8:136], both[:, 32:112, 176:256] = clip[0], small[:, ::1, ::-1]
    write_video(tmp_path / "driving.mp4", both)
    imageio.imwrite(tmp_path / "source.png", world.sample_clip(1_000_200, 1, 256)[0][0])
    (tmp_path / "jobs.csv").write_text("\ufeffsource,driving,out,prompt\nsource.png,driving.mp4,made/a.mp4,\nnone.png,driving.mp4,b.mp4,\n"
                                       ",driving.mp4,c.mp4,a person with red hair\nsource.png,driving.mp4,d.mp4,a person with red hair\n"
                                       ",driving.mp4,e.mp4,\n")
    monkeypatch.setattr("sys.argv", ["sample.py", "--pairs", str(tmp_path / "jobs.csv"), "--steps", "1", "--only", "0:4"])
    with pytest.raises(SystemExit) as leave:
        data.run_main(sample.main)
    shown = capsys.readouterr()
    assert leave.value.code == 1                                                # some were written
    assert "line 3: no such file" in shown.err and "line 6: source is missing" in shown.err and "3 of 5 are there" in shown.out and "driving.mp4 shows 2 faces; --face 0 is taken" in shown.out
    made = [frames_of(tmp_path / name) for name in ("made/a.mp4", "c.mp4", "d.mp4")]
    assert all(abs(made[i] - made[j]).mean() > 1 for i, j in ((0, 1), (0, 2), (1, 2)))      # picture, sentence, both
    options = dict(driving=tmp_path / "driving.mp4", source=tmp_path / "source.png", model=sample.load_models(), steps=1, only="0:4")
    sample.reenact(out=tmp_path / "face.mp4", face=(1,), **options)
    sample.reenact(out=tmp_path / "edit.mp4", edit="red hair -> black hair", **options)
    sample.reenact(out=tmp_path / "shape.mp4", retarget=True, **options)
    sample.reenact(out=tmp_path / "bundled.mp4", retarget=True, **options | dict(source=None))  # the bundled picture has a shape, too
    for name in ("face", "edit", "shape"):
        assert abs(frames_of(tmp_path / f"{name}.mp4") - made[0]).mean() > 0.5
    for wrong, message in ((dict(face=(2,)), "no face number 2 in .*driving.mp4: .* has 2"), (dict(edit="red hair"), "is not of the form"),
                           (dict(edit="a -> b:nan"), "is not of the form"),
                           (dict(source=None, prompt="a face", retarget=True), "give a --source"), (dict(sampler="euler"), "no sampler 'euler'"),
                           (dict(sampler="ddim:2"), "no sampler"), (dict(method="best"), "no method")):
        with pytest.raises(sdit.UserError, match=message):
            sample.reenact(**options | dict(out=tmp_path / "x.mp4") | wrong)
    assert not list(tmp_path.glob("x*"))


def test_retargeting_takes_proportions_halfway_and_keeps_the_motion():
    """A head under known poses; the source's is wider and lower, turned, of another size, and opens its mouth."""
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(478, 3)) * (1, 1.3, 0.8)
    shape[14] = shape[13]                                                       # a closed mouth
    shape[[33, 263, 10, 152]] = [-1, 0, 0], [1, 0, 0], [0, 1.5, 0], [0, -1.5, 0]
    rigid = shape[sample.RIGID].mean(0)
    driving, halfway = [], []
    for m in range(6):
        turn = np.linalg.qr(np.eye(3) + 0.3 * (m > 0) * rng.normal(size=(3, 3)))[0]
        turn *= np.sign(np.diag(turn))                                          # near the identity, which frame 0 has
        motion = np.zeros((478, 3))
        motion[14, 1] = 0.1 * m
        size, place = 1 + 0.2 * m, rng.normal(size=3)
        driving.append(size * (shape + motion) @ turn.T + place)
        halfway.append(size * (shape + motion + 0.5 * (shape - rigid) * (0.1, -0.1, 0)) @ turn.T + place)
    driving, halfway = np.stack(driving), np.stack(halfway)
    assert sample.neutral_frame(driving) == 0
    other = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    other *= np.linalg.det(other)
    speaking = np.zeros((478, 3))
    speaking[14, 1] = -0.5
    source = 40 * (shape + (shape - rigid) * (0.1, -0.1, 0) + speaking) @ other.T + 100            # in pixels
    made = sample.retargeted(driving, source)
    assert abs(made - halfway).mean() < 0.2 * abs(driving - halfway).mean()     # not exact: size and turn are fitted to another shape
    np.testing.assert_allclose(sample.retargeted(driving, 40 * shape @ other.T + 100), driving, atol=1e-4)         # its own shape changes nothing


def test_where_the_device_multiplies_in_bfloat16_the_sdit_does(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(sdit, "has_bf16", lambda device: has)
        model = sample.load_models().sdit
        assert {p.dtype for p in model.blocks.parameters()} == {dtype}
        assert {p.dtype for p in model.mapping.parameters()} == {torch.float32}  # landmarks would move by pixels
