"""Prompts for all servers. No imports: each server's own Python reads this file."""

PROMPTS = (
    "import os\nimport sys\n\n\ndef main(",
    "class Parser:\n    def __init__(self, name):\n        self.",
    "The quick brown fox jumps over",
    "    for index, value in enumerate(values):\n",
)
NEW_TOKENS = 24

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What does enumerate() return?"},
]
CHAT_ANSWER_TOKENS = 12
"""Tokens of the greedy answer to CHAT before <|im_end|>."""

INSTRUCT_CHATS = 12
"""Number of held-out conversations for the instruction-tuned model."""
INSTRUCT_ANSWER_TOKENS = 32

MAX_LOGPROB_DIFFERENCE = 1e-4
