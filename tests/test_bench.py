"""extras/bench.py measures what it says: the same step by all peers, exact where it claims to be."""
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from extras import bench
from support.cli import InputError, run_cli

ROOT = Path(__file__).parent.parent
SMALL = ["--shape", "tiny", "--seq-len", "64", "--precision", "fp32", "--steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    model_class, teacher, student = bench.SHAPES["tiny"]
    for role, config in (("teacher", teacher), ("student", student)):
        torch.manual_seed(len(role))
        model_class(config).save(folder / role)
    return folder


def settings(**changes):
    return Namespace(**{**vars(bench.parse_args(SMALL)), **changes})


def cells(printed):
    """The rows of all printed tables that begin with "ours"."""
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in printed.splitlines() if line.startswith("| ours")]


def test_all_peers_compute_the_loss_and_gradient_of_float64(folder):
    for peer in ("ours", "hf", "script"):
        loss, gradient = bench.exactness(folder, peer, settings())
        assert loss < 1e-5 and 0 < gradient < 2e-6, peer
    loss, gradient = bench.exactness(folder, "ours", settings(precision="bf16"))
    assert loss > 1e-5 and gradient > 1e-4  # so the measure can tell


def test_all_peers_make_the_same_step(folder, monkeypatch):
    """Ours divides gradients after backward, the others a mean before: AdamW gets the same from both."""
    lengths = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *args: lengths.append(clip(*args).item()) or torch.tensor(lengths[-1]))
    ours, hf = (bench.step(folder, peer, settings()) for peer in ("ours", "hf"))
    assert len(lengths) == 4 and lengths[:2] == pytest.approx(lengths[2:], rel=1e-5)
    assert ours["loss"] == pytest.approx(hf["loss"], rel=1e-6)
    assert len(ours["seconds"]) == 1 and ours["peak"] > 1e7

    # The peer without a teacher: its draws are random tokens, which count unless they are turned off.
    with_draws = bench.step(folder, "ours-cache", settings())["loss"]
    monkeypatch.setattr(bench, "KD", 0.0)
    without = bench.step(folder, "ours-cache", settings())["loss"]
    assert without == pytest.approx(bench.step(folder, "hf", settings())["loss"], rel=1e-6)
    assert with_draws > 2 * without


def test_shapes_are_those_of_the_published_models():
    found = {}
    for shape, (model_class, *configs) in bench.SHAPES.items():
        with torch.device("meta"):
            found[shape] = [model_class(config).num_parameters() for config in configs]
    del found["tiny"]
    assert found == {"gpt2": [124_439_808, 81_912_576], "gpt2-medium": [354_823_168, 203_668_480],
                     "pythia": [162_322_944, 70_426_624], "pythia-410m": [405_334_016, 162_322_944]}


def test_peers_take_turns_and_the_load_is_noted_before_each(folder, monkeypatch, capsys):
    order = []
    loads = iter([0.1, 0.2, 99, 0.4, 0, 0])

    def in_new_process(folder, contender, args):
        order.append(contender)
        return {"seconds": [len(order)] * 3, "loss": 1.0, "peak": 1e9}

    monkeypatch.setattr(bench, "in_new_process", in_new_process)
    monkeypatch.setattr(bench, "exactness",
                        lambda folder, peer, args: order.append(f"exact {peer}") or (0, 0))
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0, 0))
    bench.print_tables(folder, ["ours", "ours-cache"], settings(rounds=2))
    assert order == ["ours", "ours-cache"] * 2 + ["exact ours"]
    out = capsys.readouterr().out
    assert re.findall(r"s a step, load before (\S+)", out) == ["0.10", "0.20", "99.00", "0.40"]
    assert "busy with something else" in out

    # ours took 1 and 3 seconds, ours-cache 2 and 4: medians, ranges, and the ratios within rounds.
    ours, cache = cells(out)[:2]
    assert ours[1:5] == ["2", "1 to 3", "1.00x", "1.00"]
    assert cache[1:5] == ["3", "2 to 4", "1.67x", "1.33 to 2.00"] and cache[7] == "-", "it has no loss"
    tuned = bench.find_contenders(settings(peers="ours", tuned=True))
    bench.print_tables(folder, tuned, settings(rounds=1, exact=False))
    assert order[5:] == ["ours", "ours, tuned"]


def test_the_tables_from_any_folder(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "extras.bench", *SMALL, "--rounds", "1", "--peers", "ours"],
                          cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    ours, exact = cells(done.stdout)
    assert ours[0] == "ours" and float(ours[1]) > 0 and ours[3] == "1.00x" and float(ours[6]) > 0.05
    assert exact[0] == "ours" and float(exact[1]) < 1e-5 and float(exact[2]) < 2e-6


def test_what_fails_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--peers", "ours,theirs"])
    with pytest.raises(SystemExit) as end:
        run_cli(bench.main)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and "--peers theirs: choose from ours" in error and error.count("\n") == 1
    assert out == "", "refused before anything is measured"
    with pytest.raises(InputError, match="step of ours failed: .*1024 positions"):
        bench.in_new_process(folder, "ours", settings(seq_len=2000))
