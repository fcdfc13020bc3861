"""CTranslate2 4.8.5 ignores llama3 scaling, `hidden_act` and (in the score's scale) `head_dim` of a Llama: shown
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 6}
IDS = torch.arange(600)[None] % 97
UNSCALED = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


def build(**changed):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **changed)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model


def ctranslate2_logits(model):
    directory = tempfile.mkdtemp()
    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", bos_token="1", eos_token="2").save_pretrained(
        directory
    )
    TransformersConverter(directory).convert(directory + "/converted")
    generator = Generator(directory + "/converted", compute_type="float32")
    lengths = StorageView.from_array(numpy.array([IDS.shape[1]], dtype="int32"))
    return torch.tensor(numpy.array(generator.forward_batch(StorageView.from_array(IDS.int().numpy()), lengths)))


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


other_scale = build(head_dim=10)
for layer in other_scale.model.layers:
    layer.self_attn.scaling = (96 / 6) ** -0.5
for name, model, wrong in (
    ("llama3 scaling", build(rope_parameters=LLAMA3), build(rope_parameters=UNSCALED)),
    ("hidden_act", build(hidden_act="gelu"), build()),
    ("head_dim", build(head_dim=10), other_scale),
):
    logits = ctranslate2_logits(model)
    truth, mistaken = model(IDS).logits.detach(), wrong(IDS).logits.detach()
    print(f"{name:<15} from the truth {distance(logits, truth):.1e}, from the mistake {distance(logits, mistaken):.1e}")
