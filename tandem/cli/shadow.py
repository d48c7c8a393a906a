"""`tandem models shadow`: a candidate sees a share of what an alias is asked, and nobody waits for it."""

from typing import TYPE_CHECKING, Any

import click

from tandem.checkpoints.references import ModelReference, parse_reference
from tandem.cli.calls import open_client
from tandem.cli.output import json_option, print_json
from tandem.errors import InvalidReference, ModelNotFound

if TYPE_CHECKING:
    from tandem.client import Client, ShadowReport


@click.command()
@click.argument("reference", metavar="[NAME@ALIAS]", required=False)
@click.option("--candidate", metavar="NAME:VERSION", help="Start: the version that is to see the calls as well.")
@click.option("--share", type=float, help="Of the calls, above 0 and at most 1.  [default: 0.1]")
@click.option("--stop", is_flag=True, help="End it, and show once more what it has found.")
@json_option
def shadow(reference: str | None, candidate: str | None, share: float | None, stop: bool, as_json: bool) -> None:
    """Let a candidate see a share of the Classify calls of NAME@ALIAS, and show how the two compare.

    With --candidate it begins; without, it is shown what was found so far: agreement, kappa, Jensen-Shannon divergence
    and, of calls whose images have labels, the paired table. Without NAME@ALIAS all of the server's are shown. NAME
    alone is NAME@latest. Callers are answered by the alias's version alone. The server forgets it when it stops.

    --json prints {name, alias, share, age_s, ended, num_seen, num_shadowed, num_waiting, num_dropped} and the fields of
    `compare`, but for its images; an array of such without NAME@ALIAS.
    """
    _check_usage(reference, candidate, share, stop)
    with open_client() as client:
        if reference is None:
            _show_all(client.get_shadows(), as_json)
        else:
            _show(_ask(client, _alias(reference), candidate, share, stop), as_json)


def _check_usage(reference: str | None, candidate: str | None, share: float | None, stop: bool) -> None:
    if reference is None and (candidate or stop):
        raise click.UsageError("give NAME@ALIAS")
    if candidate and stop:
        raise click.UsageError("give --candidate or --stop, one of the two")
    if share is not None and not candidate:
        raise click.UsageError("--share goes with --candidate")


def _alias(reference: str) -> ModelReference:
    parsed = parse_reference(reference)
    if not isinstance(parsed, ModelReference) or parsed.version is not None:
        raise InvalidReference(f"{reference} is no alias: a shadow is of the calls of NAME@ALIAS")
    return parsed


def _ask(
    client: "Client", parsed: ModelReference, candidate: str | None, share: float | None, stop: bool
) -> "ShadowReport":
    name, alias = parsed.name, parsed.alias
    if candidate:
        return client.start_shadow(name, alias, candidate, 0.1 if share is None else share)
    if stop:
        return client.stop_shadow(name, alias)
    for report in client.get_shadows(name, alias):
        return report
    raise ModelNotFound(f"{name}@{alias} has no shadow on this server: --candidate NAME:VERSION starts one")


def _show_all(reports: "tuple[ShadowReport, ...]", as_json: bool) -> None:
    if as_json:
        print_json([_document(report) for report in reports])
        return
    for number, report in enumerate(reports):
        if number:
            click.echo()
        _print(report)
    if not reports:
        click.echo("no shadows on this server")


def _show(report: "ShadowReport", as_json: bool) -> None:
    if as_json:
        print_json(_document(report))
    else:
        _print(report)


def _document(report: "ShadowReport") -> dict[str, Any]:
    from tandem.cli.compare import summary_document

    return {
        "name": report.name,
        "alias": report.alias,
        "share": report.share,
        "age_s": report.age_s,
        "ended": report.ended or None,
        "num_seen": report.num_seen,
        "num_shadowed": report.num_shadowed,
        "num_waiting": report.num_waiting,
        "num_dropped": report.num_dropped,
        **summary_document(report.summary),
    }


def _print(report: "ShadowReport") -> None:
    from tandem.cli.compare import print_summary

    summary = report.summary
    click.echo(f"{summary.b.label} sees {report.share:.3g} of the calls of {report.name}@{report.alias}")
    if report.ended:
        click.echo(f"it has ended: {report.ended}")
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in report.num_dropped.items() if count) or "none"
    click.echo(
        f"images: {report.num_seen:,} came, {report.num_shadowed:,} were seen by both, {report.num_waiting:,} wait; "
        f"dropped: {dropped}"
    )
    if summary.num_images:
        click.echo()
        print_summary(summary)
