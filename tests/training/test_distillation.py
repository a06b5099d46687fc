"""Distillation from teachers of other width, depth and rank, against a naive version."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.in_process import dataset_rows, train
from helpers.teachers import random_model
from helpers.tiny_world import TASKS, write_manifest
from oracles import distillation, objective, similarity
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from ml_embed.config import parse_config
from ml_embed.data.batch import ContrastiveBatch, PartVectors
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.schedule import plan_dataset
from ml_embed.data.store import open_store
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.losses.objective import Objective
from ml_embed.model import MatryoshkaEncoder, default_dims, dim_weights, factorize_table
from ml_embed.model_folders.read import ModelFolder
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.write import save_model_folder
from ml_embed.prepare.tokenizer_training import train_tokenizer
from ml_embed.training.build import build_teacher

MAX_LENGTH = 16
ROWS = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers(world, tmp_path_factory):
    """Name -> (folder, its exits)."""
    folder = tmp_path_factory.mktemp("teachers")
    tokenizer = AutoTokenizer.from_pretrained(world.backbone)
    for name, hidden, layers in (("deeper", 96, 4), ("shallower", 64, 1), ("narrow", 48, 2)):
        random_model(hidden, layers, seed=len(name)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    backbone = random_model(80, 3, seed=3)
    config = backbone.config
    encoder = MatryoshkaEncoder(
        backbone, (2, 3), factorize_table(backbone.embed_tokens.weight.data, 24)
    )
    record = ModelRecord((2, 3), (80, 8), (8, 24), 0.05, 32)
    save_model_folder(folder / "nested", encoder.state_dict(), config, tokenizer, record)
    return {name: folder / name for name in ("deeper", "shallower", "narrow", "nested")}


LAYERS = {"deeper": 4, "shallower": 1, "narrow": 2}
TEACHER_EXITS = {"deeper": (1, 2, 4), "shallower": (1,), "nested": (2, 3)}


@pytest.fixture(scope="module")
def only_facts(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    for part in ("query", "corpus"):
        (folder / f"facts_{part}.parquet").symlink_to(world.tokenized / f"facts_{part}.parquet")
    manifest = json.loads((world.tokenized / "manifest.json").read_text())
    manifest["datasets"] = {"facts": manifest["datasets"]["facts"]}
    write_manifest(folder, manifest)
    return folder


@dataclasses.dataclass(frozen=True)
class Case:
    """Some rows as one batch, with all their negatives or none, so that nothing is drawn."""

    batch: ContrastiveBatch
    samples: list
    documents: list
    exits: tuple[int, ...]
    student: MatryoshkaEncoder
    taught: PartVectors
    sizes: dict

    def assert_same(self, term, expected, naive) -> None:
        """In value and in every named gradient, none of which is zero."""
        assert expected > 0.01
        torch.testing.assert_close(term, expected, rtol=1e-5, atol=1e-6)
        term.backward()
        expected.backward()
        names = {"embedding.weight": "embed_tokens.weight", "norms.0.weight": "norm.weight"}
        references = {key: parameter.grad for key, parameter in naive.named_parameters()}
        for key, parameter in self.student.named_parameters():
            reference = references[names.get(key, key.removeprefix("backbone."))]
            assert reference.abs().max() > 1e-5, key
            torch.testing.assert_close(
                parameter.grad, reference, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )


def make_case(
    world, data, teacher: str, nested: bool, negatives: int, name: str = "facts", **settings
) -> Case:
    settings |= {
        "train_data_path": str(data),
        "use_mll": nested,
        "valid_fraction": 0,
        "teacher_model_path": teacher,
    }
    config = parse_config(world.config(datasets={name: {"num_hard_neg": negatives}}, **settings))
    dataset = open_store(data, config.cache_dir, progress=False).datasets[name]
    plan = plan_dataset(dataset, config, task=TASKS[name])
    eos = AutoTokenizer.from_pretrained(world.backbone).eos_token_id
    builder = BatchBuilder(0, MAX_LENGTH, eos, mask_false_negatives=True, process=0, processes=1)
    batch = builder.build(dataset, plan, np.arange(ROWS), epoch=0)
    exits = (1, 2) if nested else (2,)
    opened = ModelFolder.open(Path(teacher))
    taught = build_teacher(config, opened, CPU, torch.float32)
    vectors = taught(batch.texts.input_ids, batch.texts.packed)
    samples, documents = dataset_rows(world, name)
    samples = [(query, passage, own[:negatives]) for query, passage, own in samples[:ROWS]]
    student = MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), exits)
    sizes = {"exits": exits, "max_length": MAX_LENGTH, "eos_id": eos}
    return Case(
        batch, samples, documents, exits, student, PartVectors.of_texts(vectors, batch), sizes
    )


@pytest.mark.parametrize("name", TEACHER_EXITS)
@pytest.mark.parametrize(("nested", "negatives"), [(True, 10), (False, 10), (True, 0)])
def test_the_term_and_all_its_gradients_are_the_naive_ones(
    world, teachers, only_facts, name, nested, negatives
):
    case = make_case(world, only_facts, str(teachers[name]), nested, negatives)
    vectors = case.student(case.batch.texts.input_ids, case.batch.texts.packed)
    spec = MatryoshkaSpec((64,), (1.0,), 0.05)
    terms = Objective(spec, "vectors", kd_weight=0.25)(vectors, case.batch, case.taught)
    torch.testing.assert_close(terms.total, terms.hard + terms.in_batch + 0.25 * terms.distillation)
    naive = AutoModel.from_pretrained(world.backbone)
    teacher = AutoModel.from_pretrained(teachers[name])
    exits = TEACHER_EXITS[name] if nested else TEACHER_EXITS[name][-1:]
    expected = distillation(
        naive, teacher, case.samples, case.documents, teacher_exits=exits, **case.sizes
    )
    case.assert_same(terms.distillation, expected, naive)


@pytest.mark.parametrize(
    ("name", "teacher", "nested", "negatives"),
    [
        ("facts", "narrow", True, 10),
        ("facts", "deeper", False, 10),
        ("facts", "narrow", True, 0),
        ("topics", "shallower", True, 4),
        ("sentiment", "narrow", True, 1),
    ],
)
def test_similarities_and_all_their_gradients_are_the_naive_ones(
    world, teachers, name, teacher, nested, negatives
):
    """From teachers of other widths, for every task."""
    folder = teachers[teacher]
    case = make_case(
        world, world.tokenized, str(folder), nested, negatives, name, kd_loss="similarity"
    )
    vectors = case.student(case.batch.texts.input_ids, case.batch.texts.packed)
    dims = default_dims(64) if nested else (64,)
    spec = MatryoshkaSpec(dims, dim_weights(dims), 0.05)
    terms = Objective(spec, "similarity", kd_weight=0.25)(vectors, case.batch, case.taught)
    torch.testing.assert_close(terms.total, terms.hard + terms.in_batch + 0.25 * terms.distillation)
    naive = AutoModel.from_pretrained(world.backbone)
    rest = {"teacher_exit": LAYERS[teacher], "use_mrl": nested, **case.sizes}
    expected = similarity(
        naive, AutoModel.from_pretrained(folder), case.samples, case.documents, **rest
    )
    case.assert_same(terms.distillation, expected, naive)


def test_the_teacher_is_whole_still_and_takes_no_gradient(world, teachers):
    config = parse_config(world.config(teacher_model_path=str(teachers["nested"])))
    opened = ModelFolder.open(teachers["nested"])
    teacher = build_teacher(config, opened, CPU, torch.bfloat16)
    assert teacher.rank == 24, "the teacher's own full rank, whatever rank the student draws"
    assert teacher.exits == (2, 3)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}, (
        "no bf16 weights on a CPU"
    )
    alone = build_teacher(dataclasses.replace(config, use_mll=False), opened, CPU, torch.float32)
    assert alone.exits == (3,)


@pytest.mark.parametrize("budget", [0, 48])
def test_a_run_logs_the_naive_terms_and_adds_them(world, teachers, only_facts, tmp_path, budget):
    """Also in GradCache chunks, which bound the teacher's tokens too."""
    samples, documents = dataset_rows(world, "facts")
    code, lines = train(
        world,
        tmp_path,
        train_data_path=str(only_facts),
        datasets={"facts": {"num_hard_neg": 10}},
        teacher_model_path=str(teachers["deeper"]),
        kd_weight=0.25,
        train_batch_size=len(samples),
        max_tokens_per_forward=budget,
        train_steps=1,
        valid_fraction=0,
        max_seq_length=MAX_LENGTH,
        use_mel=False,
        mel_ranks=None,
        r=0,
    )
    assert code == 0
    model, eos = (
        AutoModel.from_pretrained(world.backbone),
        AutoTokenizer.from_pretrained(world.backbone).eos_token_id,
    )
    sizes = {"exits": (1, 2), "max_length": MAX_LENGTH, "eos_id": eos}
    with torch.no_grad():
        teacher = AutoModel.from_pretrained(teachers["deeper"])
        term = distillation(
            model, teacher, samples, documents, teacher_exits=(1, 2, 4), **sizes
        ).item()
        rest = objective(
            model, samples, documents, task="retrieval", use_mrl=True, temperature=0.05, **sizes
        ).item()
    assert lines[0]["distillation_loss"] == pytest.approx(term, rel=1e-4)
    assert lines[0]["loss"] == pytest.approx(rest + 0.25 * term, rel=1e-4)


def test_distilling_pulls_the_student_to_the_teacher(world, teachers, tmp_path):
    """All three tasks, all three nested axes; the teacher's files are not touched."""
    before = (teachers["nested"] / "model.safetensors").read_bytes()
    changes = {
        "teacher_model_path": str(teachers["nested"]),
        "train_steps": 40,
        "learning_rate": 3e-3,
    }
    code, lines = train(
        world, tmp_path, log_interval=10, validation_steps=0, kd_weight=5.0, **changes
    )
    assert code == 0
    losses = [line["distillation_loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert (teachers["nested"] / "model.safetensors").read_bytes() == before
    state = load_file(tmp_path / "run" / "resume" / "step_40" / "model.safetensors")
    assert state["embedding.A"].shape == (384, 32), (
        "the student's own table, and no parameter of the teacher's"
    )


def test_runs_without_a_teacher_do_not_speak_of_one(world, tmp_path):
    _, lines = train(world, tmp_path, train_steps=1)
    assert "distillation_loss" not in lines[0]


def test_teachers_that_cannot_teach_are_refused(world, teachers, tmp_path, capsys):
    code, _ = train(world, tmp_path, teacher_model_path=str(teachers["narrow"]))
    assert code == 2
    assert (
        '48 components, fewer than the student\'s 64; set kd_loss to "similarity"'
        in capsys.readouterr().err
    )
    stranger = tmp_path / "stranger"
    random_model(64, 1, seed=1).save_pretrained(stranger)
    train_tokenizer(
        pq.read_table(world.raw / "topics.parquet").column("query").to_pylist(), 300
    ).save_pretrained(stranger)
    code, _ = train(world, tmp_path, teacher_model_path=str(stranger))
    assert code == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "refused before anything is written"
