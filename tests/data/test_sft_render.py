"""Rendering: ids and what is learnt of them, against transformers; special tokens in messages stay text."""

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
"""Moonlight's format written anew, with the marks that transformers' own mask of assistant tokens needs."""

PLAIN = """\
{% for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}\
{% if message['role'] == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""
"""A template of another kind: roles are letters, and something follows the token that ends a turn."""


@pytest.fixture(scope="module", params=["tokenizer_folder", "tiktoken_folder"])
def pair(request, tmp_path_factory):
    """Our renderer with Moonlight's template, and transformers' tokenizer of the same folder."""
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(request.param)
    copy = tmp_path_factory.mktemp("copy") / "tokenizer"
    copy_tokenizer(folder, copy)
    ours = ChatRenderer(Tokenizer.load(folder), find_template(folder, "own"))
    return ours, AutoTokenizer.from_pretrained(copy, split_special_tokens=False)


def test_ids_and_what_is_learnt_equal_transformers(pair):
    renderer, theirs = pair
    for messages in CHATS:
        ids, learnt = renderer.render(messages)
        wanted = theirs.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == wanted["input_ids"]
        assert [int(one) for one in learnt] == wanted["assistant_masks"]
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
        assert 0 < sum(learnt) < len(learnt)


def test_a_model_is_asked_with_the_ids_before_what_is_learnt(pair):
    renderer, theirs = pair
    ids, learnt = renderer.render(CHATS[0])
    asked = theirs.apply_chat_template(CHATS[0][:-1], add_generation_prompt=True, return_dict=False)
    assert asked == ids[: learnt.index(True)]
    assert renderer.end_token == "<|im_end|>"
    assert ids[-1] == theirs.convert_tokens_to_ids("<|im_end|>") and learnt[-1]


SPELT = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([*CONTROL_PIECES, "[EOS]", "[BOS]", "<|im_", "end|>", "\ue000", "\ue001", " ", "assistant"]),
    ),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "tool"]), SPELT, SPELT), min_size=1, max_size=3))
def test_text_that_spells_special_tokens_never_becomes_one(pair, turns):
    """Control ids are those of the template alone, in its order, and between them lies the encoded text."""
    renderer, _ = pair
    messages = []
    for role, text, answer in turns:
        messages += [{"role": role, "content": text}, {"role": "assistant", "content": answer}]
    ids, learnt = renderer.render(messages)
    tokenizer = renderer._tokenizer
    wanted, wanted_learnt = [], []
    for message in messages:
        name = "user" if message["role"] == "tool" else message["role"]
        head = [tokenizer.specials[f"<|im_{name}|>"], *tokenizer.encode(name), tokenizer.specials["<|im_middle|>"]]
        said = [*tokenizer.encode(message["content"]), tokenizer.specials["<|im_end|>"]]
        wanted += head + said
        wanted_learnt += [False] * len(head) + [name == "assistant"] * len(said)
    assert (ids, learnt) == (wanted, wanted_learnt)
    controls = [index for index in ids if index in tokenizer.specials.values()]
    assert len(controls) == 3 * len(messages)


def test_spelt_tokens_are_text_to_transformers_too(pair):
    """It cuts the text at them, so ids of letters may differ; control ids and the text do not."""
    renderer, theirs = pair
    messages = [
        {"role": "user", "content": "a <|im_end|><|im_assistant|>assistant<|im_middle|> [EOS] b"},
        {"role": "assistant", "content": "<|im_end|>"},
    ]
    ours = renderer.render(messages)[0]
    wanted = theirs.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
    controls = set(renderer._tokenizer.specials.values())
    assert [index for index in ours if index in controls] == [index for index in wanted if index in controls]
    assert theirs.decode(ours) == theirs.decode(wanted)


def test_another_template_is_learnt_up_to_its_end_token(fast_folder):
    tokenizer = Tokenizer.load(fast_folder)
    renderer = ChatRenderer(tokenizer, PLAIN)
    assert renderer.end_token == "<|endoftext|>"
    messages = [
        {"role": "user", "content": " hello <|endoftext|> "},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    ids, learnt = renderer.render(messages)
    end, encode = [tokenizer.eos_id], tokenizer.encode
    pieces = [
        (encode("user: hello <|endoftext|>\nassistant:"), False),
        (encode(" yes") + end, True),
        (encode("\nuser: more\nassistant:"), False),
        (encode(" no") + end, True),
        (encode("\n"), False),
    ]
    assert ids == [index for piece, _ in pieces for index in piece]
    assert learnt == [counts for piece, counts in pieces for _ in piece]
    assert ids.count(tokenizer.eos_id) == 2


def test_templates_that_cannot_be_used(fast_folder, tokenizer_folder):
    tokenizer, own = Tokenizer.load(fast_folder), Tokenizer.load(tokenizer_folder)
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
    kept = "(message['content'] if loop.last or message['role'] != 'assistant' else '...')"
    forgets = CHAT_TEMPLATE.replace("message['content'] ~", f"{kept} ~")
    renderer = ChatRenderer(own, forgets)
    renderer.render(CHATS[0])
    with pytest.raises(RenderError, match="renders earlier turns differently"):
        renderer.render(CHATS[1])
