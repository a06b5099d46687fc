"""What all pages look like."""

from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 0 .25rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem }
.charts > div { min-width: 0 } svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: #444 }
.axis { stroke: #444 } .grid { stroke: #ddd; stroke-width: .7 }
.legend { margin: .25rem 0 0; font-size: 13px }
.legend span { margin-right: 1rem; white-space: nowrap }
.key { display: inline-block; width: 22px; height: 10px; margin-right: .35rem }
table { border-collapse: collapse; margin: .5rem 1.5rem 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child { text-align: left; white-space: nowrap }
.cubes { display: flex; flex-wrap: wrap } .note { color: #555; font-size: 14px; max-width: 52rem }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A self-contained HTML page of these parts."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
