"""What the check says of a data set in a terminal."""

from served_tokens.files.write import accounted
from served_tokens.proof.compare import NOT_SAID
from served_tokens.proof.findings import Findings
from served_tokens.rows.notes import SOME_REASONING

SHOWN_MISMATCHES, SHOWN_KEYS = 3, 10
TOO_LONG = "step 2 --cutoff-len N --tokenizer MODEL leaves out what is over cutoff_len, or raise cutoff_len"


def what_mends(found: Findings, provenance, data_args) -> str:
    """The setting that makes the samples exact, as far as it is known."""
    served_as, merged = set(provenance["served_as"]), any(len(turns) > 1 for turns in provenance["turns"])
    mends = {
        TOO_LONG: found.counts["cut"],
        "set template=qwen3_nothink": "template" in served_as and data_args.template == "qwen3",
        "set mask_history=false": merged and data_args.mask_history,
        "set mask_history=true": not (merged or data_args.mask_history),
        "set enable_thinking=false": "no-thinking" in served_as and data_args.enable_thinking is not False,
        "set preserve_thinking=false": getattr(data_args, "preserve_thinking", False),
    }
    known = [mend for mend, helps in mends.items() if helps]
    asked = "are the settings those that step 2 ended with, and the chat template and trajectories those of step 1?"
    return "; ".join(known) or asked


def print_findings(found: Findings, max_samples: int | None) -> None:
    counts = found.counts
    for text in [*(text for _, text in list(found.mismatches.values())[:SHOWN_MISMATCHES]), *found.lost]:
        print(text)
    print(f"{found.name}: {found.settings}")
    aside, turns, supervised = counts["rows set aside"], counts["turns"], counts["supervised turns"]
    print("  " + accounted("rows", counts["rows"], counts["trajectories"], "checked for samples", aside, "set aside"))
    print("  " + accounted("turns", turns, supervised, "in samples", turns - supervised, "left out"))
    for reason, number in found.reasons.most_common(SHOWN_KEYS):
        print(f"  {number:>8} set aside: {reason}")
    cut_short = f"max_samples is {max_samples}"
    for why, number in found.why_left_out.most_common():
        print(f"  {number:>8} left out: {cut_short if why == NOT_SAID and max_samples is not None else why}")
    for what, told in (("mismatched", "mismatched"), ("cut", "over cutoff_len"), ("lost texts", "lost")):
        if counts[what]:
            print(f"  {counts[what]:>8} {told}{', texts that no sample holds that should' * (what == 'lost texts')}")
    for key, number in found.lost_under.most_common(SHOWN_KEYS):
        print(f"  {number:>8} of them under {key}")
    if counts["recorded turns"]:
        exact = counts["exact by record"]
        print(f"  {exact:>8} exact by record, of {counts['recorded turns']} turns whose token ids a server recorded")
    print(f"  the longest sample has {max(found.lengths, default=0)} tokens")
    same = counts["rows read twice"] - counts["read otherwise"]
    print(f"  {same:>8} of {counts['trajectories']} rows the check reads by its own rules too, with the same result")
    if counts["other targets"]:
        others = counts["other targets"]
        print(f"  {others:>8} prompts are trained to another target too, the first: {found.other_targets}")
    if counts["without reasoning"]:
        print("  " + SOME_REASONING.format(counts["without reasoning"], counts["beside reasoning"]))
    if found.unread:
        print(f"  not trained and not shown: {unread_keys(found)}")


def unread_keys(found: Findings) -> str:
    """The keys that nobody reads, and in how many rows."""
    return ", ".join(f"{key} ({number:,})" for key, number in sorted(found.unread.items()))
