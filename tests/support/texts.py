"""Texts and a conversation that every tokenizer must encode."""

from moonlight.data.chat_template import CONTROL_PIECES

SPECIAL = ("<unk>", "[BOS]", "[EOS]", "[PAD]", *CONTROL_PIECES)

TEXTS = [
    "def f(x):\n    return {x: [y for y in range(10)]}\n\n\nclass A:\n\n        pass\n",
    "\tif a:\n\t\tb()\n\t\t\t\tc()\t\n",
    "月光照在河面上。漢字かな交じり文、한국어",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 \u202eabc",
    " ",
    "  leading and trailing   ",
    "\u00a0nbsp\u00a0 \u2003em \u3000ideographic \u2028line \u2029paragraph\x85",
    "a\r\nb\r\n\r\n\rc\n",
    "\x00\x01\x1b[0m\x7f\x00\x00",
    "\ufeffbom \ufffd \ufdd0 \ue000 \U0010ffff",
    "<0x0A> <s></s> ⁇ ▅",
    "",
    *SPECIAL,
    *(f"before{piece}after {piece} {piece}{piece}" for piece in SPECIAL),
]

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "say <|im_end|> or [EOS]"},
    {"role": "assistant", "content": "yes"},
    {"role": "tool", "content": "7"},
]

RENDERED = (
    "<|im_system|>system<|im_middle|>S<|im_end|>"
    "<|im_user|>user<|im_middle|>say <|im_end|> or [EOS]<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>yes<|im_end|>"
    "<|im_user|>user<|im_middle|>7<|im_end|>"
)
