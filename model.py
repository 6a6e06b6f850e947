"""GPT-2 and GPT-NeoX (Pythia) by hand; the Hub's checkpoints come in, ordinary Hub checkpoints go out.

Read in this order:
  Attention, Block        one pre-norm transformer layer, the same code for both architectures
  GPT                     what both share around the layers: head, key-value cache, generation, saving
  GPT2, GPTNeoX           what differs; hold the two against each other
  load, student_from      checkpoint -> model, and teacher -> student

Shapes: B batch, T tokens, C width, H heads, D = C / H head width, V vocabulary, R rotated part of D.
References: GPT-2 (Radford et al. 2019), GPT-NeoX-20B (Black et al. 2022, arXiv 2204.06745).
"""
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from support.cli import InputError
from support.files import replaced
from support.hub import fetch, read_tensors, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # what --precision calls them
GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


# ----------------------------------------------------------------------------------------- one layer
class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width, n_head, bias):
        super().__init__()
        if width % n_head:
            raise InputError(f"a width of {width} cannot be shared by {n_head} attention heads")
        self.n_head = n_head
        self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.drop = nn.Dropout(0.0)  # of attention weights

    def forward(self, x, rotary=None, cache=None, past=0):
        """x (B, T, C) -> (B, T, C). `cache` (2, B, H, room, D): k and v of `past` tokens, to which x's go."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            cache[0, :, :, past:past + T], cache[1, :, :, past:past + T] = k, v
            k, v = cache[:, :, :, :past + T]  # each (B, H, past + T, D)
        dropout = self.drop.p if self.training else 0.0
        # One new token may look at all of the past, so it needs no mask; a whole text needs the causal one.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


def rotate(x, cos, sin):
    """Rotary position: turn the first R of x's D dimensions; i is paired with i + R / 2 ("half-split")."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), -1)


class Block(nn.Module):
    """Pre-norm layer. Sequential (GPT-2): the MLP reads x + attention. Parallel (Pythia): both read x."""

    def __init__(self, width, eps, n_head, mlp_width, activation, parallel=False, attention_bias=True):
        super().__init__()
        self.gelu, self.parallel = GELU[activation], parallel
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = Attention(width, n_head, attention_bias)
        self.up, self.down = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, rotary=None, cache=None, past=0):
        attended = x + self.drop(self.attention(self.norm1(x), rotary, cache, past))
        h = self.up(self.norm2(x if self.parallel else attended))
        return attended + self.drop(self.down(F.gelu(h, approximate=self.gelu)))


# ----------------------------------------------------------------------------------------- both models
def likeliest(logits):
    """Greedy: logits (B, V) -> the likeliest token of each (B, 1)."""
    return logits.argmax(-1, keepdim=True)


class GPT(nn.Module):
    """Blocks between an embedding and a head; GPT2 and GPTNeoX say how positions get in (`embed_at`)."""

    def __init__(self, config, context, depth, tied, width, eps, **block):
        super().__init__()
        self.config, self.context = config, context
        self.embed, self.drop = nn.Embedding(config.vocab_size, width), nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(width, eps, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.head = None if tied else nn.Linear(width, config.vocab_size, bias=False)

    def initialise(self):
        """As GPT-2: std 0.02, over sqrt(2 * depth) in the 2 * depth matrices that end a residual branch."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            else:
                branches = 2 * len(self.blocks) if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(p, std=0.02 * branches**-0.5)

    @property
    def head_weight(self):
        """(V, C); a tied head is the embedding itself."""
        return self.embed.weight if self.head is None else self.head.weight

    def set_dropout(self, p, attention_p):
        """In training: `p` on embeddings and residual branches, `attention_p` on attention weights."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = attention_p if name.endswith("attention.drop") else p

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        return F.linear(self.hidden(ids), self.head_weight)

    def hidden(self, ids, cache=None, past=0):
        """ids (B, T) -> final hidden states after the last norm (B, T, C). With a `cache` that holds `past`
        tokens ids go on from them and are added: any number to an empty one, then one at a time."""
        x, rotary = self.embed_at(ids, past)
        x = self.drop(x)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, None if cache is None else cache[i], past)
        return self.norm(x)

    def new_cache(self, batch, room):
        """Place for the keys and values of `room` tokens: (layers, 2, batch, H, room, D)."""
        n_head, width = self.blocks[0].attention.n_head, len(self.norm.weight)
        return self.norm.weight.new_empty(len(self.blocks), 2, batch, n_head, room, width // n_head)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, choose=likeliest):
        """ids (B, T) -> (B, T + max_new_tokens). `choose`: logits (B, V) -> tokens (B, 1); see sample.py. A
        full window slides: its older half goes, the rest is read again, as absolute positions cannot move."""
        cache = self.new_cache(ids.size(0), min(self.context, ids.size(1) + max_new_tokens))
        unread, past = ids[:, -self.context:], 0
        for _ in range(max_new_tokens):
            logits = F.linear(self.hidden(unread, cache, past)[:, -1], self.head_weight)  # (B, V)
            past += unread.size(1)
            unread = choose(logits)
            ids = torch.cat((ids, unread), 1)
            if past == self.context:
                unread, past = ids[:, -max(1, self.context // 2):], 0
        return ids

    def checkpoint_names(self):
        """{name of our tensor: its name on the Hub}, from NAMES."""
        names = {ours.format(i): theirs[self.COLUMN].format(i)
                 for ours, theirs in NAMES.items() for i in range(len(self.blocks))}
        parts = [name.rpartition(".") for name in self.state_dict()]  # (module, ".", "weight" or "bias")
        return {module + dot + leaf: names[module] + dot + leaf for module, dot, leaf in parts}

    def save(self, folder):
        """The inverse of `load`: config.json, generation_config.json, model.safetensors as on the Hub."""
        state, names = self.state_dict(), self.checkpoint_names()
        tensors = {names[ours]: self.layout(ours, state[ours], saving=True).contiguous() for ours in names}
        ends = {"bos_token_id": self.config.eos_token_id, "eos_token_id": self.config.eos_token_id}
        dtype = str(self.embed.weight.dtype).removeprefix("torch.")
        config = {"architectures": [self.HF_CLASS], "model_type": self.MODEL_TYPE, "torch_dtype": dtype,
                  **asdict(self.config), **ends}
        with replaced(Path(folder, "model.safetensors")) as file:
            save_file(tensors, file, {"format": "pt"})
            file.chmod(0o644)  # safetensors makes it readable for its owner alone
        for name, content in (("generation_config.json", ends), ("config.json", config)):
            with replaced(Path(folder, name)) as file:
                file.write_text(json.dumps(content, indent=2) + "\n")


# ----------------------------------------------------------------------------------------- what differs
NAMES = {  # our module: its name in checkpoints of GPT-2, of GPT-NeoX
    "embed": ("transformer.wte", "gpt_neox.embed_in"),
    "positions": ("transformer.wpe", ""),
    "blocks.{}.norm1": ("transformer.h.{}.ln_1", "gpt_neox.layers.{}.input_layernorm"),
    "blocks.{}.attention.qkv": ("transformer.h.{}.attn.c_attn",
                                "gpt_neox.layers.{}.attention.query_key_value"),
    "blocks.{}.attention.out": ("transformer.h.{}.attn.c_proj", "gpt_neox.layers.{}.attention.dense"),
    "blocks.{}.norm2": ("transformer.h.{}.ln_2", "gpt_neox.layers.{}.post_attention_layernorm"),
    "blocks.{}.up": ("transformer.h.{}.mlp.c_fc", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    "blocks.{}.down": ("transformer.h.{}.mlp.c_proj", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "norm": ("transformer.ln_f", "gpt_neox.final_layer_norm"),
    "head": ("lm_head", "embed_out"),
}


@dataclass
class GPT2Config:
    """The fields of a GPT-2 config.json in which checkpoints differ; the defaults are `gpt2` (124M)."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    eos_token_id: int = 50256


class GPT2(GPT):
    """Learned positions, sequential residual, tanh GELU, tied head."""
    MODEL_TYPE, HF_CLASS, DEPTH, COLUMN = "gpt2", "GPT2LMHeadModel", "n_layer", 0

    def __init__(self, c: GPT2Config):
        super().__init__(c, c.n_positions, c.n_layer, c.tie_word_embeddings, c.n_embd, c.layer_norm_epsilon,
                         n_head=c.n_head, mlp_width=c.n_inner or 4 * c.n_embd,
                         activation=c.activation_function)
        self.positions = nn.Embedding(c.n_positions, c.n_embd)
        self.initialise()

    def embed_at(self, ids, past):
        """ids (B, T) after `past` tokens -> (B, T, C): the position is added to the token, once, here."""
        end = past + ids.size(1)
        if end > self.context:
            raise InputError(f"{end} tokens, but this model has {self.context} positions: pass fewer")
        return self.embed(ids) + self.positions(torch.arange(past, end, device=ids.device)), None

    def layout(self, name, tensor, saving):
        """GPT-2 stores the weights of linear layers as (in, out); ours are PyTorch's (out, in)."""
        linear = name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
        return tensor.t() if linear else tensor


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
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), parallel residual, exact GELU, untied head."""
    MODEL_TYPE, HF_CLASS, DEPTH, COLUMN = "gpt_neox", "GPTNeoXForCausalLM", "num_hidden_layers", 1

    def __init__(self, c: GPTNeoXConfig):
        super().__init__(c, c.max_position_embeddings, c.num_hidden_layers, c.tie_word_embeddings,
                         c.hidden_size, c.layer_norm_eps, n_head=c.num_attention_heads,
                         mlp_width=c.intermediate_size, activation=c.hidden_act,
                         parallel=c.use_parallel_residual, attention_bias=c.attention_bias)
        self.rotary_dim = int(c.hidden_size // c.num_attention_heads * c.rotary_pct)  # R
        self.initialise()

    def embed_at(self, ids, past):
        """ids (B, T) after `past` tokens -> (B, T, C), and how far each layer turns its queries and keys:
        cosine and sine of position * frequency, each (T, R / 2), in float32. An odd R is rounded up."""
        position = torch.arange(past, past + ids.size(1), device=ids.device)
        exponent = torch.arange(0, self.rotary_dim, 2, device=ids.device) / self.rotary_dim
        angle = position[:, None] * (1 / self.config.rotary_emb_base**exponent)
        return self.embed(ids), (angle.cos(), angle.sin())

    def layout(self, name, tensor, saving):
        """GPT-NeoX stores q, k, v head by head: rows (H, 3, D); ours are (3, H, D), as in GPT-2."""
        if ".qkv." not in name:
            return tensor
        H = self.config.num_attention_heads
        return tensor.unflatten(0, (3, H, -1) if saving else (H, 3, -1)).transpose(0, 1).flatten(0, 2)


# ----------------------------------------------------------------------------------------- checkpoints
ARCHITECTURES = {"gpt2": (GPT2, GPT2Config), "gpt_neox": (GPTNeoX, GPTNeoXConfig)}
IMPLEMENTED = {  # options of config.json that change what is computed: the values that we have
    "model_type": [*ARCHITECTURES], "activation_function": [*GELU], "hidden_act": [*GELU],
    "rope_type": ["default"], "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
    "reorder_and_upcast_attn": [False], "add_cross_attention": [False], "quantization_config": [None]}
ROPE = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base", "type": "rope_type"}
BASE = r"^(transformer|gpt_neox)\."  # a prefix that some files lack
IGNORED = r"(^|\.)(attn|attention)\.(bias|masked_bias|rotary_emb\.inv_freq)$"  # causal masks, frequencies


def load(name_or_dir, device="cpu", dtype=torch.float32):
    """A model in eval mode, from the Hub (`gpt2`, `EleutherAI/pythia-70m`, ...) or from a folder. Tensors are
    converted one by one, so the peak of memory is the model in `dtype` and one tensor. InputError names what
    does not fit: a tensor (missing, unexpected, of another shape), an option, a damaged file."""
    with torch.device("meta"):
        model = build(name_or_dir)
    state, empty, names = {}, model.state_dict(), model.checkpoint_names()
    ours = {re.sub(BASE, "", theirs): name for name, theirs in names.items()}
    ours.setdefault(NAMES["head"][model.COLUMN] + ".weight", "embed.weight")  # some hold a tied head, too
    for path in weight_files(name_or_dir):
        for theirs, tensor in read_tensors(path):
            name = ours.get(re.sub(BASE, "", theirs))
            if name is None and re.search(IGNORED, theirs):
                continue
            if name is None:
                raise InputError(f"{path}: {theirs} has no place in the model that config.json describes")
            shape, found = model.layout(name, empty[name], saving=True).shape, tensor.shape
            if found != shape or not tensor.is_floating_point():
                raise InputError(f"{path}: {theirs} is {tensor.dtype} {[*found]}, not floats {[*shape]}")
            ready = torch.empty(empty[name].shape, dtype=dtype, device=device)
            ready.copy_(model.layout(name, tensor, saving=False))
            if name in state and not torch.equal(state[name], ready):
                raise InputError(f"{path}: {theirs} differs from the tensor to which config.json ties it")
            state[name] = ready
    if missing := [names[name] for name in names if name not in state]:
        raise InputError(f"{name_or_dir} lacks {len(missing)} of its tensors, such as {missing[0]}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def build(name_or_dir):
    """A model of the shape that config.json says, with fresh weights."""
    path = fetch(name_or_dir, "config.json")
    try:
        raw = {"model_type": None, **json.loads(path.read_bytes())}
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5's form of it
        raw |= {ROPE.get(name, name): value for name, value in rope.items()}
        for option, values in IMPLEMENTED.items():
            if option in raw and raw[option] not in values:
                raise InputError(f"{option} {raw[option]!r} is not implemented, only {values}")
        model, config = ARCHITECTURES[raw["model_type"]]
        return model(config(**{f.name: raw[f.name] for f in fields(config) if f.name in raw}))
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"{path} describes no model: {str(error).splitlines()[0]}") from error


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
    student = type(teacher)(replace(teacher.config, **{teacher.DEPTH: len(layers)})).to(teacher.embed.weight)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for block, i in zip(student.blocks, layers, strict=True):
        block.load_state_dict(teacher.blocks[i].state_dict())
    return student
