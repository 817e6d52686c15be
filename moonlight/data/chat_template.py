"""Moonlight's chat format, and special tokens beside text.

The special tokens ([EOS], <|im_end|> and so on) are never made from text: where a document spells one out, its
letters are encoded like any others. SentencePiece works so by itself; for `AutoTokenizer.from_pretrained(folder)(text)`
it is `split_special_tokens: true` in `tokenizer_config.json` that makes it so. Whoever renders a chat to a string and
encodes that string must therefore turn the flag off, or every marker is encoded as letters. Where the code is ours:

    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=True)

With `sanitize_control_tokens` (transformers 5.23) the markers become control ids and the same words inside a message
stay letters. A chat server takes the flag from the folder: give it a copy on which `set_chat_mode` was called; user
text can then forge markers, as with most published chat models.
"""

import json
from pathlib import Path

from moonlight.files import write_json

CONTROL_PIECES = ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
"""Moonlight's chat markers. In tokenizers trained here they have ids 4 to 8, after <unk>, [BOS], [EOS] and [PAD]."""

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
    """Make plain encoding of a rendered chat give control ids, for servers; see the module's docstring.

    Text that spells a special token out is then encoded as that token, so this is for copies that serve a
    chat model.
    """
    path = folder / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "split_special_tokens": False})
