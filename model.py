"""GPT-2 and GPT-NeoX (Pythia) by hand; the Hub's checkpoints come in, ordinary Hub checkpoints go out.

Read in this order:
  Attention, MLP, Block   one pre-norm transformer layer, the same code for both architectures
  GPT                     what both share around the layers: head, key-value cache, generation, saving
  GPT2, GPTNeoX           what differs; hold the two against each other
  load, student_from      checkpoint -> model, and teacher -> student

Shapes: B batch, T tokens, C width, H heads, D = C / H head width, V vocabulary, R rotated part of D.

References: GPT-2 (Radford et al. 2019), GPT-NeoX-20B (Black et al. 2022, arXiv 2204.06745), rotary embedding (Su et al.
2021, arXiv 2104.09864). Field names of the two configs are those of the Hub's config.json.
"""
import json
import math
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import InputError, fetch

tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": tanh_gelu, "gelu_fast": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu}


# ---------------------------------------------------------------------------------------------- one layer
class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width, n_head, bias=True):
        super().__init__()
        self.n_head = n_head
        self.dropout = 0.0  # of attention weights, in training
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x, rotary=None, cache=None):
        """x (B, T, C) -> (B, T, C). `cache` is this layer's [k, v] of the tokens before x; x is added to it."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)  # each (B, H, past + T, D)
            cache[:] = k, v
        # One new token may look at all of the past, so it needs no mask; a whole text needs the causal one.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Pre-norm layer. Sequential (GPT-2): the MLP sees attention's output. Parallel (Pythia): both read the same x."""

    def __init__(self, width, n_head, mlp_width, activation, eps, parallel=False, attention_bias=True):
        super().__init__()
        self.parallel = parallel
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, n_head, attention_bias)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_width, activation)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, rotary=None, cache=None):
        attended = self.drop(self.attention(self.norm1(x), rotary, cache))
        if self.parallel:
            return x + attended + self.drop(self.mlp(self.norm2(x)))
        x = x + attended
        return x + self.drop(self.mlp(self.norm2(x)))


def rotary_angles(position, rotary_dim, base):
    """Cosine and sine of every rotation angle: position (T,) -> two of (T, R / 2), in float32."""
    frequency = base ** -(torch.arange(0, rotary_dim, 2, device=position.device) / rotary_dim)  # (R / 2,)
    angle = torch.outer(position.float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the first R of x's D dimensions by its position; dimension i is paired with i + R / 2 ("half-split")."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), -1)


# ---------------------------------------------------------------------------------------------- both models
class GPT(nn.Module):
    """A stack of Blocks between an embedding and a head; GPT2 and GPTNeoX say how positions get in.
    """

    def __init__(self, config, width, context, blocks, eps, tied):
        super().__init__()
        self.config, self.context = config, context
        self.embed = nn.Embedding(config.vocab_size, width)
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps)
        self.head = None if tied else nn.Linear(width, config.vocab_size, bias=False)

    def initialise(self):
        """GPT-2's: normal(0, 0.02), and 1 / sqrt(residual branches) of that for what is added to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def head_weight(self):
        """(V, C); a tied head is the embedding itself."""
        return self.embed.weight if self.head is None else self.head.weight

    def set_dropout(self, p, attention_p):
        """Dropout in training: `p` on embeddings and both residual branches, `attention_p` on attention weights."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, Attention):
                module.dropout = attention_p

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        return F.linear(self.hidden(ids), self.head_weight)

    def hidden(self, ids, cache=None):
        """ids (B, T) -> final hidden states after the last norm (B, T, C).

        With `cache` (one list a layer, empty at first), `ids` continue the tokens already in it, and are added to it:
        any number of tokens into an empty cache, one at a time after that.
        """
        past = cache[0][0].size(2) if cache and cache[0] else 0
        x, rotary = self.embed_at(ids, past)  # (B, T, C)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, None if cache is None else cache[i])
        return self.norm(x)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """ids (B, T) -> (B, T + max_new_tokens), sampled token by token with a key-value cache.

        Greedy at temperature 0. A text longer than the context goes on in a sliding way: when the window is full, its
        older half is dropped and the rest is read again (positions are absolute, so a cache cannot be shifted).
        """
        cache, unread = [[] for _ in self.blocks], ids[:, -self.context:]
        for _ in range(max_new_tokens):
            last = self.hidden(unread, cache)[:, -1]  # (B, C)
            unread = sample(F.linear(last, self.head_weight).float(), temperature, top_k, top_p, generator)
            ids = torch.cat((ids, unread), 1)
            if cache[0][0].size(2) == self.context:
                cache, unread = [[] for _ in self.blocks], ids[:, -max(1, self.context // 2):]
        return ids

    def checkpoint_names(self):
        """{our parameter name: its name on the Hub}, from the class's NAMES."""
        def theirs(ours):
            module, _, leaf = ours.rpartition(".")
            layer = re.findall(r"\.(\d+)\.", module)
            return self.NAMES[re.sub(r"\.\d+\.", ".{}.", module)].format(*layer) + "." + leaf
        return {ours: theirs(ours) for ours in self.state_dict()}

    def save(self, folder):
        """Write config.json, generation_config.json and model.safetensors: the inverse of `load`, readable by transformers."""
        from safetensors.torch import save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        tensors = {theirs: self.layout(ours, state[ours], saving=True).contiguous().cpu()
                   for ours, theirs in self.checkpoint_names().items()}
        config = {"architectures": [self.HF_CLASS], "model_type": self.MODEL_TYPE, **asdict(self.config),
                  "torch_dtype": str(self.embed.weight.dtype).removeprefix("torch.")}
        eos = {"bos_token_id": self.config.eos_token_id, "eos_token_id": self.config.eos_token_id}
        for name, content in (("config.json", config | eos), ("generation_config.json", eos)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")


def sample(logits, temperature, top_k, top_p, generator=None):
    """Logits (B, V) -> one token each (B, 1). top_p keeps the fewest tokens whose probabilities reach it."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        descending, order = logits.sort(descending=True)
        p = descending.softmax(-1)
        descending[p.cumsum(-1) - p >= top_p] = -torch.inf  # what stands before it already suffices
        logits = torch.empty_like(logits).scatter(-1, order, descending)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# ---------------------------------------------------------------------------------------------- GPT-2
@dataclass
class GPT2Config:
    """The fields of a GPT-2 config.json in which checkpoints differ; the defaults are `gpt2` (124M)."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int = 50256


class GPT2(GPT):
    """Learned positions, sequential residual, tied head."""
    MODEL_TYPE, HF_CLASS, DEPTH, PREFIX = "gpt2", "GPT2LMHeadModel", "n_layer", "transformer."
    NAMES = {  # ours: the checkpoint's
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "blocks.{}.norm1": "transformer.h.{}.ln_1",
        "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
        "blocks.{}.norm2": "transformer.h.{}.ln_2",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
    }
    IGNORED = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|transformer\.lm_head\.weight|lm_head\.weight"
    ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
            "add_cross_attention": False, "tie_word_embeddings": True}

    def __init__(self, config):
        c = config
        blocks = [Block(c.n_embd, c.n_head, 4 * c.n_embd, c.activation_function, c.layer_norm_epsilon)
                  for _ in range(c.n_layer)]
        super().__init__(c, c.n_embd, c.n_positions, blocks, c.layer_norm_epsilon, tied=True)
        self.positions = nn.Embedding(c.n_positions, c.n_embd)
        self.initialise()

    def embed_at(self, ids, past):
        """ids (B, T), after `past` tokens -> (B, T, C); the position is added to the token, once, here."""
        end = past + ids.size(1)
        if end > self.context:
            raise InputError(f"{end} tokens, but this model has {self.context} positions")
        return self.embed(ids) + self.positions(torch.arange(past, end, device=ids.device)), None

    def layout(self, name, tensor, saving):
        """GPT-2 stores the weights of linear layers as (in, out); ours are PyTorch's (out, in)."""
        linear = name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
        return tensor.t() if linear else tensor


# ---------------------------------------------------------------------------------------------- GPT-NeoX
@dataclass
class GPTNeoXConfig:
    """The fields of a GPT-NeoX config.json in which checkpoints differ."""
    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rotary_pct: float = 0.25  # the share of each head's dimensions that is rotated
    rotary_emb_base: float = 10000.0
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: int = 0


class GPTNeoX(GPT):
    """Rotary positions, parallel residual (a sequential one exists), exact GELU, untied head."""
    MODEL_TYPE, HF_CLASS, DEPTH, PREFIX = "gpt_neox", "GPTNeoXForCausalLM", "num_hidden_layers", "gpt_neox."
    NAMES = {  # ours: the checkpoint's
        "embed": "gpt_neox.embed_in",
        "blocks.{}.norm1": "gpt_neox.layers.{}.input_layernorm",
        "blocks.{}.attention.qkv": "gpt_neox.layers.{}.attention.query_key_value",
        "blocks.{}.attention.out": "gpt_neox.layers.{}.attention.dense",
        "blocks.{}.norm2": "gpt_neox.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "blocks.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    IGNORED = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    ONLY = {"rope_scaling": None}

    def __init__(self, config):
        c = config
        blocks = [Block(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps,
                        parallel=c.use_parallel_residual, attention_bias=c.attention_bias)
                  for _ in range(c.num_hidden_layers)]
        super().__init__(c, c.hidden_size, c.max_position_embeddings, blocks, c.layer_norm_eps, c.tie_word_embeddings)
        self.rotary_dim = int(c.hidden_size // c.num_attention_heads * c.rotary_pct)
        self.initialise()

    def embed_at(self, ids, past):
        """ids (B, T), after `past` tokens -> (B, T, C) and the angles by which every layer turns its queries and keys."""
        position = torch.arange(past, past + ids.size(1), device=ids.device)
        return self.embed(ids), rotary_angles(position, self.rotary_dim, self.config.rotary_emb_base)

    def layout(self, name, tensor, saving):
        """GPT-NeoX stores q, k, v head by head: rows (H, 3, D); ours are (3, H, D), as in GPT-2."""
        if ".qkv." not in name:
            return tensor
        outer, inner = (3, self.config.num_attention_heads) if saving else (self.config.num_attention_heads, 3)
        return tensor.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


# ---------------------------------------------------------------------------------------------- checkpoints
ARCHITECTURES = {"gpt2": (GPT2, GPT2Config), "gpt_neox": (GPTNeoX, GPTNeoXConfig)}


def load(name_or_dir, device="cpu", dtype=torch.float32):
    """A model in eval mode from the Hub (`gpt2`, `EleutherAI/pythia-70m`, ...) or from a folder.

    Tensors are read and converted one at a time, so the peak is the model in `dtype` plus one tensor. Strict on both
    sides: InputError names a tensor that is missing, unexpected or of another shape, an option of config.json that is
    not implemented here, a damaged file, an unknown repository.
    """
    with torch.device("meta"):
        model = build(name_or_dir)
    empty = model.state_dict()
    ours = {theirs: name for name, theirs in model.checkpoint_names().items()}
    state = {}
    for path in checkpoint_files(name_or_dir):
        for theirs, tensor in read_tensors(path):
            theirs = theirs if theirs in ours else model.PREFIX + theirs
            if theirs in ours:
                name, tensor = ours[theirs], model.layout(ours[theirs], tensor, saving=False)
                if tensor.shape != empty[name].shape:
                    raise InputError(f"{path}: {theirs} has shape {tuple(tensor.shape)} where the model of its config.json "
                                     f"has {tuple(empty[name].shape)}")
                state[name] = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
            elif not re.fullmatch(model.IGNORED, theirs):
                raise InputError(f"{path}: tensor {theirs.removeprefix(model.PREFIX)} has no place in {type(model).__name__}")
    if missing := [theirs for theirs in ours if ours[theirs] not in state]:
        raise InputError(f"{name_or_dir}: the checkpoint has no tensor {', '.join(missing[:3])} ({len(missing)} missing)")
    model.load_state_dict(state, assign=True)
    return model.eval()


def build(name_or_dir):
    """A model of the shape that config.json says, with fresh weights."""
    path = fetch(name_or_dir, "config.json")
    try:
        raw = json.loads(path.read_text("utf-8"))
        kind = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a model's config.json ({error})") from error
    if kind not in ARCHITECTURES:
        raise InputError(f"{name_or_dir} is a {kind!r} model; supported are {' and '.join(ARCHITECTURES)} (GPT-2, Pythia, ...)")
    model_class, config_class = ARCHITECTURES[kind]
    rope = raw.get("rope_parameters") or {}  # how transformers 5 writes what the Hub has as rotary_pct, rotary_emb_base
    for theirs, ours in (("partial_rotary_factor", "rotary_pct"), ("rope_theta", "rotary_emb_base")):
        raw[ours] = rope.get(theirs, raw.get(ours, getattr(config_class, ours, None)))
    options = [(k, raw[k], v) for k, v in model_class.ONLY.items() if raw.get(k, v) != v]
    options += [("rope_type", v, "default") for v in [rope.get("rope_type", "default")] if v != "default"]
    for option, value, only in options:
        raise InputError(f"{path}: {option} = {value!r} is not implemented (only {only!r})")
    given = {f.name: raw[f.name] for f in fields(config_class) if f.name in raw}
    try:
        config = config_class(**given)
    except TypeError as error:
        raise InputError(f"{path}: {error}") from error
    activation = given.get("activation_function") or given.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(f"{path}: activation {activation!r} is not implemented (only {', '.join(ACTIVATIONS)})")
    return model_class(config)


def checkpoint_files(name_or_dir):
    """The files with the weights: safetensors before .bin, one file before shards."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if path := fetch(name_or_dir, whole, required=False):
            return [path]
        if path := fetch(name_or_dir, whole + ".index.json", required=False):
            return [fetch(name_or_dir, shard) for shard in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
    raise InputError(f"{name_or_dir} has no weights: neither model.safetensors nor pytorch_model.bin, nor their shards")


def read_tensors(path):
    """Yield (name, tensor) from one checkpoint file, tensor by tensor and without executing pickled code."""
    from safetensors import SafetensorError, safe_open
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                names = list(f.keys())
            for name in names:  # opened anew for each: closing gives the memory-mapped pages of the last one back
                with safe_open(path, "pt") as f:
                    yield name, f.get_tensor(name)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            yield from ((name, state[name]) for name in list(state) if isinstance(state[name], torch.Tensor))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError, TypeError) as error:
        raise InputError(f"{path} does not hold readable weights ({str(error).splitlines()[0]}); "
                         "if the file was cut short, delete it and fetch it again") from error


# ---------------------------------------------------------------------------------------------- students
def spread_layers(n_teacher, n_student):
    """Evenly spread teacher layers, first and last included: (12, 6) -> [0, 2, 4, 7, 9, 11], DistilGPT2's own choice."""
    if not 1 <= n_student <= n_teacher:
        raise InputError(f"{n_student} student layers of a teacher with {n_teacher}: choose 1 to {n_teacher}")
    return [round(i * (n_teacher - 1) / max(1, n_student - 1)) for i in range(n_student)]


def student_from(teacher, layers):
    """A new model with the teacher's embeddings, final norm and head, and copies of the teacher's blocks `layers`."""
    depth = len(teacher.blocks)
    if not layers or not all(0 <= i < depth for i in layers):
        raise InputError(f"layers {layers} of a teacher whose layers are 0 to {depth - 1}")
    student = type(teacher)(replace(teacher.config, **{teacher.DEPTH: len(layers)})).to(teacher.embed.weight)
    for name, parameter in student.named_parameters():
        source = re.sub(r"blocks\.(\d+)", lambda match: f"blocks.{layers[int(match[1])]}", name)
        parameter.data.copy_(teacher.get_parameter(source))
    return student
