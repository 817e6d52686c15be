"""Moonlight's chat format, and how special tokens are kept apart from text.

Text never becomes a special token ([EOS], <|im_end|> and so on): if a document spells one, it is encoded as ordinary
text. SentencePiece does this by default. `AutoTokenizer.from_pretrained(folder)(text)` does it because
`tokenizer_config.json` sets `split_special_tokens: true`. Code that renders a chat to a string and encodes that string
must turn the flag off; otherwise every marker is encoded as text. In Python:

    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=True)

With `sanitize_control_tokens` (transformers 5.23) the markers become control ids and the same words inside a message
stay text. A chat server reads the flag from the folder: give it a copy on which `set_chat_mode` was called. User text
can then forge markers, as with most published chat models.
"""

import json
from pathlib import Path

from moonlight.data.tokenizer_config import CONFIG_FILE
from moonlight.files import write_json

CONTROL_PIECES = ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
"""Moonlight's chat markers. `moonlight tokenizer train` gives them ids 4 to 8, after <unk>, [BOS], [EOS], [PAD]."""

TEMPLATE_FILE = "chat_template.jinja"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- '<|im_system|>system<|im_middle|>' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|im_assistant|>assistant<|im_middle|>' -}}
    {%- elif message['role'] in ('user', 'tool') -%}
        {{- '<|im_user|>user<|im_middle|>' -}}
    {%- else -%}
        {{- raise_exception('role ' ~ message['role'] ~ ' is not one of system, user, assistant, tool') -}}
    {%- endif -%}
    {{- message['content'] ~ '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""


def set_chat_mode(folder: Path) -> None:
    """Set `split_special_tokens` to false, so that encoding a rendered chat returns control ids.

    Text that spells a special token is then encoded as that token. Use it only on copies that serve a chat model; see
    the module's docstring.
    """
    path = folder / CONFIG_FILE
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "split_special_tokens": False})
