"""What MkDocs does beside rendering the pages of this folder; mkdocs.yml names this file.

Pages link to files of the repository by relative paths, as they do where the repository is browsed. In the
site every file that is linked becomes a page of its own under repository/, and a missing one ends the build.
The pages of the Python API are made from the package's folders, and MathJax comes from a PyPI package.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGE = ROOT / "megatron_vespo"
ASSETS = "repository"  # the site's folder of repository files
IMAGES = {".png", ".svg"}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()([^()\s]+)(\))")
FENCE = re.compile(r"(^ *(?:```|~~~).*?^ *(?:```|~~~) *$|`[^`\n]+`)", re.M | re.S)
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".toml": "toml", ".diff": "diff"}


def links(markdown: str) -> Iterator[str]:
    """Targets of links and images, code left out."""
    for part in FENCE.split(markdown)[::2]:
        yield from (match[2] for match in LINK.finditer(part))


def resolve(source: str, target: str) -> tuple[str, str] | None:
    """(path in the repository, anchor) of a relative link of file `source`; None for one that leaves it."""
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source, anchor


def site_path(path: str) -> str:
    """Where MkDocs has a file of the repository: pages of this folder as they are, all others as pages."""
    if path.startswith("docs/") and path.endswith((".md", *IMAGES)):
        return path.removeprefix("docs/")
    name = f"{ASSETS}/{path}"
    return name if Path(path).suffix in {".md", *IMAGES} else f"{name}.md"


def rewritten(source: str, markdown: str) -> str:
    """The page with links as MkDocs wants them: relative to the page's own place in the site."""
    here = posixpath.dirname(site_path(source))

    def replace(match: re.Match[str]) -> str:
        found = resolve(source, match[2])
        if found is None or match[2].startswith("#"):
            return match[0]
        path, anchor = found
        target = posixpath.relpath(site_path(folder_page(path)), here or ".")
        return f"{match[1]}{target}{'#' * bool(anchor)}{anchor}{match[3]}"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(replace, part) for part in parts[::2]]
    return "".join(parts)


def folder_page(path: str) -> str:
    """A folder stands for its README.md where it has one."""
    readme = posixpath.join(path, "README.md")
    return readme if (ROOT / path).is_dir() and (ROOT / readme).is_file() else path


def linked_files(pages: dict[str, str]) -> dict[str, Path]:
    """Every file and folder of the repository that `pages`, by path, link to; also what those link to."""
    found: dict[str, Path] = {}
    waiting = list(pages.items())
    while waiting:
        source, markdown = waiting.pop()
        for target in links(markdown):
            path = resolve(source, target)
            if path is None or path[0] in found or path[0] in pages:
                continue
            name = folder_page(path[0])
            file = ROOT / name
            if name.startswith("..") or not file.exists():
                raise FileNotFoundError(f"{source}: the link {target} leads to no file of the repository")
            if name in pages or name in found:
                continue
            found[name] = file
            if file.suffix == ".md":
                waiting.append((name, file.read_text()))
    return found


def as_page(name: str, file: Path) -> str:
    """The Markdown that shows a file or a folder."""
    if file.suffix == ".md":
        text = file.read_text()
        return text if text.startswith("# ") else f"# {name}\n\n{text}"
    title = f"# {name}\n\n"
    if file.is_dir():
        listed = subprocess.run(
            ["git", "ls-files", "--", name], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.split() or sorted(str(path.relative_to(ROOT)) for path in file.rglob("*") if path.is_file())
        return title + "".join(f"* `{path}`\n" for path in listed)
    return f"{title}~~~~ {{ .{LANGUAGES.get(file.suffix, 'text')} }}\n{file.read_text().rstrip()}\n~~~~\n"


def api_pages() -> dict[str, str]:
    """The reference of the Python API, a page for each room of the package."""
    pages = {}
    for room in sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()):
        text = [f"# {room.name}\n", f"::: megatron_vespo.{room.name}\n"]
        modules = sorted(path for path in room.rglob("*.py") if path.stem != "__init__")
        for module in modules:
            text.append(f"::: {'.'.join(module.relative_to(ROOT).with_suffix('').parts)}\n")
        pages[f"reference/api/{room.name}.md"] = "\n".join(text)
    pages["reference/api/types.md"] = "# types\n\n::: megatron_vespo.types\n"
    listed = "".join(f"* [{Path(page).stem}]({Path(page).name})\n" for page in sorted(pages))
    pages["reference/api/index.md"] = (
        "# Python API\n\nFrom the docstrings of the package, a page for each room. "
        "[Architecture](../../architecture.md) says what the rooms are for. Names without an underscore are "
        "for the other rooms. The command line is the stable interface; before version 1 a Python name may "
        f"change with any minor version.\n\n{listed}"
    )
    return pages


# what MkDocs calls


def on_files(files, config):
    from mkdocs.structure.files import File, Files

    def add(uri: str, **source) -> None:
        files.append(File.generated(config, uri, **source))

    written = files.documentation_pages()
    pages = {f"docs/{file.src_uri}": Path(file.abs_src_path).read_text() for file in written}
    for uri, text in api_pages().items():
        add(uri, content=f"---\nsearch:\n  boost: 0.02\n---\n\n{text}")  # the guides come first
        pages[f"docs/{uri}"] = ""
    for name, file in linked_files(pages).items():
        if file.suffix in IMAGES:
            add(site_path(name), abs_src_path=str(file))
        else:
            text = as_page(name, file)
            add(site_path(name), content="---\nsearch:\n  exclude: true\n---\n\n" + rewritten(name, text))
    add("assets/mathjax/tex-svg.js", abs_src_path=str(_mathjax()))
    assert isinstance(files, Files)
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    if page.file.generated_by:
        return markdown
    return rewritten(f"docs/{page.file.src_uri}", markdown)


def _mathjax() -> Path:
    from importlib.metadata import files

    [script] = [path for path in files("django-static-mathjax") or () if path.match("mathjax/es5/tex-svg.js")]
    return Path(script.locate())
