"""Export of the denoiser for fast inference: TorchScript, ONNX, TensorRT, with the override of the
anchor inside the graph (paper 3.2).

    # the bundled model -> export/demo-4-onnx-fp32
    python export.py --onnx
    # -> export/XL-2-8-trt-bf16, on the GPU that will run it
    python export.py --trt --model runs/XL-2-8/model.safetensors
    python sample.py --engine export/demo-4-onnx-fp32                      # sample with it
    python export.py --bench                                             # how fast each is here

Two forms of the same weights. `override` is the paper's rule as it stands: one `Where` after the
embedding and every block. `packed`, the default, is the same function with one copy of the anchor:
linear layers see every frame once, at the price of two attentions a block. From `packed` the keys
and values of the anchor leave the graph (row 0); a second graph, `rest`, reads them (all other
rows): so a video may have any length.

Every export is compared with the model in float32 PyTorch before it gets its name; above tolerance
nothing is left behind."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import sdit
from sdit import UserError

DEMO = Path(__file__).resolve().parent / "demo"

# --------------------------------------------------------------------------------------------------
# The graphs. The guidance branches (G of them: 1, or 2, conditional and unconditional) are an axis
# of their own, so that no branch reads the anchor of another. Rows are the only axis left open.
# Inside, frames are x (frames, N, D) with conditioning c (frames, D)


def norm(x):
    """LayerNorm in float32, whatever the weights: in float16 its squares overflow."""
    return F.layer_norm(
        x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, x.shape[-1:], eps=1e-6
    ).to(x.dtype)


def attend(q, k, v):
    """Attention over (rows, heads, tokens, d); in half precision with the softmax in float32, the
    pattern that TensorRT fuses."""
    if q.dtype in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.float().softmax(-1).to(v.dtype) @ v


def merge(x):
    """(rows, heads, tokens, d) -> (rows, tokens, D)."""
    return x.transpose(1, 2).flatten(2)


class Graph(nn.Module):
    """What the graphs share: the layers of an SDiT, without its mapping network, and the way
    through one block. Written anew from `sdit.Block`, since half precision needs its norms and
    softmax spelled out in float32, and the anchor's slot is an input here."""

    outputs = ("output",)
    unpatchify = sdit.SDiT.unpatchify
    predict_noise = sdit.SDiT.predict_noise

    def __init__(self, model, branches=2):
        super().__init__()
        self.config, self.branches = model.config, branches
        self.x_embedder, self.t_embedder, self.blocks, self.final_layer = (
            model.x_embedder,
            model.t_embedder,
            model.blocks,
            model.final_layer,
        )
        for name, value in dict(
            position=model.position,
            time_position=model.time_position,
            slots=torch.arange(model.config.frames),
        ).items():
            self.register_buffer(name, value.to(model.position.device), persistent=False)
        self.roots = model.roots.to(model.position)  # no buffer: float32 in half precision

    def override(self, x, anchor):
        """x (B, G, T, ...)."""
        return torch.where((self.slots == anchor).view(-1, *[1] * (x.dim() - 3)), x[:1], x)

    def embed(self, latents, slots):
        """Tokens (B, G, T, N, D) of latents (B, T, C, H, W) in `slots` (T,)."""
        p, side, patches = (
            self.config.patch,
            self.config.latent_size // self.config.patch,
            self.x_embedder.proj,
        )
        x = (
            latents.unflatten(4, (side, p))
            .unflatten(3, (side, p))
            .permute(0, 1, 3, 5, 2, 4, 6)
            .flatten(4, 6)
            .flatten(2, 3)
        )
        # as a convolution ONNX would not have it in bfloat16
        x = F.linear(x, patches.weight.flatten(1), patches.bias)
        x = x + self.position + self.time_position.index_select(0, slots)[:, None]  # (B, T, N, D)
        return x[:, None].expand(-1, self.branches, -1, -1, -1)

    def condition(self, timesteps, conditioning):
        """(B,) and (B, G, T, D) -> what the blocks see, (B, G, T, D)."""
        return self.t_embedder(timesteps)[:, None, None] + conditioning

    def others(self, anchor):
        """The T - 1 slots that are not the anchor."""
        first = self.slots[: self.config.frames - 1]
        return first + (first >= anchor).long()

    def heads(self, qkv):
        """(rows, tokens, 3D) -> q, k, v (rows, heads, tokens, d)."""
        return [z.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for z in qkv.chunk(3, -1)]

    def read(self, qkv, kv):
        """Attention of rows that lack their anchor, qkv (BG(T - 1), N, 3D), to themselves and to
        the anchor of their branch, whose keys and values are kv (2, G, heads, N, d). -> (BG(T - 1),
        N, D)"""
        G, N = self.branches, self.config.tokens
        # (BG, heads, (T - 1)N, d)
        q, *own = self.heads(qkv.reshape(-1, (self.config.frames - 1) * N, qkv.shape[-1]))
        own = [z.unflatten(0, (-1, G)) for z in own]  # (B, G, heads, (T - 1)N, d)
        k, v = (
            torch.cat([shared.expand(z.shape[0], -1, -1, -1, -1), z], 3).flatten(0, 1)
            for shared, z in zip(kv.unbind(0), own)
        )
        return merge(attend(q, k, v)).reshape(-1, N, self.config.width)

    def block(self, block, x, c, attention):
        """One block on frames x (frames, N, D), c (frames, D); `attention` takes (frames, N, 3D) to
        (frames, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            block.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        )
        x = x + gate1 * block.attn.proj(attention(block.attn.qkv(norm(x) * (1 + scale1) + shift1)))
        return x + gate2 * block.mlp(norm(x) * (1 + scale2) + shift2)

    def final(self, x, c):
        shift, scale = self.final_layer.adaLN_modulation(c).unsqueeze(1).chunk(2, -1)
        return self.final_layer.linear(norm(x) * (1 + scale) + shift)

    def guide(self, output, guidance, latents, timesteps):
        """Tokens (B, G, T, N, p * p * 2C) -> (B, T, 2C, H, W).

        Two branches are guided; the learned sigma is the conditional one's. `latents`, the graph's
        input (B, T, C, H, W), come overridden where the graph overrides."""
        # (B, G, T, 2C, H, W)
        output = self.unpatchify(output.flatten(0, 1)).unflatten(0, (-1, self.branches))
        noise, v = output.split(self.config.latent_channels, 3)
        if self.branches == 2:
            noise = noise[:, 1:] + guidance * (noise[:, :1] - noise[:, 1:])
        output = torch.cat([noise[:, 0], v[:, 0]], 2)
        return self.predict_noise(output, latents, timesteps).to(output.dtype)


class Override(Graph):
    """The paper's rule: the anchor of every row is replaced by row 0's after the embedding and
    after every block (Eq. 3)."""

    def forward(self, latents, timesteps, conditioning, anchor, guidance):
        """latents (B, T, C, H, W), timesteps (B,), conditioning (B, G, T, D), anchor and guidance
        scalars -> (B, T, 2C, H, W)."""
        T, G, N, D = self.config.frames, self.branches, self.config.tokens, self.config.width

        def attention(qkv):  # (BGT, N, 3D)
            return merge(attend(*self.heads(qkv.reshape(-1, T * N, 3 * D)))).reshape(-1, N, D)

        x = self.override(self.embed(latents, self.slots), anchor)  # (B, G, T, N, D)
        c = self.override(self.condition(timesteps, conditioning), anchor).flatten(0, 2)  # (BGT, D)
        for block in self.blocks:
            x = self.override(
                self.block(block, x.flatten(0, 2), c, attention).unflatten(0, (-1, G, T)), anchor
            )
        x = self.final(x.flatten(0, 2), c).unflatten(0, (-1, G, T))
        return self.guide(x, guidance, self.override(latents[:, None], anchor)[:, 0], timesteps)


class Unanchored(Override):
    """No anchoring at all, to compare with."""

    def override(self, x, anchor):
        return x


class Packed(Graph):
    """The same function as `Override` with one copy of the anchor: what rows 1.. compute for theirs
    is thrown away by the override, so they need only read its keys and values. Frames are packed:
    the G anchors, then the other T - 1 frames of row 0, branch by branch, then those of row 1 ...
    """

    outputs = ("output", "anchor_kv")

    def forward(self, latents, timesteps, conditioning, anchor, guidance):
        """As `Override.forward`; also returns the anchor's keys and values, (depth, 2, G, heads, N,
        d)."""
        T, G, slots, kept = self.config.frames, self.branches, self.others(anchor), []

        def pack(x):  # (B, G, T, ...) -> (G + BG(T - 1), ...)
            return torch.cat(
                [x[0].index_select(1, anchor.view(1))[:, 0], x.index_select(2, slots).flatten(0, 2)]
            )

        def attention(qkv):
            q, k, v = self.heads(qkv[:G])  # (G, heads, N, d)
            kept.append(torch.stack([k, v]))
            # its G (T - 1) other frames, which the anchor reads too
            row_0 = self.heads(qkv[G : G * T].reshape(G, -1, qkv.shape[-1]))
            anchors = merge(attend(q, *(torch.cat(pair, 2) for pair in zip((k, v), row_0[1:]))))
            return torch.cat([anchors, self.read(qkv[G:], kept[-1])])

        x, c = pack(self.embed(latents, self.slots)), pack(self.condition(timesteps, conditioning))
        for block in self.blocks:
            x = self.block(block, x, c, attention)
        x = self.final(x, c)
        others = x[G:].unflatten(0, (-1, G, T - 1))
        first = x[None, :G, None].expand(others.shape[0], -1, -1, -1, -1)
        # the anchor comes first now; back to the order of slots: the anchor is at 0, slots before
        # it one later, those after it where they were
        place = torch.where(
            self.slots == anchor, 0, torch.where(self.slots < anchor, self.slots + 1, self.slots)
        )
        x = torch.cat([first, others], 2).index_select(2, place)
        latents = self.override(latents[:, None], anchor)[:, 0]
        return self.guide(x, guidance, latents, timesteps), torch.stack(kept)


class Rest(Graph):
    """Rows without their anchor slots; they read the keys and values of one made elsewhere."""

    def forward(self, latents, timesteps, conditioning, anchor, guidance, anchor_kv):
        """latents (B, T - 1, C, H, W), conditioning (B, G, T - 1, D), anchor_kv (depth, 2, G,
        heads, N, d) -> (B, T - 1, 2C, H, W)."""
        x = self.embed(latents, self.others(anchor)).flatten(0, 2)
        c = self.condition(timesteps, conditioning).flatten(0, 2)
        for block, kv in zip(self.blocks, anchor_kv.unbind(0)):
            x = self.block(block, x, c, lambda qkv: self.read(qkv, kv))
        x = self.final(x, c).unflatten(0, (-1, self.branches, self.config.frames - 1))
        return self.guide(x, guidance, latents, timesteps)


FORMS = dict(unanchored=Unanchored, override=Override, packed=Packed, rest=Rest)
PRECISIONS = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def build_graph(model, form, precision="fp32", branches=2):
    """A graph in `precision`, of a model in float32, which stays as it is."""
    graph = FORMS[form](model, branches).eval().requires_grad_(False)
    return graph if precision == "fp32" else copy.deepcopy(graph).to(PRECISIONS[precision])


def example(config, form, rows, branches=2, anchor=0, t=500, seed=0, device="cpu"):
    """Inputs of a graph by name, random, float32."""
    g, T = torch.Generator().manual_seed(seed), config.frames - (form == "rest")
    inputs = dict(
        latents=torch.randn(
            rows, T, config.latent_channels, config.latent_size, config.latent_size, generator=g
        ),
        timesteps=torch.full((rows,), t),
        conditioning=torch.randn(rows, branches, T, config.width, generator=g),
        anchor=torch.tensor(anchor),
        guidance=torch.tensor(2.0),
    )
    if form == "rest":
        inputs["anchor_kv"] = torch.randn(
            config.depth,
            2,
            branches,
            config.heads,
            config.tokens,
            config.width // config.heads,
            generator=g,
        )
    return {k: v.to(device) for k, v in inputs.items()}


def output_shapes(config, form, rows, branches):
    """Shapes of what a graph returns, by name."""
    size = config.latent_size
    shapes = dict(
        output=(rows, config.frames - (form == "rest"), 2 * config.latent_channels, size, size),
        anchor_kv=(
            config.depth,
            2,
            branches,
            config.heads,
            config.tokens,
            config.width // config.heads,
        ),
    )
    return {name: shapes[name] for name in FORMS[form].outputs}


# --------------------------------------------------------------------------------------------------
# Writing graphs

OPSET = 20  # from 23 on there is an Attention operator, which TensorRT does not build in float32
OPEN = ("latents", "timesteps", "conditioning")  # inputs whose first axis is rows


def torch_program(graph, form):
    """torch.export's program of a graph, for any number of rows. (The ONNX exporter by itself fixes
    the rows, without a word, where it cannot keep them open; this raises.)"""
    rows, dtype = torch.export.Dim("rows", min=1, max=1024), graph.position.dtype
    inputs = example(graph.config, form, 3, graph.branches, device=graph.position.device)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return torch.export.export(
        graph, (), inputs, dynamic_shapes={k: {0: rows} if k in OPEN else None for k in inputs}
    )


def write_onnx(graph, form, folder):
    """FORM.onnx, and its weights FORM.onnx.data, in a folder. Returns the path."""
    import onnx

    path = folder / f"{form}.onnx"
    program = torch.onnx.export(
        torch_program(graph, form),
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
        input_names=[*example(graph.config, form, 1)],
        output_names=list(graph.outputs),
    )
    program.save(path, external_data=True)
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path, load_external_data=False).graph
    axes = [
        v.type.tensor_type.shape.dim[0]
        for v in [*proto.input, *proto.output]
        if v.name in (*OPEN, "output")
    ]
    if len(axes) != 4 or len({a.dim_param for a in axes}) != 1 or not axes[0].dim_param:
        raise UserError(f"{path}: the rows are not one open axis")
    return path


def write_torchscript(graph, form, folder):
    """FORM.ts, traced and frozen. (PyTorch deprecates TorchScript in favour of torch.export; it
    still works.) Returns the path."""
    inputs = example(graph.config, form, 3, graph.branches, device=graph.position.device).values()
    inputs = tuple(v.to(graph.position.dtype) if v.is_floating_point() else v for v in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.trace(graph, inputs, check_trace=False)).save(
            str(folder / f"{form}.ts")
        )
    return folder / f"{form}.ts"


def build_plan(trt, path, plan, rows, timing_cache=None):
    """Build the TensorRT engine `plan` of an ONNX graph, for 1 to rows[1] rows and best at rows[0],
    with TensorRT 10.12 to 11; `trt` is the module. Types are those of the graph (strongly typed).
    Timings of kernels are kept in the file `timing_cache`."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):  # from the file: the weights lie beside it
        raise UserError(
            f"TensorRT cannot read {path}: "
            + "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        )
    settings, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name, shape = network.get_input(i).name, list(network.get_input(i).shape)
        if name in OPEN:
            profile.set_shape(name, *([n, *shape[1:]] for n in (1, *rows)))
    settings.add_optimization_profile(profile)
    # float32 means float32; half precision is what is fast
    settings.clear_flag(trt.BuilderFlag.TF32)
    if timing_cache:
        cache = settings.create_timing_cache(
            Path(timing_cache).read_bytes() if Path(timing_cache).exists() else b""
        )
        settings.set_timing_cache(cache, False)
    built = builder.build_serialized_network(network, settings)
    if built is None:
        raise UserError(f"TensorRT could not build {path}; its messages are above")
    plan.write_bytes(built)
    if timing_cache:
        Path(timing_cache).write_bytes(settings.get_timing_cache().serialize())
    return plan


def import_tensorrt(device):
    """The module; UserError where it, or the GPU that it builds for and runs on, is not there."""
    try:
        import tensorrt
    except ImportError:
        raise UserError(
            "TensorRT is not installed: pip install tensorrt --extra-index-url https://pypi.nvidia.com, on a machine with an "
            "NVIDIA GPU; --onnx works without"
        ) from None
    if device.type != "cuda":
        raise UserError(
            "TensorRT builds for the NVIDIA GPU that it runs on, and there is none here; --onnx works without"
        )
    return tensorrt


# --------------------------------------------------------------------------------------------------
# Running graphs. A runner takes inputs by name, any precision, and returns a tuple of outputs, all
# of them on the device


def run_module(module, dtype, inputs):
    """PyTorch: a graph as it is, compiled, or loaded from TorchScript."""
    with torch.no_grad():
        outputs = module(*(v.to(dtype) if v.is_floating_point() else v for v in inputs.values()))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def load_onnx(path, device):
    """ONNX Runtime's session, on the GPU or the CPU as asked."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    cuda = ("CUDAExecutionProvider", dict(device_id=device.index or 0, use_tf32=0))
    provider, settings = cuda if device.type == "cuda" else ("CPUExecutionProvider", {})
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, settings)])
    except Exception as e:  # its errors have no common class
        raise UserError(
            f"ONNX Runtime cannot run {path} on {device}: {str(e).partition(chr(10))[0]}"
        ) from None
    if session.get_providers()[0] != provider:  # it falls back without an error
        raise UserError(
            f"this ONNX Runtime has no {provider}; install onnxruntime-gpu for the CUDA version of this PyTorch, or choose --device cpu"
        )
    return session


def run_onnx(session, config, form, branches, dtype, inputs):
    """Run on torch's own buffers. (bfloat16 needs a GPU.)"""
    import onnx

    types = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
        torch.int64: onnx.TensorProto.INT64,
    }
    device, binding = inputs["latents"].device, session.io_binding()
    inputs = {
        v.name: inputs[v.name]
        .to(dtype if inputs[v.name].is_floating_point() else torch.int64)
        .contiguous()
        for v in session.get_inputs()
    }
    outputs = {
        k: torch.empty(s, dtype=dtype, device=device)
        for k, s in output_shapes(config, form, len(inputs["latents"]), branches).items()
    }
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, v in tensors.items():
            bind(name, device.type, device.index or 0, types[v.dtype], tuple(v.shape), v.data_ptr())
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # ONNX Runtime works on a stream of its own
    session.run_with_iobinding(binding)
    return tuple(outputs.values())


def load_plan(trt, path, device):
    """(execution context, stream) of a TensorRT engine on a GPU."""
    with torch.cuda.device(device):
        engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(
            Path(path).read_bytes()
        )
        if engine is None:
            raise UserError(
                f"{path} was built by another version of TensorRT or for another GPU; export it again here"
            )
        return engine.create_execution_context(), torch.cuda.Stream(device)


def run_plan(context, stream, config, form, branches, dtype, inputs):
    """Run on torch's own buffers, on a stream that is not the default one, where TensorRT would
    wait for everything."""
    names = {context.engine.get_tensor_name(i) for i in range(context.engine.num_io_tensors)}
    inputs = {
        k: v.to(dtype if v.is_floating_point() else torch.int64).contiguous()
        for k, v in inputs.items()
        if k in names
    }
    device, rows = inputs["latents"].device, len(inputs["latents"])
    outputs = {
        k: torch.empty(s, dtype=dtype, device=device)
        for k, s in output_shapes(config, form, rows, branches).items()
    }
    with torch.cuda.device(device):  # TensorRT runs on the current one
        for name, v in inputs.items():
            if not context.set_input_shape(name, tuple(v.shape)):
                raise UserError(
                    f"this engine was not built for {rows} rows; export it with --rows {rows} {rows}"
                )
        for name, v in (inputs | outputs).items():
            context.set_tensor_address(name, v.data_ptr())
        stream.wait_stream(torch.cuda.current_stream(device))
        if context.infer_shapes() or not context.execute_async_v3(stream.cuda_stream):
            raise UserError("TensorRT did not run; its message is above")
        torch.cuda.current_stream(device).wait_stream(stream)
    for v in (inputs | outputs).values():
        v.record_stream(stream)
    return tuple(outputs.values())


def load_runner(kind, path, config, form, branches, dtype, device):
    """inputs by name -> tuple of outputs, of a graph file of any kind."""
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return functools.partial(run_module, torch.jit.load(path, map_location=device), dtype)
    if kind == "onnx":
        return functools.partial(run_onnx, load_onnx(path, device), config, form, branches, dtype)
    return functools.partial(
        run_plan, *load_plan(import_tensorrt(device), path, device), config, form, branches, dtype
    )


@dataclasses.dataclass
class Engine:
    """An export, loaded: what `sample.py` samples with in place of the SDiT."""

    name: str
    config: sdit.SDiTConfig
    branches: int
    most_rows: int  # at once
    first_runner: callable
    rest_runner: callable

    def _run(self, runner, x, t, conditions, anchor, guidance, **rest):
        # an engine for guidance, asked for none: both branches are the same
        filled = [*conditions, *conditions[:1]][: self.branches]
        c = torch.stack(filled, 1)  # (B, G, T, D)
        scalars = dict(anchor=anchor, guidance=float(guidance))
        scalars = {name: torch.full((), value, device=x.device) for name, value in scalars.items()}
        timesteps = torch.full((len(x),), t, device=x.device)
        return runner(dict(latents=x, timesteps=timesteps, conditioning=c, **scalars, **rest))

    def first(self, x, t, conditions, anchor, guidance):
        """Row 0, x (1, T, C, H, W), `conditions` (1, T, D) of one branch or two -> (guided output
        (1, T, 2C, H, W), anchor_kv)."""
        output, anchor_kv = self._run(self.first_runner, x, t, conditions, anchor, guidance)
        return output.to(x.dtype), anchor_kv

    def rest(self, x, t, conditions, anchor, guidance, anchor_kv):
        """Any other rows without their anchors, x (B, T - 1, C, H, W) -> (B, T - 1, 2C, H, W)."""
        return self._run(self.rest_runner, x, t, conditions, anchor, guidance, anchor_kv=anchor_kv)[
            0
        ].to(x.dtype)


MANIFEST = dict(
    name=str,
    kind=str,
    precision=str,
    branches=int,
    rows=list,
    opset=int,
    model_sha256=str,
    files=dict,
    sha256=dict,
    bytes=dict,
    config=dict,
    versions=dict,
)


def read_manifest(folder):
    """What an export says of itself."""
    try:
        about = json.loads((folder / "manifest.json").read_text())
        forms = set(about["files"])
        if (
            {k: type(v) for k, v in about.items()} == MANIFEST
            and about["rows"]
            and about["precision"] in PRECISIONS
            and forms in ({"packed", "rest"}, {"override"})
        ):
            return about
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(
        f"{folder} is not an export: it has no manifest.json of one; make it with export.py"
    )


def load_engine(folder, model_sha256=None, device="cpu"):
    """The engine in a folder that this script wrote; refuses one made of another model."""
    folder, device = Path(folder), torch.device(device)
    about = read_manifest(folder)
    if model_sha256 and about["model_sha256"] != model_sha256:
        raise UserError(
            f"{folder} was made of another model ({about['name']}, sha256 {about['model_sha256'][:12]}...); give that with --model, or export this one"
        )
    if "rest" not in about["files"]:
        raise UserError(
            f"{folder} holds the form {'/'.join(about['files'])}, made to be looked at; videos need --form packed"
        )
    config, runners = (
        sdit.check_config(sdit.SDiTConfig, about["config"], folder / "manifest.json"),
        [],
    )
    for form in ("packed", "rest"):
        path = folder / about["files"][form]
        for name, digest in about["sha256"].items():
            if name.startswith(f"{form}.") and (
                not (folder / name).is_file() or data.sha256(folder / name) != digest
            ):
                raise UserError(f"{folder / name} is missing or not what was written; export again")
        runners.append(
            load_runner(
                about["kind"],
                path,
                config,
                form,
                about["branches"],
                PRECISIONS[about["precision"]],
                device,
            )
        )
    most = about["rows"][-1] if about["kind"] == "trt" else sys.maxsize
    return Engine(folder.resolve().name, config, about["branches"], most, *runners)


# --------------------------------------------------------------------------------------------------
# Comparison with the model

TOLERANCE = dict(fp32=1e-5, fp16=5e-3, bf16=3e-2)  # relative L2 error against the model in float32


@torch.no_grad()
def reference(model, form, inputs):
    """What a graph must return, by the SDiT itself, one guidance branch at a time."""
    x, t, c, anchor, guidance = (
        inputs[k] for k in ("latents", "timesteps", "conditioning", "anchor", "guidance")
    )
    slot, branches = None if form == "unanchored" else anchor.item(), range(c.shape[1])
    if form == "rest":
        outputs = [
            model.forward_rest(x, t, c[:, g], slot, inputs["anchor_kv"][:, :, g : g + 1])
            for g in branches
        ]
    else:
        outputs = [model(x, t, c[:, g], slot) for g in branches]
    noise, v = zip(*(output.chunk(2, 2) for output in outputs))
    guided = noise[-1] + guidance * (noise[0] - noise[-1]) if len(outputs) == 2 else noise[0]
    expected = (torch.cat([guided, v[0]], 2),)
    if form == "packed":
        kept = [model.forward_first(x[:1], t[:1], c[:1, g], slot)[1] for g in branches]
        expected += (torch.cat(kept, 2),)
    return expected


def relative_error(a, b):
    """L2 norm of a - b against that of b; infinite where a is not finite."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item() if a.isfinite().all() else float("inf")


def verify(model, form, branches, run, most_rows=5):
    """Largest error of a runner over rows, slots and timesteps, and what leaving out the anchor
    would have cost in the same cases: an error far below it shows that the anchor is in the graph.
    """
    T, device = model.config.frames, next(model.parameters()).device
    errors, control = [], []
    for seed, (rows, slot, t) in enumerate([(1, 0, 0), (2, T // 2, 500), (5, T - 1, 999)]):
        inputs = example(model.config, form, min(rows, most_rows), branches, slot, t, seed, device)
        expected = reference(model, form, inputs)
        errors += [relative_error(a, b) for a, b in zip(run(inputs), expected, strict=True)]
        if min(rows, most_rows) > 1 and form in ("override", "packed"):
            control.append(relative_error(reference(model, "unanchored", inputs)[0], expected[0]))
    return max(errors), min(control, default=None)


def upcast(path, folder):
    """A bfloat16 ONNX graph as the same graph in float32, its weights being still those rounded to
    bfloat16: ONNX Runtime has no bfloat16 on CPUs, but can then run the structure. Returns its
    path."""
    import onnx
    from onnx import TensorProto as P, numpy_helper

    proto, path = onnx.load(path), folder / Path(path).name
    for tensor in proto.graph.initializer:
        if tensor.data_type == P.BFLOAT16:
            tensor.CopyFrom(
                numpy_helper.from_array(
                    numpy_helper.to_array(tensor).astype("float32"), tensor.name
                )
            )
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == P.BFLOAT16:
                attribute.i = P.FLOAT
            if attribute.HasField("t") and attribute.t.data_type == P.BFLOAT16:
                attribute.t.CopyFrom(
                    numpy_helper.from_array(
                        numpy_helper.to_array(attribute.t).astype("float32"), attribute.t.name
                    )
                )
    for value in [*proto.graph.input, *proto.graph.output]:
        if value.type.tensor_type.elem_type == P.BFLOAT16:
            value.type.tensor_type.elem_type = P.FLOAT
    del proto.graph.value_info[:]
    onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def check(model, kind, path, form, precision, branches, device, rows):
    """Compare one written graph with the model, print the errors, and raise UserError above
    tolerance."""
    dtype, note = PRECISIONS[precision], ""
    with tempfile.TemporaryDirectory() as scratch:
        if kind == "onnx" and precision == "bf16" and device.type == "cpu":
            path, dtype = upcast(path, Path(scratch)), torch.float32
            note = " (weights in bf16, computed in float32: no bf16 in ONNX Runtime on a CPU)"
        run = load_runner(kind, path, model.config, form, branches, dtype, device)
        error, control = verify(model, form, branches, run, rows[-1])
    against = "" if control is None else f"; without the anchor it would be {control:.2g}"
    print(
        f"{form:9} {kind} {precision}: largest relative error {error:.2g}, tolerance {TOLERANCE[precision]:.0e}{against}{note}"
    )
    if not error <= TOLERANCE[precision]:
        raise UserError(
            f"the {form} graph differs from the model by {error:.2g}, more than {TOLERANCE[precision]:.0e}; nothing was written; "
            f"try another --precision"
        )
    if control is not None and control < 10 * error:
        print(
            f"note: this model's anchor moves its output by {control:.2g} only, too little to tell an override from none (is it trained?)"
        )


# --------------------------------------------------------------------------------------------------
# The command


def random_model(name, frames, seed=0):
    """A model of a named size with random weights, none of them zero, to measure with."""
    torch.manual_seed(seed)
    model = sdit.SDiT(sdit.make_config(name, frames))
    for m in (*model.blocks, model.final_layer):
        nn.init.normal_(m.adaLN_modulation[1].weight, std=0.02)
        nn.init.normal_(m.adaLN_modulation[1].bias, std=0.1)
    nn.init.xavier_uniform_(model.final_layer.linear.weight)
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
    trt = import_tensorrt(device) if kind == "trt" else None
    path = write_onnx(graph, form, folder)
    if trt:
        gpu = torch.cuda.get_device_name(device).replace(" ", "-")
        name = f"{form}.{data.sha256(path)[:12]}-{a.precision}-trt{trt.__version__}-{gpu}.plan"
        with torch.cuda.device(device):
            build_plan(trt, path, folder / name, a.rows, a.out / "timing.cache")
        for used in (path, path.with_suffix(".onnx.data")):
            used.unlink(missing_ok=True)
        path = folder / name
    return path


def export(model, digest, kind, a, device):
    """Write, check and name one artefact. Returns its folder."""
    extra = ("" if a.form == "packed" else f"-{a.form}") + ("" if a.branches == 2 else "-unguided")
    final = (
        a.out
        / f"{model.config.name.replace('/', '-')}-{model.config.frames}-{kind}-{a.precision}{extra}"
    )
    if final.exists():
        known = set(read_manifest(final)["sha256"]) | {"manifest.json"}
        if others := sorted(p.name for p in final.iterdir() if p.name not in known):
            raise UserError(
                f"{final} also holds {others[0]}, which is not the export's; move it, or choose another --out"
            )
    fresh = sdit.hidden(final, ".tmp")  # renamed as one, since ONNX graphs name their weights' file
    with data.owned(final):
        return export_into(model, digest, kind, a, device, fresh, final)


def export_into(model, digest, kind, a, device, fresh, final):
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    fresh.mkdir()
    try:
        files, start = {}, time.perf_counter()
        for form in tqdm(
            ["packed", "rest"] if a.form == "packed" else [a.form],
            desc=kind,
            unit="graph",
            leave=False,
            disable=None,
        ):
            files[form] = write_graph(model, kind, form, a, fresh, device)
            check(model, kind, files[form], form, a.precision, a.branches, device, a.rows)
        written = sorted(p for p in fresh.iterdir())
        about = dict(
            name=model.config.name,
            kind=kind,
            precision=a.precision,
            branches=a.branches,
            rows=a.rows,
            opset=OPSET,
            model_sha256=digest,
            files={k: p.name for k, p in files.items()},
            sha256={p.name: data.sha256(p) for p in written},
            bytes={p.name: p.stat().st_size for p in written},
            config=dataclasses.asdict(model.config),
            versions=versions(
                "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "tensorrt"
            ),
        )
        (fresh / "manifest.json").write_text(json.dumps(about, indent=1))
        older = sdit.hidden(final, ".old")
        shutil.rmtree(older, ignore_errors=True)
        if final.exists():
            os.replace(final, older)
        os.replace(fresh, final)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform != "darwin" else 2**30
    )
    print(
        f"{final}: {sum(about['bytes'].values()) / 2**20:,.0f} MiB, {time.perf_counter() - start:.0f} s, peak memory {peak:.1f} GiB"
    )
    return final


def peak_memory(run, device):
    """MiB that a call takes at its height beyond what is held before it; None where the system does
    not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def read(field):
        return (
            int(
                next(
                    line for line in status.read_text().splitlines() if line.startswith(field)
                ).split()[1]
            )
            / 1024
        )

    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the height so far
    except OSError:
        return None
    before = read("VmRSS")
    run()
    return max(0.0, read("VmHWM") - before)


def bench_runners(model, a, device, folder):
    """{(backend, form): runner or the reason why there is none}."""
    runners, dtype = {}, PRECISIONS[a.precision]
    for form in ("unanchored", "override", "packed"):
        graph = build_graph(model, form, a.precision, a.branches).to(device)
        runners["eager", form] = functools.partial(run_module, graph, dtype)
        runners["compiled", form] = functools.partial(run_module, torch.compile(graph), dtype)
        for kind in ("torchscript", "onnx", "trt"):
            try:
                (folder / kind).mkdir(exist_ok=True)
                path = write_graph(model, kind, form, a, folder / kind, device)
                runners[kind, form] = load_runner(
                    kind, path, model.config, form, a.branches, dtype, device
                )
            except (UserError, RuntimeError) as e:
                runners[kind, form] = str(e).partition("\n")[0]
    return runners


def bench(model, a, device, repeat=7):
    """Time one evaluation of the typical number of rows by every backend and form, each in turn,
    after two warm calls: medians, ratios to eager override."""
    a.out, inputs = (
        Path(tempfile.mkdtemp()),
        example(
            model.config, "packed", a.rows[0], a.branches, model.config.frames // 2, device=device
        ),
    )
    seconds, memory, missing = {}, {}, {}
    try:
        runners = bench_runners(model, a, device, a.out)
        for key, run in tqdm(
            runners.items(), desc="warming up", unit="graph", leave=False, disable=None
        ):
            if isinstance(run, str):
                missing[key] = run
                continue
            try:
                error = relative_error(run(inputs)[0], reference(model, key[1], inputs)[0])
                if not error <= TOLERANCE[a.precision]:
                    raise RuntimeError(f"differs from the model by {error:.2g}")
                run(inputs)
                seconds[key] = []
                # those allocate beside torch on a GPU
                if device.type == "cpu" or key[0] not in ("onnx", "trt"):
                    memory[key] = peak_memory(lambda: run(inputs), device)
            except Exception as e:  # a backend that fails is a row of the table
                missing[key] = str(e).partition("\n")[0]
        for _ in tqdm(range(repeat), desc="timing", unit="round", leave=False, disable=None):
            for key in seconds:
                start = time.perf_counter()
                runners[key](inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[key].append(time.perf_counter() - start)
    finally:
        shutil.rmtree(a.out, ignore_errors=True)
    report(
        model,
        a,
        device,
        {k: statistics.median(v) for k, v in seconds.items()},
        memory,
        missing,
        repeat,
    )


def report(model, a, device, seconds, memory, missing, repeat):
    """Print the table of `bench`; the last line is JSON."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()} CPU"
    )
    hardware = f"{name}, {torch.get_num_threads()} threads"
    found, base = (
        versions("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt"),
        seconds.get(("eager", "override"), math.nan),
    )
    print(
        f"{model.config.name}, T = {model.config.frames}, {a.rows[0]} rows, {a.branches} guidance branch(es), {a.precision}; {hardware}; {found}; "
        f"median of {repeat}\n\n| | unanchored | override | packed | peak memory, packed |\n|---|---|---|---|---|"
    )
    for backend in dict.fromkeys(b for b, _ in seconds):
        cells = [
            f"{seconds[backend, f] * 1e3:,.1f} ms ({seconds[backend, f] / base:.2f})"
            if (backend, f) in seconds
            else "-"
            for f in ("unanchored", "override", "packed")
        ]
        held = memory.get((backend, "packed"))
        # less is not seen
        print(
            f"| {backend} | {' | '.join(cells)} | {f'{held:,.0f} MiB' if held and held >= 1 else '-'} |"
        )
    for reason in dict.fromkeys(f"{backend}: {reason}" for (backend, _), reason in missing.items()):
        print(f"not there: {reason}")
    print(
        json.dumps(
            dict(
                model=model.config.name,
                frames=model.config.frames,
                rows=a.rows[0],
                branches=a.branches,
                precision=a.precision,
                hardware=hardware,
                versions=found,
                repeat=repeat,
                ms={f"{b} {f}": v * 1e3 for (b, f), v in seconds.items()},
                peak_mib={f"{b} {f}": v for (b, f), v in memory.items()},
            )
        )
    )


def arguments():
    ap = data.Parser(__doc__)
    for kind, text in (
        ("onnx", "ONNX graphs, for ONNX Runtime and others"),
        ("torchscript", "TorchScript modules"),
        ("trt", "TensorRT engines for the GPU of this machine"),
        ("bench", "time every form and backend that is there"),
    ):
        ap.add_argument(f"--{kind}", action="store_true", help=text)
    ap.add_argument(
        "--model", type=Path, default=DEMO / "sdit.safetensors", help="model file made by train.py"
    )
    ap.add_argument(
        "--size", help="random weights of this size instead of a model, to measure: XL/2 ..."
    )
    ap.add_argument(
        "--frames", type=data.number(int, 2, 10_000), default=8, help="frames a row, with --size"
    )
    ap.add_argument(
        "--out",
        type=Path,
        default=Path("export"),
        help="folder that the export's own folder goes into",
    )
    ap.add_argument(
        "--form",
        choices=["packed", "override"],
        default="packed",
        help="packed: fast, any length; override: the paper's rule as written",
    )
    ap.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        help="default: bf16 for TensorRT and for --bench on a GPU, else fp32",
    )
    ap.add_argument(
        "--branches",
        type=int,
        choices=[1, 2],
        default=2,
        help="2: with classifier-free guidance inside; 1: without, half the work",
    )
    ap.add_argument(
        "--rows",
        type=data.number(int, 1, 10_000),
        nargs=2,
        default=[4, 8],
        metavar=("TYPICAL", "MOST"),
        help="rows at once of a TensorRT engine; --bench takes the typical number",
    )
    ap.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    a = ap.parse_args()
    if a.rows[0] > a.rows[1]:
        raise UserError(
            f"--rows {' '.join(map(str, a.rows))} is not two numbers, the second the larger"
        )
    if not (a.onnx or a.torchscript or a.trt or a.bench):
        raise UserError("choose what to make: --onnx, --torchscript, --trt, or --bench")
    return a


def main():
    a = arguments()
    device, precision = data.get_device(a.device), a.precision
    if a.trt:
        import_tensorrt(device)  # said before the work
    torch.backends.cudnn.allow_tf32 = False  # the model to compare with is float32
    model = (
        random_model(a.size, a.frames).to(device) if a.size else sdit.load_model(a.model, device)
    )
    digest = "random" if a.size else data.sha256(a.model)
    if model.config.frames < 2:
        raise UserError(
            "rows of one frame have no anchor to share; export a model of two frames and more"
        )
    for kind in ("onnx", "torchscript", "trt"):
        if getattr(a, kind):
            a.precision = precision or ("bf16" if kind == "trt" else "fp32")
            export(model, digest, kind, a, device)
    if a.bench:
        half = device.type == "cuda" and sdit.has_bf16("cuda")
        a.precision = precision or ("bf16" if half else "fp32")
        bench(model, a, device)


if __name__ == "__main__":
    data.run_main(main)
