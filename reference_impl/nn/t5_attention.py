"""T5's attention: no scale, no biases on the projections, and a position bias on the scores (Switch Transformer).

Shapes: B batch, T tokens of this call (queries), S keys, H heads, Dh d_kv.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference_impl.nn.attention import AttentionKernel, merge_heads, split_heads
from reference_impl.nn.kv_cache import LayerCache

# Keys and values of all heads, (B, H, S, Dh) each.
KeysAndValues = tuple[Float[Tensor, "batch heads keys head_dim"], Float[Tensor, "batch heads keys head_dim"]]


class T5Attention(AttentionKernel):
    """Self-attention, or attention over the states of an encoder.

        Attention(Q, K, V) = softmax(Q Kᵀ + b) V

    Raffel et al. 2020 (arXiv:1910.10683), section 2.1: b → `bias`, made by `relative_position_bias` from the table
    `relative_attention_bias`. Only the first layer of a stack has such a table; its bias serves all layers of the stack.
    Scores are not divided by √Dh: T5 folds that into the scale at which it initialises q.

    Children without weights show to forward hooks what no projection returns, as in `AttentionKernel`.

    Args:
        num_buckets: rows of the table; None: it has none.
    """

    def __init__(self, *, d_model: int, d_kv: int, num_heads: int, num_buckets: int | None, attention: str) -> None:
        super().__init__(attention, scale=1.0)
        self.d_kv = d_kv
        self.q = nn.Linear(d_model, num_heads * d_kv, bias=False)
        self.k = nn.Linear(d_model, num_heads * d_kv, bias=False)
        self.v = nn.Linear(d_model, num_heads * d_kv, bias=False)
        self.o = nn.Linear(num_heads * d_kv, d_model, bias=False)
        if num_buckets is not None:
            self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def keys_and_values(self, states: Float[Tensor, "batch keys hidden"]) -> KeysAndValues:
        """Of an encoder's states: the same for every target token, so that they need computing only once."""
        return split_heads(self.k(states), self.d_kv), split_heads(self.v(states), self.d_kv)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        mask: Bool[Tensor, "#batch 1 seq keys"],
        bias: Float[Tensor, "#batch heads seq keys"] | None = None,
        memory: KeysAndValues | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`mask`: True where a query may see a key. `memory`: the keys and values of an encoder; None: those of `x`,
        with the earlier ones of `cache` before them."""
        query = split_heads(self.q(x), self.d_kv)  # (B, H, T, Dh)
        key, value = self.keys_and_values(x) if memory is None else memory  # (B, H, S, Dh)
        if cache is not None:
            key, value = cache.append(key, value)
        output: Tensor = self.o(merge_heads(self.attend(query, key, value, mask, bias)))
        return output
