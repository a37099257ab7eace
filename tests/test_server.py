import json
import time

import pytest
from conftest import ROOT, assistant, call, tool, user
from small_server import MODELS, a_server, serving

from served_tokens.proof import server as asking
from served_tokens.proof.server import (
    CHAT,
    DERENDER,
    RENDER,
    Refused,
    ask_all,
    connect,
    parsed_answer,
    prompt_ids,
    request_body,
)
from served_tokens.proof.server_check import (
    Question,
    cause_of,
    chosen_turns,
    compare_with_server,
    lines_of,
    questions_of,
    written,
)

RECORDED = json.loads((ROOT / "tests" / "server" / "vllm_render.json").read_text(encoding="utf-8"))
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    monkeypatch.delenv(asking.API_KEY, raising=False)


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def one_of(*answers):
    """The first answer, then the next, and the last one ever after."""
    left = list(answers)
    return lambda *_: left.pop(0) if len(left) > 1 else left[0]


def as_recorded(body: dict, _) -> tuple:
    """What vLLM 0.32.0 made of a request."""
    for request in filter(lambda request: "prompt" in request, RECORDED):
        sent = request_body(request["messages"], request["tools"], request["reasoning_sent_as"] or "none")
        if {"model": "tiny", **sent} == body:
            return 200, {"token_ids": ids_of(request["prompt"])}
    return 400, {"error": {"message": "not recorded"}}


def recorded(name: str, field: str | None = None) -> dict:
    return next(r for r in RECORDED if r["name"] == name and r["reasoning_sent_as"] == field)


def test_a_request_comes_out_as_the_server_rendered_it():
    request = recorded("two_queries_tool_chains, turn 10", "reasoning_content")
    with serving(a_server(as_recorded)) as url:
        server = connect(url + "/v1/")
        assert (server.model, server.prompts, server.parses) == ("tiny", RENDER, False)
        body = request_body(request["messages"], request["tools"], "reasoning_content")
        assert decode(prompt_ids(server, body)) == request["prompt"]


@pytest.mark.parametrize("answer", [{"prompt_token_ids": [1, 2]}, {"choices": [{"prompt_token_ids": [1, 2]}]}])
def test_without_a_render_path_the_chat_is_asked_for_one_token(answer):
    bodies = []

    def chat(body, _):
        bodies.append(body)
        return 200, answer

    with serving(a_server(**{CHAT: chat})) as url:
        server = connect(url)
        assert server.prompts == CHAT
        assert prompt_ids(server, request_body([user("q")], None, "none")) == [1, 2]
    assert bodies[-1] == {
        "model": "tiny",
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
        "return_prompt_token_ids": True,
        "messages": [user("q")],
    }


def test_paths_that_are_switched_off_are_not_there():
    off = {
        path: lambda *_: (403, {"error": {"message": "Scale-out endpoints are disabled."}})
        for path in (RENDER, DERENDER)
    }
    with serving(a_server(**off)) as url:
        server = connect(url)
    assert (server.prompts, server.parses) == (CHAT, False)


def test_a_request_is_sent_as_an_agent_sends_it():
    calls = [{"function": {"name": "f", "arguments": {"x": "é"}}}, call("g", None), call("h", '{"a":1}', id="own")]
    messages = [
        {"role": "system", "content": None},
        user([{"text": "a"}, {"type": "text", "text": "b"}]),
        assistant(None, "r", calls),
        tool({"x": 1}),
        tool([{"type": "text", "text": "o"}]),
        {**tool(None), "tool_call_id": "own"},
        assistant("a", ""),
    ]
    body = request_body(messages, [], "reasoning", thinking=False)
    assert body == {
        "messages": [
            {"role": "system", "content": ""},
            user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            {
                "role": "assistant",
                "content": "",
                "reasoning": "r",
                "tool_calls": [
                    {"id": "call_2_0", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}},
                    {"id": "call_2_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                    {"id": "own", "type": "function", "function": {"name": "h", "arguments": '{"a":1}'}},
                ],
            },
            {"role": "tool", "tool_call_id": "call_2_0", "content": '{"x": 1}'},
            {"role": "tool", "tool_call_id": "call_2_1", "content": [{"type": "text", "text": "o"}]},
            {"role": "tool", "tool_call_id": "own", "content": ""},
            {"role": "assistant", "content": "a", "reasoning": ""},
        ],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert "reasoning" not in str(request_body(messages, [TOOL], "none")["messages"])


def test_a_refusal_keeps_the_words_of_the_server():
    with serving(a_server(lambda *_: (400, {"error": {"message": "no auto tool choice"}}))) as url:
        assert prompt_ids(connect(url), {"messages": []}) == Refused(400, "no auto tool choice")


def test_a_busy_server_is_asked_again():
    busy, ok = (429, {}), (200, {"token_ids": [7]})
    with serving(a_server(one_of((400, {}), busy, (503, b"starting"), ok))) as url:
        assert prompt_ids(connect(url), {"messages": []}) == [7]


def test_a_server_that_stays_busy_ends_it_with_one_line():
    with serving(a_server(one_of((400, {}), (429, {})))) as url, pytest.raises(SystemExit) as end:
        prompt_ids(connect(url), {"messages": []})
    assert str(end.value) == f"{url}: does not answer {RENDER} (status 429, 5 tries); is it overloaded?"


def test_a_slow_server_ends_it_with_one_line():
    def slow(body, _):
        time.sleep(0.3 if body["messages"] else 0)
        return 400, {}

    with serving(a_server(slow)) as url, pytest.raises(SystemExit, match=r"ReadTimeout, 0\.1 s are the limit, 5 tries"):
        prompt_ids(connect(url, timeout=0.1), {"messages": [user("q")]})


def test_a_server_that_is_not_there_ends_it_with_one_line():
    with serving({}) as url:
        pass
    with pytest.raises(SystemExit) as end:
        connect(url)
    assert str(end.value).startswith(f"{url}: no server answers (") and "\n" not in str(end.value)
    with pytest.raises(SystemExit, match="no server answers"):
        connect("localhost:8000")


@pytest.mark.parametrize(
    "paths, said",
    [
        ({}, "lists no model at /v1/models"),
        ({"/v1/models": lambda *_: (200, b"<html>")}, "answers no JSON but '<html>'"),
        ({"/v1/models": lambda *_: (401, {})}, "wants an API key; set the environment variable SERVER_API_KEY"),
    ],
)
def test_what_is_no_such_server_ends_it_with_one_line(paths, said):
    with serving(paths) as url, pytest.raises(SystemExit, match=said):
        connect(url)


def test_an_answer_without_ids_ends_it_with_one_line():
    with serving(a_server(lambda *_: (200, {"choices": []}))) as url:
        server = connect(url)
        with pytest.raises(SystemExit, match="answers without the ids of the prompt"):
            prompt_ids(server, {"messages": []})


def test_the_key_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv(asking.API_KEY, "secret")
    seen = []

    def models(_, headers):
        seen.append(headers["Authorization"])
        return 200, MODELS

    with serving({"/v1/models": models}) as url:
        connect(url)
    assert seen == ["Bearer secret"]


def test_answers_come_in_order_and_many_at_a_time():
    def ask(number: int) -> int:
        time.sleep(0.02 if number % 8 else 0.05)
        return -number

    start = time.monotonic()
    assert list(ask_all(ask, iter(range(40)), 40, "t")) == [(number, -number) for number in range(40)]
    assert time.monotonic() - start < 0.7


def test_an_answer_that_was_streamed_is_put_together():
    pieces = [
        {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": None}},
        {"index": 0, "id": None, "type": None, "function": {"name": None, "arguments": '{"a": 1}'}},
        {"index": 1, "id": "y", "type": "function", "function": {"name": "g"}},
    ]
    delta = {"role": "assistant", "content": "\n\n", "reasoning": "\nr\n", "tool_calls": pieces}
    derender = {DERENDER: lambda *_: (200, {"chunk": {"choices": [{"index": 0, "delta": delta}]}})}
    with serving(a_server(**derender)) as url:
        server = connect(url)
        assert server.parses
        assert parsed_answer(server, {"messages": []}, [1], [2, 3], streamed=True) == {
            "role": "assistant",
            "content": "\n\n",
            "reasoning_content": "\nr\n",
            "tool_calls": [
                {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": ""}},
            ],
        }


# ---------------------------------------------------------------- the comparison


def question(trained: str, messages=None, tools=None, **more) -> Question:
    messages = messages or [user("q"), assistant("a")]
    rest = {"turn": 1, "served_as": "drop", "echo": "none", "targets": {}, **more}
    return Question("data.jsonl: trajectory 0, turn 1", messages, tools, trained=ids_of(trained), **rest)


def test_exact_refused_and_other_prompts_are_told_apart():
    def render(body, _):
        text = body["messages"][0]["content"] if body["messages"] else ""
        return (400, {"error": "too long"}) if text == "long" else (200, {"token_ids": ids_of(f"<user>{text}")})

    asked = [question("<user>q"), question("<user>q "), question("-", [user("long")])]
    with serving(a_server(render)) as url:
        server = connect(url)
        compared = compare_with_server(iter(asked), 3, server, "reasoning_content", decode)
    assert lines_of(compared, server, 10) == [
        "data.jsonl: trajectory 0, turn 1: the server's prompt differs from token 7 of 7:\n"
        "  server : …'<user>q' >>> ''\n  trained: …'<user>q' >>> ' '",
        f"  asked                   3  of 10 prompts at {url}{RENDER}",
        "  exact by server         1  (33.33%)",
        "  refused                 1  400: too long",
        "  differ                  1  another chat template; step 1 --chat-template with the one that is served",
    ]


def test_a_server_that_parses_shows_which_agents_the_samples_fit():
    def render(body, _):
        return 200, {"token_ids": ids_of("|".join(message["content"] or "" for message in body["messages"]))}

    def derender(body, _):
        if "chat_request" not in body:
            return 400, {}
        text = decode((body.get("generate_response") or body.get("generate_chunk") or {})["choices"][0]["token_ids"])
        message = {"content": ("streamed " if body.get("stream") else "whole ") + text}
        answer = {"choices": [{"message": message}]}
        return 200, {"chunk": {"choices": [{"delta": message}]}} if body.get("stream") else answer

    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    asked = question("q|whole t|r", messages, turn=3, echo="vllm", targets={1: ids_of("t")})
    paths = a_server(render, **{DERENDER: derender})
    with serving(paths) as url:
        server = connect(url)
        compared = compare_with_server(iter([asked]), 1, server, "none", decode)
    assert (compared.asked, compared.exact) == ({"none": 1, "vllm": 1, "vllm-stream": 1}, {"vllm": 1})
    assert lines_of(compared, server, 1)[2:] == [
        "         0 of      1  are what an agent is served that sends them as the rows have them",
        "         1 of      1  are what an agent is served that sends the answers back as they came",
        "         0 of      1  are what an agent is served that streams, and sends the answers back as they came",
    ]


def test_where_the_server_does_not_parse_the_checks_own_reading_does():
    bodies = []

    def render(body, _):
        bodies.append(body)
        return 200, {"token_ids": [1]}

    target = '<think>\nr\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    asked = question(
        "x", [user("q"), assistant("a"), user("r")], [TOOL], turn=2, echo="vllm-stream", targets={1: ids_of(target)}
    )
    with serving(a_server(render)) as url:
        compare_with_server(iter([asked._replace(served_as="template")]), 1, connect(url), "reasoning_content", decode)
    sent = bodies[-1]["messages"][1]
    assert (sent["content"], sent["reasoning_content"]) == ("\n\n", "\nr\n")
    assert sent["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


TOOLS_AS = "<tools>\n%s\n</tools>"


@pytest.mark.parametrize(
    "served, trained, more, cause",
    [
        ("a", "a", {}, "another tokenizer"),
        ("assistant\n<tool_call>", "assistant\n<think>\n", {}, "does not show the reasoning that was sent"),
        ("assistant\n<think>\n", "assistant\nHi", {}, "shows reasoning that the samples leave out"),
        ("a\nb", "ab", {"messages": [user([{"text": "a"}, {"text": "b"}])]}, "--server-style vllm"),
        ("a b", "a\nb", {"messages": [user([{"text": "a"}, {"text": "b"}])]}, "--server-style sglang"),
        ("<|im_start|>system", "<|im_start|>user", {}, "another chat template"),
        (
            TOOLS_AS % json.dumps({**TOOL, "defer_loading": None}),
            TOOLS_AS % json.dumps(TOOL),
            {"tools": [TOOL]},
            "prints tools otherwise; step 1 --server-style sglang",
        ),
        (
            TOOLS_AS % json.dumps({**TOOL, "x": 1}),
            TOOLS_AS % json.dumps(TOOL),
            {"tools": [TOOL]},
            "prints tools as no style of step 1 does",
        ),
    ],
)
def test_the_cause_of_a_difference_is_named(served, trained, more, cause):
    assert cause in cause_of(served, trained, question(trained, **more))


def test_a_choice_of_turns_is_even_and_never_more_than_there_are():
    samples = [[1, 3], [5], [1], [2, 4, 6], [7]]
    assert chosen_turns(samples, 4) == {0: [1], 1: [5], 3: [2, 6]}
    assert chosen_turns(samples, 99) == dict(enumerate(samples))
    assert chosen_turns([], 5) == {}


def test_the_prompts_of_a_sample_end_where_its_turns_begin():
    sample = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, -100, 6]}
    about = question("", turn=None, targets={1: [3, 4], 3: [6]})._replace(place="row 0")
    asked = questions_of(about, [1, 3], [1, 3], sample)
    assert [(one.place, one.turn, one.trained, one.targets) for one in asked] == [
        ("row 0, turn 1", 1, [1, 2], {}),
        ("row 0, turn 3", 3, [1, 2, 3, 4, 5], {1: [3, 4]}),
    ]
    assert questions_of(about, [1, 3], [3], sample) == asked[1:]


def test_a_target_is_written_up_to_the_end_mark():
    assert written("<think>\n\n</think>\n\na<|im_end|>\n") == "<think>\n\n</think>\n\na"
