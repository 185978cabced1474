"""`scalecryo verify`: is a store what its conversion wrote."""

import time
from collections.abc import Iterable

from scalecryo.commands.console import note, say
from scalecryo.data.conversion.shard_task import PENDING
from scalecryo.data.conversion.verify import Finding, check_objects, compare_with_source
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, MissingInputError, StoreError
from scalecryo.physics.threads import one_torch_thread


def run(store: str, *, full: bool) -> None:
    """Check every object against the manifests and rows against the source; name everything that is wrong."""
    opened = ParticleStore.open(store)
    shown = urls.redacted(store)
    checked, size, problems = _collect(check_objects(opened))
    say(f"{shown}: {checked:,} objects, {size / 1e6:,.1f} MB, checked against the manifests")
    if urls.list_folder(urls.join(store, PENDING)):
        note("particles were being added when that was interrupted: run the same `scalecryo convert --append` again")
    if not problems:
        try:
            with one_torch_thread():
                *_, problems = _collect(compare_with_source(opened, full))
            say(f"{shown}: {'every particle' if full else 'a sample of particles'} compared with the source")
        except (MissingInputError, InputError) as error:
            note(f"particles not compared with their source: {error}")
    if problems:
        for problem in problems:
            note(problem)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StoreError(f"{problems[0]}{more}; convert again with --overwrite")
    say(f"{shown}: sound")


def _collect(findings: Iterable[Finding]) -> tuple[int, int, list[str]]:
    """How many checks, how many bytes, and what is wrong; notes progress every few seconds."""
    told = time.monotonic()
    count, size, problems = 0, 0, []
    for finding in findings:
        count, size = count + 1, size + finding.bytes
        if finding.problem:
            problems.append(finding.problem)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            note(f"{count:,} checked, {size / 1e6:,.0f} MB")
    return count, size, problems
