"""A hook of MkDocs: links to files of the repository outside docs/.

They lead to the repository where its address is known (`REPOSITORY`, as CI sets it), else they are
plain text. In both cases the file must be there.
"""

from __future__ import annotations

import logging
import os
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
log = logging.getLogger("mkdocs.hooks.links")  # --strict counts its warnings


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.groups("")
        if not (ROOT / path).exists():
            log.warning("%s: no file %s in the repository", page.file.src_uri, path)
        repository = os.environ.get("REPOSITORY")
        return f"[{text}]({repository}/blob/main/{path}{anchor})" if repository else text

    return re.sub(r"\[([^]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)", link, markdown)
