"""The report shows what the check found, moves in a real browser, fetches nothing and runs nothing of the data."""

import json
import os
import pty
import subprocess
import sys
import time
from array import array
from collections import Counter

import check_training_tokens as check
import chromium
import pytest
import training_report as report
from conftest import GOLDEN, ROOT, assistant, user, write_jsonl
from datasets import Dataset

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)></script><!-- \u2028 &amp; \x1b[31m 陈 👩‍👩‍👧"
ROWS = [
    {"messages": [user("q " + HOSTILE), assistant("a " + HOSTILE, "r " + HOSTILE), user("q2"), assistant("b", "r")]},
    {"messages": [user("q"), assistant("word " * 600, "r")]},  # over the cutoff
    {"messages": [{"role": "<b>narrator", "content": "x"}, user("q"), assistant("a")]},  # set aside
    {"messages": [assistant("hello"), user("q"), assistant("a", "r")]},  # LlamaFactory cannot write what comes before its turns
    {"messages": [user("q"), assistant("short", "r")]},
]


@pytest.fixture(scope="module")
def failed(tmp_path_factory, tiny_model):
    """A folder with rows.jsonl, its samples, and report.html and plots/ of a check that finds every kind of fault."""
    folder = tmp_path_factory.mktemp("report")
    write_jsonl(folder / "rows.jsonl", ROWS)

    def run(script, *arguments, expect=0):
        process = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
        assert process.returncode == expect, process.stdout + process.stderr

    run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl")
    run("step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", "--dataset-dir", ".")
    run("check_training_tokens.py", *settings(folder, tiny_model), "preserve_thinking=true", "cutoff_len=500", "--report", "report.html",
        "--plots", "plots", "--gpus", "2", expect=1)  # fmt: skip
    return folder


def settings(folder, model) -> list:
    return [ROOT / "qwen3_full_sft.yaml", f"dataset_dir={folder}", "dataset=samples", f"model_name_or_path={model}",
            "preprocessing_num_workers=1"]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, failed):
    """The report of the failed check, open in a browser without network."""
    browser.open("about:blank")
    browser.requests.clear()
    browser.open((failed / "report.html").as_uri())
    return browser


@pytest.fixture
def main(monkeypatch, capsys):
    """main(folder, *arguments) -> what the check prints; in this process, which has loaded LlamaFactory."""

    def main(folder, *arguments) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["check_training_tokens.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            check.main()
        except SystemExit as end:
            assert end.code is None, end.code
        return capsys.readouterr().out

    return main


def cells(page) -> dict:
    """{first cell: [the other cells]} of each row of the page's tables."""
    rows = page.evaluate("[...document.querySelectorAll('section tr')].map(row => [...row.cells].map(cell => cell.textContent))")
    return {row[0]: row[1:] for row in rows}


def tiles(page) -> dict:
    return dict(page.evaluate("[...document.querySelectorAll('.tiles div')].map(tile => [...tile.children].map(e => e.textContent))"))


def click(page, selector: str) -> str:
    page.evaluate(f"document.querySelector('{selector}').click()")
    return page.text("#note")


def jump(page, trajectory: str, turn: str) -> str:
    page.evaluate(f"document.querySelector('#trajectory').value = '{trajectory}'; document.querySelector('#turn').value = '{turn}';"
                  "document.querySelector('#choose').requestSubmit()")  # fmt: skip
    return page.text("#note")


# ---------------------------------------------------------------- the page in a browser


def test_report_of_a_failed_check_says_so_at_the_top_and_counts_each_fault(page):
    assert page.evaluate("document.title") == "FAILED: training tokens of samples"
    assert page.text("header h1 + *").startswith("FAILEDsamples: the model would not be trained on what it is served with")
    found, shown = cells(page), tiles(page)
    assert (shown["trajectories"], shown["turns"], shown["samples"]) == ("4", "6", "4")
    assert found["exact"] == ["2", "50.00%"]
    assert found["mismatched"] == ["1", "in 1 the tokens differ"]
    assert found["over cutoff_len"][0] == "1" and found["supervised"][0] == "4"
    assert found["left out"][0] == "2" and found["left out"][1].endswith("; turns without a sample: 3:0, 3:2")
    assert "1: its prompt opens with a block of assistant, which LlamaFactory cannot write; " in found["left out"][1]
    assert found["set aside"][0] == "1" and "1 like this: message 0: unknown role '<b>narrator'" in found["set aside"][1]
    assert found["steps"] == ["3"] and found["samples per step"] == ["64"]  # 4 samples, 3 epochs, 1 x 32 x 2
    tokens = int(shown["tokens"].replace(",", ""))
    assert found["tokens"] == [f"{3 * tokens:,}"]


def test_report_of_a_passed_check_counts_every_sample(pipeline, main, tiny_model, tmp_path, browser):
    pipeline(GOLDEN)
    assert main(tmp_path, *settings(tmp_path, tiny_model), "--report", "report.html").endswith("report: report.html\n")
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.text("#verdict strong") == "PASSED"
    assert cells(browser)["exact"] == ["53", "100.00%"] and tiles(browser)["turns"] == "54"
    assert browser.evaluate("document.querySelectorAll('#sample option').length") == 53
    assert browser.text("#viewer h2 + p").startswith("53 of 53 samples")
    assert browser.errors == []


def test_data_set_for_evaluation_has_numbers_and_samples_but_no_cost(pipeline, main, tiny_model, tmp_path, browser):
    pipeline([ROWS[4]] * 5, "--val-ratio", "0.4")
    main(tmp_path, *settings(tmp_path, tiny_model), "eval_dataset=samples_val", "eval_strategy=epoch", "--report", "report.html")
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.evaluate("[...document.querySelectorAll('h2')].slice(0, 2).map(e => e.textContent)") == ["samples", "samples_val (for evaluation)"]
    assert browser.evaluate("document.querySelectorAll('#sample option').length") == 5
    assert cells(browser)["tokens"] == ["180"]  # 3 samples of 20 tokens, 3 epochs


def test_page_fetches_nothing_and_runs_nothing_of_the_data(page, failed):
    text = jump(page, "0", "3") + page.text("#tokens").replace("↵", "")
    assert HOSTILE.replace("\x1b", r"\x1b") in text  # as text, to the character
    assert page.requests == [(failed / "report.html").as_uri()]
    assert page.dialogs == [] and page.errors == []
    assert page.evaluate("document.title").startswith("FAILED")
    assert page.evaluate("document.querySelectorAll('img, iframe, link, script[src]').length") == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 2


def test_policy_of_the_page_forbids_other_scripts(page):
    page.evaluate("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
    assert page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()


def test_viewer_goes_to_the_next_the_previous_and_a_named_turn(page):
    assert page.text("#note").startswith("1 of 4 (mismatch)") and "trajectory 0, turn 3" in page.text("#note")
    assert click(page, "#next").startswith("2 of 4 (longest, not exact)")
    assert click(page, "#previous").startswith("1 of 4") and click(page, "#previous").startswith("4 of 4")
    assert "trajectory 4, turn 1" in jump(page, "4", "1") and "trajectory 0, turn" in jump(page, "0", "")
    assert "trajectory 1, turn 1" in jump(page, "1", "")
    jump(page, "2", "1")
    assert "trajectory 2, turn 1 is not among the 4 samples" in page.text("#message") and "--show 2:1" in page.text("#message")
    assert "trajectory 1, turn 1" in page.text("#note")


def test_link_of_the_longest_sample_shows_it_in_the_viewer(page):
    page.evaluate("document.querySelector('#extremes a').click()")
    end = time.monotonic() + 10
    while "trajectory 1, turn 1" not in page.text("#note") and time.monotonic() < end:
        time.sleep(0.02)
    assert "trajectory 1, turn 1" in page.text("#note") and "(longest, not exact)" in page.text("#note")
    assert page.text("#note").endswith(f"; as it is served it has {cells(page)['trajectory 1, turn 1'][0]} tokens")


def test_first_token_that_differs_is_marked_beside_what_is_served(page):
    assert "the tokens differ from token" in page.text("#mismatch") and "served :" in page.text("#mismatch")
    assert page.text("#tokens .first") == "<think>"
    assert page.evaluate("document.querySelectorAll('#tokens .first').length") == 1


def test_supervised_and_special_tokens_are_told_apart_without_colour(page):
    jump(page, "4", "1")
    assert page.evaluate("[...document.querySelectorAll('#tokens mark')].map(e => e.textContent).join()").replace("↵", "") == (
        "<think>\nr\n</think>\n\nshort<|im_end|>\n")  # fmt: skip
    style = "getComputedStyle(document.querySelector('{}')).{}"
    assert page.evaluate(style.format("#tokens mark", "textDecorationLine")) == "underline"
    assert page.evaluate(style.format("#tokens span:not(.token)", "textDecorationLine")) == "none"
    assert page.evaluate(style.format("#tokens .special", "borderTopStyle")) == "solid"
    assert page.evaluate("[...document.querySelectorAll('#tokens mark .special')].map(e => e.textContent)") == ["<think>", "</think>", "<|im_end|>"]


def test_token_tells_its_id_and_text_by_pointer_and_by_keyboard(page, tokenizer):
    jump(page, "4", "1")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert page.evaluate("document.querySelector('#tokens .token').title") == f'{start}: "<|im_start|>"'
    page.evaluate("document.querySelector('#tokens').focus()")
    page.press("ArrowRight")
    assert page.text("#inspector") == f'token 0, id {start}: "<|im_start|>", context, special'
    page.press("ArrowRight")
    assert page.text("#inspector").startswith("token 1, id ") and page.text("#inspector").endswith(": \"user\", context")
    page.evaluate("document.querySelector('#tokens mark .token').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    assert page.text("#inspector").endswith('"<think>", supervised, special')


def test_page_is_usable_by_keyboard_and_names_its_parts(page):
    page.evaluate("document.querySelector('#next').focus()")
    page.press("Enter", "\r")
    assert page.text("#note").startswith("2 of 4")
    assert page.evaluate("['header', 'nav', 'main', 'footer', 'h1'].every(name => document.querySelectorAll(name).length === 1)")
    assert page.evaluate("[...document.querySelectorAll('select, input')].every(field => field.labels.length)")
    assert page.evaluate("[...document.querySelectorAll('svg')].every(svg => svg.getAttribute('aria-label'))")
    assert page.evaluate("document.documentElement.lang") == "en"


def test_page_fits_a_phone_and_follows_the_dark_mode(page):
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.call("Emulation.clearDeviceMetricsOverride")
    colours = []
    for scheme in ("light", "dark"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.call("Emulation.setEmulatedMedia", features=[])
    assert colours == ["rgb(255, 255, 255)", "rgb(15, 20, 25)"]


def test_charts_name_their_axes_and_mark_the_cutoff(page):
    assert page.evaluate("[...document.querySelectorAll('figcaption')].map(e => e.textContent)") == [
        "Sample lengths", "Turns per trajectory", "Supervised tokens per turn"]  # fmt: skip
    assert page.text("svg text.mark") == "cutoff_len 500"
    assert page.evaluate("[...document.querySelectorAll('figure:nth-of-type(2) svg title')].map(e => e.textContent)") == ["1: 2", "2: 2"]
    assert cells(page)["1"] == ["2"] and cells(page)["2"] == ["2"]


# ---------------------------------------------------------------- a large data set


def test_page_of_very_many_long_samples_is_bounded_and_says_what_it_does_not_show():
    found = report.Findings("big", True, "", array("q", range(1, 100_001)), bytearray(100_000))
    found.counts.update(exact=100_000, tokens=sum(found.lengths))
    chosen = report.choice_of_samples(found, report.SAMPLES_IN_PAGE)
    assert len(chosen) == 200 and Counter(chosen.values()) == {"longest": 20, "shortest": 20, "even choice": 160}
    assert chosen == report.choice_of_samples(found, report.SAMPLES_IN_PAGE)
    samples = [("big", report.Sample("x", position, [1], [7] * 40_000, [-100] * 39_990 + [7] * 10, why, 40_000))
               for position, why in chosen.items()]  # fmt: skip
    data = report.viewer_data(samples, lambda ids: "<" * len(ids), set())
    assert len(report.script_json(data)) < 6_000_000
    held = data["samples"][0]["runs"]
    assert sum(len(run[2]) for run in held if run[0] is not None) <= 2500
    assert sum(run[2] if run[0] is None else len(run[2]) for run in held) == 40_000


def test_mismatches_come_first_in_the_choice():
    found = report.Findings("x", True, "", array("q", [5] * 1000), bytearray(1000), mismatches={800: (3, "the tokens differ")})
    assert list(report.choice_of_samples(found, 200).items())[0] == (800, "mismatch")


@pytest.mark.parametrize("length, at, ranges", [
    (10, 5, [(0, 10)]),
    (100, 50, [(0, 10), (45, 55), (90, 100)]),
    (100, 0, [(0, 10), (90, 100)]),
    (100, 12, [(0, 17), (90, 100)]),
    (100, 99, [(0, 10), (90, 100)]),
    (100, 500, [(0, 10), (90, 100)]),
])  # fmt: skip
def test_long_sample_is_shown_at_its_ends_and_where_it_matters(length, at, ranges):
    assert report.shown_ranges(length, 30, at) == ranges


@pytest.mark.parametrize("values, bars", [
    ({}, [(0, 0, 0)]),
    ({7: 3}, [(7, 7, 3)]),
    ({1: 2, 3: 1}, [(1, 1, 2), (2, 2, 0), (3, 3, 1)]),
    ({0: 1, 99: 2}, [(b, b + 4, {0: 1, 95: 2}.get(b, 0)) for b in range(0, 100, 5)]),
])  # fmt: skip
def test_histogram_counts_each_value_in_bars_of_one_round_width(values, bars):
    assert report.histogram("t", "x", "y", Counter(values)).bars == bars


def test_few_far_higher_values_share_the_last_bar_and_leave_the_others_their_room():
    chart = report.histogram("t", "x", "y", Counter({1: 100, 2: 100, 5000: 1, 9000: 1}))
    assert chart.bars == [(1, 1, 100), (2, 2, 100), (3, 9000, 2)] and chart.note == "the last bar goes to 9,000"
    chart = report.histogram("t", "x", "y", Counter({1: 200, 100: 1}), (50, "cutoff_len 50"))
    assert chart.bars[0] == (0, 4, 200) and chart.bars[-1] == (100, 104, 1) and chart.mark  # what is cut is seen


def test_cutoff_far_beyond_the_samples_is_named_and_leaves_them_their_room():
    chart = report.histogram("t", "tokens", "y", Counter({10: 1}), (32768, "cutoff_len 32,768"))
    assert chart.mark is None and chart.note == "cutoff_len 32,768 is further right"


# ---------------------------------------------------------------- the cost


@pytest.mark.parametrize("settings, steps, tokens", [
    ({}, 12, 300_000),  # 100 samples, 32 a step: 4 an epoch
    ({"gpus": 8}, 3, 300_000),
    ({"epochs": 0.5}, 2, 50_000),
    ({"max_steps": 6}, 6, 150_000),
    ({"batch": 3, "accumulation": 1, "gpus": 2}, 51, 300_000),
])  # fmt: skip
def test_cost_counts_steps_and_tokens_as_the_trainer_does(settings, steps, tokens):
    settings = {"epochs": 3.0, "max_steps": -1, "batch": 1, "accumulation": 32, "gpus": 1, **settings}
    cost = report.training_cost(100, 100_000, 5_000, **settings)
    assert (cost["steps"], cost["tokens"]) == (steps, tokens)


def test_cost_is_of_what_is_trained_less_what_is_held_out():
    found = report.Findings("x", True, "", array("q", [10] * 100), bytearray(100), counts=Counter({"tokens": 1000, "supervised tokens": 100}))
    schedule = {"epochs": 1.0, "max_steps": -1, "batch": 1, "accumulation": 1, "val_size": 0.2, "packing": False}
    cost, said = check.cost_of([found], schedule, 1, 50)
    assert (cost["steps"], cost["tokens"], cost["supervised tokens"]) == (80, 800, 80) and "less val_size 0.2" in said
    assert "6 steps" in check.cost_of([found], {**schedule, "max_steps": 6}, 1, 50)[1]
    cost, said = check.cost_of([found], {**schedule, "packing": True}, 1, 50)
    assert cost["steps"] == 16 and "packed" in said


# ---------------------------------------------------------------- plots


def test_plots_are_a_png_of_each_histogram(failed):
    from matplotlib.image import imread

    assert sorted(path.name for path in (failed / "plots").iterdir()) == [
        "samples_sample_lengths.png", "samples_supervised_tokens_per_turn.png", "samples_turns_per_trajectory.png"]  # fmt: skip
    for path in (failed / "plots").iterdir():
        assert imread(path)[..., :3].std() > 0.05  # something is drawn


# ---------------------------------------------------------------- one sample in the terminal


def test_sample_is_shown_with_brackets_where_the_output_is_no_terminal(main, failed, tiny_model):
    assert main(failed, *settings(failed, tiny_model), "--show", "4:1") == (
        "rows.jsonl: trajectory 4, turn 1: 20 tokens, 11 supervised (in ⟦…⟧)\n\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<think>\nr\n</think>\n\nshort<|im_end|>\n⟧\n"
    )


def test_sample_is_shown_in_colour_on_a_terminal(failed, tiny_model):
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, ROOT / "check_training_tokens.py", *settings(failed, tiny_model), "--show", "4:1"],
                               cwd=failed, stdout=theirs, stderr=subprocess.PIPE, env=environment)  # fmt: skip
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # how Linux tells that the other end is closed
        pass
    error = process.communicate()[1]
    os.close(ours)
    assert process.returncode == 0, error
    assert b"\x1b[4;32;1;35m<think>\x1b[0m" in output and b"\x1b[1;35m<|im_start|>\x1b[0muser" in output


class Terminal:
    isatty = staticmethod(lambda: True)


def test_colour_is_for_terminals_unless_no_color_is_set():
    assert check.wants_colour(Terminal, {}) and check.wants_colour(Terminal, {"NO_COLOR": ""})
    assert not check.wants_colour(Terminal, {"NO_COLOR": "1"}) and not check.wants_colour(open(os.devnull), {})


def test_control_characters_of_the_data_do_not_reach_the_terminal():
    sample = report.Sample("x\x1b", 0, [1], [1, 2], [-100, 2])
    text = report.terminal_view(sample, lambda ids: "".join({1: "\x1b]0;title\x07\u202e", 2: "b\tc\n"}[i] for i in ids), set(), False)
    assert text == "x\\x1b: trajectory 0, turn 1: 2 tokens, 1 supervised (in ⟦…⟧)\n\n\\x1b]0;title\\x07\\u202e⟦b\tc\n⟧"


def test_turn_without_a_sample_is_named_with_those_that_have_one():
    provenance = Dataset.from_list([{"source": "x", "trajectory": 3, "turns": [turn]} for turn in (2, 6, 4)])
    built = Dataset.from_list([{"input_ids": [1], "labels": [1]}] * 3)
    assert [sample.turns for sample in check.samples_of_turn([("samples", None, provenance, built)], 3, 6)] == [[6]]
    with pytest.raises(SystemExit, match="--show 3:5: no sample supervises message 5 of trajectory 3, .*: 2, 4, 6"):
        check.samples_of_turn([("samples", None, provenance, built)], 3, 5)
    with pytest.raises(SystemExit, match="--show 9:5: trajectory 9 has no sample in samples; rows are counted from 0"):
        check.samples_of_turn([("samples", None, provenance, built)], 9, 5)


@pytest.mark.parametrize("options, error", [
    (["--show", "4"], "'4' does not name a trajectory and a turn; write it as 17:4"),
    (["--show", "4:1", "--report", "x.html"], "--show checks nothing"),
    (["--report", "qwen3_full_sft.yaml"], "'qwen3_full_sft.yaml' is no name of a page; end it with .html"),
])  # fmt: skip
def test_wrong_option_is_named_before_the_work(monkeypatch, capsys, options, error):
    monkeypatch.setattr(sys, "argv", ["check_training_tokens.py", *options])
    with pytest.raises(SystemExit):
        check.main()
    assert error in capsys.readouterr().err


# ---------------------------------------------------------------- text


def test_tokens_of_one_character_are_shown_together(tokenizer):
    ids = tokenizer("a 👩‍👩‍👧 陈\ufffd!", add_special_tokens=False)["input_ids"]
    found = list(report.pieces(ids, tokenizer.decode))
    assert [i for group, _ in found for i in group] == ids
    assert "".join(text for _, text in found).startswith("a 👩‍👩‍👧 陈")


def test_lone_surrogate_in_a_reason_can_be_written():
    assert report.visible("no column \ud800") == "no column \\ud800"


@pytest.mark.parametrize("text", ["</script><script>", "<!--", "\u2028\u2029", "&", "陈", '"\\'])
def test_embedded_json_ends_no_element_and_keeps_the_text(text):
    embedded = report.script_json([text])
    assert not set("<>&\u2028\u2029") & set(embedded) and json.loads(embedded) == [text]
