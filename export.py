"""Export of the denoiser for fast inference: TorchScript, ONNX, TensorRT, with the override of the
anchor inside the graph (paper 3.2).

    python export.py --onnx                            # the demo's -> export/demo-4-onnx-fp32
    python sample.py --engine export/demo-4-onnx-fp32  # sample with it
    python export.py --trt --model runs/XL-2-8/model.safetensors  # on the GPU that will run it
    python export.py --bench                           # how fast each is here

Two forms of the same weights. `override` is the paper's rule: the SDiT as it is. `packed`, the
default, is the same function with one copy of the anchor: linear layers see every frame once, at
the price of two attentions a block. It also returns the anchor's keys and values. A second graph,
`rest`, reads them and computes all rows but row 0, so a video may have any length.

An export gets its name only after it agrees with the model in float32 PyTorch."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import data
import sdit
from data import DEMO
from sdit import UserError

PRECISIONS = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)

# --------------------------------------------------------------------------------------------------
# The graphs. Guidance evaluates every row in G branches: 1, or 2, conditional and unconditional.
# Inside a graph each branch of a row is a row of its own, and each branch has its own anchor


class Graph(nn.Module):
    """The SDiT, and classifier-free guidance. This form has no anchor, to compare with."""

    def __init__(self, model, branches=2):
        super().__init__()
        self.model, self.branches = model, branches

    def forward(self, latents, timesteps, conditioning, anchor, guidance, anchor_kv=None):
        """latents (B, T, C, H, W), timesteps (B,), conditioning (B, G, T, D), anchor and guidance
        scalars -> guided noise, and the conditional branch's sigma, (B, T, 2C, H, W)."""
        B, G = latents.shape[0], self.branches
        x = torch.stack([latents] * G, 1).flatten(0, 1)  # (BG, T, C, H, W)
        t = torch.stack([timesteps] * G, 1).flatten()  # (BG,)
        c = conditioning.flatten(0, 1)  # (BG, T, D)
        output, *kv = self.denoise(x, t, c, B, anchor, anchor_kv)  # (BG, T, 2C, H, W)

        noise, sigma = output.unflatten(0, (-1, G)).chunk(2, 3)  # (B, G, T, C, H, W)
        guided = noise[:, -1] + guidance * (noise[:, 0] - noise[:, -1]) if G == 2 else noise[:, 0]
        return torch.cat([guided, sigma[:, 0]], 2).to(latents.dtype), *kv

    def denoise(self, x, t, c, B, anchor, anchor_kv):
        return (self.model.run_blocks(x, t, c, self.model.time_position),)


class Override(Graph):
    """The paper's rule: the anchor of every row is replaced by row 0's after the embedding and
    after every block (Eq. 3)."""

    def denoise(self, x, t, c, B, anchor, anchor_kv):
        def override(x):
            x = x.unflatten(0, (-1, self.branches))  # (B, G, T, ...)
            return sdit.override(x, anchor, axis=2).flatten(0, 1)

        return (self.model.run_blocks(x, t, c, self.model.time_position, override),)


class Packed(Graph):
    """The same function as `Override` with one copy of the anchor: what rows 1.. compute for theirs
    is thrown away by the override. Frames are packed, each as a row of its own: first the anchor of
    each branch, then the T - 1 others of row 0, branch by branch, then those of row 1 ..."""

    def denoise(self, x, t, c, B, anchor, anchor_kv):
        """Also returns the anchor's keys and values, (depth, 2, G, heads, N, d)."""
        model, G, T = self.model, self.branches, self.model.config.frames
        others = other_slots(anchor, T)

        def pack(x):  # (BG, T, ...) -> (G + BG(T - 1), 1, ...)
            anchors = x[:G].index_select(1, anchor.view(1))
            return torch.cat([anchors, x.index_select(1, others).flatten(0, 1).unsqueeze(1)])

        t = pack(t.unsqueeze(1).expand(-1, T)).squeeze(1)
        time_position = pack(model.time_position.expand(B * G, -1, -1))
        bank = PackedBank(B, G, T)
        x = model.run_blocks(pack(x), t, pack(c), time_position, bank=bank)

        # unpack: the anchor comes first now, and the slots before it one later
        rest = x[G:].squeeze(1).unflatten(0, (-1, T - 1))  # (BG, T - 1, 2C, H, W)
        x = torch.cat([tile(x[:G], B), rest], 1)
        slots = torch.arange(T, device=anchor.device)
        place = torch.where(slots == anchor, 0, slots + (slots < anchor).long())
        return x.index_select(1, place), torch.stack(bank.written)


class PackedBank(sdit.AnchorBank):
    """Attention among the frames that `Packed` packs, and the keys and values of their anchors."""

    def __init__(self, rows, branches, frames):
        super().__init__()
        self.rows, self.branches, self.frames = rows, branches, frames

    def attend(self, q, k, v, N):
        """Over (G + BG(T - 1), heads, N, d)."""
        G, tokens = self.branches, (self.frames - 1) * N
        self.written.append(torch.stack([k[:G], v[:G]]))  # (2, G, heads, N, d)

        def complete(x):  # keys or values of whole rows: (BG, heads, TN, d)
            return torch.cat([tile(x[:G], self.rows), regroup(x[G:], tokens)], 2)

        k, v = complete(k), complete(v)
        anchors = sdit.attend(q[:G], k[:G], v[:G])  # they are frames of row 0
        others = sdit.attend(regroup(q[G:], tokens), k, v)  # (BG, heads, (T - 1)N, d)
        return torch.cat([anchors, regroup(others, N)])


class Rest(Graph):
    """Rows without their anchor, T - 1 frames each; they read the keys and values `anchor_kv`
    (depth, 2, G, heads, N, d) of one made elsewhere."""

    def denoise(self, x, t, c, B, anchor, anchor_kv):
        others = other_slots(anchor, self.model.config.frames)
        time_position = self.model.time_position.index_select(0, others)
        bank = sdit.AnchorBank(kv=(tile(kv, B, 1) for kv in anchor_kv.unbind(0)))
        return (self.model.run_blocks(x, t, c, time_position, bank=bank),)


def other_slots(anchor, T):
    """The T - 1 slots that are not the anchor."""
    slots = torch.arange(T - 1, device=anchor.device)
    return slots + (slots >= anchor).long()


def tile(x, B, axis=0):
    """Repeat (.., G, ...) for each of B rows, row by row: (.., BG, ...)."""
    sizes = [-1] * (x.dim() + 1)
    sizes[axis] = B
    return x.unsqueeze(axis).expand(sizes).flatten(axis, axis + 1)


def regroup(x, tokens):
    """(rows, heads, n, d) -> the same in rows of `tokens` tokens, (.., heads, tokens, d)."""
    x = x.transpose(1, 2)  # (rows, n, heads, d)
    return x.reshape(-1, tokens, *x.shape[2:]).transpose(1, 2)


FORMS = dict(unanchored=Graph, override=Override, packed=Packed, rest=Rest)


def build_graph(model, form, precision="fp32", branches=2):
    """A graph in `precision`, of a model in float32, which stays as it is."""
    graph = FORMS[form](model, branches).eval().requires_grad_(False)
    return graph if precision == "fp32" else copy.deepcopy(graph).to(PRECISIONS[precision])


def example(config, form, rows, branches=2, anchor=0, t=500, seed=0, device="cpu"):
    """Inputs of a graph by name, random, float32."""
    c, T = config, config.frames - (form == "rest")
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    inputs = dict(
        latents=normal(rows, T, c.latent_channels, c.latent_size, c.latent_size),
        timesteps=torch.full((rows,), t),
        conditioning=normal(rows, branches, T, c.width),
        anchor=torch.tensor(anchor),
        guidance=torch.tensor(2.0),
    )
    if form == "rest":
        heads = c.heads, c.tokens, c.width // c.heads
        inputs["anchor_kv"] = normal(c.depth, 2, branches, *heads)
    return {name: x.to(device) for name, x in inputs.items()}


def cast(inputs, dtype):
    """Inputs by name in a graph's precision; integers stay."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def trace_inputs(graph, form):
    """Inputs on the graph's device and in its precision. (PyTorch takes 1 row for a constant.)"""
    position = graph.model.position
    inputs = example(graph.model.config, form, 3, graph.branches, device=position.device)
    return cast(inputs, position.dtype)


# --------------------------------------------------------------------------------------------------
# Writing graphs

OPSET = 20  # from 23 on there is an Attention operator, which TensorRT does not build in float32
OPEN = ("latents", "timesteps", "conditioning")  # inputs whose first axis is rows
OUTPUTS = ("output", "anchor_kv")  # the second of `packed` only


def safe_norm(x, *args, **options):
    """LayerNorm in float32: in float16 its squares overflow."""
    return F.layer_norm(x.float(), *args, **options).to(x.dtype)


def safe_attention(q, k, v):
    """Softmax in float32, in the pattern that TensorRT fuses."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.float().softmax(-1).to(v.dtype) @ v


def patch_embedding(images, weight, bias, stride, *_):
    """The convolution of `PatchEmbed` as a linear layer: ONNX has none in bfloat16."""
    patches = F.pixel_unshuffle(images, stride[0])  # (BT, C * p * p, H / p, W / p)
    tokens = F.linear(patches.flatten(2).transpose(1, 2), weight.flatten(1), bias)
    return tokens.transpose(1, 2).unflatten(2, patches.shape[2:])


class Portable(TorchFunctionMode):
    """While a graph is traced for others: functions that PyTorch computes in float32 inside."""

    replaced = {
        F.layer_norm: safe_norm,
        F.scaled_dot_product_attention: safe_attention,
        F.conv2d: patch_embedding,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.replaced.get(function, function)(*args, **kwargs or {})


def write_onnx(graph, form, folder):
    """FORM.onnx, and its weights FORM.onnx.data, in a folder. Returns the path."""
    import onnx

    # in two steps: the ONNX exporter by itself fixes the rows, silently, where it cannot keep them
    # open; torch.export raises
    inputs, rows = trace_inputs(graph, form), torch.export.Dim("rows", min=1, max=1024)
    shapes = {name: {0: rows} if name in OPEN else None for name in inputs}
    with Portable():
        program = torch.export.export(graph, (), inputs, dynamic_shapes=shapes)
    names = OUTPUTS if form == "packed" else OUTPUTS[:1]
    program = torch.onnx.export(program, output_names=names, opset_version=OPSET, verbose=False)
    path = folder / f"{form}.onnx"
    program.save(path, external_data=True)
    onnx.checker.check_model(path, full_check=True)
    return path


def write_torchscript(graph, form, folder):
    """FORM.ts, traced and frozen; its path. (Deprecated by PyTorch, which still runs it.)"""
    path, inputs = folder / f"{form}.ts", tuple(trace_inputs(graph, form).values())
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        traced = torch.jit.trace(graph, inputs, check_trace=False)
        torch.jit.freeze(traced).save(str(path))
    return path


def build_plan(trt, path, plan, rows, timing_cache=None):
    """Build the engine `plan` of an ONNX graph, for 1 to rows[1] rows and best at rows[0], with the
    module `trt`, TensorRT 10.12 to 11. The file `timing_cache` keeps the timings of kernels."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):  # from the file: the weights lie beside it
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise UserError(f"TensorRT cannot read {path}: {errors}")

    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name, shape = network.get_input(i).name, list(network.get_input(i).shape)
        if name in OPEN:
            profile.set_shape(name, *([n, *shape[1:]] for n in (1, *rows)))
    settings = builder.create_builder_config()
    settings.add_optimization_profile(profile)
    settings.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32; half precision is fast
    if timing_cache:
        known = timing_cache.read_bytes() if timing_cache.exists() else b""
        settings.set_timing_cache(settings.create_timing_cache(known), False)

    built = builder.build_serialized_network(network, settings)
    if built is None:
        raise UserError(f"TensorRT could not build {path}; its messages are above")
    plan.write_bytes(built)
    if timing_cache:
        timing_cache.write_bytes(settings.get_timing_cache().serialize())
    return plan


def import_tensorrt(device):
    """The module; UserError where it, or the GPU that it builds for and runs on, is not there."""
    with contextlib.suppress(ImportError):
        import tensorrt

        if device.type == "cuda":
            return tensorrt
    raise UserError(
        "TensorRT builds for the NVIDIA GPU that it runs on: choose one by --device, and pip "
        "install 'tensorrt>=10.12,<12' --extra-index-url https://pypi.nvidia.com; --onnx works "
        "without"
    )


# --------------------------------------------------------------------------------------------------
# Running graphs. A runner takes inputs by name, in any precision, and returns a tuple of outputs


def run_module(module, dtype, inputs):
    """PyTorch: a graph as it is, compiled, or loaded from TorchScript."""
    with torch.no_grad():
        return module(*cast(inputs, dtype).values())


def load_onnx(path, device):
    """ONNX Runtime's session, on the GPU or the CPU as asked."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    provider, settings = "CPUExecutionProvider", {}
    if device.type == "cuda":
        provider = "CUDAExecutionProvider"
        settings = dict(device_id=device.index or 0, use_tf32=0)
    cure = "install onnxruntime-gpu for PyTorch's CUDA version, or choose --device cpu"
    missing = UserError(f"this ONNX Runtime has no {provider}; {cure}")
    if provider not in onnxruntime.get_available_providers():
        raise missing
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, settings)])
    except Exception as e:  # its errors have no common class
        reason = str(e).partition("\n")[0]
        raise UserError(f"ONNX Runtime cannot run {path} on {device}: {reason}") from None
    if session.get_providers()[0] != provider:  # it falls back without an error
        raise missing
    return session


def run_onnx(session, dtype, inputs):
    """Share tensors with ONNX Runtime, without a copy. (bfloat16 needs a GPU.)"""
    from onnxruntime import OrtValue

    inputs, device = cast(inputs, dtype), inputs["latents"].device
    binding = session.io_binding()
    for value in session.get_inputs():
        tensor = OrtValue.from_dlpack(inputs[value.name].contiguous())
        binding.bind_ortvalue_input(value.name, tensor)
    for value in session.get_outputs():
        binding.bind_output(value.name, device.type, device.index or 0)

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # ONNX Runtime works on a stream of its own
    session.run_with_iobinding(binding)
    return tuple(torch.from_dlpack(value) for value in binding.get_outputs())


def load_plan(trt, path, device):
    """(execution context, stream) of a TensorRT engine on a GPU."""
    with torch.cuda.device(device):
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine = runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if engine is None:
            reason = "was built by another version of TensorRT or for another GPU"
            raise UserError(f"{path} {reason}; export it again here")
        return engine.create_execution_context(), torch.cuda.Stream(device)


def run_plan(context, stream, dtype, inputs):
    """Run on PyTorch's buffers, on a stream of its own: on the default one TensorRT would wait for
    everything."""
    names = {context.engine.get_tensor_name(i) for i in range(context.engine.num_io_tensors)}
    inputs = {k: v.contiguous() for k, v in cast(inputs, dtype).items() if k in names}
    device, rows = inputs["latents"].device, len(inputs["latents"])
    current = torch.cuda.current_stream(device)

    with torch.cuda.device(device):  # TensorRT runs on the current one
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                cure = f"export it with --rows {rows} {rows}"
                raise UserError(f"this engine was not built for {rows} rows; {cure}")
        shapes = [tuple(context.get_tensor_shape(name)) for name in OUTPUTS if name in names]
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        for name, tensor in [*inputs.items(), *zip(OUTPUTS, outputs)]:
            context.set_tensor_address(name, tensor.data_ptr())
            tensor.record_stream(stream)

        stream.wait_stream(current)
        if context.infer_shapes() or not context.execute_async_v3(stream.cuda_stream):
            raise UserError("TensorRT did not run; its message is above")
        current.wait_stream(stream)
    return tuple(outputs)


def load_runner(kind, path, dtype, device):
    """inputs by name -> tuple of outputs, of a graph file of any kind."""
    if kind == "torchscript":
        with warnings.catch_warnings(action="ignore"):
            return functools.partial(run_module, torch.jit.load(path, map_location=device), dtype)
    if kind == "onnx":
        return functools.partial(run_onnx, load_onnx(path, device), dtype)
    return functools.partial(run_plan, *load_plan(import_tensorrt(device), path, device), dtype)


@dataclass
class Engine:
    """An export, loaded: what `sample.py` samples with in place of the SDiT."""

    name: str
    config: sdit.SDiTConfig
    branches: int
    most_rows: int  # at once
    first_runner: callable
    rest_runner: callable

    def first(self, x, t, conditions, anchor, guidance):
        """Row 0, x (1, T, C, H, W), `conditions` (1, T, D) of each branch -> guided output (1, T,
        2C, H, W), anchor_kv."""
        return self._run(self.first_runner, x, t, conditions, anchor, guidance)

    def rest(self, x, t, conditions, anchor, guidance, anchor_kv):
        """Any other rows without their anchors, x (B, T - 1, C, H, W) -> (B, T - 1, 2C, H, W)."""
        inputs = x, t, conditions, anchor, guidance
        return self._run(self.rest_runner, *inputs, anchor_kv=anchor_kv)[0]

    def _run(self, runner, x, t, conditions, anchor, guidance, **rest):
        # an engine for guidance, asked for none: both branches are the same
        conditions = [*conditions, *conditions[:1]][: self.branches]
        inputs = dict(
            latents=x,
            timesteps=torch.full((len(x),), t, device=x.device),
            conditioning=torch.stack(conditions, 1),  # (B, G, T, D)
            anchor=torch.full((), anchor, device=x.device),
            guidance=torch.full((), float(guidance), device=x.device),
        )
        output, *kv = runner(inputs | rest)
        return output.to(x.dtype), *kv


@dataclass
class Manifest:
    """What an export says of itself, in manifest.json."""

    name: str
    kind: str
    precision: str
    branches: int
    rows: list  # typical and most
    opset: int
    model_sha256: str
    files: dict  # by form
    sha256: dict  # by file, as `bytes`
    bytes: dict
    config: dict
    versions: dict


def read_manifest(folder, cure="make it with export.py"):
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        about = Manifest(**json.loads((folder / "manifest.json").read_text()))
        typed = all(type(getattr(about, f.name)) is f.type for f in dataclasses.fields(about))
        known = typed and about.rows and about.precision in PRECISIONS
        if known and set(about.files) in ({"packed", "rest"}, {"override"}):
            return about
    raise UserError(f"{folder} is not an export, by its manifest.json; {cure}")


def load_engine(folder, model_sha256=None, device="cpu"):
    """The engine in a folder that this script wrote; refuses one made of another model."""
    folder, device = Path(folder), torch.device(device)
    about = read_manifest(folder)
    if model_sha256 and about.model_sha256 != model_sha256:
        made_of = f"another model ({about.name}, sha256 {about.model_sha256[:12]}...)"
        raise UserError(f"{folder} was made of {made_of}; give that as --model, or export this one")
    if "rest" not in about.files:
        raise UserError(f"{folder} holds the form override; videos need --form packed")
    config = sdit.check_config(sdit.SDiTConfig, about.config, folder / "manifest.json")

    for name, digest in about.sha256.items():
        path = folder / name
        if not path.is_file() or data.sha256(path) != digest:
            raise UserError(f"{path} is missing or not what was written; export again")
    dtype = PRECISIONS[about.precision]
    runners = [
        load_runner(about.kind, folder / about.files[form], dtype, device)
        for form in ("packed", "rest")
    ]
    most = about.rows[-1] if about.kind == "trt" else sys.maxsize
    return Engine(folder.resolve().name, config, about.branches, most, *runners)


# --------------------------------------------------------------------------------------------------
# Comparison with the model

# Relative L2 error against the model in float32, whose own rounding is 1e-5 where it is trained
TOLERANCE = dict(fp32=1e-4, fp16=5e-3, bf16=3e-2)


@torch.no_grad()
def reference(model, form, inputs):
    """What a graph must return, by the SDiT itself, one guidance branch at a time."""
    x, t, guidance = inputs["latents"], inputs["timesteps"], inputs["guidance"]
    branches = inputs["conditioning"].unbind(1)  # (B, T, D) each
    anchor = None if form == "unanchored" else inputs["anchor"].item()
    if form == "rest":
        pairs = zip(branches, inputs["anchor_kv"].split(1, 2))
        outputs = [model.forward_rest(x, t, c, anchor, kv) for c, kv in pairs]
    else:
        outputs = [model(x, t, c, anchor) for c in branches]

    noise, sigma = zip(*(output.chunk(2, 2) for output in outputs))
    guided = noise[-1] + guidance * (noise[0] - noise[-1]) if len(noise) == 2 else noise[0]
    expected = (torch.cat([guided, sigma[0]], 2),)
    if form == "packed":
        kv = [model.forward_first(x[:1], t[:1], c[:1], anchor)[1] for c in branches]
        expected += (torch.cat(kv, 2),)
    return expected


def relative_error(a, b):
    """L2 norm of a - b against that of b; infinite where a is not finite."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item() if a.isfinite().all() else math.inf


def verify(model, form, branches, run, most_rows):
    """Largest error of a runner over rows, slots and timesteps; and, as a control, the smallest
    that a graph without the anchor would have there."""
    T, device = model.config.frames, model.position.device
    errors, control = [], []
    for seed, (rows, slot, t) in enumerate([(1, 0, 0), (2, T // 2, 500), (5, T - 1, 999)]):
        rows = min(rows, most_rows)
        inputs = example(model.config, form, rows, branches, slot, t, seed, device)
        expected = reference(model, form, inputs)
        errors += [relative_error(a, b) for a, b in zip(run(inputs), expected, strict=True)]
        if rows > 1 and form in ("override", "packed"):
            control.append(relative_error(reference(model, "unanchored", inputs)[0], expected[0]))
    return max(errors), min(control, default=math.inf)


def upcast(path, folder):
    """Copy a bfloat16 ONNX graph to `folder` with float32 in its place, weights still rounded: ONNX
    Runtime has no bfloat16 on CPUs, but can run that. Returns the path."""
    import onnx
    from onnx import TensorProto as P
    from onnx import numpy_helper

    proto = onnx.load(path)
    graph = proto.graph
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    for tensor in [*graph.initializer, *(attribute.t for attribute in attributes)]:
        if tensor.data_type == P.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for attribute in attributes:
        if attribute.name == "to" and attribute.i == P.BFLOAT16:
            attribute.i = P.FLOAT
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == P.BFLOAT16:
            value.type.tensor_type.elem_type = P.FLOAT
    del graph.value_info[:]

    path = folder / path.name
    onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def check(model, kind, path, form, precision, branches, device, rows):
    """Compare a written graph with the model and print the error; UserError above tolerance."""
    dtype, note = PRECISIONS[precision], ""
    with tempfile.TemporaryDirectory() as scratch:
        if kind == "onnx" and precision == "bf16" and device.type == "cpu":
            path, dtype = upcast(path, Path(scratch)), torch.float32
            note = " (weights in bf16, computed in float32: no bf16 in ONNX Runtime on a CPU)"
        run = load_runner(kind, path, dtype, device)
        error, control = verify(model, form, branches, run, rows[-1])

    most = TOLERANCE[precision]
    against = f"; without the anchor it would be {control:.2g}" if control < math.inf else ""
    found = f"largest relative error {error:.2g}, tolerance {most:.0e}"
    print(f"{form:9} {kind} {precision}: {found}{against}{note}")
    if not error <= most:
        cure = "nothing was written; try another --precision"
        found = f"differs from the model by {error:.2g}, more than {most:.0e}"
        raise UserError(f"the {form} graph {found}; {cure}")
    if control < 10 * error:
        print("note: without the anchor the error would be hardly larger (is the model trained?)")


# --------------------------------------------------------------------------------------------------
# The command


def random_model(name, frames):
    """A model of a named size with random weights, none of them zero, to measure with."""
    torch.manual_seed(0)
    model = sdit.SDiT(sdit.make_config(name, frames))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def versions(*names):
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_graph(model, kind, form, a, folder, device):
    """One graph file of an export in `folder`. Returns its path."""
    graph = build_graph(model, form, a.precision, a.branches)
    if kind == "torchscript":
        return write_torchscript(graph, form, folder)
    if kind == "onnx":
        return write_onnx(graph, form, folder)

    trt = import_tensorrt(device)
    path = write_onnx(graph, form, folder)
    gpu = torch.cuda.get_device_name(device).replace(" ", "-")
    name = f"{form}.{data.sha256(path)[:12]}-{a.precision}-trt{trt.__version__}-{gpu}.plan"
    with torch.cuda.device(device):
        build_plan(trt, path, folder / name, a.rows, a.out / "timing.cache")
    for used in folder.glob(f"{path.name}*"):
        used.unlink()
    return folder / name


@contextlib.contextmanager
def atomic_folder(path):
    """A temporary folder that takes the place of `path` when the block ends well; else it goes."""
    fresh, older = (sdit.hidden(path, ending) for ending in (".tmp", ".old"))
    try:
        if older.exists() and not path.exists():  # a run was killed between two renames
            os.replace(older, path)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        shutil.rmtree(older, ignore_errors=True)
        if path.exists():
            os.replace(path, older)
        os.replace(fresh, path)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def export(model, digest, kind, a, device):
    """Write, check and name one artefact. Returns its folder."""
    start, config = time.perf_counter(), model.config
    form = "" if a.form == "packed" else f"-{a.form}"
    guided = "" if a.branches == 2 else "-unguided"
    size = config.name.replace("/", "-")
    final = a.out / f"{size}-{config.frames}-{kind}-{a.precision}{form}{guided}"
    if final.exists():
        cure = "move it, or choose another --out"
        about = read_manifest(final, cure)
        if about.model_sha256 != digest:
            raise UserError(f"{final} is the export of another model; {cure}")
        if others := sorted({p.name for p in final.iterdir()} - {*about.sha256, "manifest.json"}):
            raise UserError(f"{final} also holds {others[0]}, which is not the export's; {cure}")

    with data.owned(final), atomic_folder(final) as folder:
        forms = ["packed", "rest"] if a.form == "packed" else [a.form]
        files = {}
        for form in data.progress(forms, kind, "graph"):
            path = write_graph(model, kind, form, a, folder, device)
            check(model, kind, path, form, a.precision, a.branches, device, a.rows)
            files[form] = path.name

        written = sorted(folder.iterdir())
        packages = "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "tensorrt"
        about = Manifest(
            name=config.name,
            kind=kind,
            precision=a.precision,
            branches=a.branches,
            rows=a.rows,
            opset=OPSET,
            model_sha256=digest,
            files=files,
            sha256={path.name: data.sha256(path) for path in written},
            bytes={path.name: path.stat().st_size for path in written},
            config=dataclasses.asdict(config),
            versions=versions(*packages),
        )
        (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(about), indent=1))

    size = sum(about.bytes.values()) / 2**20
    seconds, peak = time.perf_counter() - start, data.peak_memory()
    print(f"{final}: {size:,.0f} MiB, {seconds:.0f} s, peak memory {peak:.1f} GiB")
    return final


def arguments():
    ap = data.Parser(__doc__)
    add = ap.add_argument
    add("--onnx", action="store_true", help="ONNX graphs, for ONNX Runtime and others")
    add("--torchscript", action="store_true", help="TorchScript modules")
    add("--trt", action="store_true", help="TensorRT engines for the GPU of this machine")
    add("--bench", action="store_true", help="time every form and backend that is there")
    add("--model", type=Path, default=DEMO / "sdit.safetensors", help="model file of train.py")
    add("--size", help="random weights of this size instead of a model, to measure: XL/2 ...")
    frames = data.number(int, 2, 10_000)
    add("--frames", type=frames, default=8, help="frames a row, with --size")
    add("--out", type=Path, default=Path("export"), help="folder for the export's own folder")
    forms = "packed: fast, any length; override: the paper's rule as written"
    add("--form", choices=["packed", "override"], default="packed", help=forms)
    precision = "default: bf16 for TensorRT and for --bench on a GPU, else fp32"
    add("--precision", choices=list(PRECISIONS), help=precision)
    branches = "2: with classifier-free guidance inside; 1: without, half the work"
    add("--branches", type=int, choices=[1, 2], default=2, help=branches)
    rows = "rows at once of a TensorRT engine; --bench takes the typical number"
    pair = dict(nargs=2, default=[4, 8], metavar=("TYPICAL", "MOST"))
    add("--rows", type=data.number(int, 1, 10_000), **pair, help=rows)
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    a = ap.parse_args()

    if a.rows[0] > a.rows[1]:
        raise UserError(f"--rows {a.rows[0]} {a.rows[1]}: the second must be the larger number")
    if not (a.onnx or a.torchscript or a.trt or a.bench):
        raise UserError("choose what to make: --onnx, --torchscript, --trt, or --bench")
    return a


def main():
    a = arguments()
    device, precision = data.get_device(a.device), a.precision
    if a.trt:
        import_tensorrt(device)  # said before the work
    torch.backends.cudnn.allow_tf32 = False  # the model to compare with is float32
    if a.size:
        model, digest = random_model(a.size, a.frames).to(device), "random"
    else:
        model, digest = sdit.load_model(a.model, device), data.sha256(a.model)
    if model.config.frames < 2:
        raise UserError("rows of one frame share no anchor; export a model of two frames or more")

    for kind in ("onnx", "torchscript", "trt"):
        if getattr(a, kind):
            a.precision = precision or ("bf16" if kind == "trt" else "fp32")
            export(model, digest, kind, a, device)
    if a.bench:
        sys.path.append(str(DEMO))
        import bench

        half = device.type == "cuda" and sdit.has_bf16("cuda")
        a.precision = precision or ("bf16" if half else "fp32")
        bench.bench(model, a, device)


if __name__ == "__main__":
    data.run_main(main)
