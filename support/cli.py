"""What every command shares: an error of the user's is one line, a table lines up.

  InputError     the user's mistake, in one line that names the thing and the fix
  run_cli        runs a command: such an error becomes exit code 2
  format_table   rows of figures as Markdown
"""
import sys


class InputError(ValueError):
    """The user's mistake: one line that names the thing and the fix."""


def run_cli(main):
    """Run a command: an InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def format_table(rows):
    """Rows (dicts with the same keys) as a Markdown table whose columns line up in a terminal, too."""
    def show(value):
        form = {int: ",", float: ".4f"}.get(type(value), "")
        return " ± ".join(map(show, value)) if isinstance(value, tuple) else format(value, form)

    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    width, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width, *("-" * (w - 1) + ":" for w in widths)])
    lines = (" | ".join([name.ljust(width), *map(str.rjust, row, widths)]) for name, *row in cells)
    return "\n".join(f"| {line} |" for line in lines)
