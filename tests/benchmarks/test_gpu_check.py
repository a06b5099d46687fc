"""The GPU check, rehearsed on the CPU: sections run, failures are told, and the deadline holds."""

import json
import os
import re
import subprocess

import pytest
import torch
from helpers import ROOT
from helpers.scripts import load_script

from ml_embed.benchmarks import gpu_check
from ml_embed.benchmarks.gpu_common import (
    SMALL,
    SMALL_MODEL,
    Setting,
    measure_step,
    random_batch,
    share_of_data_sheet,
)
from ml_embed.benchmarks.training_setup import fast_contender
from ml_embed.commands import check_gpu
from ml_embed.errors import UserError

CPU = torch.device("cpu")


def results(folder) -> dict[str, dict]:
    lines = (folder / "check_gpu.jsonl").read_text().splitlines()
    return {entry["section"]: entry["result"] for entry in map(json.loads, lines)}


@pytest.mark.slow
def test_the_whole_check_is_rehearsed(tmp_path):
    """Every step of gpu_check.sh ends well on a CPU, in tiny shapes; takes minutes."""
    here = {"GPU_TESTS_ON": "cpu", "OUT": str(tmp_path), "LIMIT": "3000", "PATIENCE": "10"}
    subprocess.run(["bash", ROOT / "scripts" / "gpu_check.sh"], env=os.environ | here, check=True)
    log = (tmp_path / "log.txt").read_text()
    ended = dict(re.findall(r"^=== (\w+): rc (\d+) at", log, re.MULTILINE))
    assert ended.keys() >= {"correct", "speed", "tests", "run", "nccl_2", "encode", "trainer"}, log
    assert set(ended.values()) == {"0"}, log
    failed = {name: found for name, found in results(tmp_path).items() if "FAILED" in found}
    assert not failed
    assert log.count("largest relative difference of a loss") == 4


def test_sections_run_in_their_order(tmp_path):
    script = load_script("check_gpu")
    names = ["losses", "optimizer", "kernels", "environment"]
    assert (
        script.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--only", *names]) == 0
    )
    found = results(tmp_path)
    assert list(found) == ["environment", "kernels", "optimizer", "losses"]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["kernels"]["ok"]
    assert found["optimizer"]["fused_from_loop"] < 1e-5


def test_a_section_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def broken(setting):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(
        gpu_check, "SECTIONS", {"broken": broken, "whole": lambda setting: {"ok": True}}
    )
    gpu_check.run_sections(Setting(CPU, True, tmp_path), [], deadline=60)
    expected = {"broken": {"FAILED": "RuntimeError: no such kernel"}, "whole": {"ok": True}}
    assert results(tmp_path) == expected
    gpu_check.run_sections(Setting(CPU, True, tmp_path), ["whole"], deadline=-1)
    assert "SKIPPED whole: deadline" in capsys.readouterr().out


def test_a_section_that_is_not_there_is_a_mistake(tmp_path, capsys):
    assert check_gpu.main(["--only", "kernel", "--out", str(tmp_path)]) == 2
    assert "--only: no section 'kernel'; there are" in capsys.readouterr().err


def test_a_benchmark_of_wrong_results_fails(tmp_path, monkeypatch):
    for found in ({"ok": False}, {"FAILED": "no"}):
        monkeypatch.setattr(gpu_check, "SECTIONS", {"kernels": lambda setting, f=found: f})
        with pytest.raises(UserError, match="not right: kernels"):
            gpu_check.report_benchmark(Setting(CPU, True, tmp_path))


def test_a_step_is_measured(tmp_path):
    setting = Setting(CPU, True, tmp_path)
    batch = random_batch(SMALL, SMALL_MODEL)
    contender = fast_contender(batch, SMALL, setting.accelerator(), SMALL_MODEL)
    measured = measure_step(contender, batch.num_tokens, 1, CPU)
    assert measured.tokens_per_second * measured.timing.median == pytest.approx(batch.num_tokens)
    assert share_of_data_sheet(CPU, measured.flops_per_second) is None
    assert measured.peak_mib == 0, "of a GPU"
