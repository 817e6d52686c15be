"""The data section of a recipe."""

from dataclasses import dataclass, field
from pathlib import PurePath

from moonlight.config.checks import positive, require
from moonlight.config.schedule import check_weights


@dataclass(frozen=True, kw_only=True)
class Source:
    """One prepared data folder of a mixture."""

    path: str
    """Folder with train.bin/.idx, validation.bin/.idx and manifest.json."""
    weight: float = 1.0
    """Share of the training sequences, in any unit."""
    max_epochs: float = 0.0
    """How often its documents may be seen over the whole run; 0 sets no limit."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from. Both folders are made by `moonlight tokenizer train` and `moonlight data prepare`."""

    path: str = ""
    """Folder with train.bin/.idx, validation.bin/.idx and manifest.json. Or else `sources`."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Several such folders, under names of your own, to mix."""
    tokenizer: str
    """Folder with the tokenizer whose checksum the manifests name."""
    sequence_length: int
    mask_documents: bool = False
    """Let no token attend to another document of its sequence. A document ends with the tokenizer's [EOS]."""
    reset_positions: bool = False
    """Count positions from the beginning of the document, or of what the sequence has of it."""
    conversations: bool = False
    """The folders hold conversations, made by `moonlight data prepare-chat`: only what the assistant says is learnt."""
    cache_folder: str = ""
    """Folder for the shuffled orders of documents, on a disk of each host; empty takes the run's own folder."""

    def __post_init__(self) -> None:
        positive("data", sequence_length=self.sequence_length)
        require(
            bool(self.path) != bool(self.sources),
            "data.path and data.sources are both " + ("given" if self.path else "missing") + ": give one of them",
        )
        for name, source in self.sources.items():
            for key in ("weight", "max_epochs"):
                value = getattr(source, key)
                require(value >= 0, f"data.sources.{name}.{key} is {value}: it must be at least 0")
        require(
            not self.conversations or (self.mask_documents and self.reset_positions),
            "data.conversations needs data.mask_documents=true and data.reset_positions=true: a sequence holds several",
        )
        check_weights("data.sources", {name: source.weight for name, source in self.sources.items()})

    @property
    def mixture(self) -> dict[str, Source]:
        """The sources by name; `path` alone is one of the name of its folder."""
        return self.sources or {PurePath(self.path).name: Source(path=self.path)}
