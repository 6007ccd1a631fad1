"""What the site needs beyond the pages in this folder; mkdocs calls these functions.

The pages are written so that they can be read in the repository too: links go to files outside of
this folder, formulas stand between dollars. Here both are made fit for the site. Pages that have
their source elsewhere are put together: the benchmarks and the list of changes.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
IMAGES = "benchmarks/results"

# Where a link to a file outside of docs/ leads on the site, by its path from the root.
TARGETS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}

# Where each name of the API is described, as the pages in api/ name it.
ENTRIES = "\n".join(page.read_text() for page in sorted(Path(__file__).parent.glob("api/*.md")))
API = {
    identifier.rpartition(".")[2]: identifier
    for identifier in re.findall(r"^::: ([\w.]+)$", ENTRIES, re.MULTILINE)
}


def section(text, title):
    """One section of a Markdown page, its heading included."""
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section {title!r}, which docs/hooks.py looks for.")
    return found[0]


def from_root(text):
    """Links of a file in the root of the repository, as those of a page in docs/."""
    text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", text)
    return text.replace("](docs/", "](")


def benchmarks():
    """The page of benchmarks: the results in README.md and the README of the folder."""
    results = from_root(section((ROOT / "README.md").read_text(), "Results"))
    results = results.replace('"Where we differ"', "[Differences](differences.md)")
    how = (ROOT / "benchmarks" / "README.md").read_text()
    fence = r"^(```.*?^```$)"
    parts = re.split(fence, how, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"^(#+ )", r"#\1", part, flags=re.MULTILINE) for part in parts[::2]]
    return f"# Benchmarks\n\n{results}\n{''.join(parts)}"


def on_files(files, config):
    """Adds the pages made here, and the figures that pages show."""
    pages = {
        "benchmarks.md": benchmarks(),
        "changelog.md": from_root((ROOT / "CHANGELOG.md").read_text()),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for image in sorted((ROOT / IMAGES).glob("*.png")):
        files.append(File.generated(config, f"{IMAGES}/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files outside of docs/, and the language of examples with prompts."""

    def target(link):
        path, hash_, anchor = link[1].partition("#")
        return f"]({TARGETS.get(path, path)}{hash_}{anchor})"

    if "/" not in page.file.src_uri:
        markdown = re.sub(r"\]\(\.\./([^)]+)\)", target, markdown)
    return re.sub(r"^```python\n(?=>>> )", "```pycon\n", markdown, flags=re.MULTILINE)


def on_page_content(content, page, config, files):
    """Formulas as MathML, links in docstrings as links, names of the API as references."""
    content = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        formula,
        content,
        flags=re.DOTALL,
    )
    # In a table \\| stands for |, which Markdown does not undo in code.
    content = re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace("\\|", "|"), content)
    if page.file.src_uri.startswith("api/"):
        content = re.sub(
            r"<code>([^<]*?)\s&lt;(https?://[^&]+)&gt;</code>_", r'<a href="\2">\1</a>', content
        )
        content = re.sub(rf"<code>({'|'.join(API)})</code>", reference, content)
    return content


def reference(match):
    """A name of the API in code, as a reference to where it is described."""
    return f'<autoref identifier="{API[match[1]]}">{match[0]}</autoref>'


def formula(match):
    """One formula of LaTeX as MathML, which browsers show without a script."""
    display = "inline" if match[1] == "span" else "block"
    mathml = convert(html.unescape(match[2]).strip(), display=display)
    return f'<{match[1]} class="formula">{mathml}</{match[1]}>'
