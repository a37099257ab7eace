"""The report shows what the check found, moves in a real browser, fetches nothing and runs nothing of the data."""

import hashlib
import io
import os
import pty
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from conftest import ROOT, assistant, golden, user, write_jsonl
from matplotlib.image import imread
from playwright.sync_api import expect, sync_playwright

import check_training_tokens as check

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)></script>"
HOSTILE += "<!-- \u2028 &amp; \x1b[31m 陈 👩‍👩‍👧"
ROWS = [
    {"messages": [user("q " + HOSTILE), assistant("a " + HOSTILE, "r " + HOSTILE), user("q2"), assistant("b", "r")]},
    {"messages": [user("q"), assistant("word " * 600, "r")]},  # over the cutoff
    {"messages": [{"role": "<b>narrator", "content": "x"}, user("q"), assistant("a")]},  # set aside
    {"messages": [assistant("hello"), user("q"), assistant("a", "r")]},  # no user block before its first turn
    {"messages": [user("q"), assistant("b", "r")]},
]
PROBLEM = (
    "samples: 2 of 4 samples are exact, so the model would not be trained on what it is served with; step 2 "
    "--cutoff-len N --tokenizer MODEL leaves out what is over cutoff_len, or raise cutoff_len; "
    "set preserve_thinking=false"
)


@pytest.fixture(scope="module")
def failed(tmp_path_factory, tiny_model):
    """A folder with rows.jsonl, its samples, and report.html and plots/ of a check that finds every kind of fault."""
    folder = tmp_path_factory.mktemp("report")
    write_jsonl(folder / "rows.jsonl", ROWS)
    for script, *arguments in (
        ("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl"),
        ("step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", "--dataset-dir", "."),
    ):
        process = subprocess.run(
            [sys.executable, ROOT / script, *arguments], cwd=folder, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout + process.stderr
    options = ["preserve_thinking=true", "cutoff_len=500", "--report", "report.html", "--plots", "plots", "--gpus", "2"]
    end = end_of_check(folder, *settings(folder, tiny_model), *options)
    assert end == f"FAILED: {PROBLEM}"
    return folder


def end_of_check(folder, *arguments):
    """What the check exits with; in this process, which loads LlamaFactory once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["check_training_tokens.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            check.main()
            sys.exit()
    return end.value.code


def settings(folder, model) -> list:
    return [
        ROOT / "qwen3_full_sft.yaml",
        f"dataset_dir={folder}",
        "dataset=samples",
        f"model_name_or_path={model}",
        "preprocessing_num_workers=1",
    ]


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; every address but that of a file leads nowhere."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    assert binary, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
        with playwright.chromium.launch(executable_path=binary, args=options) as browser:
            yield browser


@pytest.fixture(scope="module")
def tab(browser):
    """A page, and what it asked for and what went wrong in it."""
    page, seen = browser.new_page(), SimpleNamespace(requests=[], dialogs=[], errors=[])
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
    return page, seen


@pytest.fixture
def seen(tab):
    return tab[1]


@pytest.fixture
def open_page(tab):
    """open_page(file) -> the page, as if new."""

    def open_page(path):
        page, seen = tab
        page.goto("about:blank")
        for events in vars(seen).values():
            events.clear()
        page.goto(path.as_uri())
        return page

    return open_page


@pytest.fixture
def page(open_page, failed):
    """The report of the failed check."""
    return open_page(failed / "report.html")


@pytest.fixture
def main(capsys):
    """main(folder, *arguments) -> what the check prints."""

    def main(folder, *arguments) -> str:
        capsys.readouterr()
        assert end_of_check(folder, *arguments) is None
        return capsys.readouterr().out

    return main


def texts(page, rows: str, cells: str) -> list[list[str]]:
    """The text of each cell, of each row: CSS selectors."""
    found = "[...row.querySelectorAll(cells)].map(cell => cell.textContent)"
    return page.locator(rows).evaluate_all(f"(rows, cells) => rows.map(row => {found})", cells)


def cells(page) -> dict:
    """{first cell: [the other cells]} of each row of the page's tables."""
    return {row[0]: row[1:] for row in texts(page, "section tr", "th, td")}


def tiles(page) -> dict:
    return dict(texts(page, ".tiles div", "dt, dd"))


def click(page, selector: str) -> str:
    page.click(selector)
    return page.text_content("#note")


def jump(page, trajectory: str, turn: str) -> str:
    page.fill("#trajectory", trajectory)
    page.fill("#turn", turn)
    return click(page, "#choose .group button")


def style(page, selector: str, name: str) -> str:
    return page.locator(selector).first.evaluate("(element, name) => getComputedStyle(element)[name]", name)


# ---------------------------------------------------------------- the page in a browser


def test_report_of_a_failed_check_says_so_at_the_top_and_counts_each_fault(page):
    assert page.title() == "FAILED: training tokens of samples"
    verdict = page.text_content("header h1 + *").split("\n")
    assert verdict == ["FAILED", PROBLEM, ""]
    found, shown = cells(page), tiles(page)
    assert (shown["trajectories"], shown["turns"], shown["samples"]) == ("4", "6", "4")
    assert found["exact"] == ["2", "50.00%"]
    assert found["mismatched"] == ["1", "in 1 the tokens differ"]
    assert found["over cutoff_len"][0] == "1" and found["supervised"][0] == "4"
    assert found["left out"][0] == "2" and found["left out"][1].endswith("; turns without a sample: 3:0, 3:2")
    assert "1: its prompt opens with a block of assistant, which LlamaFactory cannot write; " in found["left out"][1]
    assert found["set aside"][0] == "1"
    assert "1 like this: message 0: unknown role '<b>narrator'" in found["set aside"][1]
    assert found["steps"][0] == "3" and found["samples or rows per step"][0] == "64"  # 4 samples, 3 epochs, 1 x 32 x 2
    tokens = int(shown["tokens"].replace(",", ""))
    assert found["tokens"][0] == f"{3 * tokens:,}"


def test_page_names_model_versions_date_and_the_checksum_of_the_data(page, failed, tiny_model):
    said = dict(texts(page, "#checked div", "dt, dd"))
    assert said.pop("model") == str(tiny_model)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(said.pop("date"))) < timedelta(hours=1)
    assert said == {"llamafactory": version("llamafactory"), "transformers": version("transformers")}
    digest = hashlib.sha256((failed / "samples.parquet").read_bytes()).hexdigest()
    assert page.text_content(".file") == f"samples.parquet: SHA-256 {digest}"


def test_report_of_a_passed_check_counts_every_sample(pipeline, main, tiny_model, tmp_path, open_page, seen):
    pipeline(golden())
    assert "report: report.html\nPASSED: " in main(tmp_path, *settings(tmp_path, tiny_model), "--report", "report.html")
    page = open_page(tmp_path / "report.html")
    assert page.text_content("#verdict strong") == "PASSED"
    assert cells(page)["exact"] == ["51", "100.00%"] and tiles(page)["turns"] == "52"
    assert page.locator("#sample option").count() == 51
    assert page.text_content("#viewer h2 + p").startswith("51 of 51 samples")
    assert seen.errors == []


def test_data_set_for_evaluation_has_numbers_and_samples_but_no_cost(pipeline, main, tiny_model, tmp_path, open_page):
    pipeline([{"messages": [user(str(n)), assistant("b", "r")]} for n in range(5)], "--val-ratio", "0.5")
    main(
        tmp_path,
        *settings(tmp_path, tiny_model),
        "eval_dataset=samples_val",
        "eval_strategy=epoch",
        "--report",
        "report.html",
    )
    page = open_page(tmp_path / "report.html")
    assert page.locator("h2").all_text_contents()[:2] == ["samples", "samples_val (for evaluation)"]
    assert page.locator("#sample option").count() == 5
    assert cells(page)["of a sample"] == ["18"] * 5  # shortest, mean, median, 95th percentile, longest
    trained = dict(texts(page, "section:first-of-type .tiles div", "dt, dd"))
    assert 0 < int(trained["samples"]) < 5 and cells(page)["tokens"][0] == str(3 * int(trained["tokens"]))  # 3 epochs


def test_page_fetches_nothing_and_runs_nothing_of_the_data(page, seen, failed):
    text = jump(page, "0", "3") + page.text_content("#tokens").replace("↵", "")
    assert HOSTILE.replace("\x1b", r"\x1b") in text  # as text, to the character
    assert seen.requests == [(failed / "report.html").as_uri()]
    assert seen.dialogs == [] and seen.errors == []
    assert page.title().startswith("FAILED")
    assert page.locator("img, iframe, link, script[src]").count() == 0
    assert page.locator("script").count() == 2


def test_policy_of_the_page_forbids_other_scripts(page, seen):
    script = "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'})"
    page.evaluate(f"() => document.body.append({script})")
    assert page.evaluate("() => window.ran === undefined")
    assert any("Content Security Policy" in error for error in seen.errors)


def test_viewer_goes_to_the_next_the_previous_and_a_named_turn(page):
    note = page.text_content("#note")
    assert note.startswith("1 of 4 (mismatch)") and "trajectory 0, turn 3" in note
    assert click(page, "#next").startswith("2 of 4 (longest, not exact)")
    assert click(page, "#previous").startswith("1 of 4") and click(page, "#previous").startswith("4 of 4")
    assert "trajectory 4, turn 1" in jump(page, "4", "1") and "trajectory 0, turn" in jump(page, "0", "")
    assert "trajectory 1, turn 1" in jump(page, "1", "")
    jump(page, "2", "1")
    assert "trajectory 2, turn 1 is not among the 4 samples" in page.text_content("#message")
    assert "--show 2:1" in page.text_content("#message")
    assert "trajectory 1, turn 1" in page.text_content("#note")


def test_link_of_the_longest_sample_shows_it_in_the_viewer(page):
    page.locator("#extremes a").first.click()
    served = cells(page)["trajectory 1, turn 1"][0]
    expect(page.locator("#note")).to_contain_text(f"; as it is served it has {served} tokens")
    assert "trajectory 1, turn 1" in page.text_content("#note") and "(longest, not exact)" in page.text_content("#note")


def test_first_token_that_differs_is_marked_beside_what_is_served(page):
    mismatch = page.text_content("#mismatch")
    assert "the tokens differ from token" in mismatch and "served :" in mismatch
    assert page.locator("#tokens .first").all_text_contents() == ["<think>"]


def test_supervised_and_special_tokens_are_told_apart_without_colour(page):
    jump(page, "4", "1")
    supervised = ",".join(page.locator("#tokens mark").all_text_contents())
    assert supervised.replace("↵", "") == "<think>\nr\n</think>\n\nb<|im_end|>\n"
    assert style(page, "#tokens mark", "borderBottomStyle") == "solid"
    assert style(page, "#tokens span:not(.token)", "borderBottomStyle") == "none"
    assert style(page, "#tokens .special", "borderTopStyle") == "solid"
    assert page.locator("#tokens mark .special").all_text_contents() == ["<think>", "</think>", "<|im_end|>"]


@pytest.mark.parametrize("zoom", [0.5, 1, 2])
def test_underscore_of_supervised_text_is_apart_from_the_line_below_it_at_every_zoom(browser, failed, zoom):
    columns = []
    with browser.new_page(device_scale_factor=zoom) as page:
        page.goto((failed / "report.html").as_uri())
        mark = page.locator("#tokens mark").first
        for text in ("a_b", "a b"):
            mark.evaluate("(mark, text) => { mark.textContent = text }", text)
            pixels = imread(io.BytesIO(mark.screenshot()))[..., :3].mean(axis=2)
            columns.append(pixels[:, pixels.shape[1] // 2])
    with_underscore, without = columns
    paper = without[len(without) // 2]
    underscore, line = (abs(a - b) > 0.15 for a, b in ((with_underscore, without), (without, paper)))
    assert underscore.any() and line.any()
    assert underscore.nonzero()[0].max() + 1 < line.nonzero()[0].min()  # pixels between them


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


def test_page_is_usable_by_keyboard_and_names_its_parts(page):
    page.focus("#next")
    page.keyboard.press("Enter")
    assert page.text_content("#note").startswith("2 of 4")
    assert [page.locator(name).count() for name in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert page.evaluate("[...document.querySelectorAll('select, input')].every(field => field.labels.length)")
    assert page.get_by_role("img", name="Histogram: ").count() == 3
    assert page.get_attribute("html", "lang") == "en"


def test_page_fits_a_phone(browser, failed):
    with browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True) as page:
        page.goto((failed / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_page_and_charts_follow_the_dark_mode(page):
    def colours(scheme: str) -> list[str]:
        page.emulate_media(color_scheme=scheme)
        bar = style(page, "figure path[fill='var(--accent)']", "fill")
        return [style(page, "body", "backgroundColor"), bar, style(page, "figure text", "fill")]

    assert colours("dark") == ["rgb(15, 20, 25)", "rgb(108, 182, 255)", "rgb(154, 167, 180)"]
    assert colours("light") == ["rgb(255, 255, 255)", "rgb(11, 98, 179)", "rgb(87, 96, 106)"]


def test_charts_name_their_axes_and_mark_the_cutoff(page):
    assert page.locator("figcaption").all_text_contents() == [
        "Sample lengths",
        "Turns per trajectory",
        "Supervised tokens per turn",
    ]
    drawn = [chart.locator("text").all_text_contents() for chart in page.locator("svg").all()]
    assert "cutoff_len 500" in drawn[0] and {"tokens of a sample", "samples"} < set(drawn[0])
    assert drawn[1] == ["1", "2", "turns of a trajectory", "0", "1", "2", "trajectories"]
    assert page.locator("figure:nth-of-type(2) svg title").all_text_contents() == ["1: 2", "2: 2"]
    assert cells(page)["1"] == ["2"] and cells(page)["2"] == ["2"]


# ---------------------------------------------------------------- plots


def test_plots_are_a_png_of_each_histogram(failed):
    assert sorted(path.name for path in (failed / "plots").iterdir()) == [
        "samples_sample_lengths.png",
        "samples_supervised_tokens_per_turn.png",
        "samples_turns_per_trajectory.png",
    ]
    for path in (failed / "plots").iterdir():
        assert imread(path)[..., :3].std() > 0.05  # something is drawn


# ---------------------------------------------------------------- one sample in the terminal


def test_sample_is_shown_with_brackets_where_the_output_is_no_terminal(main, failed, tiny_model):
    assert main(failed, *settings(failed, tiny_model), "--show", "4:1") == (
        "rows.jsonl: trajectory 4, turn 1: 18 tokens, 9 supervised (in ⟦…⟧)\n\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<think>\nr\n</think>\n\nb<|im_end|>\n⟧\n"
    )


def test_sample_is_shown_in_colour_on_a_terminal(failed, tiny_model):
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "check_training_tokens.py", *settings(failed, tiny_model), "--show", "4:1"],
        cwd=failed,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
    )
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
