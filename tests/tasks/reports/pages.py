"""Reading a page as a browser does."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects what a browser would load, the text, and whether every element is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def section(html: str, heading: str) -> str:
    """What stands under a heading."""
    return html.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]
