"""GPT-2 and GPT-NeoX (Pythia) by hand; the Hub's checkpoints come in, ordinary Hub checkpoints go out.

Read in this order:
  Config                  the shape of a model, with the same names for both architectures
  Attention, MLP, Block   one pre-norm transformer layer, the same code for both
  GPT                     what both share around the layers: head, key-value cache, generation, saving
  GPT2, GPTNeoX           what differs; hold the two against each other
  TENSORS, FIELDS         the names in checkpoints and in config.json, as data
  load, student_from      checkpoint -> model, and teacher -> student

Shapes: B batch, L tokens of a sequence, C width, H heads, D = C / H width of a head, V vocabulary,
R the part of D that is rotated.
References: GPT-2 (Radford et al. 2019), GPT-NeoX-20B (Black et al. 2022, arXiv 2204.06745).
"""
import functools
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from support.cli import InputError, reading
from support.files import replaced
from support.hub import need, read_json, read_tensors, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # what --precision calls them

# What config.json calls an activation -> what PyTorch calls that form of the GELU.
GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass
class Config:
    """The shape of a GPT. FIELDS, below, has config.json's names of the same things."""
    vocab_size: int  # V, often padded: more rows than the tokenizer has tokens
    context: int  # how many tokens the model can look at
    width: int  # C, of the stream that runs through all layers
    n_layer: int
    n_head: int
    mlp_width: int | None = None  # of the hidden layer of the MLP; None: 4 * width
    activation: str = "gelu_new"  # a key of GELU
    norm_eps: float = 1e-5
    tied_head: bool = True  # the output head is the embedding matrix itself
    eos: int | list | None = None  # id of the end-of-text token, or several
    inverse_layer_scale: bool = False  # GPT-2: attention scores of layer i are also divided by i + 1
    parallel: bool = False  # GPT-NeoX: attention and MLP read the same input
    attention_bias: bool = True
    rotary_share: float = 0.0  # GPT-NeoX: the share of each head's dimensions that is rotated
    rotary_base: float = 10000.0

    def __post_init__(self):
        if self.mlp_width is None:
            self.mlp_width = 4 * self.width
        if self.n_layer > 500:  # building millions would take hours
            raise ValueError(f"{self.n_layer} layers are more than any model has")
        if self.width % self.n_head:
            raise ValueError(f"a width of {self.width} cannot be divided among {self.n_head} attention heads")

        # Rotated dimensions come in pairs, so an odd number of them is rounded up.
        pairs = math.ceil(self.rotary_dim / 2)
        if 2 * pairs > self.head_width:
            raise ValueError(f"{2 * pairs} dimensions to rotate in heads of width {self.head_width}")

    @property
    def head_width(self):
        """D."""
        return self.width // self.n_head

    @property
    def rotary_dim(self):
        """R."""
        return int(self.head_width * self.rotary_share)


# ----------------------------------------------------------------------------------------- one layer
class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.width, 3 * config.width, config.attention_bias)
        self.out = nn.Linear(config.width, config.width, config.attention_bias)
        self.dropout = nn.Dropout(0.0)  # of attention weights

        # Scores are divided by sqrt(D). Stanford's GPT-2 divides those of layer i by i + 1 as well.
        self.scale = config.head_width**-0.5
        if config.inverse_layer_scale:
            self.scale /= layer + 1

    def forward(self, x, rotary=None, cache=None, past=0):
        """x (B, L, C) -> (B, L, C). `cache` (2, B, H, room, D) holds keys and values of `past` tokens, and
        those of x are added to it."""
        B, L, C = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.n_head, -1)  # (B, L, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, D)

        if rotary is not None:
            q = rotate(q, *rotary)
            k = rotate(k, *rotary)

        if cache is not None:
            cache[0, :, :, past:past + L] = k
            cache[1, :, :, past:past + L] = v
            k, v = cache[:, :, :, :past + L]  # each (B, H, past + L, D)

        dropout = self.dropout.p if self.training else 0.0
        if written_out_is_faster(q) and cache is None and not dropout:
            y = causal_attention(q, k, v, self.scale)  # (B, H, L, D)
        else:
            # One new token may look at all of the past, so it needs no mask. A whole text needs one, and so
            # do several new tokens: each looks at the past, at itself and at those before it.
            mask = None
            if past and L > 1:
                mask = torch.ones(L, past + L, dtype=torch.bool, device=x.device).tril(past)
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=L > 1 and not past, scale=self.scale)  # (B, H, L, D)
        return self.out(y.transpose(1, 2).reshape(B, L, C))


def causal_attention(q, k, v, scale):
    """softmax(q k^T * scale) v, in which each token looks at itself and at all tokens before it.

    q, k, v (B, H, L, D) -> (B, H, L, D). This is what attention is; PyTorch's scaled_dot_product_attention
    computes the same. It goes over blocks of queries, as a query needs no keys beyond the end of its block.
    """
    L = q.size(2)
    mask = causal_mask(L, q.dtype)  # (L, L)
    block = max(128, L // 4)
    parts = []
    for start in range(0, L, block):
        end = min(start + block, L)
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2) * scale  # (B, H, queries, keys)
        weights = (scores + mask[start:end, :end]).softmax(-1)  # how much of each token to take
        parts.append(weights @ v[:, :, :end])
    return torch.cat(parts, 2)


@functools.cache
def causal_mask(L, dtype):
    """(L, L): 0 where the query of a row may look at the key of a column, -inf where the key comes later.

    It is kept, as making it takes as long as what attention in blocks saves.
    """
    return torch.full((L, L), -torch.inf, dtype=dtype).triu(1)


def written_out_is_faster(q):
    """On a CPU with bf16, it takes 0.65 of the time of PyTorch's kernel (docs/speed.md). But autograd keeps
    the weights of all pairs of tokens, which would cost too much memory in training on long texts."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    return q.size(2) <= 512 or not q.requires_grad


def rotate(x, cos, sin):
    """Rotary position (Su et al. 2021, arXiv 2104.09864): turn the first R of x's D dimensions.

    x (B, H, L, D); cos, sin (L, R / 2). Dimension i is paired with i + R / 2 ("half-split"), and each pair is
    turned like a point in the plane, by an angle that grows with the token's position.
    """
    half = cos.size(-1)
    a = x[..., :half]
    b = x[..., half:2 * half]
    rest = x[..., 2 * half:]

    turned_a = (a * cos - b * sin).to(x.dtype)
    turned_b = (b * cos + a * sin).to(x.dtype)
    return torch.cat((turned_a, turned_b, rest), -1)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, applied to each token separately."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.gelu_form = GELU[config.activation]

    def forward(self, x):
        """x (B, L, C) -> (B, L, C)."""
        return self.down(F.gelu(self.up(x), approximate=self.gelu_form))


class Block(nn.Module):
    """One pre-norm layer: attention and MLP each read the normalised stream and add what they found to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(0.0)  # of what is added to the stream

    def forward(self, x, rotary=None, cache=None, past=0):
        """x (B, L, C) -> (B, L, C); see Attention for the rest."""
        attended = x + self.dropout(self.attention(self.norm1(x), rotary, cache, past))

        # Sequential (GPT-2): the MLP sees what attention found. Parallel (Pythia): both see the same x.
        mlp_input = x if self.parallel else attended
        return attended + self.dropout(self.mlp(self.norm2(mlp_input)))


# ----------------------------------------------------------------------------------------- both models
def likeliest(logits):
    """Greedy choice: logits (B, V) -> the likeliest token of each (B, 1)."""
    return logits.argmax(-1, keepdim=True)


class GPT(nn.Module):
    """Blocks between an embedding and a head. Subclasses define the position encoding and what is on disk:

      embed_at(ids, past)      ids (B, L) that follow `past` tokens -> stream (B, L, C), and what `rotate`
                               needs or None
      from_disk(name, tensor)  a tensor as checkpoints store it -> as we do; `name` is ours
      to_disk(name, tensor)    the inverse
    """

    # Each subclass sets these.
    MODEL_TYPE: str  # in config.json; the column of TENSORS and of FIELDS with its names
    HF_CLASS: str  # its class in transformers
    DEFAULTS: dict  # values of Config's fields that config.json may leave out

    @classmethod
    def config(cls, **fields):
        """A Config with this architecture's defaults: GPT2.config(n_layer=6)."""
        return Config(**{**cls.DEFAULTS, **fields})

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.context = config.context
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(0.0)  # of the embeddings
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.head = None
        if not config.tied_head:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def initialise(self):
        """Fresh weights as GPT-2's: std 0.02, but over sqrt(2 * n_layer) in the 2 * n_layer matrices that
        add to the stream, so that its size does not grow with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=0.02 * (2 * len(self.blocks)) ** -0.5)
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head_weight(self):
        """(V, C); a tied head is the embedding itself."""
        return self.embed.weight if self.head is None else self.head.weight

    def set_dropout(self, p, attention_p):
        """In training: `p` on embeddings and on what blocks add, `attention_p` on attention weights."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = attention_p if name.endswith("attention.dropout") else p

    def num_parameters(self):
        """How many there are; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, ids):
        """ids (B, L) -> logits (B, L, V). Training never calls this: logits of all tokens are large."""
        return F.linear(self.hidden(ids), self.head_weight)

    def hidden(self, ids, cache=None, past=0):
        """ids (B, L) -> final hidden states, after the last norm (B, L, C).

        With a `cache` that holds `past` tokens, ids follow those and are added to it.
        """
        x, rotary = self.embed_at(ids, past)
        x = self.dropout(x)  # (B, L, C)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, None if cache is None else cache[i], past)
        return self.norm(x)

    def new_cache(self, batch, room):
        """Room for the keys and values of `room` tokens: (n_layer, 2, batch, H, room, D)."""
        config = self.config
        shape = (config.n_layer, 2, batch, config.n_head, room, config.head_width)
        return self.norm.weight.new_empty(shape)

    @torch.no_grad()
    def tokens(self, ids, max_new_tokens, choose=likeliest):
        """Yield the tokens that follow ids (B, L), one for each row at a time (B, 1).

        `choose`: logits (B, V) -> tokens (B, 1); sample.py has one that draws. When the window is full its
        older half is dropped and the rest is read again, because positions in the cache cannot move.
        """
        room = min(self.context, ids.size(1) + max_new_tokens)
        cache = self.new_cache(ids.size(0), room)
        unread = ids[:, -self.context:]
        past = 0

        for _ in range(max_new_tokens):
            hidden = self.hidden(unread, cache, past)[:, -1]  # (B, C)
            past += unread.size(1)
            unread = choose(F.linear(hidden, self.head_weight))  # (B, 1)
            ids = torch.cat((ids, unread), 1)
            yield unread

            if past == self.context:
                unread = ids[:, -max(1, self.context // 2):]
                past = 0

    def generate(self, ids, max_new_tokens, choose=likeliest):
        """ids (B, L) -> (B, L + max_new_tokens), greedily or as `choose` says."""
        return torch.cat((ids, *self.tokens(ids, max_new_tokens, choose)), 1)

    def checkpoint_names(self):
        """{name of our tensor: its name in checkpoints}, from TENSORS."""
        theirs = {}
        for ours, both in TENSORS.items():
            for i in range(len(self.blocks)):
                theirs[ours.format(i)] = getattr(both, self.MODEL_TYPE).format(i)

        names = {}
        for name in self.state_dict():
            module, dot, leaf = name.rpartition(".")  # leaf: "weight" or "bias"
            names[name] = theirs[module] + dot + leaf
        return names

    def save(self, folder):
        """The inverse of `load`: model.safetensors, generation_config.json, config.json, as on the Hub.

        Each file is replaced as a whole, config.json last, so that a reader never finds half a model.
        """
        state = self.state_dict()
        tensors = {theirs: self.to_disk(ours, state[ours]).contiguous()
                   for ours, theirs in self.checkpoint_names().items()}
        with replaced(Path(folder, "model.safetensors")) as file:
            save_file(tensors, file, {"format": "pt"})

        eos = self.config.eos
        bos = (eos or [None])[0] if isinstance(eos, list) else eos  # GPTs begin a text with what ends one
        ends = {"bos_token_id": bos, "eos_token_id": eos}
        config = {
            "architectures": [self.HF_CLASS],
            "model_type": self.MODEL_TYPE,
            "torch_dtype": str(self.embed.weight.dtype).removeprefix("torch."),
        }
        for name, value in asdict(self.config).items():
            if theirs := getattr(FIELDS[name], self.MODEL_TYPE):
                config[theirs] = value
        if "n_positions" in config:
            config["n_ctx"] = config["n_positions"]  # an older name, which llama.cpp's converter needs
        for name, content in (("generation_config.json", ends), ("config.json", config | ends)):
            with replaced(Path(folder, name)) as file:
                file.write_text(json.dumps(content, indent=2) + "\n")


# ----------------------------------------------------------------------------------------- what differs
class GPT2(GPT):
    """Learned positions, sequential residual, tanh GELU, tied head."""
    MODEL_TYPE = "gpt2"
    HF_CLASS = "GPT2LMHeadModel"
    DEFAULTS = {"vocab_size": 50257, "context": 1024, "width": 768, "n_layer": 12, "n_head": 12, "eos": 50256}

    def __init__(self, config):
        super().__init__(config)
        self.positions = nn.Embedding(config.context, config.width)
        self.initialise()

    def embed_at(self, ids, past):
        """ids (B, L) -> (B, L, C): a vector for the position is added to that of the token, once, here."""
        end = past + ids.size(1)
        if end > self.context:
            raise InputError(f"{end} tokens, but this model has {self.context} positions: pass fewer")
        positions = torch.arange(past, end, device=ids.device)
        return self.embed(ids) + self.positions(positions), None

    def from_disk(self, name, tensor):
        """GPT-2 stores weights of linear layers as (in, out); ours are PyTorch's (out, in)."""
        linear = name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
        return tensor.t() if linear else tensor

    to_disk = from_disk  # transposing twice changes nothing


class GPTNeoX(GPT):
    """Rotary positions, parallel residual, exact GELU, a head of its own."""
    MODEL_TYPE = "gpt_neox"
    HF_CLASS = "GPTNeoXForCausalLM"
    DEFAULTS = {"activation": "gelu", "tied_head": False, "eos": 0, "parallel": True, "rotary_share": 0.25}

    def __init__(self, config):
        super().__init__(config)
        self.initialise()

    def embed_at(self, ids, past):
        """ids (B, L) -> (B, L, C), and how far each layer turns its queries and keys: cosine and sine of
        position * frequency, each (L, R / 2), in float32. An odd R is rounded up."""
        positions = torch.arange(past, past + ids.size(1), device=ids.device)  # (L,)
        rotary_dim = self.config.rotary_dim
        exponents = torch.arange(0, rotary_dim, 2, device=ids.device) / rotary_dim  # (R / 2,)
        frequencies = 1 / self.config.rotary_base**exponents
        angles = positions[:, None] * frequencies  # (L, R / 2)
        return self.embed(ids), (angles.cos(), angles.sin())

    def from_disk(self, name, tensor):
        """GPT-NeoX stores q, k, v head by head: rows (H, 3, D); ours are (3, H, D), as in GPT-2."""
        if ".qkv." not in name:
            return tensor
        return tensor.unflatten(0, (self.config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)

    def to_disk(self, name, tensor):
        if ".qkv." not in name:
            return tensor
        return tensor.unflatten(0, (3, self.config.n_head, -1)).transpose(0, 1).flatten(0, 2)


# ----------------------------------------------------------------------------------------- names on disk
class Names(NamedTuple):
    """What the files of the two architectures call a thing; "" if one has no such thing."""
    gpt2: str
    gpt_neox: str


TENSORS = {  # by our module
    "embed": Names("transformer.wte", "gpt_neox.embed_in"),
    "positions": Names("transformer.wpe", ""),
    "blocks.{}.norm1": Names("transformer.h.{}.ln_1", "gpt_neox.layers.{}.input_layernorm"),
    "blocks.{}.attention.qkv": Names("transformer.h.{}.attn.c_attn",
                                     "gpt_neox.layers.{}.attention.query_key_value"),
    "blocks.{}.attention.out": Names("transformer.h.{}.attn.c_proj", "gpt_neox.layers.{}.attention.dense"),
    "blocks.{}.norm2": Names("transformer.h.{}.ln_2", "gpt_neox.layers.{}.post_attention_layernorm"),
    "blocks.{}.mlp.up": Names("transformer.h.{}.mlp.c_fc", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    "blocks.{}.mlp.down": Names("transformer.h.{}.mlp.c_proj", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "norm": Names("transformer.ln_f", "gpt_neox.final_layer_norm"),
    "head": Names("lm_head", "embed_out"),
}
PREFIX = r"^(transformer|gpt_neox)\."  # which some files lack, such as those of `gpt2`
IGNORED = r"(^|\.)(attn|attention)\.(bias|masked_bias|rotary_emb\.inv_freq)$"  # causal masks, frequencies


FIELDS = {  # what config.json calls a field of Config; "" if it has no such field
    "vocab_size": Names("vocab_size", "vocab_size"),
    "context": Names("n_positions", "max_position_embeddings"),
    "width": Names("n_embd", "hidden_size"),
    "n_layer": Names("n_layer", "num_hidden_layers"),
    "n_head": Names("n_head", "num_attention_heads"),
    "mlp_width": Names("n_inner", "intermediate_size"),
    "activation": Names("activation_function", "hidden_act"),
    "norm_eps": Names("layer_norm_epsilon", "layer_norm_eps"),
    "tied_head": Names("tie_word_embeddings", "tie_word_embeddings"),
    "eos": Names("eos_token_id", "eos_token_id"),
    "inverse_layer_scale": Names("scale_attn_by_inverse_layer_idx", ""),
    "parallel": Names("", "use_parallel_residual"),
    "attention_bias": Names("", "attention_bias"),
    "rotary_share": Names("", "rotary_pct"),
    "rotary_base": Names("", "rotary_emb_base"),
}
ROTARY_NAMES = {  # what Llama and transformers 5 call a rotary setting: what the Hub's Pythias call it
    "partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base", "type": "rope_type"}
ARCHITECTURES = {"gpt2": GPT2, "gpt_neox": GPTNeoX}
IMPLEMENTED = {  # options of config.json that change what is computed: the values that we have
    "model_type": [*ARCHITECTURES], "activation_function": [*GELU], "hidden_act": [*GELU],
    "rope_type": ["default"], "scale_attn_weights": [True], "add_cross_attention": [False],
    "quantization_config": [None]}


def read_config(path):
    """config.json -> (GPT2 or GPTNeoX, Config). InputError names what we cannot compute."""
    with reading(path, "a config.json of GPT-2 or GPT-NeoX"):
        raw = {"model_type": None} | with_rotary_names(read_json(path))
        for option, values in IMPLEMENTED.items():
            if option in raw and raw[option] not in values:
                raise ValueError(f"{option} {raw[option]!r:.99} is not implemented, only {values}")

        kind = raw["model_type"]
        given = {}
        for name, both in FIELDS.items():
            theirs = getattr(both, kind)
            if theirs in raw:
                check_value(theirs, raw[theirs], Config.__annotations__[name])
                given[name] = raw[theirs]
        return ARCHITECTURES[kind], ARCHITECTURES[kind].config(**given)


def with_rotary_names(raw):
    """config.json with its rotary settings under the names of the Hub's Pythias.

    Others write {"rope_theta": 10000.0}, or {"rope_parameters": {"rope_theta": 10000.0}}, which comes first.
    """
    group = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    renamed, renamed_group = [{ROTARY_NAMES.get(name, name): value for name, value in settings.items()}
                              for settings in (raw, group)]
    return renamed | raw | renamed_group


def check_value(name, value, wanted):
    """ValueError if a value is not of its field's type, or a number that no model has.

    JSON's types are not Python's: True is an int there, 2.0 is not a number of heads, and json reads NaN.
    """
    kinds = (float, int) if wanted is float else get_args(wanted) or (wanted,)
    if type(value) not in kinds:
        types = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} {value!r:.50} must be of type {types}")
    low = 1 if wanted is int else 0
    if type(value) in (int, float) and not low <= value <= 10**7:  # also refuses NaN
        raise ValueError(f"{name} {value!r:.50} must be from {low} to 10 million")


# ----------------------------------------------------------------------------------------- checkpoints
def build(name_or_dir):
    """A model of the shape that config.json describes, with fresh weights."""
    architecture, config = read_config(need(name_or_dir, "config.json"))
    return architecture(config)


def load(name_or_dir, device="cpu", dtype=torch.float32):
    """A model in eval mode, from the Hub (`gpt2`, `EleutherAI/pythia-70m`, ...) or from a folder.

    Tensors are converted one by one, so the peak of memory is the model in `dtype` and one tensor. InputError
    names what does not fit: a tensor (missing, unexpected, of another shape, not finite), an option, a file.
    """
    with torch.device("meta"):  # shapes alone, without memory
        model = build(name_or_dir)
    empty = model.state_dict()
    names = model.checkpoint_names()
    ours = {re.sub(PREFIX, "", theirs): name for name, theirs in names.items()}
    head = getattr(TENSORS["head"], model.MODEL_TYPE) + ".weight"
    ours.setdefault(head, "embed.weight")  # some hold a tied head, too

    state = {}
    for path in weight_files(name_or_dir):
        for theirs, tensor in read_tensors(path):
            name = ours.get(re.sub(PREFIX, "", theirs))
            if name is None and re.search(IGNORED, theirs):
                continue
            if name is None:
                raise InputError(f"{path}: {theirs} has no place in the model that config.json describes")

            shape = model.to_disk(name, empty[name]).shape
            if tensor.shape != shape or not tensor.is_floating_point():
                found = f"{tensor.dtype} {[*tensor.shape]}"
                raise InputError(f"{path}: {theirs} is {found}, not floats {[*shape]}")
            ready = torch.empty(empty[name].shape, dtype=dtype, device=device)
            ready.copy_(model.from_disk(name, tensor))

            # The two extremes show NaN and infinity, without a copy of the tensor.
            low, high = torch.aminmax(ready)
            if not math.isfinite(low.item() + high.item()):
                raise InputError(f"{path}: {theirs} holds NaN or infinity in {dtype}: broken weights")
            if name in state and not torch.equal(state[name], ready):
                raise InputError(f"{path}: {theirs} differs from the tensor to which config.json ties it")
            state[name] = ready

    if missing := [names[name] for name in names if name not in state]:
        raise InputError(f"{name_or_dir} lacks {len(missing)} of its tensors, such as {missing[0]}")
    model.load_state_dict(state, assign=True)
    return model.eval()


# ----------------------------------------------------------------------------------------- students
def spread_layers(n_teacher, n_student):
    """Evenly spread layers with the first and the last: (12, 6) -> [0, 2, 4, 7, 9, 11], as DistilGPT2's."""
    if not 1 <= n_student <= n_teacher:
        raise InputError(f"{n_student} student layers of a teacher with {n_teacher}: choose 1 to {n_teacher}")
    return [round(i * (n_teacher - 1) / max(1, n_student - 1)) for i in range(n_student)]


def student_from(teacher, layers):
    """A new model with copies of the teacher's blocks `layers`, and of all that surrounds the blocks."""
    if not layers or not set(layers) <= set(range(len(teacher.blocks))):
        raise InputError(f"layers {layers} of a teacher whose layers are 0 to {len(teacher.blocks) - 1}")
    config = replace(teacher.config, n_layer=len(layers))
    student = type(teacher)(config).to(teacher.embed.weight)  # on its device, in its dtype

    for name, module in student.named_children():
        if name != "blocks":
            module.load_state_dict(getattr(teacher, name).state_dict())
    for block, i in zip(student.blocks, layers, strict=True):
        block.load_state_dict(teacher.blocks[i].state_dict())

    if config.inverse_layer_scale:  # a layer that moved forward divides by less, so its queries shrink
        for new, old in enumerate(layers):
            for parameter in student.blocks[new].attention.qkv.parameters():
                parameter.data[:config.width] *= (new + 1) / (old + 1)
    return student
