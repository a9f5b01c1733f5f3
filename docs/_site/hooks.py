"""Pages of the site that are no files of docs/: README and its like, notebooks, and the reference.

A link between files of the repository works in both places: on the site it leads to the page of that file, or to a
copy of the file where it has no page.
"""

import ast
import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[2]

# Files of the repository that are pages, by their place on the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/emoji/README.md": "emoji.md",
}

LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def public_names(path: Path) -> list[str]:
    """`__all__` of a module, read without importing it; empty where there is none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def modules() -> dict[str, list[str]]:
    """The modules that define public names, by their dotted names; packages that re-export are left out."""
    found = {}
    for path in sorted((ROOT / "coop_hf").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py" and not path.name.startswith("_") and public_names(path):
            found[name] = public_names(path)
    return found


def rooms() -> dict[str, list[str]]:
    """Pages of the reference: a room of the package, or all single modules together, and its modules."""
    pages: dict[str, list[str]] = {}
    for name in modules():
        parts = name.split(".")
        pages.setdefault(parts[1] if len(parts) > 2 else "coop_hf", []).append(name)
    return dict(sorted(pages.items(), key=lambda item: (item[0] != "coop_hf", item[0])))


def top_level() -> dict[str, str]:
    """Every name of `coop_hf.__all__` and the module that defines it."""
    defined = {name: module for module, names in modules().items() for name in names}
    names = public_names(ROOT / "coop_hf" / "__init__.py")
    return {name: defined[name] for name in names if not name.startswith("_")}


def reference() -> dict[str, str]:
    """The reference's pages and their Markdown; what stands in them is read from the source by mkdocstrings."""
    lines = ["# API reference", "", "`from coop_hf import ...`; each name leads to its page.", "", "| name | from |"]
    lines += ["|---|---|", *(f"| [`{n}`][{m}.{n}] | `{m}` |" for n, m in sorted(top_level().items())), ""]
    pages = {"reference/index.md": "\n".join(lines)}
    for room, names in rooms().items():
        title = "coop_hf" if room == "coop_hf" else f"coop_hf.{room}"
        pages[f"reference/{room}.md"] = "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"
    return pages


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text and its code, in order."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"]).strip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            parts.append("```\n" + "".join(output.get("text", [])).rstrip() + "\n```")
    here = os.path.relpath(path, ROOT / "docs")
    return "\n\n".join([*parts, f"This page is the notebook [{path.name}]({Path(here).name}).", ""])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the reference into the navigation, and pages that it does not name yet."""
    named = set(re.findall(r"[\w/.-]+\.md", json.dumps(config.nav)))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    unnamed = sorted(page for page in pages - named if not page.startswith(("results/", "_site/")))
    if unnamed:
        config.nav.append({"More": unnamed})
    config.nav.append({"Reference": list(reference())})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files of docs/, and copies of the files that pages link to."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    for place, text in reference().items():
        files.append(File.generated(config, place, content=text))
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(page.content_string):
            path = linked_file(page.src_uri, target)
            if path is not None and place_of(path) not in files.src_uris and (ROOT / path).is_file():
                files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between places on the site."""

    def moved(match: re.Match) -> str:
        path = linked_file(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        place = place_of(path)
        here = os.path.dirname(page.file.src_uri)
        return f"{match[1]}{os.path.relpath(place, here or '.')}{match[3]}"

    return LINK.sub(moved, markdown)


def linked_file(place: str, target: str) -> str | None:
    """The file of the repository that a page's link means: relative to where the page's source is."""
    if target.startswith(("http://", "https://", "mailto:")) or place.startswith("reference/"):
        return None
    source = next((s for s, p in PAGES.items() if p == place), f"docs/{place}")
    path = os.path.normpath(os.path.join(os.path.dirname(source), target))
    if (ROOT / path).is_dir():
        path = os.path.join(path, "README.md")
    return path


def place_of(path: str) -> str:
    """Where on the site a file of the repository is."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path.removesuffix('.md')}"
