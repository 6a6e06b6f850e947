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
from model import GPT2
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


def settings(peer="ours", **changes):
    return Namespace(**{**vars(bench.parse_args(SMALL)), "peer": peer, **changes})


def command(folder, *argv):
    """python -m extras.bench, from a folder that is not the repository."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "extras.bench", *map(str, argv)], cwd=folder, env=env,
                          text=True, capture_output=True, timeout=300)


# ------------------------------------------------------------------------------------ exactness
@pytest.mark.parametrize("peer", ["ours", "hf", "script"])
def test_all_peers_compute_the_loss_of_float64(folder, peer):
    exact = bench.reference(folder, settings())
    measured = bench.step(folder, settings(peer))
    assert measured["loss"] == pytest.approx(exact["script" if peer == "script" else "loss"], rel=1e-6)
    assert len(measured["seconds"]) == 1 and measured["peak"] > 1e7


@pytest.mark.parametrize("peer", ["ours", "hf"])
def test_gradients_are_those_of_float64(folder, peer):
    bench.reference(folder, settings())
    assert 0 < bench.gradient(folder, settings(peer)) < 2e-6
    assert bench.gradient(folder, settings(peer, precision="bf16")) > 1e-4  # so the measure can tell


def test_all_peers_make_the_same_step(folder, monkeypatch):
    """Ours divides gradients after backward, the others a mean before: what is left to AdamW is one thing."""
    lengths = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *args: lengths.append(clip(*args).item()) or torch.tensor(lengths[-1]))
    for peer in ("ours", "hf"):
        bench.step(folder, settings(peer))
    assert len(lengths) == 4 and lengths[:2] == pytest.approx(lengths[2:], rel=1e-5)


def test_the_peer_without_a_teacher_computes_the_rest_of_the_loss(folder, monkeypatch):
    """The part of the draws, which are any tokens, is turned off here; it counts otherwise."""
    with_draws = bench.step(folder, settings("ours-cache"))["loss"]
    monkeypatch.setattr(bench, "KD", 0.0)
    exact = bench.reference(folder, settings())
    without = bench.step(folder, settings("ours-cache"))["loss"]
    assert without == pytest.approx(exact["loss"], rel=1e-6) and with_draws > 2 * without


# ------------------------------------------------------------------------------------ what is measured
def test_decoding_compares_the_same_text(folder):
    for of in bench.decode(folder, settings(), new_tokens=8).values():
        assert of["same"] == 1 and of["ours"] > 0 and of["hf"] > 0


def test_flops_of_a_step(monkeypatch):
    """A teacher's and a student's layer of GPT-2, counted by hand."""
    config = GPT2.config(vocab_size=10, width=4, n_head=2, n_layer=1)
    monkeypatch.setitem(bench.SHAPES, "tiny", (GPT2, config, config))
    layer, attention, head = 12 * 4 * 4, 2 * 4 * 64 / 2, 4 * 10
    per_weight = 3 * 64 * (layer + attention + head)
    assert bench.step_flops(settings(batch_size=3)) == per_weight * (2 + 6)
    assert bench.step_flops(settings(batch_size=3), with_teacher=False) == per_weight * 6


def test_a_step_from_a_cache(folder, monkeypatch, capsys):
    """It has no teacher's FLOPs, nothing to hold it against, and a line about the making of a cache."""
    found = {"ceiling": {"flops": 1e12}, "step": {"seconds": [2.0], "loss": 7.5, "peak": 5e12},
             "answering": [0.25, 0.5, 0.125]}
    monkeypatch.setattr(bench, "child", lambda folder, args, task, contender=None: found[task])
    bench.print_steps(folder, settings(), [bench.Contender("ours-cache")])
    out = capsys.readouterr().out
    assert "float64" not in out
    assert "1,000 tokens in 0.25 s (range\n0.125 to 0.5), load before" in out

    found |= {"reference": {"loss": 7.5}, "gradient": 0.5}
    bench.print_steps(folder, settings(), [bench.Contender("ours"), bench.Contender("ours-cache")])
    exactness = capsys.readouterr().out.partition("float64")[2]
    assert "| ours " in exactness and "| ours-cache" not in exactness

    monkeypatch.setattr(bench, "step_flops", lambda args, with_teacher=True: 1e12 if with_teacher else 5e11)
    runs = {bench.Contender(peer): [{"seconds": [2.0], "peak": 1, "load": 1}]
            for peer in ("ours", "ours-cache")}
    assert [row["of the ceiling"] for row in bench.cost_rows(runs, settings(), 1e12)] == ["50%", "25%"]


def test_answers_are_timed_by_1000_tokens(folder, monkeypatch):
    """The first time warms up."""
    seconds = iter([9.0, 2.0, 4.0])
    rows = []
    monkeypatch.setattr(bench, "timed", lambda device, answer: (next(seconds), rows.append(answer())))
    assert bench.answering(folder, settings(steps=2, batch_size=4)) == [2000 / 256, 4000 / 256]
    assert [row["ids"].shape for row in rows] == [(256, bench.DRAWS)] * 3


def test_peers_take_turns_and_the_load_is_noted_before_each(folder, monkeypatch, capsys):
    order = []
    loads = iter([0.1, 0.2, 3.3, 0.4])

    def child(folder, args, task, contender):
        order.append(contender.name)
        return {"seconds": [len(order)] * 3, "loss": 1.0, "peak": 1e9}

    monkeypatch.setattr(bench, "child", child)
    monkeypatch.setattr(bench, "machine_load", lambda: next(loads))
    contenders = [bench.Contender("ours"), bench.Contender("hf")]
    runs = bench.measure_steps(folder, settings(rounds=2), contenders)
    assert order == ["ours", "hf", "ours", "hf"]
    assert [run["load"] for run in runs[contenders[0]]] == [0.1, 3.3]
    assert re.findall(r"load before (\S+)", capsys.readouterr().out) == ["0.10", "0.20", "3.30", "0.40"]

    # ours took 1 and 3 seconds, hf 2 and 4: medians, ranges, and the ratios within rounds.
    ours, hf = bench.cost_rows(runs, settings(), top=1e12)
    assert (ours["median, s"], ours["range, s"], ours["load before"]) == ("2", "1 to 3", "0.10 to 3.30")
    assert (hf["median, s"], hf["range, s"], hf["by round"], hf["time"]) \
        == ("3", "2 to 4", "1.33 to 2.00", "1.67x")


@pytest.mark.parametrize("values, shown", [
    ([2.0], "2.00"), ([3.14159, 1], "1.00 to 3.14"), ([1.001, 1.0012], "1.00"), ([9, 10], "9.00 to 10.00"),
    ([None], "-"), ([None, 1], "1.00")])
def test_spread(values, shown):
    assert bench.spread(values) == shown


def test_shapes_are_those_of_the_published_models():
    found = {}
    for shape, (model_class, *configs) in bench.SHAPES.items():
        with torch.device("meta"):
            found[shape] = [model_class(config).num_parameters() for config in configs]
    del found["tiny"]
    assert found == {"gpt2": [124_439_808, 81_912_576], "gpt2-medium": [354_823_168, 203_668_480],
                     "pythia": [162_322_944, 70_426_624], "pythia-410m": [405_334_016, 162_322_944]}


def test_time_alone(monkeypatch, capsys):
    """--no-exact: nothing is computed in float64."""
    found = {"ceiling": {"flops": 1e12}, "step": {"seconds": [2.0], "loss": 7.5, "peak": 5e12}}
    monkeypatch.setattr(bench, "child", lambda folder, args, task, contender=None: found[task])
    bench.print_steps(None, settings(exact=False), [bench.Contender("ours")])
    out = capsys.readouterr().out
    assert "tokens/s" in out and "float64" not in out


# ------------------------------------------------------------------------------------ the command
def test_the_tables_from_any_folder_and_against_another_checkout(tmp_path):
    """The other checkout's bench is one that lies at its top, as it once did; it gets what it needs."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "bench.py").write_text(
        "import json, sys\n"
        "args = json.loads(sys.argv[2])\n"
        "assert sys.argv[1] == '--child' and args['peer'] == 'ours'\n"
        "found = {'step': {'seconds': [1e3], 'loss': 7.5, 'peak': 5e12}, 'gradient': 0.25}\n"
        "print(json.dumps(found[args['task']]))\n")
    flags = ["--rounds", 1, "--peers", "ours", "--only", "step", "--against", "before"]
    done = command(tmp_path, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()
            if line.startswith("| ours")]
    ours, before, ours_loss, before_loss = rows
    assert ours[0] == "ours" and float(ours[1]) > 0 and ours[3] == "1.00x"
    assert before[:3] == ["ours before", "1e+03", "1e+03"] and before[7] == "5000.00"
    assert float(ours_loss[1]) == pytest.approx(float(ours_loss[2]), abs=2e-6) and float(ours_loss[3]) < 2e-6
    assert before_loss == ["ours before", "7.500000", ours_loss[2], "2.5e-01"]


@pytest.mark.parametrize("argv, message", [
    (["--peers", "ours,theirs"], "--peers theirs: choose from ours"),
    (["--against", "nowhere"], "nowhere: there is no checkout of this project"),
    (["--rounds", "0"], "--rounds 0: must be a whole number from 1")])
def test_bad_flags_are_one_line(monkeypatch, capsys, argv, message):
    monkeypatch.setattr(sys, "argv", ["bench", *argv])
    with pytest.raises(SystemExit) as end:
        run_cli(bench.main)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert out == "", "refused before anything is measured"


def test_a_process_that_fails_is_one_line(folder):
    with pytest.raises(InputError, match="step ours failed: .*1024 positions"):
        bench.child(folder, settings(seq_len=2000), "step", bench.Contender("ours"))
