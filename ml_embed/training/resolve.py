"""Everything that follows from the config, the backbone and the data, before any weight is loaded.

Letters: V vocabulary, H hidden size, L layers, r rank, B samples per process, W processes.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from transformers import Qwen3Config

from ml_embed.config import TASKS, Task, TrainConfig, check_dataset_names
from ml_embed.data.languages import LanguageDraws
from ml_embed.data.loader import Validation
from ml_embed.data.schedule import DatasetPlan, Schedule, plan_dataset
from ml_embed.data.split import Split, hold_out_all, split_dataset
from ml_embed.data.store import Store, TokenizedDataset
from ml_embed.errors import UserError
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.model_folders.cut import Cube
from ml_embed.model_folders.sizes import layer_parameters
from ml_embed.notices import warn
from ml_embed.training.cost import Parameters, Teacher, TokensPerStep, estimate_memory
from ml_embed.training.learnable import check_held_out, check_losses, check_scores
from ml_embed.training.mixture import LanguageShare, language_draws, mixture_of, with_draws
from ml_embed.training.nested_sizes import NestedSizes


@dataclass(frozen=True)
class Resolved:
    """The derived numbers of a run (`resolved.json`)."""

    world_size: int
    global_batch_size: int
    """samples per optimizer step, over all processes"""
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    embedding_lr_scale: float
    exits: tuple[int, ...]
    dims: tuple[int, ...]
    dim_weights: tuple[float, ...]
    exit_weights: tuple[float, ...]
    """share of each exit in the loss; their sum is 1"""
    ranks: tuple[int, ...]
    """ranks that are drawn in training; the single r without use_mel; empty for a whole table"""
    parameters: int
    """of the model that is saved: adapters are merged in it"""
    trained_parameters: int
    """those that training moves; with lora_r: adapters, token factors (or table), exits' norms"""
    embedding_parameters: int
    layer_parameters: int
    """of one decoder layer"""
    mean_tokens_per_step: int
    """real tokens of an average step, over all processes"""
    most_tokens_per_step: int
    """those of one process's share of a step in which every text is as long as texts may be"""
    valid_grid: Cube | None
    """cuts that validation measures beside the whole model; null = none"""
    memory_gib: dict[str, float]
    """estimate for one process without sharding, with the average batch and with the largest that
    there can be"""
    languages: dict[str, LanguageShare] | None
    """the mixture that language_sampling makes; null = it is not used"""
    datasets: tuple[DatasetPlan, ...]
    valid_datasets: tuple[DatasetPlan, ...]
    """those of valid_data_path; empty = validation takes the rows that `datasets` hold out"""

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def resolve(
    config: TrainConfig,
    backbone: Qwen3Config,
    store: Store,
    world_size: int,
    valid_store: Store | None = None,
    half_precision: bool = False,
    teacher: Teacher | None = None,
) -> tuple[Resolved, Schedule]:
    """Derive every number of a run, and the steps of its training.

    Args:
        config: checked.
        backbone: that it starts from.
        store: tokenized data.
        world_size: processes.
        valid_store: data of its own for validation.
        half_precision: forward passes compute in bfloat16.
        teacher: that runs beside the student.
    Raises:
        UserError: what the config asks for does not fit the backbone or the data; all problems at
            once.
    """
    sizes = NestedSizes.of(config, backbone)
    data = _Data.of(config, backbone, store, valid_store)
    samples = config.samples_per_process(world_size)
    global_batch = samples * world_size
    schedule = Schedule(data.plans, data.splits, global_batch, config.seed, data.languages)
    check_losses(config, data.plans, store, global_batch)
    check_held_out(config, data.plans, store)
    steps = config.train_steps
    if steps <= 0:
        steps = config.train_epochs * schedule.steps_per_epoch
    _warn_of_settings(config, steps)
    tokens = data.tokens_per_epoch(config, store) / schedule.steps_per_epoch
    most_tokens = _most_tokens(samples, config, data.plans, store)
    parameters = Parameters.of(config, backbone, len(sizes.exits), teacher)
    resolved = Resolved(
        world_size=world_size,
        global_batch_size=global_batch,
        steps_per_epoch=schedule.steps_per_epoch,
        total_steps=steps,
        warmup_steps=config.warmup_steps,
        embedding_lr_scale=config.embedding_lr_factor,
        exits=sizes.exits,
        dims=sizes.dims,
        dim_weights=sizes.dim_weights(config),
        exit_weights=sizes.exit_weights(config),
        ranks=sizes.ranks,
        parameters=parameters.saved,
        trained_parameters=parameters.trained,
        embedding_parameters=parameters.embedding,
        layer_parameters=layer_parameters(backbone),
        mean_tokens_per_step=round(tokens),
        most_tokens_per_step=most_tokens,
        valid_grid=sizes.valid_grid(config),
        memory_gib=estimate_memory(
            config,
            backbone,
            parameters,
            TokensPerStep(tokens / world_size, most_tokens),
            half_precision,
        ),
        languages=mixture_of(data.languages),
        datasets=data.plans,
        valid_datasets=data.valid_plans,
    )
    return resolved, schedule


@dataclass(frozen=True)
class _Data:
    """What training takes of each dataset, and validation of data of its own."""

    plans: tuple[DatasetPlan, ...]
    splits: dict[str, Split]
    languages: dict[str, LanguageDraws] | None
    valid_plans: tuple[DatasetPlan, ...]

    @classmethod
    def of(
        cls, config: TrainConfig, backbone: Qwen3Config, store: Store, valid_store: Store | None
    ) -> "_Data":
        names = {*store.datasets, *(valid_store.datasets if valid_store else ())}
        check_dataset_names(sorted(names), config.datasets)
        plans = _dataset_plans(config, backbone, store, "train_data_path")
        languages = language_draws(plans, store, config)
        plans = with_draws(plans, languages)
        splits = {
            plan.name: split_dataset(
                store.datasets[plan.name], plan.task, config.held_out_fraction, config.seed
            )
            for plan in plans
        }
        valid_plans: tuple[DatasetPlan, ...] = ()
        if valid_store is not None:
            read = _dataset_plans(config, backbone, valid_store, "valid_data_path")
            rows = {name: dataset.num_rows for name, dataset in valid_store.datasets.items()}
            valid_plans = tuple(_all_held_out(plan, rows[plan.name]) for plan in read)
            for plan in valid_plans:
                check_scores(plan, valid_store.datasets[plan.name])
        return cls(plans, splits, languages, valid_plans)

    def tokens_per_epoch(self, config: TrainConfig, store: Store) -> float:
        """Real tokens that are expected, over all datasets and processes."""
        languages = self.languages or {}
        return sum(
            _tokens_per_epoch(plan, store.datasets[plan.name], config, languages.get(plan.name))
            for plan in self.plans
        )


def _warn_of_settings(config: TrainConfig, steps: int) -> None:
    if config.mel_sampling == "full" and config.mel_refactor == "never":
        warn(
            "mel_sampling: with 'full' no smaller rank than r is trained, and mel_refactor 'never' "
            "leaves them to the start's order; set mel_refactor to 'save'"
        )
    if config.warmup_steps >= steps:
        warn(
            f"warmup_steps: the warm-up of {config.warmup_steps} steps is not over when the run of "
            f"{steps} steps ends; its learning rate rises to {learning_rate(steps, config, steps)} "
            "at most"
        )


def _dataset_plans(
    config: TrainConfig, backbone: Qwen3Config, store: Store, key: str
) -> tuple[DatasetPlan, ...]:
    if store.max_token_id >= backbone.vocab_size:
        raise UserError(
            f"{key}: the data holds token id {store.max_token_id}, but the backbone's "
            f"vocabulary has only {backbone.vocab_size}; tokenize the data with the tokenizer in "
            f"{config.model_path}"
        )
    return tuple(
        plan_dataset(dataset, config, _task_in_manifest(store, name))
        for name, dataset in store.datasets.items()
    )


def _all_held_out(plan: DatasetPlan, rows: int) -> DatasetPlan:
    return dataclasses.replace(plan, train_rows=0, valid_rows=rows, draws=0)


def _task_in_manifest(store: Store, name: str) -> Task | None:
    """The task that the manifest gives a dataset, if it is one."""
    given = None if store.manifest is None else store.manifest.datasets[name].task
    return next((task for task in TASKS if task == given), None)


def make_validation(resolved: Resolved, store: Store, seed: int) -> Validation:
    """What validation goes through where it has data of its own."""
    plans = resolved.valid_datasets
    splits = {plan.name: hold_out_all(plan.name, plan.valid_rows, seed) for plan in plans}
    return Validation(Schedule(plans, splits, resolved.global_batch_size, seed), store)


def loss_spec(resolved: Resolved, temperature: float) -> MatryoshkaSpec:
    return MatryoshkaSpec(resolved.dims, resolved.dim_weights, temperature, resolved.exit_weights)


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


def _tokens_per_epoch(
    plan: DatasetPlan,
    dataset: TokenizedDataset,
    config: TrainConfig,
    languages: LanguageDraws | None,
) -> float:
    """Expected real tokens of an epoch, from at most 10,000 rows of the dataset."""
    rows = np.linspace(0, dataset.num_rows - 1, min(dataset.num_rows, 10_000)).astype(np.int64)
    limit = config.max_seq_length
    drawn = np.ones(len(rows))  # how often, in proportion
    if languages is not None:
        counts = languages.by_language.counts
        drawn = (languages.draws / np.maximum(counts, 1))[dataset.language_numbers[rows]]
    own = np.minimum(dataset.query_lengths[rows], limit) + np.minimum(
        dataset.document_lengths[dataset.passage_documents[rows]], limit
    )
    starts = dataset.negative_offsets[rows]
    counts = dataset.negative_offsets[rows + 1] - starts
    places = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    negatives = np.minimum(dataset.document_lengths[dataset.negative_documents[places]], limit)
    used = np.minimum(counts, plan.num_negatives) / np.maximum(counts, 1)  # of a row's negatives
    tokens = own @ drawn + negatives @ np.repeat(used * drawn, counts)
    return plan.draws * float(tokens / max(drawn.sum(), 1e-9))


def _most_tokens(
    samples: int, config: TrainConfig, plans: tuple[DatasetPlan, ...], store: Store
) -> int:
    """Tokens of one process's samples of a step in which every text is as long as texts may be."""
    longest = config.max_seq_length
    if store.manifest is not None:
        longest = min(longest, store.manifest.max_seq_length or longest)
    texts = 2 + max(plan.num_negatives for plan in plans)
    return samples * texts * longest
