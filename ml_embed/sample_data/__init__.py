"""The embedded sample corpus (the Declaration of Human Rights) and datasets made of it."""

from ml_embed.sample_data.corpus import load_articles
from ml_embed.sample_data.cues import cue_accuracy
from ml_embed.sample_data.datasets import TASKS, build_datasets
from ml_embed.sample_data.plan import Plan, plan_datasets, training_texts

__all__ = [
    "TASKS",
    "Plan",
    "build_datasets",
    "cue_accuracy",
    "load_articles",
    "plan_datasets",
    "training_texts",
]
