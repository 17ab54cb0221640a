"""A report as the tests read it: elements that nest, and what stands in them."""

from html.parser import HTMLParser

from dualray.platform.metrics_log import MetricsLog
from dualray.platform.report import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.captions: list[str] = []
        self.tiles: dict[str, str] = {}
        self._title = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        within = self.open[-1] if self.open else ""
        if within in ("style", "script") or not data.strip():
            return
        self.words.append(data.strip())
        if within == "h2":
            self.headings.append(data)
        if within == "figcaption":
            self.captions.append(data)
        if "section" not in self.open and within == "span":
            self._title = data
        if "section" not in self.open and within == "b":
            self.tiles[self._title] = data


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def bare_run(folder, steps=(), text=""):
    folder.mkdir()
    (folder / "run.yaml").write_text(text)
    with MetricsLog.create(folder / "metrics.jsonl") as log:
        for step in steps:
            log.append(step)
    return folder
