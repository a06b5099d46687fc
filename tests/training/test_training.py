"""The training objective and the loop, against plain transformers and the formulas."""

import functools
import json
import math
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.in_process import dataset_rows, train
from helpers.tiny_world import write_manifest
from oracles import objective
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from ml_embed.config import load_config
from ml_embed.data.store import open_store
from ml_embed.distributed import sole_launch
from ml_embed.training import loop as training
from ml_embed.training.accelerator import make_accelerator, set_deterministic, training_device
from ml_embed.training.inputs import _look_at_end
from ml_embed.training.run import Run


@pytest.fixture(scope="module")
def one_dataset(world, tmp_path_factory):
    """A function: the tokenized folder with only one of the datasets left in it."""

    def keep(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        for part in ("query", "corpus"):
            (folder / f"{name}_{part}.parquet").symlink_to(
                world.tokenized / f"{name}_{part}.parquet"
            )
        manifest = json.loads((world.tokenized / "manifest.json").read_text())
        manifest["datasets"] = {name: manifest["datasets"][name]}
        write_manifest(folder, manifest)
        return str(folder)

    return keep


@pytest.mark.parametrize(
    ("name", "task", "nested", "mask"),
    [
        ("facts", "retrieval", True, True),
        ("facts", "retrieval", True, False),
        ("facts", "retrieval", False, True),
        ("topics", "clustering", True, True),
        ("sentiment", "classification", True, True),
    ],
)
def test_logged_loss_is_the_naive_objective(world, tmp_path, one_dataset, name, task, nested, mask):
    """One batch of the whole dataset, all negatives, and at r = H factors that are the table."""
    samples, documents = dataset_rows(world, name)
    code, lines = train(
        world,
        tmp_path,
        train_data_path=one_dataset(name),
        datasets={name: {"task": task, "num_hard_neg": 10}},
        train_batch_size=len(samples),
        train_steps=1,
        valid_fraction=0,
        max_seq_length=16,
        use_mll=nested,
        use_mrl=nested,
        use_mel=False,
        mel_ranks=None,
        r=64 if nested else 0,
        mask_false_negatives=mask,
    )
    assert code == 0
    model = AutoModel.from_pretrained(world.backbone)
    eos = AutoTokenizer.from_pretrained(world.backbone).eos_token_id
    with torch.no_grad():
        expected = objective(
            model,
            samples,
            documents,
            task=task,
            exits=[1, 2] if nested else [2],
            use_mrl=nested,
            temperature=0.05,
            max_length=16,
            eos_id=eos,
            mask=mask,
        )
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 0.1


def test_masking_false_negatives_matters_here(world):
    """The two mask cases above differ only if the data really holds repeated documents."""
    samples, _ = dataset_rows(world, "facts")
    passages = [passage for _, passage, _ in samples]
    assert len(set(passages)) < len(passages)
    assert any(passage in own for _, passage, own in samples)


def test_a_run_writes_what_the_design_promises(world, tmp_path):
    intervals = {"log_interval": 3, "validation_steps": 4, "checkpointing_steps": 5}
    code, lines = train(world, tmp_path, train_steps=7, valid_fraction=0.3, **intervals)
    folder = tmp_path / "run"
    assert code == 0
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "resolved.json",
        "metrics.jsonl",
        "step_5",
        "step_7",
    }
    given = json.loads((folder / "config.json").read_text())
    assert given["num_hard_neg"] == 2
    assert "seed" not in given, "the config is saved as given, without defaults"
    resolved = json.loads((folder / "resolved.json").read_text())
    assert resolved["exits"] == [1, 2]
    assert resolved["dims"] == [64, 32, 16, 8]
    assert resolved["ranks"] == [16, 32]
    train_lines = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train_lines] == [3, 6, 7]
    assert [line["step"] for line in lines if line["split"] == "valid"] == [4, 7]
    for line in train_lines:
        assert {
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens_per_second",
            "tokens",
            "time",
            "epoch",
        } <= line.keys()
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    seen = {
        key.split("/")[0]
        for line in train_lines
        for key in line
        if key.endswith("training_loss_hard")
    }
    assert seen == {"facts", "topics", "sentiment", "Avg"}
    in_batch = {
        key for line in train_lines for key in line if key.endswith("training_loss_in_batch")
    }
    assert in_batch == {"facts/training_loss_in_batch", "Avg/retrieval/training_loss_in_batch"}
    valid = [line for line in lines if line["split"] == "valid"][-1]
    assert 0 < valid["facts/ndcg@10"] <= 1
    assert valid["facts/valid_loss_in_batch"] > 0


@pytest.fixture
def simulated_clock(monkeypatch):
    """The loop's clock: a step takes a second, a validation 100 and a checkpoint 1000."""
    now = [0.0]
    for name, seconds in (("training_step", 1), ("validate", 100), ("save_checkpoint", 1000)):

        def takes(real, seconds, *given):
            now[0] += seconds
            return real(*given)

        monkeypatch.setattr(
            training, name, functools.partial(takes, getattr(training, name), seconds)
        )
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))


def test_the_rate_leaves_validation_out(world, tmp_path, simulated_clock):
    """Wherever it lies between two lines, and when the tokens of a line are of two launches."""
    intervals = {
        "log_interval": 3,
        "validation_steps": 2,
        "checkpointing_steps": 4,
        "train_steps": 8,
    }
    _, lines = train(world, tmp_path, **intervals)
    rates = {
        line["step"]: (line["seconds"], line["tokens_per_second"])
        for line in lines
        if line["split"] == "train"
    }
    tokens = {line["step"]: line["tokens"] for line in lines if line["split"] == "train"}
    assert rates == {
        step: (n, pytest.approx(tokens[step] / n)) for step, n in ((3, 3), (6, 1003), (8, 2))
    }
    for folder in (tmp_path / "run", tmp_path / "run" / "resume"):
        shutil.rmtree(folder / "step_8")
    _, continued = train(world, tmp_path, arguments=["--resume", "auto"], **intervals)
    again = {
        line["step"]: (line["seconds"], line["tokens_per_second"])
        for line in continued
        if "seconds" in line
    }
    assert again == rates | {6: (3, pytest.approx(tokens[6] / 3))}, (
        "the checkpoint was written by the former launch"
    )


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, tmp_path):
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _, lines = train(world, tmp_path, name, seed=seed)
        losses.append([line["loss"] for line in lines if line["split"] == "train"])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize(
    "changes",
    [{"train_steps": 60}, {"train_steps": 60, "use_mel": False, "mel_ranks": None, "r": 0}],
)
def test_training_learns(world, tmp_path, changes):
    _, lines = train(
        world, tmp_path, learning_rate=3e-3, log_interval=10, validation_steps=0, **changes
    )
    train_lines = [line["loss"] for line in lines if line["split"] == "train"]
    assert train_lines[-1] < 0.5 * train_lines[0]


def test_chunks_give_the_gradients_of_the_whole_batch(world, tmp_path):
    """GradCache: after steps with clipping and AdamW the weights agree."""
    weights = []
    for name, budget in (("whole", 0), ("chunks", 64)):
        train(
            world, tmp_path, name, max_tokens_per_forward=budget, train_steps=3, learning_rate=1e-4
        )
        weights.append(load_file(tmp_path / name / "resume" / "step_3" / "model.safetensors"))
    for parameter, whole in weights[0].items():
        assert (whole - weights[1][parameter]).abs().max() < 2e-5, parameter


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    losses = []
    for name, on in (("off", False), ("on", True)):
        _, lines = train(world, tmp_path, name, gradient_checkpointing=on)
        losses.append([line["loss"] for line in lines if line["split"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("device", "trains_on"), [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda"), ("xpu", "xpu")]
)
def test_a_mac_trains_on_its_cpu(monkeypatch, device, trains_on):
    """Its GPU has no float64; a simulated one, for there is none here."""
    found = None if device is None else torch.device(device)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert training_device().type == trains_on


def test_deterministic_is_the_same_run_on_a_cpu(world, tmp_path, monkeypatch):
    """All operations of a step have a form that adds in a fixed order."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    losses = []
    try:
        for deterministic in (False, True):
            _, lines = train(world, tmp_path, f"{deterministic}", deterministic=deterministic)
            losses.append([line["loss"] for line in lines if line["split"] == "train"])
            assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_deterministic(False)
    assert losses[0] == losses[1]


def test_precision_follows_the_device_of_the_run(world, tmp_path, monkeypatch):
    """A run on the CPU of a machine with a GPU is as one on a machine without."""
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    config, _ = load_config(world.write_config(tmp_path / "config.json", "on_cpu"))
    accelerator = make_accelerator(config)
    assert (accelerator.device.type, accelerator.mixed_precision) == ("cpu", "no")


def test_dry_run_prints_and_writes_nothing(world, tmp_path, capsys):
    code, lines = train(world, tmp_path, arguments=["--dry-run"])
    assert code == 0
    assert lines == []
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["total_steps"] == 4
    assert resolved["memory_gib"]["total"] > 0
    assert not (tmp_path / "run").exists()


def test_a_second_run_does_not_overwrite_the_first(world, tmp_path, capsys):
    train(world, tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, _ = train(world, tmp_path)
    assert code == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("learning_rate", "name"), [(1e39, "embedding.A"), (1e25, "the token table")]
)
def test_weights_that_overflow_in_the_last_step_are_not_saved(
    world, tmp_path, capsys, monkeypatch, learning_rate, name
):
    """Loss and gradient are finite in that step; with 1e25 A and B are finite, but not A B."""
    monkeypatch.setattr(
        Run, "learning_rate", lambda run, step: learning_rate if step == 3 else 1e-4
    )
    settings = {"checkpointing_steps": 2, "weight_decay": 0.0, "valid_fraction": 0}
    code, lines = train(world, tmp_path, train_steps=3, **settings)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert code == 2
    said = capsys.readouterr().err
    assert f"error: after step 3 {name} has NaN or infinity" in said
    assert f"the last good checkpoint is {tmp_path}/run/resume/step_2. Lower" in said
    assert sorted(path.name for path in (tmp_path / "run").glob("*step*")) == ["step_2"]
    assert sorted(path.name for path in (tmp_path / "run" / "resume").iterdir()) == ["step_2"]


def test_two_launches_never_train_into_one_folder(world, tmp_path, capsys, monkeypatch):
    """Another one that ends in time is waited for; one that does not is named.

    Links to the folder, and to the folder of all runs, are that folder.
    """
    monkeypatch.setattr(sole_launch, "ENDS_WITHIN_SECONDS", 0.1)
    (tmp_path / "linked_run").symlink_to(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path)
    with sole_launch.sole_launch(tmp_path / "run"):
        for folder, name in (
            (tmp_path, "run"),
            (tmp_path, "linked_run"),
            (tmp_path / "link", "run"),
        ):
            code, _ = train(world, folder, name)
            assert code == 2, (folder, name)
            assert f"another launch is training into {tmp_path}/run" in capsys.readouterr().err
            assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sole_launch, "ENDS_WITHIN_SECONDS", 60)
    holds = threading.Event()

    def hold_for_a_while():
        with sole_launch.sole_launch(tmp_path / "run"):
            holds.set()
            time.sleep(4)  # longer than the other takes to come to the folder

    threading.Thread(target=hold_for_a_while).start()
    holds.wait()
    code, lines = train(world, tmp_path)
    assert code == 0
    assert lines
    assert "waiting for another launch" in capsys.readouterr().err


def test_the_released_layout_trains_the_same(world, tmp_path, one_dataset, capsys):
    """The same rows with string document ids: the same losses; a warning for another end token."""
    folder = tmp_path / "released"
    folder.mkdir()
    samples, documents = dataset_rows(world, "facts")
    columns = {
        "query_input_ids": pa.array([q for q, _, _ in samples], pa.list_(pa.int64())),
        "passage_input_ids": [f"facts-{p}" for _, p, _ in samples],
    }
    for k in range(4):
        columns[f"negative_{k + 1}_input_ids"] = pa.array(
            [f"facts-{own[k]}" if k < len(own) else None for _, _, own in samples], pa.string()
        )
    pq.write_table(pa.table(columns), folder / "facts_query.parquet")
    corpus = {
        "doc_id": [f"facts-{i}" for i in range(len(documents))],
        "input_ids": pa.array(documents, pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(corpus), folder / "corpus.parquet")
    losses = []
    for name, path in (("own", one_dataset("facts")), ("released", str(folder))):
        _, lines = train(world, tmp_path, name, datasets={}, train_data_path=path, train_steps=6)
        losses.append([line["loss"] for line in lines])
    assert losses[0] == losses[1]
    tokenizer = AutoTokenizer.from_pretrained(world.backbone)
    store = open_store(folder, tmp_path / "cache", False)
    _look_at_end(str(folder), tokenizer, store)
    assert "ends in token" not in capsys.readouterr().err
    tokenizer.eos_token = tokenizer.pad_token
    _look_at_end(str(folder), tokenizer, store)
    assert (
        "ends in token 1, those of model_path end in 0 (<|endoftext|>)" in capsys.readouterr().err
    )
