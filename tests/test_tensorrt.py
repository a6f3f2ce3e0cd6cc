"""TensorRT's own parser and builder on the graphs, without a GPU: TensorRT-RTX builds on a CPU (pip install tensorrt-rtx, Linux)."""
import pytest

import export

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx for the tests of TensorRT's parser and builder")


@pytest.mark.parametrize("precision", list(export.PRECISIONS))
@pytest.mark.parametrize("form", ["override", "packed", "rest"])
def test_every_graph_builds_with_every_attention_fused(form, precision, tmp_path):
    model = export.random_model("S/2", 4)
    model.blocks, model.config.depth = model.blocks[:2], 2
    graph = export.write_onnx(export.build_graph(model, form, precision), form, tmp_path)
    plan = export.build_plan(trt, graph, tmp_path / "a.plan", (4, 8))
    attentions = 0 if precision == "fp32" else 2 * (2 if form == "packed" else 1)                  # in float32 TensorRT fuses none
    assert plan.read_bytes().count(b"_gemm_mha_v2_params_t") == 4 * attentions
