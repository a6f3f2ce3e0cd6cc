"""Half precision, and what the ONNX graphs are made of."""
import onnx
import pytest
import torch
from graphs import cases, check_structure, runner

import export

# v becomes noise behind the blocks, in all forms alike (see test_graphs_in_float64): the form that is written fastest has it
every_graph = pytest.mark.parametrize(
    "small_model, form", [("epsilon-1", "override"), ("epsilon-2", "packed"), ("v", "rest")], indirect=["small_model"])


@every_graph
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


@every_graph
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_structure(small_model, onnx_graph, form, precision):
    check_structure(small_model, form, onnx_graph(small_model, form, precision))
