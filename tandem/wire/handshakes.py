"""Why client and server did not come to speak with each other, in one line with the remedy."""

from tandem.access import CA_FILE, CLIENT_CERT_FILE

# What gRPC's core says of a failed handshake, in the words of BoringSSL; the first row that fits counts.
_REASONS = (
    (
        "certificate has expired",
        "its certificate has expired: it has to be renewed at the server, which takes a new one without a restart",
    ),
    ("certificate is not yet valid", "its certificate is not valid yet: compare the clocks of both machines"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        f"its certificate is of no authority in {CA_FILE}: name the authority that signed it",
    ),
    (
        "Hostname Verification",
        "its certificate is for another name: call it by a name that the certificate has",
    ),
    ("WRONG_VERSION_NUMBER", f"it does not speak TLS: leave {CA_FILE} out, or give the server a certificate"),
)
# Before a connection stands nothing else is said by a server that wants other credentials.
_CLOSED = ("Socket closed", "Connection reset", "closed the connection", "Broken pipe")


def is_final(details: str) -> bool:
    """Return whether the handshake failed for a reason that does not pass; a proxy hangs up while its server starts."""
    return bool(_refusal(details))


def tls_problem(details: str, address: str, is_encrypted: bool) -> str:
    """Return what is wrong with the TLS of a connection to `address`, "" where nothing of `details` says so.

    `details` is the text of gRPC's UNAVAILABLE; `is_encrypted` says whether the client speaks TLS.
    """
    if reason := _refusal(details):
        return f"the inference server at {address} can't be trusted or understood: {reason}"
    # A connection that stood and was lost says the same without these words.
    if not details.startswith("failed to connect") or not any(words in details for words in _CLOSED):
        return ""
    if is_encrypted:
        return f"{address} hung up: if it wants a certificate of its clients, name one it trusts in {CLIENT_CERT_FILE}"
    return f"{address} hung up: if it speaks TLS, name the authority of its certificate in {CA_FILE}"


def _refusal(details: str) -> str:
    found = (reason for words, reason in _REASONS if words in details)
    return next(found, "") if details.startswith("failed to connect") else ""
