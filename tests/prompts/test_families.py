"""Other models of the ChatML family, each by a small template that has the property in question."""

import json

import pytest
import tiny_qwen3
from conftest import ROOT, assistant, call, tool, user, write_jsonl

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
            tool("t1"),
            tool("t2"),
            assistant("", "r2", [call("f", {"x": {"z": None}})]),
            tool("t3\n"),
            assistant("a1 \n", "r3"),
            user("q2"),
            assistant("a2", "\nr4"),
            user("q3"),
            assistant("", "r5", [call("f", {})]),
            tool(""),
            assistant("a3", "r6"),
        ],
    },
    {
        "tools": None,
        "messages": [
            user("q"),
            assistant("a"),
            user("q2"),
            user("q3"),
            assistant("\n\nb"),
            user("q4"),
            assistant("c", "r"),
        ],
    },
    {"tools": None, "messages": [{"role": "system", "content": "P"}, assistant("Hi"), user("q"), assistant("a", "r")]},
]
TURNS = sum(message["role"] == "assistant" for row in ROWS for message in row["messages"])
NOTHINK, PARSED = ["template=qwen3_nothink"], ["template=null"]
MERGE = ["--history-thinking", "template", "--merge-turns"]
NO_THINK, NO_THINKING = ["--no-thinking"], ["template=qwen3", "enable_thinking=false"]
CASES = [  # model, its template, that of the folder LlamaFactory trains (see README, "Other models"), step 2, overrides
    ("qwen2.5", QWEN25, QWEN25, [], NOTHINK),
    ("qwen2.5", QWEN25, QWEN25, [], ["template=qwen"]),
    ("qwen2.5", QWEN25, QWEN25, MERGE, [*NOTHINK, "mask_history=false"]),
    ("instruct-2507", INSTRUCT_2507, INSTRUCT_2507, [], NOTHINK),
    ("instruct-2507", INSTRUCT_2507, INSTRUCT_2507, MERGE, [*NOTHINK, "mask_history=false"]),
    ("thinking-2507", THINKING_2507, THINKING_2507, [], PARSED),
    ("thinking-2507", THINKING_2507, THINKING_2507, ["--history-thinking", "template"], PARSED),
    ("thinking-2507", THINKING_2507, THINKING_2507, MERGE, [*PARSED, "mask_history=false"]),
    ("qwen3.5", QWEN35_STRICT, QWEN35, [], PARSED),
    ("qwen3.5", QWEN35_STRICT, QWEN35, MERGE, [*PARSED, "mask_history=false"]),
    ("qwen3.5", QWEN35_STRICT, QWEN35_STRICT, NO_THINK, NO_THINKING),
]


@pytest.mark.parametrize(
    "model, template, trained, options, overrides",
    CASES,
    ids=lambda value: value if value in ("qwen2.5", "qwen3.5") else None,
)
def test_family_is_exact_through_both_scripts_and_the_check(
    run, check, tmp_path, model, template, trained, options, overrides
):
    from transformers import Qwen3Config

    folder = tmp_path / "model"
    tiny_qwen3.build_tokenizer(trained).save_pretrained(folder)
    Qwen3Config().save_pretrained(folder)
    (tmp_path / "served.jinja").write_text(template, encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", "--chat-template", "served.jinja")
    process = run("step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", "--dataset-dir", ".", *options)
    hint = process.stdout.rpartition("qwen3_full_sft.yaml dataset_dir=. dataset=samples")[2].split()
    assert set(hint) <= set(overrides) or overrides == ["template=qwen"]
    output = check("samples", f"model_name_or_path={folder}", *overrides)
    assert "PASSED: " in output
    supervised = int(output.split(" turns in samples")[0].split()[-1])
    assert (
        TURNS - 2 <= supervised < TURNS
    )  # the opening turn has no user block, and one may hold a newline LlamaFactory removes


def step1(run, tmp_path, template: str, rows=ROWS) -> tuple[list[dict], str]:
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    process = run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", "--chat-template", "t.jinja")
    return [
        json.loads(line) for line in (tmp_path / "plain.jsonl").read_text(encoding="utf-8").splitlines()
    ], process.stdout


def test_default_system_prompt_of_a_template_becomes_a_message(run, tmp_path):
    rows, output = step1(run, tmp_path, QWEN25)
    assert rows[1]["messages"][0] == {"role": "system", "content": "You are a default."}
    assert "8 turns have reasoning that this chat template does not render" in output


def test_think_tag_of_the_generation_prompt_is_given_and_not_a_part_of_the_output(run, tmp_path):
    rows, _ = step1(run, tmp_path, THINKING_2507)
    assert rows[0]["served"]["given"] == "<think>\n"
    assert rows[0]["messages"][-1]["content"] == "<think>\nr6\n</think>\n\na3"
    run("step2_to_alpaca_mask_history.py", "plain.jsonl", "out.jsonl", "--dataset-dir", ".")
    outputs = [json.loads(line)["output"] for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "r6\n</think>\n\na3" in outputs


def test_xml_calls_are_rendered_as_the_template_says(run, tmp_path):
    rows, _ = step1(run, tmp_path, QWEN35_STRICT)
    assert rows[0]["messages"][2]["content"] == (
        "<think>\nr1\n</think>\n\nso\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
        "\n<tool_call>\n<function=f>\n<parameter=y>\né\n\n</parameter>\n</function>\n</tool_call>"
    )


def test_turn_whose_prompt_the_template_refuses_is_left_out_and_the_rest_stays(run, tmp_path):
    rows, output = step1(run, tmp_path, QWEN35_STRICT)
    assert [turn["left_out"] for turn in rows[2]["served"]["turns"]] == [
        "the chat template refuses the messages: No user query found.",
        None,
    ]
    assert "1 turns left out: the chat template refuses the messages: No user query found." in output
