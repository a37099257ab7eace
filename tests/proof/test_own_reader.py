"""The check's own reading of plain rows: by rules of its own, the same as step 1's, and no other row is plain."""

import json

import pytest
from conftest import ROOT, assistant, call, golden, read_jsonl, tool, user
from hypothesis import given
from hypothesis import strategies as st

from served_tokens.proof.own_reader import plain_reading
from served_tokens.proof.reading import as_plain
from served_tokens.rows import servers
from served_tokens.rows.trajectory import Reading, read_trajectory

FUNCTION = {"name": "f", "description": "d", "parameters": {"b": 1, "a": "é"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
KEEP_ALL = Reading(allow_calls_without_tools=True)


def row(*messages, **columns) -> dict:
    return {"messages": [user("q"), *messages, assistant("a", "r")], "tools": TOOLS, **columns}


def test_a_plain_row_is_read_as_its_json_says():
    called = assistant(None, " r\n", [call("f", '{"b":1.50,"a":"\\u00e9"}'), call("f", "", id="c")])
    kwargs = {"preserve_thinking": True, "tone": None}
    assert plain_reading(row(called, tool(" 3\n"), id=7, chat_template_kwargs=kwargs)) == (
        [
            ("user", "q", "", []),
            ("assistant", "", " r\n", [("f", '{"b": 1.5, "a": "\\u00e9"}'), ("f", "{}")]),
            ("tool", " 3\n", "", []),
            ("assistant", "a", "r", []),
        ],
        ['{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"b": 1, "a": "\\u00e9"}}}'],
        {"preserve_thinking": True},
    )


@pytest.mark.parametrize(
    "one",
    [
        row(user([{"type": "text", "text": "x"}])),
        row({**assistant("b"), "reasoning": "x"}),
        row(assistant("<think>x</think>b")),
        row(assistant("x</think>b")),
        row({"role": "developer", "content": "x"}),
        row({**user("x"), "note": "y"}),
        row({**tool("x"), "content": {"x": 1}}),
        row(assistant("", None, [{"name": "f", "arguments": {}}])),
        row(assistant("", None, [{**call("f", {}), "index": 0}])),
        row(assistant("", None, [{"function": {"name": "f", "args": {}}}])),
        row(assistant("", None, [call("f", "[1]")])),
        row(assistant("", None, [json.dumps(call("f", {}))])),
        row(tools=[FUNCTION]),
        row(tools=[{"type": "function", "function": {**FUNCTION, "strict": None}}]),
        row(tools=[{"function": FUNCTION, "type": "function"}]),
        row(tools={"f": TOOLS[0]}),
        row(system="s"),
        row(functions=TOOLS),
        row(conversations=[{"from": "human", "value": "q"}]),
        {"messages": "no JSON"},
        {"prompt": [user("q")], "completion": [assistant("a")]},
    ],
)
def test_a_row_that_is_not_plain_is_not_read(one):
    assert plain_reading(one) is None


@pytest.mark.parametrize("parameters", [{"type": "dict"}, {"a": [{"type": ["null", "int"]}]}, {"maximum": 1 << 64}])
def test_tools_are_not_plain_to_sglang_where_it_may_print_them_otherwise(parameters):
    function = {**FUNCTION, "parameters": parameters}
    one = row(tools=[{"type": "function", "function": function}])
    assert plain_reading(one, "sglang") is None and plain_reading(one) is not None
    assert plain_reading(row(tool_choice="none"), "sglang") is None


@pytest.mark.parametrize("style", ["vllm", "sglang"])
def test_all_rows_of_the_embedded_sample_and_all_golden_cases_but_one_are_plain_and_read_alike(style):
    rows = [*read_jsonl(ROOT / "data" / "envscaler_sample.jsonl"), *golden()]
    plain = [plain_reading(one, style) for one in rows]
    keep_all = Reading(allow_calls_without_tools=True, server_style=style)
    assert [rows[k]["messages"][2]["content"] for k, read in enumerate(plain) if read is None] == [
        "<think>\ninline\n</think>\n\nanswer"
    ]
    assert all(read in (None, as_plain(read_trajectory(one, keep_all))) for one, read in zip(rows, plain))


TEXTS = st.text(st.sampled_from('ab \n"\\é{[<|>'), max_size=5)
VALUES = st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers(), st.none(), st.lists(TEXTS, max_size=2)), max_size=3)
CALLS = st.builds(call, TEXTS, st.one_of(VALUES, VALUES.map(json.dumps), st.sampled_from([None, "", "{}"])))
ANSWERS = st.one_of(TEXTS.map("x{}".format), st.none())
TURNS = st.builds(assistant, ANSWERS, TEXTS, st.lists(CALLS, min_size=1, max_size=2))
OTHERS = st.one_of(TEXTS.map(user), TEXTS.map(tool), TEXTS.map(lambda text: {"role": "system", "content": text}))
PLAIN_TOOLS = st.builds(
    lambda name, parameters: {"type": "function", "function": {**FUNCTION, "name": name, "parameters": parameters}},
    TEXTS,
    VALUES,
)


@given(st.lists(st.one_of(OTHERS, TURNS), max_size=5), st.lists(PLAIN_TOOLS, max_size=2), st.booleans())
def test_random_plain_rows_are_read_alike(messages, tools, as_text):
    one = {"messages": [*messages, assistant("a", "r")], "tools": tools}
    if as_text:
        one = {key: json.dumps(value) for key, value in one.items()}
    assert plain_reading(one) == as_plain(read_trajectory(one, KEEP_ALL))


def test_the_check_says_how_many_rows_it_reads_twice_and_fails_where_the_two_differ(checked, monkeypatch):
    rows = [row(), {**row(user([{"type": "text", "text": "hello"}])), "id": 7}]
    assert "1 of 2 rows with samples the check reads by its own rules too, with the same result" in checked(rows).stdout

    monkeypatch.setattr(servers, "_shown", lambda function, keys: dict(sorted(function.items())))
    process = checked(rows, expect=1)
    assert "rows.jsonl: row 0: step 1 reads it otherwise than the check itself does" in process.stdout
    assert "FAILED: samples: 1 row is read otherwise" in process.stderr
