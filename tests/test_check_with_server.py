"""check_training_tokens.py --server against a small server that renders with the model's own chat template."""

import pytest
from conftest import ROOT, assistant, call, tool, user
from small_server import a_server, serving
from test_server_styles import handed_over

from served_tokens.proof import server as asking
from served_tokens.proof.server import RENDER, connect
from served_tokens.proof.server_check import compare_with_server, lines_of

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
TOOL_CHAIN = [user("q"), assistant("", "why", [call("f", "{}")]), tool("o"), assistant("done", "so")]
ROWS = [{"messages": [*TOOL_CHAIN, user("bye"), assistant("Bye.", "r")], "tools": [TOOL]}]
ROWS_OF_PARTS = [{"messages": [user("q"), assistant("a", "r"), user(PARTS), assistant("b", "r")]}]
FAILED = "FAILED: samples: {} of {} prompts are not those of the server at {}".format


@pytest.fixture
def rendering(tokenizer):
    """rendering(style, ignored=…) -> what a server of this style answers that reads no key of that name."""

    def rendering(style: str = "vllm", ignored: str = ""):
        def render(body, _):
            served, tools = handed_over(body["messages"], body.get("tools"), style)
            served = [{key: its[key] for key in its if key != ignored} for its in served]
            text = tokenizer.apply_chat_template(served, tools=tools, tokenize=False, add_generation_prompt=True)
            return 200, {"token_ids": tokenizer.encode(text, add_special_tokens=False)}

        return lambda body, headers: render(body, headers) if body["messages"] else (400, {"error": "no messages"})

    return rendering


@pytest.fixture
def check_with(run_check, pipeline, tmp_path, tiny_model):
    """check_with(url, rows, *options) -> the finished check of the rows, which are exact by the chat template."""

    def check_with(url: str, rows: list, *options, echo: str = "none", expect: int = 0):
        name = pipeline(rows, "--history-thinking", "template", echo=echo)
        settings = (f"dataset_dir={tmp_path}", f"dataset={name}", f"model_name_or_path={tiny_model}")
        command = (ROOT / "qwen3_full_sft.yaml", *settings, "template=qwen3_nothink", "preprocessing_num_workers=1")
        process = run_check(*command, "--server", url, *options, expect=expect)
        assert "mismatched" not in process.stdout
        return process

    return check_with


def test_a_server_that_renders_the_same_is_exact(check_with, rendering):
    with serving(a_server(rendering())) as url:
        process = check_with(url, ROWS)
    assert (
        f"samples: asked the server\n  asked                   3  of 3 prompts at {url}{RENDER}\n"
        "  exact by server         3  (100.00%)\n"
    ) in process.stdout
    assert "FAILED" not in process.stderr


def test_max_turns_bounds_what_is_asked_and_says_of_how_many(check_with, rendering):
    bodies, render = [], rendering()

    def counted(body, headers):
        bodies.extend([body] if body["messages"] else [])
        return render(body, headers)

    with serving(a_server(counted)) as url:
        output = check_with(url, ROWS, "--max-turns", "2").stdout
    assert f"  asked                   2  of 3 prompts at {url}{RENDER}\n" in output
    assert "  exact by server         2  (100.00%)\n" in output and len(bodies) == 2


@pytest.mark.parametrize("echo, content", [("vllm", ""), ("vllm-stream", "\n\n")])
def test_history_is_sent_as_the_samples_say_that_it_came_back(check_with, rendering, echo, content):
    sent, render = [], rendering()

    def seen(body, headers):
        sent.extend(body["messages"][1:2])
        return render(body, headers)

    with serving(a_server(seen)) as url:
        assert "  exact by server         3  (100.00%)\n" in check_with(url, ROWS, echo=echo).stdout
    assert {(turn["content"], turn["reasoning_content"]) for turn in sent} == {(content, "\nwhy\n")}


@pytest.mark.parametrize(
    "rows, style, ignored, off, cause",
    [
        (ROWS, "sglang", "", 3, "the server prints tools otherwise; step 1 --server-style sglang"),
        (ROWS, "template", "", 3, "the server prints tools otherwise; step 1 --server-style template"),
        (ROWS_OF_PARTS, "sglang", "", 1, "the server joins text parts otherwise; step 1 --server-style sglang"),
        (
            ROWS,
            "vllm",
            "reasoning_content",
            1,
            "the server does not show the reasoning that was sent; try another --reasoning-field",
        ),
    ],
)
def test_a_server_that_renders_otherwise_fails_with_the_setting_that_mends_it(
    check_with, rendering, rows, style, ignored, off, cause
):
    turns = sum(message["role"] == "assistant" for message in rows[0]["messages"])
    with serving(a_server(rendering(style, ignored))) as url:
        process = check_with(url, rows, expect=1)
    assert f"  differ           {off:>8}  {cause}\n" in process.stdout
    assert "rows.jsonl: trajectory 0, turn " in process.stdout and "  server : …" in process.stdout
    assert process.stderr.splitlines()[-1] == FAILED(off, turns, url)


def test_reasoning_is_sent_in_the_field_that_is_named(check_with, rendering):
    with serving(a_server(rendering())) as url:
        assert "(100.00%)" in check_with(url, ROWS, "--reasoning-field", "reasoning").stdout
        process = check_with(url, ROWS, "--reasoning-field", "none", expect=1)
    assert "  differ                  1  the server does not show the reasoning that was sent" in process.stdout


def test_a_server_that_refuses_fails_in_its_own_words(check_with):
    with serving(a_server(lambda *_: (400, {"error": {"message": "auto tool choice is off"}}))) as url:
        process = check_with(url, ROWS, expect=1)
    assert "  refused                 3  400: auto tool choice is off\n" in process.stdout
    assert "  exact by server         0  (0.00%)\n" in process.stdout
    assert process.stderr.splitlines()[-1] == FAILED(3, 3, url)


def test_a_server_that_is_not_there_ends_the_check_with_one_line(check_with):
    with serving({}) as url:
        pass
    process = check_with(url, ROWS, expect=1)
    assert (
        process.stderr.splitlines()[-1].startswith(f"{url}: no server answers (") and "Traceback" not in process.stderr
    )


def test_a_server_that_stops_answering_ends_the_check_with_one_line(check_with, monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    with serving(a_server(lambda body, _: (503 if body["messages"] else 400, {}))) as url:
        process = check_with(url, ROWS, expect=1)
    assert process.stderr.splitlines()[-1] == (
        f"{url}: does not answer {RENDER} (status 503, {asking.TRIES} tries); is it overloaded?"
    )


def test_of_no_samples_nothing_is_asked(rendering, tokenizer):
    with serving(a_server(rendering())) as url:
        server = connect(url)
        compared = compare_with_server(iter([]), 0, server, "reasoning_content", tokenizer.decode)
    assert lines_of(compared, server, 0) == [
        f"  asked                   0  of 0 prompts at {url}{RENDER}",
        "  exact by server         0  (0.00%)",
    ]
    assert compared.off() == 0
