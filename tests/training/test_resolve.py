"""Derived numbers: the learning rate, nested sizes, parameters, steps."""

import copy
import json
import math

import pytest
import torch
from helpers import ROOT
from transformers import AutoConfig, AutoModel, Qwen3Config

from ml_embed.config import parse_config
from ml_embed.data.store import open_store
from ml_embed.errors import UserError
from ml_embed.model import (
    MatryoshkaEncoder,
    default_dims,
    default_exits,
    default_ranks,
    factorize_table,
)
from ml_embed.training.resolve import learning_rate, resolve


@pytest.fixture(scope="module")
def store(world, tmp_path_factory):
    return open_store(world.tokenized, tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="module")
def backbone(world):
    return AutoConfig.from_pretrained(world.backbone)


def schedule(world, **changes) -> list[float]:
    config = parse_config(world.config(learning_rate=1.0, warmup_steps=4, min_lr=0.1, **changes))
    return [learning_rate(step, config, 12) for step in range(1, 13)]


def test_cosine_after_linear_warmup_with_a_floor(world):
    rates = schedule(world)
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    expected = [max(0.1, 0.5 * (1 + math.cos(math.pi * k / 8))) for k in range(1, 9)]
    assert rates[4:] == pytest.approx(expected)
    assert rates[-1] == 0.1


def test_constant_after_warmup(world):
    assert schedule(world, scheduler_type="constant_with_warmup")[3:] == [1.0] * 9


def test_default_sizes_are_those_of_the_paper():
    assert default_exits(28) == (1, 2, 4, 8, 16, 24, 28)
    assert default_exits(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert default_exits(1) == (1,)
    assert default_dims(1024) == (1024, 512, 256, 128, 64, 32, 16, 8)
    assert default_dims(640) == (640, 512, 256, 128, 64, 32, 16, 8)
    assert default_ranks(512) == (64, 128, 256, 512)
    assert default_ranks(48) == (48,)


QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}


@pytest.mark.parametrize("name", ["config", "stage_1", "stage_2"])
def test_the_configs_we_ship_fit_a_card_of_80_gb(name, store):
    """In bfloat16, also the batch in which every text is as long as texts may be."""
    given = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    unchunked = parse_config(given | {"max_tokens_per_forward": 0, "datasets": {}})
    memory = {
        shipped: resolve(
            config, Qwen3Config(**QWEN3_06B), without_manifest(store), 1, half_precision=True
        )[0].memory_gib
        for shipped, config in (
            (True, parse_config(given | {"datasets": {}})),
            (False, unchunked),
        )
    }
    assert memory[True]["total"] < memory[True]["total_most"] < 64
    assert memory[False]["total_most"] > 80


def without_manifest(store):
    """Then texts may be as long as the config says."""
    other = copy.copy(store)
    other.manifest = None
    return other


@pytest.mark.parametrize("world_size", [1, 3])
def test_steps_are_optimizer_steps_of_the_global_batch(world, store, backbone, world_size):
    config = parse_config(world.config(train_steps=-1, train_epochs=3, valid_fraction=0))
    resolved, _ = resolve(config, backbone, store, world_size)
    rows = {name: dataset.num_rows for name, dataset in store.datasets.items()}
    assert resolved.global_batch_size == 4 * world_size
    assert resolved.steps_per_epoch == sum(math.ceil(n / (4 * world_size)) for n in rows.values())
    assert resolved.total_steps == 3 * resolved.steps_per_epoch
    assert resolved.warmup_steps == 2


@pytest.mark.parametrize(
    "changes", [{}, {"r": 0, "use_mel": False, "mel_ranks": None}, {"mll_norm": "per_layer"}]
)
def test_parameters_are_counted_right(world, store, backbone, changes):
    config = parse_config(world.config(**changes))
    resolved, _ = resolve(config, backbone, store, 1)
    model = AutoModel.from_pretrained(world.backbone)
    factors = factorize_table(model.embed_tokens.weight.detach(), config.r) if config.r else None
    encoder = MatryoshkaEncoder(model, resolved.exits, factors, config.mll_norm)
    assert resolved.parameters == sum(p.numel() for p in encoder.parameters())
    assert resolved.embedding_parameters == sum(p.numel() for p in encoder.embedding.parameters())


def test_explicit_sizes_always_hold_the_whole(world, store, backbone):
    config = parse_config(world.config(mll_layers=[1], mrl_dims=[16, 8], mel_ranks=[8]))
    resolved, _ = resolve(config, backbone, store, 1)
    assert (resolved.exits, resolved.dims, resolved.ranks) == ((1, 2), (64, 16, 8), (8, 32))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, (0.25, 0.25, 0.25, 0.25)),
        ({"mll_weights": "linear"}, (0.1, 0.2, 0.3, 0.4)),
        ({"mll_weights": "last"}, (1 / 6, 1 / 6, 1 / 6, 1 / 2)),
        ({"mll_weights": "last", "mll_prior_weight": 3.0}, (0.25, 0.25, 0.25, 0.25)),
        ({"mll_weights": [0, 0, 1, 3]}, (0, 0, 0.25, 0.75)),
    ],
)
def test_shares_of_the_exits(world, store, backbone, weights, expected):
    backbone = copy.deepcopy(backbone)
    backbone.num_hidden_layers = 4
    config = parse_config(
        world.config(use_mll=True, mll_layers=[1, 2, 3], mrl_weights="uniform", **weights)
    )
    resolved, _ = resolve(config, backbone, store, 1)
    assert resolved.exit_weights == pytest.approx(expected)
    assert set(resolved.dim_weights) == {1.0}


@pytest.mark.parametrize("key", ["mll_weights", "mrl_weights"])
def test_as_many_weights_as_sizes(world, store, backbone, key):
    config = parse_config(world.config(**{key: [1, 2, 3, 4, 5, 6, 7]}))
    with pytest.raises(UserError, match=f"{key}: 7 numbers for"):
        resolve(config, backbone, store, 1)


def test_mean_tokens_are_what_a_run_sees(world, store, backbone):
    """All negatives used and nothing cut: the estimate is exact."""
    settings = {name: {"task": "retrieval", "num_hard_neg": 9} for name in store.datasets}
    config = parse_config(world.config(datasets=settings, valid_fraction=0, max_seq_length=256))
    resolved, _ = resolve(config, backbone, store, 1)
    tokens = 0
    for dataset in store.datasets.values():
        for row in range(dataset.num_rows):
            documents = [dataset.passage_documents[row], *dataset.negatives(row)]
            tokens += len(dataset.query(row)) + sum(len(dataset.document(d)) for d in documents)
    assert resolved.mean_tokens_per_step == pytest.approx(tokens / resolved.steps_per_epoch, abs=1)


def test_token_ids_beyond_the_vocabulary_are_refused(world, store, backbone):
    small = AutoConfig.from_pretrained(world.backbone)
    small.vocab_size = 100
    with pytest.raises(UserError, match="holds token id"):
        resolve(parse_config(world.config(r=8, mel_ranks=None)), small, store, 1)


def test_frequency_start_counts_the_data(world, store):
    share = torch.from_numpy(store.token_share(384))
    counts = torch.ones(384, dtype=torch.float64)
    for dataset in store.datasets.values():
        texts = [dataset.query(row) for row in range(dataset.num_rows)]
        texts += [dataset.document(d) for d in range(dataset.num_documents)]
        for text in texts:
            for token in text.tolist():
                counts[token] += 1
    torch.testing.assert_close(share, counts / counts.sum())
