"""Masks secrets in text before it is shown or kept: signed addresses, passwords and tokens.

The terminal, logs, configurations, checkpoints, reports and cards get masked text only.
"""

import re
from typing import Any

_MASK = "***"
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), f"{_MASK}@"),  # user:password@
    (  # signatures in a query
        re.compile(r"(://[^\s?'\"<>]*?\?)[^\s'\"<>{},|]+?(?=::|:?(?:[\s'\"<>{},|]|$))"),
        rf"\1{_MASK}",
    ),
    (re.compile(r"(?i)\b(bearer|:\s*basic)\s+[\w.~+/=-]{8,}"), rf"\1 {_MASK}"),
    (
        re.compile(
            r"(?i)\b(authorization\s*:\s*(?:(?:bearer|basic|digest|token|aws4-hmac-sha256)\s+)?)"
            r"[^'\"\n]+"
        ),
        rf"\1{_MASK}",
    ),
    (re.compile(r"(?i)\b(cookie\s*:\s*)[^'\"\n]+"), rf"\1{_MASK}"),
    (  # TOKEN=..., X-Auth-Token: ..., --token ...
        re.compile(
            r"(?i)((?:\b|(?P<flag>--))[\w-]*"
            r"(?:token(?!s)|secret|passw(?:or)?d|api[_-]?key|access[_-]?key)"
            r"[\w-]*(?:=|:\s+|(?(flag)\s+|(?!))))[^\s'\"&]+"
        ),
        rf"\1{_MASK}",
    ),
    (  # flags of curl and wget: user:password, and cookies
        re.compile(
            r"((?:^|\s)(?:-u|-U|-E|--user|--proxy-user|--cert)[\s=]?['\"]?)[^\s:'\"]+:[^\s'\"]+"
        ),
        rf"\1{_MASK}",
    ),
    (
        re.compile(
            r"((?:^|\s)(?:-b|--cookie)[\s=]?)(?:'[^'\n]*=[^'\n]*'|\"[^\"\n]*=[^\"\n]*\"|[^\s'\"]+=\S+)"
        ),
        rf"\1{_MASK}",
    ),
    (re.compile(r"\b(?:hf|ghp|gho|ghs|github_pat)_\w{20,}|\bglpat-[\w-]{16,}"), _MASK),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), _MASK),  # a JSON web token
)
_SIGNS = ("://", "=", ":", "earer", "asic", "hf_", "gh", "github_pat", "glpat-", "eyJ", "--")


def mask(text: str) -> str:
    """The text without secrets.

    Of an address, the user name with its password and the query are masked; of a command, also
    headers and flags with credentials, and values of names such as `token` or `api_key`.
    """
    if not any(sign in text for sign in _SIGNS):
        return text
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def mask_tree(tree: Any) -> Any:  # noqa: ANN401  any nested plain value
    """Nested plain values with all their texts masked."""
    if isinstance(tree, dict):
        return {key: mask_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [mask_tree(value) for value in tree]
    return mask(tree) if isinstance(tree, str) else tree
