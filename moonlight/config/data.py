"""The data section of a recipe."""

from dataclasses import dataclass, field
from pathlib import PurePath

from moonlight.config.checks import NonNegative, Positive, check_fields, require
from moonlight.config.schedule import check_weights


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One prepared data folder of a mixture."""

    path: str
    """Folder with train.bin/.idx, validation.bin/.idx and manifest.json."""
    weight: NonNegative[float] = 1.0
    """Weight of this source among the training sequences, in any unit."""
    max_epochs: NonNegative[float] = 0.0
    """How often the run may see its documents; 0 sets no limit."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepared data: folders that `moonlight tokenizer train` and `moonlight data prepare` made."""

    path: str = ""
    """Folder with train.bin/.idx, validation.bin/.idx and manifest.json. Give this or `sources`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several such folders to mix, each under a name of your own."""
    tokenizer: str
    """Folder with the tokenizer whose checksum is in the manifests."""
    sequence_length: Positive[int]
    """Tokens per sequence."""
    mask_documents: bool = False
    """Let no token attend to another document of its sequence. A document ends with the tokenizer's [EOS]."""
    reset_positions: bool = False
    """Count positions from the start of each document, or of the part of it that is in the sequence."""
    conversations: bool = False
    """The folders hold conversations of `moonlight data prepare-chat`; the loss covers the assistant's tokens."""
    cache_folder: str = ""
    """Folder for the shuffled orders of documents, on a disk of each host; empty takes the run's own folder."""

    def __post_init__(self) -> None:
        check_fields("data", self)
        require(
            bool(self.path) != bool(self.sources),
            "data.path and data.sources are both " + ("given" if self.path else "missing") + ": give one of them",
        )
        for name, source in self.sources.items():
            check_fields(f"data.sources.{name}", source)
        require(
            not self.conversations or (self.mask_documents and self.reset_positions),
            "data.conversations needs data.mask_documents=true and data.reset_positions=true: a sequence holds several",
        )
        check_weights("data.sources", {name: source.weight for name, source in self.sources.items()})

    @property
    def mixture(self) -> dict[str, SourceConfig]:
        """The sources by name. A single `path` is one source, named after its folder."""
        return self.sources or {PurePath(self.path).name: SourceConfig(path=self.path)}
