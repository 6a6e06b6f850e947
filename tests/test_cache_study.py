"""extras/cache_study.py: its measure of calibration, what each arm learns from, the page's table."""
import shlex
from argparse import Namespace
from functools import partial

import pytest
import torch

import distill
from extras import cache_study
from extras.atlas import BASE
from extras.cache_study import (
    STUDY,
    calibration_error,
    draws,
    likeliest,
    likeliest_as_they_are,
    losses_from,
    rest_loss,
)
from model import GPT2
from support.chunked_loss import ChunkedLoss
from support.scoring import validate
from support.teacher_cache import Draws, draws_loss


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
V = 40


def loss_inputs():
    """Hidden states and heads of student and teacher, and targets, of which two do not count."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((10, 8), (V, 8), (10, 6), (V, 6))]
    targets = torch.randint(V, (10,), generator=generator)
    targets[3:5] = -100
    return *tensors, targets


def value_and_gradient(losses_of, inputs):
    inputs[0].requires_grad_()
    losses = losses_of(*inputs, distill.LossSettings())
    return torch.stack(losses), *torch.autograd.grad(losses.loss, inputs[0])


def test_an_arm_that_keeps_everything_is_the_whole_answer():
    """The 40 likeliest of 40 tokens; so many draws that their shares are the probabilities."""
    inputs = loss_inputs()
    whole = value_and_gradient(distill.losses_of, inputs)
    everything = [(partial(likeliest, n=V), draws_loss), (partial(likeliest_as_they_are, n=V), rest_loss),
                  (partial(draws, n=200_000), draws_loss)]
    for keep, loss_function in everything:
        found = value_and_gradient(losses_from(keep, loss_function), inputs)
        for some, exact in zip(found, whole, strict=True):
            assert torch.allclose(some, exact, rtol=1e-3, atol=1e-3), (keep, some, exact)


def test_what_is_kept():
    p = torch.tensor([[0.4, 0.1, 0.2, 0.3]])
    ids, weights = likeliest(p, n=2)
    assert ids.tolist() == [[0, 3]] and torch.allclose(weights, torch.tensor([[4 / 7, 3 / 7]]))
    _, weights = likeliest_as_they_are(p, n=2)
    assert torch.allclose(weights, torch.tensor([[0.4, 0.3]]))

    # Other draws each time, each with the same weight; seeded, the same again.
    several = p.expand(50, 4)
    torch.manual_seed(0)
    first, second = draws(several, 3), draws(several, 3)
    torch.manual_seed(0)
    assert draws(several, 3)[0].equal(first[0]) and not first[0].equal(second[0])
    assert first[1].unique().tolist() == pytest.approx([1 / 3])


def test_the_rest_is_one_more_token():
    """rest_loss by hand: the KL after tokens 1 and 2 of 4 became one; and only the student's logits learn."""
    p, q = torch.tensor([0.4, 0.1, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    settings = distill.LossSettings(temperature=1.0, kd_weight=1.0, clm_weight=0.0)
    kept = Draws(*likeliest_as_they_are(p[None], n=2), torch.zeros(1), torch.zeros(1))
    loss, kl, _ = rest_loss(q.log()[None], kept, torch.tensor([0]), settings)
    joined = torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0.1, 0.4, 0.5])
    assert loss.item() == kl.item() == pytest.approx((joined[0] * (joined[0] / joined[1]).log()).sum().item())


def test_arms_differ_in_temperature_rate_and_seed_alone():
    first = vars(distill.parse_args(shlex.split(f"{BASE} {cache_study.FIRST_DEMO}")))
    for name, command in STUDY.plan.items():
        args = vars(distill.parse_args(shlex.split(command)))
        changed = {flag for flag, value in args.items() if value != first[flag]}
        if name.startswith("noise"):
            assert args["clm_weight"] == 0 and args["precision"] == "fp32", name
        else:
            assert changed <= {"seed", "temperature", "lr", "objective"}, name
        assert f"T {args['temperature']:g}," in name and name.split(", ")[1] in cache_study.ARMS


def test_each_arm_learns_from_what_it_says(workshop, monkeypatch, tmp_path):
    """All arms of a seed, made small: of what kind was what each student learned from?"""
    monkeypatch.chdir(tmp_path)
    small = (f"--teacher {workshop / 'teacher'} --data {workshop / 'text'} --data-folder "
             f"{workshop / 'corpora'} --seq-len 16 --eval-tokens 100 --student-layers 2 --steps 1 "
             "--grad-accum 1")
    learned_from = []
    honest = ChunkedLoss.apply

    def spy(loss_function, student_hidden, student_head, teacher_hidden, teacher_head, *rest):
        kept = teacher_hidden.ids.shape[1] if teacher_head is None else "all"
        learned_from.append((loss_function.__name__, kept))
        return honest(loss_function, student_hidden, student_head, teacher_hidden, teacher_head, *rest)

    monkeypatch.setattr(ChunkedLoss, "apply", spy)
    names = [f"T 2, {arm}, seed 0" for arm in cache_study.ARMS]
    rows = [cache_study.one_run(name, f"{STUDY.plan[name]} {small}") for name in names]
    assert learned_from == [("plain_loss", "all"), ("draws_loss", 50), ("draws_loss", 12), ("draws_loss", 12),
                            ("rest_loss", 12)]
    assert len({row["loss"] for row in rows}) == 5 and len({row["teacher"]["loss"] for row in rows}) == 1

    noise = {arm: cache_study.one_run(f"noise: T 2, {arm}", f"{STUDY.plan[f'noise: T 2, {arm}']} {small}")
             for arm in ("50 draws", "12 draws")}
    assert 0 < noise["50 draws"]["head"] < noise["12 draws"]["head"], "fewer draws, more noise"


def test_the_page_has_the_tables_of_the_results():
    page = STUDY.file(".md").read_text(encoding="utf-8")
    rows = STUDY.rows()
    assert STUDY.filled(page, rows) == page, "python -m extras.cache_study --page"
    for name, row in rows.items():
        if name in STUDY.plan:  # some rows are older than --temperature 2 in the plan, which is the default
            then, now = (distill.parse_args(shlex.split(flags)) for flags in (row["flags"], STUDY.plan[name]))
            assert then == now, name
        assert not row["commit"].endswith(("+", "?")), name


def test_the_table_has_means_over_the_seeds():
    figures = {"same_top_1": 0.5, "confidence": 0.4, "right": 0.3, "ece_text": 0.1, "ece_teacher": 0.05}
    rows = {f"T 2, live teacher, seed {seed}": {
        "seed": seed, "loss": 3.0 + seed / 10, "kl": 0.25, "teacher": figures | {"loss": 2.5, "kl": 0.0},
        **figures} for seed in range(3)}
    live, itself = ([*line.values()] for line in cache_study.arms_table(rows))
    assert live == ["T 2, live teacher", "3.1000 (3.0000 to 3.2000)", "0.2500 (0.2500 to 0.2500)", "0.500",
                    "0.400", "0.300", "0.100", "0.050"]
    assert itself[:3] == ["the teacher itself", "2.5000", "0.0000"] and itself[-1] == "0.050"
