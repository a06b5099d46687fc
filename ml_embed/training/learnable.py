"""Finds datasets whose batches have no loss: steps on them would only move the optimizer."""

import numpy as np

from ml_embed.config import TrainConfig
from ml_embed.data.schedule import DatasetPlan
from ml_embed.data.store import Store, TokenizedDataset
from ml_embed.errors import UserError
from ml_embed.notices import notice, warn


def check_losses(
    config: TrainConfig, plans: tuple[DatasetPlan, ...], store: Store, global_batch: int
) -> None:
    """Warn of datasets that nothing can be learned from; with a teacher there are none.

    Raises:
        UserError: all are such, or pairs of a similarity dataset lack their scores.
    """
    for plan in plans:
        check_scores(plan, store.datasets[plan.name])
    if config.learns_scores:
        _check_teacher_scores(config, plans, store)
    elif config.is_taught and config.kd_weight:
        return
    reasons = {
        plan.name: reason
        for plan in plans
        if (reason := _why_no_loss(plan, store.datasets[plan.name], global_batch))
    }
    listing = "\n".join(f"  - {name}: {reason}" for name, reason in reasons.items())
    remedy = "Add negatives or rows, remove them from the folder, or give another task in datasets"
    if len(reasons) == len(plans):
        raise UserError(f"no dataset has a loss, so nothing would be trained:\n{listing}\n{remedy}")
    if reasons:
        warn(f"no batch of these datasets has a loss:\n{listing}\n{remedy}")


def _check_teacher_scores(
    config: TrainConfig, plans: tuple[DatasetPlan, ...], store: Store
) -> None:
    """Raise UserError for datasets whose negatives are trained on, but not all scored."""
    missing = {
        plan.name: rows
        for plan in plans
        if plan.num_negatives and (rows := store.datasets[plan.name].unscored_rows)
    }
    if missing:
        listing = "\n".join(
            f"  - {name}: {rows:,} of {store.datasets[name].num_rows:,} rows"
            for name, rows in missing.items()
        )
        raise UserError(
            f"kd_loss: {config.kd_loss!r} needs pos_score and neg_scores in every row with "
            f"negatives; they are missing in:\n{listing}\nScore the raw data with a teacher and "
            "tokenize it again, or give these datasets num_hard_neg 0"
        )


def check_held_out(config: TrainConfig, plans: tuple[DatasetPlan, ...], store: Store) -> None:
    """Say which datasets have nothing to validate, and how many held-out rows are left out."""
    if dropped := sum(plan.dropped_rows for plan in plans):
        kept = sum(plan.valid_rows for plan in plans)
        notice(
            f"{dropped} held-out rows are not used, because their queries are trained on; "
            f"{kept} are validated"
        )
    absent = [
        plan.name
        for plan in plans
        if plan.valid_rows == 0 and _asked_for(config, store.datasets[plan.name].num_rows)
    ]
    if absent:
        warn(
            f"validation has no rows of {', '.join(absent)}: all of their documents have many "
            "rows, or queries that are trained on too. Give validation data as valid_data_path"
        )


def _asked_for(config: TrainConfig, rows: int) -> bool:
    """Whether at least one of so many rows was to be held out."""
    return rows > 1 and int(rows * config.held_out_fraction + 0.5) > 0


def check_scores(plan: DatasetPlan, dataset: TokenizedDataset) -> None:
    """Raises UserError if pairs of a similarity dataset have no score."""
    if plan.task != "similarity":
        return
    absent = dataset.num_rows if dataset.scores is None else int(np.isnan(dataset.scores).sum())
    if absent:
        raise UserError(
            f"datasets: {plan.name} has the task similarity, but {absent} of its "
            f"{dataset.num_rows} rows have no score; tokenize raw data with a column score in all "
            "rows, or give another task"
        )


def _why_no_loss(plan: DatasetPlan, dataset: TokenizedDataset, global_batch: int) -> str | None:
    rows = min(plan.draws, plan.train_rows, global_batch)
    if plan.task == "similarity":
        assert dataset.scores is not None
        if rows < 2:
            return f"similarity compares pairs, and a batch has {rows}"
        return "all scores are equal" if _all_equal(dataset.scores) else None
    if plan.num_negatives and len(dataset.negative_documents):
        return None
    negatives = "num_hard_neg is 0" if len(dataset.negative_documents) else "it has no negatives"
    if plan.task != "retrieval":
        return f"{plan.task} compares a query with its own negatives, and {negatives}"
    if rows < 2:
        return f"{negatives}, and a batch has one row"
    if _all_equal(dataset.passage_documents):
        return f"{negatives}, and all rows have the same passage"
    return None


def _all_equal(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())
