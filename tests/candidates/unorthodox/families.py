"""Mistral, Mixtral, Phi and GPT-2, right and unusual; `self.wrong` is the one mistake that each can make."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from candidates.batch_first import ACTIVATIONS, frequencies, wide

from .skeleton import Cache, Decoder

# --- Mistral --------------------------------------------------------------------------------------------------------


class Ring(Cache):
    """The last `size` keys and values, (b, k, size, e): column c of the text lies in slot c % size, written in place.

    With three slots, c d e stand as  d e c  after five columns; they are read in order: c d e.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.fed = size, 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.held is None:
            self.held = tuple(x.new_zeros(*x.shape[:2], self.size, x.shape[3]) for x in (keys, values))
        assert self.held is not None
        old = torch.arange(max(0, self.fed - self.size), self.fed) % self.size
        k, v = (torch.cat((held[:, :, old], new), dim=2)
                for held, new in zip(self.held, (keys, values), strict=True))  # fmt: skip
        last = min(self.size, keys.shape[2])
        self.fed += keys.shape[2]
        slots = torch.arange(self.fed - last, self.fed) % self.size
        for held, new in zip(self.held, (keys, values), strict=True):
            held[:, :, slots] = new[:, :, -last:]
        return k, v


class Bands(Decoder):
    """No mask as large as the text: three queries at a time see the band of keys that their windows can reach."""

    family, trainable = "mistral", False

    def cache(self) -> Ring:
        return Ring(self.window - 2 if self.wrong else self.window - 1)  # the newest keys come on top

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        seen, rows = seen[..., -k.shape[2] :], []
        for start in range(0, q.shape[2], 3):
            end = min(start + 3, q.shape[2])
            reached = seen[:, start:end].any(0).any(0).nonzero()
            band = slice(int(reached[0]), int(reached[-1]) + 1)
            rows.append(super().attend(q[:, :, start:end], k[:, :, band], v[:, :, band], seen[:, start:end, band]))
        return torch.cat(rows, dim=2)


# --- Mixtral --------------------------------------------------------------------------------------------------------


class Routed(Decoder):
    """Tokens in one row, (n, d); experts stacked, (E, f, d) and (E, d, f)."""

    family, default_eps = "mixtral", 1e-5

    def feed_forward(self, at: str, n: Tensor) -> Tensor:
        at, tokens = at + "block_sparse_moe.", n.flatten(0, 1)
        router = F.linear(tokens.to(wide(n.dtype)), self.w[at + "gate.weight"].to(wide(n.dtype)))
        logits, chosen = router.topk(self.config.get("num_experts_per_tok", 2), dim=-1)
        experts = range(self.config["num_local_experts"])
        w1, w2, w3 = (torch.stack([self.w[f"{at}experts.{e}.{w}.weight"] for e in experts]) for w in ("w1", "w2", "w3"))
        return self.mix(tokens, chosen, logits.softmax(-1), w1, w2, w3).view(n.shape)

    def mix(self, x: Tensor, chosen: Tensor, shares: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        raise NotImplementedError


class DenseExperts(Routed):
    """Every expert sees every token; those that were not chosen count 0."""

    def mix(self, x: Tensor, chosen: Tensor, shares: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        every = shares.new_zeros(len(x), len(w1)).scatter(1, chosen, shares)
        if self.wrong:
            every = torch.full_like(every, 1 / len(w1))
        inner = self.activation(torch.einsum("nd,efd->enf", x, w1)) * torch.einsum("nd,efd->enf", x, w3)
        outputs = torch.einsum("enf,edf->end", inner, w2)
        return torch.einsum("ne,end->nd", every, outputs.to(every.dtype)).to(x.dtype)


class SortedDispatch(Routed):
    """Tokens are sorted by expert, run in groups and added up where they belong."""

    def mix(self, x: Tensor, chosen: Tensor, shares: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        token, counts = order // chosen.shape[1], chosen.flatten().bincount(minlength=len(w1)).tolist()
        groups = [
            F.linear(self.activation(F.linear(group, w1[e])) * F.linear(group, w3[e]), w2[e])
            for e, group in enumerate(x[token].split(counts))
        ]
        sorted_shares = shares.flatten() if self.wrong else shares.flatten()[order]
        weighted = torch.cat(groups).to(shares.dtype) * sorted_shares[:, None]
        return torch.zeros_like(x, dtype=shares.dtype).index_add(0, token, weighted).to(x.dtype)


class GatheredExperts(Routed):
    """Each token is given copies of its experts' matrices."""

    def mix(self, x: Tensor, chosen: Tensor, shares: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        gate, up = (torch.einsum("nd,nkfd->nkf", x, w[chosen]) for w in ((w3, w1) if self.wrong else (w1, w3)))
        outputs = torch.einsum("nkf,nkdf->nkd", self.activation(gate) * up, w2[chosen])
        return (outputs.to(shares.dtype).mT @ shares[..., None])[..., 0].to(x.dtype)


# --- LayerNorm families ---------------------------------------------------------------------------------------------


class FusedParallel(Decoder):
    """Phi's parallel block as two products: one matrix into attention and feed-forward, one out of both."""

    family, trainable = "phi", False

    def read(self) -> None:
        config = self.config | {"rms_norm_eps": self.config["layer_norm_eps"]}
        self.config = config
        super().read()
        rope = config.get("rope_parameters") or config
        self.turned = int(self.head_dim * rope.get("partial_rotary_factor", 0.5))
        self.turning = frequencies(config, self.turned, self.turned)

    def prepare(self) -> None:
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            into = [*(f"{at}self_attn.{letter}_proj" for letter in "qkv"), at + "mlp.fc1"]
            out = [at + "self_attn.dense", at + "mlp.fc2"]
            for kind in ("weight", "bias"):
                self.w[f"{at}into.{kind}"] = torch.cat([self.w[f"{module}.{kind}"] for module in into])
            self.w[at + "out.weight"] = torch.cat([self.w[module + ".weight"] for module in out], dim=1)
            biases = [self.w[module + ".bias"] for module in (out[:1] if self.wrong else out)]
            self.w[at + "out.bias"] = torch.stack(biases).sum(0)

    def block(self, layer: int, x: Tensor, angles: Tensor, seen: Tensor, cache: Any) -> Tensor:
        at, size = f"model.layers.{layer}.", self.head_dim
        parts = self.linear(self.norm(x, at + "input_layernorm"), at + "into").split(
            [self.heads * size, self.kv_heads * size, self.kv_heads * size, self.config["intermediate_size"]], dim=-1
        )
        q, k, v = (self.split(part) for part in parts[:3])
        if self.config.get("qk_layernorm", False):
            q, k = self.norm(q, at + "self_attn.q_layernorm"), self.norm(k, at + "self_attn.k_layernorm")
        q, k = (torch.cat((self.turn(y[..., : self.turned], angles), y[..., self.turned :]), -1) for y in (q, k))
        if cache is not None:
            k, v = cache.extend(k, v)
        inner = torch.cat((self.merge(self.attend(q, k, v, seen)), self.activation(parts[3])), dim=-1)
        return x + self.linear(inner, at + "out")

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x, "model.final_layernorm"), "lm_head")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], self.eps)


class UnfusedLinears(Decoder):
    """GPT-2 with a transposed matrix of its own for each projection, (out, in), and LayerNorm as E[x²] − E[x]²."""

    family, table, trainable = "gpt2", "transformer.wte.weight", False

    def read(self) -> None:
        config = self.config
        self.layers, self.heads, self.kv_heads = config["n_layer"], config["n_head"], config["n_head"]
        self.head_dim, self.window = config["n_embd"] // self.heads, None
        self.eps = config.get("layer_norm_epsilon", 1e-5)
        self.activation, self.turning = ACTIVATIONS[config["activation_function"]], ()

    def prepare(self) -> None:
        for name in [name for name in self.w if ".c_" in name]:
            tensor = self.w.pop(name)
            module, kind = name.rsplit(".", 1)
            if not module.endswith("c_attn"):
                self.w[name] = tensor.T.contiguous() if kind == "weight" else tensor
                continue
            for letter, part in zip("qkv", self.thirds(tensor), strict=True):
                self.w[f"{module}_{letter}.{kind}"] = part.T.contiguous() if kind == "weight" else part

    def thirds(self, joint: Tensor) -> Any:
        if self.wrong:  # head by head
            return joint.unflatten(-1, (self.heads, 3, -1)).transpose(-3, -2).flatten(-2).unbind(-2)
        return joint.chunk(3, dim=-1)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        table = self.w["transformer.wpe.weight"]
        places = F.one_hot(positions.expand_as(ids), len(table)).to(table.dtype)
        return F.embedding(ids, self.w[self.table]) + places @ table

    def angles(self, positions: Tensor) -> None:
        return None

    def block(self, layer: int, x: Tensor, angles: None, seen: Tensor, cache: Any) -> Tensor:
        at, n = f"transformer.h.{layer}.", self.norm(x, f"transformer.h.{layer}.ln_1")
        q, k, v = (self.split(self.linear(n, f"{at}attn.c_attn_{letter}")) for letter in "qkv")
        if cache is not None:
            k, v = cache.extend(k, v)
        if self.config.get("scale_attn_by_inverse_layer_idx", False):
            q = q / (layer + 1)
        x = x + self.linear(self.merge(self.attend(q, k, v, seen)), at + "attn.c_proj")
        up = self.linear(self.norm(x, at + "ln_2"), at + "mlp.c_fc")
        return x + self.linear(self.activation(up), at + "mlp.c_proj")

    def logits(self, x: Tensor) -> Tensor:
        head = self.w.get("lm_head.weight", self.w[self.table])  # tied unless the config says otherwise
        return self.norm(x, "transformer.ln_f") @ head.T

    def norm(self, x: Tensor, name: str) -> Tensor:
        precise = x.to(wide(x.dtype))
        mean = precise.mean(-1, keepdim=True)
        variance = precise.square().mean(-1, keepdim=True) - mean.square()
        normed = (precise - mean) * (variance + self.eps).rsqrt()
        return torch.addcmul(self.w[name + ".bias"], normed.to(x.dtype), self.w[name + ".weight"])
