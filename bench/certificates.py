"""A certificate authority of an hour's use, for scenarios whose upstream speaks https."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM form: the authority, and a server's certificate for loopback with its key."""

    ca_file: Path
    cert_file: Path
    key_file: Path


def make_certificates(folder: Path) -> Certificates:
    """Make new certificates. Raises ModuleNotFoundError without the package trustme."""
    import trustme

    made = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(made.ca_file))
    made.ca_file.chmod(0o644)  # nginx's worker is another user
    with made.cert_file.open("wb") as file:
        file.writelines(blob.bytes() for blob in issued.cert_chain_pems)
    issued.private_key_pem.write_to_path(str(made.key_file))
    return made
