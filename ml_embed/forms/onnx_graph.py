"""A cut model as one ONNX graph: token ids in, unit vectors out.

The token factors, the last token's pooling, the cut to D and the normalisation are in it.
Needs the extra `onnx`, which is imported where it is used.

Letters: B texts of a batch, S their longest length, V vocabulary, r rank, H hidden size, D vector
length.
"""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Model

from ml_embed.errors import UserError
from ml_embed.model import FactorizedEmbedding

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "sentence_embedding"
LARGE = 2**30
"""Bytes of weights from which on they lie in a file beside the graph, which may not have 2 GiB."""
LEVELS = 127
"""Whole numbers on each side of 0 in 8 bits."""


class Graph(nn.Module):
    """What is exported: transformers' layers between the token factors and the pooling."""

    def __init__(self, backbone: Qwen3Model, dim: int, end: int):
        super().__init__()
        self.embedding = backbone.get_input_embeddings()
        self.backbone = backbone
        self.dim = dim
        self.end = end

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) ids and mask, padded on either side -> (B, D) unit vectors."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (place * attention_mask).argmax(1, keepdim=True)  # (B, 1)
        # transformers.js cuts a long text behind its end token; here it gets that back.
        input_ids = torch.where(place == last, self.end, input_ids)
        earlier = place <= place.unsqueeze(1)  # (S, S)
        # A filler sees itself: rows without any 1 would become NaN.
        itself = place == place.unsqueeze(1)
        seen = (earlier & (attention_mask > 0).unsqueeze(1)) | itself  # (B, S, S)
        hidden = self.backbone(
            inputs_embeds=self.embedding(input_ids),
            attention_mask={"full_attention": seen.unsqueeze(1)},
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state  # (B, S, H)
        pooled = hidden.gather(1, last.unsqueeze(2).expand(-1, 1, hidden.shape[2])).squeeze(1)
        return F.normalize(pooled[:, : self.dim], dim=-1)


class Int8Table(nn.Module):
    """A token table in 8 bits, or the factor A, each row with a scale of its own, and B.

    Rows are looked up first and widened then, so the table never is.
    """

    rows: Tensor
    scales: Tensor
    B: Tensor | None

    def __init__(self, table: Tensor, B: Tensor | None):
        super().__init__()
        scales = table.abs().amax(1, keepdim=True).clamp(min=1e-30) / LEVELS
        self.register_buffer("rows", (table / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("B", B)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) ids -> (B, S, H)."""
        rows = F.embedding(input_ids, self.rows).float() * F.embedding(input_ids, self.scales)
        return rows if self.B is None else rows @ self.B


def require_onnx() -> None:
    """Raises UserError where a library of the extra is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install 'ml-embed[onnx]'")


def graph_of(backbone: Qwen3Model, dim: int, end: int, int8: bool = False) -> "ModelProto":
    """Trace a cut model.

    Args:
        backbone: from `load_for_transformers`; it is changed and used, not copied.
        dim: D.
        end: id of the end token.
        int8: hold all matrices and the token table in 8 bits, and compute in float32.
    """
    graph = Graph(backbone, dim, end).eval()
    if int8 and isinstance(graph.embedding, FactorizedEmbedding):
        graph.embedding = Int8Table(graph.embedding.A.detach(), graph.embedding.B.detach())
    elif int8:
        graph.embedding = Int8Table(graph.embedding.get_parameter("weight").detach(), None)
    backbone.register_module("embed_tokens", None)
    traced = _trace(graph)
    return _in_8_bits(traced) if int8 else traced


def _trace(graph: Graph) -> "ModelProto":
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ids = torch.ones(2, 3, dtype=torch.int64)  # what the sizes are is not part of the graph
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sizes = {0: batch, 1: length}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=(sizes, sizes),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # it names files of the machine
    return program.model_proto


def _in_8_bits(model: "ModelProto") -> "ModelProto":
    """Matrices in blocks of 8 bits, by onnxruntime's own quantization of weights."""
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    blocks = DefaultWeightOnlyQuantConfig(
        bits=8, block_size=32, is_symmetric=True, op_types_to_quantize=("MatMul",)
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=blocks)
    quantizer.process()
    return quantizer.model.model


def save_graph(model: "ModelProto", path: Path) -> None:
    """Write a graph; weights of `LARGE` bytes and more into NAME.onnx_data beside it."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    outside = {"save_as_external_data": True, "location": f"{path.name}_data"}
    onnx.save(model, path, **outside if size >= LARGE else {})
