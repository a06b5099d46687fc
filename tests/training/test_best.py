"""keep_best and patience: the best model is kept, and a run that no longer improves ends."""

import json
import shutil

import pytest
from helpers.in_process import train
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import Inputs, config_of, metrics, run, write_tokenized

from ml_embed.config import parse_config
from ml_embed.errors import UserError
from ml_embed.files.atomic import write_checksums
from ml_embed.training.best import Best
from ml_embed.training.inputs import open_inputs
from ml_embed.training.resume import what_is_left

KEY = "Avg/retrieval/ndcg@10"
EVERY_STEP = {"validation_steps": 1, "checkpointing_steps": 1, "valid_fraction": 0.4}


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [(KEY, 0.6, 0.4), ("loss", 0.4, 0.6), ("facts/valid_loss_hard", 0.4, 0.6)],
)
def test_a_loss_is_better_the_lower_it_is(metric, better, worse):
    best = Best(metric)
    assert best.add({metric: 0.5}, 1)
    assert not best.add({metric: 0.5}, 2), "as good is no gain"
    assert not best.add({metric: worse}, 3)
    assert (best.without_gain, best.is_over(2), best.is_over(3), best.is_over(0)) == (
        2,
        True,
        False,
        False,
    )
    assert best.add({metric: better}, 4)
    assert (best.value, best.step, best.without_gain) == (better, 4, 0)


def test_the_best_model_is_kept_outside_the_limit(world, tmp_path):
    settings = EVERY_STEP | {"keep_best": KEY, "train_steps": 6, "learning_rate": 0.02}
    code, lines = train(world, tmp_path, "all", **settings)
    assert code == 0
    values = {line["step"]: line[KEY] for line in lines if line["split"] == "valid"}
    best = max(values, key=lambda step: (values[step], -step))
    assert len(set(values.values())) > 1
    for file in ("model.safetensors", "ml_embed.json"):
        kept = (tmp_path / "all" / "best" / file).read_bytes()
        assert kept == (tmp_path / "all" / f"step_{best}" / file).read_bytes()
    train(world, tmp_path, "limited", save_total_limit=1, **settings)
    assert [path.name for path in (tmp_path / "limited").glob("step_*")] == ["step_6"]
    limited = (tmp_path / "limited" / "best" / "model.safetensors").read_bytes()
    assert limited == (tmp_path / "all" / "best" / "model.safetensors").read_bytes()


def test_a_run_without_gains_ends_and_stays_ended(world, tmp_path, capsys):
    """At weights that do not move, no validation is better than the first."""
    still = {"learning_rate": 1e-12, "min_lr": 0.0, "weight_decay": 0.0, "train_steps": 9}
    settings = EVERY_STEP | still | {"keep_best": KEY, "patience": 2, "checkpointing_steps": 0}
    code, lines = train(world, tmp_path, **settings)
    assert code == 0
    assert max(line["step"] for line in lines) == 3
    assert "ended after step 3: the last 2 validations gave no better" in capsys.readouterr().err
    assert (tmp_path / "run" / "step_3").is_dir()
    code, again = train(world, tmp_path, arguments=["--resume", "auto"], **settings)
    assert (code, again) == (0, lines)
    assert train(world, tmp_path, arguments=["--is-done"], **settings)[0] == 0
    settings["patience"] = 4
    assert train(world, tmp_path, arguments=["--is-done"], **settings)[0] == 75
    code, longer = train(world, tmp_path, arguments=["--resume", "auto"], **settings)
    assert code == 0
    assert max(line["step"] for line in longer) == 5


def test_what_a_crash_left_of_a_run_is_to_be_continued(tmp_path):
    """Torn or missing files, that is: the newest whole state counts."""
    config = parse_config(
        dict.fromkeys(("model_path", "experiment_id", "tb_dir", "cache_dir"), "x")
        | {"output_dir": str(tmp_path), "train_data_path": "x"}
    )
    states, resolved = config.run_dir / "resume", config.run_dir / "resolved.json"
    assert "no step that is saved" in what_is_left(config)
    for step in (2, 3):
        (states / f"step_{step}").mkdir(parents=True)
        (states / f"step_{step}" / "state.json").write_text(json.dumps({"step": step}))
        write_checksums(states / f"step_{step}")
    assert "has done 3 steps" in what_is_left(config)
    resolved.write_text('{"total_st')
    assert "has done 3 steps" in what_is_left(config)
    resolved.write_text('{"total_steps": 3}')
    assert what_is_left(config) is None
    (states / "step_3" / "state.json").write_text("{")
    assert "has done 2 of 3 steps" in what_is_left(config)
    (states / "step_3" / "state.json").unlink()
    assert "has done 2 of 3 steps" in what_is_left(config)


def test_it_is_exact_in_a_continued_run_of_two_processes(tmp_path):
    inputs = Inputs.write(tmp_path / "inputs")
    settings = EVERY_STEP | {"keep_best": "loss", "patience": 2, "learning_rate": 0.01}
    run(inputs, config_of(inputs, "unbroken", **settings))
    unbroken, broken = inputs.run_dir("unbroken"), inputs.run_dir("broken")
    shutil.copytree(unbroken, broken)
    last = max(line["step"] for line in metrics(unbroken))
    assert 2 < last < 9, "the run ended early"
    for step in range(2, last + 1):
        shutil.rmtree(broken / "resume" / f"step_{step}", ignore_errors=True)
    shutil.copytree(
        unbroken / "resume" / f"step_{last - 1}", broken / "resume" / f"step_{last - 1}"
    )
    settings["train_batch_size"] = 2
    run(inputs, config_of(inputs, "broken", **settings), "--resume", "auto", processes=2)
    states = [
        json.loads((folder / "resume" / f"step_{last}" / "state.json").read_text())["best"]
        for folder in (unbroken, broken)
    ]
    assert states[0].pop("value") == pytest.approx(states[1].pop("value"), rel=1e-5)
    assert states[0] == states[1]
    assert len(metrics(broken)) == len(metrics(unbroken))


def test_a_number_that_validation_does_not_give_is_refused(world, tmp_path, capsys):
    assert train(world, tmp_path, keep_best="Avg/retrieval/ndgc@10")[0] == 2
    said = capsys.readouterr().err
    assert "keep_best: validation gives no number 'Avg/retrieval/ndgc@10'" in said
    assert "'Avg/retrieval/ndcg@10'" in said
    assert train(world, tmp_path, patience=2)[0] == 2
    assert "patience needs keep_best" in capsys.readouterr().err
    assert train(world, tmp_path, keep_best="loss", valid_fraction=0)[0] == 2
    assert "keep_best needs validation" in capsys.readouterr().err


def test_a_number_of_a_language_needs_held_out_rows_of_it(tmp_path):
    """Rows whose task gives that number, that is; all names that are taken are given."""
    inputs = Inputs.write(tmp_path / "inputs")
    shutil.rmtree(inputs.folder / "tokenized")
    languages = {"facts": ["swa"] + ["eng"] * 39, "polarity": ["yor"] * 7}
    datasets = {
        "facts": ("retrieval", 40, 40, (1, 3)),
        "polarity": ("classification", 7, 2, (1, 1)),
    }
    write_tokenized(inputs.folder / "tokenized", make_tokenizer(), datasets, languages)
    settings = {"datasets": {"polarity": {"task": "classification"}}}
    rows = held_out_languages(opened(inputs, "language/eng/ndcg@10", **settings))
    assert rows == {"facts": {"eng"}, "polarity": {"yor"}}, "the only row of swa is trained on"
    for taken in ("eng/valid_loss_in_batch", "yor/valid_loss_hard"):
        opened(inputs, f"language/{taken}", **settings)
    for refused in ("swa/ndcg@10", "swa/valid_loss_hard", "yor/ndcg@10", "yor/valid_loss_in_batch"):
        with pytest.raises(UserError, match=f"validation gives no number 'language/{refused}'"):
            opened(inputs, f"language/{refused}", **settings)


def test_a_metric_of_candidates_needs_held_out_rows_with_negatives(tmp_path):
    inputs = Inputs.write(tmp_path / "inputs")
    for taken in ("no_negatives/valid_loss_hard", "polarity/ndcg@10", "graded/spearman"):
        opened(inputs, taken)
    with pytest.raises(UserError, match="validation gives no number 'no_negatives/ndcg@10'"):
        opened(inputs, "no_negatives/ndcg@10")


def opened(inputs, metric, **settings):
    path = config_of(inputs, "run", keep_best=metric, valid_fraction=0.3, **settings)
    return open_inputs(parse_config(json.loads(path.read_text())), 1, progress=False)


def held_out_languages(inputs):
    found = {}
    for name, dataset in inputs.store.datasets.items():
        rows = [row for batch in inputs.schedule.valid_batches(name) for row in batch]
        found[name] = {dataset.languages[dataset.language_numbers[row]] for row in rows}
    return found
