"""The README's commands as users type them, through a stand-in Hub, with the models' widths made small."""
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS
from fakehub import FakeHub

from data import load_tokenizer
from model import GPT2, GPTNeoX, load

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "2", "--seq-len", "32", "--batch-size", "2", "--grad-accum", "2", "--workers", "1",
         "--precision", "fp32", "--device", "cpu", "--eval-tokens", "500"]


def publish(hub, name, model, tokenizer):
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = hub.root / "models" / name
    model.save(folder)
    (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())


def articles(n, topic):
    return [f"Article {i} about {topic}. " + f"The {topic} of part {i} is {i * i}. " * (3 + i % 20)
            for i in range(n)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizers_dir):
    """The Hub's gpt2, distilgpt2, pythia-70m and pythia-160m, narrow, and some rows of the data sets."""
    import pyarrow
    import pyarrow.parquet
    hub = FakeHub(tmp_path_factory.mktemp("hub"))
    torch.manual_seed(0)

    def gpt2(n_layer):
        return GPT2(GPT2.config(vocab_size=600, context=64, width=32, n_layer=n_layer, n_head=2,
                               eos=599))

    def pythia(n_layer, width, vocab_size):
        return GPTNeoX(GPTNeoX.config(vocab_size=vocab_size, context=64, width=width, n_layer=n_layer,
                                      n_head=2))

    publish(hub, "gpt2", gpt2(12), tokenizers_dir / "gpt2")
    publish(hub, "gpt2-xl", gpt2(48), tokenizers_dir / "gpt2")
    publish(hub, "distilgpt2", gpt2(6), tokenizers_dir / "gpt2")
    publish(hub, "EleutherAI/pythia-160m", pythia(4, 48, 656), tokenizers_dir / "neox")
    publish(hub, "EleutherAI/pythia-70m", pythia(2, 32, 640), tokenizers_dir / "neox")

    def rows(name, column_of_texts):
        path = hub.root / "datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": column_of_texts}), path)

    rows("Skylion007/openwebtext/plain_text/train-00000-of-00001.parquet", articles(300, "web"))
    rows("EleutherAI/the_pile_deduplicated/data/train-00000-of-00001.parquet", articles(300, "pile"))
    wiki = [line for i in range(60)
            for line in ("", f" = Title {i} = \n", "", f" Text {i} says {i * i} . \n" * 5)]
    splits = ("train", "validation", "test")
    configs = [f"wikitext-{size}-raw-v1" for size in ("2", "103")]
    for config, split in itertools.product(configs, splits):
        rows(f"Salesforce/wikitext/{config}/{split}-00000-of-00001.parquet", wiki)
    configs = [{"config_name": config,
                "data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in splits]}
               for config in configs]
    (hub.root / "datasets" / "Salesforce" / "wikitext" / "README.md").write_text(
        "---\n" + json.dumps({"configs": configs}) + "\n---\n")
    rows("EleutherAI/lambada_openai/data/test-00000-of-00001.parquet", articles(20, "words"))
    yield hub
    hub.close()


@pytest.fixture
def run(run, world):
    """A command, with this file's Hub instead of the one that all tests share."""
    return lambda *argv, **env: run(*argv, **{**world.env, **env})


COMMANDS = {
    "flagship": ["--teacher", "gpt2", "--student-layers", "6"],
    "distilpythia": ["--recipe", "distilpythia"],
    "finetune-wikitext103": ["--recipe", "finetune-wikitext103", "--student", "distilgpt2"],
}


@pytest.fixture(scope="module")
def workplace(world, tmp_path_factory):
    """A folder after the flagship command: its out/ and corpora/, with demo/ and my_texts/ beside them."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "demo").symlink_to(ROOT / "demo")
    (folder / "my_texts").mkdir()
    for i, text in enumerate(articles(100, "mine")):
        (folder / "my_texts" / f"{i}.txt").write_text(text)
    done = command([sys.executable, str(ROOT / "distill.py"), *COMMANDS["flagship"], *SMALL], world, folder)
    args = json.loads((folder / "out" / "args.json").read_text())
    assert args["recipe"] == "plain" and args["data"] == "openwebtext", done.stdout
    assert args["student_layers"] == "0,2,4,7,9,11"
    return folder


def command(argv, world, folder):
    """Run it in the folder, as a user of one thread; it must succeed."""
    env = {**os.environ, **world.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=folder, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, (argv, done.stderr)
    return done


SHORTER = {
    "distill.py": SMALL,
    "data.py": ["--max-tokens", "5000", "--workers", "1"],
    "eval_ppl.py": ["--limit", "3", "--context", "32", "--device", "cpu"],
    "sample.py": ["--tokens", "4", "--device", "cpu"],
    "extras.plot": [],
}
ELSEWHERE = ("pip install", "pytest", "lm_eval", "hf upload", "extras.atlas", "extras.bench",
             "extras.cache_study", "extras.play")


def short(line):
    """A line of the README as arguments of this Python, with flags that make it short: (script, argv)."""
    form = r"(torchrun .*?|python )(?:-m )?(extras\.\w+|\w+\.py)(.*)"
    launcher, script, flags = re.match(form, line).groups()
    argv = [sys.executable]
    if "torchrun" in launcher:
        argv += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv += ["-m", script] if script.startswith("extras") else [str(ROOT / script)]
    return script, [*argv, *shlex.split(flags), *SHORTER[script]]


RUNNABLE = [runnable for block in BLOCKS
            if (runnable := [line for line in block if not any(word in line for word in ELSEWHERE)])]


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block[0][:60])
def test_commands_of_the_readme(world, workplace, block, tmp_path):
    """One after the other, with flags behind them that make them short. Students open in transformers."""
    shutil.copytree(workplace, tmp_path / "here", symlinks=True)
    folder = tmp_path / "here"
    for line in block:
        if "--nnodes=2" in line:
            continue  # takes a second machine; here it would be the command before it once more
        script, argv = short(line)
        if script == "distill.py" and "--resume" in argv:
            before = [part for part in argv if part != "--resume"]
            command([*before, "--save-interval", "1", "--overwrite", "--no-control"], world, folder)
        elif script == "distill.py":
            argv.append("--overwrite")
        command(argv, world, folder)
        if script == "distill.py":
            out = argv[len(argv) - argv[::-1].index("--out")] if "--out" in argv else "out"
            opens_in_transformers(folder / out)


def opens_in_transformers(out):
    """Nothing missing, nothing unexpected, the same logits, the same greedy text, the same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    ours, tokenizer = load(out), load_tokenizer(out)
    text = "The part of  Article 7\n    is\t49. <|endoftext|> é"
    ids = tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(out)(text.replace("<|endoftext|>", ""))["input_ids"] \
        == tokenizer.encode(text.replace("<|endoftext|>", ""))
    ids = torch.tensor([ids])
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)
    written = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(ids, 12).tolist() == written.tolist()


@pytest.mark.parametrize("name", ["distilpythia", "finetune-wikitext103"])  # distilgpt2: in the README
def test_recipes_run_on_two_processes(world, tmp_path, name):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "distill.py"), *COMMANDS[name], *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **world.env, "OMP_NUM_THREADS": "1"},
                          text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and len(load(tmp_path / "out").blocks) > 0
    card, taught = (tmp_path / "out" / "README.md").read_text(), name == "distilpythia"
    claims = ("# A distilled GPT", "tags: [distillation]", "its teacher says")
    assert all((claim in card) == taught for claim in claims)


def test_sample_from_the_hub(world, run):
    argv = ["sample.py", "--model", "gpt2", "--compare", "distilgpt2", "--prompt", "The part", "--tokens",
            "5", "--num", "2"]
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^--- (\S+)", done.stdout, re.M) == ["gpt2", "distilgpt2"]
    assert done.stdout.count("The part") == 4
    assert run(*argv).stdout == done.stdout


def test_sample_says_what_it_does_with_a_long_prompt(world, run):
    argv = ["sample.py", "--model", "gpt2", "--prompt", "a b c d " * 50, "--tokens", "3",
            "--temperature", "0"]
    done = run(*argv)
    assert done.returncode == 0 and "sees the last 64" in done.stderr


@pytest.mark.parametrize("argv, message", [
    ([], "run `python distill.py` first"),
    (["--model", "nobody/nothing"], "nobody/nothing"),
    (["--model", "gpt2", "--top-p", "0"], "--top-p 0: must be above 0 and at most 1"),
    (["--model", "gpt2", "--tokens", "0"], "--tokens 0: must be 1 to 1000000"),
])
def test_sample_with_bad_input(world, run, argv, message):
    done = run("sample.py", *argv)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_no_hub_names_the_offline_default(run):
    done = run("distill.py", "--teacher", "gpt2", "--student-layers", "6", HF_HUB_OFFLINE="1",
               HF_HOME="empty")
    assert done.returncode == 2 and "`python distill.py` needs no Hub" in done.stderr


def test_a_download_cut_half_way_leaves_nothing_behind(world, run, tmp_path):
    """The clients either fetch the rest or fail; the next try succeeds; a half file is never loaded."""
    world.cut.add("model.safetensors")
    argv = ["distill.py", "--teacher", "gpt2", "--student-layers", "6", *SMALL]
    first = run(*argv, HF_HOME=tmp_path / "fresh")
    assert first.returncode in (0, 2) and "Traceback" not in first.stderr
    second = run(*argv, "--overwrite", HF_HOME=tmp_path / "fresh")
    assert second.returncode == 0, second.stderr
