"""The embedded chat template, and what the environment and the ways of rendering make of others."""

import pytest
from conftest import GOLDEN, assistant, call, golden, tool, user
from reading_rows import READ_AS_IT_IS, served_text, served_trajectory

from served_tokens.marks import TrajectoryError
from served_tokens.prompts import turns
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.turns import apply_chat_template, renders_by_chains
from served_tokens.proof.turn import served_turn
from served_tokens.samples.alpaca import to_samples

RENDER = load_chat_template(read_chat_template(str(QWEN3)))
CHAIN = [user("q"), assistant("", "r", [call("f", {})]), tool("1"), assistant("a", "s")]


@pytest.fixture
def load(tmp_path):
    """load(text) -> render of a chat template t.jinja."""

    def load(text: str):
        (tmp_path / "t.jinja").write_text(text, encoding="utf-8")
        return load_chat_template(read_chat_template(str(tmp_path / "t.jinja")))

    return load


def made_into_samples(messages, tools, render, served_as: str) -> tuple[list, dict]:
    plain, served = apply_chat_template(messages, tools, render)
    return to_samples(plain, {**served, "source": "", "trajectory": 0, **READ_AS_IT_IS}, served_as)


@pytest.mark.parametrize("by_chains", [True, False])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_both_steps_reproduce_the_official_prompts_and_targets(case, by_chains, monkeypatch):
    monkeypatch.setattr(turns, "renders_by_chains", lambda render: by_chains)
    expected = {turn["turn"]: turn for turn in case["turns"]}
    for mode in ("drop", "template"):
        samples, left_out = made_into_samples(*served_trajectory(*golden(case["name"])), RENDER, mode)
        assert sorted([*left_out, *(sample["turns"][0] for sample in samples)]) == list(expected)
        assert len(left_out) == (case["name"] == "assistant_opens")
        for sample in samples:
            turn = expected[sample["turns"][0]]
            assert served_text(sample) == (turn[f"prompt_{mode}"], turn["target"])


def test_environment_has_what_templates_for_transformers_use(load):
    render = load(
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}{{ strftime_now('') }}"
        "{{ tools | tojson ~ tools | tojson(indent=1, ensure_ascii=true) if tools else '' }}"
        "{{ raise_exception('no') if messages | length > 2 else '' }}"
    )
    assert render([user("é<"), tool("x")], None) == "<|im_start|>user\né<<|im_end|>\n"
    assert render([user("a")], [{"é": 1}]).endswith('[{"é": 1}][\n {\n  "\\u00e9": 1\n }\n]')
    with pytest.raises(TrajectoryError, match="no"):
        render([user("a")] * 3, None)


@pytest.mark.parametrize(
    "rendered", ["[INST] q [/INST]", "<|im_start|>user<|im_sep|>q<|im_end|>", "<s><|im_start|>user\nq<|im_end|>\n"]
)
def test_template_that_is_not_chatml_is_named_as_such(rendered, load):
    with pytest.raises(SystemExit, match=r"t.jinja: the chat template is not ChatML"):
        load(rendered)


def test_template_in_which_no_prompt_begins_with_another_stays_exact(load):
    """Each block shows how many messages there are."""
    qwen3 = QWEN3.read_text(encoding="utf-8")
    render = load(qwen3.replace("'<|im_end|>\\n' -}}", "messages | length ~ '<|im_end|>\\n' -}}"))
    assert renders_by_chains(RENDER) and not renders_by_chains(render)
    [sample], _ = made_into_samples(CHAIN[:2], None, render, "drop")
    assert served_text(sample)[0] == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"


def test_template_that_looks_at_more_than_expected_is_seen_by_the_check(load):
    """A switch in the system prompt: step 1 renders chains without it, and the check's own definition with it."""
    qwen3 = QWEN3.read_text(encoding="utf-8")
    thinks = "(loop.last or reasoning)"
    render = load(qwen3.replace(thinks, f"{thinks} and '/no_think' not in messages[0].content"))
    messages = [{"role": "system", "content": "/no_think"}, *CHAIN]
    plain, _ = apply_chat_template(messages, None, render)
    assert renders_by_chains(render) and plain[4]["content"] == "<think>\ns\n</think>\n\na"
    assert served_turn(messages, None, 4, "drop", render)[1] == "a<|im_end|>\n"
