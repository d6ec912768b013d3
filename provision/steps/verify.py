"""Step 7: green means tokens: a real decode through the real endpoint, equal to the golden ids."""

from __future__ import annotations

import datetime
import json

from engine.errors import HaloError
from provision import endpoint, generations
from provision.context import Action, Context
from provision.desired import is_loopback
from provision.files import atomic_write
from provision.steps.model import prove


def plan(ctx: Context) -> list[Action]:
    """Verification changes nothing but the receipt."""
    if generations.blessed(ctx.layout, ctx.name):
        return []
    return [Action("decode the golden prompt and compare its token ids", "green means tokens")]


def apply(ctx: Context) -> str:
    """Prove the generation; returns how. Raises HaloError when it decodes wrongly or does not answer."""
    manifest = generations.read_manifest(ctx.directory)
    if manifest is None:
        raise HaloError(f"Generation {ctx.name} has no manifest.", hint="run the install again")
    golden = manifest["model"]["golden"][0]
    if ctx.served:
        answer = endpoint.wait_for_generation(ctx.desired.listen, ctx.name, ctx.screen.tick)
        key = None if is_loopback(ctx.desired.listen) else ctx.layout.api_key
        ids, text = endpoint.decode(ctx.desired.listen, golden, key)
        how = f"{len(ids)} golden tokens through http://{ctx.desired.listen} ({answer.get('backend', '?')})"
    else:
        report = prove(ctx, str(ctx.directory / "models/default"))
        ids, text = [int(token) for token in report["ids"]], str(report["text"])
        how = f"{len(ids)} golden tokens through the engine itself; no server was asked"
    endpoint.check_golden(ids, golden)
    ctx.sentence = golden["prompt"] + text
    bless(ctx, how)
    return how


def bless(ctx: Context, how: str) -> None:
    """Record that the generation proved itself, and what the owner declared; then let old ones go."""
    layout = ctx.layout
    if not generations.blessed(layout, ctx.name):
        with ctx.change("verify", f"bless {ctx.name}"):
            layout.receipts.mkdir(parents=True, exist_ok=True)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            receipt = {"schema": 1, "id": ctx.name, "at": now, "proof": how, "changes": ctx.changes}
            atomic_write(layout.receipts / f"{ctx.name}.json", json.dumps(receipt, indent=1) + "\n")
    if not layout.config.is_file() or layout.config.read_text() != ctx.desired.text():
        with ctx.change("verify", f"write {layout.config}"):
            atomic_write(layout.config, ctx.desired.text())
    gone = generations.collect(layout)
    if gone:
        ctx.changes.append(f"removed old generations {', '.join(gone)}")
