"""Who may do what: bearer tokens of tenants, requests of other sites' pages, TLS."""

import hashlib
import hmac
import re
import ssl
from pathlib import Path
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from anabranch.run.config import ConfigError, ServeConfig

_LOCAL = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
"""A `Host` that stands for this machine."""


class Tenant(NamedTuple):
    """A token: whose it is, its hash, and whether it shows the figures of the whole server."""

    name: str
    digest: str
    operator: bool = False


class Access:
    """Tells whose a request is.

    Raises:
        ConfigError: if the file of tokens cannot be read.
    """

    def __init__(self, serve: ServeConfig):
        self.tenants = _tenants(serve.tokens)
        self.local = serve.host == "::1" or bool(_LOCAL.fullmatch(serve.host))

    @property
    def guarded(self) -> bool:
        """Whether there are tokens."""
        return self.tenants is not None

    def who(self, connection: HTTPConnection) -> Tenant:
        """Whose request this is.

        Raises:
            HTTPException: 401, if the server has tokens and the request has none of them; 403, if it has none, and a
                page of another site sends this.
        """
        if self.tenants is None:
            self._refuse_foreign(connection.headers)
        return self.authorize(connection.headers.get("authorization", ""))

    def _refuse_foreign(self, headers: Headers) -> None:
        """Refuse what a page of another site sends: a browser would carry it to a server that asks for no token."""
        origin, host = headers.get("origin"), headers.get("host")
        if origin is not None and origin.partition("://")[2] != host:
            raise HTTPException(403, f"Origin: {origin!a} is another site than {host!a}")
        # A page can also give its own name the address of this machine.
        if host and self.local and not _LOCAL.fullmatch(host):
            raise HTTPException(403, f"Host: {host!a} is not this machine, and without tokens only it is served")

    def authorize(self, header: str) -> Tenant:
        """The tenant with this `Authorization` header.

        Raises:
            HTTPException: 401, if the server has tokens and this is none of them.
        """
        if self.tenants is None:
            return Tenant("", "", operator=True)
        kind, _, token = header.partition(" ")
        digest, found = hashlib.sha256(token.encode()).hexdigest(), None
        for tenant in self.tenants:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, tenant.digest):
                found = tenant
        if found is None or kind.lower() != "bearer":
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        return found


def _tenants(path: Path | None) -> list[Tenant] | None:
    """Who has a token."""
    if path is None:
        return None
    found, line = [], re.compile(r"([^\s/]+) ([0-9a-f]{64})( operator)?")
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        if (said := line.fullmatch(text.strip())) is None:
            raise ConfigError(
                f"{path}: line {number}: expected TENANT SHA256, a name without '/' and 64 hex digits, "
                "and after them at most 'operator'"
            )
        found.append(Tenant(said[1], said[2], operator=said[3] is not None))
    return found


def check_tls(serve: ServeConfig) -> None:
    """Raise ConfigError if TLS is half configured, or the certificate and the key do not fit."""
    if serve.certificate is None and serve.key is None:
        return
    if serve.certificate is None or serve.key is None:
        there, missing = ("certificate", "key") if serve.key is None else ("key", "certificate")
        raise ConfigError(f"serve.{missing}: needed beside serve.{there}")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(serve.certificate, serve.key, "")
    except (OSError, ValueError) as error:
        raise ConfigError(f"serve.certificate, serve.key: {serve.certificate}, {serve.key}: {error}") from error
