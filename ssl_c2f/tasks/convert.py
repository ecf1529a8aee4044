"""`ssl_c2f convert`: weights that others published, as a checkpoint folder of ours.

OUT/
  checkpoints/step-00000000/    model.safetensors and state.json, which --ckpt OUT finds
  transfer.json                 what became of each tensor
  NOTICE                        whose weights these are, and their licence
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ssl_c2f.core import checkpoint
from ssl_c2f.core.files import new_folder, write_json, write_text
from ssl_c2f.train.weights import ImportOptions, import_published

_LINKS = {
    "CC-BY-NC-4.0": "https://creativecommons.org/licenses/by-nc/4.0/legalcode",
    "BSD-3-Clause": "https://opensource.org/license/bsd-3-clause",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
}


def convert(file: Path, out: Path, options: ImportOptions) -> Path:
    """Write the checkpoint folder of a published file (or folder of transformers'), say what was done, return `out`.

    Raises:
        UserError: `out` holds something, or what `import_published` refuses.
    """
    with new_folder(out) as folder:
        weights, report = import_published(file, options)
        for line in weights.notes:
            print(line)
        checkpoint.save(folder / "checkpoints", 0, {"model": weights.tensors}, weights.to_json(), None, keep=1)
        write_json(folder / "transfer.json", {"from": weights.origin, **report.to_dict()})
        write_text(folder / "NOTICE", notice(weights.source))
    print(out)
    return out


def notice(source: Mapping[str, str]) -> str:
    """Whose weights these are, and on what terms; empty where they are one's own."""
    if not source:
        return ""
    licence = source["licence"].lower()
    link = next((link for name, link in _LINKS.items() if licence.startswith(name.lower())), "see there")
    return (
        f"These weights derive from {source['kind']} weights ({source['file']}) that others published:\n"
        f"  source   {source['url']}\n  licence  {source['licence']}\n  text     {link}\n"
        "They were renamed and rearranged, and may have been trained further. Whoever passes them on keeps this notice "
        "and\nthe terms of that licence; the licence of ssl_c2f itself is about its code alone.\n"
    )
