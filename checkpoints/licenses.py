"""License identifiers of the Hugging Face Hub."""

import difflib
import re

from moonlight.errors import UserError

_IDS = """
    afl-3.0, agpl-3.0, apache-2.0, apple-amlr, apple-ascl, artistic-2.0, bigcode-openrail-m,
    bigscience-bloom-rail-1.0, bigscience-openrail-m, bsd, bsd-2-clause, bsd-3-clause, bsd-3-clause-clear, bsl-1.0,
    c-uda, cc, cc-by-2.0, cc-by-2.5, cc-by-3.0, cc-by-4.0, cc-by-nc-2.0, cc-by-nc-3.0, cc-by-nc-4.0,
    cc-by-nc-nd-3.0, cc-by-nc-nd-4.0, cc-by-nc-sa-2.0, cc-by-nc-sa-3.0, cc-by-nc-sa-4.0, cc-by-nd-4.0, cc-by-sa-3.0,
    cc-by-sa-4.0, cc0-1.0, cdla-permissive-1.0, cdla-permissive-2.0, cdla-sharing-1.0, creativeml-openrail-m,
    deepfloyd-if-license, ecl-2.0, epl-1.0, epl-2.0, etalab-2.0, eupl-1.1, eupl-1.2,
    fair-noncommercial-research-license, gemma, gfdl, gpl, gpl-2.0, gpl-3.0, h-research, intel-research, isc, lgpl,
    lgpl-2.1, lgpl-3.0, lgpl-lr, llama2, llama3, llama3.1, llama3.2, llama3.3, llama4, lppl-1.3c, mit, mpl-2.0,
    ms-pl, ncsa, odbl, odc-by, ofl-1.1, openrail, openrail++, osl-3.0, pddl, postgresql, unlicense, wtfpl, zlib
"""
HUB_LICENSES = frozenset(_IDS.replace(",", " ").split())
"""Identifiers that a model card may use; any other license is `other` with a name."""


def check_license(license: str) -> None:
    """Raise UserError if `license` is nearly an identifier: as it is, the card would declare it a custom license."""
    slug = license_slug(license)
    near = difflib.get_close_matches(slug, HUB_LICENSES, n=1, cutoff=0.85)
    if slug not in HUB_LICENSES and near:
        raise UserError(f"--license is {license!r}: did you mean {near[0]}? Give a custom license a clearer name")


def license_slug(license: str) -> str:
    """Return the identifier of a license, or a custom name in the same format."""
    return re.sub(r"[^a-z0-9.+]+", "-", license.lower()).strip("-")
