"""The CUDA paths without a GPU: fake tensors on cuda:0. Every operator sees the device, type and
shape that it would have there; none computes. What fails: tensors of two devices in one operator,
float64 on the device, and whatever makes the host wait for it."""

import copy
import traceback
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import export
import sample
import sdit
import train
from conftest import ROOT, NumberSchedule

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "bincount",
    "_unique2",
    "is_nonzero",
}


class Watch(TorchDispatchMode):
    """Notes operators that are wrong on a GPU, and the line of the project that called them."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.is_cuda}
        if len(devices) > 1 and name != "copy_":
            self.note(f"{name} mixes devices")

        to = kwargs.get("device") if name == "_to_copy" else None
        crosses = to is not None and to.type not in devices or name == "copy_" and len(devices) > 1
        blocking = not (kwargs.get("non_blocking") or name == "copy_" and True in args)
        mask = name == "index" and any(x.dtype is torch.bool for x in tensors[1:])
        if crosses and blocking or mask or name in WAITS and "cuda" in devices:
            self.note(f"{name} waits")

        result = function(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda and x.dtype is torch.float64 for x in tensors + made):
            self.note(f"{name} sees float64")
        return result

    def note(self, what):
        ours = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: {ours[-1].line}" if ours else ""
        self.found.add(f"{what}: {where}")


@pytest.fixture
def cuda(monkeypatch):
    if not torch.backends.cuda.is_built() or torch.cuda.is_available():
        pytest.skip("for a CUDA build of PyTorch on a machine without a GPU")
    # else autocast turns itself off
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def wide():
    """XL/2's width and heads, 2 blocks, on the CPU. It predicts v, which takes one way more."""
    config = sdit.make_config("XL/2", 8, prediction="v")
    config.depth = 2
    return sdit.SDiT(config).eval().requires_grad_(False)


def test_training_step(cuda):
    B = 16
    with FakeTensorMode(allow_non_fake_inputs=True):
        with cuda:  # fake from the start: all 28 blocks cost nothing
            model, ema = (sdit.SDiT(sdit.make_config("XL/2", 8)) for _ in range(2))
        batch = dict(
            latents=torch.empty(B, 8, 4, 32, 32),
            landmarks=torch.empty(B, 8, 478, 3),
            mask=torch.empty(B, 8, 32, 32),
            scene=torch.empty(B, 768),
        )
        optimizer, meter = train.build_optimizer(model, 1e-4, 1e-5, 0.01), train.Meter(cuda)
        objective = train.Objective(model, sdit.NoiseSchedule(cuda), 1.0)

        with Watch() as watch:
            drawn = train.sample_noise(0, 0, batch["latents"].shape, 0.1)
            batch = {name: data.send(x, cuda) for name, x in batch.items()}
            t, noise, drop = (data.send(x, cuda) for x in drawn)
            with torch.autocast("cuda", torch.bfloat16):
                error, bound = objective(batch, t, noise, drop)
            for p in model.parameters():  # autograd's engine would ask for a GPU
                p.grad = torch.empty_like(p)
            meter.add(1, t, error, bound)
            optimizer.step()
            train.update_ema(ema, model, 0, 0.9999)

        assert error.device == bound.device == cuda
        assert error.dtype == bound.dtype == torch.float32
    assert not watch.found


SAMPLINGS = [("anchored", s, 2.0) for s in ("ddim", "ddim:1", "ddpm", "dpm++")]
SAMPLINGS += [
    ("anchored", "ddim:1", 1.0),
    ("independent", "ddim:1", 1.0),
    ("multidiffusion", "ddim", 1.0),
]


@torch.no_grad()
@pytest.mark.parametrize("method, sampler, guidance", SAMPLINGS)
def test_sampling(cuda, wide, method, sampler, guidance, monkeypatch):
    """A video of 13 frames in bfloat16, as a GPU samples it, but not recorded as CUDA graphs."""
    settings = sample.Settings(2, sampler, guidance, method)
    pairs, rows = settings.timesteps(), sample.plan_rows(13, 8)[0]
    monkeypatch.setattr(sample.Settings, "timesteps", lambda self: pairs)
    monkeypatch.setattr(sample, "NoiseSchedule", NumberSchedule)
    monkeypatch.setattr(sample, "Captured", lambda model: model)

    with FakeTensorMode(allow_non_fake_inputs=True):
        model, conditions = on_gpu(wide.config, cuda, guidance)
        with Watch() as watch:
            numbers = list(range(len(rows)))
            made = list(sample.sample_rows(model, rows, numbers, conditions, settings))
        assert all(x.device == cuda and x.dtype is torch.float32 for _, x in made)
    assert not watch.found


def on_gpu(config, device, guidance):
    """A model in bfloat16 on a device, and the conditioning of 13 frames."""
    with device:
        model = sdit.SDiT(config).requires_grad_(False)
    for x in [*model.parameters(), *model.buffers()]:
        x.data = x.data.to(torch.bfloat16)
    c = torch.empty(13, config.width, device=device, dtype=torch.bfloat16)
    return model, [c] * (1 + (guidance != 1))


@torch.no_grad()
def test_evaluations_agree_in_shape_and_type(cuda, wide):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, _ = on_gpu(wide.config, cuda, 1)
        with cuda:
            mapping = sdit.Mapping(1152, 768)
        x, t = (
            torch.empty(2, 8, 4, 32, 32, device=cuda),
            torch.zeros(2, dtype=torch.int64, device=cuda),
        )
        scene, landmarks = torch.empty(2, 768, device=cuda), torch.empty(2, 8, 478, 3, device=cuda)
        with Watch() as watch:
            c = mapping(scene, landmarks).to(torch.bfloat16)
            plain = model(x, t, c, 4)
            first, kv = model.forward_first(x[:1], t[:1], c[:1], 4)
            rest = model.forward_rest(x[1:, :7], t[1:], c[1:, :7], 4, kv)
        for y, frames in (plain, 8), (first, 8), (rest, 7):
            assert (
                y.device == cuda and y.dtype is plain.dtype and y.shape[1:] == (frames, 8, 32, 32)
            )
    assert not watch.found


@torch.no_grad()
@pytest.mark.parametrize("precision", list(export.PRECISIONS))
@pytest.mark.parametrize("form", list(export.FORMS))
def test_graphs(cuda, wide, form, precision):
    dtype = export.PRECISIONS[precision]
    graph = export.build_graph(copy.deepcopy(wide), form, precision)
    inputs = export.example(wide.config, form, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph, inputs = graph.to(cuda), {k: v.to(cuda) for k, v in inputs.items()}
        with Watch() as watch:
            outputs = export.run_module(graph, dtype, inputs)
        c = wide.config
        shapes = [(3, c.frames - (form == "rest"), 2 * c.latent_channels, 32, 32)]
        if form == "packed":
            shapes.append((c.depth, 2, 2, c.heads, c.tokens, c.width // c.heads))
        assert all(y.device == cuda and y.dtype is dtype for y in outputs)
        assert [tuple(y.shape) for y in outputs] == shapes
    assert not watch.found


def test_engine(cuda, wide):
    """What `sample.py --engine` gives a graph is made on the device."""
    seen = []

    def runner(inputs):
        seen.append(inputs)
        return (inputs["latents"],)

    engine = export.Engine("e", wide.config, 2, 8, runner, runner)
    with FakeTensorMode(), Watch() as watch:
        x, c = torch.empty(2, 7, 4, 32, 32, device=cuda), torch.empty(2, 7, 1152, device=cuda)
        engine.rest(x, 500, [c, c], 4, 2, torch.empty(1, device=cuda))
        assert all(v.device == cuda for v in seen[0].values())
        assert seen[0]["guidance"].dtype is torch.float32 and seen[0]["anchor"].dtype is torch.int64
    assert not watch.found


@torch.no_grad()
def test_autoencoder(cuda):
    with FakeTensorMode(), cuda, Watch() as watch:
        model = sdit.AutoencoderKL(sdit.AutoencoderConfig())
        z = model.encode(torch.empty(2, 3, 256, 256))
        assert z.shape == (2, 4, 32, 32) and z.device == cuda
        assert model.decode(z).shape == (2, 3, 256, 256)
    assert not watch.found


@torch.no_grad()
def test_clip(cuda, monkeypatch):
    """Pictures and sentences go over and wait: twice a clip, and it is the host that has them."""
    # torchvision asks the device whether a deviation is 0
    monkeypatch.setattr("torchvision.transforms.functional.normalize", lambda x, *_: x)
    encoder = data.SceneEncoder(ROOT / "demo" / "clip.safetensors")
    tokens = encoder.tokenizer(["a face"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.model.to(cuda)
        encoder.device, encoder.tokenizer = cuda, lambda sentences: tokens
        with Watch() as watch:
            scenes = encoder.images(torch.empty(2, 3, 300, 260)), encoder.texts(["a face"])
        assert all(scene.device == cuda and scene.dtype is torch.float32 for scene in scenes)
    assert not [found for found in watch.found if "waits" not in found]
