"""What docs/lambada.md shows of docs/lambada.jsonl: two tables, and a picture.

    python -m extras.lambada_page    print the tables, draw assets/lambada.png

Read in this order:
  arms_table, shares_table   rows -> Markdown
  Change                     what a run did to the words of our LAMBADA, and what of it was copying
  means_drawn_again          intervals, by drawing items and seeds again
  draw                       change over steps, and arm by arm
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from extras.lambada import LONG_ARMS, MARKS, RESULTS, SHORT_ARMS
from extras.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save
from extras.results import read_rows
from support.cli import InputError, format_table, new_parser, run_cli

PICTURE = Path(__file__).parent.parent / "assets" / "lambada.png"
DRAWS = 2000  # of items and seeds


class State(NamedTuple):
    """An arm after so many steps: the figures of each of its seeds."""
    arm: str
    steps: int
    seeds: list

    @property
    def label(self):
        return f"{self.arm}, {self.steps} steps" if self.arm.endswith("long") else self.arm


def all_states(rows):
    """In the order of the plan; a long arm gives one for each of its marks."""
    found = {}
    for arm in SHORT_ARMS | LONG_ARMS:
        for name, row in rows.items():
            if name.startswith(f"{arm}, seed "):
                for steps, figures in row["states"].items():
                    found.setdefault((arm, int(steps)), []).append(figures)
    return [State(arm, steps, seeds) for (arm, steps), seeds in found.items()]


# ------------------------------------------------------------------------------------ what was copying
class Change(NamedTuple):
    """What training did, in nats for each word (seeds, items); positive is worse.

    total: to the word. elsewhere: to the word where nothing can be copied, as it is exchanged wherever it
    stood before. The rest, total - elsewhere, is what the model lost of the help that standing there gives.
    """
    total: np.ndarray
    elsewhere: np.ndarray

    @property
    def copying(self):
        return self.total - self.elsewhere


def change(before, seeds):
    """From the figures of the student before, and of each seed after."""
    def of(column):
        return np.array([figures[column] for figures in seeds]) - np.array(before[column])
    return Change(of("items"), of("items exchanged"))


def means_drawn_again(values):
    """The means of `values` (seeds, items) where both seeds and items are drawn again, with replacement:
    (DRAWS,). The draws are the same each time, so that means of two arrays belong together."""
    rng = np.random.default_rng(0)
    n_seeds, n_items = values.shape
    of_seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), DRAWS) / n_seeds  # (DRAWS, seeds)
    of_items = rng.multinomial(n_items, np.full(n_items, 1 / n_items), DRAWS) / n_items  # (DRAWS, items)
    return ((of_seeds @ values) * of_items).sum(1)


def interval(values):
    """What 95% of these means lie between."""
    return np.percentile(means_drawn_again(values), (2.5, 97.5))


def with_interval(values):
    low, high = interval(values)
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def share_of_copying(found):
    """Of a Change, as text; "-" where the change itself may be nothing."""
    low, high = interval(found.total)
    if low * high <= 0:
        return "-"
    shares = means_drawn_again(found.copying) / means_drawn_again(found.total)
    least, most = np.percentile(shares, (2.5, 97.5))
    return f"{found.copying.mean() / found.total.mean():.0%} ({least:.0%} to {most:.0%})"


# ------------------------------------------------------------------------------------ tables
def arms_table(rows):
    """Means over seeds of what a model was asked; of the two perplexities the least and the most, too."""
    columns = {  # of the figures: (heading, digits, whether with its range)
        "perplexity": ("perplexity", 2, True),
        "lambada perplexity": ("LAMBADA", 0, True),
        "lambada accuracy": ("accuracy", 3, False),
        "copy names": ("names copied", 3, False),
        "copy random 64": ("random copied", 3, False),
        "loss pair": ("loss, pair seen", 3, False),
        "loss new": ("loss, new", 3, False),
    }
    models = [State(who, 0, [rows[who]["states"]["0"]]) for who in ("teacher", "student")]
    lines = []
    for state in models + all_states(rows):
        line = {"": state.label}
        for column, (heading, digits, ranged) in columns.items():
            values = [figures[column] for figures in state.seeds]
            line[heading] = f"{np.mean(values):.{digits}f}"
            if ranged and len(values) > 1:
                line[heading] += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
        lines.append(line)
    return format_table(lines)


def shares_table(rows):
    """By how much each arm changed the text and the words, what of the latter is copying, and how it compares
    with text alone: the same steps, rate and seeds."""
    before = rows["student"]["states"]["0"]
    states = all_states(rows)
    lines = []
    for state in states:
        found = change(before, state.seeds)
        line = {
            "": state.label,
            "text, a token": f"{np.mean([seed['loss'] for seed in state.seeds]) - before['loss']:+.3f}",
            "LAMBADA, a word": with_interval(found.total),
            "of it copying": with_interval(found.copying),
            "elsewhere": f"{found.elsewhere.mean():+.3f}",
            "LAMBADA less text alone's": "-",
            "copying less text alone's": "-",
        }
        if control := control_of(state, states):
            alone = change(before, control.seeds)
            line["LAMBADA less text alone's"] = with_interval(found.total - alone.total)
            line["copying less text alone's"] = with_interval(found.copying - alone.copying)
        lines.append(line)
    return format_table(lines)


def control_of(state, states):
    """The arm that had the text alone, for as many steps at the same rate, with as many seeds; or None."""
    rest = state.arm.rpartition(", ")[2]
    arm = f"text alone, {rest}" if rest in ("long", "lr 1e-3") else "text alone"
    for other in states:
        if other.arm == arm != state.arm and other.steps == state.steps:
            return other if len(other.seeds) == len(state.seeds) else None
    return None


# ------------------------------------------------------------------------------------ the picture
def draw(rows):
    """Left: LAMBADA and text over steps, with the teacher and without. Right: copying and the rest by arm."""
    figure = new_figure()
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    before = rows["student"]["states"]["0"]
    draw_steps(left, rows, before)
    draw_arms(right, rows, before)
    return figure


def draw_steps(axes, rows, before):
    for arm, colour in (("published, long", BLUE), ("text alone, long", PURPLE)):
        states = [state for state in all_states(rows) if state.arm == arm]
        steps = [state.steps for state in states]
        words = [change(before, state.seeds).total.mean(1) for state in states]
        tokens = [[seed["loss"] - before["loss"] for seed in state.seeds] for state in states]
        name = arm.removesuffix(", long")
        axes.fill_between(steps, [min(w) for w in words], [max(w) for w in words], color=colour, alpha=0.2)
        axes.plot(steps, [np.mean(w) for w in words], "o-", color=colour, label=f"{name}: LAMBADA, a word")
        axes.plot(steps, [np.mean(t) for t in tokens], "s--", color=colour, label=f"{name}: text, a token")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xscale="log", xlabel="steps", ylabel="change, nats (above 0: worse)")
    axes.set_xticks(MARKS, MARKS)
    axes.minorticks_off()
    axes.legend(frameon=False, labelcolor="linecolor", fontsize=7)
    axes.grid()


def draw_arms(axes, rows, before):
    states = [state for state in all_states(rows) if not state.arm.endswith(("long", "lr 1e-3"))]
    changes = [change(before, state.seeds) for state in states]
    places = np.arange(len(states))
    for shift, part, colour in ((-0.2, "copying", ORANGE), (0.2, "elsewhere", GREEN)):
        values = [getattr(found, part) for found in changes]
        bounds = np.array([interval(value) for value in values]).T  # (2, arms)
        means = np.array([value.mean() for value in values])
        axes.errorbar(means, places + shift, xerr=[means - bounds[0], bounds[1] - means], fmt="o",
                      color=colour, label=part, capsize=2)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(places, [state.label for state in states])
    axes.invert_yaxis()
    axes.set(xlabel="change of LAMBADA, nats a word, 64 steps")
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.grid(axis="x")


def parse_args(argv=None):
    return new_parser(__doc__, "python -m extras.lambada_page").parse_args(argv)


def main():
    parse_args()
    rows = read_rows(RESULTS)
    if "student" not in rows:
        raise InputError(f"{RESULTS} has no runs yet: python -m extras.lambada makes them")
    print(arms_table(rows) + "\n\n" + shares_table(rows) + "\n\ncopying's share:")
    for state in all_states(rows):
        found = change(rows["student"]["states"]["0"], state.seeds)
        print(f"  {state.label}: {share_of_copying(found)}")
    save(draw(rows), PICTURE)


if __name__ == "__main__":
    run_cli(main)
