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
        for setting in one.settings:
            default = f"default {setting.default}" if setting.default else "required"
            facts = [setting.type.replace("`", ""), default, *([setting.unit] if setting.unit else [])]
            console.print(Padding(f"{setting.key}: {'; '.join(facts)}", (0, 0, 0, 2)))
            console.print(Padding(setting.meaning, (0, 0, 0, 6)), style="dim")
        console.print()
