"""Helpers for the tests of releases: an exported folder that is ready for release, and changes to it."""

import json

from checkpoints.export import export
from moonlight.files import SUMS_FILE, VERIFICATION_FILE, sha256_checksum, write_json, write_sums

OWNER = "moon"
REPO = "moon/tiny"
TOKEN = "hf_aVeryUnlikelyToken0123456789"
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n# Tiny\n"


def make_ready(run_folder, out):
    """Export a run in several shards, with all files that a release needs."""
    export(run_folder, out, max_shard_bytes=200_000, license="apache-2.0")
    seal(out)


def seal(folder):
    """Write the checksums of a folder, and a passed verification of them."""
    write_sums(folder)
    write_json(folder / VERIFICATION_FILE, {"passed": True, "sums_sha256": sha256_checksum(folder / SUMS_FILE)})


def set_revision_step(folder, step):
    content = json.loads((folder / "export.json").read_text())
    content["made_from"]["revision_step"] = step
    write_json(folder / "export.json", content)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))
