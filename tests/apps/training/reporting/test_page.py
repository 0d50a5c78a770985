"""report.html: self-contained, escaped, and complete."""

import re
from html.parser import HTMLParser

from apps.training.reporting.page import Report, render
from apps.training.reporting.records import Evaluation, StepRecord

STEPS = [
    StepRecord(
        step=i, epoch=1, loss=9.0 / i, lr=1e-3 / i, num_tokens=100, num_counted=90, seconds=0.1 * i, grad_norm=None
    )
    for i in range(1, 30)
]


def page(**changes: object) -> str:
    report = {
        "title": "demo",
        "subtitle": "a run",
        "facts": {"parameters": "6.1M"},
        "steps": STEPS,
        "evaluations": [Evaluation(29, 0.5, 10)],
        "settings": "command: run",
        "routed_table": "* dense",
        "sample": ("if a < b:", "\n    return <c> & 'd'"),
        "unigram_entropy": 6.0,
    }
    return render(Report(**(report | changes)))


def test_it_loads_nothing_from_anywhere() -> None:
    class Links(HTMLParser):
        found: list[tuple[str, str]] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [(tag, name) for name, _ in attrs if name in ("src", "href", "srcset", "data")]
            assert tag not in ("script", "link", "iframe", "img")

    Links().feed(page())
    assert Links.found == []
    assert "://" not in page()
    assert "url(" not in page()


def test_it_shows_charts_sample_settings_and_routing_escaped() -> None:
    text = page()
    assert text.count("<svg") == 3
    assert "if a &lt; b:</span>\n    return &lt;c&gt; &amp; &#x27;d&#x27;" in text
    assert "command: run" in text
    assert "* dense" in text
    assert "unigram entropy" in text
    assert "prefers-color-scheme: dark" in text


def test_a_run_without_sample_evaluation_or_steps_still_makes_a_page() -> None:
    text = page(sample=None, evaluations=[], steps=[], unigram_entropy=None)
    assert "Sample text" not in text
    assert "<svg" not in text
    assert re.search(r"<h1>demo</h1>", text)
