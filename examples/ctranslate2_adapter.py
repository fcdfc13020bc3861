"""CTranslate2 through its own converter, which wants a tokenizer: the words are the ids themselves."""

from pathlib import Path

import numpy
import torch
from ctranslate2 import Generator, StorageView, __version__
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from conformance import Unsupported


class CTranslate2:
    name, families, dtypes = f"ctranslate2 {__version__}", {"llama", "mistral", "gpt2"}, {"float32"}

    def load(self, checkpoint):
        words = {str(i): i for i in range(checkpoint.config["vocab_size"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), unk_token="0", bos_token="1", eos_token="2"
        )
        tokenizer.save_pretrained(checkpoint.path)
        converted = Path(checkpoint.path, "converted")
        TransformersConverter(str(checkpoint.path)).convert(str(converted))
        generator = Generator(str(converted), compute_type="float32", intra_threads=1)

        def model(input_ids, attention_mask=None):
            lengths = torch.full((len(input_ids),), input_ids.shape[1])
            if attention_mask is not None:
                lengths = attention_mask.sum(1)
                if not attention_mask[:, 0].all():
                    raise Unsupported("forward_batch takes lengths: padding stands on the right")
            ids, lengths = (StorageView.from_array(x.int().contiguous().numpy()) for x in (input_ids, lengths))
            return torch.from_numpy(numpy.array(generator.forward_batch(ids, lengths)))

        return model
