"""Lengths: the tokens that LlamaFactory makes of a sample, counted without it."""

import functools
import re

from served_tokens.marks import BLOCK_END, BLOCK_START


def token_counter(tokenizer, given: str):
    """count(columns, no_thinking) -> tokens that LlamaFactory makes of a sample, for the samples of one trajectory.

    Control tokens split a text before it is tokenized, so what stands between two of them is tokenized once, whatever
    number of samples it is in.
    """

    @functools.cache
    def count_between(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0

    def count_text(text: str) -> int:
        first, *others = re.split(r"<\|im_(?:start|end)\|>", text)
        return count_between(first) + sum(1 + count_between(other) for other in others)

    def count(columns: dict, no_thinking: bool) -> int:
        opening = f"{BLOCK_END}\n{BLOCK_START}assistant\n{given}"
        prompt = f"{BLOCK_START}system\n{columns['system']}{BLOCK_END}\n" if columns["system"] else ""
        for user, assistant in columns["history"]:
            prompt += f"{BLOCK_START}user\n{user}{opening}{assistant}{BLOCK_END}\n"
        prompt += f"{BLOCK_START}user\n{columns['instruction']}{opening}"
        if no_thinking:
            prompt += "<think>\n\n</think>\n\n"
        return count_text(prompt) + count_text(f"{columns['output']}{BLOCK_END}\n")

    return count


@functools.cache
def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is no tokenizer to be had
        raise SystemExit(f"{name}: no tokenizer to be had from this model ({error})") from None
