"""The optimizer of a run: AdamW, or AdamW with its moments in 8 bits through torchao."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ml_embed.config import TrainConfig
from ml_embed.distributed.engine import LR_SCALE
from ml_embed.errors import UserError, check_installed
from ml_embed.kernels.compilation import check_compiler
from ml_embed.model import MatryoshkaEncoder

ADAM_BETAS = (0.9, 0.98)  # F2LLM-v2 (arXiv 2603.19223)
ADAM_EPSILON = 1e-8
OLDEST_TORCHAO = "0.17"


def check_optimizer(config: TrainConfig) -> None:
    """Raises UserError where the optimizer's library is not installed."""
    if config.optimizer == "adamw_8bit":
        key = "optimizer: 'adamw_8bit'"
        check_installed(key, "torchao", OLDEST_TORCHAO, "set optimizer to 'adamw'")


def check_engine(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raises UserError for an engine that cannot share the optimizer's moments out."""
    sharing = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if config.optimizer == "adamw_8bit" and accelerator.distributed_type in sharing:
        raise UserError(
            "optimizer: 'adamw_8bit' works on one process and with DDP, which keep whole moments; "
            "with engines that share them out (FSDP2, HSDP, DeepSpeed) set it to 'adamw'"
        )


def build_optimizer(encoder: MatryoshkaEncoder, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all trained parameters with weight decay on all of them.

    In 8 bits (arXiv 2110.02861) each of the two moments is kept in blocks of 256 numbers with one
    scale, and rounded after it has moved the weights. torchao leaves those of small tensors whole.

    Raises:
        UserError: torchao's update cannot be compiled here.
    """
    groups = _parameter_groups(encoder, config.embedding_lr_factor)
    settings = {
        "lr": config.learning_rate,
        "betas": ADAM_BETAS,
        "eps": ADAM_EPSILON,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw_8bit":
        from torchao.optim import AdamW8bit

        # its update is compiled, once for each shape of weights
        check_compiler(groups[0]["params"][0].device, "optimizer", "'adamw'")
        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)  # type: ignore[arg-type]


def _parameter_groups(encoder: MatryoshkaEncoder, embedding_lr_factor: float) -> list[dict]:
    """All trained parameters; the token table, or A, apart if its learning rate is another."""
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if embedding_lr_factor == 1:
        return [{"params": trained}]
    table = next(encoder.embedding.parameters())  # A comes first
    others = [parameter for parameter in trained if parameter is not table]
    return [{"params": others}, {"params": [table], LR_SCALE: embedding_lr_factor}]
