"""What ONNX Runtime makes of exported layers and of a whole exported model."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.onnx.write import matmul_nbits
from qalora_plugin.verify.export import verify_export

from .weights import ACT_ORDER, SIZES, error_in_steps

REASON = "needs onnxruntime: pip install '.[export]'"
onnx = pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)


def run_node(node):
    """W [N, K] of a MatMulNBits node: its product with the identity, by ONNX Runtime."""
    attributes, constants = node
    helper, types = onnx.helper, onnx.TensorProto
    k, n = attributes["K"], attributes["N"]
    made = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **attributes
    )
    graph = helper.make_graph(
        [made],
        "one",
        [helper.make_tensor_value_info("x", types.FLOAT, [k, k])],
        [helper.make_tensor_value_info("y", types.FLOAT, [k, n])],
        [onnx.numpy_helper.from_array(v.numpy(), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {"x": np.eye(k, dtype=np.float32)})
    return torch.from_numpy(y).t()


@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 16), (3, 48), (4, 32), (4, -1), (8, 48), (8, -1)]
)
def test_weights_are_equal(bits, group_size, quantized):
    source = quantized(bits, group_size)
    for name in list(source.layers)[:7]:  # 64 and 172 inputs
        terms = matmul_nbits(source.layer(name))
        assert len(terms) == (2 if bits == 8 else 1)
        found = torch.stack([run_node(term) for term in terms]).sum(0)
        assert error_in_steps(found, source, name) <= 2.0 ** (bits - 22)


def test_every_product_is_replaced(family, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason=REASON)
    pytest.importorskip("onnx_ir", reason=REASON)
    # one part of the fused q, k, v is different
    source = family(LlamaConfig(**SIZES), 4, 32, (8, 16))
    result = export_model(source.directory, tmp_path / "out", "onnx")
    assert (result.layers, result.dense) == (7, {})
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    products = [node.name for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 8  # two for the v_proj of 8 bits
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (tmp_path / "out" / "build").exists()


def test_what_is_computed_with_a_dense_layer_is_dense(family, tmp_path):
    for module in ("onnxruntime_genai", "onnx_ir"):
        pytest.importorskip(module, reason=REASON)
    source = family(LlamaConfig(**SIZES), 4, 32, (4, 24))
    result = export_model(source.directory, tmp_path / "out", "onnx")
    dense = {name.rpartition(".")[2]: why for name, why in result.dense.items()}
    assert result.layers == 4 and dense.keys() == {"q_proj", "k_proj", "v_proj"}
    assert "groups of 24" in dense["v_proj"]
    assert "with model.layers.0.self_attn.v_proj, which is dense" in dense["q_proj"]
    report = verify_export(tmp_path / "out", source.directory)
    assert report.layers == 7 and report.largest_error < 1e-5


def test_what_blocks_cannot_hold_is_refused(quantized, tmp_path):
    for module in ("onnxruntime_genai", "onnx_ir"):
        pytest.importorskip(module, reason=REASON)
    with pytest.raises(CheckpointError, match="groups of 8 cannot be cut into blocks"):
        export_model(quantized(4, 8).directory, tmp_path / "out", "onnx")
    with pytest.raises(CheckpointError, match="act-order"):
        export_model(ACT_ORDER, tmp_path / "out", "onnx")
    assert not any(tmp_path.iterdir())
