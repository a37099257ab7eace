"""What the benchmarks compare with is still the definition, and all of them start."""

import importlib

import pytest

from benchmarks import made_up, speed, training_tokens


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_naive_way_makes_the_samples_of_both_steps(tmp_path, suffix):
    source = made_up.write(tmp_path / f"rows{suffix}", 3, turns=3)
    speed.both_steps(source, tmp_path / "samples")
    if suffix != ".json":  # the naive way reads an array
        source = made_up.write(tmp_path / "rows.json", 3, turns=3)
    speed.naive(str(source), str(tmp_path / "naive.json"))
    speed.reference(str(source), str(tmp_path / "reference.json"))
    assert len(speed.digests(tmp_path / "samples")) == 9
    assert speed.digests(tmp_path / "samples") == speed.digests(tmp_path / "naive.json")
    assert speed.digests(tmp_path / "samples") != speed.digests(tmp_path / "reference.json")


def test_training_tokens_are_counted(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training_tokens", str(tiny_model), "--rows", "2"])
    training_tokens.main()
    assert "merged chains, template" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["loading", "trees"])
def test_a_benchmark_can_be_started(name):
    assert importlib.import_module(f"benchmarks.{name}").main
