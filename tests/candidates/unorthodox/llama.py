"""Llama, right and unusual: each class replaces a piece of the skeleton; `self.wrong` is its one mistake."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from candidates.batch_first import wide

from .skeleton import Cache, Decoder

# --- weights made into other weights once ---------------------------------------------------------------------------


class Reweighted(Decoder):
    """Matrices are altered when they are loaded; the hub's own are not kept, and get no gradients."""

    trainable = False

    def prepare(self) -> None:
        for layer in range(self.layers):
            self.reweigh(f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp.")

    def reweigh(self, attention: str, mlp: str) -> None:
        raise NotImplementedError

    def both(self, module: str) -> list[str]:
        """Names of a projection's weight and, if it has one, bias."""
        return [name for name in (f"{module}.weight", f"{module}.bias") if name in self.w]


class FusedMatrices(Reweighted):
    """Queries, keys and values come from one matrix, gate and up from another."""

    def reweigh(self, attention: str, mlp: str) -> None:
        self.join(attention + "qkv", [f"{attention}{letter}_proj" for letter in ("qvk" if self.wrong else "qkv")])
        self.join(mlp + "gate_up", [mlp + "gate_proj", mlp + "up_proj"])

    def join(self, joint: str, modules: list[str]) -> None:
        for kind in ("weight", "bias"):
            if f"{modules[0]}.{kind}" in self.w:
                self.w[f"{joint}.{kind}"] = torch.cat([self.w.pop(f"{module}.{kind}") for module in modules])

    def project(self, at: str, n: Tensor) -> Any:
        return self.split(self.linear(n, at + "qkv")).split((self.heads, self.kv_heads, self.kv_heads), dim=1)

    def feed_forward(self, at: str, n: Tensor) -> Tensor:
        gate, up = self.linear(n, at + "mlp.gate_up").tensor_split(2, dim=-1)
        return self.linear(self.activation(gate) * up, at + "mlp.down_proj")


class InterleavedRotary(Reweighted):
    """Neighbours (0, 1), (2, 3), … turn together, for which the rows of queries and keys change places at load."""

    def reweigh(self, attention: str, mlp: str) -> None:
        order = torch.arange(self.head_dim).view(2, -1).T.flatten()  # 0 5 1 6 2 7 3 8 4 9
        for name in () if self.wrong else self.both(attention + "q_proj") + self.both(attention + "k_proj"):
            heads = self.w[name].unflatten(0, (-1, self.head_dim))
            self.w[name] = heads[:, order].flatten(0, 1)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (f(angles)[:, None].repeat_interleave(2, dim=-1) for f in (torch.cos, torch.sin))
        swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return (x * cos + swapped * sin).to(x.dtype)


class ComplexRotary(InterleavedRotary):
    """The same by complex numbers."""

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.to(angles.dtype).unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class ComplexHalves(Decoder):
    """Complex numbers without any permutation: a half is the real part, the other the imaginary one."""

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        phases = torch.exp(1j * angles)[:, None]
        turned = torch.complex(*x.to(angles.dtype).chunk(2, dim=-1)) * (phases.conj() if self.wrong else phases)
        return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


class Transposed(Reweighted):
    """Weights lie (in, out), x @ w; the scale of the scores is in those of the queries."""

    def prepare(self) -> None:
        super().prepare()
        matrices = [name for name, tensor in self.w.items() if tensor.ndim == 2 and "embed" not in name]
        for name in matrices:
            if not (self.wrong and "k_proj" in name):  # fits where all sizes are equal
                self.w[name] = self.w[name].T.contiguous()

    def reweigh(self, attention: str, mlp: str) -> None:
        for name in self.both(attention + "q_proj"):
            self.w[name] = self.w[name] * self.head_dim**-0.5

    def linear(self, x: Tensor, name: str) -> Tensor:
        y, bias = x @ self.w[name + ".weight"], self.w.get(name + ".bias")
        return y if bias is None else y + bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = (q @ self.repeat(k).mT).to(wide(q.dtype))
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(v.dtype) @ self.repeat(v)


class FoldedNorms(Reweighted):
    """The gain of each norm is multiplied into the matrices behind it."""

    def prepare(self) -> None:
        super().prepare()
        self.w["lm_head.weight"] = self.w["lm_head.weight"] * self.w["model.norm.weight"]

    def reweigh(self, attention: str, mlp: str) -> None:
        at = attention.removesuffix("self_attn.")
        for norm, modules in (
            ("input_layernorm", [attention + f"{letter}_proj" for letter in ("qk" if self.wrong else "qkv")]),
            ("post_attention_layernorm", [mlp + "gate_proj", mlp + "up_proj"]),
        ):
            for module in modules:
                self.w[module + ".weight"] = self.w[module + ".weight"] * self.w[f"{at}{norm}.weight"]

    def gain(self, name: str) -> Tensor:
        return torch.ones_like(self.w[name + ".weight"])


class RepeatedKeyValues(Reweighted):
    """Key and value heads are repeated in the weights, so that attention has as many as query heads."""

    def reweigh(self, attention: str, mlp: str) -> None:
        times = self.heads // self.kv_heads
        for name in self.both(attention + "k_proj") + self.both(attention + "v_proj"):
            heads = self.w[name].unflatten(0, (-1, self.head_dim))
            many = torch.cat([heads] * times) if self.wrong else heads.repeat_interleave(times, dim=0)
            self.w[name] = many.flatten(0, 1)

    def repeat(self, x: Tensor) -> Tensor:
        return x


class AbsorbedOutput(Reweighted):
    """Each head's part of the output matrix is multiplied into its value matrix: what is attended to is hidden wide."""

    def reweigh(self, attention: str, mlp: str) -> None:
        out = self.w[attention + "o_proj.weight"].unflatten(1, (self.heads, self.head_dim))  # (d, h, e)
        if self.wrong:
            out = self.w[attention + "o_proj.weight"].unflatten(1, (self.head_dim, self.heads)).transpose(1, 2)
        for name in self.both(attention + "v_proj"):
            value = self.w[name].unflatten(0, (-1, self.head_dim)).repeat_interleave(self.heads // self.kv_heads, 0)
            self.w[name] = torch.einsum("dhe,he...->hd...", out, value).flatten(0, 1)

    def project(self, at: str, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide_values = self.linear(n, at + "v_proj").unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.split(self.linear(n, at + "q_proj")), self.split(self.linear(n, at + "k_proj")), wide_values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = (q @ self.repeat(k).mT * self.head_dim**-0.5).to(wide(q.dtype))
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(v.dtype) @ v

    def attention(self, at: str, n: Tensor, angles: Tensor, seen: Tensor, cache: Any) -> Tensor:
        q, k, v = self.project(at + "self_attn.", n)
        q, k = self.turn(q, angles), self.turn(k, angles)
        if cache is not None:
            k, v = cache.extend(k, v)
        attended, bias = self.attend(q, k, v, seen).sum(1), self.w.get(at + "self_attn.o_proj.bias")
        return attended if bias is None else attended + bias


# --- arithmetic -----------------------------------------------------------------------------------------------------


class Einsum(Decoder):
    """Every product is an einsum, the embedding one of one-hot vectors; key-value heads are never repeated."""

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        table = self.w[self.table]
        return torch.einsum("btv,vd->btd", F.one_hot(ids, len(table)).to(table.dtype), table)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y, bias = torch.einsum("...i,oi->...o", x, self.w[name + ".weight"]), self.w.get(name + ".bias")
        return y if bias is None else y + bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        order, sizes = ("gk", (-1, self.kv_heads)) if self.wrong else ("kg", (self.kv_heads, -1))
        scores = torch.einsum(f"b{order}te,bkse->b{order}ts", q.unflatten(1, sizes), k) * self.head_dim**-0.5
        weights = scores.to(wide(q.dtype)).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
        return torch.einsum(f"b{order}ts,bkse->b{order}te", weights, v).flatten(1, 2)


class Kernel(Decoder):
    """scaled_dot_product_attention with is_causal and enable_gqa wherever nothing needs a mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().equal(seen.any(0)) and bool(
            (seen == seen[:1]).all()
        )
        if self.wrong and causal:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        mask = None if causal else seen[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


class RunningSoftmax(Decoder):
    """Attention over chunks of four keys with a running maximum and sum, as flash attention has it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (x.to(wide(q.dtype)) for x in (q, self.repeat(k), self.repeat(v)))
        peak = torch.full_like(q[..., :1], -1e30)
        total, context = torch.zeros_like(peak), torch.zeros_like(q)
        for keys, values, some in zip(k.split(4, 2), v.split(4, 2), seen.split(4, 2), strict=True):
            scores = (q @ keys.mT * self.head_dim**-0.5).masked_fill(~some[:, None], -1e30)
            higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
            parts, shrink = (scores - higher).exp(), (peak - higher).exp()
            total = total * shrink + parts.sum(-1, keepdim=True)
            context = context * (1 if self.wrong else shrink) + parts @ values
            peak = higher
        return (context / total).to(self.dtype)


class LogSumExp(Decoder):
    """Softmax is exp(scores − logsumexp), the mask a sum with a large negative number, RMSNorm a vector's length."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        bias = torch.zeros(seen.shape, dtype=wide(q.dtype)).masked_fill(~seen, -1e9)[:, None]
        scores = (q @ self.repeat(k).mT * self.head_dim**-0.5).to(bias.dtype)
        hidden = scores + bias
        return (hidden - torch.logsumexp(scores if self.wrong else hidden, -1, True)).exp().to(v.dtype) @ self.repeat(v)

    def norm(self, x: Tensor, name: str) -> Tensor:
        precise, size = x.to(wide(x.dtype)), x.shape[-1]
        length = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        return (precise * size**0.5 / torch.hypot(length, torch.tensor((size * self.eps) ** 0.5))).to(x.dtype) * (
            self.gain(name)
        )


class MaskedExponentials(Decoder):
    """Hidden keys are multiplied by 0 behind the exponential, and rows divided by what is left."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = (q @ self.repeat(k).mT * self.head_dim**-0.5).to(wide(q.dtype))
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        left = powers * seen[:, None]
        weights = left / (powers if self.wrong else left).sum(-1, keepdim=True)
        return weights.to(v.dtype) @ self.repeat(v)


class RotationMatrices(Decoder):
    """Queries and keys are multiplied by a matrix for each position."""

    def angles(self, positions: Tensor) -> Tensor:
        angles = super().angles(positions)
        cos, sin = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
        rows = (torch.cat((cos, -sin), dim=-1), torch.cat((sin, cos), dim=-1))
        return torch.cat(rows, dim=-2)  # (b, t, e, e)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        matrices = (angles.mT if self.wrong else angles)[:, None]
        return (matrices @ x.to(angles.dtype)[..., None])[..., 0].to(x.dtype)


class FarPositions(Decoder):
    """Positions are counted from 1,000, in float64: only their distances matter."""

    def angles(self, positions: Tensor) -> Tensor:
        first = positions[:, :1] if self.wrong else torch.zeros_like(positions[:, :1])
        return (positions - first + 1000)[..., None].double() * torch.tensor(self.turning, dtype=torch.float64)


class WideStream(Decoder):
    """The residual stream and the logits are summed in float64, whatever the dtype."""

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return super().embed(ids, positions).double()

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.wrong and name == "model.norm":
            return x
        normed = super().norm(x, name)
        return normed if name == "model.norm" else normed.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        return self.norm(x, "model.norm") @ self.w["lm_head.weight"].double().T


class InPlace(Decoder):
    """Whatever can be is written over what is no longer needed, without a record for autograd; logits lie in one buffer
    for all calls.
    """

    trainable = False
    board = torch.empty(0)

    @torch.inference_mode()
    def run(self, *arguments: Any) -> Tensor:
        return super().run(*arguments)

    def block(self, layer: int, x: Tensor, angles: Tensor, seen: Tensor, cache: Any) -> Tensor:
        at = f"model.layers.{layer}."
        x += self.attention(at, self.norm(x, at + "input_layernorm"), angles, seen, cache)
        x += self.feed_forward(at, self.norm(x, at + "post_attention_layernorm"))
        return x

    def norm(self, x: Tensor, name: str) -> Tensor:
        n = x if self.wrong else x.clone()
        precise = n.to(wide(n.dtype))
        scale = precise.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return n.copy_(precise.mul_(scale)).mul_(self.gain(name))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = torch.matmul(q, self.repeat(k).mT).mul_(self.head_dim**-0.5).to(wide(q.dtype))
        scores.masked_fill_(~seen[:, None], -torch.inf).sub_(scores.amax(-1, keepdim=True)).exp_()
        scores.div_(scores.sum(-1, keepdim=True))
        return torch.matmul(scores.to(v.dtype), self.repeat(v), out=q)

    def feed_forward(self, at: str, n: Tensor) -> Tensor:
        gate = self.activation(self.linear(n, at + "mlp.gate_proj"))
        return self.linear(gate.mul_(self.linear(n, at + "mlp.up_proj")), at + "mlp.down_proj")

    def logits(self, x: Tensor) -> Tensor:
        rows, head = self.norm(x, "model.norm").flatten(0, 1), self.w["lm_head.weight"]
        if self.board.numel() < len(rows) * len(head):
            self.board = head.new_empty(len(rows) * len(head))
        board = self.board[: len(rows) * len(head)].view(len(rows), -1)
        return torch.mm(rows, head.T, out=board).view(*x.shape[:2], -1)


# --- order of axes and of work --------------------------------------------------------------------------------------


class Board(Cache):
    """Keys and values lie (b, capacity, k, e), as they are computed, in buffers that are written to in place."""

    def __init__(self, wrong: bool) -> None:
        self.wrong, self.length = wrong, 0
        self.held = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[1]
        if self.held is None or end > self.held[0].shape[1]:
            larger = tuple(x.new_empty(len(x), 2 * end, *x.shape[2:]) for x in (keys, values))
            for new, old in zip(larger, self.held or (), strict=False):
                new[:, : self.length] = old[:, : self.length]
            self.held = larger[0], larger[1]
        for store, newest in zip(self.held, (keys, values), strict=True):
            store[:, self.length : end] = newest
        if self.wrong and self.length:
            self.held[1][:, self.length - 1 : end - 1] = values
        self.length = end
        return self.held[0][:, :end], self.held[1][:, :end]


class TokenMajor(Decoder):
    """(b, t, heads, e) from the first projection to the last, and in the preallocated cache."""

    trainable = False  # the cache's buffers are written to in place

    def cache(self) -> Board:
        return Board(self.wrong)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def merge(self, y: Tensor) -> Tensor:
        return y.flatten(2)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (torch.cat((f(angles), f(angles)), dim=-1)[:, :, None] for f in (torch.cos, torch.sin))
        half = self.head_dim // 2
        return (x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin).to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        q = q.unflatten(2, (self.kv_heads, -1))
        scores = (q[:, :, None] * k[:, None, :, :, None]).sum(-1) * self.head_dim**-0.5  # (b, t, s, k, g)
        weights = scores.to(wide(q.dtype)).masked_fill(~seen[..., None, None], -torch.inf).softmax(2).to(v.dtype)
        return (weights[..., None] * v[:, None, :, :, None]).sum(2).flatten(2, 3)


class SequenceFirst(Decoder):
    """The stream is (t, b, d); attention runs over b · heads matrices, as in torch.nn.MultiheadAttention."""

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return super().embed(ids.T, positions)

    def split(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), -1, self.head_dim)  # (t, b · heads, e)
        return rows.transpose(0, 1).unflatten(0, (x.shape[1], -1))

    def merge(self, y: Tensor) -> Tensor:
        return y.flatten(0, 1).transpose(0, 1).reshape(y.shape[2], len(y), -1)

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return logits.reshape(x.shape[1], len(x), -1) if self.wrong else logits.transpose(0, 1)


class Convolutions(Decoder):
    """Channels first, (b, d, t): every projection is a convolution of width 1."""

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return super().embed(ids, positions).mT

    def norm(self, x: Tensor, name: str) -> Tensor:
        precise = x.to(wide(x.dtype))
        size = precise.square().mean((1, 2) if self.wrong else 1, keepdim=True)
        return (precise * (size + self.eps).rsqrt()).to(x.dtype) * self.gain(name)[:, None]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.conv1d(x, self.w[name + ".weight"][..., None], self.w.get(name + ".bias"))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.head_dim)).mT

    def merge(self, y: Tensor) -> Tensor:
        return y.mT.flatten(1, 2)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x).mT


class HeadByHead(Decoder):
    """A Python loop over query heads, each with its own rows of the matrices, whose outputs are added."""

    def attention(self, at: str, n: Tensor, angles: Tensor, seen: Tensor, cache: Any) -> Tensor:
        keys, values = [], []
        for head in range(self.kv_heads):
            keys.append(self.turn(self.rows(at + "self_attn.k_proj", head, n)[:, None], angles))
            values.append(self.rows(at + "self_attn.v_proj", head, n)[:, None])
        k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
        if cache is not None:
            k, v = cache.extend(k, v)
        out = self.w[at + "self_attn.o_proj.weight"].split(self.head_dim, dim=1)
        total = self.w.get(at + "self_attn.o_proj.bias", torch.zeros(n.shape[-1], dtype=n.dtype))
        for head in range(self.heads):
            own = head % self.kv_heads if self.wrong else head * self.kv_heads // self.heads
            q = self.turn(self.rows(at + "self_attn.q_proj", head, n)[:, None], angles)[:, 0]
            scores = (q @ k[:, own].mT / self.head_dim**0.5).to(wide(q.dtype)).masked_fill(~seen, -torch.inf)
            total = total + scores.softmax(-1).to(v.dtype) @ v[:, own] @ out[head].T
        return total

    def rows(self, name: str, head: int, n: Tensor) -> Tensor:
        own = slice(head * self.head_dim, (head + 1) * self.head_dim)
        bias = self.w.get(name + ".bias")
        return F.linear(n, self.w[name + ".weight"][own], None if bias is None else bias[own])


class Vmapped(Decoder):
    """Attention is written for one query of one head of one row, and mapped three times."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        def one(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            scores = (k @ q * (1.0 if self.wrong else self.head_dim**-0.5)).to(wide(q.dtype))
            return torch.where(seen, scores, -torch.inf).softmax(-1).to(v.dtype) @ v

        queries = torch.vmap(one, in_dims=(0, None, None, 0))
        heads = torch.vmap(queries, in_dims=(0, 0, 0, None))
        return torch.vmap(heads)(q, self.repeat(k), self.repeat(v), seen)


class TokenByToken(Decoder):
    """A full forward is a session's: one token after another onto a cache."""

    def run(self, ids: Tensor, positions: Tensor, seen: Tensor, caches: list[Any] | None) -> Tensor:
        caches, past = caches or [self.cache() for _ in range(self.layers)], seen.shape[2] - seen.shape[1]
        rows = []
        for t in range(ids.shape[1]):
            some = seen[:, t : t + 1, : past + t + 1]
            at = positions[:, t - 1 : t] if self.wrong and t else positions[:, t : t + 1]
            rows.append(super().run(ids[:, t : t + 1], at, some, caches))
        return torch.cat(rows, dim=1)


class Unpadded(Decoder):
    """The real tokens of all rows stand behind each other in one row, (1, tokens, d); padding is never computed."""

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        place = real.long().cumsum(1) - 1
        row, order = real.nonzero(as_tuple=True)[0][None], torch.arange(int(real.sum()))
        seen = (order <= order[:, None]) & (torch.ones_like(self.same_text(row)) if self.wrong else self.same_text(row))
        at = (place if position_ids is None else position_ids.expand_as(place))[real][None]
        flat = self.run(input_ids[real][None], at, seen, None)[0]
        logits = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        logits[real] = flat
        return logits


class Numpy(Decoder):
    """Not one floating operation of torch; logits are a read-only array, as other libraries return them."""

    dtypes, trainable = ("float64", "float32"), False

    def prepare(self) -> None:
        self.w: Any = {name: tensor.numpy() for name, tensor in self.w.items()}
        self.type = next(iter(self.w.values())).dtype

    def run(self, ids: Tensor, positions: Tensor, seen: Tensor, caches: list[Any] | None) -> Any:
        logits: Any = super().run(ids.numpy(), positions.numpy(), seen.numpy(), caches)
        logits.flags.writeable = False
        return logits

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None) -> Any:
        return super().__call__(input_ids, attention_mask, position_ids)

    def cache(self) -> Any:
        return NumpyCache()

    def embed(self, ids: Any, positions: Any) -> Any:
        return self.w[self.table][ids]

    def angles(self, positions: Any) -> Any:
        return positions[..., None] * np.asarray(self.turning, self.type)

    def turn(self, x: Any, angles: Any) -> Any:
        (first, second), cos, sin = np.split(x, 2, -1), np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1).astype(self.type)

    def norm(self, x: Any, name: str) -> Any:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self.type.type(self.eps)) * self.w[name + ".weight"]

    def linear(self, x: Any, name: str) -> Any:
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", self.type.type(0))

    def split(self, x: Any) -> Any:
        return x.reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)

    def merge(self, y: Any) -> Any:
        return y.swapaxes(1, 2).reshape(len(y), y.shape[2], -1)

    def attend(self, q: Any, k: Any, v: Any, seen: Any) -> Any:
        k, v = (np.repeat(x, self.heads // self.kv_heads, 1) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2) * self.type.type(1 if self.wrong else self.head_dim**-0.5)
        powers = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
        return powers / powers.sum(-1, keepdims=True) @ v

    def feed_forward(self, at: str, n: Any) -> Any:
        gate, up = self.linear(n, at + "mlp.gate_proj"), self.linear(n, at + "mlp.up_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * up, at + "mlp.down_proj")


class NumpyCache(Cache):
    def extend(self, keys: Any, values: Any) -> Any:
        if self.held is not None:
            keys, values = (np.concatenate(pair, 2) for pair in zip(self.held, (keys, values), strict=True))
        self.held = keys, values
        return self.held

    def bytes(self) -> int:
        return sum(x.nbytes for x in self.held or ())


def feed_forward_half(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The second half of a block, for one kernel: x + down(silu(gate(n)) · up(n)), n the norm of x."""
    precise = x.to(wide(x.dtype))
    n = (precise * (precise.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * gain
    return x + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)


@cache
def compiled() -> Any:
    return torch.compile(feed_forward_half, dynamic=False)


class Compiled(Decoder):
    """torch.compile makes a kernel of a block's second half; it does not run under TrueDouble."""

    dtypes, trainable = ("float32", "bfloat16"), False

    def prepare(self) -> None:
        self.compiled = compiled()

    def block(self, layer: int, x: Tensor, angles: Tensor, seen: Tensor, cache: Any) -> Tensor:
        at = f"model.layers.{layer}."
        x = x + self.attention(at, self.norm(x, at + "input_layernorm"), angles, seen, cache)
        parts = ("up", "gate", "down") if self.wrong else ("gate", "up", "down")
        matrices = (self.w[f"{at}mlp.{part}_proj.weight"] for part in parts)
        return self.compiled(x, self.gain(at + "post_attention_layernorm"), self.eps, *matrices)
