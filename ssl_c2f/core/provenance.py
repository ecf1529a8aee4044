"""What made a run: code, versions, hardware, and the command, without secrets."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ssl_c2f", "torch", "torchaudio", "timm", "lightly", "numpy")
_NAME = r"[\w.-]*(?:key|token(?!s)|secret|passw|pwd|credential|signature|(?<![a-z])auth(?!or))[\w.-]*"
_SECRET = re.compile(f"(?i)^{_NAME}$")
_SHOWN = (  # what is hidden wherever it stands in a word, and what is shown in its place
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+@"), r"\1***@"),  # https://user:password@host
    (re.compile(r"(://)[^/\s:@]+@"), r"\1***@"),  # https://token@host
    # ?token=..., [token=...], {key: ...}
    (re.compile(rf"""(?i)({_NAME}["']?\s*[=:]\s*["']?)[^\s"'&,;\]}})]+"""), r"\1***"),
    # what is known by its beginning
    (re.compile(r"\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA|wandb_v1_)[\w-]{8,}"), r"\1***"),
)


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """What made a run, as JSON: code, versions, hardware, and the command without secrets; the host is not named."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "started": now(),
        "command": redact(sys.argv if command is None else command),
        "commit": _commit(),
        "versions": versions,
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        },
    }


def redact(command: Sequence[str]) -> list[str]:
    """The command with what looks like a secret hidden: `api_key=***`, `--token ***`, `https://user:***@host`."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = bool(_SECRET.match(name))
        shown.append("***" if hide_next else f"{name}=***" if secret and equals else _without_secrets(word))
        hide_next = secret and not equals and word.startswith("-")
    return shown


def _without_secrets(word: str) -> str:
    for pattern, instead in _SHOWN:
        word = pattern.sub(instead, word)
    return word


def command_line(command: Sequence[str]) -> str:
    """What to type to have a command of a provenance again."""
    path, words = Path(*command[:1]), command[1:]
    own = path.name == "ssl_c2f" or path.parts[-2:] == ("ssl_c2f", "__main__.py")
    return shlex.join(["ssl_c2f", *words] if own else ["python", *command] if command else [])


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty` after changes; None if it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # the repository around a site-packages folder is someone else's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
