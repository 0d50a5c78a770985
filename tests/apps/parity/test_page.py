"""parity.html: self-contained, escaped, and complete."""

from html.parser import HTMLParser

from apps.parity.page import ParityPage, render
from tests.apps.parity.found import layer, variant


def page() -> str:
    layers = [layer(f"layers.{block}.up_proj", 0.1 * (1 + block)) for block in range(3)]
    others = [variant("a <b>", *layers), variant("c", *layers)]
    return render(ParityPage("demo & co", "data", {"device": "CPU"}, variant("dense"), others, "seed: 42"))


def test_it_loads_nothing_from_anywhere_and_closes_what_it_opens() -> None:
    class Tags(HTMLParser):
        opened: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe", "img")
            assert not {name for name, _ in attrs} & {"src", "href", "srcset", "data"}
            if tag != "meta":
                self.opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.opened.pop() == tag

    tags = Tags()
    tags.feed(page())
    assert tags.opened == []
    assert "://" not in page()
    assert "url(" not in page()


def test_it_shows_tables_charts_every_layer_routing_and_settings_escaped() -> None:
    text = page()
    assert "<b>" not in text.replace("<b>CPU</b>", "")
    assert "a &lt;b&gt;" in text
    assert text.count("<svg") == text.count("Nothing to compare.") == 2  # outputs, and gradients
    assert text.count('<td class="text">layers.2.up_proj</td>') == 2
    assert "the table of dense" in text
    assert "seed: 42" in text
    assert "demo &amp; co" in text
