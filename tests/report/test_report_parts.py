"""The parts of the report: what is chosen and counted, how tokens become text, what a chart shows."""

import hashlib
import json
import subprocess
from array import array
from collections import Counter

import pytest
from datasets import Dataset

from served_tokens.files.read import checksum
from served_tokens.llamafactory import TrainingSet
from served_tokens.proof.findings import Findings
from served_tokens.report.charts import Bar, histogram, length_statistics
from served_tokens.report.choice import choice_of_samples, samples_of_turn
from served_tokens.report.cost import Schedule, costs_by_way, training_cost
from served_tokens.report.page import Checked, report_page
from served_tokens.report.tokens import ShownSample, runs, terminal_view, viewer_data
from served_tokens.trees.check import AS_WRITTEN, TREES

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>&amp; \x1b[31m \ud800 {{ 7 * 7 }}"


def found_of(lengths, **more) -> Findings:
    settings = {"name": "x", "settings": "", "lengths": array("q", lengths), "exact": bytearray(len(lengths))}
    return Findings(**settings | more)


def shown(ids: list, labels: list, source="x", name="x", **more) -> ShownSample:
    told = {"source": source, "trajectory": 0, "turns": [1]}
    return ShownSample(name, told, {"input_ids": ids, "labels": labels}, **more)


# ---------------------------------------------------------------- which samples, and how much of them


def test_page_of_very_many_long_samples_is_bounded_and_says_what_it_does_not_show():
    chosen = choice_of_samples(found_of(range(1, 100_001)), 200)
    assert Counter(chosen.values()) == {"longest": 20, "shortest": 20, "even choice": 160}
    assert chosen == choice_of_samples(found_of(range(1, 100_001)), 200)
    labels = [-100] * 39_990 + [7] * 10
    samples = [shown([7] * 40_000, labels, why=why) for why in chosen.values()]
    data = viewer_data(samples, lambda ids: "<" * len(ids), set())
    assert len(json.dumps(data, separators=(",", ":"))) < 6_000_000
    assert sum(len(numbers) for _, _, numbers in data["samples"][0]["runs"]) == 5000


@pytest.mark.parametrize(
    "length, at, window",
    [(25, 5, (0, 25)), (100, 50, (35, 65)), (100, 2, (0, 30)), (100, 500, (70, 100)), (100, None, (65, 95))],
)
def test_long_sample_is_shown_where_it_differs_else_where_it_is_first_supervised(length, at, window):
    sample = shown([7] * length, [-100] * (length - 20) + [7] * 20, at=at)
    found = [*runs(sample, 30)]
    assert (found[0][1], found[-1][1] + len(found[-1][2])) == window


def test_turn_without_a_sample_is_named_with_those_that_have_one():
    provenance = Dataset.from_list([{"source": "x", "trajectory": 3, "turns": [turn]} for turn in (2, 6, 4)])
    sets = [TrainingSet("samples", None, provenance, [{"input_ids": [1], "labels": [1]}] * 3, 3)]
    assert [sample.told["turns"] for sample in samples_of_turn(sets, 3, 6)] == [[6]]
    with pytest.raises(SystemExit, match=r"--show 3:5: no sample supervises message 5 of row 3, .*: 2, 4, 6$"):
        samples_of_turn(sets, 3, 5)
    with pytest.raises(
        SystemExit, match=r"those that are supervised: none; is the row set aside, or are its turns left out\?$"
    ):
        samples_of_turn(sets, 9, 5)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "values, bars",
    [
        ([], [(0, 0, 0)]),
        ([7, 7, 7], [(7, 7, 3)]),
        ([1, 1, 3], [(1, 1, 2), (2, 2, 0), (3, 3, 1)]),
        ([0, 99, 99], [(b, b + 4, {0: 1, 95: 2}.get(b, 0)) for b in range(0, 100, 5)]),
    ],
)
def test_histogram_counts_each_value_in_bars_of_one_round_width(values, bars):
    assert histogram("t", "x", "y", values).bars == [Bar(*bar) for bar in bars]


def test_lengths_have_a_mean_a_median_and_a_95th_percentile_between_their_ends():
    found = length_statistics(array("q", [7, 3, 3, 30]))
    assert found == {"shortest": 3, "mean": 10.8, "median": 5, "95th percentile": 30, "longest": 30}
    assert [*length_statistics(array("q", range(1, 101))).values()] == [1, 50.5, 50.5, 95, 100]
    assert set(length_statistics(array("q")).values()) == {0}


@pytest.mark.parametrize(
    "changes, steps, tokens",
    [
        ({}, 12, 300_000),  # 4 an epoch
        ({"gpus": 8}, 3, 300_000),
        ({"batch": 3, "accumulation": 1, "gpus": 2}, 51, 300_000),
        ({"epochs": 0.5}, 2, 50_000),
        ({"max_steps": 6}, 6, 150_000),
    ],
)
def test_cost_counts_steps_and_tokens_as_the_trainer_does(changes, steps, tokens):
    schedule = Schedule(**{"epochs": 3, "max_steps": -1, "batch": 1, "accumulation": 32, "gpus": 1} | changes)
    cost = training_cost(100, 100_000, schedule)
    assert (cost["steps"], cost["tokens"]) == (steps, tokens)


def test_costs_of_token_trees_stand_beside_those_of_the_samples_unless_they_are_packed():
    found = found_of([10] * 64, ways={AS_WRITTEN: (64, 640), TREES: (4, 100)})

    def told(packing: bool) -> dict:
        schedule = Schedule(epochs=2, max_steps=-1, batch=1, accumulation=16, gpus=2, packing=packing)
        costs = costs_by_way([found], schedule, 50)
        return {way: (cost["steps"], cost["tokens"], cost["samples or rows per step"]) for way, cost in costs.items()}

    assert told(packing=False) == {AS_WRITTEN: (4, 1280, 32), TREES: (4, 200, 2)}
    assert told(packing=True) == {AS_WRITTEN: (2, 1280, 13)}  # 640 tokens in packs of 50 are 13 samples


def test_checksum_of_a_folder_is_that_of_the_sorted_lines_of_sha256sum(tmp_path):
    for name in ("b.parquet", "a.parquet", "A.parquet"):
        (tmp_path / name).write_text(name)
    lines = subprocess.run("LC_ALL=C sha256sum *", shell=True, cwd=tmp_path, capture_output=True, check=True).stdout
    assert checksum(tmp_path) == hashlib.sha256(lines).hexdigest()
    assert checksum(tmp_path / "a.parquet") == hashlib.sha256(b"a.parquet").hexdigest()


# ---------------------------------------------------------------- text


def test_no_text_of_the_data_is_read_as_html(tmp_path):
    file = tmp_path / "<img src=x>.jsonl"
    file.write_text("{}")
    counted = ("kinds", "reasons", "why_left_out", "lost_under", "unread")
    texts = {"name": HOSTILE, "settings": HOSTILE, "left_out": [HOSTILE], "lost": [HOSTILE]}
    found = found_of([2], path=file, first_other_targets=HOSTILE, other_targets=1, **texts)
    for name in counted:
        getattr(found, name)[HOSTILE] = 1
    found.ways = dict.fromkeys((AS_WRITTEN, TREES), (1, 2))
    sample = shown([1, 2], [-100, 2], HOSTILE, name=HOSTILE, why=HOSTILE, at=1, mismatch=HOSTILE)
    checked = Checked(HOSTILE, HOSTILE, 8, [HOSTILE], HOSTILE, [found], Schedule(1, -1, 1, 1, 1))
    page = report_page(checked, [sample], lambda ids: HOSTILE, set())
    assert page.count("<script") == page.count("</script") == 2 and "<img" not in page
    assert "{{ 7 * 7 }}" in page and r"\x1b[31m \ud800" in page and page.encode()


def test_control_characters_and_lone_surrogates_do_not_reach_the_terminal():
    texts = {1: "\x1b]0;title\x07\u202e\ud800", 2: "b\tc\n"}
    sample = shown([1, 2], [-100, 2], "x\x1b")
    view = terminal_view(sample, lambda ids: "".join(texts[i] for i in ids))
    said, text = "x\\x1b: row 0, turn 1: 2 tokens, 1 supervised", "\\x1b]0;title\\x07\\u202e\\ud800"
    assert view == f"{said} (⟦…⟧)\n\n{text}⟦b\tc\n⟧"


@pytest.mark.parametrize(
    "options, error",
    [
        ("--show 4", "'4' does not name a row and a turn; write it as 17:4"),
        ("--show 4:1 --report x.html", "--show checks nothing"),
        ("--report qwen3_full_sft.yaml", "'qwen3_full_sft.yaml' is no name of a page; end it with .html"),
    ],
)
def test_wrong_option_is_named_before_the_work(run, options, error):
    assert error in run("check_training_tokens.py", *options.split(), expect=1).stderr
