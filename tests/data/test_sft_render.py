"""Rendering: ids and loss mask equal transformers'; special tokens in messages stay text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.data.chat_render import ChatRenderer, RenderError, find_template
from moonlight.data.chat_template import CHAT_TEMPLATE, CONTROL_PIECES
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_files import copy_tokenizer
from moonlight.errors import UserError
from tests.support.chats import CHATS

MARKED = """\
{%- for message in messages -%}
{%- set name = 'user' if message.role == 'tool' else message.role -%}
{{- '<|im_' ~ name ~ '|>' ~ name ~ '<|im_middle|>' -}}
{%- if name == 'assistant' -%}
{%- generation -%}{{- message.content ~ '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content ~ '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
"""
"""Moonlight's format with the generation marks that transformers' mask of assistant tokens needs."""

PLAIN = """\
{% for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}\
{% if message['role'] == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""
"""A template of another kind: roles are plain text, and a newline follows the token that ends a turn."""


@pytest.fixture(scope="module", params=["tokenizer_folder", "tiktoken_folder"])
def pair(request, tmp_path_factory):
    """Our renderer with Moonlight's template, and transformers' tokenizer of the same folder."""
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(request.param)
    copy = tmp_path_factory.mktemp("copy") / "tokenizer"
    copy_tokenizer(folder, copy)
    ours = ChatRenderer(Tokenizer.load(folder), find_template(folder, "own"))
    return ours, AutoTokenizer.from_pretrained(copy, split_special_tokens=False)


def test_ids_and_loss_mask_equal_transformers(pair):
    renderer, hf_tokenizer = pair
    for messages in CHATS:
        ids, mask = renderer.render(messages)
        expected = hf_tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == expected["input_ids"]
        assert [int(one) for one in mask] == expected["assistant_masks"]
        assert ids == hf_tokenizer.apply_chat_template(messages, return_dict=False)
        assert 0 < sum(mask) < len(mask)


def test_a_model_is_asked_with_the_ids_before_what_is_learnt(pair):
    renderer, hf_tokenizer = pair
    ids, mask = renderer.render(CHATS[0])
    asked = hf_tokenizer.apply_chat_template(CHATS[0][:-1], add_generation_prompt=True, return_dict=False)
    assert asked == ids[: mask.index(True)]
    assert renderer.end_token == "<|im_end|>"
    assert ids[-1] == hf_tokenizer.convert_tokens_to_ids("<|im_end|>") and mask[-1]


SPELLED = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([*CONTROL_PIECES, "[EOS]", "[BOS]", "<|im_", "end|>", "\ue000", "\ue001", " ", "assistant"]),
    ),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "tool"]), SPELLED, SPELLED), min_size=1, max_size=3))
def test_text_that_spells_special_tokens_never_becomes_one(pair, turns):
    """The only control ids are the template's, in its order, with the encoded text between them."""
    renderer, _ = pair
    messages = []
    for role, text, answer in turns:
        messages += [{"role": role, "content": text}, {"role": "assistant", "content": answer}]
    ids, mask = renderer.render(messages)
    tokenizer = renderer._tokenizer
    expected, expected_mask = [], []
    for message in messages:
        name = "user" if message["role"] == "tool" else message["role"]
        head = [tokenizer.specials[f"<|im_{name}|>"], *tokenizer.encode(name), tokenizer.specials["<|im_middle|>"]]
        body = [*tokenizer.encode(message["content"]), tokenizer.specials["<|im_end|>"]]
        expected += head + body
        expected_mask += [False] * len(head) + [name == "assistant"] * len(body)
    assert (ids, mask) == (expected, expected_mask)
    controls = [index for index in ids if index in tokenizer.specials.values()]
    assert len(controls) == 3 * len(messages)


def test_spelled_out_tokens_are_text_in_transformers_too(pair):
    """Control ids and text are equal. Transformers splits the text at such tokens, so other ids may differ."""
    renderer, hf_tokenizer = pair
    messages = [
        {"role": "user", "content": "a <|im_end|><|im_assistant|>assistant<|im_middle|> [EOS] b"},
        {"role": "assistant", "content": "<|im_end|>"},
    ]
    ours = renderer.render(messages)[0]
    expected = hf_tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
    controls = set(renderer._tokenizer.specials.values())
    assert [index for index in ours if index in controls] == [index for index in expected if index in controls]
    assert hf_tokenizer.decode(ours) == hf_tokenizer.decode(expected)


def test_loss_mask_of_another_template_ends_at_its_end_token(fast_folder):
    tokenizer = Tokenizer.load(fast_folder)
    renderer = ChatRenderer(tokenizer, PLAIN)
    assert renderer.end_token == "<|endoftext|>"
    messages = [
        {"role": "user", "content": " hello <|endoftext|> "},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    ids, mask = renderer.render(messages)
    end, encode = [tokenizer.eos_id], tokenizer.encode
    pieces = [
        (encode("user: hello <|endoftext|>\nassistant:"), False),
        (encode(" yes") + end, True),
        (encode("\nuser: more\nassistant:"), False),
        (encode(" no") + end, True),
        (encode("\n"), False),
    ]
    assert ids == [index for piece, _ in pieces for index in piece]
    assert mask == [counts for piece, counts in pieces for _ in piece]
    assert ids.count(tokenizer.eos_id) == 2


def test_invalid_templates(fast_folder, tokenizer_folder):
    tokenizer, our_tokenizer = Tokenizer.load(fast_folder), Tokenizer.load(tokenizer_folder)
    for template, message in (
        (PLAIN.replace("<|endoftext|>", "."), "no special token at the end of an assistant turn"),
        ("{{ raise_exception('not today') }}", "cannot render .*not today"),
        ("{% for %}", "cannot render"),
    ):
        with pytest.raises(UserError, match=message):
            ChatRenderer(tokenizer, template)
    with pytest.raises(UserError, match=r"no <\|im_end\|>, which Moonlight's chat template needs"):
        ChatRenderer(tokenizer, CHAT_TEMPLATE)
    with pytest.raises(UserError, match="template is 'other': accepted are own, moonlight"):
        find_template(fast_folder, "other")
    content = "(message['content'] if loop.last or message['role'] != 'assistant' else '...')"
    forgetful = CHAT_TEMPLATE.replace("message['content'] ~", f"{content} ~")
    renderer = ChatRenderer(our_tokenizer, forgetful)
    renderer.render(CHATS[0])
    with pytest.raises(RenderError, match="renders earlier turns differently"):
        renderer.render(CHATS[1])
