"""The text of the LAMBADA study: the standard library with its names drawn anew, so that they must be copied.

  find_names    the names of the library that are drawn from
  rename        a module -> the same one, where each of these names is another one, drawn for it alone
  name_list     a list of names that stands there twice, as a table or a log repeats itself
  write_text    both, as a folder that `--data` can name
  write_prose   other text: what the library says in English

The demo's teacher knows by heart which words follow each other in the library, and copies little: of random
tokens that stand there twice it gets 0.2% right the second time. Whether copying breaks can hardly be asked
of it. In this text a name says nothing, except where it stood before.
"""
import ast
import json
import keyword
import re
from collections import Counter

import numpy as np

from support.documents import stdlib_documents, stdlib_held_out
from support.files import replaced

NAME = re.compile(r"[A-Za-z_]\w{3,}")
LEAST_MODULES, MOST_MODULES = 3, 60  # rarer ones are many tokens, those in more are English, or `self`
COPIES = 3  # of each module to train on, each with names of its own
LIST_NAMES = (8, 48)  # in a list, at least and at most
LIST_SHARE = 0.25  # of the training text, in characters


def find_names(tokenizer):
    """The names that stand in 3 to 60 of the modules to train on and are one or two tokens, sorted."""
    modules = Counter()
    for path, text in stdlib_documents():
        if not stdlib_held_out(path):
            modules.update(set(NAME.findall(text)))

    return sorted(name for name, count in modules.items()
                  if LEAST_MODULES <= count <= MOST_MODULES and not keyword.iskeyword(name)
                  and len(tokenizer.encode(" " + name)) <= 2)


def rename(text, names, rng):
    """Exchange those of `names` that a text has for others of them: each always for the same one.

    "push(item, heap)" -> "shape(title, wait)"
    """
    known = set(names)
    found = sorted(known & set(NAME.findall(text)))
    others = rng.choice(names, len(found), replace=False).tolist()
    new = dict(zip(found, others, strict=True))
    return NAME.sub(lambda match: new.get(match[0], match[0]), text)


def name_list(names, rng):
    """Some names on a line, and the same line again."""
    line = " ".join(rng.choice(names, rng.integers(*LIST_NAMES)).tolist())
    return f"{line}\n{line}\n"


def texts(names, held_out):
    """The documents of one split. What is held out has no lists: those only help a small model to learn."""
    rng = np.random.default_rng(int(held_out))
    for _ in range(1 if held_out else COPIES):
        owed = 0  # characters of lists
        for path, text in stdlib_documents():
            if stdlib_held_out(path) != held_out:
                continue
            yield rename(text, names, rng)

            owed += 0 if held_out else len(text) * LIST_SHARE / (1 - LIST_SHARE)
            while owed > 0:
                extra = name_list(names, rng)
                yield extra
                owed -= len(extra)


def write_text(folder, tokenizer):
    """FOLDER/train.jsonl and FOLDER/val.jsonl, unless they are there. Returns the folder."""
    names = find_names(tokenizer)
    return write_splits(folder, lambda held_out: texts(names, held_out))


def write_prose(folder):
    """The docstrings of the library as it is, one after the other, as a folder of the same kind."""
    def docstrings(held_out):
        for path, text in stdlib_documents():
            if stdlib_held_out(path) == held_out:
                yield "\n\n".join(found for node in ast.walk(ast.parse(text)) if (found := docstring(node)))

    return write_splits(folder, docstrings)


def docstring(node):
    """That of a module, class or function; of other nodes None."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return ast.get_docstring(node) if isinstance(node, documented) else None


def write_splits(folder, documents):
    """documents(held_out), texts, into the two files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            with replaced(path) as file:
                lines = (json.dumps({"text": text}) + "\n" for text in documents(split == "val") if text)
                file.write_text("".join(lines), encoding="utf-8")
    return folder
