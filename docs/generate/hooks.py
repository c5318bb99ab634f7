"""What MkDocs is told besides its pages: those that lie elsewhere in the repository, figures and tables, links.

Pages link to each other and to other files as they lie in the repository, so that links work there, too. In the site
they lead to the page, or to a copy of the file.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import figures  # noqa: E402
import tables  # noqa: E402

# Pages of the site by files of the repository outside docs/.
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_ORIGIN = {page: source for source, page in ELSEWHERE.items()}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_NO_DESCRIPTION = re.compile(r"–(?=\s*<div class=\"doc-md-description\">\s*</div>)")
_TABLE = re.compile(r"^<!-- table: (\w+)(.*) -->$", re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    drawn = ROOT / "build" / "figures"
    for path in figures.draw(drawn):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    measured = {str(path.relative_to(ROOT)) for path in tables.RESULTS.glob("*.json")}
    for source in sorted(measured.union(*map(_linked, files.documentation_pages()))):
        files.append(File.generated(config, _copy(source), abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    origin = _origin(page.file.src_uri)

    def there(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if (ROOT / path).is_dir():
            return text
        if not (ROOT / path).is_file():
            return link[0]  # a page or figure of the site itself, or for MkDocs to complain of
        found = ELSEWHERE.get(path) or (path.removeprefix("docs/") if _is_page(path) else _copy(path))
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return _LINK.sub(there, _TABLE.sub(lambda marker: getattr(tables, marker[1])(*marker[2].split()), markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A dash only before what a docstring says of a parameter or result, not after its type alone."""
    return _NO_DESCRIPTION.sub("", html)


def _origin(page: str) -> str:
    """The file of the repository that a page is."""
    return _ORIGIN.get(page, f"docs/{page}")


def _is_page(path: str) -> bool:
    return path.startswith("docs/") and path.endswith(".md")


def _copy(path: str) -> str:
    """Where the site has a file of the repository: as text, which browsers show."""
    return f"repository/{path}" if path.endswith((".json", ".png")) else f"repository/{path}.txt"


def _linked(file: File) -> set[str]:
    """The files of the repository that a page links to and that are no pages."""
    folder = posixpath.dirname(_origin(file.src_uri))
    targets = (link[2] for link in _LINK.finditer(file.content_string))
    paths = {posixpath.normpath(posixpath.join(folder, target)) for target in targets}
    return {path for path in paths if path not in ELSEWHERE and not _is_page(path) and (ROOT / path).is_file()}
