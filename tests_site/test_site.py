"""Tests the pages that `make docs` writes: their links, signatures, search and width."""

import functools
import html
import http.server
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import threading
import urllib.parse
from html.parser import HTMLParser

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SITE = ROOT / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))
REPOSITORY = re.compile(r"https://github\.com/jaxnorm/jaxnorm/(?:blob|tree|raw)/main/([^#?]*)")


def test_the_site_was_built():
    names = {page.relative_to(SITE).as_posix() for page in PAGES}
    assert {"index.html", "api/nnx.html", "notebooks/quickstart.html"} <= names, "run `make docs`"


# ---- Links ----


class Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.references = {"", "__tabbed"}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        """Called by HTMLParser for each element."""
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                self.references.append(value)


page_at = functools.cache(Page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(SITE).as_posix())
def test_no_link_is_dead(path):
    dead = [link for link in page_at(path).references if not exists(link, path)]
    assert not dead


def exists(link, page):
    repository = REPOSITORY.match(link)
    if repository:
        return (ROOT / urllib.parse.unquote(repository[1])).exists()
    url = urllib.parse.urlsplit(link)
    if url.scheme or url.netloc:
        return True  # another site
    name = urllib.parse.unquote(url.path)
    # 404.html is served at any address: its links start at the root.
    root = "/jaxnorm/"
    target = SITE / name.removeprefix(root) if name.startswith(root) else page.parent / name
    if not name:
        target = page
    elif name.endswith(("/", ".")):
        target /= "index.html"
    target = pathlib.Path(os.path.normpath(target))
    if not target.is_file() or not target.is_relative_to(SITE):
        return False
    anchor = urllib.parse.unquote(url.fragment)
    return not anchor or target.suffix != ".html" or anchor in page_at(target).anchors


# ---- Signatures ----


def signatures():
    for path in sorted((SITE / "api").glob("*.html")):
        for name, code in re.findall(
            r'<h2 id="([\w.]+)".*?(?=<div class="doc-signature)(.*?)</div>', path.read_text(), re.S
        ):
            yield name, html.unescape(re.sub(r"<[^>]+>", "", code))


def test_signatures_have_the_values_of_defaults():
    shown = dict(signatures())
    assert len(shown) > 60
    for name, code in shown.items():
        assert not re.findall(r"= [A-Z_]*[A-Z]{3,}\b|= _\w+\.", code), name
    nnx = re.sub(r"(\w+): .* = ", r"\1=", shown["jaxnorm.nnx.BatchNorm"])
    assert "momentum=0.1," in nnx
    assert "bias_init=nnx.initializers.zeros_init()," in nnx
    assert "scale_init=nnx.initializers.ones_init()," in nnx
    assert "scale_metadata={}," in nnx
    assert "momentum: float | None = 0.1," in shown["jaxnorm.linen.BatchNorm2d"]  # inherited


# ---- In a browser ----


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """The command that starts Chromium without a window."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    command = os.environ.get("CHROMIUM") or next(filter(shutil.which, names), None)
    if command is None:
        pytest.skip("THE SEARCH AND THE WIDTHS ARE NOT TESTED: there is no Chromium")
    profile = tmp_path_factory.mktemp("profile")
    return [command, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]


# Opens pages one after another in frames, since a window of Chromium cannot be 390 pixels wide.
VISITOR = """<!doctype html><body><script type="module">
const visits = await (await fetch("/visits")).json();
const seen = [];
for (const [page, width] of visits) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  frame.src = page;
  document.body.append(frame);
  await new Promise((resolve) => (frame.onload = resolve));
  const found = () => frame.contentDocument.querySelectorAll(
    ".md-search-result__item:first-child .md-search-result__link");
  // A tenth of a second for the scripts that wrap the tables; ten for the search.
  for (let i = 0; i < 100 && (i == 0 || (page.includes("?q=") && !found().length)); i++)
    await new Promise((resolve) => setTimeout(resolve, 100));
  const { scrollWidth, clientWidth } = frame.contentDocument.documentElement;
  const hits = Array.from(found(), (link) => [
    Number(link.firstElementChild.dataset.mdScore), link.href.slice(location.origin.length + 1)]);
  seen.push({ excess: scrollWidth - clientWidth, hits });
  frame.remove();
}
await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
</script></body>"""


@pytest.fixture(scope="session")
def seen(browser):
    """What there is to see of each page at each width, and of each search."""
    visits = [(f"/{name}", width) for name in NAMES for width in WIDTHS]
    visits += [(f"/index.html?q={urllib.parse.quote(query)}", 1280) for query in FIRST_HITS]
    answers = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            pages = {"/visitor": VISITOR, "/visits": json.dumps(visits)}
            if self.path not in pages:
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(pages[self.path].encode())

        def do_POST(self):
            answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=SITE)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}/visitor"
        with subprocess.Popen([*browser, url], stderr=subprocess.DEVNULL) as process:
            try:
                answer = answers.get(timeout=300)
            finally:
                process.terminate()
                server.shutdown()
    return dict(zip(visits, answer, strict=True))


NAMES = [page.relative_to(SITE).as_posix() for page in PAGES]
WIDTHS = (390, 1280)
# The guides' sections have these words in their titles; docs/site/hooks.py has the weights.
FIRST_HITS = {
    "group norm": "api/functions.html#jaxnorm.group_norm",
    "layer_norm": "api/functions.html#jaxnorm.layer_norm",
    "batch norm": "api/functions.html#jaxnorm.batch_norm",
    "rmsnorm": "api/functions.html#jaxnorm.rms_norm",
    "BatchNorm2d": "api/linen.html#jaxnorm.linen.BatchNorm2d",
    "momentum": "migration.html#momentum",
    "NCHW": "norms.html#other-axes-channels-first-nchw",
    "pmean": "distributed.html#pmap-and-pmean",
    "flatten": "interop.html#flattening-orders",
    "checkpoint": "checkpoints.html",
    "mask": "masks.html",
}


def first(hits):
    """What the key Enter opens: of the first page that was found, the entry that fits best."""
    assert hits, "the search found nothing"
    return re.sub(r"\?h=[^#]*", "", max(hits)[1])


@pytest.mark.parametrize("query", FIRST_HITS)
def test_the_search_finds_the_page_first(query, seen):
    hits = seen[f"/index.html?q={urllib.parse.quote(query)}", 1280]["hits"]
    assert first(hits) == FIRST_HITS[query]


def test_the_search_works_in_pages_that_are_opened_from_files(browser):
    url = f"{SITE.as_uri()}/api/nnx.html?q=group%20norm"
    flags = ["--virtual-time-budget=60000", "--dump-dom"]  # the search is done at the end of them
    done = subprocess.run([*browser, *flags, url], capture_output=True, text=True, timeout=300)
    link = rf'href="{SITE.as_uri()}/([^"]*)" class="md-search-result__link".*?-score="([^"]*)"'
    item = "".join(done.stdout.split("md-search-result__item")[1:2])
    hits = [(float(score), page) for page, score in re.findall(link, item, re.S)]
    assert first(hits) == FIRST_HITS["group norm"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_no_page_is_wider_than_the_window(name, width, seen):
    assert seen[f"/{name}", width]["excess"] == 0
