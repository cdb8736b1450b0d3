"""GPT-2, the whole network in one file (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners").

Parameters have OpenAI's names, so checkpoints of this model and of Hugging Face's `GPT2LMHeadModel` hold the same ones.
Shapes: B sequences of T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V = vocab_size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from muon import Muon
from tokens import VOCAB_SIZE, Tokenizer, gpt2_tokenizer

# The four published sizes: 124M, 350M, 774M and 1558M parameters.
SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

# What Hugging Face's GPT2Config can vary and GPT-2 does not.
HF_CONFIG = dict(
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    n_inner=None,  # 4 * n_embd
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    tie_word_embeddings=True,
    add_cross_attention=False,
)


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = VOCAB_SIZE  # 256 bytes, 50,000 merges, <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in every linear map and LayerNorm, as GPT-2 has it; False is a little smaller and faster

    def __post_init__(self):
        limits = dict(n_layer=1000, n_head=2**24, n_embd=2**24, block_size=2**24, vocab_size=2**24)
        for name, limit in limits.items():  # a config.json may ask for anything
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} {getattr(self, name)}: must be from 1 to {limit}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads")

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows of the embedding matrix: vocab_size rounded up to a multiple of 128, for fast kernels."""
        return (self.vocab_size + 127) // 128 * 128

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> GPTConfig:
        """Read the config.json of a directory or a model on the hub. Raise OSError, or ValueError if it is no GPT-2."""
        hf = json.loads(_find(name_or_dir, "config.json").read_text(encoding="utf-8"))
        try:
            if hf["model_type"] != "gpt2":
                raise ValueError(f"not a GPT-2: its config.json has model_type {hf['model_type']!r}")
            for key, ours in HF_CONFIG.items():
                theirs = hf.get(key, ours)
                if theirs != ours and not (key == "n_inner" and theirs == 4 * hf["n_embd"]):
                    raise ValueError(f"not GPT-2's network: its config.json has {key} {theirs!r}, not {ours!r}")
            shape = {key: int(hf[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
            dropout, bias = hf.get("resid_pdrop", 0.1), hf.get("bias", True)
            return cls(block_size=int(hf["n_positions"]), dropout=dropout, bias=bias, **shape)
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"not a GPT-2: its config.json is not a model's ({e!r})") from None

    def to_hf(self) -> dict:
        """Return the content of a Hugging Face config.json. Other programs ignore `bias`."""
        shape = dict(vocab_size=self.vocab_size, n_positions=self.block_size)
        shape |= dict(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, bias=self.bias)
        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout)
        end_of_text = min(self.vocab_size, VOCAB_SIZE) - 1
        tokens = dict(bos_token_id=end_of_text, eos_token_id=end_of_text)
        kind = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", dtype="float32")
        return HF_CONFIG | shape | dropout | tokens | kind


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value for all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)  # holds the probability for scaled_dot_product_attention
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, nh, T so far, hs), in float32 on a CPU
        # A single query is the newest token, which attends to every key; only several at once need the causal mask.
        causal = mask is None and T > 1
        dropout_p = self.attn_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, dropout_p, is_causal=causal)  # (B, nh, T, hs)
        y = y.to(q.dtype).transpose(1, 2).contiguous().view(B, T, C)  # (B, T, C): heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation that GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.recompute = False  # set by set_recompute

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        if self.recompute and self.training:
            # Keep only x for the backward pass, which calls add_branches again (Chen et al., 2016, section 4).
            return checkpoint(self.add_branches, x, mask, cache, use_reentrant=False)
        return self.add_branches(x, mask, cache)

    def add_branches(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class KVCache:
    """Keys and values of a layer for the tokens so far, so that generating a token computes one token.

    Two buffers (B, nh, block_size, hs) hold `length` tokens. The first update may add several tokens, later ones add
    one. On a CPU they are float32: for a single query, attention is up to four times slower there in bfloat16.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.length = 0

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new keys and values (B, nh, T, hs); return all of them, each (B, nh, length, hs)."""
        B, nh, T, hs = k.size()
        if self.length == 0:
            dtype = torch.float32 if k.device.type == "cpu" else k.dtype
            self.k = k.new_empty(B, nh, self.block_size, hs, dtype=dtype)
            self.v = k.new_empty(B, nh, self.block_size, hs, dtype=dtype)
        self.k[:, :, self.length : self.length + T] = k
        self.v[:, :, self.length : self.length + T] = v
        self.length += T
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        layers = dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        )
        self.transformer = nn.ModuleDict(layers)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights with std 0.02, in residual projections divided by √(2·n_layer) (section 2.3 of the paper).

        Biases and the rows that pad the vocabulary are zero, the weights of LayerNorms one.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 1:  # a LayerNorm's weight
                nn.init.ones_(p)
            else:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) for tokens idx (B, T); with targets (B, T), the mean cross-entropy in nats.

        Both are float32. Raise ValueError if T is larger than block_size.
        """
        logits = self.head(self.hidden(idx))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    def hidden(
        self, idx: Tensor, pos: Tensor | None = None, mask: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """Return the output of the last LayerNorm for tokens idx (B, T): (B, T, C).

        pos, (T) or (B, T), are the tokens' positions, by default one after the other. mask, boolean (B, 1, T, T), says
        which token attends to which, in place of the causal mask. With caches, one per layer, the tokens follow those
        that the caches hold.
        """
        past = caches[0].length if caches else 0
        T = idx.size(1)
        if pos is None:
            if past + T > self.config.block_size:
                raise ValueError(f"{past + T} tokens do not fit into a context of {self.config.block_size}")
            pos = torch.arange(past, past + T, device=idx.device)  # (T)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for block, cache in zip(self.transformer.h, caches or [None] * self.config.n_layer, strict=True):
            x = block(x, mask, cache)
        return self.transformer.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Return the float32 logits (..., V) for hidden states (..., C), by the token embedding (tied weights).

        Padded ids are cut off: they have no probability, and their rows get no gradient.
        """
        return F.linear(x, self.transformer.wte.weight)[..., : self.config.vocab_size].float()

    def generate(self, idx: Tensor, *args, **kwargs) -> Tensor:
        """Return each sequence of idx (B, T) with its continuation, (B, T + new). The arguments are `stream`'s."""
        tokens = self.stream(idx, *args, **kwargs)
        return torch.cat((idx, *(token[:, None] for token in tokens)), dim=1)

    @torch.inference_mode()
    def stream(  # noqa: PLR0913 (the arguments that transformers' generate has, too)
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yield up to max_new_tokens that continue each sequence of idx (B, T): one for each sequence, (B), at a time.

        temperature 0 takes the most likely token. top_k keeps the k most likely tokens, top_p (Holtzman et al., 2020,
        section 3.1) the fewest tokens with that much probability. A sequence that has generated stop_token is filled up
        with it, and generation ends once every sequence has. Past block_size, each token is computed from the last
        block_size tokens: all their positions change, so there the cache cannot help.
        """
        block_size = self.config.block_size
        caches = [KVCache(block_size) for _ in self.transformer.h] if use_cache else []
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if caches and idx.size(1) <= block_size:
                x = self.hidden(idx[:, caches[0].length :], caches=caches)
            else:
                x = self.hidden(idx[:, -block_size:])
            token = sample(self.head(x[:, -1]), temperature, top_k, top_p, generator)  # (B)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            yield token
            idx = torch.cat((idx, token[:, None]), dim=1)
            if stop_token is not None and done.all():
                break

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> GPT:
        """Load a directory, or a name on the hub such as "gpt2". Raise OSError, or ValueError if it is no GPT-2."""
        try:
            config = GPTConfig.from_pretrained(name_or_dir)
            with torch.device("meta"):  # shapes alone: no time spent on initial weights that are overwritten
                model = cls(config)
            model.to_empty(device="cpu")
            model.load_hf_state(_read_weights(name_or_dir))
        except ValueError as e:
            raise ValueError(f"{name_or_dir}: {e}") from None
        return model

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
        """Return a model that uses these tensors without a copy, by the names of `state_dict`."""
        with torch.device("meta"):  # shapes alone; the tensors take their places
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        return model

    @torch.no_grad()
    def load_hf_state(self, state: dict[str, Tensor]) -> None:
        """Copy weights in Hugging Face's layout. Raise ValueError if a tensor is missing, misshapen or unknown."""
        state = {name.removeprefix("transformer."): t for name, t in state.items()}  # the hub's "gpt2" has no prefix
        for name, p in self.transformer.named_parameters():
            rows = self.config.vocab_size if name == "wte.weight" else len(p)
            ours = p.t() if _is_conv1d(name, p) else p[:rows]  # a view: what is copied there is in p
            theirs = state.pop(name, None)
            if theirs is None or theirs.shape != ours.shape:
                found = "nothing" if theirs is None else tuple(theirs.shape)
                raise ValueError(f"{name}: expected a tensor of shape {tuple(ours.shape)}, found {found}")
            if not theirs.isfinite().all():
                raise ValueError(f"{name}: holds values that are not finite")
            ours.copy_(theirs)
            p[rows:] = 0.0
        for name, t in state.items():  # left over: causal masks and the tied head in old files, zeros for bias=False
            if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")) and t.any():
                raise ValueError(f"{name}: a tensor that GPT-2 does not have")

    def hf_state(self) -> dict[str, Tensor]:
        """Return the weights in Hugging Face's layout, on the CPU: Conv1D transposes matrices and always has a bias."""
        state = {}
        for name, p in self.named_parameters():
            rows = self.config.vocab_size if name == "transformer.wte.weight" else len(p)
            t = p.detach().t() if _is_conv1d(name, p) else p.detach()[:rows]
            state[name] = t.cpu().contiguous()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is None:
                state[f"{name}.bias"] = torch.zeros(len(module.weight))
        return state

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a Hugging Face GPT-2 directory that `transformers` and `from_pretrained` open, with this tokenizer, by
        default GPT-2's or, if the vocabulary is smaller, its first tokens."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        own = tokenizer or gpt2_tokenizer().first(min(self.config.vocab_size, VOCAB_SIZE))
        end = "<|endoftext|>"
        roles = dict(bos_token=end, eos_token=end, unk_token=end)
        roles |= dict(tokenizer_class="GPT2Tokenizer", model_max_length=self.config.block_size)
        save_file(self.hf_state(), directory / "model.safetensors", metadata={"format": "pt"})
        # transformers' pipeline generates 256 tokens by default, more than a small context has.
        generation = dict(max_new_tokens=min(256, self.config.block_size // 2))
        generation |= dict(bos_token_id=own.end_of_text, eos_token_id=own.end_of_text)
        configs = {"config": self.config.to_hf(), "tokenizer_config": roles, "generation_config": generation}
        for name, content in configs.items():
            (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, content in (own.files | {"tokenizer.json": own.tokenizer_json}).items():
            (directory / name).write_bytes(content)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to block_size tokens; the positions after that are dropped."""
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    def set_dropout(self, dropout: float) -> None:
        """Use another dropout probability everywhere."""
        self.config = replace(self.config, dropout=dropout)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def set_recompute(self, recompute: bool) -> None:
        """Choose whether the backward pass computes each block's activations again, which saves their memory."""
        for block in self.transformer.h:
            block.recompute = recompute

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        muon_lr_scale: float | None = None,
        muon_dtype: torch.dtype = torch.float32,
    ) -> torch.optim.AdamW:
        """Return AdamW (Loshchilov & Hutter, 2019), with weight decay for matrices and embeddings only. With a
        muon_lr_scale, Muon updates the matrices of the blocks, at that multiple of the learning rate."""
        options = dict(lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
        no_decay = dict(params=[p for p in self.parameters() if p.dim() < 2], weight_decay=0.0)
        if muon_lr_scale is None:
            decay = dict(params=[p for p in self.parameters() if p.dim() >= 2], weight_decay=weight_decay)
            return torch.optim.AdamW([decay, no_decay], **options)
        blocks = self.transformer.h
        embeddings = dict(params=[self.transformer.wte.weight, self.transformer.wpe.weight])
        # Query, key and value are three matrices.
        qkv = dict(params=[block.attn.c_attn.weight for block in blocks], lr_scale=muon_lr_scale, parts=3)
        linears = [layer for block in blocks for layer in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
        others = dict(params=[layer.weight for layer in linears], lr_scale=muon_lr_scale, parts=1)
        return Muon([embeddings, no_decay, qkv, others], muon_dtype, weight_decay=weight_decay, **options)

    def num_parameters(self) -> int:
        """Return the number of parameters, without the padded rows."""
        c = self.config
        return sum(p.numel() for p in self.parameters()) - (c.padded_vocab_size - c.vocab_size) * c.n_embd

    def flops_per_token(self) -> int:
        """Return the floating-point operations to train on one token: 6 for each weight of a matrix product, and those
        of attention without the causal mask (Chowdhery et al., 2022, PaLM, appendix B)."""
        c = self.config
        weights = 12 * c.n_layer * c.n_embd**2 + c.padded_vocab_size * c.n_embd  # the head's; lookups multiply nothing
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for each row of logits (B, V): (B). Ids beyond GPT-2's vocabulary are never drawn."""
    logits = logits[:, :VOCAB_SIZE]
    if temperature < 1e-6:  # float32 cannot divide by less, and other tokens have no probability left
        return logits.argmax(dim=-1)
    ids = None
    if top_k is not None or top_p is not None:  # what follows then deals with few tokens, the most likely first
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # so that no temperature makes it infinite
    if top_p is not None:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, -math.inf)  # enough without this one
    token = torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)  # (B, 1)
    return (token if ids is None else ids.gather(1, token))[:, 0]


def _is_conv1d(name: str, p: Tensor) -> bool:
    """Return whether Hugging Face keeps this weight in a Conv1D, (in, out): matrices of the blocks, not embeddings."""
    return p.dim() == 2 and (".attn." in name or ".mlp." in name)


def _find(name_or_dir: str | Path, filename: str) -> Path:
    """Return the path of a model's file: in its directory, or in the hub's cache, where it is downloaded if needed."""
    path = Path(name_or_dir)
    if path.is_dir():
        return path / filename
    if path.is_absolute() or len(path.parts) > 2 or path.name.startswith("step_"):  # no name on the hub
        there = ", ".join(sorted(p.parent.name for p in path.parent.glob("*/config.json")))
        raise FileNotFoundError(f"no such directory; in {path.parent} there is {there or 'no model'}")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(name_or_dir), filename))


def load_tokenizer(name_or_dir: str | Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model with so large a vocabulary: that of its directory or name on the hub, or GPT-2's
    if it comes without vocab.json and merges.txt. Raise OSError, or ValueError if they do not fit together."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        _find(name_or_dir, "vocab.json")
        tokenizer = Tokenizer.load(_find(name_or_dir, "merges.txt").parent)
    except (FileNotFoundError, EntryNotFoundError) as e:
        if isinstance(e, LocalEntryNotFoundError) and name_or_dir not in SIZES:  # no network: it may have some
            raise
        tokenizer = gpt2_tokenizer()
    if tokenizer.vocab_size != min(vocab_size, VOCAB_SIZE):  # a model of GPT-2's tokens may have more, for fast kernels
        raise ValueError(f"has {vocab_size} tokens, and its tokenizer (without files, GPT-2's) {tokenizer.vocab_size}")
    return tokenizer


def _read_weights(name_or_dir: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a model, by Hugging Face's names."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return load_file(_find(name_or_dir, "model.safetensors"))
    except SafetensorError as e:
        raise ValueError(f"model.safetensors is damaged: {e}") from None
    except (FileNotFoundError, EntryNotFoundError):  # pytorch_model.bin, or sharded: transformers knows all layouts
        from transformers import GPT2LMHeadModel

        model, info = GPT2LMHeadModel.from_pretrained(name_or_dir, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"lacks {', '.join(sorted(info['missing_keys']))}") from None
        return model.state_dict()
