"""All parts of one training run."""

import contextlib
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.config import TrainConfig
from ml_embed.data.loader import Loader
from ml_embed.distributed.engine import Engine
from ml_embed.files.paths import numbered_folders
from ml_embed.losses.objective import Objective
from ml_embed.model_folders.record import ModelRecord
from ml_embed.training.best import Best
from ml_embed.training.metrics_log import MetricsLog, Window
from ml_embed.training.resolve import Resolved, learning_rate
from ml_embed.training.weight_average import WeightAverage


@dataclass
class Run:
    """All parts of a run, built by `ml_embed.training.setup`."""

    config: TrainConfig
    resolved: Resolved
    accelerator: Accelerator
    engine: Engine
    """holds the encoder and its optimizer"""
    objective: Objective
    average: WeightAverage | None
    """of its weights, kept by its optimizer; None = they are saved themselves"""
    teacher: nn.Module | None
    """a teacher that runs beside the student"""
    loader: Loader
    tokenizer: PreTrainedTokenizerBase
    backbone_config: Qwen3Config
    token_share: Tensor | None
    """(V,) of each token in the training data, by which factors are turned; None = they are not"""
    record: ModelRecord
    log: MetricsLog
    window: Window
    best: Best
    """the best validation so far"""
    start_step: int
    """optimizer steps already done"""
    fingerprint: dict[str, Any]
    """what a resumed run must share with this one"""

    def epoch_of(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / self.resolved.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, counted from 1."""
        return learning_rate(step, self.config, self.resolved.total_steps)

    def weights_to_save(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that are validated and saved. A collective."""
        if self.average is None:
            return contextlib.nullcontext()
        return self.average.in_place(self.engine)

    def last_good_checkpoint(self) -> str:
        """Half a sentence for an error message."""
        states = numbered_folders(self.config.run_dir / "resume")
        if not states:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {states[-1][1]}"
