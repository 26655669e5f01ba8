"""What does the address of a file or folder say? It is taken literally, and no secret is shown.

    PATH, file://PATH            on this machine
    s3://BUCKET/KEY              all behind the first slash is the key: also #, ?, % and //
    http://HOST/PATH?QUERY       escapes stay (%20), what needs one gets one; the query, which may
                                 be a signature, is sent with each request

A user and a password of a web server (http://USER:PASSWORD@HOST/...) are kept apart from the
address by `take_login`, for this process and those that it starts. A run's config.json has none:
the command that continues the run gives them again, or they stand in ~/.netrc.
"""

import json
import netrc
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from mocov3_ds.settings.paths import expand_user

_WEB = ("http://", "https://")
LOGINS = "MOCOV3_HTTPLOGINS"
"""Variable for this program's own processes: JSON, USER:PASSWORD by SCHEME://HOST."""
_ONE_SLASH = re.compile(r"(s3|gs|az|https?):/(?!/)")
_LOGIN = re.compile(r"://[^/?#\s]*@")
_SECRET_PARAMETER = re.compile(
    r"([?&][^=&#\s]*(?:sig|token|secret|credential|passw|key|auth|policy)[^=&#\s]*=)[^&#\s'\")]*",
    re.IGNORECASE,
)
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"
_SAFE_IN_NAME = "/:@!$&'()*+,;=~-._"


class Address(NamedTuple):
    """A file or folder of a store."""

    bucket_url: str
    """SCHEME://BUCKET or SCHEME://HOST"""
    key: str
    """what the store calls the file; for web servers path and query, escaped"""


def is_local(url: str) -> bool:
    """Whether a URL names a file or folder of this machine."""
    return "://" not in url or url.startswith("file://")


def is_web(url: str) -> bool:
    """Whether a URL names a file or folder of a web server."""
    return url.startswith(_WEB)


def local_path(url: str) -> Path:
    """Return the path that a local URL names, with `~` expanded.

    Raises:
        ValueError: It begins as the URL of a store does, but has one slash alone.
    """
    if match := _ONE_SLASH.match(url):
        raise ValueError(
            f"{hide_secrets(url)} would be a folder of this machine; for a store write "
            f"{match[1]}://, for such a folder ./{match[1]}:/."
        )
    return expand_user(url.removeprefix("file://"))


def join_url(url: str, name: str) -> str:
    """Return the URL of a file in a folder; the name is literal, without escapes.

    Raises:
        ValueError: The folder is empty text, which would be the root of this machine.
    """
    if not url:
        raise ValueError("the address is empty text; `.` names the folder where this is run.")
    if is_local(url):
        return f"{url.rstrip('/')}/{name}"
    folder, mark, query = _split_query(url)
    name = quote(name, safe=_SAFE_IN_NAME) if is_web(url) else name
    return f"{folder}{'' if folder.endswith('/') else '/'}{name}{mark}{query}"


def split_file_url(url: str) -> tuple[str, str]:
    """Return the folder and the name of which `join_url` makes the URL of a file."""
    address, mark, query = _split_query(url)
    folder, _, name = address.rpartition("/")
    return f"{folder}{mark}{query}", unquote(name) if is_web(url) else name


def folder_url(url: str, name: str) -> str:
    """Return the URL of a folder that is given itself or by a file in it.

    Args:
        url: URL of the folder, or of the file `name` in it.
        name: Name of the file.
    """
    folder, mark, query = _split_query(url)
    folder = folder.removesuffix("/" + name)
    if is_local(url):
        return folder.rstrip("/") or "/"
    if folder.endswith("/") and not folder.endswith("//"):  # a double slash belongs to the key
        folder = folder[:-1]
    return f"{folder}{mark}{query}"


def split_url(url: str) -> Address:
    """Return the store and the key that a URL names.

    Raises:
        ValueError: The URL names no store, or holds what is no part of an address.
    """
    scheme, _, location = url.partition("://")
    if is_web(url):
        return _split_web_url(url)
    bucket, _, key = location.partition("/")
    if not bucket:
        raise ValueError(f"{url} names no bucket; write {scheme}://BUCKET/FOLDER.")
    if "@" in bucket:
        raise ValueError(
            f"{hide_secrets(url)}: a user or key in front of @ is not used; credentials of a store "
            "come from its own variables and files (AWS_*, GOOGLE_*, AZURE_*)."
        )
    return Address(f"{scheme}://{bucket}", key)


def _split_web_url(url: str) -> Address:
    try:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"{hide_secrets(url)} names no server; write http://HOST/FOLDER.")
        _ = parts.port
    except ValueError as error:
        if "names no server" in str(error):
            raise
        # the address is not repeated, as what stands there may be a password
        raise ValueError(
            f"an address that begins with {url.partition('://')[0]}:// has no server that can be "
            "read; in a user name or password write %2F for /, %3F for ?, %23 for # and %40 for @."
        ) from None
    if parts.fragment or url.endswith("#"):
        raise ValueError(
            f"{hide_secrets(url)}: no server gets to see what follows #; leave it out, or write "
            "%23 for a # in a name."
        )
    server = parts.netloc.rpartition("@")[2]
    path = re.sub("%(?![0-9a-fA-F]{2})", "%25", parts.path) or "/"
    target = quote(path, safe=_SAFE_IN_PATH)
    _, mark, query = url.partition("?")
    return Address(f"{parts.scheme}://{server}", target + mark + query.replace(" ", "%20"))


def _split_query(url: str) -> tuple[str, str, str]:
    """Address, `?` and query of a web server's URL; elsewhere a `?` is a character of the key."""
    return url.partition("?") if is_web(url) else (url, "", "")


# ---------------------------------------------------------------------------------------- secrets


def hide_secrets(text: str) -> str:
    """Return an address, or a text with addresses, without what signs in with them.

    Args:
        text: Text to be shown or stored; a user and a password go, and so do the values of query
            parameters that sign (`sig`, `X-Amz-Signature`, `token`, ...).
    """
    return _SECRET_PARAMETER.sub(r"\1...", _LOGIN.sub("://", text))


def take_login(url: str) -> str:
    """Return a web server's URL without user and password, and remember these for its server.

    Args:
        url: Any URL or path.
    """
    if not is_web(url) or not _LOGIN.match(url[url.index("://") :].partition("?")[0]):
        return url
    login, _, server = urlsplit(url).netloc.rpartition("@")
    scheme = urlsplit(url).scheme
    logins = {**json.loads(os.environ.get(LOGINS) or "{}"), f"{scheme}://{server}": login}
    os.environ[LOGINS] = json.dumps(logins)
    return _LOGIN.sub("://", url, count=1)


def find_login(bucket_url: str) -> tuple[str, str] | None:
    """Return user and password for a web server, from its URL or from ~/.netrc.

    Args:
        bucket_url: SCHEME://HOST of the server.

    Raises:
        ValueError: The file that the variable NETRC names, or ~/.netrc, is malformed.
    """
    login = json.loads(os.environ.get(LOGINS) or "{}").get(bucket_url)
    if login is not None:
        user, _, password = login.partition(":")
        return unquote(user), unquote(password)
    path = expand_user(os.environ.get("NETRC") or "~/.netrc")
    try:
        credentials = netrc.netrc(path).authenticators(urlsplit(bucket_url).hostname or "")
    except OSError:
        return None
    except (netrc.NetrcParseError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read as a netrc file; correct it.") from None
    return None if credentials is None else (credentials[0], credentials[2] or "")


# ------------------------------------------------------------------------- lists of several files


def explain_pattern(url: str) -> str:
    """Say what to do with an address that is webdataset's list of tars; empty = it is none.

    Args:
        url: An address at which there is nothing.
    """
    path = _split_query(url)[0]
    if re.match("(.*/)?pipe:", url):
        return (
            f"{hide_secrets(url)!r} is a command; samples are read by range, which a pipe cannot. "
            "Give the folder or URL of the tars with their manifest.json."
        )
    if "::" in url or re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}|[*\[]", path):
        first = path.partition("::")[0]
        folder = first.rpartition("/")[0] or "."
        return (
            f"{hide_secrets(url)!r} is a list of tars; a set is named by the folder of its "
            f"manifest.json. Describe the tars once with python -m data_prep index {folder}, then "
            f"give {folder}."
        )
    return ""
