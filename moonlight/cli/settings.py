"""`moonlight settings`: the keys of a recipe, as text in a terminal or as the page docs/settings.md."""

from rich.console import Console
from rich.padding import Padding

from moonlight.config.settings import find_section, list_sections, settings_page


def print_settings(section: str, *, markdown: bool) -> None:
    """Print one section, or all of them if `section` is empty.

    Raises:
        UserError: there is no such section.
    """
    sections = find_section(section) if section else list_sections()
    if markdown:
        print(settings_page(sections), end="")
        return
    console = Console(highlight=False, markup=False)
    for one in sections:
        console.print(f"{one.name or 'top level'}: {one.meaning}", style="bold")
        for key in one.keys:
            default = f"default {key.default}" if key.default else "required"
            facts = [key.type.replace("`", ""), default, *([key.unit] if key.unit else [])]
            console.print(Padding(f"{key.name}: {'; '.join(facts)}", (0, 0, 0, 2)))
            console.print(Padding(key.meaning, (0, 0, 0, 6)), style="dim")
        console.print()
