"""The report shows what the check found, moves in a real browser, fetches nothing and runs nothing of the data."""

import hashlib
import re
import shutil
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from conftest import ROOT, assistant, run_here, user, write_jsonl
from playwright.sync_api import expect, sync_playwright

from served_tokens.report import tokens
from served_tokens.report.cost import Schedule
from served_tokens.report.page import Checked, report_page

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)></script>"
HOSTILE += "<!-- \u2028 &amp; \x1b[31m {{ 7 * 7 }} 陈 👩‍👩‍👧"
ROWS = [
    {"messages": [user("q " + HOSTILE), assistant("a " + HOSTILE, "r " + HOSTILE), user("q2"), assistant("b", "r")]},
    {"messages": [user("q"), assistant("word " * 600, "r")]},  # over the cutoff
    {"messages": [{"role": "<b>narrator", "content": "x"}, user("q"), assistant("a")]},  # set aside
    {"messages": [assistant("hello"), user("q"), assistant("a", "r")]},  # no user block before its first turn
    {"messages": [user("q"), assistant("b", "r")]},
]
PROBLEM = (
    "samples: 2 of 4 samples are exact, so the model would not be trained on what it is served with; raise "
    "cutoff_len above 619, or leave out what is longer by step 2 --cutoff-len N --tokenizer MODEL; "
    "set preserve_thinking=false"
)


@pytest.fixture(scope="module")
def failed(tmp_path_factory, tiny_model):
    """A folder with rows.jsonl, its samples, and report.html of a check that finds every kind of fault."""
    folder = tmp_path_factory.mktemp("report")
    write_jsonl(folder / "rows.jsonl", ROWS)
    run_here(folder, "step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl")
    run_here(folder, "step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", "--dataset-dir", ".")
    options = ["preserve_thinking=true", "cutoff_len=500", "--report", "report.html", "--gpus", "2"]
    assert check_here(folder, tiny_model, *options) == f"FAILED: {PROBLEM}"
    return folder


def check_here(folder, model, *options):
    settings = f"dataset_dir={folder}", "dataset=samples", f"model_name_or_path={model}", "preprocessing_num_workers=1"
    return run_here(folder, "check_training_tokens.py", ROOT / "qwen3_full_sft.yaml", *settings, *options)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; every address but that of a file leads nowhere."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=binary, args=options) as browser:
        yield browser


@pytest.fixture
def seen():
    """What a page asks for, and what goes wrong in it."""
    return SimpleNamespace(requests=[], errors=[])


@pytest.fixture
def open_page(browser, seen):
    """open_page(file) -> the page in a tab of its own."""
    with browser.new_page() as page:
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("dialog", lambda dialog: (seen.errors.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)

        def open_page(path):
            page.goto(path.as_uri())
            return page

        yield open_page


@pytest.fixture
def page(open_page, failed):
    """The report of the failed check."""
    return open_page(failed / "report.html")


def texts(page, rows: str, cells: str) -> list[list[str]]:
    """The text of each cell, of each row: CSS selectors."""
    found = "[...row.querySelectorAll(cells)].map(cell => cell.textContent.trim())"
    return page.locator(rows).evaluate_all(f"(rows, cells) => rows.map(row => {found})", cells)


def cells(page) -> dict:
    """{first cell: [the other cells]} of each row of the page's tables."""
    return {row[0]: row[1:] for row in texts(page, "section tr", "th, td")}


def click(page, selector: str) -> str:
    page.click(selector)
    return page.text_content("#note")


def jump(page, trajectory: str, turn: str) -> str:
    page.fill("#trajectory", trajectory)
    page.fill("#turn", turn)
    return click(page, "#choose .group button")


def style(page, selector: str, name: str) -> str:
    return page.locator(selector).first.evaluate("(element, name) => getComputedStyle(element)[name]", name)


# ---------------------------------------------------------------- what the page says


def test_report_of_a_failed_check_says_so_at_the_top_and_counts_each_fault(page, failed):
    assert page.title() == "FAILED: training tokens of samples"
    assert page.text_content("header h1 + *") == f"FAILED\n{PROBLEM}\nsamples: 1 row set aside, 2 turns left out\n"
    found, tiles = cells(page), dict(texts(page, ".tiles div", "dt, dd"))
    assert (tiles["trajectories"], tiles["turns"], tiles["samples"]) == ("4", "6", "4")
    assert found["exact"] == ["2", "samples", "50.00%"]
    assert found["mismatched"] == ["1", "samples", "in 1 the tokens differ"]
    assert found["over cutoff_len"][0] == "1" and found["supervised"] == ["4", "turns", ""]
    assert found["left out"][:2] == ["2", "turns"] and found["left out"][2].endswith("; row and turn of each: 3:0, 3:2")
    assert "1: its prompt opens with a block of assistant, which LlamaFactory cannot write; " in found["left out"][2]
    assert found["set aside"][:2] == ["1", "rows"]
    assert "; 1 like this: message 0: unknown role '<b>narrator'" in found["set aside"][2]
    digest = hashlib.sha256((failed / "samples.parquet").read_bytes()).hexdigest()
    assert page.text_content("details .file") == f"samples.parquet: SHA-256 {digest}"
    tokens = int(tiles["tokens, as trained"].replace(",", ""))
    assert found["steps"][0] == "3" and found["samples or rows per step"][0] == "4"  # 4 samples, 3 epochs, 1 x 32 x 2
    assert found["tokens"][0] == f"{3 * tokens:,}" and len(found["tokens"]) == 2  # as samples and trees
    assert found["hours"] == ["0.00", "0.00"]
    page.locator(".rate").first.fill("0.01")
    assert cells(page)["hours"] == [f"{3 * tokens / 2 / 0.01 / 3600:.2f}", "0.00"]  # on two GPUs
    page.locator(".rate").last.fill("fast")
    assert cells(page)["hours"][1] == "–"


def test_report_of_a_passed_check_counts_every_sample_and_the_cost_of_those_that_are_trained(
    pipeline, check, tmp_path, tiny_model, open_page, seen
):
    pipeline([{"messages": [user(str(n)), assistant("b", "r")]} for n in range(5)], "--val-ratio", "0.5")
    printed = check("samples", "eval_dataset=samples_val", "eval_strategy=epoch", "--report", "report.html")
    assert "report: report.html\ntook: loading " in printed and "PASSED: 5 of 5 samples are exact" in printed
    page = open_page(tmp_path / "report.html")
    assert page.text_content("#verdict strong") == "PASSED"
    said = dict(texts(page, "#checked div", "dt, dd"))
    assert abs(datetime.now(UTC) - datetime.fromisoformat(said.pop("date"))) < timedelta(hours=1)
    versions = {name: version(name) for name in ("llamafactory", "transformers")}
    assert said == {"model": str(tiny_model)} | versions
    assert page.locator("h2").all_text_contents()[:2] == ["samples", "samples_val (for evaluation)"]
    assert page.locator("#sample option").count() == 5
    assert page.text_content("#viewer h2 + p").startswith("5 of 5 samples")
    assert cells(page)["of a sample as it is served"] == ["18"] * 5  # shortest, mean, median, 95th percentile, longest
    trained = dict(texts(page, "section:first-of-type .tiles div", "dt, dd"))
    assert cells(page)["held out"] == [str(5 - int(trained["samples"])), "turns", "to be evaluated"]
    epochs_tokens = str(3 * int(trained["tokens, as trained"]))
    assert 0 < int(trained["samples"]) < 5 and cells(page)["tokens"][0] == epochs_tokens
    assert seen.errors == []


def test_charts_name_their_axes_mark_the_cutoff_and_have_their_numbers_below(page):
    names = ["Sample lengths", "Turns per trajectory", "Supervised tokens per turn"]
    assert page.locator("figcaption").all_text_contents() == names
    assert page.get_by_role("img", name="Histogram: ").count() == 3
    drawn = [chart.locator("text").all_text_contents() for chart in page.locator("figure > svg").all()]
    assert {"cutoff_len 500", "tokens of a sample", "samples"} < set(drawn[0])
    assert drawn[1] == ["0", "1", "2", "1", "2", "turns of a trajectory", "trajectories"]
    assert page.locator("figure:nth-of-type(2) svg title").all_text_contents() == ["1: 2", "2: 2"]
    assert cells(page)["1"] == ["2"] and cells(page)["2"] == ["2"]
    room = page.locator("figure:nth-of-type(1) svg svg .reach").first.bounding_box()
    numbers = [int(row[1]) for row in texts(page, "figure:nth-of-type(1) tbody tr", "td")]
    bars = [bar.bounding_box() for bar in page.locator("figure:nth-of-type(1) .bar").all()]
    for bar, number in zip(bars, numbers, strict=True):  # they stand on the axis, as high as their numbers
        assert bar["y"] + bar["height"] == pytest.approx(room["y"] + room["height"], abs=2)
        assert bar["height"] == pytest.approx(room["height"] * number / max(numbers), abs=2)


# ---------------------------------------------------------------- what it must not do


def test_page_fetches_nothing_runs_nothing_of_the_data_and_forbids_other_scripts(page, seen, failed):
    text = jump(page, "0", "3") + page.text_content("#tokens").replace("↵", "")
    assert HOSTILE.replace("\x1b", r"\x1b") in text  # as text, to the character
    assert seen.requests == [(failed / "report.html").as_uri()] and seen.errors == []
    assert page.title().startswith("FAILED")
    assert page.locator("img, iframe, link, script[src]").count() == 0 and page.locator("script").count() == 2
    script = "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'})"
    page.evaluate(f"() => document.body.append({script})")
    assert page.evaluate("() => window.ran === undefined")
    assert any("Content Security Policy" in error for error in seen.errors)


# ---------------------------------------------------------------- the viewer


def test_viewer_goes_to_the_next_the_previous_and_a_named_turn(page):
    note = page.text_content("#note")
    assert note.startswith("1 of 4 (mismatch)") and "row 0, turn 3" in note
    assert click(page, "#next").startswith("2 of 4 (longest, not exact)")
    assert click(page, "#previous").startswith("1 of 4") and click(page, "#previous").startswith("4 of 4")
    assert "row 4, turn 1" in jump(page, "4", "1") and "row 0, turn" in jump(page, "0", "")
    assert "row 1, turn 1" in jump(page, "1", "")
    assert "row 1, turn 1" in jump(page, "2", "1")
    message = page.text_content("#message")
    assert "row 2, turn 1 is not among the 4 samples" in message and "--show 2:1" in message


def test_viewer_marks_the_first_token_that_differs_and_shows_the_sample_of_a_link(page):
    mismatch = page.text_content("#mismatch")
    assert "the tokens differ from token" in mismatch and "served :" in mismatch
    assert page.locator("#tokens .first").all_text_contents() == ["<think>"]
    assert page.locator(".legend .first").all_text_contents() == ["first that differs"]
    page.locator("#extremes a").first.click()
    served = cells(page)["row 1, turn 1"][0]
    expect(page.locator("#note")).to_contain_text(f"; as it is served it has {served} tokens")
    assert "row 1, turn 1" in page.text_content("#note") and "(longest, not exact)" in page.text_content("#note")


def test_tokens_that_are_not_drawn_are_opened_and_those_that_the_page_lacks_are_to_be_had_by_a_command(
    tmp_path, open_page, seen, monkeypatch
):
    monkeypatch.setattr(tokens, "TOKENS_IN_PAGE", 24_000)
    told = {"source": "x.jsonl", "trajectory": 3, "turns": [2, 4]}
    trained = {"input_ids": [1] * 25_000, "labels": [-100] * 24_999 + [1]}
    checked = Checked("", "", 1, [], "", [], Schedule(1, -1, 1, 1, 1, packing=True))
    page = report_page(checked, [tokens.ShownSample("x", told, trained)], lambda ids: "a", set())
    (tmp_path / "x.html").write_text(page, encoding="utf-8")
    page = open_page(tmp_path / "x.html")
    absent = "… 5,000 tokens are not in this page: --show 3:4 of the check prints them …"
    assert page.locator("#tokens .gap").all_text_contents() == [absent, "… show 10,000 more tokens …"]
    assert page.locator("#tokens .token").count() == 10_000
    page.click("#tokens button")
    assert page.locator("#tokens .gap").all_text_contents() == [absent]
    assert page.locator("#tokens .token").count() == 20_000 and seen.errors == []


def test_supervised_and_special_tokens_are_told_apart_without_colour(page):
    jump(page, "4", "1")
    supervised = ",".join(page.locator("#tokens mark").all_text_contents())
    assert supervised.replace("↵", "") == "<think>\nr\n</think>\n\nb<|im_end|>\n"
    assert style(page, "#tokens mark", "borderBottomStyle") == "solid"
    assert style(page, "#tokens mark", "textDecorationLine") == "none"  # which would lie on underscores
    assert style(page, "#tokens span:not(.token)", "borderBottomStyle") == "none"
    assert style(page, "#tokens .special", "borderTopStyle") == "solid"
    assert page.locator("#tokens mark .special").all_text_contents() == ["<think>", "</think>", "<|im_end|>"]


def test_token_tells_its_id_and_text_by_pointer_and_by_keyboard(page, tokenizer):
    jump(page, "4", "1")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert page.locator("#tokens .token").first.get_attribute("title") == f'{start}: "<|im_start|>"'
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#inspector") == f'token 0, id {start}: "<|im_start|>", context, special'
    page.keyboard.press("ArrowRight")
    assert re.fullmatch(r'token 1, id \d+: "user", context', page.text_content("#inspector"))
    page.locator("#tokens mark .token").first.hover()
    assert page.text_content("#inspector").endswith('"<think>", supervised, special')


def test_page_is_usable_by_keyboard_names_its_parts_fits_a_phone_and_follows_the_dark_mode(page):
    page.focus("#next")
    page.keyboard.press("Enter")
    assert page.text_content("#note").startswith("2 of 4")
    assert [page.locator(name).count() for name in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert page.evaluate("[...document.querySelectorAll('select, input')].every(field => field.labels.length)")
    assert page.get_attribute("html", "lang") == "en"
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for scheme, paper, bar in (
        ("dark", "rgb(15, 20, 25)", "rgb(108, 182, 255)"),
        ("light", "rgb(255, 255, 255)", "rgb(11, 98, 179)"),
    ):
        page.emulate_media(color_scheme=scheme)
        assert (style(page, "body", "backgroundColor"), style(page, "figure .bar", "fill")) == (paper, bar)


# ---------------------------------------------------------------- one sample in the terminal


def test_sample_is_shown_with_brackets_where_the_output_is_no_terminal(capsys, failed, tiny_model):
    assert check_here(failed, tiny_model, "--show", "4:1") is None
    assert capsys.readouterr().out == (
        "rows.jsonl: row 4, turn 1: 18 tokens, 9 supervised (⟦…⟧)\n\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<think>\nr\n</think>\n\nb<|im_end|>\n⟧\n"
    )
