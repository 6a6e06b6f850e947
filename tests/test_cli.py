"""support/cli.py: how commands end, what flags refuse and how --help looks."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import InputError, checked, lookalike, new_parser, pick_device, run_cli, user_path

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


def start(what, **settings):
    """The process of a command of ours, with pipes for what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}
    env |= settings.pop("env", {})
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.Popen([sys.executable, "-c", CODE, what], env=env, **settings)


# ------------------------------------------------------------------------------------ how commands end
@pytest.mark.parametrize("command", [["distill.py"], ["data.py"], ["sample.py"], ["eval_ppl.py"],
                                     ["-m", "extras.plot"]])
def test_ctrl_c_while_libraries_load(tmp_path, command):
    """One line and no traceback, whichever library it is that takes its time."""
    for library in ("torch", "numpy"):
        (tmp_path / f"{library}.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    loading = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert loading.stdout.readline() == b"loading\n"
    loading.send_signal(signal.SIGINT)
    assert loading.communicate(timeout=30) == (b"", b"\nstopped by SIGINT\n")
    assert loading.returncode == 130


def test_ctrl_c_belongs_to_who_imports_a_lesson_file():
    code = "import signal, data; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("what, unbuffered", [
    ("1", ""), ("1", "1"), ("100000", ""), ("100000", "1"), ("--help", "")])
def test_a_closed_pipe_ends_silently(what, unbuffered):
    """As in `| head -1`: the reader goes after a line, or before there was any."""
    read, write = os.pipe()
    if what != "100000":
        os.close(read)
    process = start(what, stdout=write, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(write)
    if what == "100000":
        assert os.read(read, 1) == b"0"
        os.close(read)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("what", ["1", "100000", "--help"])
def test_a_full_disk_is_one_line(what):
    with open("/dev/full", "w") as full:
        process = start(what, stdout=full)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(b"error: standard output") and errors.endswith(b": No space left on device\n")
    assert errors.count(b"\n") == 1

    with open("/dev/full", "w") as full:
        process = start("mistake", stderr=full)
        process.communicate(timeout=60)
    assert process.returncode == 2


@pytest.mark.parametrize("encoding, printed", [
    ("utf-8", "0 4² * 日本 ±"), ("cp932", "0 4^2 * 日本 ±"), ("gbk", "0 4^2 * 日本 ±"),
    ("cp1250", r"0 4^2 * \u65e5\u672c ±"), ("cp1252", r"0 4² * \u65e5\u672c ±"),
    ("ascii", r"0 4^2 * \u65e5\u672c +-")])
def test_a_narrow_console_gets_what_it_can_show(encoding, printed):
    process = start("1", env={"PYTHONIOENCODING": encoding})
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert out.decode(encoding).rstrip() == printed


def test_a_mistake_is_one_line():
    process = start("mistake")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (out, errors) == (b"", b"error: no folder a\\nb\\x1b[2J" + os.linesep.encode())


def test_an_input_error_is_one_line_wherever_it_is_shown():
    """A notebook, and who catches it, see it without run_cli."""
    assert str(InputError("tensor a\nb\u2028c has no place")) == "tensor a\\nb\\u2028c has no place"
    assert len(str(InputError("x" * 5000))) < 1000
    error = InputError("no caf\u00e9 in \ud800")
    assert str(InputError(str(error))) == str(error) == "no caf\u00e9 in \\ud800"


@pytest.mark.parametrize("error, code, line", [
    (KeyboardInterrupt(), 130, ""),
    (InputError("x" * 5000), 2, "error: " + "x" * 700 + " ... " + "x" * 200),
    (PermissionError(13, "Permission denied", "/root/x"), 2, "error: /root/x: Permission denied"),
    (OSError(36, "File name too long", "y" * 5000), 2,
     "error: " + "y" * 700 + " ... " + "y" * 180 + ": File name too long"),
])
def test_what_ends_a_command(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_cli(main)
    assert exit.value.code == code
    assert capsys.readouterr().err.rstrip() == line


def test_a_fault_of_ours_keeps_its_traceback():
    def main():
        return {}["missing"]

    with pytest.raises(KeyError):
        run_cli(main)


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


@pytest.mark.parametrize("argv, message", [
    (["--seed", "10"], "--seed 10: must be 0 to 9"),
    (["--seed", "-1"], "--seed -1: must be 0 to 9"),
    (["--seed", "1.5"], "--seed 1.5: must be 0 to 9"),
    (["--seed", "9" * 10_000], "--seed " + "9" * 40 + ": must be 0 to 9"),
    (["--share", "nan"], "--share nan: must be 0 to 1"),
    (["--share", "1e400"], "--share 1e400: must be 0 to 1"),
    (["--sede", "3"], "did you mean --seed?"),
    (["--seed"], "--seed expected one argument"),
])
def test_flags_refuse(parser, argv, message):
    with pytest.raises(InputError) as error:
        parser.parse_args(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_flags_take(parser):
    args = parser.parse_args(["--seed", "9", "--share", "0.5", "--fast"])
    assert (args.seed, args.share, args.fast) == (9, 0.5, True)
    assert user_path("~/x") == str(Path.home() / "x") and user_path("a~b/~") == "a~b/~"


def test_help_shows_what_helps(parser):
    """The first paragraph, the examples, groups, defaults that say something: no more."""
    text = parser.format_help()
    assert text.startswith("usage: ") and "Do it.\n" in text and "\nspeed:\n" in text
    assert "    python do.py --fast      and nothing else" in text and "More for" not in text
    assert "of the draws (default: 0)" in text
    assert text.count("(default") == 1


def test_devices(monkeypatch):
    import torch
    assert pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    for name in ("cuda:99", "meta", "gpu", "cuda:" + "9" * 30, ""):
        with pytest.raises(InputError, match="there is no such device here, only cpu$"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"


@pytest.mark.parametrize("name, near", [
    ("demo/techer", "demo/teacher"), ("demo/techer/", "demo/teacher"), ("my_text.txt", "my_texts.txt"),
    ("lambda", "lambada"), ("EleutherAI/pythia-70m", None), ("gpt2", None), ("owner/lambda", None)])
def test_misspelt_names(tmp_path, monkeypatch, name, near):
    (tmp_path / "demo" / "teacher").mkdir(parents=True)
    (tmp_path / "my_texts.txt").touch()
    (tmp_path / "distilgpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lookalike(name, ["lambada", "stdlib"]) == near
