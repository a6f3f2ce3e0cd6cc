"""Training: the loss against closed forms, the optimiser's two rates, exact resume."""
import contextlib
import copy
import dataclasses
import json
import multiprocessing
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

import data
import sample
import sdit
import train
from conftest import ROOT, random_sdit
from test_data import record


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    """Of the demo's six."""
    monkeypatch.setitem(sdit.DEMO_SIZE, "depth", 2)


def batch(B=2, T=4):
    torch.manual_seed(1)
    return dict(latents=torch.randn(B, T, 4, 8, 8), landmarks=torch.rand(B, T, 478, 3), mask=torch.zeros(B, T, 8, 8),
                scene=torch.nn.functional.normalize(torch.randn(B, 16), dim=1))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_expressive_pixels_weigh_more(prediction):
    """Paper 4.1: weight 1 + lambda_ex on the mask, 1 elsewhere; not normalised."""
    model, schedule, b, t, drop = random_sdit(prediction=prediction), sdit.NoiseSchedule(), batch(), torch.tensor([5, 700]), torch.tensor([False] * 2)
    noise = torch.randn_like(b["latents"])
    plain, bound = train.diffusion_loss(model, schedule, b, t, noise, drop, 1.0)
    b["mask"][:, 1, 2:4, 3] = 0.5
    masked, same = train.diffusion_loss(model, schedule, b, t, noise, drop, 1.0)
    xt = schedule.add_noise(b["latents"], noise, t)
    output = model(xt, t, model.mapping(b["scene"], b["landmarks"]))
    squared = (output[:, :, :4] - noise) ** 2                                   # the target is the noise
    if prediction == "v":
        squared = squared / schedule.alpha_bar[t].view(2, 1, 1, 1, 1).float()
    torch.testing.assert_close(plain, squared.mean((1, 2, 3, 4)))
    torch.testing.assert_close(masked, plain + 0.5 * squared[:, 1, :, 2:4, 3].sum((1, 2)) / squared[0].numel())
    torch.testing.assert_close(same, bound)
    assert torch.equal(train.diffusion_loss(model, schedule, b, t, noise, drop, 0.0)[0], plain)


@pytest.mark.parametrize("bf16", [False, True])
def test_v_loss_is_the_squared_error_of_v(bf16):
    """(F - v)^2 in float64 of what the network itself put out, also at t = 999 and in bfloat16."""
    model, schedule, b, seen = random_sdit(prediction="v"), sdit.NoiseSchedule(), batch(3), []
    model.final_layer.register_forward_hook(lambda m, given, y: seen.append(model.unpatchify(y)))
    noise, t = torch.randn_like(b["latents"]), torch.tensor([0, 600, 999])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        error, _ = train.diffusion_loss(model, schedule, b, t, noise, torch.tensor([False] * 3))

    alpha_bar = schedule.alpha_bar[t].view(3, 1, 1, 1, 1)
    v = alpha_bar.sqrt() * noise.double() - (1 - alpha_bar).sqrt() * b["latents"].double()
    expected = (seen[0][:, :, :4].double() - v).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=0)


def test_bound_is_the_kl_of_two_normals():
    schedule, (B, shape) = sdit.NoiseSchedule(), (3, (3, 2, 1, 2, 2))
    torch.manual_seed(0)
    x0, noise, wrong, v = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    v, t = v.tanh(), torch.tensor([1, 300, 999])
    xt = schedule.add_noise(x0, noise, t)
    value = train.variational_bound(schedule, x0, xt, wrong, v, t)
    normal = torch.distributions.Normal
    for i in range(B):
        ab, before, beta = schedule.alpha_bar[t[i]], schedule.alpha_bar[t[i] - 1], schedule.beta[t[i]]
        posterior = beta * (1 - before) / (1 - ab)

        def mean(clean):                                                        # DDPM, Eq. 7
            return before.sqrt() * beta / (1 - ab) * clean + (1 - beta).sqrt() * (1 - before) / (1 - ab) * xt[i]
        guess = (xt[i] - (1 - ab).sqrt() * wrong[i]) / ab.sqrt()
        sigma = torch.exp((v[i] + 1) / 4 * beta.log() + (1 - v[i]) / 4 * posterior.log())
        kl = torch.distributions.kl_divergence(normal(mean(x0[i]), posterior.sqrt()), normal(mean(guess), sigma))
        torch.testing.assert_close(value[i], kl.mean() / math.log(2))


def test_bound_at_t_0_is_a_likelihood():
    schedule = sdit.NoiseSchedule()
    x0 = torch.full((1, 1, 1, 1, 1), 0.2, dtype=torch.float64)
    noise, v = torch.zeros_like(x0), torch.zeros_like(x0)
    xt = schedule.add_noise(x0, noise, torch.tensor([0]))
    value = train.variational_bound(schedule, x0, xt, noise, v, torch.tensor([0]))
    sigma = math.exp((math.log(schedule.posterior_variance[0]) + math.log(schedule.beta[0])) / 4)
    points = np.linspace(0.2 - 1 / 255, 0.2 + 1 / 255, 100_001)
    density = np.exp(-((points - 0.2) / sigma) ** 2 / 2) / sigma / math.sqrt(2 * math.pi)
    assert value.item() == pytest.approx(-math.log2(np.trapz(density, points)), rel=1e-4)


def test_bound_trains_the_variance_alone():
    model, schedule, b = random_sdit().requires_grad_(True), sdit.NoiseSchedule(), batch()
    _, bound = train.diffusion_loss(model, schedule, b, torch.tensor([5, 700]), torch.randn_like(b["latents"]), torch.tensor([False] * 2))
    bound.sum().backward()
    grad = model.final_layer.linear.bias.grad.view(2, 2, 2, 4)                  # (p, p, noise or v, C)
    assert grad[:, :, 0].abs().max() == 0 and grad[:, :, 1].abs().min() > 0


def test_draws_are_uniform_and_belong_to_the_step():
    t, noise, drop = train.sample_noise(0, 3, (20_000, 1), 0.1)
    assert t.min() == 0 and t.max() == 999 and torch.histc(t.float(), 10).sub(2000).abs().max() < 200
    assert abs(drop.float().mean() - 0.1) < 0.01 and abs(noise.std() - 1) < 0.02
    assert torch.equal(train.sample_noise(0, 3, (20_000, 1), 0.1)[1], noise) and not torch.equal(train.sample_noise(0, 4, (20_000, 1), 0.1)[1], noise)


def test_dropped_rows_do_not_see_their_conditions():
    model, schedule, b, t = random_sdit(), sdit.NoiseSchedule(), batch(), torch.tensor([5, 700])
    noise, drop = torch.randn_like(b["latents"]), torch.tensor([True, False])
    before = train.diffusion_loss(model, schedule, b, t, noise, drop)[0]
    b["scene"], b["landmarks"] = -b["scene"], b["landmarks"] + 1
    after = train.diffusion_loss(model, schedule, b, t, noise, drop)[0]
    assert before[0] == after[0] and before[1] != after[1]


def test_mapping_learns_at_its_own_rate():
    model = random_sdit().requires_grad_(True)
    rest, mapping = train.build_optimizer(model, 6.4e-5, 6.4e-6, 0.01).param_groups
    assert rest["lr"] == 6.4e-5 and mapping["lr"] == 6.4e-6
    assert sum(p.numel() for p in mapping["params"]) == sum(p.numel() for p in model.mapping.parameters())
    assert len(rest["params"]) + len(mapping["params"]) == len(list(model.parameters()))


def test_learning_rates_warm_up_and_fall(cache, tmp_path, monkeypatch):
    cosine = [train.learning_rate(step, 4, 0) for step in range(4)]
    assert cosine == pytest.approx([1, 0.854, 0.5, 0.146], abs=1e-3)
    ramp = [train.learning_rate(step, 10 ** 9, 4) for step in range(6)]
    assert ramp == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])

    built, build = [], train.build_optimizer
    monkeypatch.setattr(train, "build_optimizer", lambda *a: built.append(build(*a)) or built[-1])
    for settings, mapping_lr, warmup in (((), 1e-4, 0),
                                         (("--mapping-lr", "7e-4", "--warmup", "8"), 7e-4, 8)):
        run(cache, tmp_path / f"run{warmup}", monkeypatch, *settings)
        rest, mapping = built[-1].param_groups
        factor = train.learning_rate(3, 4, warmup)                              # the last of 4 steps
        assert rest["lr"] == pytest.approx(1e-3 * factor)
        assert mapping["lr"] == pytest.approx(mapping_lr * factor)


@pytest.fixture
def cache(tmp_path):
    about = dict(latent_channels=6, latent_size=16, scene_width=128, autoencoder="a", autoencoder_sha256="1", clip="c", clip_sha256="2")
    writer = data.CacheWriter(tmp_path / "cache", about)
    for value in range(1, 5):
        writer.add(record(8, value, 6, 16, 128), dict(file=str(value)))
    writer.finish([dict(file=str(value), frames=8) for value in range(1, 5)])
    return tmp_path / "cache"


def run(cache, out, monkeypatch, *more):
    monkeypatch.setattr("sys.argv", ["train.py", "--size", "demo", "--frames", "2", "--data", str(cache), "--out", str(out), "--batch", "2",
                                     "--steps", "4", "--save-minutes", "0", "--log-every", "2", "--lr", "1e-3", "--precision", "fp32", *more])
    train.main()


def same(a, b):
    """Whether two runs ended with the same weights, bit by bit."""
    a, b = (sdit.load_model(run / "model.safetensors").state_dict() for run in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a)


def test_resume_is_exact(cache, tmp_path, monkeypatch, capsys):
    run(cache, tmp_path / "whole", monkeypatch)
    run(cache, tmp_path / "parts", monkeypatch)
    (tmp_path / "parts" / "model.safetensors").unlink()
    newest = tmp_path / "parts" / "state-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])                              # damaged: the one before is taken
    run(cache, tmp_path / "parts", monkeypatch)
    assert "state-00000004.pt is damaged" in capsys.readouterr().err and same(tmp_path / "whole", tmp_path / "parts")
    model = sdit.load_model(tmp_path / "whole" / "model.safetensors")
    assert model.config.autoencoder_sha256 == "1" and len(model.config.scene_mean) == 128 and model.config.name == "demo"
    assert model.mapping.landmark_mean.std() > 0 and not torch.equal(model.mapping.landmark_basis, torch.eye(1434, 64))
    for changed, value in (("frames", "3"), ("lr", "1e-4"), ("seed", "1"), ("mapping-lr", "1e-3"), ("warmup", "2"), ("prediction", "v")):
        with pytest.raises(sdit.UserError, match=f"trained with another {changed.replace('-', '_')}"):
            run(cache, tmp_path / "parts", monkeypatch, f"--{changed}", value)
    state = torch.load(newest, weights_only=True)
    mean = state["recipe"]["scene_mean"]
    for error in (2e-5, 1e-2):                                                  # rounding of another processor; another cache
        torch.save(state | dict(recipe=state["recipe"] | dict(scene_mean=[x + error for x in mean])), newest)
        with pytest.raises(sdit.UserError, match="trained with another data") if error == 1e-2 else contextlib.nullcontext():
            run(cache, tmp_path / "parts", monkeypatch)
    shutil.copytree(cache, tmp_path / "other")
    mixed = "--data", f"{cache}:0.5", f"{tmp_path / 'other'}:"
    run(cache, tmp_path / "mixed", monkeypatch, *mixed[:2], mixed[2] + "0.5")
    with pytest.raises(sdit.UserError, match="trained with another shares"):
        run(cache, tmp_path / "mixed", monkeypatch, *mixed[:2], mixed[2] + "0.1")
    for state in (tmp_path / "parts").glob("state-*"):
        state.write_bytes(b"")
    with pytest.raises(sdit.UserError, match="every state .* is damaged"):
        run(cache, tmp_path / "parts", monkeypatch)


def test_sigterm_saves_and_the_same_command_goes_on(cache, tmp_path, monkeypatch, capsys):
    run(cache, tmp_path / "whole", monkeypatch, "--save-minutes", "9")
    draw, steps = train.sample_noise, []

    def interrupted(seed, step, *rest):
        steps.append(step)
        if steps == [0, 1]:
            for child in multiprocessing.active_children():                     # as torchrun and batch systems do
                os.kill(child.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(seed, step, *rest)
    monkeypatch.setattr(train, "sample_noise", interrupted)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):           # `train.py && sample.py` stops, too
        run(cache, tmp_path / "parts", monkeypatch, "--save-minutes", "9", "--workers", "1")
    assert "saved after step 2" in capsys.readouterr().out and [p.name for p in (tmp_path / "parts").glob("state-*")] == ["state-00000002.pt"]
    run(cache, tmp_path / "parts", monkeypatch, "--save-minutes", "9")
    assert steps == [0, 1, 2, 3] and same(tmp_path / "whole", tmp_path / "parts")


def command(cache, out, *more):
    return [sys.executable, "-c", "import sys, torch; sys.path.insert(0, sys.argv.pop(1)); torch.set_num_threads(1); import data, sdit, train; "
            "sdit.DEMO_SIZE['depth'] = 2; data.run_main(train.main)",
            str(ROOT), "--size", "demo", "--frames", "2", "--data", str(cache), "--out", str(out), "--precision", "fp32", "--lr", "1e-3", "--preview", "0", *more]


def test_processes_and_parts_do_not_change_the_result(cache, tmp_path, monkeypatch):
    """20 steps of 4 rows: one process, two over gloo, one in two parts: the same losses and weights to 1e-4."""
    settings = "--batch", "4", "--steps", "20", "--log-every", "1", "--lr", "1e-4"   # at 1e-3 it is unstable at first, and rounding grows
    run(cache, tmp_path / "one", monkeypatch, *settings)
    run(cache, tmp_path / "parts", monkeypatch, *settings, "--accumulate", "2")
    code, *arguments = command(cache, tmp_path / "two", *settings)[2:]
    (tmp_path / "script.py").write_text(code.replace("sys.argv.pop(1)", repr(arguments.pop(0))))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "script.py"), *arguments],
                   check=True, stderr=(said := open(tmp_path / "said", "w")))
    said.close()
    assert "broadcast_buffers" not in (tmp_path / "said").read_text()
    logs = {name: [json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("one", "two", "parts")}
    weights = {name: sdit.load_model(tmp_path / name / "model.safetensors").state_dict() for name in logs}
    for model in weights.values():
        for name, bias in model.items():
            if name.endswith("qkv.bias"):                                       # attention does not see a bias of its keys: its gradient is
                bias.chunk(3)[1].zero_()                                        # rounding alone, which AdamW brings to full size
    for other in ("two", "parts"):
        assert len(logs[other]) == 20
        for here, there in zip(logs["one"], logs[other]):
            assert here["mse"] == pytest.approx(there["mse"], rel=1e-4) and here["norm"] == pytest.approx(there["norm"], rel=1e-3)
        assert max((weights["one"][k] - weights[other][k]).abs().max() for k in weights["one"]) < 1e-4
    assert logs["one"][-1]["rows_per_s"] > 0 and logs["one"][-1]["mfu"] > 0


def test_the_average_follows_without_gradients(cache, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train.Saver, "save", lambda saver, step, model, ema, *_: seen.append((model, ema)))
    run(cache, tmp_path / "run", monkeypatch)
    for model, ema in seen:
        assert not any(p.requires_grad for p in ema.parameters())
        assert 0 < (model.final_layer.linear.weight - ema.final_layer.linear.weight).abs().max() < model.final_layer.linear.weight.abs().max()


def test_a_loss_that_is_not_finite_stops_before_saving(cache, tmp_path, monkeypatch):
    with pytest.raises(sdit.UserError, match="not finite at step 2; the last state is intact"):
        run(cache, tmp_path / "run", monkeypatch, "--lr", "1e30", "--log-every", "4", "--save-minutes", "9")
    assert not list((tmp_path / "run").glob("*.pt"))
    loss = train.diffusion_loss

    def steep(*given):                                                          # a finite loss with a gradient that is not
        error, bound = loss(*given)
        return error + (error - error.detach()).abs().sqrt(), bound
    monkeypatch.setattr(train, "diffusion_loss", steep)
    with pytest.raises(sdit.UserError, match="not finite at step 1; the last state"):
        run(cache, tmp_path / "run", monkeypatch, "--save-minutes", "0")
    assert not list((tmp_path / "run").glob("*.pt")) and not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("wrong", [("--save-minutes", "-1"), ("--frames", "0"), ("--seed", "-1"), ("--warmup", "-1"), ("--accumulate", "3")])
def test_what_could_only_fail_later_is_refused(wrong, cache, tmp_path, monkeypatch):
    with pytest.raises(sdit.UserError, match="or more|does not divide"):
        run(cache, tmp_path / "run", monkeypatch, *wrong)


def test_operations_of_a_row():
    """The closed form against PyTorch's own count (attention as explicit products, since its kernel is not counted on the CPU)."""
    from torch.utils.flop_counter import FlopCounterMode
    model = sdit.SDiT(sdit.make_config("S/8", 4))
    x, t, c = torch.zeros(1, 4, 4, 32, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, 4, 384)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, t, c)
    assert train.row_flops(model.config) == pytest.approx(3 * counter.get_total_flops(), rel=0.02)


@pytest.fixture
def networks():
    model = sdit.SDiT(sdit.make_config("demo", 2))
    return model, copy.deepcopy(model), train.build_optimizer(model, 1e-3, 1e-4, 0.01)


def test_a_save_is_of_its_moment_and_in_a_thread(networks, tmp_path, monkeypatch):
    """While a state is being written training goes on, and does not change it; the next save waits
    for it. An interrupted write leaves the state before; what went wrong is raised."""
    model, ema, optimizer = networks
    written, write = [], torch.save
    gate = threading.Event()

    def slow(state, path):
        assert gate.wait(60)
        if len(written) == 2:
            raise OSError(28, "full", str(path))
        written.append(state["step"])
        write(state, path)
    monkeypatch.setattr(torch, "save", slow)

    with pytest.raises(OSError, match="full"), train.Saver(tmp_path) as saver:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        saver.save(1, model, ema, optimizer, {})
        assert not saver.writing.done() and not train.states(tmp_path)
        model.final_layer.linear.weight.data.add_(1)
        gate.set()
        saver.save(2, model, ema, optimizer, {})
        assert written[0] == 1
        saver.save(3, model, ema, optimizer, {})

    assert [p.name for p in train.states(tmp_path)] == ["state-00000001.pt", "state-00000002.pt"]
    assert not list(tmp_path.glob(".state*"))
    kept = train.read_state(train.states(tmp_path)[0])["model"]
    assert all(torch.equal(kept[k], before[k]) for k in before)


def test_states_come_by_the_clock(cache, tmp_path, monkeypatch):
    saved, now = [], iter(range(0, 100_000, 40))                                # every look is 40 seconds later
    monkeypatch.setattr(train.Saver, "save", lambda saver, step, *_: saved.append(step))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(now))
    run(cache, tmp_path / "run", monkeypatch, "--steps", "12", "--save-minutes", "4", "--log-every", "12")
    assert saved[-1] == 12 and 2 <= len(saved) <= 5                             # the last step, and a few on the way


def test_rank_0_names_the_state(networks, cache, tmp_path, monkeypatch):
    """A rank that would see another newest state, as on a disk that is slow to tell, takes rank 0's."""
    model, ema, optimizer = networks
    for step in (1, 2):
        with train.Saver(tmp_path) as saver:
            saver.save(step, model, ema, optimizer, {})
    first = train.states(tmp_path)[0]
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda said: said.__setitem__(0, first))
    assert train.load_state(tmp_path, model, ema, optimizer, {}) == 1


def test_gradients_are_given_back_before_the_next_step(cache, tmp_path, monkeypatch):
    """Kept through the next forward pass, those of XL/2 would take 2.6 GiB."""
    kept, loss, add = [], train.diffusion_loss, train.Meter.add

    def looking(model, *given):
        kept.append([x for x in seen if not x.expired()])
        return loss(model, *given)

    def after_backward(meter, step, t, error, bound):
        seen.extend(StorageWeakRef(p.grad.untyped_storage()) for p in built[-1].parameters() if p.grad is not None)
        add(meter, step, t, error, bound)
    seen, built, build = [], [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *a: built.append(build(*a)) or built[-1])
    monkeypatch.setattr(train, "diffusion_loss", looking)
    monkeypatch.setattr(train.Meter, "add", after_backward)
    run(cache, tmp_path / "run", monkeypatch, "--save-minutes", "9", "--preview", "0")
    assert len(seen) > 100 and len(kept) == 4 and not any(kept)


def test_peaks_are_of_whole_names(monkeypatch):
    cuda, name = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[-1])
    for name[:], peak in ((["NVIDIA A100-SXM4-80GB"], 312), (["NVIDIA H100 NVL"], 835), (["NVIDIA H200"], 989)):
        assert train.device_peak(cuda, torch.bfloat16) == peak
    name[:] = ["NVIDIA RTX A1000"]                                              # measured, where there is one
    monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        train.device_peak(cuda, torch.bfloat16)


def test_pauses_are_no_time_of_training():
    meter = train.Meter(torch.device("cpu"))
    with meter.pause():
        time.sleep(0.3)
    assert meter.lap() < 0.2


def test_a_process_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(sdit.UserError, match="process 2 finds no GPU .* --nproc_per_node=2"):
        train.start_processes()


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler here")
def test_compiled_blocks_make_what_plain_ones_make():
    """At the demo's sizes, at which PyTorch's compiler once made nan of tokens that were not contiguous."""
    config = sdit.make_config("demo", 2, latent_channels=4, latent_size=16, scene_width=16, prediction="v")
    torch.manual_seed(0)
    model = sdit.SDiT(dataclasses.replace(config, depth=1))
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight, std=0.02)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    given = torch.randn(2, 2, 4, 16, 16), torch.tensor([5, 700]), torch.randn(2, 2, config.width)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*given)
    plain = run(model)
    train.build_objective(model, sdit.NoiseSchedule(), type("A", (), dict(compile=True, lambda_ex=1.0, world=1)))
    torch.testing.assert_close(run(model), plain, atol=0.02, rtol=0)


def test_blocks_are_compiled_whole(monkeypatch):
    """On a GPU by default, and not cut where DistributedDataParallel exchanges gradients."""
    compiled = []
    monkeypatch.setattr(sdit.Block, "compile", lambda block: compiled.append(block))
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    cpu, cuda = (type("Schedule", (), dict(beta=type("Beta", (), dict(is_cuda=x))))() for x in (False, True))
    for schedule, wanted, count in ((cpu, None, 0), (cuda, False, 0), (cpu, True, 2), (cuda, None, 2)):
        compiled.clear()
        train.build_objective(random_sdit(), schedule, type("A", (), dict(compile=wanted, lambda_ex=1.0, world=1)))
        assert len(compiled) == count
    assert torch._dynamo.config.optimize_ddp is False


def test_start_from_other_weights(cache, tmp_path, monkeypatch, capsys):
    """--init: a model of ours; DiT's names without the mapping network and with a class embedding; a file that does not fit."""
    torch.manual_seed(1)
    model = sdit.SDiT(sdit.make_config("demo", 2, latent_channels=6))
    sdit.save_model(tmp_path / "ours.safetensors", model)
    other = sdit.SDiT(sdit.make_config("demo", 4, latent_channels=6))
    train.init_weights(other, tmp_path / "ours.safetensors")                      # the number of frames may differ
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert not capsys.readouterr().out
    train.init_weights(sdit.SDiT(sdit.make_config("demo", 4, latent_channels=6, clip="new", clip_sha256="2")), tmp_path / "ours.safetensors")
    assert "was trained with another clip" in (said := capsys.readouterr().out) and "autoencoder" not in said
    image = {k: v for k, v in model.state_dict().items() if not k.startswith("mapping.")}
    extra = {"pos_embed": torch.zeros(1, 64, 256), "y_embedder.embedding_table.weight": torch.zeros(1001, 256)}
    torch.save(image | extra, tmp_path / "DiT.pt")
    fresh = sdit.SDiT(sdit.make_config("demo", 4, latent_channels=6))
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    train.init_weights(fresh, tmp_path / "DiT.pt")
    assert "not for commercial use" in capsys.readouterr().out
    assert all(torch.equal(v, before[k] if k.startswith("mapping.") else image[k]) for k, v in fresh.state_dict().items())
    with pytest.raises(sdit.UserError, match=r"does not fit this network: x_embedder.proj.weight is \(192, 6, 2, 2\), expected \(384, 4, 2, 2\)"):
        train.init_weights(sdit.SDiT(sdit.make_config("S/2", 4)), tmp_path / "ours.safetensors")
    run(cache, tmp_path / "run", monkeypatch, "--init", str(tmp_path / "DiT.pt"))
    for name in ("DiT.pt", "ours.safetensors"):
        settings = "--init", str(tmp_path / name), "--prediction", "v"
        with pytest.raises(sdit.UserError, match=f"{name} predicts epsilon; give --prediction e"):
            run(cache, tmp_path / "other", monkeypatch, *settings)


def test_init_keeps_the_statistics_that_the_weights_know(cache, tmp_path, monkeypatch):
    """Those of the model that training starts from; without one, the cache's."""
    run(cache, tmp_path / "fresh", monkeypatch)
    fresh = sdit.load_model(tmp_path / "fresh" / "model.safetensors")
    statistics = data.Rows(cache, 2).statistics()
    for name, value in statistics.items():
        torch.testing.assert_close(getattr(fresh.mapping, name), value)
    fresh.mapping.scene_mean.add_(1)
    fresh.mapping.scene_gain.fill_(3)
    fresh.mapping.output_gain.fill_(0.5)
    sdit.save_model(tmp_path / "other.safetensors", fresh)
    run(cache, tmp_path / "run", monkeypatch, "--init", str(tmp_path / "other.safetensors"))
    model = sdit.load_model(tmp_path / "run" / "model.safetensors")
    kept = dict(fresh.mapping.named_buffers())
    assert len(kept) == 5
    for name, value in model.mapping.named_buffers():
        assert torch.equal(value, kept[name]), name


def test_preview(tmp_path, monkeypatch):
    """Two strips a row: the clip as it is, and what the model makes."""
    about = dict(latent_channels=16, latent_size=16, scene_width=128, autoencoder="autoencoder.safetensors", clip="c", clip_sha256="2",
                 autoencoder_sha256=data.sha256(ROOT / "demo" / "autoencoder.safetensors"))
    writer = data.CacheWriter(tmp_path / "cache", about)
    for value in range(1, 4):
        writer.add(record(8, value, 16, 16, 128), dict(file=str(value)))
    writer.finish([dict(file=str(value), frames=8) for value in range(1, 4)])
    plain, halves = sample.sample_plain, []
    monkeypatch.setattr(sample, "sample_plain", lambda *given, **named: halves.append(torch.is_autocast_enabled("cpu")) or plain(*given, **named))
    run(tmp_path / "cache", tmp_path / "run", monkeypatch, "--preview", "4")
    run(tmp_path / "cache", tmp_path / "half", monkeypatch, "--preview", "4", "--precision", "bf16")
    assert halves == [False, True]
    assert Image.open(tmp_path / "run" / "preview-00000004.png").size == (2 * 128, 2 * 3 * 128)


def test_plot_of_a_log(tmp_path, monkeypatch, capsys):
    """Of a run that was resumed and then killed in the middle of a line: the later of two lines of a step counts."""
    entry = dict(quarters=[0.4, 0.3, 0.2, 0.1], lr=1e-4, rows_per_s=3.0)
    lines = [json.dumps(entry | dict(step=step)) for step in (50, 100, 150)] + [json.dumps(entry | dict(step=100, lr=5e-5)), '{"step": 2']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *given, **named: drawn.append(given) or plot(axes, *given, **named))
    monkeypatch.setattr(sys, "argv", ["train.py", "--plot", str(tmp_path)])
    train.main()
    assert [list(y) for _, y in drawn] == [[q] * 3 for q in entry["quarters"]] + [[1e-4, 5e-5, 1e-4], [3.0] * 3]
    assert all(list(x) == [50, 100, 150] for x, _ in drawn) and Image.open(tmp_path / "log.png").width > 500
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(sdit.UserError, match="has no line of train.py yet"):
        train.main()


def test_no_cache_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "python data.py" in done.stderr
