"""What real servers made of requests, through step 1, step 2 and the check: the same, or set aside with a reason."""

import json
import unicodedata

import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN, ROOT, assistant, golden, read_jsonl, tool, user, write_jsonl
from reading_rows import served_text
from recorded import ECHOED_BY_SGLANG, ECHOED_BY_VLLM, SGLANG, VLLM

from served_tokens.marks import TrajectoryError
from served_tokens.rows.trajectory import Reading, read_trajectory

KEEP_ALL = ("--allow-control-tokens", "--allow-calls-without-tools")
SET_ASIDE = {  # by step 1, although the server answered
    "assistant part refusal": "message 1: content has a part of type refusal, which nobody reads",
    "arguments ' '": "message 1: tool call arguments are not a JSON object but a string",
    "arguments '[1]'": "message 1: tool call arguments are not a JSON object but a list",
    "arguments '42'": "message 1: tool call arguments are not a JSON object but a number",
    "arguments doubly encoded": "message 1: tool call arguments are not a JSON object but a string",
    "arguments broken JSON": "message 1: tool call arguments are not valid JSON",
    "reasoning_content and reasoning differ": "message 1: the reasoning stands in both reasoning_content and reasoning",
    "tool custom key in function": "nobody reads its keys tool.response",
    "tool custom key beside function": "nobody reads its keys tool.x",
    "unknown keys in messages": "nobody reads its keys message.x",
    "call with extra key in function": "nobody reads its keys call.x",
    "role function": "message 2: servers do not show the role function beside tool_calls; write the role tool",
    "inline think + reasoning_content same": "message 1: has stray think marks in content beside its reasoning field",
}
LEFT_OUT = {  # by step 2, although the server answered
    "system content ''": "its system prompt is empty, and LlamaFactory writes no block for that",
    "assistant opens": "its prompt opens with a block of assistant, which LlamaFactory cannot write",
    "no user message": "the chat template renders this turn without a think block, as no user query comes before it",
    "assistant_opens, turn 1": "the chat template renders this turn without a think block, as no user query comes "
    "before it",
}
SENT_OTHERWISE = {  # no agent sends the message so: its reasoning goes back in one field, an output as a tool message
    "assistant part thinking + text",
    "reasoning '' and reasoning_content",
    "reasoning_details (OpenRouter)",
}
REFUSED_AND_SET_ASIDE = {
    "user part of plain str": "message 0: content is not text but a list",
    "user part input_text": "message 0: content has a part of type input_text, which nobody reads",
    "arguments lone surrogate escape": "the text holds a lone surrogate",
    "arguments 5000-digit int": "message 1: tool call arguments are not valid JSON (Exceeds the limit (4300 digits)",
    "tool content number": "message 2: content is not text but a number",
    "tool description number": "tool 'f': a server refuses its function.description",
    "tool parameters list": "tool 'f': a server refuses its function.parameters",
    "lone surrogate in text": "the text holds a lone surrogate",
}
REFUSED_AND_REPAIRED = {
    *("user content null", "tool content null", "user part without type", "call without id", "call without type"),
    *("arguments object", "arguments null", "arguments missing", "flat call {name, arguments}", "tools []"),
    *("tool content object", "tool content list of objects", "tool content list of strings"),
    "tool flat (no function)",
}
REFUSED_AND_LEFT_OUT = {"system content null": LEFT_OUT["system content ''"]}
NOT_THERE = SET_ASIDE | LEFT_OUT | REFUSED_AND_SET_ASIDE | REFUSED_AND_LEFT_OUT
EXACT = "PASSED: {0} of {0} samples are exact\n".format


def row_of(request: dict) -> dict:
    """A trajectory of which the last turn has the request's prompt."""
    messages = [*request["messages"], assistant("an answer")]
    row = {"messages": messages, "tools": request["tools"], **request.get("more", {})}
    return {key: value for key, value in row.items() if value is not None}


@pytest.fixture
def steps(run, tmp_path):
    """steps(rows, *step 1's options, history=…, turns=…) -> {(row, turn): prompt}, after both steps."""

    def steps(rows: list[dict], *options, history: str = "template", turns: str = "all") -> dict:
        lines = "".join(json.dumps(row) + "\n" for row in rows)  # in which half a character can be written
        (tmp_path / "rows.jsonl").write_text(lines)
        run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", *options)
        options = "--dataset-dir", ".", "--history-thinking", history, "--turns", turns
        run("step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", *options)
        samples = pq.read_table(tmp_path / "samples.parquet").to_pylist()
        prompts = {(its["trajectory"], its["turns"][0]): served_text(its)[0] for its in samples}
        return {turn: unicodedata.normalize("NFC", text) for turn, text in prompts.items()}  # as Qwen's tokenizers do

    return steps


def reasons(folder) -> dict:
    """{row: why there is no sample of its last turn}, as both steps say it beside their output."""
    whys = {its["row"]: its["reason"] for its in read_jsonl(folder / "plain.jsonl.rejects.jsonl")}
    kept = [row for row in range(len(SGLANG)) if row not in whys]
    whys |= {turn["trajectory"]: turn["reason"] for turn in read_jsonl(folder / "samples.parquet.left_out.jsonl")}
    if (rejects := folder / "samples.parquet.rejects.jsonl").exists():
        whys |= {kept[its["row"]]: its["reason"] for its in read_jsonl(rejects)}
    return whys


# ---------------------------------------------------------------- recorded prompts


def test_a_recorded_prompt_comes_out_the_same_through_both_steps_and_the_check(steps, check, tmp_path):
    prompts = steps([row_of(request) for request in VLLM], *KEEP_ALL, turns="last")
    differ, repaired, without, whys = set(), set(), set(), reasons(tmp_path)
    for row, request in enumerate(VLLM):
        name, prompt = request["name"], prompts.get((row, len(request["messages"])))
        if prompt is None:
            assert whys[row].startswith(NOT_THERE[name]), name
            without.add(name)
        elif "refused" in request:
            repaired.add(name)
        elif prompt != request["prompt"]:
            differ.add(name)
    assert (differ, repaired, without) == (SENT_OTHERWISE, REFUSED_AND_REPAIRED, NOT_THERE.keys())
    assert EXACT(len(prompts)) in check("samples", "template=qwen3_nothink")


def test_a_recorded_prompt_without_reasoning_is_that_of_the_drop_history(steps, check):
    prompts = steps([row_of(request) for request in VLLM], *KEEP_ALL, history="drop", turns="last")
    bare = {its["name"]: its["prompt"] for its in VLLM if "prompt" in its and not its["reasoning_sent_as"]}
    sent = [(row, its) for row, its in enumerate(VLLM) if its["reasoning_sent_as"]]
    differ = {its["name"] for row, its in sent if prompts.get((row, len(its["messages"]))) != bare[its["name"]]}
    assert differ == {
        "reasoning_content and reasoning differ",  # set aside
        "inline think + reasoning_content same",  # too
    }
    assert EXACT(len(prompts)) in check("samples", "template=qwen3_nothink")


OF_SGLANG = ("--server-style", "sglang")


def test_no_prompt_of_sglang_differs_from_the_recorded_one_in_silence(steps, check, tmp_path):
    prompts = steps([row_of(request) for request in SGLANG], *KEEP_ALL, *OF_SGLANG, turns="last")
    repaired, same, whys = 0, 0, reasons(tmp_path)
    for row, request in enumerate(SGLANG):
        prompt = prompts.get((row, len(request["messages"])))
        if prompt is None:
            assert whys[row], request["name"]
        elif "refused" in request:
            repaired += 1
        else:
            assert prompt == unicodedata.normalize("NFC", request["prompt"]), request["name"]
            same += 1
    assert (repaired, same) == (11, 208)
    assert EXACT(len(prompts)) in check("samples", "template=qwen3_nothink")


@pytest.mark.parametrize("history, field", [("drop", None), ("template", "reasoning_content")])
@pytest.mark.parametrize("echo, style", [("vllm", "vllm"), ("vllm-stream", "vllm"), ("sglang", "sglang")])
def test_a_recorded_prompt_of_an_echoing_agent_comes_out_the_same(steps, check, echo, style, history, field):
    prompts = steps(golden(), "--echo", echo, "--server-style", style, history=history)
    names = [case["name"] for case in GOLDEN if case["messages"] in [row["messages"] for row in golden()]]
    expected = {
        (names.index(its["name"]), its["turn"]): its["prompt"]
        for its in ECHOED_BY_VLLM + ECHOED_BY_SGLANG
        if (its["echo"], its["reasoning_sent_as"]) == (echo, field) and its["name"] in names
    }
    left_out = expected.keys() - prompts.keys()
    assert len(left_out) == (style == "sglang")  # right behind another turn
    assert {key: its for key, its in expected.items() if key not in left_out}.items() <= prompts.items()
    assert EXACT(53 - len(left_out)) in check("samples", "template=qwen3_nothink")


# ---------------------------------------------------------------- developer messages

DEV = {"role": "developer", "content": "dev"}


@pytest.mark.parametrize(
    "messages, system",
    [  # as vLLM 0.32.0 renders them, asked for this
        ([DEV, user("a")], "dev"),
        ([{"role": "system", "content": "sys"}, DEV, user("a")], "sys\n\ndev"),
        ([user("a"), {**DEV, "content": [{"type": "text", "text": text} for text in "de"]}], "d\ne"),
    ],
)
def test_developer_messages_before_the_first_turn_are_the_system_prompt_at_the_front(steps, check, messages, system):
    turn = assistant("b", "r")
    [prompt] = steps([{"messages": [*messages, turn, user("c"), {**turn, "weight": 0}]}]).values()
    assert prompt == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert EXACT(1) in check("samples", "template=qwen3_nothink")


def test_a_developer_message_after_a_turn_or_to_another_server_is_set_aside():
    late = [user("a"), assistant("b"), DEV, user("c"), assistant("d")]
    why = "a developer message is not shown in its place; send it with the role"
    for messages, style in ((late, "vllm"), (late[2:], "sglang"), (late[2:], "template")):
        with pytest.raises(TrajectoryError, match=why):
            read_trajectory({"messages": messages}, Reading(server_style=style))


# ---------------------------------------------------------------- recorded token ids


@pytest.fixture
def ids(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


FIRST = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = FIRST, f"{FIRST}a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
WROTE = "<think>\nt\n</think>\n\na", "<think>\nt\n</think>\n\nb"


def chat(first: dict | None = None, second: dict | None = None, **columns) -> dict:
    turns = {**assistant("a", "t"), **(first or {})}, {**assistant("b", "t"), **(second or {})}
    return {"messages": [user("q"), turns[0], user("r"), turns[1]], **columns}


def by_record(exact: int, of: int) -> str:
    return f"  {exact:>8} exact by record, of {of} turns whose token ids a server recorded\n"


def records(ids, ends: tuple = ("<|im_end|>", "<|im_end|>")) -> list[dict]:
    return [
        {"prompt_token_ids": ids(prompt), "token_ids": ids(wrote + end)}
        for prompt, wrote, end in zip(PROMPTS, WROTE, ends)
    ]


@pytest.mark.parametrize("ends", [("<|im_end|>", "<|im_end|>"), ("", "<|im_end|>\n")])
def test_recorded_ids_in_turns_or_in_the_row_are_exact_by_record(steps, check, ids, ends):
    first, second = records(ids, ends)
    of_row = {key: [first[key], second[key]] for key in first}
    rows = [chat(first, second), chat(**of_row), chat(second=second), chat(**second)]
    steps(rows, history="drop")
    output = check("samples")
    assert EXACT(8) in output and by_record(6, 6) in output


def test_records_of_turns_that_are_merged_into_one_sample_are_compared_each(checked, ids):
    first, other = records(ids)
    output = "<|im_end|>\n<|im_start|>user\n<tool_response>\no\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    second = {**other, "prompt_token_ids": ids(PROMPTS[0] + WROTE[0] + output)}
    ways = ["--history-thinking", "template", "--merge-turns"], ["template=qwen3_nothink", "mask_history=false"]
    for record, exact in ((second, 2), (other, 1)):
        chain = [user("q"), {**assistant("a", "t"), **first}, tool("o"), {**assistant("b", "t"), **record}]
        said = checked([{"messages": chain}], *ways, expect=int(exact < 2)).stdout
        assert by_record(exact, 2) in said and (EXACT(1) in said) == (exact == 2)


def test_a_record_that_differs_fails_although_the_rendering_agrees(steps, check, ids):
    first, second = records(ids)
    steps([chat(first | {"token_ids": [*first["token_ids"][:-2], 5]}, second)], history="drop")
    output = check("samples", expect=1)
    assert by_record(1, 2) in output and "         1 mismatched\n" in output
    assert "rows.jsonl: row 0, turn 1 (--show 0:1): differs from the token ids that the server recorded of it" in output


def test_a_record_outranks_a_rendering_by_another_chat_template(steps, check, ids, tmp_path):
    import tiny_qwen3
    from transformers import Qwen3Config

    template = (ROOT / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    other = template.replace("'<|im_start|>' ~ message", "'<|im_start|> ' ~ message")
    assert other != template
    tiny_qwen3.build_tokenizer(other).save_pretrained(tmp_path / "model")
    Qwen3Config().save_pretrained(tmp_path / "model")
    steps([chat(*records(ids)), chat()], history="drop")
    output = check("samples", f"model_name_or_path={tmp_path / 'model'}", expect=1)
    assert by_record(2, 2) in output and "         2 mismatched\n" in output


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"token_ids": ["x"]}, "token_ids are no lists of token ids"),
        ({"prompt_token_ids": [[1], 2]}, "prompt_token_ids are no lists of token ids"),
        ({"prompt_token_ids": [[1], [2], [3]]}, "prompt_token_ids of the row are those of 3 turns, and it has 2"),
    ],
)
def test_broken_records_are_set_aside(columns, reason):
    with pytest.raises(TrajectoryError, match=reason):
        read_trajectory(chat(**columns))


# ---------------------------------------------------------------- --echo


def test_echo_of_another_server_is_refused_in_one_line(run, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [chat()])
    errors = run("step1_apply_tool_template.py", "rows.jsonl", "--echo", "sglang", expect=1).stderr
    assert errors.strip() == "--echo sglang: the prompts are those of SGLang then; add --server-style sglang"


def test_no_thinking_after_echo_is_refused_in_one_line(run, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [chat()])
    run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", "--echo", "vllm")
    errors = run("step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", "--no-thinking", expect=1).stderr
    why = "--no-thinking: step 1 was run with --echo, which echoes what a thinking model writes; run it without"
    assert errors.splitlines()[-1] == why and not (tmp_path / "samples.parquet").exists()
