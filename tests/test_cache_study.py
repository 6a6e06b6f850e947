"""extras/cache_study.py: its measure of calibration, what each arm learns from, the page's table."""
import shlex
from argparse import Namespace

import pytest
import torch

import distill
from extras import cache_study
from extras.atlas import BASE, FIRST_DEMO
from extras.cache_study import STUDY, calibration_error, likeliest_losses
from model import GPT2
from support.chunked_loss import ChunkedLoss
from support.scoring import validate


# ------------------------------------------------------------------------------------ calibration
def test_calibration_error():
    """Worked out by hand: right as often as it says; too sure, and both ways; bins of equal width."""
    right = torch.tensor([1.0] * 3 + [0.0] * 7 + [1.0] * 4 + [0.0])
    assert calibration_error(torch.tensor([0.3] * 10 + [0.8] * 5), right) == pytest.approx(0, abs=1e-6)

    # It says 0.9 and is right half of the time, in a third of the tokens; it says 0.5 and never is, in the
    # others. Errors of one sign or two, they add up.
    confidence = torch.tensor([0.9] * 2 + [0.5] * 4)
    assert calibration_error(confidence, torch.tensor([1.0] + [0.0] * 5)) == pytest.approx(1.4 / 3)
    assert calibration_error(confidence, torch.tensor([1.0] * 2 + [0.0] * 4)) == pytest.approx(1.1 / 3)

    # At 0.1 and 0.9 errors of two signs stay apart in 15 bins, and cancel in one. 0 and 1 have bins.
    pair, half = torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5])
    assert calibration_error(pair, half) == pytest.approx(0.4)
    assert calibration_error(pair, half, n_bins=1) == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0

    # 1/15 is in the first bin, and what is above it in the second.
    edges = torch.tensor([1 / 15, 1 / 15 + 1e-3], dtype=torch.float64)
    assert calibration_error(edges, edges + torch.tensor([0.2, -0.2])) == pytest.approx(0.2)


def test_figures_are_those_of_the_closing_table():
    """Loss, KL and same top-1 as support/scoring.py has them; the confidence worked out here."""
    torch.manual_seed(0)
    teacher, student = (GPT2(GPT2.config(vocab_size=50, context=16, width=16, n_head=2, n_layer=n)).eval()
                        for n in (2, 1))
    for parameter in (*teacher.parameters(), *student.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    val = torch.randint(50, (200,)).numpy()
    corpus = Namespace(val=val, meta={"val": {"bytes": 400, "tokens": 200}})
    args = Namespace(eval_tokens=160, seq_len=16, batch_size=2, precision="fp32")

    found = cache_study.figures(args, teacher, student, corpus, Namespace(vocab_size=50))
    bar, row = validate([teacher, student], corpus, 50, args, torch.no_grad())
    assert found["loss"] == pytest.approx(row["loss"])
    assert found["teacher"]["loss"] == pytest.approx(bar["loss"])
    assert found["kl"] == pytest.approx(row["KL to teacher"])
    assert found["same_top_1"] == pytest.approx(row["same top-1"])

    with torch.no_grad():
        ids = torch.from_numpy(val[:160]).view(10, 16)
        p, q = (network(ids).softmax(-1).flatten(0, 1) for network in (teacher, student))
    confidence, top = q.max(-1)
    assert found["confidence"] == pytest.approx(confidence.mean().item())
    assert found["right"] == pytest.approx((top == torch.from_numpy(val[1:161])).float().mean().item())
    assert found["teachers"] == pytest.approx(p.gather(1, top[:, None]).mean().item())
    assert 0 < found["ece_text"] != found["ece_teacher"] > 0 == found["teacher"]["ece_teacher"]


# ------------------------------------------------------------------------------------ arms
def loss_inputs(V=40):
    """Hidden states and heads of student and teacher, and targets, of which two do not count."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((10, 8), (V, 8), (10, 6), (V, 6))]
    targets = torch.randint(V, (10,), generator=generator)
    targets[3:5] = -100
    return *tensors, targets


def test_the_likeliest_tokens_have_weights_that_sum_to_1(monkeypatch):
    inputs = loss_inputs()
    seen = []
    monkeypatch.setattr(cache_study, "chunked_loss", lambda *arguments: seen.append(arguments))
    likeliest_losses(*inputs, distill.LossSettings(temperature=2.0))
    (_, _, _, answers, teacher_head, _, _), = seen
    assert teacher_head is None, "the teacher's whole distribution is out of reach"
    assert answers.weights.shape == answers.ids.shape == (8, cache_study.LIKELIEST)
    assert torch.allclose(answers.weights.sum(-1), torch.ones(8))

    # They are the likeliest, in the proportions that they had at this temperature.
    *_, teacher_hidden, teacher_head, targets = inputs
    p = (teacher_hidden[targets != -100] @ teacher_head.T / 2).softmax(-1)
    kept = p.gather(1, answers.ids)
    assert kept.min(-1).values.equal(p.sort(-1, descending=True).values[:, cache_study.LIKELIEST - 1])
    assert torch.allclose(answers.weights[:, 0] / answers.weights[:, 5], kept[:, 0] / kept[:, 5])


def test_all_tokens_as_the_likeliest_are_the_whole_distribution(monkeypatch):
    monkeypatch.setattr(cache_study, "LIKELIEST", 40)
    inputs = loss_inputs()
    inputs[0].requires_grad_()
    found = []
    for losses_of in (likeliest_losses, distill.losses_of):
        losses = losses_of(*inputs, distill.LossSettings())
        found.append((torch.stack(losses), *torch.autograd.grad(losses.loss, inputs[0])))
    for likeliest, whole in zip(*found, strict=True):
        assert torch.allclose(likeliest, whole, atol=1e-5)


def test_arms_differ_in_their_cache_alone():
    first = vars(distill.parse_args(shlex.split(f"{BASE} {FIRST_DEMO}")))
    caches = set()
    for name, command in STUDY.plan.items():
        args = vars(distill.parse_args(shlex.split(command)))
        arm, _, seed = name.partition(", seed ")
        assert args["seed"] == int(seed)
        changed = {flag for flag, value in args.items() if value != first[flag]}
        assert changed <= {"seed", "teacher_cache", "cache_draws", "objective"}
        caches.add((arm, args["teacher_cache"], args["cache_draws"]))
    assert len(STUDY.plan) == 15 and caches == {
        ("live teacher", None, None), ("likeliest 12", None, None), ("4 draws", "caches/4", 4),
        ("12 draws", "caches/12", 12), ("50 draws", "caches/50", 50)}


def test_each_arm_learns_from_what_it_says(workshop, monkeypatch, tmp_path):
    """All arms of a seed, made small: of what kind was what each student learned from?"""
    monkeypatch.chdir(tmp_path)
    small = (f"--teacher {workshop / 'teacher'} --data {workshop / 'text'} --data-folder "
             f"{workshop / 'corpora'} --seq-len 16 --eval-tokens 100 --student-layers 2 --steps 1 "
             "--grad-accum 1")
    learned_from = []
    honest = ChunkedLoss.apply

    def spy(loss_function, student_hidden, student_head, teacher_hidden, teacher_head, *rest):
        learned_from.append(teacher_hidden.ids.shape[1] if teacher_head is None else "teacher")
        return honest(loss_function, student_hidden, student_head, teacher_hidden, teacher_head, *rest)

    monkeypatch.setattr(ChunkedLoss, "apply", spy)
    rows = [cache_study.one_run(f"{arm}, seed 0", f"{STUDY.plan[f'{arm}, seed 0']} {small}")
            for arm in cache_study.ARMS]
    assert learned_from == ["teacher", 50, 12, 4, 12]
    assert len({row["loss"] for row in rows}) == 5 and len({row["teacher"]["loss"] for row in rows}) == 1


def test_the_page_has_the_table_of_the_results():
    page = STUDY.file(".md").read_text(encoding="utf-8")
    rows = STUDY.rows()
    assert STUDY.filled(page, rows) == page, "python -m extras.cache_study --page"
    for name, row in rows.items():
        assert row["flags"] == STUDY.plan[name], name
        assert not row["commit"].endswith(("+", "?")), name


def test_the_table_has_means_over_the_seeds():
    figures = {"same_top_1": 0.5, "confidence": 0.4, "right": 0.3, "ece_text": 0.1, "ece_teacher": 0.05}
    rows = {f"live teacher, seed {seed}": {
        "seed": seed, "loss": 3.0 + seed / 10, "kl": 0.25, "teacher": figures | {"loss": 2.5}, **figures}
        for seed in range(3)}
    live, itself = ([*line.values()] for line in cache_study.arms_table(rows))
    assert live == ["live teacher", "3.1000 (3.0000 to 3.2000)", "0.2500 (0.2500 to 0.2500)", "0.500",
                    "0.400", "0.300", "0.100", "0.050"]
    assert itself[:3] == ["the teacher itself", "2.5000", "0"] and itself[-1] == "0.050"
