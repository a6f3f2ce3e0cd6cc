"""The graphs of export.py against the model: TorchScript and ONNX, both forms, all precisions; engines in sample.py."""
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from graphs import CPU, both_predictions, cases, check_structure, runner

import data
import export
import sample
import sdit
from sdit import UserError


# v becomes noise behind the blocks, in all forms alike (see test_graphs_in_float64): the form that is written fastest has it
@pytest.mark.parametrize("small_model, form", [("epsilon-2", "override"), ("epsilon-2", "packed"), ("epsilon-2", "rest"), ("v", "rest")], indirect=["small_model"])
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_float32_graphs_equal_the_model(small_model, onnx_graph, tmp_path, form, kind):
    path = onnx_graph(small_model, form, "fp32") if kind == "onnx" else export.write_torchscript(export.build_graph(small_model, form), form, tmp_path)
    if kind == "onnx":
        check_structure(small_model, form, path)
    run = runner(kind, path)
    for inputs in cases(small_model, form):
        for result, expected in zip(run(inputs), export.reference(small_model, form, inputs), strict=True):
            assert result.shape == expected.shape
            assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()
            assert export.relative_error(result, expected) <= 1e-5


@both_predictions
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("form", list(export.FORMS))
def test_graphs_in_float64(small_model, form, branches):
    whole = sdit.SDiT(small_model.config)
    whole.load_state_dict(small_model.state_dict())
    graph = export.build_graph(whole.double(), form, branches=branches)
    for inputs in cases(small_model, form, branches):
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        for result, expected in zip(export.run_module(graph, torch.float64, inputs), export.reference(whole, form, inputs), strict=True):
            assert export.relative_error(result, expected) < 1e-12


def test_packed_equals_override(small_model, onnx_graph):
    packed, override = (runner("onnx", onnx_graph(small_model, form, "fp32")) for form in ("packed", "override"))
    for inputs in cases(small_model, "packed"):
        assert export.relative_error(packed(inputs)[0], override(inputs)[0]) <= 1e-5


def test_a_missing_override_would_be_seen(small_model, onnx_graph):
    unanchored = export.build_graph(small_model, "unanchored")
    for form in ("override", "packed"):
        run = runner("onnx", onnx_graph(small_model, form, "fp32"))
        for inputs in cases(small_model, form):
            if len(inputs["latents"]) > 1:
                assert export.relative_error(export.run_module(unanchored, torch.float32, inputs)[0], run(inputs)[0]) > 1e-2


def test_branches_read_their_own_anchor(small_model):
    """Both branches as rows of one branch, which is how the conditional anchor would leak into the unconditional half, is another function."""
    one = export.build_graph(small_model, "override", branches=1)
    for inputs in cases(small_model, "override"):
        both = {k: torch.cat([v, v]) for k, v in inputs.items() if k in ("latents", "timesteps")}
        leak = export.run_module(one, torch.float32, inputs | both | dict(conditioning=inputs["conditioning"].transpose(0, 1).flatten(0, 1)[:, None]))[0]
        noise, base = (x.chunk(2, 2)[0] for x in leak.chunk(2))
        expected = export.reference(small_model, "override", inputs)[0].chunk(2, 2)[0]
        assert export.relative_error(base + 2.0 * (noise - base), expected) > 1e-2


def test_row_0_decides_for_all_rows_and_they_share_the_anchor(small_model, onnx_graph):
    for form in ("override", "packed"):
        run = runner("onnx", onnx_graph(small_model, form, "fp32"))
        inputs = export.example(small_model.config, form, 5, anchor=2)
        result = run(inputs)[0]
        assert all(torch.equal(row[2], result[0, 2]) for row in result)
        assert not torch.equal(result[0, 1], result[1, 1])
        other = dict(inputs, latents=inputs["latents"].clone())
        other["latents"][0] = torch.randn_like(other["latents"][0])
        assert ((run(other)[0] - result).flatten(1).abs().amax(1) > 1e-3).all()
        other = dict(inputs, latents=inputs["latents"].clone())
        other["latents"][3] = torch.randn_like(other["latents"][3])
        assert ((run(other)[0] - result).flatten(1).abs().amax(1) > 1e-3).tolist() == [False, False, False, True, False]


class Arguments:
    """What the command line would give."""
    form, precision, branches, rows = "packed", "fp32", 2, [4, 8]

    def __init__(self, out, **rest):
        self.out = out
        vars(self).update(rest)


@pytest.fixture(scope="module")
def engine(small_model, onnx_graph, tmp_path_factory):
    """An export of the graphs that are there already: test_readme.py writes one from nothing."""
    def copy(graph, form, folder):
        path = onnx_graph(small_model, form, "fp32")
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        return folder / path.name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_onnx", copy)
        folder = export.export(small_model, "digest", "onnx", Arguments(tmp_path_factory.mktemp("export")), CPU)
    return export.load_engine(folder, "digest")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_engines_sample_videos_of_any_length(small_model, engine, guidance):
    torch.manual_seed(1)
    conditions = [torch.randn(30, 64) for _ in range(1 if guidance == 1 else 2)]
    settings = sample.Settings(steps=20, sampler="ddim", guidance=guidance)
    by_model, by_engine = (sample.sample_video(m, conditions, settings) for m in (small_model, engine))
    limited = sample.sample_video(type(engine)(**dict(vars(engine), most_rows=2)), conditions, settings)         # a video longer than the engine's rows
    for frame in range(30):
        assert export.relative_error(by_engine[frame], by_model[frame]) <= 1e-3
        assert export.relative_error(limited[frame], by_model[frame]) <= 1e-3
    banks = [sample.sample_first(m, *first_row(small_model, conditions), settings, 2)[1] for m in (small_model, engine)]
    for of_model, of_engine in zip(*banks, strict=True):
        assert export.relative_error(of_engine[:, :, :len(conditions)], torch.cat(of_model, 2)) <= 1e-3


def first_row(small_model, conditions):
    frames = np.arange(4)[None]
    return sample.frame_noise(0, frames, (4, 8, 8)).float(), frames, [c[:4][None] for c in conditions]


def test_the_demo_by_an_engine(tmp_path, monkeypatch):
    """The same frames, through the command line's own functions; compared before H.264, which codes small differences as it likes.
    In float32 also where the processor has bfloat16."""
    monkeypatch.setattr(sdit, "has_bf16", lambda device: False)
    path, images = ROOT / "demo" / "sdit.safetensors", []
    to_images = data.to_images
    monkeypatch.setattr(data, "to_images", lambda x: images.append(to_images(x)) or images[-1])
    folder = export.export(sdit.load_model(path), data.sha256(path), "torchscript", Arguments(tmp_path), CPU)
    for engine in (None, folder):
        sample.reenact(out=tmp_path / "x.mp4", engine=engine, only="0:8", steps=8)
    by_model, by_engine = (x.astype(int) for x in images)
    assert by_model.shape == by_engine.shape == (8, 128, 128, 3)
    assert abs(by_model - by_engine).max() <= 2
    with pytest.raises(UserError, match="anchored"):
        sample.reenact(out=tmp_path / "x.mp4", engine=folder, method="independent")


def test_an_export_is_there_after_every_kill(tmp_path, monkeypatch):
    """Also after one between the two renames that put a new one in its place."""
    path, replace = tmp_path / "export", os.replace
    for text in ("old", "new"):
        with export.atomic_folder(path) as folder:
            (folder / "file").write_text(text)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(export.os, "replace", lambda a, b: replace(a, b) if b != path else exec("raise KeyboardInterrupt"))
        with export.atomic_folder(path) as folder:
            (folder / "file").write_text("newest")
    with contextlib.suppress(UserError), export.atomic_folder(path) as folder:
        raise UserError("the next run fails, too")
    assert (path / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["export"]


def test_what_does_not_fit_is_refused(small_model, engine, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not an export"):
        export.load_engine(tmp_path)
    folder = export.export(small_model, "digest", "torchscript", Arguments(tmp_path), CPU)
    with pytest.raises(UserError, match="another model"):
        export.load_engine(folder, "another")
    with pytest.raises(UserError, match="is the export of another model; move it"):
        export.export(small_model, "another", "torchscript", Arguments(tmp_path), CPU)
    about = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(about | dict(config=about["config"] | dict(unknown=1))))
    with pytest.raises(UserError, match="manifest.json is not a model of ours"):
        export.load_engine(tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    (folder / "rest.ts").write_bytes(b"torn")
    with pytest.raises(UserError, match="rest.ts is missing or not what was written"):
        export.load_engine(folder, "digest")
    override = export.export(small_model, "digest", "torchscript", Arguments(tmp_path, form="override"), CPU)
    with pytest.raises(UserError, match="--form packed"):
        export.load_engine(override)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setitem(export.TOLERANCE, "fp32", 1e-12)
    with pytest.raises(UserError, match="nothing was written"):
        export.export(small_model, "digest", "torchscript", Arguments(tmp_path), CPU)
    assert sorted(tmp_path.rglob("*")) == before                                # the one before stays


def test_tensorrt_runs_on_the_device_of_its_inputs(small_model, monkeypatch):
    entered, done = [], []

    @contextlib.contextmanager
    def on(device):
        entered.append(device)
        yield
        entered.pop()

    def run(stream):
        done.append(list(entered))
        return True
    engine = SimpleNamespace(num_io_tensors=2, get_tensor_name=lambda i: ("latents", "output")[i])
    context = SimpleNamespace(engine=engine, infer_shapes=list, execute_async_v3=run, get_tensor_shape=lambda _: (1,),
                              set_tensor_address=lambda *_: None, set_input_shape=lambda *_: True)
    stream = SimpleNamespace(wait_stream=lambda _: None, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    inputs = export.example(small_model.config, "override", 1)
    export.run_plan(context, stream, torch.float32, inputs)
    assert done == [[CPU]]


def test_a_wrong_graph_is_found(small_model, tmp_path):
    """The comparison that every export goes through fails on a graph without the override."""
    path = export.write_torchscript(export.build_graph(small_model, "unanchored"), "override", tmp_path)
    with pytest.raises(UserError, match="differs from the model"):
        export.check(small_model, "torchscript", path, "override", "fp32", 2, CPU, [4, 8])


def test_manifest(engine, small_model, tmp_path):
    folder = export.export(small_model, "digest", "torchscript", Arguments(tmp_path), CPU)
    about = json.loads((folder / "manifest.json").read_text())
    assert about["files"] == dict(packed="packed.ts", rest="rest.ts") and about["versions"]["torch"]
    assert about["bytes"]["packed.ts"] == (folder / "packed.ts").stat().st_size
    assert about["sha256"]["packed.ts"] == data.sha256(folder / "packed.ts")
    assert not [p for p in Path(tmp_path).iterdir() if p != folder]


@pytest.mark.parametrize("given, reason", [((), "choose what to make"), (("--trt",), "TensorRT"), (("--onnx", "--rows", "4", "2"), "--rows 4 2"),
                                           (("--onnx", "--model", "none.safetensors"), "no such model file: none.safetensors")])
def test_bad_arguments(given, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", *given])
    with pytest.raises((UserError, SystemExit)) as raised:
        export.main()
    assert reason in f"{raised.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_an_onnx_runtime_without_cuda_is_named(monkeypatch, tmp_path):
    import onnxruntime
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="has no CUDAExecutionProvider; install onnxruntime-gpu"):
        export.load_onnx(tmp_path / "packed.onnx", torch.device("cuda"))
