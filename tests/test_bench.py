"""bench.py measures what it says: the same step by all peers, exact where it claims to be."""
import re
from argparse import Namespace

import pytest
import torch

import bench
import model as models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    for role, config in zip(("teacher", "student"), bench.SHAPES["tiny"], strict=True):
        torch.manual_seed(len(role))
        models.GPT2(config).save(folder / role)
    return folder


def settings(peer="ours", **changes):
    defaults = vars(bench.parse_args(["--shape", "tiny", "--seq-len", "64", "--precision", "fp32",
                                      "--steps", "1", "--device", "cpu"]))
    return Namespace(**{**defaults, "peer": peer, **changes})


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


def test_decoding_compares_the_same_text(folder):
    for of in bench.decode(folder, settings(), tokens=8).values():
        assert of["same"] == 1 and of["ours"] > 0 and of["hf"] > 0


def test_flops_of_a_step(monkeypatch):
    """A teacher's and a student's layer of GPT-2, counted by hand."""
    config = models.GPT2.config(vocab_size=10, width=4, n_head=2, n_layer=1)
    monkeypatch.setitem(bench.SHAPES, "tiny", [config, config])
    layer, attention, head = 12 * 4 * 4, 2 * 4 * 64 / 2, 4 * 10
    assert bench.step_flops(settings(batch_size=3)) == 3 * 64 * (layer + attention + head) * (2 + 6)


def test_the_table(run):
    done = run("bench.py", "--shape", "tiny", "--seq-len", "32", "--rounds", "1", "--steps", "1", "--peers",
               "ours", "--only", "step", "--precision", "fp32", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (seconds, loss, exact), = re.findall(r"^\| ours +\| +([\d.]+) .* 1\.00x .*% \| ([\d.]+) \| ([\d.]+) \|",
                                         done.stdout, re.M)
    assert float(seconds) >= 0 and float(loss) == pytest.approx(float(exact), abs=2e-6)


def test_bad_peers_are_one_line(run):
    done = run("bench.py", "--peers", "ours,theirs")
    assert done.returncode == 2 and "--peers theirs" in done.stderr and "Traceback" not in done.stderr


def test_a_process_that_fails_is_one_line(folder):
    with pytest.raises(bench.InputError, match="step ours failed: .*1024 positions"):
        bench.child(folder, settings(seq_len=2000), "step", "ours")
