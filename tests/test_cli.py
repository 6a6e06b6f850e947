"""support/cli.py: how commands end, what damaged files say, what flags refuse, how --help and bars look."""
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from support import cli
from support.cli import InputError, checked, lookalike, new_parser, open_bar, reading, run_cli, user_path
from support.ranks import pick_device

ROOT = Path(__file__).parent.parent
CODE = """
import sys
from support.cli import InputError, new_parser, run_cli
def main():
    what = sys.argv[1]
    if what == "--help":
        new_parser("A script.").parse_args()
    if what == "mistake":
        raise InputError("no folder a\\nb\\x1b[2J")
    for i in range(int(what)):
        print(i, "4² * 日本 ±")
run_cli(main)
"""


def start(what, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **env):
    """The process of a command of ours, with pipes for what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", **env}
    return subprocess.Popen([sys.executable, "-c", CODE, what], env=env, stdout=stdout, stderr=stderr)


def result(process):
    """(exit code, stdout, stderr)"""
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


# ------------------------------------------------------------------------------------ how commands end
def take_ctrl_c():
    """In a child process: background jobs may have inherited that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_libraries_load(tmp_path):
    """One line and no traceback. Where a lesson file is imported, Ctrl-C stays Python's own."""
    for library in ("torch", "numpy"):
        (tmp_path / f"{library}.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in (["distill.py"], ["data.py"], ["sample.py"], ["eval_ppl.py"], ["-m", "extras.plot"]):
        loading = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, preexec_fn=take_ctrl_c)
        assert loading.stdout.readline() == b"loading\n"
        loading.send_signal(signal.SIGINT)
        assert result(loading) == (130, b"", b"\nstopped by SIGINT\n"), command

    code = "import signal, data; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=take_ctrl_c)
    assert done.stdout == "True\n", done.stderr


def test_a_closed_pipe_ends_silently():
    """As in `| head -1`: the reader goes after a line, or before there was any."""
    for what, unbuffered in (("1", ""), ("1", "1"), ("100000", ""), ("100000", "1"), ("--help", "")):
        read, write = os.pipe()
        if what != "100000":
            os.close(read)
        process = start(what, stdout=write, PYTHONUNBUFFERED=unbuffered)
        os.close(write)
        if what == "100000":
            assert os.read(read, 1) == b"0"
            os.close(read)
        assert result(process) == (141, None, b""), (what, unbuffered)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        for what in ("1", "100000", "--help"):
            code, _, errors = result(start(what, stdout=full))
            assert code == 2 and errors.startswith(b"error: standard output") and errors.count(b"\n") == 1
            assert errors.endswith(b": No space left on device\n")
        assert result(start("mistake", stderr=full))[0] == 2


def test_a_message_is_one_line_on_any_console():
    """Whatever a name contains, and also where someone catches it, as in a notebook."""
    for encoding, printed in {"utf-8": "0 4² * 日本 ±", "ascii": r"0 4\xb2 * \u65e5\u672c \xb1"}.items():
        code, out, errors = result(start("1", PYTHONIOENCODING=encoding))
        assert (code, out.decode(encoding).rstrip(), errors) == (0, printed, b"")
    assert result(start("mistake")) == (2, b"", b"error: no folder a\\nb\\x1b[2J" + os.linesep.encode())
    error = InputError("no caf\u00e9\u2028 in \ud800")
    assert str(InputError(str(error))) == str(error) == "no caf\u00e9\\u2028 in \\ud800"


def ended(capsys, error):
    """(exit code, stderr) of a command in which this is raised."""
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_cli(main)
    return exit.value.code, capsys.readouterr().err.rstrip()


def test_what_ends_a_command(capsys):
    """The system's refusals and a lack of memory, on any device, are one line; bugs keep their traceback."""
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    for error, code, line in [
            (KeyboardInterrupt(), 130, ""),
            (InputError("x" * 5000), 2, "error: " + "x" * 700 + " ... " + "x" * 200),
            (PermissionError(13, "Permission denied", "/root/x"), 2, "error: /root/x: Permission denied"),
            (MemoryError(), 2, "--batch-size"), (real.value, 2, "--batch-size"),
            (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--batch-size")]:
        found, printed = ended(capsys, error)
        assert found == code and line in printed and printed.count("\n") == 0
    for bug in (KeyError("missing"), RuntimeError("shapes do not fit")):
        with pytest.raises(type(bug)):
            ended(capsys, bug)


def test_only_the_first_of_several_processes_speaks(capsys, monkeypatch):
    """All of them find the same mistake; but once they have met, each has mistakes of its own."""
    for rank, have_met, speaks in (("0", False, True), ("1", False, False), ("1", True, True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda met=have_met: met)
        assert ended(capsys, InputError("no folder x")) == (2, "error: no folder x" if speaks else "")


# ------------------------------------------------------------------------------------ files from strangers
def test_what_libraries_raise_becomes_one_line(tmp_path):
    """The message, and the class of errors whose message alone says little. The error itself is chained."""
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    damaged = f"{path} is not a tokenizer, or is damaged: "
    for error, said in [
            (KeyError("vocab"), damaged + "KeyError 'vocab'"), (RuntimeError(""), damaged + "RuntimeError"),
            (RecursionError("too\n deep"), damaged + "too deep"),
            (ValueError("x" * 5000), damaged + "x" * 300),
            (FileNotFoundError(2, "No such file"), f"{path} could not be read: No such file")]:
        with pytest.raises(InputError) as found, reading(path, "a tokenizer"):
            raise error
        assert str(found.value) == said and found.value.__cause__ is error
    for other in (InputError("already said"), KeyboardInterrupt()):
        with pytest.raises(type(other)) as found, reading(path, "a tokenizer"):
            raise other
        assert found.value is other

    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(InputError, match="is a pointer of Git LFS.*`git lfs pull`"), reading(path, "weights"):
        raise AssertionError("it was read")


# ------------------------------------------------------------------------------------ flags
@pytest.fixture
def parser():
    parser = new_parser("""Do it.

    python do.py --fast      and nothing else

    More for those who read the code.
    """)
    add = parser.add_argument_group("speed").add_argument
    add("--fast", action="store_true", help="do it at once")
    add("--seed", type=checked(int, "0 to 9", lambda n: 0 <= n <= 9), default=0, help="of the draws")
    add("--share", type=checked(float, "0 to 1", lambda x: 0 <= x <= 1), help="how much of it")
    return parser


def test_flags_take_and_refuse(parser):
    args = parser.parse_args(["--seed", "9", "--share", "0.5", "--fast"])
    assert (args.seed, args.share, args.fast) == (9, 0.5, True)
    for argv, message in [
            ("--seed 10", "--seed 10: must be 0 to 9"), ("--seed 1.5", "--seed 1.5: must be 0 to 9"),
            ("--seed " + "9" * 10_000, "--seed " + "9" * 40 + ": must be 0 to 9"),
            ("--share nan", "--share nan: must be 0 to 1"), ("--sede 3", "did you mean --seed?"),
            ("--seed", "--seed expected one argument"), ("--fas", "did you mean --fast?")]:
        with pytest.raises(InputError) as error:
            parser.parse_args(argv.split())
        assert message in str(error.value) and "\n" not in str(error.value)


def test_help_shows_what_helps(parser):
    """The first paragraph, the examples, groups, defaults that say something: no more."""
    text = parser.format_help()
    assert text.startswith("usage: ") and "Do it.\n" in text and "\nspeed:\n" in text
    assert "    python do.py --fast      and nothing else" in text and "More for" not in text
    assert "of the draws (default: 0)" in text
    assert text.count("(default") == 1


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("cpu") == pick_device("auto") == "cpu"
    for name in ("cuda:99", "meta", "gpu", ""):
        with pytest.raises(InputError, match=rf"--device {name} does not work here \(.+\); available: cpu$"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"


def test_misspelt_names(tmp_path, monkeypatch):
    (tmp_path / "demo" / "teacher").mkdir(parents=True)
    (tmp_path / "my_texts.txt").touch()
    (tmp_path / "distilgpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, near in {
            "demo/techer": "demo/teacher", "demo/techer/": "demo/teacher", "my_text.txt": "my_texts.txt",
            "a/b/c/d": None, "lambda": "lambada", "EleutherAI/pythia-70m": None, "gpt2": None}.items():
        assert lookalike(name, ["lambada", "stdlib"]) == near, name
    assert user_path("~/x") == str(Path.home() / "x") and user_path("a~b/~") == "a~b/~"


# ------------------------------------------------------------------------------------ bars, tables
def shown(monkeypatch, items, seconds):
    """The lines that a bar leaves on stderr, where that is not a terminal; item i takes seconds(i)."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for i in open_bar(items, "training", unit="step"):
        time.sleep(seconds(i))
    assert "\r" not in sys.stderr.getvalue() and "||" not in sys.stderr.getvalue()
    return sys.stderr.getvalue().splitlines()


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch):
    """One every PLAIN_SECONDS, none of short work; a full disk stops nothing."""
    monkeypatch.setattr(cli, "PLAIN_SECONDS", 0.05)
    lines = shown(monkeypatch, range(4), lambda i: 0.06)
    assert 2 <= len(lines) <= 5 and all(line.startswith("training: ") and "step" in line for line in lines)
    lines = shown(monkeypatch, range(300), lambda i: 0.06 if i >= 296 else 0.0005)
    assert any("298/300" in line for line in lines), "those that are slower come no later"
    assert tqdm.monitor_interval == 0, "and its thread prints none in between"
    assert shown(monkeypatch, range(3), lambda i: 0) == []

    class Full(io.StringIO):
        tried = False

        def write(self, text):
            self.tried = True
            raise OSError("no space left")

    monkeypatch.setattr(sys, "stderr", Full())
    for _ in open_bar(range(2), "training"):
        time.sleep(0.06)
    assert sys.stderr.tried


def test_tables_line_up():
    rows = [{"model": "a", "n": 1200, "loss": 2.5}, {"model": "teacher", "n": 3, "loss": (3.25, 0.5)}]
    assert cli.format_table(rows).splitlines() == [
        "| model   |     n |            loss |",
        "| ------- | ----: | --------------: |",
        "| a       | 1,200 |          2.5000 |",
        "| teacher |     3 | 3.2500 ± 0.5000 |"]
    assert cli.format_table([]) == ""
