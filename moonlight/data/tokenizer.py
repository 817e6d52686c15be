"""Load tokenizers: SentencePiece, Moonlight's tiktoken, or any Hugging Face fast tokenizer. No remote code runs.

The files of a folder decide its kind, in this order:

1. `tokenizer.model`: SentencePiece, if its settings are those of `moonlight tokenizer train`. With other settings
   (Llama style: a space before the text) the folder's tokenizer.json is used.
2. `tiktoken.model`: Moonlight's published format, with the special tokens of tokenizer_config.json.
3. `tokenizer.json`: a Hugging Face fast tokenizer.

For every kind, encoding adds no [BOS] or [EOS]; `prepare` adds the end-of-text id after each document.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from moonlight.data.tiktoken_bpe import TIKTOKEN_FILE, fast_tokenizer
from moonlight.data.tokenizer_config import CONFIG_FILE, end_of_text_id, read_object, special_tokens, token_text
from moonlight.errors import UserError
from moonlight.files import sha256_checksum


class Tokenizer(ABC):
    """A loaded tokenizer folder."""

    file: str
    """Name of the file that defines the ids: tokenizer.model, tiktoken.model or tokenizer.json."""
    sha256: str
    """SHA-256 of that file, as hex digits."""
    num_ids: int
    """Number of ids, special ids included."""
    num_text_ids: int
    """Largest id of encoded text or end of text, plus one; special ids above it never occur in data."""
    bos_id: int | None
    eos_id: int
    eos_token: str
    specials: dict[str, int]
    """Texts and ids of the special tokens, which encoding never returns."""

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Load a tokenizer folder of any kind.

        Raises:
            UserError: the folder is of none of the three kinds, is corrupt, has no end-of-text id, or has a special
                token that text can spell.
        """
        sentencepiece_file = folder / "tokenizer.model"
        has_json = (folder / "tokenizer.json").is_file()
        if sentencepiece_file.is_file():
            model = _read_sentencepiece(sentencepiece_file)
            if _keeps_text(model):
                return _SentencePieceTokenizer(model, sentencepiece_file)
            if not has_json:
                raise UserError(
                    f"tokenizer {sentencepiece_file} normalizes text or adds spaces to it: add a tokenizer.json, or "
                    "give a model with normalizer identity, no dummy prefix and no removal of whitespace"
                )
        elif (folder / TIKTOKEN_FILE).is_file():
            config = read_object(folder / CONFIG_FILE)
            return _FastTokenizer(fast_tokenizer(folder, config), folder, config, folder / TIKTOKEN_FILE)
        if has_json:
            return _load_json(folder)
        raise UserError(
            f"tokenizer {folder} has no tokenizer.model, {TIKTOKEN_FILE} or tokenizer.json: give a folder that "
            "`tokenizer train` wrote, or the folder of a Hugging Face model"
        )

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without [BOS] or [EOS]. Text that spells a control token is encoded as text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Control ids become nothing, bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact text, control tokens included, or None if it is unknown."""


class _SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with the settings of `moonlight tokenizer train`."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor, path: Path) -> None:
        if model.eos_id() < 0:
            raise UserError(f"tokenizer {path} has no end-of-document id: it must have an [EOS] piece")
        self._model = model
        self.file, self.sha256 = path.name, sha256_checksum(path)
        self.num_ids = model.get_piece_size()
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_id, self.eos_token = model.eos_id(), model.id_to_piece(model.eos_id())
        control = [index for index in range(self.num_ids) if model.is_control(index)]
        self.specials = {model.id_to_piece(index): index for index in control}
        text_ids = (i for i in reversed(range(self.num_ids)) if not model.is_control(i) and not model.is_unused(i))
        self.num_text_ids = max(next(text_ids, 0), self.eos_id) + 1

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None


class _FastTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, used without its post-processor, padding and truncation."""

    def __init__(self, fast: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], path: Path) -> None:
        """Configure `fast`. `path` is the file that defines the ids, `config` the folder's tokenizer_config.json.

        Raises:
            UserError: there is no end-of-text id, or text can spell a special token.
        """
        vocab = fast.get_vocab(with_added_tokens=True)
        self.file, self.sha256 = path.name, sha256_checksum(path)
        self.eos_id = end_of_text_id(folder, config, vocab)
        self.eos_token = next(token for token, index in vocab.items() if index == self.eos_id)
        self.num_ids = max(vocab.values()) + 1
        self.bos_id = vocab.get(token_text(config.get("bos_token")) or "")
        special_names = special_tokens(config) & vocab.keys() | {self.eos_token}
        fast.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in sorted(special_names)]
        )
        fast.no_padding()
        fast.no_truncation()
        fast.encode_special_tokens = True
        self._fast = fast
        specials = {index: token for index, token in fast.get_added_tokens_decoder().items() if token.special}
        unknown = _unknown_id(fast)
        for index, token in specials.items():
            if index != unknown and not specials.keys().isdisjoint({*self.encode(token.content)} - {unknown}):
                raise UserError(
                    f"tokenizer {path} gives the control id {index} to text that spells {token.content!r}: give a "
                    "tokenizer that encodes it as text, such as byte-level BPE"
                )
        self.specials = {token.content: index for index, token in specials.items() if index != unknown}
        unused = specials.keys() - {self.eos_id, unknown}
        self.num_text_ids = max(set(vocab.values()) - unused) + 1

    def encode(self, text: str) -> list[int]:
        try:
            return self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            if not _is_panic(error):
                raise
            # The library panics when a match of its regular expressions takes too many steps.
            raise UserError(
                f"a document of {len(text)} characters, {text[:30]!r}..., cannot be split into words ({error}): split "
                "it into shorter documents"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)


def _load_json(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    read_object(path)
    try:
        fast = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises plain exceptions and panics
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise UserError(f"tokenizer {path} is not a Hugging Face fast tokenizer: {error}") from None
    return _FastTokenizer(fast, folder, read_object(folder / CONFIG_FILE), path)


def _is_panic(error: BaseException) -> bool:
    """Return whether the tokenizers library panicked; a panic is no `Exception`."""
    return type(error).__name__ == "PanicException"


def _unknown_id(fast: tokenizers.Tokenizer) -> int | None:
    """Return the id of text outside the vocabulary, or None. It is the only special id that text may become."""
    if isinstance(fast.model, tokenizers.models.Unigram):
        return json.loads(fast.to_str())["model"]["unk_id"]
    return None if fast.model.unk_token is None else fast.token_to_id(fast.model.unk_token)


def _read_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"tokenizer {path} is not a SentencePiece model") from None


def _keeps_text(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Return whether the model does not normalize text, so that decoding restores it."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.serialized_model_proto())
    spec = proto.normalizer_spec
    return not (spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces)
