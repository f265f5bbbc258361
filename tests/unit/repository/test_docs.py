"""The documentation says what the code does: generated pages, metrics, alarms, exit codes, flags, links."""

import ast
import functools
import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from megatron_vespo.algorithms.alarms import RULES
from megatron_vespo.commands import endings
from megatron_vespo.models.parameter_groups import GRADIENT_GROUPS
from megatron_vespo.system import preemption

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = [page for page in LISTED if page != "CHANGELOG.md" and (ROOT / page).is_file()]
# flags that pages show and no parser has: read before parsing, or of other programs
FOREIGN = {
    "--recipe", "--help-megatron",
    "--check", "--directory", "--fast", "--serve",
    "--custom-weight-loader", "--dist-timeout", "--mem-fraction-static", "--watchdog-timeout",
    "--weight-version",
    "--constraint", "--exclusive", "--export", "--gres", "--het-group", "--mem", "--ntasks-per-node",
    "--requeue", "--signal",
    "--test-only",
    "--head", "--include-dashboard", "--local-dir", "--no-build-isolation", "--repo-type", "--resources",
}  # fmt: skip
KINDS = (
    "reward rollout response staleness mismatch loss train policy budget eval check ratio kl weight engines "
    "checkpoint sync"
).split()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


def read(page: str) -> str:
    return (ROOT / page).read_text()


def rows(page: str) -> list[list[str]]:
    """Cells of the lines of all tables."""
    lines = [line for line in read(page).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@functools.cache
def generate() -> ModuleType:
    return load("generate")


@functools.cache
def known_flags() -> frozenset[str]:
    from megatron_vespo.arguments.parse import full_parser

    parsers = [*generate().all_parsers().values(), full_parser()]
    return frozenset(flag for parser in parsers for flag in parser._option_string_actions)


def test_the_page_of_flags_is_what_the_parsers_say():
    assert generate().PAGE.read_text() == generate().page(), "run .venv/bin/python docs/generate.py"


def test_the_generator_notices_another_default(monkeypatch, tmp_path, capsys):
    page = tmp_path / "flags.md"
    page.write_text(generate().PAGE.read_text().replace("`8192`", "`8193`"))
    monkeypatch.setattr(generate(), "PAGE", page)
    assert generate().main(["--check"]) == 1 and "docs/generate.py" in capsys.readouterr().err
    assert generate().main([]) == 0 and generate().main(["--check"]) == 0


def test_every_command_is_named_on_the_first_page():
    from megatron_vespo.commands.main import COMMANDS

    table = read("docs/index.md").partition("## Commands")[2]
    assert all(f"`{command}`" in table for command in COMMANDS)


def metric_names() -> set[str]:
    """Names of metrics in the package's source; what a formatted string puts in is `*`."""
    texts = []
    for path in (ROOT / "megatron_vespo").rglob("*.py"):
        tree = ast.parse(path.read_text())
        formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        inside = {id(part) for node in formatted for part in node.values}
        for node in formatted:
            parts = (part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
            texts.append("".join(parts))
        texts += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside
        ]
    return {text for text in texts if re.fullmatch(rf"(?:{'|'.join(KINDS)})/[\w*/]*[a-z0-9*]", text)}


def test_every_metric_is_explained():
    told = re.findall(r"`([a-z]+/[^`]+)`", read("docs/reference/metrics.md"))
    names = metric_names()
    assert len(names) > 70 and {"reward/mean", "staleness/share/*"} <= names
    missing = set()
    for name in names - {"staleness/taken_groups"}:  # which is taken out before it is written
        written = re.compile(re.escape(name).replace(r"\*", ".*"))  # as the code puts it together
        if not any(written.fullmatch(re.sub(r"<\w+>", "x", page)) for page in told) and not any(
            re.fullmatch(re.sub(r"<\w+>", r"[\\w*/-]+", page), name) for page in told
        ):
            missing.add(name)
    assert not missing


def test_every_part_of_the_gradient_is_named():
    page = read("docs/reference/metrics.md")
    assert all(f"`{group}`" in page for group in GRADIENT_GROUPS)


def test_every_alarm_is_explained_and_no_other():
    told = [cells[0].strip("`") for cells in rows("docs/reference/alarms.md")[2:]]
    assert told == [rule.__name__ for rule in RULES]


def test_every_exit_code_is_explained_and_no_other():
    told = {int(cells[0]) for cells in rows("docs/reference/exit-codes.md")[2:]}
    values = [
        value
        for module in (endings, preemption)
        for name, value in vars(module).items()
        if name.startswith("EXIT_")
    ]
    assert told == {0, *values}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    generated = {f"docs/{name}" for name in hooks.api_pages()}
    for target in hooks.links(read(page)):
        found = hooks.resolve(page, target)
        if found is None:
            continue
        path, anchor = found
        assert path in generated or (ROOT / path).exists(), target
        if anchor and path.endswith(".md"):
            assert anchor in anchors(read(path)), target


def anchors(markdown: str) -> set[str]:
    """As MkDocs and GitHub make them of headings, and those that are given."""
    found = set()
    for heading in re.findall(
        r"^#{1,6} (.+)$", hooks.FENCE.sub(lambda match: match[0].strip("`"), markdown), re.M
    ):
        given = re.search(r"\{ #([\w-]+) \}$", heading)
        text = re.sub(r"[^\w\s-]", "", heading.lower())
        found.add(given[1] if given else re.sub(r"\s+", "-", text.strip()))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("tests/")])
def test_flags_on_pages_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", read(page)))
    unknown = {flag for flag in named - known_flags() - FOREIGN if not flag.startswith("--sglang")}
    assert not unknown


def test_the_readme_is_short_and_says_first_what_has_not_run_on_gpus():
    lines = read("README.md").splitlines()
    assert len(lines) < 150
    assert "has run on a GPU" in " ".join(lines[:10])


def test_links_between_pages_and_files_are_rewritten():
    text = (
        "See [a](../concepts.md#time), [b](../../LICENSE), ![c](../../examples/tiny/curves.png) and `[d](e)`."
    )
    assert hooks.rewritten("docs/guides/x.md", text) == (
        "See [a](../concepts.md#time), [b](../repository/LICENSE.md), "
        "![c](../repository/examples/tiny/curves.png) and `[d](e)`."
    )
    assert hooks.rewritten("tests/README.md", "[a](gpu) [b](../docs/index.md)") == (
        "[a](gpu/README.md) [b](../../index.md)"
    )


def test_a_link_to_no_file_is_an_error():
    with pytest.raises(FileNotFoundError, match="docs/x.md: the link ../missing.py"):
        hooks.linked_files({"docs/x.md": "[a](../missing.py)"})


def site(folder: Path, body: str) -> list[str]:
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other/page.html").write_text('<h1 id="top">x</h1>')
    (folder / "index.html").write_text(body)
    return load("check_site").faults(folder)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="other/page.html#top">x</a><a href="https://example.org/">y</a>', None),
        ('<a href="other/nothing.html">x</a>', "index.html: other/nothing.html leads to no file"),
        ('<a href="other/page.html#end">x</a>', "index.html: other/page.html#end leads to no element"),
        ('<a href="#here">x</a>', "index.html: #here leads to no element"),
        ('<img src="missing.png">', "index.html: missing.png leads to no file"),
        ('<script src="https://example.org/a.js"></script>', "index.html: loads https://example.org/a.js"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "index.html: loads //example.org/a.css"),
    ],
)
def test_the_built_site_is_checked(tmp_path, body, fault):
    assert site(tmp_path, body) == ([fault] if fault else [])


def test_requirements_name_one_version_each_and_no_host():
    lines = [line.split("#")[0].strip() for line in read("docs/requirements.txt").splitlines()]
    lines = [line for line in lines if line]
    assert len(lines) > 20 and all(re.fullmatch(r"[a-z0-9._-]+==[\w.]+", line) for line in lines)
