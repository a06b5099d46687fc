"""Training on a teacher's vectors computed before is the same as with the teacher in memory."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.in_process import train
from helpers.teachers import LetterModel, random_model, teacher_options
from helpers.tiny_models import make_tokenizer
from helpers.tiny_world import TASKS
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ml_embed.config import parse_config
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.schedule import plan_dataset
from ml_embed.data.store import open_store
from ml_embed.data.teacher_vectors import RECORD, TeacherVectors, open_teacher_vectors
from ml_embed.errors import UserError
from ml_embed.files.atomic import write_checksums
from ml_embed.inference.text_models import load_text_model
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.write import save_model_folder
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.recipe.teacher import embed_teacher

UNCUT = 128  # tokens: no text of the tiny world is longer


def write_teacher(folder, tokenizer, hidden: int):
    """A model folder of three layers with one exit."""
    backbone = random_model(hidden, 3, seed=hidden)
    config = backbone.config
    encoder = MatryoshkaEncoder(backbone, (3,))
    save_model_folder(
        folder,
        encoder.state_dict(),
        config,
        tokenizer,
        ModelRecord((3,), (hidden,), (), 0.05, UNCUT),
    )
    return folder


@pytest.fixture(scope="module")
def own(world, tmp_path_factory):
    """(a teacher of ours with the data's tokenizer, its vectors in float32)"""
    folder = tmp_path_factory.mktemp("own")
    model = write_teacher(folder / "model", AutoTokenizer.from_pretrained(world.backbone), 80)
    embed_teacher(
        load_text_model(model, "cpu"), teacher_options(world, folder / "vectors"), progress=False
    )
    return model, folder / "vectors"


@pytest.fixture(scope="module")
def stranger(world, tmp_path_factory):
    """A sentence-transformers model with another tokenizer and narrower than the student."""
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("stranger")
    model = write_teacher(folder / "model", make_tokenizer(), 48)
    (model / "ml_embed.json").unlink()
    arguments = teacher_options(world, folder / "vectors", dtype="float16", query_prompt="query: ")
    embed_teacher(load_text_model(model, "cpu"), arguments, progress=False)
    return folder / "vectors"


@pytest.mark.parametrize("kd_loss", ["vectors", "similarity"])
def test_losses_are_those_of_the_live_teacher(world, own, tmp_path, kd_loss):
    """All tasks and axes, over several steps.

    With "vectors" the student learns only at the one exit that the teacher has.
    """
    lines = {}
    for name, teacher in (
        ("live", {"teacher_model_path": own[0]}),
        ("before", {"teacher_vectors_path": own[1]}),
    ):
        changes = {key: str(path) for key, path in teacher.items()}
        settings = {
            "train_steps": 6,
            "max_seq_length": UNCUT,
            "validation_steps": 0,
            "kd_weight": 3.0,
        }
        code, lines[name] = train(world, tmp_path, name, kd_loss=kd_loss, **settings, **changes)
        assert code == 0
    for live, before in zip(lines["live"], lines["before"], strict=True):
        assert live.keys() == before.keys()
        for key in live.keys() & {"loss", "distillation_loss", "grad_norm"}:
            assert before[key] == pytest.approx(live[key], rel=1e-5), key
    assert all(
        line["distillation_loss"] > 1e-3 for line in lines["before"] if line["split"] == "train"
    )
    seen = {
        key.split("/")[0] for line in lines["before"] for key in line if "training_loss_hard" in key
    }
    assert seen >= set(TASKS)


def test_another_tokenizer_and_width_teach(world, stranger, tmp_path):
    """The student's cosines approach the teacher's, chunks change nothing, and files stay as is."""
    before = {path.name: path.read_bytes() for path in stranger.iterdir()}
    changes = {
        "teacher_vectors_path": str(stranger),
        "kd_loss": "similarity",
        "validation_steps": 0,
    }
    _, lines = train(
        world,
        tmp_path,
        train_steps=24,
        log_interval=6,
        learning_rate=3e-3,
        kd_weight=100.0,
        **changes,
    )
    losses = [line["distillation_loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert before.items() <= {path.name: path.read_bytes() for path in stranger.iterdir()}.items()
    weights = []
    for name, budget in (("whole", 0), ("chunks", 64)):
        train(
            world,
            tmp_path,
            name,
            max_tokens_per_forward=budget,
            train_steps=3,
            learning_rate=1e-4,
            **changes,
        )
        weights.append(load_file(tmp_path / name / "resume" / "step_3" / "model.safetensors"))
    for parameter, whole in weights[0].items():
        assert (whole - weights[1][parameter]).abs().max() < 2e-5, parameter


def test_a_continued_run_is_bit_equal_wherever_the_vectors_lie_and_only_with_them(
    world, own, stranger, tmp_path, capsys
):
    folder = tmp_path / "vectors"
    shutil.copytree(own[1], folder)
    settings = {
        "teacher_vectors_path": str(folder),
        "kd_loss": "similarity",
        "checkpointing_steps": 2,
    }
    train(world, tmp_path, **settings)
    whole = (tmp_path / "run" / "resume" / "step_4" / "model.safetensors").read_bytes()
    for path in tmp_path.glob("run/**/step_4"):
        shutil.rmtree(path)
    folder.rename(tmp_path / "moved")
    code, _ = train(
        world,
        tmp_path,
        arguments=["--resume", "auto"],
        **settings | {"teacher_vectors_path": str(stranger)},
    )
    assert code == 2
    assert "  - teacher_vectors_path: " in capsys.readouterr().err
    moved = {"teacher_vectors_path": str(tmp_path / "moved")}
    code, _ = train(world, tmp_path, arguments=["--resume", "auto"], **settings | moved)
    assert code == 0
    assert (tmp_path / "run" / "resume" / "step_4" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("name", TASKS)
def test_a_batch_has_the_vectors_of_its_texts_by_role(world, own, name, processes):
    """Also rows that only fill up; a missing negative has any finite value."""
    config = parse_config(world.config())
    store = open_store(world.tokenized, world.folder / "cache", progress=False)
    dataset = store.datasets[name]
    teacher = open_teacher_vectors(own[1], store, 64, "vectors")
    plan = plan_dataset(dataset, config)
    eos = AutoTokenizer.from_pretrained(world.backbone).eos_token_id
    live = load_text_model(own[0], "cpu")
    rows = np.array([5, 3, 8, 0, 11])
    for process in range(processes):
        builder = BatchBuilder(
            0, UNCUT, eos, mask_false_negatives=True, process=process, processes=processes
        )
        batch = builder.build(dataset, plan, rows, epoch=0)
        found = teacher.of_batch(batch, builder.own_rows(rows))
        texts = [ids.tolist() for ids in batch.texts.input_ids.split(batch.texts.packed.lengths)]
        decoded = AutoTokenizer.from_pretrained(world.backbone).batch_decode(
            [text[:-1] for text in texts]
        )
        expected = torch.from_numpy(live.encode(decoded, normalize=False))
        torch.testing.assert_close(found.query[0], expected[batch.query], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.passage[0], expected[batch.passage], rtol=1e-5, atol=1e-5)
        used = batch.negative_documents >= 0
        torch.testing.assert_close(
            found.negatives[0][used], expected[batch.negatives][used], rtol=1e-5, atol=1e-5
        )
        assert found.negatives.shape == (1, *batch.negatives.shape, 80)
        assert found.negatives.isfinite().all()


def refused(world, tmp_path, capsys, folder, **changes) -> str:
    """run.py's message about a folder of vectors."""
    code, _ = train(world, tmp_path, teacher_vectors_path=str(folder), **changes)
    errors = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
    return errors


def test_vectors_of_other_data_are_refused_all_at_once(world, tmp_path, capsys):
    """Of fewer rows, of the same rows in another order, of nothing."""
    data = tmp_path / "data"
    raw = tmp_path / "raw"
    shutil.copytree(world.raw, raw)
    (raw / "sentiment.parquet").unlink()
    pq.write_table(pq.read_table(raw / "facts.parquet").slice(0, 19), raw / "facts.parquet")
    topics = pq.read_table(raw / "topics.parquet")
    pq.write_table(topics.take(list(reversed(range(len(topics))))), raw / "topics.parquet")
    tokenize_folder(TokenizeOptions(str(world.backbone), raw, data), progress=False)
    embed_teacher(LetterModel(), teacher_options(world, tmp_path / "vectors", data), progress=False)
    errors = refused(world, tmp_path, capsys, tmp_path / "vectors", kd_loss="similarity")
    assert "dataset 'facts' has other texts or another order there (19 rows" in errors
    assert "dataset 'topics' has other texts or another order there (21 rows" in errors
    assert "dataset 'sentiment' is not there" in errors


def test_teachers_whose_vectors_cannot_be_learned_are_told_of_similarities(
    world, stranger, tmp_path, capsys
):
    errors = refused(world, tmp_path, capsys, stranger)
    assert '48 components, fewer than the student\'s 64; set kd_loss to "similarity"' in errors

    class UnitModel(LetterModel):
        dim = 64

        def encode(self, texts, normalize=True):
            return super().encode(texts, normalize=True)

    record = embed_teacher(UnitModel(), teacher_options(world, tmp_path / "unit"), progress=False)
    assert record["normalized"]
    assert "of unit length" in refused(world, tmp_path, capsys, tmp_path / "unit")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / RECORD).unlink(), "holds no teacher.json"),
        (lambda folder: (folder / RECORD).write_text("{"), "is damaged or of another version"),
        (
            lambda folder: (folder / RECORD).write_text('{"format_version": 99}'),
            "format version 99",
        ),
        (lambda folder: next(folder.glob("queries-*")).unlink(), "is missing"),
        (
            lambda folder: next(folder.glob("documents-*")).write_bytes(b"half"),
            "does not have the size of",
        ),
        (
            lambda folder: flip_last_byte(next(folder.glob("documents-*"))),
            "is damaged: its digest was",
        ),
        (shutil.rmtree, "holds no teacher.json"),
    ],
)
def test_damage_is_a_message(world, own, tmp_path, capsys, damage, message):
    folder = tmp_path / "vectors"
    shutil.copytree(own[1], folder)
    damage(folder)
    assert message in refused(world, tmp_path, capsys, folder)


def flip_last_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_identity_is_of_the_runs_datasets_and_their_content(world, own, tmp_path):
    teacher = TeacherVectors.read(own[1])
    other = tmp_path / "other"
    embed_teacher(LetterModel(), teacher_options(world, other), progress=False)
    names = ["facts", "topics"]
    assert teacher.identity(names) == TeacherVectors.read(own[1]).identity(names[::-1])
    assert teacher.identity(names) != teacher.identity(["facts"])
    assert teacher.identity(names) != TeacherVectors.read(other).identity(names)
    with pytest.raises(UserError, match="not finished"):
        TeacherVectors.read(tmp_path)


def test_a_state_from_before_these_keys_continues(world, tmp_path):
    """What an earlier version did is what their defaults do."""
    train(world, tmp_path, checkpointing_steps=2)
    state = tmp_path / "run" / "resume" / "step_2" / "state.json"
    progress = json.loads(state.read_text())
    for key in ("kd_loss", "teacher_vectors_path", "false_negative_margin", "lora_r"):
        del progress["fingerprint"][key]
    for key in ("masked_by_document", "masked_by_margin"):
        del progress["window"][key]
    state.write_text(json.dumps(progress))
    (state.parent / "checksums.json").unlink()
    write_checksums(state.parent)
    code, _ = train(world, tmp_path, arguments=["--resume", str(state.parent)])
    assert code == 0
