"""The report of a run: what stands on the page, what its pictures show, that it stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.in_process import train
from helpers.tiny_world import TASKS

from ml_embed import Embedder
from ml_embed.evaluation.cube import evaluate_cube
from ml_embed.model_folders.cut import Cut
from ml_embed.reports.charts import (
    MOST_POINTS,
    Scale,
    line_chart,
    log_ticks,
    scatter_chart,
    thinned,
    ticks,
)
from ml_embed.reports.choices import CubePoint, best_choices
from ml_embed.reports.run_page import run_parameters
from ml_embed.reports.tables import number_text
from scripts.report import main

VOID = {"meta"}
# The whole model is not in it.
GRID = {"valid_ranks": [16], "valid_layers": [1, 2], "valid_dims": [8, 64]}


class Balanced(HTMLParser):
    """Fails where a tag is closed that was not opened last; collects tags and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_dir(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    intervals = {"train_steps": 6, "log_interval": 2, "validation_steps": 3}
    code, _ = train(world, folder, "a <b> run", valid_fraction=0.3, **intervals, **GRID)
    assert code == 0
    result = evaluate_cube(
        folder / "a <b> run" / "step_6", world.raw / "facts.parquet", progress=False
    )
    (folder / "a <b> run" / "evaluation.json").write_text(
        json.dumps({"model": result, "baseline": None})
    )
    return folder / "a <b> run"


def test_the_page_shows_the_run_and_needs_nothing_else(run_dir, tmp_path):
    assert main([str(run_dir), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script", page), "nothing is fetched"
    seen = Balanced(page)
    assert "a <b> run" in seen.text, "names are escaped"
    for heading in (
        "Loss, the whole objective",
        "Validation: nDCG@10",
        "Throughput",
        "What to choose from",
    ):
        assert heading in seen.text
    assert "Distillation" not in seen.text, "no empty picture of what was not done"
    assert all(f"</svg>{name}</span>" in page for name in ("facts", "topics", "sentiment"))
    evaluation = json.loads((run_dir / "evaluation.json").read_text())["model"]
    dots = [attributes for tag, attributes in seen.tags if tag == "circle"]
    assert len(dots) >= len(evaluation["rows"])
    for row in evaluation["rows"]:
        assert f"{row['ndcg@10']:.3f}" in page


def test_the_loss_curve_has_the_logged_points(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]
    assert len(losses) == 3
    chart = line_chart({"training": losses}, "optimizer step", "loss")
    assert chart in Path(_report(run_dir)).read_text()
    drawn = [
        tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', chart)[1].split()
    ]
    by_height = sorted(range(3), key=lambda i: -drawn[i][1])
    assert by_height == sorted(range(3), key=lambda i: losses[i][1]), "higher values stand higher"
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)


def test_the_validation_grid_is_shown_over_time_and_to_choose_from(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in lines if line["split"] == "valid"]
    page = _report(run_dir).read_text()

    def mean(line, suffix):
        return sum(line[f"{name}/ndcg@10{suffix}"] for name in TASKS) / len(TASKS)

    by_depth = {
        f"depth {n}": [(v["step"], mean(v, f"/rank_16_depth_{n}_dim_64")) for v in valid]
        for n in (1, 2)
    }
    by_dim = {
        f"dim {n}": [(v["step"], mean(v, f"/rank_16_depth_2_dim_{n}")) for v in valid]
        for n in (8, 64)
    }
    assert [step for step, _ in by_dim["dim 8"]] == [3, 6]
    for axis, curves in (("depth", by_depth), ("dim", by_dim)):
        assert f"ndcg@10 by {axis}</h3>{line_chart(curves, 'optimizer step', 'ndcg@10')}" in page
    assert "ndcg@10 by rank" not in page, "one rank is no curve"

    chosen = page[page.index("What to choose from: ndcg@10 on held-out rows") :]
    assert "held-out rows after step 6" in chosen
    cells = {
        (16, depth, dim): f"/rank_16_depth_{depth}_dim_{dim}" for depth in (1, 2) for dim in (8, 64)
    }
    for (rank, depth, dim), suffix in {**cells, (32, 2, 64): ""}.items():
        model = Embedder.from_pretrained(
            run_dir / "step_6", rank=rank, depth=depth, dim=dim, device="cpu"
        )
        assert (
            f"depth {depth}, dim {dim}, rank {rank}: {mean(valid[-1], suffix):.3f}, "
            f"{number_text(model.num_parameters, short=True)} parameters, "
            f"{50 * depth} % of the latency, {4 * dim} bytes per vector"
        ) in chosen
    resolved = json.loads((run_dir / "resolved.json").read_text())
    assert run_parameters(resolved, Cut(32, 2, 64)) == resolved["parameters"]


def test_languages_have_a_table_and_curves(tmp_path):
    """Their losses are no dataset's."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train = {"split": "train", "tokens": 30, "loss": 1.0, "facts/training_loss_hard": 2.0}
    by_language = {"language/swa/samples": 3, "language/swa/tokens": 10}
    by_language |= {"language/<b>/samples": 1, "language/<b>/tokens": 20}
    by_language |= {
        "language/swa/training_loss_hard": 2.5,
        "language/swa/training_loss_in_batch": 1,
    }
    lines = [{"step": step, **train, **by_language} for step in (1, 2)]
    lines.append({"split": "valid", "step": 2, "loss": 1.0, "language/swa/ndcg@10": 0.25})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "resolved.json").write_text(json.dumps({"languages": {"swa": {"rows": 12}}}))
    page = _report(run_dir).read_text()
    assert "<th>swa</th><td>12</td><td>6</td><td>75.00%</td><td>20</td><td>2.5</td>" in page
    assert "<th>&lt;b&gt;</th><td></td><td>2</td><td>25.00%</td><td>40</td><td></td>" in page
    (of_datasets,) = re.findall(r"<h3>Training: loss over hard negatives</h3>.*?</svg>", page, re.S)
    assert "facts" in of_datasets
    assert "language" not in of_datasets
    (curves,) = re.findall(r"hard negatives, by language</h3>.*?</svg>", page, re.S)
    assert "swa" in curves


def test_a_whole_token_table_is_counted_whole():
    resolved = {"embedding_parameters": 70, "layer_parameters": 5, "ranks": [], "dims": [4]}
    assert run_parameters(resolved, Cut(0, 3, 4)) == 70 + 15 + 4


def _report(run_dir):
    assert main([str(run_dir)]) == 0
    return run_dir / "report.html"


def test_choices_that_another_beats_in_everything_are_left_out():
    def point(parameters, depth, dim, quality):
        return CubePoint(Cut(16, depth, dim), parameters, 4 * dim, quality)

    points = [
        point(10, 2, 8, 0.5),
        point(20, 2, 8, 0.5),
        point(20, 4, 8, 0.7),
        point(20, 4, 16, 0.6),
    ]
    points.append(point(5, 1, 8, 0.1))
    assert best_choices(points) == [points[2], points[0], points[4]]
    assert best_choices([points[0]] * 2) == [points[0]] * 2


def test_running_runs_and_odd_values(tmp_path):
    """A line that is being written, and one lone point; before the resolved numbers are there."""
    lines = [{"split": "train", "step": 1, "loss": 2.0, "tokens": 5, "grad_norm": 0.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"split": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    page = _report(tmp_path).read_text()
    assert "<circle" in page
    assert "nan" not in Balanced(page).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "give a run folder"),
        ("", "no lines yet"),
        ('{"split": "train"}\n', "line 1 is damaged"),
    ],
)
def test_folders_without_a_run(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_line_is_named_and_the_others_are_shown(tmp_path, capsys):
    line = {"split": "train", "step": 1, "loss": 2.0, "tokens": 5}
    lines = [json.dumps(line | {"step": step}).encode() for step in (1, 2, 3)]
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "metrics.jsonl").write_bytes(b"\n".join([lines[0], lines[2], b""]))
    for damaged in (b"{" + lines[1], lines[1].replace(b"loss", b"lo\xffs"), b"[]", b"[" * 9000):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damaged, lines[2], b""]))
        assert main([str(tmp_path)]) == 0
        assert "metrics.jsonl, line 2 is damaged and left out" in capsys.readouterr().err
        shown = (tmp_path / "report.html").read_text().replace(tmp_path.name, "whole")
        assert shown == _report(whole).read_text()
    (tmp_path / "resume/step_3").mkdir(parents=True)
    (tmp_path / "resume/step_3/state.json").write_text('{"metrics_bytes":')
    assert main([str(tmp_path)]) == 0, "a torn state is no reason to show nothing"
    assert "state.json cannot be read" in capsys.readouterr().err


def test_damaged_evaluations_are_named(run_dir, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text('{"model": {"rows": []}}')
    assert main([str(run_dir), "--evaluation", str(tmp_path)]) == 2
    assert "evaluation.json" in capsys.readouterr().err


def test_ticks_and_numbers():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(3, 3) == [3]
    assert log_ticks(1, 100) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    texts = {0: "0", 0.1234567: "0.1235", 1234: "1234", 45_000: "45k", 1.2e6: "1.2M", 3e9: "3B"}
    assert {value: number_text(value, short=True) for value in texts} == texts
    assert [number_text(value) for value in (1_234_567, 0.1234567, 1e-5)] == [
        "1,234,567",
        "0.1235",
        "1e-05",
    ]
    assert number_text(0.5, 3) == "0.500"
    assert Scale(1, 100, 0, 10, logarithmic=True)(10) == pytest.approx(5)


def test_long_lines_are_averaged():
    points = [(i, i % 2) for i in range(10 * MOST_POINTS)]
    thin = thinned(points)
    assert len(thin) == MOST_POINTS
    assert all(y == pytest.approx(0.5) for _, y in thin)
    assert line_chart({"a": []}, "x", "y") == scatter_chart({}, "x", "y") == ""
    assert "nan" not in line_chart({"a": [(1, float("nan")), (2, 3.0)]}, "x", "y")
