"""CTranslate2 4.8.5 ignores fields of config.json, and takes no text that is longer than Mistral's window: shown
without the suite.

pip install torch==2.13.0 ctranslate2==4.8.5 transformers==5.23.0 "setuptools<81"
"""

import tempfile

import numpy
import torch
from ctranslate2 import Generator, StorageView
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SIZES = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 6}
UNSCALED = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


def build(kind, **changed):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **changed)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model


def ctranslate2_logits(model, ids):
    directory = tempfile.mkdtemp()
    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", bos_token="1", eos_token="2").save_pretrained(
        directory
    )
    TransformersConverter(directory).convert(directory + "/converted")
    generator = Generator(directory + "/converted", compute_type="float32")
    lengths = StorageView.from_array(numpy.array([ids.shape[1]], dtype="int32"))
    return torch.tensor(numpy.array(generator.forward_batch(StorageView.from_array(ids.int().numpy()), lengths)))


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


other_scale = build(LlamaConfig, head_dim=10)
for layer in other_scale.model.layers:
    layer.self_attn.scaling = (96 / 6) ** -0.5
for name, model, wrong in (
    ("llama3 scaling", build(LlamaConfig, rope_parameters=LLAMA3), build(LlamaConfig, rope_parameters=UNSCALED)),
    ("llama hidden_act", build(LlamaConfig, hidden_act="gelu"), build(LlamaConfig)),
    ("llama head_dim", build(LlamaConfig, head_dim=10), other_scale),
    ("mistral hidden_act", build(MistralConfig, hidden_act="gelu", num_key_value_heads=3, sliding_window=None),
     build(MistralConfig, num_key_value_heads=3, sliding_window=None)),
    ("gpt2 layer_norm_epsilon", build(GPT2Config, layer_norm_epsilon=0.5), build(GPT2Config)),
    ("gpt2 scale_attn_weights", build(GPT2Config, scale_attn_weights=False), build(GPT2Config)),
    ("gpt2 scale_attn_by_inverse_layer_idx", build(GPT2Config, scale_attn_by_inverse_layer_idx=True),
     build(GPT2Config)),
):  # fmt: skip
    ids = torch.arange(600)[None] % 97
    logits = ctranslate2_logits(model, ids)
    truth, mistaken = model(ids).logits.detach(), wrong(ids).logits.detach()
    print(f"{name:<36} from the truth {distance(logits, truth):.1e}, from the mistake {distance(logits, mistaken):.1e}")

windowed = build(MistralConfig, num_key_value_heads=3, sliding_window=5)
for length in (5, 6):
    ids = torch.arange(length)[None]
    try:
        off = distance(ctranslate2_logits(windowed, ids), windowed(ids).logits)
        print(f"window of 5, {length} tokens: off by {off:.1e}")
    except ValueError as error:
        print(f"window of 5, {length} tokens: ValueError: {error}")
