"""Half precision, and what the ONNX graphs are made of."""
import onnx
import pytest
import torch
from graphs import both_predictions, cases, runner

import export

# Operators that TensorRT's ONNX parser documents (onnx-tensorrt, docs/operators.md, for TensorRT 10.0 and later, opset 20), with all of
# float32, float16 and bfloat16 where they compute
TENSORRT_OPERATORS = set("""Add And Cast Concat Cos Div Equal Exp Expand Gather Gelu Gemm GreaterOrEqual Identity LayerNormalization Less
    MatMul Mul Neg Pow Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where""".split())


@both_predictions
@pytest.mark.parametrize("form", ["override", "packed", "rest"])
def test_half_precision(small_model, onnx_graph, tmp_path, form):
    for precision in ("fp16", "bf16"):
        path = onnx_graph(small_model, form, precision)
        inputs_of = {v.name: v.type.tensor_type.elem_type for v in onnx.load(path, load_external_data=False).graph.input}
        assert inputs_of["latents"] == dict(fp16=onnx.TensorProto.FLOAT16, bf16=onnx.TensorProto.BFLOAT16)[precision]
        module = export.build_graph(small_model, form, precision)
        assert torch.finfo(module.model.roots.dtype).bits >= 32                              # at large t, half precision would lose the clean latents
        if precision == "bf16":
            path = export.upcast(path, tmp_path)
        run = runner("onnx", path, "fp16" if precision == "fp16" else "fp32")
        for inputs in cases(small_model, form):
            expected = export.reference(small_model, form, inputs)
            for results in (run(inputs), export.run_module(module, export.PRECISIONS[precision], inputs)):
                for a, b in zip(results, expected, strict=True):
                    assert export.relative_error(a, b) <= export.TOLERANCE[precision]
                    if precision == "fp16":
                        assert torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0) >= 0.9995
    assert export.build_graph(small_model, form).model.position.dtype == torch.float32      # the small_model itself is as before


@both_predictions
@pytest.mark.parametrize("precision", list(export.PRECISIONS))
@pytest.mark.parametrize("form", ["override", "packed", "rest"])
def test_structure(small_model, onnx_graph, form, precision):
    proto = onnx.load(onnx_graph(small_model, form, precision), load_external_data=False)
    operators = [node.op_type for node in proto.graph.node]
    assert set(operators) <= TENSORRT_OPERATORS
    assert operators.count("Softmax") == small_model.config.depth * (2 if form == "packed" else 1)    # attentions
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*proto.graph.input, *proto.graph.output]}
    rows = axes["latents"][0]
    assert isinstance(rows, str) and rows and all(axes[name][0] == rows for name in (*export.OPEN, "output"))
    assert all(isinstance(n, int) for name in axes for n in axes[name][name in (*export.OPEN, "output"):])
    assert {o.version for o in proto.opset_import if not o.domain} == {export.OPSET}
