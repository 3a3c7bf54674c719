"""Adds files outside docs/ to the site: notebooks as pages, others as links."""

import html as entities
import os
import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
# The weights of pages in the search: names of norms lead to the reference, and other words to a
# guide rather than to the pages that mention everything. tests_site has the queries. (The tags of a
# page, in its first lines, outweigh all titles.)
BOOSTS = {
    "api/functions": 50,
    "api/linen": 40,
    "api/nnx": 40,
    "api/interop": 0.5,
    "migration.md": 2,
    "faq.md": 0.5,
    "errors.md": 0.5,
    "notebooks/": 0.2,
    "benchmarks": 0.2,
    "interop_zoo": 0.2,
    "changelog": 0.1,
}


def on_config(config):
    """Makes `mkdocs serve` rebuild the site when a notebook changes."""
    config.watch.append(str(NOTEBOOKS))
    return config


@event_priority(100)  # before mkdocs-jupyter, which makes them pages
def on_files(files, config):
    """Adds notebooks/*.ipynb as if they were in docs/."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        name = f"notebooks/{path.name}"
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns relative links to files outside docs/ into links to notebooks and the repository."""
    for start, boost in BOOSTS.items():
        if page.file.src_uri.startswith(start):
            page.meta.setdefault("search", {"boost": boost})
    if page.file.src_uri == "changelog.md":
        return markdown
    folder = pathlib.PurePosixPath("docs", page.file.src_uri).parent

    def link(found):
        path = os.path.normpath(folder / found["path"])
        rest = found["rest"] or ""
        if path.startswith("docs/"):
            return found[0]
        if files.get_file_from_path(path):  # a notebook, which is a page
            return f"]({os.path.relpath(path, folder.relative_to('docs'))}{rest})"
        return f"]({_on_github(config, path)}{rest})"

    return re.sub(r"\]\((?P<path>\.\./[^)#\s]+)(?P<rest>#[^)\s]*)?\)", link, markdown)


def on_page_content(html, page, config, files):
    """Turns links of notebooks into docs/ into links to pages, and formulas into MathML."""
    if page.file.src_uri.startswith("api/"):
        # The search splits GroupNorm and group_norm into words; this makes it find groupnorm, too.
        return re.sub(r'<h2 id="[\w.]*?(\w+)".*?</h2>', _findable, html, flags=re.S)
    if not page.file.src_uri.startswith("notebooks/"):
        return html

    def link(found):
        path = os.path.normpath(os.path.join("notebooks", found["path"]))
        inside = files.get_file_from_path(path.removeprefix("docs/"))
        if inside is not None:
            url = inside.url_relative_to(page.file)
        elif (ROOT / path).exists():
            url = _on_github(config, path)
        else:
            return found[0]
        return f'href="{url}{found["rest"] or ""}"'

    html = re.sub(r'href="(?P<path>[^":#?]+)(?P<rest>#[^"]*)?"', link, html)
    code = r"(<(pre|code|script|style)\b.*?</\2>|<div [^>]*clipboard-copy-txt.*?</div>)"
    text = code + r"|\$\$(?P<block>[^$]+)\$\$|\$(?P<inline>[^$\n]+)\$"
    return re.sub(text, _formula, html, flags=re.S)


def _findable(found):
    """Adds the name of a function or class in one word, for the search only."""
    return f"{found[0]}<p hidden>{found[1].replace('_', '').lower()}</p>"


def _formula(found):
    if found["block"]:
        return convert(entities.unescape(found["block"]), display="block")
    return convert(entities.unescape(found["inline"])) if found["inline"] else found[0]


def _on_github(config, path):
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"a page links to {path}, which does not exist")
    return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}"
