"""The README's commands as users type them, with a stand-in for the Hub that has narrow models."""
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
        return GPT2(GPT2.config(vocab_size=600, context=64, width=32, n_layer=n_layer, n_head=2, eos=599))

    def pythia(n_layer, width, vocab_size):
        return GPTNeoX(GPTNeoX.config(
            vocab_size=vocab_size, context=64, width=width, n_layer=n_layer, n_head=2))

    models = {"gpt2": gpt2(12), "gpt2-xl": gpt2(48), "distilgpt2": gpt2(6),
              "EleutherAI/pythia-160m": pythia(4, 48, 656), "EleutherAI/pythia-70m": pythia(2, 32, 640)}
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save(hub.root / "models" / name)
        form = "neox" if "pythia" in name else "gpt2"
        shutil.copy(tokenizers_dir / form / "tokenizer.json", hub.root / "models" / name)

    def rows(name, column_of_texts):
        path = hub.root / "datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": column_of_texts}), path)

    rows("Skylion007/openwebtext/plain_text/train-00000-of-00001.parquet", articles(300, "web"))
    rows("EleutherAI/the_pile_deduplicated/data/train-00000-of-00001.parquet", articles(300, "pile"))
    wiki = [line for i in range(60)
            for line in ("", f" = Title {i} = \n", "", f" Text {i} says {i * i} . \n" * 5)]
    configs = []
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        data_files = [{"split": split, "path": f"{config}/{split}-00000-of-00001.parquet"}
                      for split in ("train", "validation", "test")]
        configs.append({"config_name": config, "data_files": data_files})
        for file in data_files:
            rows(f"Salesforce/wikitext/{file['path']}", wiki)
    (hub.root / "datasets" / "Salesforce" / "wikitext" / "README.md").write_text(
        "---\n" + json.dumps({"configs": configs}) + "\n---\n")
    rows("EleutherAI/lambada_openai/data/test-00000-of-00001.parquet", articles(20, "words"))
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def workplace(world, tmp_path_factory):
    """A folder after the flagship command: its out/ and corpora/, with demo/ and my_texts/ beside them."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "demo").symlink_to(ROOT / "demo")
    (folder / "my_texts").mkdir()
    for i, text in enumerate(articles(100, "mine")):
        (folder / "my_texts" / f"{i}.txt").write_text(text)
    argv = [sys.executable, str(ROOT / "distill.py"), "--teacher", "gpt2", "--student-layers", "6", *SMALL]
    done = command(argv, world, folder)
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
ELSEWHERE = ("pip install", "venv", "pytest", "lm_eval", "hf upload", "extras.atlas", "extras.bench",
             "extras.cache_study", "extras.play", "extras.lab", "extras.speculate", "extras.check_loss")


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
    """One after the other, made short by more flags. transformers opens the students."""
    shutil.copytree(workplace, tmp_path / "here", symlinks=True)
    folder = tmp_path / "here"
    before = {}  # a command without its numbers -> the folder of its run
    for line in block:
        if "--nnodes=2" in line:
            continue  # needs a second machine; here it would repeat the command before it
        script, argv = short(line)
        if script != "distill.py":
            command(argv, world, folder)
            continue

        out = folder / (argv[len(argv) - argv[::-1].index("--out")] if "--out" in argv else "out")
        if alike := before.get(re.sub(r"\d", "", line)):  # four temperatures need not be four runs
            shutil.copytree(alike, out)
            continue
        before[re.sub(r"\d", "", line)] = out
        if "--resume" not in argv:
            argv.append("--overwrite")
        else:
            begun = [part for part in argv if part != "--resume"]
            command([*begun, "--save-interval", "1", "--overwrite", "--no-control"], world, folder)
        command(argv, world, folder)
        opens_in_transformers(out)
        card_is_true(out)


def card_is_true(out):
    """A model that had no teacher is not called distilled."""
    args = json.loads((out / "args.json").read_text())
    card = (out / "README.md").read_text()
    for claim in ("# A distilled GPT", "tags: [distillation]", "its teacher"):
        assert (claim in card) == (args["teacher"] != "none"), claim


def opens_in_transformers(out):
    """Nothing missing, nothing unexpected, the same logits, the same greedy text, the same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    ours, tokenizer = load(out), load_tokenizer(out)
    text = "The part of  Article 7\n    is\t49. <|endoftext|> é"
    ids = tokenizer.encode(text)
    plain = text.replace("<|endoftext|>", "")
    assert AutoTokenizer.from_pretrained(out)(plain)["input_ids"] == tokenizer.encode(plain)
    ids = torch.tensor([ids])
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)
    written = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(ids, 12).tolist() == written.tolist()
