"""The embedded chat template and the environment it is rendered in."""

import json

import pytest
from conftest import GOLDEN, ROOT, assistant, call, golden, tool, user
from reading_rows import READ_AS_IT_IS, served_trajectory

from served_tokens.marks import TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.turns import apply_chat_template, renders_by_chains
from served_tokens.proof.turn import served_turn
from served_tokens.samples.alpaca import to_samples


def load(name):
    return load_chat_template(read_chat_template(str(name)))


RENDER = load(QWEN3)


def served_text(sample: dict) -> tuple[str, str]:
    """What LlamaFactory makes of a sample before it tokenizes: (prompt, target)."""
    text = f"<|im_start|>system\n{sample['system']}<|im_end|>\n" if sample["system"] else ""
    for user_text, assistant_text in [*sample["history"], [sample["instruction"], ""]]:
        text += f"<|im_start|>user\n{user_text}<|im_end|>\n<|im_start|>assistant\n{assistant_text}<|im_end|>\n"
    return text.removesuffix("<|im_end|>\n"), sample["output"] + "<|im_end|>\n"


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_template_file_renders_the_official_prompts_and_targets(case):
    messages, tools = served_trajectory(*golden(case["name"]))
    for turn in case["turns"]:
        for mode in ("drop", "template"):
            prompt, target = served_turn(messages, tools, turn["turn"], mode, RENDER)
            assert (prompt, target) == (turn[f"prompt_{mode}"], turn["target"])


@pytest.mark.parametrize("by_chains", [True, False])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_both_steps_reproduce_the_official_prompts_and_targets(case, by_chains):
    plain, served = apply_chat_template(*served_trajectory(*golden(case["name"])), RENDER, by_chains=by_chains)
    expected = {turn["turn"]: turn for turn in case["turns"]}
    assert [turn["turn"] for turn in served["turns"]] == list(expected)
    for turn in served["turns"]:
        assert plain[turn["message"]]["content"] + "<|im_end|>\n" == expected[turn["turn"]]["target"]
    served |= {"source": "golden", "trajectory": 0, **READ_AS_IT_IS}
    for mode in ("drop", "template"):
        samples, left_out = to_samples(plain, served, mode)
        assert len(samples) + len(left_out) == len(expected)
        assert len(left_out) == (case["name"] == "assistant_opens")
        for sample in samples:
            turn = expected[sample["turns"][-1]]
            assert served_text(sample) == (turn[f"prompt_{mode}"], turn["target"])


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_rendering_equals_that_of_transformers(case, tokenizer):
    messages, tools = served_trajectory(*golden(case["name"]))
    for variables in ({}, {"enable_thinking": False}):
        for cut in range(1, len(messages) + 1):
            ours = RENDER(messages[:cut], tools, add_generation_prompt=True, **variables)
            theirs = tokenizer.apply_chat_template(
                messages[:cut], tools=tools, tokenize=False, add_generation_prompt=True, **variables
            )
            assert ours == theirs


def test_environment_has_what_templates_for_transformers_use(tmp_path):
    source = tmp_path / "t.jinja"
    source.write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
        "{{ tools | tojson(indent=1) if tools else '' }}{{ raise_exception('no') if messages | length > 2 else '' }}"
    )
    render = load(source)
    assert render([user("é<"), tool("x")], None) == "<|im_start|>user\né<<|im_end|>\n"
    assert render([user("a")], [{"b": 1}]).endswith('[\n {\n  "b": 1\n }\n]')
    with pytest.raises(TrajectoryError, match="no"):
        render([user("a")] * 3, None)


def test_template_cannot_reach_python_internals(tmp_path):
    source = tmp_path / "t.jinja"
    source.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(SystemExit, match="unsafe"):
        load(source)


@pytest.mark.parametrize(
    "rendered", ["[INST] q [/INST]", "<|im_start|>user<|im_sep|>q<|im_end|>", "<s><|im_start|>user\nq<|im_end|>\n"]
)
def test_template_that_is_not_chatml_is_named_as_such(rendered, tmp_path):
    (tmp_path / "t.jinja").write_text(rendered)
    with pytest.raises(SystemExit, match=r"t.jinja: the chat template is not ChatML"):
        load(tmp_path / "t.jinja")


def test_template_in_which_no_prompt_begins_with_another_stays_exact(tmp_path):
    """Each block shows how many messages there are."""
    numbered = QWEN3.read_text(encoding="utf-8").replace(
        "'<|im_end|>\\n' -}}", "messages | length ~ '<|im_end|>\\n' -}}"
    )
    assert "messages | length ~" in numbered
    (tmp_path / "numbered.jinja").write_text(numbered, encoding="utf-8")
    render = load(tmp_path / "numbered.jinja")
    messages = [user("q"), assistant("", "r", [call("f", {})]), tool("1"), assistant("a", "s")]
    assert not renders_by_chains(render)
    plain, served = apply_chat_template(messages, None, render, by_chains=False)
    samples, _ = to_samples(plain, {**served, "source": "", "trajectory": 0, **READ_AS_IT_IS}, "drop")
    for sample in samples:
        assert served_text(sample)[0] == served_turn(messages, None, sample["turns"][-1], "drop", render)[0]


def test_template_that_looks_at_more_than_expected_is_seen_by_the_check(tmp_path):
    """A switch in the system prompt: no conversation of the probe shows it, so step 1 does not know of it."""
    switch = QWEN3.read_text(encoding="utf-8").replace(
        "(loop.last or reasoning)", "(loop.last or reasoning) and '/no_think' not in messages[0].content"
    )
    (tmp_path / "switch.jinja").write_text(switch, encoding="utf-8")
    render = load(tmp_path / "switch.jinja")
    assert renders_by_chains(render)
    messages = [
        {"role": "system", "content": "/no_think"},
        user("q"),
        assistant("", "r", [call("f", {})]),
        tool("1"),
        assistant("a", "s"),
    ]
    plain, _ = apply_chat_template(messages, None, render)
    _, target = served_turn(messages, None, 4, "drop", render)
    assert target != plain[4]["content"] + "<|im_end|>\n"
    _, target = served_turn(messages, None, 4, "drop", RENDER)
    assert target == plain[4]["content"] + "<|im_end|>\n"


def test_golden_cases_are_the_official_ones():
    assert len(GOLDEN) == 25 and sum(len(case["turns"]) for case in GOLDEN) == 54
    assert json.loads((ROOT / "tests/golden/qwen3_rendering.json").read_text(encoding="utf-8")) == GOLDEN


@pytest.mark.parametrize(
    "options", ["", "indent=0", "indent=2", "separators=(',', ':')", "sort_keys=true", "ensure_ascii=true"]
)
def test_tojson_writes_what_json_writes(options, tmp_path):
    (tmp_path / "x.jinja").write_text(
        "<|im_start|>x\n{% if tools %}{{ tools[0] | tojson(" + options + ") }}{% endif %}<|im_end|>\n\n",
        encoding="utf-8",
    )
    render = load(tmp_path / "x.jinja")
    tool = {"name": "é", "b": [1, {"a": None}]}
    arguments = eval(f"dict({options})", {"true": True})
    expected = json.dumps(tool, **{"ensure_ascii": False, **arguments})
    assert render([], [tool]) == f"<|im_start|>x\n{expected}<|im_end|>\n"
