"""A run around its loop: where it starts, when it stops, what is logged, validated and saved after each step.

The loop itself is distill.train; here is what would make it hard to read.
"""
import contextlib
import math
import sys
import time

import torch

from support.cli import InputError
from support.log import Log
from support.outlook import duration_note
from support.runtime import autocast, exit_code, stop_signals
from support.scoring import validate
from support.state import RunFolder


class Run:
    """Used as a context: `with Run(...) as run: for step in run.steps(): ... run.finish_step(...)`."""

    def __init__(self, args, student, optimizer, corpus, vocab_size, ranks, later):
        self.args = args
        self.student = student
        self.optimizer = optimizer
        self.corpus = corpus
        self.vocab_size = vocab_size
        self.ranks = ranks
        self.later = later  # work that follows the training, in its micro-batches
        self.folder = RunFolder(args, ranks)
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.first_step = self.folder.resume(self.corpus, self.student, self.optimizer)
        self.log = self.stack.enter_context(Log(self.args, self.first_step, self.ranks, self.later))
        self.stop = self.stack.enter_context(stop_signals(self.ranks.is_first))
        self.started = time.perf_counter()
        self.note_is_due = self.args.role == "student"  # on how long all of it takes
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def steps(self):
        """The steps to come: from 0, or from where the resumed run was."""
        return range(self.first_step, self.args.steps)

    def after_micro_batch(self, step):
        """Show it, and how long all will take as soon as that is known. After Ctrl-C or SIGTERM on any rank,
        save the state after `step` steps and leave."""
        self.log.tick()
        time_left = self.log.line.time
        if self.note_is_due and time_left.is_reliable():
            self.note_is_due = False
            if note := duration_note(self.args, time_left.seconds(), self.ranks):
                self.log.say(f"note       {note}")
        if self.ranks.any(self.stop):
            self.leave(step)

    def leave(self, step):
        """Save what was learned since the start, say what became of it, and end with the signal's code."""
        if step > self.first_step:
            self.save(step)
        if step or self.args.role == "control":
            self.log.say(f"stopped after step {step}; the same command with --resume goes on from there")
        else:
            self.log.say("stopped before the first step was done, so nothing was saved")
        sys.exit(exit_code(self.stop))

    def check(self, step, mean_losses, gradient_norm, lr):
        """InputError if the loss or its gradient is no number any more; what was saved before stays."""
        if math.isfinite(gradient_norm + mean_losses.loss):
            return
        fix = "Start again with a lower --lr, more --warmup, or --precision fp32"
        where = ""
        if not math.isfinite(mean_losses.teacher_clm):
            where = f", as {self.args.teacher}, the teacher, answers with NaN or infinity"
            fix = "Try --precision fp32, or another teacher"
        elif name := first_not_finite(
                (name, p.grad) for name, p in self.student.named_parameters() if p.grad is not None):
            where = f", first in the gradient of {name}"
        raise InputError(f"step {step + 1}: loss {mean_losses.loss:.3g}, gradient {gradient_norm:.3g} at "
                         f"learning rate {lr:.2g}{where}. {fix}; the last saved state stays in "
                         f"{self.args.out}")

    def finish_step(self, step, mean_losses, tokens, lr, gradient_norm):
        """Log the step; validate and save where that is due. With the first one the folder is this run's."""
        seconds = time.perf_counter() - self.started
        done = step + 1
        if step == self.first_step:
            self.check_student(done)
        self.folder.begin()
        self.log.write(done, mean_losses, lr=lr, grad_norm=gradient_norm, tokens=int(tokens),
                       tokens_per_second=max(1, round(tokens / seconds)))

        every = self.args.eval_interval
        if every and done % every == 0 and self.ranks.is_first:
            row, = validate([self.student], self.corpus, self.vocab_size, self.args,
                            autocast(self.args, self.ranks.device))
            self.log.write_held_out(done, row["loss"])
        if done % self.args.save_interval == 0 or done == self.args.steps:
            self.save(done)
        self.started = time.perf_counter()

    def save(self, steps):
        """The state after so many steps."""
        self.check_student(steps)
        self.folder.save(self.corpus, self.student, self.optimizer, steps)

    def check_student(self, steps):
        """InputError if the last step has broken the student: it replaces nothing that is on disk."""
        if name := first_not_finite(self.student.named_parameters()):
            raise InputError(f"step {steps}: the student's {name} is not finite any more. Start again with "
                             f"a lower --lr; the last saved state stays in {self.args.out}")


def first_not_finite(named_tensors):
    """The name of the first tensor that holds NaN or infinity, or None. Its extremes tell, without a copy."""
    for name, tensor in named_tensors:
        low, high = torch.aminmax(tensor.detach())
        if not math.isfinite(low.item() + high.item()):
            return name
    return None
