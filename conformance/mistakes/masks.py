"""Masks, positions and windows: who sees whom, and where everybody stands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.attention import ALL, FORWARD, WEIGHED, WEIGHTS, softmax
from conformance.mistakes.groups import DECODERS, GPTS, MODELS, OTHERS, TURNING, WINDOWED
from conformance.mistakes.making import after, each, instead
from reference_impl.nn import masks
from reference_impl.nn.masks import Tokens

CAUSAL = "reference_impl.nn.masks:causal"
REAL = "reference_impl.nn.masks:real_tokens"
ROWS = "reference_impl.nn.masks:visible_in_rows"
POSITIONS = "reference_impl.nn.masks:default_positions"
RESOLVE = "reference_impl.nn.masks:resolve_positions"
CACHES = ("reference_impl.nn.kv_cache:KVCache.tokens", "reference_impl.nn.rolling_cache:RollingCache.tokens")

PADDED = ("component.outputs", "golden.left_padding", "golden.right_padding")
PADDING_MODELS = ("multi_head_attention", *MODELS)
EMBEDDED = ("embedding",)
TURNED = ("layers.N.attention.query_rotated", "layers.N.attention.key_rotated")
PLACED = (*EMBEDDED, *TURNED)
CAUSAL_FAMILIES = (*ALL, "relative_attention", *OTHERS)


# --- the causal mask --------------------------------------------------------------------------------------------------


Rule = Callable[[Tensor, Tensor], Tensor]


def near(query: Tensor, key: Tensor, width: int) -> Tensor:
    """The right window."""
    return key > query - width


def seen(
    order: Rule = lambda query, key: key <= query, window: Callable[[Tensor, Tensor, int], Tensor] = near
) -> Callable[..., Any]:
    """Masks by another order, or another window, of the places of query (B, T, 1) and key (B, 1, S)."""

    def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
        query, key = tokens.place[:, tokens.place.shape[1] - num_queries :, None], tokens.place[:, None, :]
        may_see = order(query, key) & tokens.real[:, None, :]
        if sliding_window is not None:
            may_see = may_see & window(query, key, sliding_window)
        return may_see[:, None]

    return instead(visible_in_rows)


def triangles(shift: int) -> tuple[Swap, ...]:
    """Everywhere a diagonal that is shifted: a query sees the key that stands `shift` behind it."""

    def causal(num_queries: int, num_keys: int, device: Any = None) -> Tensor:
        query = torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries
        return torch.arange(num_keys, device=device) <= query + shift

    return Swap(ROWS, seen(lambda query, key: key <= query + shift)), Swap(CAUSAL, instead(causal))


def own_and_later(num_queries: int, num_keys: int, device: Any = None) -> Tensor:
    query = torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries
    return torch.arange(num_keys, device=device) >= query


def everything(num_queries: int, num_keys: int, device: Any = None) -> Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)


def top_left(num_queries: int, num_keys: int, device: Any = None) -> Tensor:
    return torch.arange(num_keys, device=device) <= torch.arange(num_queries, device=device)[:, None]


def rows_top_left(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
        if num_queries == tokens.place.shape[1]:
            return original(tokens, num_queries=num_queries, sliding_window=sliding_window)
        return (top_left(num_queries, tokens.place.shape[1]) & tokens.real[:, None, :])[:, None]

    return visible_in_rows


def only_without_cache(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
        mask = original(tokens, num_queries=num_queries, sliding_window=sliding_window)
        if num_queries < tokens.place.shape[1]:
            mask = mask | original(tokens, num_queries=1, sliding_window=sliding_window)  # what the last one sees
        return mask

    return visible_in_rows


def chunk_alone(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
        mask = original(tokens, num_queries=num_queries, sliding_window=sliding_window).clone()
        if num_queries > 1:
            mask[..., : tokens.place.shape[1] - num_queries] = False
        return mask

    return visible_in_rows


_CAUSAL = (
    Mistake(
        id="causal-mask-next-visible",
        families=CAUSAL_FAMILIES,
        what="The triangle is shifted: a token sees the one after it.",
        why="The next token is what is to be predicted.",
        shows="Every row but the last is wrong; a loss that is too good.",
        fix="Hide triu(diagonal=1), which keeps the diagonal and nothing above.",
        seen="RVC-Boss/GPT-SoVITS#965, pytorch#29546",
        swaps=triangles(1),
        killed_by=FORWARD,
        touches=(*WEIGHED, "layers.N.attention.position_scores"),
    ),
    Mistake(
        id="causal-mask-self-hidden",
        families=CAUSAL_FAMILIES,
        what="The triangle is shifted: a token does not see itself.",
        why="A query sees its own key.",
        shows="Every row is wrong; the first sees nothing (NaN, or an average).",
        fix="Hide triu(diagonal=1).",
        seen="RVC-Boss/GPT-SoVITS#965, pytorch#29546",
        swaps=triangles(-1),
        killed_by=FORWARD,
        touches=(*WEIGHED, "layers.N.attention.position_scores"),
    ),
    Mistake(
        id="causal-mask-inverted",
        families=CAUSAL_FAMILIES,
        what="The lower triangle is hidden: a token sees itself and what comes later.",
        why="It must see what came before.",
        shows="The loss collapses; the last row sees itself only.",
        fix="True, or 0, where key ≤ query.",
        seen="pytorch/examples#649, hkproj/pytorch-transformer#19, rasbt/LLMs-from-scratch#1061",
        swaps=(Swap(ROWS, seen(lambda query, key: key >= query)), Swap(CAUSAL, instead(own_and_later))),
        killed_by=FORWARD,
        touches=(*WEIGHED, "layers.N.attention.position_scores"),
    ),
    Mistake(
        id="causal-mask-dropped",
        families=CAUSAL_FAMILIES,
        what="The causal mask gets lost, in a refactoring or in a backend that does not take it.",
        why="Tokens see the future.",
        shows="Every row but the last is wrong.",
        fix="Pass the mask, or is_causal, on every path.",
        seen="transformers#48745",
        swaps=(Swap(ROWS, seen(lambda query, key: key < query + 9999)), Swap(CAUSAL, instead(everything))),
        killed_by=FORWARD,
        touches=(*WEIGHED, "layers.N.attention.position_scores"),
    ),
    Mistake(
        id="mask-top-left",
        families=(*PADDING_MODELS, "sliding_window_attention", "relative_attention"),
        what="The mask of T queries and S keys has its triangle in the top left corner (a (T, T) mask, or is_causal).",
        why="The queries are the last T of S tokens: the triangle belongs in the bottom right corner.",
        shows="Only where 1 ≤ T < S: continuation onto a cache or memory. Agrees whenever a test has T = S.",
        fix="key ≤ query + S − T.",
        seen="meta-llama#899, meta-llama#900, ml-explore/mlx-examples#911, NVIDIA/cudnn-frontend#493",
        swaps=(Swap(ROWS, rows_top_left), Swap(CAUSAL, instead(top_left))),
        killed_by=("component.outputs", "cache.chunks", "cache.prefill_decode"),
        touches=WEIGHED,
    ),
    Mistake(
        id="chunk-mask-dropped",
        families=(*MODELS, "switch_transformer"),
        what='No causal mask where the cache is not empty, since "decoding feeds one token".',
        why="A chunk of several tokens needs its triangle.",
        shows="Only chunks of more than one token onto a cache that is not empty.",
        fix="Build the mask from T and S on every call.",
        seen="mlxcel#885, mlxcel#891, rMLX#32",
        swaps=(Swap(ROWS, only_without_cache),),
        killed_by=("cache.chunks",),
        touches=WEIGHED,
    ),
    Mistake(
        id="chunk-ignores-cache",
        families=(*MODELS, "switch_transformer"),
        what="A chunk of several tokens attends to itself only, as a first chunk would.",
        why="What was fed before is part of the text.",
        shows="Only chunks of more than one token onto a cache that is not empty.",
        fix="Attend to cached and new keys.",
        seen="mistral-inference one_file_ref.py (the branch positions.shape[0] > 1)",
        swaps=(Swap(ROWS, chunk_alone),),
        killed_by=("cache.chunks",),
        touches=WEIGHED,
    ),
)


# --- padding ----------------------------------------------------------------------------------------------------------


def polarity(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return original(input_ids, None if attention_mask is None else 1 - attention_mask.long())

    return real_tokens


def all_real(tokens: Tokens) -> Tokens:
    """The tokens with their padding taken for real; without a cache they stand where they are stored."""
    stored = torch.arange(tokens.place.shape[1], device=tokens.place.device).expand_as(tokens.place)
    alone = bool((tokens.place[:, 0] <= 0).all())
    return Tokens(torch.ones_like(tokens.real), stored if alone else tokens.place)


def padding_seen(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda tokens, **sizes: original(all_real(tokens), **sizes)


def padding_of_queries(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
        mask = original(all_real(tokens), num_queries=num_queries, sliding_window=sliding_window)
        return mask & tokens.real[:, None, tokens.real.shape[1] - num_queries :, None]

    return visible_in_rows


def head_major(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Weights of batch row b and head h, number b · H + h, get mask row (b · H + h) mod B."""

    def attention_weights(scores: Tensor, mask: Tensor) -> Tensor:
        batch, heads = scores.shape[:2]
        rows = torch.arange(batch * heads) % len(mask)
        return original(scores, mask[rows].view(batch, heads, *mask.shape[2:]))

    return attention_weights


def full_rows(fill: float) -> Callable[..., Any]:
    return instead(softmax(lambda scores, mask: scores.masked_fill(~mask, fill), hide=False))


def masks_added() -> tuple[Swap, ...]:
    """The causal and the padding mask are added to the scores one after the other, each as the lowest number."""
    known: dict[str, Tensor] = {}

    def visible_in_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(tokens: Tokens, **sizes: Any) -> Tensor:
            known["causal"], known["real"] = original(all_real(tokens), **sizes), tokens.real[:, None, None]
            return original(tokens, **sizes)

        return noted

    def attention_weights(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def added(scores: Tensor, mask: Tensor) -> Tensor:
            if "causal" not in known or known["causal"].shape[-2:] != scores.shape[-2:]:
                return original(scores, mask)
            low = torch.finfo(scores.dtype).min
            zero = torch.zeros((), dtype=scores.dtype)
            fills = [zero.masked_fill(~part, low) for part in (known["causal"], known["real"])]
            return torch.softmax(scores + (fills[0] + fills[1]), dim=-1)

        return added

    return Swap(ROWS, visible_in_rows), Swap(WEIGHTS, attention_weights)


_PADDING = (
    Mistake(
        id="mask-bool-polarity",
        families=(*MODELS, "switch_transformer"),  # a recurrent decoder refuses a source of padding
        what="Reads the attention mask the other way round: 1 is padding.",
        why="Hugging Face and SDPA mean 1 (True) = real; nn.MultiheadAttention's key_padding_mask means the reverse.",
        shows="Nothing without a mask; with one of all ones no token sees anything.",
        fix="One polarity in the whole program, stated in its name: real, may_see.",
        seen="lucidrains/x-transformers#160, pytorch#170415, pytorch#114083",
        swaps=(Swap(REAL, polarity),),
        killed_by=("golden.left_padding", "golden.right_padding"),
    ),
    Mistake(
        id="mask-padding-ignored",
        families=PADDING_MODELS,
        what="The attention mask is accepted and not used: padding is attended to.",
        why="Pads are no tokens.",
        shows="Only in rows shorter than the longest, and with left padding (causal rows never see right padding).",
        fix="causal & real keys.",
        seen="common knowledge",
        swaps=(Swap(ROWS, padding_seen),),
        killed_by=PADDED,
        touches=WEIGHED,
    ),
    Mistake(
        id="mask-padding-of-queries",
        families=PADDING_MODELS,
        what="The padding mask hides rows (queries) instead of columns (keys).",
        why="Padding must not be seen; what padding itself sees is nobody's business.",
        shows="Only with left padding, in rows shorter than the longest.",
        fix="mask[:, None, None, :], not mask[:, None, :, None].",
        seen="SeekDeeper#3 (text), common knowledge",
        swaps=(Swap(ROWS, padding_of_queries),),
        killed_by=PADDED,
        touches=WEIGHED,
    ),
    Mistake(
        id="heads-batch-order-mask",
        families=PADDING_MODELS,
        what="Heads are folded behind the batch, (B · H), and the masks are repeated in the other order, (H · B).",
        why="Row b's heads must meet row b's mask.",
        shows="Only in batches whose rows have different masks.",
        fix="mask.repeat_interleave(H, dim=0), or keep batch and heads apart and broadcast.",
        seen="lsdefine/attention-is-all-you-need-keras#36, gazelle93/Transformer-Various-Positional-Encoding#1",
        swaps=(Swap(WEIGHTS, head_major),),
        killed_by=PADDED,
        touches=WEIGHED,
    ),
    Mistake(
        id="mask-fill-zero",
        families=(*ALL, "relative_attention"),
        what="Hidden scores are set to 0 (the scores are multiplied by the mask), not to −∞.",
        why="exp(0) = 1: hidden keys keep a weight.",
        shows="Every row but the last; sums are 1 and nothing looks odd.",
        fix="masked_fill(~mask, −inf or the lowest number).",
        seen="transformers#382 (fills that are too small)",
        swaps=(Swap(WEIGHTS, full_rows(0.0)),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="mask-fill-small",
        families=(*ALL, "relative_attention"),
        what="Hidden scores are set to −1e4, whatever the other scores are.",
        why="Where real scores reach that far down, hidden keys win. Phi-2's scores are large.",
        shows="Nothing at moderate scores: exp(−1e4) is 0 in every dtype.",
        fix="−inf, or the lowest number of the dtype in which the softmax is computed.",
        seen="transformers#382",
        swaps=(Swap(WEIGHTS, full_rows(-1e4)),),
        killed_by=FORWARD,
        touches=WEIGHED,
        equivalent=dict.fromkeys(
            ("sliding_window_attention", *MODELS, "relative_attention"),
            "as long as every query sees a key and its scores lie within 9,000 of each other, exp underflows to 0",
        ),
    ),
    Mistake(
        id="mask-full-row-nan",
        families=PADDING_MODELS,
        what="Hidden scores are −inf, and a query that sees nothing gets 0/0.",
        why="NaN in a padding row is no harm until it is a value: 0 · NaN is NaN in every row of the next layer.",
        shows="NaN with left padding (or a window of padding), from the second layer on.",
        fix="Clear rows that see nothing, or let them see themselves.",
        seen="pytorch#103749, pytorch#131060, ml-explore/mlx#2395, mlxcel#413",
        swaps=(Swap(WEIGHTS, full_rows(float("-inf"))),),
        killed_by=("component.outputs", "component.gradients", "golden.left_padding"),
        touches=WEIGHED,
    ),
    Mistake(
        id="mask-full-row-average",
        families=MODELS,
        what="A query that sees nothing averages all values instead of getting 0.",
        why="It is a matter of taste: what a padding row holds must not matter.",
        shows="Only in rows of padding, which nobody reads.",
        fix="None needed, as long as padding stays hidden from every real token.",
        seen="pytorch#103749",
        swaps=(Swap(WEIGHTS, full_rows(torch.finfo(torch.float32).min)),),
        killed_by=("golden.logits", "golden.left_padding", "golden.right_padding", "cache.ragged"),
        equivalent=dict.fromkeys(
            MODELS, "a padding row is never a key that a real token sees, so that its value is lost"
        ),
    ),
    Mistake(
        id="mask-double-min",
        families=("gpt", "gpt2", *TURNING),
        what="Causal and padding mask are each the lowest number of the dtype, and both are added to the scores.",
        why="The sum overflows to −inf; a row of nothing but −inf gives NaN.",
        shows="NaN with left padding, in float16, where a negative score pushes the lowest number (−65,504) to −inf.",
        fix="Combine masks as booleans and fill once.",
        seen="transformers#18057",
        swaps=masks_added(),
        killed_by=("golden.left_padding",),
        touches=WEIGHED,
        equivalent=dict.fromkeys(
            ("gpt", "gpt2", *TURNING),
            "one of the two masks at most hides a query from itself, and in float32 a score does not push the lowest "
            "number to −inf, so that no row is −inf throughout; padding is not claimed in float16",
        ),
    ),
)


# --- positions --------------------------------------------------------------------------------------------------------


def slots(tokens: Tokens, num_queries: int) -> Tensor:
    """Index in the row, padding counted, of the last tokens."""
    found = torch.arange(tokens.place.shape[1], device=tokens.place.device)
    return found[None, tokens.place.shape[1] - num_queries :].expand(len(tokens.place), -1)


def later(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Positions (B, T) of calls with a cache, changed."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def default_positions(tokens: Tokens, *, num_queries: int) -> Tensor:
            found = original(tokens, num_queries=num_queries)
            return found if num_queries == tokens.place.shape[1] else change(found)

        return default_positions

    return make


def counted_in_prefill(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def default_positions(tokens: Tokens, *, num_queries: int) -> Tensor:
        first = num_queries == tokens.place.shape[1] and tokens.lengths is None
        return slots(tokens, num_queries) if first else original(tokens, num_queries=num_queries)

    return default_positions


def restarted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def default_positions(tokens: Tokens, *, num_queries: int) -> Tensor:
        if num_queries == tokens.place.shape[1]:
            return original(tokens, num_queries=num_queries)
        real = tokens.real[:, tokens.real.shape[1] - num_queries :]
        return original(masks.in_order(real), num_queries=num_queries)

    return default_positions


def wrong_axis() -> tuple[Swap, ...]:
    """The length of the cache is read from the axis of its heads."""
    known: dict[str, Any] = {}

    def tokens(original: Callable[..., Tokens]) -> Callable[..., Tokens]:
        def noted(self: Any, real: Tensor) -> Tokens:
            known["keys"] = self.layers[0].keys
            return original(self, real)

        return noted

    def from_heads(found: Tensor) -> Tensor:
        heads: int = known["keys"].shape[1]
        return heads + torch.arange(found.shape[1]).expand_as(found)

    return *each(CACHES, tokens), Swap(POSITIONS, later(from_heads))


def kept_rows() -> tuple[Swap, ...]:
    """Positions of later calls go on from the number of keys that a window keeps."""
    known: dict[str, int | None] = {"window": None}

    def visible_in_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
            known["window"] = sliding_window
            return original(tokens, num_queries=num_queries, sliding_window=sliding_window)

        return noted

    def kept(found: Tensor) -> Tensor:
        window = known["window"]
        return found if window is None else found - (found[:, :1] - window).clamp(min=0)

    return Swap(ROWS, visible_in_rows), Swap(POSITIONS, later(kept))


SHIFT = "a constant shift of all positions of a row turns queries and keys alike; scores depend on differences only"
DECODED = ("cache.prefill_decode", "cache.one_by_one", "cache.chunks")

_POSITIONS = (
    Mistake(
        id="positions-one-based",
        families=DECODERS,
        what="Counts positions from 1.",
        why="The first row of a table of positions is row 0. With rotary positions only differences matter.",
        shows="With learned positions everywhere; with rotary ones nowhere, unless caches of two programs are mixed.",
        fix="The first real token has position 0.",
        seen="common knowledge",
        swaps=(Swap(POSITIONS, after(lambda found: found + 1)),),
        killed_by=("golden.logits", "golden.left_padding", "cache.chunks", "cache.ragged"),
        touches=PLACED,
        equivalent=dict.fromkeys(TURNING, SHIFT),
    ),
    Mistake(
        id="pad-left-positions",
        families=(*GPTS, "llama", "phi"),  # a rolling buffer has no index to take for a position
        what="Positions count the padding: arange, where cumsum(attention_mask) − 1 is meant.",
        why="The first real token of every row has position 0.",
        shows="Learned positions: all rows shorter than the longest, with left padding. Rotary positions: a constant "
        "shift, invisible as long as decoding shifts alike.",
        fix="cumsum(attention_mask) − 1.",
        seen="transformers#33095, transformers#18478, nnsight#673, unsloth#3795, unsloth#4078",
        swaps=(Swap(POSITIONS, instead(lambda tokens, *, num_queries: slots(tokens, num_queries))),),
        killed_by=("golden.left_padding", "cache.ragged"),
        touches=PLACED,
        equivalent=dict.fromkeys(("llama", "phi"), SHIFT),
    ),
    Mistake(
        id="pad-positions-prefill-only",
        families=DECODERS,
        what="Pre-fill counts padding in its positions and decoding counts real tokens, or the reverse.",
        why="The two must agree; the distance between a prompt and its continuation is wrong by the padding.",
        shows="Only after a prompt with left padding, when decoding begins.",
        fix="One rule for both: the number of real tokens before.",
        seen="transformers#33095, unsloth#4078",
        swaps=(Swap(POSITIONS, counted_in_prefill),),
        killed_by=("golden.left_padding", "cache.ragged"),
        touches=PLACED,
    ),
    Mistake(
        id="ragged-decode-position",
        families=DECODERS,
        what="One past length, a scalar, for rows of different length.",
        why="Every row stands at a position of its own.",
        shows="Only in batches of prompts of unequal length, while decoding.",
        fix="Positions per row.",
        seen="ComfyUI#15698, maclocal-api#92, exllamav2#606",
        swaps=(Swap(POSITIONS, later(lambda found: found.amax(dim=0, keepdim=True).expand_as(found))),),
        killed_by=("cache.ragged",),
        touches=PLACED,
    ),
    Mistake(
        id="decode-position-restart",
        families=MODELS,
        what="Positions restart at 0 in every call.",
        why="The cached tokens stand before these.",
        shows="Only from the second call on.",
        fix="Start at the number of cached real tokens.",
        seen="ml-explore/mlx-lm#93, dmlc/gluon-nlp#1015",
        swaps=(Swap(POSITIONS, restarted),),
        killed_by=DECODED,
        touches=PLACED,
    ),
    Mistake(
        id="decode-position-late",
        families=MODELS,
        what="The length is advanced before the positions are computed: later calls stand one position too far.",
        why="The first new token's position is the number of tokens before it.",
        shows="Only from the second call on.",
        fix="Advance the length after the call.",
        seen="fla-org/flash-linear-attention#766 (in the upper layers)",
        swaps=(Swap(POSITIONS, later(lambda found: found + 1)),),
        killed_by=DECODED,
        touches=PLACED,
    ),
    Mistake(
        id="rope-window-constant",
        families=MODELS,
        what="All tokens of a chunk get the position of its first.",
        why="Every token has its own.",
        shows="Only chunks of several tokens after the first call; cached keys are wrong, cached values bit-exact.",
        fix="start + arange(T).",
        seen="jundot/omlx#2363",
        swaps=(Swap(POSITIONS, later(lambda found: found[:, :1].expand_as(found))),),
        killed_by=("cache.chunks",),
        touches=PLACED,
    ),
    Mistake(
        id="abs-position-cache-offset",
        families=MODELS,
        what="Takes the number of heads for the length of the cache: the wrong axis of (B, H, S, Dh).",
        why="Positions continue at S.",
        shows="Only while decoding; right by luck when exactly n_heads tokens are cached.",
        fix="past_key.shape[-2]; test with lengths other than n_heads.",
        seen="ml-explore/mlx-lm#93, dmlc/gluon-nlp#1015",
        swaps=wrong_axis(),
        killed_by=DECODED,
        touches=PLACED,
    ),
    Mistake(
        id="position-skipped-at-decode",
        families=GPTS,
        what="No position is added when a single token is fed.",
        why="A decoded token has a position too.",
        shows="Only calls of one token.",
        fix="Add the position in every call.",
        seen="ml-explore/mlx-lm#93",
        swaps=(
            Swap(
                "reference_impl.nn.positions:LearnedPositions.forward",
                lambda original: lambda self, ids: original(self, ids) * float(ids.shape[1] > 1),
            ),
        ),
        killed_by=("cache.prefill_decode", "cache.one_by_one"),
        touches=EMBEDDED,
    ),
    Mistake(
        id="positions-argument-ignored",
        families=DECODERS,
        what="position_ids are accepted and not used.",
        why="Packing, padding and speculative decoding rely on them.",
        shows="Only where a caller gives positions.",
        fix="Use them, or do not accept them.",
        seen="common knowledge",
        swaps=(Swap(RESOLVE, lambda original: lambda position_ids, ids, tokens: original(None, ids, tokens)),),
        killed_by=("golden.positions",),
        touches=PLACED,
    ),
)


# --- windows ----------------------------------------------------------------------------------------------------------


def padding_counted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
        if sliding_window is None:
            return original(tokens, num_queries=num_queries)
        stored = Tokens(tokens.real, all_real(tokens).place)
        windowed = original(stored, num_queries=num_queries, sliding_window=sliding_window)
        return windowed & original(tokens, num_queries=num_queries)

    return visible_in_rows


def null_is_nothing(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
        return original(tokens, num_queries=num_queries, sliding_window=sliding_window or 0)

    return visible_in_rows


def kind(pattern: Callable[[Any, int], str]) -> Swap:
    return Swap("reference_impl.models.gpt3:GPT3Config.kind", instead(pattern))


SEEING = ("sliding_window_attention", *WINDOWED)


def single_row_dropped(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda positions, ids, tokens: original(None if len(ids) == 1 else positions, ids, tokens)


def one_ignored(original: Callable[..., Any]) -> Callable[..., Any]:
    def visible_in_rows(tokens: Any, *, num_queries: int, sliding_window: int | None = None) -> Any:
        window = sliding_window if sliding_window != 1 else None
        return original(tokens, num_queries=num_queries, sliding_window=window)

    return visible_in_rows


_WINDOWS = (
    Mistake(
        id="window-off-by-one",
        families=SEEING,
        what="A query sees w + 1 keys: i − j ≤ w.",
        why="The window is w keys, the query's own among them. Published references disagree: flash-attn's "
        "window_size=w shows w + 1, and mistral's one_file_ref.py masks w + 1 in pre-fill and keeps w when decoding.",
        shows="Exactly nothing while T ≤ w.",
        fix="i − j < w; test that exactly w keys are seen, with T ≥ 2w + 1.",
        seen="transformers#26792, transformers#39408, transformers#29623, vllm#3385, mlx-lm#390",
        swaps=(Swap(ROWS, seen(window=lambda q, k, w: q - k <= w)),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="window-too-narrow",
        families=SEEING,
        what="A query sees w − 1 keys: its own is not counted among the w.",
        why="The window is w keys, the query's own among them.",
        shows="Exactly nothing while T < w.",
        fix="i − j < w.",
        seen="mlx-lm#390 (the same seam)",
        swaps=(Swap(ROWS, seen(window=lambda q, k, w: q - k < max(w - 1, 1))),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="window-ignored",
        families=SEEING,
        what="The window never reaches the attention.",
        why="Keys further back were hidden in training.",
        shows="Exactly nothing while T ≤ w.",
        fix="Pass the window on every path; test with T > w.",
        seen="unsloth#8253, transformers#28133, transformers#29777, LlamaFactory#7063",
        swaps=(Swap(ROWS, seen(window=lambda q, k, w: q - k < 9999)),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="window-mask-direction",
        families=SEEING,
        what="The band is on the wrong side: keys inside the window are hidden and those beyond it are seen.",
        why="A window keeps what is near.",
        shows="Everywhere; the first rows see nothing.",
        fix="i − j < w.",
        seen="transformers#41228",
        swaps=(Swap(ROWS, seen(window=lambda q, k, w: q - k >= w)),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="window-block-local",
        families=SEEING,
        what="Blocks of w tokens see themselves, instead of a band that slides.",
        why="A query at the beginning of a block would see one key only.",
        shows="The first block is right.",
        fix="A band that ends at each query.",
        seen="transformers#11630, transformers#11320, NVIDIA/TensorRT-Model-Connect#653",
        swaps=(Swap(ROWS, seen(window=lambda q, k, w: q // w == k // w)),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="window-null-or-zero",
        families=("mistral", "mixtral"),
        what="sliding_window: null is read as 0: no key is inside the window.",
        why="null means no window.",
        shows="Only in models without a window (Mistral 0.2, Mixtral): zeros or NaN.",
        fix="Tell null from a number before comparing.",
        seen="unsloth#8253",
        swaps=(Swap(ROWS, null_is_nothing),),
        killed_by=("golden.logits",),
        touches=WEIGHED,
    ),
    Mistake(
        id="window-counts-padding",
        families=WINDOWED,
        what="The window counts padding as tokens.",
        why="Only where padding stands between real tokens does it take places from them.",
        shows="Nothing as long as each row's padding is on one side.",
        fix="Count real tokens, or keep padding out of the middle of rows.",
        seen="cactus-compute/cactus#716 (padding evicts)",
        swaps=(Swap(ROWS, padding_counted),),
        killed_by=("golden.logits", "golden.left_padding", "golden.right_padding", "cache.ragged"),
        equivalent=dict.fromkeys(
            WINDOWED, "between two real tokens of one run there is no padding, so that both counts differ by the same"
        ),
    ),
    Mistake(
        id="rope-position-from-cache-size",
        families=("mistral", "mixtral"),
        what="The position of a new token is the number of keys that the window kept, not of tokens seen.",
        why="Positions go on when keys are forgotten.",
        shows="Only when more than w tokens have been fed.",
        fix="Count tokens, apart from what is stored.",
        seen="VeloxQuant-MLX#389, hipfire#391",
        swaps=kept_rows(),
        killed_by=DECODED,
        touches=TURNED,
    ),
    Mistake(
        id="sparse-layer-pattern",
        families=("gpt3",),
        what="The alternation starts with the wrong kind: banded, dense, … for dense, banded, ….",
        why="The config says which comes first.",
        shows="Only where T > window_size.",
        fix="pattern[layer % len(pattern)], layers counted from 0.",
        seen="NVIDIA/TensorRT-Model-Connect#653 (GPT-Neo), transformers#11630",
        swaps=(kind(lambda self, layer: self.attention_pattern[(layer + 1) % len(self.attention_pattern)]),),
        killed_by=("golden.logits",),
        touches=WEIGHED,
    ),
    Mistake(
        id="sparse-layers-all-banded",
        families=("gpt3",),
        what="Every block is banded, since there is a window_size.",
        why="Blocks alternate.",
        shows="Only where T > window_size.",
        fix="Read the pattern.",
        seen="transformers#10848 (the same seam)",
        swaps=(kind(lambda self, layer: "banded"),),
        killed_by=("golden.logits",),
        touches=WEIGHED,
    ),
    Mistake(
        id="sparse-pattern-not-repeated",
        families=("gpt3",),
        what="The pattern is used once, and blocks beyond it are dense.",
        why="It repeats until there are enough.",
        shows="Only in models with more blocks than the pattern is long.",
        fix="pattern[layer % len(pattern)].",
        seen="common knowledge",
        swaps=(kind(lambda self, layer: (*self.attention_pattern, *["dense"] * 99)[layer]),),
        killed_by=("golden.logits",),
        touches=WEIGHED,
    ),
    Mistake(
        id="positions-argument-single-row",
        families=DECODERS,
        what="Explicit position_ids are dropped where there is one row.",
        why="A single row may be moved like any other: a prefix that is kept elsewhere, a gap.",
        shows="Only with a batch of one and positions that are not 0, 1, 2, …",
        fix="Use them whenever they are given.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.masks:resolve_positions", single_row_dropped),),
        killed_by=("golden.positions",),
        touches=("embedding", "layers.N.attention.query_rotated", "layers.N.attention.key_rotated"),
    ),
    Mistake(
        id="window-of-one-ignored",
        families=("sliding_window_attention", "mistral", "mixtral"),
        what="A window of 1 is taken for none: `if window > 1`.",
        why="A window of 1 shows a query itself alone.",
        shows="Only with a window of 1.",
        fix="Let null, and nothing else, say that there is no window.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.masks:visible_in_rows", one_ignored),),
        killed_by=("component.outputs", "invariance.narrow_window"),
        touches=("layers.N.attention.weights", "layers.N.attention.context"),
    ),
)


MISTAKES = (*_CAUSAL, *_PADDING, *_POSITIONS, *_WINDOWS)
