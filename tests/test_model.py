"""model.py against transformers, through files on disk: logits, what is saved and refused; generation.

Weights have a standard deviation of 0.2: with the usual 0.02 a wrong GELU would move the logits by 2e-6 only.
"""
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model as models
from model import GPT2, Config, load, spread_layers, student_from
from support.cli import InputError

CONTEXT, VOCAB = 24, 60
SHAPE = {"vocab_size": VOCAB, "context": CONTEXT, "width": 32, "n_layer": 3, "n_head": 4}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 3, "n_head": 4}
NEOX_SHAPE = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "hidden_size": 32,
              "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 72}


# ---------------------------------------------------------------------------------------- checkpoints on disk
def reference(folder, architecture, layers_std=0.2, **options):
    """Have transformers write a model with random weights; nothing in it stays 0 or 1."""
    config, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM)}[architecture]
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = model_class(config(**(GPT2_SHAPE if architecture == "gpt2" else NEOX_SHAPE) | ends | options))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(re.search(r"(ln_.|norm)\.weight", name) is not None),
                              std=layers_std if parameter.dim() == 2 and re.search(r"\.\d+\.", name) else 0.2)
    model.save_pretrained(folder)
    return folder


def rewrite(folder, change):
    """Replace the tensors of folder/model.safetensors by change(tensors)."""
    tensors = change(load_file(folder / "model.safetensors"))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def rewrite_config(folder, remove=(), **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in remove} | changes
    (folder / "config.json").write_text(json.dumps(config))


def as_gpt2_on_the_hub(tensors):
    """No prefix, causal masks as buffers (bytes, numbers), and the tied head again."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.uint8).tril()[None, None]
    buffers = {f"h.{i}.attn.bias": mask for i in range(3)}
    buffers |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    return tensors | buffers | {"lm_head.weight": tensors["wte.weight"]}


def as_pythia_on_the_hub(tensors):
    """float16, with causal masks and frequencies as buffers."""
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    for i in range(3):
        name = f"gpt_neox.layers.{i}.attention."
        tensors[name + "bias"] = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()[None, None]
        tensors[name + "masked_bias"] = torch.tensor(-1e9).half()
        tensors[name + "rotary_emb.inv_freq"] = torch.ones(1).half()
    return tensors


def into_bin(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def into_shards_of_bin(folder):
    """Cut the one file with the weights into two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


NEW_NAMES = ["rope_parameters", "attention_bias"]  # those that files from before transformers 5 lack


def rope(share, base=10000.0):
    return {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": share, "rope_theta": base}}


def rotary_as(**settings):
    """Half of each head rotated, with the base 500, said in another way than transformers 5 does."""
    return "neox", rope(0.5, 500.0), lambda folder: rewrite_config(folder, remove=NEW_NAMES, **settings)


CHECKPOINTS = {  # name: (architecture, options, what else is done to the files)
    "gpt2": ("gpt2", {}, None),
    "gpt2 as on the Hub": ("gpt2", {}, lambda folder: rewrite(folder, as_gpt2_on_the_hub)),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}, None),
    "gpt2 with a narrow MLP": ("gpt2", {"n_inner": 40}, None),
    "gpt2 with exact gelu, eps": ("gpt2", {"activation_function": "gelu", "layer_norm_epsilon": 1e-2}, None),
    "gpt2 of Stanford": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, None),
    "gpt2 as .bin in shards": ("gpt2", {}, into_shards_of_bin),
    "neox": ("neox", {}, None),
    "neox sequential": ("neox", {"use_parallel_residual": False}, None),
    "neox rotary 1.0": ("neox", rope(1.0), None),
    "neox head width 20, 5 rotated": ("neox", {"hidden_size": 80}, None),
    "neox head width 7, 1 rotated": ("neox", {"hidden_size": 28}, None),
    "neox tied": ("neox", {"tie_word_embeddings": True}, None),
    "neox without attention bias": ("neox", {"attention_bias": False}, None),
    "neox with tanh gelu, eps": ("neox", {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-2}, None),
    "neox as on the Hub": ("neox", {}, lambda folder: rewrite(folder, as_pythia_on_the_hub)),
    "rotary of the Hub's Pythias": rotary_as(rotary_emb_base=500, rotary_pct=0.5),
    "rotary of Llama": rotary_as(rope_theta=500.0, partial_rotary_factor=0.5),
    "both": rotary_as(rope_theta=9.0, rotary_emb_base=500, rotary_pct=0.5),
    "group first": rotary_as(rotary_emb_base=9, rotary_pct=0.5, rope_parameters={"rope_theta": 500.0}),
    "old group": rotary_as(rope_scaling={"type": "default", "rope_theta": 500.0}, rotary_pct=0.5),
}


@pytest.fixture(params=["gpt2 of Stanford", "neox sequential"])
def checkpoint(request, tmp_path):
    """Layers with large weights: otherwise greedy text soon is one token over and over."""
    architecture, options, _ = CHECKPOINTS[request.param]
    return reference(tmp_path / "checkpoint", architecture, layers_std=0.5, **options)


@pytest.fixture
def gpt2(tmp_path):
    return reference(tmp_path / "gpt2", "gpt2")


@pytest.fixture
def neox(tmp_path):
    return reference(tmp_path / "neox", "neox")


def transformers_model(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def some_ids(B=2, L=CONTEXT):
    return torch.randint(VOCAB, (B, L), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------- parity
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path):
    """In each form of file and of config.json that the Hub has, and at each option that we implement; also
    when we have saved the model."""
    ids = some_ids()
    for name, (architecture, options, change) in CHECKPOINTS.items():
        folder = reference(tmp_path / name, architecture, **options)
        theirs = transformers_model(folder)
        if change:
            change(folder)
        if name == "neox as on the Hub":  # other weights than before: float16
            theirs = transformers_model(folder)
        expected = theirs(ids).logits
        assert expected.std() > 0.3
        load(folder).save(tmp_path / "saved")
        for model in (load(folder), load(tmp_path / "saved")):
            assert not model.training and model.head_weight.dtype == torch.float32
            assert model.num_parameters() == theirs.num_parameters() and model.context == CONTEXT
            torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=0, msg=name)


# ---------------------------------------------------------------------------------------- generation
@torch.no_grad()
def test_a_cache_changes_nothing(checkpoint):
    """Whatever the lengths of the pieces that it gets."""
    model, ids = load(checkpoint), some_ids()
    cache = model.new_cache(batch=2, room=CONTEXT).fill_(torch.nan)  # read too early, this would show
    pieces = []
    for past, length in ((0, 7), (7, 1), (8, 6), (14, CONTEXT - 14)):
        pieces.append(model.hidden(ids[:, past:past + length], cache, past))
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_generation_slides_past_the_context(checkpoint):
    """As token by token without a cache: it reads the text from its start, and when the context is full, its
    older half goes."""
    model = load(checkpoint)
    for length in (3, CONTEXT, CONTEXT + 10):
        ids = expected = some_ids(L=length)
        read = ids[:, -CONTEXT:]
        for _ in range(2 * CONTEXT):
            token = model(read)[:, -1].argmax(-1, keepdim=True)
            full = read.size(1) == CONTEXT
            expected, read = torch.cat((expected, token), 1), torch.cat((read, token), 1)
            read = read[:, -(CONTEXT // 2):] if full else read
        assert model.generate(ids, 2 * CONTEXT).tolist() == expected.tolist()
        assert len(set(expected[:, length:].flatten().tolist())) > 5

    small = GPT2(Config(**SHAPE | {"context": 1})).eval()
    assert small.generate(some_ids(L=3), 4).shape == (2, 7)


def test_tokens_come_one_at_a_time(gpt2):
    """If you stop asking, no more is computed; and no graph of gradients grows meanwhile."""
    chosen = []

    def choose(logits):
        chosen.append(logits)
        return logits.argmax(-1, keepdim=True)

    assert next(load(gpt2).tokens(some_ids(L=3), 10, choose)).shape == (2, 1)
    assert len(chosen) == 1 and not chosen[0].requires_grad and torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------- out again
@torch.no_grad()
def test_what_we_save_opens_in_transformers(checkpoint, tmp_path):
    """Nothing missing, nothing unexpected, in both precisions; the second is saved over the first."""
    out = tmp_path / "a" / "b"
    for dtype in (torch.float32, torch.bfloat16):
        model = load(checkpoint, dtype=dtype)
        model.save(out)
        again = load(out, dtype=dtype)
        assert again.config == model.config and torch.equal(again(some_ids()), model(some_ids()))
        files = {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()}
        assert files == dict.fromkeys(["config.json", "generation_config.json", "model.safetensors"], 0o644)

        theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert theirs.dtype == dtype and type(theirs) is type(transformers_model(checkpoint))
        logits = theirs.float().eval()(some_ids()).logits
        torch.testing.assert_close(logits, model.float()(some_ids()), atol=1e-5, rtol=0)


def test_what_a_config_json_says(gpt2, neox, tmp_path):
    """To transformers 4 and 5, and to llama.cpp's converter. transformers refuses a list as a beginning."""
    for eos, bos in [([7, 2], 7), ([], None), (None, None), (3, 3)]:
        rewrite_config(gpt2, eos_token_id=eos)
        load(gpt2).save(tmp_path / "out")
        theirs = transformers_model(tmp_path / "out").generation_config
        assert theirs.eos_token_id == eos and theirs.bos_token_id == bos
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["torch_dtype"] == "float32"  # the key that both transformers 4 and 5 read
    assert raw["n_ctx"] == raw["n_positions"] == CONTEXT  # llama.cpp's converter reads n_ctx

    rewrite_config(neox, **rope(0.5, 500.0))
    load(neox).save(tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters == rope(0.5, 500.0)["rope_parameters"]


def test_a_reader_finds_whole_models_only(gpt2, tmp_path, monkeypatch):
    """The folder can be loaded at any step of saving. (test_files.py has a full disk.)"""
    model, seen = load(gpt2), []
    model.save(tmp_path / "out")
    replace = os.replace

    def watched(old, new):
        replace(old, new)
        seen.append(Path(new).name)
        load(tmp_path / "out")

    monkeypatch.setattr(os, "replace", watched)
    model.save(tmp_path / "out")
    assert seen == ["model.safetensors", "generation_config.json", "config.json"]


# ---------------------------------------------------------------------------------------- students
def test_spread_layers():
    """The students of published runs have these layers; a layer that the teacher lacks is refused."""
    assert spread_layers(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilGPT2's
    assert spread_layers(6, 1) == spread_layers(1, 1) == [0]
    for n in range(1, 49):
        for m in range(2, n + 1):
            layers = spread_layers(n, m)
            assert len(layers) == m and layers == sorted(set(layers)) and layers[::m - 1] == [0, n - 1]
    for n_student in (0, 7):
        with pytest.raises(InputError, match="choose 1 to 6"):
            spread_layers(6, n_student)
    for layers in ([], [3], [0, -1]):
        with pytest.raises(InputError, match="layers are 0 to 2"):
            student_from(GPT2(Config(**SHAPE)), layers)


@torch.no_grad()
def test_student_from(checkpoint):
    """The chosen layers, in this order, as copies: the teacher must not learn along."""
    teacher = load(checkpoint).requires_grad_(False)
    assert torch.equal(student_from(teacher, [0, 1, 2]).eval()(some_ids()), teacher(some_ids()))
    student = student_from(teacher, [2, 0]).eval()  # Stanford's scores depend on where a layer is
    x, rotary = teacher.embed_at(some_ids(), 0)
    by_hand = teacher.norm(teacher.blocks[0](teacher.blocks[2](x, rotary), rotary))
    torch.testing.assert_close(student.hidden(some_ids()), by_hand, atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in student.parameters())
    before = teacher(some_ids())
    for parameter in student.parameters():
        parameter.zero_()
    assert torch.equal(teacher(some_ids()), before)


def test_random_start_forgets_the_teacher(gpt2):
    """std 0.02, and less where a layer adds to the stream, as in GPT-2."""
    student = student_from(load(gpt2), [0, 1, 2])
    student.initialise()
    for name, p in student.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all()
        else:
            std = 0.02 / 6**0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert abs(p.std().item() / std - 1) < 0.15, name


def test_dropout_is_for_training_only(gpt2):
    """Each of the two kinds works; and nothing that is measured has it."""
    model, ids = load(gpt2), some_ids()
    before = model(ids)
    for where in ((0.0, 0.5), (0.5, 0.0)):
        model.set_dropout(*where)
        assert torch.equal(model.eval()(ids), before)
        model.train()
        assert not torch.equal(model(ids), model(ids)) and not torch.equal(model(ids), before)
    model.set_dropout(0.0, 0.0)
    assert torch.equal(model(ids), before)


# ---------------------------------------------------------------------------------------- bad input
def refused(folder, message):
    with pytest.raises(InputError, match=message):
        load(folder)


GPT = {"model_type": "gpt2", "n_embd": 12, "n_layer": 1, "n_positions": 8, "vocab_size": 9}
NEOX = {"model_type": "gpt_neox", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 8, "vocab_size": 9}


def test_configs(tmp_path):
    """Options that we do not compute are refused by name: ignored, they would give wrong numbers."""
    for content, problem in [
            (GPT, None), (GPT | {"layer_norm_epsilon": 0, "n_inner": None}, None),
            (NEOX, None), (NEOX | {"rotary_pct": 0.0}, None), (NEOX | {"rotary_pct": 1}, None),
            ({}, "model_type None"),
            ({"model_type": "gpt_neox", "vocab_size": 9}, "missing .* 'context'"),
            (GPT | {"n_embd": 30}, "a width of 30 cannot be divided among 12"),
            (GPT | {"n_head": 2.0}, "n_head 2.0 must be of type int"),
            (NEOX | {"max_position_embeddings": 0}, "max_position_embeddings 0"),
            (GPT | {"n_layer": 10**7}, "10000000 layers"),
            (GPT | {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon nan"),
            (NEOX | {"hidden_size": 10, "rotary_pct": 1.0}, "6 dimensions to rotate in heads of width 5"),
            (GPT | {"scale_attn_weights": False}, "scale_attn_weights False"),
            (GPT | {"add_cross_attention": True}, "add_cross_attention True"),
            (GPT | {"activation_function": "relu"}, "activation_function 'relu'"),
            (NEOX | {"hidden_act": "silu"}, "hidden_act 'silu'"),
            (GPT | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
            (NEOX | {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
            (NEOX | {"rope_scaling": {"type": "linear"}}, "rope_type 'linear'")]:
        (tmp_path / "config.json").write_text(json.dumps(content))
        if problem:
            refused(tmp_path, "config.json.*" + problem)
        else:
            assert models.build(tmp_path)(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_tensors_that_do_not_fit(tmp_path):
    """Each by its name: a model with one tensor missing or of NaN would run, and be wrong."""
    norm = "transformer.ln_f.weight"
    for architecture, change, message in [
            ("gpt2", lambda t: {n: x for n, x in t.items() if "h.1.ln_2" not in n},
             "lacks 2 of its tensors, such as transformer.h.1.ln_2.weight"),
            ("neox", lambda t: t | {"gpt_neox.layers.3.mlp.dense_4h_to_h.bias": torch.ones(32)},
             "layers.3.mlp.dense_4h_to_h.bias has no place"),
            ("gpt2", lambda t: t | {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)},
             r"c_attn.weight is torch.float32 \[96, 32\], not floats \[32, 96\]"),
            ("gpt2", lambda t: t | {norm: torch.ones(32, dtype=torch.int8)}, "ln_f.weight is torch.int8"),
            ("gpt2", lambda t: t | {norm: t[norm].put_(torch.tensor(0), torch.tensor(math.nan))},
             "ln_f.weight holds NaN or infinity"),
            ("gpt2", lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1},
             "(lm_head|wte).weight differs from the tensor to which config.json ties it")]:
        rewrite(reference(tmp_path, architecture), change)
        refused(tmp_path, message)


def test_files_that_are_missing_and_texts_that_are_too_long(gpt2, tmp_path):
    refused(tmp_path / "nowhere", "no folder .*nowhere")
    (gpt2 / "pytorch_model.bin").write_bytes(b"not weights")  # safetensors come first
    with pytest.raises(InputError, match="25 tokens, but this model has 24 positions"):
        load(gpt2)(some_ids(L=CONTEXT + 1))
    into_shards_of_bin(gpt2)
    (gpt2 / "pytorch_model.bin").unlink()
    shard = next(gpt2.glob("*-00002-of-*"))
    shard.unlink()
    refused(gpt2, f"gpt2 has no {shard.name}")


# ---------------------------------------------------------------------------------------- memory
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_bfloat16_teacher_is_never_held_in_float32(run, tmp_path):
    """Peak memory is that of the weights and little more; a float32 copy would add twice as much."""
    GPT2(Config(**SHAPE)).save(tmp_path / "narrow")
    for form in ("safetensors", "bin"):
        GPT2(Config(**SHAPE | {"width": 768})).save(tmp_path / form)
    into_bin(tmp_path / "bin")
    (tmp_path / "script.py").write_text("""
import torch
from model import load

def peak():
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

load("narrow", dtype=torch.bfloat16)  # imports what it needs
before = peak()
for form in ("safetensors", "bin"):
    model = load(form, dtype=torch.bfloat16)
    print((peak() - before) / sum(2 * p.numel() for p in model.parameters()))
    del model
""")
    result = run(tmp_path / "script.py")
    assert result.returncode == 0, result.stderr
    safetensors, pickled = map(float, result.stdout.split())
    assert safetensors < 1.3
    assert pickled < (1.3 if torch.__version__ >= "2.8" else 2), "torch 2.6 reads more of a .bin at a time"


# ---------------------------------------------------------------------------------------- the real Hub
@pytest.mark.hub
def test_published_text_of_gpt2(real_hub, run, tmp_path):
    (tmp_path / "script.py").write_text("""
import torch
from model import load
print(load("gpt2").generate(torch.tensor([[464, 3290]]), 18)[0].tolist())
""")
    result = run(tmp_path / "script.py", **real_hub)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688,
                                         290, 2688, 27262, 13, 198, 198, 464, 3290]
