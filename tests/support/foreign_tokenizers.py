"""Tokenizer folders in the formats of other projects, trained on the tests' corpus."""

import base64
import json

import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAT_STR = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
"""The pattern that splits text in Moonlight's published tokenizer."""

SPECIAL_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|im_middle|>": 17,
    "[UNK]": 254,
    "[PAD]": 255,
}
"""Moonlight's named special tokens, by their offset from the first special id; all other offsets are reserved."""


def train_bpe(corpus, num_ids):
    """Train a byte-level BPE as in GPT-2.

    It splits text differently from Moonlight, so some tokens span two of Moonlight's pieces.
    """
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = list(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(vocab_size=num_ids, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator((file.read_text() for file in sorted(corpus.iterdir())), trainer)
    assert fast.get_vocab_size() == num_ids
    return fast


def write_ranks(path, ranks):
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines))


def write_tiktoken(folder, corpus, ranks=None):
    """Write tiktoken.model and a tokenizer_config.json that requests remote code."""
    if ranks is None:
        letter_to_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
        by_rank = sorted(train_bpe(corpus, 2048).get_vocab().items(), key=lambda item: item[1])
        ranks = {bytes(letter_to_byte[letter] for letter in token): rank for token, rank in by_rank}
    folder.mkdir(parents=True)
    write_ranks(folder / "tiktoken.model", ranks)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            str(len(ranks) + offset): {"content": name, **flags} for name, offset in SPECIAL_OFFSETS.items()
        },
        "additional_special_tokens": [
            "<|im_end|>",
            "<|im_user|>",
            "<|im_assistant|>",
            "<|im_system|>",
            "<|im_middle|>",
        ],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_moonshot.py").write_text("raise SystemExit('remote code ran')\n")
    return folder


def reference(folder):
    """Return the encoding of such a folder by the `tiktoken` package."""
    lines = (line.split() for line in (folder / "tiktoken.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    names = {len(ranks) + offset: name for name, offset in SPECIAL_OFFSETS.items()}
    ids = range(len(ranks), len(ranks) + 256)
    specials = {names.get(index, f"<|reserved_token_{index}|>"): index for index in ids}
    return tiktoken.Encoding("moonlight", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens=specials)


def write_fast(folder, corpus):
    """Write a tokenizer.json that normalizes, adds [CLS], truncates and pads.

    Its end-of-text token is given as an object.
    """
    fast = train_bpe(corpus, 1500)
    fast.add_special_tokens(["<|endoftext|>", "[CLS]"])
    fast.add_tokens(["<tool_call>"])
    fast.normalizer = normalizers.NFC()
    fast.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1501)])
    fast.enable_truncation(16)
    fast.enable_padding(length=16)
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "OtherTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_other.OtherTokenizer"]},
        "bos_token": "[CLS]",
        "eos_token": {"content": "<|endoftext|>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_other.py").write_text("raise SystemExit('remote code ran')\n")
    return folder
