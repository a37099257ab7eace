"""Every row of every file of cases (see its README): what it is read as, or why it is set aside."""

import re
from pathlib import Path

import pytest
from conftest import read_jsonl

from served_tokens.marks import TrajectoryError
from served_tokens.rows import notes
from served_tokens.rows.trajectory import read_trajectory

CASES = Path(__file__).parent.parent / "cases"
FILES = {path.name.split("-")[0]: read_jsonl(path) for path in sorted(CASES.glob("*.jsonl"))}
TOGETHER = FILES.pop("00")
CONTEXT = {  # why a turn is context only
    "off": "their weight, loss or train says not to train on them",
    "length": "their finish_reason is length, so they were cut off",
    "open": "they open a <think> and do not close it, so they were cut off",
    "empty": "they have neither text nor calls",
    "prefix": "they are a prefix that the model was asked to go on from",
}

READ = {  # roles, with marks for reasoning, calls and context, and what else is met: rows of which that is read
    "s u a:C, tools": "01.0",
    "s u a:off u a, tools": "02.0",
    "u a:off u a": "02.1 02.2",
    "u a:R:C t a:R, tools": "03.0 03.1 05.0 30.2 31.0 31.1 p34.0 p44.0 p53.0 p62.0 p71.0",
    "u a:R, tools": "04.0 04.1 13.0 13.1 13.2 13.3 30.3",
    "u a:open, tools": "07.0",
    "s u a t a, tools, TOOLS_TWICE, CALL_AS_TEXT, NO_CALL, WRAPPED": "09.0",
    "u a:R:C t a:R, tools, NULL_SCHEMAS, NULL_ARGUMENTS": "11.0",
    "u a, thinking off": "12.0 p50.0 p50.1 p50.2 p50.3 p50.4 p64.1",
    "s u t a, tools, NO_CALL": "14.5",
    "s u a:R:C t a, tools": "15.0",
    "s u a": "15b.0",
    "u a, tools": "16.0 19.2 19.3 19.4 p24.3",
    "u a:C t a, tools": "19.1 26.0 26.1 26.2 p24.0 p24.1 p24.2",
    "u a:prefix": "22.0",
    "u a:R:length": "22.1",
    "u a:empty": "22.2 22.3 22.4",
    "s u a:R:C t a:R, tools": "25.0 p03.0 p07.0",
    "u a:R:C t a:R, 2 tools, NULL_SCHEMAS, NULL_ARGUMENTS": "27.0 27.1",
    "u a:R": "30.0 p28.2 p50.5 p51.0",
    "u a:R:C:C t t u a:R, tools": "30.1",
    "s u a:R:C t a:R:C, tools": "p04.0",
    "u a, tools, thinking off": "p08.1",
    "s u a:C t a, tools": "p09.0",
    "u a:off u a u a": "p10.0",
    "s u a:R:C t a:R, tools, WRAPPED": "p11.0",
    "u a:length, tools": "p16.1 p16b.0",
    "u a:R:length, tools": "p16b.1",
    "u a:R:C:C t t a, tools": "p17.0",
    "s u a:R t a:R, tools, CALL_AS_TEXT, NO_CALL": "p20.0 p20.2",
    "s u a:R t a:R, tools, NO_CALL": "p20.1",
    "s u a:R:off u a:R, CALL_AS_TEXT 2": "p22.0",
    "u a:R:C t a:R, tools, SAYS_NONE": "p25.0",
    "s u a:R": "p28.0 p48.0 p48.2",
    "s u a:R:C, tools": "p32.0",
    "s u a:C t a:R:C, tools": "p32.1",
    "s u a:C t a:C t a:R, tools": "p32.2",
    "u a:R:C t a:R, tools, thinking on": "p37.0 p49.0",
    "s u a a a, TWO_ANSWERS 2": "p47.0",
    "s u a:R, tools": "p48.1",
    "u a:R:empty, tools": "p54.0",
    "u a:R:C t a, tools": "p54.1 p68.1",
    "s u a t a, tools, NO_CALL": "p56.0 p56.1",
    "u a:C:off t a:R, tools": "p59.0",
    "s u a t a, CALL_AS_TEXT, NO_CALL, WRAPPED": "p60.0",
    "u a:R u a:R, thinking on": "p64.0",
    "u a:R a:C t a:R, tools, TWO_ANSWERS": "p65.0",
    "u a:R:C a:C t t a:R, tools, TWO_ANSWERS": "p66.0",
}
ASIDE = {  # parts of the reason: the rows that are set aside for it
    "nobody reads its keys message.thought;": "03.2",
    "nobody reads its keys message.reasoning_text;": "03.3",
    "row.available_tools (it holds tools: read them by --read-as available_tools=tools)": "05.1",
    "row.function (it holds tools: read them by --read-as function=tools)": "05.2",
    "row.tool (it holds tools: read them by --read-as tool=tools)": "05.3",
    "a user message has tool_calls: they are of a simulated user, not of the model": "06.0 p06.0",
    "message 1: has a call of get_weather both as text and in tool_calls": "08.0",
    "message 1: unknown role 'tool_call'; convert it to one of system, user, assistant, tool": "14.0",
    "message … unknown role '": "14.1 14.2 14.3 14.4 14.6 24.0 24.1 p23.0",
    "the trajectory calls tools and offers none; … or keep it by --allow-calls-without-tools": "17.0",
    "it has response (it is the answer: append it to messages as an assistant message)": "18.0",
    "tools is not a list or an object but a string": "19.0",
    "column messages is not a list but an object": "19.5",
    "a part of type tool-call, which nobody reads; convert calls to tool_calls": "20.0 p30.0",
    "a part of type refusal, which nobody reads; write what it says as text": "20.1",
    "tool call arguments are not valid JSON": "26.3 p70.0",
    "message.channel … (harmony's channels: convert analysis to reasoning_content, ": "p01.0 p01b.0",
    "message.train_detail (loss is switched for whole turns only: leave the turn out by weight: 0)": "p02.0",
    "message.raw_data (it holds a message: bring that into messages and tools)": "p05.0",
    "message 2: is a call, or its output, of a simulated user": "p06.1",
    "of type redacted_thinking, which nobody reads; its reasoning is not to be had: take the part": "p07.1 p18.0",
    "row.metadata (it holds tools: bring that into messages and tools)": "p08.0",
    "reasoning that would be trained as text; convert it to reasoning_content": "p12.0 p12.1 p12.2 p12.3 p12.4",
    "it has messages_and_choices (convert it to messages, each choice to the message in it)": "p13.0",
    "it has input (convert the items of the Responses API to messages)": "p14.0",
    "it has systemInstruction (convert Gemini's contents to messages), contents": "p15.0",
    "message.additional_kwargs (it holds a message: bring that into messages and tools)": "p16.0",
    "message.invalid_tool_calls (the model wrote calls that are no JSON: leave the turn out": "p16.2",
    "message.function_calls (write calls as tool_calls)": "p21.0",
    "message 1: has think marks inside its reasoning field; take <think> and </think> out of it": "p26.0",
    "has stray think marks in content beside its reasoning field; take one of them out": "p27.0 p27b.0",
    "message 1: has the output of a tool inside the answer (<tool_response>)": "p28.1",
    "row.instructions (it is a system prompt: read it by --read-as instructions=system, ": "p29.0",
    "a part of type reasoningContent, which nobody reads; convert reasoning to reasoning_content": "p31.0",
    "keys row.context_window, row.kwargs, row.response (it is the answer: append it to messages": "p33.0",
    "row.chosen, row.rejected (these are preference rows: write a row for each answer that": "p35.0",
    "row.rejected_response, row.label": "p35.1",
    "message 1: content is a text that holds the JSON of content parts; write the list itself": "p36.0",
    "write 1 or true to train the turn, 0 or false to leave it out": "p38.0 p38.1",
    "message 0: content has a part of type input_text, which nobody reads": "p46.0",
    "reasoning_details holds a summary or is encrypted, and no reasoning stands beside it": "p68.0",
    "trajectory; read the one that holds them by --read-as trajectory=messages": "p69.0",
    "column messages is not valid JSON": "p70.1",
}
READ_AS, ASIDE_FOR = ({name: said for said, names in its.items() for name in names.split()} for its in (READ, ASIDE))


def said(row: dict) -> str:
    """What is read of a row, as the table says it."""
    trajectory = read_trajectory(row)
    codes, words = {why: code for code, why in CONTEXT.items()}, []
    for position, message in enumerate(trajectory.messages):
        marks = ":R" * ("reasoning_content" in message) + ":C" * len(message.get("tool_calls", ()))
        why = trajectory.not_trained.get(position)
        words.append(message["role"][0] + marks + (f":{codes[why]}" if why else ""))
    names = {value: name for name, value in vars(notes).items() if isinstance(value, str)}
    more = ["tools" if len(trajectory.tools) == 1 else f"{len(trajectory.tools)} tools"] if trajectory.tools else []
    if trajectory.given.thinking is not None:
        more.append("thinking on" if trajectory.given.thinking else "thinking off")
    for note, number in (+notes.noted(trajectory).notes).items():
        more.append(names[note] if number == 1 else f"{names[note]} {number}")
    return ", ".join([" ".join(words), *more])


def case(name: str) -> dict:
    file, _, row = name.partition(".")
    return FILES[file][int(row)]


@pytest.mark.parametrize("name", READ_AS)
def test_row_of_a_case_is_read_so(name):
    assert said(case(name)) == READ_AS[name]


@pytest.mark.parametrize("name", ASIDE_FOR)
def test_row_of_a_case_is_set_aside_for_this_reason(name):
    parts = ASIDE_FOR[name].split(" … ")
    with pytest.raises(TrajectoryError, match=".*".join(map(re.escape, parts))):
        read_trajectory(case(name))


def test_every_row_of_every_case_is_in_the_tables_and_those_of_00_are_among_the_others():
    there = {f"{name}.{row}" for name, rows in FILES.items() for row in range(len(rows))}
    assert there == READ_AS.keys() ^ ASIDE_FOR.keys()
    assert len(TOGETHER) == 17 and all(row in map(case, there) for row in TOGETHER)


# ---------------------------------------------------------------- through both steps and the check


def group(name: str) -> str | None:
    """Rows of several cases ask the same; so those with and without reasoning are no one data set."""
    if name.startswith("p32"):
        return None
    turns = [word for word in READ_AS[name].partition(",")[0].split() if word[0] == "a"]
    thinking = [":R" in turn for turn in turns]
    return "reasoning" if all(thinking) else "some" if any(thinking) else "none"


DROP, NO_THINKING = ([], []), (["--no-thinking"], ["enable_thinking=false"])
TEMPLATE = ["--history-thinking", "template"], ["template=qwen3_nothink"]


@pytest.mark.parametrize(
    "its_group, way, samples",
    [
        *(("reasoning", DROP, 69), ("reasoning", TEMPLATE, 69), ("some", DROP, 15), ("some", TEMPLATE, 15)),
        *(("none", DROP, 40), ("none", NO_THINKING, 48)),
    ],
)
def test_all_cases_that_are_read_are_exact_and_lose_no_text(its_group, way, samples, checked):
    output = checked([case(name) for name in READ_AS if group(name) == its_group], *way).stdout
    assert f"PASSED: {samples} of {samples} samples are exact" in output


@pytest.mark.parametrize(
    "name, pair",
    [
        *(("03.2", "thought=reasoning_content"), ("05.1", "available_tools=tools"), ("05.2", "function=tools")),
        *(("p29.0", "instructions=system"), ("p69.0", "trajectory=messages")),
    ],
)
def test_the_way_out_that_a_reason_names_works_when_it_is_followed(name, pair, checked):
    assert f"--read-as {pair}" in ASIDE_FOR[name] or name == "03.2"
    assert "PASSED: " in checked([case(name)], step1=["--read-as", pair]).stdout


def test_a_log_with_a_row_for_each_call_fails_and_passes_with_its_last_turns(checked):
    process = checked(FILES["p32"], expect=1)
    assert "3 of 6 turns have no reasoning (0 of 1 that answer, 3 of 5 that call tools)" in process.stdout
    assert "FAILED: samples: 2 prompts are trained both with and without reasoning to the same answer" in process.stderr
    assert "PASSED: 3 of 3 samples are exact" in checked(FILES["p32"], ["--turns", "last"]).stdout
