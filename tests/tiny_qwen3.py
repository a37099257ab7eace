"""A tiny random Qwen3 with a small tokenizer, for training without a GPU and without a download.

    python tests/tiny_qwen3.py FOLDER

The tokenizer has Qwen's pre-tokenizer rule, normalizer and special tokens, and a byte-level BPE trained on the embedded
sample, so that texts meet the same traps at their edges as with the real one. The weights are random.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
PRE_TOKENIZER = (  # Qwen2 to Qwen3: contractions, words, single digits, punctuation, line ends, other whitespace
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(chat_template: str | None = None):
    """The tokenizer; its chat template is the embedded one unless another is given."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (ROOT / "data" / "envscaler_sample.jsonl").read_text(encoding="utf-8").replace("\\n", "\n")
    blanks = ["\n\n", "\n\n\n", " \n", "  \n", "\n \n", "\t\n", "   "] * 50  # runs of whitespace are tokens, as in Qwen
    trainer = trainers.BpeTrainer(
        vocab_size=2048, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([texts, *blanks], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=131072
    )
    fast.chat_template = chat_template or (ROOT / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    return fast


def build(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
