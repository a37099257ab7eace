"""Lengths: the tokens that LlamaFactory makes of a sample, counted without it."""

import functools
import re

from served_tokens.marks import BLOCK_END, BLOCK_START


def token_counter(tokenizer, given: str):
    """count(columns, no_thinking) -> tokens that LlamaFactory makes of a sample, for the samples of one trajectory.

    It tokenizes the system text, each user and each assistant text by itself (0.9.5, data/template.py), and control
    tokens split a text before it is tokenized. So each text is tokenized once, whatever number of samples it is in.
    """

    @functools.cache
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    @functools.cache
    def block(role: str, text: str) -> int:
        texts = re.split(r"<\|im_(?:start|end)\|>", f"{role}\n{text}")  # a text may spell out others
        return len(texts) + 1 + sum(map(tokens, filter(None, texts))) + tokens("\n")

    @functools.cache
    def answer(text: str) -> int:
        return tokens(f"assistant\n{given}") + tokens(text) + 2 + tokens("\n")

    def count(columns: dict, no_thinking: bool) -> int:
        total = block("system", columns["system"]) if columns["system"] else 0
        for user, assistant in [*columns["history"], [columns["instruction"], columns["output"]]]:
            total += block("user", user) + answer(assistant)
        return total + no_thinking * tokens("<think>\n\n</think>\n\n")

    return count


@functools.cache
def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is no tokenizer to be had
        raise SystemExit(f"{name}: no tokenizer to be had from this model ({error})") from None
    if any(len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1 for token in (BLOCK_START, BLOCK_END)):
        raise SystemExit(f"{name}: its tokenizer has no {BLOCK_START} and {BLOCK_END}, so it is none of a ChatML model")
    return tokenizer
