"""Any input of any kind is either taken or refused with a message: no traceback, no hang.

The spoilt inputs of `tests/faults/fuzz.py` are tried here by a few each; `tests/faults/storm.py
--kinds fuzz` goes on with them for as long as one likes.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import fuzz
from helpers.tiny_runs import Inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import run as run_script
from ml_embed.config import TrainConfig, field_docs

KEYS = sorted(
    set(field_docs(TrainConfig))
    - {"output_dir", "tb_dir", "cache_dir", "teacher_model_path", "report_to"}
)
SECONDS = 20  # for one input that is trained on in under a second
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # set it for a long run of new examples
quick = settings(
    max_examples=EXAMPLES or 25,
    deadline=None,
    database=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("fuzz") / "inputs")


def trained_or_refused(inputs: Inputs, config: Path, capsys) -> int:
    """The exit code of a run of one step; it must be 0, or 2 with exactly one message, in time."""

    def hanging(number, frame):
        raise TimeoutError(f"no end after {SECONDS} s: {config.read_text()}")

    shutil.rmtree(inputs.folder / "runs", ignore_errors=True)
    capsys.readouterr()
    before = signal.signal(signal.SIGALRM, hanging)
    signal.alarm(SECONDS)
    try:
        code = run_script.main(["--config", str(config)])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    errors = capsys.readouterr().err.count("error: ")
    assert (code, errors) in ((0, 0), (2, 1)), (code, errors, config.read_text())
    return code


small = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, -(2**70)])
numbers = small | st.floats() | st.sampled_from([1e-9, 1e-3, 1e30, 1e308])
texts = st.sampled_from(
    ["", "auto", "svd", "frequency", "per_layer", "..", "a/b", "\0", "é", "constant_with_warmup"]
)
scalars = st.none() | st.booleans() | numbers | texts
values = scalars | st.lists(scalars, max_size=4) | st.dictionaries(texts, scalars, max_size=2)
likely = {
    "mel_ranks": st.lists(st.integers(1, 40), max_size=4),
    "mll_layers": st.lists(st.integers(1, 5), max_size=4),
    "mrl_dims": st.lists(st.integers(1, 80), max_size=4),
    "r": st.integers(0, 70),
    "max_seq_length": st.integers(1, 300),
    "train_batch_size": st.integers(1, 40),
    "learning_rate": st.floats(0, 1e38),
    "datasets": st.dictionaries(
        st.sampled_from(["answers", "*s", "nothing"]),
        st.fixed_dictionaries(
            {},
            optional={
                "task": st.sampled_from(["retrieval", "clustering", "classification", "?"]),
                "num_hard_neg": st.integers(-1, 5) | scalars,
                "weight": st.floats(0, 3) | numbers,
                "max_samples": st.integers(0, 30) | scalars,
            },
        ),
    ),
}


@st.composite
def config_changes(draw) -> dict:
    """A few keys set to values of about the right kind, or of any."""
    chosen = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True))
    return {
        key: draw(likely[key] if key in likely and draw(st.booleans()) else values)
        for key in chosen
    }


@quick
@given(changes=config_changes())
def test_any_config(inputs, capsys, changes):
    base = {"train_batch_size": 2, "valid_fraction": 0.2, "validation_steps": 1}
    path = inputs.config("any", **base)
    config = json.loads(path.read_text()) | changes
    steps = changes.get("train_steps", 1)
    ends_soon = steps != -1 and not (isinstance(steps, int) and 2 < steps < 2**63)
    config["train_steps"] = steps if ends_soon else 2
    path.write_text(json.dumps(config))
    trained_or_refused(inputs, path, capsys)


@quick
@given(data=st.data())
def test_any_bytes_in_a_config_file(inputs, capsys, data):
    path = inputs.config("bytes", train_steps=1)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    replacement = data.draw(st.binary(max_size=20))
    path.write_bytes(whole[:start] + replacement + whole[start + data.draw(st.integers(0, 200)) :])
    trained_or_refused(inputs, path, capsys)


@quick
@given(data=st.data())
def test_damaged_tokenized_files(inputs, capsys, tmp_path_factory, data):
    """Torn anywhere, bytes changed anywhere, in any file of the folder."""
    folder = tmp_path_factory.mktemp("damaged")
    tokenized = shutil.copytree(inputs.folder / "tokenized", folder / "tokenized")
    names = [
        "answers_query.parquet",
        "answers_corpus.parquet",
        "topics_query.parquet",
        "manifest.json",
    ]
    path = tokenized / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    settings = {
        "train_data_path": str(tokenized),
        "cache_dir": str(folder / "cache"),
        "train_steps": 2,
    }
    trained_or_refused(inputs, inputs.config("damaged", **settings), capsys)
    shutil.rmtree(folder)


def lists_of(items):
    return st.lists(st.none() | st.lists(st.none() | items, max_size=4), min_size=0, max_size=5)


ids = st.integers(0, 447) | st.sampled_from([-1, 448, 2**24, 2**31 - 1])
kinds = st.sampled_from([pa.int32(), pa.int64(), pa.float64(), pa.string(), pa.uint8()])


@quick
@given(data=st.data())
def test_any_columns_in_tokenized_files(inputs, capsys, tmp_path_factory, data):
    """Well-formed parquet of about the right shape, with nulls, empty lists, wrong numbers and
    wrong types."""
    folder = tmp_path_factory.mktemp("columns")
    tokenized = shutil.copytree(inputs.folder / "tokenized", folder / "tokenized")

    def column(items, kind):
        try:
            return pa.array(items, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            return pa.array(
                items, pa.list_(pa.int64()) if items and isinstance(items[0], list) else None
            )

    rows = data.draw(lists_of(ids))
    documents = st.integers(0, 6) | st.sampled_from([-1, 7, 2**40, None])
    columns = {
        "query_input_ids": column(rows, pa.list_(data.draw(kinds))),
        "passage_doc_id": column([data.draw(documents) for _ in rows], pa.int64()),
        "negative_doc_ids": column(
            [[data.draw(documents) for _ in range(i % 3)] for i in range(len(rows))], None
        ),
    }
    dropped = data.draw(st.sets(st.sampled_from(sorted(columns)), max_size=1))
    pq.write_table(
        pa.table({name: values for name, values in columns.items() if name not in dropped}),
        tokenized / "answers_query.parquet",
    )
    manifest = json.loads((tokenized / "manifest.json").read_text())
    manifest["datasets"]["answers"]["rows"] = data.draw(st.just(len(rows)) | scalars)
    (tokenized / "manifest.json").write_text(json.dumps(manifest))
    settings = {
        "train_data_path": str(tokenized),
        "cache_dir": str(folder / "cache"),
        "train_steps": 1,
    }
    trained_or_refused(inputs, inputs.config("columns", **settings), capsys)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return fuzz.base(tmp_path_factory.mktemp("sound") / "base")


@pytest.mark.parametrize("kind", fuzz.KINDS, ids=lambda kind: kind.__name__)
def test_any_spoilt_input(sound, tmp_path_factory, kind):
    @settings(quick, max_examples=EXAMPLES or 4)
    @given(random=st.randoms(use_true_random=False))
    def tried(random):
        folder = tmp_path_factory.mktemp("spoilt")
        found = fuzz.case(kind, random, sound, folder)
        shutil.rmtree(folder)
        assert found["outcome"] in ("equal", "error"), found

    tried()


def test_the_fuzzers_inputs_are_sometimes_trained_on(inputs, capsys):
    """The base inputs train: else all of the above would pass by refusing everything."""
    assert trained_or_refused(inputs, inputs.config("base", train_steps=1), capsys) == 0
    assert np.isfinite(json.loads((inputs.run_dir("base") / "metrics.jsonl").read_text())["loss"])
