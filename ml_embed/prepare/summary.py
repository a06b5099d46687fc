"""Tokenized data in numbers, when the command ends: what is missing, and languages."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from ml_embed.data.manifest import Manifest
from ml_embed.notices import notice, warn
from ml_embed.prepare.raw import say_passed_over

_SHOWN = 5
_REASONS = {
    "max_samples": "rows left out by --max-samples (0 keeps all)",
    "faulty": "faulty rows left out by --skip-bad-rows",
}


def say_what_is_missing(manifest: Manifest) -> None:
    """Notices of what was left out, cut and passed over, each with its number."""
    for reason, numbers in _left_out(manifest).items():
        notice(f"{_REASONS.get(reason, f'left out, {reason}')}: {_listing(numbers)}")
    for kind in ("queries", "documents"):
        cut = {name: (e.texts_cut or {}).get(kind, 0) for name, e in manifest.datasets.items()}
        if any(cut.values()):
            notice(f"{kind} cut at {manifest.max_seq_length} tokens: {_listing(cut)}")
    for name, entry in manifest.datasets.items():
        if 2 * (entry.texts_cut or {}).get("queries", 0) > entry.rows:
            warn(f"{name}: most of its queries are cut; raise --max-seq-length, or shorten prompts")
    say_passed_over(manifest.passed_over or ())


def language_table(manifest: Manifest) -> str:
    """A line per language: rows, tokens, and tokens per character; "" where no row says its own.

    The first line is the language with the most rows.
    """
    rows: Counter[str] = Counter()
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in manifest.datasets.values():
        rows.update(entry.languages or {})
        for code, own in (entry.text_sizes or {}).items():
            sizes[code].update(own)
    if not rows:
        return ""
    lines = [f"{'language':10}{'rows':>12}{'tokens':>14}{'tokens per character':>22}"]
    for code, count in sorted(rows.items(), key=lambda item: (-item[1], item[0])):
        own = sizes[code]
        rate = f"{own['tokens'] / own['characters']:.3f}" if own["characters"] else "-"
        lines.append(f"{code:10}{count:12,}{own['tokens']:14,}{rate:>22}")
    return "\n".join(lines)


def _left_out(manifest: Manifest) -> dict[str, dict[str, int]]:
    by_reason: dict[str, dict[str, int]] = defaultdict(dict)
    for name, entry in manifest.datasets.items():
        for reason, number in (entry.left_out or {}).items():
            by_reason[reason][name] = number
    return by_reason


def _listing(numbers: Mapping[str, int]) -> str:
    """The sum, and the datasets with most of it."""
    most = sorted((item for item in numbers.items() if item[1]), key=lambda item: -item[1])
    names = ", ".join(f"{name} {number:,}" for name, number in most[:_SHOWN])
    more = f" and {len(most) - _SHOWN:,} more datasets" if len(most) > _SHOWN else ""
    return f"{sum(numbers.values()):,} ({names}{more})"
