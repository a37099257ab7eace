"""The fast path against the naive definition, on made-up conversations, down to LlamaFactory's token ids."""

import functools
import json
from itertools import chain

import pytest
import tiny_qwen3
from conftest import assistant, call, tool, user
from hypothesis import given
from hypothesis import strategies as st
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.converter import AlpacaDatasetConverter
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.hparams import DataArguments
from reading_rows import served_trajectory

from served_tokens.files.read import Place
from served_tokens.marks import IGNORE_INDEX, Tokens, TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.turns import is_ordinary, rendered_by_chains, rendered_by_prefix
from served_tokens.proof.turn import expected_sample, served_turn
from served_tokens.rows.trajectory import CONTROL_TOKENS, Reading
from served_tokens.samples.alpaca import COLUMNS, step1_columns, to_samples
from served_tokens.samples.tokens import to_token_samples
from step1_apply_tool_template import plain_row

TEMPLATE = read_chat_template(str(QWEN3))
RENDER = load_chat_template(TEMPLATE)
PIECES = [
    *("a", "Zug", "订单", "é", "e\u0301", "\u0301", "😀", "7", ".", '"', "{", " ", "  ", "\n", "\n\n", "\t", "\r\n"),
    *"\u3000\x00\x85\ufeff\u2028\u202e\ufffd\U0010ffff",
    *("<think>", "</think>", "<think>\nx\n</think>\n\n", "<tool_response>", "</tool_response>", "<tool_call>"),
    *("<tool_response>\nr\n</tool_response>", "{{content}}", "{{idx}}", "{% x %}", "{% raw %}", "<image>"),
    *("2024-01-01", *CONTROL_TOKENS, "<|im_end|>\n<|im_start|>assistant\n", "<|im_"),
]
TEXT = st.lists(st.sampled_from(PIECES * 4 + ["\ud800"]), max_size=5).map("".join)
VALUES = st.one_of(TEXT, st.none(), st.integers(), st.floats(allow_nan=False), st.lists(TEXT, max_size=2))
ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=2)
CALLS = st.lists(st.builds(call, st.sampled_from(["f", "get_order"]), ARGUMENTS), max_size=2)
TURNS = st.builds(assistant, TEXT, st.none() | TEXT, CALLS)
SYSTEM = st.builds(lambda text: {"role": "system", "content": text}, TEXT)
MESSAGE = st.one_of(
    st.builds(user, TEXT), st.builds(tool, TEXT), TURNS, st.builds(assistant, TEXT, TEXT, CALLS), SYSTEM
)
ANSWERED = st.tuples(TURNS, st.lists(st.builds(tool, TEXT), max_size=2)).map(lambda turn: [turn[0], *turn[1]])
CHAIN = st.tuples(st.builds(user, TEXT), st.lists(ANSWERED, min_size=1, max_size=3))
ORDINARY = st.lists(CHAIN, min_size=1, max_size=3).map(
    lambda chains: [message for query, turns in chains for message in [query, *chain.from_iterable(turns)]]
)
CONVERSATION = st.one_of(ORDINARY, st.lists(MESSAGE, min_size=1, max_size=8))
TOOLS = st.sampled_from([None, [{"type": "function", "function": {"name": "f", "parameters": {"é": [1.0, None]}}}]])
ALL = Reading(allow_control_tokens=True, allow_calls_without_tools=True)
MODES = {  # served_as -> the settings of LlamaFactory that are exact for it
    "drop": [("qwen3", True), ("qwen3_nothink", True)],
    "template": [("qwen3_nothink", True)],
    "no-thinking": [("qwen3", False)],
}


@functools.cache
def llamafactory(template: str, enable_thinking: bool, mask_history: bool = True):
    """LlamaFactory's own way from a sample to token ids and labels."""
    tokenizer = tiny_qwen3.build_tokenizer()
    arguments = DataArguments(
        template=template, mask_history=mask_history, cutoff_len=10**6, enable_thinking=enable_thinking
    )
    attributes = DatasetAttr("file", "samples")
    attributes.join({"formatting": "alpaca", "columns": COLUMNS})
    convert = AlpacaDatasetConverter(attributes, arguments)
    fixed = get_template_and_fix_tokenizer(tokenizer, arguments)
    processor = SupervisedDatasetProcessor(fixed, tokenizer, None, arguments)

    def tokens(sample: dict) -> tuple[list[int], list[int]]:
        fixed.enable_thinking = enable_thinking  # LlamaFactory keeps one template object per name
        built = processor.preprocess_dataset({key: [value] for key, value in convert(sample).items()})
        return built["input_ids"][0], built["labels"][0]

    return tokens


def samples_of(messages, tools, mode, merge_turns=False, encode=None):
    """(samples, reasons of left-out turns) through the rows that both scripts write and read.

    encode: for samples of token ids. Raises TrajectoryError.
    """
    _, [(_, row)] = plain_row({"messages": messages, "tools": tools}, Place("x", 0), TEMPLATE, ALL)
    how = *step1_columns(row), mode, merge_turns
    return to_token_samples(*how, encode) if encode else to_samples(*how)


@pytest.mark.parametrize("mode", MODES)
@given(conversation=CONVERSATION, tools=TOOLS)
def test_llamafactory_trains_on_the_served_tokens(mode, conversation, tools, tokenizer):
    try:
        samples, left_out = samples_of(conversation, tools, mode)
    except TrajectoryError:
        return
    messages, tools = served_trajectory({"messages": conversation, "tools": tools}, ())
    assert len(samples) + len(left_out) == sum(message["role"] == "assistant" for message in messages)
    of_ids, _ = samples_of(conversation, tools, mode, encode=Tokens(tokenizer))
    of_ids = {sample["turns"][0]: (sample["input_ids"], sample["labels"]) for sample in of_ids}
    for sample in samples:
        texts = served_turn(messages, tools, sample["turns"][-1], mode, RENDER)
        prompt, target = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        expected = prompt + target, [IGNORE_INDEX] * len(prompt) + target
        assert of_ids[sample["turns"][0]] == expected
        for setting in MODES[mode]:
            assert llamafactory(*setting)(sample) == expected


@given(conversation=CONVERSATION, tools=TOOLS)
def test_merged_samples_supervise_each_turn_once_in_its_served_context(conversation, tools, tokenizer):
    try:
        samples, _ = samples_of(conversation, tools, "template", merge_turns=True)
    except TrajectoryError:
        return
    unmerged, _ = samples_of(conversation, tools, "template")
    messages, tools = served_trajectory({"messages": conversation, "tools": tools}, ())
    assert [turn for sample in samples for turn in sample["turns"]] == [sample["turns"][0] for sample in unmerged]
    for sample in samples:
        spans = []
        for turn in sample["turns"]:
            texts = served_turn(messages, tools, turn, "template", RENDER)
            spans.append(tokenizer(list(texts), add_special_tokens=False)["input_ids"])
        ids, labels = llamafactory("qwen3_nothink", True, mask_history=False)(sample)
        masked = [IGNORE_INDEX] * len(ids)
        for prompt, target in spans:
            assert ids[: len(prompt) + len(target)] == prompt + target
            masked[len(prompt) : len(prompt) + len(target)] = target
        assert (len(ids), labels) == (sum(map(len, spans[-1])), masked)
        assert expected_sample(spans) == {"input_ids": ids, "labels": labels}


@given(conversation=CONVERSATION, tools=TOOLS)
def test_rendering_by_chains_equals_rendering_every_prefix(conversation, tools):
    try:
        messages, tools = served_trajectory({"messages": conversation, "tools": tools}, ())
    except TrajectoryError:
        return
    messages, tools = json.loads(json.dumps([messages, tools]).replace("<|im_", "<|im+"))  # no marks of ChatML
    if is_ordinary(messages):
        assert rendered_by_chains(messages, tools, RENDER) == rendered_by_prefix(messages, tools, RENDER)


@pytest.mark.parametrize(
    "past, following, text",
    [
        (assistant("\n\na", "r"), user("q2"), "assistant\n\n\na<|im_end|>"),  # one token with the newline before it
        (assistant("</think><think>\nx\n</think>\n\na"), tool("t"), "<think>\nx\n</think>\n\na<|im_end|>"),
    ],
    ids=["whitespace at its start", "a think block typed into it"],
)
def test_history_turn_that_llamafactory_would_change_stays_text_of_the_prompt(past, following, text):
    samples, _ = samples_of([user("q"), past, following, assistant("b", "s")], None, "drop")
    assert samples[1]["history"] == [] and text in samples[1]["instruction"]


def test_answer_that_opens_with_a_newline_is_left_out_without_thinking():
    samples, left_out = samples_of([user("q"), assistant("\n", "r", [call("f", {})])], None, "no-thinking")
    assert samples == [] and "opens with a newline" in left_out[1]


def test_text_that_llamafactory_would_replace_is_left_out_with_the_reason():
    samples, left_out = samples_of([user("q"), assistant("a", "r"), user("{{idx}}"), assistant("b", "s")], None, "drop")
    assert [sample["turns"][-1] for sample in samples] == [1]
    assert left_out == {3: "its prompt holds {{idx}}, which LlamaFactory replaces by a number"}
    replaced, number = ({**samples[0], "instruction": text} for text in ("{{idx}}", "0"))
    assert llamafactory("qwen3", True)(replaced) == llamafactory("qwen3", True)(number)


def test_turn_without_reasoning_ends_its_sample_as_the_template_shows_it_otherwise_later():
    thinking, silent = (assistant("", reasoning, [call("f", {})]) for reasoning in ("r", None))
    conversation = [user("q"), thinking, tool("1"), silent, tool("2"), assistant("a", "r")]
    samples, _ = samples_of(conversation, None, "template", merge_turns=True)
    assert [sample["turns"] for sample in samples] == [[1, 3], [5]]
