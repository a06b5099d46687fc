"""Everything that follows from the config, the backbone and the data, before any weight is loaded.

Letters: V vocabulary, H hidden size, L layers, r rank, B samples a process, W processes.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import Qwen3Config

from ml_embed.config import TASKS, Task, TrainConfig, check_dataset_names
from ml_embed.data.schedule import DatasetPlan, Schedule, plan_dataset
from ml_embed.data.store import Store, TokenizedDataset
from ml_embed.errors import UserError
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.model import default_dims, default_exits, default_ranks, dim_weights
from ml_embed.model_folders.cut import Cube
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.sizes import (
    adapter_parameters,
    embedding_parameters,
    layer_parameters,
    matrix_shapes,
)

GIB = 1024**3


@dataclass(frozen=True)
class Resolved:
    """The derived numbers of a run (`resolved.json`)."""

    world_size: int
    global_batch_size: int
    """samples an optimizer step, over all processes"""
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    exits: tuple[int, ...]
    dims: tuple[int, ...]
    dim_weights: tuple[float, ...]
    ranks: tuple[int, ...]
    """ranks that are drawn in training; the single r without use_mel; empty for a whole table"""
    parameters: int
    """of the model that is saved: adapters are merged in it"""
    trained_parameters: int
    """those that training moves; with lora_r: adapters, token factors (or table) and the exits'
    norms"""
    embedding_parameters: int
    layer_parameters: int
    """of one decoder layer"""
    mean_tokens_per_step: int
    """real tokens of an average step, over all processes"""
    valid_grid: Cube | None
    """cuts that validation measures beside the whole model; null = none"""
    memory_gib: dict[str, float]
    """estimate for one process without sharding"""
    datasets: tuple[DatasetPlan, ...]

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def resolve(config: TrainConfig, backbone: Qwen3Config, store: Store, world_size: int) -> Resolved:
    """Derive every number of a run.

    Raises:
        UserError: what the config asks for does not fit the backbone or the data; all problems at
            once.
    """
    exits, dims, ranks = _nested_sizes(config, backbone)
    if store.max_token_id >= backbone.vocab_size:
        raise UserError(
            f"train_data_path: the data holds token id {store.max_token_id}, but the backbone's "
            "vocabulary has only "
            f"{backbone.vocab_size}; tokenize the data with the tokenizer in {config.model_path}"
        )
    check_dataset_names(list(store.datasets), config.datasets)
    plans = tuple(
        plan_dataset(name, dataset.num_rows, config, _task_in_manifest(store, name))
        for name, dataset in store.datasets.items()
    )
    global_batch = config.train_batch_size * world_size
    schedule = make_schedule(plans, store, global_batch, config.seed)
    epoch_steps = schedule.steps_per_epoch
    total_steps = (
        config.train_steps if config.train_steps > 0 else config.train_epochs * epoch_steps
    )
    embedding = embedding_parameters(backbone, config.r)
    final_norms = backbone.hidden_size * (len(exits) if config.mll_norm == "per_layer" else 1)
    layers = backbone.num_hidden_layers * layer_parameters(backbone)
    adapters = adapter_parameters(backbone, config.lora_r)
    parameters = embedding + layers + final_norms
    trained = parameters - layers + adapters if config.lora_r else parameters
    tokens = (
        sum(_tokens_per_epoch(plan, store.datasets[plan.name], config) for plan in plans)
        / epoch_steps
    )
    return Resolved(
        world_size=world_size,
        global_batch_size=global_batch,
        steps_per_epoch=epoch_steps,
        total_steps=total_steps,
        warmup_steps=config.warmup_steps,
        exits=exits,
        dims=dims,
        dim_weights=dim_weights(dims),
        ranks=ranks,
        parameters=parameters,
        trained_parameters=trained,
        embedding_parameters=embedding,
        layer_parameters=layer_parameters(backbone),
        mean_tokens_per_step=round(tokens),
        valid_grid=_valid_grid(config, exits, dims, ranks),
        memory_gib=_memory(config, backbone, parameters + adapters, trained, tokens / world_size),
        datasets=plans,
    )


def _task_in_manifest(store: Store, name: str) -> Task | None:
    """The task that the manifest gives a dataset, if it is one."""
    given = None if store.manifest is None else store.manifest.datasets[name].task
    return next((task for task in TASKS if task == given), None)


def make_schedule(
    plans: tuple[DatasetPlan, ...], store: Store, global_batch: int, seed: int
) -> Schedule:
    rows: Mapping[str, int] = {name: dataset.num_rows for name, dataset in store.datasets.items()}
    return Schedule(plans, rows, global_batch, seed)


def loss_spec(resolved: Resolved, temperature: float) -> MatryoshkaSpec:
    return MatryoshkaSpec(resolved.dims, resolved.dim_weights, temperature)


def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    Linear from 0 over the warm-up, which ends at the peak; then cosine to 0 at the last step,
    floored at min_lr, or constant. Steps are optimizer steps whatever the number of processes.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.scheduler_type == "constant_with_warmup":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return max(
        config.min_lr, config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    )


def _nested_sizes(config: TrainConfig, backbone: Qwen3Config) -> tuple[tuple, tuple, tuple]:
    layers, hidden = backbone.num_hidden_layers, backbone.hidden_size
    problems = []
    largest_rank = min(backbone.vocab_size, hidden)
    if config.r > largest_rank:
        problems.append(
            f"r: {config.r} is more than the token table's {largest_rank} (of {hidden} hidden "
            "dimensions)"
        )
    former = ModelRecord.load(Path(config.model_path))
    if former is not None and former.ranks and config.r > former.ranks[-1]:
        problems.append(
            f"r: {config.r} is more than the {former.ranks[-1]} that {config.model_path} was "
            "trained with"
        )
    if config.mll_layers and max(config.mll_layers) > layers:
        problems.append(
            f"mll_layers: {max(config.mll_layers)} is deeper than the backbone's {layers} layers"
        )
    if config.mrl_dims and max(config.mrl_dims) > hidden:
        problems.append(
            f"mrl_dims: {max(config.mrl_dims)} is longer than the backbone's hidden size {hidden}"
        )
    smallest_side = min(map(min, matrix_shapes(backbone).values()))
    if config.lora_r > smallest_side:
        problems.append(
            f"lora_r: {config.lora_r} is more than the {smallest_side} of the layers' smallest "
            "matrix"
        )
    if config.max_seq_length > backbone.max_position_embeddings:
        problems.append(
            f"max_seq_length: {config.max_seq_length} is longer than the backbone's "
            f"{backbone.max_position_embeddings}"
        )
    if problems:
        raise UserError(
            "the config does not fit the backbone:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    exits: tuple[int, ...] = (layers,)
    if config.use_mll:
        exits = (
            tuple(sorted({*config.mll_layers, layers}))
            if config.mll_layers
            else default_exits(layers)
        )
    dims: tuple[int, ...] = (hidden,)
    if config.use_mrl:
        dims = (
            tuple(sorted({*config.mrl_dims, hidden}, reverse=True))
            if config.mrl_dims
            else default_dims(hidden)
        )
    ranks: tuple[int, ...] = (config.r,) if config.r else ()
    if config.use_mel:
        ranks = (
            tuple(sorted({*config.mel_ranks, config.r}))
            if config.mel_ranks
            else default_ranks(config.r)
        )
    return exits, dims, ranks


def _valid_grid(config: TrainConfig, exits: tuple, dims: tuple, ranks: tuple) -> Cube | None:
    """The cuts that validation measures; a null axis is looked at whole."""
    asked = {
        "valid_ranks": config.valid_ranks,
        "valid_layers": config.valid_layers,
        "valid_dims": config.valid_dims,
    }
    trained = {"valid_ranks": ranks, "valid_layers": exits, "valid_dims": dims}
    problems = []
    for key, values in asked.items():
        listed = (
            ", ".join(map(str, sorted(trained[key]))) or "a whole token table, which has no ranks"
        )
        problems += [
            f"{key}: {v} is not trained (trained: {listed})"
            for v in values or ()
            if v not in trained[key]
        ]
    if problems:
        raise UserError(
            "validation measures only what is trained:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    if not any(asked.values()):
        return None
    return Cube(
        *(tuple(sorted(values or (max(trained[key], default=0),))) for key, values in asked.items())
    )


def _tokens_per_epoch(plan: DatasetPlan, dataset: TokenizedDataset, config: TrainConfig) -> float:
    """Expected real tokens of an epoch, from at most 10,000 rows of the dataset."""
    rows = np.linspace(0, dataset.num_rows - 1, min(dataset.num_rows, 10_000)).astype(np.int64)
    limit = config.max_seq_length
    query = np.minimum(dataset.query_lengths[rows], limit).sum()
    passage = np.minimum(dataset.document_lengths[dataset.passage_documents[rows]], limit).sum()
    starts = dataset.negative_offsets[rows]
    counts = dataset.negative_offsets[rows + 1] - starts
    places = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    negatives = np.minimum(dataset.document_lengths[dataset.negative_documents[places]], limit)
    used = np.minimum(counts, plan.num_negatives) / np.maximum(
        counts, 1
    )  # the share of a row's negatives
    return (
        plan.draws
        * float(query + passage + (negatives * np.repeat(used, counts)).sum())
        / len(rows)
    )


def _memory(
    config: TrainConfig, backbone: Qwen3Config, held: int, trained: int, tokens: float
) -> dict[str, float]:
    """Rough need of one process, in GiB: fp32 weights, gradients and two AdamW moments; activations
    of one forward.

    Activations: values kept for the backward pass of each token and layer, at 4 bytes (2 under
        bf16): about 8 H for
    the norms and residuals, 4 for each query and 6 for each key/value component, 4 for each MLP
    component, and what stands between an adapter's two parts.

    Args:
        held: parameters in memory; trained: those among them that have a gradient and moments.
        tokens: of a process and step.
    """
    assert backbone.num_key_value_heads is not None  # Qwen3Config fills it in
    heads = 4 * backbone.num_attention_heads + 6 * backbone.num_key_value_heads
    per_layer = (
        8 * backbone.hidden_size + heads * backbone.head_dim + 4 * backbone.intermediate_size
    )
    per_layer += config.lora_r * len(matrix_shapes(backbone))
    if config.max_tokens_per_forward:
        tokens = min(tokens, config.max_tokens_per_forward)
    layers = backbone.num_hidden_layers
    kept = per_layer * layers
    if config.gradient_checkpointing:
        kept = per_layer + backbone.hidden_size * layers
    weights, gradients, activations = 4 * held / GIB, 4 * trained / GIB, 4 * kept * tokens / GIB
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": activations,
    }
    return {
        name: round(value, 3) for name, value in (parts | {"total": sum(parts.values())}).items()
    }
