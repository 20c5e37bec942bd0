"""The key of a run: what its jobs show each other, and nobody else has.

A file with a private key and a certificate that it has signed itself. Both ends of a link show that certificate and
trust no other, so TLS 1.3 refuses a stranger before anything of the run is read. It names no host and no end of its
time: jobs may move, and a clock may be off.
"""

from __future__ import annotations

import os
import ssl
from datetime import datetime
from pathlib import Path

from llm_local.config import from_here
from llm_local.files import writing

_FIRST, _LAST = datetime(1970, 1, 2), datetime(9999, 12, 31)


def make_key(path: Path) -> None:
    """Writes a new key, readable by its owner alone. Raises FileExistsError, and Unwritten."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "llm_local run")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(_FIRST).not_valid_after(_LAST)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem += made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    if path.exists():
        raise FileExistsError(f"{path} exists; other jobs may use that key: name another file, or remove it")
    with writing(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


def key_problems(path: Path) -> list[str]:
    """What keeps the file from being the key of a run."""
    named = f"run_key_file={path}"
    try:
        mode = path.stat().st_mode
        if mode & 0o077:
            return [f"{named} can be read by others (mode {mode & 0o777:o}); chmod 600 it, or make a new one"]
        tls(path, server=True)
    except ssl.SSLError:
        if b"ENCRYPTED" in path.read_bytes():
            return [f"{named} has a passphrase, which no job can be asked for; use one of llm-local key, without"]
        return [f"{named} is no key of llm-local key; copy the file that the other jobs have"]
    except OSError as error:
        return [
            f"{named}{from_here(path)} cannot be read ({error.strerror}); make it with llm-local key, once for all jobs"
        ]
    return []


def tls(path: Path, server: bool) -> ssl.SSLContext:
    """What makes a connection of two that have the key. Raises OSError, of which SSLError is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(path, password="")  # else OpenSSL asks the terminal for one
    context.load_verify_locations(path)
    if server:
        context.num_tickets = 0  # nobody comes back but with the key
    return context
