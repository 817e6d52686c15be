"""The model card of an exported folder."""

import re

import yaml

_FRONT_MATTER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)


def missing_of_card(text: str) -> list[str]:
    """What a release still lacks in the model card `text`, one phrase each; empty if it is complete."""
    match = _FRONT_MATTER.match(text)
    if match is None:
        return ["front matter between two lines of ---"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return ["front matter that is YAML"]
    if not isinstance(data, dict):
        return ["front matter of keys and values"]
    return [] if data.get("license") not in (None, "", "unknown") else ["a licence"]
