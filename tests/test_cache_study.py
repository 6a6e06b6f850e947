"""extras/cache_study.py: its measure of calibration, what each arm learns from, the page's table."""
import json
import shlex
import sys
from argparse import Namespace

import pytest
import torch
from conftest import REPO

import distill
from extras import cache_study
from extras.atlas import BASE, FIRST_DEMO
from extras.results import read_rows
from model import GPT2
from support import options
from support.chunked_loss import ChunkedLoss, LossSettings, chunked_losses
from support.cli import InputError
from support.scoring import validate

ROW = {"seed": 0, "loss": 3.0, "kl": 0.25, "same_top_1": 0.5, "confidence": 0.4, "right": 0.3,
       "teachers": 0.35, "ece_text": 0.1, "ece_teacher": 0.05}


# ------------------------------------------------------------------------------------ calibration
def test_a_model_that_is_as_often_right_as_it_says_has_no_error():
    """Ten tokens at 0.3, of which three are right; five at 0.8, of which four are."""
    confidence = torch.tensor([0.3] * 10 + [0.8] * 5)
    right = torch.tensor([1.0] * 3 + [0.0] * 7 + [1.0] * 4 + [0.0])
    assert cache_study.calibration_error(confidence, right) == pytest.approx(0, abs=1e-6)


def test_the_error_of_a_model_that_is_too_sure_of_itself():
    """It says 0.9 and is right half of the time, in a third of the tokens; it says 0.5 and never is, in the
    others. Errors of one sign or two, they add up."""
    confidence = torch.tensor([0.9] * 2 + [0.5] * 4)
    right = torch.tensor([1.0, 0.0] + [0.0] * 4)
    assert cache_study.calibration_error(confidence, right) == pytest.approx(0.4 / 3 + 0.5 * 2 / 3)
    too_modest = torch.tensor([1.0, 1.0] + [0.0] * 4)
    assert cache_study.calibration_error(confidence, too_modest) == pytest.approx(0.1 / 3 + 0.5 * 2 / 3)


def test_bins_are_of_equal_width():
    """At 0.1 and 0.9 errors of two signs stay apart in 15 bins, and cancel in one. 0 and 1 have bins."""
    confidence = torch.tensor([0.1, 0.9])
    reference = torch.tensor([0.5, 0.5])
    assert cache_study.calibration_error(confidence, reference) == pytest.approx(0.4)
    assert cache_study.calibration_error(confidence, reference, n_bins=1) == pytest.approx(0, abs=1e-6)
    assert cache_study.calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0

    # 1/15 is in the first bin, and what is above it in the second.
    edges = torch.tensor([1 / 15, 1 / 15 + 1e-3], dtype=torch.float64)
    assert cache_study.calibration_error(edges, edges + torch.tensor([0.2, -0.2])) == pytest.approx(0.2)


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

    found = cache_study.figures(teacher, student, corpus, 50, args)
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
    """Hidden states and heads of student and teacher, and targets, of which two are not counted."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((10, 8), (V, 8), (10, 6), (V, 6))]
    targets = torch.randint(V, (10,), generator=generator)
    targets[3:5] = -100
    return *tensors, targets


def test_the_likeliest_tokens_have_weights_that_sum_to_1(monkeypatch):
    seen = []

    def spy(student_hidden, student_head, answers, teacher_head, targets, settings):
        seen.append((answers, teacher_head))

    monkeypatch.setattr(cache_study, "chunked_losses", spy)
    inputs = loss_inputs()
    cache_study.likeliest_losses(*inputs, LossSettings(temperature=2.0))
    (answers, teacher_head), = seen
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
    settings = LossSettings(temperature=2.0, kd_weight=0.9, clm_weight=0.1)
    found = []
    for losses_of in (cache_study.likeliest_losses, chunked_losses):
        losses = losses_of(*inputs, settings)
        found.append((torch.stack(losses), *torch.autograd.grad(losses.loss, inputs[0])))
    for likeliest, whole in zip(*found, strict=True):
        assert torch.allclose(likeliest, whole, atol=1e-5)


def test_plan():
    """Five arms, three seeds, a seed at a time; all with the first recipe of the atlas."""
    plan = cache_study.plan()
    assert len(plan) == 15 and [*plan][:2] == ["live teacher, seed 0", "50 draws, seed 0"]
    first = vars(distill.parse_args(shlex.split(f"{BASE} {FIRST_DEMO}")))
    caches = set()
    for name, (arm, seed) in plan.items():
        args = distill.parse_args(shlex.split(cache_study.flags_of(arm, seed, "my caches")))
        options.check(args)
        assert args.seed == seed and name.endswith(f", seed {seed}")
        changed = {flag for flag, value in vars(args).items() if value != first[flag]}
        assert changed <= {"seed", "teacher_cache", "cache_draws"}
        caches.add((name.partition(",")[0], args.teacher_cache, args.cache_draws))
    assert caches == {
        ("live teacher", None, None), ("likeliest 12", None, None), ("4 draws", "my caches/4", 4),
        ("12 draws", "my caches/12", 12), ("50 draws", "my caches/50", 50)}


# ------------------------------------------------------------------------------------ runs
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All arms of seed 0, made small: their rows, and of what kind was what each student learned from."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("study")
        text = folder / "text.txt"
        text.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}  # adds {i}" for i in range(100)))
        patch.chdir(folder)
        small = {"data": str(text), "seq_len": 32, "eval_tokens": 100,
                 "teacher": str(REPO / "demo" / "teacher")}
        patch.setitem(options.RECIPES, "demo", options.RECIPES["demo"] | small)
        patch.setattr(cache_study, "FIRST_DEMO", f"{FIRST_DEMO} --steps 2")
        patch.setattr(cache_study, "RESULTS", folder / "rows.jsonl")
        patch.setattr(sys, "argv", ["cache_study", "--only", "seed 0", "--caches", "my caches"])

        learned_from = []
        honest = ChunkedLoss.apply

        def spy(student_hidden, student_head, teacher_hidden, teacher_head, *rest):
            n_ids = teacher_hidden.ids.shape[1] if teacher_head is None else 0
            learned_from.append(n_ids)
            return honest(student_hidden, student_head, teacher_hidden, teacher_head, *rest)

        patch.setattr(ChunkedLoss, "apply", spy)
        cache_study.main()
        made = len(learned_from)
        cache_study.main()  # all is there
        assert len(learned_from) == made
        return read_rows(cache_study.RESULTS), learned_from


def test_each_arm_learns_from_what_it_says(runs):
    rows, learned_from = runs
    assert [*rows] == [f"{arm}, seed 0" for arm in cache_study.ARMS]
    assert learned_from == [0, 0, 50, 50, 12, 12, 4, 4, 12, 12]
    assert len({row["loss"] for row in rows.values()}) == 5
    assert len({row["teacher"]["loss"] for row in rows.values()}) == 1
    assert distill.LOSSES["chunked"] is chunked_losses, "as it was"


def test_table():
    """Means over the seeds, with the range of the losses; the teacher's figures are the same in all rows."""
    teacher = ROW | {"loss": 2.5, "kl": 0.0}
    rows = {f"live teacher, seed {seed}": ROW | {"seed": seed, "loss": 3 + seed / 10, "ece_text": 0.1 * seed,
                                                 "teacher": teacher} for seed in range(3)}
    live, itself = [[cell.strip() for cell in line.strip("|").split("|")]
                    for line in cache_study.table(rows).splitlines()[2:]]
    assert live == ["live teacher", "3.1000 (3.0000 to 3.2000)", "0.2500 (0.2500 to 0.2500)", "0.500",
                    "0.400", "0.300", "0.100", "0.050"]
    assert itself[:3] == ["the teacher itself", "2.5000", "0"] and itself[-1] == "0.050"


def test_the_page_has_the_table_of_the_results():
    done = read_rows(cache_study.RESULTS)
    page = cache_study.PAGE.read_text(encoding="utf-8")
    assert cache_study.fill(page, done) == page, "python -m extras.cache_study --table"
    assert done.keys() <= cache_study.plan().keys()
    for name, row in done.items():
        assert row["flags"] == cache_study.flags_of(*cache_study.plan()[name], "caches"), name
        assert not row["commit"].endswith(("+", "?")), name


def test_the_table_is_put_between_its_marks(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Ü\n<!-- table -->\nold\n<!-- end -->\nrest\n", encoding="utf-8")
    row = ROW | {"name": "4 draws, seed 0", "teacher": ROW}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(cache_study, "RESULTS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(cache_study, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["cache_study", "--table"])
    cache_study.main()
    table = cache_study.table({row["name"]: row})
    assert page.read_text(encoding="utf-8") == f"# Ü\n<!-- table -->\n{table}\n<!-- end -->\nrest\n"

    page.write_text("no marks\n")
    with pytest.raises(InputError, match="page.md has no place for the table"):
        cache_study.main()
    assert page.read_text() == "no marks\n"


@pytest.mark.parametrize("argv, message", [
    (["--only", "13 draws"], "--only 13 draws: no run of the plan"), (["--table"], "has no runs yet")])
def test_bad_flags_are_one_line(monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(cache_study, "RESULTS", tmp_path / "none.jsonl")
    monkeypatch.setattr(sys, "argv", ["cache_study", *argv])
    with pytest.raises(InputError, match=message):
        cache_study.main()
