"""Lengths: the tokens that LlamaFactory makes of a sample, counted without it."""

import functools

from served_tokens.marks import BLOCK_END, BLOCK_START


def token_counter(tokenizer, given: str):
    """count(columns, no_thinking) -> tokens that LlamaFactory makes of a sample, for the samples of one trajectory.

    It tokenizes message by message, so a message is counted once, whatever number of samples it is in.
    """

    @functools.cache
    def count_text(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(columns: dict, no_thinking: bool) -> int:
        texts = [f"{BLOCK_START}system\n{columns['system']}{BLOCK_END}\n"] if columns["system"] else []
        for user, assistant in [*columns["history"], [columns["instruction"], columns["output"]]]:
            texts.append(f"{BLOCK_START}user\n{user}{BLOCK_END}\n{BLOCK_START}assistant\n{given}")
            texts.append(f"{assistant}{BLOCK_END}\n")
        if no_thinking:
            texts.append("<think>\n\n</think>\n\n")
        return sum(map(count_text, texts))

    return count


@functools.cache
def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is no tokenizer to be had
        hint = "name the folder of a model, or a Hub id within reach"
        raise SystemExit(f"--tokenizer {name}: no tokenizer to be had from this model; {hint} ({error})") from None
