"""Other models of the ChatML family, each by a small template that has the property in question, some by their own."""

import json
import subprocess
import sys

import pytest
import tiny_qwen3
from conftest import ROOT, assistant, call, read_jsonl, tool, user, write_jsonl
from transformers import Qwen3Config

QWEN3 = (ROOT / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}]
GENERATION_PROMPT = "{{- '<|im_start|>assistant\\n' -}}\n    {%- if enable_thinking"
assert QWEN3.count(GENERATION_PROMPT) == 1

# A default system prompt, and no reasoning at all.
QWEN25 = """
{%- if messages[0].role != 'system' or tools -%}
    {{- '<|im_start|>system\\n' ~ (messages[0].content if messages[0].role == 'system' else 'You are a default.') -}}
    {%- for tool in tools or [] -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' else '' -}}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -}}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
    {%- elif not (loop.first and message.role == 'system' and tools) -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '\\n<tool_call>\\n' ~ (call.function | tojson) ~ '\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""
# No think block anywhere: the rules of Qwen3 without its reasoning.
INSTRUCT_2507 = QWEN3.replace("and (loop.last or reasoning)", "and false").replace("enable_thinking is false", "false")
# The generation prompt opens the think block.
THINKING_2507 = QWEN3.replace(
    GENERATION_PROMPT, GENERATION_PROMPT.replace("assistant\\n'", "assistant\\n<think>\\n'")
).replace("enable_thinking is false", "false")
# The same, calls in XML, texts trimmed, thinking that can be switched off, and no rendering without a user query.
XML_CALL = (
    "{{- '<tool_call>\\n<function=' ~ call.name ~ '>' -}}\n"
    "            {%- for name, value in call.arguments.items() -%}\n"
    "                {{- '\\n<parameter=' ~ name ~ '>\\n' ~ "
    "(value if value is string else value | tojson) ~ '\\n</parameter>' -}}\n"
    "            {%- endfor -%}\n"
    "            {{- '\\n</function>\\n</tool_call>' -}}\n"
)
JSON_CALL = QWEN3[
    QWEN3.index("            {{- '<tool_call>") : QWEN3.index("        {%- endfor -%}\n        {{- '<|im_end|>")
]
QWEN35 = (
    QWEN3.replace(JSON_CALL, "            " + XML_CALL)
    .replace("message['content'] if message['content'] is string else ''", "message.content | trim")
    .replace(
        GENERATION_PROMPT,
        GENERATION_PROMPT + " is not defined or enable_thinking -%}\n{{- '<think>\\n' -}}{%- elif enable_thinking",
    )
)
NEEDS_QUERY = "{%- if query.last == messages | length -%}{{- raise_exception('No user query found.') -}}{%- endif -%}\n"
QWEN35_STRICT = QWEN35.replace("{%- set opens_with_system", NEEDS_QUERY + "{%- set opens_with_system", 1)

ROWS = [
    {
        "tools": TOOLS,
        "messages": [
            {"role": "system", "content": "P "},
            user(" q1"),
            assistant("so ", "r1", [call("f", {"x": 1}), call("f", {"y": "é\n"})]),
            *(tool("t1"), tool("t2"), assistant("", "r2", [call("f", {"x": {"z": None}})]), tool("t3\n")),
            *(assistant("a1 \n", "r3"), user("q2"), assistant("a2", "\nr4")),
            *(user("q3"), assistant("", "r5", [call("f", {})]), tool(""), assistant("a3", "r6")),
        ],
    },
    {
        "tools": None,
        "messages": [
            *(user("q"), assistant("a"), user("q2"), user("q3"), assistant("\n\nb")),
            *(user("q4"), assistant("c", "r")),
        ],
    },
    {"tools": None, "messages": [{"role": "system", "content": "P"}, assistant("Hi"), user("q"), assistant("a", "r")]},
]
TURNS = sum(message["role"] == "assistant" for row in ROWS for message in row["messages"])
NOTHINK, PARSED = ["template=qwen3_nothink"], ["template=null"]
MERGE = ["--history-thinking", "template", "--merge-turns"]
NO_THINK, NO_THINKING = ["--no-thinking"], ["template=qwen3", "enable_thinking=false"]
CASES = [  # a template, step 2, overrides
    pytest.param(QWEN25, [], NOTHINK, id="qwen2.5"),
    pytest.param(QWEN25, [], ["template=qwen"], id="qwen2.5 by its own name"),
    pytest.param(QWEN25, MERGE, [*NOTHINK, "mask_history=false"], id="qwen2.5 merged"),
    pytest.param(INSTRUCT_2507, [], NOTHINK, id="instruct-2507"),
    pytest.param(INSTRUCT_2507, MERGE, [*NOTHINK, "mask_history=false"], id="instruct-2507 merged"),
    pytest.param(THINKING_2507, [], PARSED, id="thinking-2507"),
    pytest.param(THINKING_2507, MERGE, [*PARSED, "mask_history=false"], id="thinking-2507 merged"),
    pytest.param(QWEN35_STRICT, NO_THINK, NO_THINKING, id="qwen3.5 without thinking"),
]


@pytest.mark.parametrize("template, options, overrides", CASES)
def test_family_is_exact_through_both_scripts_and_the_check(run, check, step1, tmp_path, template, options, overrides):
    tiny_qwen3.build_tokenizer(template).save_pretrained(tmp_path / "model")
    Qwen3Config().save_pretrained(tmp_path / "model")
    step1(template)
    step2 = run("step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", "--dataset-dir", ".", *options)
    hint = step2.stdout.rpartition("qwen3_full_sft.yaml dataset=samples")[2].split()
    assert set(hint) <= set(overrides) or overrides == ["template=qwen"]
    output = check("samples", f"model_name_or_path={tmp_path / 'model'}", *overrides)
    assert "PASSED: " in output
    supervised = int(output.split(" turns in samples")[0].split()[-1])
    assert TURNS - 2 <= supervised < TURNS  # one opens without a user block, one may hold a newline that is removed


def check_ids(run, step1, folder, tokenizer, kwargs: list, options: list) -> str:
    """What the check says of samples of token ids by this tokenizer; kwargs: options of step 1, options: of step 2."""
    model = folder / "model"
    tokenizer.save_pretrained(model)
    Qwen3Config().save_pretrained(model)
    step1("", "--chat-template", model, *kwargs)
    said = run("step2_to_alpaca_mask_history.py", "plain.jsonl", "ids", "--tokens", model, *options).stdout
    settings = said.rpartition("qwen3_full_sft.yaml ")[2].split()
    return run("check_training_tokens.py", ROOT / "qwen3_full_sft.yaml", *settings).stdout


@pytest.fixture(scope="module")
def own_templates(tmp_path_factory):
    """The folder of models' own chat templates in a TRL that is newer than LlamaFactory takes."""
    folder = tmp_path_factory.mktemp("trl")
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", folder, "trl==1.16.0"])
    return folder / "trl" / "chat_templates"


@pytest.mark.parametrize(
    "name, kwargs, exact, merged",
    [  # samples where each turn has one, and where those of a chain are one
        ("qwen3_5_think", {}, TURNS - 1, 7),  # a turn comes before all queries
        ("qwen3_5_nothink", {"enable_thinking": True}, TURNS - 1, 7),
        ("qwen3_6", {}, TURNS - 1, 7),
        ("qwen3_6", {"preserve_thinking": True}, TURNS - 1, 5),
        ("nemotron_3_nano", {}, TURNS - 3, 5),  # three turns have no reasoning
        ("lfm2_2_5_v2", {}, TURNS, 6),
    ],
)
def test_token_ids_are_exact_by_models_own_chat_templates(
    run, step1, tmp_path, own_templates, name, kwargs, exact, merged
):
    tokenizer = tiny_qwen3.build_tokenizer((own_templates / f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"bos_token": "<|startoftext|>"})  # LFM2.5 opens with it
    for options, samples in ((MERGE[:0], exact), (MERGE[:2], exact), (MERGE, merged)):
        said = check_ids(run, step1, tmp_path, tokenizer, ["--template-kwargs", json.dumps(kwargs)], options)
        assert f"PASSED: {samples} of {samples} samples are exact" in said


def test_token_ids_without_thinking_are_exact(run, step1, tmp_path):
    said = check_ids(run, step1, tmp_path, tiny_qwen3.build_tokenizer(QWEN35_STRICT), [], NO_THINK)
    assert f"turns in = {TURNS - 1} turns in samples + 1 left out" in said and "PASSED: 10 of 10 samples" in said


@pytest.mark.parametrize("name", ["enable_thinkin", "messages"])
def test_a_template_kwarg_that_the_template_does_not_take_is_refused_before_the_work(run, name):
    said = run("step1_apply_tool_template.py", "--template-kwargs", f'{{"{name}": true}}', expect=1).stderr
    assert said.endswith(f"qwen3.jinja takes no {name}; correct it, or leave it out")


@pytest.fixture
def step1(run, tmp_path):
    """step1(template, *options) -> (the rows that step 1 makes of ROWS by it, what it says)"""

    def step1(template: str, *options) -> tuple[list[dict], str]:
        (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
        write_jsonl(tmp_path / "rows.jsonl", ROWS)
        process = run(
            "step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", "--chat-template", "t.jinja", *options
        )
        return read_jsonl(tmp_path / "plain.jsonl"), process.stdout

    return step1


def test_default_system_prompt_of_a_template_becomes_a_message(step1):
    rows, said = step1(QWEN25)
    assert rows[1]["messages"][0] == {"role": "system", "content": "You are a default."}
    assert "8 turns have reasoning that this chat template does not render" in said


def test_think_tag_of_the_generation_prompt_is_given_and_not_a_part_of_the_output(run, step1, tmp_path):
    rows, _ = step1(THINKING_2507)
    assert rows[0]["served"]["given"] == "<think>\n"
    assert rows[0]["messages"][-1]["content"] == "<think>\nr6\n</think>\n\na3"
    run("step2_to_alpaca_mask_history.py", "plain.jsonl", "out.jsonl", "--dataset-dir", ".")
    assert "r6\n</think>\n\na3" in [sample["output"] for sample in read_jsonl(tmp_path / "out.jsonl")]


def test_calls_are_in_xml_and_a_turn_whose_prompt_is_refused_is_left_out_where_the_template_says_so(step1):
    rows, said = step1(QWEN35_STRICT)
    assert rows[0]["messages"][2]["content"] == (
        "<think>\nr1\n</think>\n\nso\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
        "\n<tool_call>\n<function=f>\n<parameter=y>\né\n\n</parameter>\n</function>\n</tool_call>"
    )
    refused = "the chat template refuses the messages: No user query found."
    assert [turn["left_out"] for turn in rows[2]["served"]["turns"]] == [refused, None]
    assert f"1 turn left out: {refused}" in said
