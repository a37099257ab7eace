"""Token trees: rows that hold the samples of trajectories once, and their losses and gradients."""

import random
from collections import Counter

import numpy as np
import pytest
from conftest import REFUND, assistant, user
from test_exactness import MODES, TEMPLATE, llamafactory

from served_tokens.files.read import Place
from served_tokens.marks import IGNORE_INDEX
from served_tokens.rows.trajectory import Reading
from served_tokens.samples.alpaca import step1_columns, to_samples
from served_tokens.trees.check import AS_WRITTEN, TREES, check_rows, differing
from served_tokens.trees.files import columns_of
from served_tokens.trees.rows import Sample, padded, rows_of
from step1_apply_tool_template import plain_row

NO = IGNORE_INDEX
SETS = 3000


def sample(ids, supervised=()) -> Sample:
    labels = [token if at in supervised else NO for at, token in enumerate(ids)]
    return Sample(np.array(ids), np.array(labels))


def seen_by(row, token: int) -> np.ndarray:
    """The indices of the tokens that a token of the row sees, itself too: the definition."""
    return np.array([k for k in range(token + 1) if token <= row.last[k]])


def random_samples(draw: random.Random) -> list:
    """Samples that begin like others do, of few different tokens, of which any are supervised."""
    made, words, part = [], draw.choice([1, 2, 5]), draw.random()
    for _ in range(draw.randint(1, 10)):
        like = draw.choice(made)[0].tolist() if made and draw.random() < 0.8 else []
        fresh = [draw.randrange(words) for _ in range(draw.randint(0, 5))]
        ids = like[: draw.randint(len(like) // 2, len(like))] + fresh
        made.append(sample(ids, [at for at in range(len(ids)) if draw.random() < part]))
    return made


def of_samples(samples) -> Counter:
    """{(the tokens before a supervised one, it): how often}"""
    return Counter(
        (tuple(ids[:at].tolist()), int(ids[at]))
        for ids, labels in samples
        for at in range(1, len(ids))
        if labels[at] != NO
    )


def of_rows(rows, seen=seen_by) -> Counter:
    """The same of rows: what the token before each label sees, and the label."""
    return Counter(
        (tuple(row.input_ids[seen(row, at - 1)].tolist()), int(row.labels[at]))
        for row in rows
        for at in range(1, len(row.input_ids))
        if row.labels[at] != NO
    )


def as_lists(row) -> list:
    return [column.tolist() for column in row]


def test_each_supervised_token_is_in_the_rows_with_what_is_before_it_in_its_sample():
    draw, causal = random.Random(0), 0
    for _ in range(SETS):
        samples, row_samples = random_samples(draw), draw.choice([None, None, 3])
        rows = list(rows_of(samples, draw.choice([1, 10, 30, 1000]), row_samples))
        rows = [padded(row, draw.choice([1, 8]), 0) for row in rows]
        assert of_rows(rows) == of_samples(samples)
        causal += of_rows(rows, lambda row, at: np.arange(at + 1)) == of_samples(samples)
        for row in rows:
            assert {column.dtype for column in row} == {np.dtype(np.int32)}
            assert all(row.position_ids[at] == len(seen_by(row, at)) - 1 for at in range(len(row.last)))
    assert causal < 0.7 * SETS  # the control: under a causal mask what the others see is wrong


def test_rows_keep_to_the_limits_but_for_a_sample_that_is_longer():
    draw = random.Random(1)
    for _ in range(300):
        samples, limit = random_samples(draw), draw.randint(1, 12)
        longest = max(len(ids) for ids, _ in samples)
        assert all(len(row.input_ids) <= max(limit, longest) for row in rows_of(samples, limit))
        ones = [one for one in samples if (one[1][1:] != NO).any()]
        assert len(list(rows_of(samples, 1000, row_samples=1))) == len(ones)


def test_a_row_of_two_turns_holds_the_prompt_once():
    turns = [sample([1, 2, 7, 8], {2, 3}), sample([1, 2, 8, 3, 7, 9], {4, 5})]  # the second shows the first as 8
    [row] = rows_of(turns, 100)
    assert as_lists(row) == [
        [1, 2, 7, 8, 8, 3, 7, 9],
        [NO, NO, 7, 8, NO, NO, 7, 9],
        [0, 1, 2, 3, 2, 3, 4, 5],
        [7, 7, 3, 3, 7, 7, 7, 7],
    ]


def test_turns_of_a_chain_need_no_branch():
    [row] = rows_of([sample([1, 2, 7], {2}), sample([1, 2, 7, 3, 8], {4})], 100)
    assert as_lists(row) == [[1, 2, 7, 3, 8], [NO, NO, 7, NO, 8], [0, 1, 2, 3, 4], [4, 4, 4, 4, 4]]


def test_a_branch_that_would_open_with_a_supervised_token_starts_with_a_copy_of_the_one_before():
    [row] = rows_of([sample([1, 2, 7], {2}), sample([1, 2, 8], {2}), sample([1, 2, 8], {2})], 100)
    assert as_lists(row) == [
        [1, 2, 7, 2, 8, 2, 8],
        [NO, NO, 7, NO, 8, NO, 8],
        [0, 1, 2, 1, 2, 1, 2],
        [6, 2, 2, 4, 4, 6, 6],
    ]


def turns_of(second: int, first: int) -> list[Sample]:
    """Three samples that begin alike, of 4, 8 and 12 tokens between their prompt and their target."""
    return [sample([1, second, *range(first, first + turn * 4), 9], {2 + turn * 4}) for turn in range(1, 4)]


def test_a_row_ends_between_trajectories_and_in_one_only_where_it_is_too_long():
    one, other = turns_of(2, 10), turns_of(3, 50)
    both = list(rows_of(one + other, 27))
    assert [row.input_ids[1] for row in both] == [2, 3] and [len(row.input_ids) for row in both] == [17, 17]
    assert len(list(rows_of(one + other, 40))) == 1
    split = list(rows_of(one, 16))  # each part with its prefix
    assert of_rows(split) == of_samples(one) and all(row.input_ids[:2].tolist() == [1, 2] for row in split)


def test_rows_come_out_before_all_samples_are_in():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield sample([len(taken), 1, 2, 3], {3})

    rows = rows_of(endless(), 8)
    assert len(next(rows).input_ids) == 8 and len(taken) == 3


def test_no_token_sees_padding_and_padding_sees_itself():
    [row] = rows_of([sample([1, 2, 7], {2})], 10)
    assert as_lists(padded(row, 4, 99)) == [[1, 2, 7, 99], [NO, NO, 7, NO], [0, 1, 2, 0], [2, 2, 2, 3]]


# ---------------------------------------------------------------- losses and gradients


@pytest.fixture(scope="module")
def losses(tiny_model):
    """losses(batches) -> (loss of each supervised token in order, gradient of their sum), in double precision."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from served_tokens.trees.attention import use_tree_attention

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa")
    use_tree_attention()

    def losses(batches):
        model.zero_grad()
        each = []
        for columns in batches:
            batch = {name: torch.as_tensor(np.array(value), dtype=torch.int64)[None] for name, value in columns.items()}
            labels = batch.pop("labels")[0, 1:]
            logits = model(**batch).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != NO]
            loss.sum().backward()
            each += loss.tolist()
        return each, [parameter.grad.clone() for parameter in model.parameters()]

    yield losses
    AttentionInterface.register("sdpa", sdpa_attention_forward)  # the tests behind these have no trees
    AttentionMaskInterface.register("sdpa", sdpa_mask)


def batches_of(rows, causal=False):
    for row in rows:
        row = padded(row, 128, 0)
        if causal:
            row = row._replace(last=np.full_like(row.last, len(row.last) - 1))
        columns = columns_of(row)
        yield {name: columns[name] for name in ("input_ids", "labels", "position_ids", "attention_mask")}


def difference(ours, theirs) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs))


WEATHER = [*REFUND, assistant("Refunded."), assistant("Anything else?", "two turns in a row")]
OTHER = [*WEATHER[:1], user("who are you?"), assistant("A clerk.", "say so")]


def tokenized(conversations, mode) -> list:
    """LlamaFactory's (ids, labels) of the samples of both steps."""
    made, reading = [], Reading(allow_calls_without_tools=True)
    for messages in conversations:
        _, [(_, row)] = plain_row({"messages": messages}, Place("x", 0), TEMPLATE, reading)
        made += to_samples(*step1_columns(row), mode)[0]
    return [Sample(*map(np.array, llamafactory(*MODES[mode][0])(one))) for one in made]


@pytest.mark.parametrize("row_tokens", [10**6, 150, 1])  # all in one row, some split, a row for each sample
@pytest.mark.parametrize("mode", MODES)
def test_losses_of_each_token_and_gradients_are_those_of_the_samples(mode, row_tokens, losses):
    samples = tokenized([WEATHER, OTHER], mode)
    rows = list(rows_of(samples, row_tokens))
    assert len(samples) == 6 and (len(rows) == 1) == (row_tokens > 150) and (len(rows) == 6) == (row_tokens == 1)
    expected, gradients = losses({"input_ids": ids, "labels": labels} for ids, labels in samples)
    ours, our_gradients = losses(batches_of(rows))
    assert ours == pytest.approx(expected, abs=1e-12)
    assert difference(our_gradients, gradients) < 1e-6  # Qwen3's norms compute in single precision
    if len(rows) == 1:  # the control
        causal, causal_gradients = losses(batches_of(rows, causal=True))
        assert causal != pytest.approx(expected, abs=1e-6) and difference(causal_gradients, gradients) > 1e-2


def test_logits_of_the_predicting_tokens_alone_give_the_same_loss(losses, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa")
    columns = columns_of(padded(next(rows_of(tokenized([WEATHER], "drop"), 10**6)), 128, 0))
    batch = {name: torch.as_tensor(np.array(value), dtype=torch.int64)[None] for name, value in columns.items()}
    alone = model(**batch)
    whole = model(**{name: batch[name] for name in ("input_ids", "labels", "position_ids", "attention_mask")})
    assert alone.logits.numel() < whole.logits.numel() / 2 and alone.loss.item() == pytest.approx(whole.loss.item())


# ---------------------------------------------------------------- the check


def test_check_finds_samples_that_are_seen_otherwise_in_the_rows():
    draw, wrong = random.Random(2), 0
    for _ in range(1000):
        samples = [one for one in random_samples(draw) if (one[1][1:] != NO).any()]
        for row in rows_of(samples, 1000):
            row[draw.randrange(len(row))][draw.randrange(len(row.last))] += 1
            row.last[:] = np.minimum(row.last, len(row.last) - 1)
            found = differing(row, enumerate(samples))
            if of_rows([row]) != of_samples(samples):
                wrong += 1
                assert found
    assert wrong > 300


def test_check_counts_samples_and_rows():
    chain = [sample([1, 2, 7], {2}), sample([1, 2, 7, 3, 8], {4}), sample([1, 2, 9, 3, 8], {3, 4})]
    assert check_rows(chain, 100) == ({AS_WRITTEN: (3, 13), TREES: (1, 8)}, [])
    assert check_rows(chain, 1) == ({AS_WRITTEN: (3, 13), TREES: (3, 13)}, [])


def test_check_with_trees(pipeline, check):
    other = [{**message, "content": "W13"} if message["role"] == "tool" else message for message in WEATHER]
    tools = [{"type": "function", "function": {"name": "get", "description": "", "parameters": {}}}]
    rows = [{"messages": messages, "tools": tools} for messages in (WEATHER, other)]
    printed = check(pipeline(rows), "--trees")
    assert "1 rows of token trees" in printed and "of 10 of 10 samples see there what they see in them" in printed
    assert "10 rows of token trees" in check("samples", "--trees", "row_samples=1")
