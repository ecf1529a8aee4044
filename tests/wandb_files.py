"""The records in W&B's own files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def sent(folder: Path) -> list[dict[str, Any]]:
    """The records in the W&B files of `folder`.

    Such a file is a LevelDB log of protobuf records: a header of 7 bytes, then blocks of 32 KiB that hold fragments.
    Each begins with a checksum (4 bytes), a length (2) and a kind (1 whole, 2 first, 3 middle, 4 last).
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    wandb.teardown()  # finish() returns a moment before its file is written
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        raw, at, data = file.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if 32768 - at % 32768 < 7:  # a header does not fit into the rest of the block
                at += 32768 - at % 32768
            length, kind = struct.unpack_from("<4xHB", raw, at)
            data, at = data + raw[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):
                history, data = Record.FromString(data).history.item, b""
                if history:
                    named = [(".".join(item.nested_key) or item.key, item.value_json) for item in history]
                    found.append({name: json.loads(value) for name, value in named})
    return found
