"""The picture of README and landing page, drawn from what `benchmarks.real_model` measured.

python -m benchmarks.front_picture
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "real-model" / "study.json"
IMAGE = ROOT / "docs" / "images" / "two-hops.svg"
#: The question shown: subject, first relation, second relation.
SHOWN = ("Volvo", "home country", "capital")

STYLE = """
text{font:15px system-ui,sans-serif;fill:#1f2328}.s{font-size:13px}.q{fill:#59636e}.w{fill:#fff}
.b{fill:none;stroke:#59636e;stroke-width:1.5}.h{stroke-dasharray:5 4}
.y{fill:#2a9d5c}.n{fill:#d1453b}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.q{fill:#9aa4af}.b{stroke:#9aa4af}.w{fill:#fff}}
"""


def picture() -> str:
    """The phenomenon as SVG: both hops known, the question failed; and how often."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))["value"]
    subject, first, second = SHOWN
    question, bridge, answer, said, right = next(q for q in found["questions"] if subject in q[0])
    assert answer == right != said
    passed, failed = found["gap"]["passed"], found["gap"]["failed"]
    cut = round(700 * passed / (passed + failed))
    share = f"{failed / (passed + failed):.0%}"

    def box(x: int, text: str, kind: str = "") -> str:
        return (
            f'<rect class="b {kind}" x="{x}" y="16" width="110" height="40" rx="8"/>'
            f'<text x="{x + 55}" y="41" text-anchor="middle">{text}</text>'
        )

    def arrow(x: int, text: str) -> str:
        return (
            f'<path class="b" d="M{x} 36h173m-8 -5l8 5l-8 5"/>'
            f'<text class="s" x="{x + 86}" y="28" text-anchor="middle">{text} '
            '<tspan class="y">✓ known</tspan></text>'
        )

    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 208" role="img">
<title>A model that knows both hops fails the two-hop question</title>
<style>{STYLE}</style>
{box(10, subject)}{arrow(126, first)}{box(305, bridge, "h")}{arrow(421, second)}{box(600, answer)}
<text class="s q" x="360" y="74" text-anchor="middle">the bridge: not in the prompt</text>
<text x="10" y="112">“{question} ___”</text>
<text x="710" y="112" text-anchor="end">{said} <tspan class="n">✗</tspan></text>
<rect class="y" x="10" y="140" width="{cut}" height="30" rx="4"/>
<rect class="n" x="{12 + cut}" y="140" width="{698 - cut}" height="30" rx="4"/>
<text class="w" x="22" y="160">answered</text>
<text class="w" x="{24 + cut}" y="160">failed: {share}</text>
<text class="s q" x="10" y="192">SmolLM2-135M, the {passed + failed} of {found["gap"]["forms"]["prefix"]["first"]["n"]:,} real two-hop questions of which it knows both hops</text>
</svg>
"""


if __name__ == "__main__":
    IMAGE.write_text(picture(), encoding="utf-8")
