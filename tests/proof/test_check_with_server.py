"""check_training_tokens.py --server against a small server that renders with the model's own chat template."""

import json

import pytest
from conftest import ROOT, assistant, call, tool, user, write_jsonl
from small_server import a_server, serving

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
TOOL_CHAIN = [user("q"), assistant("", "why", [call("f", "{}")]), tool("o"), assistant("done", "so")]
ROWS = [{"messages": [*TOOL_CHAIN, user("bye"), assistant("Bye.", "r")], "tools": [TOOL]}]
ROWS_OF_PARTS = [{"messages": [user("q"), assistant("a", "r"), user(PARTS), assistant("b", "r")]}]
TOOL_OF_VLLM = {"type": "function", "function": {"name": "f", "description": None, "parameters": {}}}
FUNCTION_OF_SGLANG = {"name": "f", "parameters": {}, "description": None}
TOOL_OF_SGLANG = {"type": "function", "function": FUNCTION_OF_SGLANG, "defer_loading": None}


@pytest.fixture
def rendering(tokenizer):
    """rendering(…) -> what a server answers that differs in this from vLLM: how it prints tools, joins text parts …"""

    def rendering(printed=TOOL_OF_VLLM, between="\n", reads="reasoning_content", template=None, ids=lambda ids: ids):
        def render(body, _):
            if not body["messages"]:
                return 400, {"error": "no messages"}
            messages = []
            for sent in body["messages"]:
                texts = [part["text"] for part in sent["content"]] if isinstance(sent["content"], list) else []
                message = {"role": sent["role"], "content": between.join(texts) or sent["content"]}
                for one in sent.get("tool_calls", ()):
                    arguments = json.loads(one["function"]["arguments"])
                    message.setdefault("tool_calls", []).append(call(one["function"]["name"], arguments))
                if reads in sent:
                    message["reasoning_content"] = sent[reads]
                messages.append(message)
            options = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
            tools = [printed] if "tools" in body else None
            text = tokenizer.apply_chat_template(messages, tools=tools, **options)
            return 200, {"token_ids": ids(tokenizer.encode(text, add_special_tokens=False))}

        return render

    return rendering


@pytest.fixture
def check_with(checked):
    """check_with(url, rows, *options) -> the finished check of the rows, which are exact by the chat template."""

    def check_with(url, rows=ROWS, *options, history="template", echo="none", expect=0):
        settings = ("template=qwen3_nothink", "--server", url, *options)
        process = checked(rows, ["--history-thinking", history], settings, step1=["--echo", echo], expect=expect)
        assert "mismatched" not in process.stdout
        return process

    return check_with


@pytest.mark.parametrize("echo, turns", [("none", 3), ("vllm", 3), ("vllm-stream", 3), ("none", 2)])
def test_a_server_that_renders_the_same_is_exact_in_the_turns_that_it_is_asked_for(check_with, rendering, echo, turns):
    with serving(a_server(rendering())) as url:
        process = check_with(url, ROWS, "--max-turns", turns, echo=echo)
    assert (
        f"samples: asked the server\n  asked                   {turns}  of 3 prompts at {url}\n"
        f"  exact by server         {turns}  (100.00%)\ntook: loading "
    ) in process.stdout


def test_prompts_of_token_ids_are_asked_for_too(run, tmp_path, rendering, tiny_model):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl")
    options = ("--tokens", tiny_model, "--history-thinking", "template", "--merge-turns")
    hint = run("step2_to_alpaca_mask_history.py", "plain.jsonl", "ids", *options).stdout.rpartition(".yaml ")[2].split()
    with serving(a_server(rendering())) as url:
        said = run("check_training_tokens.py", ROOT / "qwen3_full_sft.yaml", *hint, "--server", url).stdout
    assert "train: asked the server\n  asked                   3  of 3 prompts" in said
    assert "  exact by server         3  (100.00%)" in said


STYLE = "tools or text parts are written otherwise; step 1 --server-style"
NO_REASONING = "the server shows no reasoning of past turns; another --reasoning-field, or step 2 --history-thinking d"
UNKNOWN = "no single setting makes its prompt; check with the model that is served and its chat template (step 1 "


@pytest.mark.parametrize(
    "differs, causes",
    [
        ({"printed": TOOL_OF_SGLANG}, {f"{STYLE} sglang": 3}),
        ({"printed": TOOL}, {f"{STYLE} template": 3}),
        ({"reads": "reasoning"}, {NO_REASONING: 1}),
        ({"printed": TOOL, "reads": "none"}, {f"{STYLE} template": 2, UNKNOWN: 1}),
        ({"printed": {**TOOL_OF_VLLM, "strict": False}}, {UNKNOWN: 3}),
        ({"ids": lambda ids: ids[::-1]}, {UNKNOWN: 3}),
        ({"template": "{{ messages[0].content }}"}, {UNKNOWN: 3}),
    ],
)
def test_a_server_that_renders_otherwise_fails_with_the_setting_that_mends_it(check_with, rendering, differs, causes):
    with serving(a_server(rendering(**differs))) as url:
        process = check_with(url, expect=1)
    for cause, times in causes.items():
        assert f"  differ           {times:>8}  {cause}" in process.stdout
    off = sum(causes.values())
    assert process.stderr.endswith(f"FAILED: samples: {off} of 3 prompts are not those of the server at {url}")


def test_the_first_differences_are_shown_as_text(check_with, rendering):
    with serving(a_server(rendering(between=" "))) as url:
        process = check_with(url, ROWS_OF_PARTS, expect=1)
    assert "rows.jsonl: row 0, turn 3: the tokens differ from token " in process.stdout
    assert " >>> ' b<|im_end|>\\n<|im_start|>assistant\\n'\n  trained: …" in process.stdout
    assert " >>> '\\nb<|im_end|>\\n<|im_start|>assistant\\n'\n" in process.stdout
    assert f"  differ                  1  {STYLE} sglang\n" in process.stdout


def test_reasoning_is_sent_in_the_field_that_is_named(check_with, rendering):
    with serving(a_server(rendering(reads="reasoning"))) as url:
        assert "(100.00%)" in check_with(url, ROWS, "--reasoning-field", "reasoning").stdout
        process = check_with(url, ROWS, "--reasoning-field", "reasoning", history="drop", expect=1)
    mend = "the server shows reasoning of past turns; step 2 --history-thinking template"
    assert f"  differ                  1  {mend}\n" in process.stdout


def test_a_server_that_refuses_fails_in_its_own_words(check_with):
    with serving(a_server(lambda *_: (400, {"error": {"message": "auto tool choice is off"}}))) as url:
        process = check_with(url, expect=1)
    assert '  refused                 3  400: {"error": {"message": "auto tool choice is off"}}\n' in process.stdout
    assert "  exact by server         0  (0.00%)\n" in process.stdout
    assert process.stderr.endswith(f"FAILED: samples: 3 of 3 prompts are not those of the server at {url}")
