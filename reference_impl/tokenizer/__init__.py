"""Tokenizers: SentencePiece's BPE with byte fallback (Llama, Mistral) and GPT-2's byte-level BPE."""

from reference_impl.tokenizer.byte_level_bpe import ByteLevelBPE
from reference_impl.tokenizer.files import TokenizerError, load_tokenizer
from reference_impl.tokenizer.sentencepiece_bpe import SentencePieceBPE

__all__ = ["ByteLevelBPE", "SentencePieceBPE", "TokenizerError", "load_tokenizer"]
