"""The parts of the report: what is chosen and counted, how tokens become text, what a chart shows."""

import hashlib
import json
import re
import subprocess
import sys
from array import array
from collections import Counter
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from datasets import Dataset

import check_training_tokens as check
from served_tokens.proof import findings
from served_tokens.proof.findings import Findings, Sample
from served_tokens.report import charts
from served_tokens.report import choice as shown_samples
from served_tokens.report import page as report
from served_tokens.report import tokens as token_view
from served_tokens.trees.check import AS_WRITTEN, MERGED, TREES

HOSTILE = (
    "</script><script>document.title='run'</script><img src=x onerror=alert(1)>&amp; \x1b[31m \ud800 $x_1$ {{ 7 * 7 }}"
)


# ---------------------------------------------------------------- a large data set


def test_page_of_very_many_long_samples_is_bounded_and_says_what_it_does_not_show():
    found = Findings("big", True, "", array("q", range(1, 100_001)), bytearray(100_000))
    found.counts.update(exact=100_000, tokens=sum(found.lengths))
    chosen = findings.choice_of_samples(found, findings.SAMPLES_IN_PAGE)
    assert len(chosen) == 200 and Counter(chosen.values()) == {"longest": 20, "shortest": 20, "even choice": 160}
    assert chosen == findings.choice_of_samples(found, findings.SAMPLES_IN_PAGE)
    samples = [
        ("big", Sample("x", position, [1], [7] * 40_000, [-100] * 39_990 + [7] * 10, why, 40_000))
        for position, why in chosen.items()
    ]
    data = token_view.viewer_data(samples, lambda ids: "<" * len(ids), set())
    assert len(token_view.script_json(data)) < 6_000_000
    held = data["samples"][0]["runs"]
    assert sum(len(run[2]) for run in held if run[0] is not None) <= 2500
    assert sum(run[2] if run[0] is None else len(run[2]) for run in held) == 40_000


def test_mismatches_come_first_in_the_choice():
    found = Findings("x", True, "", array("q", [5] * 1000), bytearray(1000), mismatches={800: (3, "the tokens differ")})
    assert next(iter(findings.choice_of_samples(found, 200).items())) == (800, "mismatch")


@pytest.mark.parametrize(
    "length, at, ranges",
    [
        (10, 5, [(0, 10)]),
        (100, 50, [(0, 10), (45, 55), (90, 100)]),
        (100, 0, [(0, 10), (90, 100)]),
        (100, 12, [(0, 17), (90, 100)]),
        (100, 99, [(0, 10), (90, 100)]),
        (100, 500, [(0, 10), (90, 100)]),
    ],
)
def test_long_sample_is_shown_at_its_ends_and_where_it_matters(length, at, ranges):
    assert token_view.shown_ranges(length, 30, at) == ranges


@pytest.mark.parametrize(
    "values, bars",
    [
        ({}, [(0, 0, 0)]),
        ({7: 3}, [(7, 7, 3)]),
        ({1: 2, 3: 1}, [(1, 1, 2), (2, 2, 0), (3, 3, 1)]),
        ({0: 1, 99: 2}, [(b, b + 4, {0: 1, 95: 2}.get(b, 0)) for b in range(0, 100, 5)]),
    ],
)
def test_histogram_counts_each_value_in_bars_of_one_round_width(values, bars):
    assert charts.histogram("t", "x", "y", Counter(values)).bars == bars


def test_few_far_higher_values_share_the_last_bar_and_leave_the_others_their_room():
    chart = charts.histogram("t", "x", "y", Counter({1: 100, 2: 100, 5000: 1, 9000: 1}))
    assert chart.bars == [(1, 1, 100), (2, 2, 100), (3, 9000, 2)] and chart.note == "the last bar goes to 9,000"
    chart = charts.histogram("t", "x", "y", Counter({1: 200, 100: 1}), (50, "cutoff_len 50"))
    assert chart.bars[0] == (0, 4, 200) and chart.bars[-1] == (100, 104, 1) and chart.mark  # what is cut is seen


def test_cutoff_far_beyond_the_samples_is_named_and_leaves_them_their_room():
    chart = charts.histogram("t", "tokens", "y", Counter({10: 1}), (32768, "cutoff_len 32,768"))
    assert chart.mark is None and chart.note == "cutoff_len 32,768 is further right"


# ---------------------------------------------------------------- the cost


@pytest.mark.parametrize(
    "settings, steps, tokens",
    [
        ({}, 12, 300_000),  # 100 samples, 32 a step: 4 an epoch
        ({"gpus": 8}, 3, 300_000),
        ({"epochs": 0.5}, 2, 50_000),
        ({"max_steps": 6}, 6, 150_000),
        ({"batch": 3, "accumulation": 1, "gpus": 2}, 51, 300_000),
    ],
)
def test_cost_counts_steps_and_tokens_as_the_trainer_does(settings, steps, tokens):
    settings = {"epochs": 3.0, "max_steps": -1, "batch": 1, "accumulation": 32, "gpus": 1, **settings}
    cost = findings.training_cost(100, 100_000, 5_000, findings.Schedule(**settings))
    assert (cost["steps"], cost["tokens"]) == (steps, tokens)


def test_cost_is_of_what_is_trained_less_what_is_held_out():
    found = Findings(
        "x",
        True,
        "",
        array("q", [10] * 100),
        bytearray(100),
        counts=Counter({"tokens": 1000, "supervised tokens": 100}),
    )
    schedule = {"epochs": 1.0, "max_steps": -1, "batch": 1, "accumulation": 1, "val_size": 0.2, "packing": False}
    cost, said = check.cost_of([found], schedule, 1, 50)
    assert (cost["steps"], cost["tokens"], cost["supervised tokens"]) == (80, 800, 80) and "less val_size 0.2" in said
    assert "6 steps" in check.cost_of([found], {**schedule, "max_steps": 6}, 1, 50)[1]
    cost, said = check.cost_of([found], {**schedule, "packing": True}, 1, 50)
    assert cost["steps"] == 16 and "packed" in said


# ---------------------------------------------------------------- text


def test_tokens_of_one_character_are_shown_together(tokenizer):
    ids = tokenizer("a 👩‍👩‍👧 陈\ufffd!", add_special_tokens=False)["input_ids"]
    found = list(token_view.pieces(ids, tokenizer.decode))
    assert [i for group, _ in found for i in group] == ids
    assert "".join(text for _, text in found).startswith("a 👩‍👩‍👧 陈")


def test_lone_surrogate_in_a_reason_can_be_written():
    assert token_view.visible("no column \ud800") == "no column \\ud800"


@pytest.mark.parametrize("text", ["</script><script>", "<!--", "\u2028\u2029", "&", "陈", '"\\'])
def test_embedded_json_ends_no_element_and_keeps_the_text(text):
    embedded = token_view.script_json([text])
    assert not set("<>&\u2028\u2029") & set(embedded) and json.loads(embedded) == [text]


# ---------------------------------------------------------------- one sample in the terminal


def test_colour_is_for_terminals_unless_no_color_is_set():
    terminal, file = (SimpleNamespace(isatty=lambda answer=answer: answer) for answer in (True, False))
    assert check.wants_colour(terminal, {}) and check.wants_colour(terminal, {"NO_COLOR": ""})
    assert not check.wants_colour(terminal, {"NO_COLOR": "1"}) and not check.wants_colour(file, {})


def test_control_characters_of_the_data_do_not_reach_the_terminal():
    sample = Sample("x\x1b", 0, [1], [1, 2], [-100, 2])
    text = token_view.terminal_view(
        sample, lambda ids: "".join({1: "\x1b]0;title\x07\u202e", 2: "b\tc\n"}[i] for i in ids), set(), False
    )
    assert text == "x\\x1b: trajectory 0, turn 1: 2 tokens, 1 supervised (in ⟦…⟧)\n\n\\x1b]0;title\\x07\\u202e⟦b\tc\n⟧"


def test_turn_without_a_sample_is_named_with_those_that_have_one():
    provenance = Dataset.from_list([{"source": "x", "trajectory": 3, "turns": [turn]} for turn in (2, 6, 4)])
    built = Dataset.from_list([{"input_ids": [1], "labels": [1]}] * 3)
    its = SimpleNamespace(name="samples", provenance=provenance, built=built)
    assert [sample.turns for sample in shown_samples.samples_of_turn([its], 3, 6)] == [[6]]
    with pytest.raises(SystemExit, match=r"--show 3:5: no sample supervises message 5 of trajectory 3, .*: 2, 4, 6"):
        shown_samples.samples_of_turn([its], 3, 5)
    with pytest.raises(SystemExit, match="--show 9:5: trajectory 9 has no sample in samples; rows are counted from 0"):
        shown_samples.samples_of_turn([its], 9, 5)


@pytest.mark.parametrize(
    "options, error",
    [
        (["--show", "4"], "'4' does not name a trajectory and a turn; write it as 17:4"),
        (["--show", "4:1", "--report", "x.html"], "--show checks nothing"),
        (["--report", "qwen3_full_sft.yaml"], "'qwen3_full_sft.yaml' is no name of a page; end it with .html"),
    ],
)
def test_wrong_option_is_named_before_the_work(monkeypatch, capsys, options, error):
    monkeypatch.setattr(sys, "argv", ["check_training_tokens.py", *options])
    with pytest.raises(SystemExit):
        check.main()
    assert error in capsys.readouterr().err


# ---------------------------------------------------------------- lengths and checksums


@pytest.mark.parametrize(
    "lengths, statistics",
    [(range(1, 101), [1, 50.5, 50.5, 95, 100]), ([7, 3, 3, 30], [3, 10.8, 5, 30, 30]), ([], [0, 0, 0, 0, 0])],
)
def test_lengths_have_a_mean_a_median_and_a_95th_percentile_between_their_ends(lengths, statistics):
    found = findings.length_statistics(array("q", lengths))
    assert list(found) == ["shortest", "mean", "median", "95th percentile", "longest"]
    assert list(found.values()) == statistics


def test_checksum_of_a_folder_is_that_of_the_sorted_lines_of_sha256sum(tmp_path):
    for name in ("b.parquet", "a.parquet", "A.parquet"):
        (tmp_path / name).write_text(name)
    lines = subprocess.run("LC_ALL=C sha256sum *", shell=True, cwd=tmp_path, capture_output=True, check=True).stdout
    assert report.checksum(tmp_path) == hashlib.sha256(lines).hexdigest()
    assert report.checksum(tmp_path / "a.parquet") == hashlib.sha256(b"a.parquet").hexdigest()


# ---------------------------------------------------------------- charts


@pytest.mark.parametrize(
    "values, ticks",
    [
        ({length: 1 + length // 997 for length in range(137, 9_731, 7)}, "0 2k 4k 6k 8k 10k x 0 200 400 600 y"),
        ({7: 3}, "7 x 0 1 2 3 y"),
        ({}, "0 x 0 1 y"),
        ({1: 100_000, 2: 1}, "1 2 x 0 20k 40k 60k 80k 100k y"),
    ],
)
def test_ticks_are_at_round_numbers(values, ticks):
    chart = charts.histogram("t", "x", "y", Counter(values))
    assert [text.text for text in ElementTree.fromstring(charts.svg(chart)).iter("text")] == ticks.split()


def test_chart_of_the_page_is_the_same_each_time_and_has_no_style_and_no_id():
    chart = charts.histogram("t", "x", "y", Counter({1: 2, 3: 4}), (2, "cutoff_len 2"))
    elements = list(ElementTree.fromstring(charts.svg(chart)).iter())
    assert charts.svg(chart) == charts.svg(chart)
    assert {element.tag for element in elements} == {"svg", "g", "path", "text", "title"}
    assert not {"id", "style", "clip-path"} & {name for element in elements for name in element.attrib}


# ---------------------------------------------------------------- the page as text


def test_no_text_of_the_data_is_read_as_html(tmp_path):
    file = tmp_path / "<img src=x>.jsonl"
    file.write_text("{}")
    found = Findings(
        HOSTILE, True, HOSTILE, array("q", [2]), bytearray(1), file, turns=Counter([1]), targets=Counter([1])
    )
    found.kinds[HOSTILE] = found.reasons[HOSTILE] = found.why_left_out[HOSTILE] = 1
    found.left_out.append(HOSTILE)
    sample = Sample(HOSTILE, 0, [1], [1, 2], [-100, 2], mismatch=(1, HOSTILE))
    checked = report.Checked(HOSTILE, HOSTILE, 8, {HOSTILE: {"steps": 1}}, HOSTILE)
    page = report.report_page(checked, [HOSTILE], [found], [(HOSTILE, sample)], lambda ids: HOSTILE, set())
    assert page.count("<script") == page.count("</script") == 2 and "<img" not in page
    assert "{{ 7 * 7 }}" in page and r"\x1b[31m \ud800" in page and page.encode()
    assert all(re.fullmatch(r"[\w.-]+\.png", name) for name in charts.plots(found, 8))


def test_costs_of_merged_chains_and_token_trees_stand_beside_those_of_the_samples():
    found = findings.Findings("x", True, "", array("q", [10] * 64), bytearray(64))
    found.counts.update({"tokens": 640, "supervised tokens": 64})
    found.ways = {AS_WRITTEN: (64, 640), MERGED: (16, 200), TREES: (4, 100)}
    schedule = {"epochs": 2, "max_steps": -1, "packing": False, "batch": 1, "accumulation": 16, "val_size": 0.0}
    costs, _ = check.costs_by_way([found], schedule, 2, 50)
    told = {way: (cost["steps"], cost["tokens"], cost["samples or rows per step"]) for way, cost in costs.items()}
    assert told == {AS_WRITTEN: (4, 1280, 32), MERGED: (2, 400, 32), TREES: (4, 200, 2)}
