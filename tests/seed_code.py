"""The code of the document that this project started from, as candidates.

The first half is the document's own: nothing is changed but spaces, and the script at its end is a function. The second
half sets what the document keeps in globals, sizes and layers, from the case, and hands it one sequence at a time:

    conformance run tests/seed_code.py:positional_encoding --family sinusoidal_positions
"""

# ruff: noqa: RET504

import math

import torch
from torch import Tensor, nn

from conformance import Unsupported

# --- the document's code --------------------------------------------------------------------------------------------


def build_absolute_positional_encoding_naive():
    positions = torch.arange(max_seq_length)  # [0,1,2, ... max_seq_length]
    positions = positions.unsqueeze(1)  # [0,1,2, ... max_seq_length][]
    embeddings = torch.arange(embedding_dim)  # [0,1,2, ... embedding_dim]

    # pos/10000^(2i/dmodel)
    angle = positions / torch.pow(10000, (2 * embeddings / embedding_dim))

    # PE(pos, 2i+0) = sin( pos/10000^(2i/dmodel) )
    # PE(pos, 2i+1) = cos( pos/10000^(2i/dmodel) )
    positional_encoding = torch.empty(max_seq_length, embedding_dim)
    positional_encoding[:, 0::2] = torch.sin(angle[:, 0::2])
    positional_encoding[:, 1::2] = torch.cos(angle[:, 1::2])
    return positional_encoding


def multi_head_attention_naive(input_embd: torch.Tensor, num_heads: int) -> torch.Tensor:
    q1 = q(input_embd)
    k1 = k(input_embd)
    v1 = v(input_embd)

    seq_length = input_embd.size(0)
    head_length = embedding_dim // num_heads

    # We work on per-head sequences (no batching for now)
    # Rearrange data as [num_heads, seq_length, head_length]
    q2 = q1.view(seq_length, num_heads, head_length).transpose(0, 1)
    k2 = k1.view(seq_length, num_heads, head_length).transpose(0, 1)
    v2 = v1.view(seq_length, num_heads, head_length).transpose(0, 1)

    # q * k_transposed / sqrt(dk)
    dk = head_length
    qk = q2.matmul(k2.transpose(1, 2)) / math.sqrt(dk)

    # out = softmax(qk) * v (no out projection for now)
    mh_attn = nn.functional.softmax(qk, dim=-1)
    mh_attn_out = mh_attn.matmul(v2)

    # Rearrange data back as [seq_length, embedding_dim]
    mh_attn_out = mh_attn_out.transpose(0, 1).reshape(seq_length, embedding_dim)
    return mh_attn_out


def multi_head_attention_add_and_norm_naive(input_embd: torch.Tensor):
    return norm_layer1(input_embd)


def feed_forward_add_norm_naive(input_embd: torch.Tensor):
    return norm_layer2(input_embd)


def feed_forward_naive(input_embd: torch.Tensor):
    hidden_states = ffn_linear1(input_embd)
    hidden_states = ffn_drop(ffn_act(hidden_states))
    hidden_states = ffn_linear2(hidden_states)
    return hidden_states


def everything_together(input_embd: torch.Tensor, num_heads: int):
    """The document has this as a script, with `torch.rand(16, embedding_dim)` and 32 heads."""
    positional_encoding = build_absolute_positional_encoding_naive()
    input_embd += positional_encoding[: input_embd.size(0)]

    mh_attn_out = multi_head_attention_naive(input_embd, num_heads=num_heads)
    hidden_states = multi_head_attention_add_and_norm_naive(mh_attn_out)

    ffn_out = feed_forward_naive(hidden_states)
    hidden_states = feed_forward_add_and_norm_naive(ffn_out)
    return hidden_states


# --- its globals ----------------------------------------------------------------------------------------------------


def set_globals(embedding_size: int, num_positions: int, ffn_size: int | None = None) -> None:
    """The document's constants and layers, in these sizes. ffn_size: 4 · embedding_size, as it has it, if None."""
    global embedding_dim, max_seq_length, q, k, v, norm_layer1, norm_layer2
    global ffn_linear1, ffn_linear2, ffn_act, ffn_drop
    embedding_dim, max_seq_length = embedding_size, num_positions
    ffn_size = 4 * embedding_dim if ffn_size is None else ffn_size

    q = nn.Linear(embedding_dim, embedding_dim, bias=False)
    k = nn.Linear(embedding_dim, embedding_dim, bias=False)
    v = nn.Linear(embedding_dim, embedding_dim, bias=False)

    norm_layer1 = nn.LayerNorm(embedding_dim)  # learnable
    norm_layer2 = nn.LayerNorm(embedding_dim)  # learnable

    ffn_linear1 = nn.Linear(embedding_dim, ffn_size)
    ffn_linear2 = nn.Linear(ffn_size, embedding_dim)
    ffn_act = nn.ReLU()
    ffn_drop = nn.Dropout(0.1)  # discard random 10% to avoid overfit


def give(layer: nn.Module, **tensors: Tensor) -> None:
    """The layer's parameters become these tensors themselves, so that gradients reach them."""
    for name, tensor in tensors.items():
        delattr(layer, name)
        setattr(layer, name, tensor)


# --- the candidates -------------------------------------------------------------------------------------------------


def positional_encoding(position_ids: Tensor, hidden_size: int, layout: str) -> Tensor:
    if layout != "interleaved":
        raise Unsupported("the document has the interleaved layout alone")
    set_globals(hidden_size, int(position_ids.max()) + 1)
    return build_absolute_positional_encoding_naive()[position_ids]


def attention(
    query: Tensor, key: Tensor, value: Tensor, q_proj_weight: Tensor, q_proj_bias: Tensor, k_proj_weight: Tensor,
    k_proj_bias: Tensor, v_proj_weight: Tensor, v_proj_bias: Tensor, num_attention_heads: int,
    attention_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if not (query.shape == key.shape == value.shape and query.equal(key) and query.equal(value)):
        raise Unsupported("the document has self-attention alone")
    if q_proj_bias.any() or k_proj_bias.any() or v_proj_bias.any() or attention_mask is not None:
        raise Unsupported("the document has no biases and no padding")
    set_globals(query.shape[-1], query.shape[1])
    give(q, weight=q_proj_weight)
    give(k, weight=k_proj_weight)
    give(v, weight=v_proj_weight)
    return torch.stack([multi_head_attention_naive(sequence, num_attention_heads) for sequence in query])


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    set_globals(x.shape[-1], x.shape[1])
    give(norm_layer1, weight=weight, bias=bias)
    return torch.stack([multi_head_attention_add_and_norm_naive(sequence) for sequence in x])


def add_and_norm(sublayer_output: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The document calls it with the sub-layer's output and nothing else."""
    set_globals(sublayer_output.shape[-1], sublayer_output.shape[1])
    give(norm_layer2, weight=weight, bias=bias)
    return torch.stack([feed_forward_add_norm_naive(sequence) for sequence in sublayer_output])


def feed_forward(
    x: Tensor, linear1_weight: Tensor, linear1_bias: Tensor, linear2_weight: Tensor, linear2_bias: Tensor,
    hidden_act: str, dropout: bool = True,
) -> Tensor:  # fmt: skip
    if hidden_act != "relu":
        raise Unsupported("the document has ReLU alone")
    set_globals(x.shape[-1], x.shape[1], len(linear1_weight))
    give(ffn_linear1, weight=linear1_weight, bias=linear1_bias)
    give(ffn_linear2, weight=linear2_weight, bias=linear2_bias)
    ffn_drop.train(dropout)
    return torch.stack([feed_forward_naive(sequence) for sequence in x])


def feed_forward_without_dropout(
    x: Tensor, linear1_weight: Tensor, linear1_bias: Tensor, linear2_weight: Tensor, linear2_bias: Tensor,
    hidden_act: str,
) -> Tensor:  # fmt: skip
    """With `ffn_drop.eval()`, which the document never calls."""
    return feed_forward(x, linear1_weight, linear1_bias, linear2_weight, linear2_bias, hidden_act, dropout=False)
