"""A run around its loop: where it starts, when it stops, what is logged, validated and saved after each step.

The loop itself is distill.train; here is what would make it hard to read.
"""
import contextlib
import math
import sys
import time

from support.chunked_loss import Losses
from support.cli import InputError
from support.log import Log
from support.runtime import autocast, exit_code, stop_signals
from support.scoring import validate
from support.state import RunFolder


class Run:
    """Used as a context: `with Run(...) as run: for step in run.steps(): ... run.finish_step(...)`."""

    def __init__(self, args, student, optimizer, corpus, vocab_size, ranks):
        self.args = args
        self.student = student
        self.optimizer = optimizer
        self.corpus = corpus
        self.vocab_size = vocab_size
        self.ranks = ranks
        self.folder = RunFolder(args, ranks)
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.first_step = self.folder.resume(self.corpus, self.student, self.optimizer)
        self.log = self.stack.enter_context(Log(self.args, self.first_step, self.ranks))
        self.stop = self.stack.enter_context(stop_signals())
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def steps(self):
        """The steps to come: from 0, or from where the resumed run was."""
        return range(self.first_step, self.args.steps)

    def stop_if_asked(self, step):
        """After Ctrl-C or SIGTERM on any rank, save the state after `step` steps and leave."""
        if self.ranks.any(self.stop):
            self.save(step)
            self.log.say(f"stopped after step {step}; the same command with --resume goes on from there")
            sys.exit(exit_code(self.stop))

    def check(self, step, mean_losses, gradient_norm, lr):
        """InputError if the loss or its gradient is no number any more; what was saved before stays."""
        if math.isfinite(gradient_norm + mean_losses.loss):
            return
        raise InputError(f"step {step + 1}: loss {mean_losses.loss:.3g}, gradient {gradient_norm:.3g} at "
                         f"learning rate {lr:.2g}. Start again with a lower --lr, more --warmup, or "
                         f"--precision fp32; the last saved state stays in {self.args.out}")

    def finish_step(self, step, mean_losses, tokens, lr, gradient_norm):
        """Log the step; validate and save where that is due. With the first one the folder is this run's."""
        seconds = time.perf_counter() - self.started
        done = step + 1
        self.folder.begin()
        self.log.write(done, mean_losses, lr=lr, grad_norm=gradient_norm, tokens=int(tokens),
                       tokens_per_second=max(1, round(tokens / seconds)))

        every = self.args.eval_interval
        if every and done % every == 0 and self.ranks.is_first:
            row, = validate([self.student], self.corpus, self.vocab_size, self.args,
                            autocast(self.args, self.ranks.device))
            self.log.say(f"step {done}: validation loss {row['loss']:.4f}")
        if done % self.args.save_interval == 0 or done == self.args.steps:
            self.save(done)
        self.started = time.perf_counter()

    def save(self, steps):
        """The state after so many steps."""
        self.folder.save(self.corpus, self.student, self.optimizer, steps)


def mean_over_tokens(totals, ranks):
    """Sums of Losses (a tensor, of this rank) -> (mean Losses per counted token, tokens), over all ranks."""
    totals = Losses(*ranks.sum(totals).tolist())
    tokens = max(totals.tokens, 1)
    return Losses(*(total / tokens for total in totals)), tokens
