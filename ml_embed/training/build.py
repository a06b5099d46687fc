"""From config, backbone and data to the encoder of a run and its teacher.

Letters: V vocabulary, H hidden size, r rank.
"""

from pathlib import Path

import torch
from torch import Tensor

from ml_embed.config import TrainConfig
from ml_embed.kernels.attention import choose_kernel
from ml_embed.kernels.compilation import check_compiler
from ml_embed.model import MatryoshkaEncoder, factorize_table
from ml_embed.model_folders.read import (
    ModelFolder,
    load_backbone,
    load_encoder,
    map_table,
    read_exit_norms,
    read_factors,
)
from ml_embed.model_folders.record import ModelRecord
from ml_embed.training import lora
from ml_embed.training.inputs import Inputs, teacher_exits


def build_encoder(
    config: TrainConfig, inputs: Inputs, device: torch.device, compute_dtype: torch.dtype
) -> MatryoshkaEncoder:
    """The encoder at the start of training, on `device`: all that is trained in float32.

    Raises:
        UserError: `compile_layers` does not work here.
    """
    if config.compile_layers:
        check_compiler(device, "compile_layers", "false")
    folder = Path(config.model_path)
    backbone = load_backbone(folder, inputs.backbone_config, with_table=config.r == 0)
    encoder = MatryoshkaEncoder(
        backbone,
        inputs.resolved.exits,
        initial_factors(config, inputs) if config.r else None,
        config.mll_norm,
        choose_kernel(config.attention, device, compute_dtype, backbone.config.head_dim),
        config.gradient_checkpointing,
        config.compile_layers,
    )
    _take_over_exit_norms(encoder, folder)
    if config.lora_r:
        lora.add_adapters(encoder, config)
        if compute_dtype == torch.bfloat16:
            lora.narrow_frozen(encoder)
    return encoder.to(device)


def initial_factors(config: TrainConfig, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A (V, r) and B (r, H): those of the start model if it has this rank, else of its table."""
    record = ModelRecord.load(Path(config.model_path))
    if record is not None and record.ranks and config.r == record.ranks[-1]:
        return read_factors(Path(config.model_path))
    table = map_table(Path(config.model_path), inputs.backbone_config)
    by_frequency = config.mel_init == "frequency"
    share = torch.from_numpy(inputs.store.token_share(len(table))) if by_frequency else None
    return factorize_table(table, config.r, share)


def _take_over_exit_norms(encoder: MatryoshkaEncoder, folder: Path) -> None:
    """Continue training the exits' own norms of a model folder that has them."""
    record = ModelRecord.load(folder)
    if record is None or record.norm_sharing != "per_layer" or encoder.norm_sharing != "per_layer":
        return
    trained = read_exit_norms(folder)
    for layer, norm in zip(encoder.exits, encoder.norms, strict=True):
        if layer in trained:
            norm.get_parameter("weight").data.copy_(trained[layer])


def build_teacher(
    config: TrainConfig, folder: ModelFolder, device: torch.device, compute_dtype: torch.dtype
) -> MatryoshkaEncoder:
    """The distillation teacher, whole and without gradients.

    It keeps its own full rank, whatever rank the student draws.
    """
    teacher = load_encoder(
        folder,
        exits=teacher_exits(config, folder),
        kernel=choose_kernel(config.attention, device, compute_dtype, folder.config.head_dim),
        dtype=compute_dtype if device.type == "cuda" else torch.float32,
    )
    return teacher.to(device).requires_grad_(False)
