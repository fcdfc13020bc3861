"""The installed Hugging Face transformers as a candidate, loaded from the checkpoint directory as a user loads it."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from conformance.families import TOKENIZERS
from conformance.implementation import Unsupported
from conformance.oracles import oracle_missing

# Families whose model transformers has or had, and those of them that it has no SDPA kernel for.
HUB_FAMILIES = frozenset(
    {"gpt", "gpt2", "llama", "mistral", "mixtral", "phi", "switch_transformer", "transformer", "transformer_xl"}
)
EAGER_ONLY = frozenset({"gpt", "switch_transformer", "transformer_xl"})
# Encoder–decoder models whose positions count pads, and that take no positions of ours.
COUNTS_PADS = frozenset({"marian"})
PADS_COUNT = "its positions count pads, so that a token's position depends on the pads before it"
# What Switch stores in its configuration and never reads.
PADS_ARE_ROUTED = "router_ignore_padding_tokens is ignored: pads before a token take its room at experts"
# model_type -> how to load it. The default kernel of experts, grouped_mm, has no float64.
SETTINGS = {"mixtral": {"experts_implementation": "eager"}}


class HuggingFaceModels:
    """`AutoModelForCausalLM.from_pretrained` behind the contract.

    attention: the kernel, "eager" or "sdpa".
    """

    def __init__(self, attention: str):
        self.attention = attention

    @property
    def families(self) -> frozenset[str]:
        """Those whose model the installed release has."""
        families = HUB_FAMILIES if self.attention == "eager" else HUB_FAMILIES - EAGER_ONLY
        tokenizers = frozenset(TOKENIZERS if self.attention == "eager" else ())
        return tokenizers | frozenset(family for family in families if oracle_missing(family) is None)

    @property
    def name(self) -> str:
        from importlib.metadata import version

        return f"transformers {version('transformers')}, {self.attention}"

    def load(self, checkpoint: Any) -> "Model | EncoderDecoderModel | TransformerXLModel | Tokenizer":
        if "tokenizer" in checkpoint.config:
            return Tokenizer(checkpoint.path)
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model_type = checkpoint.config["model_type"]
        if model_type == "transfo-xl":
            logging.set_verbosity_error()  # it counts what follows from config.json as missing
            model = AutoModelForCausalLM.from_pretrained(checkpoint.path, torch_dtype=checkpoint.dtype)
            # Some of its parameters are float32 whatever is asked for.
            return TransformerXLModel(model.to(device=checkpoint.device, dtype=checkpoint.dtype).eval())
        if model_type == "transformer":
            raise Unsupported("MarianMTModel has all sines before all cosines, not the paper's alternating order")
        if checkpoint.config.get("reorder_and_upcast_attn") and checkpoint.dtype == torch.float64:
            raise Unsupported("reorder_and_upcast_attn insists on torch.float32, by a guard in the library")
        loader = AutoModelForSeq2SeqLM if checkpoint.config.get("is_encoder_decoder") else AutoModelForCausalLM
        model = loader.from_pretrained(
            checkpoint.path, dtype=checkpoint.dtype, attn_implementation=self.attention, **SETTINGS.get(model_type, {})
        )
        model = model.to(checkpoint.device).eval()
        if loader is AutoModelForSeq2SeqLM:
            reason = PADS_COUNT if model_type in COUNTS_PADS else None
            if getattr(model.config, "router_ignore_padding_tokens", False):
                reason = PADS_ARE_ROUTED
            return EncoderDecoderModel(model, reason)
        # GPT would take a cache and ignore it
        return CachingModel(model) if cache_argument(model) else Model(model)


class Model(torch.nn.Module):
    """Calls without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.parameters = by_hub_name(model)  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels, use_cache=False
        )

    def greedy(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, stop_token: int | None
    ) -> list[list[int]]:
        rows = self.model.generate(
            input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=max_new_tokens,
            eos_token_id=stop_token, pad_token_id=0,
        )[:, input_ids.shape[1] :].tolist()  # fmt: skip
        return [row[: row.index(stop_token) + 1] if stop_token in row else row for row in rows]


class CachingModel(Model):
    """Opens sessions with a cache too, and tells texts in one row apart by positions that start again."""

    def packed(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        position_ids = torch.cat([torch.arange(n, device=input_ids.device) for n in lengths.tolist()])[None]
        return self.model(input_ids, position_ids=position_ids, use_cache=False).logits  # type: ignore[no-any-return]

    def session(self) -> "Session":
        return Session(self.model)


class EncoderDecoderModel(torch.nn.Module):
    """An encoder and a decoder that attends to it.

    no_left_padding: why tokens after pads are beyond it, if they are.
    """

    def __init__(self, model: Any, no_left_padding: str | None):
        super().__init__()
        self.model, self.no_left_padding = model, no_left_padding
        self.parameters = by_hub_name(model)  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        self.refuse_left_padding(attention_mask, decoder_attention_mask)
        return self.model(
            input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask, labels=labels, use_cache=False,
        )  # fmt: skip

    def refuse_left_padding(self, *masks: Tensor | None) -> None:
        if self.no_left_padding and any(mask is not None and (mask.diff(dim=1) > 0).any() for mask in masks):
            raise Unsupported(self.no_left_padding)

    def session(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> "EncoderDecoderSession":
        self.refuse_left_padding(attention_mask)
        return EncoderDecoderSession(self.model, input_ids, attention_mask)


class EncoderDecoderSession:
    """The encoder's output, computed once, and the library's own dynamic caches."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None):
        from transformers import DynamicCache, EncoderDecoderCache

        self.model, self.source_mask, self.cache_name = model, attention_mask, str(cache_argument(model))
        self.encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        self.cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))

    def feed(self, input_ids: Tensor) -> Tensor:
        return self.model(  # type: ignore[no-any-return]
            encoder_outputs=self.encoded, attention_mask=self.source_mask, decoder_input_ids=input_ids,
            use_cache=True, **{self.cache_name: self.cache},
        ).logits  # fmt: skip

    def state_bytes(self) -> int:
        caches = (self.cache.self_attention_cache, self.cache.cross_attention_cache)
        held = [t for cache in caches for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in [self.encoded.last_hidden_state, *held])


class TransformerXLModel(torch.nn.Module):
    """A memory of earlier segments, which begins empty: without `mems` the library would make one of zero vectors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.parameters = dict(model.named_parameters())  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        returned = self.model(input_ids, mems=self.empty_memory(len(input_ids)))
        if labels is None:
            return returned.logits
        # With labels it returns no logits.
        loss = self.model(input_ids, mems=self.empty_memory(len(input_ids)), labels=labels).loss
        return {"logits": returned.logits, "loss": loss}

    def empty_memory(self, batch: int) -> list[Tensor]:
        parameter = next(self.model.parameters())
        return [parameter.new_zeros(0, batch, self.model.config.d_model)] * self.model.config.n_layer

    def session(self) -> "TransformerXLSession":
        return TransformerXLSession(self)


class TransformerXLSession:
    """The library's own memory, handed from segment to segment."""

    def __init__(self, model: TransformerXLModel):
        self.model = model
        self.memory: list[Tensor] = []

    def feed(self, input_ids: Tensor) -> Tensor:
        returned = self.model.model(input_ids, mems=self.memory or self.model.empty_memory(len(input_ids)))
        self.memory = returned.mems
        return returned.logits  # type: ignore[no-any-return]

    def state_bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.memory)


class Tokenizer:
    """`AutoTokenizer.from_pretrained`, which builds the class that tokenizer_config.json names."""

    def __init__(self, path: Any):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(self, text: str, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        return self.tokenizer.encode(  # type: ignore[no-any-return]
            text, add_special_tokens=add_special_tokens, split_special_tokens=not parse_special
        )

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    def decoder(self) -> "TokenStream":
        return TokenStream(self.tokenizer)


class TokenStream:
    """The `tokenizers` library's DecodeStream; what it still holds at the end is what it has not given of the whole."""

    def __init__(self, tokenizer: Any):
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.given = ""

    def feed(self, token_id: int) -> str:
        self.ids.append(token_id)
        text = self.stream.step(self.tokenizer.backend_tokenizer, token_id) or ""
        self.given += text
        return text

    def finish(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.given) :]  # type: ignore[no-any-return]


def cache_argument(model: Any) -> str | None:
    """What the model calls the cache that it is given: `cache` since 5.24; None if it takes none."""
    declared = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in declared), None)


def by_hub_name(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters under the names of the checkpoint.

    Where the library fuses several into one in memory (experts), parameters with the parts' names stand for it: they
    receive their share of its gradient as soon as it has one, cut up as the library does for saving.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.nn.Parameter] = {}

    def distribute(name: str, fused: torch.nn.Parameter) -> None:
        for part, gradient in revert_weight_conversion(model, {name: fused.grad}).items():
            found[part].grad = gradient.clone()
        fused.grad = None

    for name, parameter in model.named_parameters():
        parts = revert_weight_conversion(model, {name: parameter.detach()})
        if len(parts) == 1:
            found[next(iter(parts))] = parameter
        else:
            found |= {part: torch.nn.Parameter(value) for part, value in parts.items()}
            parameter.register_post_accumulate_grad_hook(functools.partial(distribute, name))
    return found


class Session:
    """Decoding through the library's own dynamic cache; the mask of everything fed so far goes with each call."""

    def __init__(self, model: Any):
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache(config=model.config)
        self.cache_name = str(cache_argument(model))
        self.mask: Tensor | None = None

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return self.model(  # type: ignore[no-any-return]
            input_ids,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_name: self.cache},
        ).logits

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))


IMPLEMENTATIONS = {"hf": HuggingFaceModels("eager"), "hf-sdpa": HuggingFaceModels("sdpa")}
