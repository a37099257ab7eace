"""Asking a server: what is sent, which prompts are compared, and what is said of a server that does not answer."""

import json
import time

import pytest
from conftest import assistant, call, tool, user, write_jsonl
from datasets import Dataset
from small_server import MODELS, a_server, serving

from served_tokens.marks import Tokens
from served_tokens.proof import server as asking
from served_tokens.proof.compare import Truth
from served_tokens.proof.server import CHAT, Question, Server, prompt_ids, request_for
from served_tokens.rows.trajectory import Reading

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
CALLS = [{"function": {"name": "f", "arguments": {"x": "é"}}}, call("f", None), call("f", '{"a":1}', id="own")]
MESSAGES = [
    user([{"text": "a"}, {"type": "text", "text": "b"}]),
    assistant(None, "r", CALLS),
    tool({"x": 1}),
    tool([{"type": "text", "text": "o"}]),
    {**tool(None), "tool_call_id": "own"},
    assistant("done"),
]


@pytest.fixture
def truth(tokenizer):
    return Truth(Tokens(tokenizer), cutoff_len=40960, trajectories=None, is_cut=False)


def question(messages: list, turn: int, served_as: str = "template", tools=(TOOL,), **reading) -> Question:
    row, read = {"messages": messages, "tools": [*tools]}, Reading(**reading)
    return Question(place="trajectory 0", row=row, reading=read, turn=turn, served_as=served_as, trained=[])


def test_a_row_is_sent_as_an_agent_sends_it(truth):
    assert request_for(question(MESSAGES, 5), None, truth) == {
        "messages": [
            user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "r",
                "tool_calls": [
                    {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}},
                    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {"id": "own", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                ],
            },
            tool('{"x": 1}'),
            tool([{"type": "text", "text": "o"}]),
            {"role": "tool", "tool_call_id": "own", "content": ""},
        ],
        "tools": [TOOL],
    }


@pytest.mark.parametrize(
    "served_as, field, kwargs, sent, more",
    [
        ("template", None, {}, {"reasoning_content": "r"}, {}),
        ("template", "reasoning", {}, {"reasoning": "r"}, {}),
        ("template", "none", {}, {}, {}),
        ("drop", None, {}, {}, {}),
        ("drop", "reasoning", {}, {"reasoning": "r"}, {}),
        ("no-thinking", None, {"keep": 1, "enable_thinking": True}, {}, {"keep": 1, "enable_thinking": False}),
    ],
)
def test_reasoning_is_sent_as_the_sample_or_the_user_says_and_what_the_template_reads(
    truth, served_as, field, kwargs, sent, more
):
    messages = [user("q"), assistant("a", "r"), user("r")]
    body = request_for(question(messages, 2, served_as, (), template_kwargs=kwargs), field, truth)
    assert body.pop("chat_template_kwargs", {}) == more
    assert body == {"messages": [user("q"), {**assistant("a"), **sent}]}


def test_a_trained_prompt_is_what_stands_before_the_supervised_run_of_its_turn(truth, tmp_path):
    row = {"messages": [user("q"), assistant("a"), user("r"), assistant("b"), user("s"), assistant("c")]}
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"messages": []}, row]))
    told = json.dumps({"server_style": "sglang", "echo": "none"})
    sample = {"source": path, "trajectory": 1, "turns": [1, 3, 5], "served_as": "template", "reading": told}
    cut = [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, -100, 6]}]
    asked = [*asking.questions_about(Dataset.from_list([sample]), cut, 3, truth)]
    assert [(one.place, one.turn, one.trained) for one in asked] == [
        (f"{path}: row 1, turn 1", 1, [1, 2]),
        (f"{path}: row 1, turn 3", 3, [1, 2, 3, 4, 5]),
    ]
    assert asked[0].row == row and asked[0].reading == Reading(server_style="sglang")


def test_where_the_check_makes_the_servers_prompt_itself_the_sample_is_wrong(truth):
    served = truth.tokenizer.encode("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    cause = asking.cause_of(served, question([user("q"), assistant("a")], 1, tools=()), truth)
    assert cause == "the sample itself is not exact, see above"


# ---------------------------------------------------------------- the server


@pytest.mark.parametrize("answer", [{"prompt_token_ids": [1, 2]}, {"choices": [{"prompt_token_ids": [1, 2]}]}])
@pytest.mark.parametrize("render", [None, lambda *_: (403, {"error": {"message": "Scale-out is disabled."}})])
def test_without_a_render_path_the_chat_is_asked_for_one_token(answer, render):
    bodies = []

    def chat(body, _):
        bodies.append(body)
        return 200, answer

    with serving(a_server(render, **{CHAT: chat})) as url:
        server = Server(url)
        assert prompt_ids(server, {"messages": [user("q")]}) == [1, 2]
    switches = {"max_tokens": 1, "temperature": 0, "return_token_ids": True, "return_prompt_token_ids": True}
    assert bodies == [{"model": "tiny", **switches, "messages": [user("q")]}]


def test_the_key_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", "secret")
    seen = []
    with serving({"/v1/models": lambda _, headers: seen.append(headers["Authorization"]) or (200, MODELS)}) as url:
        Server(url)
    assert set(seen) == {"Bearer secret"}


@pytest.mark.parametrize(
    "paths, said",
    [
        ({}, "lists no model at /v1/models; is it an OpenAI-compatible server"),
        ({"/v1/models": lambda *_: (200, b"<html>")}, "lists no model at /v1/models"),
        ({"/v1/models": lambda *_: (401, {})}, "lists no model .*, with its API key, if it wants one, in SERVER_API_K"),
        (a_server(lambda *_: (200, {"choices": []})), "answers without the ids of the prompt"),
        (a_server(lambda *_: (200, b"<html>")), "answers without the ids of the prompt"),
        (a_server(lambda *_: time.sleep(0.5) or (400, {})), "ReadTimeout: timed out.*; is the server up"),
    ],
)
def test_what_is_no_such_server_or_answers_late_ends_it_with_one_line(paths, said):
    with serving(paths) as url, pytest.raises(SystemExit, match=said) as end:
        prompt_ids(Server(url, timeout=0.25), {"messages": [user("q")]})
    assert str(end.value).startswith(f"{url}: ") and "\n" not in str(end.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "http://127.0.0.1:port"])
def test_an_address_without_a_server_ends_it_with_one_line(url):
    with pytest.raises(SystemExit, match=r"is the server up, and the address right\?|lists no model") as end:
        Server(url)
    assert str(end.value).startswith(f"{url}: ") and "\n" not in str(end.value)
