"""A small model, and its graphs in ONNX, each written once for all tests of exports."""
import itertools

import onnx
import pytest
import torch

import export
import sdit

CPU = torch.device("cpu")
both_predictions = pytest.mark.parametrize("small_model", ["epsilon-2", "v"], indirect=True)


@pytest.fixture(scope="session")
def small_model(request):
    """2 blocks, 64 wide, no weight zero. It predicts the noise, or what a test asks for: v is converted behind the blocks, so that one is enough.
    So it is for most graphs in half precision ("epsilon-1"): float32 has shown that blocks follow each other."""
    torch.manual_seed(0)
    prediction, _, depth = getattr(request, "param", "epsilon-2").partition("-")
    small = sdit.SDiT(sdit.SDiTConfig(name="small", depth=int(depth or 1), width=64, heads=4, patch=2, frames=4, latent_channels=4,
                                      latent_size=8, scene_width=16, prediction=prediction))
    for m in (*small.blocks, small.final_layer):
        torch.nn.init.normal_(m.adaLN_modulation[1].weight, std=0.2)
        torch.nn.init.normal_(m.adaLN_modulation[1].bias, std=0.2)
    torch.nn.init.xavier_uniform_(small.final_layer.linear.weight)
    return small.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def onnx_graph(tmp_path_factory):
    """(small_model, form, precision) -> path, written once."""
    paths = {}

    def write(model, form, precision):
        key = model.config.prediction, str(model.config.depth), form, precision
        if key not in paths:
            folder = tmp_path_factory.mktemp("-".join(key))
            paths[key] = export.write_onnx(export.build_graph(model, form, precision), form, folder)
        return paths[key]
    return write


def runner(kind, path, precision="fp32"):
    return export.load_runner(kind, path, export.PRECISIONS[precision], CPU)


def cases(model, form, branches=2):
    for seed, (rows, slot, t) in enumerate(itertools.product((1, 2, 5), (0, 1, 3), (0, 500, 999))):
        yield export.example(model.config, form, rows, branches, slot, t, seed)


# Operators that TensorRT's ONNX parser documents (onnx-tensorrt, docs/operators.md, for TensorRT 10.0 and later, opset 20), with all of
# float32, float16 and bfloat16 where they compute
TENSORRT_OPERATORS = set("""Add And Cast Concat Cos Div Equal Exp Expand Gather Gelu Gemm GreaterOrEqual Identity LayerNormalization Less
    MatMul Mul Neg Pow Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where""".split())


def check_structure(model, form, path):
    proto = onnx.load(path, load_external_data=False)
    operators = [node.op_type for node in proto.graph.node]
    assert set(operators) <= TENSORRT_OPERATORS
    assert operators.count("Softmax") == model.config.depth * (2 if form == "packed" else 1)    # attentions
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*proto.graph.input, *proto.graph.output]}
    rows = axes["latents"][0]
    assert isinstance(rows, str) and rows and all(axes[name][0] == rows for name in (*export.OPEN, "output"))
    assert all(isinstance(n, int) for name in axes for n in axes[name][name in (*export.OPEN, "output"):])
    assert {o.version for o in proto.opset_import if not o.domain} == {export.OPSET}
