"""What cuts cost here, and the choice among them that keeps within limits."""

import json
import os
import shlex
import shutil
import signal

import pytest
from helpers.in_process import train
from helpers.tiny_models import make_tokenizer
from transformers import Qwen3Config, Qwen3Model

from ml_embed.commands import choose_cut, export, report
from ml_embed.errors import UserError
from ml_embed.evaluation import costs
from ml_embed.evaluation.cube import evaluate_cube
from ml_embed.model_folders.cut import Cut
from ml_embed.model_folders.read import ModelFolder
from ml_embed.model_folders.sizes import parameters_of

SIZES = ["--rank", "16", "32", "--depth", "1", "2"]


@pytest.fixture(scope="module")
def run_dir(world, tmp_path_factory):
    """A run with its evaluation."""
    folder = tmp_path_factory.mktemp("costs")
    assert train(world, folder, train_steps=2)[0] == 0
    model = folder / "run" / "step_2"
    result = evaluate_cube(model, world.raw / "facts.parquet", progress=False)
    result["rows"][0]["trained"] = False
    write(folder / "run", result)
    return folder / "run"


def write(folder, result):
    (folder / "evaluation.json").write_text(json.dumps({"model": result, "baseline": None}))


@pytest.fixture(scope="module")
def measured(run_dir):
    """costs.json, of two texts."""
    (run_dir / "texts.txt").write_text("a text\n\nanother, longer one of some words\n")
    assert choose_cut.main(flags_for(run_dir)) == 0
    return json.loads((run_dir / "costs.json").read_text())


def flags_for(run_dir, *more):
    texts, model = str(run_dir / "texts.txt"), str(run_dir / "step_2")
    flags = ["--model", model, "--evaluation", str(run_dir), "--texts", texts, "--device", "cpu"]
    return [*flags, *SIZES, *more]


def choose(run_dir, capsys, *more):
    capsys.readouterr()
    code = choose_cut.main(flags_for(run_dir, *more))
    return code, capsys.readouterr()


@pytest.fixture
def asked(monkeypatch):
    """The (rank, depth) pairs that each call would measure; none is."""
    asked = []
    monkeypatch.setattr(costs, "tqdm", lambda pairs, **_: asked.append(pairs) or [])
    return asked


def test_each_rank_and_depth_is_measured_once(run_dir, measured):
    assert (measured["texts"], measured["device"]) == (2, "cpu"), "blank lines are no texts"
    config = ModelFolder.open(run_dir / "step_2").config
    pairs = [(cost["rank"], cost["depth"]) for cost in measured["cuts"]]
    assert pairs == [(16, 1), (16, 2), (32, 1), (32, 2)]
    for cost in measured["cuts"]:
        assert cost["parameters"] == parameters_of(config, Cut(cost["rank"], cost["depth"], 64))
        assert 0 < cost["latency"] <= cost["slowest"] < 5
        assert 1e5 < cost["memory"] < 1e9


def fronts(rows, fits):
    """Names of the cuts that fit and that no other one that fits beats, in plain loops."""
    rows = [row for row in rows if row["rank"] in (16, 32) and fits(row)]

    def cost(row):
        return row["parameters"], row["depth"], row["dim"]

    return {
        f"depth {row['depth']}, dim {row['dim']}, rank {row['rank']}"
        for row in rows
        if not any(
            all(a <= b for a, b in zip(cost(other), cost(row), strict=True))
            and (other["ndcg@10"] > row["ndcg@10"] or other["ndcg@10"] == row["ndcg@10"])
            for other in rows
            if other is not row
        )
    }


def test_the_front_is_what_no_other_cut_beats(
    run_dir, measured, asked, tmp_path, capsys, monkeypatch
):
    lines = choose(run_dir, capsys)[1].out.splitlines()
    assert asked == [[]], "everything was measured before"
    rows = json.loads((run_dir / "evaluation.json").read_text())["model"]["rows"]
    named = [line.partition("  ")[0] for line in lines if line.startswith("depth ")]
    assert set(named) == fronts(rows, lambda row: True)
    assert len(named) < len(rows)
    words = shlex.split(lines[-1])
    assert words[:2] == ["python", "scripts/export_model.py"]
    best = max(row["ndcg@10"] for row in rows)
    chosen = dict(zip(words[6::2], map(int, words[7::2]), strict=False))
    (row,) = (r for r in rows if all(r[axis[2:]] == size for axis, size in chosen.items()))
    assert row["ndcg@10"] == best
    monkeypatch.chdir(tmp_path)
    assert export.main(words[2:]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert [exported[axis] for axis in ("rank", "depth", "dim")] == list(chosen.values())


def test_limits_leave_out_what_needs_more(run_dir, measured, asked, capsys):
    of = {(cost["rank"], cost["depth"]): cost for cost in measured["cuts"]}
    rows = json.loads((run_dir / "evaluation.json").read_text())["model"]["rows"]
    latency = 0.9999 * max(cost["latency"] for cost in of.values())

    given = ["--latency", f"{1e6 * latency:.6f} us", "--memory", "1GiB"]
    code, said = choose(run_dir, capsys, *given)
    assert code == 0, said.err
    named = {line.partition("  ")[0] for line in said.out.splitlines() if line[:6] == "depth "}
    assert named == fronts(rows, lambda row: of[row["rank"], row["depth"]]["latency"] <= latency)
    smallest = min(cost["memory"] for cost in of.values())
    code, said = choose(run_dir, capsys, "--memory", "9kB")
    assert code == 2
    assert f"the smallest needs {smallest / 1e6:,.0f} MB" in said.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--memory", "200"], "--memory 200 must be a number with its unit: kB, MB"),
        (["--memory", "20ms"], "--memory 20ms must be a number with its unit: kB, MB"),
        (["--latency", "fastms"], "--latency fastms must be a number with its unit: us, ms, s"),
        (["--rank", "7"], "has no cut of the --rank, --depth and --dim that are given"),
        (["--texts", "nowhere.txt"], "nowhere.txt is no file"),
        (["--evaluation", "nowhere"], "nowhere does not exist; evaluate again"),
    ],
)
def test_mistakes(run_dir, capsys, given, message):
    code, said = choose(run_dir, capsys, *given)
    assert code == 2
    assert message in said.err


def test_evaluations_of_other_models_are_refused(run_dir, measured, asked, tmp_path, capsys):
    result = json.loads((run_dir / "evaluation.json").read_text())["model"]
    for row in result["rows"]:
        row["parameters"] += 1
    write(tmp_path, result)
    (tmp_path / "costs.json").write_text(json.dumps(measured))
    code, said = choose(run_dir, capsys, "--evaluation", str(tmp_path))
    assert code == 2
    assert "is an evaluation of another model than" in said.err
    assert not asked, "it is told before anything is measured"


def test_only_what_is_missing_is_measured(run_dir, measured, asked, tmp_path):
    known = costs.Costs.load(run_dir / "costs.json")
    cuts = [Cut(rank, depth, 8) for rank in (8, 16) for depth in (1, 2)]
    texts = ["a text", "another, longer one of some words"]
    other = shutil.copytree(run_dir / "step_2", tmp_path / "other")
    (other / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    for model, given in ((run_dir / "step_2", texts), (run_dir / "step_2", ["b"]), (other, texts)):
        costs.measure_costs(model, cuts, given, "cpu", known, progress=False)
    every = [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert asked == [every[:2], every, every], "other texts and other models are measured anew"


def test_a_column_of_another_name(tmp_path):
    (tmp_path / "texts.csv").write_text("id,body\n1,a text\n")
    flags = ["--model", "m", "--evaluation", "e", "--texts", str(tmp_path / "texts.csv")]
    args = choose_cut.parse_arguments([*flags, "--column", "body"])
    assert choose_cut.read_texts(args.texts, args.column) == ["a text"]
    with pytest.raises(UserError, match="no column 'text'; name one of 'id', 'body' with --column"):
        choose_cut.read_texts(tmp_path / "texts.csv", "text")


def test_measurements_do_not_vanish_silently(run_dir, measured, asked, monkeypatch):
    """Other texts: all is measured anew, and that is said. --overwrite keeps what is not asked."""
    before = costs.Costs.load(run_dir / "costs.json")
    wanted, texts = [Cut(16, 1, 8)], ["a text", "another, longer one of some words"]
    kept = costs.measure_costs(run_dir / "step_2", wanted, texts, "cpu", before, again=True)
    assert [(cost.rank, cost.depth) for cost in kept.cuts] == [(16, 2), (32, 1), (32, 2)]
    assert asked == [[(16, 1)]]
    said = []
    monkeypatch.setattr(costs, "notice", said.append)
    costs.measure_costs(run_dir / "step_2", wanted, ["other"], "cpu", before)
    assert "the 4 cuts in costs.json were measured with other texts" in said[0]


def test_the_page_shows_what_was_measured(run_dir, measured, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert report.main([str(run_dir), "--output", str(page)]) == 0
    for cost in measured["cuts"]:
        facts = f"{1000 * cost['latency']:.3g} ms latency, {cost['memory'] / 1e6:,.0f} MB memory"
        assert f"depth {cost['depth']}, dim 8, rank {cost['rank']}: " in page.read_text()
        assert facts in page.read_text()
    damaged = json.loads((run_dir / "evaluation.json").read_text())["model"]
    for row in damaged["rows"]:
        row["parameters"] += 1
    write(tmp_path, damaged)
    (tmp_path / "costs.json").write_text(json.dumps(measured))
    capsys.readouterr()
    flags = ["--evaluation", str(tmp_path), "--output", str(page)]
    assert report.main([str(run_dir), *flags]) == 0
    assert "costs.json is of another model" in capsys.readouterr().err
    assert "ms latency" not in page.read_text()
    (tmp_path / "costs.json").write_text("{}")
    assert report.main([str(run_dir), *flags]) == 2
    assert "measure again with scripts/choose_cut.py --overwrite" in capsys.readouterr().err


@pytest.mark.alone
def test_memory_is_that_of_the_weights(tmp_path):
    needed = {}
    for rows in (1_000, 101_000):
        config = Qwen3Config(
            vocab_size=rows,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
        )
        folder = tmp_path / str(rows)
        Qwen3Model(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        needed[rows] = costs._in_new_process(folder, 0, 1, "cpu", ["a text"], 1).memory
    table = 100_000 * 64 * 4
    assert 0.9 * table < needed[101_000] - needed[1_000] < 2.2 * table


def test_a_process_that_is_killed_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "_measure", killed)
    with pytest.raises(UserError, match=r"depth 3, rank 16 was killed; where memory is short"):
        costs._in_new_process(tmp_path, 16, 3, "cpu", ["a"], 1)


def killed(*given):
    os.kill(os.getpid(), signal.SIGKILL)
