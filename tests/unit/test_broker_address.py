"""Addresses of brokers: read, written for both clients, and shown without what is secret."""

import ssl
from pathlib import Path

import pytest
from kombu import Connection
from redis.connection import SSLConnection

from tandem.errors import InvalidRequest
from tandem.jobs.broker import Broker, Tls, parse_url, read_broker
from tandem.jobs.queue import make_celery
from tandem.jobs.store import JobStore, connect
from tandem.settings import Settings

SECRET = "p@:/%#;?&w ä"
ENCODED = "p%40%3A%2F%25%23%3B%3F%26w%20%C3%A4"


@pytest.mark.parametrize(
    ("url", "broker", "shown"),
    [
        ("redis://h", Broker("h"), "redis://h:6379/0"),
        ("redis://h:7/3", Broker("h", 7, db=3), "redis://h:7/3"),
        ("redis://h:7?db=3", Broker("h", 7, db=3), "redis://h:7/3"),
        ("redis://[::1]:7/0", Broker("::1", 7), "redis://[::1]:7/0"),
        ("redis://[::1]", Broker("::1"), "redis://[::1]:6379/0"),
        (f"redis://:{ENCODED}@h:7/0", Broker("h", 7, password=SECRET), "redis://h:7/0"),
        ("redis://:p@h", Broker("h", password="p"), "redis://h:6379/0"),
        ("redis://u:a@b@h:7", Broker("h", 7, username="u", password="a@b"), "redis://h:7/0"),
        ("rediss://u:p@h:7", Broker("h", 7, username="u", password="p", tls=Tls()), "rediss://h:7/0"),
        ("rediss://h?ssl_cert_reqs=required", Broker("h", tls=Tls()), "rediss://h:6379/0"),
        ("unix:///a/b.sock?db=2", Broker(path="/a/b.sock", db=2), "redis+socket:///a/b.sock?virtual_host=2"),
        (
            f"redis+socket://:{ENCODED}@/a%20b@c/d.sock?virtual_host=1",
            Broker(path="/a b@c/d.sock", db=1, password=SECRET),
            "redis+socket:///a%20b%40c/d.sock?virtual_host=1",
        ),
    ],
)
def test_an_address_is_read_and_shown_without_its_password(url: str, broker: Broker, shown: str) -> None:
    assert parse_url(url) == broker
    assert str(broker) == shown
    assert parse_url(shown) == Broker(broker.host, broker.port, broker.path, broker.db, tls=broker.tls)


def test_celery_gets_the_same_as_redis_py() -> None:
    broker = Broker("h", 7, "", 2, "u@", SECRET)
    celery_side = make_celery(broker).connection_for_write()
    client_side = connect(broker).connection_pool.connection_kwargs
    assert (celery_side.hostname, celery_side.port) == (client_side["host"], client_side["port"]) == ("h", 7)
    assert (celery_side.userid, celery_side.password) == (client_side["username"], client_side["password"])
    assert (celery_side.virtual_host, client_side["db"], client_side["password"]) == ("2", 2, SECRET)


def test_both_clients_check_certificate_and_host_name() -> None:
    broker = Broker("h", 7, tls=Tls(Path("/ca"), Path("/crt"), Path("/key")))
    options = make_celery(broker).connection_for_write().ssl
    assert isinstance(options, dict)
    celery_side = SSLConnection(**options)
    client_side = connect(broker).connection_pool.make_connection()
    for connection in (celery_side, client_side):
        assert isinstance(connection, SSLConnection)
        assert (connection.cert_reqs, connection.check_hostname) == (ssl.CERT_REQUIRED, True)
        assert (connection.ca_certs, connection.certfile, connection.keyfile) == ("/ca", "/crt", "/key")


def test_a_password_shows_nowhere(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(SECRET + "\n")
    variables = {"TANDEM_REDIS_URL": "redis://u@h", "TANDEM_REDIS_PASSWORD_FILE": str(tmp_path / "password")}
    settings = Settings.from_environment(variables)
    assert settings.broker == Broker("h", username="u", password=SECRET)
    app = make_celery(settings.broker)
    shown = (
        repr(settings),
        str(settings.broker),
        repr(settings.broker),
        repr(JobStore(connect(settings.broker), settings.broker)),
    )
    connection: Connection = app.connection_for_write()
    for text in (*shown, connection.as_uri(), repr(connection)):
        assert SECRET not in text
        assert ENCODED not in text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hunter2@h", "begins with none of"),
        ("http://:hunter2@h", "begins with none of"),
        ("redis://:hun/hunter2@h:1/0", "percent-encoded"),
        ("redis://u:12/hunter2@h/0", "database is no number"),
        ("redis://:hunter2#x@h", "percent-encoded"),
        ("redis://:x@h?hunter2@h", "percent-encoded"),
        ("redis://:1?hunter2@h", "percent-encoded"),
        ("redis://:hunter2\u2100@h", "malformed"),
        ("redis://:hunter2@h:99999", "port is no number"),
        ("redis://:hunter2@[h", "is no Redis address"),
        ("redis://:hunter2@h/one", "database is no number"),
        ("unix://:hunter2@a/b.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("rediss://:hunter2@h?ssl_cert_reqs=none", "always checked"),
        ("rediss://:hunter2@h?ssl_check_hostname=false", "only options are db"),
    ],
)
def test_what_is_no_address_is_refused_in_a_line_without_the_password(url: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        Settings.from_environment({"TANDEM_REDIS_URL": url})
    assert "TANDEM_REDIS_URL" in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PASSWORD_FILE": "missing"}, "PASSWORD_FILE=.*missing can't be read: No such file"),
        ({"PASSWORD_FILE": "empty"}, "PASSWORD_FILE=.*empty must hold the password alone"),
        ({"PASSWORD_FILE": "two lines"}, "PASSWORD_FILE=.*two lines must hold the password alone"),
        ({"PASSWORD_FILE": "bytes"}, "PASSWORD_FILE=.*bytes can't be read"),
        ({"PASSWORD_FILE": "one", "URL": "redis://:p@h"}, "keep one of them"),
        ({"CA_FILE": "one", "URL": "redis://h"}, "CA_FILE is set, but redis://h:6379/0 is not encrypted"),
        ({"CA_FILE": "missing"}, "CA_FILE=.*missing is no certificate in PEM: No such file"),
        ({"CA_FILE": "one"}, "CA_FILE=.*one is no certificate in PEM"),
        ({"CERT_FILE": "one"}, "go together"),
        ({"CERT_FILE": "one", "KEY_FILE": "one"}, "are no certificate with its key"),
    ],
)
def test_files_that_can_not_serve_are_named(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    contents = {"empty": b"\n", "two lines": b"user\npassword\n", "bytes": b"\xff\xfe", "one": b"p\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = {name: str(tmp_path / value) for name, value in variables.items() if name != "URL"}
    environment = {"URL": "rediss://h", **variables, **paths}
    with pytest.raises(InvalidRequest, match=message):
        read_broker({f"TANDEM_REDIS_{name}": value for name, value in environment.items()})


def test_a_password_file_may_end_in_any_line_ending_and_keep_its_spaces(tmp_path: Path) -> None:
    for ending in ("", "\n", "\r\n"):
        (tmp_path / "p").write_bytes(f" p {ending}".encode())
        broker = read_broker({"TANDEM_REDIS_URL": "redis://h", "TANDEM_REDIS_PASSWORD_FILE": str(tmp_path / "p")})
        assert broker is not None
        assert broker.password == " p "


def test_files_without_an_address_belong_to_no_broker(tmp_path: Path) -> None:
    assert read_broker({"TANDEM_REDIS_PASSWORD_FILE": str(tmp_path / "missing")}) is None
