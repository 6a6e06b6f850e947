"""extras/questions.py: what each arm learns from, the modules nobody chose anything on, the page."""
import shlex
from argparse import Namespace

import numpy as np
import pytest
import torch

import distill
from extras import questions
from extras.questions import LABELS, STUDY, headline, labels_of
from support.tokenizer import load_tokenizer


def test_students_of_single_tokens_learn_the_ones_that_the_teacher_chose():
    """The loss is the CLM of those tokens; a draw follows the teacher's probabilities; padding stays out."""
    generator = torch.Generator().manual_seed(0)
    student_hidden, student_head, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=generator) for shape in ((6000, 4), (3, 4), (6000, 4), (3, 4)))
    teacher_hidden[:] = teacher_hidden[0]  # one distribution, 6000 times
    p = (teacher_hidden[0] @ teacher_head.T).softmax(-1)
    targets = torch.zeros(6000, dtype=torch.int64)
    targets[5000:] = -100
    log_q = (student_hidden @ student_head.T).log_softmax(-1)[:5000]
    settings = distill.LossSettings(clm_weight=1.0)

    inputs = student_hidden, student_head, teacher_hidden, teacher_head, targets, settings
    found = labels_of(LABELS["argmax"])(*inputs)
    assert found.tokens == 5000
    assert found.loss.item() == pytest.approx(-log_q[:, p.argmax()].sum().item(), rel=1e-5)

    torch.manual_seed(0)
    drawn = labels_of(LABELS["draw"])(*inputs).loss.item()
    assert drawn == pytest.approx(-(p * log_q).sum().item(), rel=0.02)


def test_text_that_the_teacher_wrote(workshop, monkeypatch):
    teacher = str(workshop / "teacher")
    monkeypatch.setattr(questions, "DEMO_TEACHER", teacher)
    questions.teachers_text.cache_clear()
    text = questions.teachers_text(n_tokens=100, batch=2)
    questions.teachers_text.cache_clear()
    eot = load_tokenizer(teacher).eot
    assert len(text) >= 100 and text.dtype == np.uint16 and text[0] == eot and text.max() <= eot
    corpus = Namespace(train=np.arange(50_000))
    _, _, cut = questions.change("scarce", "student, 30k", None, None, corpus)
    assert len(cut.train) == 30_000


def test_losses_of_modules_are_those_of_the_models(workshop, monkeypatch):
    """A module of several windows, by definition; the last part of a window is not scored."""
    text = "def f(x): return x\n" * 20
    monkeypatch.setattr(questions, "package", lambda *names: [("test/a.py", text), ("test/empty.py", "")])
    monkeypatch.setattr(questions, "stable_hash", lambda name: 0)
    monkeypatch.setattr(questions.atlas, "held_out", lambda *parts: {})
    flags = (f"--teacher {workshop / 'teacher'} --student-layers 1 --data {workshop / 'text'} --data-folder "
             f"{workshop / 'corpora'} --seq-len 16 --precision fp32 --device cpu")
    args = distill.parse_args(shlex.split(flags))
    tokenizer, teacher, student = distill.load_models(args, torch.device("cpu"))
    found = questions.module_losses(args, teacher, student, None, tokenizer)["modules"]["test"]

    ids = torch.tensor([tokenizer.eot, *tokenizer.encode(text)])[:65]
    assert len(ids) == 65 and [module[0] for module in found] == [64]
    for network, nats in ((teacher, found[0][1]), (student, found[0][2])):
        with torch.no_grad():
            log_q = network(ids[:-1].view(4, 16)).log_softmax(-1).flatten(0, 1)
        assert nats == pytest.approx(-log_q.gather(1, ids[1:, None]).sum().item(), abs=0.01)


def test_the_headline_by_hand():
    """Two seeds, three modules of 10, 20 and 30 tokens: sums over seeds and modules, divided once."""
    tokens = np.array([10.0, 20, 30])
    losses = (2.4, 3.0), (2.6, 3.0)  # of student and control, by seed
    nats = [[np.stack([tokens, 2 * tokens, loss * tokens], -1) for loss in pair] for pair in losses]
    found = headline(np.array(nats))
    assert [found[name] for name in ("teacher", "student", "control")] == ["2.000", "2.500", "3.000"]
    assert found["student better by"] == "0.500 (0.400 to 0.600)", "modules are alike here, seeds are not"
    assert found["of the gap"].startswith("50.0% (40")


def test_what_counts_as_a_completed_function():
    """A function ends with the first line that is not inside it; a line that is cut off does not count."""
    for body in ("\n    return x\n\ny = (", " return x\n"):
        assert questions.is_python("def f(x):", body), body
    for body in ("\n    return (\n", "\n    return x", "\n    if x:\n", "\nx = 1\n"):
        assert not questions.is_python("def f(x):", body), body
    assert questions.is_python("    def f(self):", "\n        return 1\n    def g(self")
    assert not questions.is_python("    def f(self):", "\n    return 1\n")


def test_smoothed_labels():
    """A tenth of each label is spread over the vocabulary; what is logged is the plain loss."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, -100, 6, 2])
    log_q = logits.log_softmax(-1)[targets != -100]
    plain = -log_q.gather(1, targets[targets != -100, None]).sum()
    loss, kl, clm = questions.smoothed_loss(logits, None, targets, None)
    assert torch.allclose(clm, plain) and kl == 0
    assert torch.allclose(loss, 0.9 * plain - 0.1 * log_q.mean(-1).sum())


def test_runs_of_the_plan():
    """Each can be made; arms of one question that are compared read the same number of tokens."""
    tokens = {}
    for name, command in STUDY.plan.items():
        args = distill.parse_args(shlex.split(command))
        question = name.partition(":")[0]
        assert (args.data == "stdlib") == (question not in ("unseen", "unseen 2.5M", "scarce")), name
        compared = question if question != "length" else name.rpartition(", ")[0].rpartition(", ")[2]
        if questions.SECOND_STAGE not in command:
            n_tokens = args.steps * args.batch_size * args.grad_accum * args.seq_len
            assert tokens.setdefault(compared, n_tokens) == n_tokens, name
    assert tokens["hard"] == tokens["scarce"] == 614_400 and tokens["2.5M"] == 4 * 614_400


def test_the_page_has_the_tables_of_the_results():
    rows = STUDY.rows()
    page = STUDY.file(".md").read_text(encoding="utf-8")
    assert STUDY.filled(page, rows) == page, "python -m extras.questions --page"
    for name, row in rows.items():
        then, now = (distill.parse_args(shlex.split(flags)) for flags in (row["flags"], STUDY.plan[name]))
        assert then == now, name
        assert not row["commit"].endswith(("+", "?")), name
