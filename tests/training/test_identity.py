"""A run is continued only with what it began with: data, start model and teacher, by content."""

import dataclasses
import json
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.in_process import train
from helpers.teachers import LetterModel, teacher_options
from helpers.tiny_world import write_manifest

from ml_embed.recipe.teacher import embed_teacher
from scripts import report


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """A world of its own and a run in it that was stopped after step 2 of 4."""
    folder = tmp_path_factory.mktemp("identity")
    shutil.copytree(world.backbone, folder / "backbone")
    shutil.copytree(world.backbone, folder / "teacher")
    shutil.copytree(world.tokenized, folder / "tokenized")
    forget_digests(folder / "tokenized")
    embed_teacher(LetterModel(), teacher_options(world, folder / "vectors"), progress=False)
    own = in_folder(world, folder)
    code, _ = train(own, folder, "begun", **settings(own))
    assert code == 0
    for path in (*folder.glob("begun/step_4"), *folder.glob("begun/resume/step_4")):
        shutil.rmtree(path)
    return own


def in_folder(world, folder):
    """The world whose parts lie in a folder."""
    return dataclasses.replace(
        world, backbone=folder / "backbone", tokenized=folder / "tokenized", folder=folder
    )


def copied(begun, tmp_path):
    """A copy of a world, and the folder that it is in."""
    folder = shutil.copytree(begun.folder, tmp_path / "world")
    return in_folder(begun, folder), folder


def settings(world) -> dict:
    return {
        "checkpointing_steps": 2,
        "validation_steps": 0,
        "use_mll": False,
        "teacher_vectors_path": str(world.folder / "vectors"),
        "kd_loss": "similarity",
    }


def forget_digests(data) -> None:
    """As in data of earlier versions, or of other programs."""
    manifest = json.loads((data / "manifest.json").read_text())
    for entry in manifest["datasets"].values():
        del entry["digests"]
    write_manifest(data, manifest)


def exchanged(table: pa.Table) -> pa.Table:
    """The first two different passages change places: the same documents, as often as before."""
    passages = table.column("passage_doc_id").to_numpy().copy()
    other = int(np.argmax(passages != passages[0]))
    passages[[0, other]] = passages[[other, 0]]
    place = table.schema.get_field_index("passage_doc_id")
    return table.set_column(place, table.schema.field(place), pa.array(passages))


def in_another_order(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, len(table))])


def rewrite_data(world, change) -> None:
    path = world.tokenized / "facts_query.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def set_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def negate_one(folder) -> None:
    """One vector of each file points the other way; the rest stays."""
    for path in folder.glob("queries-*.vectors"):
        vectors = np.fromfile(path, np.float32).reshape(-1, LetterModel.dim)
        vectors[4] *= -1
        vectors.tofile(path)


CHANGES = {
    "passages exchanged": (lambda w: rewrite_data(w, exchanged), "facts_query.parquet"),
    "rows in another order": (lambda w: rewrite_data(w, in_another_order), "another order"),
    "another eps": (lambda w: set_config(w.backbone, rms_norm_eps=1e-3), "config.json"),
    "another theta": (
        lambda w: set_config(
            w.backbone, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
        ),
        "config.json",
    ),
    "a negated vector": (lambda w: negate_one(w.folder / "vectors"), "queries-"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_run_is_made_of_may_not_change(begun, tmp_path, capsys, name):
    change, file = CHANGES[name]
    own, folder = copied(begun, tmp_path)
    change(own)
    code, _ = train(own, folder, "begun", ["--resume", "auto"], **settings(own))
    errors = capsys.readouterr().err
    assert code == 2, errors
    assert file in errors
    assert "Traceback" not in errors


def test_a_dry_run_says_what_it_read(begun, tmp_path, capsys):
    """Once: the second one knows the digests."""
    own, folder = copied(begun, tmp_path)
    for said in (True, False):
        time.sleep(0.06)  # what was just written is not taken for settled
        assert train(own, folder, "begun", ["--dry-run"], **settings(own))[0] == 0
        assert ("digests: read 6 files whole, 0.0 MB in 0." in capsys.readouterr().err) == said


def test_a_copy_of_all_of_it_is_the_same(begun, tmp_path):
    own, folder = copied(begun, tmp_path)
    code, lines = train(own, folder, "begun", ["--resume", "auto"], **settings(own))
    assert code == 0
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]


def test_changed_metrics_are_said_and_kept(begun, tmp_path, capsys):
    """A digit that a disk gave back wrong: the line is still one."""
    own, folder = copied(begun, tmp_path)
    path = folder / "begun" / "metrics.jsonl"
    content = path.read_bytes()
    start = content.index(b'"loss": ') + 8
    changed = bytes([content[start] ^ 1])
    path.write_bytes(content[:start] + changed + content[start + 1 :])
    code, lines = train(own, folder, "begun", ["--resume", "auto"], **settings(own))
    assert code == 0
    assert "metrics.jsonl has changed since the state was saved" in capsys.readouterr().err
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    path.write_bytes(path.read_bytes().replace(b'"loss": ' + changed, b'"loss": 7', 1))
    assert report.main([str(folder / "begun")]) == 0
    assert "metrics.jsonl has changed since the state of step 4" in capsys.readouterr().err
