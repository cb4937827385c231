"""The built-in domains, one line each. Importing this package needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from common.domain import Domain
from domains import medical, protein, speech, vision

DOMAINS: Mapping[str, Domain] = {
    domain.name: domain for domain in (vision.DOMAIN, medical.DOMAIN, protein.DOMAIN, speech.DOMAIN)
}
