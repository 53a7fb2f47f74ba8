"""What is asked of a server, and which: https, and plain http from this machine only."""

import os
import ssl
from urllib.parse import urlsplit

import requests

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def check_certificates(path: str) -> None:
    """ValueError: the file that REQUESTS_CA_BUNDLE or its like names holds no certificates."""
    name = next((name for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if os.environ.get(name) == path), "")
    try:
        if not os.path.isdir(path):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as e:
        why = "has no certificates" if isinstance(e, ssl.SSLError) else f"cannot be read: {e.strerror}"
        raise ValueError(f"{path}, which {name} names, {why}; name a file of certificates (PEM), or unset it") from e


class HTTPS(requests.adapters.HTTPAdapter):
    """Looks at the certificates first: what requests says of them names neither the variable nor the way out."""

    def send(self, request, verify=True, **kwargs):
        if isinstance(verify, str):
            check_certificates(verify)
        return super().send(request, verify=verify, **kwargs)


class LocalHTTP(requests.adapters.HTTPAdapter):
    """Lets plain http through to this machine only, and not by a proxy. Redirects too, before anything is sent."""

    def send(self, request, **kwargs):
        kwargs["proxies"] = {}
        if urlsplit(request.url).hostname not in LOCAL_HOSTS:
            raise ValueError(
                f"{request.url} is not fetched: only https is, except from {', '.join(LOCAL_HOSTS)}; "
                "set GPT2_BASE_URL to an https address that redirects to https only"
            )
        return super().send(request, **kwargs)


class Session(requests.Session):
    """A session of these two, for redirects to addresses that are none too."""

    def __init__(self):
        super().__init__()
        self.mount("https://", HTTPS())
        self.mount("http://", LocalHTTP())

    def get_redirect_target(self, response):
        target = super().get_redirect_target(response)
        try:
            urlsplit(target or "")
        except ValueError as e:
            raise requests.exceptions.InvalidURL(f"it redirects to {target!r}, which is no address: {e}") from e
        return target
